"""Clips for side channels (PAVE): shows of four things, one after another, and what ten frames of a video do not tell.

In a show each thing stands alone for two or three seconds. What the channels tell of these stretches is independent of each other and of
the picture at the times of the ten frames, so that whoever lacks the channel can only guess one of four:

    audio   each stretch has a sound, of a thing that is not to be seen; one is the bell
    fast    during one the light flashes for 0.12 s, between two of the frames: only a stream of 25 frames a second has it
    depth   during one something comes near, in a map of inverse depth a second (an array file)
    view    during one a star appears, in front of a second camera

The rows are a .jsonl of one's own data (data.read_own) with "sides" and "options".
"""
import json
import os
import random
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from crab_min.interface import answer_tag
from crab_min.media import write_video
from crab_min.things import RATE, SECONDS, SIZE
from crab_min.world import FPS, Object, Renderer, Scene

VERSION = 4
STRETCHES = 4
CHANNELS = ("audio", "fast", "depth", "view")
ASK = {"audio": "Which thing is seen when the {sound} is heard?", "fast": "Which thing is seen when the light flashes?",
       "depth": "Which thing is seen when something comes near?", "view": "Which thing is seen when the star is there?"}
FILE = {"audio": ".mp4", "fast": ".mp4", "depth": ".npy", "view": "_view.mp4"}


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
    for thing, span in zip(heard, spans):
        scene.objects.append(Object(thing, renderer.things[thing].label, heard=[span]))
    return scene, marked


def row(scene: Scene, marked: dict[str, int], channel: str) -> dict:
    """One question, in the form of one's own data, with paths from the folder of the .jsonl."""
    options, sound = scene.objects[:STRETCHES], scene.objects[STRETCHES + marked["audio"]].label
    return {"messages": [{"role": "user", "content": "<video>" + ASK[channel].format(sound=sound)}, {"role": "assistant", "content": answer_tag(options[marked[channel]].label)}],
            "videos": [f"../{scene.name}.mp4"], "sides": {channel: f"../{scene.name}{FILE[channel]}"}, "options": sorted(o.label for o in options), "type": channel}


@lru_cache
def renderer_of(folder: str) -> Renderer:
    return Renderer(folder or None)


def write_show(folder: str, seed: int, root: str, which: tuple[str, int]) -> None:
    """Render the clip, its depth and its second camera; runs in a worker process."""
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
    depth = rng.uniform(3, 5, (SECONDS, 4, 4, 1))                             # metres
    start, end = spans[marked["depth"]]
    depth[start:end, 1:3, 1:3] = .5
    np.save(f"{root}/{scene.name}.npy", (1 / depth).astype(np.float16))        # nearer is more, as depth models give it
    picture = Image.fromarray(rng.integers(60, 90, (SIZE, SIZE, 3), dtype=np.uint8))
    star = picture.copy()
    x, y = rng.integers(30, 66, 2)
    ImageDraw.Draw(star).regular_polygon((int(x), int(y), 20), 5, fill="#ffd84d")
    start, end = spans[marked["view"]]
    write_video(f"{root}/{scene.name}_view.mp4", np.stack([np.asarray(star if start <= t < end else picture) for t in np.arange(2 * SECONDS) / 2]), None, 2, RATE)


def build_side_world(things: str, clips: int, test: int, seed: int, names: list[str], cache: str | Path = "data/world") -> Path:
    """The train.jsonl with questions for the side channels `names`, a clip a question each; test.jsonl lies beside it.

    Clips are made where they are not there yet, and the folder appears whole or not at all. Raises WorldError for unusable things.
    """
    renderer = renderer_of(things)
    final = Path(cache) / f"sides-v{VERSION}-seed{seed}-{clips}-{test}{'-' + Path(things).resolve().name if things else ''}"
    jobs = [("train", i) for i in range(clips)] + [("test", i) for i in range(test)]
    if not final.exists():
        making = final.with_name(f"{final.name}.making-{os.getpid()}")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        try:
            with ProcessPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
                work = pool.map(partial(write_show, things, seed, str(making)), jobs, chunksize=8)
                list(tqdm(work, total=len(jobs), desc="building the world", unit="clip"))
            if not final.exists():
                making.rename(final)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    folder = final / "+".join(names)
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        lines = [json.dumps(row(*make_show(renderer, *job, seed), name)) for job in jobs if job[0] == split for name in names]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"
