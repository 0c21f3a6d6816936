"""The run folder: which one it is, whose, and the states in it, from which a run that was killed goes on as if nothing had happened.

state/step_N/ holds all that the next step depends on: trained weights, optimizer moments, the random state of every process, how many batches were
taken. A state, and what a run leaves at its end, appears whole or not at all: it is written beside and renamed.
"""
import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from crab_min.cli import atomic_write
from crab_min.errors import RunError
from crab_min.model import AVLanguageModel
from crab_min.runs import processes


def choose_folder(wanted: dict, out: str, name: str) -> Path:
    """The folder of a run with these settings, checked but not touched: a new one, or that of an interrupted run of the same command. Raises RunError."""
    for number in itertools.count(1):
        folder = Path(out or f"runs/{name}" + (f"-{number}" if number > 1 else ""))
        if not folder.exists() or not any(folder.iterdir()):
            return folder
        try:
            found = json.loads((folder / "config.json").read_text())["train"]
        except (OSError, ValueError, KeyError):
            raise RunError(f"{folder}: exists and is not a run of train.py; choose another --out or remove it") from None
        differs = [k for k in wanted if found.get(k) != wanted[k]]
        if not (folder / "metrics.json").exists() and not differs:
            return folder
        if out and differs and not (folder / "metrics.json").exists():
            raise RunError(f"{folder}: an interrupted run with another --{differs[0].replace('_', '-')} ({found.get(differs[0])!r}, now {wanted[differs[0]]!r}); "
                           "use its value to continue it, or another --out")
        if out:
            raise RunError(f"{folder}: this run is finished and will not be overwritten; choose another --out or remove it")


def lock_run(folder: Path, needed: int):
    """Make the folder and hold it until the process ends. Raises RunError: another process holds it, it cannot be written, fewer than `needed` bytes are free."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)                       # not flock, which the worker processes would hold on to after a kill
    except OSError:
        raise RunError(f"{folder}: in use by another process; wait for it, or choose another --out") from None
    if (free := shutil.disk_usage(folder).free) + sum(file.stat().st_size for file in folder.rglob("*")) < needed:             # states that are there make room for others
        raise RunError(f"{folder}: {free / 1e6:.0f} MB are free there, and the states of this run want {needed / 1e6:.0f} MB; free some, lower --keep, or choose another --out")
    return file


def atomic_replace(final: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside, then put it, whole and on the disk, in the place of `final`."""
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"{final}: cannot be written ({error}); free some space, then the same command goes on from the last state") from error
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)


def save_trained(folder: Path, model: AVLanguageModel) -> None:
    """adapter/, patches/ and modules.safetensors of a run, each whole."""
    atomic_replace(folder / "trained", model.save_trained)
    for new in (folder / "trained").iterdir():
        if (old := folder / new.name).is_dir():
            shutil.rmtree(old)
        new.rename(old)
    (folder / "trained").rmdir()


def save_state(folder: Path, progress: dict, model: AVLanguageModel, optimizer: torch.optim.Optimizer, keep: int = 1) -> None:
    """state/step_N/, N = progress["step"]; the newest `keep` stay. Every process calls it, the first writes."""
    dice = processes.gather({"cpu": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})})
    if processes.rank():
        return
    moments = {f"{i}.{key}": torch.as_tensor(value) for i, state in optimizer.state_dict()["state"].items() for key, value in state.items()}

    def write(temporary: Path) -> None:
        model.save_trained(temporary)
        save_file({**moments, **{f"rng.{r}.{device}": state for r, each in enumerate(dice) for device, state in each.items()}}, temporary / "optimizer.safetensors")
        atomic_write(temporary / "progress.json", json.dumps(progress))
    atomic_replace(folder / "state" / f"step_{progress['step']}", write)
    for old in states_of(folder)[:-keep]:
        shutil.rmtree(old)


def states_of(folder: Path) -> list[Path]:
    """The states of a run, the newest last."""
    return sorted((folder / "state").glob("step_*"), key=lambda p: int(p.name[5:]))


def load_state(folder: Path, model: AVLanguageModel, optimizer: torch.optim.Optimizer) -> dict:
    """Restore the newest state into model, optimizer and random generators; its progress ({}: there is none). With more processes than then, the new ones keep their random state."""
    if not (states := states_of(folder)):
        return {}
    model.restore_trained(states[-1])
    state: dict = {}
    for name, value in load_file(states[-1] / "optimizer.safetensors").items():
        index, key = name.split(".", 1)
        if index != "rng":
            state.setdefault(int(index), {})[key] = value
        elif key == f"{processes.rank()}.cpu":
            torch.set_rng_state(value)
        elif key == f"{processes.rank()}.cuda" and torch.cuda.is_available():
            torch.cuda.set_rng_state(value)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((states[-1] / "progress.json").read_text())
