"""The output half of Crab+'s unified interface: one grammar for all answers.

Crab+ (arXiv 2603.04128) trains every task as text, with one vocabulary and one loss. A target text
begins with explicit reasoning (Crab, arXiv 2503.13068): prose that says what happens, where and
when. The label follows in a form that a program can read:

    form        label after the reasoning                                   e.g. task
    CHOICE      <answer> yes</answer>                                       avqa
    EVENT       <event> dog, (0 3)(7 10)</event>                            ave
    EVENTS      <event> dog, (0 3)</event> <event> cat, (2 5)</event>       unav
    AV_EVENTS   <visual_event> dog, (0 3)</visual_event>                    avvp
                <audio_event> dog, (2 5)</audio_event>
    BOX         [12,30,200,180]                                             arig
    BOXES       [12,30,200,180] [75,121],[153,103],[160,90]                 s4, ms3
    EXISTS      <answer> true</answer> and then as BOXES                    ref_avs
    TEXT        the whole text, without a tag                               avcap

Times are whole seconds: the span (0 3) covers the seconds 0, 1 and 2. A box is [x1,y1,x2,y2] and a
point [x,y], integers on a grid of 224 x 224; the points of a box follow it. A model with a mask
decoder writes <mask_0> ... <mask_5> after its boxes (masks.py). With `--target label` a model is
trained on the label alone, without reasoning.

An OutputForm holds both directions: `format` writes the label of an Answer, `parse` reads a model's
text. `parse` also takes what models really write: odd spaces and case, no closing tag, a repeated
tag, <range>0,3</range>. Where a text holds no label it raises ParseError. Task.parse keeps the
reason in `Answer.error`; such an answer is scored wrong and counted, never dropped.

What differs from the released code: the gold labels of training and test rows have one form. The
released a2v rows say "one" in training and 1 in the test.

Page of the course: docs/course/21_interface.md.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

GRID = 224  # boxes and points are integers from 0 to GRID
MASK_TOKENS = tuple(f"<mask_{index}>" for index in range(6))

Span = tuple[int, int]  # (start, end) in whole seconds, without the second `end`
Event = tuple[str, list[Span]]  # a label and the spans in which it happens
Box = tuple[int, int, int, int]  # (x1, y1, x2, y2)
Point = tuple[int, int]  # (x, y)


class ParseError(ValueError):
    """A text or a field of a row that holds no answer; the message says why."""


@dataclass(slots=True)
class Answer:
    """The label of one sample, predicted or gold.

    Each output form fills its own fields.
    """

    choice: str | None = None
    exists: bool | None = None  # EXISTS: whether the object is in the image
    events: list[Event] = field(default_factory=list)
    audio_events: list[Event] = field(default_factory=list)
    visual_events: list[Event] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    text: str = ""  # TEXT: a caption or a free answer; with an error, the text that was not parsed
    error: str | None = None  # why the text could not be parsed; None where it could

    # The remaining fields do not count when two answers are compared.
    # The mask (H, W) that goes with the answer: scores in [0, 1], or class numbers (avss).
    mask: np.ndarray | None = field(default=None, compare=False)
    # For each point, the index of its box.
    owners: list[int] = field(default_factory=list, compare=False)
    # Gold answers alone: the options of a row with options, or all right texts of an open question.
    choices: tuple[str, ...] = field(default=(), compare=False)
    seconds: int = field(default=0, compare=False)  # gold, of events: length of the clip, if known

    def objects(self) -> list[tuple[Box, list[Point]]]:
        """Pair each box with its points."""
        objects = []
        for index, box in enumerate(self.boxes):
            points = [point for point, owner in zip(self.points, self.owners) if owner == index]
            objects.append((box, points))
        return objects


# --- writing --------------------------------------------------------------------------------------
def answer_tag(choice: str) -> str:
    """Write a label in its tag.

    The space before the label makes it the same token as in the prose before it (" dog").
    """
    return f"<answer> {choice}</answer>"


def event_tag(kind: str, label: str, spans: Iterable[Span]) -> str:
    """Write an event in its tag; kind: "event", "audio_event" or "visual_event"."""
    times = "".join(f"({start} {end})" for start, end in spans)
    return f"<{kind}> {label}, {times}</{kind}>"


def box_text(box: Iterable[float]) -> str:
    """Write a box (x1, y1, x2, y2) or a point (x, y) as integers in square brackets."""
    return "[" + ",".join(str(int(number)) for number in box) + "]"


def points_text(points: Iterable[Point]) -> str:
    """Write points as "[75,121],[153,103]"."""
    return ",".join(map(box_text, points))


def mask_box(mask: np.ndarray) -> Box | None:
    """Return the box of a mask (H, W) on the grid, None where the mask is empty."""
    ys, xs = np.nonzero(mask)  # (number of pixels,) each
    if not len(xs):
        return None
    height, width = mask.shape
    # A pixel ends one pixel after it begins: hence + 1 at the right and bottom edges.
    edges = (xs.min() / width, ys.min() / height, (xs.max() + 1) / width, (ys.max() + 1) / height)
    return tuple(round(GRID * float(edge)) for edge in edges)


# The functions of the output forms: an Answer -> its label as text. An answer without events is an
# empty tag: a text without any tag does not count as an answer.
def format_choice(answer: Answer) -> str:
    return answer_tag(answer.choice)


def format_events(answer: Answer) -> str:
    tags = [event_tag("event", label, spans) for label, spans in answer.events]
    return " ".join(tags) or "<event></event>"


def format_av_events(answer: Answer) -> str:
    tags = [event_tag("visual_event", label, spans) for label, spans in answer.visual_events]
    tags += [event_tag("audio_event", label, spans) for label, spans in answer.audio_events]
    return " ".join(tags) or "<audio_event></audio_event>"


def format_boxes(answer: Answer) -> str:
    texts = [f"{box_text(box)} {points_text(points)}" for box, points in answer.objects()]
    return " ".join(text.strip() for text in texts)


def format_exists(answer: Answer) -> str:
    tag = answer_tag(str(answer.exists).lower())
    return f"{tag} {format_boxes(answer)}".strip()


def format_text(answer: Answer) -> str:
    return answer.text


# --- labels in canonical form ---------------------------------------------------------------------
NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()
PUNCTUATION = " \t\r\n.,;:"


@lru_cache(maxsize=100_000, typed=True)  # typed: 1 and True are different labels
def normalize_label(label: str | int, choices: tuple = ()) -> str:
    """Return the canonical form in which labels are compared.

    Args:
        label: a label as annotated or as a model wrote it.
        choices: the options of a question. A letter or an index (from 0) that is not itself an
            option stands for the option it points at.

    >>> normalize_label("PlayingViolin"), normalize_label(" Yes. "), normalize_label(2)
    ('playing violin', 'yes', 'two')
    >>> normalize_label("(B)", ("rain", "Dog")), normalize_label("1", ("rain", "Dog"))
    ('dog', 'dog')
    >>> normalize_label("B. dog", ("rain", "Dog")), normalize_label("A. dog", ("rain", "Dog"))
    ('dog', 'a. dog')
    """
    # Separate the words, in lower case, with one space after a comma and no signs around them.
    text = re.sub(r"(?<=[a-z])(?=[A-Z])|[\s_-]+", " ", str(label)).lower()
    text = re.sub(r" ?, ?", ", ", text).strip(PUNCTUATION + "!?\"'`*")
    if re.fullmatch("1?[0-9]|20", text):  # 0 to 20
        text = NUMBER_WORDS[int(text)]

    # The text of an option goes before its index: "2" is "two" among one, two, three.
    options = [normalize_label(choice) for choice in choices]
    if text in options:
        return text
    # "one", "b" and "option b" name the option with the index 1, and so does "(b) dog" if it is it.
    name = text.removeprefix("option ").strip("()")
    for index, option in enumerate(options):
        letter = chr(ord("a") + index)
        if name == letter or name in NUMBER_WORDS[index : index + 1]:
            return option
        if re.fullmatch(rf"\(?{letter}[).:]+ ?{re.escape(option)}", text):
            return option
    return text


def find_option(label: str, options: tuple[str, ...]) -> str:
    """Return a label in canonical form.

    Raises ParseError unless it is one of the options.
    """
    canonical = normalize_label(label)
    if canonical not in options:
        raise ParseError(f"answer {canonical!r}, expected {' or '.join(options)}")
    return canonical


# --- parsing --------------------------------------------------------------------------------------
# The functions of the output forms: a text -> an Answer, or a ParseError.

# An opening tag and what follows it, up to the next tag or the end of the text.
TAG = re.compile(r"<\s*(\w+)\s*>([^<]*)")
# A time as models write it: "3", "3.5 s", "0:03".
TIME = r"(?<![\d.:])((?:\d{1,2}:){0,2}\d{1,4}(?:\.\d+)?)(?:\s*s(?:ec(?:ond)?s?)?\b)?"
# Two times, "0 3" or "0,3" or "0-3" or "0 to 3".
PAIR = rf"{TIME}(?:[\s,–-]+|\s+to\s+){TIME}(?![.:]?\d)"
# One or more pairs in parentheses: "(0 3)(7 10)".
SPANS = re.compile(rf"(?:\(\s*{PAIR}\s*\)[\s,;]*)+")
# A corner of a box as the released Crab writes it: "(12,30)".
CORNER = re.compile(r"\(\s*(\d{1,3})\s*,\s*(\d{1,3})\s*\)")
# Numbers in square brackets: "[12, 30, 200, 180]".
BRACKETS = re.compile(r"\[\s*(-?\d{1,4}(?:\.\d+)?(?:[\s,]+-?\d{1,4}(?:\.\d+)?)*)\s*\]")


def parse_choice(text: str) -> Answer:
    """Parse the one label in <answer>; it stays as it was written."""
    # Collect the different labels by canonical form. Of a repeated one the first spelling counts.
    spellings: dict[str, str] = {}
    for tag, content in TAG.findall(text):
        label = content.strip(PUNCTUATION)
        if tag.lower() == "answer" and normalize_label(label):
            spellings.setdefault(normalize_label(label), label)
    if not spellings:
        raise ParseError("no <answer>")
    if len(spellings) > 1:
        raise ParseError(f"{len(spellings)} different answers")
    (label,) = spellings.values()
    return Answer(choice=label)


def parse_spans(text: str) -> list[Span]:
    """Return all pairs of times of a text as spans."""
    # Sorted, since models also write (5 2).
    return [tuple(sorted(map(whole_second, pair))) for pair in re.findall(PAIR, text)]


def whole_second(time: str) -> int:
    """Return a time, "3.6" or "0:04", as the nearest whole second."""
    seconds = 0.0
    for part in time.split(":"):
        seconds = 60 * seconds + float(part)
    return int(seconds + 0.5)


def split_events(text: str) -> list[Event]:
    """Split a list of labels and times into events.

    >>> split_events("A, b, (0 3)(4 5) and C,(1 2)")
    [('A, b', [(0, 3), (4, 5)]), ('C', [(1, 2)])]
    >>> split_events("a label without times")
    [('a label without times', [])]
    """
    events = []
    position = 0  # where the next label begins
    for times in SPANS.finditer(text):
        events.append((text[position : times.start()], parse_spans(times[0])))
        position = times.end()
    if text[position:].strip(PUNCTUATION):
        events.append((text[position:], []))
    # Remove the signs around a label and the "and" before the last one.
    return [(re.sub(r"^and\s+", "", label.strip(PUNCTUATION)), spans) for label, spans in events]


def merge_events(events: list[Event]) -> list[Event]:
    """Merge events of the same label; sort their spans and drop repeated ones."""
    merged: dict[str, tuple[str, set[Span]]] = {}
    for label, spans in events:
        if not label:
            raise ParseError("times without a label")
        if not spans:
            raise ParseError(f"event {label!r} without times")
        _, all_spans = merged.setdefault(normalize_label(label), (label, set()))
        all_spans.update(spans)
    return [(label, sorted(spans)) for label, spans in merged.values()]


def tagged_events(text: str, kind: str) -> list[Event] | None:
    """Return the events in all tags of one kind, None where there is no such tag.

    A model may give the times in a tag of their own: <event>dog</event> <range>0,3</range>.
    """
    events: list[Event] = []
    has_tag = False
    for tag, content in TAG.findall(text):
        if tag.lower() == kind:
            has_tag = True
            events += split_events(content)
        elif tag.lower() == "range" and events:
            _, spans = events[-1]
            spans.extend(parse_spans(content))
    return merge_events(events) if has_tag else None


def parse_events(text: str) -> Answer:
    """Parse any number of events, none in an empty <event></event>."""
    events = tagged_events(text, "event")
    if events is None:
        raise ParseError("no <event>")
    return Answer(events=events)


def parse_event(text: str) -> Answer:
    """Parse exactly one event."""
    answer = parse_events(text)
    if not answer.events:
        raise ParseError("no <event>")
    if len(answer.events) > 1:
        raise ParseError(f"{len(answer.events)} different events, expected one")
    return answer


def parse_av_events(text: str) -> Answer:
    """Parse audible and visible events; one of the two kinds may be missing."""
    audio = tagged_events(text, "audio_event")
    visual = tagged_events(text, "visual_event")
    if audio is None and visual is None:
        raise ParseError("no <audio_event> and no <visual_event>")
    return Answer(audio_events=audio or [], visual_events=visual or [])


def check_box(box: Iterable[float]) -> Box:
    """Return a box as integers; raise ParseError unless it lies on the grid."""
    x1, y1, x2, y2 = (round(number) for number in box)
    if not (0 <= x1 <= x2 <= GRID and 0 <= y1 <= y2 <= GRID):
        corners = box_text((x1, y1, x2, y2))
        raise ParseError(f"box {corners} is not x1 <= x2, y1 <= y2 in 0 .. {GRID}")
    return x1, y1, x2, y2


def grid_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a text on the grid; decimals up to 1 are shares of the picture.

    >>> grid_numbers("12, 30.6"), grid_numbers("0.25 1.0")
    ((12, 31), (56, 224))
    """
    numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]
    scale = GRID if "." in text and max(numbers) <= 1 else 1
    return tuple(round(number * scale) for number in numbers)


