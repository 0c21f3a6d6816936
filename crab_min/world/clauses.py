"""Clauses about the objects of a scene.

Evidence and the tiny base's captions are made of them.

A clause has no capital and no full stop. Examples in the docstrings are of a dog that is on the
left and heard from second 2 to 7.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from crab_min.world.scenes import Object, Span

NUMBERS = ("zero", "one", "two", "three", "four")
NOT_IN_PICTURE = "not in the picture"
# movement: what a thing does that moves so
MOVES = {
    "bouncing": "goes up and down",
    "sliding": "goes from side to side",
    "circling": "goes round and round",
    "spinning": "turns on the spot",
    "growing": "gets larger",
    "shrinking": "gets smaller",
}


# --- parts of clauses -----------------------------------------------------------------------------
def join_with_and(phrases: Sequence[str]) -> str:
    """Return "a, b and c"; "nothing" for no phrase."""
    if len(phrases) > 1:
        return f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    return phrases[0] if phrases else "nothing"


def list_of_names(objects: Sequence[Object]) -> str:
    """Return "the dog, the cat and the bell"."""
    return join_with_and([f"the {obj.label}" for obj in objects])


def at_position(position: str) -> str:
    """Return "on the left"."""
    return "in the middle" if position == "middle" else f"on the {position}"


def during(spans: Sequence[Span]) -> str:
    """Return "from 2 to 7", with "and" between several spans."""
    return " and ".join(f"from {start} to {end}" for start, end in spans)


def heard_or_silent(obj: Object) -> str:
    """Return "heard from 2 to 7" or "silent"."""
    return f"heard {during(obj.heard)}" if obj.heard else "silent"


# --- clauses --------------------------------------------------------------------------------------
def sentence(*clauses: str) -> str:
    """Join clauses to a sentence with a capital and a full stop."""
    text = join_with_and(clauses)
    return f"{text[0].upper()}{text[1:]}."


def clause_where(obj: Object) -> str:
    """Return "the dog is on the left"."""
    return f"the {obj.label} is {at_position(obj.position)}"


def clause_heard(obj: Object) -> str:
    """Return "the dog is heard from 2 to 7"."""
    return f"the {obj.label} is {heard_or_silent(obj)}"


def clause_if_heard(obj: Object, heard: bool) -> str:
    """Return "the dog is heard" or "the dog is silent"."""
    return f"the {obj.label} is {'heard' if heard else 'silent'}"


def clause_where_heard(obj: Object) -> str:
    """Return "the dog is on the left and is heard from 2 to 7"."""
    return f"{clause_where(obj)} and is {heard_or_silent(obj)}"


def clause_where_heard_at(obj: Object, t: float) -> str:
    """Return "the dog is on the left and is heard", as it is at second t."""
    return f"{clause_where(obj)} and is {'heard' if obj.heard_at(t) else 'silent'}"


def clause_at_position(obj: Object) -> str:
    """Return "on the left is the dog, heard from 2 to 7".

    It answers questions that name a position, so that the thing follows from the position.
    """
    return f"{at_position(obj.position)} is the {obj.label}, {heard_or_silent(obj)}"


def clause_sound_sources(objects: Sequence[Object]) -> str:
    """Return "the dog on the left and the cat on the right can be heard"."""
    names = [f"the {obj.label} {at_position(obj.position)}" for obj in objects]
    return f"{join_with_and(names)} can be heard"


# --- comparisons ----------------------------------------------------------------------------------
def seconds_heard(obj: Object) -> int:
    return sum(end - start for start, end in obj.heard)


# order: its key; the object with the smallest one is the first, the last, the longest
ORDERS: dict[str, Callable[[Object], int]] = {
    "first": lambda obj: obj.heard[0][0],
    "last": lambda obj: -obj.heard[-1][1],
    "longest": lambda obj: -seconds_heard(obj),
}


@dataclass(frozen=True)
class Comparison:
    """Two words for what a smaller and a larger value of `key` mean."""

    key: Callable[[Object], int]
    smaller: str
    larger: str


LONGER = Comparison(seconds_heard, "shorter", "longer")
EARLIER = Comparison(ORDERS["first"], "earlier", "later")


def clause_compared(a: Object, b: Object, comparison: Comparison) -> str:
    """Return "next to the cat the dog is heard longer", a being the dog.

    Both names come before the judgement, so that a language model has read them when it judges.
    """
    smaller = comparison.key(a) < comparison.key(b)
    judgement = comparison.smaller if smaller else comparison.larger
    return f"next to the {b.label} the {a.label} is heard {judgement}"


def unique_minimum(objects: Sequence[Object], key: Callable[[Object], int]) -> Object | None:
    """Return the object with the smallest key.

    It is None where no object or several have it.
    """
    ranked = sorted(objects, key=key)
    if not ranked or (len(ranked) > 1 and key(ranked[0]) == key(ranked[1])):
        return None
    return ranked[0]
