"""Benchmarks of multiple choice in their released forms: VideoMME to VGGSound, by made rows.

Forms: crema_pave.md 5 and 6; those of the benchmarks are their own pages'.
"""

import json
import shutil

import numpy as np
import pytest

import train
from crab_min.data import load_media, read_samples
from crab_min.errors import DataError
from crab_min.evaluation.answering import options
from crab_min.media.write import write_video
from crab_min.side_channels import add_side_channels

VIDEOMME = {
    "video_id": "001",
    "duration": "short",
    "videoID": "fFjv93ACGo8",
    "task_type": "Counting Problem",
    "question_id": "001-1",
    "question": "How many?",
    "options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. All the same."],
    "answer": "C",
}
MVBENCH = {
    "video": "166583.webm",
    "question": "What moves?",
    "candidates": ["the cube", "the ball"],
    "answer": "the ball",
}
SENSED = {"video_id": "7", "question_id": 12, "start": 30, "end": 90, "question": "Is it soft?"}
SENSED |= {"a0": "yes", "a1": "no", "num_option": 2, "answer": 1}
PERCEPTION = {"id": 3, "question": "Which fell?", "options": ["cup", "pen", "none"], "answer_id": 1}
PERCEPTION |= {"area": "physics", "reasoning": "descriptive", "tag": ["motion"]}
AVQA = {"id": 1, "video_name": "clip_1", "question_text": "What sounds?", "answer": 1}
AVQA |= {"multi_choice": ["rain", "horse"], "question_relation": "Sound", "question_type": "Which"}
VIEWS = {"exo2": "takes/t/b.mp4", "ego": "takes/t/aria.mp4", "exo1": "takes/t/a.mp4"}
EGOEXO = {"take_uid": "uid-1", "scenario_name": "Music", "proficiency_score": "Early Expert"}
EGOEXO |= {"video_paths": VIEWS}


