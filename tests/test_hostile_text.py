"""Hostile annotation and text files: every reader gives right values or a named error.

300 files are generated from valid ones: other encodings and line ends, values of another type, NaN
and huge numbers, wrong nesting, keys and ids that stand twice, Windows paths, markup. Rows that
were not changed keep their values, and no row is lost. How many ended how is printed by
`python tests/test_hostile_text.py` and by `pytest -s tests/test_hostile_text.py`.
"""

import copy
import csv
import io
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from crab_min.data import read_samples
from crab_min.errors import UserError
from crab_min.interface import load_prompts
from crab_min.tools.many import read_question_file
from crab_min.world.things import load_entries

FILES = 300
ROWS = 5


# --- valid files ----------------------------------------------------------------------------------


def conversation(i: int) -> dict:
    messages = [{"role": "user", "content": f"<video>What is it, {i}?"}]
    messages.append({"role": "assistant", "content": f"<answer>thing {i}</answer>"})
    row = {"messages": messages, "videos": [f"{i}.mp4"], "start": 1.5, "end": 4}
    return row | {"options": ["a", "b"], "sides": {"depth": f"{i}.npy"}, "split": "train"}


def ave(i: int) -> dict:
    row = {"video_path": f"{i}.mp4", "audio_path": f"{i}.wav", "event": "dog"}
    row |= {"start_time": i, "end_time": 9, "label_content": f"<event>dog, ({i} 9)</event>"}
    return row


def nextqa(i: int) -> dict:
    options = {f"a{k}": f"option {k}" for k in range(5)}
    return {"video": f"{i}", "qid": f"CW_{i}", "question": f"why {i}?", **options} | {
        "num_option": 5,
        "answer": i,
    }


def avsd(i: int) -> dict:
    turn = {"question": f"who, {i}?", "answer": f"a man {i}"}
    return {"image_id": f"x{i}", "dialog": [turn]}


def avqa(i: int) -> dict:
    row = {"video_path": f"{i}.mp4", "audio_path": f"{i}.wav", "type": "Audio Counting"}
    return row | {"question": f"How many, {i}?", "answer": i, "label": f"<answer>{i}</answer>"}


def lvis(i: int) -> dict:
    return {"id": i, "image_id": i, "category_id": i, "bbox": [16, 8, 16, 16], "area": 1000}


def lvis_file(rows: list) -> dict:
    images, names = [], []
    for i in range(ROWS):
        images.append({"id": i, "width": 64, "height": 64, "coco_url": f"http://x/train/{i}.jpg"})
        names.append({"id": i, "name": f"thing_{i}"})
    return {"images": images, "categories": names, "annotations": rows}


def json_lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows: list) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def sample_values(samples: list) -> list:
    values = []
    for sample in samples:
        parts = [(part.kind, part.path, part.text, part.start, part.end) for part in sample.parts]
        values.append((sample.target, parts, sample.gold))
    return values


def read_own(path: Path) -> list:
    return sample_values(read_samples(path, [], "train"))


@dataclass
class Kind:
    """One kind of file: where it stands, how rows are written, how it is read."""

    file: str
    row: Callable[[int], object]
    write: Callable[[list], str]
    read: Callable[[Path], list]  # a value per row


def task_kind(task: str, file: str, row: Callable, write: Callable = json.dumps) -> Kind:
    """Make the kind of an annotation file, which lies in a data folder."""
    depth = len(Path(file).parts) - 1

    def read(path: Path) -> list:
        return sample_values(read_samples(path.parents[depth], [task], "train"))

    return Kind(file, row, write, read)


def named(i: int) -> dict:
    row = {"clip": f"{i}.mp4", "label": f"label {i}", "question": "Which?", "start": "1.5"}
    return row | {"split": "train"}


def asked(i: int) -> dict:
    return {"clip": f"{i}.mp4", "question": f"What, {i}?", "answer": f"It is the thing {i} of all."}


def spoken(i: int) -> dict:
    return {"audiocap_id": i, "youtube_id": "y", "start_time": 30, "caption": f"A dog, {i}"}


def entries(rows: list) -> str:
    return json.dumps({f"thing{i}": row for i, row in enumerate(rows)})


