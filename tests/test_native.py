"""Qwen2.5-Omni, on a tiny random one: batches give what samples give alone.

Also that train.py and infer.py run on it, and that weights in 4 bits are loaded and refused.
"""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

import infer
import train
from crab_min.backbones import common
from crab_min.backbones.load import load_model
from crab_min.backbones.omni import OmniModel
from crab_min.backbones.tiny_random import tiny_blip2, tiny_llava, tiny_omni
from crab_min.config import AdapterConfig, BackboneConfig
from crab_min.errors import ModelError
from crab_min.interface import PromptPart

TINY = BackboneConfig(backbone="omni", weights="tiny-random")
RNG = np.random.default_rng(0)
VIDEO, IMAGE, AUDIO = PromptPart("video"), PromptPart("image"), PromptPart("audio")


def frames(count: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)


def waves(*seconds: float) -> list:
    return [RNG.standard_normal(round(16000 * s)).astype(np.float32) * 0.1 for s in seconds]


def text(words: str) -> PromptPart:
    return PromptPart("text", text=words)


# a prompt, and (kind, arrays, seconds) of each of its media
CASES = {
    "video and sound": (
        [VIDEO, text("\n"), AUDIO, text("\nWhat?")],
        [("video", frames(10), 10.0), ("audio", waves(*[1] * 10), 10.0)],
    ),
    "a silent clip": (
        [VIDEO, text("\n"), AUDIO, text("\nWho?")],
        [("video", frames(4), 30.0), ("audio", [np.zeros(64000, np.float32)], 30.0)],
    ),
    "an image": (
        [IMAGE, AUDIO, text("\nWhere?")],
        [("image", frames(1), 1.0), ("audio", waves(1.0), 5.0)],
    ),
    "a2v": (
        [AUDIO, text("\nvideo one: "), VIDEO, text("\nvideo two: "), VIDEO, text("\nWhich?")],
        [("audio", waves(2.2), 2.2), ("video", frames(4), 8.0), ("video", frames(4), 10.0)],
    ),
    "v2a": (
        [VIDEO, text("\naudio one: "), AUDIO, text("\naudio two: "), AUDIO, text("\nWhich?")],
        [("video", frames(4), 8.0), ("audio", waves(1.5), 1.5), ("audio", waves(0.4), 0.4)],
    ),
    "words": ([text("Say yes.")], []),
}


@pytest.fixture(scope="module")
def model():
    return load_model(TINY)


def features_of(model, media):
    return [model.encode(kind, [arrays], [seconds])[0] for kind, arrays, seconds in media]


def batch_of(model, names, targets=None):
    prompts = [CASES[name][0] for name in names]
    media = [features_of(model, CASES[name][1]) for name in names]
    return model.collate(prompts, media, targets)


# --- the model ------------------------------------------------------------------------------------
def test_tokens_are_as_many_as_crab_plus_counts(model):
    """64 per pair of frames, 25 per second of sound; shorter sounds are padded to a second."""
    (video,) = model.encode("video", [frames(10)], [10.0])
    (sound,) = model.encode("audio", [waves(*[2] * 10)], [60.0])
    (short,) = model.encode("audio", [waves(0.2)], [0.2])
    assert [model.token_count(medium) for medium in (video, sound, short)] == [320, 500, 25]
    tokens = model.tokens([sound, video, short], [0, 0, 1])
    assert [len(of_medium) for of_medium in tokens] == [500, 320, 25]


