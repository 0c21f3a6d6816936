"""Reasoned texts without a model: sentences made of a row's own fields.

They say no more than the label says, but they say it first as prose, and everything runs offline.
"""

from collections.abc import Callable, Iterator

from crab_min.answers import AV_EVENTS, CHOICE, EVENT, EVENTS, EXISTS, Event
from crab_min.data import Sample
from crab_min.tools.reason.briefs import closing_words
from crab_min.tools.reason.rows import Job
from crab_min.tools.reason.writers import Message, Reply


class Template:
    """A writer without a model; it needs no conversation."""

    name = "template"

    def replies(
        self, jobs: list[Job], make_conversation: Callable[[Job], list[Message]]
    ) -> Iterator[tuple[Job, Reply]]:
        for job in jobs:
            yield job, Reply(template(job.sample))


def template(sample: Sample) -> str:
    """Return a text that leads to the label of a row."""
    form = sample.task.form
    if form is CHOICE:
        evidence = choice_evidence(sample)
    elif form in (EVENT, EVENTS):
        evidence = clauses(sample.gold.events, "seen and heard")
    elif form is AV_EVENTS:
        seen = clauses(sample.gold.visual_events, "seen")
        heard = clauses(sample.gold.audio_events, "heard")
        evidence = f"{seen} {heard}".strip()
    elif form is EXISTS:
        where = "in the image" if sample.gold.exists else "nowhere in the image"
        thing = str(sample.row.get("description") or sample.row.get("object"))
        evidence = f"{capital(thing)} is {where}."
    else:
        evidence = sounding_thing(sample)
    return f"{evidence} {closing_words(sample)}"


def choice_evidence(sample: Sample) -> str:
    """Return a sentence for the one label of a row, by family."""
    gold, row = sample.gold.choice, sample.row
    if sample.task.family == "emotion":
        return f"The face looks {gold} and the voice sounds {gold}."
    if sample.task.family == "action":
        return f"What is seen and heard is {gold}."
    if sample.task.family != "matching":
        return f"What is seen and heard decides for {gold}."

    # a2v and v2a: what the one medium has is in one of the two others
    one, *_, other = sample.task.media
    event = row.get(one.fields[0].replace("_path", "_event"), "thing that fits")
    return f"The {event} is in {other.kind} {gold}."


def clauses(events: list[Event], how: str) -> str:
    """Return a sentence that says from when to when each event is seen or heard."""
    if not events:
        return ""
    phrases = []
    for label, spans in events:
        times = join([f"from {start} to {end}" for start, end in spans])
        phrases.append(f"the {label.lower()} is {how} {times}")
    return f"{capital(join(phrases))}."


def sounding_thing(sample: Sample) -> str:
    """Return a sentence about what sounds, or what is asked for, in an image."""
    if "name" in sample.row:
        return f"The {sample.row['name']} can be seen."
    return f"The sound is that of the {sample.row.get('a_obj', 'thing in the image')}."


def join(phrases: list[str]) -> str:
    """Return "a, b and c"."""
    *first, last = phrases
    return f"{', '.join(first)} and {last}" if first else last


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
