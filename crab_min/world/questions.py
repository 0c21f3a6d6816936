"""Questions about a scene of the built-in world, with their answers and evidence.

There are MUSIC-AVQA's kinds of question, and multiple choice. All is computed from the symbolic
scene, never from pixels. `balanced` chooses rows so that guessing by frequency is worth nothing.
"""

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from crab_min.world.clauses import (
    EARLIER,
    LONGER,
    NOT_IN_PICTURE,
    NUMBERS,
    ORDERS,
    POSITIONS,
    Comparison,
    at_position,
    clause_at_position,
    clause_compared,
    clause_heard,
    clause_where,
    list_of_names,
    seconds_heard,
    sentence,
    unique_minimum,
)
from crab_min.world.scenes import Object, Scene


class Question(NamedTuple):
    """A question with its one answer."""

    modality: str  # Audio, Visual or Audio-Visual
    kind: str
    text: str
    answer: str
    evidence: str  # a sentence from which the answer follows


class Choice(NamedTuple):
    """A multiple-choice question."""

    text: str
    options: list[str]
    right: int  # index of the right option
    evidence: str


# --- open questions -------------------------------------------------------------------------------
def questions(scene: Scene) -> Iterator[Question]:
    """Yield every question that has one answer in this scene."""
    yield from audio_questions(scene)
    yield from visual_questions(scene)
    yield from audio_visual_questions(scene)


def audio_questions(scene: Scene) -> Iterator[Question]:
    """Yield questions about the sound: how many sounds, which of two is heard longer."""
    heard = scene.heard
    evidence = sentence(f"{list_of_names(heard)} can be heard")
    yield Question("Audio", "Counting", "How many sounds are heard?", NUMBERS[len(heard)], evidence)
    for a in heard:
        for b in heard:
            if seconds_heard(a) != seconds_heard(b):
                evidence = sentence(clause_heard(a), clause_heard(b), clause_compared(a, b, LONGER))
                text = f"Is the {a.label} heard longer than the {b.label}?"
                yield Question("Audio", "Comparative", text, yes_if_longer(a, b), evidence)


def visual_questions(scene: Scene) -> Iterator[Question]:
    """Yield questions about the picture: how many things, and where each is."""
    seen = scene.seen
    evidence = sentence(f"{list_of_names(seen)} can be seen")
    yield Question("Visual", "Counting", "How many things are seen?", NUMBERS[len(seen)], evidence)
    for obj in seen:
        text = f"Where is the {obj.label}?"
        yield Question("Visual", "Location", text, obj.position, sentence(clause_where(obj)))


def audio_visual_questions(scene: Scene) -> Iterator[Question]:
    """Yield questions that neither eyes nor ears can answer alone.

    The eyes know what is where, the ears what sounds when. Only together they know where something
    sounds.
    """
    seen, heard = scene.seen, scene.heard
    for obj in seen:
        text = f"Is the thing {at_position(obj.position)} heard?"
        answer = "yes" if obj.heard else "no"
        evidence = sentence(clause_at_position(obj))
        yield Question("Audio-Visual", "Existential", text, answer, evidence)

    # Asked only where the numbers of things seen and heard do not limit the answer.
    if len(seen) == len(heard) == 2:
        both = [obj for obj in seen if obj in heard]
        evidence = sentence(*map(clause_heard, seen))
        text = "How many of the things seen are heard?"
        yield Question("Audio-Visual", "Counting", text, NUMBERS[len(both)], evidence)

    first = unique_minimum(heard, ORDERS["first"])
    if len(seen) == 3 and first in seen:
        text = "Where is the thing that is heard first?"
        evidence = sentence(f"heard first is the {first.label}", clause_where(first))
        yield Question("Audio-Visual", "Location", text, first.position, evidence)

    # At most one thing is at each position.
    by_position = {obj.position: obj for obj in seen}
    if "left" in by_position and "right" in by_position:
        yield from left_right_questions(by_position["left"], by_position["right"])


