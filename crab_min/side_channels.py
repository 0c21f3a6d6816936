"""Side channels of a video in its prompt (PAVE, CREMA).

They are sound, flow, depth, a dense stream.

In these two papers the prompt has no sound of its own. A side channel is a named prompt part right
behind its video. PAVE adds it to the video's tokens, and CREMA fuses it with them.
"""

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from crab_min.config import DataConfig
from crab_min.data import Sample
from crab_min.encoders import ENCODERS
from crab_min.errors import DataError
from crab_min.interface import PromptPart
from crab_min.media.arrays import POINTS, SUFFIXES
from crab_min.media.kinds import media_kind
from crab_min.tasks import Task

AUDIO_MARKER = re.compile(r"\s*audio( one| two)?: ")  # what build_prompt writes before a sound
MARKER = re.compile(r"\s*(video|audio|image)( one| two)?: ")  # and before any medium
VISUAL = ("video", "view", "flow", "array")  # kinds that have a number of frames


def add_side_channels(
    samples: list[Sample],
    names: list[str],
    needed: bool = True,
    folders: dict[str, str] | None = None,
    with_video: bool = True,
) -> list[Sample]:
    """Put the prompts of samples into the form of PAVE and CREMA.

    Args:
        names: side channels to put behind the video or image; without any, the sound is only
            removed.
        needed: every sample must have at least one of them.
        folders: of side channels whose files are named like the clips (--features).
        with_video: False takes the video out; the side channels stand at the start of the prompt.

    Raises:
        DataError: a sample has several videos or sounds, or none of the side channels that it
            needs; no such folder.
    """
    chosen = {name: folder for name, folder in (folders or {}).items() if name in names}
    for name, folder in chosen.items():
        if not Path(folder).is_dir():
            raise DataError(f"--features {name}={folder}: no such folder")
    return [add_to_prompt(sample, names, needed, chosen, with_video) for sample in samples]


def add_to_prompt(
    sample: Sample, names: list[str], needed: bool, folders: dict[str, str], with_video: bool
) -> Sample:
    """Put the prompt of one sample into the form of PAVE and CREMA."""
    # the side channels that the sample has
    sounds = [part for part in sample.media if part.kind == "audio"]
    pictures = [part for part in sample.media if part.kind in ("video", "image")]
    files = side_files(sample, pictures, sounds)
    for medium in [*pictures, *sounds][:1]:
        clip = sample.row.get("clip_name") or clip_name(medium.path)
        files |= {name: feature_file(folder, clip) for name, folder in folders.items()}
    sides = []
    for name in names:
        views = view_files(files[name]) if name in files else []
        sides += [side_part(name, file, pictures, sounds) for file in views]
    if not with_video:
        return in_place_of_video(sample, sides, names)
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


def in_place_of_video(sample: Sample, sides: list[PromptPart], names: list[str]) -> Sample:
    """Return a sample whose only media are side channels, at the start of its prompt.

    Raises:
        DataError: it has none of them.
    """
    if not sides:
        raise DataError(f"{sample.id}: none of {','.join(names)}, and no video is shown here")
    texts = [part for part in sample.parts if part.kind == "text"]
    texts = [part for part in texts if not MARKER.fullmatch(part.text)]
    return replace(sample, parts=[*sides, *texts])


def side_files(
    sample: Sample, pictures: list[PromptPart], sounds: list[PromptPart]
) -> dict[str, str | list[str]]:
    """Return the file of each side channel that a sample has, or its views, by name.

    A row names files under "sides". If it names none, "audio" is the sample's sound and "fast" its
    video. "flow" and the channels of registered encoders are made of the video, unless "sides"
    names a file for them.
    """
    files: dict[str, str | list[str]] = {}
    video = ""
    if pictures and pictures[0].kind == "video":
        video = pictures[0].path
        files |= dict.fromkeys(["flow", *ENCODERS], video)

    # files that the row names
    if sample.row.get("sides"):
        return files | {name: path for name, path in sample.row["sides"].items() if path}

    # the sample's own media
    if sounds:
        files["audio"] = sounds[0].path
    if video:
        files["fast"] = video
    return files


def feature_file(folder: str, clip: str) -> str:
    """Return the file, or the folder of files, of a clip in a folder of --features.

    Where there is none it is the path of a .npy, whose reading says that it is missing.
    """
    for suffix in ("", *SUFFIXES, ".mp4", ".wav"):
        path = Path(folder, clip + suffix)
        if os.path.exists(path):
            return str(path)
    return str(Path(folder, f"{clip}.npy"))


def clip_name(path: str) -> str:
    """Return the name of a clip: of its file without the ending, or of its folder of frames."""
    return Path(path).name if os.path.isdir(path) else Path(path).stem


def view_files(path: str | list[str]) -> list[str]:
    """Return the files of a side channel: several for several views, as PAVE's exo cameras.

    Args:
        path: a file, a folder of pictures (one clip), a folder of feature files or videos (a view
            each), or a list of files.
    """
    if isinstance(path, list):
        return [str(file) for file in path]
    if not os.path.isdir(path):
        return [path]
    files = sorted(Path(path).iterdir())
    if any(media_kind(file) == "image" for file in files):
        return [path]
    views = [str(f) for f in files if f.suffix in SUFFIXES or media_kind(f) == "video"]
    return views or [path]


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

    # 3D points, stored features, and a stream of many frames
    if suffix == ".npz" or POINTS[0] in Path(path).parts:
        return PromptPart("points", path=path, side=name)
    if suffix in (".npy", ".pt", ".safetensors"):
        return PromptPart("array", path=path, frames=frames, side=name)
    if name == "fast":
        return PromptPart("fast", path=path, side=name, **span)

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
