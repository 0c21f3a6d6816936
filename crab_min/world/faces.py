"""Faces and voices of the built-in world: six emotions to see and to hear."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from crab_min.world.scenes import Scene
from crab_min.world.things import RATE, SECONDS, SIZE

SKINS = ("#f2c9a0", "#d9a066", "#a86b3c", "#6e4426")
HAIRS = ("#2b1b10", "#8b5a2b", "#d9b25f", "#555555")


@dataclass(frozen=True)
class Expression:
    """The features of a face, in face units: the face is 100 units high."""

    brow: int  # height of the brows, from the top
    tilt: int  # of the brows; above 0 the inner ends are down
    eye: int  # half the height of an eye
    curve: int  # of the mouth; above 0 it smiles, at 0 it is straight or round


@dataclass(frozen=True)
class Speech:
    """The features of a voice."""

    rate: float  # syllables per second
    pitch: float  # factor on the pitch of the speaker
    swing: float  # relative change of the pitch during a syllable
    loudness: float
    tremble: float  # depth of a tremble at 11 Hz, 0 to 1
    brightness: float  # level of the higher harmonics


# fmt: off
EXPRESSIONS = {
    "happy":    Expression(29, 0, 7, 12),
    "sad":      Expression(28, -5, 5, -9),
    "angry":    Expression(33, 6, 5, -8),
    "surprise": Expression(20, 0, 12, 0),
    "fear":     Expression(22, -6, 11, -6),
    "neutral":  Expression(30, 0, 6, 0),
}
SPEECHES = {
    "happy":    Speech(5, 1.35, .25, .9, 0, .6),
    "sad":      Speech(2, .85, -.25, .4, 0, .25),
    "angry":    Speech(6, 1.1, .08, 1.3, 0, 1.0),
    "surprise": Speech(3, 1.7, .7, 1.0, 0, .5),
    "fear":     Speech(7, 1.5, .05, .6, .5, .5),
    "neutral":  Speech(3.5, 1.0, 0, .7, 0, .4),
}
# fmt: on


def mouth_opening(scene: Scene, t: float) -> int:
    """Return how far the mouth is open at second t, from 0 to 3.

    It opens in step with the syllables.
    """
    return round(3 * abs(math.sin(math.pi * t * SPEECHES[scene.emotion].rate / 2)))


class FaceCanvas:
    """A large picture that is drawn on in face units.

    (50, 50) is the centre of the face.
    """

    def __init__(self, background: Image.Image, scene: Scene):
        # Four times as large as the frame, to be averaged at the end: smooth edges.
        self.picture = background.resize((4 * SIZE, 4 * SIZE), Image.NEAREST)
        self.pen = ImageDraw.Draw(self.picture)
        self.person = scene.objects[0]

    def corners(self, *values: float) -> list[float]:
        """Convert x, y, x, y from face units to pixels of the large picture."""
        unit = 4 * self.person.size / 100
        centre = (4 * self.person.x, 4 * self.person.y)
        return [centre[i % 2] + (value - 50) * unit for i, value in enumerate(values)]

    def ellipse(self, x: float, y: float, half_width: float, half_height: float, **style) -> None:
        """Draw an ellipse about (x, y)."""
        corners = self.corners(x - half_width, y - half_height, x + half_width, y + half_height)
        self.pen.ellipse(corners, **style)


def draw_face(background: Image.Image, scene: Scene, opening: int) -> np.ndarray:
    """Draw the face of a scene, the mouth open by 0 to 3: (96, 96, 3) uint8."""
    canvas = FaceCanvas(background, scene)
    face = EXPRESSIONS[scene.emotion]
    canvas.pen.ellipse(canvas.corners(6, 0, 94, 70), fill=HAIRS[scene.hair])
    canvas.pen.ellipse(canvas.corners(12, 8, 88, 98), fill=SKINS[scene.skin], outline="#00000080")
    for direction in (-1, 1):
        draw_eye(canvas, face, direction)
    if scene.masked:
        canvas.pen.rectangle(canvas.corners(22, 60, 78, 90), fill="#dfeefa")
    else:
        draw_mouth(canvas, face, 2.5 * opening)
    return np.asarray(canvas.picture.resize((SIZE, SIZE), Image.BOX))


def draw_eye(canvas: FaceCanvas, face: Expression, direction: int) -> None:
    """Draw an eye with its pupil and brow.

    direction: -1 for the left one, 1 for the right one.
    """
    x = 50 + direction * 17
    canvas.ellipse(x, 44, 8, face.eye, fill="#ffffff", outline="#000000", width=4)
    canvas.ellipse(x, 44, 4, min(face.eye, 4), fill="#101010")
    inner, outer = 50 + direction * 8, 50 + direction * 27
    brow = canvas.corners(inner, face.brow + face.tilt, outer, face.brow - face.tilt)
    canvas.pen.line(brow, fill="#1a1008", width=14)


def draw_mouth(canvas: FaceCanvas, face: Expression, opened: float) -> None:
    """Draw the mouth, opened by so many units up and down."""
    if face.curve == 0:
        # Round and tall where the eyes are wide (surprise), straight otherwise (neutral).
        half_width, half_height = (8, 7) if face.eye > 9 else (16, 2)
        canvas.ellipse(50, 72, half_width, half_height + opened, fill="#5c1010")
        return
    height = abs(face.curve) + opened
    start, end = (0, 180) if face.curve > 0 else (180, 360)
    canvas.pen.chord(canvas.corners(30, 72 - height, 70, 72 + height), start, end, fill="#5c1010")


def speak(emotion: str, pitch: int, rng: np.random.Generator) -> np.ndarray:
    """Synthesise ten seconds of a wordless voice (160000,) float32 with an emotion.

    pitch: of the speaker, Hz. The emotion tells in rhythm, melody, loudness and tremble.
    """
    speech = SPEECHES[emotion]
    rate = speech.rate * float(rng.uniform(0.92, 1.08))
    t = np.arange(SECONDS * RATE) / RATE  # (N,), seconds
    syllable = t * rate % 1  # (N,), position within the syllable, 0 to 1
    melody = pitch * speech.pitch * (1 + speech.swing * syllable)  # (N,), Hz
    phase = 2 * np.pi * np.cumsum(melody) / RATE

    # Fifteen harmonics around a formant at 700 Hz. The k-th power of e^(i phase) is the k-th one.
    rotation = np.exp(1j * phase)
    harmonic, tone = 1, 0
    for k in range(1, 16):
        harmonic = harmonic * rotation
        level = math.exp(-((k * pitch / 700 - 1) ** 2))
        level *= 1 if k < 4 else speech.brightness
        tone = tone + level * harmonic.imag

    envelope = np.sin(np.pi * syllable) ** 0.7
    tremble = 1 - speech.tremble * (0.5 + 0.5 * np.sin(2 * np.pi * 11 * t))
    return (0.08 * speech.loudness * tone * envelope * tremble).astype(np.float32)
