"""Released checkpoints: by our names and back, every name accounted for, as run folders that infer.py takes."""
import pytest
import torch
from peft import get_peft_model, set_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

import infer
from crab_min.backbones.composed import load_base
from crab_min.backbones.omni import load_omni
from crab_min.errors import ModelError
from crab_min.ilora import ILoraConfig
from crab_min.tools import convert as command
from crab_min.tools.convert import adapter_sizes, convert, read_checkpoint, revert


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)).eval()


def released(linears: list[str], heads: int = 3, r: int = 4) -> dict:
    """An adapter in Crab's format for linears of width 16."""
    parts = {"lora_route": (heads, 16), "lora_A": (r, 16), **{f"lora_B{k}": (16, r) for k in reversed(range(heads))}}
    return {f"{linear}.{part}.weight": torch.randn(shape) for linear in linears for part, shape in parts.items()}


def test_a_released_adapter_becomes_ours():
    model = get_peft_model(llama(), ILoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    names = [f"base_model.model.model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qo"]
    theirs = released(names)
    connector = {"base_model.model.model.vl_projector.visual_ln.bias": torch.ones(3),
                 "base_model.model.model.al_projector.audio_proj.2.weight": torch.ones(3),
                 "base_model.model.model.al_projector.audio_Qformer.cls.predictions.bias": torch.ones(3)}
    state = convert(theirs | connector, "crab")
    assert {n for n in state if "ilora_" not in n} == {"visual_qformer.norm.bias", "audio_qformer.mlp.2.weight"}
    adapter = {name: weight for name, weight in state.items() if "ilora_" in name}
    assert adapter_sizes(adapter) == (4, 3) and len(adapter) == 3 * len(names)
    assert not set_peft_model_state_dict(model, adapter).unexpected_keys
    B = model.base_model.model.model.layers[0].self_attn.q_proj.ilora_B["default"].weight
    assert torch.equal(B[:, 4:8], theirs[names[0] + ".lora_B1.weight"])


def test_crab_plus_names_follow_transformers_5():
    old = ["thinker.model.layers.3.mlp.up_proj", "visual.blocks.0.mlp.up_proj", "audio_tower.layers.0.self_attn.q_proj"]
    new = ["model.language_model.layers.3.mlp.up_proj", "model.visual.blocks.0.mlp.up_proj",
           "model.audio_tower.layers.0.self_attn.q_proj"]
    state = convert(released([f"base_model.model.{name}" for name in old], heads=5), "crab_plus")
    assert {name.split(".ilora_")[0] for name in state} == {f"base_model.model.{name}" for name in new}
    assert adapter_sizes(state) == (4, 5)


def test_names_that_do_not_fit_are_errors():
    good = released(["x"])
    with pytest.raises(ModelError, match=r"does not know 1 of 6 names: x\.lora_C\.weight;"):
        convert(good | {"x.lora_C.weight": torch.ones(1)}, "ilora")
    with pytest.raises(ModelError, match="'nothing': no such table, expected one of ilora, patch, qformer"):
        convert(good, "nothing")
    with pytest.raises(ModelError, match=r"heads \[0, 2\], expected 0 to 2"):
        convert({name: w for name, w in good.items() if "B1" not in name}, "ilora")
    with pytest.raises(ModelError, match="8 columns, expected 12"):
        adapter_sizes(convert({name: w for name, w in good.items() if "B2" not in name}, "ilora"))
    with pytest.raises(ModelError, match="1 A, 0 routers"):
        adapter_sizes(convert({name: w for name, w in good.items() if "route" not in name}, "ilora"))
    with pytest.raises(ModelError, match="visual_ln.bias and audio_ln.bias would both become norm.bias"):
        convert({"visual_ln.bias": torch.ones(1), "audio_ln.bias": torch.ones(1)}, "qformer")


def test_checkpoints_are_read_without_running_what_is_in_them(tmp_path):
    state = released(["x"])
    for name, format in ("new.bin", True), ("old.pt", False):
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=format)
        again = read_checkpoint(tmp_path / name)
        assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)
    with pytest.raises(ModelError, match="nowhere.bin: no such file"):
        read_checkpoint(tmp_path / "nowhere.bin")
    (tmp_path / "page.bin").write_text("<html>Not Found</html>")
    (tmp_path / "page.safetensors").write_text("<html>Not Found</html>")
    (tmp_path / "half.bin").write_bytes((tmp_path / "new.bin").read_bytes()[:900])
    torch.save({"x": Ran()}, tmp_path / "code.pt")
    for name in "page.bin", "page.safetensors", "half.bin", "code.pt":
        with pytest.raises(ModelError, match=f"{name}: not a whole file of weights"):
            read_checkpoint(tmp_path / name)


class Ran:
    """Unpickling it would run code."""

    def __reduce__(self):
        return pytest.fail, ("code of the file was run",)


