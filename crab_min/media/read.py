"""Video, sound and image files -> arrays, and back (PyAV, whose wheels bring FFmpeg along, Pillow, and OpenCV for flow).

All times are seconds on one clock whose 0 is the first time stamp of the file, not of a stream: pictures and sound stay
together, and a file whose stamps begin elsewhere (MPEG-TS at 1.4 s, MP3 behind its encoder's delay) starts at 0 too.
Crab+ takes `linspace` over frame numbers, first and last included; we take frame i of n at (i + 1/2) / n of the clip,
the middle of its n-th, which means the same at any frame rate, a variable one too, and in clips of fewer than n frames.
Pictures are squashed to a square, as there (224 x 224).
A broken file is an error, never a black picture or silence: where a file says how long it is, what can be decoded has
to reach that far. MPEG-TS, Ogg and fragmented MP4 do not say it: cut short, they are shorter files.

Shapes: T frames, H x W pixels, N samples.
"""
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.stream import Disposition
from matplotlib.colors import hsv_to_rgb
from PIL import Image, ImageOps

from crab_min.errors import MediaError

CUT = .5         # seconds by which a file may end before the length it states
JUMP = .04       # seconds by which the stamps of sound may wander (Matroska rounds to 1 ms) before it is a gap
PREROLL = 1.     # seconds of sound decoded before and after a window: MP3, AAC and Opus need some to come into step
LONG = 60.       # seconds before a window of sound from which we seek; nearer, decoding on costs less than 0.1 s
FAR = 3.         # seconds to the next wanted frame from which a jump is tried in a file without an index of keyframes
NEAR = 4         # frames before a wanted one that are all decoded, also those that no other refers to
BITS = 4         # a sample of compressed sound: at FFmpeg's default its AAC encoder distorts audibly
CODECS = {".wav": ("wav", "pcm_s16le"), ".mp3": ("mp3", "libmp3lame"), ".m4a": ("mp4", "aac"),
          ".ogg": ("ogg", "libopus")}                                             # ending: container, codec


@dataclass
class Video:
    """Frames of a clip."""
    frames: np.ndarray                                 # (T, H, W, 3) uint8, RGB
    times: np.ndarray                                  # (T,) float64: frames[i] is on the screen at times[i] seconds
    seconds: float                                     # length of the clip


@dataclass
class Audio:
    """Sound of a file, or of a window of it."""
    wave: np.ndarray                                   # (N,) float32, mono, full scale is -1..1
    seconds: float                                     # length of the file, not of the window
    silent: bool                                       # the file has no sound track: the wave is zeros


# --- reading ----------------------------------------------------------------------------------------------------------
def read_video(path: str | Path, frames: int = 10, size: int | None = 224,
               window: tuple[float, float] | None = None) -> Video:
    """`frames` frames spread evenly over a clip, or over a window of it, squashed to size x size (None: as they are).

    window: (start, end) in seconds. Where a clip has fewer frames, or ends before the window does, frames are repeated.
    Rotated and mirrored recordings come upright. Raises MediaError.
    """
    if frames < 1:
        raise MediaError(f"{path}: {frames} frames asked for; ask for 1 or more")
    if os.path.isdir(path):
        return read_folder(path, frames, size)
    with _open(path) as clip:
        track = _Track(clip, "video")
        start, end = _window(path, window, track.seconds)
        times = start + (np.arange(frames) + .5) * (end - start) / frames         # (T,)
        scaler, images, last = av.video.reformatter.VideoReformatter(), [], None
        for frame in track.shown(times):
            if frame is not last:
                image = scaler.reformat(frame, size, size, "rgb24", interpolation="BICUBIC", threads=1).to_ndarray()
                image, last = _upright(image, frame), frame                       # (H, W, 3)
            images.append(image)
        return Video(np.stack(images), times, track.seconds)                      # (T, H, W, 3)


