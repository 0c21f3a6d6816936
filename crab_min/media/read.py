"""Reading video, sound, image and flow files into arrays.

    video = read_video("clip.mp4", frames=10, size=224)     # Video: frames (10, 224, 224, 3) uint8
    audio = read_audio("clip.mp4", window=(2.0, 4.0))       # Audio: wave (32000,) float32 at 16 kHz

Times are seconds from the start of the file (tracks.py). Frame i of n is the one on the screen at
(i + 1/2) / n of the clip, the middle of its n-th part. This means the same at any frame rate, a
variable one too, and in clips of fewer than n frames. Pictures are squashed to a square.

Differs from Crab+, which takes `linspace` over the frame numbers, the first and the last included.
It squashes to 224 x 224 too.

Shapes: T frames, H x W pixels, N samples of sound.
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from crab_min.errors import MediaError
from crab_min.media.flow import FLOW_GAP, flow_pictures, optical_flow
from crab_min.media.tracks import AudioTrack, VideoTrack, check_file, open_clip

PREROLL = 1.0  # seconds of sound decoded around a window: MP3, AAC and Opus need a run-in
SEEK_FROM = 60.0  # seconds: a window of sound that begins later is sought (60 s decode in 0.1 s)

Window = tuple[float, float]  # (start, end) in seconds


@dataclass
class Video:
    """Frames of a clip."""

    frames: np.ndarray  # (T, H, W, 3) uint8, RGB
    times: np.ndarray  # (T,) float64: frames[i] is on the screen at times[i] seconds
    seconds: float  # length of the clip


@dataclass
class Audio:
    """Sound of a file, or of a window of it."""

    wave: np.ndarray  # (N,) float32, mono, full scale is -1..1
    seconds: float  # length of the file, not of the window
    silent: bool  # the file has no sound track: the wave is zeros


# --- video ----------------------------------------------------------------------------------------


def read_video(
    path: str | Path, frames: int = 10, size: int | None = 224, window: Window | None = None
) -> Video:
    """Read frames spread evenly over a clip, upright as it was recorded.

    Args:
        path: a video file, or a folder with its frames as pictures, one per second.
        frames: number of frames. A clip that has fewer, or ends before the window, repeats its own.
        size: side of the square frames in pixels; None: as they are.
        window: (start, end) in seconds; None: the whole clip.

    Raises:
        MediaError: a file that is missing, broken or no video, or a window outside of it.
    """
    if frames < 1:
        raise MediaError(f"{path}: {frames} frames asked for; ask for 1 or more")
    if os.path.isdir(path):
        return read_folder(path, frames, size, window)
    with open_clip(path) as clip:
        track = VideoTrack(clip)
        start, end = check_window(path, window, track.seconds)
        times = spread_times(start, end, frames)
        images = images_at(track, times, size, "rgb24")
        return Video(np.stack(images), times, track.seconds)  # (T, H, W, 3)


def read_folder(path: str | Path, frames: int, size: int | None, window: Window | None) -> Video:
    """Read frames from a folder of pictures, one per second."""
    pictures = frame_files(path)
    start, end = check_window(path, window, len(pictures))
    times = spread_times(start, end, frames)
    images = [read_image(pictures[min(int(time), len(pictures) - 1)], size) for time in times]
    return Video(np.stack(images), times, float(len(pictures)))


def frame_files(path: str | Path) -> list[Path]:
    """Return the pictures of a folder of frames, in the order of their numbers.

    Raises MediaError if there are none.
    """
    pictures = [p for p in Path(path).iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png")]
    if not pictures:
        advice = "name one with the frames of a clip, or a video"
        raise MediaError(f"{path}: a folder without pictures (.jpg, .png); {advice}")
    return sorted(pictures, key=numbers_in_name)


def numbers_in_name(path: Path) -> tuple[list[int], str]:
    """Return a sort key by which "2.png" comes before "10.png"."""
    return [int(digits) for digits in re.findall(r"\d+", path.stem)], path.name


def read_flow(
    path: str | Path, frames: int = 10, size: int = 224, window: Window | None = None
) -> Video:
    """Read optical flow as pictures.

    The hue is the direction, white is at rest (flow.py).

    Args:
        frames: number of times, spread evenly over the clip. Flow is that of 0.09 s from there on.
        size: side of the square pictures in pixels.
        window: (start, end) in seconds; None: the whole clip.

    Raises:
        MediaError: as read_video.
    """
    with open_clip(path) as clip:
        track = VideoTrack(clip)
        start, end = check_window(path, window, track.seconds)
        times = spread_times(start, end, frames)

        # the pairs' frames (2 T) are read in the order of their times, then put back into pairs
        pairs = np.stack([times, np.minimum(times + FLOW_GAP, end)], 1).flatten()  # (2 T,)
        order = np.argsort(pairs, kind="stable")
        images: list = [None] * len(pairs)
        for i, image in zip(order, images_at(track, pairs[order], size, "gray")):
            images[i] = image

        flow = optical_flow(images[::2], images[1::2])  # (T, H, W, 2)
        return Video(flow_pictures(flow), times, track.seconds)


def spread_times(start: float, end: float, count: int) -> np.ndarray:
    """Return the middles (count,) of `count` equal parts of a window, in seconds."""
    return start + (np.arange(count) + 0.5) * (end - start) / count


def images_at(
    track: VideoTrack, times: np.ndarray, size: int | None, pixel_format: str
) -> list[np.ndarray]:
    """Return upright images at rising times.

    They are (H, W, 3) of "rgb24" or (H, W) of "gray".
    """
    scaler = VideoReformatter()
    options = {"interpolation": "BICUBIC", "threads": 1}
    images: list[np.ndarray] = []
    last = None
    for frame in track.frames_at(times):
        if frame is last:  # still on the screen
            images.append(images[-1])
            continue
        scaled = scaler.reformat(frame, size, size, pixel_format, **options)
        images.append(turn_upright(scaled.to_ndarray(), frame))
        last = frame
    return images


def turn_upright(image: np.ndarray, frame) -> np.ndarray:
    """Apply the display matrix of a frame: x' = a x + c y, y' = b x + d y.

    PyAV's `frame.rotation` would take a mirrored recording for a turned one.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(b) > abs(a):  # a quarter turn: x' = c y, y' = b x
        image = image.swapaxes(0, 1)
        a, d = c, b
    if d < 0:
        image = image[::-1]
    if a < 0:
        image = image[:, ::-1]
    return image


