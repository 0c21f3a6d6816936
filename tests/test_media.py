"""Media files as users have them: every container and codec, cut, rotated, offset, silent, empty. All are made here.

A frame carries its number as eight black or white bars, a sound its place as a burst of a tone, so that both say what was read.
"""
import os
import struct
import wave as wavefile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from crab_min.errors import MediaError
from crab_min.media import read as media
from crab_min.media.read import (
    media_seconds,
    read_audio,
    read_image,
    read_video,
    write_audio,
    write_video,
)

RATE = 16000
REAL = Path(os.environ.get("CRAB_MEDIA", Path(__file__).parents[2] / "shared" / "media"))


def numbered(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    bits = (np.arange(count)[:, None] >> np.arange(8)) & 1                                    # (T, 8)
    return np.repeat(np.repeat(255 * bits, width // 8, 1)[:, None, :, None], height, 1).repeat(3, 3).astype(np.uint8)


def numbers(frames: np.ndarray) -> list[int]:
    bars = frames.mean((1, 3)).reshape(len(frames), 8, -1).mean(2) > 128                       # (T, 8)
    return (bars << np.arange(8)).sum(1).tolist()


def burst(seconds: float, at: float, rate: int = RATE) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    return (.5 * np.sin(2 * np.pi * 600 * t) * (abs(t - at - .1) <= .1)).astype(np.float32)    # 0.2 s long


def onset(wave: np.ndarray, rate: int = RATE) -> float:
    return float(np.argmax(abs(wave) > .25)) / rate


def write(path, frames, stamps=None, wave=None, name="mp4", fps=25, delay=0., gap=(0., 0.), **options):
    """A file as others write them: B-frames, given stamps (in frames), sound `delay` seconds late or with a gap."""
    with av.open(str(path), "w", format=name, options=options) as container:
        video = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "bf": "2", "g": "20"})
        video.height, video.width = frames.shape[1:3]
        sound = None if wave is None else container.add_stream("aac", rate=RATE, layout="mono")
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image)
            frame.pts, frame.time_base = i if stamps is None else stamps[i], Fraction(1, fps)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if sound is not None:
            frame = av.AudioFrame.from_ndarray(wave[None], format="flt", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
            for packet in sound.encode(frame) + sound.encode():
                time = float(packet.pts * packet.time_base)
                if not gap[0] <= time < gap[1]:
                    packet.pts = packet.dts = packet.pts + round(delay / packet.time_base)
                    container.mux(packet)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """10 s, 250 numbered frames, a tone from 3.0 to 3.2 s."""
    path = tmp_path_factory.mktemp("media") / "clip.mp4"
    write_video(path, numbered(250), burst(10, 3.))
    return path


# --- pictures ---------------------------------------------------------------------------------------------------------
def test_frames_come_from_the_middle_of_each_part(clip):
    video = read_video(clip, 10, None)
    assert numbers(video.frames) == [12, 37, 62, 87, 112, 137, 162, 187, 212, 237] and video.seconds == 10
    assert video.frames.shape == (10, 48, 64, 3) and video.frames.dtype == np.uint8
    np.testing.assert_allclose(video.times, np.arange(10) + .5)


def test_frames_of_a_window(clip):
    video = read_video(clip, 4, 64, window=(2, 4))
    assert numbers(video.frames) == [56, 68, 81, 93] and video.frames.shape == (4, 64, 64, 3)
    assert numbers(read_video(clip, 3, None, window=(9, 12)).frames) == [237, 249, 249]        # held beyond the end


def test_colours_and_shapes_survive(tmp_path):
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 100, 50)], np.uint8)
    write_video(tmp_path / "c.mp4", np.repeat(colours.reshape(1, 2, 2, 3), 3, 0).repeat(48, 1).repeat(48, 2), None)
    frame = read_video(tmp_path / "c.mp4", 1).frames[0]                                        # (224, 224, 3)
    assert abs(frame[56::112, 56::112].reshape(4, 3).astype(int) - colours).max() <= 8


