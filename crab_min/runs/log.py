"""The log of a run: log.csv and the progress bar; and stopping with Ctrl-C."""

import csv
import resource
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from crab_min.runs import processes
from crab_min.runs.folder import atomic_write


@dataclass
class LogRow:
    """A line of log.csv: the numbers of one optimizer step, over all processes."""

    step: int
    lr: float
    seconds: float  # of the whole step
    wait: float  # seconds of the step that were spent waiting for data
    metric: float | None  # on held-out rows; None for steps without an evaluation
    loss: float  # mean cross-entropy per answer token
    answer_tokens: int
    rows: int
    padded_tokens: int  # tokens that the LM computed on
    grad_norm: float  # before clipping
    active: str  # CREMA: the modalities that were trained


class RunLog:
    """The open log.csv and the progress bar of a run.

    Every line is written as soon as its step ends. A run that continues drops the lines after its
    last checkpoint.

    Args:
        done: steps before this start of the run.
        steps: all steps of the run.
    """

    def __init__(self, folder: Path, done: int, steps: int):
        self.path = folder / "log.csv"
        self.done = done
        self.steps = steps
        self.file: TextIO | None = None  # of the first process alone
        self.recent: deque[LogRow] = deque(maxlen=50)

    def __enter__(self) -> "RunLog":
        if processes.rank() == 0:
            # the header, and the lines up to the last checkpoint
            rows = [[f.name for f in fields(LogRow)]]
            if self.path.exists() and self.done:
                lines = self.path.read_text(encoding="utf-8").splitlines()
                rows += list(csv.reader(lines))[1 : self.done + 1]
            text = "\n".join(",".join(row) for row in rows)
            atomic_write(self.path, text + "\n")
            self.file = open(self.path, "a", buffering=1, encoding="utf-8")
        self.bar = tqdm(desc="training", unit="step", initial=self.done, total=self.steps)
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        if self.file:
            self.file.close()

    def add(self, row: LogRow) -> None:
        """Write a line and advance the bar."""
        self.recent.append(row)
        if self.file:
            self.file.write(",".join(map(cell, asdict(row).values())) + "\n")
        self.bar.set_postfix_str(self.summary(), refresh=False)
        self.bar.update()

    def summary(self) -> str:
        """Describe the last loss, and speed and share of waiting over the last 50 steps."""
        seconds = sum(row.seconds for row in self.recent)
        waiting = sum(row.wait for row in self.recent) / seconds
        samples = sum(row.rows for row in self.recent) / seconds
        tokens = sum(row.padded_tokens for row in self.recent) / seconds
        return (
            f"loss {self.recent[-1].loss:.3f}, {samples:.1f} samples/s, {tokens:,.0f} tokens/s, "
            f"{memory() / 1e9:.1f} GB, waiting {waiting:.0%}"
        )


def cell(value) -> str:
    """Format a value of a LogRow: floats with seven digits, None as ""."""
    if value is None:
        return ""
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def memory() -> int:
    """Return the peak memory so far, in bytes: of the GPU, or of this process if it has none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def stop_requested() -> Iterator[list[bool]]:
    """Yield a list that is empty until Ctrl-C is pressed; pressed again, it interrupts at once."""
    requested: list[bool] = []

    def handler(number, frame):
        if requested:
            raise KeyboardInterrupt
        requested.append(True)

    # Python sets signal handlers in the main thread alone
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    previous_handler = signal.signal(signal.SIGINT, handler)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGINT, previous_handler)
