"""Which model a run is about: the flags that choose a backbone and its weights, and the function that loads it."""
import re
from dataclasses import dataclass, field

import torch
from torch import nn

from crab_min.backbones.blip2 import load_crema
from crab_min.backbones.composed import (
    ASSETS,
    ComposedModel,
    ModelConfig,
    load_base,
    load_tokenizer,
)
from crab_min.backbones.llava_onevision import load_llava
from crab_min.backbones.omni import load_omni
from crab_min.backbones.sizes import LLAMA_CHAT
from crab_min.encoders import DepthEncoder, register
from crab_min.errors import ModelError
from crab_min.masks import SegmentConfig
from crab_min.model import LLM_LINEARS, AVLanguageModel


@dataclass
class BackboneConfig(SegmentConfig):
    """The frozen model. Weights are named by local path or hub id."""
    backbone: str = field(default="composed", metadata={"help": "composed (CLIP + BEATs + Q-Formers + LM), native (Qwen2.5-Omni), llava (LLaVA-OneVision) or crema (one "
                                                               "Q-Former for all modalities: BLIP-2, or without --weights the base)",
                                                       "choices": ["composed", "native", "llava", "crema"]})
    base: str = field(default="", metadata={"help": "composed, crema: folder of a base, or random (default: the shipped tiny base)"})
    vision: str = field(default="", metadata={"help": "composed, instead of a base: CLIP or SigLIP"})
    audio: str = field(default="", metadata={"help": "composed, instead of a base; llava and crema, for sound beside a video: path of a BEATs checkpoint (BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt)"})
    llm: str = field(default="", metadata={"help": "composed, instead of a base: a causal LM for chat in Llama 2's format"})
    weights: str = field(default="", metadata={"help": "native: Qwen2.5-Omni; llava: LLaVA-OneVision; crema: BLIP-2; any preset: tiny-random, small random weights of the same classes, to try a command"})
    depth: str = field(default="", metadata={"help": "crema: a depth model of transformers, by path or hub id, that makes the modality depth of clips without depth files"})
    quantize: str = field(default="", metadata={"help": "4bit: the linears of the frozen LM in NF4 (QLoRA), a quarter of the memory; wants the package bitsandbytes", "choices": ["", "4bit"]})
    separate: bool = field(default=True, metadata={"help": "native: text between two videos or two sounds of a prompt (the released Crab+ runs them together)"})


def load_model(config: BackboneConfig) -> AVLanguageModel:
    """The model of a run, frozen and in evaluation mode. Raises ModelError, ModelError."""
    model = load_frozen(config)
    if config.masks:
        if not isinstance(model, ComposedModel):
            raise ModelError(f"--masks decoder: the decoder reads the layers of a vision encoder beside a causal LM (--backbone composed), got --backbone {config.backbone}")
        model.add_masks(config)
    if config.quantize:
        quantize(model.llm)
    return model


def quantize(llm: nn.Module) -> None:
    """4 bits a weight (NF4 with quantized scales, QLoRA 2305.14314, section 3) for the linears of the LM's layers, from when they move to their device. Raises ModelError."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except (ImportError, RuntimeError) as error:
        raise ModelError(f"--quantize 4bit: bitsandbytes cannot be used ({str(error).splitlines()[0]}); pip install bitsandbytes, or leave --quantize out") from error
    for name, linear in list(llm.named_modules()):
        if isinstance(linear, nn.Linear) and re.fullmatch(LLM_LINEARS + r"|(encoder|decoder)\.block\..+", name):                # of a T5 the latter
            kind = {"quant_type": "nf4", "quant_storage": torch.bfloat16}      # kept as if in bfloat16, since T5 makes its inputs of the type of its weights
            small = Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=torch.bfloat16, device="meta", **kind)
            small.weight, small.bias = Params4bit(linear.weight.data, requires_grad=False, module=small, **kind), linear.bias
            llm.set_submodule(name, small)


def load_frozen(config: BackboneConfig) -> AVLanguageModel:
    if config.backbone == "crema":
        model = load_crema(config.weights, config.base, config.audio)
        if config.depth:
            register("depth", DepthEncoder(config.depth, model.vision))
        return model
    if config.backbone != "composed" and not config.weights:
        raise ModelError(f"--backbone {config.backbone}: which weights? give --weights, a path or hub id of Qwen2.5-Omni (native) or LLaVA-OneVision (llava), or tiny-random")
    if config.backbone == "native":
        return load_omni(config.weights, config.separate)
    if config.backbone == "llava":
        return load_llava(config.weights, config.audio)
    parts = {"vision": config.vision, "audio": config.audio, "llm": config.llm}
    if config.weights == "tiny-random":
        return load_base("random")
    if config.weights:
        raise ModelError(f"--weights {config.weights}: a composed model takes --base, or --vision, --audio and --llm; --weights takes tiny-random alone")
    if not any(parts.values()):
        return load_base(config.base or ASSETS / "base")
    if config.base or not all(parts.values()):
        raise ModelError(f"--vision, --audio and --llm go together and without --base; got {parts | {'base': config.base}}")
    model = ComposedModel(ModelConfig(**parts, visual_qformer={}, audio_qformer={}, template=LLAMA_CHAT), load_tokenizer(config.llm))
    return model.requires_grad_(False).eval()
