"""train.py and infer.py as a user meets them, at a small size: results, resume, and one-line errors."""
import csv
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import infer
import train
from crab_min import trainer
from crab_min.data import keep_modality, read_samples
from crab_min.errors import RunError
from crab_min.evaluation.answering import plan_batches
from crab_min.model import AVLanguageModel
from crab_min.runs.folder import lock_run
from crab_min.tasks import TASKS

ROOT = Path(__file__).parents[1]
SMALL = ["--steps", "6", "--batch-size", "4", "--save-every", "2", "--r", "4", "--alpha", "8"]


@pytest.fixture(scope="module")
def finished(small_world, tmp_path_factory):
    """A short run on three tasks."""
    out = tmp_path_factory.mktemp("runs") / "small"
    assert train.main([*SMALL, "--data", str(small_world), "--tasks", "ave,avqa,s4", "--out", str(out)]) == 0
    return out


def test_metrics_and_predictions_hold_what_design_says(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics["tasks"]) == {"ave", "avqa", "s4"} and metrics["seconds"] > 0
    for r in metrics["tasks"].values():
        assert {"metric", "base", "blind", "parsed", "n", "all"} <= set(r)
        assert 0 <= r["metric"] <= 1 and 0 <= r["parsed"] <= 1 and r["n"] > 0
    lines = [json.loads(line) for line in (finished / "predictions" / "ave.jsonl").read_text().splitlines()]
    assert len(lines) == metrics["tasks"]["ave"]["n"]
    assert all({"id", "task", "text", "target", "parsed"} <= set(line) for line in lines) and lines[0]["id"] == "ave/test/0"
    log = (finished / "log.csv").read_text().splitlines()
    assert log[0].startswith("step,loss") and len(log) == 7
    assert {p.name for p in (finished / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((finished / "adapter" / "adapter_config.json").read_text())["peft_type"] == "ILORA"


def test_a_finished_run_is_not_overwritten(finished, small_world, capsys):
    before = (finished / "metrics.json").read_text()
    assert train.main([*SMALL, "--data", str(small_world), "--tasks", "ave,avqa,s4", "--out", str(finished)]) == 2
    assert "finished" in capsys.readouterr().err and (finished / "metrics.json").read_text() == before


def test_a_run_in_use_is_locked_for_other_processes_and_not_by_workers_that_outlive_it(tmp_path):
    other = f"from pathlib import Path; from crab_min.runs.folder import lock_run; lock_run(Path({str(tmp_path)!r}), 0)"
    held = lock_run(tmp_path, 0)
    worker = torch.multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    again = partial(subprocess.run, [sys.executable, "-c", other], cwd=ROOT, capture_output=True, text=True)
    assert "in use" in again().stderr
    held.close()
    assert again().returncode == 0
    worker.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system offers no such end")
def test_workers_end_with_a_killed_run(small_world):
    script = f"""
from crab_min.data import decoding, read_samples
parts = [p for s in read_samples({str(small_world)!r}, ["ks"], "train") for p in s.media]
for _ in decoding([parts[i:i + 2] for i in range(0, len(parts), 2)] * 1000, 96, 2):
    print("ready", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    process.kill()
    process.wait()
    deadline = time.time() + 20
    while (left := [pid for pid in workers if Path(f"/proc/{pid}").exists()]) and time.time() < deadline:
        time.sleep(.1)
    assert len(workers) >= 2 and not left


def test_a_folder_that_cannot_hold_the_run_is_an_error_before_the_first_step(tmp_path):
    with pytest.raises(RunError, match="MB are free"):
        lock_run(tmp_path, 10 ** 18)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        lock_run(tmp_path / "file" / "run", 0)


def test_a_killed_run_started_again_ends_with_the_same_losses(small_world, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--data", str(small_world), "--tasks", "ks,s4", "--test-rows", "1", "--steps", "24",
               "--batch-size", "4", "--save-every", "4", "--dropout", "0.2", "--train", "adapter+connectors", "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, cwd=tmp_path)
    process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    deadline = time.time() + 120
    while not (tmp_path / "killed" / "state" / "step_8").exists() and time.time() < deadline and process.poll() is None:
        time.sleep(.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "metrics.json").exists(), "the run ended before it could be killed"
    subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True, cwd=tmp_path)
    whole, killed = ([line.split(",")[:5] for line in (tmp_path / name / "log.csv").read_text().splitlines()] for name in ("whole", "killed"))
    assert whole == killed and len(whole) == 25


def test_ctrl_c_saves_a_state_and_a_picture_and_what_was_best_can_be_asked(small_world, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--data", str(small_world), "--tasks", "ks,s4", "--test-rows", "1", "--steps", "2000", "--batch-size", "2",
                                "--eval-every", "2", "--eval-rows", "2", "--out", str(run)], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    deadline = time.time() + 120
    while not ((run / "log.csv").exists() and len((run / "log.csv").read_text().splitlines()) > 4) and time.time() < deadline and process.poll() is None:
        time.sleep(.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in errors
    steps = len((run / "log.csv").read_text().splitlines()) - 1
    assert steps >= 4 and [state.name for state in (run / "state").iterdir()] == [f"step_{steps}"]
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    metrics = [row.split(",")[9] for row in (run / "log.csv").read_text().splitlines()[1:]]
    assert all(bool(metric) == (i % 2 == 1) for i, metric in enumerate(metrics))
    assert f"{json.loads((run / 'best' / 'progress.json').read_text())['best']:.4f}" == max(m for m in metrics if m)
    assert infer.main(["--eval", "--data", str(small_world), "--tasks", "ks", "--test-rows", "1", "--run", str(run / "best"), "--out", str(tmp_path / "eval")]) == 0


def test_a_batch_passed_in_parts_makes_the_same_step(small_world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(small_world), "--tasks", "ks,s4", "--test-rows", "1", "--steps", "4", "--batch-size", "6", "--dropout", "0", "--no-half"]
    for name, more in (("whole", []), ("parts", ["--max-tokens", "500"])):
        assert train.main([*flags, *more, "--out", name]) == 0
    whole, parts = (list(csv.DictReader(open(tmp_path / name / "log.csv"))) for name in ("whole", "parts"))
    assert [float(row["loss"]) for row in parts] == pytest.approx([float(row["loss"]) for row in whole], abs=1e-5)
    assert [row["rows"] for row in parts] == [row["rows"] for row in whole] == ["6"] * 4
    assert sum(int(row["places"]) for row in parts) < sum(int(row["places"]) for row in whole)         # less padding


def test_infer_on_a_clip_prints_one_json_line_and_draws(finished, small_world, tmp_path, monkeypatch, capsys):
    clip = sorted((small_world / "ave" / "video").glob("*.mp4"))[0]
    monkeypatch.chdir(tmp_path)
    assert infer.main([str(clip), "--task", "ave", "--json", "--run", str(finished)]) == 0
    out = capsys.readouterr().out
    line = json.loads(out)
    assert out.count("\n") == 1 and {"text", "parsed", "seconds", "error"} <= set(line)
    assert Path(line["picture"]).read_bytes()[:4] == b"\x89PNG"
    assert infer.main([str(clip), "--ask", "How many things are seen?", "--run", str(finished)]) == 0
    assert "answer:" in (shown := capsys.readouterr().out) and "How many things are seen?" in shown


def test_infer_takes_every_kind_of_media(finished, small_world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one, two = map(str, sorted((small_world / "ave" / "video").glob("*.mp4"))[:2])
    image = str(next((small_world / "s4").rglob("frames/*.jpg")))
    for arguments in (["--task", "a2v", one, "--second-video", two], ["--task", "v2a", one, "--audio", one, "--audio", two],
                      ["--task", "s4", "--image", image, "--audio", one, "--frame-index", "2"], ["--task", "meld", one],
                      ["--task", "avqa_thu", one, "--ask", "What is heard?", "--options", "dog,cat,bell"],
                      ["--task", "ref_avs", "--image", image, "--audio", one, "--ask", "the thing on the left"]):
        assert infer.main([*arguments, "--json", "--run", str(finished), "--limit", "8"]) == 0
        assert json.loads(capsys.readouterr().out)["task"] == arguments[1]


def test_eval_scores_a_split_and_counts_missing_clips(finished, small_world, tmp_path, capsys):
    assert infer.main(["--eval", "--data", str(small_world), "--split", "train", "--tasks", "ave", "--test-rows", "3", "--run", str(finished), "--out", str(tmp_path / "e")]) == 0
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert metrics["tasks"]["ave"]["n"] == 3 and "exact" in metrics["tasks"]["ave"]
    data = tmp_path / "data"
    (data / "ave").mkdir(parents=True)
    rows = json.loads((small_world / "ave" / "test.json").read_text())[:2]
    (data / "ave" / "test.json").write_text(json.dumps([{**r, "video_path": str(small_world / "ave" / "video" / r["video_path"]) if i else "gone.mp4",
                                                         "audio_path": str(small_world / "ave" / "audio" / r["audio_path"])} for i, r in enumerate(rows)]))
    command = ["--eval", "--data", str(data), "--tasks", "ave", "--run", str(finished), "--out", str(tmp_path / "m")]
    assert infer.main(command) == 2 and "gone.mp4" in capsys.readouterr().err and not (tmp_path / "m").exists()
    assert infer.main([*command, "--allow-missing"]) == 0
    assert json.loads((tmp_path / "m" / "metrics.json").read_text())["missing"] == 1


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_bytes(finished, small_world, tmp_path, monkeypatch, capsys):
    command = ["--eval", "--data", str(small_world), "--tasks", "ave,avqa,ks,s4", "--batch-size", "3", "--run", str(finished)]
    assert infer.main([*command, "--out", str(tmp_path / "whole")]) == 0
    generate, calls = AVLanguageModel.generate, []

    def killed(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(self, *args, **kwargs)
    monkeypatch.setattr(AVLanguageModel, "generate", killed)
    assert infer.main([*command, "--out", str(tmp_path / "cut")]) == 130
    partial = tmp_path / "cut" / "answers.partial.jsonl"
    lines = partial.read_text().splitlines()
    assert len(lines) == 3 and not (tmp_path / "cut" / "metrics.json").exists()
    partial.write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])          # the third line is cut
    calls[:] = [1] * 10
    assert infer.main([*command, "--out", str(tmp_path / "cut")]) == 0
    batches = len(plan_batches(read_samples(small_world, ["ave", "avqa", "ks", "s4"], "test"), 3))
    assert len(calls) - 10 == batches - 2                                     # two batches were done
    for file in sorted((tmp_path / "whole" / "predictions").iterdir()):
        assert file.read_bytes() == (tmp_path / "cut" / "predictions" / file.name).read_bytes()
    assert {p.stem for p in (tmp_path / "cut" / "sheets").iterdir()} == {"ave", "avqa", "ks", "s4"} and not partial.exists()
    assert json.loads((tmp_path / "cut" / "metrics.json").read_text())["decoding"]["batch_size"] == 3


def bad_inputs(folder, world):
    """(what it is, command, words the one line must have)"""
    good = sorted((world / "ave" / "video").glob("*.mp4"))[0]
    (folder / "text.mp4").write_text("not a film")
    (folder / "cut.mp4").write_bytes(good.read_bytes()[:len(good.read_bytes()) // 2])
    (folder / "empty.wav").write_bytes(b"")
    for name, content in (("broken", "[{"), ("field", '[{"video_path": "x.mp4"}]')):
        (folder / name / "ave").mkdir(parents=True)
        (folder / name / "ave" / "train.json").write_text(content)
    ask = ["--task", "ave"]
    yield "missing file", infer.main, [str(folder / "gone.mp4"), *ask], ["gone.mp4"]
    yield "text file", infer.main, [str(folder / "text.mp4"), *ask], ["text.mp4"]
    yield "cut file", infer.main, [str(folder / "cut.mp4"), *ask], ["cut.mp4"]
    yield "empty sound", infer.main, [str(good), "--audio", str(folder / "empty.wav"), *ask], ["empty.wav"]
    yield "nothing asked", infer.main, [str(good)], ["--ask", "--task"]
    yield "missing second video", infer.main, [str(good), "--task", "a2v"], ["a2v", "video2_path"]
    yield "unknown task", infer.main, [str(good), "--task", "avee"], ["avee", "ave"]
    yield "unknown task", train.main, ["--tasks", "avee"], ["avee", "ave"]
    yield "broken json", train.main, ["--data", str(folder / "broken")], ["broken/ave/train.json", "JSON"]
    yield "missing field", train.main, ["--data", str(folder / "field")], ["field/ave/train.json", "row 0", "audio_path"]
    yield "no such data", train.main, ["--data", str(folder / "nothing")], ["nothing", "--data"]
    yield "no such things", train.main, ["--things", str(folder / "nothing")], ["nothing", "--things"]
    yield "no such run", infer.main, [str(good), *ask, "--run", str(folder / "nothing")], ["nothing", "--run"]
    yield "unknown flag", train.main, ["--stepz", "3"], ["--stepz"]
    yield "unknown preset", train.main, ["crab-huge"], ["crab-huge", "crab_plus-tiny"]
    yield "wrong value", train.main, ["--steps", "many"], ["--steps", "many"]


def test_bad_input_is_one_line_with_exit_code_2_and_leaves_nothing_behind(small_world, tmp_path, monkeypatch, capsys):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    cases = list(bad_inputs(inputs, small_world))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name, main, arguments, words in cases:
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
        error = capsys.readouterr().err.strip()
        lines = [line for line in error.splitlines() if line.startswith("error:")]
        assert code == 2 and len(lines) == 1 and "Traceback" not in error, (name, error)
        assert all(word in lines[0] for word in words), (name, error)
        assert not list((tmp_path / "work").iterdir()), name


def test_readme_commands_run_at_a_small_size(tmp_path):
    """The README's training command with small numbers, then infer.py without arguments, in a folder of their own."""
    commands = [line.strip() for line in (ROOT / "README.md").read_text().splitlines()]
    assert "pip install -r requirements.txt && python train.py" in commands and "pytest" in commands
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = lambda *arguments: subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)      # noqa: E731
    done = run(str(ROOT / "train.py"), *SMALL, "--world-clips", "24", "--world-test", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    for task in TASKS.values():
        assert len([line for line in done.stdout.splitlines() if line.split(" ")[0] == task.name]) == (1 if "test" in task.splits and task.v2 else 0)
    done = run(str(ROOT / "infer.py"), "--json", "--limit", "8", "--run", "runs/crab_plus-tiny")
    assert done.returncode == 0 and json.loads(done.stdout)["task"] == "avqa", done.stderr[-2000:]


def test_every_recipe_of_the_readme_is_a_run_that_could_start(monkeypatch):
    """The commands of "Train the papers": flags that exist, values that fit together."""
    section = (ROOT / "README.md").read_text().split("## Train the papers")[1].split("\n## ")[0]
    recipes = [line.split("#")[0].split("train.py")[1].split() for line in section.splitlines() if line.startswith(("python train.py", "torchrun"))]
    found = []
    monkeypatch.setattr(train, "run", lambda config, preset: found.append((preset, config)))
    for recipe in recipes:
        assert train.main(recipe) == 0
    assert {preset for preset, _ in found} == {"crab_plus-7b", "crab_plus-3b", "crab-7b", "pave-7b", "pave-0.5b", "crema-xl"} and len(found) >= 12
    for preset, config in found:
        if config.stage in ("", "visual"):                                    # others want the run before them
            trainer.staged(config, preset)


def test_each_stage_of_crab_starts_from_the_one_before(small_world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["crab-tiny", "--steps", "4", "--batch-size", "4", "--r", "4", "--alpha", "8", "--data", str(small_world), "--test-rows", "1"]
    assert train.main([*command, "--stage", "audio"]) == 2
    assert "runs/crab-tiny-visual is none; run --stage visual first" in capsys.readouterr().err
    for stage in ("visual", "audio", "unified"):
        assert train.main([*command, "--stage", stage]) == 0
    states = {stage: load_file(f"runs/crab-tiny-{stage}/modules.safetensors") for stage in ("visual", "audio", "unified")}
    assert {key.split(".")[0] for key in states["visual"]} == {"visual_qformer"}
    assert {key.split(".")[0] for key in states["audio"]} == {"visual_qformer", "audio_qformer"}
    assert all(torch.equal(states["audio"][key], value) for key, value in states["visual"].items())
    assert not torch.equal(states["unified"]["visual_qformer.query"], states["visual"]["visual_qformer.query"])      # trained on
    assert not Path("runs/crab-tiny-audio/adapter").exists() and Path("runs/crab-tiny-unified/adapter").is_dir()
    assert json.loads(Path("runs/crab-tiny-unified/config.json").read_text())["train"]["start"] == "runs/crab-tiny-audio"


def test_captions_of_one_sense_hide_the_other(small_world):
    whole = read_samples(small_world, ["avcap"], "train", limit=3)
    for kind, field in (("video", "seen"), ("audio", "heard")):
        for before, after in zip(whole, keep_modality(whole, kind)):
            assert [p.kind for p in after.media] == [kind] and after.target == before.row[field] != before.target
            assert after.parts[0].text.startswith(f"{kind}: ") and after.parts[-1] == before.parts[-1]
