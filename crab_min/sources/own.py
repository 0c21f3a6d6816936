r"""Rows of your own clips: a table, a folder of class folders, or a .jsonl.

    labels.csv      clip,label                   one label per clip
    answers.csv     clip,question,answer         a question each
    clips/LABEL/    a folder of clips per label
    rows.jsonl      one conversation per line, with any media

A table may also have the columns split (train or test), start and end (seconds of the clip) and
audio (its sound in a file of its own). All four become rows of one form, that of a .jsonl line:

    {"messages": [{"role": "user", "content": "<video><audio>What barks?"},
                  {"role": "assistant", "content": "<answer>the dog</answer>"}],
     "videos": ["x.mp4"], "audios": ["x.mp4"], "images": [], ...}

with absolute paths. Other fields: "options" (multiple choice), "sides" {name: file} (side
channels), "split", "start", "end", and "where", the file and line for messages.
"""

import difflib
import math
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from crab_min.answers import answer_tag
from crab_min.errors import DataError, listed
from crab_min.interface import PromptPart, QuestionForm, text_part
from crab_min.media.kinds import media_files, media_kind
from crab_min.sources.llava import conversation_row, is_llava
from crab_min.text_files import parse_json, read_csv, read_json, read_text

TABLES = (".csv", ".tsv", ".jsonl", ".json")
KINDS = ("video", "audio", "image")
# a tag stands for a medium; behind a backslash it is a word
MEDIA_TAG_TEXT = "(<video>|<audio>|<image>)"
MEDIA_TAG = re.compile(rf"(?<!\\){MEDIA_TAG_TEXT}")
WORD = re.compile(rf"\\{MEDIA_TAG_TEXT}")
LISTED_LABELS = 30  # labels that a question names, at most
LABEL_WORDS = 5  # words of an answer in a table that still counts as a label
TEST_SHARE = 5  # one clip of so many of each label is a test clip
COLUMNS = ("clip", "file", "label", "question", "answer", "split", "start", "end", "audio")
# key of a .jsonl's line -> types of its value; the last two are written by this module
FIELDS = {"messages": [list], "videos": [list], "audios": [list], "images": [list]}
FIELDS |= {"sides": [dict], "options": [list], "split": [str], "start": [int, float]}
FIELDS |= {"end": [int, float], "clip": [str], "where": [str], "type": [str]}
ROW_FORM = (
    '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}], '
    '"videos": [...], "audios": [...], "images": [...]}'
)
TABLE_FORM = "clip,label or clip,question,answer; more columns: split,start,end,audio"


def is_own(path: str | Path) -> bool:
    """Tell whether a path is a table, a .jsonl, or a folder of class folders."""
    path = Path(path)
    return path.suffix.lower() in TABLES or bool(os.path.isdir(path) and class_folders(path))


def class_folders(folder: Path) -> list[Path]:
    """Return the folders in a folder that have media files, by name.

    There are none where the folder itself has clips or a table, or where one has annotations.
    """
    files = list(folder.iterdir())
    if media_files(folder) or any(file.suffix.lower() in TABLES for file in files):
        return []
    folders = sorted(file for file in files if file.is_dir())
    annotated = [inner for inner in folders if list(inner.glob("*.json"))]
    return [] if annotated else [inner for inner in folders if media_files(inner)]


def read_own_rows(path: Path, answers: bool = True, labels: Iterable[str] = ()) -> list[dict]:
    """Read the rows of a table, of class folders or of a .jsonl.

    Args:
        answers: every row must have an answer; else rows may be questions alone.
        labels: what the question that is made for a table lists beside the table's own labels.

    Raises:
        DataError: the file or one of its lines cannot be used; names the line.
    """
    if path.is_dir():
        rows = read_class_folders(path, labels)
    elif path.suffix.lower() in (".jsonl", ".json"):
        rows = read_jsonl(path, answers)
    else:
        rows = read_table(path, answers, labels)
    if not rows:
        form = ROW_FORM if path.suffix.lower() == ".jsonl" else TABLE_FORM
        raise DataError(f"{path}: no lines; a line is {form}")
    return rows


# --- class folders and tables ---------------------------------------------------------------------


