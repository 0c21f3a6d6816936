"""Annotation rows -> samples -> arrays.

`read_samples` turns each row of an AV-UIE folder, or of a .jsonl file of your own, into a `Sample`:
a prompt in parts, the text to learn, and the gold answer. Nothing is decoded before it is needed:
`load_media` turns one part of a prompt into arrays, in a worker process (features.py).

Shapes: frames (T, H, W, 3) uint8; a sound is a list of T waves (N,), float32 at 16 kHz.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

from crab_min.answers import TEXT, Answer, mask_box
from crab_min.errors import DataError, MediaError
from crab_min.interface import PromptPart, audio_windows, build_prompt, text_part
from crab_min.media.arrays import point_code, read_array, read_points
from crab_min.media.read import media_seconds, read_audio, read_flow, read_image, read_video
from crab_min.media.workers import exit_with_parent
from crab_min.sources.av_uie import mask_classes, mask_objects, mask_path, read_mask
from crab_min.sources.rows import find_layout, read_rows
from crab_min.tasks import TASKS, Task

SAMPLE_RATE = 16000  # Hz
FAST_SIZE, FAST_RATE = 16, 25  # a dense stream: pixels of its square frames, frames per second
BLACK = "black"  # stands for a path where pictures are to be black (evaluation/ablation.py)


@dataclass(slots=True)
class Sample:
    """One question about one or more media.

    Attributes:
        id: task/split/index of its row.
        parts: the prompt: text and media in reading order.
        target: the text to learn; "" where a test row has none.
        row: the annotation row that it was made of.
        mask: file of the gold mask; set by Crab's mask stage (recipes/crab.py).
    """

    id: str
    task: Task
    parts: list[PromptPart]
    target: str
    gold: Answer
    row: dict
    mask: str = ""

    @property
    def media(self) -> list[PromptPart]:
        """Return the parts of the prompt that are not text."""
        return [part for part in self.parts if part.kind != "text"]


def pick_tasks(names: str) -> list[str]:
    """Return task names in the order of TASKS.

    Args:
        names: "all", or names separated by commas.

    Raises:
        DataError: an unknown name.
    """
    chosen = list(TASKS)
    if names != "all":
        chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in TASKS:
            raise DataError(f"unknown task {name!r}; choose from {', '.join(TASKS)}, or all")
    return [name for name in TASKS if name in chosen]


# --- AV-UIE --------------------------------------------------------------------------------------


def read_samples(
    root: str | Path,
    tasks: list[str],
    split: str,
    target: str = "reasoning",
    prompts: dict | None = None,
    limit: int = 0,
) -> list[Sample]:
    """Read the samples of a split, task by task.

    Args:
        root: an AV-UIE folder (v2, or v1 where that has the task), or a .jsonl file, which is read
            whatever the tasks.
        tasks: names; a task whose folder is not there is left out.
        split: "train" or "test".
        target: "reasoning" (the annotated text) or "label" (its tags alone).
        prompts: instructions by task name, instead of ours.
        limit: rows per task at most; 0 for all.

    Raises:
        DataError: no rows at all, or a row that cannot be used.
    """
    root = Path(root)
    if root.suffix == ".jsonl":
        return read_jsonl(root, split, limit)
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder; --data takes the folder that holds ave/, avqa/, ... (AVUIE_2)"
        )

    # a task without an annotation file is left out
    samples = []
    for name in tasks:
        path, _ = find_layout(root, name, split)
        if not path:
            continue
        for index, row in enumerate(read_rows(root, name, split, limit)):
            # an error names the file and the row that has to be mended
            try:
                sample = make_sample(TASKS[name], row, root, split, index, target, prompts)
            except DataError as error:
                raise DataError(f"{path}, row {index}: {error}") from None
            samples.append(sample)
    if not samples:
        raise DataError(
            f"{root}: no {split}.json in any of {', '.join(tasks)}; "
            f"expected e.g. {root / tasks[0] / (split + '.json')}"
        )
    return samples


def make_sample(
    task: Task, row: dict, root: Path, split: str, index: int, target: str, prompts: dict | None
) -> Sample:
    """Make the sample of one annotation row; arguments as in `read_samples`.

    Raises:
        DataError: a field is missing or holds something else.
    """
    parts = build_prompt(task, row, str(root), prompts)

    # test rows with a mask have no boxes: they are those of the mask's objects
    if split == "test" and task.mask_head == "binary" and "gold_boxes" not in row:
        image = next(part.path for part in parts if part.kind == "image")
        mask = read_mask(mask_path(Path(image), task.name, row))
        boxes = [mask_box(object_mask) for object_mask in mask_objects(mask, task.name)]
        row = {**row, "gold_boxes": boxes}
    gold = task.gold_answer(row, split)

    # what is learned: the annotated reasoning, or without one the label alone
    text = ""
    if split == "train":
        text = row.get(task.target) or ""
        if not isinstance(text, str):
            raise DataError(f"field {task.target!r} must be text, got {text!r}")
        text = text or task.format(gold)
    if target == "label" and text:
        parsed = task.parse(text)
        text = text if parsed.error else task.format(parsed)
    return Sample(f"{task.name}/{split}/{index}", task, parts, text, gold, row)


def gold_mask(sample: Sample, size: int = 0) -> np.ndarray | None:
    """Read the gold mask of a sample.

    Args:
        size: pixels per side of the result, by the nearest pixel; 0 for the file's own size.

    Returns:
        (H, W) bool; for AVSS the class per pixel, int64, -1 for an unknown colour; None without
        a mask.
    """
    if not sample.mask:
        return None
    mask = read_mask(Path(sample.mask))
    if sample.task.mask_head == "classes":
        mask = mask_classes(mask)
    else:
        mask = mask.max(-1) > 0
    if not size:
        return mask
    # the nearest row and column of the file for each of the result
    height, width = mask.shape
    rows, columns = np.arange(size) * height // size, np.arange(size) * width // size
    return mask[rows[:, None], columns]


# --- a .jsonl file of one's own ------------------------------------------------------------------

# A row's "options" make it multiple choice, its "sides" {name: file} name side channels.
OWN = {"name": "own", "family": "own", "instruction": "", "target": "target"}
OWN_TEXTS = Task(**OWN, form=TEXT, metric="rouge_l", set_metrics=("cider",))
OWN_LABELS = Task(**OWN, set_metrics=("by_class",), types=("type",))
MEDIA_TAG = re.compile("(<video>|<audio>|<image>)")
ROW_FORM = (
    '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}], '
    '"videos": [...], "audios": [...], "images": [...]}'
)


def read_jsonl(path: Path, split: str, limit: int = 0) -> list[Sample]:
    """Read a .jsonl file of one's own: one JSON object per line, of the form ROW_FORM.

    The last message is what the model should answer, those before it are the prompt. A file takes
    the place of its tag in the text (<video>, <audio>, <image>), or stands before the text where
    there is no tag. Paths are relative to the file's folder. If all answers of the file have an
    <answer> tag they are labels, else they are text.

    Raises:
        DataError: the file or one of its lines cannot be used; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: {error}; --data takes a .jsonl file or the folder that holds ave/, avqa/, "
            "... (AVUIE_2)"
        ) from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: no lines; a line is {ROW_FORM}")

    # each line by itself, so that an error names it
    rows = []
    for number, line in lines[: limit or None]:
        try:
            rows.append(read_jsonl_line(line, path.parent))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{path}, line {number}: not {ROW_FORM} ({reason})") from None

    # one answer without a tag makes all of them free text
    untagged = [answer for *_, answer in rows if OWN_LABELS.parse(answer).error]
    task = OWN_TEXTS if untagged else OWN_LABELS
    samples = []
    for index, (row, parts, answer) in enumerate(rows):
        target = answer if split == "train" else ""
        gold = task.gold_answer({"target": answer})
        samples.append(Sample(f"own/{split}/{index}", task, parts, target, gold, row))
    return samples


