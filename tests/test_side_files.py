"""Side features as they are released: by shape, by folder, of several views; one patch frozen."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import train
from crab_min.backbones.load import load_model
from crab_min.config import BackboneConfig, DataConfig, PaveSettings, SideChannelConfig, with_values
from crab_min.data import read_samples
from crab_min.encoders import MediaFeatures, interleave_views
from crab_min.errors import DataError, MediaError, ModelError, RunError
from crab_min.features import Features
from crab_min.media.arrays import read_array
from crab_min.media.read import media_seconds, read_video
from crab_min.recipes import pave
from crab_min.runs.asking import asking_words
from crab_min.side_channels import add_side_channels
from crab_min.sources.own import question_form
from crab_min.trained_parts import read_part

SMALL = "--steps 2 --batch-size 2 --test-rows 2 --no-baseline --r 2 --alpha 4 --workers 0"


def run_train(command: str, *more: str) -> int:
    """Run train.py on a few steps and return its exit code."""
    try:
        return train.main([*command.split(), *more, *SMALL.split()])
    except SystemExit as refused:
        return refused.code


# --- by shape -------------------------------------------------------------------------------------
# crema_pave.md 3.3 and 6: the shape in the file -> steps, tokens, width as PAVE's loader gives them
@pytest.mark.parametrize(
    "released, expected",
    [
        ((1, 18432, 1024), (32, 576, 1024)),  # LLaVA-3D, video_features.pt
        ((240, 5, 1024), (240, 4, 1024)),  # LanguageBind, class token first
        ((59, 1024), (59, 1, 1024)),  # ImageBind
        ((32, 196, 1152), (32, 196, 1152)),  # one exo view of SigLIP
        ((7, 4, 1024), (7, 4, 1024)),
    ],
)
def test_released_features_by_shape(tmp_path, released, expected):
    file = tmp_path / "x.pt"
    features = torch.zeros(released, dtype=torch.bfloat16)
    features.view(-1)[:1024] = 1  # the first token
    torch.save(features, file)
    read = read_array(str(file), 32, 24)
    assert read.shape == expected
    # a class token that comes first is the one that is left out
    assert read[0, 0].any() == (released != (240, 5, 1024))


def test_frames_of_a_scene_keep_their_order(tmp_path):
    scene = torch.arange(32.0).repeat_interleave(576)[None, :, None].expand(1, 18432, 4)
    torch.save(scene.clone(), tmp_path / "video_features.pt")
    steps = read_array(str(tmp_path / "video_features.pt"), 32, 24)
    assert steps[:, :, 0].min(1).tolist() == steps[:, :, 0].max(1).tolist() == list(range(32))


# --- by folder ------------------------------------------------------------------------------------
@pytest.fixture
def clips(small_world):
    """Two training samples of the world with a video and its sound."""
    return read_samples(small_world, ["avqa"], "train")[:2]


def name_of(sample) -> str:
    path = next(part.path for part in sample.media if part.kind == "video")
    return path.rsplit("/", 1)[1].removesuffix(".mp4")


def test_features_are_found_by_the_name_of_the_clip(clips, tmp_path):
    names = [name_of(sample) for sample in clips]
    np.save(tmp_path / f"{names[0]}.npy", np.zeros((3, 8), np.float32))
    scene = tmp_path / names[1]
    scene.mkdir()
    torch.save(torch.zeros(1, 1152, 8), scene / "video_features.pt")
    changed = add_side_channels(clips, ["audio"], folders={"audio": str(tmp_path)})
    (first,), (second,) = ([p for p in s.media if p.side] for s in changed)
    assert (first.kind, first.path) == ("array", str(tmp_path / f"{names[0]}.npy"))
    assert second.path == str(scene / "video_features.pt")
    assert read_array(second.path, 2, 24).shape == (2, 576, 8)


def test_what_is_missing_or_of_another_width_is_named(clips, tmp_path, tiny_model):
    np.save(tmp_path / f"{name_of(clips[0])}.npy", np.zeros((3, 8), np.float32))
    folders = {"audio": str(tmp_path)}
    with_sides = add_side_channels(clips, ["audio"], folders=folders)
    missing = tmp_path / f"{name_of(clips[1])}.npy"
    if missing.exists():  # both rows ask about one clip
        pytest.skip("the world changed: take rows of two clips")
    for keep in (True, False):
        with pytest.raises(DataError, match=f"{missing.name}: no such file"):
            Features(tiny_model, keep=keep).prepare(with_sides)
    np.save(missing, np.zeros((3, 9), np.float32))
    with pytest.raises(DataError, match="side channel audio [89] wide, in .* [89]; give files of"):
        Features(tiny_model).prepare(with_sides)

    with pytest.raises(DataError, match="--features audio=nowhere: no such folder"):
        add_side_channels(clips, ["audio"], folders={"audio": "nowhere"})
    with pytest.raises(RunError, match="--features audio: give NAME=FOLDER"):
        DataConfig(features="audio")


def test_features_of_no_side_channel_of_the_run_are_refused(small_world, tmp_path, capsys):
    command = f"pave-tiny --no-compare-lora --features depth={tmp_path} --data"
    assert run_train(command, str(small_world), "--out", str(tmp_path / "run")) == 2
    assert "--features depth=...: the run's side channels are audio" in capsys.readouterr().err


# --- folders of frames ----------------------------------------------------------------------------
def write_frames(folder, count):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")


def test_a_scene_of_frames_is_a_clip(tmp_path):
    """32 numbered frames are PAVE's 32 frames, in the order of their numbers."""
    write_frames(tmp_path / "scanqa/videos/scene0000_00", 32)
    row = {"scene_id": "scene0000_00", "question": "What is red?", "answers": ["a bed"]}
    (tmp_path / "scanqa/ScanQA_v1.0_val.json").write_text(json.dumps([row]))
    (sample,) = read_samples(tmp_path, ["scanqa"], "test")
    (video,) = sample.media
    frames = read_video(video.path, 32, 8)
    assert frames.frames[:, 0, 0, 0].tolist() == list(range(32))
    assert media_seconds(video.path) == 32.0
    half = read_video(video.path, 4, 8, window=(16.0, 32.0))
    assert half.frames[:, 0, 0, 0].tolist() == [18, 22, 26, 30]

    shutil.rmtree(tmp_path / "scanqa/videos/scene0000_00")
    (tmp_path / "scanqa/videos/scene0000_00").mkdir()
    with pytest.raises(MediaError, match="a folder without pictures"):
        read_video(video.path, 32, 8)


