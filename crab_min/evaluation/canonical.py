"""Canonical forms of answers, which metrics compare instead of a model's text."""

import re
from functools import lru_cache

from crab_min.answers import NUMBER_WORDS, Answer, Event, Span, normalize_label

SECONDS = 10  # AVE and LLP clips, and UnAV as cut for AV-UIE v2; times after it are not scored
ARTICLES = ("a", "an", "the")


def canonical_choice(answer: Answer) -> str:
    """Return the label of an answer in canonical form, "" where it has none."""
    if answer.error or answer.choice is None:
        return ""
    return normalize_label(answer.choice, answer.choices)


@lru_cache(100_000)
def canonical_text(text: str) -> str:
    """Return a short free answer in canonical form: "The 2 chairs." -> "two chairs".

    The text is in lower case, numbers from 0 to 20 are words, other signs than letters and digits
    are spaces, and articles are removed unless the text is nothing else. LEO's `clean_answer`,
    which PAVE uses, also corrects typing errors of its data and takes "none" for zero, so its
    scores differ a little.
    """
    words = []
    for word in re.findall(r"[^\W_]+", text.lower()):
        is_small_number = re.fullmatch("1?[0-9]|20", word)
        words.append(NUMBER_WORDS[int(word)] if is_small_number else word)
    content_words = [word for word in words if word not in ARTICLES]
    return " ".join(content_words or words)


def seconds_of(spans: list[Span], end_inclusive: bool = False) -> set[int]:
    """Return those of the seconds 0 to 9 that the spans (start, end) cover.

    end_inclusive: count the second that starts at `end` too, as the released AVE scorer does.
    """
    seconds: set[int] = set()
    for start, end in spans:
        stop = end + 1 if end_inclusive else end
        seconds.update(range(max(start, 0), min(stop, SECONDS)))
    return seconds


def seconds_by_class(events: list[Event]) -> dict[str, set[int]]:
    """Return {canonical label: the seconds in which it happens}."""
    return {normalize_label(label): seconds_of(spans) for label, spans in events}


def label_per_second(answer: Answer, end_inclusive: bool = False) -> list[str | None]:
    """Return the canonical label of the only event for each second.

    It is None where the event is absent.
    """
    [(label, spans)] = answer.events
    canonical_label = normalize_label(label)
    labels: list[str | None] = [None] * SECONDS
    for second in seconds_of(spans, end_inclusive):
        labels[second] = canonical_label
    return labels
