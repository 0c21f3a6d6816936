"""The table of presets: plain values for the dataclasses that stand beside the code they configure."""


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