# --- at the sizes of the papers, and there and back --------------------------------------------------------------------------
def crab_plus(layers: int, encoders: int, blocks: int, d: int = 3584, wide: int = 18944, kv: int = 512, audio: int = 1280, vision: tuple = (1280, 3420), r: int = 128,
              make=torch.empty) -> dict:
    """Names and shapes of Crab+'s finetune_weights.bin (papers/crab.md 8.1)."""
    linears = {f"model.layers.{i}.self_attn.{p}_proj": (d, kv if p in "kv" else d) for i in range(layers) for p in "qkvo"}
    linears |= {f"model.layers.{i}.mlp.{p}_proj": (wide, d) if p == "down" else (d, wide) for i in range(layers) for p in ("gate", "up", "down")}
    linears |= {f"audio_tower.layers.{i}.self_attn.{p}_proj": (audio, audio) for i in range(encoders) for p in "qkv"}
    linears |= {f"visual.blocks.{i}.mlp.{p}_proj": vision[::-1] if p == "down" else vision for i in range(blocks) for p in ("gate", "up", "down")}
    state = {}
    for name, (d_in, d_out) in linears.items():
        shapes = {"lora_route": (3, d_in), "lora_A": (r, d_in), **{f"lora_B{k}": (d_out, r) for k in range(3)}}
        for part, shape in shapes.items():
            state[f"base_model.model.{name}.{part}.weight"] = make(shape) * (0 if "lora_B" in part and not name.startswith("model.") and make is torch.randn else 1)
    return state


def crab(layers: int, d: int, wide: int, r: int, hidden: int, inner: int, vision: int, audio: int, queries: int, depth: int, vocab: int, make=torch.empty,
         linears: bool = True, prefix: str = "base_model.model.") -> dict:
    """Names and shapes of Crab's finetune_weights.bin, or without its adapter those of the aligning stages (papers/crab.md 8.2)."""
    shapes = {}
    for name, d_in, d_out in [(f"self_attn.{p}_proj", d, d) for p in "qkvo"] + [("mlp.gate_proj", d, wide), ("mlp.up_proj", d, wide), ("mlp.down_proj", wide, d)]:
        for i in range(layers if linears else 0):
            at = f"model.layers.{i}.{name}."
            shapes |= {at + "lora_route": (3, d_in), at + "lora_A": (r, d_in), **{f"{at}lora_B{k}": (d_out, r) for k in range(3)}}
    weights = {f"{prefix}{name}.weight": shape for name, shape in shapes.items()}
    for projector, sense, width in (("vl_projector", "visual", vision), ("al_projector", "audio", audio)):
        def linear(name, d_in, d_out):
            return {f"{name}.weight": (d_out, d_in), f"{name}.bias": (d_out,)}

        def norm(name, size):
            return {f"{name}.weight": (size,), f"{name}.bias": (size,)}
        one = {**norm(f"{sense}_ln", width), f"{sense}_query_tokens": (1, queries, hidden), **linear(f"{sense}_proj.0", hidden, d), **linear(f"{sense}_proj.2", d, d)}
        bert = {"embeddings.word_embeddings.weight": (vocab, hidden), "embeddings.position_embeddings.weight": (512, hidden), **norm("embeddings.LayerNorm", hidden)}
        for n in range(depth):
            layer = f"encoder.layer.{n}"
            for kind, d_in in (("attention", hidden), ("crossattention", width)):
                for part in ("query", "key", "value"):
                    bert |= linear(f"{layer}.{kind}.self.{part}", hidden if part == "query" else d_in, hidden)
                bert |= {**linear(f"{layer}.{kind}.output.dense", hidden, hidden), **norm(f"{layer}.{kind}.output.LayerNorm", hidden)}
            for half in ("", "_query"):
                bert |= {**linear(f"{layer}.intermediate{half}.dense", hidden, inner), **linear(f"{layer}.output{half}.dense", inner, hidden),
                         **norm(f"{layer}.output{half}.LayerNorm", hidden)}
        one |= {f"{sense}_Qformer.bert.{name}": shape for name, shape in bert.items()} | {f"{sense}_Qformer.cls.predictions.bias": (vocab,)}
        weights |= {f"{prefix}model.{projector}.{name}": shape for name, shape in one.items()}
    return {name: make(shape) for name, shape in weights.items()}


def test_the_released_names_at_full_size():
    with torch.device("meta"):
        plus, first = crab_plus(28, 32, 32), crab(32, 4096, 11008, 8, 768, 3072, 1024, 768, 32, 2, 30522)
        assert len(plus) == 1940 and sum(w.numel() for w in plus.values()) == 870_480_512
        ours = convert(plus, "crab_plus")
        lm = {name: weight for name, weight in ours.items() if ".language_model." in name}
        assert len(ours) == 3 * (196 + 96 + 96) and sum(w.numel() for w in lm.values()) == 682_350_592 and adapter_sizes(lm) == (128, 3)
        adapter = {name: weight for name, weight in convert(first, "crab").items() if "ilora_" in name}
        assert len(adapter) == 3 * 224 and sum(w.numel() for w in adapter.values()) == 45_162_496


