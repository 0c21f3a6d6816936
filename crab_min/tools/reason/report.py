"""Counts of what was asked, verified and thrown out, and a sheet of rows to judge by eye."""

import random
from dataclasses import dataclass, field
from pathlib import Path

from crab_min.evaluation.pictures import draw_sheet
from crab_min.tools.reason.rows import Folder, Job

SHEET_ROWS = 20


@dataclass
class TaskCounts:
    """Counts of the training rows of one task, and of their texts."""

    rows: int = 0
    verified: int = 0
    label_only: int = 0  # asked about as often as allowed, each text rejected
    unanswered: int = 0  # no reply, or none of the judge; the same command asks again
    texts: int = 0
    judged: int = 0
    judged_yes: int = 0
    kept: dict[str, int] = field(default_factory=dict)  # not asked about, by reason
    rejected: dict[str, int] = field(default_factory=dict)  # texts thrown out, by kind


def count_rows(folders: list[Folder], jobs: list[Job]) -> dict[str, TaskCounts]:
    """Return the counts of each task, and those of all under "all"."""
    counts = {folder.task.name: TaskCounts() for folder in folders}
    counts["all"] = TaskCounts()
    for folder in folders:
        for task_counts in (counts[folder.task.name], counts["all"]):
            task_counts.rows += len(folder.rows)
            for reason in folder.kept.values():
                task_counts.kept[reason] = task_counts.kept.get(reason, 0) + 1
    for job in jobs:
        for task_counts in (counts[job.sample.task.name], counts["all"]):
            add_job(task_counts, job)
    return counts


def add_job(counts: TaskCounts, job: Job) -> None:
    """Add a row and its texts to the counts of its task."""
    if job.verified:
        counts.verified += 1
    elif job.error:
        counts.unanswered += 1
    else:
        counts.label_only += 1
    counts.texts += len(job.attempts)
    for attempt in job.attempts:
        if attempt.fault:
            kind = attempt.fault.kind
            counts.rejected[kind] = counts.rejected.get(kind, 0) + 1
        if attempt.judge:
            counts.judged += 1
        if attempt.judge == "yes":
            counts.judged_yes += 1


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


def draw_verified(path: Path, jobs: list[Job], seed: int) -> int:
    """Draw random verified rows with their media; return how many were drawn."""
    verified = [job for job in jobs if job.verified]
    chosen = random.Random(seed).sample(verified, min(SHEET_ROWS, len(verified)))
    if chosen:
        draw_sheet(path, [(job.sample, job.attempts[-1].text, None) for job in chosen])
    return len(chosen)
