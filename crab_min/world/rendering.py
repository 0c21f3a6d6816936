"""Rendering of scenes: frames, masks and sound.

Shapes: frames (T, 96, 96, 3) uint8 at 25 per second, masks (96, 96) uint8, sound (160000,) float32
at 16 kHz.
"""

import math
from collections.abc import Hashable, Iterable

import numpy as np
from PIL import Image

from crab_min.world.faces import draw_face, mouth_opening, speak
from crab_min.world.scenes import KINDS, SPLITS, Object, Scene, make_scene
from crab_min.world.things import RATE, SECONDS, SIZE, cutout, draw_things, load_things

# name of a place: (colour of the sky, colour of the ground)
PLACES = {
    "meadow": ((150, 200, 240), (110, 170, 80)),
    "beach": ((170, 215, 245), (225, 205, 150)),
    "street": ((190, 190, 200), (110, 110, 115)),
    "room": ((235, 220, 200), (150, 110, 80)),
    "snow": ((205, 215, 230), (245, 245, 250)),
    "night": ((25, 30, 60), (40, 55, 50)),
}
FADE = 800  # sound samples over which a thing begins and ends to sound: 50 ms
Pose = tuple[int, int, int, int]  # x and y of the centre, size (pixels), angle (degrees)


class Renderer:
    """A renderer of scenes as frames, masks and sound.

    It holds the things and the backgrounds.
    """

    def __init__(self, folder: str | None = None):
        """Take the things of a folder (see load_things), or the drawn ones."""
        self.things = load_things(folder) if folder else draw_things()
        self.places = {name: paint_place(*colours) for name, colours in PLACES.items()}

    def scene(self, split: str, kind: str, index: int, seed: int = 0) -> Scene:
        """Make a scene of these things and places, see make_scene."""
        return make_scene(self.things, list(self.places), split, kind, index, seed)

    def frames(self, scene: Scene, times: Iterable[float]) -> np.ndarray:
        """Draw the scene at the given seconds: (T, 96, 96, 3) uint8."""
        # Poses are rounded, so that many frames are equal. Each is drawn once, and so is each
        # turned and resized cut-out.
        drawn: dict[Hashable, np.ndarray] = {}
        cutouts: dict[tuple, np.ndarray] = {}
        frames = []
        for t in times:
            look = appearance(scene, t)
            if look not in drawn:
                drawn[look] = self.draw(scene, look, cutouts)
            frames.append(drawn[look])
        return np.stack(frames)  # (T, 96, 96, 3)

    def draw(self, scene: Scene, look: Hashable, cutouts: dict) -> np.ndarray:
        """Draw one frame (96, 96, 3).

        Args:
            look: its `appearance`.
            cutouts: those of earlier frames, by thing, size and angle; new ones are added.
        """
        place = self.places[scene.place]
        if scene.kind == "face":
            return draw_face(place, scene, look)
        frame = np.array(place)
        for thing, (x, y, size, angle) in look:
            if (thing, size, angle) not in cutouts:
                cutouts[thing, size, angle] = self.cutout(thing, size, angle)
            blend(frame, cutouts[thing, size, angle], x, y)
        return frame

    def cutout(self, thing: int, size: int, angle: int) -> np.ndarray:
        """Return a thing's RGBA picture (h, w, 4) in a size and at an angle."""
        return cutout(self.things[thing].sprite, size, angle)

    def mask(self, scene: Scene, obj: Object, t: float) -> np.ndarray:
        """Return the pixels of an object at second t: (96, 96) uint8 of 0 or 255.

        All are 0 where it is not seen.
        """
        silhouette = np.zeros((SIZE, SIZE, 3), np.uint8)
        if obj.seen_at(t):
            x, y, size, angle = pose(scene, obj, t)
            cutout = self.cutout(obj.thing, size, angle).copy()
            cutout[..., :3] = 255
            blend(silhouette, cutout, x, y)
        return np.where(silhouette[..., 0] > 127, 255, 0).astype(np.uint8)

    def wave(self, scene: Scene) -> np.ndarray:
        """Mix the sound track (160000,) float32.

        It has every heard span of every object, and a hiss.
        """
        rng = np.random.default_rng([3, SPLITS[scene.split], KINDS[scene.kind], scene.index])
        track = rng.standard_normal(SECONDS * RATE).astype(np.float32) * 0.002
        if scene.kind == "face":
            return np.clip(track + speak(scene.emotion, scene.voice, rng), -1, 1)

        # Each span fades in and out, and is a little louder or softer than the others.
        for obj in scene.objects:
            for start, end in obj.heard:
                length = (end - start) * RATE
                ramp = np.minimum(np.arange(length), np.arange(length)[::-1]) / FADE
                fade = np.minimum(1, ramp).astype(np.float32)
                loudness = float(rng.uniform(0.6, 1))
                sound = self.things[obj.thing].wave[:length]
                track[start * RATE : end * RATE] += loudness * fade * sound
        return np.clip(track, -1, 1)


