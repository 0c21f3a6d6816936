"""AV-UIE v1 and the sources of PAVE and CREMA as released: a copy made of the built-in world's media, every source with rows to keep and rows to leave out."""
import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import train
from crab_min.data import load_media, pick_tasks, read_samples
from crab_min.errors import DataError
from crab_min.evaluation.answering import options
from crab_min.media.read import write_video
from crab_min.sources.av_uie import RELEASED_LAYOUTS, mask_objects, read_mask, read_rows
from crab_min.tasks import TASKS
from crab_min.tools.check import check

CLIP = {"uid": "x_1", "vid": "x", "s_min": 0, "s_sec": 0, "a_obj": "dog", "label": ""}
TURNS = [{"question": "who is there?", "answer": "a man with a cup"}, {"question": " does he speak?", "answer": "no"}, {"question": "where is he?", "answer": "in a kitchen"}]
ASKED = {"scene_id": "scene0000_00", "question_id": "train-scene0000-0", "question": "What is beside the bed?", "answers": ["A brown chair", "chair"]}
PLACED = {"scene_id": "scene0000_00", "situation": "I face the door.", "question": "Can I leave?", "question_id": 220602000000, "answers": ["yes"]}
CHOICE = {"video": "12", "qid": "CW_3", "question": "why did he run", **{f"a{i}": f"to {do}" for i, do in enumerate(("play", "eat", "hide", "rest", "win"))}, "num_option": 5, "answer": 2}
MUSIC = {"video_id": "00000093", "question_id": 1, "type": '["Audio","Counting"]', "question_content": "Is the <Object> louder than the <FL> one?",
         "templ_values": '["flute", "first"]', "anser": "acoustic_guitar"}
BOX, COLOURS = (56, 28, 112, 84), ((128, 0, 0), (0, 64, 0))


def write_json(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def frames(folder, masks, count, things):
    """`count` frames and their masks in the two folders: `things` objects of a colour each, the first at BOX; the last frame has none."""
    for place in (folder, masks):
        place.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (64, 64), (9 * i, 90, 90)).save(folder / f"{i}.jpg")
        mask = np.zeros((64, 64, 3), np.uint8)
        for k in range(things if i < count - 1 else 0):
            mask[8 + 30 * k:24 + 30 * k, 16 + 24 * k:32 + 24 * k] = COLOURS[k]
        name = f"0000{i}.png" if "gt_mask" in str(masks) else f"{i}.png"
        Image.fromarray(mask).save(masks / name)


@pytest.fixture(scope="module")
def v1(tmp_path_factory, small_world):
    root, video, sound = tmp_path_factory.mktemp("v1"), *(sorted((small_world / "ave" / kind).iterdir())[0] for kind in ("video", "audio"))

    def copy(source, to):
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, to)
    for folder, name, kind in (("music-avqa", "1", "videos"), ("ave/AVE_Dataset", "v", "AVE"), ("avvp", "v", "llp_videos"), ("valor", "v", "video_data")):
        copy(video, root / folder / kind / f"{name}.mp4")
        copy(sound, root / folder / "audio_data" / f"{name}.mp3")
    for name in ("music-avqa/converted_label/7.txt", "ave/AVE_Dataset/converted_label/v.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("One sounds. So the answer is <answer> one </answer>." if "avqa" in name else
                                 "So it is <event> Dog bark </event>, and the time range is <range> 0,8 </range>.\n")
    question = {"video_id": "1", "question_id": 7, "type": '["Audio", "Counting"]', "question": "How many sound?", "answer": "one",
                "video_path": "/group/someone/data/music-avqa/videos/1.mp4", "audio_path": "/group/someone/data/music-avqa/audio_data/1.mp3"}
    event = {"event": "Dog bark", "vid": "v", "start_time": 0, "end_time": 8}
    parsed = {"filename": "v_0_10", "vid": "v", "event": "audio: Dog,(0 3) visual: Dog,(0 10)"}
    for split in ("valid_train", "test"):
        write_json(root / f"music-avqa/{split}_samples.json", [question])
        write_json(root / f"ave/AVE_Dataset/{split}_samples.json", [event])
    write_json(root / "avvp/train_samples.json", [{**parsed, "label": "<visual>Dog,(0 10)</visual> and <audio>Dog,(0 3)</audio>"}, {**parsed, "label": None}])
    write_json(root / "avvp/test_samples.json", [parsed])
    write_json(root / "valor/train_samples.json", [{"video_id": "v", "desc": "A dog barks."}])
    for version, count, things in (("v1s", 5, 1), ("v1m", 5, 2), ("v2", 10, 2)):
        frames(root / f"AVS/{version}/x_1/frames", root / f"AVS/{version}/x_1/labels_rgb", count, things)
        copy(sound, root / f"AVS/{version}/x_1/audio.wav")
    for name in ("s4", "ms3", "avss"):
        write_json(root / f"AVS/{name}_samples.json", [{**CLIP, "split": split} for split in ("train", "val", "test")])
    grounded = {"audio_path": "/group/someone/data/AVS/v1s/x_1/audio.wav", "frame_path": "/group/someone/data/AVS/v1s/x_1/frames/2.jpg",
                "mask_path": "", "top_left": BOX[:2], "bottom_right": BOX[2:], "a_obj": "dog"}
    write_json(root / "AVS/v1s_grounding_samples.json", [{**grounded, "split": split, **more} for split in ("train", "test") for more in ({}, {"top_left": [1000, 1000]})])
    vid = "x_0_10000"
    frames(root / f"ref-avs/REFAVS/media/{vid}/frames", root / f"ref-avs/REFAVS/gt_mask/{vid}/fid_3", 10, 1)
    copy(sound, root / f"ref-avs/REFAVS/media/{vid}/audio.wav")
    write_csv(root / "ref-avs/REFAVS/metadata.csv", [{"vid": vid, "uid": f"{vid}_dog_1", "split": split, "fid": 3, "exp": "The barking one"} for split in ("train", "val", "test_s", "test_n")])
    copy(sound, root / "audiocaps/audio_data/5.wav")
    for split in ("train", "test"):
        write_csv(root / f"audiocaps/{split}.csv", [{"audiocap_id": 5, "youtube_id": "y", "start_time": 30, "caption": "A dog barks"}])
    copy(root / "AVS/v1s/x_1/frames/0.jpg", root / "lvis/train2017/0.jpg")
    thing = {"id": 1, "image_id": 4, "category_id": 2, "bbox": [16, 8, 16, 16], "area": 1000}
    write_json(root / "lvis/lvis_v1_train.json", {
        "images": [{"id": 4, "width": 64, "height": 64, "coco_url": "http://images.cocodataset.org/train2017/0.jpg"}],
        "categories": [{"id": 2, "name": "dog_collar", "def": "a collar"}], "annotations": [thing, {**thing, "id": 2, "area": 999}]})
    for name in ("train_set4DSTC7-AVSD.json", "mock_test_set4DSTC10-AVSD_from_DSTC7_singref.json"):
        write_json(root / "avsd" / name, {"type": "", "version": "0.1", "dialogs": [{"image_id": "ABC", "caption": "c", "summary": "s", "dialog": TURNS}]})
    for split, other in (("train", "train"), ("val", "test")):
        write_json(root / f"scanqa/ScanQA_v1.0_{split}.json", [ASKED])
        write_json(root / f"sqa3d/SQA_{other}.json", [PLACED if split == "train" else {**PLACED, "answers": [{"answer": "yes", "answer_id": 1}]}])
    for name in ("scanqa", "sqa3d"):
        copy(video, root / name / "videos/scene0000_00.mp4")
    for split in ("train", "val"):
        write_json(root / f"nextqa/nextqa_{split}.json", [CHOICE])
    copy(video, root / "nextqa/videos/12.mp4")
    for name in ("nextqa/videos_depth/12", "sqa3d/videos_norm/scene0000_00", "sqa3d/voxelized_features_sam_nonzero_preprocess/scene0000_00.pt"):
        (root / name).mkdir(parents=True)
    (root / "avsd/videos").mkdir()
    write_video(root / "avsd/videos/ABC.mp4", np.zeros((25, 64, 64, 3), np.uint8), np.sin(np.arange(16000) / 5).astype(np.float32) / 2)
    return root


