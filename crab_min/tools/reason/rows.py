"""Training rows, as they are read and written, and what was written about each.

    folders = read_folders(root, tasks, rewrite)     the rows, and which of them are asked about
    jobs = make_jobs(folders, briefs, notes, ...)    one per row that is asked about
    write_folder(out, root, folders, jobs)           train.json per task, test.json as it was

Test rows are never asked about.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from crab_min.answers import Answer
from crab_min.data import Sample, make_sample
from crab_min.errors import DataError, MediaError
from crab_min.media.read import media_seconds
from crab_min.runs.folder import atomic_write
from crab_min.sources.rows import find_layout, read_rows
from crab_min.tasks import TASKS, Task
from crab_min.tools.reason.briefs import (
    Brief,
    can_be_reasoned,
    closing_words,
    example_sample,
    notes_of,
    row_facts,
)
from crab_min.tools.reason.verify import Rejection, Rules, example_evidence, split_text

CLOSED_SETS = ("action", "emotion", "localisation")  # families of which all labels are compared


# --- a row and what was written about it ----------------------------------------------------------
@dataclass
class Attempt:
    """One text about a row, and what became of it.

    judge: "yes", "no" or "unclear"; "" before or without a judge.
    """

    text: str
    rejection: Rejection | None
    judge: str = ""

    @property
    def fault(self) -> Rejection | None:
        """Return why the text is not used: the check that failed, or the judge's no."""
        if self.judge == "no":
            return Rejection("judge", "The sentences do not support the answer.")
        return self.rejection


