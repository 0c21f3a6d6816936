"""The datasets, one row of TASKS each.

A row says all that crab_min has to know about a dataset.

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

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from crab_min import answers
from crab_min.answers import AV_EVENTS, BOX, BOXES, CHOICE, EVENT, EVENTS, EXISTS, TEXT, Answer
from crab_min.errors import DataError


@dataclass(frozen=True)
class Medium:
    """One medium of a prompt, and where a row names its file."""

    kind: str  # "video", "audio" or "image"
    marker: str  # what the prompt writes before it
    fields: tuple[str, ...]  # the path is in the first of them that the row has
    subfolder: str  # of the task's folder; the path begins there


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
# fmt: on

# The fields of a row that may hold the text for a {placeholder} of an instruction. The text for any
# other placeholder is in the field of the same name.
SLOT_FIELDS = {
    "question": ("question", "question_text"),
    "choices": ("multi_choice",),
    "description": ("description", "object"),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One dataset: its prompts, its answers, and how they are scored."""

    name: str  # of its folder below the data folder
    family: str  # the task in Crab+'s sense
    v2: bool = True  # a folder of AV-UIE v2; else of AV-UIE v1, PAVE or CREMA
    splits: tuple[str, ...] = ("train", "test")

    # Unified input interface
    instruction: str  # with a {placeholder} for each slot
    media: tuple[Medium, ...] = (VIDEO, AUDIO)  # in the order of the prompt
    frames: int = 10  # per video
    audio: str = "tenths"  # which part of the sound, a name of interface.audio_windows

    # Unified output interface
    form: answers.OutputForm = CHOICE
    options: tuple[str, ...] = ()  # CHOICE: the only labels there are, in canonical form
    target: str = "label"  # the field with the target text of a training row
    # The gold label: a reader of answers.py and the fields it takes. (): it is in the target text.
    gold: tuple = ()
    gold_test: tuple = ()  # of test rows, where they differ from training rows
    mask_head: str = ""  # of a mask decoder: "binary", "classes" (one per pixel), "" without masks
    # Of a model whose layout says so: answers without a tag, and how it names an option, such as
    # "Option {letter}"; "" for the option's text.
    bare: bool = False
    option_name: str = ""

    # Scores: names from evaluation/metrics.py
    metric: str = "accuracy"  # of one sample
    set_metrics: tuple[str, ...] = ()  # further numbers, of a whole test set
    types: tuple[str, ...] = ()  # fields with the type of a question; each type is scored apart too

    @property
    def slots(self) -> dict[str, tuple[str, ...]]:
        """Return the instruction's placeholders, and fields that may hold their texts."""
        names = re.findall(r"\{(\w+)\}", self.instruction)
        return {name: SLOT_FIELDS.get(name, (name,)) for name in names}

    def parse(self, text: str) -> Answer:
        """Read a model's text.

        Where it does not parse, `error` says why. Nothing is raised.
        """
        try:
            tagged = answers.tag_bare_answer(text, self.form.tag) if self.bare else text
            answer = self.form.parse(tagged)
            if self.options:
                answer.choice = answers.find_option(answer.choice, self.options)
            return answer
        except answers.ParseError as reason:
            return Answer(text=text, error=str(reason))

    def format(self, answer: Answer) -> str:
        """Write the label of an answer, without reasoning."""
        return self.form.format(answer)

    def format_option(self, options: Sequence[str], index: int) -> str:
        """Write the answer that names one of several options, as the model writes it."""
        text = str(options[index])
        if self.option_name:
            return self.option_name.format(letter=chr(ord("A") + index))
        return text if self.bare else self.format(Answer(choice=text))

    def gold_answer(self, row: dict[str, Any], split: str = "test") -> Answer:
        """Return the gold answer of an annotation row.

        Test rows of s4, ms3 and ref_avs have a mask file instead of boxes; data.py puts the boxes
        of the mask (none where it is empty) into row["gold_boxes"] first.

        Raises:
            DataError: a field is missing or holds something else; the text says which and what.
        """
        # The fields that hold the label, and their values.
        gold = self.gold or (self.form.parse, self.target)
        if split == "test" and self.gold_test:
            gold = self.gold_test
        reader, *names = gold
        expected = answers.EXPECTED.get(reader, answers.TAGGED_TEXT)
        values = [self.read_field(row, (name,), expected) for name in names]
        # Read them. A value of another type fails in many ways.
        try:
            answer = reader(*values)
            if answer.events or answer.audio_events or answer.visual_events:
                answer.seconds = math.ceil(float(row.get("duration") or 0))
            if self.options:  # only a check: a gold label is in canonical form already
                answers.find_option(answer.choice, self.options)
            return answer
        except (ValueError, TypeError, AttributeError, OverflowError) as reason:
            fields = ", ".join(map(repr, names))
            actual = ", ".join(map(repr, values))
            raise DataError(
                f"{self.name}: field {fields} must be {expected}, got {actual} ({reason})"
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


MASK_BOXES = (answers.read_boxes, "gold_boxes")

# fmt: off
# What the rows of a family have in common. Of emotions the first four seconds are heard.
emotion = partial(Task, family="emotion", instruction="Which emotion does the person show?",
                  frames=4, audio="first4", set_metrics=("by_class",))
multiple_choice = partial(Task, family="qa", v2=False, media=(VIDEO,),
                          instruction="Question: {question} Options: {choices}",
                          gold=(answers.read_option, "answer", "multi_choice"), types=("type",))
captioning = partial(Task, family="captioning", form=TEXT, target="label_content",
                     metric="rouge_l", set_metrics=("cider",))

TASKS = {task.name: task for task in (
    # --- matching -----------------------------------------------------------------------------
    # A sound and two videos: the video that the sound belongs to.
    Task(name="a2v", family="matching",
         instruction="Which video goes with the audio, one or two?",
         media=(AUDIO, VIDEO_ONE, VIDEO_TWO), options=("one", "two"),
         gold=(answers.read_label, "correct_video")),
    # A video and two sounds: the sound that the video belongs to.
    Task(name="v2a", family="matching",
         instruction="Which audio goes with the video, one or two?",
         media=(VIDEO, AUDIO_ONE, AUDIO_TWO), options=("one", "two"),
         gold=(answers.read_label, "correct_audio")),

    # --- action recognition -------------------------------------------------------------------
    # Kinetics-Sounds: actions of Kinetics that can be seen and heard.
    Task(name="ks", family="action", instruction="What is being done?",
         gold=(answers.read_label, "action")),
    # UCF-101: sports, music and everyday actions.
    Task(name="ucf", family="action", instruction="Which action is shown?",
         target="new_label", gold=(answers.read_label, "label")),

    # --- emotion recognition ------------------------------------------------------------------
    # MELD: dialogues of a television series.
    emotion(name="meld", gold=(answers.read_label, "Emotion")),
    # MER 2024: the data of a challenge in multimodal emotion recognition; it has no test rows.
    emotion(name="mer24", gold=(answers.read_label, "discrete"), splits=("train",)),
    # CREMA-D: actors who speak given sentences.
    emotion(name="cremad", gold=(answers.read_label, "emotion")),
    # MAFW: faces "in the wild", from films and other videos.
    emotion(name="mafw", gold=(answers.read_label, "emotion")),
    # DFEW: faces from films.
    emotion(name="dfew", gold=(answers.read_label, "emotion")),

    # --- question answering -------------------------------------------------------------------
    # MUSIC-AVQA: questions about a minute of music, nine types of them.
    Task(name="avqa", family="qa", instruction="Question: {question}", audio="spread",
         gold=(answers.read_label, "answer"),
         set_metrics=("substring_released", "gold_in_answer", "part_of_gold"), types=("type",)),
    # AVQA: questions about everyday videos, with options.
    Task(name="avqa_thu", family="qa", instruction="Question: {question} Options: {choices}",
         gold=(answers.read_option, "answer", "multi_choice"),
         types=("question_relation", "question_type")),

    # --- temporal localisation ----------------------------------------------------------------
    # AVE: one event that is both seen and heard, in 10 seconds.
    Task(name="ave", family="localisation",
         instruction="Which event is both seen and heard, and when?",
         form=EVENT, target="label_content",
         gold=(answers.read_event, "event", "start_time", "end_time"), metric="segments"),
    # UnAV-100: several events; AV-UIE v2 has 10 seconds of each video, and no test rows.
    Task(name="unav", family="localisation", instruction="Which events happen, and when?",
         form=EVENTS, target="label_content", metric="event_f", splits=("train",)),
    # LLP (audio-visual video parsing, AVVP): events seen, events heard, in 10 seconds.
    Task(name="avvp", family="localisation",
         instruction="Which events are seen, which are heard, and when?",
         form=AV_EVENTS, target="label_content", gold=(answers.read_av_events, "event"),
         metric="av_event_f"),

    # --- segmentation and grounding: an image and its sound -----------------------------------
    # AVSBench S4: a single sounding object.
    Task(name="s4", family="segmentation", media=(IMAGE, IMAGE_AUDIO), audio="fifth",
         instruction="Which thing sounds? Give its box and three points.",
         form=BOXES, target="label_content", gold_test=MASK_BOXES,
         mask_head="binary", metric="first_box"),
    # AVSBench MS3: multiple sounding objects.
    Task(name="ms3", family="segmentation", media=(IMAGE, IMAGE_AUDIO), audio="fifth",
         instruction="Which things sound? Give a box and three points for each.",
         form=BOXES, target="label_content", gold_test=MASK_BOXES,
         mask_head="binary", metric="all_boxes"),
    # Ref-AVS: the object of a description, which may not be there.
    Task(name="ref_avs", family="segmentation", media=(IMAGE, IMAGE_AUDIO), audio="tenth",
         instruction="Is {description} in the image? If true, give its box and three points.",
         form=EXISTS, target="output", gold_test=(answers.read_exists, "gold_boxes"),
         mask_head="binary", metric="exists_box", types=("split",)),
    # ARIG (audio-referred image grounding): the box of the sounding object, on images of S4.
    Task(name="arig", family="segmentation", media=(IMAGE, IMAGE_AUDIO), audio="fifths",
         instruction="Which thing sounds? Give its box.", form=BOX, target="label_content",
         gold_test=(answers.read_corners, "top_left", "bottom_right"), metric="first_box"),

    # --- captioning ---------------------------------------------------------------------------
    # VALOR: captions of what is seen and heard; it has no test rows.
    captioning(name="avcap", instruction="Say what is seen and heard.", splits=("train",)),

    # --- what AV-UIE v1 adds (Crab) -----------------------------------------------------------
    # AVSBench, semantic: sounding objects of 70 classes.
    Task(name="avss", family="segmentation", v2=False, media=(IMAGE, IMAGE_AUDIO), audio="tenth",
         instruction="Which things sound? Give a box and three points for each.",
         form=BOXES, target="label_content", gold_test=MASK_BOXES,
         mask_head="classes", metric="all_boxes"),
    # AudioCaps: captions of sounds, for pretraining.
    captioning(name="audiocaps", v2=False, media=(IMAGE_AUDIO,), instruction="Say what is heard."),
    # LVIS: boxes and masks of named objects in photographs, for pretraining.
    Task(name="lvis", family="segmentation", v2=False, media=(IMAGE,),
         instruction="Where is the {name}? Give its box.",
         form=BOX, target="label_content", mask_head="binary", metric="first_box"),

    # --- what PAVE and CREMA add --------------------------------------------------------------
    # AVSD: a dialogue about a video (PAVE).
    Task(name="avsd", family="qa", v2=False,
         instruction="Answer the last question of the dialogue. {dialogue}",
         form=TEXT, target="answer", metric="rouge_l", set_metrics=("cider",)),
    # ScanQA: questions about a scanned room (PAVE).
    Task(name="scanqa", family="qa", v2=False, media=(VIDEO,),
         instruction="Answer in a few words: {question}",
         form=TEXT, target="answer", gold=(answers.read_texts, "answers"),
         metric="exact_match", set_metrics=("refined", "cider", "bleu_4", "rouge_l_coco")),
    # SQA3D: questions asked from a described place in a scanned room (PAVE, CREMA).
    Task(name="sqa3d", family="qa", v2=False, media=(VIDEO,),
         instruction="Answer in a few words: {situation} {question}",
         form=TEXT, target="answer", gold=(answers.read_texts, "answers"),
         metric="exact_match", set_metrics=("refined", "substring_of_gold"), types=("type",)),
    # NExT-QA: questions about why and when, with five options (CREMA).
    Task(name="nextqa", family="qa", v2=False, media=(VIDEO,),
         instruction="Question: {question} Options: {choices}",
         gold=(answers.read_option, "answer", "multi_choice"), types=("type",)),
    # VideoMME, MVBench, MLVU: multiple choice about short, moving and long videos (PAVE).
    multiple_choice(name="videomme", splits=("test",)),
    multiple_choice(name="mvbench", splits=("test",)),
    multiple_choice(name="mlvu", splits=("test",)),
    # Touch-QA, Thermal-QA: what a hand feels, how warm it is (CREMA).
    multiple_choice(name="touchqa", types=()),
    multiple_choice(name="thermalqa", types=()),
    # PerceptionTest: memory, physics, abstraction and semantics, three options (CREMA).
    multiple_choice(name="perceptiontest", types=("area", "reasoning")),
    # Ego-Exo4D: how well the person does it, seen from the head and from around (PAVE).
    Task(name="egoexo", family="action", v2=False, media=(VIDEO,),
         instruction="How well is it done: novice, early expert, intermediate expert or late "
                     "expert?",
         options=("novice", "early expert", "intermediate expert", "late expert"),
         gold=(answers.read_label, "proficiency_score"), types=("scenario_name",)),
    # VGGSound: 309 classes of sound; most likely the seventh task of CREMA.
    Task(name="vggsound", family="action", v2=False, instruction="What makes the sound?",
         gold=(answers.read_label, "label")),
)}
# fmt: on
