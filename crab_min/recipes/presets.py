"""The presets of train.py: a recipe each, and the values that differ from its defaults."""

from dataclasses import dataclass, field


@dataclass
class Preset:
    """A recipe with values for its settings.

    Attributes:
        values: by group of the settings, then by field.
        stages: values that a stage of Crab adds, by its name.
    """

    recipe: str
    description: str
    values: dict[str, dict] = field(default_factory=dict)
    stages: dict[str, dict[str, dict]] = field(default_factory=dict)


def with_values(values: dict[str, dict], **more: dict) -> dict[str, dict]:
    """Return values by group, with more values for some of the groups."""
    groups = {**values, **{name: {} for name in more if name not in values}}
    return {name: {**group, **more.get(name, {})} for name, group in groups.items()}


# Values of the papers at full size.
LARGE = {"cache_features": False}
CRAB_PLUS = {
    "data": LARGE,
    "backbone": {"backbone": "omni"},
    "adapter": {"r": 128, "alpha": 256, "dropout": 0.1},
    "training": {
        "trainable": "adapter",
        "lr": 1e-4,
        "batch_size": 4,
        "epochs": 5,
        "task_sampling_exponent": 1.0,
        "gradient_checkpointing": True,
    },
}
CRAB = {
    "data": LARGE,
    "backbone": {
        "vision": "openai/clip-vit-large-patch14",
        "audio": "BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt",
        "llm": "meta-llama/Llama-2-7b-chat-hf",
    },
    "adapter": {"r": 8, "alpha": 16, "dropout": 0.05},
    "training": {
        "trainable": "adapter,connectors",
        "lr": 1e-4,
        "connector_lr": 1e-4,
        "batch_size": 8,
        "epochs": 5,
        "task_sampling_exponent": 1.0,
        "gradient_checkpointing": True,
    },
}
PAVE = {
    "data": LARGE | {"tasks": "avqa", "target": "label", "frames": 32},
    "backbone": {"backbone": "llava_onevision"},
    "adapter": {"adapter": "lora", "r": 64, "alpha": 16, "dropout": 0.05},
    "training": {
        "trainable": "adapter",
        "lr": 2e-5,
        "connector_lr": 2e-5,
        "max_grad_norm": 0.1,
        "batch_size": 16,
        "epochs": 2,
        "task_sampling_exponent": 1.0,
        "gradient_checkpointing": True,
    },
}
CREMA = {
    "data": LARGE | {"tasks": "avqa", "target": "label", "frames": 4},
    "backbone": {"backbone": "blip2", "weights": "Salesforce/blip2-flan-t5-xl"},
    "adapter": {"adapter": "none"},
    "training": {
        "trainable": "adapter",
        "lr": 2e-4,
        "connector_lr": 2e-4,
        "batch_size": 24,
        "epochs": 20,
        "task_sampling_exponent": 1.0,
        "gradient_checkpointing": True,
    },
    "run": {"eval_mode": "rank"},
}

# What Crab's mask stage has on the tiny base: text first, then a small decoder on 1,800 clips.
TINY_MASKS = {
    "world": {"world_clips": 1800},
    "training": {
        "trainable": "adapter,connectors,mask_decoder",
        "connector_lr": 1e-3,
        "beta2": 0.98,
        "warmup": 0.05,
        "steps": 1400,
    },
    "stages": {"text_steps": 250},
    "masks": {"width": 64, "heads": 4, "queries": 16, "bce": 2.0, "dice": 2.0},
}

PRESETS = {
    "crab_plus-tiny": Preset(
        "crab_plus",
        "Crab+'s recipe on the shipped tiny base: I-LoRA on the built-in world (or --data)",
        {"adapter": {"r": 16, "alpha": 32}},
    ),
    "crab-tiny": Preset(
        "crab",
        "Crab's recipe on the shipped tiny base: --stage visual, audio, unified, masks",
        {"adapter": {"r": 16, "alpha": 32}, "training": {"steps": 400}},
        stages={"masks": TINY_MASKS},
    ),
    "pave-tiny": Preset(
        "pave",
        "PAVE's recipe on the shipped tiny base: a patch and LoRA, beside LoRA alone",
        {
            "world": {"world_clips": 600, "world_test": 200},
            "adapter": {"adapter": "lora", "r": 16, "alpha": 32, "dropout": 0},
            "training": {"trainable": "adapter", "steps": 400, "connector_lr": 5e-3},
            "run": {"eval_mode": "rank"},
            "patch": {"compare_lora": True, "width": 128},
        },
    ),
    "crema-tiny": Preset(
        "crema",
        "CREMA's recipe on the shipped tiny base: modalities through its visual Q-Former",
        with_values(
            CREMA,
            data={"frames": 5, "cache_features": True},
            world={"world_clips": 450, "world_test": 60},
            backbone={"weights": ""},
            training={
                "batch_size": 16,
                "steps": 900,
                "lr": 5e-3,
                "connector_lr": 5e-3,
                "gradient_checkpointing": False,
            },
            crema={
                "modalities": "rgb,audio,flow,depth,thermal",
                "fusion": "add",
                "modality_rank": 16,
                "modality_dropout": 0.3,
                "modality_sequential": False,
            },
        ),
    ),
    "crab_plus-3b": Preset(
        "crab_plus",
        "Crab+ on Qwen2.5-Omni-3B: I-LoRA on its LM",
        with_values(CRAB_PLUS, backbone={"weights": "Qwen/Qwen2.5-Omni-3B"}),
    ),
    "crab_plus-7b": Preset(
        "crab_plus",
        "Crab+ on Qwen2.5-Omni-7B: I-LoRA on its LM",
        with_values(CRAB_PLUS, backbone={"weights": "Qwen/Qwen2.5-Omni-7B"}),
    ),
    "crab-7b": Preset(
        "crab",
        "Crab: CLIP-L + BEATs + Q-Formers + Llama-2-7b-chat, in stages",
        CRAB,
        stages={"masks": {"training": {"trainable": "mask_decoder,mask_tokens", "epochs": 30}}},
    ),
    "pave-0.5b": Preset(
        "pave",
        "PAVE on LLaVA-OneVision-0.5B: a patch for a side channel, and LoRA on its LM",
        with_values(PAVE, backbone={"weights": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"}),
    ),
    "pave-7b": Preset(
        "pave",
        "PAVE on LLaVA-OneVision-7B",
        with_values(PAVE, backbone={"weights": "llava-hf/llava-onevision-qwen2-7b-ov-hf"}),
    ),
    "crema-xl": Preset(
        "crema", "CREMA on BLIP-2 with Flan-T5-XL: one Q-Former for all modalities", CREMA
    ),
    "tiny-base": Preset(
        "tinybase", "trains the tiny base itself from nothing on the built-in world"
    ),
}
