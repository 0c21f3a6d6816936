"""Check a copy of AV-UIE before training: what is there, what is missing or unreadable, lengths, labels.

    python -m crab_min.tools.check --data AVUIE_2
"""
import json
import os
import sys
from collections import Counter
from pathlib import Path
from statistics import median

from tqdm import tqdm

from crab_min.answers import GRID
from crab_min.cli import Parser, run_command
from crab_min.runs.folder import atomic_write
from crab_min.data import DataError, Sample, decoding, make_sample, pick_tasks
from crab_min.sources.av_uie import annotation_file, read_rows
from crab_min.tasks import TASKS


def check(root: str | Path, tasks: list[str], decode: bool, workers: int) -> dict:
    """What a copy of AV-UIE holds: by task and split its rows, its labels and the lengths of its files; and all that is wrong.

    decode: every file is decoded as in training; else its header is read alone. Each file is looked at once, by `workers` processes.
    Returns {"tasks": {"ave/train": {...}}, "files": their number, "bad": [{"path", "reason", "rows"}], "rows": [reasons]}. Raises DataError.
    """
    found, bad_rows, users, paths = {}, [], Counter(), {}                     # users: part -> its rows; paths: task/split -> its files
    for task in (TASKS[name] for name in tasks):
        for split in task.splits:
            if annotation_file(Path(root), task.name, split):
                rows, samples = read_rows(root, task.name, split), []
                for index, row in enumerate(rows):
                    try:
                        samples.append(make_sample(task, row, Path(root), split, index, "reasoning", None))
                    except ValueError as error:                               # a field, or a mask
                        bad_rows.append(f"{task.name}/{split}/{index}: {error}")
                users.update(part for sample in samples for part in sample.media)
                paths[f"{task.name}/{split}"] = {part.path for sample in samples for part in sample.media}
                found[f"{task.name}/{split}"] = {"rows": len(rows), "bad_rows": len(rows) - len(samples), "labels": Counter(labels_of(samples)),
                                                 "unparsed_targets": sum(bool(s.target and task.parse(s.target).error) for s in samples)}
    if not found:
        raise DataError(f"{root}: no annotation file of {', '.join(tasks)}; --data takes the folder that holds ave/, avqa/, ... (AVUIE_2)")
    parts = sorted(users if decode else {p.path: p for p in users}.values(), key=lambda p: (p.path, p.index))
    lengths, reasons, rows_of = {}, {}, Counter()
    for part, rows in users.items():
        rows_of[part.path] += rows
    groups = [parts[i:i + 16] for i in range(0, len(parts), 16)]
    for group in tqdm(decoding(groups, GRID, workers, decode), desc="reading media", unit_scale=16, unit="file"):
        for part, loaded, reason in group:
            if reason is not None:
                reasons[part.path] = reason
            elif part.kind != "image":
                lengths[part.path] = loaded[1]
    for name, entry in found.items():
        seconds, bad = [lengths[p] for p in paths[name] if p in lengths], paths[name] & reasons.keys()
        entry |= {"files": len(paths[name]), "missing": sum(not os.path.exists(p) for p in bad), "unreadable": sum(os.path.exists(p) for p in bad),
                  "seconds": [min(seconds), median(seconds), max(seconds)] if seconds else None}
    return {"tasks": found, "files": len(rows_of), "bad": [{"path": p, "reason": r, "rows": rows_of[p]} for p, r in sorted(reasons.items())], "rows": bad_rows}


def labels_of(samples: list[Sample]) -> list[str]:
    """The labels that the golds of the samples name: a choice, or the events."""
    return [label for s in samples for label in ([s.gold.choice] if s.gold.choice is not None else
                                                 [label for label, _ in s.gold.events + s.gold.audio_events + s.gold.visual_events])]


def check_report(found: dict) -> str:
    """The table that `check` ends with."""
    lines = [f"{'task/split':<16}{'rows':>8}{'bad rows':>10}{'files':>8}{'missing':>9}{'unreadable':>12}{'labels':>8}  seconds: least, median, most"]
    for name, e in found["tasks"].items():
        seconds = "  ".join(f"{s:.1f}" for s in e["seconds"]) if e["seconds"] else "-"
        lines.append(f"{name:<16}{e['rows']:>8}{e['bad_rows']:>10}{e['files']:>8}{e['missing']:>9}{e['unreadable']:>12}{len(e['labels']):>8}  {seconds}")
    return "\n".join([*lines, f"{found['files']} files, {len(found['bad'])} of them missing or unreadable; {len(found['rows'])} rows that cannot be used"])


def main(arguments: list[str]) -> int:
    parser = Parser(prog="-m crab_min.tools.check", description="Check a copy of AV-UIE.")
    parser.add_argument("--data", required=True, help="the folder that holds ave/, avqa/, ... (AVUIE_2)")
    parser.add_argument("--tasks", default="all", help="comma-separated task names, or all")
    parser.add_argument("--headers", action="store_true", help="read the header of each file alone: much faster, but a broken picture or sound is not found")
    parser.add_argument("--out", default="check.json", help="where all that was found goes, with the reasons")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--debug", action="store_true", help="show a traceback where something goes wrong")
    given = parser.parse_args(arguments)

    def run():
        found = check(given.data, pick_tasks(given.tasks), not given.headers, given.workers)
        for reason in [b["reason"] for b in found["bad"][:10]] + found["rows"][:10]:
            print(reason)
        print(check_report(found))
        atomic_write(Path(given.out), json.dumps(found, indent=1, ensure_ascii=False))
        print(f"all of it, with every reason: {given.out}")
    return run_command(run, given.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
