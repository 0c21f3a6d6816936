"""README.md and docs/: links, pictures, tables, names, and every command."""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

import infer
from crab_min.backbones.tiny_random import tiny_omni
from crab_min.cli import COMMANDS, REMOVED, RENAMED_INFER, flags_of, parse_train
from crab_min.config import INFER, RECIPES, RENAMED, groups_of
from crab_min.recipes.presets import PRESETS
from crab_min.tasks import TASKS
from crab_min.tools import check, convert, features, fetch, heads
from crab_min.tools.reason import __main__ as reason

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FIGURES = ROOT / "docs" / "figures"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
COURSE = sorted((ROOT / "docs" / "course").glob("*.md"))
CODE = [ROOT / "train.py", ROOT / "infer.py", *sorted((ROOT / "crab_min").rglob("*.py"))]
# flags of torchrun, of hf and of a benchmark, and flags that stand for any
NO_FLAGS = {"nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint", "exclude", "tiny"}
NO_FLAGS |= {"flag", "x"}
# functions and classes of the first version whose names are no ordinary words
OLD_NAMES = """
    ConvertError CremaConfig EncoderError FeatureCache GatedFusion InterfaceError ModalLinear
    NativeModel SegmentConfig TrainConfig WorldError add_masks add_sides annotation_file
    asked_to_stop auto_steps backgrounds_from batches_of beside_embeddings beside_videos
    check_report class_seconds count_parameters decoder_bytes draw_grid draw_masks draw_routes
    draw_span draw_subsets drawn_media drawn_things end_with_parent examine_between examine_masks
    examined_data from_first from_flags gold_av_events gold_option half_products hold_answers
    image_rows kept_bytes labels_of load_crema load_frozen load_native load_state make_config
    make_modalities make_vision mask_tensor missing_weights modalities_of modality_bytes one_sense
    optimizer_of own_parts own_state patch_costs patch_sizes placed_at processes_of read_answers
    read_events record_routes remove_side renderer_of replace_whole row_field same_everywhere
    save_state score_subsets second_stage span_ious split_encoders states_of things_from
    train_beside with_frames with_sides world_channels write_whole
""".split()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """Return the text of a page without its code blocks."""
    return "".join(text_of(page).split("```")[::2])


