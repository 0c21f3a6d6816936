"""Many questions about many clips: `python infer.py CLIPS --questions FILE --out answers.csv`."""

import csv
import hashlib
import io
import json
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from crab_min.data import OWN_LABELS, OWN_TEXTS, Sample, own_samples
from crab_min.errors import DataError, RunError, UserError
from crab_min.evaluation.answering import DEFAULT_LIMIT, Decoding, generate_answers
from crab_min.evaluation.budget import TokenBudget
from crab_min.features import Features
from crab_min.runs.folder import atomic_write
from crab_min.sources.own import TABLES, clip_of, read_own_rows, split_question
from crab_min.text_files import parse_json, read_csv, read_text
from crab_min.tools.loading import LoadedRun
from crab_min.tools.questions import clips_of, prepare, question_sample

COLUMNS = ("clip", "question", "answer", "text", "error")


@dataclass
class Question:
    """One question about one clip.

    Attributes:
        sample: None where the clip does not fit the questions of the run.
        error: the reason why it does not.
    """

    clip: str
    question: str
    sample: Sample | None
    error: str = ""


def answer_many(given: Namespace, run: LoadedRun) -> None:
    """Answer each question of a file about each clip, and write the answers to a table.

    Answers of a command that was killed are kept: the same command continues.

    Raises:
        DataError: a file of questions that cannot be used.
        RunError: the table exists already.
    """
    out = Path(given.out or "answers/answers.csv")
    if out.suffix not in (".csv", ".jsonl"):
        raise RunError(f"--out {out}: answers are written as .csv or .jsonl")
    if out.exists():
        raise RunError(f"{out}: exists; choose another --out, or remove it to ask anew")
    out.parent.mkdir(parents=True, exist_ok=True)
    questions = read_questions(given, run)
    samples = [question.sample for question in questions if question.sample]
    if not samples:
        raise DataError(questions[0].error)

    # answers in batches; those of an interrupted command with the same questions and model are kept
    limits = dict(run.saved.token_limits)
    for sample in samples:
        limit = given.max_new_tokens or limits.get(sample.task.name, DEFAULT_LIMIT)
        limits[sample.task.name] = limit
    budget = TokenBudget(given.eval_batch_tokens)
    decoding = Decoding(limits, run.settings.run.eval_mode, given.beams, budget)
    partial = out.with_name(f".{out.name}.{digest(run, decoding, samples)}.partial")
    features = Features(run.model, run.settings.data.cache_features, max_bad=1.0)
    features.prepare(samples, strict=False)
    texts = generate_answers(
        run.model, features, samples, decoding, "answering", partial, strict=False
    )

    # the table, in the order of the questions
    text_of = dict(zip((sample.id for sample in samples), texts))
    rows = []
    for question in questions:
        text = text_of[question.sample.id] if question.sample else ""
        rows.append(table_row(question, text, features))
    atomic_write(out, table_text(rows, out.suffix))
    partial.unlink(missing_ok=True)
    failed = sum(bool(row["error"]) for row in rows)
    print(f"{len(rows)} answers in {out}, {failed} of them with an error")


def table_row(question: Question, text: str, features: Features) -> dict[str, str]:
    """Return the row of a question: its answer, or the reason why there is none."""
    label, error = text, question.error
    if question.sample:
        answer = question.sample.task.parse(text)
        broken = [part for part in question.sample.media if part in features.unreadable]
        label = text if answer.choice is None else answer.choice
        error = features.unreadable[broken[0]] if broken else answer.error or ""
    return dict(zip(COLUMNS, (question.clip, question.question, label, text, error)))


def read_questions(given: Namespace, run: LoadedRun) -> list[Question]:
    """Return the questions of --questions about each clip of the command line.

    The file has one question per line, or a column question, or lines of a .jsonl. A row that names
    its own media, in the column clip or in the .jsonl, is asked about these alone.
    """
    path = Path(given.questions)
    clips = clips_of(given)
    texts, rows = read_question_file(path, run.form.options if run.form else ())
    if texts and not clips:
        raise DataError(f"{path}: its questions name no clip; give clips or a folder of them")

    questions = []
    for clip in clips:
        for text in texts:
            question = Question(str(clip), text, None)
            name = f"{clip}: {len(questions)}"
            try:
                question.sample = question_sample(given, run, clip, text, name)
            except UserError as error:  # of this clip, such as a sound among videos
                question.error = str(error)
            questions.append(question)
    for row in rows:
        name = f"{clip_of(row)}: {len(questions)}"
        questions.append(own_question(row, given, run, name))
    return questions


def read_question_file(path: Path, labels: Iterable[str] = ()) -> tuple[list[str], list[dict]]:
    """Read a file of questions.

    Args:
        labels: what the question that is made for a table of labels lists too.

    Returns:
        Questions about every clip, and rows that name their own media.

    Raises:
        DataError: the file cannot be read, or has no questions.
    """
    lines = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not lines:
        raise DataError(f"--questions {path}: no questions; a line is one")
    suffix = path.suffix.lower()
    if suffix not in TABLES:
        return lines, []
    if suffix == ".jsonl" and '"messages"' not in lines[0]:
        try:
            questions = [parse_json(line)["question"] for line in lines]
            if not all(isinstance(question, str) and question.strip() for question in questions):
                raise ValueError("a question is a text")
            return questions, []
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'--questions {path}: a line is {{"question": ...}} or has messages ({error})'
            ) from None
    if suffix != ".jsonl":
        columns, numbered = read_csv(path)
        if "question" in columns and not {"clip", "file"} & set(columns):
            return [row["question"] for _, row in numbered if row.get("question")], []
    return [], read_own_rows(path, answers=False, labels=labels)


def own_question(row: dict, given: Namespace, run: LoadedRun, name: str) -> Question:
    """Make the question of a row that names its own media.

    A row of a table is put into the form of the run. A .jsonl says its own form.
    """
    # an answer in the row is not used
    messages = row["messages"]
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    row = {**row, "messages": messages}
    is_label = run.form is not None and run.form.is_label
    sample = own_samples([row], "test", OWN_LABELS if is_label else OWN_TEXTS)[-1]

    clip = clip_of(row)
    _, question = split_question(sample.parts)
    if row.get("clip"):
        sample = question_sample(given, run, Path(clip), question, name)
    else:
        [sample] = prepare([replace(sample, id=name)], given, run)
    return Question(clip, question, sample)


def digest(run: LoadedRun, decoding: Decoding, samples: list[Sample]) -> str:
    """Return a short name for all that the answers depend on."""
    prompts = [[asdict(part) for part in sample.parts] for sample in samples]
    depends = [str(run.folder), decoding.mode, decoding.beams, decoding.limits, prompts]
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:10]


def table_text(rows: list[dict], suffix: str) -> str:
    """Return rows as the text of a .csv or a .jsonl."""
    if suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