def test_a_clip_shorter_than_the_frames_asked_for_repeats_its_own(tmp_path):
    write_video(tmp_path / "s.mp4", numbered(3), None)
    assert numbers(read_video(tmp_path / "s.mp4", 9, None).frames) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_variable_frame_rate_goes_by_time(tmp_path):
    stamps = [0, 1, 2, 3, 4, 50, 100, 101, 102, 103]                                           # 2 s and 2 s on one frame each
    path = write(tmp_path / "v.mp4", numbered(10), stamps)
    video = read_video(path, 8, None)                                                          # at 0.26, 0.78, ... s
    assert numbers(video.frames) == [int(np.searchsorted(stamps, 25 * t, "right")) - 1 for t in video.times]
    assert numbers(video.frames)[1:7] == [4, 4, 4, 5, 5, 5]


@pytest.mark.parametrize("name", ["mp4", "matroska", "mpegts", "avi", "flv"])
def test_seeking_gives_the_frames_of_decoding_straight(name, tmp_path, monkeypatch):
    path, found, jumps = write(tmp_path / f"long.{name}", numbered(250), name=name, fps=5), [], []
    seek = media._Track.seek
    monkeypatch.setattr(media._Track, "seek", lambda self, time: (jumps.append(time), seek(self, time)))
    for pays in (media._Track.jump_pays, lambda *_: False, lambda self, now, time: time > now):
        monkeypatch.setattr(media._Track, "jump_pays", pays)
        found.append((numbers(read_video(path, 10, None).frames), len(jumps)))
    assert found[0][0] == found[1][0] == found[2][0]
    assert found[0][0] == pytest.approx([12, 37, 62, 87, 112, 137, 162, 187, 212, 237], abs=3)
    assert found[0][1] >= 8 and found[1][1] - found[0][1] <= 1                                # it does jump; Matroska's index


def test_frames_far_apart_are_not_skipped_though_no_other_refers_to_them(tmp_path, monkeypatch):
    stamps = [*range(200), *(200 + 40 * i for i in range(20))]                                 # 1/25 s, then 1.6 s each, with B-frames
    path, jumps, jump = write(tmp_path / "slow.mp4", numbered(220), stamps), [], media._Track.jump
    monkeypatch.setattr(media._Track, "jump_pays", lambda *_: False)
    monkeypatch.setattr(media._Track, "jump", lambda self, time: (jumps.append(time), jump(self, time))[1])
    for count in range(3, 21):
        video = read_video(path, count, None)
        assert numbers(video.frames) == [int(np.searchsorted(stamps, 25 * t, "right")) - 1 for t in video.times]
    assert jumps                                                                               # some had been skipped, and were fetched


TURNS = {"90": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)), "180": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
         "270": ((0, -1, 1, 0), lambda x: np.rot90(x)), "mirrored": ((-1, 0, 0, 1), np.fliplr),
         "transposed": ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1))}


@pytest.mark.parametrize("turn", TURNS)
def test_rotated_recordings_come_upright(clip, tmp_path, turn):
    (a, b, c, d), upright = TURNS[turn]
    data = bytearray(clip.read_bytes())
    matrix = data.find(b"tkhd") + 44                                                           # of the video track
    assert struct.unpack_from(">9i", data, matrix) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, matrix, a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    (tmp_path / "r.mp4").write_bytes(data)
    expected = upright(read_video(clip, 1, None).frames[0])
    np.testing.assert_array_equal(read_video(tmp_path / "r.mp4", 1, None).frames[0], expected)


# --- sound ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ending", [".wav", ".mp3", ".m4a", ".ogg"])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_a_tone_keeps_its_place_in_every_codec(tmp_path, ending, rate):
    path = tmp_path / f"tone{ending}"
    write_audio(path, burst(5, 3., rate), rate)
    audio = read_audio(path)
    assert onset(audio.wave) == pytest.approx(3, abs=.005) and audio.wave.dtype == np.float32 and not audio.silent
    assert audio.seconds == pytest.approx(5, abs=.02) and len(audio.wave) == round(audio.seconds * RATE)
    assert media_seconds(path) == audio.seconds
    assert abs(audio.wave).max() == pytest.approx(.5, abs=.1)


