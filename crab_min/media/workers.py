"""Worker processes that decode or encode media."""

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1


def exit_with_parent(*_) -> None:
    """Make a worker process end when the one that started it does, by whatever signal.

    On Linux; elsewhere a worker may outlive a SIGKILL.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
