"""What the built-in world is made of: a thing has a picture, a sound and words for it.

Twelve things are drawn and synthesised below, so that the world needs no file; `--things FOLDER` takes cut-outs and recordings instead.
Shapes: picture RGBA, wave (N,) float32 at 16 kHz.
"""
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from crab_min.errors import DataError, MediaError
from crab_min.media.read import read_audio

SIZE, RATE, SECONDS = 96, 16000, 10                    # of a clip of the world: pixels a side, Hz, s


@dataclass
class Thing:
    """One thing of the world: its label, what doing it is called, a cut-out and ten seconds of its sound."""
    label: str
    action: str
    sprite: Image.Image                                # RGBA
    wave: np.ndarray                                   # (160000,) float32


# label: (action, shapes on a 100 x 100 canvas, timbre). A timbre is (f0 Hz, partials, noise share, pulses a second, decay s, glide, vibrato).
DRAWN = {
    "bell": ("ringing a bell", [("polygon", (50, 8, 72, 30, 80, 74, 92, 84, 8, 84, 20, 74, 28, 30), "#e8b923"),
                                ("ellipse", (40, 80, 60, 98), "#8a6a10")],
             (880, ((1, 1), (2.4, .6), (3.9, .4)), 0, 1, .5, 0, 0)),
    "drum": ("beating a drum", [("rectangle", (8, 34, 92, 80), "#d02b2b"), ("ellipse", (8, 64, 92, 96), "#d02b2b"),
                                ("ellipse", (8, 14, 92, 54), "#fff4e0")],
             (90, ((1, 1), (1.6, .4)), .35, 2, .12, -.4, 0)),
    "violin": ("playing a violin", [("ellipse", (26, 58, 74, 98), "#8b4a1c"), ("ellipse", (32, 38, 68, 72), "#8b4a1c"),
                                    ("rectangle", (46, 2, 54, 46), "#2d1a0a")],
               (440, ((1, 1), (2, .7), (3, .5), (4, .4), (5, .3), (6, .2)), 0, .1, 30, 0, 6)),
    "trumpet": ("blowing a trumpet", [("rectangle", (4, 44, 74, 56), "#f5d000"), ("polygon", (70, 46, 98, 22, 98, 78, 70, 54), "#f5d000"),
                                      ("rectangle", (28, 28, 34, 72), "#b09000"), ("rectangle", (42, 28, 48, 72), "#b09000")],
                (300, ((1, .8), (2, 1), (3, 1), (4, .7), (5, .5), (7, .3)), 0, 2, .25, 0, 0)),
    "dog": ("making a dog bark", [("ellipse", (18, 22, 82, 92), "#c98f4a"), ("ellipse", (4, 18, 30, 66), "#7a4d1d"),
                                  ("ellipse", (70, 18, 96, 66), "#7a4d1d"), ("ellipse", (40, 58, 60, 74), "#1a1a1a"),
                                  ("ellipse", (32, 40, 42, 52), "#1a1a1a"), ("ellipse", (58, 40, 68, 52), "#1a1a1a")],
            (260, ((1, 1), (2, .8), (3, .6)), .3, 2.5, .09, .6, 0)),
    "cat": ("making a cat meow", [("ellipse", (14, 26, 86, 94), "#3a3a44"), ("polygon", (16, 46, 20, 4, 46, 32), "#3a3a44"),
                                  ("polygon", (84, 46, 80, 4, 54, 32), "#3a3a44"), ("ellipse", (28, 46, 44, 62), "#9be23c"),
                                  ("ellipse", (56, 46, 72, 62), "#9be23c")],
            (620, ((1, 1), (2, .6), (3, .2)), .03, 1, .7, -.45, 0)),
    "bird": ("making a bird sing", [("ellipse", (24, 30, 84, 88), "#2f7fe0"), ("ellipse", (10, 12, 50, 52), "#2f7fe0"),
                                    ("polygon", (12, 28, 0, 36, 14, 42), "#ff9c1a"), ("ellipse", (20, 22, 32, 34), "#ffffff"),
                                    ("polygon", (80, 60, 100, 46, 96, 76), "#1c56a8")],
             (2500, ((1, 1),), 0, 5, .09, .7, 0)),
    "frog": ("making a frog croak", [("ellipse", (10, 36, 90, 94), "#3fae3f"), ("ellipse", (16, 14, 46, 50), "#3fae3f"),
                                     ("ellipse", (54, 14, 84, 50), "#3fae3f"), ("ellipse", (24, 20, 38, 36), "#101010"),
                                     ("ellipse", (62, 20, 76, 36), "#101010"), ("rectangle", (26, 66, 74, 72), "#1c5c1c")],
             (150, ((1, 1), (3, .8), (5, .8), (8, .6)), .1, 12, .02, 0, 0)),
    "car": ("driving a car", [("rectangle", (4, 46, 96, 78), "#8a3fd0"), ("polygon", (22, 46, 34, 22, 70, 22, 82, 46), "#8a3fd0"),
                              ("rectangle", (36, 28, 66, 44), "#cfe8ff"), ("ellipse", (14, 66, 38, 92), "#151515"),
                              ("ellipse", (62, 66, 86, 92), "#151515")],
            (62, tuple((k, 1 / k ** .5) for k in range(1, 12)), .25, .1, 30, 0, 3)),
    "clock": ("winding a clock", [("ellipse", (6, 6, 94, 94), "#202020"), ("ellipse", (14, 14, 86, 86), "#ffffff"),
                                  ("rectangle", (47, 22, 53, 54), "#d01010"), ("rectangle", (48, 48, 74, 54), "#202020")],
              (1800, ((1, 1),), .7, 4, .015, 0, 0)),
    "whistle": ("blowing a whistle", [("ellipse", (8, 30, 66, 92), "#ff5fa8"), ("rectangle", (36, 30, 98, 52), "#ff5fa8"),
                                      ("ellipse", (24, 48, 48, 74), "#7c1848")],
                (1750, ((1, 1),), .05, .1, 30, 0, 28)),
    "kettle": ("boiling a kettle", [("ellipse", (14, 34, 80, 94), "#20a8a0"), ("polygon", (70, 56, 98, 34, 98, 46, 76, 74), "#20a8a0"),
                                    ("arc", (24, 6, 70, 60), "#0c4c48"), ("ellipse", (42, 26, 54, 38), "#0c4c48")],
               (3200, ((1, .15),), .9, .1, 30, 0, 0)),
}


