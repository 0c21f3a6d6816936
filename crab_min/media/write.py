"""Writing video and sound files (with PyAV). A file appears whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from crab_min.errors import MediaError

BITS = 4  # per sample of compressed sound: at FFmpeg's default its AAC encoder distorts audibly
FORMATS = {  # ending of the file: container, codec
    ".wav": ("wav", "pcm_s16le"),
    ".mp3": ("mp3", "libmp3lame"),
    ".m4a": ("mp4", "aac"),
    ".ogg": ("ogg", "libopus"),
}


def write_video(
    path: str | Path,
    frames: np.ndarray,
    wave: np.ndarray | None,
    fps: float = 25,
    rate: int = 16000,
) -> None:
    """Write an MP4: H.264 and mono AAC.

    The pictures are yuv420p, with a keyframe every 25 frames or sooner.

    Args:
        frames: (T, H, W, 3) uint8, RGB, with even H and W.
        wave: (N,) in -1..1, or None for no sound track.
        fps: frames per second.
        rate: samples of sound per second (Hz).

    Raises:
        MediaError: frames of another shape, or a folder that cannot be written.
    """
    if frames.ndim != 4 or not len(frames) or frames.shape[1] % 2 or frames.shape[2] % 2:
        expected = "give (T, H, W, 3), T > 0, H and W even"
        raise MediaError(f"{path}: cannot write frames of shape {frames.shape}; {expected}")
    frame_rate = Fraction(float(fps)).limit_denominator(1001)  # 1001: 30000 / 1001 stays exact
    with new_container(path, "mp4") as container:
        # both streams are declared before the first packet
        options = {"preset": "ultrafast", "crf": "20"}
        video = container.add_stream("libx264", rate=frame_rate, options=options)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.gop_size = 25
        video.codec_context.thread_count = 1
        audio = None
        if wave is not None:
            audio = add_audio_stream(container, "aac", rate)

        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = i
            frame.time_base = 1 / frame_rate
            container.mux(video.encode(frame))
        container.mux(video.encode())  # what the encoder still holds
        if audio is not None:
            encode_wave(container, audio, wave, rate)


def write_audio(path: str | Path, wave: np.ndarray, rate: int = 16000) -> None:
    """Write a mono sound file; its ending names the codec.

    Args:
        path: ends in .wav, .mp3, .m4a (AAC) or .ogg (Opus).
        wave: (N,) in -1..1.
        rate: samples per second (Hz).

    Raises:
        MediaError: another ending, or a folder or rate that cannot be written.
    """
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        name = ending or "a name without an ending"
        raise MediaError(f"{path}: cannot write {name}; end it in {', '.join(FORMATS)}")
    container_format, codec = FORMATS[ending]
    with new_container(path, container_format) as container:
        # Opus knows few rates: PyAV resamples
        codec_rate = 48000 if codec == "libopus" else rate
        audio = add_audio_stream(container, codec, codec_rate)
        encode_wave(container, audio, wave, rate)


@contextmanager
def new_container(path: str | Path, name: str) -> Iterator[av.container.OutputContainer]:
    """Open a temporary file, which moves to `path` when the block has ended well."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    options = {"fflags": "+bitexact"}  # the same content gives the same bytes
    try:
        with av.open(f"file:{temporary}", "w", format=name, options=options) as container:
            yield container
        os.replace(temporary, path)
    except (av.FFmpegError, OSError) as error:
        reason = f"cannot be written ({error.strerror})"
        raise MediaError(f"{path}: {reason}; check the folder and the rate") from None
    finally:
        temporary.unlink(missing_ok=True)


def add_audio_stream(
    container: av.container.OutputContainer, codec: str, rate: int
) -> av.AudioStream:
    # FFmpeg's default search of AAC takes four times as long and distorts more
    options = {"aac_coder": "fast"} if codec == "aac" else {}
    return container.add_stream(
        codec, rate=rate, layout="mono", bit_rate=BITS * rate, options=options
    )


def encode_wave(
    container: av.container.OutputContainer, audio: av.AudioStream, wave: np.ndarray, rate: int
) -> None:
    """Encode a wave (N,) into an audio stream."""
    audio.codec_context.flags |= av.codec.context.Flags.bitexact
    samples = np.clip(wave, -1, 1).astype(np.float32)[None]  # (1, N): one channel
    frame = av.AudioFrame.from_ndarray(samples, format="flt", layout="mono")
    frame.sample_rate = rate
    frame.pts = 0
    frame.time_base = Fraction(1, rate)
    container.mux(audio.encode(frame))
    container.mux(audio.encode())  # what the encoder still holds
