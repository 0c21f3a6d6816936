"""What can be asked about a scene of the built-in world: clauses, MUSIC-AVQA's nine types of question, multiple choice, balancing.

Everything is computed from the symbolic scene, never from pixels. Evidence is made of the same clauses as the statements that the tiny base learns from.
"""
import random
from collections import defaultdict

from crab_min.world.scenes import Object, Scene

NUMBERS = ("zero", "one", "two", "three", "four")
MOVES = {"bouncing": "goes up and down", "sliding": "goes from side to side", "circling": "goes round and round",
         "spinning": "turns on the spot", "growing": "gets larger", "shrinking": "gets smaller"}


def times(spans) -> str:
    return " and ".join(f"from {s} to {e}" for s, e in spans)


def listing(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names) if names else "nothing"


def hears(o: Object) -> str:
    return f"the {o.label} is heard {times(o.heard)}" if o.heard else f"the {o.label} is silent"


def sentence(*clauses: str) -> str:
    text = listing([c for c in clauses if c]) if len(clauses) > 1 else clauses[0]
    return text[0].upper() + text[1:] + "."


def length(o: Object) -> int:
    return sum(e - s for s, e in o.heard)


def at(side: str) -> str:
    return "in the middle" if side == "middle" else f"on the {side}"


def named(objects: list[Object]) -> str:
    """the dog, the cat and the bell"""
    return listing([f"the {o.label}" for o in objects])


def sounds(o: Object, heard: bool) -> str:
    return f"the {o.label} is {'heard' if heard else 'silent'}"


def placed(o: Object) -> str:
    """the dog is on the left and is heard from 2 to 7"""
    return f"the {o.label} is {at(o.side)} and is {f'heard {times(o.heard)}' if o.heard else 'silent'}"


def found(o: Object) -> str:
    """on the left is the dog, heard from 2 to 7: for questions that name a side, so that the thing follows from the side"""
    return f"{at(o.side)} is the {o.label}, {f'heard {times(o.heard)}' if o.heard else 'silent'}"


def placed_at(o: Object, t: float) -> str:
    """the dog is on the left and is silent: at second t"""
    return f"the {o.label} is {at(o.side)} and is {'heard' if o.heard_at(t) else 'silent'}"


def sounding(objects: list[Object]) -> str:
    """the dog on the left and the cat on the right can be heard"""
    return f"{listing([f'the {o.label} {at(o.side)}' for o in objects])} can be heard"


def compared(a: Object, b: Object, key, less: str, more: str) -> str:
    """next to the cat the dog is heard longer: both names come before the judgement"""
    return f"next to the {b.label} the {a.label} is heard {less if key(a) < key(b) else more}"


def only(objects: list[Object], key) -> Object | None:
    """The object with the smallest key, None where there is none or it is not the only one."""
    ranked = sorted(objects, key=key)
    return ranked[0] if ranked and (len(ranked) == 1 or key(ranked[0]) < key(ranked[1])) else None


ORDERS = {"first": lambda o: o.heard[0][0], "last": lambda o: -o.heard[-1][1], "longest": lambda o: -length(o)}
LONGER, EARLIER = (length, "shorter", "longer"), (ORDERS["first"], "earlier", "later")


def questions(scene: Scene):
    """Every question that has one answer in this scene: (modality, type, question, answer, evidence).

    Those of modality "Audio-Visual" ask for what neither eyes nor ears alone can know: the eyes know what is where, the ears what
    sounds when, and only together they know where something sounds.
    """
    seen, heard = scene.seen, scene.heard
    at_side = {o.side: o for o in seen}                                       # one thing a side (world.py)
    yield "Audio", "Counting", "How many sounds are heard?", NUMBERS[len(heard)], sentence(f"{named(heard)} can be heard")
    for a in heard:
        for b in heard:
            if length(a) != length(b):
                yield ("Audio", "Comparative", f"Is the {a.label} heard longer than the {b.label}?", "yes" if length(a) > length(b) else "no",
                       sentence(hears(a), hears(b), compared(a, b, *LONGER)))
    yield "Visual", "Counting", "How many things are seen?", NUMBERS[len(seen)], sentence(f"{named(seen)} can be seen")
    for o in seen:
        yield "Visual", "Location", f"Where is the {o.label}?", o.side, sentence(f"the {o.label} is {at(o.side)}")
        yield "Audio-Visual", "Existential", f"Is the thing {at(o.side)} heard?", "yes" if o.heard else "no", sentence(found(o))
    if len(seen) == len(heard) == 2:
        yield "Audio-Visual", "Counting", "How many of the things seen are heard?", NUMBERS[sum(o in heard for o in seen)], sentence(*map(hears, seen))
    first = only(heard, ORDERS["first"])
    if len(seen) == 3 and first in seen:
        evidence = sentence(f"heard first is the {first.label}", f"the {first.label} is {at(first.side)}")
        yield "Audio-Visual", "Location", "Where is the thing that is heard first?", first.side, evidence
    if {"left", "right"} <= set(at_side):
        left, right = at_side["left"], at_side["right"]
        if length(left) != length(right):
            yield ("Audio-Visual", "Comparative", "Is the thing on the left heard longer than the thing on the right?",
                   "yes" if length(left) > length(right) else "no", sentence(found(left), found(right), compared(left, right, *LONGER)))
        if (earlier := only([o for o in (left, right) if o.heard], ORDERS["first"])) and left.heard and right.heard:
            yield ("Audio-Visual", "Temporal", "Which is heard first, the thing on the left or the thing on the right?", earlier.side,
                   sentence(found(left), found(right), compared(left, right, *EARLIER)))


PLACES_TO_CHOOSE = {"left": "on the left", "middle": "in the middle", "right": "on the right", "": "not in the picture"}


def choices(scene: Scene, rng: random.Random):
    """Multiple choice: (question, four options, index of the right one, evidence)."""
    heard = scene.heard
    for order, key in ORDERS.items():
        o = only(heard, key)
        if o and len(scene.seen) == 3:
            right = PLACES_TO_CHOOSE[o.side if o.seen else ""]
            options = rng.sample(list(PLACES_TO_CHOOSE.values()), 4)
            evidence = sentence(f"heard {order} is the {o.label}", f"the {o.label} is {right}")
            yield f"Where is the thing that is heard {order}?", options, options.index(right), evidence


def balanced(items: list[tuple], count: int, rng: random.Random) -> list:
    """About `count` rows of `items` (type, stratum, answer, row): types alike, and within a stratum every answer equally often.

    Rows are taken in sets, one for each answer of the type, all of one stratum; what cannot be completed to a set is left out.
    """
    tree: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for kind, stratum, answer, row in items:
        tree[kind][stratum][answer].append(row)
    sets: dict = {}
    for kind, strata in sorted(tree.items()):
        answers = sorted({answer for stratum in strata.values() for answer in stratum})
        sets[kind] = [s for _, stratum in sorted(strata.items()) for s in zip(*(rng.sample(stratum[a], len(stratum[a])) for a in answers))]
        sets[kind] = sets[kind] or [(row,) for stratum in strata.values() for rows in stratum.values() for row in rows]   # a very small world
        rng.shuffle(sets[kind])
    picked: dict = {kind: [] for kind in sets}
    while any(sets.values()) and sum(map(len, picked.values())) < count:
        kind = min((k for k in sets if sets[k]), key=lambda k: len(picked[k]))
        picked[kind] += sets[kind].pop()
    rows = [row for kind in picked for row in picked[kind]]
    rng.shuffle(rows)
    return rows
