"""What PEFT promises of a method, held for I-LoRA on models of every shape.

Where I-LoRA cannot keep a promise (merging several heads, quantized weights, modules that read a
weight themselves) it raises an error with a name.
"""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from crab_min.config import AdapterConfig
from crab_min.ilora import ILoraConfig, ILoraError, ILoraLinear, MergeError
from crab_min.model import peft_config
from crab_min.trained_parts import unadapted

IDS = torch.arange(3, 15).view(2, 6)
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


class Mlp(nn.Module):
    """PEFT's custom model: linears by their own, with and without a bias."""

    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.drop = nn.Dropout(0.5)
        self.lin1 = nn.Linear(20, 6, bias=False)

    def forward(self, x):
        x = x.to(self.lin0.weight.dtype)
        return self.lin1(self.drop(self.lin0(x).relu()))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=40, decoder_start_token_id=0, **sizes))


X = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
# name -> the base, what it is called with, targets of two adapters
MODELS = {
    "mlp": (Mlp, {"x": X}, ["lin0", "lin1"], ["lin1"]),
    "llama": (
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        {"input_ids": IDS},
        ["q_proj", "down_proj"],
        ["q_proj", "up_proj"],
    ),
    "t5": (t5, {"input_ids": IDS, "decoder_input_ids": IDS}, ["q", "wo"], ["v"]),
}
CASES = [(name, heads) for name in MODELS for heads in (1, 3)]


def base_of(name: str) -> nn.Module:
    """Build the same base every time."""
    torch.manual_seed(1)
    return MODELS[name][0]().eval()


def adapted(name: str, heads: int, **changes) -> PeftModel:
    """Put an adapter with an update that is not zero on a base."""
    base = base_of(name)
    torch.manual_seed(2)
    targets = {"target_modules": MODELS[name][2], "init_weights": False}
    config = ILoraConfig(**{"r": 4, "alpha": 8, "heads": heads, **targets, **changes})
    return get_peft_model(base, config).eval()


def add_other(model: PeftModel, name: str, heads: int) -> None:
    torch.manual_seed(3)
    config = ILoraConfig(r=2, heads=heads, target_modules=MODELS[name][3], init_weights=False)
    model.add_adapter("other", config)
    model.eval()


