"""The built-in audio-visual world: clips with exact labels, drawn and synthesised (DESIGN.md, "The built-in world").

A `Scene` is the whole truth about one 10-second clip: a place, things with a position and the seconds in which each is seen
and heard, or a face with an expression and a voice. Everything else is derived from it: frames, sound track, masks, and (in
`world_tasks.py`) questions and answers. Nothing is measured afterwards, so every label is exact.

Four kinds of scene: "one" (exactly one thing is both seen and heard), "many" (1 to 3 things seen, 1 to 3 heard, any number of
them the same), "action" (one thing moves in one of six ways and sounds) and "face" (an expression and a voice, now and then
behind a mask). Off-screen sounds and silent things are everywhere, and all things sway as long as they are seen, so that
nothing in the picture tells what is heard, or when.

Each scene has a generator of its own from (seed, split, kind, index): the same scene on any machine, whatever else is drawn.
Shapes: frames (T, 96, 96, 3) uint8 at 25 per second, wave (N,) float32 at 16 kHz, sprites (h, w, 4) uint8.
"""
import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from crab_min.world.things import (
    RATE,
    SECONDS,
    SIZE,
    Thing,
    backgrounds_from,
    drawn_things,
    things_from,
)

VERSION = 7                                            # a change of what is drawn or said needs a new version, and a new base
FPS = 25                                               # frames a second
SPLITS = {"train": 0, "test": 1, "base": 2}
KINDS = {"one": 0, "many": 1, "action": 2, "face": 3}
MOVEMENTS = ("bouncing", "sliding", "circling", "spinning", "growing", "shrinking")
EMOTIONS = ("happy", "sad", "angry", "surprise", "fear", "neutral")
PLACES = {                                             # name: (sky, ground)
    "meadow": ((150, 200, 240), (110, 170, 80)), "beach": ((170, 215, 245), (225, 205, 150)),
    "street": ((190, 190, 200), (110, 110, 115)), "room": ((235, 220, 200), (150, 110, 80)),
    "snow": ((205, 215, 230), (245, 245, 250)), "night": ((25, 30, 60), (40, 55, 50)),
}


# --- scenes --------------------------------------------------------------------------------------------------------------
Span = tuple[int, int]                                 # whole seconds, end not included


@dataclass
class Object:
    """A thing in a scene. Positions and size in pixels of the 96 x 96 frame, spans in whole seconds."""
    thing: int
    label: str
    x: int = 0                                         # centre
    y: int = 0
    size: int = 0
    seen: list[Span] = field(default_factory=list)     # empty: off-screen
    heard: list[Span] = field(default_factory=list)    # empty: silent
    trembles: int = 0                                  # 1 or -1: from side to side, to the right or to the left at every quarter of a second

    def seen_at(self, t: float) -> bool:
        return any(s <= t < e for s, e in self.seen)

    def heard_at(self, t: float) -> bool:
        return any(s <= t < e for s, e in self.heard)

    @property
    def side(self) -> str:
        return "left" if self.x < SIZE / 3 else "right" if self.x >= 2 * SIZE / 3 else "middle"


@dataclass
class Scene:
    split: str
    kind: str
    index: int
    place: str
    objects: list[Object] = field(default_factory=list)
    movement: str = ""                                 # "action" scenes
    emotion: str = ""                                  # "face" scenes, with the four fields below
    voice: int = 0                                     # Hz
    masked: bool = False
    skin: int = 0
    hair: int = 0

    @property
    def name(self) -> str:
        return f"{self.split}_{self.kind}_{self.index:05d}"

    @property
    def seen(self) -> list[Object]:
        """What is seen at any time, from left to right."""
        return sorted((o for o in self.objects if o.seen), key=lambda o: o.x)

    @property
    def heard(self) -> list[Object]:
        """What is heard at any time, in the order in which it begins."""
        return sorted((o for o in self.objects if o.heard), key=lambda o: o.heard)


def draw_span(rng, shortest=2, longest=8) -> Span:
    length = int(rng.integers(shortest, longest + 1))
    start = int(rng.integers(0, SECONDS - length + 1))
    return start, start + length


