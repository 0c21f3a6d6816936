"""Media files as users have them: every container and codec, cut, rotated, offset, silent, empty.

All are made here. A frame carries its number as eight black or white bars, and sound its time as a
burst of a tone, so that both tell what was read.
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
from crab_min.media.read import media_seconds, read_audio, read_image, read_video
from crab_min.media.tracks import VideoTrack
from crab_min.media.write import write_audio, write_video

RATE = 16000
REAL = Path(os.environ.get("CRAB_MEDIA", Path(__file__).parents[2] / "shared" / "media"))


def numbered_frames(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames (count, height, width, 3) that show their numbers as bars: the first is bit 0."""
    bits = (np.arange(count)[:, None] >> np.arange(8)) & 1  # (T, 8)
    rows = np.repeat(255 * bits, width // 8, 1)  # (T, W)
    images = np.repeat(rows[:, None, :, None], height, 1)  # (T, H, W, 1)
    return images.repeat(3, 3).astype(np.uint8)


def frame_numbers(frames: np.ndarray) -> list[int]:
    """The numbers that frames (T, H, W, 3) show."""
    bars = frames.mean((1, 3)).reshape(len(frames), 8, -1).mean(2) > 128  # (T, 8)
    return (bars << np.arange(8)).sum(1).tolist()


def burst(seconds: float, start: float, rate: int = RATE) -> np.ndarray:
    """A wave with a tone of 0.2 s."""
    t = np.arange(round(seconds * rate)) / rate
    sounding = abs(t - start - 0.1) <= 0.1
    return (0.5 * np.sin(2 * np.pi * 600 * t) * sounding).astype(np.float32)


def onset(wave: np.ndarray, rate: int = RATE) -> float:
    return float(np.argmax(abs(wave) > 0.25)) / rate


def frames_on_screen(stamps: list[int], times: np.ndarray) -> list[int]:
    """The frames that are on the screen at `times`; they begin at `stamps` / 25 s."""
    return [int(np.searchsorted(stamps, 25 * time, "right")) - 1 for time in times]


def write_clip(
    path, frames, stamps=None, wave=None, name="mp4", fps=25, delay=0.0, gap=(0.0, 0.0), **options
):
    """Write a file as others do, with B-frames.

    stamps: times of the frames, in frames; delay: seconds by which the sound is late; gap: seconds
    of sound that are missing; options: of the container.
    """
    if stamps is None:
        stamps = range(len(frames))
    with av.open(str(path), "w", format=name, options=options) as container:
        codec_options = {"preset": "ultrafast", "bf": "2", "g": "20"}
        video = container.add_stream("libx264", rate=fps, options=codec_options)
        video.height, video.width = frames.shape[1:3]
        audio = None
        if wave is not None:
            audio = container.add_stream("aac", rate=RATE, layout="mono")
        for stamp, image in zip(stamps, frames):
            frame = av.VideoFrame.from_ndarray(image)
            frame.pts, frame.time_base = stamp, Fraction(1, fps)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio is None:
            return path
        frame = av.AudioFrame.from_ndarray(wave[None], format="flt", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        for packet in audio.encode(frame) + audio.encode():
            if not gap[0] <= float(packet.pts * packet.time_base) < gap[1]:
                packet.pts = packet.dts = packet.pts + round(delay / packet.time_base)
                container.mux(packet)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """10 s, 250 numbered frames, a tone from 3.0 to 3.2 s."""
    path = tmp_path_factory.mktemp("media") / "clip.mp4"
    write_video(path, numbered_frames(250), burst(10, 3.0))
    return path


# --- video ----------------------------------------------------------------------------------------


def test_frames_come_from_the_middle_of_each_part(clip):
    video = read_video(clip, 10, None)
    assert frame_numbers(video.frames) == [12, 37, 62, 87, 112, 137, 162, 187, 212, 237]
    assert video.seconds == 10
    assert video.frames.shape == (10, 48, 64, 3) and video.frames.dtype == np.uint8
    np.testing.assert_allclose(video.times, np.arange(10) + 0.5)


def test_frames_of_a_window(clip):
    video = read_video(clip, 4, 64, window=(2, 4))
    assert frame_numbers(video.frames) == [56, 68, 81, 93]
    assert video.frames.shape == (4, 64, 64, 3)
    beyond = read_video(clip, 3, None, window=(9, 12))
    assert frame_numbers(beyond.frames) == [237, 249, 249]  # the last one is repeated


def test_colours_and_shapes_survive(tmp_path):
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 100, 50)], np.uint8)
    quarters = np.repeat(colours.reshape(1, 2, 2, 3), 3, 0).repeat(48, 1).repeat(48, 2)
    write_video(tmp_path / "c.mp4", quarters, None)
    frame = read_video(tmp_path / "c.mp4", 1).frames[0]  # (224, 224, 3)
    centres = frame[56::112, 56::112].reshape(4, 3).astype(int)
    assert abs(centres - colours).max() <= 8


