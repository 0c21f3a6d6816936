"""A check of a copy of AV-UIE before training.

It reports missing and unreadable files, lengths and labels, and how many rows have a reasoned text.

python -m crab_min.tools.check --data AVUIE_2
"""

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from tqdm import tqdm

from crab_min.answers import GRID
from crab_min.cli import Parser, run_command
from crab_min.data import Sample, decode_ahead, make_sample, pick_tasks
from crab_min.errors import DataError
from crab_min.interface import PromptPart
from crab_min.runs.folder import atomic_write
from crab_min.sources.rows import find_layout, read_rows
from crab_min.tasks import TASKS, Task
from crab_min.tools.reason.briefs import can_be_reasoned
from crab_min.tools.reason.rows import has_reasoning, labels_of
from crab_min.tools.statistics import SplitReport, draw_statistics

GROUP = 16  # files that a worker process is given at once
SHOWN = 10  # reasons of each kind that are printed; the file has all


# --- what is reported ----------------------------------------------------------------------------
@dataclass
class BadFile:
    """A file that is missing or cannot be decoded."""

    path: str
    reason: str
    rows: int  # rows that use it


@dataclass
class Report:
    """Contents of a copy of AV-UIE, and all that is wrong with it."""

    splits: dict[str, SplitReport]  # by task/split
    files: int
    bad_files: list[BadFile]
    bad_rows: list[str]  # task/split/index of a row and why it makes no sample

    def to_json(self) -> dict:
        return {
            "tasks": {name: asdict(split) for name, split in self.splits.items()},
            "files": self.files,
            "bad": [asdict(file) for file in self.bad_files],
            "rows": self.bad_rows,
        }

    def table(self) -> str:
        """Return a table with one line per annotation file, and the totals below it."""
        header = (
            f"{'task/split':<16}{'rows':>8}{'bad rows':>10}{'files':>8}{'missing':>9}"
            f"{'unreadable':>12}{'labels':>8}{'reasoned':>10}{'words':>7}"
            "  seconds: least, median, most"
        )
        lines = [header]
        for name, split in self.splits.items():
            seconds = "-"
            if split.seconds:
                seconds = "  ".join(f"{s:.1f}" for s in split.seconds)
            reasoned, words = "-", "-"
            if split.words:
                reasoned = str(split.reasoned)
                words = f"{split.words[1]:.0f}"
            lines.append(
                f"{name:<16}{split.rows:>8}{split.bad_rows:>10}{split.files:>8}{split.missing:>9}"
                f"{split.unreadable:>12}{len(split.labels):>8}{reasoned:>10}{words:>7}  {seconds}"
            )
        lines += self.family_lines()
        lines.append(
            f"{self.files} files, {len(self.bad_files)} of them missing or unreadable; "
            f"{len(self.bad_rows)} rows that cannot be used"
        )
        return "\n".join(lines)

    def family_lines(self) -> list[str]:
        """Return a line per task of the paper: training rows, and the share that is reasoned."""
        rows: Counter[str] = Counter()
        reasoned: Counter[str] = Counter()
        for name, split in self.splits.items():
            task = TASKS[name.split("/")[0]]
            if name.endswith("/train") and can_be_reasoned(task):
                family = task.family
                rows[family] += split.rows
                reasoned[family] += split.reasoned
        lines = []
        for family, count in rows.items():
            share = reasoned[family] / max(1, count)
            lines.append(f"{family}: {count} training rows, {share:.3f} of them reasoned")
        return lines


# --- check ---------------------------------------------------------------------------------------
def check(root: str | Path, tasks: list[str], decode: bool, workers: int) -> Report:
    """Check the annotation files of some tasks and every file that they name.

    Args:
        root: the folder that holds ave/, avqa/, ...
        tasks: names of tasks; those without annotation files are skipped.
        decode: decode every file as in training, or else read its header alone.
        workers: processes that read files (0: this one).

    Raises:
        DataError: none of the tasks has an annotation file, or one cannot be read.
    """
    splits: dict[str, SplitReport] = {}
    paths: dict[str, set[str]] = {}  # task/split -> files that it names
    uses: Counter[PromptPart] = Counter()  # medium -> how many rows use it
    bad_rows: list[str] = []

    # annotations
    for task in (TASKS[name] for name in tasks):
        for split in task.splits:
            path, _ = find_layout(Path(root), task.name, split)
            if not path:
                continue
            samples, reasons = read_split(Path(root), task, split)
            name = f"{task.name}/{split}"
            splits[name] = describe_split(samples, len(reasons))
            media = [part for sample in samples for part in sample.media]
            paths[name] = {part.path for part in media}
            uses.update(media)
            bad_rows += reasons
    if not splits:
        raise DataError(
            f"{root}: no annotation file of {', '.join(tasks)}; --data takes the folder that holds "
            "ave/, avqa/, ... (AVUIE_2)"
        )

    # media
    seconds, errors = read_media(list(uses), decode, workers)
    for name, split in splits.items():
        add_files(split, paths[name], seconds, errors)

    rows_of: Counter[str] = Counter()  # path -> how many rows use it
    for part, rows in uses.items():
        rows_of[part.path] += rows
    bad_files = [BadFile(path, errors[path], rows_of[path]) for path in sorted(errors)]
    return Report(splits, len(rows_of), bad_files, bad_rows)


