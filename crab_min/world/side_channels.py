"""Clips for side channels (PAVE) and modalities (CREMA): shows of four things, one after another, and what the frames of a video do not tell.

In a show each thing stands alone for two or three seconds. What the channels tell of these stretches is independent of each other and of
the picture at whole and half seconds (the times of five and of ten frames), so that whoever lacks the channel can only guess one of four:

    audio     each stretch has a sound, of a thing that is not to be seen; one is the bell
    fast      during one the light flashes for 0.12 s, between two of the frames: only a stream of 25 frames a second has it
    view      during one a star appears, in front of a second camera
    flow      one thing trembles, and is where it would be at rest whenever a frame is taken: optical flow, as pictures
    depth     one is near: inverse depth, as pictures
    normals   one is turned aside: which way each surface faces, as pictures
    thermal   one is hot: temperature, as pictures
    touch     one is rough: what a sensor of touch sees
    points    one floats high: 64 points in space

The last six are exact, a map each second, made from the scene and not from the picture. The rows are a .jsonl of one's own data (data.read_own)
with "sides" and "options".
"""
import json
import os
import random
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw
from tqdm import tqdm

from crab_min.answers import answer_tag
from crab_min.media.workers import exit_with_parent
from crab_min.media.read import FLOW_GAP, flow_pictures, write_video
from crab_min.world.scenes import FPS, Object, Renderer, Scene
from crab_min.world.things import RATE, SECONDS, SIZE

VERSION = 5
STRETCHES = 4
ASK = {"audio": "Which thing is seen when the {sound} is heard?", "fast": "Which thing is seen when the light flashes?",
       "depth": "Which thing is near?", "view": "Which thing is seen when the star is there?", "flow": "Which thing trembles?",
       "normals": "Which thing is turned aside?", "thermal": "Which thing glows?", "touch": "Which thing is rough?", "points": "Which thing floats high?"}
CHANNELS = tuple(ASK)
FILE = {"audio": ".mp4", "fast": ".mp4", "view": "_view.mp4", "points": "_points.npz"}           # else NAME_CHANNEL.npy
MAP = 32                                               # pixels of a map's side


def make_show(renderer: Renderer, split: str, index: int, seed: int) -> tuple[Scene, dict[str, int]]:
    """(the scene, which stretch each channel marks): four things in turn, and off-screen four sounds."""
    rng = random.Random(f"{seed}/{split}/show/{index}")
    lengths = rng.sample([2, 2, 3, 3], STRETCHES)
    starts = [sum(lengths[:i]) for i in range(STRETCHES)]
    spans = [(start, start + length) for start, length in zip(starts, lengths)]
    marked, others = {name: rng.randrange(STRETCHES) for name in CHANNELS}, range(1, len(renderer.things))   # thing 0 is the bell
    shown, heard = rng.sample(others, STRETCHES), rng.sample(others, STRETCHES)
    heard[marked["audio"]] = 0
    scene = Scene(split, "many", index, rng.choice(list(renderer.places)))
    for thing, span in zip(shown, spans):
        scene.objects.append(Object(thing, renderer.things[thing].label, rng.randrange(30, 67), rng.randrange(34, 63), rng.randrange(40, 53), seen=[span]))
    scene.objects[marked["flow"]].trembles = rng.choice([-1, 1])
    for thing, span in zip(heard, spans):
        scene.objects.append(Object(thing, renderer.things[thing].label, heard=[span]))
    return scene, marked


def row(scene: Scene, marked: dict[str, int], channel: str, sides: list[str]) -> dict:
    """A question about one channel, in the form of one's own data, with the files of `sides` by their paths from the folder of the .jsonl."""
    files = {name: f"../{scene.name}{FILE.get(name, f'_{name}.npy')}" for name in sides}
    options, sound = scene.objects[:STRETCHES], scene.objects[STRETCHES + marked["audio"]].label
    return {"messages": [{"role": "user", "content": "<video>" + ASK[channel].format(sound=sound)}, {"role": "assistant", "content": answer_tag(options[marked[channel]].label)}],
            "videos": [f"../{scene.name}.mp4"], "sides": files, "options": sorted(o.label for o in options), "type": channel}


@lru_cache
def renderer_of(folder: str) -> Renderer:
    return Renderer(folder or None)


