"""The native backbone, on a tiny random Qwen2.5-Omni: batches give what samples give alone, and train.py and infer.py run on it."""
import json
import sys

import numpy as np
import pytest
import torch

import infer
import train
from crab_min.backbones.load import BackboneConfig, load_model
from crab_min.backbones.omni import load_omni
from crab_min.errors import ModelError
from crab_min.interface import PromptPart
from crab_min.model import AdapterConfig

RNG = np.random.default_rng(0)


def frames(count: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)


def waves(*seconds: float) -> list:
    return [RNG.standard_normal(round(16000 * s)).astype(np.float32) * .1 for s in seconds]


def text(words: str) -> PromptPart:
    return PromptPart("text", text=words)


# (parts, [(kind, arrays, seconds)]): video and sound; the same with a silent sound; an image task; two videos; two sounds; words alone
CASES = {
    "video and sound": ([PromptPart("video"), text("\n"), PromptPart("audio"), text("\nWhat?")], [("video", frames(10), 10.), ("audio", waves(*[1] * 10), 10.)]),
    "a silent clip": ([PromptPart("video"), text("\n"), PromptPart("audio"), text("\nWho?")], [("video", frames(4), 30.), ("audio", [np.zeros(64000, np.float32)], 30.)]),
    "an image": ([PromptPart("image"), PromptPart("audio"), text("\nWhere?")], [("image", frames(1), 1.), ("audio", waves(1.), 5.)]),
    "a2v": ([PromptPart("audio"), text("\nvideo one: "), PromptPart("video"), text("\nvideo two: "), PromptPart("video"), text("\nWhich?")],
            [("audio", waves(2.2), 2.2), ("video", frames(4), 8.), ("video", frames(4), 10.)]),
    "v2a": ([PromptPart("video"), text("\naudio one: "), PromptPart("audio"), text("\naudio two: "), PromptPart("audio"), text("\nWhich?")],
            [("video", frames(4), 8.), ("audio", waves(1.5), 1.5), ("audio", waves(.4), .4)]),
    "words": ([text("Say yes.")], []),
}


@pytest.fixture(scope="module")
def model():
    return load_omni("tiny-random")


def batch_of(model, names, targets=None):
    prompts, media = zip(*(CASES[name] for name in names))
    return model.collate(list(prompts), [[model.encode(kind, [arrays], [seconds])[0] for kind, arrays, seconds in m] for m in media], targets)


def test_tokens_are_as_many_as_crab_plus_counts(model):
    """Crab+: 64 tokens a pair of frames, 25 a second of sound; sounds shorter than a second are padded to one."""
    (video,), (sound,), (short,) = (model.encode(*case) for case in (("video", [frames(10)], [10.]), ("audio", [waves(*[2] * 10)], [60.]), ("audio", [waves(.2)], [.2])))
    assert [model.count(m) for m in (video, sound, short)] == [320, 500, 25]
    assert [len(t) for t in model.tokens([sound, video, short], [0, 0, 1])] == [500, 320, 25]