def test_a_sound_is_read_at_its_own_length(monkeypatch):
    """The hub's processor pads each sound to 300 s, and the frames of the sound are the same."""
    thinker, processor = tiny_omni()
    extractor = WhisperFeatureExtractor(128, chunk_length=300, return_attention_mask=True)
    processor.feature_extractor = extractor
    model = OmniModel(thinker, processor)
    stft, lengths = torch.stft, []

    def spy(wave, *arguments, **options):
        lengths.append(wave.shape[-1])
        return stft(wave, *arguments, **options)

    monkeypatch.setattr(torch, "stft", spy)
    sounds = [waves(*[1] * 10), waves(2.37), waves(0.4)]
    encoded = model.encode("audio", sounds, [10.0, 2.37, 0.4])
    assert lengths == [160_000 + 400]
    for medium, sound in zip(encoded, sounds):
        wave = np.concatenate(sound)
        wave = np.pad(wave, (0, max(0, 16000 - len(wave))))
        padded = extractor(wave, sampling_rate=16000, padding="max_length", return_tensors="pt")
        frames = -(-len(wave) // 160)
        assert medium.features.shape == (frames, 128)
        expected = padded["input_features"][0, :, :frames].T
        torch.testing.assert_close(medium.features, expected, atol=1e-5, rtol=0)


def test_frames_and_images_are_cut_into_the_same_patches_together_and_alone(model):
    for kind, counts in (("video", (2, 4, 6)), ("image", (1, 1, 1))):
        media = [frames(count) for count in counts]
        together = model.encode(kind, media, [1.0] * 3)
        alone = [model.encode(kind, [medium], [1.0])[0] for medium in media]
        for one, two in zip(together, alone):
            assert torch.equal(one.features, two.features)


def test_the_head_computes_the_logits_of_the_last_tokens_alone(model):
    seen = []

    def note(head, inputs, output):
        seen.append(output.shape[1])

    with model.thinker.lm_head.register_forward_hook(note):
        model.generate(batch_of(model, CASES), 3)
    assert seen == [1] * len(seen) and seen


@torch.no_grad()
def test_a_batch_gives_the_logits_of_each_sample_alone(model):
    together = model.logits(batch_of(model, CASES), 5)
    for row, name in zip(together, CASES):
        alone = model.logits(batch_of(model, [name]), 5)[0]
        torch.testing.assert_close(row, alone, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_it_is_what_transformers_computes_from_pixels_and_waves(model):
    """One video and one sound through the processor's own path: ids, features, positions."""
    batch = batch_of(model, ["video and sound"])
    video, sound = features_of(model, CASES["video and sound"][1])
    expected = model.thinker(
        input_ids=batch.ids,
        attention_mask=batch.attention,
        pixel_values_videos=video.features,
        video_grid_thw=torch.tensor([[5, 16, 16]]),
        input_features=sound.features.T[None],
        feature_attention_mask=torch.ones(1, len(sound.features), dtype=torch.long),
        video_second_per_grid=torch.tensor([2.0]),
    )
    logits = model.logits(batch, 5)
    torch.testing.assert_close(logits, expected.logits[:, -5:], atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_the_seconds_of_a_clip_set_its_positions(model):
    prompt, [(kind, arrays, _), sound] = CASES["video and sound"]
    logits = []
    for seconds in (10.0, 60.0):
        features = features_of(model, [(kind, arrays, seconds), sound])
        logits.append(model.logits(model.collate([prompt], [features]), 1))
    assert not torch.allclose(*logits)


def test_answers_do_not_depend_on_the_batch_or_on_what_came_before(model):
    alone = [model.generate(batch_of(model, [name]), 6)[0] for name in CASES]
    assert model.generate(batch_of(model, CASES), 6) == alone


@torch.no_grad()
def test_run_together_as_released_two_videos_are_one(model):
    released = load_model(replace(TINY, separate_media=False))
    ours, theirs = batch_of(model, ["a2v"]), batch_of(released, ["a2v"])
    begin = model.media_tokens["video"].before[0]
    assert (ours.ids == begin).sum() == 2
    assert (theirs.ids == begin).sum() == 1
    assert [medium.kind for medium in theirs.media] == ["audio", "video"]
    assert theirs.media[1].seconds == 18
    assert released.logits(theirs, 1).isfinite().all()


def test_adapters_are_on_the_lm_alone_and_learn():
    model = load_model(TINY)
    model.add_adapter(AdapterConfig(r=4))
    model.set_trainable(["adapter"])
    model.llm.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    batch = batch_of(model, CASES, ["yes"] * len(CASES))
    for _ in range(2):  # B is zero at first, so A and R get a gradient from the second step on
        model.zero_grad()
        (model(batch) / batch.answer_tokens).backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad.sign()
    adapted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("language_model" in name for name in adapted)
    assert len({name.split(".ilora_")[0] for name in adapted}) == 14
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.values())


# --- commands -------------------------------------------------------------------------------------
def test_train_and_infer_run_on_it(small_world, tmp_path, capsys):
    run, picture, routes = tmp_path / "run", tmp_path / "a.png", tmp_path / "r.png"
    command = (
        "crab_plus-7b --weights tiny-random --steps 2 --batch-size 2 --tasks ks,a2v,s4 "
        f"--test-rows 1 --r 4 --alpha 8 --data {small_world} --out {run}"
    )
    assert train.main(command.split()) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["tasks"]) == {"ks", "a2v", "s4"}

    clip = next((small_world / "ave" / "video").glob("test_*.mp4"))
    capsys.readouterr()
    ask = [str(clip), "--ask", "What is it?", "--run", str(run), "--max-new-tokens", "3", "--json"]
    assert infer.main([*ask, "--picture", str(picture), "--routes", str(routes)]) == 0
    assert json.loads(capsys.readouterr().out)["clip"] == str(clip)
    assert routes.stat().st_size > 5000


def test_a_sound_in_a_prompt_that_takes_none_says_what_to_do():
    """LLaVA-OneVision with a BEATs for side channels, and without one."""
    model = load_model(BackboneConfig(backbone="llava_onevision", weights="tiny-random"))
    features = features_of(model, [("audio", waves(1.0), 1.0)])
    with pytest.raises(
        ModelError, match="audio: not in a prompt .* which takes video, image.*pave"
    ):
        model.collate([[AUDIO, text("What?")]], [features])
    model.audio = None
    with pytest.raises(ModelError, match="only as a side channel .*pave.* with --audio"):
        features_of(model, [("audio", waves(1.0), 1.0)])


def test_weights_that_are_not_there_say_what_to_do():
    expected = "Qwen2.5-Omni nowhere/at-all: cannot be loaded.*hf download nowhere/at-all"
    with pytest.raises(ModelError, match=expected):
        load_model(replace(TINY, weights="nowhere/at-all"))


def test_half_a_checkpoint_says_what_to_do(model, tmp_path):
    model.thinker.config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"the first half")
    with pytest.raises(ModelError, match="Qwen2.5-Omni .* cannot be loaded.*Is the download wh"):
        load_model(replace(TINY, weights=str(tmp_path)))


