"""Hostile files: 330 broken ones, read in a process of their own. Each ends in a value or in a named error: no crash, no hang, no gigabyte.

`python tests/test_hostile.py` prints how many ended how; `pytest -s tests/test_hostile.py` does too.
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

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from crab_min.errors import DataError, MediaError
from crab_min.media.read import (
    media_seconds,
    read_audio,
    read_image,
    read_video,
    write_audio,
    write_video,
)
from crab_min.sources.av_uie import read_list

SECONDS, BYTES = 10, 1e9                               # that one file may take
KINDS = {".mp4": 60, ".mkv": 60, ".wav": 60, ".mp3": 60, ".jpg": 60, ".json": 30}             # files of each
HUGE = (b"\xff" * 4, b"\x7f" + b"\xff" * 3, b"\x00\x00\x00\x00")                              # sizes and counts that are not true


def whole_files(folder: Path) -> dict[str, bytes]:
    """A valid file of each kind."""
    import av
    rng = np.random.default_rng(0)
    frames, wave = rng.integers(0, 255, (50, 64, 64, 3), dtype=np.uint8), (.3 * np.sin(np.arange(32000) / 9)).astype(np.float32)
    write_video(folder / "a.mp4", frames, wave)
    with av.open(str(folder / "a.mp4")) as source, av.open(str(folder / "a.mkv"), "w", format="matroska") as copy:
        streams = {s.index: copy.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                copy.mux(packet)
    for name in ("a.wav", "a.mp3"):
        write_audio(folder / name, wave)
    Image.fromarray(frames[0]).save(folder / "a.jpg")
    (folder / "a.json").write_text(json.dumps([{"video_path": f"{i}.mp4", "audio_path": f"{i}.mp3", "event": "dog"} for i in range(20)]))
    return {kind: (folder / f"a{kind}").read_bytes() for kind in KINDS}


def broken(content: bytes, rng: random.Random, way: int) -> bytes:
    """One of the ways in which files break."""
    data = bytearray(content)
    if way == 0:                                       # single bits, anywhere
        for _ in range(rng.choice([1, 8, 64])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == 1:                                     # cut off
        del data[rng.choice([0, 1, 16, rng.randrange(len(data))]):]
    elif way == 2:                                     # a false header
        data[:rng.choice([4, 16, 64])] = rng.choice([b"\x00", b"RIFF", b"<html>", bytes([rng.randrange(256)])]) * 16
    elif way == 3:                                     # huge or empty sizes near the start, where headers are
        for _ in range(rng.choice([1, 4])):
            at = rng.randrange(min(len(data) - 4, 600))
            data[at:at + 4] = rng.choice(HUGE)
    elif way == 4:                                     # a piece missing, twice or full of noise
        at = rng.randrange(len(data))
        data[at:at + rng.randrange(2000)] = rng.choice([b"", bytes(data[at:at + 500]) * 2, rng.randbytes(700)])
    else:                                              # huge sizes near the end, where an mp4's index is
        at = rng.randrange(max(0, len(data) - 3000), len(data) - 4)
        data[at:at + 4] = struct.pack(">I", rng.choice([2 ** 32 - 1, 2 ** 31 - 1, 10 ** 8]))
    return bytes(data)


def hostile_files(folder: Path) -> list[Path]:
    rng, paths = random.Random(0), []
    for kind, content in whole_files(folder).items():
        for i in range(KINDS[kind]):
            paths.append(folder / f"{i:02d}{kind}")
            paths[-1].write_bytes(broken(content, rng, i % 6))
    return paths


def use(path: Path) -> str:
    """Read a file as training would; "value" or the name of the error. A value has the promised shape and is finite."""
    try:
        if path.suffix == ".json":
            assert all(isinstance(row, dict) for row in read_list(path))
        elif path.suffix == ".jpg":
            assert read_image(path).shape == (224, 224, 3)
        else:
            if path.suffix in (".mp4", ".mkv"):
                assert read_video(path, 10, 96).frames.shape == (10, 96, 96, 3)
            assert media_seconds(path) > 0
            heard = read_audio(path, window=(0, 10))
            assert heard.wave.shape == (160000,) and np.isfinite(heard.wave).all()
            if heard.seconds < 600:
                read_audio(path)
        return "value"
    except (MediaError, DataError) as error:
        assert str(error).startswith(str(path.parent))                        # says which file
        return type(error).__name__


def child(paths: list[Path], pipe) -> None:
    for path in paths:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            outcome = use(path)
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        pipe.send((outcome, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))


def outcomes(paths: list[Path]) -> list[tuple[Path, str]]:
    """What became of each file; after a crash or a hang a new process goes on with the next."""
    found, context = [], multiprocessing.get_context("spawn")
    while len(found) < len(paths):
        ours, theirs = context.Pipe()
        process = context.Process(target=child, args=(paths[len(found):], theirs))
        process.start()
        theirs.close()
        first = True
        while len(found) < len(paths):
            try:
                outcome, grown = ours.recv() if ours.poll(SECONDS + 50 * first) else ("hang", 0)      # it takes a while to start
            except EOFError:
                outcome, grown = "crash", 0
            first = False
            found.append((paths[len(found)], "gigabyte" if grown > BYTES else outcome))
            if outcome in ("hang", "crash"):
                break
        process.kill()
        process.join()
    return found


def test_hostile_files_end_in_a_value_or_a_named_error():
    with tempfile.TemporaryDirectory() as folder:
        found = outcomes(hostile_files(Path(folder)))
        assert {outcome for _, outcome in outcomes([Path(folder) / f"a{kind}" for kind in KINDS])} == {"value"}      # unbroken, all can be read
    assert len(found) >= 300
    counts = Counter((path.suffix, outcome) for path, outcome in found)
    print("\n".join(f"{kind:<6} {outcome:<60} {n}" for (kind, outcome), n in sorted(counts.items())))
    assert {outcome for _, outcome in found} <= {"value", "MediaError", "DataError"}, [f for f in found if f[1] not in ("value", "MediaError", "DataError")]
    assert {outcome for path, outcome in found if path.suffix == ".mp4"} == {"value", "MediaError"}      # some are read all the same, some are not


if __name__ == "__main__":
    test_hostile_files_end_in_a_value_or_a_named_error()
