"""The plan: its counts are the models', its estimate of activations is what a forward really keeps."""
import time

import pytest
from torch.autograd.graph import saved_tensors_hooks

import train
from crab_min.backbones.composed import load_base
from crab_min.recipes.presets import PRESETS
from crab_min.data import read_samples
from crab_min.features import Features
from crab_min.model import AdapterConfig
from crab_min.tools.plan import activations, count_parameters, plan, sizes_of
from crab_min.trainer import TrainConfig


def test_crab_plus_7b_has_the_adapter_of_the_paper():
    """682,350,592 parameters on the LM of Qwen2.5-Omni-7B; 870,480,512 with the released placement (papers/crab.md 2.2)."""
    sizes, paper = sizes_of("crab_plus-7b"), AdapterConfig(r=128, alpha=256)
    assert count_parameters(sizes, paper, "adapter")["adapter in the language model"] == (682_350_592, 0)
    released = count_parameters(sizes, AdapterConfig(r=128, alpha=256, encoder_adapters=True), "adapter")
    assert sum(trained for trained, _ in released.values()) == 870_480_512


def test_crab_7b_has_the_adapter_of_the_paper():
    assert count_parameters(sizes_of("crab-7b"), AdapterConfig(), "adapter")["adapter in the language model"] == (45_162_496, 0)


def test_the_tiny_counts_are_those_of_the_model():
    model = load_base()
    model.add_adapter(AdapterConfig(r=16))
    model.set_trainable("connectors")
    found = count_parameters(sizes_of("crab_plus-tiny"), AdapterConfig(r=16), "adapter+connectors")
    assert found["adapter in the language model"][0] == sum(p.numel() for n, p in model.named_parameters() if "ilora_" in n)
    assert found["visual connector"] == (sum(p.numel() for p in model.visual_qformer.parameters()), 0)
    assert found["vision encoder"][1] == sum(p.numel() for p in model.vision.parameters())


@pytest.mark.parametrize("adapter", ["none", "lora", "ilora"])
def test_the_estimate_of_activations_is_what_a_forward_keeps(adapter, small_world):
    """A training batch of the tiny model on the CPU: within a fifth."""
    model, config = load_base(), AdapterConfig(adapter=adapter, r=16, dropout=0)
    model.add_adapter(config)
    samples = read_samples(small_world, ["avqa"], "train", limit=8)
    batch = model.train().collate([s.parts for s in samples], Features(model)(samples), [s.target for s in samples])
    batch_size, length = batch["ids"].shape
    answer = int((batch["labels"] != -100).sum(1).max())
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    embedded = model.embed(batch).detach().requires_grad_()
    model.embed = lambda batch: embedded

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = model(batch)
    estimate = activations(sizes_of("crab_plus-tiny"), config, batch_size, length, answer, False, False)
    assert loss.requires_grad and abs(estimate / sum(kept.values()) - 1) < .2


def test_checkpointing_and_half_need_less():
    sizes, adapter = sizes_of("crab_plus-tiny"), AdapterConfig(r=16)
    everything = activations(sizes, adapter, 4, 200, 20, False, False)
    assert activations(sizes, adapter, 4, 200, 20, True, False) < .6 * everything
    assert activations(sizes, adapter, 4, 200, 20, False, True) < everything


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "tiny-base"])
def test_every_preset_has_a_plan(preset, capsys):
    began = time.time()
    assert train.main([preset, "--plan"]) == 0
    said = capsys.readouterr().out
    assert "fits 24 GB" in said and ("adapter in the language model" in said) == (not preset.startswith(("crab-", "crema-")))     # nor has Crab's first stage
    assert time.time() - began < 120                   # a broken plan would load weights or run for minutes


@pytest.mark.parametrize("preset, patch, lora, tflops, share", [("pave-0.5b", 6_235_776, 35_192_832, .0586, .0020), ("pave-7b", 8_996_352, 161_480_704, .0931, .0007)])
def test_pave_costs_a_thousandth_of_its_base(preset, patch, lora, tflops, share):
    """FLOPs of the 7B patch by hand, two a product: video 32 x 196 x 1152 x 512, sound 59 x 1024 x 512; twice query (6272 x 512 x 512), key and value
    (59 x 512 x 512 each) and MLP (2 x 6272 x 512 x 1024); out 6272 x (512 x 1024 + 1024 x 3584): 46.5 billion products, 0.093 TFLOPs."""
    found = plan(TrainConfig(**PRESETS[preset][1]), preset)
    count, spent = found["patches"]["audio"]
    assert count == found["parts"]["patch for audio"]["trained"] == patch
    assert found["parts"]["adapter in the language model"]["trained"] == lora
    assert spent / 1e12 == pytest.approx(tflops, rel=.02) and spent / found["patches"]["base"][1] == pytest.approx(share, abs=5e-5)
