"""What answers rest on: the same questions with a modality taken away."""

from dataclasses import replace

from crab_min.data import BLACK, Sample


def ablate_modality(samples: list[Sample], modality: str) -> list[Sample]:
    """Return the same questions without a modality.

    Args:
        modality: "audio": every sound is that of another clip of its task; "video": all pictures
            are black.
    """
    if modality == "video":
        return [with_black_pictures(sample) for sample in samples]
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
        is_picture = part.kind in ("video", "image")
        parts.append(replace(part, path=BLACK) if is_picture else part)
    return replace(sample, parts=parts)


def with_other_sounds(group: list[Sample]) -> list[Sample]:
    """Give each sample of a task the sounds of a sample half the group further on."""
    sounds = [[part.path for part in sample.media if part.kind == "audio"] for sample in group]
    changed = []
    for i, sample in enumerate(group):
        other = iter(other_sounds(sounds, i))
        parts = []
        for part in sample.parts:
            parts.append(replace(part, path=next(other)) if part.kind == "audio" else part)
        changed.append(replace(sample, parts=parts))
    return changed


def other_sounds(sounds: list[list[str]], index: int) -> list[str]:
    """Find the next sounds, half the list further on, none of which are those at `index`."""
    half = len(sounds) // 2
    for step in range(len(sounds)):
        candidate = sounds[(index + half + step) % len(sounds)]
        if not set(candidate) & set(sounds[index]):
            return candidate
    return sounds[index]
