"""The command that asks a run about a clip of its own: the flags of infer.py for a sample."""

import os
import shlex
from pathlib import Path

from crab_min.data import Sample
from crab_min.interface import QuestionForm
from crab_min.sources.own import clip_of, conversation_parts, split_question

# the flags of infer.py that fill a slot of an instruction
SLOT_FLAGS = {
    "question": "--ask",
    "description": "--ask",
    "choices": "--options",
    "dialogue": "--dialogue",
    "situation": "--situation",
    "name": "--name",
}


def asking_command(folder: Path, samples: list[Sample], form: QuestionForm | None) -> str:
    """Return a command that asks a run about one of its own clips, as it was trained.

    Where infer.py has no flags for the rows, the command scores them all.

    Args:
        folder: of the run.
        samples: rows that it may ask about; none for a run of the built-in world.
        form: that of the run, if it learned rows of one's own.
    """
    words = asking_words(samples, form)
    if samples and not words:
        words = ["--eval"]
    words = [below_here(word) for word in words]
    return shlex.join(["python", "infer.py", *words, "--run", str(folder)])


def below_here(word: str) -> str:
    """Return the path of a file relative to the working folder if it lies below; else the word."""
    here = f"{Path.cwd()}{os.sep}"
    if not word.startswith(here):
        return word
    path = word.removeprefix(here)
    return f"./{path}" if path.startswith("-") else path


def card_command(folder: Path, form: QuestionForm | None) -> str:
    """Return a command that asks a run as a repository of the hub; no local path is in it."""
    question = "" if form and form.question else ' "..."'
    return f"python infer.py CLIP.mp4{question} --run OWNER/{folder.name}"


def asking_words(samples: list[Sample], form: QuestionForm | None) -> list[str]:
    """Return the words that ask about one of the samples; [] if infer.py has no flags for any.

    Args:
        form: as in asking_command.
    """
    for sample in samples:
        words = own_words(sample, form) if sample.task.name == "own" else task_words(sample)
        if words:
            return words
    return []


def own_words(sample: Sample, form: QuestionForm) -> list[str]:
    """Return the words that ask the first question of a row of one's own.

    There are none for a row with several videos or pictures or views, or of a rarer form.
    """
    row, clip = sample.row, clip_of(sample.row)
    text, question = split_question(conversation_parts(row)[0][0])
    videos, images = row.get("videos") or [], row.get("images") or []
    several_views = any(isinstance(files, list) for files in sides_of(row).values())
    if text != form.text or not clip or len(videos) > 1 or len(images) > 1 or several_views:
        return []
    words = [clip] if question == form.question else [clip, question]
    if videos and images:
        words += ["--image", images[0]]

    # a video comes with its own sound; a sound alone is the clip
    sounds = row.get("audios") or []
    if not videos and not images:
        sounds = sounds[1:]
    if sounds != [clip]:
        words += flags("--audio", sounds)
    for name in ("start", "end"):
        if row.get(name):
            words += [f"--{name}", f"{float(row[name]):g}"]
    return words + flags("--side", [f"{name}={file}" for name, file in sides_of(row).items()])


def sides_of(row: dict) -> dict[str, str | list[str]]:
    """Return the file, or the views, of each side channel that a row names."""
    return {name: file for name, file in (row.get("sides") or {}).items() if file}


def task_words(sample: Sample) -> list[str]:
    """Return the words that ask the question of a row of one of TASKS."""
    # media: the first video stands alone
    media = [part for part in sample.media if not part.side]
    videos = [part.path for part in media if part.kind == "video"]
    words = videos[:1] + flags("--second-video", videos[1:])
    words += flags("--image", [part.path for part in media if part.kind == "image"])
    sounds = [part for part in media if part.kind == "audio"]
    if [part.path for part in sounds] != videos[:1]:
        words += flags("--audio", [part.path for part in sounds])
    if sounds and sounds[0].index:
        words += ["--frame-index", str(sounds[0].index)]

    # the task, and what fills the slots of its instruction
    words += ["--task", sample.task.name]
    for slot, fields in sample.task.slots.items():
        value = sample.task.read_field(sample.row, fields, f"the {slot}")
        if isinstance(value, (list, tuple)):
            value = ",".join(map(str, value))
        words += [SLOT_FLAGS[slot], str(value)]
    return words


def flags(name: str, values: list[str]) -> list[str]:
    """Return a flag once for each value."""
    return [word for value in values for word in (name, value)]
