"""The course: run a page of tutorials/, write it to docs/course/ with its output and figures.

    python -m crab_min.tools.page tutorials/12_crab_ilora.py     one page, and the index
    python -m crab_min.tools.page                                the index and the links alone

A page is a script in percent format. These of its lines mean something here:

    # # 12. Title                           in the first cell: the title, with the page's number
    # * Read first: [11](...)               in the first cell, where a page needs another
    # figure: what the picture shows        in a code cell that saves answers/12_crab_ilora*.png
    # 1. Change `A` to `B`; expect `text`.  an exercise: code that the page has once, its new output

Links are relative to tutorials/. The order of the course is that of the names of the files.
"""

import argparse
import contextlib
import hashlib
import io
import re
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from crab_min.runs.folder import atomic_write

ROOT = Path(__file__).parents[2]
PAGES, COURSE, ANSWERS = ROOT / "tutorials", ROOT / "docs" / "course", Path("answers")
PAPERS = {
    "0": "Start",
    "1": "Crab ([2503.13068](https://arxiv.org/abs/2503.13068))",
    "2": "Crab+ ([2603.04128](https://arxiv.org/abs/2603.04128))",
    "3": "PAVE ([2503.19794](https://arxiv.org/abs/2503.19794))",
    "4": "CREMA ([2402.05889](https://arxiv.org/abs/2402.05889))",
    "5": "Practice",
}
MAX_BYTES = 60_000  # of a figure
NAVIGATION = "<!-- navigation -->"  # ends the lines that link a page to its neighbours


@dataclass
class Cell:
    """A cell of a page: markdown without its comment signs, or code."""

    is_code: bool
    text: str
    first_line: int  # of the text, in the file


@dataclass(frozen=True)
class Exercise:
    """An exercise of a page: the code to change, and what the changed page prints."""

    old: str
    new: str
    expected: str


# --- reading a page -------------------------------------------------------------------------------
def read_cells(script: str) -> list[Cell]:
    """Split a script in percent format into its cells."""
    cells, lines = [], script.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("# %%")]
    for start, end in zip(starts, [*starts[1:], len(lines)]):
        is_code = "[markdown]" not in lines[start]
        body = lines[start + 1 : end]
        if not is_code:
            body = [re.sub(r"^# ?", "", line) for line in body]
        cells.append(Cell(is_code, "\n".join(body).strip("\n"), start + 1))
    return cells


def title_of(page: Path) -> str:
    """Return the title of a page, which begins with its number."""
    return re.search(r"^# # (.+)$", page.read_text(encoding="utf-8"), re.M)[1]


def exercises_of(script: str) -> list[Exercise]:
    """Return the exercises of a page that can be checked."""
    text = " ".join(cell.text for cell in read_cells(script) if not cell.is_code)
    found = re.findall(
        r"[Cc]hange `([^`]+)` to `([^`]+)`; expect `([^`]+)`", " ".join(text.split())
    )
    return [Exercise(*parts) for parts in found]


def hash_of(script: str) -> str:
    """Return the hash by which a rendered page names the script it was made from."""
    return hashlib.sha256(script.encode()).hexdigest()[:16]


# --- rendering ------------------------------------------------------------------------------------
def run_cell(cell: Cell, namespace: dict, page: Path) -> str:
    """Run a code cell in the namespace of the page and return what it prints."""
    printed = io.StringIO()
    code = compile("\n" * cell.first_line + cell.text, str(page), "exec")  # lines as in the file
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)
    return printed.getvalue().replace(f"{Path.cwd()}/", "").rstrip()  # of no use elsewhere


