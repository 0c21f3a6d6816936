"""Encoders: their features, padding and batching, saving, and their errors.

All are tiny and random. Agreement with the authors' own BEATs is tested in test_goldens.py.
"""

from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipImageProcessor,
)
from transformers.models.t5.modeling_t5 import T5Attention

from crab_min.backbones.common import encode_sounds
from crab_min.beats import Beats, BeatsConfig, distance_buckets, fbank, load_beats
from crab_min.encoders import AudioEncoder, VisionEncoder
from crab_min.errors import ModelError
from crab_min.qformer import use_few_queries

BEATS = {
    "embed_dim": 16,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "conv_pos": 8,
    "conv_pos_groups": 4,
    "num_buckets": 32,
    "max_distance": 64,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
CLIP = {"model_type": "clip_vision_model", **VISION}
SIGLIP = {"model_type": "siglip_vision_model", **VISION}
TABLE = "encoder.layers.{}.self_attn.relative_attention_bias.weight"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_beats() -> Beats:
    return Beats(BeatsConfig.from_dict(BEATS))


def waves(*seconds: float) -> list[torch.Tensor]:
    return [0.1 * torch.randn(round(s * 16000)) for s in seconds]


def movie(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)


def published(beats: Beats) -> dict:
    """Give BEATs the form of a file of microsoft/unilm.

    It has the old names of weight norm, one bias table per layer, and a classifier.
    """
    names = {
        "parametrizations.weight.original0": "weight_g",
        "parametrizations.weight.original1": "weight_v",
    }
    model = {}
    for key, value in beats.state_dict().items():
        for ours, released in names.items():
            key = key.replace(ours, released)
        model[key] = value
    model[TABLE.format(1)] = model[TABLE.format(0)]
    model["predictor.weight"] = torch.zeros(527, 32)
    model["predictor.bias"] = torch.zeros(527)
    cfg = {
        **BEATS,
        "finetuned_model": True,
        "predictor_class": 527,
        "activation_fn": "gelu",
        "gru_rel_pos": True,
        "relative_position_embedding": True,
        "layer_norm_first": False,
        "encoder_layerdrop": 0.05,
    }
    return {"cfg": cfg, "model": model}


# --- BEATs ----------------------------------------------------------------------------------------
def test_one_second_of_sound_is_48_patches_and_two_are_96():
    assert fbank(torch.randn(3, 16000)).shape == (3, 98, 128)
    beats = make_beats().eval()
    for seconds, patches in (1, 48), (2, 96):
        features, mask = beats(fbank(torch.randn(3, 16000 * seconds)))
        assert features.shape == (3, patches, 32)
        assert mask.shape == (3, patches) and mask.all()


def test_distance_buckets_are_those_of_t5():
    position = torch.arange(60)
    distance = position[None] - position[:, None]
    expected = T5Attention._relative_position_bucket(distance, True, 32, 64)
    assert torch.equal(distance_buckets(60, 32, 64), expected)


def test_a_padded_batch_gives_what_each_sound_gives_alone():
    beats = make_beats().eval()
    banks = [fbank(wave[None])[0] for wave in waves(0.5, 1.3, 2.0)]
    masks = [torch.ones(len(bank), dtype=torch.bool) for bank in banks]
    mask = pad_sequence(masks, batch_first=True)
    padded = pad_sequence(banks, batch_first=True, padding_value=7.0)
    together, real = beats(padded, mask)
    for features, kept, bank in zip(together, real, banks):
        alone, _ = beats(bank[None])
        torch.testing.assert_close(features[kept], alone[0], atol=1e-5, rtol=1e-4)


def test_beats_learns_from_scratch():
    beats, targets = make_beats(), torch.randn(4, 32)
    banks = fbank(torch.stack(waves(0.4, 0.4, 0.4, 0.4)))  # two rows of patches
    optimizer, losses = torch.optim.AdamW(beats.parameters(), lr=3e-3), []
    for _ in range(40):
        loss = (beats(banks)[0].mean(1) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in beats.parameters())
    assert losses[-1] < 0.5 * losses[0]


def test_a_published_file_gives_the_model_it_was_made_from(tmp_path):
    beats, path = make_beats().eval(), tmp_path / "beats.pt"
    torch.save(published(beats), path)
    bank = fbank(torch.randn(1, 16000))
    for source in path, published(beats):
        loaded = load_beats(source)
        assert not loaded.training
        assert torch.equal(loaded(bank)[0], beats(bank)[0])


def test_load_beats_says_what_is_wrong(tmp_path):
    with pytest.raises(ModelError, match=r"nowhere.pt: no such file.*iter3_plus.*microsoft/unilm"):
        load_beats(tmp_path / "nowhere.pt")
    (tmp_path / "page.pt").write_text("<html>Resource not found</html>")
    with pytest.raises(ModelError, match="page.pt: not a file of torch weights"):
        load_beats(tmp_path / "page.pt")
    with pytest.raises(ModelError, match="`cfg` and `model`"):
        load_beats({"state_dict": {}})
    good = published(make_beats())
    lacking = {k: v for k, v in good["model"].items() if "fc1" not in k}
    with pytest.raises(ModelError, match="encoder.layers.0.fc1.weight"):
        load_beats({**good, "model": lacking})
    unknown = good["model"] | {"quantize.codebook": torch.zeros(1)}
    with pytest.raises(ModelError, match=r"unexpected weights \['quantize.codebook'\]"):
        load_beats({**good, "model": unknown})
    with pytest.raises(ModelError, match="do not fit"):
        load_beats({**good, "cfg": good["cfg"] | {"encoder_embed_dim": 64}})
    with pytest.raises(ModelError, match="layer_norm_first=True"):
        load_beats({**good, "cfg": good["cfg"] | {"layer_norm_first": True}})


# --- sound ----------------------------------------------------------------------------------------
def test_segments_of_a_clip_are_padded_to_the_longest_and_masked():
    encoder, segments = AudioEncoder(BEATS).eval(), waves(1.0, 0.4, 2.0)
    features, mask = encoder(segments)
    assert features.shape == (1, 3, 96, 32) and mask.sum(-1).tolist() == [[48, 16, 96]]
    for features_t, mask_t, wave in zip(features[0], mask[0], segments):
        torch.testing.assert_close(
            features_t[mask_t], encoder([wave])[0][0, 0], atol=1e-5, rtol=1e-4
        )


def test_a_padded_tensor_with_lengths_is_the_same_as_a_list():
    encoder, segments = AudioEncoder(BEATS).eval(), waves(1.0, 0.4, 2.0, 1.5)
    padded = pad_sequence(segments, batch_first=True).view(2, 2, -1)
    features, mask = encoder(padded, torch.tensor([[16000, 6400], [32000, 24000]]))
    expected, kept = encoder(segments)
    assert features.shape == (2, 2, 96, 32)
    assert torch.equal(mask.flatten(0, 1), kept[0])
    torch.testing.assert_close(features.flatten(0, 1)[kept[0]], expected[kept])


@pytest.mark.parametrize("samples", [0, 1, 300, 2799, 2800])
def test_a_segment_too_short_for_a_row_of_patches_still_gives_one(samples):
    encoder = AudioEncoder(BEATS).eval()
    for segments in [torch.randn(samples)], [torch.randn(samples), torch.randn(16000)]:
        features, mask = encoder(segments)
        assert mask[0, 0].sum() == 8 and features[mask].isfinite().all()


# --- frames ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("config, prefix", [(CLIP, 1), (SIGLIP, 0)])
def test_frames_become_the_patches_below_the_last_layer(config, prefix):
    encoder, frames = VisionEncoder(config).eval(), movie(2, 3, 32, 32)
    features = encoder(frames)
    assert features.shape == (2, 3, 16, 32)
    assert (encoder.width, encoder.size, encoder.tokens) == (32, 32, 16)
    states = encoder.model(encoder.pixels(frames[1]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(features[1], states[2][:, prefix:])
    first, last = encoder.hidden(frames, [0, -1])
    assert first.shape == last.shape == features.shape and not torch.equal(first, last)


@pytest.mark.parametrize(
    "config, processor", [(CLIP, CLIPImageProcessor), (SIGLIP, SiglipImageProcessor)]
)
def test_pixels_are_normalised_as_the_released_processor_does(config, processor):
    frames = movie(2, 32, 32)
    process = processor(do_resize=False, do_center_crop=False)
    released = process(list(frames.permute(0, 3, 1, 2)), return_tensors="pt")["pixel_values"]
    pixels = VisionEncoder(config).pixels(frames)
    torch.testing.assert_close(pixels, released, atol=1e-5, rtol=1e-5)


def test_frames_of_any_size_are_squashed_whole_to_the_input():
    encoder, frames = VisionEncoder(CLIP), torch.zeros(1, 48, 100, 3, dtype=torch.uint8)
    frames[:, :, :50] = 255  # left half white
    pixels = encoder.pixels(frames) * encoder.std + encoder.mean
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels[..., :14].min() > 0.99 and pixels[..., 18:].max() < 0.01


def test_a_long_video_in_passes_gives_what_its_frames_give_alone():
    encoder, frames = VisionEncoder(SIGLIP).eval(), movie(1, 70, 32, 32)
    features = encoder(frames)
    assert features.shape == (1, 70, 16, 32)
    torch.testing.assert_close(features[:, 66:67], encoder(frames[:, 66:67]), atol=1e-5, rtol=1e-4)


# --- all of them ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "cls, config, media",
    [
        (VisionEncoder, CLIP, movie(1, 2, 32, 32)),
        (VisionEncoder, SIGLIP, movie(1, 2, 32, 32)),
        (AudioEncoder, BEATS, torch.randn(1, 2, 8000)),
    ],
)
def test_a_frozen_encoder_is_deterministic_and_comes_back_from_its_state_dict(
    cls, config, media, tmp_path
):
    encoder = cls(config).eval().requires_grad_(False)
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    again = cls(config).eval().requires_grad_(False)
    again.load_state_dict(load_file(tmp_path / "encoder.safetensors"))
    # of BEATs without its mask
    first, second, rebuilt = encoder(media)[0], encoder(media)[0], again(media)[0]
    assert torch.equal(first, second) and torch.equal(first, rebuilt)
    assert not first.requires_grad
    assert again.width == encoder.width == 32


def test_a_pretrained_folder_may_hold_the_whole_of_clip(tmp_path):
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION)).eval()
    clip.save_pretrained(tmp_path)
    encoder, frames = VisionEncoder(tmp_path), movie(1, 2, 32, 32)
    pixels = encoder.pixels(frames[0])
    states = clip.vision_model(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(encoder(frames)[0], states[-2][:, 1:])

    weights = load_file(tmp_path / "model.safetensors")
    lacking = {k: v for k, v in weights.items() if "vision_model.encoder.layers.1" not in k}
    save_file(lacking, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"its weights lack \['encoder.layers.1"):
        VisionEncoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half a download")
    with pytest.raises(ModelError, match="cannot be loaded"):
        VisionEncoder(tmp_path)


def test_a_vision_encoder_that_cannot_be_had_says_what_to_do(tmp_path):
    command = "hf download openai/clip-vit-large-patch14"
    with pytest.raises(ModelError, match=f"no/such/clip: cannot be loaded.*{command}"):
        VisionEncoder(tmp_path / "no/such/clip")
    known = "clip_vision_model or siglip_vision_model"
    with pytest.raises(ModelError, match=f"model_type 'bert'.*{known}"):
        VisionEncoder({"model_type": "bert"})
    with pytest.raises(ModelError, match="layer -5: .* hidden states 0 to 3"):
        VisionEncoder(CLIP, layer=-5)


def test_equal_sounds_are_encoded_once_and_each_gives_what_it_gives_alone():
    encoder = AudioEncoder(BEATS)
    torch.manual_seed(0)
    long, short = torch.randn(2, 8000).numpy(), torch.randn(2, 4000).numpy()
    sounds = [list(long), list(short), list(long.copy())]
    passes = []
    encoder.beats.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    with torch.no_grad():
        encoded = encode_sounds(encoder, sounds)
        assert passes == [2, 2]  # segments: the long sound, the short one
        for sound, features in zip(sounds, encoded):
            alone, mask = encoder([torch.as_tensor(wave) for wave in sound])
            torch.testing.assert_close(features.features, alone[0])
            assert torch.equal(features.mask, mask[0])


# --- the Q-Former ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_few_queries_attention_gives_what_transformers_attention_gives(attention):
    """With padded tokens too; values and gradients of queries and features."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 16}
    config = Blip2QFormerConfig(
        **sizes,
        num_hidden_layers=2,
        cross_attention_frequency=1,
        encoder_hidden_size=20,
        attn_implementation=attention,
    )
    theirs = Blip2QFormerModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # biases too
    ours = use_few_queries(deepcopy(theirs))
    mask = torch.arange(7)[None] < torch.tensor([[7], [4], [1]])  # (3, 7)

    for real in (None, mask):
        results = []
        for model in (theirs, ours):
            torch.manual_seed(0)
            query = torch.randn(3, 5, 32, requires_grad=True)
            x = torch.randn(3, 7, 20, requires_grad=True)
            states = model(query, encoder_hidden_states=x, encoder_attention_mask=real)
            states.last_hidden_state.square().sum().backward()
            results.append((states.last_hidden_state, query.grad, x.grad))
        for expected, got in zip(*results):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
