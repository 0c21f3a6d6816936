"""AV-UIE v1 and the sources of PAVE and CREMA, as released.

A data folder is made with every source, each with rows to keep and rows to leave out.
"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from crab_min.data import load_media, pick_tasks, read_samples
from crab_min.errors import DataError
from crab_min.evaluation.answering import options
from crab_min.media.write import write_audio, write_video
from crab_min.sources.av_uie import mask_objects, read_mask
from crab_min.sources.rows import RELEASED_LAYOUTS, read_rows
from crab_min.tasks import TASKS
from crab_min.tools.check import check

BOX = (56, 28, 112, 84)  # of the first object of each mask
COLOURS = ((128, 0, 0), (0, 64, 0))  # of the objects in a mask
# the last one of each task; benchmarks of multiple choice are in test_choices.py
LAYOUTS = {
    layout.task: layout
    for layout in RELEASED_LAYOUTS
    if layout.convert.__module__ != "crab_min.sources.choices"
}
AVS_ROW = {"uid": "x_1", "vid": "x", "s_min": 0, "s_sec": 0, "a_obj": "dog", "label": ""}
DIALOGUE = [
    {"question": "who is there?", "answer": "a man with a cup"},
    {"question": " does he speak?", "answer": "no"},
    {"question": "where is he?", "answer": "in a kitchen"},
]
SCANQA_ROW = {
    "scene_id": "scene0000_00",
    "question_id": "train-scene0000-0",
    "question": "What is beside the bed?",
    "answers": ["A brown chair", "chair"],
}
SQA3D_ROW = {
    "scene_id": "scene0000_00",
    "situation": "I face the door.",
    "question": "Can I leave?",
    "question_id": 220602000000,
    "answers": ["yes"],
}
NEXTQA_ROW = {
    "video": "12",
    "qid": "CW_3",
    "question": "why did he run",
    "a0": "to play",
    "a1": "to eat",
    "a2": "to hide",
    "a3": "to rest",
    "a4": "to win",
    "num_option": 5,
    "answer": 2,
}
MUSIC_ROW = {
    "video_id": "00000093",
    "question_id": 1,
    "type": '["Audio","Counting"]',
    "question_content": "Is the <Object> louder than the <FL> one?",
    "templ_values": '["flute", "first"]',
    "anser": "acoustic_guitar",
}


# --- a data folder with every source --------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_json(path: Path, rows) -> None:
    write_text(path, json.dumps(rows))


def write_csv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def write_frames(folder: Path, masks: Path, count: int, objects: int) -> None:
    """Write frames and masks with objects of one colour each, the first at BOX.

    The last frame has no object.
    """
    folder.mkdir(parents=True)
    masks.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (64, 64), (9 * i, 90, 90)).save(folder / f"{i}.jpg")
        mask = np.zeros((64, 64, 3), np.uint8)
        if i < count - 1:
            for k in range(objects):
                mask[8 + 30 * k : 24 + 30 * k, 16 + 24 * k : 32 + 24 * k] = COLOURS[k]
        name = f"0000{i}.png" if "gt_mask" in str(masks) else f"{i}.png"
        Image.fromarray(mask).save(masks / name)


@pytest.fixture(scope="module")
def v1(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("v1")
    video = root / "clip.mp4"
    audio = root / "clip.mp3"
    noise = np.random.default_rng(0).integers(0, 255, (50, 64, 64, 3), np.uint8)
    wave = np.sin(np.arange(160000) / 5).astype(np.float32) / 2
    write_video(video, noise, wave, fps=5)  # 10 s
    write_audio(audio, wave)
    write_clip_sources(root, video, audio)
    write_frame_sources(root, audio)
    write_pave_crema_sources(root, video)
    return root


def write_clip_sources(root: Path, video: Path, audio: Path) -> None:
    """Crab's MUSIC-AVQA, AVE, AVVP, VALOR and AudioCaps."""
    clips = {
        "music-avqa": "videos/1.mp4",
        "ave/AVE_Dataset": "AVE/v.mp4",
        "avvp": "llp_videos/v.mp4",
        "valor": "video_data/v.mp4",
    }
    for source, file in clips.items():
        copy(video, root / source / file)
        copy(audio, root / source / "audio_data" / f"{Path(file).stem}.mp3")
    copy(audio, root / "audiocaps/audio_data/5.wav")

    reasoning = "One sounds. So the answer is <answer> one </answer>."
    write_text(root / "music-avqa/converted_label/7.txt", reasoning)
    reasoning = "So it is <event> Dog bark </event>, and the time range is <range> 0,8 </range>.\n"
    write_text(root / "ave/AVE_Dataset/converted_label/v.txt", reasoning)

    question = {
        "video_id": "1",
        "question_id": 7,
        "type": '["Audio", "Counting"]',
        "question": "How many sound?",
        "answer": "one",
        "video_path": "/group/someone/data/music-avqa/videos/1.mp4",
        "audio_path": "/group/someone/data/music-avqa/audio_data/1.mp3",
    }
    event = {"event": "Dog bark", "vid": "v", "start_time": 0, "end_time": 8}
    for split in ("valid_train", "test"):
        write_json(root / f"music-avqa/{split}_samples.json", [question])
        write_json(root / f"ave/AVE_Dataset/{split}_samples.json", [event])

    events = "audio: Dog,(0 3) visual: Dog,(0 10)"
    parsed = {"filename": "v_0_10", "vid": "v", "event": events}
    label = "<visual>Dog,(0 10)</visual> and <audio>Dog,(0 3)</audio>"
    write_json(
        root / "avvp/train_samples.json", [{**parsed, "label": label}, {**parsed, "label": None}]
    )
    write_json(root / "avvp/test_samples.json", [parsed])
    write_json(root / "valor/train_samples.json", [{"video_id": "v", "desc": "A dog barks."}])
    caption = {"audiocap_id": 5, "youtube_id": "y", "start_time": 30, "caption": "A dog barks"}
    for split in ("train", "test"):
        write_csv(root / f"audiocaps/{split}.csv", [caption])


