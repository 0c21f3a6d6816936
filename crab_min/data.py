"""AV-UIE on disk -> samples -> media.

`read_samples` makes of annotation rows (annotations.py; train and test rows differ, papers/crab.md 6.1) `Sample`s: a prompt in parts,
a target text, a gold answer. Nothing is decoded before it is needed: `load_media` turns one part into arrays, in a worker process
(features.py).

Shapes: frames (T, H, W, 3) uint8, sound a list of T waves (N,) float32 at 16 kHz.
"""
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

from crab_min.answers import (
    CHOICE,
    GRID,
    MASK_TOKENS,
    TEXT,
    Answer,
    GoldLabel,
    mask_box,
)
from crab_min.cli import exit_with_parent
from crab_min.encoders import ENCODERS
from crab_min.errors import DataError, MediaError
from crab_min.interface import PromptPart, audio_windows, build_prompt, text_part
from crab_min.media.arrays import POINTS, point_code, read_array, read_points
from crab_min.media.read import media_seconds, read_audio, read_flow, read_image, read_video
from crab_min.sources.av_uie import mask_classes, mask_objects, mask_path, read_mask
from crab_min.sources.rows import annotation_file, read_rows
from crab_min.tasks import TASKS, Task


@dataclass(slots=True)
class Sample:
    """One question about one or more media: `id` is task/split/index of its row."""
    id: str
    task: Task
    parts: list[PromptPart]
    target: str                                        # what the model should write ("" where a test row has no text)
    gold: Answer
    row: dict
    mask: str = ""                                     # file of the mask that the answer stands for, where the model answers with masks

    @property
    def media(self) -> list[PromptPart]:
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
    """The samples of a split ("train", "test") of the AV-UIE folder `root` (v2, or v1 where that has the task), task by task.

    target: "reasoning" (the annotated text) or "label" (its tags alone). limit: at most so many rows a task (0: all).
    Folders that are not there are left out; none at all is an error. Where `root` is a .jsonl file, it is read (read_own), whatever
    the tasks. Raises DataError.
    """
    root, samples = Path(root), []
    if root.suffix == ".jsonl":
        return read_jsonl(root, split, limit)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; --data takes the folder that holds ave/, avqa/, ... (AVUIE_2)")
    for name in tasks:
        path = annotation_file(root, name, split)
        for index, row in enumerate(read_rows(root, name, split, limit) if path else []):
            try:
                samples.append(make_sample(TASKS[name], row, root, split, index, target, prompts))
            except DataError as error:
                raise DataError(f"{path}, row {index}: {error}") from None
    if not samples:
        raise DataError(f"{root}: no {split}.json in any of {', '.join(tasks)}; expected e.g. {root / tasks[0] / (split + '.json')}")
    return samples


# One's own data: what a model says, as text; or a label, where every line's answer has an <answer> tag.
# "options" makes it a multiple choice, "sides" {name: file} names side channels (PAVE).
CUSTOM_TASKS = {
    "text": Task(
        name="own", family="own", instruction="", target="", form=TEXT,
        gold=GoldLabel(TEXT.parse, "target"), metric="rouge_l", set_metrics=("cider",)),
    "choice": Task(
        name="own", family="own", instruction="", target="", form=CHOICE,
        gold=GoldLabel(CHOICE.parse, "target"), set_metrics=("by_class",), types=("type",)),
}