def write(path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A data folder with one row of each benchmark, and its clip."""
    root = tmp_path_factory.mktemp("released")
    wave = np.sin(np.arange(32000) / 5).astype(np.float32) / 2
    write_video(root / "x.mp4", np.zeros((10, 16, 16, 3), np.uint8), wave, fps=5)
    write(root / "videomme/videomme.json", [VIDEOMME])
    timed = {**MVBENCH, "video": "y.mp4", "start": 0.5, "end": 1.5}
    write(root / "mvbench/json/object_shuffle.json", [MVBENCH])
    write(root / "mvbench/json/action_sequence.json", [timed])
    write(
        root / "mlvu/json/1_plotQA.json", [MVBENCH | {"video": "m.mp4", "question_type": "plotQA"}]
    )
    write(
        root / "mlvu/json/9_summary.json", [{"video": "s.mp4", "question": "?", "answer": "A man."}]
    )
    for split in ("train", "test"):
        write(root / f"touchqa/touchqa_{split}.json", [SENSED])
        write(root / f"thermalqa/thermalqa_{split}.json", [SENSED])
    for split, avqa in (("train", "train"), ("valid", "val")):
        mc = {"video_9": {"metadata": {"split": split}, "mc_question": [PERCEPTION]}}
        write(root / f"perceptiontest/mc_question_{split}.json", mc)
        write(root / f"avqa/{avqa}_qa.json", [AVQA])
    for split in ("train", "val"):
        name = f"egoexo/annotations/proficiency_demonstrator_{split}.json"
        write(root / name, {"annotations": [EGOEXO]})
    lines = ['"---g-f_I2yQ",1,"people marching",test', '"--0PQM4-hqg",30,"waterfall",train']
    write(root / "vggsound/vggsound.csv", "\n".join(lines) + "\n")

    clips = "videomme/videos/fFjv93ACGo8 mvbench/video/y mlvu/video/1_plotQA/m touchqa/clips/12 "
    clips += "thermalqa/clips/12 perceptiontest/videos/video_9 avqa/videos/clip_1 "
    clips += "egoexo/takes/t/aria egoexo/takes/t/a egoexo/takes/t/b "
    clips += "vggsound/videos/---g-f_I2yQ_000001 vggsound/videos/--0PQM4-hqg_000030"
    for clip in [*clips.split(), "mvbench/video/166583"]:
        suffix = ".webm" if clip.endswith("166583") else ".mp4"
        path = root / (clip + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "x.mp4", path)
    return root


# task -> question in the prompt, options, gold label, type of the test row
EXPECTED = {
    "videomme": ("How many?", ["Apples.", "Candles.", "Berries.", "All the same."], "Berries."),
    "mvbench": ("What moves?", ["the cube", "the ball"], "the ball"),
    "mlvu": ("What moves?", ["the cube", "the ball"], "the ball"),
    "touchqa": ("Is it soft?", ["yes", "no"], "no"),
    "thermalqa": ("Is it soft?", ["yes", "no"], "no"),
    "perceptiontest": ("Which fell?", ["cup", "pen", "none"], "pen"),
    "avqa_thu": ("What sounds?", ["rain", "horse"], "horse"),
}


@pytest.mark.parametrize("task", EXPECTED)
def test_a_released_row_becomes_a_question_with_options(released, task):
    question, choices, gold = EXPECTED[task]
    samples = read_samples(released, [task], "test")
    for sample in samples:
        text = f"\nQuestion: {question} Options: {'; '.join(choices)}"
        assert sample.parts[-1].text == text
        assert sample.gold.choice == gold and sample.target == ""
        assert options(sample)[choices.index(gold)] == f"<answer> {gold}</answer>"
        frames, _ = load_media(sample.media[0], 16)
        assert len(frames) == 10
    if task not in ("videomme", "mvbench", "mlvu"):  # these have no training rows
        (sample,) = read_samples(released, [task], "train")
        assert sample.target == f"<answer> {gold}</answer>"


def test_types_parts_of_clips_and_what_is_left_out(released):
    first, second = read_samples(released, ["mvbench"], "test")
    assert [s.row["type"] for s in (first, second)] == ["action_sequence", "object_shuffle"]
    assert (first.media[0].start, first.media[0].end) == (0.5, 1.5)
    (plot,) = read_samples(released, ["mlvu"], "test")  # a summary has no options
    assert plot.row["type"] == "1_plotQA"
    (short,) = read_samples(released, ["videomme"], "test")
    assert short.row["type"] == "short"


def test_a_take_has_its_exo_views_as_one_side_channel(released, tmp_path):
    (sample,) = read_samples(released, ["egoexo"], "train")
    assert sample.gold.choice == "early expert"
    (viewed,) = add_side_channels([sample], ["view"])
    takes = str(released / "egoexo/takes/t")
    paths = [part.path for part in viewed.media]
    assert paths == [f"{takes}/aria.mp4", f"{takes}/a.mp4", f"{takes}/b.mp4"]
    # features of the views lie in a folder named by the take
    (tmp_path / "uid-1").mkdir()
    for name in ("exo1", "exo2"):
        np.save(tmp_path / f"uid-1/{name}.npy", np.zeros((32, 196, 1152), np.float16))
    (stored,) = add_side_channels([sample], ["view"], folders={"view": str(tmp_path)})
    assert [part.path for part in stored.media[1:]] == [
        str(tmp_path / "uid-1/exo1.npy"),
        str(tmp_path / "uid-1/exo2.npy"),
    ]


def test_vggsound_has_no_header_and_names_its_split(released):
    (train_row,) = read_samples(released, ["vggsound"], "train")
    (test_row,) = read_samples(released, ["vggsound"], "test")
    assert train_row.gold.choice == "waterfall" and test_row.gold.choice == "people marching"
    assert [part.kind for part in test_row.media] == ["video", "audio"]


def test_a_row_that_is_not_as_released_is_named(tmp_path):
    write(tmp_path / "videomme/videomme.json", [{**VIDEOMME, "answer": "berries"}])
    with pytest.raises(DataError, match="row 0: ValueError.*a row of videomme as released"):
        read_samples(tmp_path, ["videomme"], "test")


# --- PAVE's training files ------------------------------------------------------------------------
def test_rows_in_llavas_form_have_all_their_turns(released, tmp_path):
    """As PAVE trains on them; the video is known by the name before its first point."""
    turns = [("human", "<image>\nWho is there?"), ("gpt", "a man")]
    turns += [("human", "Does he speak?"), ("gpt", "no")]
    conversations = [{"from": role, "value": text} for role, text in turns]
    row = {"id": 1, "video": "Charades/ABC.0.mp4", "conversations": conversations}
    (tmp_path / "videos").mkdir()
    shutil.copy(released / "x.mp4", tmp_path / "videos/ABC.mp4")
    write(tmp_path / "train.json", [row])
    write(tmp_path / "lines.jsonl", json.dumps(row) + "\n")
    for name in ("train.json", "lines.jsonl"):
        first, second = read_samples(tmp_path / name, [], "train")
        assert (first.target, second.target) == ("a man", "no")
        assert [part.path for part in second.media] == [str(tmp_path / "videos/ABC.mp4")]
        assert [part.role for part in second.parts if part.role] == ["assistant"]
    (with_side, _) = add_side_channels([first, second], ["fast"])
    assert [part.kind for part in with_side.media] == ["video", "fast"]
    write(tmp_path / "train.json", {"rows": []})
    with pytest.raises(DataError, match="expected a list of objects of the form"):
        read_samples(tmp_path / "train.json", [], "train")


def test_exo_views_train_one_patch(released, tmp_path):
    command = "pave-tiny --no-compare-lora --side view --tasks egoexo --target label --steps 2"
    small = "--batch-size 1 --no-baseline --workers 0 --data".split()
    out = ["--out", str(tmp_path / "run")]
    assert train.main([*command.split(), *small, str(released), *out]) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["tasks"]["egoexo"]["n"] == 1
