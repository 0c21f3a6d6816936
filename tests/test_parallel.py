"""Several processes on one run, on the CPU (gloo): the losses of one process.

Also parts that a process has no use for, sharding, and what happens when a process dies.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import infer
from crab_min import trainer
from crab_min.backbones.composed import load_base
from crab_min.backbones.tiny_random import tiny_blip2, tiny_llava, tiny_omni
from crab_min.config import Settings, TrainingConfig
from crab_min.data import read_samples
from crab_min.errors import RunError
from crab_min.recipes import common
from crab_min.runs import processes
from crab_min.runs.folder import Progress

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ONE = [sys.executable]
TWO = [*ONE, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
FLAGS = "--tasks ks,s4 --test-rows 2 --steps 20 --batch-size 4 --dropout 0 --no-bf16".split()
FLAGS += ["--grad-accum", "1", "--trainable", "adapter,connectors"]


def command(data: Path, out: Path, *flags: str, launcher: list[str] = TWO) -> list[str]:
    train = str(ROOT / "train.py")
    return [*launcher, train, "--data", str(data), *FLAGS, *flags, "--out", str(out)]


def finish(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a command to its end."""
    env = {**ENVIRONMENT, **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def start(command: list[str], folder: Path) -> subprocess.Popen:
    """Start a command and return at once."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, **silent)


def wait_for(happened, process: subprocess.Popen, seconds: float = 600) -> None:
    deadline = time.time() + seconds
    while not happened():
        if time.time() > deadline:
            process.kill()
        assert process.poll() is None
        time.sleep(0.01)


def column(run: Path, name: str) -> list[float]:
    with open(run / "log.csv", encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def ranks_of(run: subprocess.Popen) -> list[int]:
    """Return the processes that torchrun has started."""
    children = ["pgrep", "-P", str(run.pid), "-f", "train.py"]
    found = subprocess.run(children, capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(small_world, tmp_path_factory) -> Path:
    """Three runs of the same steps.

    One process that takes two batches per step, two that take one each, and two that share the LM.
    """
    folder = tmp_path_factory.mktemp("parallel")
    for name, flags, launcher in (
        ("one", ["--grad-accum", "2"], ONE),
        ("two", [], TWO),
        ("sharded", ["--fsdp"], TWO),
    ):
        done = finish(command(small_world, folder / name, *flags, launcher=launcher), folder)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("other", ["two", "sharded"])
def test_two_processes_are_one_with_twice_the_batches(runs, other):
    losses = column(runs / other, "loss")
    assert losses == pytest.approx(column(runs / "one", "loss"), abs=1e-5) and len(losses) == 20
    for name in ("rows", "answer_tokens"):
        assert column(runs / other, name) == column(runs / "one", name)
    for file in ("adapter/adapter_model", "parts/visual_qformer", "parts/audio_qformer"):
        one, two = (load_file(runs / name / f"{file}.safetensors") for name in ("one", other))
        assert one.keys() == two.keys()
        assert all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)


@pytest.mark.slow
def test_a_run_of_two_is_a_run_like_any_other(runs, small_world, tmp_path):
    assert (runs / "two" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    metrics = json.loads((runs / "two" / "metrics.json").read_text())
    assert {task: result["n"] for task, result in metrics["tasks"].items()} == {"ks": 2, "s4": 2}
    split = ["--eval", "--data", str(small_world), "--tasks", "ks", "--run", str(runs / "sharded")]
    assert infer.main([*split, "--out", str(tmp_path)]) == 0


@pytest.mark.slow
def test_on_another_number_of_processes_a_run_continues_with_the_next_batches(
    runs, small_world, tmp_path
):
    out = tmp_path / "run"
    run = start(command(small_world, out, "--save-every", "10"), tmp_path)
    wait_for((out / "checkpoints" / "step_10").exists, run)
    for process in [run.pid, *ranks_of(run)]:
        os.kill(process, 9)
    run.wait()
    one = command(small_world, out, "--save-every", "10", launcher=ONE)
    assert finish(one, tmp_path).returncode == 0
    before, after = column(runs / "one", "answer_tokens"), column(out, "answer_tokens")
    assert after[:10] == before[:10]
    # a step of two batches there is two steps of one batch here
    assert [a + b for a, b in zip(after[10::2], after[11::2])] == before[10:15]


@pytest.mark.slow
def test_when_one_process_dies_the_other_ends(small_world, tmp_path):
    run = start(command(small_world, tmp_path / "run", "--steps", "2000"), tmp_path)
    log = tmp_path / "run" / "log.csv"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 3, run)
    ranks = ranks_of(run)
    assert len(ranks) == 2
    os.kill(ranks[1], 9)
    assert run.wait(timeout=600) != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.slow
def test_a_process_without_a_readable_sample_does_not_stop_the_others(small_world, tmp_path):
    """A damaged clip is skipped, with batches of one sample and an LM that two processes share."""
    data = shutil.copytree(small_world, tmp_path / "AVUIE_2")
    row = json.loads((data / "ks" / "train.json").read_text())[0]
    video = Path(os.path.normpath(data / "ks" / "video" / row["video_path"]))
    damaged = video.read_bytes()[:300]
    video.unlink()
    video.write_bytes(damaged)
    flags = ["--no-cache-features", "--max-bad", "1", "--steps", "8", "--batch-size", "1"]
    flags += ["--no-baseline", "--test-rows", "1"]
    for name, fsdp in (("whole", []), ("sharded", ["--fsdp"])):
        done = finish(command(data, tmp_path / name, *flags, *fsdp), tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "skipped: " in done.stdout
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    assert min(column(whole, "rows")) == 1  # of two processes one had nothing to read
    assert column(sharded, "loss") == pytest.approx(column(whole, "loss"), abs=1e-5)
    assert column(sharded, "rows") == column(whole, "rows")


FAILS = """
import sys
import train
from crab_min import trainer
from crab_min.errors import RunError
from crab_min.runs import processes

update = trainer.update

def failing(*arguments):
    if processes.rank() == 1:
        raise RunError("this process fails")
    return update(*arguments)

trainer.update = failing
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_when_one_process_fails_all_end(small_world, tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    flags = [*FLAGS, "--no-baseline", "--data", str(small_world), "--out", str(tmp_path / "run")]
    run = subprocess.Popen(
        [*TWO, str(script), *flags],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    lock = tmp_path / "run" / "lock"
    wait_for(lock.exists, run)
    began = time.time()
    _, printed = run.communicate(timeout=300)
    assert run.returncode != 0 and time.time() - began < 60
    assert "error: step 1: this process fails" in printed


def test_the_lm_is_shared_out_before_it_is_moved(monkeypatch):
    calls = []

    class Model:
        llm = "LM"

        def to(self, device):
            calls.append(f"to {device}")

    def load_model(settings, device):
        calls.append(f"load on {device}")
        return Model()

    monkeypatch.setattr(processes, "shard", lambda llm: calls.append(f"shard {llm}"))
    settings = Settings(training=TrainingConfig(fsdp=True))
    run = common.Run("crab_plus", "name", settings, torch.device("meta"), Path("run"))
    common.load_backbone(run, load_model)
    assert calls == ["load on cpu", "shard LM", "to meta"]
    run.settings = Settings()
    calls.clear()
    common.load_backbone(run, load_model)
    assert calls == ["load on meta", "to meta"]


def test_all_layers_of_the_lm_are_shared_out_under_one_root(monkeypatch):
    """Of T5 those of encoder and decoder; of Qwen2.5-Omni not those of its encoders of media."""
    sharded = []
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes, "fully_shard", lambda module, **_: sharded.append(module))
    for model, roots in (
        (tiny_blip2("<video>")[0].language_model, ["encoder", "decoder"]),
        (tiny_omni()[0], ["model.language_model"]),
        (tiny_llava()[0], ["model.language_model"]),
        (load_base().llm, ["model"]),
    ):
        sharded.clear()
        processes.shard(model)
        expected = []
        for name in roots:
            root = model.get_submodule(name)
            expected += [*processes.stack_layers(root), root]
        assert sharded == expected


def test_sharing_the_lm_wants_torchrun():
    with pytest.raises(RunError, match="--fsdp: .* start it with torchrun"):
        processes.shard(load_base().llm)


def test_gradients_are_summed_in_messages_of_bounded_size(monkeypatch):
    """One process stands for two: what it sends comes back doubled."""
    sizes = []

    def all_reduce(message):
        sizes.append(message.numel())
        message *= 2

    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(processes, "MESSAGE", 10)
    parameters = [torch.nn.Parameter(torch.ones(n)) for n in (4, 5, 25, 3, 3)]
    for parameter in parameters[:-1]:
        parameter.grad = torch.arange(float(parameter.numel()))
    processes.add_gradients(parameters)
    assert sizes == [5, 9, 25, 3]
    assert parameters[-1].grad is None
    for parameter in parameters[:-1]:
        assert torch.equal(parameter.grad, 2 * torch.arange(float(parameter.numel())))


def test_a_phase_that_is_over_has_no_batches_left_on_more_processes(small_world, monkeypatch):
    """A mask run that continues in its second phase passes over the first."""
    samples = read_samples(small_world, ["ks"], "train")
    progress = Progress(step=8, batches=8)
    monkeypatch.setattr(processes, "count", lambda: 4)
    order = trainer.own_batches(None, samples, TrainingConfig(), progress, range(2))
    assert list(order) == []


# --- parts that a process has no use for ----------------------------------------------------------

PARTS = """
import torch
from crab_min.backbones.composed import load_base
from crab_min.config import AdapterConfig
from crab_min.interface import PromptPart
from crab_min.runs import processes

processes.start()
torch.manual_seed(processes.rank())  # replicas that begin apart
model = load_base()
model.add_adapter(AdapterConfig())
model.set_trainable(["adapter", "connectors"])
trained = [p for p in model.parameters() if p.requires_grad]
processes.broadcast_parameters(trained)
optimizer = torch.optim.AdamW(trained, 1e-3)

frames = torch.zeros(10, 96, 96, 3, dtype=torch.uint8).numpy()
(video,) = model.encode("video", [frames], [10.0])
(sound,) = model.encode("audio", [[torch.randn(16000).numpy()]], [1.0])
ask = PromptPart("text", text="Who?")
silent = [([ask], []), ([PromptPart("video"), ask], [video])]  # text alone, or no sound
whole = [PromptPart("video"), PromptPart("audio"), ask], [video, sound]
for step in range(4):
    # in the last step no process has a sound
    without = processes.rank() == 1 or step == 3
    parts, media = silent[step % 2] if without else whole
    batch = model.collate([parts], [media], ["The dog."])
    (model(batch) / batch.answer_tokens).backward()
    processes.add_gradients(trained)
    learns = model.audio_qformer.query.grad is not None
    assert learns == (step < 3), step
    optimizer.step()
    optimizer.zero_grad()
sums = processes.gather(sum(p.double().sum().item() for p in trained))
assert sums[0] == sums[1], sums
processes.end()
"""


@pytest.mark.slow
def test_processes_that_lack_a_modality_stay_equal(tmp_path):
    script = tmp_path / "parts.py"
    script.write_text(PARTS)
    done = finish([*TWO, str(script)], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


ANSWERS = """
import sys
from pathlib import Path

from crab_min.backbones.composed import load_base
from crab_min.data import read_samples
from crab_min.evaluation import answering
from crab_min.evaluation.answering import Decoding, generate_answers
from crab_min.evaluation.budget import TokenBudget
from crab_min.features import Features
from crab_min.model import AVLanguageModel
from crab_min.runs import processes

processes.start()
whole, sharded = load_base(), load_base()
processes.shard(sharded.llm)
sharded.is_sharded = True
samples = []
for task, count in (("avqa", 7), ("ks", 1), ("meld", 4)):
    samples += read_samples(Path(sys.argv[1]), [task], "test")[:count]
answers = [f"<answer> {name}</answer>" for name in ("yes", "no", "two")]
answering.options = lambda sample: answers if sample.task.name == "avqa" else []

generate, rows = AVLanguageModel.generate, []

def counted(model, batch, limit, beams):
    rows.append(batch.rows)
    return generate(model, batch, limit, beams=beams)

AVLanguageModel.generate = counted
for mode in ("generate", "rank"):
    texts = []
    for model in (whole, sharded):
        rows.clear()
        # two processes make a different number of parts
        budget = TokenBudget(450, sharded=model.is_sharded)
        decoding = Decoding({"avqa": 12, "ks": 5, "meld": 4}, mode, budget=budget)
        partial = Path(f"{mode}{model.is_sharded}.jsonl")
        texts.append(generate_answers(model, Features(model), samples, decoding, partial=partial))
    assert texts[0] == texts[1] and all(texts[0]), texts
    # each process has answered its half, and has accompanied the other
    half = 6 if mode == "generate" else 3
    assert half <= sum(rows) <= half + 2, rows
    assert partial.read_text().count(":") == len(samples)
processes.end()
"""


@pytest.mark.slow
def test_processes_that_share_the_lm_divide_the_evaluation(small_world, tmp_path):
    script = tmp_path / "answers.py"
    script.write_text(ANSWERS)
    done = finish([*TWO, str(script), str(small_world)], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_that_do_not_find_each_other_are_one_line(small_world, tmp_path):
    alone = command(small_world, tmp_path / "run", launcher=ONE)
    done = finish(alone, tmp_path, WORLD_SIZE="2")
    assert done.returncode == 2 and "start them with torchrun" in done.stderr
    assert done.stderr.count("\n") == 1


def test_more_processes_than_gpus_and_a_torch_without_nccl_are_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    advice = "a machine with 1 GPUs; start one per GPU: torchrun --nproc-per-node 1"
    with pytest.raises(RunError, match=advice):
        processes.start()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(RunError, match="no NCCL.*a CUDA build of torch"):
        processes.start()


def test_a_single_process_is_the_first_of_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes.rank() == 0 and processes.count() == 1
    assert processes.gather("value") == ["value"]
    assert processes.on_first(lambda: "made") == "made"
    assert processes.sum_all(2, 0.5) == [2, 0.5]