def write_frame_sources(root: Path, audio: Path) -> None:
    """Crab's AVSBench, ARIG, Ref-AVS and LVIS: frames with masks or boxes."""
    for version, count, objects in (("v1s", 5, 1), ("v1m", 5, 2), ("v2", 10, 2)):
        clip = root / "AVS" / version / "x_1"
        write_frames(clip / "frames", clip / "labels_rgb", count, objects)
        copy(audio, clip / "audio.wav")
    for name in ("s4", "ms3", "avss"):
        rows = [{**AVS_ROW, "split": split} for split in ("train", "val", "test")]
        write_json(root / f"AVS/{name}_samples.json", rows)

    grounded = {
        "audio_path": "/group/someone/data/AVS/v1s/x_1/audio.wav",
        "frame_path": "/group/someone/data/AVS/v1s/x_1/frames/2.jpg",
        "mask_path": "",
        "top_left": BOX[:2],
        "bottom_right": BOX[2:],
        "a_obj": "dog",
    }
    rows = []
    for split in ("train", "test"):
        rows.append({**grounded, "split": split})
        rows.append({**grounded, "split": split, "top_left": [1000, 1000]})  # nothing sounds
    write_json(root / "AVS/v1s_grounding_samples.json", rows)

    vid = "x_0_10000"
    ref_avs = root / "ref-avs/REFAVS"
    write_frames(ref_avs / f"media/{vid}/frames", ref_avs / f"gt_mask/{vid}/fid_3", 10, 1)
    copy(audio, ref_avs / f"media/{vid}/audio.wav")
    expression = {"vid": vid, "uid": f"{vid}_dog_1", "fid": 3, "exp": "The barking one"}
    splits = ("train", "val", "test_s", "test_n")
    write_csv(ref_avs / "metadata.csv", [{**expression, "split": split} for split in splits])

    copy(root / "AVS/v1s/x_1/frames/0.jpg", root / "lvis/train2017/0.jpg")
    url = "http://images.cocodataset.org/train2017/0.jpg"
    object_row = {"id": 1, "image_id": 4, "category_id": 2, "bbox": [16, 8, 16, 16], "area": 1000}
    content = {
        "images": [{"id": 4, "width": 64, "height": 64, "coco_url": url}],
        "categories": [{"id": 2, "name": "dog_collar", "def": "a collar"}],
        "annotations": [object_row, {**object_row, "id": 2, "area": 999}],
    }
    write_json(root / "lvis/lvis_v1_train.json", content)