def test_a_tone_keeps_its_place_in_a_clip(clip):
    audio = read_audio(clip)
    assert onset(audio.wave) == pytest.approx(3, abs=.005) and audio.seconds == media_seconds(clip) == 10


def test_a_window_of_sound_has_its_exact_length_and_silence_outside(clip):
    whole = read_audio(clip).wave
    for start, end in ((2.5, 4), (-1, 1), (9, 12), (-2, 12.5), (1 / 3, 2 / 3)):
        wave = read_audio(clip, window=(start, end)).wave
        assert len(wave) == round((end - start) * RATE)
        padded = np.pad(whole, (2 * RATE, 3 * RATE))[round((start + 2) * RATE):][:len(wave)]
        np.testing.assert_allclose(wave, padded, atol=1e-6)
    assert onset(read_audio(clip, window=(2.5, 4)).wave) == pytest.approx(.5, abs=.005)


def test_a_window_far_into_a_long_file(tmp_path):
    write_audio(tmp_path / "long.mp3", burst(100, 80.))
    audio = read_audio(tmp_path / "long.mp3", window=(79, 81))                                 # found by seeking
    assert onset(audio.wave) == pytest.approx(1, abs=.005) and audio.seconds == pytest.approx(100, abs=.01)


def test_a_clip_without_a_sound_track_is_silent_and_says_so(tmp_path):
    write_video(tmp_path / "mute.mp4", numbered(50), None)
    audio = read_audio(tmp_path / "mute.mp4")
    assert audio.silent and audio.seconds == 2 and len(audio.wave) == 2 * RATE and not audio.wave.any()
    assert len(read_audio(tmp_path / "mute.mp4", window=(.5, 4)).wave) == 3.5 * RATE


@pytest.mark.parametrize("name", ["mpegts", "matroska"])
def test_pictures_and_sound_share_a_clock_that_starts_at_zero(tmp_path, name):
    path = write(tmp_path / f"late.{name}", numbered(100), np.arange(100) + 50, burst(4, 1.), name, delay=2.)
    assert read_video(path).seconds == pytest.approx(4, abs=.1)
    assert onset(read_audio(path).wave) == pytest.approx(1, abs=.1)
    assert numbers(read_video(path, 1, None, window=(1, 1.1)).frames) == [pytest.approx(26, abs=2)]


def test_sound_that_starts_late_or_has_a_gap_stays_in_place(tmp_path):
    late = write(tmp_path / "late.mkv", numbered(100), None, burst(2, 1.), "matroska", delay=1.5)
    assert onset(read_audio(late).wave) == pytest.approx(2.5, abs=.1)
    tone = burst(4, 3.) + .1 * np.sin(np.arange(4 * RATE)).astype(np.float32)
    gap = read_audio(write(tmp_path / "gap.mkv", numbered(100), None, tone, "matroska", gap=(1., 2.))).wave
    assert onset(gap) == pytest.approx(3, abs=.1)
    assert not gap[int(1.2 * RATE):int(1.8 * RATE)].any() and abs(gap[int(2.3 * RATE):int(2.8 * RATE)]).max() > .05


def test_channels_are_averaged_and_rates_converted(tmp_path):
    left = np.sin(2 * np.pi * 440 * np.arange(44100) / 44100)
    with wavefile.open(str(tmp_path / "s.wav"), "wb") as file:
        file.setparams((2, 2, 44100, 0, "NONE", ""))
        file.writeframes((np.stack([left, left], 1) * 32767).astype("<i2").tobytes())
    audio = read_audio(tmp_path / "s.wav")
    np.testing.assert_allclose(audio.wave[100:-100], np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)[100:-100], atol=.01)
    assert len(read_audio(tmp_path / "s.wav", rate=8000).wave) == 8000


