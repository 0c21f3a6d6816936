"""Opening a media file, its clock, and seeking in one of its streams.

Files are read with PyAV and its FFmpeg.

    with open_clip(path) as clip:             # Clip: the streams of a file, its zero, its length
        track = VideoTrack(clip)              # its first video stream
        for frame in track.frames_at(times):  # decoded in order, with jumps to keyframes
            ...

All times are seconds after the first time stamp of the file, in whichever stream it is. Pictures
and sound so stay together, and a file whose stamps begin elsewhere (MPEG-TS at 1.4 s, MP3 after its
encoder's delay) starts at 0 too.

A broken file is an error, never a black picture or silence: if a file states its length, what can
be decoded has to reach that far. MPEG-TS, Ogg and fragmented MP4 do not state it: cut short, they
are shorter files.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

from crab_min.errors import MediaError

END_TOLERANCE = 0.5  # seconds by which a file may end before the length it states
GAP_TOLERANCE = 0.04  # seconds by which stamps of sound may wander (Matroska rounds to 1 ms)
WRAPPED = 60.0  # seconds after the end from which a stamp means that MPEG-TS's clock wrapped
JUMP_FROM = 3.0  # seconds to the next wanted frame from which we seek without an index of keyframes
UNSKIPPED = 4  # frames before a wanted one that are all decoded, also those that no other refers to

# A .wav says all in its header: FFmpeg need not decode 5 MB of it first, nor in pieces of 4 kB.
WAV_OPTIONS = {"probesize": "32768", "max_size": "16384"}

TimedFrame = tuple[float, av.VideoFrame | av.AudioFrame]  # (seconds, frame)


# --- a file and its clock -------------------------------------------------------------------------


def check_file(path: str | Path) -> None:
    """Raise MediaError unless `path` is a file with something in it."""
    if os.path.isdir(path):
        raise MediaError(f"{path}: is a folder; check the path and the data folder")
    if not os.path.isfile(path):
        raise MediaError(f"{path}: no such file; check the path and the data folder")
    if not os.path.getsize(path):
        raise MediaError(f"{path}: empty (0 bytes); fetch it again")


@contextmanager
def open_clip(path: str | Path) -> Iterator["Clip"]:
    """Open a video or sound file.

    What FFmpeg raises inside the block becomes a MediaError.
    """
    check_file(path)
    try:
        check_riff_size(path)
        options = WAV_OPTIONS if str(path).lower().endswith(".wav") else {}
        with av.open(f"file:{path}", metadata_errors="ignore", options=options) as container:
            name = container.format.name
            if name in ("image2", "tty") or name.endswith("_pipe"):
                advice = "use read_image or name a video or sound file"
                raise MediaError(f"{path}: a picture or a text; {advice}")
            yield Clip(path, container)
    except (av.FFmpegError, OSError) as error:
        reason = f"not a video or sound file, or cut short ({error.strerror})"
        raise MediaError(f"{path}: {reason}; fetch it again") from None


def check_riff_size(path: str | Path) -> None:
    """Raise MediaError for a WAV or AVI file that is cut short.

    FFmpeg does not report this.
    """
    with open(path, "rb") as file:
        mark = file.read(4)
        stated = int.from_bytes(file.read(4), "little")
    size = os.path.getsize(path)
    # a program that writes to a pipe states the largest size there is
    if mark == b"RIFF" and 1.02 * size < stated < 0x7FFFF000:
        raise MediaError(f"{path}: truncated, {size} of {stated} bytes; fetch it again")


class Clip:
    """An open file: its streams of picture and sound, and the zero of their clock.

    Attributes:
        path: the file.
        container: PyAV's container.
        streams: "video" and "audio" -> the streams of that kind that can be decoded.
        origin: time stamp, in seconds, of what is 0 on our clock.
    """

    def __init__(self, path: str | Path, container: av.container.InputContainer):
        self.path = path
        self.container = container
        self.streams: dict[str, list] = {"video": [], "audio": []}
        for stream in container.streams:
            if not stream.codec_context or stream.type not in self.streams:
                continue
            if not stream.disposition & Disposition.attached_pic:  # the cover picture of a song
                self.streams[stream.type].append(stream)
        if not self.all_streams():
            reason = "has neither video nor audio that can be decoded"
            raise MediaError(f"{path}: {reason}; name another file")
        # zero is the first time stamp of all streams
        stamped = [s for s in self.all_streams() if s.start_time is not None]
        self.origin = min((float(s.start_time * s.time_base) for s in stamped), default=0.0)

    def all_streams(self) -> list:
        return self.streams["video"] + self.streams["audio"]

    def stated_end(self, stream: av.stream.Stream) -> float | None:
        """Return where a stream states that it ends, or None if FFmpeg only guesses it.

        FFmpeg guesses from the bit rate for AAC, and for MP3 without LAME's delay and length.
        """
        name = self.container.format.name
        guessed = name == "aac" or (name == "mp3" and not stream.start_time)
        if guessed or not stream.duration:
            return None
        start = stream.start_time or 0
        return float((start + stream.duration) * stream.time_base) - self.origin

    def seconds(self) -> float:
        """Return the length that all streams state, or the file, or else the packets."""
        ends = [self.stated_end(stream) for stream in self.all_streams()]
        if None not in ends:
            return max(ends)
        # A Matroska file that begins late states its end or its length, according to who wrote it.
        guessed = self.container.format.name in ("aac", "mp3")
        if self.container.duration and not guessed and self.origin < END_TOLERANCE:
            return self.container.duration / av.time_base
        return self.scan_packets()

    def scan_packets(self) -> float:
        """Return where the last packet of the file ends; nothing is decoded."""
        with av.open(f"file:{self.path}", metadata_errors="ignore") as container:
            ends = [packet_end(packet) for packet in container.demux() if packet.pts is not None]
        end = max(ends, default=0.0) - self.origin
        if end <= 0:
            reason = "holds no samples, or no time stamps"
            raise MediaError(f"{self.path}: {reason}; fetch it again or remux it to .mp4")
        return end


def packet_end(packet: av.Packet) -> float:
    """Return where a packet ends, in seconds of the file's own stamps."""
    duration = packet.duration or 0
    return (packet.pts + duration) * float(packet.time_base)


