"""The datasets: one row of TASKS says all that crab_min has to know about a dataset.

Crab+ (arXiv 2603.04128) puts all its tasks behind one unified interface: media and an instruction
go in, explicit reasoning and a label come out. What differs between datasets is data, not code:
which media, how many frames, which instruction, in which form the label is written, which fields of
an annotation hold it. Training, evaluation and infer.py read the same row of TASKS. A new dataset
is a new row. The paper counts seven tasks; here a dataset is a Task, and each of the paper's tasks
is a family of them.

The folders of AV-UIE v2 (Crab+) come first, then what AV-UIE v1 (Crab, arXiv 2503.13068), PAVE
(arXiv 2503.19794) and CREMA (arXiv 2402.05889) add. The instructions are worded by us; `--prompts`
replaces any of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crab_min.answers import (
    AV_EVENTS,
    BOX,
    BOXES,
    CHOICE,
    EVENT,
    EVENTS,
    EXISTS,
    TEXT,
    Answer,
    GoldLabel,
    OutputForm,
    ParseError,
    check_option,
    read_av_events,
    read_boxes,
    read_corners,
    read_event,
    read_exists,
    read_label,
    read_option,
    read_texts,
)
from crab_min.errors import DataError


@dataclass(frozen=True)
class Medium:
    """One medium of a prompt, and where a row names its file."""

    kind: str  # "video", "audio" or "image"
    marker: str  # what the prompt writes before it
    fields: tuple[str, ...]  # the path is in the first of them that the row has
    subfolder: str  # of the task's folder; the path begins there


@dataclass(frozen=True)
class Slot:
    """A {placeholder} of an instruction, and where a row has the text for it."""

    name: str
    fields: tuple[str, ...]  # the text is in the first of them that the row has


# fmt: off
VIDEO     = Medium("video", "video",     fields=("video_path",),  subfolder="video")
VIDEO_ONE = Medium("video", "video one", fields=("video1_path",), subfolder="video")
VIDEO_TWO = Medium("video", "video two", fields=("video2_path",), subfolder="video")
AUDIO     = Medium("audio", "audio",     fields=("audio_path",),  subfolder="audio")
AUDIO_ONE = Medium("audio", "audio one", fields=("audio1_path",), subfolder="audio")
AUDIO_TWO = Medium("audio", "audio two", fields=("audio2_path",), subfolder="audio")

# An image and its sound lie anywhere in the task's folder. Test rows say visual_path.
IMAGE       = Medium("image", "image", fields=("image_path", "visual_path"), subfolder="")
IMAGE_AUDIO = Medium("audio", "audio", fields=("audio_path",),               subfolder="")

QUESTION    = Slot("question",    fields=("question", "question_text"))
CHOICES     = Slot("choices",     fields=("multi_choice",))
DESCRIPTION = Slot("description", fields=("description", "object"))
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Task:
    """One dataset: its prompts, its answers, and how they are scored."""

    name: str  # of its folder below the data folder
    family: str  # the task in Crab+'s sense
    v2: bool = True  # a folder of AV-UIE v2; else of AV-UIE v1, PAVE or CREMA
    splits: tuple[str, ...] = ("train", "test")

    # Unified input interface
    instruction: str  # with a {placeholder} for each slot
    slots: tuple[Slot, ...] = ()
    media: tuple[Medium, ...] = (VIDEO, AUDIO)  # in the order of the prompt
    frames: int = 10  # per video
    audio: str = "tenths"  # which part of the sound, a name of interface.audio_windows

    # Unified output interface
    form: OutputForm = CHOICE
    options: tuple[str, ...] = ()  # CHOICE: the only labels there are, in canonical form
    target: str = "label"  # the field with the target text of a training row
    gold: GoldLabel
    gold_train: GoldLabel | None = None  # of training rows, where they differ from test rows
    mask_head: str = ""  # of a mask decoder: "binary", "classes" (one per pixel), "" without masks

    # Scores: names from evaluation/metrics.py
    metric: str = "accuracy"  # of one sample
    set_metrics: tuple[str, ...] = ()  # further numbers, of a whole test set
    types: tuple[str, ...] = ()  # fields with the type of a question; each type is scored apart too

    def parse(self, text: str) -> Answer:
        """Read a model's text. Where it does not parse, `error` says why; nothing is raised."""
        try:
            return self.form.parse(text, self.options)
        except ParseError as reason:
            return Answer(text=text, error=str(reason))

    def format(self, answer: Answer) -> str:
        """Write the label of an answer, without reasoning."""
        return self.form.format(answer)

    def gold_answer(self, row: dict[str, Any], split: str = "test") -> Answer:
        """Return the gold answer of an annotation row.

        Test rows of s4, ms3 and ref_avs have a mask file instead of boxes; data.py puts the boxes
        of the mask (none where it is empty) into row["gold_boxes"] first.

        Raises:
            DataError: a field is missing or holds something else; the text says which and what.
        """
        # The fields that hold the label, and their values.
        gold = self.gold
        if split == "train" and self.gold_train:
            gold = self.gold_train
        values = [self.read_field(row, (name,), gold.expected) for name in gold.fields]
        # Read them. A value of another type fails in many ways.
        try:
            answer = gold.read(*values)
            if self.options:
                check_option(answer.choice, self.options)
            return answer
        except (ParseError, TypeError, ValueError, AttributeError, OverflowError) as reason:
            fields = ", ".join(map(repr, gold.fields))
            actual = ", ".join(map(repr, values))
            raise DataError(
                f"{self.name}: field {fields} must be {gold.expected}, got {actual} ({reason})"
            ) from None

    def read_field(self, row: dict[str, Any], names: Sequence[str], expected: str) -> Any:
        """Return the value of the first of the fields `names` that the row has.

        Raises:
            DataError: the row has none of them; the text says what was `expected` in them.
        """
        for name in names:
            if row.get(name) is not None:
                return row[name]
        missing = " or ".join(map(repr, names))
        raise DataError(
            f"{self.name}: the row has no field {missing}; expected {expected}; "
            f"its fields: {', '.join(row) or 'none'}"
        )


