"""The run folder: its choice, its lock, and its checkpoints.

A killed run continues from a checkpoint.

checkpoints/step_N/ holds all that the next step depends on: trained weights, optimizer moments, the
random state of every process, and how many batches were taken. Files and folders appear whole or
not at all: they are written under a temporary name and renamed. A checkpoint is copied to the CPU
and written by a thread, so that training stops for the copy alone.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from crab_min.config import RECIPES, Settings, settings_from, settings_from_old
from crab_min.errors import RunError
from crab_min.interface import PromptLayout, QuestionForm
from crab_min.runs import processes
from crab_min.text_files import read_json
from crab_min.trained_parts import copy_to_cpu, copy_trained

# settings that do not change the result: a run may continue with other values of these
FREE = {
    "data": ["max_bad", "allow_missing", "workers", "cache_features"],
    "run": [
        "out",
        "device",
        "log_to",
        "save_every",
        "save_minutes",
        "keep_checkpoints",
        "eval_batch_tokens",
    ],
}


# --- files that appear whole or not at all -------------------------------------------------------


def atomic_write(path: Path, text: str) -> None:
    """Write a text file under a temporary name, flush it to the disk and rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def atomic_replace(final: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, flush it to disk, rename it to `final`.

    Raises:
        RunError: the disk is full or cannot be written; `final` stays as it was.
    """
    # a temporary folder may be left from a run that was killed
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"{final}: cannot be written ({error}); free some space, then the same command "
            "continues from the last checkpoint"
        ) from error

    # a folder can only be renamed to a name that is free
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)


Writer = Callable[[Callable[[], None]], None]


@contextmanager
def background_writer() -> Iterator[Writer]:
    """Yield a function that calls another one in a thread, after the call before has ended.

    What a call raises is raised when the next one begins, or at the end of the context.
    """
    calls: list[Future] = []

    def wait() -> None:
        while calls:
            calls.pop().result()

    def begin(write: Callable[[], None]) -> None:
        wait()
        calls.append(pool.submit(write))

    with ThreadPoolExecutor(1) as pool:
        yield begin
        wait()


# --- config.json ---------------------------------------------------------------------------------


@dataclass
class SavedRun:
    """The contents of config.json.

    Attributes:
        recipe: module of crab_min.recipes that made the run.
        steps: optimizer steps of the whole run.
        token_limits: maximum number of answer tokens, by task.
        layout: how its prompts are laid out; None in runs of older versions.
        form: the form of its questions, if it learned rows of one's own.
        prompts: the instructions of --prompts, by task name.
    """

    preset: str
    recipe: str
    settings: Settings
    steps: int = 0
    token_limits: dict[str, int] = field(default_factory=dict)
    layout: PromptLayout | None = None
    form: QuestionForm | None = None
    prompts: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write config.json."""
        atomic_write(folder / "config.json", json.dumps(asdict(self), indent=1))


def load_saved_run(folder: Path) -> SavedRun:
    """Read config.json of a run; the flat form of the first version is read too.

    Raises:
        RunError: the file is missing, or is not that of a run.
    """
    try:
        saved = read_json(folder / "config.json")

        # the first version: flat settings under "train"
        if "train" in saved:
            recipe, settings = settings_from_old(saved["train"])
            return SavedRun(
                saved.get("preset", ""), recipe, settings, saved.get("steps", 0), saved["limits"]
            )

        settings = settings_from(RECIPES[saved["recipe"]], saved["settings"])
        layout = PromptLayout(**saved["layout"]) if saved["layout"] else None
        form = None
        if saved.get("form"):
            options = tuple(saved["form"]["options"])
            form = QuestionForm(**{**saved["form"], "options": options})
        return SavedRun(**{**saved, "settings": settings, "layout": layout, "form": form})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder}: not a run of train.py ({type(error).__name__}: {error}); give a finished "
            "run with --run, or train one: python train.py"
        ) from None


def difference(old: Settings, new: Settings) -> str:
    """Name the first setting in which two runs differ, with both values.

    Returns "" if none differs.
    """
    old_groups, new_groups = asdict(old), asdict(new)
    for group, values in new_groups.items():
        for name, value in values.items():
            old_value = old_groups.get(group, {}).get(name)
            if old_value != value and name not in FREE.get(group, []):
                return f"--{name.replace('_', '-')} ({old_value!r}, now {value!r})"
    return ""


# --- choosing and locking ------------------------------------------------------------------------


def choose_folder(settings: Settings, name: str) -> Path:
    """Find the folder of a run: a new one, or that of an interrupted run.

    The interrupted run must be of the same command. Nothing is written. Without --out the folder is
    runs/NAME, or the next free runs/NAME-2, ... An interrupted run with other settings, which is
    passed over, is named in one line.

    Raises:
        RunError: --out names a finished run, a run with other settings, or a folder without a run.
    """
    out = settings.run.out
    passed = []
    for number in itertools.count(1):
        # a free folder
        suffix = f"-{number}" if number > 1 else ""
        folder = Path(out or f"runs/{name}{suffix}")
        if not folder.exists() or not any(folder.iterdir()):
            break

        # the same run, interrupted
        try:
            saved = load_saved_run(folder)
        except RunError:
            raise RunError(
                f"{folder}: exists and is not a run of train.py; choose another --out or remove it"
            ) from None
        finished = (folder / "metrics.json").exists()
        differs = difference(saved.settings, settings)
        if not finished and not differs:
            break

        # another run: an error if --out names it, else the next number
        if out and finished:
            raise RunError(
                f"{folder}: this run is finished and will not be overwritten; choose another "
                "--out or remove it"
            )
        if out:
            raise RunError(
                f"{folder}: an interrupted run with another {differs}; use its value to continue "
                "it, or another --out"
            )
        if not finished:
            passed.append(f"{folder}, an interrupted run with another {differs}, is left as it is")
    if passed:
        print(f"{'; '.join(passed)}; this run is {folder}")
    return folder


