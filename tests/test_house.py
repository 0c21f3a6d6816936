"""The plan of the house: which file may import which, and that docstrings name files that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "crab_min").rglob("*.py")) + [ROOT / "train.py", ROOT / "infer.py"]

# Rooms in the order of imports: a file imports nothing of a later room. A name is a file or a
# folder of crab_min; train and infer are the commands.
ORDER = [
    "errors installation devices text_files",
    "config",
    "answers",
    "tasks",
    "interface",
    "media sources",
    "encoders beats qformer ilora pave crema masks",
    "model trained_parts",
    "backbones",
    "data features side_channels",
    "runs",
    "trainer",
    "evaluation",
    "recipes",
    "cli tools train infer",
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names.split()}
METHODS = ["ilora", "pave", "qformer", "crema", "masks"]  # the papers' equations
MAY_USE = {"crema": ["errors", "qformer"]}  # the other methods: errors alone
NOT_TO_READ = ["world", "tinybase", "tools", "recipes"]  # nothing up to the trainer needs these
# runs.processes knows torch.distributed alone, so the features may ask which process this is
KNOWN = {("features", "runs.processes")}
# scripts of the authors, whose scores evaluation/ computes too
RELEASED = {
    "ave_eval.py",
    "avqa_eval.py",
    "avvp_eval_metrics.py",
    "calculate_acc.py",
    "scanqa_evaluator.py",
}


def module_name(file: Path) -> str:
    """Return the name of a file's module below crab_min, or that of a command."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "crab_min" else parts)


MODULES = {module_name(file): file for file in FILES if file.stem != "__init__"}


def imports(file: Path) -> list[str]:
    """Return the modules of crab_min that a file imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            # `from crab_min.runs import processes` names a module, or something that one defines
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                found.append(whole if whole[len("crab_min.") :] in MODULES else node.module)
    return [name.removeprefix("crab_min.") for name in found if name.startswith("crab_min.")]


def room(module: str) -> str:
    return module.split(".")[0]


IMPORTS = [(name, used) for name, file in MODULES.items() for used in sorted(set(imports(file)))]


def test_every_file_is_in_a_room():
    assert {room(name) for name in MODULES} == LEVEL.keys() | {"world", "tinybase"}


def test_no_file_imports_one_of_a_later_room():
    late = []
    for name, used in IMPORTS:
        known = (room(name), used) in KNOWN
        if room(name) in LEVEL and room(used) in LEVEL and not known:
            if LEVEL[room(used)] > LEVEL[room(name)]:
                late.append(f"{name} imports {used}")
    assert not late


def test_a_method_file_uses_errors_alone():
    other = []
    for name, used in IMPORTS:
        if name in METHODS and used not in MAY_USE.get(name, ["errors"]):
            other.append(f"{name} imports {used}")
    assert not other


def test_the_trainer_knows_no_paper():
    assert not [used for name, used in IMPORTS if name == "trainer" and used in METHODS]


def test_the_reading_path_needs_neither_world_nor_tools_nor_recipes():
    last = LEVEL["trainer"]
    found = []
    for name, used in IMPORTS:
        if LEVEL.get(room(name), last + 1) <= last and room(used) in NOT_TO_READ:
            found.append(f"{name} imports {used}")
    assert not found


def test_a_recipe_imports_no_other_recipe():
    found = []
    for name, used in IMPORTS:
        shared = ("recipes.common", "recipes.arms")
        if room(name) == room(used) == "recipes" and used not in shared:
            found.append(f"{name} imports {used}")
    assert not found


def test_no_import_goes_in_a_circle():
    uses: dict[str, set[str]] = {name: set() for name in MODULES}
    for name, used in IMPORTS:
        uses[name].add(used)
    left = dict(uses)
    while left:
        free = [name for name, used in left.items() if not used & left.keys()]
        assert free, f"in circles: {', '.join(sorted(left))}"
        for name in free:
            del left[name]


def docstrings(file: Path) -> list[str]:
    """Return the docstrings of a file, its classes and its functions."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, documented):
            found.append(ast.get_docstring(node) or "")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_that_docstrings_name_exist(file):
    for text in docstrings(file):
        for name in re.findall(r"[\w./-]+\.(?:py|md)\b", text):
            places = [ROOT / name, ROOT / "crab_min" / name, file.parent / name]
            assert name in RELEASED or any(place.exists() for place in places), name
