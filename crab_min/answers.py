"""TODO."""
import re
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from crab_min.errors import DataError

GRID = 224                                             # boxes and points are integers 0 .. GRID


MASK_TOKENS = tuple(f"<mask_{k}>" for k in range(6))


@dataclass(slots=True)
class Answer:
    """What a model said, or should have said. `error`: why a text does not parse, None when it does.

    An event is (label, [(start, end), ...]) in whole seconds. `text` holds a caption, or the text that did not parse.
    """
    choice: str | None = None
    exists: bool | None = None
    events: list = field(default_factory=list)
    audio_events: list = field(default_factory=list)
    visual_events: list = field(default_factory=list)
    boxes: list = field(default_factory=list)          # (x1, y1, x2, y2)
    points: list = field(default_factory=list)         # (x, y)
    text: str = ""
    error: str | None = None
    mask: np.ndarray | None = field(default=None, compare=False)   # (H, W) scores in [0, 1], or of avss classes, where the model makes masks
    owners: list = field(default_factory=list, compare=False)      # for each point, the index of its box
    choices: tuple = field(default=(), compare=False)              # golds: the options of the row (avqa_thu, nextqa), or all right texts (scanqa, sqa3d)

    def objects(self) -> list:
        """[(box, its points), ...]; without `owners` the points are dealt out evenly, in order."""
        total = len(self.points)
        owners = self.owners or [i * len(self.boxes) // total for i in range(total)]
        return [(box, [p for p, owner in zip(self.points, owners) if owner == i]) for i, box in enumerate(self.boxes)]


def row_field(task, row: dict, names: tuple, expected: str):
    """The value of the first of the fields `names` that the row has. Raises DataError."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise DataError(f"{task.name}: the row has no field {' or '.join(map(repr, names))}; expected {expected}; "
                         f"its fields: {', '.join(row) or 'none'}")


def answer_tag(choice) -> str:
    """With a space before the label, so that it is the same token as in the prose before it (" dog", not "dog")."""
    return f"<answer> {choice}</answer>"


def event_tag(kind: str, label: str, spans) -> str:
    """kind: event, audio_event or visual_event; spans: (start, end) in whole seconds."""
    return f"<{kind}> {label}, {''.join(f'({start} {end})' for start, end in spans)}</{kind}>"


def mask_box(mask: np.ndarray) -> tuple | None:
    """The box (x1, y1, x2, y2) of a mask (H, W) on the grid; None where the mask is empty."""
    ys, xs = np.nonzero(mask)
    if not len(xs):
        return None
    h, w = mask.shape
    return tuple(round(GRID * float(v)) for v in (xs.min() / w, ys.min() / h, (xs.max() + 1) / w, (ys.max() + 1) / h))


def box_text(box) -> str:
    return "[" + ",".join(str(int(v)) for v in box) + "]"


def points_text(points) -> str:
    return ",".join(map(box_text, points))


def format_answer(task, answer: Answer) -> str:
    """The answer without prose: parse(task, write(task, answer)) gives it back."""
    if task.parser == "choice":
        return answer_tag(answer.choice)
    if task.parser == "text":
        return answer.text
    if "event" in task.parser:
        kinds = {"event": answer.events, "visual_event": answer.visual_events, "audio_event": answer.audio_events}
        tags = [event_tag(kind, *event) for kind, events in kinds.items() for event in events]
        return " ".join(tags) or ("<audio_event></audio_event>" if task.parser == "av_events" else "<event></event>")
    exists = [answer_tag(str(answer.exists).lower())] if task.parser == "exists" else []
    boxes = [f"{box_text(box)} {points_text(points)}".strip() for box, points in answer.objects()]
    return " ".join(exists + boxes)


TAG = re.compile(r"<\s*(\w+)\s*>([^<]*)")              # an opening tag and what follows, up to the next tag or the end


PAIR = r"(?<![\d.])(\d{1,4})[\s,-]+(\d{1,4})(?!\.?\d)"


SPANS = re.compile(rf"(?:\(\s*{PAIR}\s*\)[\s,;]*)+")


NUMBERS = re.compile(r"\[\s*(-?\d{1,4}(?:[\s,]+-?\d{1,4})*)\s*\]")


WORDS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
         "seventeen eighteen nineteen twenty").split()


PUNCTUATION = " \t\r\n.,;:"


class Unreadable(Exception):
    """Inside this module: why there is no answer in a text or a field."""


@lru_cache(100_000, typed=True)                        # 1 and True are different labels
def normalize_label(label, choices: tuple = ()) -> str:
    """The form in which labels are compared: PlayingViolin == playing_violin, " Yes." == yes, 2 == two.

    choices: the options of a question; an index (from 0) or letter that is not itself an option becomes its text.
    """
    text = re.sub(r"(?<=[a-z])(?=[A-Z])|[\s_-]+", " ", str(label)).lower()
    text = re.sub(r" ?, ?", ", ", text).strip(PUNCTUATION + "!?\"'`*")
    text = WORDS[int(text)] if re.fullmatch("1?[0-9]|20", text) else text
    options, key = [normalize_label(choice) for choice in choices], text.strip("()")
    if text not in options:
        place = WORDS.index(key) if key in WORDS else ord(key) - ord("a") if len(key) == 1 else -1
        text = options[place] if 0 <= place < len(options) else text
    return text


def parse_answer(task, text: str) -> Answer:
    """Read a model's text. Never raises: without a valid answer, `error` says why and `text` holds the text."""
    try:
        return PARSERS[task.parser](task, text)
    except Unreadable as reason:
        return Answer(text=text, error=str(reason))


def parse_choice(task, text: str) -> Answer:
    found = [content.strip(PUNCTUATION) for tag, content in TAG.findall(text) if tag.lower() == "answer"]
    forms = {normalize_label(choice): choice for choice in reversed(found) if normalize_label(choice)}     # the first spelling wins
    if len(forms) != 1:
        raise Unreadable(f"{len(forms)} different answers" if forms else "no <answer>")
    (form, choice), = forms.items()
    if task.options and form not in task.options:
        raise Unreadable(f"answer {form!r}, expected {' or '.join(task.options)}")
    return Answer(choice=form if task.options else choice)


def spans(text: str) -> list:
    return [(min(pair), max(pair)) for pair in ((int(a), int(b)) for a, b in re.findall(PAIR, text))]


def read_events(text: str) -> list:
    """"A, b, (0 3)(4 5) and C,(1 2)" -> [("A, b", [(0, 3), (4, 5)]), ("C", [(1, 2)])]; [] for a label without times."""
    events, position = [], 0
    for run in SPANS.finditer(text):
        events.append((text[position:run.start()], spans(run[0])))
        position = run.end()
    if text[position:].strip(PUNCTUATION):
        events.append((text[position:], []))
    return [(re.sub(r"^and\s+", "", label.strip(PUNCTUATION)), times) for label, times in events]


def merge(events: list) -> list:
    """One event a label, in the order they come, its spans in order of time and no span twice."""
    merged: dict = {}
    for label, times in events:
        if not label or not times:
            raise Unreadable(f"event {label!r} without times" if label else "times without a label")
        merged.setdefault(normalize_label(label), (label, set()))[1].update(times)
    return [(label, sorted(times)) for label, times in merged.values()]


def tagged_events(text: str, kind: str) -> list | None:
    """The events in the tags of this kind, None if there is no such tag. A <range> belongs to the event before it."""
    events, found = [], False
    for tag, content in TAG.findall(text):
        if tag.lower() == kind:
            events, found = events + read_events(content), True
        elif tag.lower() == "range" and events:
            events[-1][1].extend(spans(content))
    return merge(events) if found else None


def parse_events(task, text: str) -> Answer:
    events = tagged_events(text, "event")
    if events is None or task.parser == "event" and len(events) != 1:
        raise Unreadable(f"{len(events)} different events, expected one" if events else "no <event>")
    return Answer(events=events)


def parse_av_events(task, text: str) -> Answer:
    audio, visual = tagged_events(text, "audio_event"), tagged_events(text, "visual_event")
    if audio is None and visual is None:
        raise Unreadable("no <audio_event> and no <visual_event>")
    return Answer(audio_events=audio or [], visual_events=visual or [])


def check_box(box) -> tuple:
    x1, y1, x2, y2 = (round(v) for v in box)
    if not (0 <= x1 <= x2 <= GRID and 0 <= y1 <= y2 <= GRID):
        raise Unreadable(f"box {box_text((x1, y1, x2, y2))} is not x1 <= x2, y1 <= y2 in 0 .. {GRID}")
    return x1, y1, x2, y2


def parse_boxes(task, text: str) -> Answer:
    answer = Answer(exists=True if task.parser == "exists" else None)
    if task.parser == "exists" and parse_choice(task, text).choice == "false":
        return Answer(exists=False)
    owner = 0                                          # the box that was named last
    for numbers in NUMBERS.findall(text):
        values = tuple(map(int, re.findall(r"-?\d+", numbers)))
        if len(values) == 4:
            answer.boxes += [check_box(values)] if values not in answer.boxes else []
            owner = answer.boxes.index(values)
        elif len(values) == 2 and task.parser != "box":
            if not all(0 <= v <= GRID for v in values):
                raise Unreadable(f"point {box_text(values)} outside of 0 .. {GRID}")
            answer.points.append(values)
            answer.owners.append(owner)
    if not answer.boxes:
        raise Unreadable("no box")
    return answer


def parse_text(task, text: str) -> Answer:
    if not text.strip():
        raise Unreadable("no text")
    return Answer(text=text.strip())


PARSERS = {"choice": parse_choice, "event": parse_events, "events": parse_events, "av_events": parse_av_events,
           "box": parse_boxes, "boxes": parse_boxes, "exists": parse_boxes, "text": parse_text}


def gold_answer(task, row: dict, split: str = "test") -> Answer:
    """The right answer of an annotation row. Raises DataError naming the task, the field and what is expected.

    Test rows of s4, ms3 and ref_avs have a mask file instead of boxes: the data reader puts its boxes (a list, empty
    where the mask is) into row["gold_boxes"] before it calls this.
    """
    reader, *names = task.gold_train if split == "train" and task.gold_train else task.gold
    read, expected = GOLDS[reader]
    values = [row_field(task, row, (name,), expected) for name in names]
    try:
        return read(task, *values)
    except (Unreadable, TypeError, ValueError, AttributeError, OverflowError) as reason:   # of another type
        raise DataError(f"{task.name}: field {', '.join(map(repr, names))} must be {expected}, got "
                             f"{', '.join(map(repr, values))} ({reason})") from None


def gold_option(task, index: int, choices: list) -> Answer:
    if not isinstance(choices, list) or not 0 <= index < len(choices):
        raise Unreadable("no such option")
    return Answer(choice=str(choices[index]), choices=tuple(map(str, choices)))


def gold_event(task, label: str, start: int, end: int) -> Answer:
    if int(end) < int(start):
        raise Unreadable("ends before it starts")
    return Answer(events=merge([(label, [(int(start), int(end))])]))


def gold_av_events(task, text: str) -> Answer:
    """"audio: A,(0 3) B, (2 5)(6 7) visual: A,(0 10)": a part may be missing; each has labels and then their spans."""
    before, *pieces = re.split(r"\b(audio|visual)\s*:", text, flags=re.IGNORECASE)
    found = {name.lower(): merge(read_events(part)) for name, part in zip(pieces[::2], pieces[1::2])}
    if before.strip() or not any(found.values()):
        raise Unreadable("no part with an event")
    return Answer(audio_events=found.get("audio", []), visual_events=found.get("visual", []))


def gold_boxes(task, boxes: list) -> Answer:
    return Answer(boxes=[check_box(box) for box in boxes], exists=bool(boxes) if task.parser == "exists" else None)


def gold_texts(task, answers: list) -> Answer:
    """Several right answers: the first is the text, all of them are the choices. Released as texts or as {"answer": text}."""
    if not isinstance(answers, list) or not answers:
        raise Unreadable("no list with an answer in it")
    texts = [parse_text(task, a.get("answer", "") if isinstance(a, dict) else a).text for a in answers]
    return Answer(text=texts[0], choices=tuple(texts))


GOLDS = {                                              # reader of a gold field, and what it reads
    "choice": (lambda task, label: parse_choice(task, answer_tag(normalize_label(label))), "a label"),
    "option": (gold_option, "the index of the right option (from 0) and the list of options"),
    "event": (gold_event, "the event, its start and its end in seconds"),
    "av_events": (gold_av_events, "a text such as 'audio: Dog,(0 3) visual: Dog,(0 2),(5 10)'"),
    "corners": (lambda task, first, last: gold_boxes(task, [(*first, *last)]), f"[x1, y1] and [x2, y2], 0 to {GRID}"),
    "boxes": (gold_boxes, "the boxes of the row's mask (read_samples derives them)"),
    "text": (parse_text, "a text"),
    "texts": (gold_texts, 'a list of texts, or of objects with a text under "answer"'),
    "target": (lambda task, text: PARSERS[task.parser](task, text), "a text with the label in its tag or box"),
}
