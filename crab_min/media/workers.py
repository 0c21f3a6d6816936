"""Worker processes that decode or encode media."""

import ctypes
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def start_method() -> str | None:
    """Return how worker processes start: "fork" on Linux, "spawn" elsewhere.

    A spawned worker imports the main script again. None where this would run it again: a script
    without a main guard, such as a tutorial, works without workers.
    """
    if sys.platform == "linux":
        return "fork"
    script = getattr(sys.modules["__main__"], "__file__", "")
    if script and "__main__" not in Path(script).read_text(encoding="utf-8"):
        return None
    return "spawn"


def loader_options(workers: int) -> dict:
    """Return the options of a torch DataLoader with this many workers."""
    method = start_method()
    if not workers or not method:
        return {"num_workers": 0}
    return {
        "num_workers": workers,
        "multiprocessing_context": method,
        "worker_init_fn": exit_with_parent,
    }


def exit_with_parent(*_) -> None:
    """Make a worker process end when the one that started it does, by whatever signal.

    On Linux; elsewhere a worker may outlive a SIGKILL.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
