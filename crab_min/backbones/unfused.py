"""CREMA's prompt without fusion, as its zero-shot runs have it (2402.05889).

    [P_t, Z_t, Z^m_t, ...]_t, Z^audio, P^points, Z^points, question
    P^audio, Z^audio, question                                       a sound alone
    P^audio, Z^points, question                                      points alone, as released

P_t are the words "Frame t: ". Pictures (flow, depth, normals) have the steps of the video and stand
beside its frames. A sound and points have steps of their own, and stand behind the video. A
modality that a clip lacks is left out.

A prompt is a list of steps. Both its token ids and its tokens follow this list.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

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


def steps_of(medium: MediaFeatures, names: list[str], frame_prefix: str) -> list[Step]:
    """Return the steps of a video with its side modalities, or of a modality by itself.

    Args:
        names: the side modalities in the order of the prompt.
    """
    if medium.kind not in VIDEO:
        return stream_steps(medium.kind, len(medium.features), ALONE)
    present = [name for name in names if name in medium.sides]
    steps = []
    for t in range(len(medium.features)):
        steps.append(Step(frame_prefix.format(t + 1), "rgb", t))
        for name in present:
            if name not in STREAMS:
                last = len(medium.sides[name].features) - 1
                steps.append(Step("", name, min(t, last)))
    for name in present:
        if name in STREAMS:
            steps += stream_steps(name, len(medium.sides[name].features), STREAMS[name])
    return steps


def stream_steps(name: str, count: int, words: str) -> list[Step]:
    """Return all steps of a sound or of points; the words stand before the first one."""
    return [Step("" if index else words, name, index) for index in range(count)]


def unfused_tokens(model, media: list[MediaFeatures]) -> list[Tensor]:
    """Compute the tokens (steps * Q, D) of each medium of a prompt, in the order of its steps.

    Args:
        model: a CremaModel.
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
        tokens.append(torch.cat([encoded[step.modality, i][step.index] for step in steps]))
    return tokens
