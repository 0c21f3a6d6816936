"""Kill a small training run with SIGKILL at random moments, and start it again each time.

    python benchmarks/kill.py [--kills 20] [--seed 0]

Each fourth kill comes while the run writes a checkpoint. When a run has reached its end, its
weights, losses and scores are compared, bit for bit, with those of a run that was never
interrupted, and the next run begins. All along, and after each kill, every file that carries its
final name is read.
The exit status is 1 if something differed or could not be read.
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
from dataclasses import dataclass
from pathlib import Path

from common import NO_BARS, ROOT
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

FLAGS = """--world-clips 64 --world-test 8 --tasks ks,s4,avqa --test-rows 8 --steps 100
--batch-size 4 --save-every 3 --eval-every 20 --eval-rows 4 --dropout 0.1 --r 4
--trainable adapter,connectors"""
COMMAND = [sys.executable, str(ROOT / "train.py"), *FLAGS.split()]
# what is compared of a run
WEIGHTS = (
    "adapter/adapter_model.safetensors",
    "parts/visual_qformer.safetensors",
    "best/parts/visual_qformer.safetensors",
)
COLUMNS = ("step", "loss", "answer_tokens", "lr", "grad_norm", "metric")


# --- the files of a run ---------------------------------------------------------------------------
def read_jsonl(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_log(path: Path) -> list[float]:
    return [float(row["loss"]) for row in csv.DictReader(open(path))]


READERS = {
    ".json": lambda path: json.loads(path.read_text()),
    ".jsonl": read_jsonl,
    ".safetensors": load_file,
    ".csv": read_log,
    ".png": lambda path: Image.open(path).load(),
}


def unreadable(run: Path) -> list[str]:
    """Read all files of a run, and return which cannot be read and why.

    A file whose name, or whose folder's name, begins with a dot is being written and does not
    count. Nor does a file that disappears meanwhile.
    """
    problems = []
    for folder, subfolders, files in os.walk(run):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            path = Path(folder) / name
            if name.startswith(".") or path.suffix not in READERS:
                continue
            try:
                READERS[path.suffix](path)
            except Exception as error:  # any error at all is what this looks for
                if path.exists():
                    problems.append(f"{path.relative_to(run)}: {error}")
    return problems


def result(run: Path) -> dict:
    """Return what must not depend on kills: weights, losses, scores."""
    weights = {}
    for file in WEIGHTS:
        for name, tensor in load_file(run / file).items():
            weights[f"{file}/{name}"] = tensor.numpy().tobytes()
    log = []
    for row in csv.DictReader(open(run / "log.csv")):
        log.append({name: row[name] for name in COLUMNS})
    metrics = json.loads((run / "metrics.json").read_text())
    return {"weights": weights, "log": log, "tasks": metrics["tasks"]}


def folders_in_writing(run: Path, since: float) -> list[str]:
    """Return the folders that a process started at `since` is writing: best, a state, weights."""
    names = []
    for path in [*run.glob(".*.tmp"), *(run / "state").glob(".*.tmp")]:
        try:
            if path.is_dir() and path.stat().st_mtime > since:
                names.append(path.name.removeprefix(".").removesuffix(".tmp"))
        except FileNotFoundError:
            continue
    return names


def activity(run: Path, since: float) -> str:
    """Return what a process started at `since` was doing when it ended."""
    log = run / "log.csv"
    if not log.exists() or log.stat().st_mtime < since:
        return "before its first step"
    step = len(log.read_text().splitlines()) - 1
    return ", writing ".join([f"at step {step}", *folders_in_writing(run, since)])


def newest_state(run: Path) -> str:
    steps = [int(path.name.removeprefix("step_")) for path in (run / "state").glob("step_*")]
    return f"step {max(steps)}" if steps else "none"


# --- killing --------------------------------------------------------------------------------------
@dataclass
class Kill:
    """A line of the table."""

    run: int
    after: float  # seconds since the benchmark began
    activity: str
    newest_state: str
    files_whole: bool


class Trial:
    """Runs that are killed and started again, what was found wrong, and how many came to an end."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng = folder, random.Random(seed)
        self.kills: list[Kill] = []
        self.problems: list[str] = []
        self.finished = 0
        self.began = time.time()
        subprocess.run(
            [*COMMAND, "--out", "whole"], cwd=folder, check=True, capture_output=True, env=NO_BARS
        )
        self.whole_seconds = time.time() - self.began
        self.expected = result(folder / "whole")

    @property
    def run(self) -> Path:
        """The folder of the run in progress."""
        return self.folder / f"killed-{self.finished}"

    def kill_runs(self, count: int) -> None:
        """Kill runs `count` times, and let the last one come to its end."""
        with tqdm(total=count, desc="kills") as bar:
            while len(self.kills) < count or (self.run / "config.json").exists():
                if not self.start_and_kill(spare=len(self.kills) >= count):
                    return
                bar.update(len(self.kills) - bar.n)
                # metrics.json is the last file: with it the run is finished, killed or not
                if (self.run / "metrics.json").exists():
                    self.compare()

    def start_and_kill(self, spare: bool) -> bool:
        """Start the run in progress and kill it; return False where it failed by itself.

        Args:
            spare: do not kill it.
        """
        run, start = self.run, time.time()
        during_save = not spare and len(self.kills) % 4 == 3
        deadline = float("inf")
        if not spare and not during_save:
            deadline = start + self.rng.uniform(0, self.whole_seconds)
        process = subprocess.Popen(
            [*COMMAND, "--out", run.name],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=NO_BARS,
        )

        # wait for the moment; reading all files takes longer than a state takes to write
        while process.poll() is None and time.time() < deadline:
            if not during_save:
                self.problems += unreadable(run)
            elif folders_in_writing(run, start):
                break

        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            self.problems += unreadable(run)
            kill = Kill(
                self.finished,
                time.time() - self.began,
                activity(run, start),
                newest_state(run),
                not self.problems,
            )
            self.kills.append(kill)
        elif process.returncode:
            error = process.stderr.read()[-500:]
            self.problems.append(f"run {self.finished} ended with {process.returncode}: {error}")
            return False
        return True

    def compare(self) -> None:
        """Compare the finished run with the one that was never interrupted; begin the next."""
        reached = result(self.run)
        for name, value in self.expected.items():
            if reached[name] != value:
                self.problems.append(f"run {self.finished}: other {name} than without kills")
        self.finished += 1

    def report(self) -> str:
        header = f"{'kill':>4}  {'run':>3}  {'after':>6}  {'while':<30}{'newest state':<14}"
        lines = [header + "files whole"]
        for number, kill in enumerate(self.kills, start=1):
            whole = "yes" if kill.files_whole else "NO"
            lines.append(
                f"{number:>4}  {kill.run:>3}  {f'{kill.after:.0f} s':>6}  {kill.activity:<30}"
                f"{kill.newest_state:<14}{whole}"
            )
        verdict = "NOT as in" if self.problems else "bit-equal to"
        lines.append(
            f"{self.finished} runs came to their end, after {len(self.kills)} kills; "
            f"weights, losses and scores {verdict} a run without kills"
        )
        return "\n".join(lines + self.problems)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder), args.seed)
        trial.kill_runs(args.kills)
        print(trial.report())
    return int(bool(trial.problems))


if __name__ == "__main__":
    sys.exit(main())
