"""The unified interface: prompts and answers of every task; what models really write."""

import doctest
import json
import random
from pathlib import Path

import pytest

from crab_min import answers, interface
from crab_min.answers import (
    AV_EVENTS,
    BOX,
    CHOICE,
    EVENT,
    EVENTS,
    EXISTS,
    TEXT,
    Answer,
    normalize_label,
)
from crab_min.errors import DataError
from crab_min.interface import audio_windows, build_prompt, load_prompts, prompt_text
from crab_min.tasks import TASKS

LABELS = [
    "Violin, fiddle",
    "Frying (food)",
    "dog",
    "people eating",
    "Fixed-wing aircraft, airplane",
    "Baby_laughter",
    "1st bell",
]
CHOICES = ("yes", "more than ten", "playing violin", "two", "left")
CAPTION_WORDS = ["a", "dog", "barks,", "then", "[it] stops."]
QUESTION_ROW = {"video_path": "x.mp4", "audio_path": "x.mp3", "question": "How many?"}


@pytest.mark.parametrize("module", [answers, interface], ids=["answers", "interface"])
def test_examples_in_docstrings(module):
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed


# --- writing and parsing --------------------------------------------------------------------------
def random_spans(rng):
    edges = sorted(rng.sample(range(11), 2 * rng.randint(1, 3)))
    return list(zip(edges[::2], edges[1::2]))


def random_events(rng, count):
    return [(label, random_spans(rng)) for label in rng.sample(LABELS, count)]


def random_boxes(rng, count):
    boxes = []
    for _ in range(count):
        x1, x2 = sorted(rng.sample(range(225), 2))
        y1, y2 = sorted(rng.sample(range(225), 2))
        boxes.append((x1, y1, x2, y2))
    return boxes


