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

# Full sizes, the few numbers that make a model: what `--plan` counts with. Everything else is transformers' default.
CLIP_LARGE = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
              "image_size": 224, "patch_size": 14}
LLAMA_2_7B = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


def qwen_omni(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict:
    """The thinker of a Qwen2.5-Omni (transformers' default has another vision encoder): its LM differs from size to size, its encoders only in their output."""
    return {"text_config": {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
                            "num_key_value_heads": kv_heads, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
            "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": hidden},
            "audio_config": {"num_mel_bins": 128, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "d_model": 1280, "output_dim": hidden}}


def llava_onevision(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict:
    """LLaVA-OneVision: transformers' default SigLIP and a Qwen2."""
    return {"text_config": {"model_type": "qwen2", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
                            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}}


VIT_G = {"model_type": "blip_2_vision_model"}           # transformers' defaults are BLIP-2's
FLAN_T5_XL = {"model_type": "t5", "vocab_size": 32128, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "feed_forward_proj": "gated-gelu",
              "decoder_start_token_id": 0, "tie_word_embeddings": False}
LLAVA = {"0.5b": llava_onevision(896, 4864, 24, 14, 2, 152000, True), "7b": llava_onevision(3584, 18944, 28, 28, 4, 152128, False)}
QWEN_OMNI = {"3b": qwen_omni(2048, 11008, 36, 16, 2, 151936), "7b": qwen_omni(3584, 18944, 28, 28, 4, 152064)}
LLAMA_CHAT = ["[INST] <<SYS>>\nYou are a helpful assistant.\n<</SYS>>\n\n", " [/INST] "]                # text before and after a prompt

# preset: (what it is, values that differ from the defaults of its config)
CRAB_PLUS = {"backbone": "native", "r": 128, "alpha": 256, "dropout": .1, "train": "adapter", "lr": 1e-4, "batch_size": 4, "epochs": 5, "mix": 1.0,
             "cache_features": False, "checkpointing": True}
CRAB = {"r": 8, "alpha": 16, "dropout": .05, "train": "adapter+connectors", "lr": 1e-4, "connector_lr": 1e-4, "batch_size": 8, "epochs": 5, "mix": 1.0,
        "cache_features": False, "checkpointing": True, "stage": "visual"}
PAVE = {"backbone": "llava", "adapter": "lora", "r": 64, "alpha": 16, "dropout": .05, "train": "adapter", "side": "audio", "frames": 32, "tasks": "avqa", "lr": 2e-5,
        "connector_lr": 2e-5, "clip": .1, "batch_size": 16, "epochs": 2, "target": "label", "mix": 1.0, "cache_features": False, "checkpointing": True}
CREMA = {"backbone": "crema", "weights": "Salesforce/blip2-flan-t5-xl", "adapter": "none", "train": "adapter", "modalities": "rgb,audio", "frames": 4, "tasks": "avqa",
         "lr": 2e-4, "connector_lr": 2e-4, "batch_size": 24, "epochs": 20, "target": "label", "mix": 1.0, "answers": "options", "cache_features": False, "checkpointing": True}
PRESETS = {
    "crab_plus-tiny": ("Crab+'s recipe on the shipped tiny base: I-LoRA, text answers, the built-in world (or --data)", {"r": 16, "alpha": 32}),
    "crab-tiny": ("Crab's recipe on the shipped tiny base: a connector a sense (--stage visual, audio), then all tasks (--stage unified)",
                  {"r": 16, "alpha": 32, "stage": "visual", "steps": 400}),
    "pave-tiny": ("PAVE's recipe on the shipped tiny base: a patch for a side channel (--side audio, fast, depth, view) and LoRA, beside LoRA alone", {
        "adapter": "lora", "r": 16, "alpha": 32, "dropout": 0, "train": "adapter", "side": "audio", "patch_size": 128, "answers": "options", "arms": True, "world_clips": 600,
        "world_test": 200, "steps": 400, "connector_lr": 5e-3}),
    "crema-tiny": ("CREMA's recipe on the shipped tiny base: modalities (--modalities) through its visual Q-Former", CREMA | {
        "weights": "", "checkpointing": False, "modalities": "rgb,audio,flow,depth,thermal", "join": "add", "modality_rank": 16, "world_clips": 450, "world_test": 60, "frames": 5,
        "batch_size": 16, "sequential": False, "steps": 900, "modality_dropout": .3, "lr": 5e-3, "connector_lr": 5e-3, "cache_features": True}),
    "crema-xl": ("CREMA on BLIP-2 with Flan-T5-XL: one Q-Former for all modalities", CREMA),
    "pave-0.5b": ("PAVE on LLaVA-OneVision-0.5B: a patch for a side channel, and LoRA on its LM", PAVE | {"weights": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"}),
    "pave-7b": ("PAVE on LLaVA-OneVision-7B", PAVE | {"weights": "llava-hf/llava-onevision-qwen2-7b-ov-hf"}),
    "crab_plus-3b": ("Crab+ on Qwen2.5-Omni-3B: I-LoRA on its LM", CRAB_PLUS | {"weights": "Qwen/Qwen2.5-Omni-3B"}),
    "crab_plus-7b": ("Crab+ on Qwen2.5-Omni-7B: I-LoRA on its LM", CRAB_PLUS | {"weights": "Qwen/Qwen2.5-Omni-7B"}),
    "crab-7b": ("Crab: CLIP-L + BEATs + Q-Formers + Llama-2-7b-chat, in three stages", CRAB | {
        "vision": "openai/clip-vit-large-patch14", "audio": "BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt", "llm": "meta-llama/Llama-2-7b-chat-hf"}),
    "tiny-base": ("trains the tiny base itself from nothing on the built-in world", {}),
}

# (preset, stage): values that differ from the preset's
STAGES = {
    ("crab-tiny", "masks"): {"train": "adapter+connectors+decoder", "text_steps": 250, "mask_width": 64, "mask_heads": 4, "mask_queries": 16, "mask_bce": 2., "mask_dice": 2.,
                             "connector_lr": 1e-3, "beta2": .98, "warmup": .05, "steps": 1400, "world_clips": 1800},
    ("crab-7b", "masks"): {"train": "masks", "epochs": 30},
}