# --- sound ----------------------------------------------------------------------------------------


def read_audio(
    path: str | Path, rate: int = 16000, window: Window | Callable[[float], Window] | None = None
) -> Audio:
    """Read the sound of any file, mono: the mean of its channels.

    Args:
        path: a sound or video file. A video without a sound track gives silence and says so.
        rate: samples per second (Hz).
        window: (start, end) in seconds, or a function that returns it for the file's length in
            seconds; None: all of it. The wave always has round((end - start) * rate) samples: where
            a window leaves the file there is silence.

    Raises:
        MediaError: a file that is missing, broken or has neither, or a window outside of it.
    """
    with open_clip(path) as clip:
        seconds = clip.seconds()
        if callable(window):
            window = window(seconds)
        start, end = check_window(path, window, seconds)
        wave = np.zeros(round((end - start) * rate), np.float32)  # (N,)
        if clip.streams["video"] and not clip.container.streams.audio:
            return Audio(wave, seconds, silent=True)

        track = AudioTrack(clip)
        if start > SEEK_FROM:
            track.seek(start - PREROLL)
        # copy what overlaps with the window
        for segment_start, segment in track.segments(rate, end + PREROLL):
            offset = round((segment_start - start) * rate)  # of the segment in the window
            low = max(offset, 0)
            high = min(offset + len(segment), len(wave))
            if low < high:
                wave[low:high] = segment[low - offset : high - offset]
        return Audio(wave, seconds, silent=False)


def media_seconds(path: str | Path) -> float:
    """Return the length of a video, a folder of frames or a sound file, without decoding it.

    Raises MediaError.
    """
    if os.path.isdir(path):
        return float(len(frame_files(path)))
    with open_clip(path) as clip:
        return clip.seconds()


def has_sound(path: str | Path) -> bool:
    """Tell whether a file has a sound track; a folder of frames has none. Raises MediaError."""
    if os.path.isdir(path):
        return False
    with open_clip(path) as clip:
        return bool(clip.container.streams.audio)


def check_window(path: str | Path, window: Window | None, seconds: float) -> Window:
    """Return a window; None becomes the whole file.

    Raises MediaError for an empty window or one outside the file.
    """
    start, end = (0.0, seconds) if window is None else window
    if not (-math.inf < start < end < math.inf and start < seconds and end > 0):
        reason = f"the window {start} to {end} s is empty or outside"
        raise MediaError(f"{path}: {reason}; give start < end within its {seconds:.2f} s")
    return start, end


# --- images ---------------------------------------------------------------------------------------


def read_image(path: str | Path, size: int | None = 224) -> np.ndarray:
    """Read an image, turned as its EXIF tells.

    Args:
        size: side of the square in pixels, to which it is squashed; None: as it is.

    Returns:
        (size, size, 3) uint8, RGB.

    Raises:
        MediaError: a file that is missing or no readable image.
    """
    check_file(path)
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    # Pillow raises SyntaxError for a broken PNG
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = f"not a readable image ({error})"
        raise MediaError(f"{path}: {reason}; fetch it again or name an image file") from None
    if size is not None:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(image)  # (H, W, 3)
