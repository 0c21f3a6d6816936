"""Checks that a text must pass before it may be learned from.

    rejection = verify(sample, text, rules)     None where the text is in order

AV-UIE's texts were read by people (Crab, 2503.13068). Here a program checks what a program can:

    kind            what is wrong
    empty           no text
    unparsed        no label that can be read
    wrong label     another label than the gold one
    not last        something is written after the label
    markup          signs that belong to no tag of the answer
    too short/long  the evidence has fewer or more words than the limits
    time            a time outside of the clip, or one that contradicts the events of the label
    box             a box in the evidence of a task that has none
    other option    the evidence says that another option is right, or tells of other events alone
    leak            it speaks of the label or the instructions, or copies an example

A text that passes may still say something about the clip that is not so: only the label is known.
"""

import re
from dataclasses import dataclass

from crab_min.answers import (
    BOX,
    BOXES,
    BRACKETS,
    NUMBER_WORDS,
    TAG,
    Answer,
    Event,
    Span,
    normalize_label,
)
from crab_min.data import Sample

MIN_WORDS, MAX_WORDS = 3, 120  # of the evidence
COPIED_WORDS = 8  # as many successive words of the instructions are no chance
ANSWER_TAGS = ("answer", "event", "audio_event", "visual_event", "range")


@dataclass(frozen=True)
class Rejection:
    """A reason not to use a text: a kind of the table above, and a sentence for the model."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Rules:
    """Limits and texts that a text of one task is compared with.

    Attributes:
        options: labels of the task's rows, where they are a closed set; () elsewhere.
        instructions: the brief, which must not be repeated.
        examples: the evidence of the worked examples, which must not be copied.
        max_words: largest number of words of the evidence.
    """

    options: tuple[str, ...] = ()
    instructions: str = ""
    examples: frozenset[str] = frozenset()
    max_words: int = MAX_WORDS


# --- the whole check ------------------------------------------------------------------------------
def clean(reply: str) -> str:
    """Return a model's reply as one line.

    Left out are thoughts in <think>, and what follows where a model goes on with more examples.
    """
    text = re.sub(r"<think>.*?(</think>|$)", " ", reply, flags=re.DOTALL)
    text = re.split(r"\n\s*Facts:", text)[0]
    text = re.sub(r"^\s*(```\w*|Text:)|```\s*$", " ", text)
    return " ".join(text.split())


def verify(
    sample: Sample, text: str, rules: Rules = Rules(), seconds: float = 0.0
) -> Rejection | None:
    """Check a text, see the table at the top of the file.

    Args:
        text: a reply, made one line by `clean`.
        seconds: length of the clip; 0 where it is not known.

    Returns:
        The first thing that is wrong; None where nothing is.
    """
    if not text:
        return Rejection("empty", "There is no text.")

    # the label
    answer = sample.task.parse(text)
    if answer.error:
        return Rejection("unparsed", f"The closing words are missing or broken: {answer.error}.")
    if not same_label(answer, sample.gold):
        return Rejection("wrong label", "The closing words are not those that were given.")
    evidence, after = split_text(sample, text)
    if re.search(r"\w", after):
        return Rejection("not last", f"Nothing may follow the closing words: {after!r}.")
    if re.search(r"[<>]", TAGS.sub("", text)):
        return Rejection("markup", "There are signs < or > outside of the closing words.")

    # the evidence
    checks = (
        length_fault(evidence, rules),
        time_fault(evidence, sample.gold, seconds),
        box_fault(evidence),
        option_fault(evidence, sample, rules),
        event_fault(evidence, sample.gold, rules),
        leak_fault(evidence, sample, rules),
    )
    return next((fault for fault in checks if fault), None)


# --- the label ------------------------------------------------------------------------------------
def same_label(answer: Answer, gold: Answer) -> bool:
    """Tell whether two answers have the same label, in canonical form and any order."""

    def canonical(answer: Answer) -> tuple:
        choice = answer.choice and normalize_label(answer.choice)
        events = [
            sorted((normalize_label(label), tuple(spans)) for label, spans in kind)
            for kind in (answer.events, answer.audio_events, answer.visual_events)
        ]
        return choice, answer.exists, events, sorted(answer.boxes), sorted(answer.points)

    return canonical(answer) == canonical(gold)


TAGS = re.compile(rf"<\s*/?\s*(?:{'|'.join(ANSWER_TAGS)})\s*>", re.IGNORECASE)


# words that lead to the label and are no evidence: "So", "Therefore, the answer is", "It is at"
LEAD = re.compile(
    r"\b(?:so|therefore|thus|hence)?,?\s*"
    r"(?:\b(?:the \w+ (?:is|are)|(?:it is|they are) at))?[\s:]*$",
    re.IGNORECASE,
)


def split_text(sample: Sample, text: str) -> tuple[str, str]:
    """Return the evidence before the label and its lead, and what stands after the label."""
    marks = list(BRACKETS.finditer(text))
    if sample.task.form not in (BOX, BOXES):
        first = TAG.search(text).start()
        marks = [mark for mark in marks if mark.start() > first]
        marks += TAGS.finditer(text)
    start = min(mark.start() for mark in marks)
    end = max(mark.end() for mark in marks)
    return LEAD.sub("", text[:start]).strip(), text[end:]


# --- the evidence ---------------------------------------------------------------------------------
def words_of(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def length_fault(evidence: str, rules: Rules) -> Rejection | None:
    count = len(words_of(evidence))
    if count < MIN_WORDS:
        return Rejection("too short", f"The evidence has {count} words, write {MIN_WORDS} or more.")
    if count > rules.max_words:
        return Rejection(
            "too long", f"The evidence has {count} words; the limit is {rules.max_words}."
        )
    return None


# times are written as "0:07", "7 s" or "the 7th second"
NUMBER_WORD = re.compile(rf"\b(?:{'|'.join(NUMBER_WORDS)})\b")
CLOCK = re.compile(r"\b(\d{1,2}):([0-5]\d)\b")
NUMBER = r"(\d+(?:\.\d+)?)"
UNIT = r"(?:\s*(?:s|sec|secs|seconds?)\b)?"
TO = r"\s*(?:to|and|until|till|through|-|\u2013)\s*(?:second\s+)?"
RANGE = re.compile(
    rf"\b(?:from|between|seconds?)\s+(?:second\s+)?{NUMBER}{UNIT}{TO}{NUMBER}(?![\w.]*\d)"
    rf"|\(\s*{NUMBER}[\s,-]+{NUMBER}\s*\)"
    rf"|\b{NUMBER}\s*(?:to|-|\u2013)\s*{NUMBER}\s*(?:s|sec|seconds)\b"
)
MOMENT = re.compile(rf"\bseconds?\s+{NUMBER}|\b{NUMBER}(?:st|nd|rd|th)?\s*(?:s|sec|seconds?)\b")


def with_digits(text: str) -> str:
    """Return a text with times as digits: "from two to 0:08" becomes "from 2 to 8"."""
    text = CLOCK.sub(lambda clock: str(60 * int(clock[1]) + int(clock[2])), text.lower())
    return NUMBER_WORD.sub(lambda word: str(NUMBER_WORDS.index(word[0])), text)


def time_fault(evidence: str, gold: Answer, seconds: float) -> Rejection | None:
    """Find a time that is not in the clip, or a range that is not one of the label's event.

    A range belongs to the event that is named last before it. It must be one of the event's spans,
    lie in one, or reach from the first to the last.
    """
    text = with_digits(evidence)
    if seconds:
        for moment in MOMENT.finditer(text):
            if number_in(moment)[0] > seconds + 0.5:
                return Rejection("time", f"{moment[0]!r} is not within {seconds:.0f} seconds.")
    events = gold.events + gold.audio_events + gold.visual_events
    for match in RANGE.finditer(text):
        start, end = number_in(match)
        if end < start:
            return Rejection("time", f"{match[0]!r} ends before it begins.")
        if seconds and end > seconds + 0.5:
            return Rejection("time", f"{match[0]!r} is not within {seconds:.0f} seconds.")
        spans = spans_before(text[: match.start()], events)
        if spans and not any(first <= start and end <= last for first, last in spans):
            return Rejection("time", f"{match[0]!r} does not agree with the closing words.")
    return None


def number_in(match: re.Match) -> list[float]:
    return [float(group) for group in match.groups() if group]


def spans_before(text: str, events: list[Event]) -> list[Span]:
    """Return the spans of the event that a text names last, or of all events, with their hull."""
    named_at = {with_digits(label): text.rfind(with_digits(label)) for label, _ in events}
    latest = max(named_at.values(), default=-1)
    chosen: list[Span] = []
    for label, spans in events:
        if latest < 0 or named_at[with_digits(label)] == latest:
            chosen += spans
            chosen.append((spans[0][0], spans[-1][1]))
    return chosen


def box_fault(evidence: str) -> Rejection | None:
    """Find a box or a point where the task has none, so that nothing says whether it is so."""
    box = BRACKETS.search(evidence)
    return box and Rejection("box", f"{box[0]} is not among the facts.")


NEGATIONS = re.compile(
    r"\b(?:not|no|never|nor|neither|without|silent|instead|rather|than|unlike)\b|n't\b"
)
VERDICT = re.compile(
    r"\b(?:answer|option|choice|emotion|action|mood) (?:must be|should be|is|was|:)"
    r"(?: the| option)? ([^.;,<]+)"
)


def option_fault(evidence: str, sample: Sample, rules: Rules) -> Rejection | None:
    """Find a sentence that says that another option is right.

    It is one that begins so ("the answer is X"), or a last sentence that names another option, does
    not name the right one, and denies nothing.
    """
    gold = sample.gold.choice
    if gold is None:
        return None
    right = option_pattern(gold, sample)
    options = sample.gold.choices or sample.task.options or rules.options
    others = [option for option in options if normalize_label(option) != normalize_label(gold)]
    text = evidence.lower()
    last = re.split(r"[.!?]\s+", text.rstrip(" .!?"))[-1]
    verdicts = [match[1] for match in VERDICT.finditer(text)]
    for other in others:
        pattern = option_pattern(other, sample)
        if any(pattern.match(verdict) and not right.match(verdict) for verdict in verdicts):
            return Rejection("other option", f"It says that {other!r} is right.")
        if pattern.search(last) and not right.search(last) and not NEGATIONS.search(last):
            return Rejection("other option", f"It ends with {other!r}, which is not the answer.")
    return None


def event_fault(evidence: str, gold: Answer, rules: Rules) -> Rejection | None:
    """Find evidence that names events of the data set, and none of the label's."""
    right = [label for label, _ in gold.events + gold.audio_events + gold.visual_events]
    if not right or any(names(evidence, label, r"\w*") for label in right):
        return None
    others = [label for label in rules.options if names(evidence, label, "s?")]
    if others:
        return Rejection("other option", f"It tells of {others[0]!r}, not of {right[0]!r}.")
    return None