PROMPTS = ("ks", "ucf", "ave", "avvp", "s4")
KINDS = [
    Kind("rows.jsonl", conversation, json_lines, read_own),
    Kind("labels.csv", named, table, read_own),
    Kind("answers.csv", asked, table, read_own),
    task_kind("ave", "ave/train.json", ave),
    task_kind("avqa", "avqa/train.json", avqa),
    task_kind("nextqa", "nextqa/nextqa_train.json", nextqa),
    task_kind(
        "avsd",
        "avsd/train_set4DSTC7-AVSD.json",
        avsd,
        lambda rows: json.dumps({"dialogs": rows}),
    ),
    task_kind("audiocaps", "audiocaps/train.csv", spoken, table),
    task_kind("lvis", "lvis/lvis_v1_train.json", lvis, lambda rows: json.dumps(lvis_file(rows))),
    Kind(
        "questions.txt",
        lambda i: f"What is it, {i}?",
        lambda rows: "\n".join(str(row).strip() or "?" for row in rows),  # a blank line is no row
        lambda path: read_question_file(path)[0],
    ),
    Kind(
        "questions.jsonl",
        lambda i: {"question": f"What is it, {i}?"},
        json_lines,
        lambda path: read_question_file(path)[0],
    ),
    Kind(
        "things.json",
        lambda i: {"label": f"a thing {i}", "kind": "object"},
        entries,
        lambda path: list(load_entries(path).values()),
    ),
    Kind(
        "prompts.json",
        lambda i: f"What, {i}?",
        lambda rows: json.dumps(dict(zip(PROMPTS, rows))),
        lambda path: list(load_prompts(str(path)).values()),
    ),
]


# --- broken files ---------------------------------------------------------------------------------

RAW = "@raw@"  # stands before JSON that json.dumps does not write
DEEP = RAW + "[" * 5000 + "]" * 5000
VALUES = [
    *(None, True, False, 0, -1, 10**400, 1e308, float("nan"), float("inf"), "", " ", [], {}, [[]]),
    *({"a": 1}, [None], RAW + "1e999", DEEP, "\ud800", "a\0b", "nan", "1,5", "-3"),
    *("<video>", "<audio><image>", "</answer><answer>x", "<|im_end|>", "{question}", "\x85\u2028"),
    "C:\\clips\\a.mp4",
    *("x" * 200_000, "../../../etc", "\x1b[31m", "🐕\u202e", '"', "a;b\tc,d"),
]


def change_value(rows: list, rng: random.Random) -> int:
    """Put a hostile value somewhere into one row, and return its index."""
    index = rng.randrange(len(rows))
    value = copy.deepcopy(rng.choice(VALUES))
    holder, key = rows, index
    # walk down, and stop sooner or later
    while isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.85:
        holder = holder[key]
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    holder[key] = value
    return index


def change_key(rows: list, rng: random.Random) -> int:
    """Rename, remove or add a key of one row."""
    index = rng.randrange(len(rows))
    row = rows[index]
    if isinstance(row, dict):
        key = rng.choice(list(row))
        way = rng.randrange(4)
        if way == 0:
            row[key[:-1]] = row.pop(key)
        elif way == 1:
            del row[key]
        elif way == 2:
            row["another"] = rng.choice(["x.mp4", 1, None])
        else:
            row[key] = [row[key]] if rng.random() < 0.5 else {"value": row[key]}
    return index


def encode(text: str, rng: random.Random) -> tuple[bytes, bool]:
    """Encode a text as some tool does; tell whether its values stay the same."""
    ways = [
        ("utf-8-sig", True),
        ("utf-16", True),
        ("utf-16-be", False),
        ("utf-32", True),
        ("cp1252", False),
        ("shift-jis", False),
    ]
    encoding, same = rng.choice(ways)
    if not same:
        text = text.replace("What", "Größe" if encoding == "cp1252" else "犬")
    line_end = rng.choice(["\n", "\r\n", "\r"])
    return text.replace("\n", line_end).encode(encoding, "replace"), same