def write_pave_crema_sources(root: Path, video: Path) -> None:
    """AVSD, ScanQA, SQA3D and NExT-QA, with some side channels."""
    dialogue = {"image_id": "ABC", "caption": "c", "summary": "s", "dialog": DIALOGUE}
    avsd = LAYOUTS["avsd"]
    for name in (avsd.train, avsd.test):
        write_json(root / "avsd" / name, {"type": "", "version": "0.1", "dialogs": [dialogue]})
    (root / "avsd/videos").mkdir()
    wave = np.sin(np.arange(16000) / 5).astype(np.float32) / 2
    write_video(root / "avsd/videos/ABC.mp4", np.zeros((25, 64, 64, 3), np.uint8), wave)

    for split in ("train", "val"):
        write_json(root / f"scanqa/ScanQA_v1.0_{split}.json", [SCANQA_ROW])
        write_json(root / f"nextqa/nextqa_{split}.json", [NEXTQA_ROW])
    write_json(root / "sqa3d/SQA_train.json", [SQA3D_ROW])
    tested = {**SQA3D_ROW, "answers": [{"answer": "yes", "answer_id": 1}]}
    write_json(root / "sqa3d/SQA_test.json", [tested])
    for file in ("scanqa/videos/scene0000_00.mp4", "sqa3d/videos/scene0000_00.mp4"):
        copy(video, root / file)
    copy(video, root / "nextqa/videos/12.mp4")

    (root / "nextqa/videos_depth/12").mkdir(parents=True)
    (root / "sqa3d/videos_norm/scene0000_00").mkdir(parents=True)
    (root / "sqa3d/voxelized_features_sam_nonzero_preprocess").mkdir()
    (root / "sqa3d/voxelized_features_sam_nonzero_preprocess/scene0000_00.pt").touch()


# --- what is read of it ---------------------------------------------------------------------------


def test_every_source_is_read_with_what_it_leaves_out(v1):
    train_counts = {task: len(read_rows(v1, task, "train")) for task in LAYOUTS}
    # of MS3 every frame with an object, of AVSD every turn
    assert train_counts == dict.fromkeys(LAYOUTS, 1) | {"ms3": 4, "avsd": 3}

    tested = [task for task in LAYOUTS if "test" in TASKS[task].splits and task != "lvis"]
    test_counts = {task: len(read_rows(v1, task, "test")) for task in tested}
    frames = {"s4": 5, "ms3": 5, "avss": 10, "ref_avs": 20}
    assert test_counts == dict.fromkeys(tested, 1) | frames
    assert set(LAYOUTS) - set(tested) == {"avcap", "lvis"}
    assert LAYOUTS["avcap"].test == ""


def test_rows_become_samples_whose_media_load_and_whose_targets_parse_to_their_gold(v1):
    samples = read_samples(v1, pick_tasks("all"), "train")
    assert {s.task.name for s in samples} == set(LAYOUTS)
    for sample in samples:
        if sample.task.name == "ref_avs":
            assert sample.gold.error is None
        else:
            assert sample.task.parse(sample.target) == sample.gold, sample
        for part in sample.media:
            load_media(part, 96)

    by_task = {s.task.name: s for s in samples}
    for task in ("s4", "lvis", "arig"):
        assert by_task[task].gold.boxes == [BOX]
    for task in ("ms3", "avss"):
        assert len(by_task[task].gold.boxes) == 2
    assert by_task["avqa"].gold.choice == "one"
    assert by_task["ave"].gold.events == [("Dog bark", [(0, 8)])]
    assert by_task["lvis"].parts[-1].text == "\nWhere is the dog collar? Give its box."