@lru_cache
def docstrings() -> list[tuple[str, str]]:
    """Return (place, docstring) of all files, classes and functions."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = []
    for file in CODE:
        for node in ast.walk(ast.parse(text_of(file))):
            if isinstance(node, documented) and ast.get_docstring(node):
                name = getattr(node, "name", "")
                found.append((f"{file.relative_to(ROOT)} {name}", ast.get_docstring(node)))
    return found


@lru_cache
def train_flags() -> dict:
    """Return the fields of all flags of train.py, by flag."""
    flags: dict = {}
    for settings in RECIPES.values():
        flags |= flags_of(groups_of(settings))
    return flags


def all_texts() -> list[tuple[str, str]]:
    """Return (place, text) of the pages, the docstrings and the helps of flags."""
    texts = [(page.name, text_of(page)) for page in PAGES + COURSE]
    for name, field in (train_flags() | flags_of(INFER)).items():
        texts.append((f"help of --{name}", field.metadata["help"]))
    return texts + docstrings()


# --- what a page shows ----------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(text_of(README).splitlines()) <= 150
    assert len(text_of(README).split()) <= 1200
    # figures stand in tables, on docs/results.md
    prose = re.sub(r"^\|.*$|^<img.*$|\]\([^)]*\)", "", prose_of(README), flags=re.M)
    assert len(re.findall(r"\d[\d.,]*", prose)) <= 10


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES + COURSE, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", prose_of(page))
    for target in map("".join, targets):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_of_docs_is_linked_from_the_readme():
    for page in PAGES[1:]:
        assert f"(docs/{page.name}" in text_of(README), page.name


def test_pictures_are_small_have_a_text_and_are_shown():
    shown = ""
    for page in PAGES:
        for tag in re.findall(r"<img [^>]*>", text_of(page)):
            assert len(re.search(r'alt="([^"]*)"', tag)[1]) > 20, f"{page.name}: {tag}"
        shown += text_of(page)
    pictures = sorted(FIGURES.glob("*.png"))
    sizes = {picture.name: picture.stat().st_size for picture in pictures}
    assert max(sizes.values()) < 150_000, sizes
    assert sum(sizes.values()) < 1_200_000
    assert not [name for name in sizes if f"figures/{name}" not in shown]
    made = re.search(r"^ALL = \((.+)\)$", text_of(FIGURES / "make.py"), re.M)[1].split(", ")
    assert len(made) == 11 and {f"{name}.png" for name in made} <= set(sizes)


# --- names and tables -----------------------------------------------------------------------------


def test_pages_docstrings_and_helps_name_flags_that_exist():
    known = {*train_flags(), *flags_of(INFER), *COMMANDS, "fit", *NO_FLAGS}
    for tool in (check, convert, features, fetch, heads, reason):
        known |= {option[2:] for option in tool.make_parser()._option_string_actions}
    unknown = []
    for place, text in all_texts():
        for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", text):
            if flag.removeprefix("no-") not in known:
                unknown.append(f"{place}: --{flag}")
    assert not unknown


def test_no_page_docstring_or_help_has_a_name_of_an_earlier_version():
    fields = [name for name in RENAMED if "_" in name]
    flags = {f"--{name}" for name in {*RENAMED, *RENAMED_INFER, *REMOVED}}
    flags -= {f"--{name}" for name in {*train_flags(), *flags_of(INFER)}}
    for place, text in all_texts():
        words = set(re.findall(r"\w+", text))
        assert not words & {*OLD_NAMES, *fields}, place
        used = set(re.findall(r"(?<![\w-])--[\w-]+", text))
        assert not {flag.replace("_", "-") for flag in flags} & used, place


def test_docs_train_lists_every_flag():
    page = text_of(ROOT / "docs" / "train.md")
    of_the_base = flags_of(groups_of(RECIPES["tinybase"]))
    flags = [flag for flag in train_flags() if flag not in of_the_base]
    assert not [flag for flag in flags if f"`--{flag}`" not in page]


def test_docs_data_has_every_task_with_its_metric():
    page = text_of(ROOT / "docs" / "data.md")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", page, re.M))
    assert list(rows) == list(TASKS)
    for name, task in TASKS.items():
        cells = rows[name].split(" | ")
        assert cells[4].split(", ") == [task.metric, *task.set_metrics], name
        assert cells[5] == ("both" if len(task.splits) == 2 else f"{task.splits[0]} only"), name
        kinds = [medium.kind for medium in task.media]
        frames = f" ({task.frames})" if "video" in kinds else ""
        assert cells[1] == " ".join(kinds) + frames, name
        assert cells[6] == task.instruction, name


def test_the_paper_map_names_functions_that_exist():
    page = text_of(ROOT / "docs" / "paper-map.md")
    named = re.findall(r"\]\(\.\./([\w/]+\.py)\): ((?:`\w+`(?:, )?)+)", page)
    assert len(named) > 25
    for file, names in named:
        defined = {
            node.name
            for node in ast.walk(ast.parse(text_of(ROOT / file)))
            if isinstance(node, (ast.ClassDef, ast.FunctionDef))
        }
        assert set(re.findall(r"`(\w+)`", names)) <= defined, file


# --- commands -------------------------------------------------------------------------------------


def commands_of(page: Path) -> list[list[str]]:
    """Return the commands in the code blocks of a page as lists of words."""
    commands = []
    for block in text_of(page).split("```")[1::2]:
        for line in block.splitlines()[1:]:  # the first is the name of a language, or nothing
            for command in line.split("&&"):
                if command.split()[:1] in (["python"], ["torchrun"]):
                    commands.append(shlex.split(command, comments=True))
    return commands


def after(command: list[str], word: str) -> list[str]:
    """Return the words of a command behind a word."""
    return command[command.index(word) + 1 :]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_has_flags_that_exist_and_values_that_fit_together(page, capsys):
    for command in commands_of(page):
        if "train.py" in command:
            words = after(command, "train.py")
            if {"--help", "--help-all", "--list"} & set(words):  # these print and exit
                with pytest.raises(SystemExit) as stopped:
                    parse_train(words)
                assert stopped.value.code == 0
                continue
            given, settings = parse_train(words)
            recipe = PRESETS[given.preset].recipe
            if recipe != "tinybase":
                importlib.import_module(f"crab_min.recipes.{recipe}").run_settings(settings)
        elif "infer.py" in command:
            infer.parse_infer(after(command, "infer.py"))
        elif "-m" in command:
            tools = {tool.__name__: tool for tool in (check, convert, features, fetch, heads)}
            tool = tools.get(command[2], reason)  # a package with a __main__
            tool.make_parser().parse_args(command[3:])
        else:
            assert (ROOT / command[1]).exists()


def test_the_readme_has_a_command_for_each_paper():
    presets = set()
    for command in commands_of(README):
        if "train.py" in command:
            presets.add(parse_train(after(command, "train.py"))[0].preset)
    assert {"crab_plus-tiny", "crab-tiny", "pave-tiny", "crema-tiny"} <= presets


SMALL_WORLD = ["--world-clips", "24", "--world-test", "2"]
SMALL_RUN = ["--steps", "2", "--batch-size", "4", "--test-rows", "2", *SMALL_WORLD]


def small(command: list[str]) -> list[str]:
    """Return a command of the README at a size that takes seconds."""
    script, *words = command[1:]
    if script == "-m":
        return [sys.executable, *command[1:]]
    if "--plan" in words:  # downloads nothing
        pass
    elif script == "train.py":
        words += SMALL_RUN
    elif "--eval" in words:
        words += ["--test-rows", "1"]
    elif script == "infer.py":
        words += ["--max-new-tokens", "8", "--device", "cpu"]
    return [sys.executable, str(ROOT / script), *words]


@pytest.mark.slow
def test_the_commands_of_the_readme_run_at_a_small_size(tmp_path):
    """One after the other in a folder of their own, as someone who copies them would."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    commands = commands_of(README)
    assert commands[:2] == [["python", "train.py"], ["python", "infer.py"]]
    for command in commands:
        words = small(command)
        options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(words, **options)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-2000:]}"
        if command == ["python", "train.py"]:
            rows = [line.split(" ")[0] for line in done.stdout.splitlines()]
            for task in TASKS.values():
                assert rows.count(task.name) == int("test" in task.splits and task.v2)
            lend_clips(tmp_path)


def lend_clips(folder: Path) -> None:
    """Put clips, a table, questions and a tiny model where the README's commands expect them."""
    clips = sorted(folder.glob("data/world/*/AVUIE_2/ave/video/*.mp4"))[:10]
    shutil.copyfile(clips[0], folder / "clip.mp4")
    (folder / "clips").mkdir()
    lines = ["clip,label"]
    for index, clip in enumerate(clips):
        shutil.copyfile(clip, folder / "clips" / clip.name)
        lines.append(f"clips/{clip.name},{('dog', 'rain')[index % 2]}")
    (folder / "labels.csv").write_text("\n".join(lines))
    (folder / "questions.txt").write_text("What is it?\nIs it a dog?\n")
    # a random model stands for the one that would be downloaded
    model, processor = tiny_omni()
    for saved in (model, processor):
        saved.save_pretrained(folder / "Qwen" / "Qwen2.5-Omni-3B")