def test_a_run_whose_only_clip_cannot_be_read_says_so(tmp_path, capsys):
    (tmp_path / "x").mkdir()  # a folder without frames
    turns = [("user", "<video>What?"), ("assistant", "<answer>a</answer>")]
    messages = [{"role": role, "content": text} for role, text in turns]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages, "videos": ["x"]}))
    rows = str(tmp_path / "rows.jsonl")
    assert run_train("crab_plus-tiny", "--data", rows, "--out", str(tmp_path / "run")) == 2
    out, error = capsys.readouterr()
    assert "x: a folder without pictures" in out
    assert f"{rows}: no row to train on is left" in error


# --- several views in one patch -------------------------------------------------------------------
def test_views_are_interleaved_step_by_step():
    """Four exo views of 32 steps are 128 steps: all views of a step, then the next step."""
    views = [MediaFeatures("array", torch.full((32, 2, 3), float(i))) for i in range(4)]
    together = interleave_views("view", views)
    assert together.features.shape == (128, 2, 3)
    assert together.features[:5, 0, 0].tolist() == [0, 1, 2, 3, 0]
    with pytest.raises(ModelError, match="side channel view: views of different shapes"):
        interleave_views("view", [views[0], MediaFeatures("array", torch.zeros(31, 2, 3))])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_views_of_a_folder_go_through_one_patch(clips, tmp_path, count):
    folder = tmp_path / name_of(clips[0])
    folder.mkdir()
    for i in range(count):
        torch.save(torch.randn(10, 4, 6), folder / f"cam{i}.pt")
    (sample,) = add_side_channels(clips[:1], ["view"], folders={"view": str(tmp_path)})
    model = load_model(BackboneConfig())
    features = Features(model)([sample])
    batch = model.collate([sample.parts], features, [sample.target])
    assert batch.media[0].sides["view"].features.shape == (10 * count, 4, 6)
    before = model.token_losses(batch)
    model.add_side_channel("view", 6, SideChannelConfig(width=32, layers=1))
    assert torch.equal(model.token_losses(batch), before)
    torch.nn.init.normal_(model.patches["view"].norm.weight)
    assert not torch.equal(model.token_losses(batch), before)