# --- one stream of it -----------------------------------------------------------------------------


class Track:
    """The first stream of a kind of a clip, decoded in order.

    Attributes:
        seconds: its length; it may end before the file does.
        reached: end of what could be read so far, in seconds.
    """

    kind = ""

    def __init__(self, clip: Clip):
        if not clip.streams[self.kind]:
            reason = f"has no {self.kind} that can be decoded"
            raise MediaError(f"{clip.path}: {reason}; name a file with {self.kind}")
        self.clip = clip
        self.stream = clip.streams[self.kind][0]
        self.stream.codec_context.thread_count = 1  # callers work on many files at a time
        self.stated = clip.stated_end(self.stream)
        self.seconds = self.stated or clip.seconds()
        self.reached = 0.0

    def decode(self) -> Iterator[TimedFrame]:
        """Yield (time, frame) from here to the end.

        Raises MediaError if that comes too early.
        """
        # If the stream states no length, only the packets of all streams tell if the file is whole.
        streams = [] if self.stated is None else [self.stream]
        for packet in self.clip.container.demux(*streams):
            try:
                frames = self.decode_packet(packet) if packet.stream is self.stream else []
            except av.error.InvalidDataError:  # tags at the end of an MP3, or a damaged packet
                continue
            if packet.pts is not None:
                self.reached = max(self.reached, packet_end(packet) - self.clip.origin)
            for frame in frames:
                time = self.frame_time(frame)
                if time < self.seconds + WRAPPED:
                    yield time, frame
        if self.reached < self.seconds - END_TOLERANCE:
            reason = f"{self.reached:.2f} of {self.seconds:.2f} s can be decoded"
            raise MediaError(f"{self.clip.path}: truncated or damaged, {reason}; fetch it again")

    def decode_packet(self, packet: av.Packet) -> list:
        return packet.decode()

    def frame_time(self, frame: av.VideoFrame | av.AudioFrame) -> float:
        """Return when a frame begins, infinity if it has no time stamp."""
        stamp = frame.dts if frame.pts is None else frame.pts  # AVI has no pts
        if stamp is None:
            return math.inf
        return stamp * float(self.stream.time_base) - self.clip.origin

    def to_stamp(self, time: float) -> int:
        """Return a time as the stream counts it, in units of its time base."""
        return int((time + self.clip.origin) / self.stream.time_base)

    def seek(self, time: float) -> None:
        """Go to the keyframe that the file's index gives for a time; it may lie after it."""
        self.clip.container.seek(self.to_stamp(time), stream=self.stream)


