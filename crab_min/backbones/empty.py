"""Models without weights: what `--plan` counts parameters and memory on.

Classes and sizes are those of a run, built on the meta device: tensors with a shape and a precision
but without memory. Sizes come from a config.json, where a name is a folder or stands in the hub
cache, or from sizes.py. Nothing is downloaded, tokenizers neither: where there is none, a token of
text is four characters.
"""

from dataclasses import replace
from pathlib import Path

import tokenizers
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from crab_min.backbones.blip2 import CremaModel, from_base, from_blip2, load_blip2
from crab_min.backbones.composed import (
    PLACEHOLDERS,
    ComposedModel,
    ModelConfig,
    empty_base,
)
from crab_min.backbones.llava_onevision import LlavaModel, load_llava
from crab_min.backbones.omni import QWEN_CHAT, OmniModel
from crab_min.backbones.sizes import HUB_SIZES
from crab_min.backbones.tiny_random import (
    LLAVA_TOKENS,
    OMNI_TOKENS,
    omni_processor,
    tiny_omni,
)
from crab_min.beats import read_file
from crab_min.config import BackboneConfig
from crab_min.encoders import AudioEncoder, MediaFeatures
from crab_min.errors import ModelError
from crab_min.model import ASSETS, AVLanguageModel

LOADED_IN = torch.bfloat16  # the precision in which pretrained LMs are loaded
MEDIA_TOKENS = {f"{kind}_token": token for kind, token in PLACEHOLDERS.items()}


def empty_backbone(
    config: BackboneConfig, composed_class: type[ComposedModel], template: list[str]
) -> AVLanguageModel:
    """Build the backbone of a run without weights, inside of `torch.device("meta")`.

    Args:
        composed_class: the class of a composed model.
        template: text before and after the prompts of a model that is composed of parts.

    Raises:
        ModelError: weights whose sizes are not known here.
    """
    is_random = config.weights == "tiny-random"  # small random weights are made, not read
    if config.backbone == "omni":
        return empty_omni(config)
    if config.backbone == "llava_onevision":
        return load_llava(config.weights) if is_random else empty_llava(config)
    if config.backbone == "blip2" and config.weights:
        return load_blip2(config.weights) if is_random else empty_blip2(config)
    if config.vision and not is_random:
        return empty_composed(config, composed_class, template)

    # a base: the shipped one, or that of --base
    folder = ASSETS / "base" if config.base in ("", "random") else Path(config.base)
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder / 'config.json'}: missing; --base takes the folder of a base")
    if config.backbone == "blip2":
        return from_base(empty_base(folder, ComposedModel))
    return empty_base(folder, composed_class)


def empty_composed(
    config: BackboneConfig, model_class: type[ComposedModel], template: list[str]
) -> ComposedModel:
    """Build a model that is composed of a vision encoder, a BEATs and an LM."""
    vision = find_config(config.vision, AutoConfig)
    vision = getattr(vision, "vision_config", vision)  # a whole CLIP or SigLIP has a text half too
    llm = find_config(config.llm, AutoConfig)
    sizes = ModelConfig(
        vision=vision.to_dict(),
        audio=beats_sizes(config.audio),
        llm=llm.to_dict(),
        visual_qformer={},
        audio_qformer={},
        template=template,
    )
    model = model_class(sizes, counting_tokenizer("</s>", MEDIA_TOKENS, llm.vocab_size))
    # as load_llm loads it
    model.llm.to(LOADED_IN)
    model.llm.set_attn_implementation("sdpa")
    return model


def empty_omni(config: BackboneConfig) -> OmniModel:
    """Build a Qwen2.5-Omni thinker."""
    layout = replace(QWEN_CHAT, separate_media=config.separate_media)
    if config.weights == "tiny-random":
        return EmptyOmniModel(*tiny_omni(), layout)
    sizes = find_config(config.weights, Qwen2_5OmniThinkerConfig)
    thinker = Qwen2_5OmniThinkerForConditionalGeneration(sizes).to(LOADED_IN)
    tokenizer = counting_tokenizer("<|im_end|>", OMNI_TOKENS)
    processor = omni_processor(sizes.audio_config.num_mel_bins, tokenizer)
    return EmptyOmniModel(thinker, processor, layout)


class EmptyOmniModel(OmniModel):
    """An OmniModel whose encoders are counted and do not run: they look at the values of grids."""

    def frame_tokens(self, media: list[MediaFeatures]) -> list[Tensor]:
        return [self.zero_tokens(medium) for medium in media]

    def sound_tokens(self, media: list[MediaFeatures]) -> list[Tensor]:
        return [self.zero_tokens(medium) for medium in media]

    def zero_tokens(self, medium: MediaFeatures) -> Tensor:
        """Return zeros in the place of a medium's tokens (token_count, D)."""
        width = self.thinker.config.text_config.hidden_size
        return torch.zeros(self.token_count(medium), width, dtype=self.thinker.dtype)


def empty_llava(config: BackboneConfig) -> LlavaModel:
    """Build a LLaVA-OneVision, with a BEATs where one is named."""
    sizes = find_config(config.weights, LlavaOnevisionConfig)
    llava = LlavaOnevisionForConditionalGeneration(sizes).to(LOADED_IN)
    tokenizer = counting_tokenizer("<|im_end|>", LLAVA_TOKENS)
    return LlavaModel(llava, tokenizer, empty_beats(config.audio))


def empty_blip2(config: BackboneConfig) -> CremaModel:
    """Build a BLIP-2, with a BEATs where one is named."""
    sizes = find_config(config.weights, Blip2Config)
    blip = Blip2ForConditionalGeneration(sizes).to(LOADED_IN)
    tokenizer = counting_tokenizer("</s>", MEDIA_TOKENS)
    return from_blip2(blip, tokenizer, empty_beats(config.audio))


# --- sizes ---------------------------------------------------------------------------------------


def find_config(name: str, config_class: type) -> PreTrainedConfig:
    """Return the transformers config of a model by hub id or folder.

    Args:
        config_class: its class, or AutoConfig.

    Raises:
        ModelError: neither sizes.py nor this machine has one.
    """
    if name in HUB_SIZES and config_class is AutoConfig:
        return AutoConfig.for_model(**HUB_SIZES[name])
    if name in HUB_SIZES:
        return config_class(**HUB_SIZES[name])
    try:
        return config_class.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name}: its sizes are not known here, and --plan downloads nothing; give a folder "
            f"with its config.json, or one of {', '.join(HUB_SIZES)}"
        ) from error


def beats_sizes(path: str) -> dict:
    """Return the config of a BEATs checkpoint; without the file, that of all published ones."""
    return read_file(path)["cfg"] if Path(path).is_file() else {}


def empty_beats(path: str) -> AudioEncoder | None:
    """Build a BEATs, or nothing where none is named."""
    return AudioEncoder(beats_sizes(path)) if path else None


def counting_tokenizer(end: str, special: dict[str, str], size: int = 0) -> PreTrainedTokenizerFast:
    """Make a tokenizer that takes four characters of a text for a token.

    Args:
        end: the special token at the end of an answer.
        special: other special tokens by attribute.
        size: of the vocabulary, filled with tokens that occur nowhere.
    """
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": end}
    vocabulary = [*names.values(), *special.values()]
    vocabulary += [f"<{i}>" for i in range(len(vocabulary), size)]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    four = tokenizers.Regex(r"[\s\S]{1,4}")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(four, "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=special, **names
    )
