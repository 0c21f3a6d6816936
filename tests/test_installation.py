"""A fresh install: exact pins, a whole package, one line for libraries that do not fit."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from crab_min import installation

ROOT = Path(__file__).parents[1]


def distribution(folder: Path, name: str, version: str, code: str) -> None:
    """Make a package in a folder: a module and the metadata that pip would have written."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def error_line(arguments: list[str], packages: Path) -> str:
    """Run a command that must end with exit code 2 and one line; return the line."""
    command = [sys.executable, *arguments]
    environment = {"PYTHONPATH": f"{packages}:{ROOT}", "PATH": "/usr/bin:/bin"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == "" and ended.stderr.count("\n") == 1, ended.stderr
    return ended.stderr


def test_every_requirement_is_an_exact_version():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in pins)
    assert installation.wanted_versions() == dict(line.split("==") for line in pins)


@pytest.mark.parametrize("command", ["train.py", "infer.py", "-m crab_min.tools.check"])
def test_a_torchaudio_of_another_torch_is_one_line(tmp_path, command):
    distribution(tmp_path, "torchaudio", "99.1", "raise OSError('undefined symbol:\\n _ZN3c10')")
    line = error_line(command.split(), tmp_path)
    wanted = installation.wanted_versions()
    assert f"torch {metadata.version('torch').split('+')[0]}, torchaudio 99.1" in line
    assert "undefined symbol: _ZN3c10" in line
    assert f"wanted: torch {wanted['torch']}, torchaudio {wanted['torchaudio']}" in line
    assert f"pip install torch=={wanted['torch']} torchaudio=={wanted['torchaudio']}" in line


def test_a_transformers_outside_its_pin_is_one_line(tmp_path):
    distribution(tmp_path, "transformers", "4.40.0", "raise SystemExit('must not be imported')")
    line = error_line(["train.py"], tmp_path)
    wanted = installation.wanted_versions()["transformers"]
    assert "installed: transformers 4.40.0; " in line
    assert line.endswith(f"run: python -m pip install transformers=={wanted}\n")


def test_torchvision_without_its_operators_does_not_pass(tmp_path):
    version = metadata.version("torchvision")
    code = "from types import SimpleNamespace\nops = SimpleNamespace(nms=None)"
    distribution(tmp_path, "torchvision", version, code)
    line = error_line(["train.py"], tmp_path)
    assert f"torchvision {version}" in line and "torchvision: " in line


def test_libraries_that_fit_are_not_complained_about():
    assert installation.installation_fault() == ""


def test_a_missing_library_is_named(monkeypatch):
    def version(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return installation.wanted_versions()[name]

    monkeypatch.setattr(installation.metadata, "version", version)
    assert installation.installation_fault().startswith("installed: torch missing; wanted: torch ")


@pytest.mark.slow  # pip fetches setuptools
def test_the_wheel_has_the_assets_and_the_pins_and_no_tests(tmp_path):
    # pip builds inside the folder that it is given
    checkout = tmp_path / "checkout"
    for folder in ("crab_min", "tests"):
        shutil.copytree(ROOT / folder, checkout / folder)
    for file in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, checkout)
    build = ["wheel", str(checkout), "--no-deps", "--quiet", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        about = next(name for name in names if name.endswith("/METADATA"))
        pins = re.findall(r"^Requires-Dist: ([\w-]+)==([\w.]+)$", wheel.read(about).decode(), re.M)

    package = ROOT / "crab_min"
    files = {file for file in package.rglob("*") if file.is_file()}
    files -= set(package.rglob("__pycache__/*"))
    assert {str(file.relative_to(ROOT)) for file in files} <= names
    assert "crab_min/assets/base/model.safetensors" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "tutorials"))]
    assert dict(pins) == installation.wanted_versions()