def synthesise(name: str, timbre: tuple) -> np.ndarray:
    """Ten seconds of a timbre (N,) float32: decaying pulses of a harmonic tone with glide, vibrato and a share of noise."""
    f0, partials, noise, rate, decay, glide, vibrato = timbre
    t = np.arange(SECONDS * RATE) / RATE
    tau = (t * rate % 1) / rate                                              # seconds since the last pulse
    pitch = f0 * (1 + glide * np.minimum(tau * rate, 1)) * (1 + .03 * np.sin(2 * np.pi * vibrato * t) * (vibrato > 0))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    tone = sum(a * np.sin(m * phase) for m, a in partials) / sum(a for _, a in partials)
    hiss = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(len(t)) * .5
    wave = np.minimum(tau / .004, 1) * np.exp(-tau / decay) * ((1 - noise) * tone + noise * hiss)
    return loudness(wave)


def loudness(wave: np.ndarray) -> np.ndarray:
    """Scale a wave to the level that every thing has (root mean square 0.1), limited to [-1, 1]; silence stays silence."""
    return np.clip(wave * (.1 / max(float(np.sqrt(np.mean(wave ** 2))), 1e-4)), -1, 1).astype(np.float32)


def drawn_things() -> list[Thing]:
    """The twelve things that need no file."""
    things = []
    for label, (action, shapes, timbre) in DRAWN.items():
        canvas = Image.new("RGBA", (400, 400))
        draw = ImageDraw.Draw(canvas)
        for shape, points, colour in shapes:
            if shape == "arc":
                draw.arc([4 * p for p in points], 180, 360, colour, 28)
            else:
                getattr(draw, shape)([4 * p for p in points], fill=colour, outline="#00000060")
        things.append(Thing(label, action, canvas.resize((100, 100), Image.LANCZOS), synthesise(label, timbre)))
    return things


def things_from(folder: str) -> list[Thing]:
    """Things from NAME.png (with transparency) and NAME.ogg/.wav/.mp3 in `folder`; labels in its things.json where it has one.

    Raises DataError: no such folder, fewer than 4 complete things, a picture that is empty, a sound that cannot be read.
    """
    root, things = Path(folder), []
    if not root.is_dir():
        raise DataError(f"{folder}: no such folder; --things takes a folder with NAME.png and NAME.ogg/.wav/.mp3 pairs")
    try:
        names = json.loads((root / "things.json").read_text()) if (root / "things.json").exists() else {}
    except ValueError as error:
        raise DataError(f"{root / 'things.json'}: not JSON ({error}); expected {{\"NAME\": {{\"label\": \"...\"}}}}") from None
    for picture in sorted(root.glob("*.png")):
        sound = next((p for p in (picture.with_suffix(s) for s in (".ogg", ".wav", ".mp3")) if p.exists()), None)
        if sound is None:
            continue
        try:
            sprite = Image.open(picture).convert("RGBA")
            wave = read_audio(str(sound), RATE).wave
        except (OSError, MediaError) as error:
            raise DataError(f"{picture}: cannot be used as a thing ({error}); replace or remove it") from None
        box = sprite.getchannel("A").getbbox()
        if box is None or not len(wave):
            raise DataError(f"{picture}: the picture is fully transparent or its sound is empty; replace or remove it")
        entry = names.get(picture.stem, {})
        label = entry.get("label", picture.stem.replace("_", " "))
        action = {"instrument": "playing a {}", "object": "using a {}"}.get(entry.get("kind"), "hearing a {}").format(label)
        repeats = math.ceil(SECONDS * RATE / len(wave))                     # a recording shorter than the clip is repeated
        things.append(Thing(label, action, sprite.crop(box), loudness(np.tile(wave, repeats)[:SECONDS * RATE])))
    if len(things) < 4:
        raise DataError(f"{folder}: {len(things)} things with both a picture and a sound, at least 4 are needed")
    return things


def backgrounds_from(folder: str | None) -> dict[str, Image.Image]:
    """Photographic places: the pictures in FOLDER/backgrounds, by name; none is fine (the drawn places are used then)."""
    paths = sorted(p for p in Path(folder or "/nonexistent").glob("backgrounds/*") if p.suffix in (".png", ".jpg", ".jpeg"))
    return {p.stem.replace("_", " "): Image.open(p).convert("RGB").resize((SIZE, SIZE), Image.LANCZOS) for p in paths}
