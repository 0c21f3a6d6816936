"""CREMA's modules: MMQA, self-gated fusion, early exit, released names.

In MMQA every modality has parts of its own, which come and go without touching the others.
"""

import copy

import pytest
import torch
from released import linear, norm, random_weights, revert
from torch import nn
from transformers import Blip2QFormerModel

from crab_min.crema import (
    FIRST_EXIT,
    EarlyExit,
    MultimodalConfig,
    MultimodalQFormer,
    SelfGatedFusion,
    over_frames,
)
from crab_min.errors import ModelError
from crab_min.qformer import use_few_queries
from crab_min.tools.released.weights import convert, missing_modalities
from crab_min.trained_parts import check_fit

# `norm` (surface normals) is the name of a module too
WIDTHS = {"rgb": 24, "flow": 24, "audio": 20, "norm": 24}


def tiny(*names: str, trained: bool = True) -> MultimodalQFormer:
    """Build a small Q-Former with these modalities; trained: B is not zero."""
    torch.manual_seed(0)
    config = MultimodalConfig(24, 36, queries=5, hidden=32, layers=4, heads=4, intermediate=64)
    config.rank = 8
    model = MultimodalQFormer(config)
    for name in names:
        model.add(name, WIDTHS[name])
    if trained:
        for pair in model.adapted_linears():
            for B in pair.B.values():
                nn.init.normal_(B.weight)
    return model


def features(name: str, steps: int = 3) -> torch.Tensor:
    return torch.randn(2, steps, 7, WIDTHS[name])


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


def unchanged(before: dict, after: dict) -> set[str]:
    return {name for name in before if torch.equal(before[name], after[name])}


def is_low_rank(name: str) -> bool:
    return ".A." in name or ".B." in name


# --- MMQA -----------------------------------------------------------------------------------------
def test_parameter_counts_are_the_papers():
    with torch.device("meta"):
        model = MultimodalQFormer(MultimodalConfig())
        model.add("rgb", 1408)
        model.add("audio", 768)
        assert count(model.parameters_of("rgb").values()) == 3_961_600
        assert count(model.parameters_of("audio").values()) == 5_044_352
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == model.parameters_of("rgb").keys() | model.parameters_of("audio").keys()
        sizes = [count(SelfGatedFusion(list("afdn")[:n], 2048).parameters()) for n in (1, 2, 3, 4)]
        assert sizes == [4_196_352, 8_390_656, 12_584_960, 16_779_264]


def test_a_fresh_modality_gives_what_the_frozen_qformer_gives():
    model, x = tiny("rgb", "flow", trained=False).eval(), features("rgb")
    frozen = use_few_queries(Blip2QFormerModel(model.qformer.config)).eval()
    weights = {}
    for name, weight in model.qformer.state_dict().items():
        if not is_low_rank(name):
            weights[name.replace(".base.", ".")] = weight
    frozen.load_state_dict(weights)

    part = model.parts["rgb"]
    queries, flat = part.query.expand(6, -1, -1), part.norm(x.flatten(0, 1))
    with torch.no_grad():
        states = frozen(queries, encoder_hidden_states=flat).last_hidden_state
        expected = part.out(states).unflatten(0, (2, 3))
        assert torch.equal(model("rgb", x), expected)
        value = model.qformer.encoder.layer[3].attention.attention.value
        nn.init.ones_(value.B["rgb"].weight)
        assert not torch.allclose(model("rgb", x), expected)
        assert torch.equal(model("rgb", x, adapted=False), expected)


def test_no_modality_acts_outside_of_the_forward():
    model = tiny("rgb", "audio")
    model("rgb", features("rgb"))
    assert {pair.modality for pair in model.adapted_linears()} == {None}


def test_a_masked_token_is_not_read():
    model, x = tiny("audio"), features("audio")
    mask = torch.ones(2, 3, 7, dtype=torch.bool)
    mask[..., 5:] = False
    torch.testing.assert_close(model("audio", x, mask), model("audio", x[:, :, :5]))


def test_a_step_on_a_modality_changes_it_and_the_fusion_alone():
    qformer, fusion = tiny("rgb", "flow", "audio"), SelfGatedFusion(["flow", "audio"], 36)
    model = nn.ModuleDict({"multimodal": qformer, "fusion": fusion})
    before = copy.deepcopy(model.state_dict())
    stepped = {f"multimodal.{name}": p for name, p in qformer.parameters_of("audio").items()}
    stepped |= {f"fusion.{name}": p for name, p in fusion.named_parameters()}

    tokens = {name: qformer(name, features(name)) for name in ("rgb", "flow", "audio")}
    (tokens.pop("rgb") + fusion(tokens)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in stepped.values())
    frozen = [p for name, p in qformer.qformer.named_parameters() if not is_low_rank(name)]
    assert all(p.grad is None for p in frozen)
    torch.optim.AdamW(stepped.values(), lr=1e-2).step()
    assert before.keys() - unchanged(before, model.state_dict()) == stepped.keys()


def test_adding_and_removing_leave_the_others_bit_for_bit():
    model, x = tiny("rgb", "audio"), {name: features(name) for name in ("rgb", "audio")}
    before = copy.deepcopy(model.state_dict())
    parameters = {id(p) for p in model.parameters()}
    tokens = {name: model(name, x[name]) for name in x}
    steps = (
        lambda: model.add("norm", 24),
        lambda: model("norm", features("norm")),
        lambda: model.remove("norm"),
    )
    for step in steps:
        step()
        assert unchanged(before, model.state_dict()) == before.keys()
        assert parameters <= {id(p) for p in model.parameters()}
        assert all(torch.equal(model(name, x[name]), tokens[name]) for name in x)
    assert model.state_dict().keys() == before.keys()


# --- self-gated fusion ----------------------------------------------------------------------------
def test_the_number_of_tokens_does_not_grow_with_the_modalities():
    x = {f"m{i}": torch.randn(2, 4, 5, 36) for i in range(4)}
    for sides in (1, 2, 4):
        names = list(x)[:sides]
        fused = SelfGatedFusion(names, 36)({name: x[name] for name in names})
        assert fused.shape == (2, 4, 5, 36)


def test_fusion_gates_a_linear_of_what_is_there():
    fusion, flow = SelfGatedFusion(["flow", "audio"], 6), torch.randn(2, 3, 5, 6)
    audio = over_frames(torch.randn(2, 2, 5, 6), 3)
    fused = fusion({"flow": flow, "audio": audio})
    f = fusion.linear(torch.cat([flow, audio], -1))
    torch.testing.assert_close(fused, f.sigmoid() * f)

    # a missing modality counts as zeros
    silent = fusion({"flow": flow, "audio": torch.zeros_like(flow)})
    assert torch.equal(fusion({"flow": flow}), silent)
    # in a sample that lacks it too
    half = fusion({"flow": flow, "audio": torch.stack([audio[0], torch.zeros_like(audio[1])])})
    assert torch.equal(half, torch.stack([fused[0], silent[1]]))


def test_a_modality_with_steps_of_its_own_is_brought_to_the_frames():
    x = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
    assert over_frames(x, 3).flatten().tolist() == [2, 2, 2]
    assert over_frames(x, 2, aligned=True).flatten().tolist() == [1, 3]
    assert over_frames(x, 4, aligned=True).flatten().tolist() == [1, 1, 3, 3]


# --- early exit -----------------------------------------------------------------------------------
def test_a_modality_exits_when_its_gradient_outgrows_its_mean():
    """g_e > tau * mean(g_0 .. g_(e-1)), by hand: 1 1 1 1 1 1 then 2 against 1.5 * 1."""
    exits = EarlyExit(["audio"], threshold=1.5)
    for norm_of_epoch in [1.0] * (FIRST_EXIT + 1) + [2.0]:
        assert exits.live == ["audio"]
        for step, norm_of_step in enumerate((norm_of_epoch - 0.5, norm_of_epoch + 0.5)):
            exits.add_norm("audio", norm_of_step)
            exits.end_step(last=step == 1)
    assert exits.live == [] and exits.exit_epochs == {"audio": FIRST_EXIT + 1}


# --- errors ---------------------------------------------------------------------------------------
def test_unknown_modalities_and_wrong_features_are_named():
    model, x = tiny("rgb", "audio"), torch.zeros(2, 3, 5, 36)
    known = r"'depth': not in this Q-Former, which has rgb, audio; add\('depth', width\) first"
    for call in (
        lambda: model("depth", x),
        lambda: model.remove("depth"),
        lambda: model.parameters_of("depth"),
    ):
        with pytest.raises(ModelError, match=known):
            call()
    for wrong in (features("rgb"), features("audio")[0]):
        with pytest.raises(ModelError, match=r"'audio': wants features .*tokens, 20\), got"):
            model("audio", wrong)


def test_names_that_are_taken_or_impossible_are_refused():
    model = tiny("rgb", "audio")
    with pytest.raises(ModelError, match="'rgb': is there already .of width 24.; remove it first"):
        model.add("rgb", 24)
    for name in ("a.b", "", "keys", "train"):
        with pytest.raises(ModelError, match="cannot be a name"):
            model.add(name, 24)
    assert model.state_dict().keys() == tiny("rgb", "audio").state_dict().keys()


def test_a_fusion_of_other_modalities_or_shapes_is_refused():
    fusion, x = SelfGatedFusion(["flow", "audio"], 36), torch.zeros(2, 3, 5, 36)
    wrong = ({}, {"depth": x}, {"flow": x, "audio": x[:, :2]}, {"flow": x[..., :9]})
    for sides in wrong:
        with pytest.raises(ModelError, match="fusion of flow, audio: wants .* 36 wide, got"):
            fusion(sides)
    for names in ([], ["flow", "flow"]):
        with pytest.raises(ModelError, match="one or more, each once"):
            SelfGatedFusion(names, 36)


# --- released names -------------------------------------------------------------------------------
FIRST_QUERY = "Qformer.bert.encoder.layer.0.attention.self.query.weight"


def bert_shapes(c: MultimodalConfig) -> dict[str, tuple]:
    """Return names and shapes of the Q-Former in a checkpoint."""
    h = c.hidden
    shapes = {**norm("embeddings.LayerNorm", h), "embeddings.position_ids": (1, 512)}
    for n in range(c.layers):
        layer = f"encoder.layer.{n}."
        shapes |= linear(f"{layer}attention.self.query.w", h, h)
        shapes |= linear(f"{layer}attention.self.key", h, h)
        shapes |= linear(f"{layer}attention.self.value.w", h, h)
        shapes |= linear(f"{layer}attention.output.dense", h, h)
        shapes |= norm(f"{layer}attention.output.LayerNorm", h)
        if n % c.cross_every == 0:
            shapes |= linear(f"{layer}crossattention.self.query", h, h)
            shapes |= linear(f"{layer}crossattention.self.key", c.width_in, h)
            shapes |= linear(f"{layer}crossattention.self.value", c.width_in, h)
            shapes |= linear(f"{layer}crossattention.output.dense", h, h)
            shapes |= norm(f"{layer}crossattention.output.LayerNorm", h)
        shapes |= linear(f"{layer}intermediate_query.dense", h, c.intermediate)
        shapes |= linear(f"{layer}output_query.dense", c.intermediate, h)
        shapes |= norm(f"{layer}output_query.LayerNorm", h)
    return {f"Qformer.bert.{name}": shape for name, shape in shapes.items()}


def crema_shapes(c: MultimodalConfig, widths: dict[str, int]) -> dict[str, tuple]:
    """Return names and shapes of a released checkpoint, modalities by width."""
    shapes = bert_shapes(c)
    shapes |= linear("fusion.0", c.width_out * (len(widths) - 1), c.width_out)
    shapes["t5_model.shared.weight"] = (3, 2)
    for name, width in widths.items():
        shapes[f"query_tokens_{name}"] = (1, c.queries, c.hidden)
        shapes |= linear(f"t5_proj_{name}", c.hidden, c.width_out)
        shapes |= norm(f"ln_{name}", c.width_in)
        shapes[f"{name}_gradsel_embed"] = (1, 9)
        if width != c.width_in:
            shapes |= linear(f"projection_{name}", width, c.width_in)
        for n in range(c.layers):
            for part in ("query", "value"):
                path = f"Qformer.bert.encoder.layer.{n}.attention.self.{part}"
                shapes[f"{path}.w_a_{name}.weight"] = (c.rank, c.hidden)
                shapes[f"{path}.w_b_{name}.weight"] = (c.hidden, c.rank)
    return shapes


def kept(released: dict) -> set[str]:
    """Return the names that a conversion does not drop."""
    ends, starts = ("_gradsel_embed", "position_ids"), ("t5_model",)
    return {name for name in released if not name.endswith(ends) and not name.startswith(starts)}


def assert_reverted(back: dict, released: dict) -> None:
    assert back.keys() == kept(released)
    assert all(torch.equal(back[name], released[name]) for name in back)


def test_released_crema_there_and_back():
    qformer = tiny("rgb", "norm", "audio")
    widths = {name: WIDTHS[name] for name in qformer.parts}
    released = random_weights(crema_shapes(qformer.config, widths))
    state = convert(released, "crema")
    assert not missing_modalities(state, list(widths))
    fusion = SelfGatedFusion(["norm", "audio"], 36)
    nn.ModuleDict({"multimodal": qformer, "fusion": fusion}).load_state_dict(state)
    assert_reverted(revert(state, "crema"), released)
    with pytest.raises(ModelError, match=f"does not know 1 of .* names: {FIRST_QUERY};"):
        convert(released | {FIRST_QUERY: torch.ones(1)}, "crema")


def test_released_names_at_the_papers_sizes():
    config, widths = MultimodalConfig(), {"rgb": 1408, "audio": 768}
    with torch.device("meta"):
        qformer = MultimodalQFormer(config)
        for name, width in widths.items():
            qformer.add(name, width)
        fusion = SelfGatedFusion(["audio"], 2048)
        model = nn.ModuleDict({"multimodal": qformer, "fusion": fusion})
        released = random_weights(crema_shapes(config, widths), torch.empty)
        check_fit(convert(released, "crema"), model.state_dict(), "released")


def test_missing_modalities_are_reported():
    """A sequentially trained release holds the modality that was trained last."""
    released = random_weights(crema_shapes(tiny().config, {"rgb": 24, "flow": 24, "audio": 20}))
    for name in list(released):
        if "_flow" in name or "rgb" in name or "gradsel" in name:
            del released[name]
    state = convert(released, "crema")
    everything = ["queries", "norm", "projection", "adapter"]
    missing = missing_modalities(state, ["rgb", "flow", "audio"])
    assert missing == {"rgb": everything, "flow": everything}
    without_norm = {name: w for name, w in state.items() if ".norm." not in name}
    assert missing_modalities(without_norm, ["audio"]) == {"audio": ["norm"]}
