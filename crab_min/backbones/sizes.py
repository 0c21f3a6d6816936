"""The sizes of the models: the tiny base, and what the large presets are built of."""

# The tiny base: about 4 million parameters in the same modules as at full size, so that everything
# runs on a laptop.
TINY_MODEL = {
    "vision": {
        "model_type": "clip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 96,
        "patch_size": 8,
    },
    "vision_layer": -1,
    "audio": {
        "embed_dim": 64,
        "encoder_layers": 4,
        "encoder_embed_dim": 128,
        "encoder_ffn_embed_dim": 256,
        "encoder_attention_heads": 4,
        "conv_pos": 32,
        "conv_pos_groups": 8,
        "num_buckets": 32,
        "max_distance": 128,
    },
    "visual_qformer": {"queries": 6, "hidden": 128, "layers": 2, "heads": 4, "intermediate": 256},
    "audio_qformer": {"queries": 3, "hidden": 128, "layers": 2, "heads": 4, "intermediate": 256},
    "llm": {
        "model_type": "llama",
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
    "time_steps": 10,
    "numbers": 2,
}

# What a config here does not name is transformers' default.


def qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int
) -> dict:
    """Return the config of an LM of the Qwen2 family."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


def qwen_omni(lm: dict) -> dict:
    """Return the config of a Qwen2.5-Omni thinker.

    Its encoders are as large in all sizes.
    """
    return {
        "text_config": lm,
        "vision_config": {"hidden_size": 1280, "out_hidden_size": lm["hidden_size"]},
        "audio_config": {"output_dim": lm["hidden_size"]},
    }


# The configs of the weights that the presets name, by hub id: `--plan` counts with them and
# downloads nothing.
HUB_SIZES = {
    "Qwen/Qwen2.5-Omni-3B": qwen_omni(qwen2(2048, 11008, 36, 16, 2, vocab=151936)),
    "Qwen/Qwen2.5-Omni-7B": qwen_omni(qwen2(3584, 18944, 28, 28, 4, vocab=152064)),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": {
        "text_config": {**qwen2(896, 4864, 24, 14, 2, vocab=152000), "tie_word_embeddings": True}
    },
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": {
        "text_config": qwen2(3584, 18944, 28, 28, 4, vocab=152128)
    },
    # its ViT-g and its Q-Former are the defaults
    "Salesforce/blip2-flan-t5-xl": {
        "text_config": {
            "model_type": "t5",
            "d_model": 2048,
            "d_ff": 5120,
            "num_layers": 24,
            "num_heads": 32,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
            "tie_word_embeddings": False,
        }
    },
    "openai/clip-vit-large-patch14": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "meta-llama/Llama-2-7b-chat-hf": {"model_type": "llama"},  # the default sizes are its own
}
# Every published BEATs has the default sizes of beats.BeatsConfig.
