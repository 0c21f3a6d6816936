"""Released checkpoints by our names, with every name accounted for, and as run folders."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model, set_peft_model_state_dict
from released import (
    PEFT,
    CrabPlusSizes,
    CrabSizes,
    adapter_shapes,
    crab_adapter_shapes,
    crab_connector_shapes,
    crab_plus,
    crab_plus_shapes,
    random_weights,
    revert,
    write_released,
)
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import infer
from crab_min.backbones.composed import load_base
from crab_min.backbones.load import load_model
from crab_min.backbones.omni import QWEN_CHAT
from crab_min.config import BackboneConfig
from crab_min.data import read_samples
from crab_min.errors import ModelError
from crab_min.ilora import ILoraConfig
from crab_min.runs.asking import asking_words
from crab_min.tools import convert as command
from crab_min.tools.loading import load_run
from crab_min.tools.questions import question_sample
from crab_min.tools.released import TABLES
from crab_min.tools.released.patterns import DROPPED
from crab_min.tools.released.weights import (
    adapter_sizes,
    convert,
    read_checkpoint,
    read_state_dict,
    split_qkv,
    stack_heads,
)

# sizes of the tiny random thinker
TINY_PLUS = CrabPlusSizes(
    2, 2, 2, hidden=64, intermediate=96, key_value=32, audio=32, vision=(32, 48), r=4
)


def released_adapter(linears: list[str]) -> dict[str, Tensor]:
    """Return an adapter by released names: 3 heads of rank 4 on linears of width 16."""
    shapes = {}
    for linear in linears:
        shapes |= adapter_shapes(linear, 16, 16, r=4)
    return random_weights(shapes)


def without(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: weight for name, weight in state.items() if part not in name}


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


# --- names ---------------------------------------------------------------------------------------
def test_a_released_adapter_becomes_ours():
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    adapter_config = ILoraConfig(r=4, target_modules=["q_proj", "o_proj"])
    model = get_peft_model(LlamaForCausalLM(config).eval(), adapter_config)
    linears = [f"{PEFT}model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qo"]
    theirs = released_adapter(linears)
    connectors = {
        PEFT + "model.vl_projector.visual_ln.bias": torch.ones(3),
        PEFT + "model.al_projector.audio_proj.2.weight": torch.ones(3),
        PEFT + "model.al_projector.audio_Qformer.cls.predictions.bias": torch.ones(3),
    }

    state = convert(theirs | connectors, "crab")

    adapter = {name: weight for name, weight in state.items() if "ilora_" in name}
    assert state.keys() - adapter.keys() == {
        "visual_qformer.norm.bias",
        "audio_qformer.mlp.2.weight",
    }
    assert adapter_sizes(adapter) == (4, 3)
    assert len(adapter) == 3 * len(linears)
    assert not set_peft_model_state_dict(model, adapter).unexpected_keys
    B = model.base_model.model.model.layers[0].self_attn.q_proj.ilora_B["default"].weight
    assert torch.equal(B[:, 4:8], theirs[linears[0] + ".lora_B1.weight"])


@pytest.mark.parametrize("thinker", ["", "thinker."])
def test_crab_plus_names_follow_transformers_5(thinker):
    our_name = {
        "model.layers.3.mlp.up_proj": "model.language_model.layers.3.mlp.up_proj",
        "visual.blocks.0.mlp.up_proj": "model.visual.blocks.0.mlp.up_proj",
        "audio_tower.layers.0.self_attn.q_proj": "model.audio_tower.layers.0.self_attn.q_proj",
    }
    state = convert(released_adapter([PEFT + thinker + name for name in our_name]), "crab_plus")
    linears = {name.split(".ilora_")[0] for name in state}
    assert linears == {PEFT + name for name in our_name.values()}
    assert adapter_sizes(state) == (4, 3)


def test_every_row_of_every_table_is_reached():
    """No row hides a later one, and both names of a row have the same wildcards."""
    example = {
        "n": 0,
        "i": 1,
        "head": 0,
        "modality": "rgb",
        "rest": "x.weight",
        "path": "",
        "thinker": "",
    }
    for table, rows in TABLES.items():
        for released, ours in rows.items():
            weight = torch.zeros(2, 2)
            expected = set() if ours is DROPPED else {ours.format(**example)}
            assert convert({released.format(**example): weight}, table).keys() == expected


def test_names_that_do_not_fit_are_errors():
    good = released_adapter(["x"])
    with pytest.raises(ModelError, match=r"does not know 1 of 6 names: x\.lora_C\.weight;"):
        convert(good | {"x.lora_C.weight": torch.ones(1)}, "ilora")
    with pytest.raises(ModelError, match="'nothing': no such table, expected one of crab, "):
        convert(good, "nothing")
    with pytest.raises(ModelError, match=r"heads \[0, 2\], expected 0 to 2"):
        convert(without(good, "B1"), "ilora")
    with pytest.raises(ModelError, match="8 columns, expected 12"):
        adapter_sizes(convert(without(good, "B2"), "ilora"))
    with pytest.raises(ModelError, match="1 A, 0 routers"):
        adapter_sizes(convert(without(good, "route"), "ilora"))
    both = {"visual_ln.bias": torch.ones(1), "audio_ln.bias": torch.ones(1)}
    with pytest.raises(
        ModelError, match="visual_ln.bias and audio_ln.bias would both become norm.bias"
    ):
        convert(both, "qformer")


def test_packed_projections_are_split_and_heads_stand_side_by_side():
    q, k, v = torch.randn(3, 4, 4)
    packed = {"attn.in_proj_weight": torch.cat([q, k, v]), "attn.out_proj.weight": v}
    assert_same(
        split_qkv(packed),
        {
            "attn.q_proj.weight": q,
            "attn.k_proj.weight": k,
            "attn.v_proj.weight": v,
            "attn.out_proj.weight": v,
        },
    )
    assert torch.equal(stack_heads("B", {1: k, 0: q, 2: v}), torch.cat([q, k, v], dim=1))


def test_the_released_names_at_full_size():
    with torch.device("meta"):
        plus = random_weights(crab_plus_shapes(CrabPlusSizes()), torch.empty)
        shapes = crab_adapter_shapes(CrabSizes()) | crab_connector_shapes(CrabSizes())
        first = random_weights(shapes, torch.empty)
    assert len(plus) == 1940
    assert count(plus) == 870_480_512

    ours = convert(plus, "crab_plus")
    lm = {name: weight for name, weight in ours.items() if ".language_model." in name}
    assert len(ours) == 3 * (196 + 96 + 96)
    assert count(lm) == 682_350_592
    assert adapter_sizes(lm) == (128, 3)

    state = convert(first, "crab")
    adapter = {name: weight for name, weight in state.items() if "ilora_" in name}
    assert len(adapter) == 3 * 224
    assert count(adapter) == 45_162_496


def count(state: dict[str, Tensor]) -> int:
    return sum(weight.numel() for weight in state.values())


# --- files ---------------------------------------------------------------------------------------
def test_checkpoints_are_read_without_running_what_is_in_them(tmp_path):
    state = released_adapter(["x"])
    for name, zip_format in ("new.bin", True), ("old.pt", False):
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zip_format)
        assert_same(read_checkpoint(tmp_path / name), state)
    with pytest.raises(ModelError, match="nowhere.bin: no such file"):
        read_checkpoint(tmp_path / "nowhere.bin")

    (tmp_path / "page.bin").write_text("<html>Not Found</html>")
    (tmp_path / "page.safetensors").write_text("<html>Not Found</html>")
    (tmp_path / "half.bin").write_bytes((tmp_path / "new.bin").read_bytes()[:900])
    torch.save({"x": RunsCode()}, tmp_path / "code.pt")
    for name in "page.bin", "page.safetensors", "half.bin", "code.pt":
        with pytest.raises(ModelError, match=f"{name}: not a whole file of weights"):
            read_checkpoint(tmp_path / name)


class RunsCode:
    """An object that runs code where it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("code of the file was run",)


