"""Ablation of a modality: the same questions with other sounds, or with black pictures."""

from dataclasses import replace

from crab_min.data import BLACK, Sample


def ablate_modality(samples: list[Sample], modality: str) -> list[Sample]:
    """Return the same questions without the information of a modality.

    Args:
        modality: "audio" replaces every sound by that of another clip of the same task; "video"
            makes all pictures black.

    Returns:
        The changed samples, in the same order.
    """
    if modality == "video":
        return [with_black_pictures(sample) for sample in samples]

    # sounds are exchanged within a task
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.task.name, []).append(sample)
    changed = {}
    for group in groups.values():
        changed |= {sample.id: sample for sample in with_other_sounds(group)}
    return [changed[sample.id] for sample in samples]


def with_black_pictures(sample: Sample) -> Sample:
    """Make every video and image of a sample black."""
    parts = []
    for part in sample.parts:
        if part.kind in ("video", "image"):
            part = replace(part, path=BLACK)
        parts.append(part)
    return replace(sample, parts=parts)


def with_other_sounds(group: list[Sample]) -> list[Sample]:
    """Give each sample of a task the sounds of the sample that is half the group away."""
    sounds = [sound_paths(sample) for sample in group]
    changed = []
    for i, sample in enumerate(group):
        paths = iter(other_sounds(sounds, i))
        parts = []
        for part in sample.parts:
            if part.kind == "audio":
                part = replace(part, path=next(paths))
            parts.append(part)
        changed.append(replace(sample, parts=parts))
    return changed


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
