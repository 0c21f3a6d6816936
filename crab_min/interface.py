"""The unified interface: one prompt builder and one output grammar for the 19 AV-UIE v2 folders (and what v1, PAVE and CREMA add).

Crab+ (2603.04128) trains all its tasks through text: media and an instruction go in, out come reasoning in prose and
then the label in a tag. A dataset is a row of TASKS (papers/crab.md 2.5, 6.1), which training, evaluation and infer.py
share.

Output grammar, after free prose, with whole seconds (end exclusive) and integers on a 224 x 224 grid:
    <answer>yes</answer>   <event>label, (0 3)(7 10)</event>   <audio_event>...   <visual_event>...
    [x1,y1,x2,y2] a box, [x,y] a point; where there are several objects, each box is followed by its points
    <mask_0> ... <mask_5> a mask, where the model has a decoder for it (segment.py)
`parse` also takes what models really write: odd spaces and case, no closing tag, repeated tags, <range>0,3</range>.

Differs from the released code: the instructions are ours; every medium follows a marker (the released a2v prompt does
not say where its first video ends); test golds look like training labels (released a2v: "one" and 1).
"""
import json
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from crab_min.answers import row_field
from crab_min.errors import DataError
from crab_min.tasks import TASKS, Task


@dataclass(frozen=True, slots=True)
class PromptPart:
    """One piece of a prompt: text, or a medium to be decoded."""
    kind: str                                          # "text", "video", "audio", "image"; of a side channel also "view", "flow", "fast", "array", "points"
    text: str = ""
    path: str = ""
    frames: int = 10                                   # of a video
    window: str = "tenths"                             # of an audio file, see audio_windows
    index: int = 0                                     # which piece of the audio goes with the image ("fifth", "tenth")
    side: str = ""                                     # side channel of the video before it (PAVE): its name; no tokens of its own


# --- the tasks -----------------------------------------------------------------------------------------------------


# --- prompts -------------------------------------------------------------------------------------------------------


def media_path(root: str, task: Task, value: str, subfolder: str) -> str:
    """Where a file is: `value` is relative to ROOT/TASK/SUBFOLDER and may leave it ("../../ave/video/x.mp4")."""
    return os.path.normpath(os.path.join(root, task.name, subfolder, value))


def check_prompts(prompts: dict) -> dict:
    """`prompts` {task name: instruction}, if each has exactly the placeholders of its task. Raises DataError."""
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise DataError('prompts must be an object of task names and texts, such as {"ks": "What is done?"}')
    for name, text in prompts.items():
        if name not in TASKS:
            raise DataError(f"prompts: unknown task {name!r}; choose from {', '.join(TASKS)}")
        wanted, found = {slot for slot, _ in TASKS[name].slots}, set(re.findall(r"\{(\w+)\}", text))
        if wanted != found:
            raise DataError(f"prompts: {name} needs placeholders {sorted(wanted)}, has {sorted(found)}: {text!r}")
    return prompts


def load_prompts(path: str) -> dict:
    """Read and check the file of `--prompts`. Raises DataError."""
    try:
        return check_prompts(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None


def build_prompt(task: Task, row: dict, root: str = "", prompts: dict | None = None) -> list[PromptPart]:
    """The prompt of one row: each medium after its marker ("video: ", "audio two: "), then the instruction.

    row: an annotation row of either split, or one made from command-line arguments; root: the folder of the task
    folders; prompts: instructions that replace ours, by task name. Raises DataError for what is missing.
    """
    parts, words = [], {}
    for kind, names, subfolder in task.media:
        value = row_field(task, row, names, f"the path of the {kind} file")
        number = " one" if "1" in names[0] else " two" if "2" in names[0] else ""
        parts.append(text_part("\n" * bool(parts) + kind + number + ": "))
        path = media_path(root, task, str(value), subfolder)
        window = row.get("window", task.audio)         # Crab hears more of some tasks than Crab+
        parts.append(PromptPart(kind, path=path, window=window, index=frame_index(task, row, window)) if kind == "audio" else
                     PromptPart(kind, path=path, frames=task.frames))
    for slot, names in task.slots:
        value = row_field(task, row, names, f"the {slot}")
        values = value if isinstance(value, (list, tuple)) else [value]
        words[slot] = "; ".join(str(v).strip() for v in values)
    ask = check_prompts(prompts or {}).get(task.name, task.ask)
    return parts + [text_part("\n" + re.sub(r"\{(\w+)\}", lambda slot: words[slot[1]], ask))]


@lru_cache(maxsize=1024)
def text_part(text: str) -> PromptPart:
    """A text part; hundreds of thousands of rows share the few texts there are."""
    return PromptPart("text", text=text)


PIECES = {"fifth": 5, "tenth": 10}                     # audio windows that depend on the frame index


def frame_index(task: Task, row: dict, window: str) -> int:
    """Which fifth or tenth of the sound goes with the image, from 0; 0 for tasks that hear all of it.

    Field frame_idx or idx, or else the image's file name (training rows of s4). Raises DataError.
    """
    if window not in PIECES:
        return 0
    image = Path(str(row_field(task, row, task.media[0][1], "the path of the image file"))).stem
    value = next((row[name] for name in ("frame_idx", "idx") if row.get(name) is not None), image)
    if not str(value).isdecimal() or int(value) >= PIECES[window]:
        raise DataError(f"{task.name}: field 'frame_idx' (or 'idx', or the image's file name) must be a frame "
                             f"number 0 to {PIECES[window] - 1}, got {value!r}")
    return int(value)


def audio_windows(name: str, seconds: float, index: int = 0) -> list[tuple[float, float]]:
    """The (start, end) in seconds of the pieces of a sound file that a task hears; outside of the file is silence.

    tenths, fifths: all of it in equal parts; fifth, tenth: the index-th of them (s4, ms3; ref_avs); first4: 4 x 1 s
    (emotion); spread (avqa): 2 s around every tenth, [i - 0.5, i + 1.5] for i = 0, 6, ..., 54 in a minute. Below 20 s
    these would overlap, and spread is tenths; the released code scales time instead (a window lasts length / 30).
    """
    if not seconds > 0:
        raise DataError(f"a sound of {seconds} s has no windows; expected a positive length")
    if name == "first4":
        return [(float(i), i + 1.) for i in range(4)]
    if name == "spread" and seconds >= 20:
        return [(i * seconds / 10 - .5, i * seconds / 10 + 1.5) for i in range(10)]
    count = {"tenths": 10, "fifths": 5, "spread": 10, **PIECES}[name]
    return [(i * seconds / count, (i + 1) * seconds / count) for i in ([index] if name in PIECES else range(count))]


# --- the output grammar: writing -----------------------------------------------------------------------------------


# --- the output grammar: reading -----------------------------------------------------------------------------------


# --- gold answers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptLayout:
    """How every prompt of a model is laid out, around the parts that build_prompt makes."""

    before: str = ""  # text before the prompt: a system text, the opening of a chat template
    after: str = "\n"  # text between the prompt and the answer
    # text between two videos or two sounds that follow one another; released Crab+ runs them together
    separate_media: bool = True
