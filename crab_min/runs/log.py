"""log.csv, the text of the progress bar, and stopping with Ctrl-C."""

import csv
import resource
import signal
import threading
from collections import deque
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

from crab_min.runs import processes
from crab_min.runs.folder import atomic_write


@dataclass
class LogRow:
    """A line of log.csv: one optimizer step, over all processes."""

    step: int
    lr: float
    seconds: float
    wait: float  # of the seconds, those spent waiting for data
    metric: float | None  # on held-out rows, where the step was evaluated
    loss: float  # mean cross-entropy per answer token
    answer_tokens: int
    rows: int
    padded_tokens: int  # tokens that the LM computed on
    grad_norm: float  # before clipping
    active: str  # CREMA: the modalities that were trained


class RunLog:
    """log.csv and the progress bar of a run that has done some of its steps.

    The file is complete to its last line; lines after the last checkpoint are dropped.
    """

    def __init__(self, folder: Path, done: int, steps: int):
        self.path, self.done, self.steps = folder / "log.csv", done, steps
        self.recent: deque[LogRow] = deque(maxlen=50)

    def __enter__(self) -> "RunLog":
        self.file = None
        if processes.rank() == 0:
            kept: list[list[str]] = []
            if self.path.exists() and self.done:
                lines = self.path.read_text(encoding="utf-8").splitlines()
                kept = list(csv.reader(lines))[1 : self.done + 1]
            header = [f.name for f in fields(LogRow)]
            text = "\n".join(",".join(row) for row in [header, *kept])
            atomic_write(self.path, text + "\n")
            self.file = open(self.path, "a", buffering=1, encoding="utf-8")
        self.bar = tqdm(desc="training", unit="step", initial=self.done, total=self.steps)
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        if self.file:
            self.file.close()

    def add(self, row: LogRow) -> None:
        """Write a line and move the bar."""
        self.recent.append(row)
        if self.file:
            self.file.write(",".join(map(cell, asdict(row).values())) + "\n")
        self.bar.set_postfix_str(self.summary(), refresh=False)
        self.bar.update()

    def summary(self) -> str:
        """Describe the last 50 steps: loss, speed, memory, share of the time spent waiting."""
        seconds = sum(row.seconds for row in self.recent)
        waiting = sum(row.wait for row in self.recent) / seconds
        samples = sum(row.rows for row in self.recent) / seconds
        tokens = sum(row.padded_tokens for row in self.recent) / seconds
        return (
            f"loss {self.recent[-1].loss:.3f}, {samples:.1f} samples/s, {tokens:,.0f} tokens/s, "
            f"{memory() / 1e9:.1f} GB, waiting {waiting:.0%}"
        )


def cell(value) -> str:
    """Write a value of a LogRow; numbers with seven digits, None as nothing."""
    if value is None:
        return ""
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def memory() -> int:
    """Return the peak memory so far in bytes: of the GPU, or without one of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def stop_requested():
    """Yield a list that is empty until Ctrl-C is pressed; pressed again, it interrupts at once."""
    requested: list[bool] = []

    def handler(number, frame):
        if requested:
            raise KeyboardInterrupt
        requested.append(True)

    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGINT, before)
