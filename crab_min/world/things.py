"""The things of the built-in world.

A thing has a picture, a sound and words for it.

Twelve things are drawn and synthesised here, so that the world needs no file. `--things FOLDER`
takes cut-out pictures and recordings instead.

Shapes: pictures are RGBA, waves (160000,) float32 in [-1, 1]: ten seconds at 16 kHz.
"""

import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from crab_min.errors import DataError, MediaError
from crab_min.media.read import open_image, read_audio
from crab_min.text_files import read_json

# A clip of the world: pixels of a side, sound samples per second (Hz), seconds.
SIZE, RATE, SECONDS = 96, 16000, 10
# Pixels of the longer side of a thing that stands (scenes.add_things).
SMALLEST, LARGEST = 24, 32
SILENCE = 1e-4  # root mean square of a wave below which it is silent
SHORTEST = 0.05  # seconds of a recording
SOUND_ENDINGS = (".ogg", ".wav", ".mp3")
EXPECTED = "--things takes a folder with a NAME.png and a NAME.ogg, .wav or .mp3 per thing"


@dataclass
class Thing:
    """One thing: its name, the action that makes it sound, its picture, its sound."""

    label: str
    action: str
    sprite: Image.Image  # RGBA, transparent around the thing
    wave: np.ndarray  # (160000,) float32


# --- drawn things ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Timbre:
    """A synthetic sound: decaying pulses of a harmonic tone, mixed with noise."""

    pitch: float  # frequency of the fundamental, Hz
    partials: tuple  # (multiple of the fundamental, amplitude) of each partial
    noise: float = 0  # share of noise, 0 to 1
    pulses: float = 0.1  # per second; 0.1 is one pulse for the whole clip
    decay: float = 30  # seconds; 30 hardly decays within the clip
    glide: float = 0  # relative change of the pitch during a pulse
    vibrato: float = 0  # Hz


