"""Clips for side channels (PAVE) and modalities (CREMA), and questions about them.

Such a clip is a show of four things, one after another. Each thing stands alone for an interval of
two or three seconds. Every channel marks one of the four intervals, and a question asks which
thing it is:

    audio     the intervals have sounds, of things that are not to be seen; one is the bell's
    fast      the light flashes for 0.12 s, between two frames: a stream of 25 per second has it
    view      a star appears, in front of a second camera
    flow      the thing trembles, and is at rest whenever a frame is taken: optical flow, pictures
    depth     the thing is near: inverse depth, pictures
    normals   the thing is turned aside: the direction of each surface, pictures
    thermal   the thing is hot: temperature, pictures
    touch     the thing is rough: the picture of a touch sensor
    points    the thing floats high: 64 points in space

What the channels mark is independent of each other. The video does not show it at whole and half
seconds, where five or ten frames are taken. So a model without the channel can only guess one of
four.

The last six are exact: one map per second, made from the scene and not from the video. Rows have
the form of a user's own .jsonl, with "sides" and "options".
"""

import json
import random
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw

from crab_min.answers import answer_tag
from crab_min.errors import DataError
from crab_min.media.flow import FLOW_GAP, flow_pictures
from crab_min.media.write import write_video
from crab_min.world.folders import new_folder, things_suffix, worker_renderer, write_in_processes
from crab_min.world.rendering import Renderer, pose
from crab_min.world.scenes import FPS, Object, Scene, Span
from crab_min.world.things import RATE, SECONDS, SIZE

VERSION = 5
INTERVALS = 4
QUESTIONS = {
    "audio": "Which thing is seen when the {sound} is heard?",
    "fast": "Which thing is seen when the light flashes?",
    "depth": "Which thing is near?",
    "view": "Which thing is seen when the star is there?",
    "flow": "Which thing trembles?",
    "normals": "Which thing is turned aside?",
    "thermal": "Which thing glows?",
    "touch": "Which thing is rough?",
    "points": "Which thing floats high?",
}
CHANNELS = tuple(QUESTIONS)
# Channel: end of its file's name after that of the scene; _CHANNEL.npy for the others.
FILE_ENDINGS = {"audio": ".mp4", "fast": ".mp4", "view": "_view.mp4", "points": "_points.npz"}
# Channels that no encoder encodes: (steps, tokens per step, width) of their features.
SHAPES = {"fast": (250, 4, 192), "points": (10, 64, 96)}
MAP_SIZE = 32  # pixels of a map's side
VIEW_FPS = 2  # frames per second of the second camera
FLASH = 0.12  # seconds

Marked = dict[str, int]  # channel -> the interval that it marks


