"""Folder of the built-in world: annotations and media files in the AV-UIE v2 layout.

Train rows carry a reasoned target, test rows only the gold fields, both under the released field
names. All folders point into `ave/video` and `ave/audio`, as the released annotations do with
`../../`.
"""

import hashlib
import json
import math
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
from crab_min.media.workers import exit_with_parent
from crab_min.media.write import write_audio, write_video
from crab_min.world.clip_rows import Rows, clip_rows, match_rows
from crab_min.world.frame_rows import frame_rows
from crab_min.world.rendering import Renderer
from crab_min.world.scenes import FPS, VERSION
from crab_min.world.things import RATE, SECONDS

ROWS_VERSION = 3  # a change of rows alone needs a new number here, and no new tiny base
TRAIN_ONLY = ("mer24", "unav", "avcap")  # folders without a test split


def build_world(
    config: WorldConfig, seed: int, cache: str | Path = "data/world", still: bool = False
) -> Path:
    """Return the world's folder in the AV-UIE v2 layout; build it where it is not there yet.

    Building takes about a minute on two cores. The folder's name tells version, seed, sizes and
    things. The folder appears whole or not at all.

    Args:
        still: only the folders whose rows show one frame, without videos, which are most of the
            work.

    Raises:
        DataError: the things of `config.things` cannot be used.
    """
    renderer = Renderer(config.things or None)  # a new one: files of the things may have changed
    final = Path(cache) / world_name(config, seed, still, renderer)
    if not (final / "AVUIE_2").exists():
        counts = clip_counts(config, still)
        with new_folder(final) as folder:
            root = folder / "AVUIE_2"
            (root / "ave" / "video").mkdir(parents=True)
            (root / "ave" / "audio").mkdir()
            for split in counts:
                rows = make_rows(renderer, split, counts[split], seed, root, still)
                write_rows(rows, split, root)
            write = partial(write_clip, config.things, seed, str(root), still)
            write_in_processes(write, clip_ids(counts))
    return final / "AVUIE_2"


def world_name(config: WorldConfig, seed: int, still: bool, renderer: Renderer) -> str:
    """Return the name of a world's folder."""
    name = f"v{VERSION}.{ROWS_VERSION}-seed{seed}-{config.world_clips}-{config.world_test}"
    if still:
        name += "-still"
    if config.things:
        digest = hashlib.sha256()
        for thing in renderer.things:
            digest.update(thing.sprite.tobytes() + thing.wave.tobytes() + thing.label.encode())
        name += f"-{Path(config.things).resolve().name}-{digest.hexdigest()[:8]}"
    return name


def clip_counts(config: WorldConfig, still: bool) -> dict[str, dict[str, int]]:
    """Return the number of clips, by split and by kind of scene."""
    share = {"one": 1 / 4, "many": 5 / 12}
    if not still:
        share |= {"action": 1 / 6, "face": 1 / 6}
    train, test = {}, {}
    for kind in share:
        train[kind] = max(8, round(config.world_clips * share[kind]))
        test[kind] = math.ceil(config.world_test * (1.5 if kind == "many" else 1))
    return {"train": train, "test": test}


def clip_ids(counts: dict[str, dict[str, int]]) -> list[tuple[str, str, int]]:
    """Return (split, kind, index) of every clip."""
    ids = []
    for split, by_kind in counts.items():
        for kind, count in by_kind.items():
            ids += [(split, kind, index) for index in range(count)]
    return ids


# --- annotations ----------------------------------------------------------------------------------
# Folder: the field of a training row's target text. "label" in the others.
TARGET_FIELD = {
    "ucf": "new_label",
    "ref_avs": "output",
    **dict.fromkeys(("ave", "unav", "avvp", "avcap", "s4", "ms3", "arig"), "label_content"),
}
# Folder: fields that the rows of a split do not have.
TRAIN_HIDES = {"arig": ("top_left", "bottom_right", "frame_idx")}
TEST_HIDES = {
    "a2v": ("audio_event", "video1_event", "video2_event"),
    "v2a": ("audio1_event", "video_event", "audio2_event"),
}
# Folder: fields that have another name in test rows.
TEST_NAMES = {
    "ref_avs": {"image_path": "visual_path", "idx": "frame_idx", "description": "object"},
    **dict.fromkeys(("s4", "ms3", "arig"), {"image_path": "visual_path"}),
}


def make_rows(
    renderer: Renderer, split: str, counts: dict[str, int], seed: int, root: Path, still: bool
) -> Rows:
    """Make the rows of a split by folder; write the frames and masks that they name."""
    rng = random.Random(f"{seed}/{split}")
    scenes = {}
    for kind, count in counts.items():
        scenes[kind] = [renderer.scene(split, kind, index, seed) for index in range(count)]
    rows: Rows = {}
    if not still:
        question_count = counts["one"] * (2 if split == "train" else 1)
        rows |= clip_rows(renderer, scenes, rng, question_count)
        rows |= match_rows(scenes["one"], rng, counts["one"])
    return rows | frame_rows(renderer, scenes, rng, root, still)


def write_rows(rows: Rows, split: str, root: Path) -> None:
    """Write the annotation files of a split."""
    for folder, items in rows.items():
        if split == "test" and folder in TRAIN_ONLY:
            continue
        (root / folder).mkdir(exist_ok=True)
        released = [release_row(folder, split, row) for row in items]
        (root / folder / f"{split}.json").write_text(json.dumps(released, indent=1))


def release_row(folder: str, split: str, row: dict) -> dict:
    """Return a row with the released field names of its split."""
    hidden = TRAIN_HIDES if split == "train" else TEST_HIDES
    names = {} if split == "train" else TEST_NAMES.get(folder, {})
    released = {}
    for name, value in row.items():
        if name != "text" and name not in hidden.get(folder, ()):
            released[names.get(name, name)] = value
    if split == "train":
        released[TARGET_FIELD.get(folder, "label")] = row["text"]
    elif folder == "ref_avs":
        released["split"] = "test_s"
    return released


# --- files ----------------------------------------------------------------------------------------
@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a folder to fill. It takes its place at `final` when the block has ended well."""
    making = final.with_name(f"{final.name}.making-{os.getpid()}")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    try:
        yield making
        if not final.exists():  # another process may have been faster
            making.rename(final)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def write_in_processes(write: Callable[[tuple], None], clips: list[tuple]) -> None:
    """Write clips in a worker process per core, with a progress bar."""
    workers = min(os.cpu_count() or 1, 8)
    with ProcessPoolExecutor(workers, initializer=exit_with_parent) as pool:
        written = pool.map(write, clips, chunksize=8)
        list(tqdm(written, total=len(clips), desc="building the world", unit="clip"))


@lru_cache(1)
def worker_renderer(things: str) -> Renderer:
    """Return the renderer of a worker process, which writes many clips with it."""
    return Renderer(things or None)


def write_clip(things: str, seed: int, root: str, still: bool, clip: tuple[str, str, int]) -> None:
    """Render and encode the clip (split, kind, index); of a `still` world its sound alone."""
    renderer = worker_renderer(things)
    scene = renderer.scene(*clip, seed)
    wave = renderer.wave(scene)
    if not still:
        times = np.arange(SECONDS * FPS) / FPS
        frames = renderer.frames(scene, times)
        write_video(f"{root}/ave/video/{scene.name}.mp4", frames, wave, FPS, RATE)
    write_audio(f"{root}/ave/audio/{scene.name}.mp3", wave, RATE)