# label: (action, shapes on a canvas of 100 x 100, timbre)
# fmt: off
DRAWN = {
    "bell": ("ringing a bell", [
        ("polygon", (50, 8, 72, 30, 80, 74, 92, 84, 8, 84, 20, 74, 28, 30), "#e8b923"),
        ("ellipse", (40, 80, 60, 98), "#8a6a10"),
    ], Timbre(880, ((1, 1), (2.4, .6), (3.9, .4)), pulses=1, decay=.5)),
    "drum": ("beating a drum", [
        ("rectangle", (8, 34, 92, 80), "#d02b2b"), ("ellipse", (8, 64, 92, 96), "#d02b2b"),
        ("ellipse", (8, 14, 92, 54), "#fff4e0"),
    ], Timbre(90, ((1, 1), (1.6, .4)), noise=.35, pulses=2, decay=.12, glide=-.4)),
    "violin": ("playing a violin", [
        ("ellipse", (26, 58, 74, 98), "#8b4a1c"), ("ellipse", (32, 38, 68, 72), "#8b4a1c"),
        ("rectangle", (46, 2, 54, 46), "#2d1a0a"),
    ], Timbre(440, ((1, 1), (2, .7), (3, .5), (4, .4), (5, .3), (6, .2)), vibrato=6)),
    "trumpet": ("blowing a trumpet", [
        ("rectangle", (4, 44, 74, 56), "#f5d000"),
        ("polygon", (70, 46, 98, 22, 98, 78, 70, 54), "#f5d000"),
        ("rectangle", (28, 28, 34, 72), "#b09000"), ("rectangle", (42, 28, 48, 72), "#b09000"),
    ], Timbre(300, ((1, .8), (2, 1), (3, 1), (4, .7), (5, .5), (7, .3)), pulses=2, decay=.25)),
    "dog": ("making a dog bark", [
        ("ellipse", (18, 22, 82, 92), "#c98f4a"), ("ellipse", (4, 18, 30, 66), "#7a4d1d"),
        ("ellipse", (70, 18, 96, 66), "#7a4d1d"), ("ellipse", (40, 58, 60, 74), "#1a1a1a"),
        ("ellipse", (32, 40, 42, 52), "#1a1a1a"), ("ellipse", (58, 40, 68, 52), "#1a1a1a"),
    ], Timbre(260, ((1, 1), (2, .8), (3, .6)), noise=.3, pulses=2.5, decay=.09, glide=.6)),
    "cat": ("making a cat meow", [
        ("ellipse", (14, 26, 86, 94), "#3a3a44"), ("polygon", (16, 46, 20, 4, 46, 32), "#3a3a44"),
        ("polygon", (84, 46, 80, 4, 54, 32), "#3a3a44"), ("ellipse", (28, 46, 44, 62), "#9be23c"),
        ("ellipse", (56, 46, 72, 62), "#9be23c"),
    ], Timbre(620, ((1, 1), (2, .6), (3, .2)), noise=.03, pulses=1, decay=.7, glide=-.45)),
    "bird": ("making a bird sing", [
        ("ellipse", (24, 30, 84, 88), "#2f7fe0"), ("ellipse", (10, 12, 50, 52), "#2f7fe0"),
        ("polygon", (12, 28, 0, 36, 14, 42), "#ff9c1a"), ("ellipse", (20, 22, 32, 34), "#ffffff"),
        ("polygon", (80, 60, 100, 46, 96, 76), "#1c56a8"),
    ], Timbre(2500, ((1, 1),), pulses=5, decay=.09, glide=.7)),
    "frog": ("making a frog croak", [
        ("ellipse", (10, 36, 90, 94), "#3fae3f"), ("ellipse", (16, 14, 46, 50), "#3fae3f"),
        ("ellipse", (54, 14, 84, 50), "#3fae3f"), ("ellipse", (24, 20, 38, 36), "#101010"),
        ("ellipse", (62, 20, 76, 36), "#101010"), ("rectangle", (26, 66, 74, 72), "#1c5c1c"),
    ], Timbre(150, ((1, 1), (3, .8), (5, .8), (8, .6)), noise=.1, pulses=12, decay=.02)),
    "car": ("driving a car", [
        ("rectangle", (4, 46, 96, 78), "#8a3fd0"),
        ("polygon", (22, 46, 34, 22, 70, 22, 82, 46), "#8a3fd0"),
        ("rectangle", (36, 28, 66, 44), "#cfe8ff"), ("ellipse", (14, 66, 38, 92), "#151515"),
        ("ellipse", (62, 66, 86, 92), "#151515"),
    ], Timbre(62, tuple((k, 1 / k ** .5) for k in range(1, 12)), noise=.25, vibrato=3)),
    "clock": ("winding a clock", [
        ("ellipse", (6, 6, 94, 94), "#202020"), ("ellipse", (14, 14, 86, 86), "#ffffff"),
        ("rectangle", (47, 22, 53, 54), "#d01010"), ("rectangle", (48, 48, 74, 54), "#202020"),
    ], Timbre(1800, ((1, 1),), noise=.7, pulses=4, decay=.015)),
    "whistle": ("blowing a whistle", [
        ("ellipse", (8, 30, 66, 92), "#ff5fa8"), ("rectangle", (36, 30, 98, 52), "#ff5fa8"),
        ("ellipse", (24, 48, 48, 74), "#7c1848"),
    ], Timbre(1750, ((1, 1),), noise=.05, vibrato=28)),
    "kettle": ("boiling a kettle", [
        ("ellipse", (14, 34, 80, 94), "#20a8a0"),
        ("polygon", (70, 56, 98, 34, 98, 46, 76, 74), "#20a8a0"),
        ("arc", (24, 6, 70, 60), "#0c4c48"), ("ellipse", (42, 26, 54, 38), "#0c4c48"),
    ], Timbre(3200, ((1, .15),), noise=.9)),
}
# fmt: on


def draw_things() -> list[Thing]:
    """Draw and synthesise the twelve things that need no file."""
    things = []
    for label, (action, shapes, timbre) in DRAWN.items():
        things.append(Thing(label, action, draw_sprite(shapes), synthesise(label, timbre)))
    return things


def draw_sprite(shapes: list[tuple]) -> Image.Image:
    """Draw (shape, corners, colour) one over the other: (100, 100) RGBA."""
    # Four times as large, then reduced: smooth edges.
    canvas = Image.new("RGBA", (400, 400))
    pen = ImageDraw.Draw(canvas)
    for shape, corners, colour in shapes:
        corners = [4 * c for c in corners]
        if shape == "arc":
            pen.arc(corners, 180, 360, colour, 28)
        else:
            getattr(pen, shape)(corners, fill=colour, outline="#00000060")
    return canvas.resize((100, 100), Image.LANCZOS)


def synthesise(label: str, timbre: Timbre) -> np.ndarray:
    """Synthesise ten seconds of a timbre (160000,) float32; the label seeds its noise."""
    t = np.arange(SECONDS * RATE) / RATE  # (N,), seconds
    since_pulse = (t * timbre.pulses % 1) / timbre.pulses  # (N,), seconds since the last pulse

    # The pitch glides during each pulse and wavers by 3 percent; its integral is the phase.
    glide = 1 + timbre.glide * np.minimum(since_pulse * timbre.pulses, 1)
    vibrato = 1 + 0.03 * np.sin(2 * np.pi * timbre.vibrato * t)
    phase = 2 * np.pi * np.cumsum(timbre.pitch * glide * vibrato) / RATE  # (N,)

    # Partials and noise, in pulses that begin within 4 ms and decay.
    tone = sum(amplitude * np.sin(multiple * phase) for multiple, amplitude in timbre.partials)
    tone = tone / sum(amplitude for _, amplitude in timbre.partials)
    noise = np.random.default_rng(zlib.crc32(label.encode())).standard_normal(len(t)) * 0.5
    envelope = np.minimum(since_pulse / 0.004, 1) * np.exp(-since_pulse / timbre.decay)
    return equalise(envelope * ((1 - timbre.noise) * tone + timbre.noise * noise))