def random_answer(task, rng):
    if task.form is CHOICE:
        return Answer(choice=rng.choice(task.options or CHOICES))
    if task.form is EVENT:
        return Answer(events=random_events(rng, 1))
    if task.form is EVENTS:
        return Answer(events=random_events(rng, rng.randint(0, 3)))
    if task.form is AV_EVENTS:
        audio = random_events(rng, rng.randint(0, 3))
        return Answer(audio_events=audio, visual_events=random_events(rng, rng.randint(0, 3)))
    if task.form is TEXT:
        return Answer(text=" ".join(rng.choices(CAPTION_WORDS, k=rng.randint(1, 9))))
    exists = rng.random() < 0.7 if task.form is EXISTS else None
    if exists is False:
        return Answer(exists=False)
    count = rng.randint(1, 3) if task.name == "ms3" else 1
    boxes = random_boxes(rng, count)
    points, owners = [], []
    if task.form is not BOX:
        points = [(rng.randint(0, 224), rng.randint(0, 224)) for _ in range(3 * count)]
        owners = [index // 3 for index in range(3 * count)]
    return Answer(exists=exists, boxes=boxes, points=points, owners=owners)


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_what_is_written_is_read_again(task):
    rng = random.Random(task.name)
    for _ in range(100):
        answer = random_answer(task, rng)
        text = task.format(answer)
        assert task.parse(text) == answer
        assert task.parse(text).objects() == answer.objects()
        if task.form is not TEXT:
            assert task.parse(f"First some prose (about it). So {text}.") == answer


def test_there_are_19_tasks_of_seven_families_and_16_have_a_test_set():
    assert sum(task.v2 for task in TASKS.values()) == 19
    assert len({task.family for task in TASKS.values()}) == 7
    train_only = [name for name, task in TASKS.items() if "test" not in task.splits]
    assert train_only == ["mer24", "unav", "avcap"]


def test_five_tasks_have_masks():
    heads = {name: task.mask_head for name, task in TASKS.items() if task.mask_head}
    binary = dict.fromkeys(["s4", "ms3", "ref_avs", "lvis"], "binary")
    assert heads == binary | {"avss": "classes"}


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("avqa", "So the answer is <answer> yes </answer>", Answer(choice="yes")),
        ("avqa", "<ANSWER>yes", Answer(choice="yes")),
        ("avqa", "< answer >yes.< / answer >", Answer(choice="yes")),
        ("avqa", "<answer>yes</answer><answer>Yes.</answer><unk><unk>", Answer(choice="yes")),
        ("a2v", "<answer>1</answer>", Answer(choice="one")),
        (
            "ave",
            "<event> Violin, fiddle </event>, and the time range is <range> 0,10 </range>.",
            Answer(events=[("Violin, fiddle", [(0, 10)])]),
        ),
        (
            "ave",
            "<event>Frying (food), ( 0 , 5 )(7 9)",
            Answer(events=[("Frying (food)", [(0, 5), (7, 9)])]),
        ),
        (
            "ave",
            "<event>dog,(3 6),(0 1)</event> <event>Dog,(0 1)</event>",
            Answer(events=[("dog", [(0, 1), (3, 6)])]),
        ),
        ("ave", "<Event>dog (5 2)</Event>", Answer(events=[("dog", [(2, 5)])])),
        (
            "unav",
            "<event>dog, (0 3) and cat, (4 5)</event>",
            Answer(events=[("dog", [(0, 3)]), ("cat", [(4, 5)])]),
        ),
        ("avvp", "<audio_event>Dog,(0 1),(3 6)", Answer(audio_events=[("Dog", [(0, 1), (3, 6)])])),
        (
            "avvp",
            "<visual_event></visual_event> and <audio_event>Dog,(0 10)</audio_event>.",
            Answer(audio_events=[("Dog", [(0, 10)])]),
        ),
        (
            "s4",
            "Its box is [ 12, 30, 200, 180 ] and points [75, 121],[153 103]",
            Answer(boxes=[(12, 30, 200, 180)], points=[(75, 121), (153, 103)]),
        ),
        ("arig", "[0,0,224,224] [1,2]", Answer(boxes=[(0, 0, 224, 224)])),
        ("ref_avs", "<answer>False</answer> It is not there.", Answer(exists=False)),
        (
            "ref_avs",
            "<answer> true </answer> It is at [1,2,3,4]",
            Answer(exists=True, boxes=[(1, 2, 3, 4)]),
        ),
    ],
)
def test_what_models_really_write_is_read(name, text, expected):
    assert TASKS[name].parse(text) == expected


@pytest.mark.parametrize(
    "name, text, reason",
    [
        ("avqa", "yes", "no <answer>"),
        ("avqa", "<answer></answer>", "no <answer>"),
        ("avqa", "<answer>yes</answer> <answer>no</answer>", "2 different answers"),
        ("a2v", "<answer>three</answer>", "expected one or two"),
        ("ave", "A dog from 0 to 10.", "no <event>"),
        ("ave", "<event>dog</event>", "without times"),
        ("ave", "<event>(0 10)</event>", "without a label"),
        ("ave", "<event>dog, (0.5.5 3)</event>", "without times"),
        (
            "ave",
            "<event>dog</event> <range>0,4</range> <event>cat</event> <range>4,10</range>",
            "2 different events",
        ),
        ("avvp", "<event>dog, (0 10)</event>", "no <audio_event>"),
        ("s4", "[1,2]", "no box"),
        ("s4", "[0.1.2,0.2,0.3,0.4]", "no box"),
        ("s4", "[0,0,300,100]", "0 .. 224"),
        ("s4", "[-1,0,30,100]", "0 .. 224"),
        ("arig", "[50,0,30,100]", "x1 <= x2"),
        ("s4", "[0,0,30,100] [4,999]", "point"),
        ("ref_avs", "<answer>true</answer> It is there.", "no box"),
        ("avcap", " \n", "no text"),
    ],
)
def test_what_cannot_be_read_gives_a_reason_and_keeps_the_text(name, text, reason):
    answer = TASKS[name].parse(text)
    assert reason in answer.error and answer == Answer(text=text, error=answer.error)


