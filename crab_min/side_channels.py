"""Side channels of a video in its prompt (PAVE, CREMA).

They are sound, flow, depth, a dense stream.

In these two papers the prompt has no sound of its own. A side channel is a named prompt part right
behind its video. PAVE adds it to the video's tokens, and CREMA fuses it with them.
"""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from crab_min.config import DataConfig
from crab_min.data import Sample
from crab_min.encoders import ENCODERS
from crab_min.errors import DataError
from crab_min.interface import PromptPart
from crab_min.media.arrays import POINTS
from crab_min.tasks import Task

AUDIO_MARKER = re.compile(r"\s*audio( one| two)?: ")  # what build_prompt writes before a sound
VISUAL = ("video", "view", "flow", "array")  # kinds that have a number of frames


def add_side_channels(samples: list[Sample], names: list[str], needed: bool = True) -> list[Sample]:
    """Put the prompts of samples into the form of PAVE and CREMA.

    Args:
        names: side channels to put behind the video or image; without any, the sound is only
            removed.
        needed: every sample must have at least one of them.

    Raises:
        DataError: a sample has several videos or sounds, or none of the needed side channels.
    """
    return [add_to_prompt(sample, names, needed) for sample in samples]


def add_to_prompt(sample: Sample, names: list[str], needed: bool) -> Sample:
    """Put the prompt of one sample into the form of PAVE and CREMA."""
    # the side channels that the sample has
    sounds = [part for part in sample.media if part.kind == "audio"]
    pictures = [part for part in sample.media if part.kind in ("video", "image")]
    files = side_files(sample, pictures, sounds)
    sides = [side_part(name, files[name], pictures, sounds) for name in names if name in files]
    if names and (len(pictures) != 1 or len(sounds) > 1 or (needed and not sides)):
        raise DataError(
            f"{sample.id}: {len(pictures)} videos or images, {len(sounds)} sounds and the side "
            f"channels {', '.join(files) or 'none'}; {','.join(names)} want one video with at "
            'least one of them (rows of a .jsonl name their files under "sides")'
        )

    # each right behind the video, in the order of `names`
    parts = []
    for part in without_sound(sample.parts):
        parts.append(part)
        if part.kind in ("video", "image"):
            parts.extend(sides)
    return replace(sample, parts=parts)


def side_files(
    sample: Sample, pictures: list[PromptPart], sounds: list[PromptPart]
) -> dict[str, str]:
    """Return the file of each side channel that a sample has, by name.

    A row names files under "sides". If it names none, "audio" is the sample's sound and "fast" its
    video. "flow" and the channels of registered encoders are made of the video, unless "sides"
    names a file for them.
    """
    files: dict[str, str] = {}
    video = ""
    if pictures and pictures[0].kind == "video":
        video = pictures[0].path
        files |= dict.fromkeys(["flow", *ENCODERS], video)

    # files that the row names
    if sample.row.get("sides"):
        return files | {name: str(path) for name, path in sample.row["sides"].items() if path}

    # the sample's own media
    if sounds:
        files["audio"] = sounds[0].path
    if video:
        files["fast"] = video
    return files


def without_sound(parts: list[PromptPart]) -> list[PromptPart]:
    """Return a prompt without its sounds and their markers.

    Side channels that were added earlier are left out too.
    """
    kept = []
    for index, part in enumerate(parts):
        following = parts[index + 1].kind if index + 1 < len(parts) else ""
        is_marker = part.kind == "text" and AUDIO_MARKER.fullmatch(part.text)
        if part.side or part.kind == "audio" or (is_marker and following == "audio"):
            continue
        kept.append(part)
    return kept


def side_part(
    name: str, path: str, pictures: list[PromptPart], sounds: list[PromptPart]
) -> PromptPart:
    """Make the prompt part of a side channel.

    Its kind follows from its name and its file.
    """
    suffix = Path(path).suffix
    frames = pictures[0].frames if pictures else Task.frames
    span = {"start": pictures[0].start, "end": pictures[0].end} if pictures else {}

    # a stream of many frames, 3D points, and stored features
    if name == "fast":
        return PromptPart("fast", path=path, side=name, **span)
    if suffix == ".npz" or POINTS[0] in path:
        return PromptPart("points", path=path, side=name)
    if suffix in (".npy", ".pt", ".safetensors"):
        return PromptPart("array", path=path, frames=frames, side=name)

    # a sound keeps the window of the sample's own sound
    if name == "audio":
        sound = sounds[0] if sounds else PromptPart("audio")
        return replace(sound, path=path, side=name)

    # optical flow of the video itself, or pictures of another file
    made_of_video = name == "flow" and pictures and path == pictures[0].path
    kind = "flow" if made_of_video else "view"
    return PromptPart(kind, path=path, frames=frames, side=name, **span)


def limit_frames(samples: list[Sample], frames: int) -> list[Sample]:
    """Give every video and visual side channel this many frames; 0 changes nothing."""
    if not frames:
        return samples
    limited = []
    for sample in samples:
        parts = []
        for part in sample.parts:
            if part.kind in VISUAL:
                part = replace(part, frames=frames)
            parts.append(part)
        limited.append(replace(sample, parts=parts))
    return limited


def limit_media(samples: list[Sample], config: DataConfig) -> list[Sample]:
    """Give media the frames of --frames, within --max-frames and --max-audio-seconds."""
    samples = limit_frames(samples, config.frames)
    if not config.max_frames and not config.max_audio_seconds:
        return samples
    limited = []
    for sample in samples:
        parts = [within_limits(part, config) for part in sample.parts]
        limited.append(replace(sample, parts=parts))
    return limited


def within_limits(part: PromptPart, config: DataConfig) -> PromptPart:
    """Return a part with no more frames, or seconds of sound, than the settings allow."""
    if config.max_frames and part.kind in VISUAL and part.frames > config.max_frames:
        return replace(part, frames=config.max_frames)
    last = part.start + config.max_audio_seconds
    if config.max_audio_seconds and part.kind == "audio" and not 0 < part.end <= last:
        return replace(part, end=last)
    return part


def count_missing(samples: list[Sample], names: list[str]) -> dict[str, int]:
    """Count, by side channel, the samples that lack it."""
    present = Counter()
    for sample in samples:
        present.update({part.side for part in sample.media})
    return {name: len(samples) - present[name] for name in names}
