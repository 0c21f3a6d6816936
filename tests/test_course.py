"""The course: pages are rendered from what they are, run as scripts, and their exercises hold."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crab_min.tools.page import (
    COURSE,
    MAX_BYTES,
    PAGES,
    ROOT,
    Exercise,
    exercises_of,
    hash_of,
    index_text,
    linked,
    main,
    read_cells,
    rendered_pages,
)

SCRIPTS = sorted(PAGES.glob("*.py"))
WITHOUT_EQUATION = ["10_crab_data"]
EXERCISES = [
    pytest.param(script, exercise, id=f"{script.stem}-{number + 1}")
    for script in SCRIPTS
    for number, exercise in enumerate(exercises_of(script.read_text(encoding="utf-8")))
]


def rendered(script: Path) -> str:
    return (COURSE / f"{script.stem}.md").read_text(encoding="utf-8")


def printed(script: Path) -> str:
    """Return what a page prints, from its rendered form."""
    return "\n".join(re.findall(r"^```text\n(.*?)\n```$", rendered(script), re.M | re.S))


# --- what is committed ----------------------------------------------------------------------------
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_rendered_page_is_that_of_the_script_of_today(script):
    fresh = hash_of(script.read_text(encoding="utf-8"))
    assert f" {fresh} " in rendered(script), (
        f"python -m crab_min.tools.page tutorials/{script.name}"
    )


def test_the_index_and_the_links_are_those_of_the_pages_of_today():
    pages = rendered_pages()
    assert pages == SCRIPTS
    assert {file.stem for file in COURSE.glob("*.md")} == {"README", *(s.stem for s in SCRIPTS)}
    assert (COURSE / "README.md").read_text(encoding="utf-8") == index_text()
    for index, script in enumerate(pages):
        assert rendered(script) == linked(pages, index), "python -m crab_min.tools.page"


def test_the_figures_of_the_course_are_small_and_shown():
    shown = "".join(rendered(script) for script in SCRIPTS)
    for figure in COURSE.glob("figures/*"):
        assert figure.stat().st_size <= MAX_BYTES
        assert f"(figures/{figure.name})" in shown, figure.name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_page_has_the_form_of_the_course(script):
    text = script.read_text(encoding="utf-8")
    first, imports, *_, last = read_cells(text)
    assert len(text.splitlines()) - len(imports.text.splitlines()) <= 120
    assert first.text.startswith(f"# {script.name[:2]}. ")
    assert re.search(r"^\* Code: \[", first.text, re.M)
    exercises = re.findall(r"^\d\. ", last.text.split("## Exercises\n")[1], re.M)
    assert len(exercises) == len(exercises_of(text)) >= 2
    assert re.search(r"^# figure: ", text, re.M)
    if script.name[0] in "1234":  # a section of a paper
        assert re.search(r"^\* Paper: \[", first.text, re.M)
    if script.name[0] in "1234" and script.stem not in WITHOUT_EQUATION:
        assert "# $$" in text and "assert torch.allclose(" in text


@pytest.mark.parametrize("method", "ilora qformer masks pave crema interface answers".split())
def test_a_method_module_names_its_page(method):
    opening = (ROOT / "crab_min" / f"{method}.py").read_text(encoding="utf-8").split('"""')[1]
    (name,) = re.findall(r"docs/course/(\w+)\.md", opening)
    assert f"/{method}.py)" in (COURSE / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script, exercise", EXERCISES)
def test_an_exercise_changes_one_place_and_expects_what_the_page_does_not_print(script, exercise):
    code = [cell.text for cell in read_cells(script.read_text(encoding="utf-8")) if cell.is_code]
    assert "\n".join(code).count(exercise.old) == 1
    assert exercise.expected not in printed(script)


# --- what runs ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One folder for all pages, several of which use the same world."""
    folder = tmp_path_factory.mktemp("course")
    (folder / "data").mkdir()
    return folder


def run(script: Path, folder: Path, threads: str = "") -> subprocess.CompletedProcess:
    """Run a page in a folder, as `python tutorials/NAME.py` does in the repository's."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if threads:
        environment["OMP_NUM_THREADS"] = threads
    options = {"cwd": folder, "env": environment}
    return subprocess.run([sys.executable, script], capture_output=True, text=True, **options)


def change(script: Path, exercise: Exercise, folder: Path) -> Path:
    """Write a page with the change of an exercise in its code."""
    lines = script.read_text(encoding="utf-8").split("\n")
    for cell in read_cells("\n".join(lines)):
        rows = slice(cell.first_line, cell.first_line + cell.text.count("\n") + 3)
        if cell.is_code and exercise.old in cell.text:
            lines[rows] = "\n".join(lines[rows]).replace(exercise.old, exercise.new).split("\n")
            break
    changed = folder / script.name
    changed.write_text("\n".join(lines), encoding="utf-8")
    return changed


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_page_runs_and_draws_its_figures(script, folder):
    done = run(script, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    for figure in re.findall(r"\(figures/(.+\.png)\)", rendered(script)):
        assert (folder / "answers" / figure).exists()


@pytest.fixture(scope="module")
def changed_pages(request, folder):
    """Run the exercises that were selected, one per core: a dict of their futures."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {}
        for item in request.session.items:
            if item.originalname == "test_an_exercise_gives_what_its_page_says":
                script, exercise = item.callspec.params["script"], item.callspec.params["exercise"]
                own = folder / item.callspec.id
                own.mkdir()
                (own / "data").symlink_to(folder / "data")
                changed = change(script, exercise, own)
                futures[script, exercise] = pool.submit(run, changed, own, threads="1")
        yield futures


@pytest.mark.exercise
@pytest.mark.parametrize("script, exercise", EXERCISES)
def test_an_exercise_gives_what_its_page_says(script, exercise, changed_pages):
    done = changed_pages[script, exercise].result()
    assert exercise.expected in done.stdout + done.stderr


# --- the renderer ---------------------------------------------------------------------------------
PAGE = """# %% [markdown]
# # 12. A page
#
# * Code: [page.py](../crab_min/tools/page.py)
# * Read first: [11](11_other.py)

# %%
import sys

# %%
from pathlib import Path

from crab_min.evaluation.figures import new_figure, save

weight = 0.5
print("weight", weight)
# figure: a line from zero to one
axes = new_figure(2, 2).subplots()
axes.plot([0, 1])
save(axes.figure, Path("answers/12_page.png"))

# %% [markdown]
# ## Exercises
#
# 1. Twice the weight. Change `weight = 0.5` to `weight = 1.0`;
#    expect `weight 1.0`.
"""


def test_the_renderer_writes_text_code_output_figures_and_links(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, path in (("COURSE", tmp_path / "docs"), ("PAGES", tmp_path / "pages")):
        monkeypatch.setattr(f"crab_min.tools.page.{name}", path)
    script = tmp_path / "pages" / "12_page.py"
    script.parent.mkdir()
    script.write_text(PAGE)
    script.with_name("13_page.py").write_text(PAGE.replace("12", "13").replace("A page", "Next"))
    main([str(script)])
    main([str(script.with_name("13_page.py"))])

    text = (tmp_path / "docs" / "12_page.md").read_text()
    assert hash_of(PAGE) in text.splitlines()[0]
    assert "<details><summary>Imports</summary>\n\n```python\nimport sys\n```" in text
    assert "```text\nweight 0.5\n```\n\n![a line from zero to one](figures/12_page.png)" in text
    assert "[page.py](../../crab_min/tools/page.py)" in text and "[11](11_other.md)" in text
    assert text.count("| [13. Next](13_page.md) →") == 2  # above and below
    index = (tmp_path / "docs" / "README.md").read_text()
    assert '<img src="figures/12_page.png" width="120"' in index
    assert "| [12. A page](12_page.md) | [11](11_other.md) |" in index
    exercise = Exercise("weight = 0.5", "weight = 1.0", "weight 1.0")
    assert exercises_of(PAGE) == [exercise]
    assert "weight 1.0" in run(change(script, exercise, tmp_path), tmp_path).stdout