def test_each_source_has_its_window_of_sound(v1):
    windows = {}
    for sample in read_samples(v1, pick_tasks("all"), "train"):
        windows[sample.task.name] = [p.window for p in sample.media if p.kind == "audio"]
    assert windows["s4"] == windows["ms3"] == windows["arig"] == ["fifths"]
    assert windows["ref_avs"] == ["tenths"] and windows["avss"] == ["tenth"]
    assert windows["avqa"] == ["spread"]


def test_golds_of_test_frames_come_from_their_masks(v1):
    for task, count in (("s4", 5), ("ms3", 5), ("avss", 10), ("ref_avs", 10)):
        golds = [s.gold for s in read_samples(v1, [task], "test")][:count]
        assert BOX in golds[0].boxes and not golds[-1].boxes
    assert golds[0].exists and golds[-1].exists is False


def test_a_dialogue_is_asked_turn_by_turn_in_training_and_at_its_end_in_the_test(v1):
    first, _, last = read_samples(v1, ["avsd"], "train")
    (tested,) = read_samples(v1, ["avsd"], "test")
    ask = "\nAnswer the last question of the dialogue. "
    assert first.parts[-1].text == f"{ask}Question: who is there?"
    assert first.target == "a man with a cup"
    assert last.parts[-1].text == tested.parts[-1].text
    assert tested.parts[-1].text == (
        f"{ask}Question: who is there? Answer: a man with a cup "
        "Question: does he speak? Answer: no Question: where is he?"
    )
    assert last.target == tested.gold.text == "in a kitchen" and tested.target == ""

    path = str(v1 / "avsd/videos/ABC.mp4")
    assert [(p.kind, p.path) for p in tested.media] == [("video", path), ("audio", path)]
    waves, _ = load_media(tested.media[1], 96)
    assert np.abs(waves[5]).max() > 0.1  # the sound of the video itself


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_question_about_a_scene_has_its_situation_its_type_and_all_its_answers(v1, split):
    scanqa, sqa3d = read_samples(v1, ["scanqa", "sqa3d"], split)
    ask = "\nAnswer in a few words: "
    assert scanqa.parts[-1].text == f"{ask}What is beside the bed?"
    assert sqa3d.parts[-1].text == f"{ask}I face the door. Can I leave?"
    assert scanqa.gold.choices == ("A brown chair", "chair") and sqa3d.gold.choices == ("yes",)
    assert [p.kind for p in (*scanqa.media, *sqa3d.media)] == ["video", "video"]
    expected = ("A brown chair", "yes") if split == "train" else ("", "")
    assert (scanqa.target, sqa3d.target) == expected
    assert sqa3d.row["type"] == "can"


@pytest.mark.parametrize(
    "question, expected",
    [
        (" What's there?", "what"),
        ("is it red?", "is"),
        ("How many?", "how"),
        ("Which is near?", "which"),
        ("Am I near?", "other"),
    ],
)
def test_the_type_of_a_question_is_its_first_word(v1, question, expected):
    (row,) = LAYOUTS["sqa3d"].convert(v1 / "sqa3d", {**SQA3D_ROW, "question": question}, False)
    assert row["type"] == expected


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_multiple_choice_has_its_options_its_answer_as_a_text_and_its_type(v1, split):
    (sample,) = read_samples(v1, ["nextqa"], split)
    choices = "to play; to eat; to hide; to rest; to win"
    assert sample.parts[-1].text == f"\nQuestion: why did he run Options: {choices}"
    label = "<answer> to hide</answer>"
    assert sample.gold.choice == "to hide"
    assert sample.target == (label if split == "train" else "")
    assert options(sample)[2] == label and sample.row["type"] == "CW"


def test_rows_name_the_side_channels_that_are_there(v1):
    samples = read_samples(v1, ["scanqa", "sqa3d", "nextqa"], "test")
    scanqa, sqa3d, nextqa = (sample.row for sample in samples)
    assert scanqa["sides"] == {}
    points = "voxelized_features_sam_nonzero_preprocess/scene0000_00.pt"
    assert sqa3d["sides"] == {
        "normals": str(v1 / "sqa3d/videos_norm/scene0000_00"),
        "points": str(v1 / "sqa3d" / points),
    }
    assert nextqa["sides"] == {"depth": str(v1 / "nextqa/videos_depth/12")}