def make_scene(things: list[Thing], places: list[str], split: str, kind: str, index: int, seed: int = 0) -> Scene:
    """The scene number `index` of a kind and split: the same one for the same arguments, on any machine."""
    rng = np.random.default_rng([seed, SPLITS[split], KINDS[kind], index])
    scene = Scene(split, kind, index, places[int(rng.integers(len(places)))])
    if kind == "face":
        scene.emotion, scene.masked = EMOTIONS[index % len(EMOTIONS)], bool(rng.random() < .15)
        scene.voice = int(rng.choice([105, 125, 190, 225]))
        scene.skin, scene.hair = int(rng.integers(4)), int(rng.integers(4))
        scene.objects = [Object(-1, "person", int(rng.integers(40, 57)), int(rng.integers(42, 55)), int(rng.integers(58, 75)),
                                [(0, SECONDS)], [(0, SECONDS)])]
        return scene
    if kind == "action":
        thing = int(rng.integers(len(things)))
        scene.movement = MOVEMENTS[index % len(MOVEMENTS)]
        scene.objects = [Object(thing, things[thing].label, 48, 50, int(rng.integers(28, 37)), [(0, SECONDS)],
                                [draw_span(rng, 4, 10)])]
        return scene
    seen, heard = (int(v) for v in rng.choice([1, 2, 2, 3, 3], 2))            # how many things are seen, how many heard
    both = 1 if kind == "one" else int(rng.integers(max(0, seen + heard - 4), min(seen, heard) + 1))
    roles = ["both"] * both + ["silent"] * (seen - both) + ["off"] * (heard - both)
    columns = iter(rng.permutation(3))                                        # a column for each thing seen: nothing overlaps
    for role, thing in zip(roles[:4], rng.choice(len(things), 4, replace=False)):
        o = Object(int(thing), things[thing].label)
        if role != "off":
            o.x, o.y = 16 + 32 * int(next(columns)) + int(rng.integers(-3, 4)), 26 + 44 * int(rng.integers(2)) + int(rng.integers(-4, 5))
            o.size = int(rng.integers(24, 33))
            o.seen = [(0, SECONDS)] if kind == "one" or rng.random() < .5 else [draw_span(rng, 5, 9)]
        if role != "silent":
            o.heard = [draw_span(rng, 2, 8 if kind == "one" else 6)]
        scene.objects.append(o)
    return scene


