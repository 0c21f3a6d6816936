"""Pretraining: a modality of CREMA without a video, Crab's stages on the data they name."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from test_modalities import load_blip2, run_train

from crab_min.config import AdapterConfig, CrabSettings, ModalityConfig, with_values
from crab_min.data import gold_mask, read_samples
from crab_min.encoders import MediaFeatures
from crab_min.errors import DataError, RunError
from crab_min.features import Features
from crab_min.model import ASSETS
from crab_min.recipes import crab
from crab_min.side_channels import add_side_channels
from crab_min.trained_parts import read_part

SHIPPED = ASSETS / "crab_plus-tiny"
SHORT = "--steps 2 --batch-size 4 --workers 0 --no-baseline --test-rows 2 --data"


@pytest.fixture(scope="session")
def captions(small_world, tmp_path_factory):
    """AudioCaps as released: the sounds of the world with what is heard in them."""
    root = tmp_path_factory.mktemp("captions")
    (root / "audiocaps/audio_data").mkdir(parents=True)
    rows = []
    for number, sample in enumerate(read_samples(small_world, ["avcap"], "train")):
        sound = next(part.path for part in sample.media if part.kind == "audio")
        shutil.copy(sound, root / f"audiocaps/audio_data/{number}.wav")
        rows.append({"audiocap_id": number, "caption": sample.row["heard"]})
    for split, chosen in (("train", rows[4:]), ("test", rows[:4])):
        with open(root / f"audiocaps/{split}.csv", "w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(chosen)
    return root


# --- a modality of CREMA without a video ----------------------------------------------------------
@pytest.mark.parametrize("weights", ["", "tiny-random"])
def test_a_prompt_without_a_video_has_the_tokens_of_its_modality(captions, weights):
    model = load_blip2(weights)
    model.add_adapter(AdapterConfig(adapter="none"))
    model.configure(ModalityConfig("audio", "none", modality_rank=4))
    samples = read_samples(captions, ["audiocaps"], "train")[:2]
    samples = add_side_channels(samples, ["audio"], with_video=False)
    assert [part.kind for part in samples[0].parts] == ["audio", "text"]
    features = Features(model)(samples)
    model.add_side_channel("audio", features[0][0].features.shape[-1])
    model.set_trainable([])
    batch = model.collate([s.parts for s in samples], features, [s.target for s in samples])
    # ten windows of sound, each of as many tokens as there are queries
    placeholder = model.media_tokens["audio"].placeholder
    queries = model.multimodal.config.queries
    assert (batch.ids == placeholder).sum(1).tolist() == [10 * queries] * 2

    (model(batch) / batch.answer_tokens).backward()
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    own = {f"multimodal.{name}" for name in model.multimodal.parameters_of("audio")}
    assert learned == own
    assert all(p.grad is not None for p in model.multimodal.parameters_of("audio").values())


def test_unfused_tokens_have_the_time_of_the_base():
    """A frame has its number, a sound beside it that of the frame, a sound alone its second."""
    model = load_blip2("")
    model.choose_modalities(ModalityConfig("rgb,audio", "none"))
    model.add_side_channel("audio", 32)
    sound = MediaFeatures("audio", torch.randn(4, 7, 32))
    video = MediaFeatures("video", torch.randn(2, 36, model.vision.width), sides={"audio": sound})
    timed = model.tokens([video, sound], [0, 1])
    time, model.time = model.time, None
    plain = model.tokens([video, sound], [0, 1])
    times = ([0, 1, 0, 0, 1, 1], [0, 1, 2, 3])
    for with_time, without, expected in zip(timed, plain, times):
        added = time.weight[expected].repeat_interleave(model.multimodal.config.queries, 0)
        torch.testing.assert_close(with_time - without, added, atol=1e-4, rtol=1e-4)


def test_a_row_without_the_modality_is_named(captions):
    (sample, *_) = read_samples(captions, ["audiocaps"], "train")
    with pytest.raises(DataError, match="none of points, and no video is shown here"):
        add_side_channels([sample], ["points"], with_video=False)


def test_a_pretrained_modality_goes_into_the_run_with_the_video(captions, small_world, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    command = f"crema-tiny --modality-rank 4 {SHORT}"
    alone = [
        "--modalities",
        "audio",
        "--fusion",
        "none",
        "--tasks",
        "audiocaps",
        "--out",
        str(first),
    ]
    assert run_train(command, str(captions), *alone) == 0
    assert sorted(f.name for f in (first / "parts").iterdir()) == ["modality_audio.safetensors"]
    metrics = json.loads((first / "metrics.json").read_text())
    assert metrics["tasks"]["audiocaps"]["n"] == 2 and "subsets" not in metrics

    beside = ["--modalities", "rgb,audio", "--tasks", "avqa", "--lr", "0", "--connector-lr", "0"]
    start = ["--init-from", str(first), "--out", str(second)]
    assert run_train(command, str(small_world), *beside, *start) == 0
    states = [read_part(run / "parts/modality_audio.safetensors").state for run in (first, second)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert (second / "parts/modality_rgb.safetensors").exists()


def test_a_comparison_trains_a_run_per_design_once(tmp_path, monkeypatch, capsys):
    """--compare fusion: five runs and one table; finished runs are not trained again."""
    monkeypatch.chdir(tmp_path)
    world = "--world-clips 8 --world-test 2 --batch-size 2 --steps 1 --no-baseline --workers 0"
    command = f"crema-tiny --modality-rank 4 --modalities rgb,audio --compare fusion {world}"
    assert run_train(command) == 0
    table = capsys.readouterr().out.split("questions about")[-1]
    for title in ("add", "concat", "add no gate", "concat no gate", "not fused"):
        assert title in table.split("\n")[0]
    runs = {path.parent.name: path.stat().st_mtime for path in Path("runs").glob("*/metrics.json")}
    assert len(runs) == 5 and "crema-tiny-add_no_gate" in runs
    assert run_train(command) == 0
    for path in Path("runs").glob("*/metrics.json"):
        assert path.stat().st_mtime == runs[path.parent.name]


# --- Crab's stages on the data they name ----------------------------------------------------------
def test_the_tasks_that_are_named_are_aligned_on():
    for stage, given, expected in (
        ("audio", "all", "avcap"),
        ("audio", "audiocaps", "audiocaps"),
        ("visual", "ks,ucf", "ks,ucf"),
        ("masks-align", "all", "lvis"),
        ("masks", "all", "s4,ms3,ref_avs,avss"),
    ):
        settings = with_values(CrabSettings(), stage=stage, tasks=given)
        assert crab.run_settings(settings).data.tasks == expected


def test_the_audio_stage_learns_audiocaps(captions, tmp_path, capsys):
    command = f"crab-tiny --stage audio --init-from {SHIPPED} {SHORT}"
    out = ["--out", str(tmp_path / "run"), "--tasks"]
    assert run_train(command, str(captions), *out, "audiocaps") == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert list(metrics["tasks"]) == ["audiocaps"]
    wrong = f"crab-tiny --stage visual --tasks audiocaps {SHORT}"
    assert run_train(wrong, str(captions), "--out", str(tmp_path / "wrong")) == 2
    assert "no video or image in it to align the connector on" in capsys.readouterr().err


def test_the_visual_stage_learns_image_captions_in_llavas_form(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "x.jpg")
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "A black square.")]
    conversations = [{"from": role, "value": text} for role, text in turns]
    row = {"id": 1, "image": "x.jpg", "conversations": conversations}
    (tmp_path / "captions.json").write_text(json.dumps([row]))
    samples = read_samples(tmp_path / "captions.json", [], "train")
    settings = with_values(CrabSettings(), stage="visual")
    (sample,) = crab.prepare_samples(samples, settings)
    assert [(part.kind, part.path) for part in sample.media] == [("image", str(tmp_path / "x.jpg"))]
    assert sample.target == "A black square."


@pytest.fixture(scope="session")
def lvis(tmp_path_factory):
    """LVIS as released: pictures with one rectangle each, as box and as polygon."""
    root = tmp_path_factory.mktemp("lvis")
    (root / "lvis/train2017").mkdir(parents=True)
    images, annotations = [], []
    for i in range(12):
        left, top = 8 + 4 * i, 8 + 2 * i
        picture = Image.new("RGB", (128, 96), "black")
        corners = (left, top, left + 40, top + 40)
        ImageDraw.Draw(picture).rectangle(corners, fill="red")
        picture.save(root / f"lvis/train2017/{i}.png")
        url = f"http://images.cocodataset.org/train2017/{i}.png"
        images.append({"id": i, "width": 128, "height": 96, "coco_url": url})
        polygon = [left, top, left + 40, top, left + 40, top + 40, left, top + 40]
        about = {"id": i, "image_id": i, "category_id": 1, "bbox": [left, top, 40, 40]}
        annotations.append({**about, "area": 1600, "segmentation": [polygon]})
    content = {"images": images, "categories": [{"id": 1, "name": "red_block"}]}
    for split, part in (("train", annotations[:8]), ("val", annotations[8:])):
        file = root / f"lvis/lvis_v1_{split}.json"
        file.write_text(json.dumps({**content, "annotations": part}))
    return root


def test_the_gold_mask_of_lvis_is_its_polygon(lvis):
    (sample, *_) = crab.add_mask_tokens(read_samples(lvis, ["lvis"], "train"))
    mask = gold_mask(sample)
    assert mask.shape == (96, 128) and mask[8:49, 8:49].all() and mask.sum() == 41 * 41
    assert gold_mask(sample, 224).shape == (224, 224)
    assert sample.gold.boxes == [(14, 19, 84, 112)]  # pixels on the 224 x 224 grid
    assert sample.target.endswith("<mask_5>")


def test_the_decoder_is_aligned_on_lvis_and_goes_into_the_mask_stage(
    lvis, small_world, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    short = "--steps 4 --text-steps 2 --batch-size 2 --workers 0 --no-baseline --test-rows 2"
    assert run_train(f"crab-tiny --stage masks-align {short} --data {lvis}") == 0
    aligned = tmp_path / "runs/crab-tiny-masks-align"
    scores = json.loads((aligned / "metrics.json").read_text())["masks"]
    assert set(scores) == {"lvis"} and scores["lvis"]["n"] == 2

    masks = f"crab-tiny --stage masks {short} --tasks s4 --data"
    assert run_train(masks, str(small_world), "--out", "runs/masks") == 0
    saved = json.loads((tmp_path / "runs/masks/config.json").read_text())
    assert saved["settings"]["training"]["init_from"] == "runs/crab-tiny-masks-align"

    assert run_train("crab-tiny --stage masks-align --steps 4 --text-steps 2") == 2
    assert "LVIS is not in the built-in world" in capsys.readouterr().err


# --- the built-in world in these forms ------------------------------------------------------------
def test_the_world_is_written_in_released_forms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the world lies
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
    import released_forms

    for name, (write, _, _) in released_forms.KINDS.items():
        write(tmp_path / name, 2, 2, 0)
    sound, _ = read_samples(tmp_path / "captions", ["audiocaps"], "test")
    assert Path(sound.media[0].path).exists() and " is heard from " in sound.gold.text

    # a polygon is the mask of a thing in a picture four times as large
    for sample in read_samples(tmp_path / "objects", ["lvis"], "test"):
        (box,) = sample.gold.boxes
        (masked,) = crab.add_mask_tokens([sample])
        rows, columns = np.nonzero(gold_mask(masked, 224))
        edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert np.abs(np.subtract(edges, box)).max() <= 1

    (first, _) = read_samples(tmp_path / "views/train.jsonl", [], "train")
    (viewed,) = add_side_channels([first], ["view"])
    assert len({part.path for part in viewed.media if part.side}) == released_forms.CAMERAS


# --- settings -------------------------------------------------------------------------------------
def test_the_video_comes_first_or_not_at_all():
    assert not ModalityConfig("audio,points", "none").has_video
    with pytest.raises(RunError, match="name rgb, the video, first; without it give --fusion none"):
        ModalityConfig("audio")
    with pytest.raises(RunError, match="each other modality once"):
        ModalityConfig("audio,rgb", "none")
