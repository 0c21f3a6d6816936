"""What backbones share: media by kind, sound through BEATs, pretrained weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import BitsAndBytesConfig

from crab_min.encoders import AudioEncoder, MediaFeatures
from crab_min.errors import ModelError
from crab_min.model import missing_weights


def by_kind(
    media: list[MediaFeatures], groups: list[tuple[str, ...]]
) -> Iterator[tuple[tuple[str, ...], list[int]]]:
    """Yield each group of kinds that occurs, with the positions of its media."""
    for kinds in groups:
        positions = [i for i, medium in enumerate(media) if medium.kind in kinds]
        if positions:
            yield kinds, positions


@torch.no_grad()
def encode_sounds(encoder: AudioEncoder | None, sounds: list) -> list[MediaFeatures]:
    """Encode several sounds with BEATs, each T waves (N,): features (T, S, W).

    Raises:
        ModelError: no encoder.
    """
    if encoder is None:
        raise ModelError(
            "audio: this model has no audio encoder; name a BEATs checkpoint with --audio, "
            'or give features as files (.npy, .pt) under "sides"'
        )
    encoded = []
    for waves in sounds:
        # (1, T, S, W), (1, T, S)
        features, mask = encoder([torch.as_tensor(wave) for wave in waves])
        encoded.append(MediaFeatures("audio", features[0], mask[0]))
    return encoded


@contextmanager
def named_weights(what: str, name: str) -> Iterator[None]:
    """Turn what transformers raises for missing weights into a ModelError."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError) as error:
        raise missing_weights(what, name, error) from error


def four_bit_config(not_in_4_bits: list[str]) -> BitsAndBytesConfig:
    """Return settings for NF4 with quantized scales (QLoRA, 2305.14314).

    Args:
        not_in_4_bits: modules that keep their precision, by name or as a regular expression.

    Raises:
        ModelError: bitsandbytes is missing or does not work here.
    """
    try:
        import bitsandbytes  # noqa: F401  (optional, and slow to import)
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"--load-in-4bit: bitsandbytes cannot be used ({reason}); pip install bitsandbytes, "
            "or leave --load-in-4bit out"
        ) from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=not_in_4_bits,
    )
