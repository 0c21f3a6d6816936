"""The input half of Crab+'s unified interface: from an annotation row to a prompt.

Crab+ (arXiv 2603.04128) asks all tasks in one way: first the media, each after a marker in words,
then an instruction. `build_prompt` returns them as a list of PromptPart; its docstring shows one.
Training, evaluation and infer.py call the same function. Later the backbone puts its chat template
around the text, and the features of a medium in the place of its part (model.py).

The sound of a clip is encoded in pieces, and which pieces depends on the dataset: `audio_windows`.

What differs from the released code: the instructions are worded by us (`--prompts FILE` replaces
them), and every medium has a marker. The released a2v prompt runs its two videos together. A run of
released weights is asked in its authors' form: a PromptLayout holds it (tools/released/layouts.py).

Page of the course: docs/course/21_interface.md.
"""

import os
import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from crab_min.errors import DataError
from crab_min.tasks import IMAGE, TASKS, Medium, Task
from crab_min.text_files import read_json


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

    # --- what build_prompt makes of a row
    paper: str = ""  # whose released models learned this form; "" for ours
    medium: str = "\n{marker}: {medium}"  # the text around a medium; {lead} is its lead-in
    instruction: str = "\n{instruction}"
    # Lead-ins: before all media by task name, or before a medium by its kind.
    leads: dict[str, str] = field(default_factory=dict)
    # Names of tokens before and after a medium, by kind, for an LM that has none of its own.
    marks: dict[str, list[str]] = field(default_factory=dict)
    # Tasks whose image is asked about as a frame of its clip, of so many frames (Crab); an image
    # alone is an image.
    clip_frames: dict[str, int] = field(default_factory=dict)
    # The options of a question, each of them, and what is between them.
    options: str = "{options}"
    option: str = "{text}"
    between_options: str = "; "
    lower_slots: tuple[str, ...] = ()  # slots that are written in lower case
    plain_tasks: tuple[str, ...] = ()  # tasks whose slots pass plain_text, as in LAVIS
    sound: str = ""  # the window of every sound, a name of audio_windows; "" for that of its task
    dialogue_turns: bool = False  # a dialogue is a conversation, not text in one question

    # --- what a model makes of the prompt
    joined: bool = False  # `before`, `after` and the texts beside them are tokenized as one
    text_tokens: int = 0  # tokens of a question with what follows it, at most; 0 for no limit
    seconds_per_grid: float = 0.0  # of a pair of frames (Omni); 0: from the clip's length

    # --- answers
    bare_answers: bool = False  # a word, letter or option without a tag is the answer
    option_name: str = ""  # the name of an option in an answer, such as "{letter}"
    beams: int = 1  # of the search for an answer

    def adapt(self, task: Task) -> Task:
        """Return a task with the media and the answers that it has in this layout."""
        if task.name in self.clip_frames:
            frames = self.clip_frames[task.name]
            sound = "fifths" if frames == PARTS["fifths"] else "tenths"
            task = replace(task, media=(CLIP, *task.media[1:]), frames=frames, audio=sound)
        if self.bare_answers:
            task = replace(task, bare=True, option_name=self.option_name)
        return task


OURS = PromptLayout()
# The frames around an image, see frames_around.
CLIP = Medium("video", "video", fields=("clip_path",), subfolder="")
FRAME = "frame"  # the image itself then: a part without tokens, for a mask decoder


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
    task: Task,
    row: dict,
    root: str = "",
    prompts: dict[str, str] | None = None,
    layout: PromptLayout = OURS,
) -> list[PromptPart]:
    r"""Return the prompt of one row: media after their markers, then the instruction.

    Args:
        task: the row of TASKS.
        row: an annotation row of either split, or one made from command-line arguments.
        root: the folder of the task folders.
        prompts: instructions that replace ours, by task name, as load_prompts reads them.
        layout: what stands around and between the parts.

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
    # The media, in our layout each on a line of its own after its marker.
    parts: list[PromptPart] = []
    add_text(parts, layout.leads.get(task.name, ""))
    media = task.media
    if CLIP in media:
        frames = frames_around(task, row)
        row = {**row, "clip_path": frames}
        if frames:  # with all of their sound, where a row of AVSS names that of one frame
            row["window"] = task.audio
        else:
            media = (IMAGE, *media[1:])
    around = layout.medium.split("{medium}")
    for medium in media:
        lead = layout.leads.get(medium.kind, "")
        before, after = (text.format(marker=medium.marker, lead=lead) for text in around)
        add_text(parts, before if parts else before.lstrip("\n"))
        parts.append(media_part(task, medium, row, root, layout.sound))
        if medium is CLIP:
            parts.append(replace(media_part(task, IMAGE, row, root), side=FRAME))
        add_text(parts, after)
    # The instruction: that of the task, or the user's.
    if layout.dialogue_turns and "dialogue" in task.slots and "turns" in row:
        return [*parts, *dialogue_parts(row["turns"], layout)]
    instruction = (prompts or {}).get(task.name, task.instruction)
    text = fill_slots(task, instruction, row, layout)
    add_text(parts, layout.instruction.format(instruction=text))
    return parts


def frames_around(task: Task, row: dict) -> str:
    """Return the folder "frames" of a clip in which an image lies; "" for an image alone."""
    image = str(task.read_field(row, IMAGE.fields, "the path of the image file"))
    folder = os.path.dirname(image)
    return folder if os.path.basename(folder) == "frames" else ""


def add_text(parts: list[PromptPart], text: str) -> None:
    """Add a text to the parts of a prompt, which never has two texts side by side."""
    if text and parts and parts[-1].kind == "text":
        parts[-1] = text_part(parts[-1].text + text)
    elif text:
        parts.append(text_part(text))


def dialogue_parts(turns: list, layout: PromptLayout) -> list[PromptPart]:
    """Return a dialogue as a conversation: pairs of a question and its answer, then a question."""
    *before, (last, _) = turns
    parts = []
    for question, answer in before:
        parts.append(text_part(question))
        parts.append(PromptPart("text", text=answer, role="assistant"))
    parts.append(text_part(last))
    # what the layout writes before an instruction stands before the first question
    first = layout.instruction.format(instruction=parts[0].text)
    return [text_part(first), *parts[1:]]


@lru_cache(maxsize=1024)
def text_part(text: str) -> PromptPart:
    """Return a text part.

    The cache lets 200,000 rows share the few different texts there are.
    """
    return PromptPart("text", text=text)


def media_part(task: Task, medium: Medium, row: dict, root: str, window: str = "") -> PromptPart:
    """Return the part of one medium of a row; window: of a sound, instead of the task's."""
    value = task.read_field(row, medium.fields, f"the path of the {medium.kind} file")
    # A path may leave the folder of its task: "../../ave/video/x.mp4".
    path = os.path.normpath(os.path.join(root, task.name, medium.subfolder, str(value)))
    # Rows of some benchmarks ask about a part of a clip.
    start, end = row.get("clip_seconds", (0.0, 0.0))
    if medium.kind != "audio":
        return PromptPart(medium.kind, path=path, frames=task.frames, start=start, end=end)
    # Rows of AV-UIE v1 name a window of their own: Crab uses more of some sounds than Crab+.
    window = window or row.get("window", task.audio)
    return PromptPart("audio", path=path, window=window, index=frame_index(task, row, window))


