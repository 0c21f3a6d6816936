"""Kills a small training run with SIGKILL at 20 random moments, each fourth while it writes a state, and starts it again each time.

    python benchmarks/kill.py [--kills 20] [--seed 0]

Whenever a run has come to its end its weights and losses are compared, bit for bit, with those of a run that was never interrupted, and the next one
begins. All along, and after each kill, every file that carries its final name is read. Exit status 1: something differed, or could not be read.
"""
import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, str(ROOT / "train.py"), "--world-clips", "64", "--world-test", "8", "--tasks", "ks,s4,avqa", "--test-rows", "8", "--steps", "100", "--batch-size", "4",
           "--save-every", "3", "--eval-every", "20", "--eval-rows", "4", "--dropout", "0.1", "--r", "4", "--train", "adapter+connectors"]
QUIET = os.environ | {"TQDM_DISABLE": "1"}
READERS = {".json": lambda path: json.loads(path.read_text()), ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()], ".safetensors": load_file,
           ".csv": lambda path: [float(row["loss"]) for row in csv.DictReader(open(path))], ".png": lambda path: Image.open(path).load()}


def unreadable(run: Path) -> list[str]:
    """The files of a run that cannot be read, and why. Those written beside, under a name with a dot, do not count, nor those that go meanwhile."""
    wrong = []
    for folder, below, files in os.walk(run):                                 # which passes over what goes while it looks
        below[:] = [name for name in below if not name.startswith(".")]
        for path in (Path(folder) / name for name in files if Path(name).suffix in READERS and not name.startswith(".")):
            try:
                READERS[path.suffix](path)
            except Exception as error:                                        # whatever it is, it is what is looked for
                if path.exists():
                    wrong.append(f"{path.relative_to(run)}: {error}")
    return wrong


def result(run: Path) -> dict:
    """What must not depend on the kills: weights, losses, scores."""
    weights = {f"{file}/{name}": tensor.numpy().tobytes() for file in ("adapter/adapter_model.safetensors", "modules.safetensors", "best/modules.safetensors")
               for name, tensor in load_file(run / file).items()}
    log = [{name: row[name] for name in ("step", "loss", "tokens", "lr", "grad_norm", "metric")} for row in csv.DictReader(open(run / "log.csv"))]
    return {"weights": weights, "log": log, "tasks": json.loads((run / "metrics.json").read_text())["tasks"]}


def writing(run: Path, since: float) -> list[str]:
    """The folders that a process that was started at `since` is writing: best, a state, what was trained."""
    found = []
    for path in [*run.glob(".*.tmp"), *(run / "state").glob(".*.tmp")]:
        try:
            found += [path.name[1:-4]] if path.is_dir() and path.stat().st_mtime > since else []
        except FileNotFoundError:
            continue
    return found


def where(run: Path, since: float) -> str:
    """What such a process was doing when it ended."""
    log = run / "log.csv"
    if not log.exists() or log.stat().st_mtime < since:
        return "before its first step"
    return ", writing ".join([f"at step {len(log.read_text().splitlines()) - 1}", *writing(run, since)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, rows, wrong, finished = random.Random(given.seed), [], [], 0
    with tempfile.TemporaryDirectory() as folder, tqdm(total=given.kills, desc="kills") as bar:
        began = time.time()
        subprocess.run([*COMMAND, "--out", "whole"], cwd=folder, check=True, capture_output=True, env=QUIET)
        seconds, whole, number = time.time() - began, result(Path(folder) / "whole"), 0
        run = Path(folder) / "killed-0"
        while len(rows) < given.kills or (run / "config.json").exists():
            process = subprocess.Popen([*COMMAND, "--out", run.name], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=QUIET)
            in_save, start = len(rows) % 4 == 3, time.time()
            moment = start + (float("inf") if len(rows) >= given.kills or in_save else rng.uniform(0, seconds))
            while process.poll() is None and time.time() < moment and not (in_save and writing(run, start)):
                if not in_save:                                               # reading takes longer than a state takes to write
                    wrong += unreadable(run)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
                wrong += unreadable(run)
                states = sorted((int(path.name[5:]) for path in (run / "state").glob("step_*")), reverse=True)
                rows.append((number, f"{time.time() - began:.0f} s", where(run, start), f"step {states[0]}" if states else "none", not wrong))
                bar.update()
            elif process.returncode:
                wrong.append(f"run {number} ended with {process.returncode}: {process.stderr.read()[-500:]}")
                break
            if (run / "metrics.json").exists():                               # the last file: killed after it or not, the run is finished
                found = result(run)
                wrong += [f"run {number}: other {what} than without kills" for what in whole if found[what] != whole[what]]
                finished, number = finished + 1, number + 1
                run = Path(folder) / f"killed-{number}"
    print(f"{'kill':>4}  {'run':>3}  {'after':>6}  {'while':<30}{'newest state':<14}files whole")
    for i, (run, after, at, state, whole_files) in enumerate(rows):
        print(f"{i + 1:>4}  {run:>3}  {after:>6}  {at:<30}{state:<14}{'yes' if whole_files else 'NO'}")
    print(f"{finished} runs came to their end, after {len(rows)} kills; weights, losses and scores {'bit-equal to' if not wrong else 'NOT as in'} a run without kills")
    print("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
