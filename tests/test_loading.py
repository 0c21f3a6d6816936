"""Pretrained weights that cannot be used are one line that says what to do."""

import gc
import json
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from crab_min.backbones.common import load_pretrained
from crab_min.backbones.load import load_model
from crab_min.backbones.tiny_random import tiny_blip2, tiny_omni
from crab_min.beats import load_beats
from crab_min.config import BackboneConfig
from crab_min.encoders import VisionEncoder
from crab_min.errors import ModelError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4800000000\n"


@pytest.fixture
def omni(tmp_path) -> BackboneConfig:
    """A Qwen2.5-Omni of random weights, in a folder as the hub has it."""
    for piece in tiny_omni():
        piece.save_pretrained(tmp_path / "omni")
    return BackboneConfig(backbone="omni", weights=str(tmp_path / "omni"))


def change_weights(config: BackboneConfig, change) -> None:
    file = Path(config.weights) / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def test_whole_weights_load(omni):
    model = load_model(omni)
    assert model.llm.dtype == torch.bfloat16


def anonymous_bytes() -> int:
    """Return the memory of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("stored, most", [(torch.bfloat16, 0.3), (torch.float16, 1.3)])
def test_a_model_is_never_in_host_memory_twice(stored, most, tmp_path):
    """Weights in bfloat16 stay in the mapped file, which all share; others are copied once."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12}
    config = LlamaConfig(vocab_size=1000, num_attention_heads=8, **sizes)
    LlamaForCausalLM(config).to(stored).save_pretrained(tmp_path)
    gc.collect()
    loaded, peak, before = threading.Event(), [0], anonymous_bytes()

    def watch() -> None:
        while not loaded.wait(0.001):
            peak[0] = max(peak[0], anonymous_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        model = load_pretrained(LlamaForCausalLM, str(tmp_path), False, [])
    finally:
        loaded.set()
        watcher.join()
    assert peak[0] < most * sum(parameter.nbytes for parameter in model.parameters())


def test_a_git_lfs_pointer_is_named(omni, tmp_path):
    (Path(omni.weights) / "model.safetensors").write_text(POINTER)
    with pytest.raises(ModelError, match="model.safetensors: a git-lfs pointer.*git lfs pull"):
        load_model(omni)
    (tmp_path / "beats.pt").write_text(POINTER)
    with pytest.raises(ModelError, match="beats.pt: a git-lfs pointer"):
        load_beats(tmp_path / "beats.pt")
    with pytest.raises(ModelError, match="a git-lfs pointer"):
        VisionEncoder(omni.weights)


def test_half_a_checkpoint_is_named(omni):
    change_weights(omni, lambda state: dict(list(state.items())[::2]))
    with pytest.raises(ModelError, match=r"weights that a Qwen2_5OmniThinker\w+ has are not in it"):
        load_model(omni)


def test_half_a_file_is_not_looked_for_on_the_hub(omni):
    file = Path(omni.weights) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"cannot be loaded \(.*\)\. Is the download whole"):
        load_model(omni)


def test_a_foreign_layout_is_named(omni):
    change_weights(omni, lambda state: {f"module.{key}": x for key, x in state.items()})
    with pytest.raises(ModelError, match="are not in it .*Is the download whole, and the model of"):
        load_model(omni)


def test_other_sizes_are_named(omni):
    change_weights(omni, lambda state: {key: x[..., :-1].clone() for key, x in state.items()})
    with pytest.raises(ModelError, match="of other sizes than its config.json names"):
        load_model(omni)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_weights_that_others_have_quantized_are_refused(method, omni):
    file = Path(omni.weights) / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": method}}
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"quantized \({method}\).*--load-in-4bit"):
        load_model(omni)


def test_defaults_of_generation_on_the_hub_change_nothing(omni):
    config = GenerationConfig(repetition_penalty=1.3, do_sample=True, temperature=2.0, top_k=3)
    config.save_pretrained(omni.weights)
    model = load_model(omni)
    assert model.llm.generation_config.repetition_penalty in (None, 1.0)
    assert not model.llm.generation_config.do_sample
    tiny = load_model(replace(omni, weights="tiny-random"))
    assert model.llm.generation_config.to_diff_dict().keys() == (
        tiny.llm.generation_config.to_diff_dict().keys()
    )


def test_the_qformer_of_blip2_keeps_float32(tmp_path):
    for piece in tiny_blip2("<video>"):
        piece.save_pretrained(tmp_path)
    blip, _ = tiny_blip2("<video>")
    model = load_model(BackboneConfig(backbone="blip2", weights=str(tmp_path)))
    assert model.llm.dtype == model.vision.model.dtype == torch.bfloat16
    loaded = model.multimodal.qformer.state_dict()
    stored = load_file(tmp_path / "model.safetensors")
    names = [name for name in stored if name.startswith("qformer.") and "query.weight" in name]
    assert names
    for name in names:
        key = name.removeprefix("qformer.").replace("query.weight", "query.base.weight")
        value = loaded.get(key, loaded.get(name.removeprefix("qformer.")))
        assert value.dtype == torch.float32 and torch.equal(value, stored[name])
