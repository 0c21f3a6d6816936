"""AV-UIE v2 on disk -> samples -> media -> batches.

`read_samples` reads the annotation files of the 19 folders as released (train and test rows differ, papers/crab.md 6.1) into
`Sample`s: a prompt in parts, a target text, a gold answer. Nothing is decoded before it is needed: `load_media` turns one part
into arrays, in a worker process, and `Features` keeps what the frozen encoders made of it, so that a clip that many questions
share is decoded and encoded once (`--cache-features`).
Shapes: frames (T, H, W, 3) uint8, sound a list of T waves (N,) float32 at 16 kHz, features (T, S, W).
"""
import json
import os
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from crab_min.interface import GRID, TASKS, Answer, InterfaceError, Part, Task, audio_windows, build_prompt, gold, mask_box, parse, write
from crab_min.media import MediaError, media_seconds, read_audio, read_image, read_video
from crab_min.model import AVLanguageModel, MediaFeatures


class DataError(ValueError):
    """An annotation file or row that cannot be used: which one, what is wrong, what to do."""


@dataclass
class Sample:
    """One question about one or more media: `id` is task/split/index of its row."""
    id: str
    task: Task
    parts: list[Part]
    target: str                                        # what the model should write ("" where a test row has no text)
    gold: Answer
    row: dict

    @property
    def media(self) -> list[Part]:
        return [p for p in self.parts if p.kind != "text"]


def pick_tasks(names: str) -> list[str]:
    """"all" or a comma-separated list of task names -> names in the order of TASKS. Raises DataError for an unknown one."""
    chosen = list(TASKS) if names == "all" else [n.strip() for n in names.split(",") if n.strip()]
    for name in chosen:
        if name not in TASKS:
            raise DataError(f"unknown task {name!r}; choose from {', '.join(TASKS)}, or all")
    return [t for t in TASKS if t in chosen]


def read_samples(root: str | Path, tasks: list[str], split: str, target: str = "reasoning", prompts: dict | None = None,
                 limit: int = 0) -> list[Sample]:
    """The samples of a split ("train", "test") of the AV-UIE v2 folder `root`, task by task.

    target: "reasoning" (the annotated text) or "label" (its tags alone). limit: at most so many rows a task (0: all).
    Folders that are not there are left out; none at all is an error. Raises DataError.
    """
    root, samples = Path(root), []
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; --data takes the folder that holds ave/, avqa/, ... (AVUIE_2)")
    for name in tasks:
        path = root / name / f"{split}.json"
        if not path.exists():
            continue
        try:
            rows = json.loads(path.read_text())
        except (ValueError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: broken JSON ({error}); repair or download the file again") from None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{path}: expected a list of objects, one a sample")
        for index, row in enumerate(rows[:limit or None]):
            try:
                samples.append(make_sample(TASKS[name], row, root, split, index, target, prompts))
            except InterfaceError as error:
                raise DataError(f"{path}, row {index}: {error}") from None
    if not samples:
        raise DataError(f"{root}: no {split}.json in any of {', '.join(tasks)}; expected e.g. {root / tasks[0] / (split + '.json')}")
    return samples


def make_sample(task: Task, row: dict, root: Path, split: str, index: int, target: str, prompts: dict | None) -> Sample:
    parts = build_prompt(task, row, str(root), prompts)
    if split == "test" and task.name in ("s4", "ms3", "ref_avs"):
        row = {**row, "gold_boxes": mask_boxes(root / task.name / row["visual_path"], task.name, row)}
    answer = gold(task, row, split)
    text = row.get(task.target, "") if split == "train" else ""
    if split == "train" and not isinstance(text, str):
        raise InterfaceError(f"field {task.target!r} must be text, got {text!r}")
    if target == "label":
        parsed = parse(task, text)
        text = text if parsed.error or not text else write(task, parsed)
    return Sample(f"{task.name}/{split}/{index}", task, parts, text, answer, row)


