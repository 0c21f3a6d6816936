"""What several benchmarks share: their flags, timing in turns, and peak memory.

Importing this module makes `crab_min` of this checkout importable.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

NO_BARS = os.environ | {"TQDM_DISABLE": "1"}  # environment of commands that a benchmark runs


def make_parser(description: str, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with --repeats and --json, described by a docstring's first line."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=repeats)
    help_text = "print one list, with one object per size, and nothing else"
    parser.add_argument("--json", action="store_true", help=help_text)
    return parser


def add_device_flags(parser: argparse.ArgumentParser, device: str) -> None:
    parser.add_argument("--device", default=device, choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])


def now(device: str) -> float:
    """Return the time in seconds, after the device has finished what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(run: Callable[[], object], device: str = "cpu") -> float:
    """Return how long one call takes."""
    began = time.perf_counter()
    run()
    return now(device) - began


def take_turns(measures: dict[str, Callable], repeats: int, warm_up: int = 0) -> dict[str, list]:
    """Call every function once per repeat and return their results by name.

    They take turns so that what else the machine does meets all of them alike.

    Args:
        warm_up: number of repeats before those that count.
    """
    results = {name: [] for name in measures}
    for repeat in range(-warm_up, repeats):
        for name, measure in measures.items():
            result = measure()
            if repeat >= 0:
                results[name].append(result)
    return results


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Return the most bytes that a call holds at once, above what there was before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    # on a CPU: every allocation and release that the profiler saw, in order
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak
