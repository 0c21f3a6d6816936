"""Hostile files: 330 broken ones, read in a process of their own.

Each ends in a value or in a named error: no crash, no hang, no gigabyte. How many ended how is
printed by `python tests/test_hostile.py` and by `pytest -s tests/test_hostile.py`.
"""

import json
import multiprocessing
import random
import resource
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

import av
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from crab_min.errors import DataError, MediaError
from crab_min.media.read import media_seconds, read_audio, read_image, read_video
from crab_min.media.write import write_audio, write_video
from crab_min.sources.av_uie import read_list

SECONDS = 10  # that one file may take
STARTING = 50  # seconds more for the first one: a process takes a while to start
BYTES = 1e9  # by which one file may let the process grow
KINDS = {".mp4": 60, ".mkv": 60, ".wav": 60, ".mp3": 60, ".jpg": 60, ".json": 30}  # broken ones
HUGE = (b"\xff" * 4, b"\x7f" + b"\xff" * 3, b"\x00\x00\x00\x00")  # sizes that are not true
HEADERS = (b"\x00", b"RIFF", b"<html>")
GOOD_OUTCOMES = {"value", "MediaError", "DataError"}


def write_whole_files(folder: Path) -> list[Path]:
    """Write a valid file of each kind."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (50, 64, 64, 3), dtype=np.uint8)
    wave = (0.3 * np.sin(np.arange(32000) / 9)).astype(np.float32)
    write_video(folder / "a.mp4", frames, wave)
    remux(folder / "a.mp4", folder / "a.mkv")
    write_audio(folder / "a.wav", wave)
    write_audio(folder / "a.mp3", wave)
    Image.fromarray(frames[0]).save(folder / "a.jpg")
    rows = []
    for i in range(20):
        rows.append({"video_path": f"{i}.mp4", "audio_path": f"{i}.mp3", "event": "dog"})
    (folder / "a.json").write_text(json.dumps(rows))
    return [folder / f"a{kind}" for kind in KINDS]


def remux(source: Path, target: Path) -> None:
    """Copy the streams of an MP4 into a Matroska file."""
    with av.open(str(source)) as read, av.open(str(target), "w", format="matroska") as written:
        streams = {s.index: written.add_stream_from_template(s) for s in read.streams}
        for packet in read.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                written.mux(packet)


def break_file(content: bytes, rng: random.Random, way: int) -> bytes:
    """Break a file in one of six ways."""
    data = bytearray(content)
    if way == 0:  # single bits, anywhere
        for _ in range(rng.choice([1, 8, 64])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == 1:  # cut off
        del data[rng.choice([0, 1, 16, rng.randrange(len(data))]) :]
    elif way == 2:  # a false header
        length = rng.choice([4, 16, 64])
        header = rng.choice([*HEADERS, bytes([rng.randrange(256)])])
        data[:length] = header * 16
    elif way == 3:  # huge or empty sizes near the start, where headers are
        for _ in range(rng.choice([1, 4])):
            start = rng.randrange(min(len(data) - 4, 600))
            data[start : start + 4] = rng.choice(HUGE)
    elif way == 4:  # a piece missing, twice or full of noise
        start = rng.randrange(len(data))
        end = start + rng.randrange(2000)
        twice = bytes(data[start : start + 500]) * 2
        data[start:end] = rng.choice([b"", twice, rng.randbytes(700)])
    else:  # huge sizes near the end, where an MP4's index is
        start = rng.randrange(max(0, len(data) - 3000), len(data) - 4)
        size = rng.choice([2**32 - 1, 2**31 - 1, 10**8])
        data[start : start + 4] = struct.pack(">I", size)
    return bytes(data)


def write_hostile_files(folder: Path, whole: list[Path]) -> list[Path]:
    rng = random.Random(0)
    paths = []
    for source in whole:
        content = source.read_bytes()
        for i in range(KINDS[source.suffix]):
            path = folder / f"{i:02d}{source.suffix}"
            path.write_bytes(break_file(content, rng, i % 6))
            paths.append(path)
    return paths


def read_as_training_does(path: Path) -> None:
    """Read a file and check that what comes has the promised shape and is finite."""
    if path.suffix == ".json":
        assert all(isinstance(row, dict) for row in read_list(path))
        return
    if path.suffix == ".jpg":
        assert read_image(path).shape == (224, 224, 3)
        return
    if path.suffix in (".mp4", ".mkv"):
        assert read_video(path, 10, 96).frames.shape == (10, 96, 96, 3)
    assert media_seconds(path) > 0
    audio = read_audio(path, window=(0, 10))
    assert audio.wave.shape == (160000,) and np.isfinite(audio.wave).all()
    if audio.seconds < 600:
        read_audio(path)


def outcome_of(path: Path) -> str:
    """Read a file: "value", or the name of the error."""
    try:
        read_as_training_does(path)
        return "value"
    except (MediaError, DataError) as error:
        assert str(error).startswith(str(path.parent))  # says which file
        return type(error).__name__


def run_child(paths: list[Path], pipe) -> None:
    """Send (outcome, bytes by which the process grew) of each file."""
    for path in paths:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            outcome = outcome_of(path)
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send((outcome, 1024 * (after - before)))


def read_in_child(paths: list[Path]) -> list[str]:
    """Return the outcomes of files up to the first crash or hang, or of all of them."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_child, args=(paths, theirs))
    process.start()
    theirs.close()
    outcomes: list[str] = []
    limit = SECONDS + STARTING
    while len(outcomes) < len(paths) and outcomes[-1:] not in (["hang"], ["crash"]):
        try:
            outcome, grown = ours.recv() if ours.poll(limit) else ("hang", 0)
        except EOFError:
            outcome, grown = "crash", 0
        outcomes.append("gigabyte" if grown > BYTES else outcome)
        limit = SECONDS
    process.kill()
    process.join()
    return outcomes


def read_all(paths: list[Path]) -> list[str]:
    """Return the outcome of each file; after a crash or a hang a new process goes on."""
    outcomes: list[str] = []
    while len(outcomes) < len(paths):
        outcomes += read_in_child(paths[len(outcomes) :])
    return outcomes


def test_hostile_files_end_in_a_value_or_a_named_error(tmp_path):
    whole = write_whole_files(tmp_path)
    hostile = write_hostile_files(tmp_path, whole)
    assert len(hostile) >= 300
    outcomes = read_all(whole + hostile)
    assert set(outcomes[: len(whole)]) == {"value"}  # unbroken, all can be read

    results = list(zip(hostile, outcomes[len(whole) :]))
    counts = Counter((path.suffix, outcome) for path, outcome in results)
    for (suffix, outcome), count in sorted(counts.items()):
        print(f"{suffix:<6} {outcome:<60} {count}")
    bad = [(path.name, outcome) for path, outcome in results if outcome not in GOOD_OUTCOMES]
    assert not bad
    # of the same kind some are read all the same, some are not
    assert {outcome for suffix, outcome in counts if suffix == ".mp4"} == {"value", "MediaError"}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        test_hostile_files_end_in_a_value_or_a_named_error(Path(folder))
