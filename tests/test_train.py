"""train.py and infer.py as a user meets them, at a small size."""

import csv
import io
import json
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import infer
import train
from crab_min import trainer
from crab_min.backbones.composed import load_base
from crab_min.cli import parse_train
from crab_min.config import AdapterConfig
from crab_min.data import read_samples
from crab_min.errors import RunError
from crab_min.evaluation.answering import plan_batches
from crab_min.model import AVLanguageModel
from crab_min.recipes import crab
from crab_min.runs import folder as run_folder
from crab_min.runs.folder import SavedRun, choose_folder, lock_run
from crab_min.trained_parts import copy_to_cpu

ROOT = Path(__file__).parents[1]
SMALL = "--steps 6 --batch-size 4 --grad-accum 1 --save-every 2 --r 4 --alpha 8".split()


def few_rows(world: Path, *flags: str) -> list[str]:
    """Return flags for a run on 16 training rows, which are decoded without workers."""
    return ["--data", str(world), "--tasks", "ks,s4", "--test-rows", "1", *flags]


def read_log(run: Path) -> list[dict[str, str]]:
    """Return the rows of log.csv without those columns that depend on the clock."""
    with open(run / "log.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"], row["wait"]
    return rows


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def wait_for(happened: Callable[[], bool], process: subprocess.Popen, seconds: float = 600) -> None:
    """Wait until something has happened; fail where the process ends before that."""
    deadline = time.time() + seconds
    while not happened():
        if time.time() > deadline:
            process.kill()
        assert process.poll() is None
        time.sleep(0.01)


def interrupt_in_step(number: int, monkeypatch) -> None:
    """Let the next run be interrupted in its N-th step, before a weight changes."""
    update, calls = trainer.update, []

    def interrupted(*arguments) -> float:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr(trainer, "update", interrupted)


# --- what a run leaves ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(small_world, tmp_path_factory) -> Path:
    """A short run on three tasks."""
    out = tmp_path_factory.mktemp("runs") / "small"
    data = ["--data", str(small_world), "--tasks", "ave,avqa,s4", "--test-rows", "3"]
    assert train.main([*SMALL, *data, "--out", str(out)]) == 0
    return out


