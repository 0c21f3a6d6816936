"""The input half of Crab+'s unified interface: from an annotation row to a prompt.

Crab+ (arXiv 2603.04128) asks all tasks in one way: first the media, each after a marker in words,
then an instruction. `build_prompt` returns them as a list of PromptPart; its docstring shows one.
Training, evaluation and infer.py call the same function. Later the backbone puts its chat template
around the text, and the features of a medium in the place of its part (model.py).

The sound of a clip is encoded in pieces, and which pieces depends on the dataset: `audio_windows`.

What differs from the released code: the instructions are worded by us (`--prompts FILE` replaces
them), and every medium has a marker. The released a2v prompt runs its two videos together.

Page of the course: docs/course/21_interface.md.
"""

import json
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from crab_min.errors import DataError
from crab_min.tasks import TASKS, Medium, Task


@dataclass(frozen=True, slots=True)
class PromptPart:
    """One piece of a prompt: text, or a medium to be decoded."""

    # "text", "video", "audio" or "image"; a side channel also "view", "flow", "fast", "array" or
    # "points" (data.py).
    kind: str
    text: str = ""
    path: str = ""
    frames: int = 10  # of a video
    window: str = "tenths"  # of a sound, a name of audio_windows
    index: int = 0  # of a sound that goes with one frame: which fifth or tenth of it
    side: str = ""  # name of a side channel of the video before it (PAVE, CREMA)
    # Of a text in a conversation: "system", or "assistant" for an answer given before.
    role: str = ""
    # Of a clip, in seconds: the part of the file that is used. An end of 0 is that of the file.
    start: float = 0.0
    end: float = 0.0


@dataclass(frozen=True)
class PromptLayout:
    """The layout of every prompt of a model, around the parts of build_prompt.

    A run keeps it in its config.json, so that it is asked in the form in which it was trained.
    """

    before: str = ""  # text before the prompt: a system text, the opening of a chat template
    after: str = "\n"  # text between the prompt and the answer
    # Text between two videos or two sounds; the released Crab+ runs them together.
    separate_media: bool = True
    # Text between an earlier answer and the next question; None: a conversation is not continued.
    turn: str | None = None
    system: str = ""  # the system text inside `before`, which one of a row's own replaces


@dataclass(frozen=True)
class QuestionForm:
    """The form of the questions that a run learned from rows of one's own.

    A run keeps it in its config.json. infer.py puts a question and files into the same form.
    """

    # Of the user: tags for media (<video>, <audio>, <image>), and {question}.
    text: str = "{question}"
    question: str = ""  # where all rows ask the same
    system: str = ""
    options: tuple[str, ...] = ()  # where all rows have the same ones
    is_label: bool = False  # answers stand in <answer> tags


# --- from a row to a prompt -----------------------------------------------------------------------
def build_prompt(
    task: Task, row: dict, root: str = "", prompts: dict[str, str] | None = None
) -> list[PromptPart]:
    r"""Return the prompt of one row: media after their markers, then the instruction.

    Args:
        task: the row of TASKS.
        row: an annotation row of either split, or one made from command-line arguments.
        root: the folder of the task folders.
        prompts: instructions that replace ours, by task name, as load_prompts reads them.

    Raises:
        DataError: a field is missing.

    >>> row = {"video_path": "7.mp4", "audio_path": "7.wav", "question": "How many drums?"}
    >>> parts = build_prompt(TASKS["avqa"], row, root="data")
    >>> for part in parts:
    ...     print(part.kind, repr(part.path or part.text))
    text 'video: '
    video 'data/avqa/video/7.mp4'
    text '\naudio: '
    audio 'data/avqa/audio/7.wav'
    text '\nQuestion: How many drums?'
    >>> print(prompt_text(parts))
    video: <video 7.mp4>
    audio: <audio 7.wav>
    Question: How many drums?
    """
    # The media, each on a line of its own after its marker.
    parts = []
    for medium in task.media:
        line_break = "\n" if parts else ""
        parts.append(text_part(f"{line_break}{medium.marker}: "))
        parts.append(media_part(task, medium, row, root))
    # The instruction: that of the task, or the user's.
    instruction = (prompts or {}).get(task.name, task.instruction)
    return [*parts, text_part("\n" + fill_slots(task, instruction, row))]


@lru_cache(maxsize=1024)
def text_part(text: str) -> PromptPart:
    """Return a text part.

    The cache lets 200,000 rows share the few different texts there are.
    """
    return PromptPart("text", text=text)


def media_part(task: Task, medium: Medium, row: dict, root: str) -> PromptPart:
    """Return the part of one medium of a row."""
    value = task.read_field(row, medium.fields, f"the path of the {medium.kind} file")
    # A path may leave the folder of its task: "../../ave/video/x.mp4".
    path = os.path.normpath(os.path.join(root, task.name, medium.subfolder, str(value)))
    if medium.kind != "audio":
        return PromptPart(medium.kind, path=path, frames=task.frames)
    # Rows of AV-UIE v1 name a window of their own: Crab uses more of some sounds than Crab+.
    window = row.get("window", task.audio)
    return PromptPart("audio", path=path, window=window, index=frame_index(task, row, window))


