"""Examples for the tiny base's LM: scenes shown as prompts with media, in different views.

Shapes: T frames or pieces of sound, N samples of a wave, F frames of a filter bank, S encoder
tokens per piece, W encoder width.
"""

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from crab_min.backbones.composed import SPECIALS, ComposedModel
from crab_min.encoders import MediaFeatures
from crab_min.interface import PromptPart
from crab_min.tinybase.captions import pair_statements, scene_statements
from crab_min.tinybase.pretrain_encoders import augment, fbank_pieces
from crab_min.world.rendering import Renderer
from crab_min.world.scenes import Scene
from crab_min.world.things import SECONDS


@dataclass
class RawMedium:
    """A medium before it is encoded."""

    kind: str  # "image", "video" or "audio"
    array: np.ndarray  # frames (T, 96, 96, 3) uint8, or a wave (N,) float32
    pieces: range = range(0)  # of the wave: those that are given
    piece_seconds: int = 0  # length of one piece


@dataclass
class Recorder:
    """Records a scene as a medium, with a little noise."""

    renderer: Renderer
    noise: np.random.Generator

    def image(self, scene: Scene, second: float) -> RawMedium:
        return RawMedium("image", augment(self.renderer.frames(scene, [second]), self.noise))

    def video(self, scene: Scene, frames: int) -> RawMedium:
        """Record `frames` frames, each in the middle of its share of the clip."""
        times = [(i + 0.5) * SECONDS / frames for i in range(frames)]
        return RawMedium("video", augment(self.renderer.frames(scene, times), self.noise))

    def audio(self, scene: Scene, pieces: range, piece_seconds: int = 1) -> RawMedium:
        wave = augment(self.renderer.wave(scene), self.noise)
        return RawMedium("audio", wave, pieces, piece_seconds)


@dataclass
class Example:
    """A prompt with its media, and a function that samples true statements about them.

    The media are RawMedium until `encode_examples` puts features in their place.
    """

    parts: list[PromptPart] = field(default_factory=list)
    media: list[RawMedium | MediaFeatures] = field(default_factory=list)
    sample_statements: Callable[..., list[str]] | None = None

    def add(self, medium: RawMedium, rng: random.Random, name: str = "") -> None:
        """Append a medium to the prompt, on a line of its own.

        Args:
            name: stands before the medium; without one, half of the time its kind does.
        """
        if not name and rng.random() < 0.5:
            name = medium.kind
        marker = f"{name}: " if name else ""
        line_end = "\n" if self.parts else ""
        self.parts.append(PromptPart("text", text=line_end + marker))
        self.parts.append(PromptPart(medium.kind))
        self.media.append(medium)


def make_example(
    renderer: Renderer,
    scenes: list[Scene],
    rng: random.Random,
    view: str = "",
    frame_at: float | None = None,
) -> Example:
    """Show one scene, or three in a view of several media.

    Views of one scene:

        image   one frame
        audio   the sound track
        clip    ten frames and the sound track (of a face four frames and four seconds)
        still   one frame and the sound track
        moment  one frame and the one or two seconds of sound around it

    Views of three scenes:

        pair    two videos and the sound of the third scene, or two sounds and its video
        frames  two videos of one frame; the third scene is not shown

    Args:
        view: "" for any view of one scene.
        frame_at: the second of the frame; None for any.
    """
    # sampled for every view, used or not
    scene = scenes[0]
    recorder = Recorder(renderer, np.random.default_rng(rng.randrange(10**9)))
    frame_at = frame_at or rng.randrange(SECONDS) + 0.5
    view = view or rng.choice(single_views(scene))
    piece_seconds = rng.choice([1, 1, 2])
    if view in ("pair", "frames"):
        return make_pair_example(recorder, scenes, rng, one_frame=view == "frames")

    # frames
    example = Example()
    has_image = view in ("image", "moment", "still")
    length = 4 if scene.kind == "face" else SECONDS  # frames of a video, seconds of its sound
    if has_image:
        example.add(recorder.image(scene, frame_at), rng)
    if view == "clip":
        example.add(recorder.video(scene, length), rng)

    # sound
    heard = None
    if view in ("audio", "clip", "still"):
        heard = range(length)
        example.add(recorder.audio(scene, heard), rng)
    if view == "moment":
        piece = int(frame_at) // piece_seconds
        heard = range(piece * piece_seconds, (piece + 1) * piece_seconds)
        example.add(recorder.audio(scene, range(piece, piece + 1), piece_seconds), rng)

    shown = {"video": view != "audio", "frame_at": frame_at if has_image else None, "audio": heard}
    example.sample_statements = partial(scene_statements, renderer, scene, rng, **shown)
    return example