def write_show(folder: str, seed: int, root: str, which: tuple[str, int]) -> None:
    """Render the clip, its second camera and its maps; runs in a worker process."""
    renderer = renderer_of(folder)
    scene, marked = make_show(renderer, *which, seed)
    rng, times = np.random.default_rng([seed, which[1], which[0] == "test"]), np.arange(SECONDS * FPS) / FPS
    spans = [o.seen[0] for o in scene.objects[:STRETCHES]]
    frames = renderer.frames(scene, times).copy()
    start, end = spans[marked["fast"]]
    flash = rng.integers(start, end) + rng.choice([.12, .22, .66, .76])        # the ten frames are at the halves of the seconds
    bright = (times >= flash) & (times < flash + .12)
    frames[bright] = 255 - frames[bright]                                     # a negative: as strong in the snow as at night
    write_video(f"{root}/{scene.name}.mp4", frames, renderer.wave(scene), FPS, RATE)
    for name, x in maps(renderer, scene, marked, rng).items():
        np.savez(f"{root}/{scene.name}_points.npz", xyz=x) if name == "points" else np.save(f"{root}/{scene.name}_{name}.npy", x)
    picture = Image.fromarray(rng.integers(60, 90, (SIZE, SIZE, 3), dtype=np.uint8))
    star = picture.copy()
    x, y = rng.integers(30, 66, 2)
    ImageDraw.Draw(star).regular_polygon((int(x), int(y), 20), 5, fill="#ffd84d")
    start, end = spans[marked["view"]]
    write_video(f"{root}/{scene.name}_view.mp4", np.stack([np.asarray(star if start <= t < end else picture) for t in np.arange(2 * SECONDS) / 2]), None, 2, RATE)


def coloured(name: str, x: np.ndarray) -> np.ndarray:
    """A map x (H, W) of 0 to 1 in the colours of matplotlib's `name` (H, W, 3) uint8, as cameras of heat and depth show it."""
    return colormaps[name](x, bytes=True)[..., :3]


def maps(renderer: Renderer, scene: Scene, marked: dict[str, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Of each second, at its half: flow, depth, normals, thermal (10, 32, 32, 3), touch (10, 32, 32), points (10, 64, 3), all uint8 and exact."""
    found: dict[str, list] = {name: [] for name in ("flow", "normals", "depth", "thermal", "touch", "points")}
    rows, columns = np.mgrid[:MAP, :MAP]
    metres, warm = rng.uniform(3, 5, STRETCHES), rng.uniform(-3, 3, STRETCHES)
    for t in np.arange(SECONDS) + .5:
        i = next(i for i, o in enumerate(scene.objects) if o.seen_at(t))
        here = {name: stretch == i for name, stretch in marked.items()}
        there = np.asarray(Image.fromarray(renderer.mask(scene, scene.objects[i], t)).resize((MAP, MAP), Image.BOX)) > 127
        (x, y, *_), (x2, y2, *_) = (renderer.pose(scene, scene.objects[i], s) for s in (t, t + FLOW_GAP - .01))              # frames are at 25 a second
        found["flow"].append(flow_pictures(there[None, ..., None] * np.array([x2 - x, y2 - y]) / SIZE)[0])
        facing = np.where(there[..., None], (-.8, 0, .6) if here["normals"] else (0, 0, 1), (0, .8, .6))
        found["normals"].append((127.5 * (facing + 1)).astype(np.uint8))
        depth = np.where(there, 1 if here["depth"] else metres[i], 10 - 5 * rows / MAP)
        found["depth"].append(coloured("turbo", 1 / depth))                   # nearer is more, as depth models give it
        degrees = np.where(there, 70 if here["thermal"] else 20 + warm[i], 20)
        found["thermal"].append(coloured("hot", (degrees - 15) / 60))
        ridges = np.sin((columns * np.cos(rng.uniform(0, 3)) + rows) * 1.6) if here["touch"] else rng.uniform(-.2, .2)
        found["touch"].append((127 + 90 * ridges + rng.uniform(-9, 9, (MAP, MAP))).astype(np.uint8))
        low, high = (170, 230) if here["points"] else (10, 90)
        found["points"].append(np.stack([rng.integers(100, 156, 64), rng.integers(100, 156, 64), rng.integers(low, high, 64)], -1).astype(np.uint8))
    return {name: np.stack(each) for name, each in found.items()}


def build_side_world(things: str, clips: int, test: int, seed: int, names: list[str], cache: str | Path = "data/world", together: bool = False) -> Path:
    """The train.jsonl with questions for the side channels `names`, a clip a question each; test.jsonl lies beside it.

    together: each row has the files of all of them (CREMA), else of the one that it is about (PAVE).

    Clips are made where they are not there yet, and the folder appears whole or not at all. Raises DataError for unusable things.
    """
    renderer = renderer_of(things)
    final = Path(cache) / f"sides-v{VERSION}-seed{seed}-{clips}-{test}{'-' + Path(things).resolve().name if things else ''}"
    jobs = [("train", i) for i in range(clips)] + [("test", i) for i in range(test)]
    if not final.exists():
        making = final.with_name(f"{final.name}.making-{os.getpid()}")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        try:
            with ProcessPoolExecutor(min(os.cpu_count() or 1, 8), initializer=exit_with_parent) as pool:
                work = pool.map(partial(write_show, things, seed, str(making)), jobs, chunksize=8)
                list(tqdm(work, total=len(jobs), desc="building the world", unit="clip"))
            if not final.exists():
                making.rename(final)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    folder = final / (" + ".join(names) if together else "+".join(names))
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        lines = [json.dumps(row(*make_show(renderer, *job, seed), name, names if together else [name])) for job in jobs if job[0] == split for name in names]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"