def read_class_folders(folder: Path, labels: Iterable[str]) -> list[dict]:
    """Make a row of each clip in a folder of class folders."""
    labelled = []
    for inner in class_folders(folder):
        labelled += [{"clip": str(file), "label": inner.name} for file in media_files(inner)]

    # what lies elsewhere or is no medium by its name
    clips = {row["clip"] for row in labelled}
    files = [file for file in sorted(folder.rglob("[!.]*")) if file.is_file()]
    unused = [str(file.relative_to(folder)) for file in files if str(file) not in clips]
    note_unused(folder, "files", unused)
    return labelled_rows(labelled, Path(), labels)


def read_table(path: Path, answers: bool, labels: Iterable[str]) -> list[dict]:
    """Read a table with a heading; commas, semicolons or tabs between its columns."""
    columns, numbered = read_csv(path)
    if "clip" not in columns and "file" in columns:
        columns = [*columns, "clip"]
        for _, cells in numbered:
            cells["clip"] = cells.pop("file", "")
    has_answers = "label" in columns or {"question", "answer"} <= set(columns)
    if "clip" not in columns or not (has_answers or (not answers and "question" in columns)):
        raise DataError(f"{path}: columns {', '.join(columns) or 'none'}; expected {TABLE_FORM}")
    note_unused(path, "columns", [name for name in columns if name and name not in COLUMNS])

    # each line by itself, so that an error names it
    table = []
    for line, cells in numbered:
        cells["where"] = f"{path}, line {line}"
        for name in ("clip", "label", "question", "answer"):
            if name in columns and not cells.get(name):
                raise DataError(f"{cells['where']}: no {name}; a line is {TABLE_FORM}")
        table.append(cells)
    if "label" in columns:
        return labelled_rows(table, path.parent, labels)
    is_label = all(is_short(cells.get("answer", "")) for cells in table)
    return [question_row(cells, path.parent, is_label) for cells in table]


def note_unused(path: Path, what: str, names: list[str]) -> None:
    """Say on stderr which columns or keys of a file, or files of a folder, are not used."""
    if names:
        print(f"note: {path}: {what} that are not used: {listed(names)}", file=sys.stderr)


def table_labels(path: Path) -> list[str]:
    """Return the labels of a table or of class folders; none of other data."""
    if path.is_dir():
        return [inner.name for inner in class_folders(path)]
    if path.suffix.lower() not in (".csv", ".tsv"):
        return []
    _, numbered = read_csv(path)
    return [cells["label"] for _, cells in numbered if cells.get("label")]


def labelled_rows(labelled: list[dict], folder: Path, labels: Iterable[str]) -> list[dict]:
    """Make rows of clips and labels: one question and list of labels for all."""
    labels = sorted({*labels, *(row["label"] for row in labelled)})
    question = "Which class is it?"
    if len(labels) <= LISTED_LABELS:
        question = f"Which of these is it: {', '.join(labels)}?"
    rows = []
    for cells in labelled:
        if "<" in cells["label"]:
            where = cells.get("where", cells["clip"])
            raise DataError(f"{where}: label {cells['label']!r}; a label has no <")
        messages = [turn("user", cells.get("question") or question)]
        messages.append(turn("assistant", answer_tag(cells["label"])))
        rows.append(clip_row(cells, folder, messages) | {"options": labels})
    return rows


def question_row(cells: dict, folder: Path, is_label: bool) -> dict:
    """Make a row of a clip, a question and perhaps an answer.

    Args:
        is_label: the answers of the table are short. They are labels, and stand in <answer> tags.
    """
    messages = [turn("user", cells["question"])]
    if "answer" in cells:
        answer = answer_tag(cells["answer"]) if is_label else cells["answer"]
        messages.append(turn("assistant", answer))
    return clip_row(cells, folder, messages)


def is_short(answer: str) -> bool:
    """Tell whether an answer can be a label, which stands in a tag."""
    return len(answer.split()) <= LABEL_WORDS and "<" not in answer