@torch.no_grad()
def test_a_batch_gives_the_logits_of_each_sample_alone(model):
    together = model.logits(batch_of(model, CASES), 5)
    for row, name in zip(together, CASES):
        torch.testing.assert_close(row, model.logits(batch_of(model, [name]), 5)[0], atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_it_is_what_transformers_computes_from_pixels_and_waves(model):
    """One video and one sound through the processor's own path: ids, features and positions are the model's."""
    batch, (_, media) = batch_of(model, ["video and sound"]), CASES["video and sound"]
    video, sound = (model.encode(kind, [arrays], [seconds])[0] for kind, arrays, seconds in media)
    theirs = model.thinker(input_ids=batch["ids"], attention_mask=batch["attention"], pixel_values_videos=video.features,
                           video_grid_thw=torch.tensor([[5, 16, 16]]), input_features=sound.features.T[None],
                           feature_attention_mask=torch.ones(1, len(sound.features), dtype=torch.long), video_second_per_grid=torch.tensor([2.]))
    torch.testing.assert_close(model.logits(batch, 5), theirs.logits[:, -5:], atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_the_seconds_of_a_clip_set_its_positions(model):
    prompt, [(kind, arrays, _), sound] = CASES["video and sound"]
    logits = []
    for seconds in (10., 60.):
        features = [model.encode(kind, [arrays], [seconds])[0], model.encode(*[[v] if i else v for i, v in enumerate(sound)])[0]]
        logits.append(model.logits(model.collate([prompt], [features]), 1))
    assert not torch.allclose(*logits)


def test_answers_do_not_depend_on_the_batch_or_on_what_came_before(model):
    alone = {name: model.generate(batch_of(model, [name]), 6)[0] for name in CASES}
    assert model.generate(batch_of(model, CASES), 6) == list(alone.values())


@torch.no_grad()
def test_run_together_as_released_two_videos_are_one(model):
    released = load_omni("tiny-random", separate=False)
    ours, theirs = batch_of(model, ["a2v"]), batch_of(released, ["a2v"])
    begin = model.marks["video"][0][0]
    assert (ours["ids"] == begin).sum() == 2 and (theirs["ids"] == begin).sum() == 1
    assert [m.kind for m in theirs["media"]] == ["audio", "video"] and theirs["media"][1].seconds == 18
    assert released.logits(theirs, 1).isfinite().all()


@pytest.mark.parametrize("encoders", [False, True])
def test_adapters_are_where_they_are_asked_for_and_learn(encoders):
    model = load_omni("tiny-random")
    model.add_adapter(AdapterConfig(r=4, encoder_adapters=encoders))
    model.llm.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    for step in range(2):                              # B is zero at first, so A and R get a gradient from the second step on
        loss, tokens = model(batch_of(model, CASES, ["yes"] * len(CASES)))
        model.zero_grad()
        (loss / tokens).backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= .1 * p.grad.sign()
    adapted = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {"language_model" in n for n in adapted} == ({True, False} if encoders else {True})
    assert len({n.split(".ilora_")[0] for n in adapted if "language_model" in n}) == 14
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_train_and_infer_run_on_it(small_world, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main(["crab_plus-7b", "--weights", "tiny-random", "--steps", "2", "--batch-size", "2", "--data", str(small_world), "--tasks", "ks,a2v,s4",
                       "--test-rows", "1", "--r", "4", "--alpha", "8", "--out", str(run)]) == 0
    assert set(json.loads((run / "metrics.json").read_text())["tasks"]) == {"ks", "a2v", "s4"}
    clip = next((small_world / "ave" / "video").glob("test_*.mp4"))
    capsys.readouterr()
    assert infer.main([str(clip), "--ask", "What is it?", "--run", str(run), "--limit", "3", "--json", "--picture", str(tmp_path / "a.png"), "--routes", str(tmp_path / "r.png")]) == 0
    assert json.loads(capsys.readouterr().out)["clip"] == str(clip) and (tmp_path / "r.png").stat().st_size > 5000


def test_weights_that_are_not_there_say_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="Qwen2.5-Omni nowhere/at-all: cannot be loaded.*hf download nowhere/at-all"):
        load_omni("nowhere/at-all")


@pytest.mark.parametrize("backbone", ["native", "llava", "crema"])
def test_a_base_in_4_bits_answers_nearly_the_same_and_its_adapter_learns(backbone):
    pytest.importorskip("bitsandbytes")
    whole, small = (load_model(BackboneConfig(backbone=backbone, weights="tiny-random", quantize=quantize)).to("cpu") for quantize in ("", "4bit"))
    batches = [model.collate([[PromptPart("text", "What is it?")]], [[]], ["A dog."]) for model in (whole, small)]
    one, other = (model.losses(batch) for model, batch in zip((whole, small), batches))
    assert not torch.equal(one, other) and torch.allclose(one, other, rtol=.1)
    small.add_adapter(AdapterConfig(adapter="none" if backbone == "crema" else "ilora"))
    if backbone != "crema":
        small(batches[1])[0].backward()
        assert all(p.grad is not None for p in small.parameters() if p.requires_grad)


def test_4_bits_without_bitsandbytes_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(ModelError, match="pip install bitsandbytes"):
        load_model(BackboneConfig(backbone="native", weights="tiny-random", quantize="4bit"))