def test_a_row_may_name_a_list_of_views(tmp_path):
    turns = [("user", "<video>What?"), ("assistant", "<answer>a</answer>")]
    messages = [{"role": role, "content": text} for role, text in turns]
    row = {"messages": messages, "videos": ["x.mp4"], "sides": {"view": ["a.mp4", "b.mp4"]}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    rows = read_samples(tmp_path / "rows.jsonl", [], "train")
    (sample,) = add_side_channels(rows, ["view"])
    sides = [(p.kind, p.path) for p in sample.media if p.side]
    assert sides == [("view", str(tmp_path / name)) for name in ("a.mp4", "b.mp4")]
    form = question_form([rows[0].row], is_label=True)
    assert asking_words(rows, form) == []  # --side takes one file


# --- side tokens in the prompt, to compare the patch with -----------------------------------------
@pytest.mark.parametrize("backbone", ["composed", "llava_onevision"])
def test_side_tokens_stand_behind_the_video_or_behind_the_frame_of_their_time(
    clips, tmp_path, backbone
):
    np.save(tmp_path / f"{name_of(clips[0])}.npy", np.random.rand(25, 3, 6).astype(np.float32))
    (sample,) = add_side_channels(clips[:1], ["audio"], folders={"audio": str(tmp_path)})
    base = load_model(BackboneConfig(backbone=backbone, weights="tiny-random"))
    features = Features(base)([sample])
    plain = base.collate([sample.parts], features)
    (video,) = base.tokens(plain.media, [0])
    for merge in ("concat", "interleave"):
        model = copy.deepcopy(base)
        model.add_side_channel("audio", 6, SideChannelConfig(merge=merge))
        batch = model.collate([sample.parts], features)
        assert batch.ids.shape[1] == plain.ids.shape[1] + 25 * 3
        (tokens,) = model.tokens(batch.media, [0])
        side = model.patches["audio"].out(features[0][1].features.float())  # (25, 3, D)
        first = len(video) // 10  # tokens of a frame
        if merge == "concat":
            expected = torch.cat([video, side.flatten(0, 1)])
        else:  # ten frames: the first five have three steps, the others two
            frames = zip(video.split(first), side.tensor_split(10))
            expected = torch.cat([torch.cat([frame, own.flatten(0, 1)]) for frame, own in frames])
        torch.testing.assert_close(tokens, expected.to(tokens.dtype))
        assert (
            model.token_losses(model.collate([sample.parts], features, ["a dog"])).isfinite().all()
        )
    if backbone == "composed":
        with pytest.raises(ModelError, match="goes with one side channel"):
            model.add_side_channel("depth", 6, SideChannelConfig(merge="concat"))


def test_an_unknown_comparison_is_one_line(capsys):
    assert run_train("pave-tiny --compare everything") == 2
    assert "--compare everything: choose from merge" in capsys.readouterr().err


# --- rows doubled, one patch frozen ---------------------------------------------------------------
def test_rows_about_sound_are_doubled_in_training_alone(small_world):
    types = {"Visual Counting": 1, "Audio Comparative": 2, '["Audio-Visual", "Temporal"]': 2}
    settings = with_values(PaveSettings(), patch_double_audio_rows=True)
    for split in ("train", "test"):
        sample = read_samples(small_world, ["avqa"], split)[0]
        for name, times in types.items():
            sample.row["type"] = name
            prepared = pave.prepare_samples([sample], settings)
            assert len(prepared) == (times if split == "train" else 1)


def test_one_patch_is_frozen_while_another_learns(small_world, tmp_path, capsys):
    data = ["--data", str(small_world), "--tasks", "avqa", "--target", "label"]
    command = "pave-tiny --no-compare-lora --side "
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_train(command + "fast", *data, "--out", str(first)) == 0
    start = [*data, "--init-from", str(first), "--out", str(second)]
    assert run_train(command + "fast,audio --freeze-patch fast", *start) == 0
    patches = [read_part(run / "parts/patch_fast.safetensors").state for run in (first, second)]
    assert all(torch.equal(patches[0][name], patches[1][name]) for name in patches[0])
    learned = read_part(second / "parts/patch_audio.safetensors").state
    assert learned["norm.weight"].any()

    capsys.readouterr()
    refused = ["--out", str(tmp_path / "third")]
    assert run_train(command + "fast,audio --freeze-patch fast", *data, *refused) == 2
    assert "no such patch to start from" in capsys.readouterr().err
    assert run_train(command + "audio --freeze-patch fast", *data, *refused) == 2
    assert "not among --side audio" in capsys.readouterr().err