def test_no_text_makes_the_parsers_raise():
    rng = random.Random(0)
    tags = ["<answer>", "</answer>", "<event>", "<audio_event>", "<visual_event>", "<range>"]
    signs = ["(", ")", "[", "]", "<", ">", ",", " ", "\n", " " * 2000, "{}", "%s", "é", "\x00"]
    numbers = ["0", "-1", "9" * 5000, "224", "٣", "²", "(0 3)", "[1,2,3,4]", "[1,2]"]
    pieces = [*tags, *signs, *numbers, "\ud800", "dog", "true", "one"]
    for _ in range(1000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 30)))
        for task in TASKS.values():
            answer = task.parse(text)
            assert answer.error is None or answer.text == text
            if answer.error is None:
                assert task.parse(task.format(answer)).error is None


def test_no_pattern_takes_quadratic_time():
    long_texts = (
        "<event>a, " + "(0 1" * 20000,
        "[" + "1," * 50000,
        "<" * 50000,
        "(1" + " " * 50000,
    )
    for text in long_texts:
        for task in TASKS.values():
            task.parse(text)


def test_each_point_belongs_to_the_box_before_it():
    text = "[0,0,9,9] [1,1],[2,2],[3,3] and [20,20,40,40] [30,30] and again [0,0,9,9] [4,4]"
    assert TASKS["ms3"].parse(text).objects() == [
        ((0, 0, 9, 9), [(1, 1), (2, 2), (3, 3), (4, 4)]),
        ((20, 20, 40, 40), [(30, 30)]),
    ]


@pytest.mark.parametrize(
    "a, b",
    [
        ("PlayingViolin", "playing violin"),
        (" Yes. ", "yes"),
        ("2", "two"),
        (2, "Two"),
        ("20", "twenty"),
        ("Baby_laughter", "baby laughter"),
        ("Violin , fiddle", "violin,fiddle"),
        ("Fixed-wing", "fixed wing"),
    ],
)
def test_labels_are_equal_in_canonical_form(a, b):
    assert normalize_label(a) == normalize_label(b)


def test_an_option_may_be_named_by_text_index_or_letter():
    options = ("chainsaw", "violin", "dog")
    assert [normalize_label(x, options) for x in ("Dog", "2", "(C)", "two", "c.")] == ["dog"] * 5
    # The text of an option goes before an index.
    assert normalize_label("2", ("one", "two", "three")) == "two"
    assert normalize_label("7", options) == "seven"
    assert normalize_label(1) != normalize_label(True)


# --- gold answers ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, row, expected",
    [
        ("v2a", {"correct_audio": 2}, Answer(choice="two")),
        ("ucf", {"label": "PlayingViolin"}, Answer(choice="playing violin")),
        ("meld", {"Emotion": "happy"}, Answer(choice="happy")),
        ("avqa", {"answer": "1"}, Answer(choice="one")),
        ("avqa_thu", {"answer": 1, "multi_choice": ["rain", "Dog"]}, Answer(choice="Dog")),
        (
            "ave",
            {"event": "Violin, fiddle", "start_time": 0, "end_time": 7},
            Answer(events=[("Violin, fiddle", [(0, 7)])]),
        ),
        (
            "avvp",
            {"event": "audio: Dog,(0 3) Speech , (2 5) (6 7) visual: Dog,(0 10)"},
            Answer(
                audio_events=[("Dog", [(0, 3)]), ("Speech", [(2, 5), (6, 7)])],
                visual_events=[("Dog", [(0, 10)])],
            ),
        ),
        (
            "avvp",
            {"event": "visual: Dog,(0 1),(3 6)"},
            Answer(visual_events=[("Dog", [(0, 1), (3, 6)])]),
        ),
        (
            "arig",
            {"top_left": [112, 58], "bottom_right": [133, 98]},
            Answer(boxes=[(112, 58, 133, 98)]),
        ),
        (
            "ms3",
            {"gold_boxes": [(1, 2, 3, 4), (5, 6, 7, 8)]},
            Answer(boxes=[(1, 2, 3, 4), (5, 6, 7, 8)]),
        ),
        ("ref_avs", {"gold_boxes": []}, Answer(exists=False)),
        ("ref_avs", {"gold_boxes": [(1, 2, 3, 4)]}, Answer(exists=True, boxes=[(1, 2, 3, 4)])),
    ],
)
def test_the_gold_answer_of_a_test_row(name, row, expected):
    assert TASKS[name].gold_answer(row) == expected