def test_a_run_leaves_its_numbers_and_predictions(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics["tasks"]) == {"ave", "avqa", "s4"}
    for result in metrics["tasks"].values():
        assert {"metric", "base", "constant", "parsed", "n", "all"} <= set(result)
        assert 0 <= result["metric"] <= 1 and 0 <= result["parsed"] <= 1 and result["n"] > 0
    assert metrics["tasks"]["avqa"]["base_lenient"] == metrics["base"]["avqa"]["lenient"]
    assert metrics["seconds"] > 0 and metrics["steps"] == 6 and metrics["unreadable_files"] == 0
    assert set(metrics["loss"]) == {"first", "last"}

    lines = (finished / "predictions" / "ave.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    assert len(predictions) == metrics["tasks"]["ave"]["n"]
    assert predictions[0]["id"] == "ave/test/0"
    assert all({"id", "task", "text", "target", "parsed"} <= set(line) for line in predictions)
    for name in ("curves.png", "scores.png", "answers.png"):
        assert (finished / name).read_bytes()[:4] == b"\x89PNG"


def test_a_run_leaves_its_settings_by_group(finished, small_world):
    saved = json.loads((finished / "config.json").read_text())
    how_it_asks = {"token_limits", "layout", "form", "prompts"}
    assert set(saved) == {"preset", "recipe", "settings", "steps"} | how_it_asks
    assert saved["preset"] == "crab_plus-tiny" and saved["recipe"] == "crab_plus"
    assert saved["settings"]["data"]["data"] == str(small_world)
    assert saved["settings"]["training"]["steps"] == saved["steps"] == 6
    assert saved["settings"]["adapter"]["r"] == 4
    assert set(saved["token_limits"]) == {"ave", "avqa", "s4"}
    assert saved["layout"]["separate_media"] is True


def test_a_run_leaves_its_trained_parts_and_a_line_per_step(finished):
    adapter = {path.name for path in (finished / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= adapter
    config = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "ILORA"
    parts = {path.stem for path in (finished / "parts").iterdir()}
    assert parts == {"visual_qformer", "audio_qformer", "time", "number", "embeddings"}

    rows = read_log(finished)
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert int(row["rows"]) == 4 and 0 < float(row["loss"]) < 20
        assert int(row["padded_tokens"]) > int(row["answer_tokens"]) > 0
    # what only an unfinished run needs is gone
    assert not (finished / "checkpoints").exists() and not (finished / "trained").exists()


def test_a_run_in_which_nothing_learns_is_refused(small_world, tmp_path, capsys):
    flags = few_rows(small_world, "--adapter", "none", "--trainable", "adapter", "--steps", "1")
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 2
    assert "nothing of the model learns" in capsys.readouterr().err


def test_a_finished_run_is_not_overwritten(finished, small_world, capsys):
    before = (finished / "metrics.json").read_bytes()
    data = ["--data", str(small_world), "--tasks", "ave,avqa,s4"]
    assert train.main([*SMALL, *data, "--out", str(finished)]) == 2
    assert "finished" in capsys.readouterr().err
    assert (finished / "metrics.json").read_bytes() == before


# --- checkpoints ----------------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written(small_world, tmp_path, monkeypatch):
    """The writer waits for the step after; the weights are those of the step before."""
    step_after, weights = threading.Event(), []
    write, learn = run_folder.save_file, trainer.JointStep.__call__

    def slow_write(tensors, path):
        assert step_after.wait(60)
        write(tensors, path)

    def learn_or_stop(self, model, *arguments):
        weights.append(copy_to_cpu(dict(model.llm.named_parameters())))
        if len(weights) == 4:
            raise KeyboardInterrupt
        result = learn(self, model, *arguments)
        if len(weights) == 3:
            step_after.set()
        return result

    monkeypatch.setattr(run_folder, "save_file", slow_write)
    monkeypatch.setattr(trainer.JointStep, "__call__", learn_or_stop)
    run = tmp_path / "run"
    flags = few_rows(small_world, "--steps", "6", "--save-every", "2", "--no-baseline")
    assert train.main([*flags, "--lr", "0.1", "--out", str(run)]) == 130
    saved = load_file(run / "checkpoints" / "step_2" / "adapter" / "adapter_model.safetensors")
    for name, weight in saved.items():
        before, after = name.rsplit(".", 1)
        inside = f"{before}.default.{after}"
        assert torch.equal(weight, weights[2][inside])  # as step 3 begins
    assert not torch.equal(weight, weights[3][inside])


def test_a_checkpoint_that_cannot_be_written_stops_the_run(
    small_world, tmp_path, monkeypatch, capsys
):
    def full(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "save_file", full)
    flags = few_rows(small_world, "--steps", "3", "--save-every", "1", "--no-baseline")
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "step_1: cannot be written" in error and "No space left" in error


def test_nothing_is_asked_of_a_hub_while_saving(tmp_path, monkeypatch):
    calls = []

    def refuse(*arguments, **options):
        calls.append(arguments)
        raise OSError("no network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    model = load_base()
    model.add_adapter(AdapterConfig())
    model.llm.peft_config["default"].base_model_name_or_path = "somebody/some-lm"
    model.save_trained(tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists() and not calls


# --- locking and stopping -------------------------------------------------------------------------


def error_of_locking(folder: Path) -> str:
    """Lock a run folder in another process; return the error, "" without one."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def lock() -> None:
        try:
            lock_run(folder)
            theirs.send("")
        except RunError as error:
            theirs.send(str(error))

    process = context.Process(target=lock)
    process.start()
    error = ours.recv()
    process.join()
    return error


def test_a_run_in_use_is_locked_for_others_and_not_by_workers_that_outlive_it(tmp_path):
    lock = lock_run(tmp_path)
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    assert "in use" in error_of_locking(tmp_path)
    lock.close()
    assert error_of_locking(tmp_path) == ""
    worker.kill()
    worker.join()


def test_a_folder_that_cannot_hold_the_run_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        lock_run(tmp_path / "file" / "run")


def test_an_interrupted_run_with_other_settings_is_named_and_left_as_it_is(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    before, now = (parse_train(["--lr", lr])[1] for lr in ("1e-3", "2e-3"))
    folder, name = Path("runs/crab_plus-tiny"), "crab_plus-tiny"
    folder.mkdir(parents=True)
    SavedRun(name, "crab_plus", before).save(folder)
    assert choose_folder(now, name) == Path("runs/crab_plus-tiny-2")
    assert capsys.readouterr().out == (
        "runs/crab_plus-tiny, an interrupted run with another --lr (0.001, now 0.002), is left as "
        "it is; this run is runs/crab_plus-tiny-2\n"
    )

    # nothing is said where the run continues, or where the one before is finished
    assert choose_folder(before, name) == folder
    (folder / "metrics.json").write_text("{}")
    assert choose_folder(now, name) == Path("runs/crab_plus-tiny-2")
    assert capsys.readouterr().out == ""


def test_an_interrupted_run_continues_and_ends_with_the_same_losses(
    small_world, tmp_path, monkeypatch, capsys
):
    """Also with other values of flags that change nothing that is learned."""
    flags = few_rows(small_world, "--batch-size", "4", "--steps", "6", "--dropout", "0.2")
    flags += ["--trainable", "adapter,connectors"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train.main([*flags, "--out", str(whole)]) == 0

    interrupt_in_step(6, monkeypatch)
    assert train.main([*flags, "--save-every", "2", "--out", str(cut)]) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert checkpoints(cut) == ["step_4"] and len(read_log(cut)) == 5
    monkeypatch.undo()

    assert train.main([*flags, "--save-every", "2", "--lr", "1e-3", "--out", str(cut)]) == 2
    assert "another --lr (0.004, now 0.001)" in capsys.readouterr().err
    free = ["--save-every", "3", "--workers", "0", "--keep-checkpoints", "2", "--max-bad", "0.5"]
    assert train.main([*flags, *free, "--out", str(cut)]) == 0
    assert read_log(cut) == read_log(whole) and len(read_log(whole)) == 6
    for part in ("adapter/adapter_model", "parts/visual_qformer"):
        states = [load_file(run / f"{part}.safetensors") for run in (whole, cut)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    small_world, tmp_path, monkeypatch, capsys
):
    flags = few_rows(small_world, *"--batch-size 2 --grad-accum 1 --steps 4 --save-every 1".split())
    command = [*flags, "--out", str(tmp_path / "run")]
    forward, batches = AVLanguageModel.forward, []

    def broken(self, batch):
        batches.append(batch)
        loss = forward(self, batch)
        return loss * float("nan") if len(batches) == 3 else loss

    monkeypatch.setattr(AVLanguageModel, "forward", broken)
    assert train.main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "step 3: the loss is nan" in error and "checkpoint is kept" in error
    assert all(name in error for name in batches[2].keys) and len(batches[2].keys) == 2
    assert checkpoints(tmp_path / "run") == ["step_2"]
    assert len(read_log(tmp_path / "run")) == 2

    monkeypatch.undo()
    assert train.main(command) == 0
    assert len(read_log(tmp_path / "run")) == 4


def test_a_gradient_that_is_not_finite_changes_no_weight():
    model = torch.nn.Linear(2, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    (model(torch.ones(1, 2)) * float("inf")).sum().backward()
    with pytest.raises(RunError, match="norm of the gradient"):
        trainer.update(optimizer, 1.0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_smaller_batches_and_more_of_them_make_the_same_steps(small_world, tmp_path):
    flags = few_rows(small_world, "--steps", "3", "--dropout", "0", "--no-bf16")
    logs = []
    for sizes in (
        ["--batch-size", "6", "--grad-accum", "1"],
        ["--batch-size", "2", "--grad-accum", "3"],
    ):
        out = tmp_path / sizes[1]
        assert train.main([*flags, *sizes, "--out", str(out)]) == 0
        logs.append(read_log(out))
    whole, parts = logs
    losses = [[float(row["loss"]) for row in rows] for rows in logs]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert [row["rows"] for row in parts] == [row["rows"] for row in whole] == ["6"] * 3
    padded = [sum(int(row["padded_tokens"]) for row in rows) for rows in logs]
    assert padded[1] <= padded[0]  # no more padding in smaller batches


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system offers no such end")
def test_workers_end_with_a_killed_run(small_world):
    script = f"""
from crab_min.data import decode_ahead, read_samples
parts = [part for s in read_samples({str(small_world)!r}, ["ks"], "train") for part in s.media]
groups = [parts[i : i + 2] for i in range(0, len(parts), 2)] * 1000
for _ in decode_ahead(groups, 96, 2):
    print("ready", flush=True)
"""
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    workers = [Path("/proc") / pid for pid in found.stdout.split()]
    assert len(workers) >= 2
    process.kill()
    process.wait()
    deadline = time.time() + 20
    while any(worker.exists() for worker in workers) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(worker.exists() for worker in workers)


@pytest.mark.slow
def test_a_killed_run_started_again_ends_with_the_same_losses(small_world, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *few_rows(small_world), "--steps", "24"]
    command += ["--batch-size", "4", "--save-every", "4", "--dropout", "0.2"]
    command += ["--trainable", "adapter,connectors", "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, str(whole)], check=True, capture_output=True, cwd=tmp_path)

    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, str(killed)], cwd=tmp_path, **silent)
    wait_for((killed / "checkpoints" / "step_8").exists, process)
    process.kill()
    process.wait()
    assert not (killed / "metrics.json").exists(), "the run ended before it could be killed"
    subprocess.run([*command, str(killed)], check=True, capture_output=True, cwd=tmp_path)
    assert read_log(whole) == read_log(killed) and len(read_log(whole)) == 24


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint_and_what_was_best_can_be_asked(small_world, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), *few_rows(small_world), "--steps", "2000"]
    command += ["--batch-size", "2", "--eval-every", "2", "--eval-rows", "2", "--out", str(run)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    log = run / "log.csv"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 4, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130 and "the same command continues" in errors

    rows = read_log(run)
    assert len(rows) >= 4 and checkpoints(run) == [f"step_{len(rows)}"]
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    metrics = [row["metric"] for row in rows]
    assert all(metrics[1::2]) and not any(metrics[0::2])
    best = json.loads((run / "best" / "progress.json").read_text())["best"]
    assert best == pytest.approx(max(float(metric) for metric in metrics[1::2]), rel=1e-6)
    evaluation = ["--eval", *few_rows(small_world), "--run", str(run / "best")]
    assert infer.main([*evaluation, "--out", str(tmp_path / "eval")]) == 0


# --- asking ---------------------------------------------------------------------------------------


def test_infer_on_a_clip_prints_one_json_line_and_draws(
    finished, small_world, tmp_path, monkeypatch, capsys
):
    clip = sorted((small_world / "ave" / "video").glob("*.mp4"))[0]
    monkeypatch.chdir(tmp_path)
    assert infer.main([str(clip), "--task", "ave", "--json", "--run", str(finished)]) == 0
    printed = capsys.readouterr().out
    line = json.loads(printed)
    assert printed.count("\n") == 1
    assert {"text", "parsed", "seconds", "error"} <= set(line)
    assert Path(line["picture"]).read_bytes()[:4] == b"\x89PNG"

    question = "How many things are seen?"
    assert infer.main([str(clip), "--ask", question, "--run", str(finished)]) == 0
    printed = capsys.readouterr().out
    assert "answer:" in printed and question in printed


def test_infer_takes_every_kind_of_media(finished, small_world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one, two = map(str, sorted((small_world / "ave" / "video").glob("*.mp4"))[:2])
    image = str(next((small_world / "s4").rglob("frames/*.jpg")))
    expression = "the thing on the left"
    for arguments in (
        ["--task", "a2v", one, "--second-video", two],
        ["--task", "v2a", one, "--audio", one, "--audio", two],
        ["--task", "s4", "--image", image, "--audio", one, "--frame-index", "2"],
        ["--task", "meld", one],
        ["--task", "avqa_thu", one, "--ask", "What is heard?", "--options", "dog,cat,bell"],
        ["--task", "ref_avs", "--image", image, "--audio", one, "--ask", expression],
    ):
        command = [*arguments, "--json", "--run", str(finished), "--max-new-tokens", "8"]
        assert infer.main(command) == 0
        assert json.loads(capsys.readouterr().out)["task"] == arguments[1]


def old_form(run: Path, folder: Path) -> None:
    """Write a run as the first version did: flat settings, and one file of all trained parts."""
    new = json.loads((run / "config.json").read_text())
    training = new["settings"]["training"]
    flat = {"adapter": "ilora", "r": 4, "alpha": 8, "train": "adapter+connectors+words"}
    flat |= {"answers": "text", "half": True, "quantize": "", "steps": training["steps"]}
    old = {"preset": new["preset"], "train": flat, "steps": new["steps"]}
    state = {}
    for file in (run / "parts").iterdir():
        name = {"embeddings": "words"}.get(file.stem, file.stem)
        state |= {f"{name}.{key}": value for key, value in load_file(file).items()}

    (folder / "adapter").mkdir(parents=True)
    for file in (run / "adapter").iterdir():
        (folder / "adapter" / file.name).write_bytes(file.read_bytes())
    save_file(state, folder / "modules.safetensors")
    (folder / "config.json").write_text(json.dumps(old | {"limits": new["token_limits"]}))


def test_a_run_of_the_first_version_still_answers(
    finished, small_world, tmp_path, monkeypatch, capsys
):
    old_form(finished, tmp_path / "old")
    clip = sorted((small_world / "ave" / "video").glob("*.mp4"))[0]
    monkeypatch.chdir(tmp_path)
    texts = []
    for run in (finished, tmp_path / "old"):
        assert infer.main([str(clip), "--task", "ave", "--json", "--run", str(run)]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1]
    split = ["--eval", "--data", str(small_world), "--tasks", "s4", "--test-rows", "1"]
    assert infer.main([*split, "--run", "old", "--out", "eval"]) == 0


# --- scoring a split ------------------------------------------------------------------------------


def test_eval_scores_a_split(finished, small_world, tmp_path):
    split = ["--data", str(small_world), "--split", "train", "--tasks", "ave", "--test-rows", "3"]
    command = ["--eval", *split, "--run", str(finished), "--out", str(tmp_path / "eval")]
    assert infer.main(command) == 0
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["tasks"]["ave"]["n"] == 3


def test_eval_stops_at_a_missing_clip_or_counts_it_as_wrong(
    finished, small_world, tmp_path, capsys
):
    rows = json.loads((small_world / "ave" / "test.json").read_text())[:2]
    for row in rows:
        for kind in ("video", "audio"):
            row[f"{kind}_path"] = str(small_world / "ave" / kind / row[f"{kind}_path"])
    rows[0]["video_path"] = "gone.mp4"
    (tmp_path / "data" / "ave").mkdir(parents=True)
    (tmp_path / "data" / "ave" / "test.json").write_text(json.dumps(rows))

    out = tmp_path / "eval"
    command = ["--eval", "--data", str(tmp_path / "data"), "--tasks", "ave"]
    command += ["--run", str(finished), "--out", str(out)]
    assert infer.main(command) == 2
    assert "gone.mp4" in capsys.readouterr().err
    assert not out.exists()
    assert infer.main([*command, "--allow-missing"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["missing"] == 1 and metrics["tasks"]["ave"]["n"] == 2


def test_training_goes_on_without_missing_clips_if_asked(small_world, tmp_path, capsys):
    """Of the training rows one is gone, of two test rows one: it is scored as wrong."""
    folder = tmp_path / "data" / "ave"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        rows = json.loads((small_world / "ave" / f"{split}.json").read_text())[:2]
        for row in rows:
            for kind in ("video", "audio"):
                row[f"{kind}_path"] = str(small_world / "ave" / kind / row[f"{kind}_path"])
        rows[0]["video_path"] = f"gone_{split}.mp4"
        (folder / f"{split}.json").write_text(json.dumps(rows))

    command = ["--data", str(folder.parent), "--tasks", "ave", "--steps", "2", "--batch-size", "2"]
    command += ["--no-cache-features", "--out", str(tmp_path / "run")]
    assert train.main(command) == 2
    assert "gone_test.mp4" in capsys.readouterr().err
    assert train.main([*command, "--allow-missing"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("gone_train.mp4") == printed.count("gone_test.mp4") == 1
    assert "step 1: " in printed and " GB of memory" in printed
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["unreadable_files"] == 2
    assert metrics["tasks"]["ave"]["n"] == metrics["base"]["ave"]["n"] == 2
    assert not list((tmp_path / "run").glob("*.partial.jsonl"))


def test_a_killed_evaluation_continues_and_ends_with_the_same_bytes(
    finished, small_world, tmp_path, monkeypatch
):
    tasks = ["ave", "avqa", "s4"]
    command = ["--eval", "--data", str(small_world), "--tasks", ",".join(tasks)]
    command += ["--test-rows", "3", "--max-new-tokens", "12"]
    command += ["--run", str(finished)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert infer.main([*command, "--out", str(whole)]) == 0

    generate, calls = AVLanguageModel.generate, []

    def killed(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, *arguments, **options)

    monkeypatch.setattr(AVLanguageModel, "generate", killed)
    assert infer.main([*command, "--out", str(cut)]) == 130
    partial = cut / "answers.partial.jsonl"
    lines = partial.read_text().splitlines()
    assert len(lines) == 2 and not (cut / "metrics.json").exists()

    # its second line is cut; the batch of one task is done
    partial.write_text("\n".join([lines[0], lines[1][:20]]))
    calls[:] = [1] * 10
    assert infer.main([*command, "--out", str(cut)]) == 0
    batches = plan_batches(read_samples(small_world, tasks, "test", limit=3))
    assert len(calls) - 10 == len(batches) - 1 == 2
    for file in sorted((whole / "predictions").iterdir()):
        assert file.read_bytes() == (cut / "predictions" / file.name).read_bytes()
    assert {path.stem for path in (cut / "sheets").iterdir()} == set(tasks)
    assert not partial.exists()
    decoding = json.loads((cut / "metrics.json").read_text())["decoding"]
    assert decoding["eval_batch_tokens"] == 16384


def test_eval_with_a_modality_taken_away(finished, small_world, tmp_path):
    command = ["--eval", *few_rows(small_world), "--run", str(finished), "--max-new-tokens", "4"]
    for modality in ("audio", "video"):
        out = tmp_path / modality
        assert infer.main([*command, "--ablate", modality, "--out", str(out)]) == 0
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["decoding"]["ablate"] == modality and set(metrics["tasks"]) == {"ks", "s4"}


# --- errors ---------------------------------------------------------------------------------------


def bad_inputs(folder: Path, world: Path):
    """Yield a command, its arguments, and the words that its one line must have."""
    good = sorted((world / "ave" / "video").glob("*.mp4"))[0]
    (folder / "text.mp4").write_text("not a film")
    (folder / "cut.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (folder / "empty.wav").write_bytes(b"")
    for name, content in (("broken", "[{"), ("field", '[{"video_path": "x.mp4"}]')):
        (folder / name / "ave").mkdir(parents=True)
        (folder / name / "ave" / "train.json").write_text(content)
    nothing, empty = str(folder / "nothing"), str(folder / "empty.wav")

    # infer.py: files, questions, runs
    ask = ["--demo", "--task", "ave"]
    for name in ("gone.mp4", "text.mp4", "cut.mp4"):
        yield infer.main, [str(folder / name), *ask], [name]
    yield infer.main, [str(good), "--audio", empty, *ask], ["empty.wav"]
    yield infer.main, [str(good), "--demo"], ["what about", "--task"]
    yield infer.main, ["What barks?", "--demo"], ["which clip?", "What barks?"]
    yield infer.main, [str(good), "--demo", "--task", "a2v"], ["a2v", "--second-video"]
    yield infer.main, [str(good), "--demo", "--task", "avee"], ["avee", "ave"]
    yield infer.main, [str(good), "--task", "ave", "--run", nothing], ["nothing", "--run"]

    # train.py: data, things, parts
    yield train.main, ["--tasks", "avee"], ["avee", "ave"]
    broken, field = ["--data", str(folder / "broken")], ["--data", str(folder / "field")]
    yield train.main, broken, ["broken/ave/train.json", "JSON"]
    yield train.main, field, ["field/ave/train.json", "row 0", "audio_path"]
    yield train.main, ["--data", nothing], ["nothing", "--data"]
    yield train.main, ["--things", nothing], ["nothing", "--things"]
    yield train.main, ["--init-from", nothing], ["nothing", "--init-from"]
    yield train.main, few_rows(world, "--trainable", "adapter,qformers"), ["qformers", "embeddings"]


@pytest.mark.parametrize("preset", ["crab_plus-tiny", "pave-tiny", "crema-tiny"])
def test_a_wrong_name_of_a_trainable_part_is_said_before_rows_are_read(preset, tmp_path, capsys):
    command = [preset, "--data", str(tmp_path / "nothing"), "--trainable", "adapter,conectors"]
    assert train.main(command) == 2
    error = capsys.readouterr().err
    assert "--trainable conectors: " in error and "connectors" in error
    assert "nothing" not in error


def test_bad_input_is_one_line_with_exit_code_2_and_leaves_nothing_behind(
    small_world, tmp_path, monkeypatch, capsys
):
    inputs, work = tmp_path / "inputs", tmp_path / "work"
    inputs.mkdir()
    work.mkdir()
    cases = list(bad_inputs(inputs, small_world))
    monkeypatch.chdir(work)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    for main, arguments, words in cases:
        assert main(arguments) == 2, arguments
        printed = capsys.readouterr().err.strip()
        lines = [line for line in printed.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and "Traceback" not in printed, printed
        assert all(word in lines[0] for word in words), printed
        assert not list(work.iterdir()), arguments


# --- Crab's stages --------------------------------------------------------------------------------


def test_each_stage_of_crab_starts_from_the_one_before(small_world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["crab-tiny", *few_rows(small_world), "--steps", "2", "--batch-size", "4", "--r", "4"]
    assert train.main([*command, "--stage", "audio"]) == 2
    assert "runs/crab-tiny-visual is none; run --stage visual first" in capsys.readouterr().err
    parts = {}
    for stage in ("visual", "audio", "unified"):
        assert train.main([*command, "--stage", stage]) == 0
        files = Path(f"runs/crab-tiny-{stage}/parts").iterdir()
        parts[stage] = {file.stem: load_file(file) for file in files}

    # a connector is aligned, goes on as it is, and learns again with all tasks
    assert set(parts["visual"]) == {"visual_qformer"}
    assert set(parts["audio"]) == {"visual_qformer", "audio_qformer"}
    for key, value in parts["visual"]["visual_qformer"].items():
        assert torch.equal(parts["audio"]["visual_qformer"][key], value)
    query = [parts[stage]["visual_qformer"]["query"] for stage in ("visual", "unified")]
    assert not torch.equal(*query)
    assert not Path("runs/crab-tiny-audio/adapter").exists()
    assert Path("runs/crab-tiny-unified/adapter").is_dir()
    saved = json.loads(Path("runs/crab-tiny-unified/config.json").read_text())
    assert saved["settings"]["training"]["init_from"] == "runs/crab-tiny-audio"


@pytest.mark.parametrize("stage", ["visual", "audio"])
def test_captions_of_one_modality_hide_the_other(small_world, stage):
    whole = read_samples(small_world, ["avcap"], "train", limit=3)
    kinds, caption = crab.ALIGN[stage]
    kind = kinds[0]
    for before, after_ in zip(whole, crab.keep_modality(whole, kinds, caption)):
        assert [part.kind for part in after_.media] == [kind]
        assert after_.target == before.row[caption] != before.target
        assert after_.parts[0].text.startswith(f"{kind}: ")
        assert after_.parts[-1] == before.parts[-1]
