"""The log of a run: log.csv and the progress bar; and stopping with Ctrl-C."""

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None

from crab_min.errors import RunError
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


@contextmanager
def open_log(
    folder: Path, done: int, steps: int, log_to: str = ""
) -> Iterator[Callable[[LogRow], None]]:
    """Open log.csv and the progress bar of a run.

    Yields a function that adds a row to both. Every line is written as soon as its step ends. A run
    that continues drops the lines after its last checkpoint.

    Args:
        done: steps before this start of the run.
        steps: all steps of the run.
        log_to: a tracker that gets the rows too, "tensorboard" or "wandb".
    """
    # the first process alone keeps the log: the header, and the lines up to the last checkpoint
    path = Path(os.devnull)
    if processes.rank() == 0:
        path = folder / "log.csv"
        lines = [",".join(f.name for f in fields(LogRow))]
        if path.exists():
            lines += path.read_text(encoding="utf-8").splitlines()[1 : done + 1]
        atomic_write(path, "\n".join(lines) + "\n")

    recent: deque[LogRow] = deque(maxlen=50)
    with (
        open(path, "a", buffering=1, encoding="utf-8") as file,
        open_tracker(log_to if processes.rank() == 0 else "", folder) as track,
        tqdm(desc="training", unit="step", initial=done, total=steps) as bar,
    ):

        def add(row: LogRow) -> None:
            if not recent and processes.rank() == 0:
                tqdm.write(f"step {row.step}: {memory() / 1e9:.1f} GB of memory, the peak so far")
            recent.append(row)
            file.write(",".join(map(cell, asdict(row).values())) + "\n")
            bar.set_postfix_str(summary(recent), refresh=False)
            bar.update()
            track(row)

        yield add


def check_tracker(name: str) -> None:
    """Raise RunError if a tracker is not installed."""
    if name and not find_spec(name):
        raise RunError(f"--log-to {name}: not installed; pip install {name}")


@contextmanager
def open_tracker(name: str, folder: Path) -> Iterator[Callable[[LogRow], None]]:
    """Open a tracker. Yields a function that gives it a row; without a name it does nothing."""
    if name == "wandb":
        import wandb  # optional

        with wandb.init(project="crab_min", name=folder.name, dir=str(folder)) as run:
            yield lambda row: run.log(numbers(row), step=row.step)
    elif name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter  # optional

        with SummaryWriter(str(folder / "tensorboard")) as writer:
            yield lambda row: add_scalars(writer, row)
    else:
        yield lambda row: None


def add_scalars(writer, row: LogRow) -> None:
    """Give the numbers of a row to a SummaryWriter of tensorboard."""
    for name, value in numbers(row).items():
        writer.add_scalar(name, value, row.step)


def numbers(row: LogRow) -> dict[str, float]:
    """Return the numbers of a row by name, without its step."""
    values = asdict(row).items()
    return {name: v for name, v in values if isinstance(v, (int, float)) and name != "step"}


def summary(recent: Sequence[LogRow]) -> str:
    """Describe the last loss, and speed and share of waiting over the recent steps."""
    seconds = sum(row.seconds for row in recent)
    waiting = sum(row.wait for row in recent) / seconds
    samples = sum(row.rows for row in recent) / seconds
    tokens = sum(row.padded_tokens for row in recent) / seconds
    return (
        f"loss {recent[-1].loss:.3f}, {samples:.1f} samples/s, {tokens:,.0f} tokens/s, "
        f"{memory() / 1e9:.1f} GB, waiting {waiting:.0%}"
    )


def cell(value) -> str:
    """Format a value of a LogRow: floats with seven digits, None as ""."""
    if value is None:
        return ""
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def memory() -> int:
    """Return the peak memory so far, in bytes.

    It is that of the GPU, or of this process if there is none.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def stop_requested() -> Iterator[list[bool]]:
    """Yield a list that is empty until Ctrl-C is pressed.

    Pressed again, it interrupts at once.
    """
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
