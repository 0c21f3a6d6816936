"""Odd but valid files: each kind gives its frames, its length and its sound."""

import wave as wavefile
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from crab_min.media.read import media_seconds, read_audio, read_image, read_video

TONE = 440  # Hz


def tone(seconds: float, rate: int) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * TONE * t)).astype(np.float32)


@dataclass
class OddClip:
    """A clip that grows brighter from black to white, with a tone."""

    file: str = "a.mp4"
    container: str = "mp4"
    video: str = "libx264"
    audio: str | None = "aac"
    seconds: float = 4
    sound_seconds: float | None = None  # None: as long as the picture
    start: float = 0  # the first time stamp, in seconds
    fps: float = 25
    frames: int | None = None  # None: fps * seconds
    size: tuple[int, int] = (64, 48)  # width, height
    rate: int = 48000
    layout: str = "stereo"
    options: dict = field(default_factory=dict)  # of the video codec
    expected_seconds: float | None = 4  # None: not tested

    def write(self, folder: Path) -> Path:
        path = folder / self.file
        with av.open(str(path), "w", format=self.container) as container:
            # both streams are declared before the first packet
            fps = Fraction(self.fps).limit_denominator(1001)
            video = container.add_stream(self.video, rate=fps, options=self.options)
            video.width, video.height = self.size
            video.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(self.video, "yuv420p")
            audio = None
            if self.audio:
                audio = container.add_stream(self.audio, rate=self.rate, layout=self.layout)
            self.write_frames(container, video)
            if audio is not None:
                self.write_sound(container, audio)
        return path

    def write_frames(self, container, video) -> None:
        width, height = self.size
        count = self.frames or round(self.seconds * self.fps)
        for i in range(count):
            level = round(255 * i / max(1, count - 1))
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), level, np.uint8))
            frame.time_base = Fraction(1, 90000)
            frame.pts = round((self.start + i / self.fps) * 90000)
            container.mux(video.encode(frame))
        container.mux(video.encode())

    def write_sound(self, container, audio) -> None:
        wave = tone(self.sound_seconds or self.seconds, self.rate)
        channels = np.repeat(wave[None], audio.layout.nb_channels, 0)  # (channels, N)
        frame = av.AudioFrame.from_ndarray(channels, format="fltp", layout=self.layout)
        frame.sample_rate, frame.time_base = self.rate, Fraction(1, self.rate)
        frame.pts = round(self.start * self.rate)
        resampler = av.AudioResampler(
            format=audio.format,
            layout=self.layout,
            rate=self.rate,
            frame_size=audio.codec_context.frame_size or 1024,
        )
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(audio.encode(part))
        container.mux(audio.encode())


VP9_FAST = {"deadline": "realtime", "cpu-used": "8"}
OPEN_GROUPS = {"x264-params": "open-gop=1:keyint=20:bframes=3"}
ONE_KEYFRAME = {"g": "10000", "keyint_min": "10000"}
QUIET = {"x265-params": "log-level=none"}
KINDS = {
    "mov": OddClip("a.mov", "mov"),
    "mkv": OddClip("a.mkv", "matroska"),
    "avi": OddClip("a.avi", "avi", "mpeg4", "libmp3lame"),
    "webm": OddClip("a.webm", "webm", "libvpx-vp9", "libopus", options=VP9_FAST),
    "gif": OddClip("a.gif", "gif", "gif", audio=None, fps=10),
    "mpegts": OddClip("a.ts", "mpegts"),
    "mjpeg": OddClip("a.mkv", "matroska", "mjpeg"),
    "H.265": OddClip(video="libx265", options=QUIET),
    "no sound": OddClip(audio=None),
    "5.1": OddClip(layout="5.1"),
    "8 kHz": OddClip(rate=8000, layout="mono"),
    "22 kHz": OddClip(rate=22050),
    "96 kHz": OddClip(rate=96000),
    "one frame": OddClip(frames=1),
    "1 frame per second": OddClip(fps=1),
    "4 frames per second": OddClip(fps=4),
    "29.97 frames per second": OddClip(fps=30000 / 1001),
    "120 frames per second": OddClip(fps=120),
    "open groups of pictures": OddClip(options=OPEN_GROUPS),
    "one keyframe": OddClip(options=ONE_KEYFRAME),
    "tall": OddClip(size=(32, 480)),
    "sound longer": OddClip(sound_seconds=6, expected_seconds=6),
    "sound shorter": OddClip(sound_seconds=2),
    "starts late": OddClip("a.ts", "mpegts", start=100),
    "starts late, mkv": OddClip("a.mkv", "matroska", start=7, expected_seconds=None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_odd_clips(kind, tmp_path):
    clip = KINDS[kind]
    path = clip.write(tmp_path)
    if clip.expected_seconds is not None:
        assert abs(media_seconds(path) - clip.expected_seconds) < 0.3

    # from dark to bright, in order
    video = read_video(path, 8, 32)
    levels = video.frames.mean((1, 2, 3))
    assert video.frames.shape == (8, 32, 32, 3)
    if clip.frames != 1:
        assert (np.diff(levels) >= 0).all() and levels[0] < 70 and levels[-1] > 150

    audio = read_audio(path)
    if clip.audio is None:
        assert audio.silent and not audio.wave.any()
        return
    # the pitch of one second, soon after the sound begins
    sounding = audio.wave[audio.wave.nonzero()[0][0] :][4000:20000]
    spectrum = abs(np.fft.rfft(sounding * np.hanning(len(sounding))))
    pitch = spectrum.argmax() * 16000 / len(sounding)
    assert abs(pitch - TONE) < 3 and sounding.std() > 0.1


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_waves_of_every_width(tmp_path, bits):
    samples = tone(1, 11025)
    if bits == 8:
        data = (samples * 127 + 128).astype(np.uint8)
    else:
        data = (samples * (2 ** (bits - 1) - 1)).astype(f"<i{bits // 8}")
    with wavefile.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, bits // 8, 11025, 0, "NONE", ""))
        file.writeframes(data.tobytes())
    wave = read_audio(tmp_path / "a.wav").wave
    assert abs(len(wave) - 16000) < 50
    assert wave.std() == pytest.approx(0.5 / 2**0.5, abs=0.03)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_images_of_every_mode(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        image = Image.fromarray(np.full((30, 40), 200 * 257, np.uint16))
    else:
        image = Image.new("RGB", (40, 30), (200, 200, 200)).convert(mode)
    image.save(path)
    assert read_image(path, 16).shape == (16, 16, 3)


def test_a_long_clip_is_read_by_seeking(tmp_path):
    long = OddClip(seconds=900, fps=1, rate=8000, layout="mono", size=(32, 32))
    path = long.write(tmp_path)
    frames = read_video(path, 10, 32, window=(700, 710)).frames
    levels = frames.mean((1, 2, 3))
    assert levels.mean() == pytest.approx(255 * 705 / 900, abs=6)
    assert np.ptp(levels) < 5  # 10 of 900 s
    assert read_audio(path, window=(800, 810)).wave.std() > 0.3