def lock_run(folder: Path) -> TextIO:
    """Make the folder, lock it, and return the lock file.

    The lock file unlocks the folder when it closes. Windows has no such lock.

    Raises:
        RunError: another process has locked the folder, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w", encoding="utf-8")
        # lockf, not flock: worker processes that outlive a kill would keep a flock
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(
            f"{folder}: in use by another process; wait for it, or choose another --out"
        ) from None
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be written ({error.strerror}); choose another --out"
        ) from None
    return file


# --- trained parts and checkpoints ---------------------------------------------------------------


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        step: optimizer steps done.
        batches: batches taken so far, by all processes.
        best: the best metric on held-out rows so far.
        step_state: state of the step object (CREMA's early exit).
    """

    step: int = 0
    batches: int = 0
    best: float | None = None
    step_state: dict = field(default_factory=dict)


def write_trained(folder: Path, model: nn.Module) -> None:
    """Write the trained parts of a model into its run folder; each appears whole."""
    atomic_replace(folder / "trained", model.save_trained)
    for new in (folder / "trained").iterdir():
        old = folder / new.name
        if old.is_dir():
            shutil.rmtree(old)
        new.rename(old)
    (folder / "trained").rmdir()


def save_best(folder: Path, progress: Progress, model: nn.Module, writer: Writer) -> None:
    """Write RUN/best, a run folder of its own that holds the best weights so far."""
    if processes.rank() > 0:
        return
    write_parts, described = copy_trained(model), json.dumps(asdict(progress))

    def write(temporary: Path) -> None:
        write_parts(temporary)
        shutil.copy(folder / "config.json", temporary)
        atomic_write(temporary / "progress.json", described)

    writer(lambda: atomic_replace(folder / "best", write))


def checkpoints_of(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, the newest last."""
    checkpoints = (folder / "checkpoints").glob("step_*")
    return sorted(checkpoints, key=lambda path: int(path.name.removeprefix("step_")))


def save_checkpoint(
    folder: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int,
    writer: Writer,
) -> None:
    """Copy all that the next step depends on, and begin to write it to checkpoints/step_N/.

    Every process calls it, because each has a random state. The first one writes, and then removes
    the oldest checkpoints.

    Args:
        keep: how many of the newest checkpoints stay.

    Raises:
        RunError: a weight is not finite; older checkpoints stay.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise RunError(
                f"step {progress.step}: {name} has weights that are not finite. The last "
                "checkpoint is kept: train with a lower --lr into another --out"
            )

    # the random states of all processes
    random_state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_state["cuda"] = torch.cuda.get_rng_state()
    random_states = processes.gather(random_state)
    if processes.rank() > 0:
        return

    # optimizer.safetensors is flat: "PARAMETER.moment", "rng.RANK.device"
    tensors = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"{index}.{key}"] = torch.as_tensor(value)
    for rank, states in enumerate(random_states):
        for device, state in states.items():
            tensors[f"rng.{rank}.{device}"] = state
    tensors, write_parts = copy_to_cpu(tensors), copy_trained(model)
    described = json.dumps(asdict(progress))

    def write_checkpoint(temporary: Path) -> None:
        write_parts(temporary)
        save_file(tensors, temporary / "optimizer.safetensors")
        atomic_write(temporary / "progress.json", described)

    def write() -> None:
        # the new checkpoint is whole before an old one goes
        atomic_replace(folder / "checkpoints" / f"step_{progress.step}", write_checkpoint)
        for old in checkpoints_of(folder)[:-keep]:
            shutil.rmtree(old)

    writer(write)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore the newest checkpoint into model, optimizer and random generators.

    If more processes load a checkpoint than wrote it, the additional ones keep their random state.

    Returns:
        The progress of the run; Progress() if there is no checkpoint.
    """
    # trained weights
    checkpoints = checkpoints_of(folder)
    if not checkpoints:
        return Progress()
    newest = checkpoints[-1]
    model.restore_trained(newest)

    # optimizer moments, and the random state of this process
    moments: dict[int, dict] = {}
    for name, value in load_file(newest / "optimizer.safetensors").items():
        index, key = name.split(".", 1)
        if index != "rng":
            moments.setdefault(int(index), {})[key] = value
        elif key == f"{processes.rank()}.cpu":
            torch.set_rng_state(value)
        elif key == f"{processes.rank()}.cuda" and torch.cuda.is_available():
            torch.cuda.set_rng_state(value)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return Progress(**json.loads((newest / "progress.json").read_text(encoding="utf-8")))