# --- lengths ----------------------------------------------------------------------------------------------------------
def test_lengths_that_no_header_states_are_measured(tmp_path):
    path = write(tmp_path / "live.mkv", numbered(50), wave=burst(2, 1.), name="matroska", live="1")
    assert media_seconds(path) == pytest.approx(2, abs=.1)
    write_audio(tmp_path / "a.wav", burst(2, 1.))
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"                                              # as written to a pipe
    (tmp_path / "pipe.wav").write_bytes(data)
    assert media_seconds(tmp_path / "pipe.wav") == 2
    assert onset(read_audio(tmp_path / "pipe.wav").wave) == pytest.approx(1, abs=.005)


def test_a_cover_picture_does_not_shift_a_song(tmp_path):
    write_audio(tmp_path / "a.mp3", burst(3, 1.))
    Image.new("RGB", (32, 32)).save(tmp_path / "c.png")
    cover = b"\0image/png\0\3\0" + (tmp_path / "c.png").read_bytes()
    frame = b"APIC" + struct.pack(">I", len(cover)) + b"\0\0" + cover
    size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    (tmp_path / "cover.mp3").write_bytes(b"ID3\3\0\0" + size + frame + (tmp_path / "a.mp3").read_bytes())
    audio = read_audio(tmp_path / "cover.mp3")
    assert onset(audio.wave) == pytest.approx(1, abs=.005) and audio.seconds == pytest.approx(3, abs=.01)
    with pytest.raises(MediaError, match="has no video"):
        read_video(tmp_path / "cover.mp3")


# --- images -----------------------------------------------------------------------------------------------------------
def test_images_are_turned_and_squashed(tmp_path):
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, :30] = 255                                                                        # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6                                                                           # to be turned by 90 degrees
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", None), np.rot90(image, -1))
    small = read_image(tmp_path / "a.png", 20)
    assert small.shape == (20, 20, 3) and small.dtype == np.uint8 and small[:9].min() > 250 and small[11:].max() < 5
    Image.fromarray(image[..., 0]).convert("P").save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png").shape == (224, 224, 3)


# --- writing ----------------------------------------------------------------------------------------------------------
def test_the_same_sound_gives_the_same_bytes(tmp_path):
    for ending in (".mp3", ".ogg"):
        for name in "ab":
            write_audio(tmp_path / f"{name}{ending}", burst(1, .5))
        assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(5), None)
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(ValueError):
        write_video(tmp_path / "a.mp4", numbered(5).astype(float), None)                       # fails half way
    assert (tmp_path / "a.mp4").read_bytes() == before and os.listdir(tmp_path) == ["a.mp4"]


def test_what_cannot_be_written_is_named(tmp_path):
    for expected, call in (("even", lambda: write_video(tmp_path / "a.mp4", numbered(2, 47), None)),
                           ("T > 0", lambda: write_video(tmp_path / "a.mp4", numbered(0), None)),
                           ("cannot write .xyz", lambda: write_audio(tmp_path / "a.xyz", np.zeros(9))),
                           ("cannot be written", lambda: write_audio(tmp_path / "a.mp3", np.zeros(9), 12345)),
                           ("check the folder", lambda: write_audio(tmp_path / "none" / "a.wav", np.zeros(9)))):
        with pytest.raises(MediaError, match=expected):
            call()
    assert not os.listdir(tmp_path)