def names(text: str, label: str, ending: str) -> bool:
    """Tell whether a text names a label, in canonical form and with such an ending."""
    pattern = rf"\b{re.escape(normalize_label(label))}{ending}\b"
    return re.search(pattern, text.lower()) is not None


ORDINALS = {"one": "first", "two": "second"}


def option_pattern(option: str, sample: Sample) -> re.Pattern:
    """Return a pattern that finds an option in a text.

    "one" of two media is found as "video one" or "the first video", not as any "one".
    """
    name = re.escape(normalize_label(option))
    if sample.task.options:
        medium = r"(?:video|audio|clip|sound|medium)"
        return re.compile(rf"\b{medium} {name}\b|\b{ORDINALS[option]} {medium}\b")
    return re.compile(rf"(?<!\w){name}(?!\w)")


LEAKS = re.compile(
    r"\b(?:closing words|label(?:s|led)?|annotat\w+|ground truth|the facts|the notes|prompt"
    r"|instructions?|as an ai|language model)\b"
)


def leak_fault(evidence: str, sample: Sample, rules: Rules) -> Rejection | None:
    """Find words about the task itself, or words of the brief."""
    words = words_of(evidence)
    told = sample.parts[-1].text.lower()  # a question may be about a label on a bottle
    leak = LEAKS.search(" ".join(words))
    if leak and leak[0] not in told:
        return Rejection("leak", f"It speaks of {leak[0]!r}; speak of the clip alone.")
    brief = " ".join(words_of(rules.instructions))
    for start in range(len(words) - COPIED_WORDS + 1):
        run = " ".join(words[start : start + COPIED_WORDS])
        if run in brief:
            return Rejection("leak", f"It repeats the instructions: {run!r}.")
    if " ".join(words) in rules.examples:
        return Rejection("leak", "It copies the text of an example.")
    return None


def example_evidence(sample: Sample, text: str) -> str:
    """Return the evidence of a worked example, in the form of Rules.examples."""
    evidence, _ = split_text(sample, text)
    return " ".join(words_of(evidence))
