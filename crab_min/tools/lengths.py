"""The lengths of media files, and which of them cannot be read."""

from tqdm import tqdm

from crab_min.answers import GRID
from crab_min.data import Sample, decode_ahead
from crab_min.interface import PromptPart

GROUP = 16  # files that a worker process is given at once


def read_media(
    parts: list[PromptPart], decode: bool, workers: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Read media files.

    Args:
        parts: media; several may name the same file, of which they want different pieces.
        decode: decode each of the parts, or else read the header of each file once.
        workers: processes that read files (0: this one).

    Returns:
        Seconds by path, without pictures; and the reason by path where a file cannot be read.
    """
    if not decode:
        parts = list({part.path: part for part in parts}.values())
    parts = sorted(parts, key=lambda part: (part.path, part.index))
    groups = [parts[start : start + GROUP] for start in range(0, len(parts), GROUP)]

    seconds, errors = {}, {}
    loader = decode_ahead(groups, GRID, workers, decode)
    for group in tqdm(loader, desc="reading media", unit_scale=GROUP, unit="file"):
        for medium in group:
            if medium.error:
                errors[medium.part.path] = medium.error
            elif medium.part.kind != "image":
                seconds[medium.part.path] = medium.seconds
    return seconds, errors


def sample_seconds(sample: Sample, seconds: dict[str, float]) -> float:
    """Return the seconds of the longest medium of a sample.

    Args:
        seconds: by path, as read_media returns them.
    """
    return max((part_seconds(part, seconds) for part in sample.media), default=0.0)


def part_seconds(part: PromptPart, seconds: dict[str, float]) -> float:
    """Return the seconds of the part of a file that is used; 0 for an image."""
    length = seconds.get(part.path, 0.0)
    return max(0.0, min(part.end or length, length) - part.start)
