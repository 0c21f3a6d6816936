"""Pretraining: a modality of CREMA without a video, Crab's stages on the data they name."""

import csv
import json
import shutil

import pytest
import torch
from test_modalities import load_blip2, run_train

from crab_min.config import AdapterConfig, ModalityConfig
from crab_min.data import read_samples
from crab_min.errors import RunError
from crab_min.features import Features
from crab_min.side_channels import add_side_channels
from crab_min.trained_parts import read_part

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
    model.configure(ModalityConfig(modalities="audio", modality_rank=4))
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


def test_a_pretrained_modality_goes_into_the_run_with_the_video(captions, small_world, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    command = f"crema-tiny --modality-rank 4 {SHORT}"
    alone = ["--modalities", "audio", "--tasks", "audiocaps", "--out", str(first)]
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


def test_the_video_comes_first_or_not_at_all():
    assert not ModalityConfig(modalities="audio,points").has_video
    with pytest.raises(RunError, match="name rgb, the video, first"):
        ModalityConfig(modalities="audio,rgb")