def test_a_clip_shorter_than_the_frames_asked_for_repeats_its_own(tmp_path):
    write_video(tmp_path / "s.mp4", numbered_frames(3), None)
    video = read_video(tmp_path / "s.mp4", 9, None)
    assert frame_numbers(video.frames) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_variable_frame_rate_goes_by_time(tmp_path):
    stamps = [0, 1, 2, 3, 4, 50, 100, 101, 102, 103]  # 2 s and 2 s on one frame each
    path = write_clip(tmp_path / "v.mp4", numbered_frames(10), stamps)
    video = read_video(path, 8, None)  # at 0.26, 0.78, ... s
    assert frame_numbers(video.frames) == frames_on_screen(stamps, video.times)
    assert frame_numbers(video.frames)[1:7] == [4, 4, 4, 5, 5, 5]


@pytest.mark.parametrize("name", ["mp4", "matroska", "mpegts", "avi", "flv"])
def test_seeking_gives_the_frames_of_decoding_straight(name, tmp_path, monkeypatch):
    path = write_clip(tmp_path / f"long.{name}", numbered_frames(250), name=name, fps=5)
    seeks = []
    seek = VideoTrack.seek

    def counted_seek(self, time):
        seeks.append(time)
        seek(self, time)

    monkeypatch.setattr(VideoTrack, "seek", counted_seek)

    def read(jump_pays) -> tuple[list[int], int]:
        """The frames, and how often was sought."""
        seeks.clear()
        monkeypatch.setattr(VideoTrack, "jump_pays", jump_pays)
        return frame_numbers(read_video(path, 10, None).frames), len(seeks)

    as_it_pays, sought = read(VideoTrack.jump_pays)
    straight, sought_straight = read(lambda *_: False)
    always, _ = read(lambda self, now, time: time > now)
    assert as_it_pays == straight == always
    expected = [12, 37, 62, 87, 112, 137, 162, 187, 212, 237]
    assert as_it_pays == pytest.approx(expected, abs=3)
    assert sought >= 8 and sought_straight <= 1  # 1: Matroska's index


def test_frames_far_apart_are_not_skipped_though_no_other_refers_to_them(tmp_path, monkeypatch):
    # 1/25 s each, then 1.6 s each, with B-frames
    stamps = [*range(200), *(200 + 40 * i for i in range(20))]
    path = write_clip(tmp_path / "slow.mp4", numbered_frames(220), stamps)
    jumps = []
    jump = VideoTrack.jump

    def counted_jump(self, time):
        jumps.append(time)
        jump(self, time)

    monkeypatch.setattr(VideoTrack, "jump_pays", lambda *_: False)
    monkeypatch.setattr(VideoTrack, "jump", counted_jump)
    for count in range(3, 21):
        video = read_video(path, count, None)
        assert frame_numbers(video.frames) == frames_on_screen(stamps, video.times)
    assert jumps  # some frames had been skipped, and were fetched