def mask_boxes(frame: Path, task: str, row: dict) -> list[tuple]:
    """Boxes on the 224 grid of the mask that belongs to a test frame, as released: labels_rgb beside frames, or Ref-AVS's gt_mask.

    One box for each connected group of columns (MS3 may have several objects); an empty mask has none.
    """
    if task == "ref_avs":
        path = frame.parents[3] / "gt_mask" / row["vid"] / f"fid_{row['fid']}" / f"0000{row['frame_idx']}.png"
    else:
        path = Path(str(frame.with_suffix(".png")).replace("/frames/", "/labels_rgb/"))
    try:
        mask = np.asarray(Image.open(path).convert("RGB")).max(-1) > 0
    except OSError as error:
        raise DataError(f"{path}: mask missing or unreadable ({error}); it is needed to score {task}") from None
    columns = np.flatnonzero(mask.any(0))
    groups = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1) if task == "ms3" else [columns]
    boxes = [mask_box(mask & np.isin(np.arange(mask.shape[1]), xs)) for xs in groups]
    return [box for box in boxes if box]


# --- media -----------------------------------------------------------------------------------------------------------------
BLACK = "black"                                        # the path of pictures that are to be black, see `without`


def without(samples: list[Sample], sense: str) -> list[Sample]:
    """The same questions with a sense taken away, to see what an answer rests on.

    sense: "sound": every sound is that of another clip of its task; "frames": all pictures are black.
    """
    groups, changed = {}, {}
    for s in samples:
        groups.setdefault(s.task.name, []).append(s)
    for group in groups.values():
        sounds = [[p.path for p in s.media if p.kind == "audio"] for s in group]
        for i, s in enumerate(group):
            ahead = (sounds[(i + len(group) // 2 + k) % len(group)] for k in range(len(group)))
            other = iter(next((paths for paths in ahead if not set(paths) & set(sounds[i])), sounds[i]))
            changed[s.id] = replace(s, parts=[
                replace(p, path=next(other)) if p.kind == "audio" and sense == "sound" else
                replace(p, path=BLACK) if p.kind in ("video", "image") and sense == "frames" else p for p in s.parts])
    return [changed[s.id] for s in samples]


def one_sense(samples: list[Sample], kind: str) -> list[Sample]:
    """Captions for aligning the connector of one sense ("video" or "audio"): the other medium and its marker are left out of the prompt.

    The target is the row's caption of that sense alone, under "seen" or "heard", where it has one; else the whole caption.
    """
    changed = []
    for s in samples:
        parts = [p for i, p in enumerate(s.parts) if p.kind in ("text", kind) and (i + 1 == len(s.parts) or s.parts[i + 1].kind in ("text", kind))]
        parts[0] = replace(parts[0], text=parts[0].text.lstrip("\n"))
        changed.append(replace(s, parts=parts, target=s.row.get({"video": "seen", "audio": "heard"}[kind], s.target)))
    return changed


def load_media(part: Part, size: int) -> tuple:
    """(arrays, seconds) of one media part: frames (T, size, size, 3) uint8, or a list of waves (N,); and how long it is. Raises MediaError."""
    if part.path == BLACK:
        return np.zeros((part.frames if part.kind == "video" else 1, size, size, 3), np.uint8), float(part.frames)
    if part.kind == "video":
        clip = read_video(part.path, part.frames, size)
        return clip.frames, clip.seconds
    if part.kind == "image":
        return read_image(part.path, size)[None], 1.
    windows = audio_windows(part.window, media_seconds(part.path), part.index)
    audio = read_audio(part.path, window=(min(s for s, _ in windows), max(e for _, e in windows)))
    start = min(s for s, _ in windows)
    return [audio.wave[round((s - start) * 16000):round((e - start) * 16000)] for s, e in windows], audio.seconds


def drawn_media(sample: Sample) -> list[tuple]:
    """The media of a sample as viz.py draws them: (name, kind, arrays, seconds) in the order of the prompt."""
    return [(f"{p.kind}: {Path(p.path).name}", p.kind, *load_media(p, GRID)) for p in sample.media]


class MediaSet:
    """A map-style dataset of media parts for worker processes: (index, (arrays, seconds), None), or (index, None, the reason it cannot be read)."""

    def __init__(self, parts: list[Part], size: int):
        self.parts, self.size = parts, size

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, i: int):
        try:
            return i, load_media(self.parts[i], self.size), None
        except MediaError as error:
            return i, None, str(error)


@dataclass
class Features:
    """Frozen-encoder features of media parts, computed once and kept where `keep` is set (half precision, in memory)."""
    model: AVLanguageModel
    keep: bool = True
    max_bad: float = .01                               # share of unreadable media above which `fill` stops
    store: dict = field(default_factory=dict)
    bad: dict = field(default_factory=dict)            # part -> reason

    def fill(self, samples: list[Sample], strict: bool = True) -> None:
        """Decode and encode every medium of the samples that is not there yet, with a progress bar.

        strict: an unreadable file is an error; else it is listed in `bad`, up to `max_bad` of all. Raises DataError.
        """
        parts = sorted({p for s in samples for p in s.media if p not in self.store and p not in self.bad}, key=lambda p: (p.kind, p.path, p.index))
        loader = DataLoader(MediaSet(parts, self.model.frame_size), batch_size=8, num_workers=min(2, os.cpu_count() or 1) if len(parts) > 32 else 0,
                            collate_fn=list)
        with tqdm(total=len(parts), desc="decoding and encoding", unit="file", disable=len(parts) < 32) as bar:
            for group in loader:
                for i, _, reason in group:
                    if reason is not None:
                        self.reject(parts[i], reason, strict, len(parts))
                self.encode([(parts[i], *loaded) for i, loaded, reason in group if reason is None])
                bar.update(len(group))

    def reject(self, part: Part, reason: str, strict: bool, total: int) -> None:
        if strict:
            raise DataError(reason)
        self.bad[part] = reason
        tqdm.write(f"skipped: {reason}")
        if len(self.bad) > self.max_bad * max(total, len(self.store)) and len(self.bad) > 1:
            raise DataError(f"{len(self.bad)} unreadable files, more than --max-bad {self.max_bad:.0%}; the last: {reason}")

    def encode(self, loaded: list[tuple]) -> None:
        groups: dict = {}
        for part, arrays, seconds in loaded:
            groups.setdefault((part.kind, len(arrays)), []).append((part, arrays, seconds))
        for (kind, _), items in groups.items():
            for (part, *_), features in zip(items, self.model.encode(kind, [arrays for _, arrays, _ in items], [seconds for *_, seconds in items])):
                features.features = features.features.half()
                self.store[part] = features

    def __call__(self, samples: list[Sample]) -> list[list[MediaFeatures]]:
        """The features of each sample's media, in reading order."""
        self.fill(samples)
        media = [[self.store[p] for p in s.media] for s in samples]
        if not self.keep:
            self.store.clear()
        return media


# --- order -----------------------------------------------------------------------------------------------------------------
class Mixer:
    """Which samples make up the batch of a step: a function of (seed, step) alone, so that a resumed run goes on where it was.

    A task is drawn with probability proportional to (rows ** alpha); within a task every row comes once before any comes twice.
    """

    def __init__(self, samples: list[Sample], batch_size: int, seed: int, alpha: float = .5):
        self.batch_size, self.seed = batch_size, seed
        self.rows: dict[str, list[Sample]] = {}
        for sample in samples:
            self.rows.setdefault(sample.task.name, []).append(sample)
        self.names = list(self.rows)
        self.weights = [len(self.rows[n]) ** alpha for n in self.names]

    def epoch(self, name: str, number: int) -> list[Sample]:
        rows = list(self.rows[name])
        random.Random(f"{self.seed}/{name}/{number}").shuffle(rows)
        return rows

    def __iter__(self):
        """Batches without end; skip those already done with itertools.islice."""
        rng, drawn, orders = random.Random(self.seed), Counter(), {}
        while True:
            batch = []
            for name in rng.choices(self.names, self.weights, k=self.batch_size):
                number, position = divmod(drawn[name], len(self.rows[name]))
                if position == 0:
                    orders[name] = self.epoch(name, number)
                batch.append(orders[name][position])
                drawn[name] += 1
            yield batch