def test_every_source_is_read_with_what_it_leaves_out(v1):
    counts = {split: {task: len(read_rows(v1, task, split)) for task in RELEASED_LAYOUTS if split in TASKS[task].splits and (split, task) != ("test", "lvis")} for split in ("train", "test")}
    assert counts["train"] == dict.fromkeys(RELEASED_LAYOUTS, 1) | {"ms3": 4, "avsd": 3}     # of MS3 every frame with an object, of AVSD every turn
    assert counts["test"] == {"avqa": 1, "ave": 1, "avvp": 1, "s4": 5, "ms3": 5, "avss": 10, "arig": 1, "ref_avs": 20, "audiocaps": 1, "avsd": 1, "scanqa": 1, "sqa3d": 1, "nextqa": 1}


def test_rows_of_v1_become_samples_whose_media_load_and_whose_targets_parse_to_their_gold(v1):
    samples = read_samples(v1, pick_tasks("all"), "train")
    assert {s.task.name for s in samples} == set(RELEASED_LAYOUTS)
    for sample in samples:
        assert sample.task.parse(sample.target) == sample.gold or sample.task.name == "ref_avs" and sample.gold.error is None, sample
        for part in sample.media:
            load_media(part, 96)
    by_task = {s.task.name: s for s in samples}
    assert by_task["s4"].gold.boxes == by_task["lvis"].gold.boxes == by_task["arig"].gold.boxes == [BOX]
    assert len(by_task["ms3"].gold.boxes) == len(by_task["avss"].gold.boxes) == 2
    assert by_task["avqa"].gold.choice == "one" and by_task["ave"].gold.events == [("Dog bark", [(0, 8)])]
    windows = {name: [p.window for p in s.media if p.kind == "audio"] for name, s in by_task.items()}
    assert windows["s4"] == windows["ms3"] == windows["arig"] == ["fifths"] and windows["ref_avs"] == ["tenths"] and windows["avss"] == ["tenth"]
    assert windows["avqa"] == ["spread"] and by_task["lvis"].parts[-1].text == "\nWhere is the dog collar? Give its box."


def test_golds_of_test_frames_come_from_their_masks(v1):
    for task, count in (("s4", 5), ("ms3", 5), ("avss", 10), ("ref_avs", 10)):
        golds = [s.gold for s in read_samples(v1, [task], "test")][:count]
        assert BOX in golds[0].boxes and not golds[-1].boxes
    assert golds[0].exists and golds[-1].exists is False


def test_a_dialogue_is_asked_turn_by_turn_in_training_and_at_its_end_in_the_test(v1):
    first, _, last = read_samples(v1, ["avsd"], "train")
    tested, = read_samples(v1, ["avsd"], "test")
    ask = "\nAnswer the last question of the dialogue. "
    assert (first.parts[-1].text, first.target) == (ask + "Question: who is there?", "a man with a cup")
    assert last.parts[-1].text == tested.parts[-1].text == ask + "Question: who is there? Answer: a man with a cup Question: does he speak? Answer: no Question: where is he?"
    assert last.target == tested.gold.text == "in a kitchen" and tested.target == ""
    assert [(p.kind, p.path) for p in tested.media] == [(kind, str(v1 / "avsd/videos/ABC.mp4")) for kind in ("video", "audio")]
    assert np.abs(load_media(tested.media[1], 96)[0][5]).max() > .1                            # the sound of the film itself


def test_a_question_about_a_scene_has_its_situation_its_type_and_all_its_answers(v1):
    for split in ("train", "test"):
        asked, placed = read_samples(v1, ["scanqa", "sqa3d"], split)
        assert asked.parts[-1].text == "\nAnswer in a few words: What is beside the bed?" and asked.gold.choices == ("A brown chair", "chair")
        assert placed.parts[-1].text == "\nAnswer in a few words: I face the door. Can I leave?" and placed.gold.choices == ("yes",)
        assert [p.kind for p in (*asked.media, *placed.media)] == ["video", "video"]
        assert (asked.target, placed.target) == (("A brown chair", "yes") if split == "train" else ("", "")) and placed.row["type"] == "can"
    kinds = {" What's there?": "what", "is it red?": "is", "How many?": "how", "Which is near?": "which", "Am I near?": "other"}
    assert {q: next(RELEASED_LAYOUTS["sqa3d"][0].convert(v1 / "sqa3d", {**PLACED, "question": q}, False))["type"] for q in kinds} == kinds