def read_split(root: Path, task: Task, split: str) -> tuple[list[Sample], list[str]]:
    """Make samples of all rows of an annotation file.

    Returns:
        The samples, and for each other row task/split/index and the reason.
    """
    samples, reasons = [], []
    for index, row in enumerate(read_rows(root, task.name, split)):
        try:
            samples.append(make_sample(task, row, root, split, index, "reasoning", None))
        except ValueError as error:  # in a field, or in the mask that the row names
            reasons.append(f"{task.name}/{split}/{index}: {error}")
    return samples, reasons


def describe_split(samples: list[Sample], bad_rows: int) -> SplitReport:
    """Count rows, labels, and unparsed and reasoned targets of one annotation file."""
    labels: Counter[str] = Counter()
    unparsed, reasoned = 0, 0
    lengths = []
    for sample in samples:
        labels.update(labels_of(sample.gold))
        if not sample.target:
            continue
        lengths.append(len(sample.target.split()))
        unparsed += sample.task.parse(sample.target).error is not None
        reasoned += has_reasoning(sample)
    words = three_of(lengths)
    return SplitReport(len(samples) + bad_rows, bad_rows, dict(labels), unparsed, reasoned, words)


def three_of(values: list[float]) -> list[float] | None:
    """Return the least, the median and the largest value; None without values."""
    return [min(values), median(values), max(values)] if values else None


def read_media(
    parts: list[PromptPart], decode: bool, workers: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Read media files.

    Args:
        parts: media; several may name the same file, of which they want different pieces.
        decode: decode each of the parts, or else read the header of each file once.
        workers: processes that read files (0: this one).

    Returns:
        Seconds by path, without pictures; and the reason by path where a file cannot be read.
    """
    if not decode:
        parts = list({part.path: part for part in parts}.values())
    parts = sorted(parts, key=lambda part: (part.path, part.index))
    groups = [parts[start : start + GROUP] for start in range(0, len(parts), GROUP)]

    seconds, errors = {}, {}
    loader = decode_ahead(groups, GRID, workers, decode)
    for group in tqdm(loader, desc="reading media", unit_scale=GROUP, unit="file"):
        for medium in group:
            if medium.error:
                errors[medium.part.path] = medium.error
            elif medium.part.kind != "image":
                seconds[medium.part.path] = medium.seconds
    return seconds, errors


def add_files(
    split: SplitReport, paths: set[str], seconds: dict[str, float], errors: dict[str, str]
) -> None:
    """Complete the report of an annotation file by what was found out about its files."""
    split.files = len(paths)
    for path in paths & errors.keys():
        if os.path.exists(path):
            split.unreadable += 1
        else:
            split.missing += 1
    split.seconds = three_of([seconds[path] for path in paths if path in seconds])


# --- command -------------------------------------------------------------------------------------
def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="-m crab_min.tools.check", description="Check a copy of AV-UIE.")
    parser.add_argument(
        "--data", required=True, help="the folder that holds ave/, avqa/, ... (AVUIE_2)"
    )
    parser.add_argument("--tasks", default="all", help="comma-separated task names, or all")
    parser.add_argument(
        "--headers",
        action="store_true",
        help="read the header of each file alone: much faster, but a broken picture or sound is "
        "not found",
    )
    parser.add_argument(
        "--out", default="check.json", help="file for the whole report, with all reasons"
    )
    parser.add_argument("--figure", default="check.png", help="file for rows, targets and labels")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes (default: all cores)",
    )
    parser.add_argument(
        "--debug", action="store_true", help="show a traceback where something goes wrong"
    )
    return parser


def main(arguments: list[str]) -> int:
    given = make_parser().parse_args(arguments)

    def run():
        report = check(given.data, pick_tasks(given.tasks), not given.headers, given.workers)
        for file in report.bad_files[:SHOWN]:
            print(file.reason)
        for reason in report.bad_rows[:SHOWN]:
            print(reason)
        print(report.table())
        text = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
        atomic_write(Path(given.out), text)
        draw_statistics(Path(given.figure), report.splits)
        print(f"the whole report, with every reason: {given.out}; as a picture: {given.figure}")

    return run_command(run, given.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