def clip_row(cells: dict, folder: Path, messages: list[dict]) -> dict:
    """Make the row of one clip of a table.

    A video is asked about with its own sound, or with that in the column audio. The prompt has the
    form of Crab+'s interface: each medium after its marker, then the question.

    Raises:
        DataError: a cell holds something else.
    """
    where = cells.get("where", cells["clip"])
    clip = media_path(folder, cells["clip"])
    sound = media_path(folder, cells["audio"]) if cells.get("audio") else ""
    kind = media_kind(clip) or "video"
    files: dict[str, list[str]] = {kind: [clip]}
    if sound or (kind == "video" and not os.path.isdir(clip)):  # a folder of frames has no sound
        files["audio"] = [sound or clip]
    markers = [f"{name}: <{name}>" for name in files]
    messages[0]["content"] = "\n".join([*markers, as_text(messages[0]["content"])])

    row = {"messages": messages, **{f"{name}s": files.get(name, []) for name in KINDS}}
    row |= {"clip": clip, "where": where}
    try:
        return row | split_and_span(cells)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None


def media_path(folder: Path, name: str) -> str:
    """Return the absolute path of a medium; a path as Windows writes it is read too."""
    path = folder / name
    if "\\" in name and not os.path.exists(path):
        path = folder / name.replace("\\", "/")
    return str(path.absolute())


def side_paths(folder: Path, files: str | list[str]) -> str | list[str]:
    """Return the absolute path of a side channel, or those of its views."""
    if isinstance(files, list):
        return [media_path(folder, file) for file in files]
    return media_path(folder, files)


def split_and_span(row: dict) -> dict:
    """Return the split of a row, and the seconds of its clip.

    Raises:
        ValueError: they are something else.
    """
    split = str(row.get("split") or "").lower()
    if split not in ("", "train", "test"):
        raise ValueError(f"split {row['split']!r}; expected train or test")
    span = {}
    for name in ("start", "end"):
        try:
            span[name] = float(str(row.get(name) or 0).replace(",", "."))
        except ValueError:
            raise ValueError(f"{name} {row[name]!r}; expected seconds") from None
        if not 0 <= span[name] < math.inf:
            raise ValueError(f"{name} {row[name]!r}; expected seconds")
    if span["end"] and span["end"] <= span["start"]:
        raise ValueError(f"start {span['start']:g} and end {span['end']:g}; end comes later")
    return {"split": split, **span}


def turn(role: str, content: str) -> dict:
    """Return one message of a conversation."""
    return {"role": role, "content": content}


# --- .jsonl ---------------------------------------------------------------------------------------


def read_jsonl(path: Path, answers: bool) -> list[dict]:
    r"""Read a .jsonl, one object of the form ROW_FORM per line, or a .json with a list of them.

    Objects may be in LLaVA's form too (llava.py). A file takes the place of its tag in the text
    (<video>, <audio>, <image>), or stands before the text where there is no tag; \<video> is the
    word itself. Paths are relative to the file's folder.
    """
    rows = []
    unused: dict[str, None] = {}
    for where, text in json_texts(path):
        try:
            row = parse_json(text) if isinstance(text, str) else text
            if is_llava(row):
                row = conversation_row(row, path.parent)
            else:
                unused |= dict.fromkeys(check_fields(row))
            rows.append(jsonl_row(row, path.parent, answers) | {"where": where})
            conversation_parts(rows[-1])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{where}: not {ROW_FORM} ({reason})") from None
    note_unused(path, "keys", list(unused))
    return rows


def json_texts(path: Path) -> list[tuple[str, str | dict]]:
    """Return the lines of a .jsonl, or the objects of a .json, each with its place.

    Raises DataError: a .json that holds no list of objects.
    """
    if path.suffix.lower() == ".jsonl":
        lines = enumerate(read_text(path).split("\n"), 1)
        return [(f"{path}, line {number}", line) for number, line in lines if line.strip()]
    objects = read_json(path)
    if not isinstance(objects, list):
        raise DataError(f"{path}: expected a list of objects of the form {ROW_FORM}")
    return [(f"{path}, row {number}", row) for number, row in enumerate(objects)]


def check_fields(row: dict) -> list[str]:
    """Return the keys of a line that are not used.

    Raises:
        ValueError: a key is misspelt or names media, or a value is of another type.
    """
    if not isinstance(row, dict):
        raise ValueError("a line is an object")
    unused = []
    for name, value in row.items():
        items = value if isinstance(value, list) else [value]
        if name not in FIELDS:
            close = difflib.get_close_matches(name, FIELDS, 1, cutoff=0.75)
            hint = f", did you mean {close[0]!r}?" if close else ""
            if close or any(isinstance(item, str) and media_kind(item) for item in items):
                raise ValueError(f"unknown key {name!r}{hint}")
            unused.append(name)
        elif value is not None and type(value) not in FIELDS[name]:
            expected = " or ".join(kind.__name__ for kind in FIELDS[name])
            raise ValueError(f"{name!r} is {value!r}; expected {expected}")
    for name in ("videos", "audios", "images"):
        if not all(isinstance(path, str) and path for path in row.get(name) or []):
            raise ValueError(f"{name!r} is {row[name]!r}; expected a list of paths")
    return unused