def parse_boxes(text: str, with_points: bool = True) -> Answer:
    """Parse one or more boxes, each with the points that follow it.

    Points are ignored with `with_points=False`.
    """
    answer = Answer()
    last_box = 0  # index of the box that was named last
    for brackets in BRACKETS.findall(text):
        numbers = grid_numbers(brackets)
        # Four numbers are a box. A box may be named again before more of its points.
        if len(numbers) == 4:
            if numbers not in answer.boxes:
                answer.boxes.append(check_box(numbers))
            last_box = answer.boxes.index(numbers)
        # Two numbers are a point of that box.
        elif len(numbers) == 2 and with_points:
            if not 0 <= min(numbers) <= max(numbers) <= GRID:
                raise ParseError(f"point {box_text(numbers)} outside of 0 .. {GRID}")
            answer.points.append(numbers)
            answer.owners.append(last_box)
    if not answer.boxes:
        raise ParseError("no box")
    return answer


def parse_box(text: str) -> Answer:
    """Parse boxes without points; without brackets a box is two corners, as Crab's are.

    >>> parse_box("Its top left corner is (12,30) and its bottom right corner is (200,180)").boxes
    [(12, 30, 200, 180)]
    """
    corners = CORNER.findall(text)
    if len(corners) == 2 and not BRACKETS.search(text):
        text = box_text((*corners[0], *corners[1]))
    return parse_boxes(text, with_points=False)