# --- 4 bits ---------------------------------------------------------------------------------------
LOADERS = {
    "omni": "crab_min.backbones.omni.Qwen2_5OmniThinkerForConditionalGeneration",
    "llava_onevision": (
        "crab_min.backbones.llava_onevision.LlavaOnevisionForConditionalGeneration"
    ),
    "blip2": "crab_min.backbones.blip2.Blip2ForConditionalGeneration",
    "composed": "crab_min.backbones.composed.AutoModelForCausalLM",
}


class Stop(Exception):
    """Ends loading where the weights would be read."""


@pytest.mark.parametrize("backbone", LOADERS)
def test_4_bits_are_asked_of_transformers_for_the_lm_alone(backbone, monkeypatch):
    given = {}

    def from_pretrained(name, **settings):
        given.update(settings)
        raise Stop

    monkeypatch.setitem(sys.modules, "bitsandbytes", common)  # some module: it is there
    monkeypatch.setattr(common, "refuse_unusable", lambda name: None)
    monkeypatch.setattr(f"{LOADERS[backbone]}.from_pretrained", from_pretrained)
    if backbone == "composed":
        from crab_min.backbones.composed import load_llm

        with pytest.raises(Stop):
            load_llm("some/llm", None, load_in_4bit=True)
    else:
        with pytest.raises(Stop):
            load_model(BackboneConfig(backbone=backbone, weights="some/lm", load_in_4bit=True))
    settings = given["quantization_config"]
    assert settings.load_in_4bit and settings.bnb_4bit_quant_type == "nf4"
    assert settings.bnb_4bit_use_double_quant
    assert settings.bnb_4bit_compute_dtype == torch.bfloat16
    assert "lm_head" in settings.llm_int8_skip_modules


PIECES = {
    "omni": tiny_omni,
    "llava_onevision": tiny_llava,
    "blip2": lambda: tiny_blip2("<video>"),
}


@pytest.mark.parametrize("backbone", PIECES)
def test_an_lm_in_4_bits_answers_nearly_the_same_and_its_adapter_learns(backbone, tmp_path):
    pytest.importorskip("bitsandbytes")
    for piece in PIECES[backbone]():  # as a checkpoint lies on the hub
        piece.save_pretrained(tmp_path)
    config = BackboneConfig(backbone=backbone, weights=str(tmp_path))
    whole = load_model(config).to("cpu")
    small = load_model(replace(config, load_in_4bit=True)).to("cpu")

    # in evaluation mode bitsandbytes' code for CPUs wants widths that are multiples of 64
    small.train(backbone != "blip2")
    sample = [[text("What is it?")]], [[]], ["A dog."]
    batch = small.collate(*sample)
    losses = whole.token_losses(whole.collate(*sample)), small.token_losses(batch)
    assert not torch.equal(*losses)
    torch.testing.assert_close(*losses, rtol=0.1, atol=0.1)

    # CREMA trains no adapter on the LM
    small.add_adapter(AdapterConfig(adapter="none" if backbone == "blip2" else "ilora"))
    trained = [p for p in small.parameters() if p.requires_grad]
    if trained:
        small(batch).backward()
    assert all(p.grad is not None for p in trained)


def test_4_bits_without_bitsandbytes_say_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match="pip install bitsandbytes"):
        load_model(BackboneConfig(backbone="omni", weights="some/lm", load_in_4bit=True))


def test_4_bits_without_weights_to_load_are_refused():
    tiny = [
        BackboneConfig(backbone="omni", weights="tiny-random", load_in_4bit=True),
        BackboneConfig(load_in_4bit=True),
        BackboneConfig(backbone="blip2", load_in_4bit=True),
    ]
    for config in tiny:
        with pytest.raises(ModelError, match="--load-in-4bit: .* nothing to load"):
            load_model(config)
