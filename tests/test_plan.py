"""The plan counts the run's own model, and its memory is what training and evaluation keep."""

import importlib
import re
from functools import cache

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig

import train
from crab_min.backbones.composed import load_base
from crab_min.backbones.tiny_random import tiny_omni
from crab_min.cli import parse_train
from crab_min.config import AdapterConfig, Settings, TrainingConfig
from crab_min.data import Sample, read_samples
from crab_min.errors import ModelError
from crab_min.features import Features
from crab_min.recipes import crab_plus
from crab_min.recipes.presets import PRESETS
from crab_min.tools import measure
from crab_min.tools.measure import Prompt, activation_bytes, cache_bytes, fill, without_values
from crab_min.tools.plan import Plan, build_model, count_parts, plan, report
from crab_min.trainer import collate_answers
from crab_min.world.side_channels import CHANNELS, build_side_world

ADAPTER = "adapter in the language model"
TINY = ["crab_plus-tiny", "crab-tiny --stage visual", "crab-tiny --stage masks"]
TINY += ["pave-tiny", "crema-tiny"]
OMNI = "crab_plus-tiny --backbone omni --weights tiny-random"
LLAVA = "pave-tiny --backbone llava_onevision --weights tiny-random"
BLIP2 = "crema-tiny --weights tiny-random"


def recipe_and_settings(command: str):
    """Read a command line of train.py, without `python train.py`."""
    given, settings = parse_train(command.split())
    recipe = importlib.import_module(f"crab_min.recipes.{PRESETS[given.preset].recipe}")
    return recipe, recipe.run_settings(settings)


@cache
def plan_of(command: str) -> Plan:
    return plan(*recipe_and_settings(command))


def parts_of(command: str) -> dict:
    return count_parts(build_model(*recipe_and_settings(command))[0])


# --- parameters ----------------------------------------------------------------------------------


def test_crab_plus_7b_has_the_adapter_of_the_paper():
    assert parts_of("crab_plus-7b")[ADAPTER].trained == 682_350_592


def test_crab_7b_has_the_adapter_of_the_paper():
    assert parts_of("crab-7b --stage unified")[ADAPTER].trained == 45_162_496


@pytest.mark.parametrize("command", [*TINY, OMNI, LLAVA, BLIP2])
def test_the_counted_model_is_the_one_that_trains(command):
    recipe, settings = recipe_and_settings(command)
    empty, sides = build_model(recipe, settings)
    model = recipe.load_model(settings)
    widths = {name: medium.features.shape[-1] for name, medium in sides.items()}
    recipe.add_trained_parts(model, settings, widths)
    model.set_trainable(settings.training.parts)
    assert count_parts(empty) == count_parts(model)
    assert [p.dtype for p in empty.parameters()] == [p.dtype for p in model.parameters()]
    assert all(parameter.is_meta for parameter in empty.parameters())


@pytest.mark.parametrize("command", ["pave-tiny --side ", "crema-tiny --modalities rgb,"])
def test_side_channels_have_the_shapes_of_the_built_in_world(command, tmp_path):
    recipe, settings = recipe_and_settings(command + ",".join(CHANNELS))
    _, sides = build_model(recipe, settings)

    # what a run on the world encodes
    rows = build_side_world("", 1, 1, 0, list(CHANNELS), tmp_path, together=True)
    (sample, *_) = recipe.prepare_samples(read_samples(rows, [], "train"), settings)
    (media,) = Features(recipe.load_model(settings))([sample])
    names = [part.side for part in sample.media]
    encoded = {name: medium.features.shape for name, medium in zip(names, media) if name}

    assert {name: medium.features.shape for name, medium in sides.items()} == encoded


def test_a_stage_of_crab_trains_its_connector_alone():
    trained = [title for title, count in parts_of("crab-7b").items() if count.trained]
    assert trained == ["visual connector"]


# --- flags ---------------------------------------------------------------------------------------


def test_the_plan_follows_the_backbone():
    other = "crab_plus-tiny --backbone omni --weights Qwen/Qwen2.5-Omni-3B --trainable adapter"
    assert parts_of(other) == parts_of("crab_plus-3b --r 16")


def test_the_plan_follows_weights_in_a_folder(tmp_path):
    thinker, _ = tiny_omni()
    thinker.config.save_pretrained(tmp_path)
    parts = parts_of(f"crab_plus-7b --weights {tmp_path}")
    frozen = sum(count.frozen for count in parts.values())
    assert frozen == sum(parameter.numel() for parameter in thinker.parameters())


def test_the_plan_follows_an_lm_in_a_folder(tmp_path):
    sizes = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512}
    LlamaConfig(**sizes, num_hidden_layers=3).save_pretrained(tmp_path)
    result = plan_of(f"crab-7b --stage unified --llm {tmp_path}")
    assert result.parts["head"].frozen == 1000 * 256
    # q, k, v, o and the MLP of three layers, and two norms of each and one at the end
    layers = 3 * (4 * 256**2 + 3 * 256 * 512 + 2 * 256) + 256
    assert result.parts["language model"].frozen == 1000 * 256 + layers


def test_unknown_weights_are_an_error_that_says_what_to_give(capsys):
    assert train.main(["crab_plus-7b", "--plan", "--weights", "no/such-model"]) == 2
    message = capsys.readouterr().err
    assert "no/such-model" in message and "config.json" in message
    with pytest.raises(ModelError, match="--vision, --audio and --llm go together"):
        parts_of("crab_plus-tiny --llm no/such-model")