def read_jsonl_line(line: str, folder: Path) -> tuple[dict, list[PromptPart], str]:
    """Return the row of a line, its prompt and its answer.

    Raises ValueError and its like.
    """
    row = json.loads(line)
    texts = [message["content"].strip() for message in row["messages"]]
    if len(texts) < 2 or row["messages"][-1]["role"] != "assistant":
        raise ValueError("the last of two or more messages must be the assistant's")
    sides = row.get("sides") or {}
    row["sides"] = {name: str(folder / file) for name, file in sides.items()}
    files = {}
    for kind in ("video", "audio", "image"):
        files[kind] = [str(folder / file) for file in row.get(f"{kind}s") or []]
    return row, jsonl_parts("\n".join(texts[:-1]), files), texts[-1]


def jsonl_parts(text: str, files: dict[str, list[str]]) -> list[PromptPart]:
    """Make a prompt of a text with tags and of the files that take their places.

    Args:
        files: paths by kind: "video", "audio", "image".

    Raises:
        ValueError: a kind has some tags, but not as many as files.
    """
    # files of a kind that has no tag stand before the text
    untagged = ""
    for kind, paths in files.items():
        tags = text.count(f"<{kind}>")
        if tags == 0:
            untagged += f"<{kind}>" * len(paths)
        elif tags != len(paths):
            raise ValueError(f"{tags} <{kind}> in the text, {len(paths)} in {kind}s")
    text = untagged + text

    # tags become media, in order; what is between them stays text
    parts = []
    remaining = {kind: iter(paths) for kind, paths in files.items()}
    for piece in MEDIA_TAG.split(text):
        if MEDIA_TAG.fullmatch(piece):
            kind = piece.strip("<>")
            parts.append(PromptPart(kind, path=next(remaining[kind])))
        elif piece:
            parts.append(text_part(piece))
    if not parts or parts[-1].kind != "text":
        parts.append(text_part("\n"))  # what follows a prompt is expected behind text
    return parts