EMOTION = "Which emotion does the person show?"
GOLD_BOXES = GoldLabel(read_boxes, "gold_boxes")

# fmt: off
TASKS = {task.name: task for task in (
    # --- matching -----------------------------------------------------------------------------
    # A sound and two videos: the video that the sound belongs to.
    Task(name="a2v", family="matching",
         instruction="Which video goes with the audio, one or two?",
         media=(AUDIO, VIDEO_ONE, VIDEO_TWO), options=("one", "two"),
         gold=GoldLabel(read_label, "correct_video")),
    # A video and two sounds: the sound that the video belongs to.
    Task(name="v2a", family="matching",
         instruction="Which audio goes with the video, one or two?",
         media=(VIDEO, AUDIO_ONE, AUDIO_TWO), options=("one", "two"),
         gold=GoldLabel(read_label, "correct_audio")),

    # --- action recognition -------------------------------------------------------------------
    # Kinetics-Sounds: actions of Kinetics that can be seen and heard.
    Task(name="ks", family="action", instruction="What is being done?",
         gold=GoldLabel(read_label, "action")),
    # UCF-101: sports, music and everyday actions.
    Task(name="ucf", family="action", instruction="Which action is shown?",
         target="new_label", gold=GoldLabel(read_label, "label")),

    # --- emotion recognition: four frames and the first four seconds of sound -----------------
    # MELD: dialogues of a television series.
    Task(name="meld", family="emotion", instruction=EMOTION, frames=4, audio="first4",
         gold=GoldLabel(read_label, "Emotion"), set_metrics=("by_class",)),
    # MER 2024: the data of a challenge in multimodal emotion recognition; it has no test rows.
    Task(name="mer24", family="emotion", instruction=EMOTION, frames=4, audio="first4",
         gold=GoldLabel(read_label, "discrete"), set_metrics=("by_class",), splits=("train",)),
    # CREMA-D: actors who speak given sentences.
    Task(name="cremad", family="emotion", instruction=EMOTION, frames=4, audio="first4",
         gold=GoldLabel(read_label, "emotion"), set_metrics=("by_class",)),
    # MAFW: faces "in the wild", from films and other videos.
    Task(name="mafw", family="emotion", instruction=EMOTION, frames=4, audio="first4",
         gold=GoldLabel(read_label, "emotion"), set_metrics=("by_class",)),
    # DFEW: faces from films.
    Task(name="dfew", family="emotion", instruction=EMOTION, frames=4, audio="first4",
         gold=GoldLabel(read_label, "emotion"), set_metrics=("by_class",)),

    # --- question answering -------------------------------------------------------------------
    # MUSIC-AVQA: questions about a minute of music, nine types of them.
    Task(name="avqa", family="qa", instruction="Question: {question}", slots=(QUESTION,),
         audio="spread", gold=GoldLabel(read_label, "answer"),
         set_metrics=("substring_released", "part_of_gold"), types=("type",)),
    # AVQA: questions about everyday videos, with options.
    Task(name="avqa_thu", family="qa", instruction="Question: {question} Options: {choices}",
         slots=(QUESTION, CHOICES), gold=GoldLabel(read_option, "answer", "multi_choice"),
         types=("question_relation", "question_type")),

    # --- temporal localisation ----------------------------------------------------------------
    # AVE: one event that is both seen and heard, in 10 seconds.
    Task(name="ave", family="localisation",
         instruction="Which event is both seen and heard, and when?",
         form=EVENT, target="label_content",
         gold=GoldLabel(read_event, "event", "start_time", "end_time"), metric="segments"),
    # UnAV-100: several events; AV-UIE v2 has 10 seconds of each video, and no test rows.
    Task(name="unav", family="localisation", instruction="Which events happen, and when?",
         form=EVENTS, target="label_content", gold=GoldLabel(EVENTS.parse, "label_content"),
         metric="event_f", splits=("train",)),
    # LLP (audio-visual video parsing, AVVP): events seen, events heard, in 10 seconds.
    Task(name="avvp", family="localisation",
         instruction="Which events are seen, which are heard, and when?",
         form=AV_EVENTS, target="label_content", gold=GoldLabel(read_av_events, "event"),
         metric="av_event_f"),

    # --- segmentation and grounding: an image and its sound -----------------------------------
    # AVSBench S4: a single sounding object.
    Task(name="s4", family="segmentation", media=(IMAGE, IMAGE_AUDIO), audio="fifth",
         instruction="Which thing sounds? Give its box and three points.",
         form=BOXES, target="label_content", gold=GOLD_BOXES,
         gold_train=GoldLabel(BOXES.parse, "label_content"),
         mask_head="binary", metric="first_box"),
    # AVSBench MS3: multiple sounding objects.
    Task(name="ms3", family="segmentation", media=(IMAGE, IMAGE_AUDIO), audio="fifth",
         instruction="Which things sound? Give a box and three points for each.",
         form=BOXES, target="label_content", gold=GOLD_BOXES,
         gold_train=GoldLabel(BOXES.parse, "label_content"),
         mask_head="binary", metric="all_boxes"),
    # Ref-AVS: the object of a description, which may not be there.
    Task(name="ref_avs", family="segmentation", media=(IMAGE, IMAGE_AUDIO), audio="tenth",
         instruction="Is {description} in the image? If true, give its box and three points.",
         slots=(DESCRIPTION,),
         form=EXISTS, target="output", gold=GoldLabel(read_exists, "gold_boxes"),
         gold_train=GoldLabel(EXISTS.parse, "output"),
         mask_head="binary", metric="exists_box"),
    # ARIG (audio-referred image grounding): the box of the sounding object, on images of S4.
    Task(name="arig", family="segmentation", media=(IMAGE, IMAGE_AUDIO), audio="fifths",
         instruction="Which thing sounds? Give its box.",
         form=BOX, target="label_content",
         gold=GoldLabel(read_corners, "top_left", "bottom_right"),
         gold_train=GoldLabel(BOX.parse, "label_content"), metric="first_box"),

    # --- captioning ---------------------------------------------------------------------------
    # VALOR: captions of what is seen and heard; it has no test rows.
    Task(name="avcap", family="captioning", instruction="Say what is seen and heard.",
         form=TEXT, target="label_content", gold=GoldLabel(TEXT.parse, "label_content"),
         metric="rouge_l", set_metrics=("cider",), splits=("train",)),

    # --- what AV-UIE v1 adds (Crab) -----------------------------------------------------------
    # AVSBench, semantic: sounding objects of 70 classes.
    Task(name="avss", family="segmentation", v2=False, media=(IMAGE, IMAGE_AUDIO), audio="tenth",
         instruction="Which things sound? Give a box and three points for each.",
         form=BOXES, target="label_content", gold=GOLD_BOXES,
         gold_train=GoldLabel(BOXES.parse, "label_content"),
         mask_head="classes", metric="all_boxes"),
    # AudioCaps: captions of sounds, for pretraining.
    Task(name="audiocaps", family="captioning", v2=False, media=(IMAGE_AUDIO,),
         instruction="Say what is heard.",
         form=TEXT, target="label_content", gold=GoldLabel(TEXT.parse, "label_content"),
         metric="rouge_l", set_metrics=("cider",)),
    # LVIS: boxes of named objects in photographs, for pretraining.
    Task(name="lvis", family="segmentation", v2=False, media=(IMAGE,),
         instruction="Where is the {name}? Give its box.", slots=(Slot("name", ("name",)),),
         form=BOX, target="label_content", gold=GOLD_BOXES, metric="first_box"),

    # --- what PAVE and CREMA add --------------------------------------------------------------
    # AVSD: a dialogue about a video (PAVE).
    Task(name="avsd", family="qa", v2=False,
         instruction="Answer the last question of the dialogue. {dialogue}",
         slots=(Slot("dialogue", ("dialogue",)),),
         form=TEXT, target="answer", gold=GoldLabel(TEXT.parse, "answer"),
         metric="rouge_l", set_metrics=("cider",)),
    # ScanQA: questions about a scanned room (PAVE).
    Task(name="scanqa", family="qa", v2=False, media=(VIDEO,),
         instruction="Answer in a few words: {question}", slots=(QUESTION,),
         form=TEXT, target="answer", gold=GoldLabel(read_texts, "answers"),
         metric="exact_match", set_metrics=("refined",)),
    # SQA3D: questions asked from a described place in a scanned room (PAVE, CREMA).
    Task(name="sqa3d", family="qa", v2=False, media=(VIDEO,),
         instruction="Answer in a few words: {situation} {question}",
         slots=(Slot("situation", ("situation",)), QUESTION),
         form=TEXT, target="answer", gold=GoldLabel(read_texts, "answers"),
         metric="exact_match", set_metrics=("refined", "substring_of_gold"), types=("type",)),
    # NExT-QA: questions about why and when, with five options (CREMA).
    Task(name="nextqa", family="qa", v2=False, media=(VIDEO,),
         instruction="Question: {question} Options: {choices}", slots=(QUESTION, CHOICES),
         gold=GoldLabel(read_option, "answer", "multi_choice"), types=("type",)),
)}
# fmt: on
