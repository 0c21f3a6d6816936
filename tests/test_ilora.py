"""I-LoRA: its equation, what PEFT does with it, and what it refuses."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from crab_min.evaluation.routing import record_routing
from crab_min.ilora import (
    ILoraConfig,
    ILoraError,
    ILoraLinear,
    MergeError,
    loop_form,
    route,
    stacked_form,
)

README = Path(__file__).parents[1] / "README.md"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(3, 15).view(2, 6)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def llama() -> LlamaForCausalLM:
    """Build the same small base every time."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def config(**changes) -> ILoraConfig:
    return ILoraConfig(**{"r": 4, "alpha": 8, "target_modules": SEVEN, **changes})


def stir(model: nn.Module) -> nn.Module:
    """Give every adapter weight random values, as if it had been trained."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


# --- the equation ---------------------------------------------------------------------------------
def test_a_fresh_adapter_changes_nothing():
    assert torch.equal(logits(get_peft_model(llama(), config()).eval()), logits(llama()))


def test_it_is_the_equation_head_by_head():
    base, x = nn.Linear(10, 7), torch.randn(3, 5, 10)
    layer = stir(ILoraLinear(base, "default", ILoraConfig(r=4, alpha=6, heads=3)))
    A = layer.ilora_A["default"].weight
    R = layer.ilora_router["default"].weight
    B = layer.ilora_B["default"].weight
    w, y = torch.softmax(x @ R.T, -1), base(x)
    for k in range(3):
        B_k = B[:, 4 * k : 4 * (k + 1)]
        y = y + 6 / 4 * w[..., k : k + 1] * (x @ A.T @ B_k.T)
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(layer(x[0, 0]), y[0, 0])  # any number of leading axes


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
def test_the_stacked_form_is_the_loop_over_the_heads_and_so_is_its_gradient(shape):
    heads, r, d_out = 3, 4, 7
    given = [
        torch.randn(*shape, d_out),  # y
        torch.randn(*shape, r),  # A x
        route(torch.randn(*shape, heads)),
        torch.randn(d_out, heads * r),
    ]
    results = []
    for form in loop_form, stacked_form:
        tensors = [tensor.double().requires_grad_() for tensor in given]
        y = form(*tensors, scaling=1.5)
        y.sin().sum().backward()
        results.append([y, *(tensor.grad for tensor in tensors)])
    for loop, stacked in zip(*results):
        torch.testing.assert_close(stacked, loop)


def test_one_head_is_lora():
    ours = stir(get_peft_model(llama(), config(heads=1)))
    lora_config = LoraConfig(r=4, lora_alpha=8, target_modules=SEVEN)
    lora = get_peft_model(llama(), lora_config).eval()
    state = {
        name.replace("ilora_", "lora_"): parameter
        for name, parameter in ours.named_parameters()
        if "ilora_router" not in name
    }
    lora.load_state_dict(state)
    torch.testing.assert_close(logits(ours), logits(lora))


def test_the_router_sees_the_input_without_dropout():
    layer = stir(ILoraLinear(nn.Linear(10, 7), "default", ILoraConfig(r=4, dropout=0.5))).train()
    x = torch.randn(4, 10)
    with record_routing(layer) as first:
        y = layer(x)
    with record_routing(layer) as second:
        assert not torch.equal(layer(x), y)
    assert torch.equal(first[""], second[""])


def test_routing_is_recorded_for_each_linear_and_only_inside_the_block():
    model = stir(get_peft_model(llama(), config()))
    with record_routing(model) as weights:
        logits(model)
    assert len(weights) == 7 * 2 and "base_model.model.model.layers.1.mlp.up_proj" in weights
    for w in weights.values():
        assert w.shape == (2, 6, 3) and not w.requires_grad
        torch.testing.assert_close(w.sum(-1), torch.ones(2, 6))
    before = dict(weights)
    model(IDS.flip(0))
    assert all(weights[name] is before[name] for name in before)


def test_llama_2_7b_has_the_parameters_of_the_paper():
    sizes = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(sizes)
        model = get_peft_model(model, ILoraConfig(r=8, heads=3, target_modules=SEVEN))
    assert model.get_nb_trainable_parameters()[0] == 45_162_496
    assert sum(p.requires_grad for p in model.parameters()) == 32 * 7 * 3


# --- training -------------------------------------------------------------------------------------
def test_a_step_moves_the_adapter_and_no_bit_of_the_base():
    model = get_peft_model(llama(), config()).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):  # B is zero at first, so A and R move from the second step on
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("ilora_" not in name), name


def test_a_half_precision_base_takes_a_full_precision_adapter():
    model = stir(get_peft_model(llama().bfloat16(), config()))
    assert {p.dtype for n, p in model.named_parameters() if "ilora_" in n} == {torch.float32}
    with record_routing(model) as weights:
        output = model(IDS, labels=IDS)
    assert output.logits.dtype == torch.bfloat16
    assert next(iter(weights.values())).dtype == torch.float32
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# --- with PEFT ------------------------------------------------------------------------------------
def test_saved_and_loaded_it_is_the_same_to_the_bit(tmp_path):
    settings = config(modules_to_save=["lm_head"], exclude_modules=["k_proj"])
    model = stir(get_peft_model(llama(), settings))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    loaded, saved = again.peft_config["default"], model.peft_config["default"]
    assert (loaded.r, loaded.alpha, loaded.heads) == (4, 8, 3)
    assert loaded.target_modules == saved.target_modules
    assert not any(p.requires_grad for p in again.parameters())


def test_disabled_it_is_the_base():
    model = stir(get_peft_model(llama(), config()))
    assert not torch.equal(logits(model), logits(llama()))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))


def test_a_second_adapter_can_be_added_switched_to_and_deleted():
    model = get_peft_model(llama(), config())
    model.add_adapter("other", config(r=2, heads=5, target_modules="all-linear"))
    first = logits(stir(model))
    model.set_adapter("other")
    other = logits(model)
    assert not torch.equal(first, other)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.split(".")[-2] for name in trained} == {"other"}
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(logits(model), other)
    assert not any(".default." in name for name, _ in model.named_parameters())


def test_several_heads_are_not_merged_and_the_reason_is_given():
    model = stir(get_peft_model(llama(), config()))
    before = logits(model)
    for merge in model.merge_adapter, model.merge_and_unload:
        with pytest.raises(MergeError, match="'default' has 3 heads.*for every token.*heads=1"):
            merge()
    assert torch.equal(logits(model), before)


def test_one_head_is_merged_and_unmerged():
    model = stir(get_peft_model(llama(), config(heads=1)))
    before, untouched = logits(model), llama().model.layers[0].self_attn.q_proj.weight
    model.merge_adapter()
    merged = model.base_model.model.model.layers[0].self_attn.q_proj
    assert merged.merged and not torch.equal(merged.weight, untouched)
    torch.testing.assert_close(logits(model), before)
    model.unmerge_adapter()
    torch.testing.assert_close(merged.weight, untouched)
    torch.testing.assert_close(logits(model), before)
    torch.testing.assert_close(logits(model.merge_and_unload(safe_merge=True)), before)


def test_it_generates():
    model = stir(get_peft_model(llama(), config()))
    answer = model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    longer = model(answer[:, :-1]).logits[:, -3:].argmax(-1)  # the cache changes nothing
    assert answer.shape == (2, 9) and torch.equal(answer[:, -3:], longer)


def test_it_adapts_an_encoder_decoder():
    sizes = T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    t5 = T5ForConditionalGeneration(sizes).eval()
    before = t5(IDS, labels=IDS).loss
    model = get_peft_model(t5, config(target_modules=["q", "v", "wo"])).eval()
    assert torch.equal(model(input_ids=IDS, labels=IDS).loss, before)
    assert not torch.equal(stir(model)(input_ids=IDS, labels=IDS).loss, before)
    assert model.generate(input_ids=IDS, max_new_tokens=3).shape[0] == 2


def test_the_four_lines_of_the_readme():
    block = r"```python\n(from peft import get_peft_model\n.*?)```"
    lines = re.search(block, README.read_text(), re.S)[1]
    assert len(lines.strip().splitlines()) == 4
    names = {"model": llama(), "ids": IDS}
    exec(lines, names)  # ends with the loss of a training step
    assert all(p.grad is not None for p in names["model"].parameters() if p.requires_grad)


def test_only_some_layers():
    model = get_peft_model(llama(), config(layers_to_transform=[1], layers_pattern="layers"))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.split(".")[4] for name in trained} == {"1"}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"r": 0}, "r=0"),
        ({"heads": 0}, "heads=0"),
        (
            {"target_modules": ".*q_proj", "layers_to_transform": 1},
            "put the layers into the regex",
        ),
        ({"layers_pattern": "layers"}, "set layers_to_transform"),
    ],
)
def test_settings_without_sense_are_refused(changes, reason):
    with pytest.raises(ILoraError, match=reason):
        config(**changes)


@pytest.mark.parametrize("targets", [["to_q"], r"layers\.\d+\.q_proj", "model.*k_prj"])
def test_targets_that_are_not_there_are_told_what_is(targets):
    listed = r"q_proj \(2\), k_proj \(2\).*down_proj \(2\), lm_head \(1\)"
    with pytest.raises(ILoraError, match=listed + ".*like 'model.layers.0.self_attn.q_proj'"):
        get_peft_model(llama(), config(target_modules=targets))


def test_only_linears_are_adapted():
    with pytest.raises(ILoraError, match="model.embed_tokens is a Embedding.*nn.Linear"):
        get_peft_model(llama(), config(target_modules=["embed_tokens"]))