# --- errors -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def broken(tmp_path_factory, clip) -> Path:
    """A folder of files that cannot be used."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "text.mp4").write_text("not a video\n" * 99)
    (folder / "text.txt").write_text("not a video\n" * 99)
    (folder / "words.srt").write_text("1\n00:00:00,000 --> 00:00:02,000\nhello\n\n")
    (folder / "empty.wav").write_bytes(b"")
    (folder / "folder.mp4").mkdir()
    with wavefile.open(str(folder / "zero.wav"), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
    Image.fromarray(numbered(1)[0]).save(folder / "image.jpg")
    whole = {"nohead.mp4": clip, "cut.mp4": write(folder / "f.mp4", numbered(250), wave=burst(10, 3.), movflags="faststart"),
             "cut.mkv": write(folder / "f.mkv", numbered(250), wave=burst(10, 3.), name="matroska"), "cut.png": folder / "f.png"}
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(folder / "f.png")
    for ending in (".wav", ".mp3"):
        write_audio(whole.setdefault(f"cut{ending}", folder / f"f{ending}"), burst(10, 3.))
    for name, source in whole.items():
        (folder / name).write_bytes(source.read_bytes()[:source.stat().st_size // 2])
    zeros = bytearray((folder / "f.mp4").read_bytes())
    zeros[len(zeros) // 2:] = bytes(len(zeros) - len(zeros) // 2)                               # a download with a hole
    (folder / "hole.mp4").write_bytes(zeros)
    return folder


@pytest.mark.parametrize("name, reason", [
    ("missing.mp4", "no such file"), ("folder.mp4", "a folder"), ("text.mp4", "not a video or sound file"),
    ("text.txt", "a picture or a text"), ("words.srt", "neither video nor audio"), ("empty.wav", "0 bytes"),
    ("zero.wav", "no samples"), ("image.jpg", "use read_image"), ("nohead.mp4", "cut short"), ("cut.mp4", "truncated"),
    ("cut.mkv", "truncated"), ("cut.wav", "truncated"), ("cut.mp3", "truncated"), ("hole.mp4", "damaged")])
def test_a_file_that_cannot_be_used_is_an_error_with_its_path_and_reason(broken, name, reason, capfd):
    readers = [read_audio] if name.endswith((".wav", ".mp3")) else [read_video, read_audio]
    for reader in readers if name != "hole.mp4" else [read_video]:
        with pytest.raises(MediaError, match=reason) as error:
            reader(broken / name)
        assert str(broken / name) in str(error.value) and "\n" not in str(error.value) and ";" in str(error.value)
    assert capfd.readouterr() == ("", "")                                                      # FFmpeg itself keeps quiet


def test_sound_has_no_frames(broken):
    with pytest.raises(MediaError, match="has no video"):
        read_video(broken / "f.wav")


@pytest.mark.parametrize("name, reason", [("missing.png", "no such file"), ("folder.mp4", "is a folder"), ("empty.wav", "0 bytes"),
                                          ("text.txt", "not a readable image"), ("cut.png", "not a readable image")])
def test_an_image_that_cannot_be_read_is_an_error(broken, name, reason):
    with pytest.raises(MediaError, match=reason):
        read_image(broken / name)


@pytest.mark.parametrize("window", [(5, 5), (6, 5), (10, 12), (-3, 0), (float("nan"), 1), (0, float("inf"))])
def test_a_window_outside_the_clip_is_an_error(clip, window):
    for reader in (read_video, read_audio):
        with pytest.raises(MediaError, match="empty or outside"):
            reader(clip, window=window)


def test_no_frames_at_all_is_an_error(clip):
    with pytest.raises(MediaError, match="0 frames"):
        read_video(clip, 0)


# --- real files -------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not REAL.is_dir(), reason="real clips are not part of the repository; set CRAB_MEDIA to their folder")
def test_real_files():
    files = {ending: sorted(REAL.rglob(f"*{ending}")) for ending in (".mp4", ".mp3", ".wav", ".jpg")}
    assert all(files.values())
    for path in files[".mp4"]:
        video = read_video(path)
        assert video.frames.shape == (10, 224, 224, 3) and video.seconds == pytest.approx(10, abs=.1)
        assert video.frames.std() > 20 and abs(np.diff(video.frames.astype(int), axis=0)).mean() > .5
    for path in files[".mp4"] + files[".mp3"] + files[".wav"]:
        audio = read_audio(path)
        assert len(audio.wave) == round(audio.seconds * RATE) and not audio.silent and abs(audio.wave).max() > .01
    for path in files[".jpg"]:
        assert read_image(path).shape == (224, 224, 3)
    for path in files[".mp4"]:                                                                 # the same sound, extracted by others
        a, b = (read_audio(p, window=(1, 9)).wave for p in (path, path.parents[1] / "audio" / f"{path.stem}.mp3"))
        spectrum = np.fft.rfft(a) * np.fft.rfft(b).conj()
        lag = np.fft.irfft(spectrum).argmax()
        assert min(lag, len(a) - lag) < .01 * RATE
