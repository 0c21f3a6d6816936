"""The table of presets: plain values for the dataclasses that stand beside the code they configure."""

# The tiny base: about 4 million parameters, so that everything runs on a laptop. The same modules as at full size.
TINY_MODEL = {
    "vision": {"model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
               "image_size": 96, "patch_size": 8},
    "vision_layer": -1,
    "audio": {"embed_dim": 64, "encoder_layers": 4, "encoder_embed_dim": 128, "encoder_ffn_embed_dim": 256, "encoder_attention_heads": 4,
              "conv_pos": 32, "conv_pos_groups": 8, "num_buckets": 32, "max_distance": 128},
    "visual_qformer": {"queries": 6, "hidden": 128, "layers": 2, "heads": 4, "intermediate": 256},
    "audio_qformer": {"queries": 3, "hidden": 128, "layers": 2, "heads": 4, "intermediate": 256},
    "llm": {"model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6,
            "num_key_value_heads": 6, "max_position_embeddings": 1024, "tie_word_embeddings": True},
    "time_steps": 10, "numbers": 2,
}

# preset: (what it is, values that differ from the defaults of its config)
PRESETS = {
    "crab_plus-tiny": ("Crab+'s recipe on the shipped tiny base: I-LoRA, text answers, the built-in world (or --data)", {"r": 16, "alpha": 32}),
    "tiny-base": ("trains the tiny base itself from nothing on the built-in world", {}),
}
