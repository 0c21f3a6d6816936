"""Folder of the built-in world: annotations and media files.

It has the AV-UIE v2 layout.

Train rows carry a reasoned target, test rows only the gold fields, both under the released field
names. All folders point into `ave/video` and `ave/audio`, as the released annotations do with
`../../`.
"""

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from crab_min.config import WorldConfig
from crab_min.media.workers import exit_with_parent, start_method
from crab_min.media.write import write_audio, write_video
from crab_min.tasks import TASKS
from crab_min.world.clip_rows import Rows, clip_rows, match_rows
from crab_min.world.frame_rows import frame_rows
from crab_min.world.rendering import Renderer
from crab_min.world.scenes import FPS, VERSION, Scene, Scenes
from crab_min.world.things import RATE, SECONDS

ROWS_VERSION = 4  # a change of rows alone needs a new number here, and no new tiny base
# Kind of scene: its share of the training clips.
SHARES = {"one": 1 / 4, "many": 5 / 12, "action": 1 / 6, "face": 1 / 6}


def build_world(
    config: WorldConfig, seed: int, cache: str | Path = "data/world", still: bool = False
) -> Path:
    """Return the world's folder in the AV-UIE v2 layout.

    It is built where it is not there yet. The folder's name tells version, seed, sizes and things.
    The folder appears whole or not at all.

    Args:
        still: only the folders whose rows show one frame, without videos, which are most of the
            work.

    Raises:
        DataError: the things of `config.things` cannot be used.
    """
    renderer = Renderer(config.things or None)  # a new one: files of the things may have changed
    name = f"v{VERSION}.{ROWS_VERSION}-seed{seed}-{config.world_clips}-{config.world_test}"
    name += "-still" if still else ""
    final = Path(cache) / (name + things_suffix(config.things, renderer))
    if not final.exists():
        with new_folder(final) as folder:
            root = folder / "AVUIE_2"
            (root / "ave" / "video").mkdir(parents=True)
            (root / "ave" / "audio").mkdir()
            clips = []
            for split in ("train", "test"):
                scenes = make_scenes(renderer, config, split, seed, still)
                write_rows(renderer, scenes, split, seed, root, still)
                clips += itertools.chain(*scenes.values())
            write_in_processes(partial(write_clip, config.things, root, still), clips)
    return final / "AVUIE_2"


def things_suffix(things: str, renderer: Renderer) -> str:
    """Return the end of a world's name for the things of a folder.

    It is "" for the drawn ones.
    """
    if not things:
        return ""
    digest = hashlib.sha256()
    for thing in renderer.things:
        digest.update(thing.sprite.tobytes() + thing.wave.tobytes() + thing.action.encode())
    return f"-{Path(things).resolve().name}-{digest.hexdigest()[:8]}"


def make_scenes(
    renderer: Renderer, config: WorldConfig, split: str, seed: int, still: bool
) -> Scenes:
    """Make the scenes of a split by kind; for a `still` world those of things alone."""
    scenes = {}
    for kind in ("one", "many") if still else SHARES:
        if split == "train":
            count = max(8, round(config.world_clips * SHARES[kind]))
        else:
            count = math.ceil(config.world_test * (1.5 if kind == "many" else 1))
        scenes[kind] = [renderer.scene(split, kind, index, seed) for index in range(count)]
    return scenes


# --- annotations ----------------------------------------------------------------------------------
# Folder: fields that its rows of one split do not have.
TRAIN_HIDES = {"arig": ["top_left", "bottom_right", "frame_idx"], "ref_avs": ["split"]}
TEST_HIDES = {
    "a2v": ["audio_event", "video1_event", "video2_event"],
    "v2a": ["audio1_event", "video_event", "audio2_event"],
}
# Field of a row that shows one frame: its name in test rows.
TEST_NAMES = {"image_path": "visual_path", "idx": "frame_idx", "description": "object"}


def write_rows(
    renderer: Renderer, scenes: Scenes, split: str, seed: int, root: Path, still: bool
) -> None:
    """Write the annotation files of a split, and the frames and masks that they name."""
    rng = random.Random(f"{seed}/{split}")
    rows: Rows = {}
    if not still:
        count = len(scenes["one"])
        question_count = 2 * count if split == "train" else count
        rows |= clip_rows(renderer, scenes, rng, question_count)
        rows |= match_rows(scenes["one"], rng, count)
    rows |= frame_rows(renderer, scenes, rng, root, still)
    for folder, items in rows.items():
        if items and split in TASKS[folder].splits:
            (root / folder).mkdir(exist_ok=True)
            released = [release_row(folder, split, row) for row in items]
            text = json.dumps(released, indent=1)
            (root / folder / f"{split}.json").write_text(text, encoding="utf-8")


def release_row(folder: str, split: str, row: dict) -> dict:
    """Return a row with the released field names of its split."""
    if split == "train":
        released = {**row, TASKS[folder].target: row["text"]}
        hidden = TRAIN_HIDES.get(folder, [])
    else:
        released = {TEST_NAMES.get(name, name): value for name, value in row.items()}
        hidden = TEST_HIDES.get(folder, [])
    return {name: value for name, value in released.items() if name not in ["text", *hidden]}


# --- files ----------------------------------------------------------------------------------------
@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a folder to fill.

    It takes its place at `final` when the block has ended well.
    """
    making = final.with_name(f"{final.name}.making-{os.getpid()}")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    try:
        yield making
        if not final.exists():  # another process may have been faster
            making.rename(final)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def write_in_processes(write: Callable, clips: list) -> None:
    """Call `write` with each clip, in a worker process per core.

    There is a progress bar.
    """
    bar = partial(tqdm, total=len(clips), desc="building the world", unit="clip")
    method = start_method()
    if method is None:
        list(bar(map(write, clips)))
        return
    workers = min(os.cpu_count() or 1, 8)
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, context, exit_with_parent) as pool:
        list(bar(pool.map(write, clips, chunksize=8)))


@lru_cache(1)
def worker_renderer(things: str) -> Renderer:
    """Return the renderer of a worker process, which writes many clips with it."""
    return Renderer(things or None)


def write_clip(things: str, root: Path, still: bool, scene: Scene) -> None:
    """Render and encode the clip of a scene; of a `still` world its sound alone."""
    renderer = worker_renderer(things)
    wave = renderer.wave(scene)
    if not still:
        times = np.arange(SECONDS * FPS) / FPS
        frames = renderer.frames(scene, times)
        write_video(f"{root}/ave/video/{scene.name}.mp4", frames, wave, FPS, RATE)
    write_audio(f"{root}/ave/audio/{scene.name}.wav", wave, RATE)
