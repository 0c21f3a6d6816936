"""The model that the settings of a run name, frozen and in evaluation mode."""

from crab_min.backbones.blip2 import load_blip2
from crab_min.backbones.composed import (
    ComposedModel,
    ModelConfig,
    load_base,
    load_tokenizer,
)
from crab_min.backbones.llava_onevision import load_llava
from crab_min.backbones.masking import MaskingModel
from crab_min.backbones.omni import load_omni
from crab_min.config import BackboneConfig, MaskDecoderConfig
from crab_min.errors import ModelError
from crab_min.model import ASSETS, AVLanguageModel

# the chat template of Llama 2, around every prompt
LLAMA_CHAT = ["[INST] <<SYS>>\nYou are a helpful assistant.\n<</SYS>>\n\n", " [/INST] "]


def load_model(config: BackboneConfig, masks: MaskDecoderConfig | None = None) -> AVLanguageModel:
    """Load the model of a run.

    Args:
        masks: the mask decoder; it is added where `masks.decoder` is true.

    Raises:
        ModelError: settings that exclude each other, or weights that are not there.
    """
    if masks is not None and masks.decoder:
        return load_masking(config, masks)
    check_4bit(config)
    if config.backbone == "composed":
        return load_composed(config, ComposedModel)
    if config.backbone == "blip2":
        return load_blip2(config.weights, config.base, config.audio, config.load_in_4bit)
    if not config.weights:
        raise ModelError(
            f"--backbone {config.backbone}: which weights? give --weights, a path or hub id of "
            "Qwen2.5-Omni (omni) or LLaVA-OneVision (llava_onevision), or tiny-random"
        )
    if config.backbone == "omni":
        return load_omni(config.weights, config.separate_media, config.load_in_4bit)
    return load_llava(config.weights, config.audio, config.load_in_4bit)


def load_masking(config: BackboneConfig, masks: MaskDecoderConfig) -> MaskingModel:
    """Load a composed model and add a new mask decoder."""
    if config.backbone != "composed":
        raise ModelError(
            "mask decoder: it reads the layers of a vision encoder beside a causal LM "
            f"(--backbone composed), got --backbone {config.backbone}"
        )
    check_4bit(config)
    model = load_composed(config, MaskingModel)
    model.add_mask_decoder(masks)
    return model


def check_4bit(config: BackboneConfig) -> None:
    """Refuse 4 bits where no LM is loaded from a hub or folder: a random or a tiny one needs none."""
    pretrained = config.llm if config.backbone == "composed" else config.weights
    if config.load_in_4bit and pretrained in ("", "tiny-random"):
        raise ModelError(
            "--load-in-4bit: the LM is quantized while it is loaded from a hub or a folder, and here there "
            f"is nothing to load ({pretrained or 'the tiny base'}); name an LM, or leave --load-in-4bit out"
        )


def load_composed(config: BackboneConfig, model_class: type[ComposedModel]) -> ComposedModel:
    """Load a base, or put a model together from its parts' own weights."""
    parts = {"vision": config.vision, "audio": config.audio, "llm": config.llm}
    if config.weights == "tiny-random":
        return load_base("random", model_class)
    if config.weights:
        raise ModelError(
            f"--weights {config.weights}: a composed model takes --base, or --vision, --audio and --llm; "
            "--weights takes tiny-random alone"
        )
    if not any(parts.values()):
        return load_base(config.base or ASSETS / "base", model_class)
    if config.base or not all(parts.values()):
        given = parts | {"base": config.base}
        raise ModelError(f"--vision, --audio and --llm go together and without --base; got {given}")
    composed = ModelConfig(**parts, visual_qformer={}, audio_qformer={}, template=LLAMA_CHAT)
    model = model_class(composed, load_tokenizer(config.llm), config.load_in_4bit)
    return model.requires_grad_(False).eval()