def read_folder(path: str | Path, frames: int, size: int | None) -> Video:
    """The same of a folder of pictures, one a second, in the order of the numbers in their names. Raises MediaError."""
    files = sorted((p for p in Path(path).iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png")), key=lambda p: ([int(n) for n in re.findall(r"\d+", p.stem)], p.name))
    if not files:
        raise MediaError(f"{path}: a folder without pictures (.jpg, .png); name one with the frames of a clip, or a video")
    times = (np.arange(frames) + .5) * len(files) / frames
    return Video(np.stack([read_image(files[int(t)], size) for t in times]), times, float(len(files)))


FLOW_GAP, FLOW_LIMIT = .09, 6 / 96                     # seconds between the two frames (of 25 a second: the next but one); the part of the picture's width that is drawn in full colour


def read_flow(path: str | Path, frames: int = 10, size: int = 224) -> Video:
    """Optical flow at `frames` times spread over a clip, as pictures: where everything goes within 0.09 s (OpenCV's dense inverse search). Raises MediaError."""
    with _open(path) as clip:
        track = _Track(clip, "video")
        start, end = _window(path, None, track.seconds)
        times = start + (np.arange(frames) + .5) * (end - start) / frames         # (T,)
        pairs = np.stack([times, np.minimum(times + FLOW_GAP, end)], 1).flatten()
        order, scaler = np.argsort(pairs, kind="stable"), av.video.reformatter.VideoReformatter()
        grey: list = [None] * len(pairs)
        for place, frame in zip(order, track.shown(pairs[order])):
            grey[place] = _upright(scaler.reformat(frame, size, size, "gray", interpolation="BICUBIC", threads=1).to_ndarray(), frame)
        search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        flow = np.stack([search.calc(np.ascontiguousarray(a), np.ascontiguousarray(b), None) for a, b in zip(grey[::2], grey[1::2])])
        return Video(flow_pictures(flow / size), times, track.seconds)


def flow_pictures(flow: np.ndarray) -> np.ndarray:
    """Flow (T, H, W, 2) in parts of the picture's width, to the right and down, as pictures (T, H, W, 3) uint8: the hue is where to, white is at rest."""
    x, y = flow[..., 0], flow[..., 1]
    hue, much = np.arctan2(y, x) / (2 * np.pi) % 1, np.minimum(1, np.hypot(x, y) / FLOW_LIMIT)
    return (255 * hsv_to_rgb(np.stack([hue, much, np.ones_like(much)], -1))).round().astype(np.uint8)


def read_audio(path: str | Path, rate: int = 16000, window: tuple[float, float] | None = None) -> Audio:
    """The sound of any file, mono (the mean of its channels) at `rate` Hz: all of it, or a window.

    window: (start, end) in seconds; where it leaves the file there is silence: N is always round((end - start) * rate).
    A clip without a sound track gives silence and says so. Raises MediaError.
    """
    with _open(path) as clip:
        seconds = clip.seconds()
        start, end = _window(path, window, seconds)
        wave = np.zeros(round((end - start) * rate), np.float32)                  # (N,)
        if clip.streams["video"] and not clip.container.streams.audio:
            return Audio(wave, seconds, True)
        track = _Track(clip, "audio")
        if start > LONG:
            track.seek(start - PREROLL)
        for begin, stretch in track.stretches(rate, end + PREROLL):
            i = round((begin - start) * rate)                                     # its place in the window
            low, high = max(i, 0), min(i + len(stretch), len(wave))
            if low < high:
                wave[low:high] = stretch[low - i:high - i]
        return Audio(wave, seconds, False)


def read_image(path: str | Path, size: int | None = 224) -> np.ndarray:
    """An image as (size, size, 3) uint8 RGB, squashed (None: as it is), turned as its EXIF says. Raises MediaError."""
    _check_file(path)
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise MediaError(f"{path}: not a readable image ({error}); fetch it again or name an image file") from None
    return np.array(image if size is None else image.resize((size, size), Image.Resampling.BICUBIC))


def media_seconds(path: str | Path) -> float:
    """Length of a video or sound file, without decoding it. Raises MediaError."""
    with _open(path) as clip:
        return clip.seconds()


# --- writing ----------------------------------------------------------------------------------------------------------
def write_video(path: str | Path, frames: np.ndarray, wave: np.ndarray | None, fps: float = 25,
                rate: int = 16000) -> None:
    """Write an MP4: H.264 (yuv420p, a keyframe every 25 frames or sooner) and, unless `wave` is None, mono AAC.

    frames: (T, H, W, 3) uint8 with even H and W; wave: (N,) in -1..1. The file appears whole or not at all.
    Raises MediaError.
    """
    if frames.ndim != 4 or not len(frames) or frames.shape[1] % 2 or frames.shape[2] % 2:
        raise MediaError(f"{path}: cannot write frames of shape {frames.shape}; give (T, H, W, 3), T > 0, H and W even")
    pace = Fraction(float(fps)).limit_denominator(1001)
    with _written(path, "mp4") as container:
        video = container.add_stream("libx264", rate=pace, options={"preset": "veryfast", "crf": "20"})
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt, video.gop_size, video.codec_context.thread_count = "yuv420p", 25, 1
        sound = None if wave is None else _sound(container, "aac", rate)
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = i, 1 / pace
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if sound is not None:
            _encode(container, sound, wave, rate)


def write_audio(path: str | Path, wave: np.ndarray, rate: int = 16000) -> None:
    """Write a mono sound file; the ending of `path` names the codec: .wav, .mp3, .m4a (AAC) or .ogg (Opus).

    wave: (N,) in -1..1. The file appears whole or not at all. Raises MediaError.
    """
    if (ending := Path(path).suffix.lower()) not in CODECS:
        raise MediaError(f"{path}: cannot write {ending or 'a name without an ending'}; end it in {', '.join(CODECS)}")
    name, codec = CODECS[ending]
    with _written(path, name) as container:
        # Opus knows few rates: PyAV resamples
        _encode(container, _sound(container, codec, 48000 if codec == "libopus" else rate), wave, rate)


def _sound(container, codec: str, rate: int):
    return container.add_stream(codec, rate=rate, layout="mono", bit_rate=BITS * rate)


def _encode(container, stream, wave: np.ndarray, rate: int) -> None:
    stream.codec_context.flags |= av.codec.context.Flags.bitexact
    frame = av.AudioFrame.from_ndarray(np.clip(wave, -1, 1).astype(np.float32)[None], format="flt", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


@contextmanager
def _written(path: str | Path, name: str):
    """A container to write; it takes its place at `path` when the block has ended well."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with av.open(f"file:{beside}", "w", format=name, options={"fflags": "+bitexact"}) as container:
            yield container
        os.replace(beside, path)
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"{path}: cannot be written ({error.strerror}); check the folder and the rate") from None
    finally:
        beside.unlink(missing_ok=True)


# --- a file and its clock ---------------------------------------------------------------------------------------------
def _check_file(path: str | Path) -> None:
    if not os.path.isfile(path):
        reason = "is a folder" if os.path.isdir(path) else "no such file"
        raise MediaError(f"{path}: {reason}; check the path and the data folder")
    if not os.path.getsize(path):
        raise MediaError(f"{path}: empty (0 bytes); fetch it again")


@contextmanager
def _open(path: str | Path):
    """The file as a _Clip; what FFmpeg raises inside the block becomes a MediaError."""
    _check_file(path)
    try:
        with open(path, "rb") as file:                                            # FFmpeg hides a cut in WAV and AVI
            mark, stated, size = file.read(4), int.from_bytes(file.read(4), "little"), os.path.getsize(path)
        if mark == b"RIFF" and 1.02 * size < stated < 0x7ffff000:                 # more: written to a pipe
            raise MediaError(f"{path}: truncated, {size} of {stated} bytes; fetch it again")
        with av.open(f"file:{path}", metadata_errors="ignore") as container:
            if container.format.name in ("image2", "tty") or container.format.name.endswith("_pipe"):
                raise MediaError(f"{path}: a picture or a text; use read_image or name a video or sound file")
            yield _Clip(path, container)
    except (av.FFmpegError, OSError) as error:
        reason = f"not a video or sound file, or cut short ({error.strerror})"
        raise MediaError(f"{path}: {reason}; fetch it again") from None


def _window(path, window: tuple[float, float] | None, seconds: float) -> tuple[float, float]:
    start, end = (0., seconds) if window is None else window
    if not (-math.inf < start < end < math.inf and start < seconds and end > 0):
        raise MediaError(f"{path}: the window {start} to {end} s is empty or outside; "
                         f"give start < end within its {seconds:.2f} s")
    return start, end


def _upright(image: np.ndarray, frame) -> np.ndarray:
    """Apply the display matrix, x' = a x + c y, y' = b x + d y (`frame.rotation` would take mirrored for turned)."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(b) > abs(a):                                                           # a quarter turn: x' = c y, y' = b x
        image, a, d = image.swapaxes(0, 1), c, b
    return image[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]


class _Clip:
    """An open file: its streams of picture and sound, and the zero of their clock."""

    def __init__(self, path, container):
        self.path, self.container = path, container
        usable = [s for s in container.streams if s.codec_context and not s.disposition & Disposition.attached_pic]
        self.streams = {kind: [s for s in usable if s.type == kind] for kind in ("video", "audio")}  # no cover pictures
        self.all = self.streams["video"] + self.streams["audio"]
        if not self.all:
            raise MediaError(f"{path}: has neither video nor audio that can be decoded; name another file")
        self.origin = min((float(s.start_time * s.time_base) for s in self.all if s.start_time is not None), default=0.)

    def end(self, stream) -> float | None:
        """Where a stream says that it ends, None where it does not say (FFmpeg then guesses from the bit rate)."""
        kind = self.container.format.name
        guess = kind == "aac" or kind == "mp3" and not stream.start_time          # LAME states delay and length
        if guess or not stream.duration:
            return None
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base) - self.origin

    def seconds(self) -> float:
        """Length that the streams or the file state, else that of the packets (found without decoding them)."""
        ends = [self.end(stream) for stream in self.all]
        if None not in ends:
            return max(ends)
        # AAC and MP3: FFmpeg's guess; a Matroska file that begins late: its end or its length, according to who wrote it
        if self.container.duration and self.origin < CUT and self.container.format.name not in ("aac", "mp3"):
            return self.container.duration / av.time_base
        with av.open(f"file:{self.path}", metadata_errors="ignore") as scan:
            end = max((_end(packet) for packet in scan.demux() if packet.pts is not None), default=0.) - self.origin
        if end <= 0:
            raise MediaError(f"{self.path}: holds no samples, or no time stamps; fetch it again or remux it to .mp4")
        return end


def _end(packet) -> float:
    return (packet.pts + (packet.duration or 0)) * float(packet.time_base)


# --- one stream -------------------------------------------------------------------------------------------------------
class _Track:
    """The first stream of a kind ("video", "audio"): decoded in order, after jumps where they pay."""

    def __init__(self, clip: _Clip, kind: str):
        if not clip.streams[kind]:
            raise MediaError(f"{clip.path}: has no {kind} that can be decoded; name a file with {kind}")
        self.clip, self.stream = clip, clip.streams[kind][0]
        self.stream.codec_context.thread_count = 1                                # callers work on many files at a time
        self.stated = clip.end(self.stream)
        self.seconds = self.stated or clip.seconds()                              # it may end before the file does
        self.reached = 0.                                                         # end of what could be decoded
        self.near = NEAR / float(kind == "video" and self.stream.average_rate or 8)
        self.wanted = self.skipped = -math.inf                                    # frames before `wanted` may be skipped; the last that was

    def decode(self) -> Iterator[tuple]:
        """(time, frame) from here on. Raises MediaError at an end that comes too early."""
        # where a stream does not say its length, only the packets of all together tell whether the file is whole
        for packet in self.clip.container.demux(*[] if self.stated is None else [self.stream]):
            frames = []
            if packet.stream is self.stream:
                if packet.pts is not None and self.stream.type == "video":        # frames that no other refers to need not be decoded
                    time = packet.pts * float(self.stream.time_base) - self.clip.origin
                    skips = time < self.wanted - self.near
                    self.stream.codec_context.skip_frame = "NONREF" if skips else "DEFAULT"
                    self.skipped = max(self.skipped, time) if skips else self.skipped
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError:                                 # tags behind an MP3, a damaged packet
                    continue
            if packet.pts is not None:
                self.reached = max(self.reached, _end(packet) - self.clip.origin)
            for frame in frames:
                stamp = frame.dts if frame.pts is None else frame.pts             # AVI has no pts
                time = math.inf if stamp is None else stamp * float(self.stream.time_base) - self.clip.origin
                if time < self.seconds + 60:                                      # else the clock of an MPEG-TS wrapped
                    yield time, frame
        if self.reached < self.seconds - CUT:
            raise MediaError(f"{self.clip.path}: truncated or damaged, {self.reached:.2f} of {self.seconds:.2f} s "
                             "can be decoded; fetch it again")

    def seek(self, time: float) -> None:
        """Go to the keyframe that the index gives for a time; it may lie behind it."""
        self.clip.container.seek(int((time + self.clip.origin) / self.stream.time_base), stream=self.stream)

    def shown(self, times: np.ndarray) -> Iterator:
        """The frame on the screen at each of the rising times: the last that begins at or before it, else the first."""
        if "matroska" in self.clip.container.format.name:
            with suppress(av.FFmpegError):
                self.seek(0)                                                      # it reads its index at the first seek
        self.indexed = len(self.stream.index_entries) > 1                         # else it grows with what is read, with holes
        decoded = self.decode()
        last, coming = None, next(decoded, None)                                  # (time, frame)
        for time in times:
            self.wanted = time
            if coming is not None and self.jump_pays(coming[0], time):
                decoded, coming = self.jump(time)
            while coming is not None and (last is None or coming[0] <= time):
                last, coming = coming, next(decoded, None)
            if last is not None and last[0] < self.skipped <= time:               # frames far apart: the one on the screen was skipped
                self.wanted = -math.inf
                decoded, coming = self.jump(time)
                while coming is not None and coming[0] <= time:
                    last, coming = coming, next(decoded, None)
            if last is None:
                raise MediaError(f"{self.clip.path}: no frame of it can be decoded; fetch it again")
            yield last[1]

    def jump(self, time: float) -> tuple:
        """(decoded frames, the first of them) from a keyframe at or before a time."""
        for back in (0., 1., 5., 25., math.inf):
            self.seek(max(time - back, min(0., -self.clip.origin)))               # at our 0, MPEG-TS finds the second keyframe
            decoded = self.decode()
            first = next(decoded, None)
            if first is not None and first[0] <= time:
                break
        return decoded, first

    def jump_pays(self, now: float, time: float) -> bool:
        """Is there a keyframe between `now` and `time`, so that seeking decodes less than going on?"""
        index = self.stream.index_entries
        low, high = (int((t + self.clip.origin) / self.stream.time_base) for t in (now, time))
        if not self.indexed or index[-1].timestamp < low:                         # no index, or not of all the file: guess
            return time - now > FAR
        key = index.search_timestamp(high)                                        # the last keyframe at or before it
        return key >= 0 and index[key].timestamp > low

    def stretches(self, rate: int, end: float) -> Iterator[tuple[float, np.ndarray]]:
        """(start in seconds, wave (N,)) of each stretch of sound up to `end`; a gap or a new format begins another."""
        resampler, begin, samples, waves, form = None, 0., 0, [], None
        for time, frame in self.decode():
            if time > end:
                break
            now = frame.format.name, frame.layout.name, frame.sample_rate
            if now != form or abs(begin + samples / frame.sample_rate - time) > JUMP:
                yield from _flush(resampler, begin, waves)
                # maxval 1: the mean of the channels; without it swresample lets loud ones add up above full scale
                resampler = av.AudioResampler("flt", "mono", rate, options={"rematrix_maxval": "1"})
                begin, samples, waves, form = time, 0, [], now
            samples += frame.samples
            waves += [out.to_ndarray()[0] for out in resampler.resample(frame)]
        else:
            if form is None:
                raise MediaError(f"{self.clip.path}: no sound of it can be decoded; fetch it again")
        yield from _flush(resampler, begin, waves)


def _flush(resampler, begin: float, waves: list[np.ndarray]) -> Iterator[tuple[float, np.ndarray]]:
    waves += [out.to_ndarray()[0] for out in (resampler.resample(None) if resampler else []) if out is not None]
    if waves:
        yield begin, np.concatenate(waves)