def left_right_questions(left: Object, right: Object) -> Iterator[Question]:
    """Yield questions that compare the sounds of the thing on the left and that on the right."""
    if seconds_heard(left) != seconds_heard(right):
        text = "Is the thing on the left heard longer than the thing on the right?"
        evidence = left_right_evidence(left, right, LONGER)
        answer = yes_if_longer(left, right)
        yield Question("Audio-Visual", "Comparative", text, answer, evidence)
    if left.heard and right.heard:
        earlier = unique_minimum([left, right], ORDERS["first"])
        if earlier is not None:
            text = "Which is heard first, the thing on the left or the thing on the right?"
            evidence = left_right_evidence(left, right, EARLIER)
            yield Question("Audio-Visual", "Temporal", text, earlier.position, evidence)


def left_right_evidence(left: Object, right: Object, comparison: Comparison) -> str:
    """Return what is on the left, what is on the right, and how their sounds compare."""
    judgement = clause_compared(left, right, comparison)
    return sentence(clause_at_position(left), clause_at_position(right), judgement)


def yes_if_longer(a: Object, b: Object) -> str:
    return "yes" if seconds_heard(a) > seconds_heard(b) else "no"


# --- multiple choice ------------------------------------------------------------------------------
def choices(scene: Scene, rng: random.Random) -> Iterator[Choice]:
    """Yield multiple-choice questions of four options in random order."""
    if len(scene.seen) != 3:
        return
    all_options = [*map(at_position, POSITIONS), NOT_IN_PICTURE]
    for order, key in ORDERS.items():
        obj = unique_minimum(scene.heard, key)
        if obj is None:
            continue
        answer = at_position(obj.position) if obj.seen else NOT_IN_PICTURE
        options = rng.sample(all_options, len(all_options))
        evidence = sentence(f"heard {order} is the {obj.label}", f"the {obj.label} is {answer}")
        text = f"Where is the thing that is heard {order}?"
        yield Choice(text, options, options.index(answer), evidence)


# --- balancing ------------------------------------------------------------------------------------
@dataclass
class Candidate:
    """A row that may be chosen, and what the choice is to balance."""

    kind: tuple | str  # of question
    stratum: tuple  # rows of one stratum look alike to somebody with one sense only
    answer: str
    row: dict


def balanced(candidates: list[Candidate], count: int, rng: random.Random) -> list[dict]:
    """Choose about `count` rows: kinds alike, and every answer of a kind equally often.

    Answers are equally frequent within each stratum too.
    """
    by_kind = defaultdict(list)
    for candidate in candidates:
        by_kind[candidate.kind].append(candidate)
    sets = {}
    for kind in sorted(by_kind):
        sets[kind] = sets_of_answers(by_kind[kind], rng)
        rng.shuffle(sets[kind])

    # One set after the other, always of the kind that has the fewest rows so far.
    chosen: dict = {kind: [] for kind in sets}
    while any(sets.values()) and sum(map(len, chosen.values())) < count:
        kind = min((kind for kind in sets if sets[kind]), key=lambda kind: len(chosen[kind]))
        chosen[kind] += sets[kind].pop()
    rows = [row for kind in chosen for row in chosen[kind]]
    rng.shuffle(rows)
    return rows


def sets_of_answers(candidates: list[Candidate], rng: random.Random) -> list[tuple[dict, ...]]:
    """Group the rows of one kind in sets of one row per answer, each set of one stratum.

    Rows that cannot be completed to a set are left out.
    """
    answers = sorted({candidate.answer for candidate in candidates})
    strata: dict = defaultdict(lambda: defaultdict(list))
    for candidate in candidates:
        strata[candidate.stratum][candidate.answer].append(candidate.row)

    sets = []
    for stratum in sorted(strata):
        by_answer = strata[stratum]
        shuffled = [rng.sample(by_answer[answer], len(by_answer[answer])) for answer in answers]
        sets += zip(*shuffled)  # as many sets as the rarest answer has rows
    if sets:
        return sets

    # A very small world may have no complete set: then every row stands by itself.
    for by_answer in strata.values():
        for rows in by_answer.values():
            sets += [(row,) for row in rows]
    return sets