def single_views(scene: Scene) -> list[str]:
    """Return the views that suit a scene, the likelier ones several times."""
    if scene.kind in ("face", "action"):  # one frame shows no movement
        return ["audio", "clip", "clip"]
    return ["image", "image", "audio", "clip", "clip", "clip", "moment", "moment", "still"]


def make_pair_example(
    recorder: Recorder, scenes: list[Scene], rng: random.Random, one_frame: bool
) -> Example:
    """Show the views "pair", or with `one_frame` "frames", of three scenes."""
    example = Example()
    first, second, third = scenes
    kind, frames = rng.choice(["video", "audio"]), SECONDS
    if one_frame:
        kind, frames = "video", 1
    elif kind == "video":
        example.add(recorder.audio(third, range(SECONDS)), rng)
    else:
        example.add(recorder.video(third, frames), rng)
    for number, scene in (("one", first), ("two", second)):
        if kind == "video":
            medium = recorder.video(scene, frames)
        else:
            medium = recorder.audio(scene, range(SECONDS))
        example.add(medium, rng, name=f"{kind} {number}")
    example.sample_statements = partial(pair_statements, [first, second], third, kind, rng)
    return example


def make_copy_example(tokenizer, rng: random.Random) -> Example:
    """Make a prompt of random tokens; the one true statement is these tokens again.

    Copying is all that the base can learn about words that no statement uses.
    """
    length = rng.randint(3, 14)
    ids = [rng.randrange(len(SPECIALS), len(tokenizer)) for _ in range(length)]
    text = tokenizer.decode(ids)
    return Example([PromptPart("text", text=text)], [], lambda forms: [text])


@torch.no_grad()
def encode_examples(model: ComposedModel, examples: list[Example]) -> None:
    """Replace the media of some examples by their features, in one pass per kind and length."""
    groups = defaultdict(list)  # (kind, length) -> where the media are: (example, index)
    for example in examples:
        for i, medium in enumerate(example.media):
            length = medium.piece_seconds if medium.kind == "audio" else len(medium.array)
            groups[medium.kind, length].append((example, i))
    for (kind, length), places in groups.items():
        media = [example.media[i] for example, i in places]
        if kind == "audio":
            features = encode_audio(model, media, length)
        else:
            features = model.encode(kind, [medium.array for medium in media])
        for (example, i), encoded in zip(places, features):
            example.media[i] = encoded


def encode_audio(
    model: ComposedModel, media: list[RawMedium], piece_seconds: int
) -> list[MediaFeatures]:
    """Encode the pieces of several waves, all pieces of the same length."""
    banks = fbank_pieces(np.stack([medium.array for medium in media]), piece_seconds)
    given = [bank[list(medium.pieces)] for bank, medium in zip(banks, media)]  # (T, F, 128) each
    encoded, _ = model.audio.beats(torch.cat(given))  # (sum of T, S, W)
    features = []
    for pieces in encoded.split([len(bank) for bank in given]):  # (T, S, W)
        mask = torch.ones(pieces.shape[:2], dtype=torch.bool)  # (T, S)
        features.append(MediaFeatures("audio", pieces, mask))
    return features
