"""Two processes on one run (gloo, on the CPU): the same losses as one, parts that a process has no use for, sharding, and what happens when one dies."""
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import infer
from crab_min.errors import RunError
from crab_min.runs import processes

ROOT = Path(__file__).parent.parent
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
FLAGS = ["--tasks", "ks,s4", "--test-rows", "2", "--steps", "20", "--batch-size", "4", "--dropout", "0", "--no-half", "--train", "adapter+connectors"]


def launch(data: Path, out: Path, *flags: str, launcher: list[str] = TWO) -> subprocess.CompletedProcess:
    return subprocess.run([*launcher, str(ROOT / "train.py"), "--data", str(data), *FLAGS, *flags, "--out", str(out)], cwd=out.parent, env=ENVIRONMENT, capture_output=True, text=True)


def column(run: Path, name: str) -> list[float]:
    return [float(row[name]) for row in csv.DictReader(open(run / "log.csv"))]


def ranks_of(run: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started."""
    return [int(line) for line in subprocess.run(["pgrep", "-P", str(run.pid), "-f", "train.py"], capture_output=True, text=True).stdout.split()]


@pytest.fixture(scope="module")
def runs(small_world, tmp_path_factory) -> Path:
    """One process that takes two batches a step, two that take one each, and two with a sharded LM."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, flags, launcher in (("one", ["--accumulate", "2"], [sys.executable]), ("two", [], TWO), ("sharded", ["--fsdp"], TWO)):
        done = launch(small_world, folder / name, *flags, launcher=launcher)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("other", ["two", "sharded"])
def test_two_processes_are_one_with_twice_the_batches(runs, other):
    assert column(runs / other, "loss") == pytest.approx(column(runs / "one", "loss"), abs=1e-5)
    assert column(runs / other, "tokens") == column(runs / "one", "tokens") and len(column(runs / other, "loss")) == 20
    for file in ("adapter/adapter_model.safetensors", "modules.safetensors"):
        one, two = (load_file(runs / name / file) for name in ("one", other))
        assert one.keys() == two.keys() and all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)


def test_a_run_of_two_is_a_run_like_any_other(runs, small_world, tmp_path):
    assert json.loads((runs / "two" / "config.json").read_text())["processes"] == [[0, 2]]
    assert (runs / "two" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    metrics = json.loads((runs / "two" / "metrics.json").read_text())
    assert {task: r["n"] for task, r in metrics["tasks"].items()} == {"ks": 2, "s4": 2}
    assert infer.main(["--eval", "--data", str(small_world), "--tasks", "ks", "--run", str(runs / "sharded"), "--out", str(tmp_path)]) == 0


def test_on_another_number_of_processes_a_run_goes_on_with_the_next_batches(runs, small_world, tmp_path):
    run = subprocess.Popen([*TWO, str(ROOT / "train.py"), "--data", str(small_world), *FLAGS, "--save-every", "10", "--out", str(tmp_path / "run")], cwd=tmp_path, env=ENVIRONMENT,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 200
    while not (tmp_path / "run" / "state" / "step_10").exists() and time.time() < deadline and run.poll() is None:
        time.sleep(.01)
    for process in [run.pid, *ranks_of(run)]:
        os.kill(process, signal.SIGKILL)
    run.wait()
    assert launch(small_world, tmp_path / "run", "--save-every", "10", launcher=[sys.executable]).returncode == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["processes"] == [[0, 2], [10, 1]]
    before, after = column(runs / "one", "tokens"), column(tmp_path / "run", "tokens")
    assert after[:10] == before[:10]
    assert [a + b for a, b in zip(after[10::2], after[11::2])] == before[10:15]                  # a step of two batches there is two of one here


SENSES = """
import sys
import torch
from crab_min.backbones.composed import load_base
from crab_min.interface import PromptPart
from crab_min.model import ASSETS, AdapterConfig
from crab_min.runs import processes
processes.start()
torch.manual_seed(processes.rank())                                      # replicas that begin apart
model = load_base(ASSETS / "base")
frames, wave = torch.zeros(10, 96, 96, 3, dtype=torch.uint8).numpy(), [torch.randn(16000).numpy()]
video, = model.encode("video", [frames])
sound, = model.encode("audio", [wave])
model.add_adapter(AdapterConfig())
model.set_trainable("adapter+connectors")
trained = [p for p in model.parameters() if p.requires_grad]
processes.broadcast_parameters(trained)
optimizer = torch.optim.AdamW(trained, 1e-3)
ask = PromptPart("text", "Who?")
lacking = [([ask], []), ([PromptPart("video"), ask], [video])]       # text alone; no sound
whole = [PromptPart("video"), PromptPart("audio"), ask], [video, sound]
for step in range(4):
    parts, media = lacking[step % 2] if processes.rank() == 1 or step == 3 else whole          # in the last step no process has a sound
    loss, tokens = model(model.collate([parts], [media], ["The dog."]))
    (loss / tokens).backward()
    processes.add_gradients(trained)
    heard = model.audio_qformer.query.grad is not None
    assert heard == (step < 3), step
    optimizer.step()
    optimizer.zero_grad()
sums = processes.gather(sum(p.double().sum().item() for p in trained))
assert sums[0] == sums[1], sums
processes.end()
"""


def test_processes_that_lack_a_sense_stay_equal(tmp_path):
    script = tmp_path / "senses.py"
    script.write_text(SENSES)
    done = subprocess.run([*TWO, str(script)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_when_one_process_dies_the_other_ends(small_world, tmp_path):
    run = subprocess.Popen([*TWO, str(ROOT / "train.py"), "--data", str(small_world), *FLAGS, "--steps", "2000", "--out", str(tmp_path / "run")], cwd=tmp_path, env=ENVIRONMENT,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = tmp_path / "run" / "log.csv", time.time() + 200
    while not (log.exists() and len(log.read_text().splitlines()) > 3) and time.time() < deadline and run.poll() is None:
        time.sleep(.1)
    assert run.poll() is None
    ranks = ranks_of(run)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert run.wait(timeout=60) != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_a_wrong_world_is_named(small_world, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--data", str(small_world), *FLAGS, "--out", str(tmp_path / "run")], capture_output=True, text=True, cwd=tmp_path,
                          env=ENVIRONMENT | {"WORLD_SIZE": "2"})
    assert done.returncode == 2 and "start them with torchrun" in done.stderr and done.stderr.count("\n") == 1


def test_what_gpus_lack_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RunError, match="a machine with 1 GPUs; start one a GPU: torchrun --nproc-per-node 1"):
        processes.start()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(RunError, match="no NCCL.*a CUDA build of torch"):
        processes.start()