def test_music_avqa_is_read_from_its_own_files_where_those_of_v1_are_not(tmp_path):
    write_json(tmp_path / "music-avqa/avqa-train.json", [MUSIC_ROW])
    (sample,) = read_samples(tmp_path, ["avqa"], "train")
    assert sample.parts[-1].text == "\nQuestion: Is the flute louder than the first one?"
    assert sample.row["type"] == "Audio Counting"
    assert sample.gold.choice == "acoustic guitar"
    assert sample.target == "<answer> acoustic guitar</answer>"
    path = str(tmp_path / "music-avqa/videos/00000093.mp4")
    assert [(p.kind, p.path) for p in sample.media] == [("video", path), ("audio", path)]


def test_objects_of_a_mask_by_columns_by_colour_and_whole(v1):
    mask = read_mask(v1 / "AVS/v2/x_1/labels_rgb/0.png")
    assert [len(mask_objects(mask, task)) for task in ("s4", "ms3", "avss")] == [1, 2, 2]
    assert [len(mask_objects(0 * mask, task)) for task in ("s4", "ms3", "avss")] == [0, 0, 0]


def test_the_check_finds_nothing_wrong(v1):
    report = check(v1, pick_tasks("all"), True, 0)
    assert not report.bad_files and not report.bad_rows
    assert report.splits["avss/test"].rows == 10


def test_a_run_on_all_sources(v1, tmp_path):
    run = tmp_path / "run"
    size = ["--steps", "2", "--batch-size", "8", "--test-rows", "1", "--r", "4", "--alpha", "8"]
    assert train.main(["--data", str(v1), "--out", str(run), *size]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["tasks"]) == set(LAYOUTS) - {"avcap", "lvis"}


# --- rows that are not as released ----------------------------------------------------------------

SECOND_BROKEN = [
    {"image_id": "x", "dialog": DIALOGUE},
    {"image_id": "x", "dialog": [{"question": "why?"}]},
]
NO_ANSWER = [{"image_id": "x", "dialog": [{"question": "why?", "answer": None}, *DIALOGUE]}]
ONE_VALUE = {**MUSIC_ROW, "templ_values": '["flute"]'}
OBJECTS = [{"text": "yes"}]


@pytest.mark.parametrize(
    "task, rows, message",
    [
        ("ave", [{"event": "Dog"}], "row 0: KeyError: 'vid'"),
        ("ave", [{"event": "Dog", "vid": "w"}], "w.txt"),
        ("avsd", {"dialogs": SECOND_BROKEN}, "row 1: KeyError: 'answer'; a row of avsd"),
        ("avsd", {"dialogs": NO_ANSWER}, "row 0: AttributeError"),
        ("avsd", {"dialog": []}, "expected a list of objects"),
        (
            "scanqa",
            [{**SCANQA_ROW, "answers": []}],
            "row 0: .*scanqa: field 'answers' must be a list of texts",
        ),
        (
            "sqa3d",
            [{**SQA3D_ROW, "answers": "yes"}],
            "sqa3d: field 'answers' must be a list of texts.* got 'yes'",
        ),
        ("sqa3d", [{**SQA3D_ROW, "answers": OBJECTS}], "objects with a text under"),
        ("nextqa", [{**NEXTQA_ROW, "num_option": 6}], "row 0: KeyError: 'a5'; a row of nextqa"),
        (
            "nextqa",
            [{**NEXTQA_ROW, "answer": 5}],
            "nextqa: field 'answer', 'multi_choice' must be the index of the right option",
        ),
        ("avqa", [MUSIC_ROW, ONE_VALUE], "row 1: IndexError.*a row of avqa"),
    ],
)
def test_a_row_that_is_not_as_released_is_named(tmp_path, task, rows, message):
    layout = LAYOUTS[task]
    write_json(tmp_path / layout.folder / layout.train, rows)
    with pytest.raises(DataError, match=message):
        read_samples(tmp_path, [task], "train")
