"""Ablation of a modality: the same questions with other sounds or black pictures."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import repeat

from crab_min.data import BLACK, Sample
from crab_min.evaluation.scores import by_task


def ablate_modality(samples: list[Sample], modality: str) -> list[Sample]:
    """Return the same questions without the information of a modality.

    Args:
        modality: "audio" replaces every sound by that of another clip of the same task; "video"
            makes all pictures black.

    Returns:
        The changed samples, in the same order.
    """
    if modality == "video":
        return [with_paths(sample, ("video", "image"), repeat(BLACK)) for sample in samples]

    # sounds are exchanged within a task
    changed = {}
    for rows in by_task(samples).values():
        sounds = [sound_paths(sample) for (sample,) in rows]
        for i, (sample,) in enumerate(rows):
            changed[sample.id] = with_paths(sample, ("audio",), other_sounds(sounds, i))
    return [changed[sample.id] for sample in samples]


def with_paths(sample: Sample, kinds: tuple[str, ...], paths: Iterable[str]) -> Sample:
    """Give the media of some kinds other paths, in their order."""
    paths = iter(paths)
    parts = []
    for part in sample.parts:
        if part.kind in kinds:
            part = replace(part, path=next(paths))
        parts.append(part)
    return replace(sample, parts=parts)


def sound_paths(sample: Sample) -> list[str]:
    """Return the files of a sample's sounds."""
    return [part.path for part in sample.media if part.kind == "audio"]


def other_sounds(sounds: list[list[str]], index: int) -> list[str]:
    """Find the sounds of a sample that shares none with the sample at `index`.

    Args:
        sounds: the sounds of each sample; the search begins half the list behind `index`.
    """
    half = len(sounds) // 2
    for step in range(len(sounds)):
        candidate = sounds[(index + half + step) % len(sounds)]
        if not set(candidate) & set(sounds[index]):
            return candidate
    return sounds[index]