def evaluation_data(data: str) -> str:
    """Return the path of the evaluation data for a run that is trained on `data`.

    An AV-UIE folder has its own test split; for a train.jsonl it is the test.jsonl in the same
    folder, "" if there is none.
    """
    if not data.endswith(".jsonl"):
        return data
    test = Path(data).with_name("test.jsonl")
    return str(test) if Path(data).name == "train.jsonl" and test.exists() else ""


# --- media ---------------------------------------------------------------------------------------


def load_media(part: PromptPart, size: int) -> tuple:
    """Decode one medium.

    Args:
        size: pixels per side of square frames; a dense stream has FAST_SIZE.

    Returns:
        Its arrays and its length in seconds: of video, image, view, flow and fast frames
        (T, size, size, 3) uint8, and so of an array file of pictures; of audio a list of waves
        (N,); of other arrays and of points features (U, S, W).

    Raises:
        MediaError: the file cannot be read.
    """
    if part.path == BLACK:
        frames = part.frames if part.kind == "video" else 1
        return np.zeros((frames, size, size, 3), np.uint8), float(frames)
    if part.kind == "array":
        return read_array(part.path, part.frames, size), 0.0
    if part.kind == "points":
        return point_code(*read_points(part.path)), 0.0
    if part.kind == "image":
        return read_image(part.path, size)[None], 1.0
    if part.kind == "audio":
        return load_audio(part)
    if part.kind == "flow":
        clip = read_flow(part.path, part.frames, size)
    elif part.kind == "fast":
        seconds = media_seconds(part.path)
        clip = read_video(part.path, max(1, round(FAST_RATE * seconds)), FAST_SIZE)
    else:
        clip = read_video(part.path, part.frames, size)
    return clip.frames, clip.seconds


def load_audio(part: PromptPart) -> tuple[list[np.ndarray], float]:
    """Decode the windows of a sound that a task uses.

    Returns waves and the seconds of the file.
    """

    def windows(seconds: float) -> list[tuple[float, float]]:
        return audio_windows(part.window, seconds, part.index)

    def span(seconds: float) -> tuple[float, float]:
        starts, ends = zip(*windows(seconds))
        return min(starts), max(ends)

    # only the part of the file that holds all windows is decoded; they are cut out of it
    audio = read_audio(part.path, window=span)
    first, _ = span(audio.seconds)
    waves = []
    for start, end in windows(audio.seconds):
        begin, stop = round((start - first) * SAMPLE_RATE), round((end - first) * SAMPLE_RATE)
        waves.append(audio.wave[begin:stop])
    return waves, audio.seconds


@dataclass
class LoadedMedia:
    """The result of a worker: arrays and seconds, or the reason why there are none."""

    part: PromptPart
    arrays: object = None
    seconds: float = 0.0
    error: str = ""


class MediaSet:
    """A dataset that is indexed by prompt parts and read by worker processes.

    Args:
        decode: False for the length alone, from the header; images are decoded all the same.
    """

    def __init__(self, size: int, decode: bool = True):
        self.size, self.decode = size, decode

    def __getitem__(self, part: PromptPart) -> LoadedMedia:
        try:
            if not self.decode and part.kind != "image":
                return LoadedMedia(part, None, media_seconds(part.path))
            return LoadedMedia(part, *load_media(part, self.size))
        except MediaError as error:
            return LoadedMedia(part, error=str(error))


def decode_ahead(
    groups: Iterable[list[PromptPart]], size: int, workers: int, decode: bool = True
) -> DataLoader:
    """Decode groups of parts in worker processes.

    Yields a list of LoadedMedia per group.
    """
    return DataLoader(
        MediaSet(size, decode),
        batch_sampler=groups,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=exit_with_parent,
    )