TURNS = {  # name: (display matrix a b c d, what turns the stored picture upright)
    "90": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "180": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    "270": ((0, -1, 1, 0), lambda x: np.rot90(x)),
    "mirrored": ((-1, 0, 0, 1), np.fliplr),
    "transposed": ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_rotated_recordings_come_upright(clip, tmp_path, turn):
    (a, b, c, d), upright = TURNS[turn]
    data = bytearray(clip.read_bytes())
    matrix = data.find(b"tkhd") + 44  # of the video track
    one = 1 << 16
    assert struct.unpack_from(">9i", data, matrix) == (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    turned = a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30
    struct.pack_into(">9i", data, matrix, *turned)
    (tmp_path / "r.mp4").write_bytes(data)
    expected = upright(read_video(clip, 1, None).frames[0])
    np.testing.assert_array_equal(read_video(tmp_path / "r.mp4", 1, None).frames[0], expected)


# --- sound ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".wav", ".mp3", ".m4a", ".ogg"])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_a_tone_keeps_its_place_in_every_codec(tmp_path, ending, rate):
    path = tmp_path / f"tone{ending}"
    write_audio(path, burst(5, 3.0, rate), rate)
    audio = read_audio(path)
    assert onset(audio.wave) == pytest.approx(3, abs=0.005)
    assert audio.wave.dtype == np.float32 and not audio.silent
    assert audio.seconds == pytest.approx(5, abs=0.02)
    assert len(audio.wave) == round(audio.seconds * RATE)
    assert media_seconds(path) == audio.seconds
    assert abs(audio.wave).max() == pytest.approx(0.5, abs=0.1)


def test_a_tone_keeps_its_place_in_a_clip(clip):
    audio = read_audio(clip)
    assert onset(audio.wave) == pytest.approx(3, abs=0.005)
    assert audio.seconds == media_seconds(clip) == 10


def test_a_window_of_sound_has_its_exact_length_and_silence_outside(clip):
    whole = np.pad(read_audio(clip).wave, (2 * RATE, 3 * RATE))  # from -2 to 13 s
    for start, end in ((2.5, 4), (-1, 1), (9, 12), (-2, 12.5), (1 / 3, 2 / 3)):
        wave = read_audio(clip, window=(start, end)).wave
        assert len(wave) == round((end - start) * RATE)
        first = round((start + 2) * RATE)
        np.testing.assert_allclose(wave, whole[first : first + len(wave)], atol=1e-6)
    assert onset(read_audio(clip, window=(2.5, 4)).wave) == pytest.approx(0.5, abs=0.005)


def test_a_window_far_into_a_long_file(tmp_path):
    write_audio(tmp_path / "long.mp3", burst(100, 80.0))
    audio = read_audio(tmp_path / "long.mp3", window=(79, 81))  # found by seeking
    assert onset(audio.wave) == pytest.approx(1, abs=0.005)
    assert audio.seconds == pytest.approx(100, abs=0.01)


def test_a_clip_without_a_sound_track_is_silent_and_says_so(tmp_path):
    path = tmp_path / "mute.mp4"
    write_video(path, numbered_frames(50), None)
    audio = read_audio(path)
    assert audio.silent and audio.seconds == 2
    assert len(audio.wave) == 2 * RATE and not audio.wave.any()
    assert len(read_audio(path, window=(0.5, 4)).wave) == 3.5 * RATE


@pytest.mark.parametrize("name", ["mpegts", "matroska"])
def test_pictures_and_sound_share_a_clock_that_starts_at_zero(tmp_path, name):
    stamps = np.arange(100) + 50
    path = tmp_path / f"late.{name}"
    write_clip(path, numbered_frames(100), stamps, burst(4, 1.0), name, delay=2.0)
    assert read_video(path).seconds == pytest.approx(4, abs=0.1)
    assert onset(read_audio(path).wave) == pytest.approx(1, abs=0.1)
    frames = read_video(path, 1, None, window=(1, 1.1)).frames
    assert frame_numbers(frames) == [pytest.approx(26, abs=2)]


def test_sound_that_starts_late_or_has_a_gap_stays_in_place(tmp_path):
    late = tmp_path / "late.mkv"
    write_clip(late, numbered_frames(100), None, burst(2, 1.0), "matroska", delay=1.5)
    assert onset(read_audio(late).wave) == pytest.approx(2.5, abs=0.1)

    gap = tmp_path / "gap.mkv"
    hum = 0.1 * np.sin(np.arange(4 * RATE)).astype(np.float32)
    tone = burst(4, 3.0) + hum
    write_clip(gap, numbered_frames(100), None, tone, "matroska", gap=(1.0, 2.0))
    wave = read_audio(gap).wave
    assert onset(wave) == pytest.approx(3, abs=0.1)
    assert not wave[int(1.2 * RATE) : int(1.8 * RATE)].any()
    assert abs(wave[int(2.3 * RATE) : int(2.8 * RATE)]).max() > 0.05


def test_channels_are_averaged_and_rates_converted(tmp_path):
    tone = np.sin(2 * np.pi * 440 * np.arange(44100) / 44100)
    with wavefile.open(str(tmp_path / "s.wav"), "wb") as file:
        file.setparams((2, 2, 44100, 0, "NONE", ""))
        file.writeframes((np.stack([tone, tone], 1) * 32767).astype("<i2").tobytes())
    audio = read_audio(tmp_path / "s.wav")
    expected = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    np.testing.assert_allclose(audio.wave[100:-100], expected[100:-100], atol=0.01)
    assert len(read_audio(tmp_path / "s.wav", rate=8000).wave) == 8000


# --- lengths --------------------------------------------------------------------------------------


def test_lengths_that_no_header_states_are_measured(tmp_path):
    path = tmp_path / "live.mkv"
    write_clip(path, numbered_frames(50), wave=burst(2, 1.0), name="matroska", live="1")
    assert media_seconds(path) == pytest.approx(2, abs=0.1)

    write_audio(tmp_path / "a.wav", burst(2, 1.0))
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"  # as a program writes it to a pipe
    (tmp_path / "pipe.wav").write_bytes(data)
    assert media_seconds(tmp_path / "pipe.wav") == 2
    assert onset(read_audio(tmp_path / "pipe.wav").wave) == pytest.approx(1, abs=0.005)


def test_a_cover_picture_does_not_shift_a_song(tmp_path):
    write_audio(tmp_path / "a.mp3", burst(3, 1.0))
    Image.new("RGB", (32, 32)).save(tmp_path / "c.png")
    cover = b"\0image/png\0\3\0" + (tmp_path / "c.png").read_bytes()
    frame = b"APIC" + struct.pack(">I", len(cover)) + b"\0\0" + cover
    size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    song = b"ID3\3\0\0" + size + frame + (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "cover.mp3").write_bytes(song)

    audio = read_audio(tmp_path / "cover.mp3")
    assert onset(audio.wave) == pytest.approx(1, abs=0.005)
    assert audio.seconds == pytest.approx(3, abs=0.01)
    with pytest.raises(MediaError, match="has no video"):
        read_video(tmp_path / "cover.mp3")


# --- images ---------------------------------------------------------------------------------------


def test_images_are_turned_and_squashed(tmp_path):
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, :30] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", None), np.rot90(image, -1))

    small = read_image(tmp_path / "a.png", 20)
    assert small.shape == (20, 20, 3) and small.dtype == np.uint8
    assert small[:9].min() > 250 and small[11:].max() < 5

    Image.fromarray(image[..., 0]).convert("P").save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png").shape == (224, 224, 3)


# --- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".mp3", ".ogg"])
def test_the_same_sound_gives_the_same_bytes(tmp_path, ending):
    first, second = tmp_path / f"a{ending}", tmp_path / f"b{ending}"
    for path in (first, second):
        write_audio(path, burst(1, 0.5))
    assert first.read_bytes() == second.read_bytes()


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, numbered_frames(5), None)
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_video(path, numbered_frames(5).astype(float), None)  # fails half way
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.mp4"]