@pytest.mark.parametrize(
    "name, row, words",
    [
        ("avqa", {"question": "?"}, ["avqa", "'answer'", "a label", "question"]),
        ("s4", {}, ["s4", "'gold_boxes'", "mask"]),
        ("a2v", {"correct_video": 3}, ["a2v", "'correct_video'", "3", "one or two"]),
        ("avqa_thu", {"answer": 4, "multi_choice": ["a", "b"]}, ["avqa_thu", "index", "4"]),
        (
            "ave",
            {"event": "dog", "start_time": "soon", "end_time": 3},
            ["ave", "'start_time'", "soon"],
        ),
        ("ave", {"event": "dog", "start_time": 5, "end_time": 3}, ["ave", "ends before"]),
        ("avvp", {"event": "Dog"}, ["avvp", "'event'", "'Dog'", "audio: Dog,(0 3)"]),
        ("arig", {"top_left": [1000, 0], "bottom_right": [3, 4]}, ["arig", "'top_left'", "224"]),
        ("arig", {"top_left": 7, "bottom_right": [3, 4]}, ["arig", "'top_left'", "7"]),
    ],
)
def test_a_bad_gold_field_is_named(name, row, words):
    with pytest.raises(DataError) as error:
        TASKS[name].gold_answer(row)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "task", [pytest.param(task, id=name) for name, task in TASKS.items() if task.v2]
)
def test_real_rows_of_every_task(task, real_media):
    for split in task.splits:
        for row in json.loads((real_media / task.name / f"{split}.json").read_text()):
            parts = build_prompt(task, row, str(real_media))
            assert all(part.kind == "text" or Path(part.path).is_file() for part in parts)
            assert parts[-1].kind == "text"
            assert "{" not in parts[-1].text
            if split == "test":
                task.gold_answer({**row, "gold_boxes": [(1, 2, 3, 4)]})
                continue
            gold = task.gold_answer(row, "train")
            target = task.parse(row[task.target])
            assert target.error is None
            assert task.parse(task.format(gold)) == gold
            if task.form is CHOICE:
                assert normalize_label(target.choice, gold.choices) == normalize_label(gold.choice)
            else:
                assert target == gold


# --- prompts --------------------------------------------------------------------------------------
def test_every_medium_follows_its_marker_and_the_instruction_comes_last():
    row = {"video1_path": "a.mp4", "video2_path": "../../ave/video/b.mp4", "audio_path": "c.mp3"}
    parts = build_prompt(TASKS["a2v"], row, "root")
    assert prompt_text(parts) == (
        "audio: <audio c.mp3>\nvideo one: <video a.mp4>\nvideo two: <video b.mp4>\n"
        + TASKS["a2v"].instruction
    )
    paths = [part.path for part in parts if part.path]
    assert paths == ["root/a2v/audio/c.mp3", "root/a2v/video/a.mp4", "root/ave/video/b.mp4"]
    parts = build_prompt(TASKS["v2a"], {"video_path": "a", "audio1_path": "b", "audio2_path": "c"})
    text = prompt_text(parts)
    assert text.startswith("video: <video a>\naudio one: <audio b>\naudio two: <audio c>\n")


