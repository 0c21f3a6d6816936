"""How fast a clip is loaded: 10 frames of 224 x 224 and 10 s of sound, by media.py and by decoding everything with PyAV.

    python benchmarks/loading.py [--json]

Clips of 10 s and 60 s at 360p and 1080p, H.264 with the key-frame distance that x264 chooses (250 frames), AAC. Both ways take turns in every
repeat and give the same frames; ratios are what is worth comparing. Memory is the most that a process of its own held above what it began with.
"""
import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from crab_min.media.read import read_audio, read_video

SIZES = ((10, 640, 360), (60, 640, 360), (10, 1920, 1080), (60, 1920, 1080))         # seconds, width, height


def write_clip(path: Path, seconds: int, width: int, height: int) -> None:
    """A camera that moves along a textured wall, a square that passes by, a little grain, 25 frames a second; and a tone."""
    rng, span = np.random.default_rng(0), width + 25 * seconds
    coarse = Image.fromarray(rng.integers(30, 220, (height // 40, span // 40, 3), dtype=np.uint8)).resize((span, height), Image.Resampling.BICUBIC)
    wall = np.asarray(coarse) // 2 + rng.integers(40, 70, (height, span, 1), dtype=np.uint8)
    grain = rng.integers(0, 6, (4, height, width, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("libx264", rate=25, options={"preset": "veryfast", "crf": "26"}), container.add_stream("aac", rate=44100, layout="stereo")
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        for i in range(25 * seconds):
            picture, x, side = wall[:, i:i + width] + grain[i % 4], 6 * i % (width - height // 4), height // 4
            picture[side:2 * side, x:x + side] = 200, 60, 40
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))))
        container.mux(video.encode())
        wave = np.sin(np.arange(44100 * seconds) / 20).astype(np.float32)[None].repeat(2, 0)
        for start in range(0, wave.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[:, start:start + 1024]), format="fltp", layout="stereo")
            frame.sample_rate = 44100
            container.mux(sound.encode(frame))
        container.mux(sound.encode())


def ours(path: Path, seconds: float) -> np.ndarray:
    read_audio(path, window=(0, 10))
    return read_video(path, 10, 224).frames


def everything(path: Path, seconds: float) -> np.ndarray:
    """The plain way: every frame and every sample in one pass, then those that are wanted."""
    times, images, waves = (np.arange(10) + .5) * seconds / 10, [], []
    resampler = av.AudioResampler(format="flt", layout="mono", rate=16000)
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1             # as ours: a loader has a process for each core
        for frame in container.decode(container.streams.video[0], container.streams.audio[0]):
            if isinstance(frame, av.AudioFrame):
                if frame.time < 10:
                    waves += [piece.to_ndarray() for piece in resampler.resample(frame)]
            elif len(images) < 10 and frame.time + 1 / 25 > times[len(images)]:
                images.append(frame.reformat(224, 224, "rgb24", interpolation="BICUBIC").to_ndarray())
    return np.stack(images)


def referred_to(path: Path) -> float:
    """The share of frames that others are decoded from; the rest may be skipped on the way to a later one."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.skip_frame = "NONREF"
        return sum(1 for _ in container.decode(video=0)) / container.streams.video[0].frames


def held(way: Callable, path: Path, seconds: float, pipe) -> None:
    def resident(what: str) -> int:
        return 1024 * int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)).split()[1])
    Path("/proc/self/clear_refs").write_text("5")                             # Linux: the peak begins anew
    before = resident("VmRSS")
    way(path, seconds)
    pipe.send(resident("VmHWM") - before)


def peak_bytes(way: Callable, path: Path, seconds: float) -> int:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=held, args=(way, path, seconds, theirs))
    process.start()
    size = mine.recv()
    process.join()
    return size


def measure(path: Path, seconds: int, width: int, height: int, repeats: int) -> dict:
    ways, times = {"ours": ours, "everything": everything}, {"ours": [], "everything": []}
    same = float(np.abs(ours(path, seconds).astype(int) - everything(path, seconds)).mean())
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way(path, seconds)
            times[name].append(time.perf_counter() - began)
    row = {"seconds": seconds, "width": width, "height": height, "mean_difference": same, "referred_to": referred_to(path)}
    for name, way in ways.items():
        row[name] = {"clips_a_second": 1 / statistics.median(times[name]), "peak_bytes": peak_bytes(way, path, seconds)}
    return row | {"ours_over_everything": row["ours"]["clips_a_second"] / row["everything"]["clips_a_second"]}


def table(rows: list[dict]) -> str:
    lines = [f"{'clip':<20}{'ours, clips/s':>15}{'everything':>12}{'ratio':>8}{'ours, MB':>10}{'everything':>12}  difference of pixels  frames referred to"]
    for r in rows:
        name = f"{r['seconds']} s, {r['width']} x {r['height']}"
        lines.append(f"{name:<20}{r['ours']['clips_a_second']:>15.2f}{r['everything']['clips_a_second']:>12.2f}{r['ours_over_everything']:>8.2f}"
                     f"{r['ours']['peak_bytes'] / 1e6:>10.1f}{r['everything']['peak_bytes'] / 1e6:>12.1f}{r['mean_difference']:>10.2f}{r['referred_to']:>20.0%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print one list, a row a size, and nothing else")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for size in tqdm(SIZES, desc="clips", disable=given.json):
            path = Path(folder) / "{}s-{}x{}.mp4".format(*size)
            write_clip(path, *size)
            rows.append(measure(path, *size, given.repeats))
    print(json.dumps(rows) if given.json else table(rows))


if __name__ == "__main__":
    main()
