"""The page of a run, report.html: one file without scripts, readable on a phone."""

import base64
import html
from collections import Counter
from pathlib import Path

from crab_min.config import Settings
from crab_min.evaluation.canonical import canonical_choice
from crab_min.evaluation.report import Evaluation
from crab_min.evaluation.scores import by_task
from crab_min.runs.folder import atomic_write
from crab_min.tasks import Task

MOST_LABELS = 30  # of a table of confusions
MOST_WRONG = 20  # wrong answers that are listed

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2530; background: #fff;
       max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
div.wide { overflow-x: auto; }
img { max-width: 58rem; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #d8dde4; text-align: right; }
th:first-child, td:first-child, td.text { text-align: left; }
td.text { min-width: 6rem; overflow-wrap: anywhere; }
td.right { background: #d9f2e3; } td.wrong { background: #fbe3e0; }
pre { background: #f3f5f8; padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def write_page(
    folder: Path, settings: Settings, evaluation: Evaluation, command: str, default: Settings
) -> None:
    """Write report.html of a finished run.

    Args:
        folder: of the run, with its pictures.
        command: that asks the run about a clip.
        default: the settings without flags and preset; what differs is shown.
    """
    tasks = by_task(evaluation.samples, evaluation.texts)
    sections = [
        ("How to ask", f"<pre>{html.escape(command)}</pre>"),
        ("Scores", score_table(evaluation.scores) + picture(folder / "scores.png", "scores")),
    ]
    for task, rows in tasks.items():
        golds = {sample.gold.choice for sample, _ in rows}
        if None not in golds and len(golds) <= MOST_LABELS:
            sections.append((f"Confusions of {task.name}", confusion_table(task, rows)))
    sections += [
        ("Best and worst answers", picture(folder / "answers.png", "answers to test clips")),
        ("Wrong answers", wrong_table(evaluation)),
        ("Training", picture(folder / "curves.png", "loss and learning rate by step")),
        ("Settings", settings_table(settings, default)),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections if content)
    title = html.escape(folder.name)
    atomic_write(
        folder / "report.html",
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>{body}</body></html>\n",
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return an HTML table; cells are HTML already, from `<td` on if they begin so."""
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in header)]
    for row in rows:
        cells = [cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row]
        lines.append("".join(cells))
    inside = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>{inside}</table></div>'


def text_cell(text: str) -> str:
    """Return a cell with text on the left."""
    return f'<td class="text">{html.escape(text)}</td>'


def picture(file: Path, description: str) -> str:
    """Return a picture of the run inside the page; "" if the run has none."""
    if not file.is_file():
        return ""
    data = base64.b64encode(file.read_bytes()).decode()
    image = f'<img alt="{description}" src="data:image/png;base64,{data}">'
    return f'<div class="wide">{image}</div>'


def score_table(scores: dict[str, dict]) -> str:
    """Return each task's metric beside the baselines."""
    rows = []
    for task, result in scores.items():
        numbers = [result.get(name) for name in ("base", "metric", "constant", "chance")]
        cells = ["" if number is None else f"{number:.3f}" for number in numbers]
        rows.append([html.escape(task), text_cell(result["name"]), *cells, str(result["n"])])
    header = ["task", "metric", "before training", "trained", "best constant", "chance", "clips"]
    return table(header, rows) if rows else "<p>No test rows, so nothing was evaluated.</p>"


def confusion_table(task: Task, rows: list[tuple]) -> str:
    """Return how often each gold label (rows) was answered with each label (columns)."""
    counts: Counter[tuple[str, str]] = Counter()
    for sample, text in rows:
        counts[canonical_choice(sample.gold), canonical_choice(task.parse(text)) or "no label"] += 1
    golds = sorted({gold for gold, _ in counts})
    answers = sorted({answer for _, answer in counts} | set(golds))
    if len(answers) > MOST_LABELS:
        others = [answer for answer in answers if answer not in golds]
        answers = [*golds, "another"]
        for gold in golds:
            counts[gold, "another"] = sum(counts[gold, other] for other in others)
    lines = []
    for gold in golds:
        cells = [html.escape(gold)]
        for answer in answers:
            kind = "right" if answer == gold else "wrong"
            number = counts[gold, answer]
            cells.append(f'<td class="{kind}">{number}</td>' if number else "")
        lines.append(cells)
    return table(["gold \\ answer", *answers], lines)


def wrong_table(evaluation: Evaluation) -> str:
    """Return the first wrong answers of tasks with labels: clip, gold label, text."""
    wrong = []
    for sample, text in zip(evaluation.samples, evaluation.texts):
        gold, answered = map(canonical_choice, (sample.gold, sample.task.parse(text)))
        if gold and answered != gold:
            name = Path(sample.media[0].path).name if sample.media else ""
            wrong.append([text_cell(cell) for cell in (name, sample.gold.choice, text)])
    if not wrong:
        return ""
    shown = table(["clip", "gold", "answer"], wrong[:MOST_WRONG])
    more = len(wrong) - MOST_WRONG
    return shown + (f"<p>{more} more in predictions/.</p>" if more > 0 else "")


def settings_table(settings: Settings, default: Settings) -> str:
    """Return the settings that differ from the defaults, or that name data and weights."""
    rows = []
    for group, values in vars(settings).items():
        for name, value in vars(values).items():
            standard = getattr(getattr(default, group), name)
            if value != standard or name in ("data", "weights", "steps", "lr", "batch_size"):
                rows.append([html.escape(f"{group}: {name}"), text_cell(str(value))])
    return table(["setting", "value"], rows)


def write_card(folder: Path, base: str, command: str, scores: dict[str, dict]) -> None:
    """Write README.md, the card of the run as a repository on the hub.

    Args:
        base: path or hub id of the pretrained weights; "" for the shipped base.
    """
    head = ["---", "library_name: crab_min", "tags: [audio-visual, peft]"]
    if base and not Path(base).exists():
        head.append(f"base_model: {base}")
    lines = [*head, "---", f"# {folder.name}", "", "Trained with crab_min. Ask it about a clip:"]
    lines += [
        "```",
        command,
        "```",
        "",
        "| task | metric | score | test clips |",
        "|---|---|---|---|",
    ]
    for task, result in scores.items():
        lines.append(f"| {task} | {result['name']} | {result['metric']:.3f} | {result['n']} |")
    atomic_write(folder / "README.md", "\n".join(lines) + "\n")