def parse_exists(text: str) -> Answer:
    """Parse whether the object is in the image, and if so its box and points."""
    if find_option(parse_choice(text).choice, ("true", "false")) == "false":
        return Answer(exists=False)
    return replace(parse_boxes(text), exists=True)


def parse_text(text: str) -> Answer:
    """Take the whole text as the answer."""
    if not text.strip():
        raise ParseError("no text")
    return Answer(text=text.strip())


# --- bare answers ---------------------------------------------------------------------------------
def tag_bare_answer(text: str, tag: str) -> str:
    """Put a bare answer into its tag; a text that has tags, or no tag to have, stays as it is.

    Args:
        tag: of the output form. Before the boxes of EXISTS only the word true or false is tagged.

    >>> tag_bare_answer("Two.", "answer"), tag_bare_answer("<answer>two</answer>", "answer")
    ('<answer> Two.</answer>', '<answer>two</answer>')
    """
    if not tag or not text.strip() or TAG.search(text):
        return text
    exists = re.match(r"\W*(true|false)\b", text, flags=re.IGNORECASE)
    if exists:
        return answer_tag(exists[1]) + text[exists.end() :]
    return f"<{tag}> {text.strip()}</{tag}>"


# --- the output forms -----------------------------------------------------------------------------
@dataclass(frozen=True)
class OutputForm:
    """One way to write a label after the reasoning: a function for each direction.

    `parse` raises ParseError; form.parse(form.format(answer)) == answer. `tag` is what stands
    around the whole of a label that is one word or one list of events.
    """

    name: str
    parse: Callable[[str], Answer]
    format: Callable[[Answer], str]
    tag: str = ""


