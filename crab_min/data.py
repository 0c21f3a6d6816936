"""Annotation rows -> samples -> arrays.

`read_samples` turns each row of an AV-UIE folder, or of a table, class folders or a .jsonl of your
own (sources/own.py), into a `Sample`: a prompt in parts, the text to learn, and the gold answer.
`read_splits` gives the training and the test samples of a run. Nothing is decoded before it is
needed: `load_media` turns one part of a prompt into arrays, in a worker process (features.py).

Shapes: frames (T, H, W, 3) uint8; a sound is a list of T waves (N,), float32 at 16 kHz.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

from crab_min.answers import TEXT, Answer, mask_box
from crab_min.config import DataConfig
from crab_min.errors import DataError, MediaError, listed
from crab_min.interface import (
    OURS,
    PromptLayout,
    PromptPart,
    QuestionForm,
    audio_windows,
    build_prompt,
)
from crab_min.media.arrays import point_code, read_array, read_points
from crab_min.media.read import media_seconds, read_audio, read_flow, read_image, read_video
from crab_min.media.workers import loader_options
from crab_min.sources.av_uie import mask_objects, mask_path, read_gold_mask, read_mask
from crab_min.sources.own import (
    conversation_parts,
    is_own,
    question_form,
    read_own_rows,
    split_rows,
    table_labels,
)
from crab_min.sources.rows import find_layout, read_rows
from crab_min.tasks import TASKS, Task

SAMPLE_RATE = 16000  # Hz
FAST_SIZE, FAST_RATE = 16, 25  # a dense stream: pixels of its square frames, frames per second
LONGEST_WINDOW = 60  # seconds of sound that are encoded as one piece; memory grows with its square
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
        source: where --data names several sources, the path of its own.
        share: share of its source among the training samples.
    """

    id: str
    task: Task
    parts: list[PromptPart]
    target: str
    gold: Answer
    row: dict
    mask: str = ""
    source: str = ""
    share: float = 1.0

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
    layout: PromptLayout = OURS,
    labels: Iterable[str] = (),
) -> list[Sample]:
    """Read the samples of a split, task by task.

    Args:
        root: an AV-UIE folder (v2, or v1 where that has the task), or a table, class folders or a
            .jsonl of your own, which are read whatever the tasks.
        tasks: names; a task whose folder is not there is left out.
        split: "train" or "test".
        target: "reasoning" (the annotated text) or "label" (its tags alone).
        prompts: instructions by task name, instead of ours.
        limit: rows per task at most, the first ones, or of your own spread over the file, which may
            be sorted by label; 0 for all.
        layout: the form of the prompts and answers.
        labels: what a question about labels of your own lists beside those of the rows.

    Raises:
        DataError: no rows at all, or a row that cannot be used.
    """
    root = Path(root)
    if is_own(root):
        rows = read_own_rows(root, labels=labels)
        rows = [row for row in rows if row.get("split") in (None, "", split)]
        samples = own_samples(spread(rows, limit), split)
        return [replace(sample, task=layout.adapt(sample.task)) for sample in samples]
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder; --data takes the folder that holds ave/, avqa/, ... "
            "(AVUIE_2), a table (.csv, .tsv, .jsonl), or a folder of class folders"
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
                form = (target, prompts, layout)
                sample = make_sample(TASKS[name], row, root, split, index, *form)
            except DataError as error:
                raise DataError(f"{path}, row {index}: {error}") from None
            samples.append(sample)
    if not samples:
        raise DataError(
            f"{root}: no {split}.json in any of {listed(tasks)}; expected e.g. "
            f"{root / tasks[0] / (split + '.json')}, or for clips of your own a table such as "
            "labels.csv, or a folder with one folder of clips per label"
        )
    return samples


def make_sample(
    task: Task,
    row: dict,
    root: Path,
    split: str,
    index: int,
    target: str,
    prompts: dict | None,
    layout: PromptLayout = OURS,
) -> Sample:
    """Make the sample of one annotation row; arguments as in `read_samples`.

    Raises:
        DataError: a field is missing or holds something else.
    """
    task = layout.adapt(task)
    parts = build_prompt(task, row, str(root), prompts, layout)

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
    return read_gold_mask(Path(sample.mask), sample.row, sample.task.mask_head == "classes", size)


