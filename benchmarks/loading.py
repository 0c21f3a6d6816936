"""How fast a clip is loaded: 10 frames of 224 x 224 and 10 s of sound.

    python benchmarks/loading.py [--json]

crab_min's reader takes turns with the plain way, decoding everything with PyAV; both give the same
frames, and ratios are what is worth comparing. The clips have 10 s and 60 s, 360p and 1080p: H.264
with the key-frame distance that x264 chooses (250 frames), and AAC. Memory is the most that a
process of its own held above what it began with.
"""

import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import av
import numpy as np
from common import make_parser, seconds_of, take_turns
from PIL import Image
from tqdm import tqdm

from crab_min.media.read import read_audio, read_video

# seconds, width, height
SIZES = ((10, 640, 360), (60, 640, 360), (10, 1920, 1080), (60, 1920, 1080))
FPS = 25
SAMPLE_RATE = 44100


# --- the clips ------------------------------------------------------------------------------------
def write_clip(path: Path, seconds: int, width: int, height: int) -> None:
    """Write a clip: a camera that moves along a wall, a square that passes by, and a tone."""
    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "crf": "26"}
        video = container.add_stream("libx264", rate=FPS, options=options)
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="stereo")
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"

        for picture in draw_frames(seconds, width, height):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))
            container.mux(video.encode(frame))
        container.mux(video.encode())

        wave = np.sin(np.arange(SAMPLE_RATE * seconds) / 20).astype(np.float32)
        wave = wave[None].repeat(2, 0)  # (2, N)
        for start in range(0, wave.shape[1], 1024):
            block = np.ascontiguousarray(wave[:, start : start + 1024])
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
            frame.sample_rate = SAMPLE_RATE
            container.mux(audio.encode(frame))
        container.mux(audio.encode())


def draw_frames(seconds: int, width: int, height: int):
    """Yield the frames (height, width, 3) uint8, with a little grain."""
    rng = np.random.default_rng(0)
    span = width + FPS * seconds  # the part of the wall that comes into view
    noise = rng.integers(30, 220, (height // 40, span // 40, 3), dtype=np.uint8)
    coarse = Image.fromarray(noise).resize((span, height), Image.Resampling.BICUBIC)
    texture = rng.integers(40, 70, (height, span, 1), dtype=np.uint8)
    wall = np.asarray(coarse) // 2 + texture  # (height, span, 3)
    grain = rng.integers(0, 6, (4, height, width, 3), dtype=np.uint8)
    side = height // 4  # of the square
    for i in range(FPS * seconds):
        picture = wall[:, i : i + width] + grain[i % 4]
        x = 6 * i % (width - side)
        picture[side : 2 * side, x : x + side] = 200, 60, 40
        yield picture


def share_referred_to(path: Path) -> float:
    """Return the share of frames that others are decoded from; the rest may be skipped."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.skip_frame = "NONREF"
        return sum(1 for _ in container.decode(video=0)) / stream.frames


# --- the two ways ---------------------------------------------------------------------------------
def ours(path: Path, seconds: float) -> np.ndarray:
    read_audio(path, window=(0, 10))
    return read_video(path, 10, 224).frames


def everything(path: Path, seconds: float) -> np.ndarray:
    """Decode every frame and sample in one pass, and keep those that are wanted."""
    wanted = (np.arange(10) + 0.5) * seconds / 10  # seconds of the frames
    images, waves = [], []
    resampler = av.AudioResampler(format="flt", layout="mono", rate=16000)
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        video.codec_context.thread_count = 1  # as ours: a loader has one process per core
        for frame in container.decode(video, audio):
            if isinstance(frame, av.AudioFrame):
                if frame.time < 10:
                    waves += [piece.to_ndarray() for piece in resampler.resample(frame)]
            elif len(images) < 10 and frame.time + 1 / FPS > wanted[len(images)]:
                image = frame.reformat(224, 224, "rgb24", interpolation="BICUBIC")
                images.append(image.to_ndarray())
    return np.stack(images)


WAYS = {"ours": ours, "everything": everything}


# --- measuring ------------------------------------------------------------------------------------
def peak_bytes(way: Callable, path: Path, seconds: float) -> int:
    """Return the most bytes that loading a clip holds at once, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    process = context.Process(target=send_peak_bytes, args=(way, path, seconds, sender))
    process.start()
    size = receiver.recv()
    process.join()
    return size


def send_peak_bytes(way: Callable, path: Path, seconds: float, sender: Connection) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
    before = process_bytes("VmRSS")
    way(path, seconds)
    sender.send(process_bytes("VmHWM") - before)


def process_bytes(name: str) -> int:
    """Return a size of this process: VmRSS is what it holds now, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status: no {name}; this benchmark needs Linux")


def measure(path: Path, seconds: int, width: int, height: int, repeats: int) -> dict:
    """Return clips per second and memory of the two ways, and how far their frames differ."""
    frames = ours(path, seconds).astype(int)
    difference = float(np.abs(frames - everything(path, seconds)).mean())
    loads = {name: partial(way, path, seconds) for name, way in WAYS.items()}
    times = take_turns({name: partial(seconds_of, load) for name, load in loads.items()}, repeats)
    row = {"seconds": seconds, "width": width, "height": height, "mean_difference": difference}
    row["referred_to"] = share_referred_to(path)
    for name, way in WAYS.items():
        speed = 1 / statistics.median(times[name])
        row[name] = {"clips_a_second": speed, "peak_bytes": peak_bytes(way, path, seconds)}
    ratio = row["ours"]["clips_a_second"] / row["everything"]["clips_a_second"]
    return row | {"ours_over_everything": ratio}


def table(rows: list[dict]) -> str:
    header = f"{'clip':<20}{'ours, clips/s':>15}{'everything':>12}{'ratio':>8}{'ours, MB':>10}"
    lines = [header + f"{'everything':>12}  difference of pixels  frames referred to"]
    for row in rows:
        own, plain = row["ours"], row["everything"]
        name = f"{row['seconds']} s, {row['width']} x {row['height']}"
        lines.append(
            f"{name:<20}{own['clips_a_second']:>15.2f}{plain['clips_a_second']:>12.2f}"
            f"{row['ours_over_everything']:>8.2f}{own['peak_bytes'] / 1e6:>10.1f}"
            f"{plain['peak_bytes'] / 1e6:>12.1f}{row['mean_difference']:>10.2f}"
            f"{row['referred_to']:>20.0%}"
        )
    return "\n".join(lines)


def main() -> None:
    args = make_parser(__doc__, repeats=9).parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seconds, width, height in tqdm(SIZES, desc="clips", disable=args.json):
            path = Path(folder) / f"{seconds}s-{width}x{height}.mp4"
            write_clip(path, seconds, width, height)
            rows.append(measure(path, seconds, width, height, args.repeats))
    print(json.dumps(rows) if args.json else table(rows))


if __name__ == "__main__":
    main()