def test_frames_and_audio_windows_are_those_of_the_task():
    parts = build_prompt(TASKS["meld"], {"video_path": "x.mp4", "audio_path": "x.mp3"})
    assert [(p.kind, p.frames) for p in parts if p.kind == "video"] == [("video", 4)]
    assert [(p.window, p.index) for p in parts if p.kind == "audio"] == [("first4", 0)]


@pytest.mark.parametrize(
    "name, row, index",
    [
        ("s4", {"image_path": "v/frames/3.jpg"}, 3),
        ("ms3", {"visual_path": "v/1.jpg", "frame_idx": 4}, 4),
        ("ref_avs", {"image_path": "7.jpg", "idx": 9, "description": "a dog"}, 9),
    ],
)
def test_the_frame_index_reaches_the_audio_part(name, row, index):
    parts = build_prompt(TASKS[name], {"audio_path": "a.wav", **row})
    assert [part.index for part in parts if part.kind == "audio"] == [index]


def test_question_options_and_description_fill_the_instruction():
    row = {**QUESTION_ROW, "question": "What {is} it?", "multi_choice": ["a dog", "rain"]}
    text = prompt_text(build_prompt(TASKS["avqa_thu"], row))
    assert text.endswith("\nQuestion: What {is} it? Options: a dog; rain")
    image = {"visual_path": "7.jpg", "audio_path": "a.wav", "object": "the loud thing"}
    assert "Is the loud thing in the image?" in prompt_text(build_prompt(TASKS["ref_avs"], image))


@pytest.mark.parametrize(
    "name, row, words",
    [
        ("avqa", {"video_path": "x.mp4", "audio_path": "x.mp3"}, ["avqa", "'question'"]),
        ("ave", {"video_path": "x.mp4"}, ["ave", "'audio_path'", "audio file"]),
        (
            "s4",
            {"image_path": "photo.jpg", "audio_path": "a.wav"},
            ["s4", "frame_idx", "0 to 4", "photo"],
        ),
        (
            "ref_avs",
            {"image_path": "1.jpg", "idx": 10, "audio_path": "a.wav"},
            ["ref_avs", "0 to 9", "10"],
        ),
    ],
)
def test_a_missing_prompt_field_is_named(name, row, words):
    with pytest.raises(DataError) as error:
        build_prompt(TASKS[name], row)
    assert all(word in str(error.value) for word in words), error.value


def test_a_file_replaces_the_instructions_of_the_tasks_it_names(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"avqa": "Please answer {question}"}))
    text = prompt_text(build_prompt(TASKS["avqa"], QUESTION_ROW, "", load_prompts(path)))
    assert text.endswith("\nPlease answer How many?")
    unusable = (
        ('{"nosuch": "x"}', "nosuch"),
        ('{"avqa": "Answer!"}', "question"),
        ('{"ks": "{question}"}', "question"),
        ('["x"]', "object"),
        ("{", "prompts.json"),
    )
    for content, words in unusable:
        path.write_text(content)
        with pytest.raises(DataError, match=words):
            load_prompts(path)
    with pytest.raises(DataError, match="missing.json"):
        load_prompts(tmp_path / "missing.json")


# --- audio windows --------------------------------------------------------------------------------
def test_audio_windows():
    assert audio_windows("tenths", 10) == [(i, i + 1) for i in range(10)]
    assert audio_windows("fifths", 10) == [(2 * i, 2 * i + 2) for i in range(5)]
    assert audio_windows("fifth", 5, 3) == [(3, 4)]
    assert audio_windows("tenth", 10, 7) == [(7, 8)]
    assert audio_windows("first4", 1.5) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert audio_windows("spread", 60) == [(i - 0.5, i + 1.5) for i in range(0, 60, 6)]
    assert audio_windows("spread", 10) == audio_windows("tenths", 10)
    with pytest.raises(DataError, match="0 s"):
        audio_windows("tenths", 0)