def build_side_world(
    things: str,
    clips: int,
    test: int,
    seed: int,
    names: list[str],
    cache: str | Path = "data/world",
    together: bool = False,
) -> Path:
    """Return the train.jsonl with one question per clip and channel.

    test.jsonl lies beside it. Clips are rendered where they are not there yet.

    Args:
        things: folder of things (see load_things), or "" for the drawn ones.
        clips, test: numbers of training and test clips.
        names: the channels.
        together: each row names the files of all channels (CREMA), not of its own alone (PAVE).

    Raises:
        DataError: the things cannot be used, or are fewer than five.
    """
    renderer = Renderer(things or None)  # a new one: files of the things may have changed
    if len(renderer.things) <= INTERVALS:
        count = f"{len(renderer.things)} things, at least {INTERVALS + 1} are needed"
        raise DataError(f"{things}: {count} for side channels; add some, or leave out --things")
    suffix = things_suffix(things, renderer)
    final = Path(cache) / f"sides-v{VERSION}-seed{seed}-{clips}-{test}{suffix}"
    shows = {}
    for split, count in (("train", clips), ("test", test)):
        shows[split] = [make_show(renderer, split, index, seed) for index in range(count)]
    if not final.exists():
        with new_folder(final) as folder:
            write = partial(write_show, things, seed, folder)
            write_in_processes(write, shows["train"] + shows["test"])

    # The rows are cheap, so they are written anew each time.
    rows_folder = final / (" + " if together else "+").join(names)
    rows_folder.mkdir(exist_ok=True)
    for split in shows:
        lines = []
        for scene, marked in shows[split]:
            for name in names:
                row = question_row(scene, marked, name, names if together else [name])
                lines.append(json.dumps(row))
        (rows_folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows_folder / "train.jsonl"


# --- scenes and rows ------------------------------------------------------------------------------
def make_show(renderer: Renderer, split: str, index: int, seed: int) -> tuple[Scene, Marked]:
    """Make the scene of a show, and say which interval each channel marks.

    The scene's first four objects are the things seen, the other four the sounds, in their order.
    """
    rng = random.Random(f"{seed}/{split}/show/{index}")
    lengths = rng.sample([2, 2, 3, 3], INTERVALS)
    spans = list(pairwise(accumulate(lengths, initial=0)))  # one after another: (0, 2), (2, 5), ...
    marked = {name: rng.randrange(INTERVALS) for name in CHANNELS}

    # Thing 0 is the bell, which the question about sound asks for.
    all_but_bell = range(1, len(renderer.things))
    shown = rng.sample(all_but_bell, INTERVALS)
    heard = rng.sample(all_but_bell, INTERVALS)
    heard[marked["audio"]] = 0

    scene = Scene(split, "many", index, rng.choice(list(renderer.places)))
    for thing, span in zip(shown, spans):
        obj = Object(thing, renderer.things[thing].label, seen=[span])
        obj.x = rng.randrange(30, 67)
        obj.y = rng.randrange(34, 63)
        obj.size = rng.randrange(40, 53)
        scene.objects.append(obj)
    scene.objects[marked["flow"]].trembles = rng.choice([-1, 1])
    for thing, span in zip(heard, spans):
        scene.objects.append(Object(thing, renderer.things[thing].label, heard=[span]))
    return scene, marked


def question_row(scene: Scene, marked: Marked, channel: str, sides: list[str]) -> dict:
    """Return the question about a channel as a row of a user's own .jsonl.

    sides: the channels whose files the row names, by their paths from its folder.
    """
    options = [obj.label for obj in scene.objects[:INTERVALS]]
    sound = scene.objects[INTERVALS + marked["audio"]].label
    question = QUESTIONS[channel].format(sound=sound)
    files = {name: f"../{scene.name}{FILE_ENDINGS.get(name, f'_{name}.npy')}" for name in sides}
    return {
        "messages": [
            {"role": "user", "content": "<video>" + question},
            {"role": "assistant", "content": answer_tag(options[marked[channel]])},
        ],
        "videos": [f"../{scene.name}.mp4"],
        "sides": files,
        "options": sorted(options),
        "type": channel,
    }


# --- files ----------------------------------------------------------------------------------------
def write_show(things: str, seed: int, root: Path, show: tuple[Scene, Marked]) -> None:
    """Render and write the clip, the second camera and the maps of a show."""
    renderer = worker_renderer(things)
    scene, marked = show
    rng = np.random.default_rng([seed, scene.index, scene.split == "test"])
    spans = [obj.seen[0] for obj in scene.objects[:INTERVALS]]

    frames = video_frames(renderer, scene, spans[marked["fast"]], rng)
    write_video(f"{root}/{scene.name}.mp4", frames, renderer.wave(scene), FPS, RATE)
    for name, steps in channel_maps(renderer, scene, marked, rng).items():
        if name == "points":
            np.savez(f"{root}/{scene.name}_points.npz", xyz=steps)
        else:
            np.save(f"{root}/{scene.name}_{name}.npy", steps)
    view = view_frames(spans[marked["view"]], rng)
    write_video(f"{root}/{scene.name}_view.mp4", view, None, VIEW_FPS, RATE)


def video_frames(
    renderer: Renderer, scene: Scene, span: Span, rng: np.random.Generator
) -> np.ndarray:
    """Draw the clip (250, 96, 96, 3), with a flash in a random second of `span`."""
    times = np.arange(SECONDS * FPS) / FPS  # (250,)
    frames = renderer.frames(scene, times)
    # Between the whole and half seconds, where five or ten frames are taken.
    start = rng.integers(*span) + rng.choice([0.12, 0.22, 0.66, 0.76])
    flashing = (times >= start) & (times < start + FLASH)
    frames[flashing] = 255 - frames[flashing]  # a negative: as strong in the snow as at night
    return frames


def view_frames(span: Span, rng: np.random.Generator) -> np.ndarray:
    """Draw the frames of the second camera (20, 96, 96, 3).

    They are noise, and a star during `span`.
    """
    empty = Image.fromarray(rng.integers(60, 90, (SIZE, SIZE, 3), dtype=np.uint8))
    star = empty.copy()
    x, y = rng.integers(30, 66, 2)
    ImageDraw.Draw(star).regular_polygon((int(x), int(y), 20), 5, fill="#ffd84d")
    frames = []
    for t in np.arange(VIEW_FPS * SECONDS) / VIEW_FPS:
        frames.append(np.asarray(star if span[0] <= t < span[1] else empty))
    return np.stack(frames)


# --- maps -----------------------------------------------------------------------------------------
def channel_maps(
    renderer: Renderer, scene: Scene, marked: Marked, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Make the exact maps of each second, at its half, all uint8.

    Returns:
        flow, normals, depth and thermal (10, 32, 32, 3), touch (10, 32, 32), points (10, 64, 3).
    """
    metres = rng.uniform(3, 5, INTERVALS)  # distance of each thing that is not near
    degrees = 20 + rng.uniform(-3, 3, INTERVALS)  # Celsius, of each thing that is not hot
    seconds = []
    for t in np.arange(SECONDS) + 0.5:
        interval = next(i for i, obj in enumerate(scene.objects) if obj.seen_at(t))
        obj = scene.objects[interval]
        mask = Image.fromarray(renderer.mask(scene, obj, t))
        thing = np.asarray(mask.resize((MAP_SIZE, MAP_SIZE), Image.BOX)) > 127  # (32, 32)
        marks = {name: interval == marked[name] for name in CHANNELS}
        seconds.append(
            {
                "flow": flow_map(thing, scene, obj, t),
                "normals": normals_map(thing, aside=marks["normals"]),
                "depth": depth_map(thing, 1 if marks["depth"] else metres[interval]),
                "thermal": thermal_map(thing, 70 if marks["thermal"] else degrees[interval]),
                "touch": touch_map(marks["touch"], rng),
                "points": point_cloud(marks["points"], rng),
            }
        )
    return {name: np.stack([second[name] for second in seconds]) for name in seconds[0]}


def flow_map(thing: np.ndarray, scene: Scene, obj: Object, t: float) -> np.ndarray:
    """Draw optical flow (32, 32, 3).

    The thing moves from frame to frame, the rest is still.
    """
    x, y, *_ = pose(scene, obj, t)
    later_x, later_y, *_ = pose(scene, obj, t + FLOW_GAP - 0.01)  # frames are 0.04 s apart
    moved = (later_x - x, later_y - y)  # pixels to the right and down
    flow = thing[..., None] * moved / SIZE  # (32, 32, 2), in parts of the picture's width
    return flow_pictures(flow[None])[0]


def normals_map(thing: np.ndarray, aside: bool) -> np.ndarray:
    """Draw surface normals (32, 32, 3).

    The thing faces the camera or aside, the ground up.
    """
    thing_normal = (-0.8, 0, 0.6) if aside else (0, 0, 1)
    normals = np.where(thing[..., None], thing_normal, (0, 0.8, 0.6))  # (32, 32, 3)
    return (127.5 * (normals + 1)).astype(np.uint8)


def depth_map(thing: np.ndarray, metres: float) -> np.ndarray:
    """Draw inverse depth (32, 32, 3), as depth models give it: nearer is more."""
    rows = np.arange(MAP_SIZE)[:, None]
    depth = np.where(thing, metres, 10 - 5 * rows / MAP_SIZE)  # the ground is nearer below
    return colormaps["turbo"](1 / depth, bytes=True)[..., :3]


def thermal_map(thing: np.ndarray, degrees: float) -> np.ndarray:
    """Draw temperature (32, 32, 3): that of the thing, and 20 degrees around it."""
    heat = (np.where(thing, degrees, 20) - 15) / 60  # 15 to 75 degrees as 0 to 1
    return colormaps["hot"](heat, bytes=True)[..., :3]


def touch_map(rough: bool, rng: np.random.Generator) -> np.ndarray:
    """Draw the picture of a touch sensor (32, 32).

    It shows ridges in a random direction, or a plane.
    """
    rows, columns = np.mgrid[:MAP_SIZE, :MAP_SIZE]
    if rough:
        height = np.sin((columns * np.cos(rng.uniform(0, 3)) + rows) * 1.6)
    else:
        height = rng.uniform(-0.2, 0.2)
    noise = rng.uniform(-9, 9, (MAP_SIZE, MAP_SIZE))
    return (127 + 90 * height + noise).astype(np.uint8)


def point_cloud(high: bool, rng: np.random.Generator) -> np.ndarray:
    """Sample 64 points (x, y, z) of a thing that floats or stands: (64, 3)."""
    lowest, highest = (170, 230) if high else (10, 90)
    x = rng.integers(100, 156, 64)
    y = rng.integers(100, 156, 64)
    z = rng.integers(lowest, highest, 64)
    return np.stack([x, y, z], -1).astype(np.uint8)
