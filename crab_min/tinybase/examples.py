"""Examples for the tiny base's LM: scenes as prompts with media.

They are shown in different views.

Shapes: T frames or pieces of sound, N samples of a piece.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from crab_min.backbones.composed import SPECIALS, ComposedModel
from crab_min.interface import PromptPart
from crab_min.tinybase.captions import pair_statements, scene_statements
from crab_min.tinybase.pretrain_encoders import augment
from crab_min.world.rendering import Renderer
from crab_min.world.scenes import Scene
from crab_min.world.things import RATE, SECONDS


@dataclass
class Example:
    """A prompt with its media, and a function that samples true statements about them.

    A medium is (kind, frames (T, 96, 96, 3) or pieces of sound (T, N)) until `encode_examples` puts
    its features there.
    """

    parts: list[PromptPart]
    media: list
    sample_statements: Callable[..., list[str]]


class Recorder:
    """A recorder of scenes, with a little noise, as the parts and media of a prompt."""

    def __init__(self, renderer: Renderer, rng: random.Random):
        self.renderer, self.rng = renderer, rng
        self.noise = np.random.default_rng(rng.randrange(10**9))
        self.parts: list[PromptPart] = []
        self.media: list[tuple[str, np.ndarray]] = []

    def add(self, kind: str, scene: Scene, seconds: Sequence[float], name: str = "") -> None:
        """Record a medium and append it to the prompt, on a line of its own.

        Args:
            seconds: those of the frames; of a sound a range, whose step is the length of a piece.
            name: stands before the medium; without one, half of the time its kind does.
        """
        if kind == "audio":
            wave = augment(self.renderer.wave(scene), self.noise)
            wave = wave[seconds.start * RATE : seconds.stop * RATE]
            medium = wave.reshape(-1, seconds.step * RATE)  # (T, N)
        else:
            medium = augment(self.renderer.frames(scene, seconds), self.noise)  # (T, 96, 96, 3)
        self.media.append((kind, medium))

        if not name and self.rng.random() < 0.5:
            name = kind
        marker = f"{name}: " if name else ""
        line_end = "\n" if self.parts else ""
        self.parts += [PromptPart("text", text=line_end + marker), PromptPart(kind)]


def make_example(
    renderer: Renderer,
    scenes: Sequence[Scene],
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
    recorder = Recorder(renderer, rng)
    frame_at = frame_at or rng.randrange(SECONDS) + 0.5
    view = view or rng.choice(single_views(scene))
    piece_seconds = rng.choice([1, 1, 2])
    if view in ("pair", "frames"):
        return make_pair_example(recorder, scenes, one_frame=view == "frames")

    # frames
    shown = {"video": view != "audio", "frame_at": None, "audio": None}
    length = 4 if scene.kind == "face" else SECONDS  # frames of a video, seconds of its sound
    if view == "clip":
        recorder.add("video", scene, middles(length))
    elif view != "audio":
        recorder.add("image", scene, [frame_at])
        shown["frame_at"] = frame_at

    # sound
    if view == "moment":
        start = int(frame_at) // piece_seconds * piece_seconds
        shown["audio"] = range(start, start + piece_seconds)
        recorder.add("audio", scene, range(start, start + piece_seconds, piece_seconds))
    elif view != "image":
        shown["audio"] = range(length)
        recorder.add("audio", scene, shown["audio"])
    sample_statements = partial(scene_statements, renderer, scene, rng, **shown)
    return Example(recorder.parts, recorder.media, sample_statements)


def single_views(scene: Scene) -> list[str]:
    """Return the views that suit a scene, the likelier ones several times."""
    if scene.kind in ("face", "action"):  # one frame shows no movement
        return ["audio", "clip", "clip"]
    return ["image", "image", "audio", "clip", "clip", "clip", "moment", "moment", "still"]


def middles(count: int) -> list[float]:
    """Return the middle second of each of `count` shares of a clip."""
    return [(i + 0.5) * SECONDS / count for i in range(count)]


def make_pair_example(recorder: Recorder, scenes: Sequence[Scene], one_frame: bool) -> Example:
    """Show the views "pair", or with `one_frame` "frames", of three scenes."""
    first, second, third = scenes
    whole = {"video": middles(SECONDS), "audio": range(SECONDS)}
    kind = recorder.rng.choice(["video", "audio"])
    if one_frame:
        kind, whole["video"] = "video", middles(1)
    else:
        other = "audio" if kind == "video" else "video"
        recorder.add(other, third, whole[other])
    recorder.add(kind, first, whole[kind], f"{kind} one")
    recorder.add(kind, second, whole[kind], f"{kind} two")
    sample_statements = partial(pair_statements, [first, second], third, kind, recorder.rng)
    return Example(recorder.parts, recorder.media, sample_statements)


def make_copy_example(tokenizer, rng: random.Random) -> Example:
    """Make a prompt of random tokens; the one true statement is these tokens again.

    Copying is all that the base can learn about words that no statement uses.
    """
    length = rng.randint(3, 14)
    ids = [rng.randrange(len(SPECIALS), len(tokenizer)) for _ in range(length)]
    text = tokenizer.decode(ids)
    return Example([PromptPart("text", text=text)], [], lambda forms: [text])


def encode_examples(model: ComposedModel, examples: list[Example]) -> None:
    """Replace the media of some examples by their features.

    Those of one shape are encoded in one pass.
    """
    groups = defaultdict(list)  # (kind, shape) -> where the media are: (example, index)
    for example in examples:
        for i, (kind, array) in enumerate(example.media):
            groups[kind, array.shape].append((example, i))
    for (kind, _), places in groups.items():
        arrays = [example.media[i][1] for example, i in places]
        for (example, i), features in zip(places, model.encode(kind, arrays)):
            example.media[i] = features