def jsonl_row(row: dict, folder: Path, answers: bool) -> dict:
    """Return a line's row with absolute paths. Raises ValueError and its like."""
    messages = [turn(m["role"], m["content"].strip()) for m in row["messages"]]
    for message in messages:
        if message["role"] == "assistant" and not message["content"]:
            raise ValueError("an empty answer")
    roles = [message["role"] for message in messages]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    if not roles or (answers and (len(roles) < 2 or roles[-1] != "assistant")):
        raise ValueError("the last of two or more messages must be the assistant's")
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2):
        raise ValueError(f"roles {', '.join(roles)}: user and assistant take turns")
    paths = {}
    for kind in KINDS:
        paths[f"{kind}s"] = [media_path(folder, file) for file in row.get(f"{kind}s") or []]
    sides = row.get("sides") or {}
    paths["sides"] = {name: side_paths(folder, files) for name, files in sides.items()}
    return {**row, **paths, **split_and_span(row), "messages": messages}


# --- rows -> prompts ------------------------------------------------------------------------------


def conversation_parts(row: dict) -> list[tuple[list[PromptPart], str]]:
    """Return a prompt and an answer for each turn of the assistant in a row.

    The prompt of a later turn holds the turns before it. A last question without an answer has the
    answer "".

    Raises:
        ValueError: a kind of media has some tags, but not as many as files.
    """
    # media without a tag stand before the first question
    messages = [dict(message) for message in row["messages"]]
    questions = [message for message in messages if message["role"] == "user"]
    text = "".join(message["content"] for message in questions)
    untagged = ""
    remaining = {}
    for kind in KINDS:
        paths = row.get(f"{kind}s") or []
        tags = count_tags(text, kind)
        if tags == 0:
            untagged += f"<{kind}>" * len(paths)
        elif tags != len(paths):
            advice = f"\\<{kind}> is the word itself"
            raise ValueError(f"{tags} <{kind}> in the text, {len(paths)} in {kind}s; {advice}")
        remaining[kind] = iter(paths)
    questions[0]["content"] = untagged + questions[0]["content"]

    # turn by turn; tags become media, in order
    span = {"start": row.get("start", 0.0), "end": row.get("end", 0.0)}
    prompts: list[tuple[list[PromptPart], str]] = []
    parts: list[PromptPart] = []
    for message in messages:
        if message["role"] == "system":
            parts.append(PromptPart("text", text=message["content"], role="system"))
        elif message["role"] == "assistant":
            prompts.append((list(parts), message["content"]))
            parts.append(PromptPart("text", text=message["content"], role="assistant"))
        else:
            parts += tagged_parts(message["content"], remaining, span)
    if messages[-1]["role"] == "user":
        prompts.append((parts, ""))
    return prompts


def count_tags(text: str, kind: str) -> int:
    """Count the tags of a kind of medium in a text."""
    return MEDIA_TAG.findall(text).count(f"<{kind}>")


def as_text(text: str) -> str:
    r"""Return a text whose tags are but words: <video> becomes \<video>."""
    return re.sub(MEDIA_TAG_TEXT, r"\\\1", text)


def tagged_parts(text: str, remaining: dict, span: dict[str, float]) -> list[PromptPart]:
    """Make parts of a text whose tags become media; what is between them stays text.

    Args:
        remaining: kind -> iterator over the paths of its files.
        span: start and end of the clip.
    """
    parts = []
    for piece in MEDIA_TAG.split(text):
        if MEDIA_TAG.fullmatch(piece):
            kind = piece.strip("<>")
            seconds = {} if kind == "image" else span
            parts.append(PromptPart(kind, path=next(remaining[kind]), **seconds))
        elif piece:
            parts.append(text_part(WORD.sub(r"\1", piece)))
    if not parts or parts[-1].kind != "text":
        parts.append(text_part("\n"))  # what follows a prompt is expected behind text
    return parts