def read_jsonl(path: Path, split: str, limit: int = 0) -> list[Sample]:
    """The samples of a .jsonl file of one's own: {"messages": [{"role": "user", "content": "<video><audio>What is it?"}, {"role": "assistant",
    "content": "..."}], "videos": ["x.mp4"], "audios": ["x.wav"], "images": []} a line, paths from the file's folder.

    The last message is what the model should say; all before it are the prompt. A medium stands where its tag is, or before everything
    where there is none. Raises DataError with the number of the line.
    """
    found = []
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}; --data takes a .jsonl file or the folder that holds ave/, avqa/, ... (AVUIE_2)") from None
    for number, line in enumerate(lines[:limit or None], 1):
        try:
            row = json.loads(line)
            said = [message["content"].strip() for message in row["messages"]]
            files = [(kind, str(path.parent / file)) for kind in ("video", "audio", "image") for file in row.get(kind + "s") or []]
            row["sides"] = {name: str(path.parent / file) for name, file in (row.get("sides") or {}).items()}
            if len(said) < 2 or row["messages"][-1]["role"] != "assistant":
                raise ValueError("the last of two or more messages must be the assistant's")
            found.append((row, jsonl_parts("\n".join(said[:-1]), files), said[-1]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}, line {number}: not {{\"messages\": [{{\"role\": \"user\", \"content\": ...}}, {{\"role\": \"assistant\", ...}}], "
                            f"\"videos\": [...], ...}} ({type(error).__name__}: {error})") from None
    if not found:
        raise DataError(f"{path}: no lines; a line is {{\"messages\": [...], \"videos\": [...], \"audios\": [...], \"images\": [...]}}")
    task = CUSTOM_TASKS["text" if any(CUSTOM_TASKS["choice"].parse(text).error for *_, text in found) else "choice"]
    return [Sample(f"own/{split}/{i}", task, parts, text if split == "train" else "", task.gold_answer({"target": text}), row) for i, (row, parts, text) in enumerate(found)]


def jsonl_parts(text: str, files: list[tuple[str, str]]) -> list[PromptPart]:
    """A prompt with the files (kind, path) in the place of the tags <video>, <audio>, <image> of its text. Raises ValueError."""
    tags = re.findall("<(video|audio|image)>", text)
    for kind in ("video", "audio", "image"):
        have, wanted = sum(k == kind for k, _ in files), tags.count(kind)
        if wanted not in (0, have):
            raise ValueError(f"{wanted} <{kind}> in the text, {have} in {kind}s")
        text = f"<{kind}>" * (have if not wanted else 0) + text
    parts, left = [], {kind: iter([p for k, p in files if k == kind]) for kind in ("video", "audio", "image")}
    for piece in re.split("(<video>|<audio>|<image>)", text):
        if piece[1:-1] in left and piece.startswith("<"):
            parts.append(PromptPart(piece[1:-1], path=next(left[piece[1:-1]])))
        elif piece:
            parts.append(text_part(piece))
    return parts if parts[-1:] and parts[-1].kind == "text" else [*parts, text_part("\n")]


def evaluation_data(data: str) -> str:
    """What a run trained on `data` is examined on: the same folder; beside a train.jsonl the test.jsonl, if there is one ("": nothing)."""
    if not data.endswith(".jsonl"):
        return data
    beside = Path(data).with_name("test.jsonl")
    return str(beside) if Path(data).name == "train.jsonl" and beside.exists() else ""


def make_sample(task: Task, row: dict, root: Path, split: str, index: int, target: str, prompts: dict | None) -> Sample:
    parts = build_prompt(task, row, str(root), prompts)
    if split == "test" and task.name in ("s4", "ms3", "ref_avs") and "gold_boxes" not in row:
        mask = read_mask(mask_path(root / task.name / row["visual_path"], task.name, row))
        row = {**row, "gold_boxes": [mask_box(m) for m in mask_objects(mask, task.name)]}
    answer = task.gold_answer(row, split)
    text = row.get(task.target, "") if split == "train" else ""
    if split == "train" and not isinstance(text, str):
        raise DataError(f"field {task.target!r} must be text, got {text!r}")
    if split == "train" and not text:                                         # no reasoned text: the label alone
        text = task.format(answer)
    if target == "label":
        parsed = task.parse(text)
        text = text if parsed.error or not text else task.format(parsed)
    return Sample(f"{task.name}/{split}/{index}", task, parts, text, answer, row)


# --- media -----------------------------------------------------------------------------------------------------------------
BLACK = "black"                                        # the path of pictures that are to be black, see `without`


def ablate_modality(samples: list[Sample], sense: str) -> list[Sample]:
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


def keep_modality(samples: list[Sample], kind: str) -> list[Sample]:
    """Captions for aligning the connector of one sense ("video" or "audio"): the other medium and its marker are left out of the prompt.

    The target is the row's caption of that sense alone, under "seen" or "heard", where it has one; else the whole caption.
    """
    changed = []
    for s in samples:
        parts = [p for i, p in enumerate(s.parts) if p.kind in ("text", kind) and (i + 1 == len(s.parts) or s.parts[i + 1].kind in ("text", kind))]
        parts[0] = replace(parts[0], text=parts[0].text.lstrip("\n"))
        changed.append(replace(s, parts=parts, target=s.row.get({"video": "seen", "audio": "heard"}[kind], s.target)))
    return changed


MASKED = tuple(name for name, task in TASKS.items() if task.mask_head)


def add_mask_tokens(samples: list[Sample], tokens: bool = True) -> list[Sample]:
    """The form of Crab: an answer with a box ends in mask tokens (unless not `tokens`), and has a mask where its file is there. Other samples stay as they are.

    One set of tokens stands for all that is meant, as one mask of MS3 does.
    """
    changed = []
    for s in samples:
        if s.task.name in MASKED:
            file = mask_path(Path(next(p.path for p in s.media if p.kind == "image")), s.task.name, s.row)
            named = bool(s.gold.boxes) if not s.target else bool(s.task.parse(s.target).boxes)
            s = replace(s, mask=str(file) if named and file.exists() else "")
            if named and s.target and tokens:
                s = replace(s, target=s.target + "".join(MASK_TOKENS))
        changed.append(s)
    return changed


def swap_audio(samples: list[Sample]) -> list[Sample]:
    """Of the samples whose row says so (the world's s4), the same pictures with the sound of a thing that is seen there and was silent: now it is meant."""
    changed = []
    for s in samples:
        if sound := s.row.get("swapped"):
            meant = {**s.row["silent"], s.row["a_obj"]: s.gold.boxes[0]}
            row = {**s.row, "a_obj": sound["event"], "silent": {label: box for label, box in meant.items() if label != sound["event"]}}
            name = Path(sound["audio_path"]).name
            parts = [replace(p, path=str(Path(p.path).with_name(name)), index=sound["frame_idx"]) if p.kind == "audio" else p for p in s.parts]
            changed.append(replace(s, parts=parts, row=row, gold=replace(s.gold, boxes=[tuple(meant[sound["event"]])])))
    return changed


def gold_mask(sample: Sample, size: int = 0) -> np.ndarray | None:
    """The mask of a sample (H, W), or (size, size): bool, or of AVSS the classes int64, -1 where the colour is no class; None where it has none. Raises DataError."""
    if not sample.mask:
        return None
    mask = read_mask(Path(sample.mask))
    mask = mask_classes(mask) if sample.task.name == "avss" else mask.max(-1) > 0
    h, w = mask.shape
    return mask[(np.arange(size) * h // size)[:, None], np.arange(size) * w // size] if size else mask


FAST, FAST_RATE = 16, 25                               # a dense stream: pixels of its square frames, frames a second
MARKER = re.compile(r"\s*audio( one| two)?: ")         # what build_prompt writes before a sound


def add_side_channels(samples: list[Sample], names: list[str], needed: bool = True) -> list[Sample]:
    """The form of PAVE and CREMA: the prompt has no sound; side channels follow the video (or image) that they belong to.

    names: keys of the row's "sides" {name: file}; where it has no "sides", "audio", the sample's sound, and "fast", all the frames of the video;
    always "flow", its optical flow, and what an encoder is registered for, its frames. No names: sound is left out alone. Raises DataError
    for a sample of two videos or sounds and, where they are `needed`, for one without any of them.
    """
    changed = []
    for s in samples:
        sounds, seen = [p for p in s.media if p.kind == "audio"], [p for p in s.media if p.kind in ("video", "image")]
        video = seen and seen[0].kind == "video" and seen[0].path
        places = {"flow": video, **dict.fromkeys(ENCODERS, video)} | (s.row.get("sides") or {"audio": sounds and sounds[0].path, "fast": video})
        sides = [side_part(name, str(places[name]), seen, sounds) for name in names if places.get(name)]
        if names and (needed and not sides or len(seen) != 1 or len(sounds) > 1):
            raise DataError(f"{s.id}: {len(seen)} videos or images, {len(sounds)} sounds and the side channels {', '.join(n for n in places if places[n]) or 'none'}; "
                            f"{','.join(names)} want one video with at least one of them (rows of a .jsonl name their files under \"sides\")")
        parts = []
        for i, p in enumerate(s.parts):
            if p.side or p.kind == "audio" or p.kind == "text" and MARKER.fullmatch(p.text) and i + 1 < len(s.parts) and s.parts[i + 1].kind == "audio":
                continue
            parts += [p, *sides] if p.kind in ("video", "image") else [p]
        changed.append(replace(s, parts=parts))
    return changed


def limit_frames(samples: list[Sample], frames: int) -> list[Sample]:
    """Of each video, and of what is seen beside it, this many frames (0: as its task has it)."""
    return [replace(s, parts=[replace(p, frames=frames) if p.kind in ("video", "view", "flow", "array") else p for p in s.parts]) for s in samples] if frames else samples


def count_missing(samples: list[Sample], names: list[str]) -> dict[str, int]:
    """How many of the samples have no such side channel, by name."""
    return {name: sum(all(p.side != name for p in s.media) for s in samples) for name in names}


def side_part(name: str, path: str, seen: list[PromptPart], sounds: list[PromptPart]) -> PromptPart:
    """A side channel as a part: a dense stream, flow, a sound, 3D points, an array, or for any other file the frames of a second video."""
    ending, frames = Path(path).suffix, seen[0].frames if seen else 10
    if name == "fast":
        return PromptPart("fast", path=path, side=name)
    if ending == ".npz" or POINTS[0] in path:
        return PromptPart("points", path=path, side=name)
    if ending in (".npy", ".pt", ".safetensors"):
        return PromptPart("array", path=path, frames=frames, side=name)
    if name == "audio":
        return replace(sounds[0], path=path, side=name) if sounds else PromptPart("audio", path=path, side=name)
    return PromptPart("flow" if name == "flow" and seen and path == seen[0].path else "view", path=path, frames=frames, side=name)


def load_media(part: PromptPart, size: int) -> tuple:
    """(arrays, seconds) of one media part: frames (T, size, size, 3) uint8, or a list of waves (N,); and how long it is. Raises MediaError."""
    if part.kind == "array":
        return read_array(part.path, part.frames, size), 0.
    if part.kind == "points":
        return point_code(*read_points(part.path)), 0.
    if part.kind == "flow":
        clip = read_flow(part.path, part.frames, size)
        return clip.frames, clip.seconds
    if part.kind == "fast":
        seconds = media_seconds(part.path)
        return read_video(part.path, max(1, round(FAST_RATE * seconds)), FAST).frames, seconds
    if part.path == BLACK:
        return np.zeros((part.frames if part.kind == "video" else 1, size, size, 3), np.uint8), float(part.frames)
    if part.kind in ("video", "view"):
        clip = read_video(part.path, part.frames, size)
        return clip.frames, clip.seconds
    if part.kind == "image":
        return read_image(part.path, size)[None], 1.
    windows = audio_windows(part.window, media_seconds(part.path), part.index)
    audio = read_audio(part.path, window=(min(s for s, _ in windows), max(e for _, e in windows)))
    start = min(s for s, _ in windows)
    return [audio.wave[round((s - start) * 16000):round((e - start) * 16000)] for s, e in windows], audio.seconds


def load_for_figure(sample: Sample) -> list[tuple]:
    """The media of a sample as viz.py draws them: (name, kind, arrays, seconds) in the order of the prompt."""
    loaded = [(p, *load_media(p, GRID)) for p in sample.media if p.kind not in ("fast", "points")]
    return [(f"{p.side or p.kind}: {Path(p.path).name}", "video" if p.kind in ("view", "flow", "array") else p.kind, arrays, seconds or 10.) for p, arrays, seconds in loaded
            if p.kind != "array" or arrays.dtype == np.uint8]


class MediaSet:
    """A dataset for worker processes whose keys are media parts: (part, (arrays, seconds), None), or (part, None, why it cannot be read)."""

    def __init__(self, size: int, decode: bool = True):
        self.size, self.decode = size, decode                                 # decode=False: the length alone, from the header

    def __getitem__(self, part: PromptPart):
        try:
            return part, load_media(part, self.size) if self.decode or part.kind == "image" else (None, media_seconds(part.path)), None
        except MediaError as error:
            return part, None, str(error)


def decoding(groups: Iterable[list[PromptPart]], size: int, workers: int, decode: bool = True) -> DataLoader:
    """Groups of parts as MediaSet gives them, in their order, decoded ahead by worker processes."""
    return DataLoader(MediaSet(size, decode), batch_sampler=groups, num_workers=workers, collate_fn=list, worker_init_fn=exit_with_parent)
