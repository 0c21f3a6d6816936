"""Is a killed run the run it would have been? `python benchmarks/kill.py [TIMES]`: a small run is killed with SIGKILL at random moments and continued, until it has been killed
TIMES times (20) and ends; then its adapter is compared, bit for bit, with that of a run that was left alone. After each kill every file of the run folder is read.
"""
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
FLAGS = ["--world-clips", "24", "--world-test", "4", "--tasks", "ks,s4", "--test-rows", "1", "--steps", "60", "--batch-size", "4", "--save-every", "1", "--keep", "2", "--dropout", ".1",
         "--train", "adapter+connectors", "--eval-every", "20", "--eval-rows", "4"]


def begin(folder: Path, name: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *FLAGS, "--out", name], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def check(run: Path) -> tuple[int, int, bool]:
    """(step of the newest state, files read, whether one was being written). Raises where a file is not whole."""
    count = 0
    for file in run.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(run).parts)                # being written, and not read by anyone
        if file.is_file() and not hidden:
            count += 1
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as tensors:
                    for key in tensors.keys():
                        tensors.get_tensor(key)
            elif file.suffix == ".json":
                json.loads(file.read_text())
    steps = [int(p.name[5:]) for p in run.glob("state/step_*")]
    return max(steps, default=0), count, any(run.glob("state/.*"))


def main(times: int) -> None:
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assert begin(folder, "whole").wait() == 0
        print("| kill | seconds after the first new state | newest state | files read | in the middle of a save |\n|---|---|---|---|---|")
        for number in range(times):
            before = check(folder / "killed")[0] if (folder / "killed").exists() else 0
            process, moment = begin(folder, "killed"), rng.random() * .5
            while process.poll() is None and not (folder / "killed" / "state" / f"step_{before + 1}").exists():
                time.sleep(.001)
            time.sleep(moment)
            if process.poll() is not None:
                raise SystemExit(f"the run ended before kill {number + 1}: {process.stderr.read().decode()[-500:]}")
            process.send_signal(signal.SIGKILL)
            process.wait()
            step, files, saving = check(folder / "killed")
            print(f"| {number + 1} | {moment:.3f} | {step} | {files} | {'yes' if saving else 'no'} |", flush=True)
        assert begin(folder, "killed").wait() == 0
        whole, killed = (load_file(folder / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "killed"))
        same = sum(bool((whole[key] == killed[key]).all()) for key in whole)
        print(f"\n{same} of {len(whole)} tensors of the adapter are bit-equal to those of the run that was left alone")
        lines = [[line.split(",")[:5] for line in (folder / name / "log.csv").read_text().splitlines()] for name in ("whole", "killed")]
        print(f"losses, learning rates and gradient norms of all {len(lines[0]) - 1} steps: {'equal' if lines[0] == lines[1] else 'NOT equal'}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
