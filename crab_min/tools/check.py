"""A check of data before training: a copy of AV-UIE, or a table of your own clips.

It reports missing and unreadable files, lengths, labels, how many rows have a reasoned text, and
tokens for a named model.

python -m crab_min.tools.check --data labels.csv
python -m crab_min.tools.check --data AVUIE_2 --model crab_plus-7b
"""

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from crab_min.cli import Parser, run_command
from crab_min.config import DataConfig
from crab_min.data import Sample, data_sources, make_sample, pick_tasks, read_splits
from crab_min.errors import DataError, listed
from crab_min.interface import PromptPart
from crab_min.runs.folder import atomic_write
from crab_min.sources.own import is_own
from crab_min.sources.rows import find_layout, read_rows
from crab_min.tasks import TASKS, Task
from crab_min.tools.lengths import read_media, sample_seconds
from crab_min.tools.loading import load_pretrained_model
from crab_min.tools.plan import prompt_tokens
from crab_min.tools.questions import silent
from crab_min.tools.reason.briefs import can_be_reasoned
from crab_min.tools.reason.rows import has_reasoning, labels_of
from crab_min.tools.statistics import SplitReport, draw_statistics

SHOWN = 10  # reasons of each kind that are printed; the file of --out has all


# --- what is reported ----------------------------------------------------------------------------
@dataclass
class BadFile:
    """A file that is missing or cannot be decoded."""

    path: str
    reason: str
    rows: int  # rows that use it


@dataclass
class Report:
    """Contents of the data, and all that is wrong with it.

    Attributes:
        samples: all of them.
        seconds: of each file that has a length, by path.
    """

    splits: dict[str, SplitReport]  # by task/split
    files: int
    bad_files: list[BadFile]
    bad_rows: list[str]  # task/split/index of a row and why it makes no sample
    samples: list[Sample] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

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
        for name, split in self.splits.items():
            if name.startswith("own/") and split.labels:
                counts = [f"{label} {n}" for label, n in Counter(split.labels).most_common(SHOWN)]
                rest = (
                    f", and {len(split.labels) - SHOWN} more" if len(split.labels) > SHOWN else ""
                )
                lines.append(f"labels of {name}: {', '.join(counts)}{rest}")
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
            task = TASKS.get(name.split("/")[0])  # None: rows of one's own
            if task and name.endswith("/train") and can_be_reasoned(task):
                family = task.family
                rows[family] += split.rows
                reasoned[family] += split.reasoned
        lines = []
        for family, count in rows.items():
            share = reasoned[family] / max(1, count)
            lines.append(f"{family}: {count} training rows, {share:.3f} of them reasoned")
        return lines


# --- check ---------------------------------------------------------------------------------------
def check(root: str | Path, tasks: list[str], decode: bool, workers: int, test: str = "") -> Report:
    """Check the annotation files of some tasks and every file that they name.

    Args:
        root: the folder that holds ave/, avqa/, ..., rows of your own, or several of them.
        tasks: names of tasks; those without annotation files are skipped.
        decode: decode every file as in training, or else read its header alone.
        workers: processes that read files (0: this one).
        test: test rows, as train.py --test names them.

    Raises:
        DataError: none of the tasks has an annotation file, or one cannot be read.
    """
    splits: dict[str, SplitReport] = {}
    paths: dict[str, set[str]] = {}  # task/split -> files that it names
    uses: Counter[PromptPart] = Counter()  # medium -> how many rows use it
    bad_rows: list[str] = []

    # annotations
    all_samples: list[Sample] = []
    if is_own(root) or test or len(data_sources(root)) > 1:
        found = run_splits(str(root), test, tasks)
    else:
        found = task_splits(Path(root), tasks)
    for name, (samples, reasons) in found.items():
        splits[name] = describe_split(samples, len(reasons))
        media = [part for sample in samples for part in sample.media]
        paths[name] = {part.path for part in media}
        uses.update(media)
        bad_rows += reasons
        all_samples += samples
    if not splits:
        raise DataError(
            f"{root}: no annotation file of {listed(tasks)}; --data takes the folder that holds "
            "ave/, avqa/, ... (AVUIE_2), a table, or a folder with a folder of clips per label"
        )

    # media
    seconds, errors = read_media(list(uses), decode, workers)
    for name, split in splits.items():
        add_files(split, paths[name], seconds, errors)

    rows_of: Counter[str] = Counter()  # path -> how many rows use it
    for part, rows in uses.items():
        rows_of[part.path] += rows
    bad_files = [BadFile(path, errors[path], rows_of[path]) for path in sorted(errors)]
    return Report(splits, len(rows_of), bad_files, bad_rows, all_samples, seconds)


