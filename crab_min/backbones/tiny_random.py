"""Small random models of transformers' classes, to try a command: tiny-random.

Their weights are the same ones each time, and their tokenizers know bytes only.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import tokenizers
import torch
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

from crab_min.backbones.sizes import qwen2

# special tokens by attribute name, in the order of their ids
OMNI_TOKENS = {
    "vision_bos_token": "<|vision_bos|>",
    "video_token": "<|video|>",
    "vision_eos_token": "<|vision_eos|>",
    "image_token": "<|image|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_token": "<|audio|>",
    "audio_eos_token": "<|audio_eos|>",
    "im_start_token": "<|im_start|>",
}
LLAVA_TOKENS = {
    "im_start_token": "<|im_start|>",
    "image_token": "<image>",
    "video_token": "<video>",
}
# the 256 characters that stand for bytes in a byte-level tokenizer
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


@contextmanager
def same_random_weights() -> Iterator[None]:
    """Draw random weights from one seed, and leave the random state outside as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def byte_level_qwen(special_tokens: dict[str, str]) -> Qwen2Tokenizer:
    """Make Qwen's tokenizer without merges, with special tokens by attribute name."""
    return Qwen2Tokenizer(
        vocab={character: i for i, character in enumerate(BYTES)},
        merges=[],
        unk_token=None,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=special_tokens,
    )


def byte_level_t5(placeholder: str) -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer whose padding and end have T5's ids, 0 and 1."""
    vocabulary = ["<pad>", "</s>", *BYTES]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=[placeholder],
    )


def omni_processor(mel_bins: int, tokenizer: PreTrainedTokenizerBase) -> Qwen2_5OmniProcessor:
    """Make Qwen2.5-Omni's processor with another tokenizer."""
    return Qwen2_5OmniProcessor(
        Qwen2VLImageProcessor(),
        Qwen2VLVideoProcessor(),
        WhisperFeatureExtractor(feature_size=mel_bins, return_attention_mask=True),
        tokenizer,
    )


def tiny_omni() -> tuple[nn.Module, Qwen2_5OmniProcessor]:
    """Make a Qwen2.5-Omni thinker of 0.2 million parameters, and its processor."""
    tokenizer = byte_level_qwen(OMNI_TOKENS)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    config = Qwen2_5OmniThinkerConfig(
        text_config={**qwen2(64, 96, 2, 4, 2, vocab=len(tokenizer)), "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        audio_config={
            "num_mel_bins": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "d_model": 32,
            "output_dim": 64,
        },
        video_token_index=tokenizer.video_token_id,
        image_token_index=tokenizer.image_token_id,
        audio_token_index=tokenizer.audio_token_id,
        vision_start_token_id=tokenizer.vision_bos_token_id,
        vision_end_token_id=tokenizer.vision_eos_token_id,
        audio_start_token_id=tokenizer.audio_bos_token_id,
        audio_end_token_id=tokenizer.audio_eos_token_id,
    )
    return Qwen2_5OmniThinkerForConditionalGeneration(config), omni_processor(16, tokenizer)


# the sizes of small encoders
TRANSFORMER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VIT = {**TRANSFORMER, "image_size": 56, "patch_size": 14}


def tiny_llava() -> tuple[nn.Module, Qwen2Tokenizer]:
    """Make a LLaVA-OneVision of 0.3 million parameters, and its tokenizer."""
    tokenizer = byte_level_qwen(LLAVA_TOKENS)
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **VIT, "vision_use_head": False},
        text_config=qwen2(64, 96, 2, 4, 2, vocab=len(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=[[56, 56]],
    )
    return LlavaOnevisionForConditionalGeneration(config), tokenizer


def tiny_blip2(placeholder: str) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """Make a BLIP-2 with a T5, 0.3 million parameters together, and its tokenizer."""
    tokenizer = byte_level_t5(placeholder)
    config = Blip2Config(
        vision_config=VIT,
        qformer_config={**TRANSFORMER, "encoder_hidden_size": 32, "vocab_size": 8},
        text_config={
            "model_type": "t5",
            "d_model": 64,
            "d_ff": 96,
            "d_kv": 16,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": len(tokenizer),
            "decoder_start_token_id": 0,
        },
        num_query_tokens=4,
    )
    blip = Blip2ForConditionalGeneration(config)
    nn.init.normal_(blip.query_tokens, std=0.02)  # transformers begins with zeros
    return blip, tokenizer
