"""Canonical forms of answers, which metrics compare instead of a model's text."""

import re
from functools import lru_cache

from crab_min.answers import NUMBER_WORDS, Answer, Event, Span, normalize_label

SECONDS = 10  # of AVE and LLP clips, and of UnAV as cut for AV-UIE v2; other clips may be longer
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
    """Return the seconds that the spans (start, end) cover.

    end_inclusive: count the second that starts at `end` too, as the released AVE scorer does.
    """
    seconds: set[int] = set()
    for start, end in spans:
        seconds.update(range(max(start, 0), end + 1 if end_inclusive else end))
    return seconds


def clip_seconds(prediction: Answer, gold: Answer) -> int:
    """Return on how many seconds the events of two answers are compared.

    It is the length of the clip, where its row names one; else the 10 seconds of AVE and LLP, or if
    a gold event ends later, as far as the events of both reach.
    """
    if gold.seconds:
        return gold.seconds
    gold_end = last_end(gold)
    return SECONDS if gold_end <= SECONDS else max(gold_end, last_end(prediction))


def last_end(answer: Answer) -> int:
    """Return the end of the last event of an answer, 0 without any."""
    events = [*answer.events, *answer.audio_events, *answer.visual_events]
    return max((end for _, spans in events for _, end in spans), default=0)


def seconds_by_class(events: list[Event], count: int | None = None) -> dict[str, set[int]]:
    """Return {canonical label: the seconds in which it happens}.

    count: only the first `count` seconds count; None for all.
    """
    seconds = {}
    for label, spans in events:
        covered = seconds_of(spans)
        if count is not None:
            covered &= set(range(count))
        seconds[normalize_label(label)] = covered
    return seconds


def label_per_second(
    answer: Answer, count: int = SECONDS, end_inclusive: bool = False
) -> list[str | None]:
    """Return the canonical label of the only event for each of the first `count` seconds.

    It is None where the event is absent.
    """
    [(label, spans)] = answer.events
    covered = seconds_of(spans, end_inclusive)
    canonical_label = normalize_label(label)
    return [canonical_label if second in covered else None for second in range(count)]
