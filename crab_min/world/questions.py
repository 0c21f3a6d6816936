"""Questions about a scene of the built-in world, with their answers and evidence.

There are MUSIC-AVQA's kinds of question, and multiple choice. All is computed from the symbolic
scene, never from pixels. `balanced` chooses so that guessing by frequency is worth nothing.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from crab_min.world.clauses import (
    EARLIER,
    LONGER,
    NOT_IN_PICTURE,
    NUMBERS,
    ORDERS,
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
    options: tuple[str, ...] = ()  # of a multiple-choice question


# --- open questions -------------------------------------------------------------------------------
def questions(scene: Scene) -> Iterator[Question]:
    """Yield every question that has one answer in this scene."""
    seen, heard = scene.seen, scene.heard

    # The sound: how many sounds, which of two is heard longer.
    evidence = sentence(f"{list_of_names(heard)} can be heard")
    yield Question("Audio", "Counting", "How many sounds are heard?", NUMBERS[len(heard)], evidence)
    for a, b in itertools.permutations(heard, 2):
        if seconds_heard(a) != seconds_heard(b):
            text = f"Is the {a.label} heard longer than the {b.label}?"
            answer = "yes" if seconds_heard(a) > seconds_heard(b) else "no"
            evidence = sentence(clause_heard(a), clause_heard(b), clause_compared(a, b, LONGER))
            yield Question("Audio", "Comparative", text, answer, evidence)

    # The picture: how many things, and where each is.
    evidence = sentence(f"{list_of_names(seen)} can be seen")
    yield Question("Visual", "Counting", "How many things are seen?", NUMBERS[len(seen)], evidence)
    for obj in seen:
        text = f"Where is the {obj.label}?"
        yield Question("Visual", "Location", text, obj.position, sentence(clause_where(obj)))

    yield from audio_visual_questions(seen, heard)


def audio_visual_questions(seen: list[Object], heard: list[Object]) -> Iterator[Question]:
    """Yield questions that neither eyes nor ears can answer alone.

    The eyes know what is where, the ears what sounds when. Only together they know where something
    sounds.
    """
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
    """Yield questions that compare the sounds of the left and the right thing."""
    clauses = [clause_at_position(left), clause_at_position(right)]
    if seconds_heard(left) != seconds_heard(right):
        text = "Is the thing on the left heard longer than the thing on the right?"
        answer = "yes" if seconds_heard(left) > seconds_heard(right) else "no"
        evidence = sentence(*clauses, clause_compared(left, right, LONGER))
        yield Question("Audio-Visual", "Comparative", text, answer, evidence)
    if left.heard and right.heard:
        earlier = unique_minimum([left, right], ORDERS["first"])
        if earlier is not None:
            text = "Which is heard first, the thing on the left or the thing on the right?"
            evidence = sentence(*clauses, clause_compared(left, right, EARLIER))
            yield Question("Audio-Visual", "Temporal", text, earlier.position, evidence)


# --- multiple choice ------------------------------------------------------------------------------
def choices(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Yield multiple-choice questions of four options in random order."""
    if len(scene.seen) != 3:
        return
    all_options = ["on the left", "in the middle", "on the right", NOT_IN_PICTURE]
    for order, key in ORDERS.items():
        obj = unique_minimum(scene.heard, key)
        if obj is None:
            continue
        answer = at_position(obj.position) if obj.seen else NOT_IN_PICTURE
        options = tuple(rng.sample(all_options, len(all_options)))
        evidence = sentence(f"heard {order} is the {obj.label}", f"the {obj.label} is {answer}")
        text = f"Where is the thing that is heard {order}?"
        yield Question("Audio-Visual", order, text, answer, evidence, options)


# --- balancing ------------------------------------------------------------------------------------
Pair = tuple[Scene, Question]


def balanced(pairs: list[Pair], count: int, rng: random.Random) -> list[Pair]:
    """Choose about `count` questions, kinds alike.

    Every answer of a kind is equally frequent. Answers are equally frequent within each stratum
    too.
    """
    by_kind = defaultdict(list)
    for scene, question in pairs:
        by_kind[question.modality, question.kind].append((scene, question))
    sets = {}
    for kind in sorted(by_kind):
        sets[kind] = sets_of_answers(by_kind[kind], rng)
        rng.shuffle(sets[kind])

    # One set after the other, always of the kind that has the fewest questions so far.
    chosen: dict = {kind: [] for kind in sets}
    while any(sets.values()) and sum(map(len, chosen.values())) < count:
        kind = min((kind for kind in sets if sets[kind]), key=lambda kind: len(chosen[kind]))
        chosen[kind] += sets[kind].pop()
    all_chosen = list(itertools.chain(*chosen.values()))
    rng.shuffle(all_chosen)
    return all_chosen


def sets_of_answers(pairs: list[Pair], rng: random.Random) -> list[tuple[Pair, ...]]:
    """Group the questions of one kind in sets of one per answer.

    Each set is of one stratum. Questions that cannot be completed to a set are left out.
    """
    answers = sorted({question.answer for _, question in pairs})
    strata: dict = defaultdict(lambda: defaultdict(list))
    for scene, question in pairs:
        strata[stratum(scene, question)][question.answer].append((scene, question))

    sets = []
    for _, by_answer in sorted(strata.items()):
        shuffled = [rng.sample(by_answer[answer], len(by_answer[answer])) for answer in answers]
        sets += zip(*shuffled)  # as many sets as the rarest answer has questions
    if sets:
        return sets

    # A very small world may have no complete set: then every question stands by itself.
    for by_answer in strata.values():
        for same_answer in by_answer.values():
            sets += [(pair,) for pair in same_answer]
    return sets


def stratum(scene: Scene, question: Question) -> tuple:
    """Return what eyes or ears alone can count.

    It is for questions that take both. Scenes of one stratum look alike to somebody with one sense
    only.
    """
    if question.modality != "Audio-Visual":
        return ()
    return scene.kind, len(scene.seen), len(scene.heard)