@dataclass
class Job:
    """A training row that is asked about.

    Attributes:
        seconds: length of its clip.
        notes: captions or transcripts of its media.
        judged: a judge has to agree.
        attempts: the texts so far, the last one is the one that counts.
        error: why the last request had no reply; "" where it had one.
    """

    sample: Sample
    brief: Brief
    rules: Rules
    seconds: float
    notes: list[str] = field(default_factory=list)
    judged: bool = False
    attempts: list[Attempt] = field(default_factory=list)
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether the last text passed the checks, and no judge has said no."""
        return bool(self.attempts) and self.attempts[-1].fault is None

    @property
    def verified(self) -> bool:
        """Whether the last text may be learned from: a judge, if there is one, has answered."""
        return self.passed and (not self.judged or self.attempts[-1].judge != "")

    @property
    def prompt(self) -> str:
        """Return the prompt about the row."""
        facts = row_facts(self.sample, self.seconds, self.notes)
        return self.brief.fill(facts, closing_words(self.sample))

    @cached_property
    def prompt_hash(self) -> str:
        """Return a hash of prompt and media; texts of another hash are not used."""
        media = [part.path for part in self.sample.media]
        return hashlib.sha256(repr((self.prompt, media)).encode()).hexdigest()[:12]


@dataclass
class Folder:
    """The rows of the training split of a task, and which of them are asked about.

    Attributes:
        rows: as they were read.
        samples: by index; None where a row is not usable.
        kept: index -> why the row is not asked about.
    """

    task: Task
    rows: list[dict]
    samples: list[Sample | None]
    kept: dict[int, str] = field(default_factory=dict)


# --- reading --------------------------------------------------------------------------------------
def read_folders(root: Path, tasks: list[str], rewrite: bool) -> list[Folder]:
    """Read the training rows of tasks.

    Args:
        rewrite: also ask about rows that have a reasoned text already.

    Raises:
        DataError: no training rows at all.
    """
    folders = []
    for task in (TASKS[name] for name in tasks):
        if not find_layout(root, task.name, "train")[0]:
            continue
        folder = Folder(task, read_rows(root, task.name, "train"), [])
        for index, row in enumerate(folder.rows):
            sample, reason = usable_sample(task, row, root, index, rewrite)
            folder.samples.append(sample)
            if reason:
                folder.kept[index] = reason
        folders.append(folder)
    if not folders:
        raise DataError(
            f"{root}: no train.json in any of {', '.join(tasks)}; --data takes the folder that "
            "holds ave/, avqa/, ... (AVUIE_2)"
        )
    return folders


def usable_sample(
    task: Task, row: dict, root: Path, index: int, rewrite: bool
) -> tuple[Sample | None, str]:
    """Return the sample of a row, and why it is not asked about ("" where it is)."""
    try:
        sample = make_sample(task, row, root, "train", index, "reasoning", None)
    except ValueError:
        return None, "bad row"
    if not can_be_reasoned(task):
        return sample, "caption"
    if has_reasoning(sample) and not rewrite:
        return sample, "reasoned already"
    if not all(os.path.exists(part.path) for part in sample.media):
        return sample, "missing media"
    return sample, ""


def has_reasoning(sample: Sample) -> bool:
    """Tell whether the target of a training row has words besides its label."""
    answer = sample.task.parse(sample.target)
    if answer.error or not can_be_reasoned(sample.task):
        return False
    evidence, _ = split_text(sample, sample.target)
    return bool(re.search(r"\w", evidence))


def make_jobs(
    folders: list[Folder],
    briefs: dict[str, Brief],
    notes: dict[str, str],
    max_words: int,
    judged: bool,
) -> list[Job]:
    """Make a job of every row that is asked about; `judged`: a judge has to agree."""
    jobs = []
    lengths: dict[str, float] = {}  # path -> seconds
    for folder in folders:
        if not can_be_reasoned(folder.task):
            continue
        brief = briefs[folder.task.name]
        rules = rules_of(folder, brief, max_words)
        for index, sample in enumerate(folder.samples):
            if index in folder.kept:
                continue
            try:
                seconds = clip_seconds(sample, lengths)
            except MediaError:
                folder.kept[index] = "unreadable media"
                continue
            row_notes = notes_of(sample, notes)
            jobs.append(Job(sample, brief, rules, seconds, row_notes, judged))
    return jobs


def rules_of(folder: Folder, brief: Brief, max_words: int) -> Rules:
    """Return what the texts of a folder are compared with."""
    labels: set[str] = set()
    if folder.task.family in CLOSED_SETS:
        for sample in filter(None, folder.samples):
            labels.update(labels_of(sample.gold))
    examples = set()
    for example in brief.examples:
        sample = example_sample(folder.task, example)
        examples.add(example_evidence(sample, example.text))
    return Rules(tuple(sorted(labels)), brief.instructions(), frozenset(examples), max_words)


def labels_of(gold: Answer) -> list[str]:
    """Return the choice of an answer, or the labels of its events."""
    if gold.choice is not None:
        return [gold.choice]
    return [label for label, _ in gold.events + gold.audio_events + gold.visual_events]


def clip_seconds(sample: Sample, lengths: dict[str, float]) -> float:
    """Return the length of the longest medium of a row. Raises MediaError."""
    paths = [part.path for part in sample.media if part.kind != "image"]
    for path in paths:
        if path not in lengths:
            lengths[path] = media_seconds(path)
    return max((lengths[path] for path in paths), default=0.0)


# --- writing --------------------------------------------------------------------------------------
def write_folder(out: Path, root: Path, folders: list[Folder], jobs: list[Job]) -> None:
    """Write an AV-UIE folder: verified texts, labels alone where there is none, test rows as read.

    The media stay where they are; the rows name them relative to the new folder.
    """
    by_id = {job.sample.id: job for job in jobs}
    for folder in folders:
        task = folder.task
        rows = []
        for row, sample in zip(folder.rows, folder.samples):
            moved = move_media(task, row, root, out)
            if sample is not None:
                moved[task.target] = target_text(sample, by_id.get(sample.id))
            rows.append(moved)
        (out / task.name).mkdir(exist_ok=True)
        atomic_write(out / task.name / "train.json", as_json(rows))
        if find_layout(root, task.name, "test")[0]:
            tests = read_rows(root, task.name, "test")
            moved = [move_media(task, row, root, out) for row in tests]
            atomic_write(out / task.name / "test.json", as_json(moved))


def target_text(sample: Sample, job: Job | None) -> str:
    """Return what a row is trained on: a verified text, or the label alone.

    A row that was not asked about keeps its text.
    """
    if job is None:
        return sample.target
    if job.verified:
        return job.attempts[-1].text
    return sample.task.format(sample.gold)


def as_json(rows: list[dict]) -> str:
    return json.dumps(rows, indent=1, ensure_ascii=False)


def move_media(task: Task, row: dict, root: Path, out: Path) -> dict:
    """Return a row whose media are named relative to the folder `out`."""
    moved = dict(row)
    for medium in task.media:
        start = os.path.abspath(out / task.name / medium.subfolder)
        for name in medium.fields:
            if row.get(name) is not None:
                path = os.path.abspath(root / task.name / medium.subfolder / str(row[name]))
                moved[name] = os.path.relpath(path, start)
    return moved


def rows_of_jobs(jobs: list[Job], model: str) -> str:
    """Return rows.jsonl: per row its prompt, model, number of texts, verdict and text."""
    lines = []
    for job in jobs:
        last = job.attempts[-1] if job.attempts else Attempt("", None)
        verdict = "verified"
        if job.error:
            verdict = f"unanswered: {job.error}"
        elif last.fault:
            verdict = f"{last.fault.kind}: {last.fault.reason}"
        line = {
            "row": job.sample.id,
            "prompt": job.prompt_hash,
            "model": model,
            "tries": len(job.attempts),
            "verdict": verdict,
            "judge": last.judge,
            "text": last.text,
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)
