"""What a run tells while it goes: log.csv, the bar, and how it is stopped.

places: tokens of a step with padding, what the LM computes on; tokens: those of the answers, which are learned.
"""
import csv
import re
import resource
import signal
import threading
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from crab_min.cli import atomic_write
from crab_min.runs import processes

HEADER = ["step", "loss", "tokens", "lr", "grad_norm", "seconds", "wait", "rows", "places", "metric", "live"]
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12, "3090": 71e12}         # bfloat16 operations a second, dense


class RunLog:
    """log.csv, a line a step, whole to the last: what an interrupted run wrote after its last state is dropped."""

    def __init__(self, folder: Path, done: int):
        self.path, self.last = folder / "log.csv", deque(maxlen=50)
        if processes.rank() == 0:
            kept = list(csv.reader(self.path.read_text().splitlines()))[1:done + 1] if self.path.exists() and done else []
            atomic_write(self.path, "\n".join(",".join(row) for row in [HEADER, *kept]) + "\n")

    def __enter__(self) -> "RunLog":
        self.file = open(self.path, "a", buffering=1) if processes.rank() == 0 else None
        return self

    def __exit__(self, *_) -> None:
        if self.file:
            self.file.close()

    def add(self, **values) -> None:
        """A line, with the columns of HEADER."""
        self.last.append({name: float(values[name]) for name in ("loss", "seconds", "wait", "rows", "places")})
        if self.file:
            self.file.write(",".join(str(values[name]) for name in HEADER) + "\n")

    def said(self, size: int) -> str:
        """Loss, samples and places a second, memory, and the share of the time that went with waiting for data, of the last steps; where the GPU's peak is
        known MFU: the share of it that an LM with `size` weights to multiply uses (4 operations a weight and place: forward, and backward without its weights' gradients)."""
        seconds, wait, rows, places = (sum(each[name] for each in self.last) for name in ("seconds", "wait", "rows", "places"))
        words = [f"loss {self.last[-1]['loss']:.3f}", f"{rows / seconds:.1f} samples/s", f"{places / seconds:,.0f} places/s", f"{memory() / 1e9:.1f} GB", f"waiting {wait / seconds:.0%}"]
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        if peak := next((peak for name, peak in PEAK.items() if name in gpu), 0):
            words.append(f"MFU {4 * size * places / seconds / peak / processes.count():.0%}")
        return ", ".join(words)


def multiplied(llm: nn.Module) -> int:
    """The frozen weights of an LM that each of its places is multiplied with: those of its linears, without encoders and adapters."""
    return sum(m.in_features * m.out_features for name, m in llm.named_modules() if isinstance(m, nn.Linear) and not re.search("visual|vision|audio_tower|lora_", name))


def memory() -> int:
    """Bytes: of the GPU at most so far, without one of this process."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def asked_to_stop():
    """A list that is empty until Ctrl-C is pressed; pressed again, it interrupts at once."""
    asked: list[bool] = []

    def note(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