def same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_crab_plus_there_and_back(tmp_path, capsys):
    """To a run folder that loads into the tiny thinker and answers, and back, bit for bit."""
    released = crab_plus(2, 2, 2, d=64, wide=96, kv=32, audio=32, vision=(32, 48), r=4, make=torch.randn)
    torch.save(released, tmp_path / "finetune_weights.bin")
    assert command.main(["crab_plus", str(tmp_path / "finetune_weights.bin"), "--out", str(tmp_path / "run")]) == 0
    assert "r 4, 3 heads" in capsys.readouterr().out
    model = load_omni("tiny-random")
    model.load_trained(tmp_path / "run")
    B = model.thinker.model.language_model.layers[1].mlp.up_proj.ilora_B["default"].weight
    assert torch.equal(B[:, 4:8], released["base_model.model.model.layers.1.mlp.up_proj.lora_B1.weight"])
    assert command.main(["crab_plus", str(tmp_path / "run"), "--back", str(tmp_path / "again.bin")]) == 0
    same(torch.load(tmp_path / "again.bin"), {name: w for name, w in released.items() if ".model.layers." in name})

    assert command.main(["crab_plus", str(tmp_path / "finetune_weights.bin"), "--out", str(tmp_path / "all"), "--encoder-adapters"]) == 0
    model = load_omni("tiny-random")
    model.load_trained(tmp_path / "all")
    assert command.main(["crab_plus", str(tmp_path / "all"), "--back", str(tmp_path / "again.bin")]) == 0
    same(torch.load(tmp_path / "again.bin"), released)

    released["base_model.model.visual.blocks.0.mlp.up_proj.lora_B2.weight"] += 1
    torch.save(released, tmp_path / "trained.bin")
    capsys.readouterr()
    assert command.main(["crab_plus", str(tmp_path / "trained.bin"), "--out", str(tmp_path / "other")]) == 2
    assert "--encoder-adapters" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_crab_there_and_back(tmp_path, capsys):
    """The tiny base's shapes by Crab's names: what was dropped is what the table says, the rest comes back bit for bit."""
    model = load_base()
    c, q = model.llm.config, model.visual_qformer.config
    sizes = (c.num_hidden_layers, c.hidden_size, c.intermediate_size, 4, q.hidden, q.intermediate, q.width_in, q.width_in, 6, q.layers, 50)
    released = crab(*sizes, make=torch.randn)
    for name in [n for n in released if n.endswith("audio_query_tokens")]:
        released[name] = torch.randn(1, model.audio_qformer.config.queries, q.hidden)
    torch.save(released, tmp_path / "finetune_weights.bin")
    assert command.main(["crab", str(tmp_path / "finetune_weights.bin"), "--out", str(tmp_path / "run"), "--preset", "crab-tiny"]) == 0
    model.load_trained(tmp_path / "run")
    assert torch.equal(model.audio_qformer.query, released["base_model.model.model.al_projector.audio_query_tokens"])
    assert command.main(["crab", str(tmp_path / "run"), "--back", str(tmp_path / "again.bin")]) == 0
    dropped = ("_embeddings.weight", ".cls.predictions.bias", ".intermediate.dense.", ".output.dense.", ".output.LayerNorm.")
    kept = {name: w for name, w in released.items() if not any(d in name for d in dropped) or "attention.output" in name}
    same(torch.load(tmp_path / "again.bin"), kept)

    pretrain = crab(*sizes, make=torch.randn, linears=False, prefix="")
    same(revert(convert(pretrain, "crab-pretrain"), "crab-pretrain"), {name.removeprefix("base_model.model."): pretrain[name.removeprefix("base_model.model.")]
                                                                       for name in kept if "lora_" not in name})
    assert convert(pretrain, "crab").keys() == convert(pretrain, "crab-pretrain").keys()


def test_a_converted_run_answers(tmp_path, real_media):
    clip = next((real_media / "ave" / "video").glob("*.mp4"))
    released = crab_plus(2, 0, 0, d=64, wide=96, kv=32, r=4, make=torch.randn)
    torch.save(released, tmp_path / "w.bin")
    assert command.main(["crab_plus", str(tmp_path / "w.bin"), "--out", str(tmp_path / "run")]) == 0
    config = (tmp_path / "run" / "config.json").read_text()
    (tmp_path / "run" / "config.json").write_text(config.replace("Qwen/Qwen2.5-Omni-7B", "tiny-random"))
    assert infer.main([str(clip), "--ask", "What?", "--run", str(tmp_path / "run"), "--limit", "2", "--picture", str(tmp_path / "a.png")]) == 0


def test_wrong_files_are_named_errors(tmp_path, capsys):
    torch.save(released(["x"]) | {"x.lora_C.weight": torch.ones(1)}, tmp_path / "odd.bin")
    for arguments, reason in ((["crab", str(tmp_path / "odd.bin")], "does not know 6 of 6 names"), (["crab", str(tmp_path / "none.bin")], "no such file"),
                              (["crab", str(tmp_path), "--back", str(tmp_path / "x.bin")], "neither adapter/ nor patches/ nor modules.safetensors")):
        assert command.main([*arguments, "--out", str(tmp_path / "run")]) == 2
        assert reason in capsys.readouterr().err and not (tmp_path / "run").exists()
