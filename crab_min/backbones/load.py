"""The model that the settings of a run name, frozen and in evaluation mode."""

from contextlib import nullcontext

import torch
from transformers import AutoConfig

from crab_min.backbones.blip2 import load_blip2
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
from crab_min.config import BackboneConfig, MaskDecoderConfig
from crab_min.errors import ModelError
from crab_min.model import AVLanguageModel

# the chat template of Llama 2, around every prompt
LLAMA_CHAT = ["[INST] <<SYS>>\nYou are a helpful assistant.\n<</SYS>>\n\n", " [/INST] "]


def load_model(
    config: BackboneConfig, masks: MaskDecoderConfig | None = None, empty: bool = False
) -> AVLanguageModel:
    """Load the model of a run.

    Args:
        masks: the mask decoder; it is added where `masks.decoder` is true.
        empty: build the same classes on the meta device instead, without weights (empty.py).

    Raises:
        ModelError: settings that exclude each other, or weights that are not there.
    """
    has_masks = masks is not None and masks.decoder
    check_settings(config, has_masks)
    composed_class = MaskingModel if has_masks else ComposedModel
    with torch.device("meta") if empty else nullcontext():
        model = load_backbone(config, composed_class, empty)
        if has_masks:
            model.add_mask_decoder(masks)
    return model.requires_grad_(False).eval()


def load_backbone(
    config: BackboneConfig, composed_class: type[ComposedModel], empty: bool
) -> AVLanguageModel:
    """Load a backbone, or build it without weights.

    Args:
        composed_class: the class of a composed model.
    """
    weights, in_4bit = config.weights, config.load_in_4bit
    if config.backbone == "omni":
        return load_omni(weights, config.separate_media, in_4bit, empty)
    if config.backbone == "llava_onevision":
        return load_llava(weights, config.audio, in_4bit, empty)
    if config.backbone == "blip2":
        return load_blip2(weights, config.base, config.audio, in_4bit, empty)

    # composed: a base, or the parts' own weights
    if weights == "tiny-random":
        return load_base("random", composed_class)
    if not config.vision:
        return load_base(config.base, composed_class, empty)
    if empty:
        return empty_composed(config, composed_class)
    parts = ModelConfig(config.vision, config.audio, config.llm, template=LLAMA_CHAT)
    return composed_class(parts, load_tokenizer(config.llm), in_4bit)


def empty_composed(config: BackboneConfig, composed_class: type[ComposedModel]) -> ComposedModel:
    """Build a model that is composed of a vision encoder, a BEATs and an LM, without weights."""
    vision = find_config(config.vision, AutoConfig)
    vision = getattr(vision, "vision_config", vision)  # a whole CLIP or SigLIP has a text half too
    llm = find_config(config.llm, AutoConfig)
    parts = ModelConfig(
        vision.to_dict(), beats_sizes(config.audio), llm.to_dict(), template=LLAMA_CHAT
    )
    special = {f"{kind}_token": token for kind, token in PLACEHOLDERS.items()}
    model = composed_class(parts, counting_tokenizer("</s>", special, llm.vocab_size))
    # as load_llm loads it
    model.llm.to(torch.bfloat16)
    model.llm.set_attn_implementation("sdpa")
    return model


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
    if config.backbone == "composed" and config.weights != "tiny-random":
        check_parts(config)


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