@torch.no_grad()
def output(model: nn.Module, name: str, **changes) -> torch.Tensor:
    result = model(**{**MODELS[name][1], **changes})
    return getattr(result, "logits", result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name, heads", CASES)
def test_forward_and_backward_in_each_type(name, heads, dtype):
    model = adapted(name, heads).to(dtype)
    assert output(model, name).dtype == dtype
    result = model(**MODELS[name][1])
    getattr(result, "logits", result).float().sum().backward()
    learns = [p for p in model.parameters() if p.requires_grad]
    assert learns and all(p.grad is not None and p.grad.isfinite().all() for p in learns)


@pytest.mark.parametrize("name, heads", CASES)
def test_new_weights_change_nothing_unless_asked_for(name, heads):
    before = output(base_of(name), name)
    assert torch.equal(output(adapted(name, heads, init_weights=True), name), before)
    assert not torch.allclose(output(adapted(name, heads), name), before, atol=1e-4)


@pytest.mark.parametrize("name, heads", CASES)
def test_adapters_are_saved_and_loaded_by_name(name, heads, tmp_path):
    model = adapted(name, heads)
    add_other(model, name, heads)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_of(name), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        again.set_adapter(adapter)
        assert torch.equal(output(again.eval(), name), output(model, name))


@pytest.mark.parametrize("name, heads", CASES)
def test_several_active_adapters_add_up(name, heads):
    model = adapted(name, heads)
    add_other(model, name, heads)
    single = []
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        single.append(output(model, name))
    model.base_model.set_adapter(["default", "other"])
    both = output(model, name)
    assert not any(torch.allclose(both, one, atol=1e-4) for one in single)
    trained = [key for key, p in model.named_parameters() if p.requires_grad]
    assert {key.split(".")[-2] for key in trained} == {"default", "other"}


@pytest.mark.parametrize("name, heads", CASES)
def test_each_row_of_a_mixed_batch_has_its_own_adapter(name, heads):
    model = adapted(name, heads)
    add_other(model, name, heads)
    names = ["other", "__base__", "default", "other"][: len(next(iter(MODELS[name][1].values())))]
    rows = []
    for index, adapter in enumerate(names):
        if adapter != "__base__":
            model.set_adapter(adapter)
        one = {key: value[index : index + 1] for key, value in MODELS[name][1].items()}
        with torch.no_grad():
            if adapter == "__base__":
                with model.disable_adapter():
                    result = model(**one)
            else:
                result = model(**one)
        rows.append(getattr(result, "logits", result))
    mixed = output(model, name, adapter_names=names)
    torch.testing.assert_close(mixed, torch.cat(rows), atol=1e-5, rtol=1e-4)
    with pytest.raises(ILoraError, match="its adapters are __base__, default, other"):
        output(model, name, adapter_names=["nobody"] * len(names))
    with pytest.raises(ILoraError, match="one name per sample"):
        output(model, name, adapter_names=["other"] * (len(names) + 1))
    with pytest.raises(ILoraError, match="for model.eval"):
        output(model.train(), name, adapter_names=names)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_mixed_batch_generates(name, beams):
    model = adapted(name, 3)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
    names = ["default", "__base__"]
    mixed = model.generate(input_ids=IDS, adapter_names=names, **options)
    mine = model.generate(input_ids=IDS[:1], **options)
    base = base_of(name).generate(input_ids=IDS[1:], **options)
    assert torch.equal(mixed, torch.cat([mine, base]))


@pytest.mark.parametrize("name, heads", CASES)
def test_deleted_disabled_and_unloaded(name, heads):
    model, before = adapted(name, heads), output(base_of(name), name)
    add_other(model, name, heads)
    mine = output(model, name)
    with model.disable_adapter():
        assert torch.equal(output(model, name), before)
    model.delete_adapter("other")
    assert torch.equal(output(model, name), mine)
    assert not any(".other" in key for key, _ in model.named_parameters())
    assert torch.equal(output(model.unload(), name), before)


@pytest.mark.parametrize("name", MODELS)
def test_merging(name):
    several = adapted(name, 3)
    mine = output(several, name)
    for merge in (several.merge_adapter, several.merge_and_unload):
        with pytest.raises(MergeError, match="3 heads"):
            merge()
    assert torch.equal(output(several, name), mine)
    single = adapted(name, 1)
    mine = output(single, name)
    single.merge_adapter(safe_merge=True)
    torch.testing.assert_close(output(single, name), mine, atol=1e-5, rtol=1e-4)
    with pytest.raises(ILoraError, match="unmerge"):
        output(single, name, adapter_names=["default"] * len(mine))
    torch.testing.assert_close(output(single.merge_and_unload(), name), mine, atol=1e-5, rtol=1e-4)


def test_layers_have_the_sizes_of_their_linear():
    layer = adapted("mlp", 3).base_model.model.lin0
    assert (layer.in_features, layer.out_features) == (10, 20)


@pytest.mark.parametrize("packed", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_not_merged_and_no_layer_is_lost(packed):
    model = adapted("mlp", 1)
    quantized = model.base_model.model.lin1.base_layer
    quantized.weight = nn.Parameter(quantized.weight.data.to(packed), requires_grad=False)
    before = model.base_model.model.lin0.base_layer.weight.clone()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="lin1 has quantized weights"):
            merge()
    layers = [m for m in model.modules() if isinstance(m, ILoraLinear)]
    assert len(layers) == 2 and not any(layer.merged for layer in layers)
    assert torch.equal(layers[0].base_layer.weight, before)


# --- families of models ---------------------------------------------------------------------------


class Attention(nn.MultiheadAttention):
    """A subclass is found too."""


@pytest.mark.parametrize(
    "base, target, reason",
    [
        (lambda: nn.Sequential(nn.MultiheadAttention(8, 2)), "out_proj", "MultiheadAttention"),
        (lambda: nn.Sequential(Attention(8, 2)), "out_proj", "Attention reads its weight"),
        (
            lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16)),
            "linear1",
            "TransformerEncoderLayer",
        ),
        (
            lambda: MambaForCausalLM(
                MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4)
            ),
            "out_proj",
            "MambaMixer",
        ),
    ],
)
def test_a_module_that_reads_a_weight_itself_is_refused(base, target, reason):
    with pytest.raises(ILoraError, match=reason):
        get_peft_model(base(), ILoraConfig(target_modules=[target]))


def test_fused_linears_have_an_adapter():
    model = Phi3ForCausalLM(Phi3Config(**SIZES))
    model = get_peft_model(model, peft_config(AdapterConfig()))
    layers = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, ILoraLinear)}
    assert layers == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert not unadapted(model)


@pytest.mark.parametrize("adapter", ["ilora", "lora"])
def test_what_has_no_adapter_is_named(adapter):
    model = MixtralForCausalLM(MixtralConfig(num_local_experts=2, **SIZES))
    model = get_peft_model(model, peft_config(AdapterConfig(adapter)))
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert unadapted(model) == ["mlp.gate.weight", *experts]