# --- rows of your own ----------------------------------------------------------------------------

# A row's "options" make it multiple choice, its "sides" {name: file} name side channels.
OWN = {"name": "own", "family": "own", "instruction": "", "target": "target"}
OWN_TEXTS = Task(**OWN, form=TEXT, metric="rouge_l", set_metrics=("cider",))
OWN_LABELS = Task(**OWN, set_metrics=("by_class",), types=("type",))


def own_samples(rows: list[dict], split: str, task: Task | None = None) -> list[Sample]:
    """Make a sample of each answer in rows of your own; several turns are several samples.

    Args:
        task: OWN_LABELS or OWN_TEXTS. Without it they are labels if all have an <answer> tag.
    """
    turns = []
    for row in rows:
        turns += [(row, parts, answer) for parts, answer in conversation_parts(row)]
    if task is None:
        untagged = [answer for _, _, answer in turns if OWN_LABELS.parse(answer).error]
        task = OWN_TEXTS if untagged else OWN_LABELS
    samples = []
    for index, (row, parts, answer) in enumerate(turns):
        target = answer if split == "train" else ""
        gold = task.gold_answer({"target": answer}) if answer else Answer()
        samples.append(Sample(f"own/{split}/{index}", task, parts, target, gold, row))
    return samples


def form_of(samples: list[Sample]) -> QuestionForm | None:
    """Return the form of the questions of one's own among samples; None without any."""
    own = [sample for sample in samples if sample.task.name == "own"]
    if not own:
        return None
    return question_form([sample.row for sample in own], own[0].task is OWN_LABELS)


# --- the samples of a run ------------------------------------------------------------------------