def task_splits(root: Path, tasks: list[str]) -> dict[str, tuple[list[Sample], list[str]]]:
    """Read the annotation files of tasks: samples and reasons by task/split."""
    found = {}
    for task in (TASKS[name] for name in tasks):
        for split in task.splits:
            if find_layout(root, task.name, split)[0]:
                found[f"{task.name}/{split}"] = read_split(root, task, split)
    return found


def run_splits(root: str, test: str, tasks: list[str]) -> dict[str, tuple[list[Sample], list[str]]]:
    """Read training and test rows as a run splits them: samples by task/split."""
    found: dict[str, tuple[list[Sample], list[str]]] = {}
    train_rows, test_rows = read_splits(DataConfig(test=test), root, tasks, None, 0)
    for split, samples in (("train", train_rows), ("test", test_rows)):
        for sample in samples:
            found.setdefault(f"{sample.task.name}/{split}", ([], []))[0].append(sample)
    return found


def token_line(report: Report, name: str) -> str:
    """Return a line with the tokens of the shortest, the median and the longest prompt.

    Args:
        name: a model, as infer.py --model takes it.
    """
    run = load_pretrained_model(name, empty=True)
    samples = [s for s in report.samples if report.seconds.keys() >= {m.path for m in s.media}]
    samples = silent(samples, run)
    if not samples:
        return f"tokens for {name}: no clip could be read"
    samples.sort(key=lambda sample: sample_seconds(sample, report.seconds))
    chosen = [samples[0], samples[len(samples) // 2], samples[-1]]
    tokens = [str(prompt_tokens(run.model, sample, report.seconds)) for sample in chosen]
    return f"tokens of a prompt for {name}, of the shortest, median and longest clip: " + (
        ", ".join(tokens)
    )


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
    parser = Parser(prog="-m crab_min.tools.check", description="Check data before training.")
    parser.add_argument(
        "--data",
        required=True,
        help="a table, class folders or a .jsonl of your own, the folder that holds ave/, avqa/, "
        "... (AVUIE_2), or several of them, as train.py takes them",
    )
    parser.add_argument("--test", default="", help="test rows, as train.py --test names them")
    parser.add_argument(
        "--model", default="", help="also count tokens for this preset, hub id or folder"
    )
    parser.add_argument("--tasks", default="all", help="comma-separated task names, or all")
    parser.add_argument(
        "--headers",
        action="store_true",
        help="read the header of each file alone: much faster, but a broken picture or sound is "
        "not found",
    )
    parser.add_argument(
        "--out", default="", help="a .json for the whole report, with all reasons (default: none)"
    )
    parser.add_argument(
        "--figure", default="", help="a .png of rows, targets and labels (default: none)"
    )
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
        tasks = pick_tasks(given.tasks)
        report = check(given.data, tasks, not given.headers, given.workers, given.test)
        for reasons in ([file.reason for file in report.bad_files], report.bad_rows):
            print(*reasons[:SHOWN], sep="\n", end="\n" if reasons else "")
            if len(reasons) > SHOWN:
                print(f"... and {len(reasons) - SHOWN} more; --out check.json has them all")
        print(report.table())
        if given.model:
            print(token_line(report, given.model))
        if given.out:
            text = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
            atomic_write(Path(given.out), text)
            print(f"the whole report: {given.out}")
        if given.figure:
            draw_statistics(Path(given.figure), report.splits)
            print(f"as a picture: {given.figure}")

    return run_command(run, given.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