def paint_place(sky: tuple, ground: tuple) -> Image.Image:
    """Paint sky and ground with a light gradient from top to bottom: (96, 96) RGB."""
    rows = np.arange(SIZE)[:, None, None]  # (96, 1, 1)
    gradient = np.linspace(-14, 14, SIZE)[:, None, None]
    columns = np.where(rows < 58, sky, ground) + gradient  # (96, 1, 3)
    picture = columns.repeat(SIZE, 1)  # (96, 96, 3)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def appearance(scene: Scene, t: float) -> Hashable:
    """Return all that a frame depends on.

    This is the mouth of a face, or (thing, pose) of all in sight.
    """
    if scene.kind == "face":
        return mouth_opening(scene, t)
    visible = [obj for obj in scene.objects if obj.seen_at(t)]
    return tuple((obj.thing, pose(scene, obj, t)) for obj in visible)


def pose(scene: Scene, obj: Object, t: float) -> Pose:
    """Return where an object is at second t, in whole pixels and steps of six degrees."""
    turn = 2 * math.pi * t
    x, y, size, angle = obj.x, obj.y, obj.size, 0
    match scene.movement:
        case "bouncing":
            y += 20 - 44 * abs(math.sin(turn / 8))
        case "sliding":
            x += 26 * math.sin(turn / 7)
        case "circling":
            x += 24 * math.cos(turn / 8)
            y += 24 * math.sin(turn / 8)
        case "spinning":
            angle = 30 * t
        case "growing":
            size *= 0.5 + 0.11 * t
        case "shrinking":
            size *= 1.6 - 0.11 * t
        case _:
            # Every thing sways, each in its own time.
            sway = math.sin(turn * 0.5 + obj.size)
            angle = 18 * round(sway)
            y -= 3 * abs(sway)
            # At whole and half seconds a trembling thing is where it would be at rest.
            x += 6 * obj.trembles * math.sin(2 * turn)
    return round(x), round(y), round(size), round(angle / 6) * 6 % 360


def blend(frame: np.ndarray, cutout: np.ndarray, x: int, y: int) -> None:
    """Paint an RGBA cut-out (h, w, 4) onto a frame (H, W, 3) in place.

    Its centre is at (x, y). What reaches over the border is cut off.
    """
    # Where the cut-out lies in the frame, and the part of this that is within the border.
    height, width = cutout.shape[:2]
    top, left = y - height // 2, x - width // 2
    y0, y1 = max(top, 0), min(top + height, frame.shape[0])
    x0, x1 = max(left, 0), min(left + width, frame.shape[1])
    if y0 >= y1 or x0 >= x1:
        return

    # Weights of 0 to 255, in whole numbers: the same result on every machine.
    part = cutout[y0 - top : y1 - top, x0 - left : x1 - left].astype(np.uint16)
    alpha = part[..., 3:]
    region = frame[y0:y1, x0:x1]
    region[:] = (region * (255 - alpha) + part[..., :3] * alpha + 127) // 255
