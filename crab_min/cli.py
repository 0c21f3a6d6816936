"""What the commands share: flags made from dataclass fields, errors printed as one line, files that are there whole or not at all, workers that end with them."""
import argparse
import ctypes
import os
import signal
import sys
from dataclasses import MISSING, fields
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors say in one line what is wrong and where help is."""

    def error(self, message: str):
        print(f"error: {message}; see python {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def add_flags(parser: argparse.ArgumentParser, config: type, defaults: dict) -> None:
    """A flag for every field of a dataclass: --field-name value, booleans as --x / --no-x. `defaults` replace the fields' own."""
    for f in fields(config):
        default = defaults.get(f.name, f.default if f.default is not MISSING else f.default_factory())
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {"type": f.type, "choices": f.metadata.get("choices")}
        shown = "on" if default is True else "off" if default is False else default if default != "" else "none"
        parser.add_argument("--" + f.name.replace("_", "-"), default=default, help=f"{f.metadata['help']} (default: {shown})", **kind)


def from_flags(config: type, arguments: argparse.Namespace):
    return config(**{f.name: getattr(arguments, f.name) for f in fields(config)})


def run_command(run, debug: bool) -> int:
    """Run a command; an error that the user can mend becomes one line and exit code 2, a traceback only with --debug."""
    try:
        run()
        return 0
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last saved state", file=sys.stderr)
        return 130


def atomic_write(path: Path, text: str) -> None:
    """Write a file beside and rename it, so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def exit_with_parent(*_) -> None:
    """What a worker process begins with: it ends when the one that started it does, by whatever signal (on Linux; elsewhere it may wait for ever after a SIGKILL)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)                            # PR_SET_PDEATHSIG