def damage(text: str, rng: random.Random) -> bytes:
    """Damage a text where no row is known to stay."""
    data = bytearray(text.encode("utf-8", "replace"))
    place = rng.randrange(len(data))
    way = rng.randrange(5)
    if way == 0:
        del data[place:]
    elif way == 1:
        data[place : place + 1] = rng.randbytes(3)
    elif way == 2:
        added = [b'"', b"\0", b"{", b"]", b"\n", b"\xff\xfe", b'"a": 1, "a": 2,']
        data[place:place] = rng.choice(added)
    elif way == 3:
        data += bytes(data)
    else:
        data[:] = rng.choice([b"", b"\n\n", b"null", b"<html>", b"[]", b"{}", b"\xef\xbb\xbf"])
    return bytes(data)


def dump(kind: Kind, rows: list) -> str:
    """Write rows as they are, with raw JSON where a value asks for it."""
    text = kind.write(rows)
    if RAW in text:
        text = text.replace(f'"{RAW}', "").replace('1e999"', "1e999").replace(']"', "]")
    return text


def broken_file(kind: Kind, rng: random.Random) -> tuple[bytes, set[int] | None, str]:
    """Return a broken file, the rows that stay as they were, and how it was broken.

    The rows are None where they are not known.
    """
    rows = [kind.row(i) for i in range(ROWS)]
    way = rng.choice(["value", "value", "value", "key", "key", "encoding", "damage"])
    kept: set[int] | None = set(range(ROWS))
    if way in ("value", "key"):
        change = change_value if way == "value" else change_key
        kept.discard(change(rows, rng))
        # what readers leave out by rule: blank rows of a table, small objects of LVIS
        rows = [row if row not in ({}, []) else None for row in rows]
        for row in rows:
            if isinstance(row, dict) and "area" in row:
                row["area"] = 1000
        try:
            return dump(kind, rows).encode("utf-8", "surrogatepass"), kept, way
        except (ValueError, AttributeError, TypeError):  # a table has no such row
            rows = [kind.row(i) for i in range(ROWS)]
            way = "encoding"
    text = dump(kind, rows)
    if way == "encoding":
        content, same = encode(text, rng)
        return content, kept if same else None, way
    return damage(text, rng), None, way


def outcome_of(kind: Kind, path: Path, kept: set[int] | None, good: list) -> str:
    """Read a file; return "value", "named error", or what is wrong."""
    try:
        values = kind.read(path)
    except UserError as error:
        return "named error" if str(path) in str(error) else f"error without file: {error}"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"
    if kept is None:
        return "value"
    if len(values) != len(good):
        return f"{len(values)} of {len(good)} rows"
    changed = [index for index in kept if values[index] != good[index]]
    return f"other values in rows {changed}" if changed else "value"


def run_all(folder: Path, files: int, seed: int = 0) -> Counter:
    """Read generated files of every kind, and count how they ended."""
    rng = random.Random(seed)
    counts: Counter = Counter()
    good = {}
    for kind in KINDS:
        path = folder / "good" / kind.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(kind.write([kind.row(i) for i in range(ROWS)]), encoding="utf-8")
        good[kind.file] = kind.read(path)
        assert len(good[kind.file]) == ROWS
    for number in range(files):
        kind = KINDS[number % len(KINDS)]
        # the same folder each time, so that paths are those of the good file
        path = folder / "good" / kind.file
        content, kept, way = broken_file(kind, rng)
        path.write_bytes(content)
        outcome = outcome_of(kind, path, kept, good[kind.file])
        if outcome not in ("value", "named error"):
            (folder / f"bad{number}").write_bytes(content)
            outcome = f"file {number}: {outcome[:300]}"
        counts[kind.file, way, outcome] += 1
    return counts


def test_hostile_text_files_end_in_right_values_or_a_named_error(tmp_path):
    counts = run_all(tmp_path, FILES)
    for (file, way, outcome), count in sorted(counts.items()):
        print(f"{file:<32} {way:<9} {outcome:<12} {count}")
    totals: Counter = Counter()
    for (_, _, outcome), count in counts.items():
        totals[outcome] += count
    assert set(totals) == {"value", "named error"}, [key for key in counts if "file" in key[2]]
    assert min(totals.values()) > 60 and sum(totals.values()) == FILES


if __name__ == "__main__":
    count, seed = (int(word) for word in [*sys.argv[1:], FILES, 0][:2])
    with tempfile.TemporaryDirectory() as temporary:
        results = run_all(Path(temporary), count, seed)
    for (file, way, outcome), number in sorted(results.items()):
        print(f"{file:<32} {way:<9} {outcome} {number}")
