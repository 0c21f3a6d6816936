"""Common code of the backbones: pretrained weights, and sound through BEATs."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from crab_min.backbones.empty import beats_sizes
from crab_min.backbones.sizes import TINY_MODEL
from crab_min.beats import refuse_lfs_pointers
from crab_min.config import BackboneConfig
from crab_min.encoders import AudioEncoder, MediaFeatures
from crab_min.errors import ModelError


def encode_sounds(encoder: AudioEncoder | None, sounds: list) -> list[MediaFeatures]:
    """Encode several sounds with BEATs, each T waves (N,): features (T, S, W).

    Raises:
        ModelError: no encoder.
    """
    if encoder is None:
        raise ModelError(
            "audio: this model has no audio encoder, and takes sound only as a side channel of a "
            "video (a pave or crema preset). For that name a BEATs checkpoint with --audio, or "
            'give features as files (.npy, .pt) under "sides"'
        )
    # equal segments once: tasks often use the same windows of a file
    segments: dict[int, dict[bytes, Tensor]] = {}
    keys = []
    for waves in sounds:
        longest = max(map(len, waves))  # sets the number of tokens of all segments of a sound
        keys.append([(longest, np.asarray(wave).tobytes()) for wave in waves])
        for (_, content), wave in zip(keys[-1], waves):
            segments.setdefault(longest, {})[content] = torch.as_tensor(wave)

    # those of one number of tokens together
    encoded: dict[tuple[int, bytes], tuple[Tensor, Tensor]] = {}
    for longest, group in segments.items():
        features, mask = encoder(list(group.values()))  # (1, segments, S, W), (1, segments, S)
        for content, x, real in zip(group, features[0], mask[0]):
            encoded[longest, content] = (x, real)

    # one medium per sound
    media = []
    for sound in keys:
        features, masks = zip(*(encoded[key] for key in sound))
        media.append(MediaFeatures("audio", torch.stack(features), torch.stack(masks)))
    return media


def load_beats(config: BackboneConfig, empty: bool) -> AudioEncoder | None:
    """Load a BEATs checkpoint, or build it without weights; None where none is named."""
    if config.weights == "tiny-random":
        return AudioEncoder(TINY_MODEL["audio"])
    if not config.audio:
        return None
    return AudioEncoder(beats_sizes(config.audio) if empty else config.audio)


@contextmanager
def named_weights(what: str, name: str) -> Iterator[None]:
    """Turn what transformers raises for missing weights into a ModelError: what to do."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        advice = (
            f"Where there is a network, `hf download {name} --local-dir FOLDER` fetches it (some "
            "need an account that has accepted a licence); then name the FOLDER instead"
        )
        if Path(name).is_dir():
            advice = "Is the download whole? Fetch it again"
        raise ModelError(f"{what} {name}: cannot be loaded ({reason}). {advice}") from error


def load_pretrained(
    model_class: type, name: str, load_in_4bit: bool, not_in_4_bits: list[str]
) -> PreTrainedModel:
    """Load a model of transformers by path or hub id, in bfloat16, onto the device in context.

    Args:
        load_in_4bit: its LM in NF4 with quantized scales (QLoRA, 2305.14314).
        not_in_4_bits: modules that keep their precision, by name or as a regular expression.

    Raises:
        ModelError: bitsandbytes is missing or does not work here, or the weights are quantized
            otherwise, not downloaded, or not those of such a model.
    """
    quantization = None
    if load_in_4bit:
        import_bitsandbytes()
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=not_in_4_bits,
        )
    refuse_unusable(name)
    try:
        model, report = model_class.from_pretrained(
            name,
            dtype=torch.bfloat16,
            quantization_config=quantization,
            output_loading_info=True,
        )
    except RuntimeError as error:  # shapes; an OutOfMemoryError is one too, and goes on
        if "size mismatch" not in str(error) and "ignore_mismatched_sizes" not in str(error):
            raise
        raise ModelError(f"{name}: weights of other sizes than its config.json names") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{name}: {len(missing)} weights that a {model_class.__name__} has are not in it "
            f"({', '.join(missing[:3])}). Is the download whole, and the model of this kind?"
        )
    return model


def import_bitsandbytes() -> ModuleType:
    """Import bitsandbytes, which is optional and slow to import.

    Raises:
        ModelError: it is missing or does not work here.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"--load-in-4bit: bitsandbytes cannot be used ({reason}); pip install "
            "bitsandbytes, or leave --load-in-4bit out"
        ) from error


def refuse_unusable(name: str) -> None:
    """Refuse weights that cannot be loaded here, before they are.

    Raises:
        ModelError: they are quantized by another method, or git-lfs pointers.
    """
    config, _ = PreTrainedConfig.get_config_dict(name)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method:
        raise ModelError(
            f"{name}: its weights are quantized ({method}), and an adapter is trained here on "
            "whole ones; name the model in bfloat16, and give --load-in-4bit"
        )
    refuse_lfs_pointers(name)