# --- rendering -----------------------------------------------------------------------------------------------------------
class Renderer:
    """Turns scenes into frames, masks and sound; holds the things and the painted places."""

    def __init__(self, folder: str | None = None):
        self.things = things_from(folder) if folder else drawn_things()
        photos = backgrounds_from(folder)
        self.places = photos or {name: self.paint(*colours) for name, colours in PLACES.items()}

    @staticmethod
    def paint(sky, ground) -> Image.Image:
        rows = np.linspace(-14, 14, SIZE)[:, None, None]                      # a light gradient from top to bottom
        picture = np.where(np.arange(SIZE)[:, None, None] < 58, sky, ground) + rows + np.zeros((1, SIZE, 1))
        return Image.fromarray(picture.clip(0, 255).astype(np.uint8))

    def scene(self, split: str, kind: str, index: int, seed: int = 0) -> Scene:
        return make_scene(self.things, list(self.places), split, kind, index, seed)

    def pose(self, scene: Scene, o: Object, t: float) -> tuple[int, int, int, int]:
        """Where an object is at second t: centre x, y, size (pixels) and angle (degrees), all rounded to whole numbers."""
        x, y, size, angle, turn = o.x, o.y, o.size, 0.0, 2 * math.pi * t
        if scene.movement:
            x += 26 * math.sin(turn / 7) * (scene.movement == "sliding") + 24 * math.cos(turn / 8) * (scene.movement == "circling")
            y += 20 - 44 * abs(math.sin(turn / 8)) if scene.movement == "bouncing" else 0
            y += 24 * math.sin(turn / 8) * (scene.movement == "circling")
            angle = 30 * t if scene.movement == "spinning" else 0
            size *= {"growing": .5 + .11 * t, "shrinking": 1.6 - .11 * t}.get(scene.movement, 1)
        else:                                                                # things sway, each in its own time
            sway = math.sin(turn * .5 + o.size)
            angle, y = 18 * round(sway), y - 3 * abs(sway)
            x += 6 * o.trembles * math.sin(2 * turn)                         # at whole and half seconds it is where it would be at rest
        return round(x), round(y), round(size), round(angle / 6) * 6 % 360

    def sprite(self, thing: int, size: int, angle: int, cache: dict) -> np.ndarray:
        """The RGBA cut-out of a thing (h, w, 4), its longer side `size` pixels, turned by `angle` degrees."""
        if (thing, size, angle) not in cache:
            picture = self.things[thing].sprite
            scale = size / max(picture.size)
            picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.LANCZOS)
            cache[thing, size, angle] = np.asarray(picture.rotate(angle, Image.BICUBIC, expand=True))
        return cache[thing, size, angle]

    def frames(self, scene: Scene, times) -> np.ndarray:
        """Frames of the scene at the given seconds: (T, 96, 96, 3) uint8."""
        place, cache, seen, out = np.asarray(self.places[scene.place]), {}, {}, []
        for t in times:
            if scene.kind == "face":
                key = self.mouth(scene, t)
                if key not in seen:
                    seen[key] = self.face(scene, key)
            else:
                key = tuple((i, self.pose(scene, o, t)) for i, o in enumerate(scene.objects) if o.seen_at(t))
                if key not in seen:                                           # nothing moved: the picture is already there
                    seen[key] = place.copy()
                    for i, (x, y, size, angle) in key:
                        blend(seen[key], self.sprite(scene.objects[i].thing, size, angle, cache), x, y)
            out.append(seen[key])
        return np.stack(out)                                                  # (T, 96, 96, 3)

    def mask(self, scene: Scene, o: Object, t: float) -> np.ndarray:
        """The pixels of one object at second t, (96, 96) uint8 of 0 or 255; all 0 where it is not seen."""
        mask = np.zeros((SIZE, SIZE, 3), np.uint8)
        if o.seen_at(t):
            x, y, size, angle = self.pose(scene, o, t)
            sprite = self.sprite(o.thing, size, angle, {}).copy()
            sprite[..., :3] = 255
            blend(mask, sprite, x, y)
        return np.where(mask[..., 0] > 127, 255, 0).astype(np.uint8)

    def mouth(self, scene: Scene, t: float) -> int:
        """How far the mouth is open at second t, 0 to 3, in step with the syllables of the voice."""
        return round(3 * abs(math.sin(math.pi * t * VOICES[scene.emotion][0] / 2)))

    def face(self, scene: Scene, mouth: int) -> np.ndarray:
        """A face (96, 96, 3): brows, eyes and mouth tell the emotion."""
        picture = self.places[scene.place].resize((4 * SIZE, 4 * SIZE), Image.NEAREST)
        draw, o = ImageDraw.Draw(picture), scene.objects[0]
        u = 4 * o.size / 100                                                  # face units -> pixels of the large canvas

        def at(*p):
            return [4 * o.x + (v - 50) * u if i % 2 == 0 else 4 * o.y + (v - 50) * u for i, v in enumerate(p)]
        brow, tilt, eye, curve = FACES[scene.emotion]                         # brow height and tilt, eye height, mouth curve
        skin = ("#f2c9a0", "#d9a066", "#a86b3c", "#6e4426")[scene.skin]
        draw.ellipse(at(6, 0, 94, 70), fill=("#2b1b10", "#8b5a2b", "#d9b25f", "#555555")[scene.hair])
        draw.ellipse(at(12, 8, 88, 98), fill=skin, outline="#00000080")
        for side in (-1, 1):
            draw.ellipse(at(50 + side * 17 - 8, 44 - eye, 50 + side * 17 + 8, 44 + eye), fill="#ffffff", outline="#000000", width=4)
            draw.ellipse(at(50 + side * 17 - 4, 44 - min(eye, 4), 50 + side * 17 + 4, 44 + min(eye, 4)), fill="#101010")
            draw.line(at(50 + side * 8, brow + tilt, 50 + side * 27, brow - tilt), fill="#1a1008", width=14)
        opened = 2.5 * mouth
        if scene.masked:
            draw.rectangle(at(22, 60, 78, 90), fill="#dfeefa")
        elif curve == 0:                                                      # a straight or a round mouth
            wide = 8 if eye > 9 else 16
            draw.ellipse(at(50 - wide, 72 - 2 - opened - (eye > 9) * 5, 50 + wide, 72 + 2 + opened + (eye > 9) * 5), fill="#5c1010")
        else:
            draw.chord(at(30, 72 - abs(curve) - opened, 70, 72 + abs(curve) + opened), *((0, 180) if curve > 0 else (180, 360)), fill="#5c1010")
        return np.asarray(picture.resize((SIZE, SIZE), Image.BOX))

    def wave(self, scene: Scene) -> np.ndarray:
        """The sound track (160000,) float32: every heard span of every object, over a faint hiss."""
        rng = np.random.default_rng([3, SPLITS[scene.split], KINDS[scene.kind], scene.index])
        track = rng.standard_normal(SECONDS * RATE).astype(np.float32) * .002
        if scene.kind == "face":
            return np.clip(track + speak(scene.emotion, scene.voice, rng), -1, 1)
        for o in scene.objects:
            for start, end in o.heard:
                a, n = start * RATE, (end - start) * RATE
                fade = np.minimum(1, np.minimum(np.arange(n), np.arange(n)[::-1]) / 800).astype(np.float32)   # 50 ms
                track[a:a + n] += float(rng.uniform(.6, 1)) * fade * self.things[o.thing].wave[:n]
        return np.clip(track, -1, 1)