def test_a_multiple_choice_has_its_options_its_answer_as_a_text_and_its_type(v1):
    for split in ("train", "test"):
        sample, = read_samples(v1, ["nextqa"], split)
        assert sample.parts[-1].text == "\nQuestion: why did he run Options: to play; to eat; to hide; to rest; to win"
        assert (sample.gold.choice, sample.target) == ("to hide", "<answer> to hide</answer>" if split == "train" else "")
        assert options(sample)[2] == "<answer> to hide</answer>" and sample.row["type"] == "CW"


def test_rows_name_the_side_channels_that_are_there(v1):
    asked, placed, choice = (s.row for s in read_samples(v1, ["scanqa", "sqa3d", "nextqa"], "test"))
    assert choice["sides"] == {"depth": str(v1 / "nextqa/videos_depth/12")} and "sides" not in asked
    assert placed["sides"] == {"normals": str(v1 / "sqa3d/videos_norm/scene0000_00"), "points": str(v1 / "sqa3d/voxelized_features_sam_nonzero_preprocess/scene0000_00.pt")}


def test_music_avqa_is_read_from_its_own_files_where_those_of_v1_are_not(tmp_path):
    write_json(tmp_path / "music-avqa/avqa-train.json", [MUSIC])
    sample, = read_samples(tmp_path, ["avqa"], "train")
    assert sample.parts[-1].text == "\nQuestion: Is the flute louder than the first one?" and sample.row["type"] == "Audio Counting"
    assert sample.gold.choice == "acoustic guitar" and sample.target == "<answer> acoustic guitar</answer>"
    assert [(p.kind, p.path) for p in sample.media] == [(kind, str(tmp_path / "music-avqa/videos/00000093.mp4")) for kind in ("video", "audio")]


def test_a_run_on_v1_and_its_check(v1, tmp_path):
    found = check(v1, pick_tasks("all"), True, 0)
    assert not found.bad_files and not found.bad_rows and found.splits["avss/test"].rows == 10
    run = tmp_path / "run"
    assert train.main(["--data", str(v1), "--steps", "2", "--batch-size", "8", "--test-rows", "2", "--out", str(run), "--r", "4", "--alpha", "8"]) == 0
    assert set(json.loads((run / "metrics.json").read_text())["tasks"]) == {t for t in RELEASED_LAYOUTS if t not in ("avcap", "lvis")}


def test_objects_of_a_mask_by_columns_by_colour_and_whole(v1):
    mask = read_mask(v1 / "AVS/v2/x_1/labels_rgb/0.png")
    assert [len(mask_objects(mask, task)) for task in ("s4", "ms3", "avss")] == [1, 2, 2]


@pytest.mark.parametrize("task, rows, message", [
    ("ave", [{"event": "Dog"}], "row 0: KeyError: 'vid'"),
    ("ave", [{"event": "Dog", "vid": "w"}], "w.txt"),
    ("avsd", {"dialogs": [{"image_id": "x", "dialog": TURNS}, {"image_id": "x", "dialog": [{"question": "why?"}]}]}, "row 1: KeyError: 'answer'; a row of avsd"),
    ("avsd", {"dialogs": [{"image_id": "x", "dialog": [{"question": "why?", "answer": None}, *TURNS]}]}, "row 0: AttributeError"),
    ("avsd", {"dialog": []}, "expected a list of objects"),
    ("scanqa", [{**ASKED, "answers": []}], "row 0: .*scanqa: field 'answers' must be a list of texts"),
    ("sqa3d", [{**PLACED, "answers": "yes"}], "sqa3d: field 'answers' must be a list of texts.* got 'yes'"),
    ("sqa3d", [{**PLACED, "answers": [{"text": "yes"}]}], "objects with a text under"),
    ("nextqa", [{**CHOICE, "num_option": 6}], "row 0: KeyError: 'a5'; a row of nextqa"),
    ("nextqa", [{**CHOICE, "answer": 5}], "nextqa: field 'answer', 'multi_choice' must be the index of the right option"),
    ("avqa", [MUSIC, {**MUSIC, "templ_values": '["flute"]'}], "row 1: IndexError.*a row of avqa"),
])
def test_a_row_that_is_not_as_released_is_named(tmp_path, task, rows, message):
    write_json(tmp_path / RELEASED_LAYOUTS[task][-1].folder / RELEASED_LAYOUTS[task][-1].files[0], rows)
    with pytest.raises(DataError, match=message):
        read_samples(tmp_path, [task], "train")