def read_splits(
    config: DataConfig, root: str, tasks: list[str], prompts: dict | None, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Read the training and the test samples of a run.

    Test rows are those of --test. Without it they are the test split of an AV-UIE folder, the file
    test.jsonl (or test.csv, ...) beside rows of your own, or a fifth of their clips.

    Args:
        root: what --data names: a path, or PATH:SHARE of several, with commas between them.
        prompts: instructions by task name, instead of ours.
        seed: of the choice of test clips.

    Raises:
        DataError: no rows at all, or a row that cannot be used.
    """
    train: list[Sample] = []
    test: list[Sample] = []
    sources = data_sources(root)
    labels: list[str] = []
    for path, share in sources:
        # training and test rows are asked alike, also where one lacks a label of the other
        test_path = config.test or evaluation_data(path)
        if test_path and (len(sources) == 1 or not config.test):
            labels = [*table_labels(Path(path)), *table_labels(Path(test_path))]
        if is_own(path) and not test_path:
            rows = split_rows(read_own_rows(Path(path)), seed)
            test_rows = spread([row for row in rows if row["split"] == "test"], config.test_rows)
            samples = {
                "train": own_samples([row for row in rows if row["split"] == "train"], "train"),
                "test": own_samples(test_rows, "test"),
            }
        else:
            form = (config.target, prompts, 0, OURS, labels)
            samples = {"train": read_samples(path, tasks, "train", *form)}
            if not config.test:
                samples["test"] = read_test(test_path, tasks, config, prompts, labels)
        if len(sources) > 1:
            marked = [replace(s, source=path, share=share) for s in samples["train"]]
            samples["train"] = marked
        train += samples["train"]
        test += samples.get("test", [])
    if config.test:
        test = read_test(config.test, tasks, config, prompts, labels)
    if not train:
        raise DataError(f"{root}: no training rows; where there is a column split, name some train")
    if len(sources) > 1:  # their samples are counted together
        train, test = with_ids(train, "train"), with_ids(test, "test")
    if config.test_rows:
        test = first_of_each_task(test, config.test_rows)
    return train, test


def read_test(
    path: str, tasks: list[str], config: DataConfig, prompts: dict | None, labels: list[str]
) -> list[Sample]:
    """Read test samples; not every task has a test split."""
    names = [name for name in tasks if "test" in TASKS[name].splits]
    if not names and not is_own(path):
        return []
    form = (config.target, prompts, config.test_rows, OURS, labels)
    return read_samples(path, names, "test", *form)


def data_sources(data: str) -> list[tuple[str, float]]:
    """Return the sources that --data names, and their shares.

    >>> data_sources("mine.csv:0.7,AVUIE_2:0.3")
    [('mine.csv', 0.7), ('AVUIE_2', 0.3)]

    Raises:
        DataError: a share that is no positive number.
    """
    data = str(data)
    if os.path.exists(data) or "," not in data:
        return [(data, 1.0)]
    sources = []
    for item in data.split(","):
        path, _, share = item.strip().rpartition(":")
        if not path:
            path, share = share, "1"
        try:
            sources.append((path, float(share)))
        except ValueError:
            raise DataError(f"--data {item}: {share!r} is no share; give PATH:SHARE") from None
        if not sources[-1][1] > 0:
            raise DataError(f"--data {item}: a share is greater than 0")
    return sources


def with_ids(samples: list[Sample], split: str) -> list[Sample]:
    """Give samples of several sources ids of their own."""
    return [replace(s, id=f"{s.task.name}/{split}/{index}") for index, s in enumerate(samples)]


def spread(rows: list, count: int) -> list:
    """Return so many of the rows, at even distances; 0 for all."""
    if not 0 < count < len(rows):
        return rows
    return [rows[index * len(rows) // count] for index in range(count)]


def first_of_each_task(samples: list[Sample], count: int) -> list[Sample]:
    """Return the first `count` samples of each task."""
    seen: dict[str, int] = {}
    first = []
    for sample in samples:
        seen[sample.task.name] = seen.get(sample.task.name, 0) + 1
        if seen[sample.task.name] <= count:
            first.append(sample)
    return first


def evaluation_data(data: str) -> str:
    """Return the path of the evaluation data for a run that is trained on `data`.

    An AV-UIE folder has its own test split. For a table or a .jsonl it is the file "test" of the
    same kind in the same folder; "" if there is none.
    """
    if not is_own(data):
        return data
    test = Path(data).with_name(f"test{Path(data).suffix}")
    found = Path(data).is_file() and test.is_file() and Path(data).name != test.name
    return str(test) if found else ""


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
    window = clip_window(part)
    if part.kind == "flow":
        clip = read_flow(part.path, part.frames, size, window)
    elif part.kind == "fast":
        seconds = window[1] - window[0] if window else media_seconds(part.path)
        clip = read_video(part.path, max(1, round(FAST_RATE * seconds)), FAST_SIZE, window)
    else:
        clip = read_video(part.path, part.frames, size, window)
    return clip.frames, window[1] - window[0] if window else clip.seconds


def clip_window(part: PromptPart) -> tuple[float, float] | None:
    """Return the start and end in seconds of a part of a clip; None for the whole clip."""
    if not part.start and not part.end:
        return None
    seconds = media_seconds(part.path)
    return part.start, min(part.end or seconds, seconds)


def load_audio(part: PromptPart) -> tuple[list[np.ndarray], float]:
    """Decode the windows of a sound that a task uses.

    Returns waves and the seconds of the file.
    """

    def windows(seconds: float) -> list[tuple[float, float]]:
        start, end = part.start, min(part.end or seconds, seconds)
        if end <= start:
            raise MediaError(f"{part.path}: begins at {start:g} s of its {seconds:.2f} s")
        pieces = audio_windows(part.window, end - start, part.index)
        longest = max(last - first for first, last in pieces)
        if longest > LONGEST_WINDOW:
            raise MediaError(
                f"{part.path}: pieces of {longest:.0f} s of sound, {LONGEST_WINDOW} s at most; "
                "name a part of it by start and end, or train with --max-audio-seconds"
            )
        return [(start + first, start + last) for first, last in pieces]

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
    return waves, min(part.end or audio.seconds, audio.seconds) - part.start


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
    media = MediaSet(size, decode)
    return DataLoader(media, batch_sampler=groups, collate_fn=list, **loader_options(workers))
