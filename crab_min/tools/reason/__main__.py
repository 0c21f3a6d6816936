"""The command: from a folder of labelled rows to a folder of reasoned ones.

    python -m crab_min.tools.reason --data IN --out OUT --llm template
    python -m crab_min.tools.reason --data IN --out OUT --llm http://127.0.0.1:8000/v1#MODEL

The folder OUT, an AV-UIE folder to train on:

    TASK/train.json   verified texts; the label alone where no text passed
    TASK/test.json    as it was
    replies.jsonl     every reply, with its verdict; a run that was stopped continues from here
    rows.jsonl        one line per row: prompt hash, model, number of texts, verdict, text
    report.json       settings and counts
    sheet.png         random verified rows with their media, to be judged by eye
"""

import argparse
import json
import random
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from crab_min.cli import Parser, run_command
from crab_min.data import pick_tasks
from crab_min.errors import RunError
from crab_min.runs.folder import atomic_write, lock_run
from crab_min.tools.reason.asking import Log, ask_all
from crab_min.tools.reason.briefs import load_briefs, load_notes
from crab_min.tools.reason.report import count_rows, draw_verified, table
from crab_min.tools.reason.rows import make_jobs, read_folders, rows_of_jobs, write_folder
from crab_min.tools.reason.template import Template
from crab_min.tools.reason.verify import MAX_WORDS
from crab_min.tools.reason.writers import KEY, LocalModel, Server, Writer

ADDRESS = ("http://", "https://")  # a --llm that is not the path or hub id of a model


# flags on which the texts depend; a stopped run continues with the same ones
SETTINGS = ("data", "llm", "tasks", "briefs", "notes", "judge", "show_clip", "rewrite", "tries")
SETTINGS += ("max_words",)


def open_folder(out: Path, settings: dict) -> None:
    """Write settings.json into a new folder, or compare with that of a stopped run.

    Raises:
        RunError: the folder holds something else, or was begun with other settings.
    """
    file = out / "settings.json"
    if file.exists():
        old = json.loads(file.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if old.get(name) != value:
                raise RunError(
                    f"{out}: was begun with --{name.replace('_', '-')} {old.get(name)!r}, now "
                    f"{value!r}; use its value to continue it, or another --out"
                )
    elif any(path.name != "lock" for path in out.iterdir()):
        raise RunError(f"{out}: exists and is not of this command; choose another --out")
    else:
        atomic_write(file, json.dumps(settings, indent=1))


def make_writer(llm: str, given: argparse.Namespace) -> Writer:
    """Return the writer that --llm or --judge names."""
    if llm == "template":
        return Template()
    if llm.startswith(ADDRESS):
        return Server(llm, given.parallel, given.timeout, given.retries)
    return LocalModel(llm, given.batch_size, given.load_in_4bit)


def reason(given: argparse.Namespace) -> None:
    """Ask about the rows, and write the folder or, with --sample, only the report."""
    settings = {name: getattr(given, name) for name in SETTINGS}
    if given.show_clip and not given.llm.startswith(ADDRESS):
        raise RunError(
            "--show-clip needs a server (--llm http://.../v1) whose model sees and hears"
        )
    if given.judge == "template":
        raise RunError("--judge template: a template has no opinion; name a model")

    root, out = Path(given.data), Path(given.out)
    source, target = root.resolve(), out.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise RunError(f"--out {out}: lies in --data {root}, or around it; choose another")

    # what there is to ask
    tasks = pick_tasks(given.tasks)
    briefs, notes = load_briefs(given.briefs), load_notes(given.notes)
    folders = read_folders(root, tasks, given.rewrite)
    jobs = make_jobs(folders, briefs, notes, given.max_words, judged=bool(given.judge))

    # who is asked
    tries = 1 if given.llm == "template" else given.tries  # a template writes the same again
    writer = make_writer(given.llm, given)
    judge = make_writer(given.judge, given) if given.judge else None

    # ask, from where a stopped run was
    with lock_run(out):
        open_folder(out, settings)
        chosen = jobs
        if given.sample:
            count = min(given.sample, len(jobs))
            chosen = random.Random(given.seed).sample(jobs, count)
        with closing(Log(out / "replies.jsonl", jobs)) as log:
            ask_all(chosen, writer, judge, log, tries, given.show_clip)

        # write
        if not given.sample:
            write_folder(out, root, folders, jobs)
        atomic_write(out / "rows.jsonl", rows_of_jobs(chosen, given.llm))
        counts = count_rows(folders, chosen)
        report = {"settings": settings, "counts": {k: asdict(count) for k, count in counts.items()}}
        atomic_write(out / "report.json", json.dumps(report, indent=1))
        print(table(counts))
        (out / "sheet.png").unlink(missing_ok=True)
        drawn = draw_verified(out / "sheet.png", chosen, given.seed)
    sheet = f"{drawn} verified rows to judge by eye in sheet.png, " if drawn else ""
    print(f"{out}: {sheet}all rows in rows.jsonl")
    if given.sample:
        print(f"this was a sample of {len(chosen)}; without --sample all {len(jobs)} are asked")
    elif counts["all"].unanswered:
        print(f"{counts['all'].unanswered} rows had no reply; the same command asks them again")


def make_parser() -> Parser:
    """Make the parser of the command."""
    parser = Parser(
        prog="-m crab_min.tools.reason",
        description="Turn labelled rows into reasoned ones, with a chat model, and verify them.",
    )
    add = parser.add_argument
    add("--data", required=True, help="the folder that holds ave/, avqa/, ... (AVUIE_2)")
    add("--out", required=True, help="a new folder of the same form")
    add(
        "--llm",
        required=True,
        help="template (no model); a chat model of transformers by path or hub id; or a server, "
        f"http://HOST/v1#MODEL, whose key is in the environment variable {KEY}",
    )
    add("--tasks", default="all", help="comma-separated task names, or all")
    add("--sample", type=int, default=0, help="ask about this many random rows first (0: all)")
    add("--rewrite", action="store_true", help="also rows that have a reasoned text already")
    add("--briefs", default="", help="a .json with briefs of your own, by task")
    add("--notes", default="", help="a .json with captions or transcripts, by media file name")
    add("--show-clip", action="store_true", help="send frames and sound too (servers alone)")
    add("--judge", default="", help="a second model: does the text support the label?")
    add("--tries", type=int, default=3, help="texts per row at most (default: 3)")
    add("--max-words", type=int, default=MAX_WORDS, help=f"of a text (default: {MAX_WORDS})")
    add("--parallel", type=int, default=4, help="requests to a server at once (default: 4)")
    add("--timeout", type=float, default=120.0, help="seconds per request (default: 120)")
    add("--retries", type=int, default=5, help="of a request, with growing pauses (default: 5)")
    add("--batch-size", type=int, default=8, help="of a model of transformers (default: 8)")
    add("--load-in-4bit", action="store_true", help="of a model of transformers")
    add("--seed", type=int, default=0, help="of the rows of --sample and of the sheet")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = make_parser().parse_args(arguments)
    return run_command(lambda: reason(given), given.debug)


if __name__ == "__main__":
    sys.exit(main())