# fmt: off
CHOICE    = OutputForm("choice",    parse_choice,    format_choice, tag="answer")
EVENT     = OutputForm("event",     parse_event,     format_events, tag="event")
EVENTS    = OutputForm("events",    parse_events,    format_events, tag="event")
AV_EVENTS = OutputForm("av_events", parse_av_events, format_av_events)
BOX       = OutputForm("box",       parse_box,       format_boxes)
BOXES     = OutputForm("boxes",     parse_boxes,     format_boxes)
EXISTS    = OutputForm("exists",    parse_exists,    format_exists, tag="answer")
TEXT      = OutputForm("text",      parse_text,      format_text)
# fmt: on


# --- gold labels ----------------------------------------------------------------------------------
# A reader takes the values of some fields of a row and returns the gold Answer, or raises
# ParseError. Where a field holds the label in its output form, the form's `parse` is the reader.
def read_label(label: str | int) -> Answer:
    """Read a label into its canonical form; numbers become words."""
    return parse_choice(answer_tag(normalize_label(label)))


def read_option(index: int, options: list) -> Answer:
    if not isinstance(options, list) or not 0 <= index < len(options):
        raise ParseError("no such option")
    return Answer(choice=str(options[index]), choices=tuple(map(str, options)))


def read_event(label: str, start: int, end: int) -> Answer:
    if int(end) < int(start):
        raise ParseError("ends before it starts")
    return Answer(events=merge_events([(label, [(int(start), int(end))])]))


