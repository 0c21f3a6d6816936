"""How fast training goes, by how it is fed: `python benchmarks/training.py`. One run of train.py each, 40 steps on the built-in world; about four minutes on 2 cores.

samples/s is over the steps after the fifth, with waiting for data; "before" are the seconds before the first step (decoding and encoding what is kept).
Compare rows of one table: the machine is another one tomorrow.
"""
import csv
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS, SKIP = 40, 5
WAYS = {
    "decoded and encoded for each batch, no workers": ["--no-cache-features", "--workers", "0"],
    "decoded and encoded for each batch, 2 workers": ["--no-cache-features", "--workers", "2"],
    "the same, features on disk (second run)": ["--no-cache-features", "--workers", "2", "--feature-cache", "cache"],
    "features in memory": [],
    "features in memory and on disk (second run)": ["--feature-cache", "cache"],
    "features in memory, batches by length": ["--group"],
}


def measure(folder: Path, flags: list[str]) -> tuple[float, float, float, float]:
    """(samples a second, share of the time that went with waiting, tokens with padding a sample, seconds before the first step)."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    subprocess.run([sys.executable, str(ROOT / "train.py"), "--steps", str(STEPS), "--test-rows", "1", "--world-clips", "300", "--world-test", "8", "--out", str(run), *flags],
                   cwd=folder, check=True, capture_output=True)
    rows = [{name: float(value or 0) for name, value in row.items() if name != "live"} for row in csv.DictReader(open(run / "log.csv"))]
    some = rows[SKIP:]
    seconds, wait, samples, places = (sum(row[name] for row in some) for name in ("seconds", "wait", "rows", "places"))
    return samples / seconds, wait / seconds, places / samples, json.loads((run / "metrics.json").read_text())["before"]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure(folder, ["--feature-cache", "cache"])                         # builds the world and fills the cache
        print(f"{platform.processor() or platform.machine()}, {STEPS - SKIP} steps of 16 samples\n")
        print(f"| {'how it is fed':<48} | samples/s | waiting | tokens a sample | before, s |\n|---|---|---|---|---|")
        for way, flags in WAYS.items():
            rate, wait, places, before = measure(folder, flags)
            print(f"| {way:<48} | {rate:.1f} | {wait:.0%} | {places:.0f} | {before:.0f} |", flush=True)


if __name__ == "__main__":
    main()