def test_weights_may_stand_under_model_and_nothing_else_is_taken(tmp_path):
    state = released_adapter(["x"])
    torch.save({"model": state, "epoch": 3}, tmp_path / "lavis.pth")
    assert_same(read_state_dict(tmp_path / "lavis.pth"), state)
    for content in [1, 2], {"epoch": 3}:
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ModelError, match="other.pth: expected the weights of a model"):
            read_state_dict(tmp_path / "other.pth")


# --- run folders ---------------------------------------------------------------------------------
def test_crab_plus_there_and_back(tmp_path, capsys):
    """A released file becomes a run that loads, and that holds the file's adapter of the LM."""
    released = crab_plus(TINY_PLUS)
    torch.save(released, tmp_path / "weights.bin")
    run = tmp_path / "run"
    assert command.main(["crab_plus", str(tmp_path / "weights.bin"), "--out", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "r 4, 3 heads" in printed and "36 tensors in the encoders left out" in printed

    model = load_model(BackboneConfig(backbone="omni", weights="tiny-random"))
    model.load_trained(run)
    layer = model.thinker.model.language_model.layers[1]
    B = layer.mlp.up_proj.ilora_B["default"].weight
    assert torch.equal(B[:, 4:8], released[PEFT + "model.layers.1.mlp.up_proj.lora_B1.weight"])

    write_released("crab_plus", run, tmp_path / "again.bin")
    of_lm = {name: weight for name, weight in released.items() if ".model.layers." in name}
    assert_same(torch.load(tmp_path / "again.bin"), of_lm)


def test_adapters_of_encoders_that_trained_are_refused(tmp_path, capsys):
    released = crab_plus(TINY_PLUS)
    released[PEFT + "visual.blocks.0.mlp.up_proj.lora_B2.weight"] += 1
    torch.save(released, tmp_path / "trained.bin")
    run = tmp_path / "run"
    assert command.main(["crab_plus", str(tmp_path / "trained.bin"), "--out", str(run)]) == 2
    error = capsys.readouterr().err
    assert "trained.bin: 1 adapters in the encoders are not zero" in error
    assert not run.exists()


def test_crab_there_and_back(tmp_path):
    """The tiny base's shapes by Crab's names: all comes back but what the table drops."""
    model = load_base()
    llm, visual, audio = model.llm.config, model.visual_qformer.config, model.audio_qformer.config
    sizes = CrabSizes(
        layers=llm.num_hidden_layers,
        hidden=llm.hidden_size,
        intermediate=llm.intermediate_size,
        r=4,
        vision=visual.width_in,
        audio=visual.width_in,
        qformer_layers=visual.layers,
        qformer_hidden=visual.hidden,
        qformer_intermediate=visual.intermediate,
        visual_queries=visual.queries,
        audio_queries=audio.queries,
        vocabulary=50,
    )
    connectors = random_weights(crab_connector_shapes(sizes))
    wrapped = {PEFT + name: weight for name, weight in connectors.items()}
    released = random_weights(crab_adapter_shapes(sizes)) | wrapped
    torch.save(released, tmp_path / "weights.bin")

    run = tmp_path / "run"
    flags = ["--out", str(run), "--preset", "crab-tiny"]
    assert command.main(["crab", str(tmp_path / "weights.bin"), *flags]) == 0
    assert files_of(run) == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "config.json",
        "metrics.json",
        "parts/audio_qformer.safetensors",
        "parts/visual_qformer.safetensors",
    }
    model.load_trained(run)
    query = released[PEFT + "model.al_projector.audio_query_tokens"]
    assert torch.equal(model.audio_qformer.query, query)

    write_released("crab", run, tmp_path / "again.bin")
    kept = {name: weight for name, weight in released.items() if not is_for_text(name)}
    assert_same(torch.load(tmp_path / "again.bin"), kept)

    # the aligning stages' files have the same connectors, without PEFT's prefix
    state = convert(connectors, "crab-pretrain")
    kept = {name: weight for name, weight in connectors.items() if not is_for_text(name)}
    assert_same(revert(state, "crab-pretrain"), kept)
    assert convert(connectors, "crab").keys() == state.keys()


def files_of(run: Path) -> set[str]:
    return {str(file.relative_to(run)) for file in run.rglob("*.*") if file.is_file()}


def is_for_text(name: str) -> bool:
    """Tell whether a weight of BERT serves text alone, so that it is dropped."""
    parts = (
        "_embeddings.weight",
        ".cls.",
        ".intermediate.dense.",
        ".output.dense.",
        ".output.LayerNorm.",
    )
    return any(part in name for part in parts) and "attention.output" not in name


def test_a_converted_run_answers(tmp_path, real_media):
    clip = next((real_media / "ave" / "video").glob("*.mp4"))
    torch.save(crab_plus(TINY_PLUS), tmp_path / "weights.bin")
    run = tmp_path / "run"
    assert command.main(["crab_plus", str(tmp_path / "weights.bin"), "--out", str(run)]) == 0
    flags = ["--run", str(run), "--weights", "tiny-random", "--max-new-tokens", "2"]
    flags += ["--picture", str(tmp_path / "a.png")]
    assert infer.main([str(clip), "--ask", "What?", *flags]) == 0

    # a converted run is asked as it was trained: the released layout around the prompt of the task
    loaded = load_run(str(run), "cpu", paths={"weights": "tiny-random"})
    layout = loaded.model.layout
    [trained] = read_samples(real_media, ["ave"], "train", limit=1, layout=layout)
    given = infer.parse_infer([*asking_words([trained], None), *flags])
    asked = question_sample(given, loaded, Path(given.clip[0]), "")
    assert asked.parts == trained.parts
    assert loaded.model.layout.before == QWEN_CHAT.before
    assert not loaded.model.layout.separate_media


def test_files_that_cannot_be_used_are_named(tmp_path, capsys):
    state = released_adapter([PEFT + "model.layers.0.mlp.up_proj"])
    torch.save(state, tmp_path / "good.bin")
    torch.save(without(state, "route"), tmp_path / "part.bin")
    torch.save(released_adapter(["x"]), tmp_path / "odd.bin")
    patches = random_weights({PEFT + "model.temporal_aggregator.output_norm.weight": (4,)})
    torch.save(patches, tmp_path / "half.bin")
    second = {name.replace("aggregator", "aggregator2"): w for name, w in patches.items()}
    torch.save(second, tmp_path / "second.bin")
    cases = [
        ("crab", ["none.bin"], "none.bin: no such file"),
        ("crab", ["odd.bin"], "odd.bin: table 'crab' does not know 5 of 5 names"),
        ("crab", ["part.bin"], "part.bin: not one I-LoRA adapter: 1 A, 0 routers"),
        ("crab", ["good.bin", "good.bin"], "and 2 others were in a file before it"),
        ("pave", ["half.bin"], "half.bin: the released patch lacks side.weight, video.weight"),
        ("pave", ["second.bin"], "second.bin: more patches (2) than names in --side audio"),
    ]
    run = tmp_path / "run"
    for paper, names, reason in cases:
        files = [str(tmp_path / name) for name in names]
        assert command.main([paper, *files, "--out", str(run)]) == 2
        assert reason in capsys.readouterr().err
        assert not run.exists()


def test_a_preset_of_another_paper_is_refused(capsys):
    assert command.main(["crema", "weights.pth", "--preset", "pave-7b"]) == 2
    assert "--preset pave-7b: files of crema want one of crema-tiny" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_not_written_to(tmp_path, capsys):
    (tmp_path / "note.txt").write_text("mine")
    assert command.main(["crab", "weights.bin", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path}: exists and is not empty" in capsys.readouterr().err
