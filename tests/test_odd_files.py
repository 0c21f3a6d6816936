"""Odd but valid files: each kind gives its frames, its length and its sound."""
import wave as wavefile
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from crab_min.media.read import media_seconds, read_audio, read_image, read_video

TONE = 440                                             # Hz


def tone(seconds: float, rate: int) -> np.ndarray:
    return (.5 * np.sin(2 * np.pi * TONE * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def make(path, name: str, video: str = "libx264", audio: str | None = "aac", seconds: float = 4, fps: float = 25, rate: int = 48000, layout: str = "stereo",
         sound: float | None = None, start: float = 0, size: tuple = (64, 48), count: int | None = None, options: dict | None = None):
    """A clip that grows brighter from black to white, with a tone; `sound`: its seconds, `start`: of the first stamp, `count`: of frames."""
    with av.open(str(path), "w", format=name) as container:
        track = container.add_stream(video, rate=Fraction(fps).limit_denominator(1001), options=options or {})
        track.width, track.height = size
        track.pix_fmt = "rgb8" if video == "gif" else "yuvj420p" if video == "mjpeg" else "yuv420p"
        heard = container.add_stream(audio, rate=rate, layout=layout) if audio else None
        total = count or round(seconds * fps)
        for i in range(total):
            image = np.full((size[1], size[0], 3), round(255 * i / max(1, total - 1)), np.uint8)
            frame = av.VideoFrame.from_ndarray(image)
            frame.time_base = Fraction(1, 90000)
            frame.pts = round((start + i / fps) * 90000)
            container.mux(track.encode(frame))
        container.mux(track.encode())
        if heard is not None:
            channels = heard.layout.nb_channels
            frame = av.AudioFrame.from_ndarray(np.repeat(tone(sound or seconds, rate)[None], channels, 0), format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, round(start * rate), Fraction(1, rate)
            fifo = av.AudioResampler(format=heard.format, layout=layout, rate=rate, frame_size=heard.codec_context.frame_size or 1024)
            for piece in [*fifo.resample(frame), *fifo.resample(None)]:
                container.mux(heard.encode(piece))
            container.mux(heard.encode())


# kind: (file, what is odd about it, seconds of the clip)
KINDS = {
    "mov": ("a.mov", dict(name="mov"), 4), "mkv": ("a.mkv", dict(name="matroska"), 4), "avi": ("a.avi", dict(name="avi", video="mpeg4", audio="libmp3lame"), 4),
    "webm": ("a.webm", dict(name="webm", video="libvpx-vp9", audio="libopus", options={"deadline": "realtime", "cpu-used": "8"}), 4),
    "gif": ("a.gif", dict(name="gif", video="gif", audio=None, fps=10), 4), "mpegts": ("a.ts", dict(name="mpegts"), 4),
    "mjpeg": ("a.mkv", dict(name="matroska", video="mjpeg"), 4),
    "no sound": ("a.mp4", dict(name="mp4", audio=None), 4), "5.1": ("a.mp4", dict(name="mp4", layout="5.1"), 4),
    "8 kHz": ("a.mp4", dict(name="mp4", rate=8000, layout="mono"), 4), "22 kHz": ("a.mp4", dict(name="mp4", rate=22050), 4),
    "96 kHz": ("a.mp4", dict(name="mp4", rate=96000), 4),
    "one frame": ("a.mp4", dict(name="mp4", count=1), 4), "1 frame a second": ("a.mp4", dict(name="mp4", fps=1), 4),
    "4 frames a second": ("a.mp4", dict(name="mp4", fps=4), 4), "29.97 frames a second": ("a.mp4", dict(name="mp4", fps=30000 / 1001), 4),
    "120 frames a second": ("a.mp4", dict(name="mp4", fps=120), 4),
    "open groups of pictures": ("a.mp4", dict(name="mp4", options={"x264-params": "open-gop=1:keyint=20:bframes=3"}), 4),
    "one key frame": ("a.mp4", dict(name="mp4", options={"g": "10000", "keyint_min": "10000"}), 4),
    "sound longer": ("a.mp4", dict(name="mp4", sound=6), 6), "sound shorter": ("a.mp4", dict(name="mp4", sound=2), 4),
    "starts late": ("a.ts", dict(name="mpegts", start=100), 4), "starts late, mkv": ("a.mkv", dict(name="matroska", start=7), None),
    "tall": ("a.mp4", dict(name="mp4", size=(32, 480)), 4), "H.265": ("a.mp4", dict(name="mp4", video="libx265", options={"x265-params": "log-level=none"}), 4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_odd_clips(kind, tmp_path):
    file, odd, seconds = KINDS[kind]
    make(tmp_path / file, **odd)
    video = read_video(tmp_path / file, 8, 32)
    levels = video.frames.mean((1, 2, 3))
    assert video.frames.shape == (8, 32, 32, 3)
    if odd.get("count") != 1:
        assert (np.diff(levels) >= 0).all() and levels[0] < 70 and levels[-1] > 150          # from dark to bright, in order
    audio = read_audio(tmp_path / file)
    assert seconds is None or abs(media_seconds(tmp_path / file) - seconds) < .3
    if odd.get("audio", "aac") is None:
        assert audio.silent and not audio.wave.any()
        return
    heard = audio.wave[audio.wave.nonzero()[0][0]:][4000:20000]                # a second from where sound begins
    assert abs(np.fft.rfft(heard * np.hanning(len(heard))).__abs__().argmax() * 16000 / len(heard) - TONE) < 3 and heard.std() > .1


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_waves_of_every_width(tmp_path, bits):
    samples = tone(1, 11025)
    with wavefile.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(bits // 8), file.setframerate(11025)
        file.writeframes((samples * 127 + 128).astype(np.uint8).tobytes() if bits == 8 else (samples * (2 ** (bits - 1) - 1)).astype(f"<i{bits // 8}").tobytes())
    wave = read_audio(tmp_path / "a.wav").wave
    assert abs(len(wave) - 16000) < 50 and wave.std() == pytest.approx(.5 / 2 ** .5, abs=.03)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_images_of_every_mode(tmp_path, mode):
    image = Image.new("L", (40, 30), 200)
    image = Image.fromarray(np.full((30, 40), 200 * 257, np.uint16)) if mode == "I;16" else image.convert("RGB").convert(mode)
    image.save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    assert read_image(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), 16).shape == (16, 16, 3)


def test_an_hour_is_read_by_seeking(tmp_path):
    make(tmp_path / "a.mp4", "mp4", seconds=3600, fps=1, rate=16000, layout="mono", size=(32, 32), sound=3600)
    video = read_video(tmp_path / "a.mp4", 10, 32, window=(3000, 3010))
    assert len(set(video.frames.mean((1, 2, 3)).round())) <= 2 and video.frames.mean() == pytest.approx(255 * 3005 / 3600, abs=6)
    assert read_audio(tmp_path / "a.mp4", window=(3500, 3510)).wave.std() > .3
