"""The prompt about a row: instructions, worked examples, and the row's facts.

    prompt = brief.fill(row_facts(sample), closing_words(sample))

AV-UIE (Crab, 2503.13068) gives a model a label and examples of the form, and gets prose that leads
to the label. The instructions and the examples here are ours; the examples are scenes of the
built-in world. `--briefs FILE.json` replaces the text, the examples, or both, by task:

    {"ave": {"text": "... {examples} ... {facts} ... {label} ...",
             "examples": [{"row": {"event": "dog", ...}, "text": "A dog ... <event> ..."}]}}
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from crab_min.data import Sample, make_sample
from crab_min.errors import DataError
from crab_min.tasks import TASKS, Task
from crab_min.tools.reason.examples import EXAMPLES, Example

PLACEHOLDERS = ["examples", "facts", "label"]

TEXT_OF_ALL = """\
Somebody has watched and heard a clip and noted a few facts about it. Write the short text that \
leads from what is seen and heard to the answer.
{aim}
Write one to three plain sentences about the evidence. Use only the facts: no other times, things, \
places or moods. After that write the closing words exactly as they are given, and nothing more. \
Never speak about facts, notes or closing words.

{examples}

Facts:
{facts}
Closing words: {label}
Text:"""

# what the evidence should be about, by family of tasks
AIMS = {
    "matching": "Say what the one medium is of, and which of the two others goes with it.",
    "action": "Say what is done in the picture, and how it sounds.",
    "emotion": "Say how the face looks and how the voice sounds.",
    "qa": "Say what is seen and heard that decides the question.",
    "localisation": "Say what is seen, what is heard, and from which second to which.",
    "segmentation": "Say which things are in the image, which of them sound, and where they are.",
}

# fields of a row that say more than its label, and how a fact names them
FACT_FIELDS = {
    "audio_event": "the audio is of",
    "video_event": "the video is of",
    "video1_event": "video one is of",
    "video2_event": "video two is of",
    "audio1_event": "audio one is of",
    "audio2_event": "audio two is of",
    "a_obj": "what sounds",
}


# --- a brief --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Brief:
    """The prompt of a task, without a row.

    text: instructions with the placeholders {examples}, {facts} and {label}.
    """

    task: Task
    text: str
    examples: tuple[Example, ...]

    @cached_property
    def solved(self) -> str:
        """The examples with their facts and texts."""
        blocks = []
        for example in self.examples:
            sample = example_sample(self.task, example)
            closing = closing_words(sample)
            lines = "\n".join(f"- {fact}" for fact in row_facts(sample))
            blocks.append(f"Facts:\n{lines}\nClosing words: {closing}\nText: {example.text}")
        return "\n\n".join(blocks)

    def fill(self, facts: list[str], label: str) -> str:
        """Return the prompt for one row."""
        # all at once: a fact may have braces of its own
        lines = "\n".join(f"- {fact}" for fact in facts)
        values = {"examples": self.solved, "facts": lines, "label": label}
        return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], self.text)

    def instructions(self) -> str:
        """Return the text without placeholders."""
        return re.sub(r"\{\w+\}", " ", self.text)


def can_be_reasoned(task: Task) -> bool:
    """Tell whether a task has worked examples; captions and benchmarks have none."""
    return task.name in EXAMPLES


def default_brief(task: Task) -> Brief:
    text = TEXT_OF_ALL.replace("{aim}", AIMS[task.family])
    return Brief(task, text, EXAMPLES[task.name])


def load_briefs(path: str = "") -> dict[str, Brief]:
    """Return the brief of each task, replaced by those in the file `path`.

    Raises:
        DataError: the file is broken, names an unknown task, or a text has other placeholders.
    """
    briefs = {task.name: default_brief(task) for task in TASKS.values() if can_be_reasoned(task)}
    if not path:
        return briefs
    try:
        own = json.loads(Path(path).read_text(encoding="utf-8"))
        for name, entry in own.items():
            if name not in briefs:
                raise DataError(f"unknown task {name!r}; choose from {', '.join(briefs)}")
            examples = briefs[name].examples
            if "examples" in entry:
                examples = tuple(Example(**example) for example in entry["examples"])
            text = entry.get("text", briefs[name].text)
            briefs[name] = check_brief(Brief(TASKS[name], text, examples))
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise DataError(f"{path}: {error}") from None
    return briefs


def check_brief(brief: Brief) -> Brief:
    """Return a brief that can be used. Raises DataError."""
    placeholders = sorted(set(re.findall(r"\{(\w+)\}", brief.text)))
    if placeholders != PLACEHOLDERS:
        needed = " ".join(f"{{{name}}}" for name in PLACEHOLDERS)
        raise DataError(f"the brief of {brief.task.name} needs {needed}, has {placeholders}")
    for example in brief.examples:
        sample = example_sample(brief.task, example)
        if brief.task.parse(example.text).error:
            raise DataError(f"{brief.task.name}: an example without its label: {example.text!r}")
        row_facts(sample)
    return brief


# --- the facts of a row ---------------------------------------------------------------------------
def row_facts(sample: Sample, seconds: float = 0.0, notes: list[str] | None = None) -> list[str]:
    """Return what is known about a row, one fact per line.

    Args:
        seconds: length of the clip; 0 where it is not known.
        notes: captions or transcripts of its media.
    """
    task, row = sample.task, sample.row
    kinds = " and ".join(medium.marker for medium in task.media)
    lines = [f"what there is: {kinds}"]
    if seconds:
        lines.append(f"length: {seconds:.0f} seconds")
    lines.append(f"what is asked: {sample.parts[-1].text.strip()}")
    for field, name in FACT_FIELDS.items():
        if row.get(field):
            lines.append(f"{name}: {row[field]}")
    if sample.gold.choice is not None:
        lines.append(f"the answer: {sample.gold.choice}")
    return lines + [f"noted by someone else: {note}" for note in notes or []]


def closing_words(sample: Sample) -> str:
    """Return the words with the label, as a text should end."""
    label = sample.task.format(sample.gold)
    lead = "It is at" if label.startswith("[") else "So"
    return f"{lead} {label}."


def example_sample(task: Task, example: Example) -> Sample:
    """Make the sample of an example; its media stand for none."""
    media = {medium.fields[0]: "0.jpg" for medium in task.media}
    return make_sample(task, {**media, **example.row}, Path(), "train", 0, "reasoning", None)


# --- captions and transcripts ---------------------------------------------------------------------
def load_notes(path: str) -> dict[str, str]:
    """Read captions or transcripts: {name of a media file, with or without suffix: text}.

    Raises DataError.
    """
    if not path:
        return {}
    try:
        notes = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise DataError(f'{path}: expected {{"x.mp4": "A dog barks at a door.", ...}}')
    return notes


def notes_of(sample: Sample, notes: dict[str, str]) -> list[str]:
    """Return the notes about the media of a row, each with the medium that it is about."""
    row_notes: list[str] = []
    for medium, part in zip(sample.task.media, sample.media):
        path = Path(part.path)
        note = notes.get(path.name, notes.get(path.stem))
        if note and note not in " ".join(row_notes):
            row_notes.append(f"({medium.marker}) {note}")
    return row_notes