def fill_slots(task: Task, instruction: str, row: dict) -> str:
    """Put the row's texts in the place of the instruction's placeholders.

    Options become a list.
    """
    slot_values = {}
    for name, fields in task.slots.items():
        value = task.read_field(row, fields, f"the {name}")
        texts = value if isinstance(value, (list, tuple)) else [value]
        slot_values[name] = "; ".join(str(text).strip() for text in texts)
    # Replace all at once, so that {braces} in a question stay as they are.
    return re.sub(r"\{(\w+)\}", lambda match: slot_values[match[1]], instruction)


def prompt_text(parts: list[PromptPart]) -> str:
    """Return a prompt as one string to look at, with <kind file name> for each medium."""
    pieces = []
    for part in parts:
        if part.kind == "text":
            pieces.append(f"\n[{part.role}: {part.text}]\n" if part.role else part.text)
        else:
            pieces.append(f"<{part.side or part.kind} {Path(part.path).name}>")
    return "".join(pieces)


# --- the file of --prompts ------------------------------------------------------------------------
def check_prompts(prompts: dict[str, str]) -> dict[str, str]:
    """Return `prompts` {task name: instruction} if it can be used.

    Raises:
        DataError: a task is unknown, or an instruction has other placeholders than its task.
    """
    if not isinstance(prompts, dict) or not all(isinstance(p, str) for p in prompts.values()):
        raise DataError(
            'prompts must be an object of task names and texts, such as {"ks": "What is done?"}'
        )
    for name, text in prompts.items():
        if name not in TASKS:
            raise DataError(f"prompts: unknown task {name!r}; choose from {', '.join(TASKS)}")
        # Exactly the placeholders of the task: one too few would hide the question.
        needed = sorted(TASKS[name].slots)
        placeholders = sorted(set(re.findall(r"\{(\w+)\}", text)))
        if needed != placeholders:
            raise DataError(
                f"prompts: {name} needs placeholders {needed}, has {placeholders}: {text!r}"
            )
    return prompts


def load_prompts(path: str) -> dict[str, str]:
    """Read and check the file of --prompts. Raises DataError."""
    try:
        return check_prompts(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None


# --- audio windows --------------------------------------------------------------------------------
PARTS = {"tenths": 10, "tenth": 10, "fifths": 5, "fifth": 5, "spread": 10}  # equal parts of a sound
ONE_PART = {"tenth", "fifth"}  # only the part that goes with the frame in the prompt


def audio_windows(name: str, seconds: float, index: int = 0) -> list[tuple[float, float]]:
    """Return the pieces of a sound that a task uses, as (start, end) in seconds.

        name             pieces                                                    e.g. task
        tenths, fifths   the whole sound, in 10 or 5 equal parts                   ave; arig
        tenth, fifth     one of these parts                                        ref_avs; s4
        first4           the first four seconds, one by one                        meld
        spread           10 windows of 2 seconds: in a minute [i - 0.5, i + 1.5]   avqa
                         for i = 0, 6, ..., 54

    A piece may reach beyond the file, where there is silence. Below 20 seconds the windows of
    "spread" would overlap, and "tenths" replaces it. The released code scales time instead: there
    a window lasts a thirtieth of the sound.

    Args:
        name: a name from the table.
        seconds: length of the sound.
        index: which part, from 0, for "tenth" and "fifth".

    Raises:
        DataError: the sound has no length.
    """
    if not seconds > 0:  # also refuses nan
        raise DataError(f"a sound of {seconds} s has no windows; expected a positive length")
    if name == "first4":
        return [(float(second), second + 1.0) for second in range(4)]
    if name == "spread" and seconds >= 20:
        return [(i * seconds / 10 - 0.5, i * seconds / 10 + 1.5) for i in range(10)]
    n_parts = PARTS[name]
    windows = [(i * seconds / n_parts, (i + 1) * seconds / n_parts) for i in range(n_parts)]
    return [windows[index]] if name in ONE_PART else windows


def frame_index(task: Task, row: dict, window: str) -> int:
    """Return which fifth or tenth of the sound goes with the image.

    It is 0 where a task uses all of the sound. The number is in the field frame_idx or idx, else in
    the image's file name (s4 in training).

    Raises:
        DataError: the number is missing or too large.
    """
    if window not in ONE_PART:
        return 0
    image = task.read_field(row, task.media[0].fields, "the path of the image file")
    candidates = (row.get("frame_idx"), row.get("idx"), Path(str(image)).stem)
    number = next(candidate for candidate in candidates if candidate is not None)
    if not str(number).isdecimal() or int(number) >= PARTS[window]:
        raise DataError(
            f"{task.name}: field 'frame_idx' (or 'idx', or the image's file name) must be a frame "
            f"number 0 to {PARTS[window] - 1}, got {number!r}"
        )
    return int(number)
