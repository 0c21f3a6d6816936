"""The model that the settings of a run name, frozen and in evaluation mode."""

import json
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from crab_min.backbones.blip2 import load_blip2
from crab_min.backbones.common import named_weights
from crab_min.backbones.composed import (
    PLACEHOLDERS,
    ComposedModel,
    ModelConfig,
    load_base,
    load_tokenizer,
)
from crab_min.backbones.empty import beats_sizes, counting_tokenizer, find_config
from crab_min.backbones.llava_onevision import load_llava
from crab_min.backbones.masking import MaskingModel
from crab_min.backbones.omni import load_omni
from crab_min.backbones.tiny_random import same_random_weights
from crab_min.config import BackboneConfig, MaskDecoderConfig
from crab_min.errors import ModelError
from crab_min.model import AVLanguageModel

# the chat template of Llama 2, around every prompt: the values of a PromptLayout
SYSTEM = "You are a helpful assistant."
LLAMA_CHAT = [
    f"[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n",
    " [/INST] ",
    True,
    "<s>[INST] ",
    SYSTEM,
]


def load_model(
    config: BackboneConfig,
    masks: MaskDecoderConfig | None = None,
    empty: bool = False,
    device: torch.device | str | None = None,
) -> AVLanguageModel:
    """Load the model of a run.

    Args:
        masks: the mask decoder; it is added where `masks.decoder` is true.
        empty: build the same classes without reading weights (empty.py).
        device: where pretrained weights are loaded to; by default the CPU, and the meta device for
            a model without weights.

    Raises:
        ModelError: settings that exclude each other, or weights that are not there.
    """
    has_masks = masks is not None and masks.decoder
    check_settings(config, has_masks)
    is_random = config.weights == "tiny-random"
    device = torch.device(device or ("meta" if empty else "cpu"))
    # random numbers are those of the CPU everywhere
    on_cpu = device.type == "cpu" or (is_random and not empty)
    with nullcontext() if on_cpu else device:
        with same_random_weights() if is_random else nullcontext():
            if has_masks:
                model = load_composed(config, empty, MaskingModel)
            else:
                model = LOADERS[config.backbone](config, empty)
        if has_masks:
            model.add_mask_decoder(masks)
    return model.requires_grad_(False).eval()


def load_composed(
    config: BackboneConfig, empty: bool, model_class: type[ComposedModel] = ComposedModel
) -> ComposedModel:
    """Load a base, or the parts of a composed model: encoders and an LM.

    Args:
        empty: build it without weights (empty.py).

    Raises:
        ModelError: settings that do not go together, or weights that are not there.
    """
    if config.weights == "tiny-random":
        return load_base("random", model_class)
    check_parts(config)
    if not config.vision:
        return load_base(config.base, model_class, empty)
    if not empty:
        parts = ModelConfig(config.vision, config.audio, config.llm, template=LLAMA_CHAT)
        return model_class(parts, load_tokenizer(config.llm), config.load_in_4bit)

    # without weights; a whole CLIP or SigLIP has a text half too
    vision = find_config(config.vision, AutoConfig)
    vision = getattr(vision, "vision_config", vision).to_dict()
    llm = find_config(config.llm, AutoConfig)
    parts = ModelConfig(vision, beats_sizes(config.audio), llm.to_dict(), template=LLAMA_CHAT)
    special = {f"{kind}_token": token for kind, token in PLACEHOLDERS.items()}
    model = model_class(parts, counting_tokenizer("</s>", special, llm.vocab_size))
    # as load_llm loads it
    model.llm.to(torch.bfloat16)
    model.llm.set_attn_implementation("sdpa")
    return model


# model_type in the config.json of a model -> the backbone that loads it
MODEL_TYPES = {
    "qwen2_5_omni": "omni",
    "qwen2_5_omni_thinker": "omni",
    "llava_onevision": "llava_onevision",
    "blip-2": "blip2",
}


def backbone_of(name: str) -> BackboneConfig:
    """Return the backbone of a model, as its config.json says.

    Args:
        name: a hub id, or a folder; also that of a base (tools of the tiny base write one).

    Raises:
        ModelError: no config.json, or a model of another kind.
    """
    if (Path(name) / "tokenizer.json").exists() and (Path(name) / "config.json").exists():
        base = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        if {"vision", "audio", "llm"} <= base.keys():
            return BackboneConfig(base=name)
    with named_weights("model", name):
        config, _ = PreTrainedConfig.get_config_dict(name)
    kind = config.get("model_type", "")
    if kind not in MODEL_TYPES:
        raise ModelError(
            f"{name}: a model of type {kind!r} cannot be asked here, only "
            f"{', '.join(MODEL_TYPES)}; an LM without encoders goes into --llm of train.py"
        )
    return BackboneConfig(MODEL_TYPES[kind], weights=name)


LOADERS = {
    "composed": load_composed,
    "omni": load_omni,
    "llava_onevision": load_llava,
    "blip2": load_blip2,
}


def check_settings(config: BackboneConfig, has_masks: bool) -> None:
    """Refuse settings that exclude each other, or that name nothing to load.

    Raises:
        ModelError: they do; it says what to give.
    """
    if has_masks and config.backbone != "composed":
        raise ModelError(
            "mask decoder: it reads the layers of a vision encoder beside a causal LM "
            f"(--backbone composed), got --backbone {config.backbone}"
        )
    pretrained = config.llm if config.backbone == "composed" else config.weights
    if config.load_in_4bit and pretrained in ("", "tiny-random"):
        raise ModelError(
            "--load-in-4bit: an LM is quantized while it is loaded from a hub or a folder, and "
            f"here there is nothing to load ({pretrained or 'a tiny base'}); name an LM, or leave "
            "--load-in-4bit out"
        )
    if config.backbone in ("omni", "llava_onevision") and not config.weights:
        raise ModelError(
            f"--backbone {config.backbone}: which weights? give --weights, a path or hub id of "
            "Qwen2.5-Omni (omni) or LLaVA-OneVision (llava_onevision), or tiny-random"
        )


def check_parts(config: BackboneConfig) -> None:
    """Refuse a composed model that is neither a base nor a whole set of parts."""
    parts = {"vision": config.vision, "audio": config.audio, "llm": config.llm}
    if config.weights:
        raise ModelError(
            f"--weights {config.weights}: a composed model takes --base, or --vision, --audio and "
            "--llm; --weights takes tiny-random alone"
        )
    if any(parts.values()) and (config.base or not all(parts.values())):
        given = parts | {"base": config.base}
        raise ModelError(f"--vision, --audio and --llm go together and without --base; got {given}")