class VideoTrack(Track):
    """The first video stream of a clip.

    It jumps to keyframes where this saves decoding.

    Attributes:
        shown: (time, frame) on the screen at the time that was asked for last.
        coming: (time, frame) after it; None at the end of the track.
        decoded: what comes after `coming`.
        wanted: time of the next wanted frame. Long before it, frames that no other refers to
            (B-frames) are skipped.
        skipped: time of the last frame that was skipped.
    """

    kind = "video"

    def __init__(self, clip: Clip):
        super().__init__(clip)
        self.shown: TimedFrame | None = None
        self.coming: TimedFrame | None = None
        self.decoded: Iterator[TimedFrame] = iter(())
        self.wanted = self.skipped = -math.inf
        frame_rate = self.stream.average_rate or 8
        self.unskipped = UNSKIPPED / float(frame_rate)  # seconds
        # A file without an index of keyframes gets one while it is read, with holes: no use here.
        if "matroska" in clip.container.format.name:
            with suppress(av.FFmpegError):
                self.seek(0)  # Matroska's index is read at the first seek
        self.has_index = len(self.stream.index_entries) > 1

    def frames_at(self, times: np.ndarray) -> Iterator[av.VideoFrame]:
        """Yield the frame that is on the screen at each of the rising `times`.

        It is the last frame that begins at or before the time, or else the first of the track.
        """
        self.decoded = self.decode()
        self.coming = next(self.decoded, None)
        for time in times:
            # decode on, or jump to the last keyframe before the time
            self.wanted = time
            if self.coming is not None and self.jump_pays(self.coming[0], time):
                self.jump(time)
            self.advance(time)
            # Where frames are far apart, the one on the screen may have been skipped: decode all.
            if self.shown is not None and self.shown[0] < self.skipped <= time:
                self.wanted = -math.inf
                self.jump(time)
                self.advance(time)
            if self.shown is None:
                raise MediaError(f"{self.clip.path}: no frame of it can be decoded; fetch it again")
            yield self.shown[1]

    def advance(self, time: float) -> None:
        """Decode until `shown` is the frame on the screen at `time`."""
        while self.coming is not None and (self.shown is None or self.coming[0] <= time):
            self.shown = self.coming
            self.coming = next(self.decoded, None)

    def decode_packet(self, packet: av.Packet) -> list:
        """Return the frames of a packet, unless they come long before the wanted one."""
        if packet.pts is not None:
            time = packet.pts * float(self.stream.time_base) - self.clip.origin
            skip = time < self.wanted - self.unskipped
            self.stream.codec_context.skip_frame = "NONREF" if skip else "DEFAULT"
            if skip:
                self.skipped = max(self.skipped, time)
        return packet.decode()

    def jump_pays(self, now: float, time: float) -> bool:
        """Tell if a keyframe lies between two times.

        Seeking then decodes less than going on.
        """
        index = self.stream.index_entries
        # without an index, or with one of a part of the file, guess
        if not self.has_index or index[-1].timestamp < self.to_stamp(now):
            return time - now > JUMP_FROM
        keyframe = index.search_timestamp(self.to_stamp(time))  # the last one at or before it
        return keyframe >= 0 and index[keyframe].timestamp > self.to_stamp(now)

    def jump(self, time: float) -> None:
        """Go on from a keyframe at or before a time."""
        # At our zero MPEG-TS gives its second keyframe; the first is at the zero of its own stamps.
        first = min(0.0, -self.clip.origin)
        # the index may give a keyframe after the time: go further back
        for back in (0.0, 1.0, 5.0, 25.0, math.inf):
            self.seek(max(time - back, first))
            self.decoded = self.decode()
            self.coming = next(self.decoded, None)
            if self.coming is not None and self.coming[0] <= time:
                break


class AudioTrack(Track):
    """The first audio stream of a clip."""

    kind = "audio"

    def segments(self, rate: int, end: float) -> Iterator[tuple[float, np.ndarray]]:
        """Yield (start in seconds, wave (N,) at `rate` Hz) of each piece up to `end`.

        A gap or another sample format begins another piece.
        """
        segment = None
        for time, frame in self.decode():
            if time > end:
                break
            if segment is None or not segment.continues_with(time, frame):
                if segment is not None:
                    yield segment.start, segment.finish()
                segment = Segment(time, frame, rate)
            segment.append(frame)
        else:  # at the end of the track
            if segment is None:
                raise MediaError(f"{self.clip.path}: no sound of it can be decoded; fetch it again")
        if segment is not None:
            yield segment.start, segment.finish()


class Segment:
    """A piece of sound without gaps and in one sample format.

    It is mixed to mono and resampled.
    """

    def __init__(self, start: float, frame: av.AudioFrame, rate: int):
        self.start = start
        self.sample_format = sample_format(frame)
        self.samples = 0  # read so far, at the rate of the file
        self.waves: list[np.ndarray] = []
        # what is mono at this rate already is only scaled: a resampler starts threads for it
        self.resampler = None
        if self.sample_format == ("s16", "mono", rate):
            return
        # maxval 1: the mean of the channels. Without it swresample lets loud ones add up above 1.
        options = {"rematrix_maxval": "1"}
        self.resampler = av.AudioResampler("flt", "mono", rate, options=options)

    def continues_with(self, time: float, frame: av.AudioFrame) -> bool:
        """Tell if a frame at `time` follows on what was read, in the same format."""
        if sample_format(frame) != self.sample_format:
            return False
        end = self.start + self.samples / frame.sample_rate
        return abs(end - time) <= GAP_TOLERANCE

    def append(self, frame: av.AudioFrame) -> None:
        self.samples += frame.samples
        if self.resampler is None:
            self.waves.append(frame.to_ndarray()[0].astype(np.float32) / 2**15)
            return
        self.waves += [part.to_ndarray()[0] for part in self.resampler.resample(frame)]

    def finish(self) -> np.ndarray:
        """Return the wave (N,) float32, with what the resampler still has in its buffer."""
        if self.resampler is not None:
            rest = [part for part in self.resampler.resample(None) if part is not None]
            self.waves += [part.to_ndarray()[0] for part in rest]
        return np.concatenate(self.waves) if self.waves else np.zeros(0, np.float32)


def sample_format(frame: av.AudioFrame) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate
