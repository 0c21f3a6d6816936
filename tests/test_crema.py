"""CREMA: one frozen Q-Former with parts for each modality, which come and go without touching the others, and the gated fusion of the side modalities."""
import copy

import pytest
import torch
from released import revert
from torch import nn
from transformers import Blip2QFormerModel

from crab_min.crema import MultimodalConfig, MultimodalQFormer, SelfGatedFusion, over_frames
from crab_min.errors import ModelError
from crab_min.tools.released.weights import convert, from_blip2, missing_modalities
from crab_min.trained_parts import check_fit

WIDTHS = {"rgb": 24, "flow": 24, "audio": 20, "norm": 24}                       # `norm` (surface normals) is a module's name too


def tiny(*names: str, trained: bool = True) -> MultimodalQFormer:
    """A small one with these modalities; trained: as if, B is not zero."""
    torch.manual_seed(0)
    model = MultimodalQFormer(MultimodalConfig(36, 24, queries=5, hidden=32, layers=4, heads=4, intermediate=64, rank=8))
    for name in names:
        model.add(name, WIDTHS[name])
    for pair in model.pairs().values() if trained else ():
        for B in pair.B.values():
            nn.init.normal_(B.weight)
    return model


def features(name: str, steps: int = 3) -> torch.Tensor:
    return torch.randn(2, steps, 7, WIDTHS[name])


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


def unchanged(before: dict, after: dict) -> set[str]:
    return {name for name in before if torch.equal(before[name], after[name])}


def test_parameter_counts_are_the_papers():
    with torch.device("meta"):
        model = MultimodalQFormer(MultimodalConfig(2048))
        for name, width in {"rgb": 1408, "audio": 768}.items():
            model.add(name, width)
        assert count(model.own("rgb").values()) == 3_961_600 and count(model.own("audio").values()) == 5_044_352
        assert {n for n, p in model.named_parameters() if p.requires_grad} == model.own("rgb").keys() | model.own("audio").keys()
        assert [count(SelfGatedFusion(list("afdn")[:sides], 2048).parameters()) for sides in (1, 2, 3, 4)] == [4_196_352, 8_390_656, 12_584_960, 16_779_264]


def test_a_fresh_modality_reads_as_the_frozen_qformer_does():
    model, x = tiny("rgb", "flow", trained=False).eval(), features("rgb")
    plain = Blip2QFormerModel(model.qformer.config).eval()
    plain.load_state_dict({name.replace(".base.", "."): weight for name, weight in model.qformer.state_dict().items() if ".A." not in name and ".B." not in name})
    part = model.parts["rgb"]
    with torch.no_grad():
        expected = part.out(plain(part.query.expand(6, -1, -1), encoder_hidden_states=part.norm(x.flatten(0, 1))).last_hidden_state).unflatten(0, (2, 3))
        assert torch.equal(model("rgb", x), expected)
        nn.init.ones_(model.pairs()["qformer.encoder.layer.3.attention.attention.value"].B["rgb"].weight)
        assert not torch.allclose(model("rgb", x), expected)
        assert torch.equal(model("rgb", x, adapted=False), expected)


def test_a_masked_token_is_not_read():
    model, x = tiny("audio"), features("audio")
    mask = torch.ones(2, 3, 7, dtype=torch.bool)
    mask[..., 5:] = False
    torch.testing.assert_close(model("audio", x, mask), model("audio", x[:, :, :5]))


def test_a_step_on_a_modality_changes_it_and_the_fusion_alone():
    model = nn.ModuleDict({"multimodal": tiny("rgb", "flow", "audio"), "fusion": SelfGatedFusion(["flow", "audio"], 36)})
    x, before = {name: features(name) for name in ("rgb", "flow", "audio")}, copy.deepcopy(model.state_dict())
    stepped = {f"multimodal.{n}": p for n, p in model["multimodal"].own("audio").items()} | {f"fusion.{n}": p for n, p in model["fusion"].named_parameters()}
    tokens = {name: model["multimodal"](name, x[name]) for name in x}
    (tokens.pop("rgb") + model["fusion"](tokens)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in stepped.values())
    assert all(p.grad is None for n, p in model["multimodal"].qformer.named_parameters() if ".A." not in n and ".B." not in n)
    torch.optim.AdamW(stepped.values(), lr=1e-2).step()
    assert before.keys() - unchanged(before, model.state_dict()) == stepped.keys()


def test_adding_and_removing_leave_the_others_bit_for_bit():
    model, x = tiny("rgb", "audio"), {name: features(name) for name in ("rgb", "audio")}
    before, parameters = copy.deepcopy(model.state_dict()), {id(p) for p in model.parameters()}
    tokens = {name: model(name, x[name]) for name in x}
    for step in (lambda: model.add("norm", 24), lambda: model("norm", features("norm")), lambda: model.remove("norm")):
        step()
        assert unchanged(before, model.state_dict()) == before.keys() and parameters <= {id(p) for p in model.parameters()}
        assert all(torch.equal(model(name, x[name]), tokens[name]) for name in x)
    assert model.state_dict().keys() == before.keys()


def test_the_number_of_tokens_does_not_grow_with_the_modalities():
    x = {f"m{i}": torch.randn(2, 4, 5, 36) for i in range(4)}
    for sides in (1, 2, 4):
        names = list(x)[:sides]
        assert SelfGatedFusion(names, 36)({name: x[name] for name in names}).shape == (2, 4, 5, 36)


def test_fusion_gates_a_linear_of_what_is_there():
    fusion, x = SelfGatedFusion(["flow", "audio"], 6), {"flow": torch.randn(2, 3, 5, 6), "audio": over_frames(torch.randn(2, 2, 5, 6), 3)}
    f = fusion.linear(torch.cat([x["flow"], x["audio"]], -1))
    torch.testing.assert_close(fusion(x), f.sigmoid() * f)
    silent = {"flow": x["flow"], "audio": torch.zeros_like(x["flow"])}
    assert torch.equal(fusion({"flow": x["flow"]}), fusion(silent))
    half = x | {"audio": torch.stack([x["audio"][0], torch.full_like(x["audio"][1], torch.nan)])}           # whatever stands in its place
    assert torch.equal(fusion(half, {"audio": torch.tensor([True, False])}), torch.stack([fusion(x)[0], fusion(silent)[1]]))
    assert torch.equal(over_frames(torch.tensor([1., 3.]).view(1, 2, 1, 1), 3).flatten(), torch.full((3,), 2.))


def test_named_errors():
    model, fusion, x = tiny("rgb", "audio"), SelfGatedFusion(["flow", "audio"], 36), torch.zeros(2, 3, 5, 36)
    for call in (lambda: model("depth", x), lambda: model.remove("depth"), lambda: model.own("depth")):
        with pytest.raises(ModelError, match=r"'depth': not in this Q-Former, which has rgb, audio; add\('depth', width\) first"):
            call()
    for wrong in (features("rgb"), features("audio")[0]):
        with pytest.raises(ModelError, match=r"'audio': wants features \(samples, steps, tokens, 20\), got"):
            model("audio", wrong)
    with pytest.raises(ModelError, match="'rgb': is there already .of width 24.; remove it first"):
        model.add("rgb", 24)
    for name in ("a.b", "", "keys", "train"):
        with pytest.raises(ModelError, match="cannot be a name"):
            model.add(name, 24)
    assert model.state_dict().keys() == tiny("rgb", "audio").state_dict().keys()
    for sides in ({}, {"depth": x}, {"flow": x, "audio": x[:, :2]}, {"flow": x[..., :9]}):
        with pytest.raises(ModelError, match="fusion of flow, audio: wants one or more of these, all of one shape and 36 wide, got"):
            fusion(sides)
    for names in ([], ["flow", "flow"]):
        with pytest.raises(ModelError, match="one or more, each once"):
            SelfGatedFusion(names, 36)


# --- released names ----------------------------------------------------------------------------------------------------------
def bert(c: MultimodalConfig, linear: str) -> dict:
    """Names and shapes of the Q-Former in CREMA's (linear .w) and BLIP-2's ("") checkpoints (papers/crema_pave.md 8)."""
    h, state = c.hidden, {"embeddings.LayerNorm.weight": (c.hidden,), "embeddings.LayerNorm.bias": (c.hidden,), "embeddings.position_ids": (1, 512)}
    for n in range(c.layers):
        at = f"encoder.layer.{n}."
        linears = {**{f"attention.self.{p}{linear if p != 'key' else ''}": (h, h) for p in ("query", "key", "value")}, "attention.output.dense": (h, h),
                   "intermediate_query.dense": (c.intermediate, h), "output_query.dense": (h, c.intermediate)}
        norms = ["attention.output.LayerNorm", "output_query.LayerNorm"]
        if n % c.cross_every == 0:
            linears |= {"crossattention.self.query": (h, h), "crossattention.self.key": (h, c.width_in), "crossattention.self.value": (h, c.width_in),
                        "crossattention.output.dense": (h, h)}
            norms += ["crossattention.output.LayerNorm"]
        state |= {f"{at}{name}.weight": shape for name, shape in linears.items()} | {f"{at}{name}.bias": shape[:1] for name, shape in linears.items()}
        state |= {f"{at}{name}.{part}": (h,) for name in norms for part in ("weight", "bias")}
    return {f"Qformer.bert.{name}": shape for name, shape in state.items()}


def own(c: MultimodalConfig, end: str, norm: str) -> dict:
    return {f"query_tokens{end}": (1, c.queries, c.hidden), f"t5_proj{end}.weight": (c.width_out, c.hidden), f"t5_proj{end}.bias": (c.width_out,),
            f"{norm}.weight": (c.width_in,), f"{norm}.bias": (c.width_in,)}


def crema(c: MultimodalConfig, widths: dict, make=torch.randn) -> dict:
    shapes = bert(c, ".w") | {"fusion.0.weight": (c.width_out, c.width_out * (len(widths) - 1)), "fusion.0.bias": (c.width_out,), "t5_model.shared.weight": (3, 2)}
    for m, width in widths.items():
        shapes |= own(c, f"_{m}", f"ln_{m}") | {f"{m}_gradsel_embed": (1, 9)}
        shapes |= {} if width == c.width_in else {f"projection_{m}.weight": (c.width_in, width), f"projection_{m}.bias": (c.width_in,)}
        shapes |= {f"Qformer.bert.encoder.layer.{n}.attention.self.{p}.w_{ab}_{m}.weight": (c.rank, c.hidden) if ab == "a" else (c.hidden, c.rank)
                   for n in range(c.layers) for p in ("query", "value") for ab in "ab"}
    return {name: make(shape) for name, shape in shapes.items()}


def dropped(name: str) -> bool:
    return name.endswith(("_gradsel_embed", "position_ids")) or name.startswith(("t5_model", "visual_encoder"))


def test_released_crema_there_and_back():
    model = tiny("rgb", "norm", "audio")
    released = crema(model.config, {name: WIDTHS[name] for name in model.parts})
    state = convert(released, "crema")
    assert not missing_modalities(state, list(model.parts))
    nn.ModuleDict({"multimodal": model, "fusion": SelfGatedFusion(["norm", "audio"], 36)}).load_state_dict(state)
    back = revert(state, "crema")
    assert back.keys() == {name for name in released if not dropped(name)} and all(torch.equal(back[name], released[name]) for name in back)
    with pytest.raises(ModelError, match="does not know 1 of .* names: Qformer.bert.encoder.layer.0.attention.self.query.weight;"):
        convert(released | {"Qformer.bert.encoder.layer.0.attention.self.query.weight": torch.ones(1)}, "crema")


def test_released_names_at_the_papers_sizes():
    with torch.device("meta"):
        model, c = MultimodalQFormer(MultimodalConfig(2048)), MultimodalConfig(2048)
        for name, width in {"rgb": 1408, "audio": 768}.items():
            model.add(name, width)
        both = nn.ModuleDict({"multimodal": model, "fusion": SelfGatedFusion(["audio"], 2048)})
        check_fit(convert(crema(c, {"rgb": 1408, "audio": 768}, torch.empty), "crema"), both.state_dict(), "released")


def test_missing_modalities_are_reported():
    """A sequentially trained checkpoint of the released code holds the modality that was trained last."""
    released = crema(tiny().config, {"rgb": 24, "flow": 24, "audio": 20})
    last = convert({name: w for name, w in released.items() if "_flow" not in name and "rgb" not in name and "gradsel" not in name}, "crema")
    assert missing_modalities(last, ["rgb", "flow", "audio"]) == {m: ["queries", "norm", "projection", "adapter"] for m in ("rgb", "flow")}
    assert missing_modalities({name: w for name, w in last.items() if ".norm." not in name}, ["audio"]) == {"audio": ["norm"]}


def test_blip2_is_the_start_of_a_visual_modality():
    model = tiny("rgb", "flow", trained=False)
    shapes = bert(model.config, "") | own(model.config, "", "ln_vision") | {"visual_encoder.pos_embed": (1, 3, 2)}
    released = {name: torch.randn(shape) for name, shape in shapes.items()}
    loaded = nn.ModuleDict({"multimodal": model}).load_state_dict(from_blip2(released, "flow"), strict=False)
    assert not loaded.unexpected_keys and all(".A." in name or ".B." in name or ".parts.rgb." in name for name in loaded.missing_keys)
    back = revert(convert(released, "blip2"), "blip2")
    assert back.keys() == {name for name in released if not dropped(name)} and all(torch.equal(back[name], released[name]) for name in back)