def read_av_events(text: str) -> Answer:
    """Read "audio: A,(0 3) B, (2 5)(6 7) visual: A,(0 10)"; a part may be missing."""
    # Split into: what stands before, "audio", its events, "visual", its events.
    before, *pieces = re.split(r"\b(audio|visual)\s*:", text, flags=re.IGNORECASE)
    events = {"audio": [], "visual": []}
    for kind, part in zip(pieces[::2], pieces[1::2]):
        events[kind.lower()] = merge_events(split_events(part))
    if before.strip() or not any(events.values()):
        raise ParseError("no part with an event")
    return Answer(audio_events=events["audio"], visual_events=events["visual"])


def read_boxes(boxes: list) -> Answer:
    return Answer(boxes=[check_box(box) for box in boxes])


def read_corners(top_left: list, bottom_right: list) -> Answer:
    return read_boxes([(*top_left, *bottom_right)])


def read_exists(boxes: list) -> Answer:
    return replace(read_boxes(boxes), exists=bool(boxes))


def read_texts(answers: list) -> Answer:
    """Read several right answers: texts, or objects with a text under "answer"."""
    if not isinstance(answers, list) or not answers:
        raise ParseError("no list with an answer in it")
    texts = []
    for answer in answers:
        if isinstance(answer, dict):
            answer = answer.get("answer", "")
        texts.append(parse_text(answer).text)
    return Answer(text=texts[0], choices=tuple(texts))


# What the fields of a reader hold, for the error text. Of a `parse` function: TAGGED_TEXT.
TAGGED_TEXT = "a text with the label in its tag or box"
MASK_BOXES = "the boxes of the row's mask (read_samples derives them)"
EXPECTED = {
    read_label: "a label",
    read_option: "the index of the right option (from 0) and the list of options",
    read_event: "the event, its start and its end in seconds",
    read_av_events: "a text such as 'audio: Dog,(0 3) visual: Dog,(0 2),(5 10)'",
    read_corners: f"[x1, y1] and [x2, y2], 0 to {GRID}",
    read_boxes: MASK_BOXES,
    read_exists: MASK_BOXES,
    read_texts: 'a list of texts, or of objects with a text under "answer"',
    parse_text: "a text",
}