def test_the_precision_is_that_of_the_weights():
    assert list(plan_of(OMNI).memory) == ["float32"]
    assert list(plan_of("crab_plus-3b").memory) == ["bfloat16", "4-bit LM"]
    assert list(plan_of("crab_plus-3b --load-in-4bit").memory) == ["4-bit LM"]


# --- memory --------------------------------------------------------------------------------------


def settings_for(adapter: str, batch: int = 8, **training) -> Settings:
    return Settings(
        adapter=AdapterConfig(adapter=adapter, r=16, dropout=0),
        training=TrainingConfig(batch_size=batch, **training),
    )


def estimate(settings: Settings, prompt: Prompt) -> int:
    """Return the activations that the plan counts for a batch of such prompts."""
    model, _ = build_model(crab_plus, settings)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill(model)
        media = [without_values(medium) for medium in prompt.media]
        return activation_bytes(model, settings, Prompt(prompt.tokens, media))


def rows_of_different_clips(folder) -> list[Sample]:
    samples = read_samples(folder, ["ave"], "train")
    return list({sample.media[0].path: sample for sample in samples}.values())[:8]


@pytest.mark.parametrize("adapter", ["none", "lora", "ilora"])
def test_the_estimate_of_activations_is_what_a_forward_keeps(adapter, small_world, monkeypatch):
    """A training batch of the tiny model: within a fifth."""
    settings = settings_for(adapter, bf16=False)
    model = load_base()
    model.add_adapter(settings.adapter)
    model.set_trainable(settings.training.parts)
    samples = rows_of_different_clips(small_world)
    media = Features(model)(samples)
    batch = collate_answers(model.train(), samples, media)

    # what its forward keeps
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch)
    real = sum(storage.nbytes() for storage in kept.values())

    # what the plan says
    monkeypatch.setattr(measure, "ANSWER", batch.longest_answer)
    assert estimate(settings, Prompt(batch.ids.shape[1], media[0])) == pytest.approx(real, rel=0.2)


def test_checkpointing_and_bf16_need_less():
    prompt = Prompt(200, [])
    everything = estimate(settings_for("ilora", bf16=False), prompt)
    checkpointed = settings_for("ilora", bf16=False, gradient_checkpointing=True)
    assert estimate(checkpointed, prompt) < 0.6 * everything
    assert estimate(settings_for("ilora"), prompt) < everything


def test_the_cache_of_evaluation_is_that_of_a_forward():
    model = load_base()
    embeddings = torch.zeros(2, 7, model.llm.config.hidden_size)
    cache = model.llm(inputs_embeds=embeddings, use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 2 * 7 * cache_bytes(model) == kept


def test_evaluation_decides_where_it_needs_more_than_training():
    memory = plan_of("crab_plus-7b").memory["4-bit LM"]
    assert memory.evaluation < memory.training < 24e9 and memory.fits(24)
    more = plan_of("crab_plus-7b --eval-batch-tokens 50000").memory["4-bit LM"]
    assert more.training == memory.training < 24e9 < more.evaluation
    assert not more.fits(24) and more.fits(48)


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_the_plan(capsys):
    assert train.main(["crab_plus-tiny", "--plan"]) == 0
    assert capsys.readouterr().out.strip() == report(plan_of("crab_plus-tiny"))


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "tiny-base"])
def test_every_preset_has_a_plan(preset):
    printed = report(plan_of(preset))
    assert "fits 24 GB" in printed and "evaluation, " in printed
    # Crab's first stage and CREMA have no adapter on the LM
    assert (ADAPTER in printed) == (not preset.startswith(("crab-", "crema-")))


@pytest.mark.parametrize(
    "preset, patch, lora, tflops, share",
    [
        ("pave-0.5b", 6_235_776, 35_192_832, 0.0586, 0.0020),
        ("pave-7b", 8_996_352, 161_480_704, 0.0931, 0.0007),
    ],
)
def test_a_patch_costs_a_thousandth_of_its_base(preset, patch, lora, tflops, share):
    """FLOPs of the 7B patch by hand, two for a product and its sum.

    Products: video 32 x 196 x 1152 x 512, sound 59 x 1024 x 512; twice query (6272 x 512 x 512),
    key and value (59 x 512 x 512 each) and MLP (2 x 6272 x 512 x 1024); out
    6272 x (512 x 1024 + 1024 x 3584). Together 46.5 billion: 0.093 TFLOPs.
    """
    result = plan_of(preset)
    operations = result.patch_operations["audio"]
    assert result.parts["patch for audio"].trained == patch
    assert result.parts[ADAPTER].trained == lora
    assert operations / 1e12 == pytest.approx(tflops, rel=0.02)
    assert operations / result.base_operations == pytest.approx(share, abs=5e-5)


def test_the_lm_reads_as_much_with_more_modalities_if_they_are_fused(capsys):
    """Fused tokens do not grow with the modalities; those that are not fused do (CREMA)."""
    counted = {}
    for names in ("rgb,audio", "rgb,audio,flow,depth"):
        assert train.main(f"crema-tiny --plan --modalities {names}".split()) == 0
        printed = capsys.readouterr().out
        lines = re.findall(r"modalities (fused|not fused): ([\d.]+) TFLOPs", printed)
        counted[names] = {join: float(operations) for join, operations in lines}
    few, more = counted.values()
    assert few["fused"] == more["fused"] < more["not fused"]
    assert few["not fused"] < more["not fused"]