def fill_slots(task: Task, instruction: str, row: dict, layout: PromptLayout = OURS) -> str:
    """Put the row's texts in the place of the instruction's placeholders.

    Options become a list.
    """
    slot_values = {}
    for name, fields in task.slots.items():
        value = task.read_field(row, fields, f"the {name}")
        if isinstance(value, (list, tuple)):
            slot_values[name] = option_list([str(text).strip() for text in value], layout)
            continue
        text = str(value).strip()
        text = text.lower() if name in layout.lower_slots else text
        slot_values[name] = plain_text(text) if task.name in layout.plain_tasks else text
    if "{second}" in instruction:
        slot_values["second"] = ORDINALS[frame_index(TASKS[task.name], row, "tenth")]
    # Replace all at once, so that {braces} in a question stay as they are.
    return re.sub(r"\{(\w+)\}", lambda match: slot_values[match[1]], instruction)


def option_list(texts: list[str], layout: PromptLayout) -> str:
    """Write the options of a question as a layout has them."""
    options = []
    for index, text in enumerate(texts):
        options.append(layout.option.format(letter=chr(ord("A") + index), text=text))
    return layout.options.format(options=layout.between_options.join(options))


PLAIN_WORDS = 50


def plain_text(text: str) -> str:
    """Return a text as LAVIS gives questions to BLIP-2: small letters, few signs, 50 words.

    >>> plain_text('Is the "cello" louder (or not)? ')
    'is the cello louder or not?'
    """
    text = re.sub(r"[.!\"()*#:;~]", "", text.lower()).rstrip(" ")
    return " ".join(text.split(" ")[:PLAIN_WORDS])


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
        # Exactly the placeholders of the task: one too few would hide the question. Where frames
        # have a number, {second} may say which of them is asked about.
        needed = sorted(TASKS[name].slots)
        placeholders = set(re.findall(r"\{(\w+)\}", text))
        if TASKS[name].mask_head:
            placeholders.discard("second")
        placeholders = sorted(placeholders)
        if needed != placeholders:
            raise DataError(
                f"prompts: {name} needs placeholders {needed}, has {placeholders}: {text!r}"
            )
    return prompts


def load_prompts(path: str) -> dict[str, str]:
    """Read and check the file of --prompts. Raises DataError."""
    prompts = read_json(path)
    try:
        return check_prompts(prompts)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


# --- frames and audio windows ---------------------------------------------------------------------
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
# equal parts of a sound
PARTS = {"whole": 1, "tenths": 10, "tenth": 10, "fifths": 5, "fifth": 5, "spread": 10}
ONE_PART = {"tenth", "fifth"}  # only the part that goes with the frame in the prompt


def audio_windows(name: str, seconds: float, index: int = 0) -> list[tuple[float, float]]:
    """Return the pieces of a sound that a task uses, as (start, end) in seconds.

        name             pieces                                                    e.g. task
        whole            the whole sound                                           tools.features
        tenths, fifths   the whole sound, in 10 or 5 equal parts                   ave; arig
        tenth, fifth     one of these parts                                        ref_avs; s4
        first4           the first four seconds, one by one                        meld
        spread           10 windows of 2 seconds: in a minute [i - 0.5, i + 1.5]   avqa
                         for i = 0, 6, ..., 54
        opening          two pieces of 5.12 s from the start, 512 mel frames each  CREMA, released

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
    if name == "opening":
        # the last mel frame of a piece reaches 15 ms into the next one
        return [(0.0, 5.135), (5.12, 10.255)]
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
