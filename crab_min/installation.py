"""A check that the installed libraries work together, before they are imported.

torch, torchaudio and torchvision are built for one another. If one of them is of another release or
build, the others cannot be imported. transformers and peft change their interfaces from release to
release. requirements.txt names the versions that were tested.
"""

import importlib
import re
import sys
from importlib import metadata
from pathlib import Path

BUILT_TOGETHER = ["torch", "torchaudio", "torchvision"]
SAME_VERSION = ["transformers", "peft"]


def require_installation() -> None:
    """Exit with code 2 and a one-line explanation if the libraries cannot work."""
    fault = installation_fault()
    if fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)


def installation_fault() -> str:
    """Find what is wrong with the installed libraries.

    Returns:
        One line that says what is installed, what is wanted, and the command that repairs it; ""
        if the libraries work together.
    """
    wanted = wanted_versions()

    # libraries of another version, and missing ones
    wrong = [name for name in SAME_VERSION if installed_version(name) != wanted[name]]
    wrong += [name for name in BUILT_TOGETHER if installed_version(name) == "missing"]
    if wrong:
        return describe(wrong, wanted, "")

    # torch and its companions may have other versions, as long as they can be imported together
    for name in BUILT_TOGETHER:
        try:
            importlib.import_module(name)
            if name == "torchvision" and not has_operators():
                raise ImportError("its compiled operators are missing")
        except Exception as error:
            reason = " ".join(f"{name}: {error}".split())[:160]
            return describe(BUILT_TOGETHER, wanted, f" do not work together ({reason})")
    return ""


def has_operators() -> bool:
    """Tell whether torch knows torchvision's compiled operators."""
    torch = importlib.import_module("torch")
    return hasattr(torch.ops.torchvision, "nms")


def wanted_versions() -> dict[str, str]:
    """Return the pinned version of each direct dependency, by its name on PyPI.

    A checkout has the pins in requirements.txt, an installed package has them in its metadata.
    """
    root = Path(__file__).parents[1]
    if (root / "pyproject.toml").exists():
        pins = (root / "requirements.txt").read_text(encoding="utf-8")
    else:
        pins = "\n".join(metadata.requires("crab_min"))
    return dict(re.findall(r"^([\w-]+)==([\w.]+)", pins, re.MULTILINE))


def installed_version(name: str) -> str:
    """Return the version of an installed distribution without its build tag.

    It is "missing" if there is none.
    """
    try:
        return metadata.version(name).split("+")[0]
    except metadata.PackageNotFoundError:
        return "missing"


def describe(names: list[str], wanted: dict[str, str], complaint: str) -> str:
    """Format installed and wanted versions and the pip command as one line."""
    installed = ", ".join(f"{name} {installed_version(name)}" for name in names)
    expected = ", ".join(f"{name} {wanted[name]}" for name in names)
    pins = " ".join(f"{name}=={wanted[name]}" for name in names)
    # of the wanted versions another build is installed
    reinstall = "--force-reinstall " if installed == expected else ""
    return (
        f"installed: {installed}{complaint}; wanted: {expected}; "
        f"run: python -m pip install {reinstall}{pins}"
    )