def save_figure(picture: Path) -> str:
    """Copy a picture to docs/course/figures/, with few colours, and return its link.

    It is made smaller until it has at most MAX_BYTES.
    """
    target = COURSE / "figures" / picture.name
    target.parent.mkdir(parents=True, exist_ok=True)
    image = Image.open(picture).convert("RGB")
    while True:
        image.quantize(128).save(target, optimize=True)
        if target.stat().st_size <= MAX_BYTES:
            return f"figures/{target.name}"
        image = image.resize((image.width * 9 // 10, image.height * 9 // 10))


def render_code(cell: Cell, printed: str, pictures: list[Path]) -> str:
    """Return a code cell as markdown: its code, output, and figures with their captions."""
    parts = [f"```python\n{cell.text}\n```"]
    if cell.text.startswith("import"):
        parts = ["<details><summary>Imports</summary>", *parts, "</details>"]
    if printed:
        parts.append(f"```text\n{printed}\n```")
    captions = re.findall(r"# figure: (.+)", cell.text)
    if len(captions) != len(pictures):
        raise ValueError(f"{len(pictures)} new pictures, but '# figure:' lines {captions}")
    for picture, caption in zip(pictures, captions):
        parts.append(f"![{caption}]({save_figure(picture)})\n\n*{caption}*")
    return "\n\n".join(parts)


def render(page: Path) -> None:
    """Run a page and write it, with its output and figures, to docs/course/."""
    script = page.read_text(encoding="utf-8")
    for old in [*ANSWERS.glob(f"{page.stem}*.png"), *COURSE.glob(f"figures/{page.stem}*.png")]:
        old.unlink()
    namespace = {"__name__": "__main__", "__file__": str(page)}
    shown: set[Path] = set()
    parts, start = [], time.perf_counter()
    for cell in read_cells(script):
        if not cell.is_code:
            links = cell.text.replace("](../", "](../../")
            parts.append(re.sub(r"\]\((\d\d_\w+)\.py", r"](\1.md", links))
            continue
        printed = run_cell(cell, namespace, page)
        pictures = sorted(set(ANSWERS.glob(f"{page.stem}*.png")) - shown)
        parts.append(render_code(cell, printed, pictures))
        shown.update(pictures)
    seconds = round(time.perf_counter() - start)
    header = f"<!-- {page.name} {hash_of(script)} {seconds} s; written by crab_min.tools.page -->"
    text = "\n\n".join([header, NAVIGATION, *parts, NAVIGATION])
    atomic_write(COURSE / f"{page.stem}.md", text + "\n")


# --- the index and the links between pages --------------------------------------------------------
def rendered_pages() -> list[Path]:
    """Return the scripts that have a rendered page, in the order of the course."""
    return [page for page in sorted(PAGES.glob("*.py")) if (COURSE / f"{page.stem}.md").exists()]


def navigation(pages: list[Path], index: int) -> str:
    """Return the line that links a page to its script, the index and its neighbours."""
    links = [f"[script](../../tutorials/{pages[index].name})", "[course](README.md)"]
    if index > 0:
        links.insert(0, f"← [{title_of(pages[index - 1])}]({pages[index - 1].stem}.md)")
    if index + 1 < len(pages):
        links.append(f"[{title_of(pages[index + 1])}]({pages[index + 1].stem}.md) →")
    return f"{' | '.join(links)} {NAVIGATION}"


def linked(pages: list[Path], index: int) -> str:
    """Return the text of a rendered page with the links to its neighbours as they are now."""
    text = (COURSE / f"{pages[index].stem}.md").read_text(encoding="utf-8")
    line = navigation(pages, index)
    return re.sub(rf"^.*{NAVIGATION}$", lambda _: line, text, flags=re.M)


def index_row(page: Path) -> str:
    """Return the row of a rendered page in the index."""
    text = (COURSE / f"{page.stem}.md").read_text(encoding="utf-8")
    seconds = re.search(r"(\d+) s;", text)[1]
    picture = re.search(r"!\[(.+)\]\((.+\.png)\)", text)
    thumbnail = f'<img src="{picture[2]}" width="120" alt="{picture[1]}">' if picture else ""
    before = re.search(r"^\* Read first: (.+)$", text, re.M)
    cells = [thumbnail, f"[{title_of(page)}]({page.stem}.md)", before[1] if before else ""]
    return f"| {' | '.join(cells)} | {seconds} s |"


def index_text() -> str:
    """Return the index of the course, grouped by paper."""
    lines = [
        "# The course",
        "",
        "One page per section of the four papers: equation, naive lines, the library's call, a",
        "figure, exercises. Read them here, or run one: `python tutorials/NAME.py`. A page is a",
        "script in percent format, so it opens as a notebook in VS Code and, with jupytext, in",
        "Jupyter. Times were measured when the page was last rendered, on a shared CPU core.",
    ]
    for digit, paper in PAPERS.items():
        rows = [index_row(page) for page in rendered_pages() if page.name[0] == digit]
        if rows:
            lines += ["", f"## {paper}", "", "| | page | read first | time |", "|---|---|---|---|"]
            lines += rows
    return "\n".join(lines) + "\n"


def write_links() -> None:
    """Write the index, and the links to the neighbours on every page."""
    pages = rendered_pages()
    for index, page in enumerate(pages):
        atomic_write(COURSE / f"{page.stem}.md", linked(pages, index))
    atomic_write(COURSE / "README.md", index_text())


def main(arguments: list[str] | None = None) -> None:
    """Render the page that is given, then write the index and the links."""
    parser = argparse.ArgumentParser(prog="crab_min.tools.page", description=__doc__.split("\n")[0])
    parser.add_argument("page", type=Path, nargs="?", help="a script in tutorials/")
    page = parser.parse_args(arguments).page
    COURSE.mkdir(parents=True, exist_ok=True)
    if page:
        render(page)
    write_links()


if __name__ == "__main__":
    main()
