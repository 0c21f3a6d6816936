"""Scenes of the built-in audio-visual world: what is true of a clip, in symbols.

A `Scene` is all there is to know about one clip of ten seconds: a place, things with their
positions and the seconds in which each is seen and heard, or a face with an expression and a
voice. Frames, sound and masks (rendering.py), questions and answers (questions.py, clip_rows.py,
frame_rows.py) are computed from it. Nothing is measured afterwards, so every label is exact.

There are four kinds of scene:

    one     exactly one thing is both seen and heard
    many    1 to 3 things are seen and 1 to 3 are heard, any number of them the same
    action  one thing moves in one of six ways and sounds
    face    an expression and a voice, now and then behind a mask

Off-screen sounds and silent things are everywhere, and all things sway as long as they are seen.
So nothing in the picture tells what is heard, or when.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from crab_min.world.things import LARGEST, SECONDS, SIZE, SMALLEST, Thing

# A change of what is drawn or said needs a new version, and a new tiny base.
VERSION = 7
FPS = 25  # frames per second
SPLITS = {"train": 0, "test": 1, "base": 2}
KINDS = {"one": 0, "many": 1, "action": 2, "face": 3}
MOVEMENTS = ("bouncing", "sliding", "circling", "spinning", "growing", "shrinking")
EMOTIONS = ("happy", "sad", "angry", "surprise", "fear", "neutral")

Span = tuple[int, int]  # (start, end) in whole seconds; the end is not included


@dataclass
class Object:
    """A thing in a scene. Centre and size are in pixels of the 96 x 96 frame."""

    thing: int  # its index in Renderer.things
    label: str
    x: int = 0
    y: int = 0
    size: int = 0  # of the longer side
    seen: list[Span] = field(default_factory=list)  # empty: off-screen
    heard: list[Span] = field(default_factory=list)  # empty: silent
    # 1 or -1: it goes to the right or to the left at every quarter of a second, then back.
    trembles: int = 0

    def seen_at(self, t: float) -> bool:
        return any(start <= t < end for start, end in self.seen)

    def heard_at(self, t: float) -> bool:
        return any(start <= t < end for start, end in self.heard)

    @property
    def position(self) -> str:
        """Return the third of the picture that holds its centre: left, middle or right."""
        if self.x < SIZE / 3:
            return "left"
        return "right" if self.x >= 2 * SIZE / 3 else "middle"


@dataclass
class Scene:
    """The facts of one clip."""

    split: str
    kind: str
    index: int
    place: str  # name of the background
    objects: list[Object] = field(default_factory=list)
    movement: str = ""  # "action" scenes only
    # "face" scenes only; their one object is the person.
    emotion: str = ""
    voice: int = 0  # pitch, Hz
    masked: bool = False
    skin: int = 0
    hair: int = 0

    @property
    def name(self) -> str:
        """Return the name of its files."""
        return f"{self.split}_{self.kind}_{self.index:05d}"

    @property
    def seen(self) -> list[Object]:
        """Return the objects that are seen at any time, from left to right."""
        return sorted((obj for obj in self.objects if obj.seen), key=lambda obj: obj.x)

    @property
    def heard(self) -> list[Object]:
        """Return the objects that are heard at any time, in the order of their start."""
        return sorted((obj for obj in self.objects if obj.heard), key=lambda obj: obj.heard)


Scenes = dict[str, list[Scene]]  # kind -> scenes


def make_scene(
    things: list[Thing], places: Sequence[str], split: str, kind: str, index: int, seed: int = 0
) -> Scene:
    """Make the scene number `index` of a kind and split.

    Each scene has its own random generator. So the same arguments give the same scene on any
    machine, whatever else is made. The order of the random calls is part of `VERSION`.
    """
    rng = np.random.default_rng([seed, SPLITS[split], KINDS[kind], index])
    scene = Scene(split, kind, index, places[int(rng.integers(len(places)))])
    if kind == "face":
        add_person(scene, rng)
    elif kind == "action":
        add_moving_thing(scene, things, rng)
    else:
        add_things(scene, things, rng)
    return scene


def add_person(scene: Scene, rng: np.random.Generator) -> None:
    """Give a scene a face and a voice.

    Emotions take turns, so that all are equally frequent.
    """
    scene.emotion = EMOTIONS[scene.index % len(EMOTIONS)]
    scene.masked = bool(rng.random() < 0.15)
    scene.voice = int(rng.choice([105, 125, 190, 225]))
    scene.skin = int(rng.integers(4))
    scene.hair = int(rng.integers(4))
    person = Object(-1, "person", seen=[(0, SECONDS)], heard=[(0, SECONDS)])
    person.x = int(rng.integers(40, 57))
    person.y = int(rng.integers(42, 55))
    person.size = int(rng.integers(58, 75))
    scene.objects.append(person)


def add_moving_thing(scene: Scene, things: list[Thing], rng: np.random.Generator) -> None:
    """Give a scene one thing that moves; movements take turns."""
    thing = int(rng.integers(len(things)))
    scene.movement = MOVEMENTS[scene.index % len(MOVEMENTS)]
    moving = Object(thing, things[thing].label, x=48, y=50, seen=[(0, SECONDS)])
    moving.size = int(rng.integers(28, 37))
    moving.heard = [random_span(rng, 4, 10)]
    scene.objects.append(moving)


def add_things(scene: Scene, things: list[Thing], rng: np.random.Generator) -> None:
    """Give a scene up to four things.

    They are seen and heard, seen and silent, or heard off-screen.
    """
    # How many things are seen, heard, and both; which leaves at most four things in all.
    seen_count, heard_count = (int(count) for count in rng.choice([1, 2, 2, 3, 3], 2))
    if scene.kind == "one":
        both_count = 1
    else:
        fewest = max(0, seen_count + heard_count - 4)
        both_count = int(rng.integers(fewest, min(seen_count, heard_count) + 1))
    roles = ["both"] * both_count
    roles += ["silent"] * (seen_count - both_count)
    roles += ["off-screen"] * (heard_count - both_count)

    # Each thing seen has a column of the picture to itself, so that nothing overlaps.
    columns = iter(rng.permutation(3))
    for role, thing in zip(roles[:4], rng.choice(len(things), 4, replace=False)):
        obj = Object(int(thing), things[thing].label)
        if role != "off-screen":
            obj.x = 16 + 32 * int(next(columns)) + int(rng.integers(-3, 4))
            obj.y = 26 + 44 * int(rng.integers(2)) + int(rng.integers(-4, 5))
            obj.size = int(rng.integers(SMALLEST, LARGEST + 1))
            always_seen = scene.kind == "one" or rng.random() < 0.5
            obj.seen = [(0, SECONDS)] if always_seen else [random_span(rng, 5, 9)]
        if role != "silent":
            obj.heard = [random_span(rng, 2, 8 if scene.kind == "one" else 6)]
        scene.objects.append(obj)


def random_span(rng: np.random.Generator, shortest: int, longest: int) -> Span:
    """Choose a span of `shortest` to `longest` seconds within the clip."""
    length = int(rng.integers(shortest, longest + 1))
    start = int(rng.integers(0, SECONDS - length + 1))
    return start, start + length