# --- the form in which a run is asked -------------------------------------------------------------


def question_form(rows: list[dict], is_label: bool) -> QuestionForm:
    """Return the form of the first questions of rows, the most frequent one.

    Args:
        is_label: the answers stand in <answer> tags.
    """
    forms = Counter()
    questions, systems, options = set(), set(), set()
    for row in rows:
        (parts, _), *_ = conversation_parts(row)
        text, question = split_question(parts)
        forms[text] += 1
        questions.add(question)
        systems.add(next((part.text for part in parts if part.role == "system"), ""))
        options.add(tuple(map(str, row.get("options") or [])))
    return QuestionForm(
        text=forms.most_common(1)[0][0],
        question=questions.pop() if len(questions) == 1 else "",
        system=systems.pop() if len(systems) == 1 else "",
        options=options.pop() if len(options) == 1 else (),
        is_label=is_label,
    )


def split_question(parts: list[PromptPart]) -> tuple[str, str]:
    """Split the first question of a prompt into its form and what is asked.

    What is asked is the last text that is not blank.
    """
    pieces = []
    for part in parts:
        if not part.role:
            pieces.append(as_text(part.text) if part.kind == "text" else f"<{part.kind}>")
    asked = [i for i, part in enumerate(pieces) if part.strip() and not MEDIA_TAG.fullmatch(part)]
    if not asked:
        return "".join(pieces) + "{question}", ""
    last = asked[-1]
    question = pieces[last].strip()
    pieces[last] = pieces[last].replace(question, "{question}", 1)
    return "".join(pieces), WORD.sub(r"\1", question)


def form_row(form: QuestionForm, question: str, files: dict[str, list[str]]) -> dict:
    """Make the row of a question about files, in the form of a run.

    Args:
        files: paths by kind. A kind that the form has no tag for stands before the text.

    Raises:
        DataError: the form has a tag for a kind of which there is no file, or the question has one.
    """
    text = form.text
    for kind in KINDS:
        tags = count_tags(text, kind)
        if tags and tags != len(files.get(kind, [])):
            names = ", ".join(Path(path).name for paths in files.values() for path in paths)
            raise DataError(
                f"{names}: the model was trained on questions with {tags} <{kind}>, and here are "
                f"{len(files.get(kind, []))} {kind} files; its form: {text!r}"
            )
    messages = [turn("system", form.system)] if form.system else []
    before, _, after = text.rpartition("{question}")
    messages.append(turn("user", before + as_text(question) + after))
    row = {"messages": messages, "options": list(form.options)}
    return row | {f"{kind}s": files.get(kind, []) for kind in KINDS}


# --- training and test rows -----------------------------------------------------------------------


def split_rows(rows: list[dict], seed: int) -> list[dict]:
    """Return rows that all have a split; a fifth of the clips of each answer is for testing.

    Rows about one clip stay together. Rows that name a split keep it, and where any does, a row
    without one is a training row.
    """
    if any(row.get("split") for row in rows):
        return [{**row, "split": row.get("split") or "train"} for row in rows]

    # the clips of each answer: that of the first row about the clip, without reasons for it
    clips: dict[str, str] = {}
    for row in rows:
        answer = row["messages"][-1]["content"]
        clips.setdefault(clip_of(row), answer.partition("<answer>")[2] or answer)
    groups: dict[str, list[str]] = {}
    for clip, answer in clips.items():
        groups.setdefault(answer, []).append(clip)

    # free answers differ from clip to clip: they are one group
    tagged = all("<answer>" in row["messages"][-1]["content"] for row in rows)
    if not tagged and len(groups) > len(clips) / 2:
        groups = {"": list(clips)}
    test = set()
    for _, members in sorted(groups.items()):
        members = sorted(members)
        random.Random(seed).shuffle(members)
        if len(members) > 1:
            test.update(members[: max(1, round(len(members) / TEST_SHARE))])
    return [{**row, "split": "test" if clip_of(row) in test else "train"} for row in rows]


def clip_of(row: dict) -> str:
    """Return the first file of a row, which stands for its clip, or its text if it has none."""
    files = [*row.get("videos", []), *row.get("images", []), *row.get("audios", [])]
    return files[0] if files else row["messages"][0]["content"]
