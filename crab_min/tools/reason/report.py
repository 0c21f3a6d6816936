"""Counts of what was asked, verified and thrown out, and a sheet of rows to judge by eye."""

import random
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from crab_min.evaluation.pictures import draw_sheet
from crab_min.tools.reason.rows import Folder, Job

SHEET_ROWS = 20
SUMMED = ("rows", "verified", "label_only", "unanswered", "texts", "judged", "judged_yes")


@dataclass
class TaskCounts:
    """What became of the training rows of one task."""

    rows: int = 0
    verified: int = 0
    label_only: int = 0  # asked about as often as allowed, each text rejected
    unanswered: int = 0  # no reply, or none of the judge; the same command asks again
    texts: int = 0
    judged: int = 0
    judged_yes: int = 0
    kept: dict[str, int] = field(default_factory=dict)  # not asked about, by reason
    rejected: dict[str, int] = field(default_factory=dict)  # texts thrown out, by kind


def count_rows(folders: list[Folder], jobs: list[Job], tries: int) -> dict[str, TaskCounts]:
    """Return the counts of each task, and those of all under "all"."""
    counts = {folder.task.name: TaskCounts(rows=len(folder.rows)) for folder in folders}
    for folder in folders:
        reasons = Counter(reason.split(":")[0] for reason in folder.kept.values())
        counts[folder.task.name].kept = dict(reasons)
    for job in jobs:
        add_job(counts[job.sample.task.name], job, tries)
    counts["all"] = sum_of(list(counts.values()))
    return counts


def add_job(counts: TaskCounts, job: Job, tries: int) -> None:
    """Add a row and its texts to the counts of its task."""
    if job.verified:
        counts.verified += 1
    elif len(job.attempts) >= tries and not job.passed:
        counts.label_only += 1
    else:
        counts.unanswered += 1
    counts.texts += len(job.attempts)
    for attempt in job.attempts:
        kind = attempt.rejection.kind if attempt.rejection else ""
        if attempt.judge == "no":
            kind = "judge"
        if kind:
            counts.rejected[kind] = counts.rejected.get(kind, 0) + 1
        if attempt.judge:
            counts.judged += 1
        if attempt.judge == "yes":
            counts.judged_yes += 1


def sum_of(counts: list[TaskCounts]) -> TaskCounts:
    """Return the sum of counts."""
    total = TaskCounts()
    kept, rejected = Counter(), Counter()
    for one in counts:
        for name in SUMMED:
            setattr(total, name, getattr(total, name) + getattr(one, name))
        kept.update(one.kept)
        rejected.update(one.rejected)
    total.kept, total.rejected = dict(kept), dict(rejected)
    return total


def table(counts: dict[str, TaskCounts]) -> str:
    """Return a table with one line per task, and below it why texts were thrown out."""
    lines = [
        f"{'task':<10}{'rows':>8}{'asked':>8}{'verified':>10}{'share':>8}{'label only':>12}"
        f"{'unanswered':>12}{'texts/row':>11}  not asked"
    ]
    for name, one in counts.items():
        asked = one.verified + one.label_only + one.unanswered
        share, texts = "-", "-"
        if asked:
            share = f"{one.verified / asked:.3f}"
            texts = f"{one.texts / asked:.2f}"
        kept = ", ".join(f"{reason} {count}" for reason, count in one.kept.items())
        lines.append(
            f"{name:<10}{one.rows:>8}{asked:>8}{one.verified:>10}{share:>8}{one.label_only:>12}"
            f"{one.unanswered:>12}{texts:>11}  {kept or '-'}"
        )
    total = counts["all"]
    if total.rejected:
        kinds = sorted(total.rejected.items(), key=lambda pair: -pair[1])
        reasons = ", ".join(f"{kind} {count}" for kind, count in kinds)
        lines.append(f"{sum(total.rejected.values())} of {total.texts} texts thrown out: {reasons}")
    if total.judged:
        lines.append(
            f"judge: {total.judged_yes} of {total.judged} texts support their label "
            f"({total.judged_yes / total.judged:.3f})"
        )
    return "\n".join(lines)


def counts_as_json(counts: dict[str, TaskCounts]) -> dict:
    return {name: asdict(one) for name, one in counts.items()}


def draw_verified(path: Path, jobs: list[Job], seed: int) -> int:
    """Draw random verified rows with their media; return how many were drawn."""
    verified = [job for job in jobs if job.verified]
    chosen = random.Random(seed).sample(verified, min(SHEET_ROWS, len(verified)))
    if chosen:
        draw_sheet(path, [(job.sample, job.attempts[-1].text, None) for job in chosen])
    return len(chosen)