def blend(frame: np.ndarray, sprite: np.ndarray, x: int, y: int) -> None:
    """Paint a sprite (h, w, 4) onto a frame (H, W, 3) in place, centred at (x, y), cut at the border."""
    h, w = sprite.shape[:2]
    top, left = y - h // 2, x - w // 2
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + h, frame.shape[0]), min(left + w, frame.shape[1])
    if y0 < y1 and x0 < x1:
        part = sprite[y0 - top:y1 - top, x0 - left:x1 - left].astype(np.uint16)
        alpha = part[..., 3:]
        region = frame[y0:y1, x0:x1]
        region[:] = (region * (255 - alpha) + part[..., :3] * alpha + 127) // 255


# emotion: brow height, brow tilt (inner end down > 0), eye half-height, mouth curve (smile > 0; 0: straight or round)
FACES = {"happy": (29, 0, 7, 12), "sad": (28, -5, 5, -9), "angry": (33, 6, 5, -8), "surprise": (20, 0, 12, 0),
         "fear": (22, -6, 11, -6), "neutral": (30, 0, 6, 0)}
# emotion: syllables a second, pitch factor, pitch swing, loudness, tremble, brightness
VOICES = {"happy": (5, 1.35, .25, .9, 0, .6), "sad": (2, .85, -.25, .4, 0, .25), "angry": (6, 1.1, .08, 1.3, 0, 1.0),
          "surprise": (3, 1.7, .7, 1.0, 0, .5), "fear": (7, 1.5, .05, .6, .5, .5), "neutral": (3.5, 1.0, 0, .7, 0, .4)}


def speak(emotion: str, voice: int, rng) -> np.ndarray:
    """Ten seconds of a wordless voice (N,) float32 with the rhythm, pitch line, loudness and tremble of an emotion."""
    rate, factor, swing, level, tremble, bright = VOICES[emotion]
    rate, t = rate * float(rng.uniform(.92, 1.08)), np.arange(SECONDS * RATE) / RATE
    tau = t * rate % 1                                                        # position within the syllable, 0 to 1
    phase = 2 * np.pi * np.cumsum(voice * factor * (1 + swing * tau)) / RATE
    turn, harmonic, tone = np.exp(1j * phase), 1, 0                           # the k-th power of e^(i phase) is the k-th harmonic
    for k in range(1, 16):
        harmonic = harmonic * turn
        tone = tone + math.exp(-((k * voice / 700 - 1) ** 2)) * (1 if k < 4 else bright) * harmonic.imag
    return (.08 * level * tone * np.sin(np.pi * tau) ** .7 * (1 - tremble * (.5 + .5 * np.sin(2 * np.pi * 11 * t)))).astype(np.float32)