def test_what_cannot_be_written_is_named(tmp_path):
    silence = np.zeros(9)
    with pytest.raises(MediaError, match="even"):
        write_video(tmp_path / "a.mp4", numbered_frames(2, 47), None)
    with pytest.raises(MediaError, match="T > 0"):
        write_video(tmp_path / "a.mp4", numbered_frames(0), None)
    with pytest.raises(MediaError, match="cannot write .xyz"):
        write_audio(tmp_path / "a.xyz", silence)
    with pytest.raises(MediaError, match="cannot be written"):
        write_audio(tmp_path / "a.mp3", silence, 12345)
    with pytest.raises(MediaError, match="check the folder"):
        write_audio(tmp_path / "none" / "a.wav", silence)
    assert not os.listdir(tmp_path)


# --- errors ---------------------------------------------------------------------------------------


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
    Image.fromarray(numbered_frames(1)[0]).save(folder / "image.jpg")

    # whole files; the first half of each is a broken one
    frames, wave = numbered_frames(250), burst(10, 3.0)
    write_clip(folder / "f.mp4", frames, wave=wave, movflags="faststart")
    write_clip(folder / "f.mkv", frames, wave=wave, name="matroska")
    write_audio(folder / "f.wav", wave)
    write_audio(folder / "f.mp3", wave)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "f.png")
    whole = {"nohead.mp4": clip}
    for ending in ("mp4", "mkv", "png", "wav", "mp3"):
        whole[f"cut.{ending}"] = folder / f"f.{ending}"
    for name, source in whole.items():
        (folder / name).write_bytes(source.read_bytes()[: source.stat().st_size // 2])

    # a download whose second half is missing
    data = (folder / "f.mp4").read_bytes()
    half = len(data) // 2
    (folder / "hole.mp4").write_bytes(data[:half] + bytes(len(data) - half))
    return folder


BROKEN = {
    "missing.mp4": "no such file",
    "folder.mp4": "a folder",
    "text.mp4": "not a video or sound file",
    "text.txt": "a picture or a text",
    "words.srt": "neither video nor audio",
    "empty.wav": "0 bytes",
    "zero.wav": "no samples",
    "image.jpg": "use read_image",
    "nohead.mp4": "cut short",
    "cut.mp4": "truncated",
    "cut.mkv": "truncated",
    "cut.wav": "truncated",
    "cut.mp3": "truncated",
    "hole.mp4": "damaged",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_used_is_an_error_with_its_path_and_reason(broken, name, capfd):
    readers = [read_video, read_audio]
    if name.endswith((".wav", ".mp3")):
        readers = [read_audio]
    if name == "hole.mp4":
        readers = [read_video]
    for reader in readers:
        with pytest.raises(MediaError, match=BROKEN[name]) as error:
            reader(broken / name)
        message = str(error.value)
        assert str(broken / name) in message and "\n" not in message and ";" in message
    assert capfd.readouterr() == ("", "")  # FFmpeg itself keeps quiet


def test_sound_has_no_frames(broken):
    with pytest.raises(MediaError, match="has no video"):
        read_video(broken / "f.wav")


@pytest.mark.parametrize(
    "name, reason",
    [
        ("missing.png", "no such file"),
        ("folder.mp4", "is a folder"),
        ("empty.wav", "0 bytes"),
        ("text.txt", "not a readable image"),
        ("cut.png", "not a readable image"),
    ],
)
def test_an_image_that_cannot_be_read_is_an_error(broken, name, reason):
    with pytest.raises(MediaError, match=reason):
        read_image(broken / name)


@pytest.mark.parametrize(
    "window", [(5, 5), (6, 5), (10, 12), (-3, 0), (float("nan"), 1), (0, float("inf"))]
)
def test_a_window_outside_the_clip_is_an_error(clip, window):
    for reader in (read_video, read_audio):
        with pytest.raises(MediaError, match="empty or outside"):
            reader(clip, window=window)


def test_no_frames_at_all_is_an_error(clip):
    with pytest.raises(MediaError, match="0 frames"):
        read_video(clip, 0)


# --- real files -----------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason="no real clips; set CRAB_MEDIA to their folder")
def test_real_files():
    endings = (".mp4", ".mp3", ".wav", ".jpg")
    videos, songs, waves, images = (sorted(REAL.rglob(f"*{ending}")) for ending in endings)
    assert videos and songs and waves and images
    for path in videos:
        video = read_video(path)
        assert video.frames.shape == (10, 224, 224, 3)
        assert video.seconds == pytest.approx(10, abs=0.1)
        changes = abs(np.diff(video.frames.astype(int), axis=0))
        assert video.frames.std() > 20 and changes.mean() > 0.5
    for path in videos + songs + waves:
        audio = read_audio(path)
        assert len(audio.wave) == round(audio.seconds * RATE)
        assert not audio.silent and abs(audio.wave).max() > 0.01
    for path in images:
        assert read_image(path).shape == (224, 224, 3)
    # the same sound, extracted by others, is not shifted
    for path in videos:
        extracted = path.parents[1] / "audio" / f"{path.stem}.mp3"
        a, b = (read_audio(file, window=(1, 9)).wave for file in (path, extracted))
        spectrum = np.fft.rfft(a) * np.fft.rfft(b).conj()
        lag = np.fft.irfft(spectrum).argmax()
        assert min(lag, len(a) - lag) < 0.01 * RATE
