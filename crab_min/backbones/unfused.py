"""CREMA's prompt without fusion, as its zero-shot runs have it (2402.05889).

    [P_t, Z_t, Z^m_t, ...]_t, Z^audio, P^points, Z^points, question
    P^audio, Z^audio, question                                       a sound alone
    P^audio, Z^points, question                                      points alone, as released

P_t are the words "Frame t: ". Pictures (flow, depth, normals) have the steps of the video and stand
beside its frames. A sound and points have steps of their own, and stand behind the video. A
modality that a clip lacks is left out. A base with an embedding of time has it on every step.

A prompt is a list of steps. Both its token ids and its tokens follow this list.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crab_min.backbones.composed import add_embeddings
from crab_min.encoders import MediaFeatures

# modalities with steps of their own -> the words before them behind a video
STREAMS = {"audio": "", "points": "3D Model: "}
ALONE = "Audio: "  # before a sound or points without a video
VIDEO = ("video", "image")  # kinds of media; any other is a modality by itself


@dataclass
class Step:
    """The Q tokens of one step of a modality, with the words before them."""

    words: str
    modality: str
    index: int
    time: int  # the frame of the video at its time; without a video its index


def steps_of(medium: MediaFeatures, names: list[str], frame_prefix: str) -> list[Step]:
    """Return the steps of a video with its side modalities, or of a modality by itself.

    Args:
        names: the side modalities in the order of the prompt.
    """
    if medium.kind not in VIDEO:
        count = len(medium.features)
        return stream_steps(medium.kind, count, ALONE, frames=count)
    present = [name for name in names if name in medium.sides]
    frames = len(medium.features)
    steps = []
    for t in range(frames):
        steps.append(Step(frame_prefix.format(t + 1), "rgb", t, t))
        for name in present:
            if name not in STREAMS:
                last = len(medium.sides[name].features) - 1
                steps.append(Step("", name, min(t, last), t))
    for name in present:
        if name in STREAMS:
            steps += stream_steps(name, len(medium.sides[name].features), STREAMS[name], frames)
    return steps


def stream_steps(name: str, count: int, words: str, frames: int) -> list[Step]:
    """Return all steps of a sound or of points; the words stand before the first one."""
    steps = []
    for index in range(count):
        steps.append(Step("" if index else words, name, index, index * frames // count))
    return steps


def unfused_tokens(model, media: list[MediaFeatures], media_index: list[int]) -> list[Tensor]:
    """Compute the tokens (steps * Q, D) of each medium of a prompt, in the order of its steps.

    Args:
        model: a CremaModel.
        media_index: as for add_embeddings.
    """
    # each modality of all media in one call
    sources: dict[str, list[tuple[int, MediaFeatures]]] = {}
    for i, medium in enumerate(media):
        own = "rgb" if medium.kind in VIDEO else medium.kind
        sources.setdefault(own, []).append((i, medium))
        for name in model.side_names:
            if name in medium.sides:
                sources.setdefault(name, []).append((i, medium.sides[name]))
    encoded: dict[tuple[str, int], Tensor] = {}
    for name, of_media in sources.items():
        lengths = [len(features.features) for _, features in of_media]
        tokens = model.encode_modality(name, [features for _, features in of_media])
        for (i, _), own_tokens in zip(of_media, tokens.split(lengths)):
            encoded[name, i] = own_tokens  # (its steps, Q, D)

    tokens = []
    for i, medium in enumerate(media):
        steps = steps_of(medium, model.side_names, model.frame_prefix)
        own = torch.stack([encoded[step.modality, i][step.index] for step in steps])
        times = torch.tensor([step.time for step in steps], device=own.device)
        number = media_index[i : i + 1]
        own = add_embeddings(own, [len(steps)], number, model.time, model.number, times)
        tokens.append(own.flatten(0, 1))
    return tokens