def equalise(wave: np.ndarray) -> np.ndarray:
    """Scale a wave to the level of all things, a root mean square of 0.1.

    Silence stays silence.
    """
    level = max(float(np.sqrt(np.mean(wave**2))), SILENCE)
    return np.clip(wave * (0.1 / level), -1, 1).astype(np.float32)


# --- things from files ----------------------------------------------------------------------------
def load_things(folder: str) -> list[Thing]:
    """Load things from the files of a folder.

    They are NAME.png (with transparency) and NAME.ogg, .wav or .mp3. Labels and kinds stand in its
    things.json where it has one: {"NAME": {"label", "kind"}}.

    Raises:
        DataError: fewer than four things have a picture and a sound, or some cannot be used; names
            all of these.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{folder}: no such folder; {EXPECTED}")
    entries = load_entries(root / "things.json")
    files = {path.name.lower(): path for path in sorted(root.iterdir())}
    things, faults = [], []
    for name, picture in files.items():
        stem, ending = os.path.splitext(name)
        if ending != ".png":
            continue
        sounds = [files[stem + end] for end in SOUND_ENDINGS if stem + end in files]
        try:
            if not sounds:
                raise DataError(f"{picture}: no sound of this name")
            things.append(load_thing(picture, sounds[0], entries.get(picture.stem, {})))
            if [thing.label for thing in things].count(things[-1].label) > 1:
                raise DataError(f"{picture}: another thing is called {things[-1].label!r} too")
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError(f"{'; '.join(faults)}. Replace or remove these; {EXPECTED}")
    if len(things) < 4:
        raise DataError(f"{folder}: {len(things)} things, at least 4 are needed; {EXPECTED}")
    return things


def load_entries(path: Path) -> dict[str, dict]:
    """Read things.json; an absent file has no entries. Raises DataError."""
    entries = read_json(path) if path.exists() else {}
    values = entries.values() if isinstance(entries, dict) else [None]
    if not all(isinstance(value, dict) for value in values):
        raise DataError(f'{path}: expected {{"NAME": {{"label": "..."}}}}')
    return entries


def load_thing(picture: Path, sound: Path, entry: dict) -> Thing:
    """Load one thing; `entry` is its entry in things.json. Raises DataError."""
    try:
        sprite = open_image(picture, "RGBA")
        wave = read_audio(str(sound), RATE, lambda seconds: (0, min(seconds, SECONDS))).wave
    except MediaError as error:
        raise DataError(str(error)) from None
    label = entry.get("label", picture.stem.replace("_", " ").strip())
    if not isinstance(label, str) or not re.search(r"\w", label) or re.search(r"[<>()\[\]]", label):
        raise DataError(f"{picture}: label {label!r}; a label is words without brackets")
    box = sprite.getchannel("A").getbbox()  # what is not transparent
    if box is None or not is_visible(sprite.crop(box)):
        raise DataError(f"{picture}: nothing is left of it at {SMALLEST} pixels")
    if len(wave) < SHORTEST * RATE or np.sqrt(np.mean(wave[: 2 * RATE] ** 2)) < SILENCE:
        raise DataError(f"{sound}: silent in its first 2 seconds, or shorter than {SHORTEST} s")

    verbs = {"instrument": "playing", "object": "using"}
    verb = verbs.get(entry.get("kind"), "hearing")
    wave = np.resize(wave, SECONDS * RATE)  # a recording shorter than the clip is repeated
    return Thing(label, f"{verb} a {label}", sprite.crop(box), equalise(wave))


def cutout(sprite: Image.Image, size: int, angle: int) -> np.ndarray:
    """Return a picture as RGBA (h, w, 4): its longer side has `size` pixels, then it is turned."""
    scale = size / max(sprite.size)
    width = max(1, round(sprite.width * scale))
    height = max(1, round(sprite.height * scale))
    sprite = sprite.resize((width, height), Image.LANCZOS)
    return np.asarray(sprite.rotate(angle, Image.BICUBIC, expand=True))


def is_visible(sprite: Image.Image) -> bool:
    """Tell whether a picture has a mask in every size and angle of a scene with masks."""
    for size in range(SMALLEST, LARGEST + 1):
        for angle in (-18, 0, 18):
            if cutout(sprite, size, angle)[..., 3].max() <= 127:
                return False
    return True
