"""The presets of train.py: each names a recipe, and values that differ from its defaults."""

from dataclasses import dataclass, field


@dataclass
class Preset:
    """A recipe with values for its settings.

    Attributes:
        values: group of the settings -> field -> value.
        stages: name of a stage of Crab -> the values that it adds.
    """

    recipe: str
    description: str
    values: dict[str, dict] = field(default_factory=dict)
    stages: dict[str, dict[str, dict]] = field(default_factory=dict)


def with_values(values: dict[str, dict], **changes: dict) -> dict[str, dict]:
    """Return a copy of values by group, with changed and added values.

    Args:
        changes: group -> field -> value.
    """
    merged = {name: dict(group) for name, group in values.items()}
    for name, group in changes.items():
        merged[name] = {**merged.get(name, {}), **group}
    return merged


# the papers' values at full size
LARGE = dict(task_sampling_exponent=1.0, gradient_checkpointing=True)
CRAB_PLUS = dict(
    data=dict(cache_features=False),
    backbone=dict(backbone="omni"),
    adapter=dict(r=128, alpha=256, dropout=0.1),
    training=dict(trainable="adapter", lr=1e-4, batch_size=4, epochs=5, **LARGE),
)
CRAB = dict(
    data=dict(cache_features=False),
    backbone=dict(
        vision="openai/clip-vit-large-patch14",
        audio="BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt",
        llm="meta-llama/Llama-2-7b-chat-hf",
    ),
    adapter=dict(r=8, alpha=16, dropout=0.05),
    training=dict(
        trainable="adapter,connectors", lr=1e-4, connector_lr=1e-4, batch_size=8, epochs=5, **LARGE
    ),
)
PAVE = dict(
    data=dict(cache_features=False, tasks="avqa", target="label", frames=32),
    backbone=dict(backbone="llava_onevision"),
    adapter=dict(adapter="lora", r=64, alpha=16, dropout=0.05),
    training=dict(
        trainable="adapter",
        lr=2e-5,
        connector_lr=2e-5,
        max_grad_norm=0.1,
        batch_size=16,
        epochs=2,
        **LARGE,
    ),
)
CREMA = dict(
    data=dict(cache_features=False, tasks="avqa", target="label", frames=4),
    backbone=dict(backbone="blip2", weights="Salesforce/blip2-flan-t5-xl"),
    adapter=dict(adapter="none"),
    training=dict(
        trainable="adapter", lr=2e-4, connector_lr=2e-4, batch_size=24, epochs=20, **LARGE
    ),
    run=dict(eval_mode="rank"),
)

# tiny presets, on the shipped base
PAVE_TINY = dict(
    world=dict(world_clips=600, world_test=200),
    adapter=dict(adapter="lora", r=16, alpha=32, dropout=0),
    training=dict(trainable="adapter", steps=400, connector_lr=5e-3),
    run=dict(eval_mode="rank"),
    patch=dict(compare_lora=True, width=128),
)
CREMA_TINY = with_values(
    CREMA,
    data=dict(frames=5, cache_features=True),
    world=dict(world_clips=450, world_test=60),
    backbone=dict(weights=""),
    training=dict(
        batch_size=16, steps=900, lr=5e-3, connector_lr=5e-3, gradient_checkpointing=False
    ),
    crema=dict(
        modalities="rgb,audio,flow,depth,thermal",
        fusion="add",
        modality_rank=16,
        modality_dropout=0.3,
        modality_sequential=False,
    ),
)
CRAB_TINY = dict(adapter=dict(r=16, alpha=32), training=dict(steps=400))
CRAB_TINY_MASKS = dict(
    world=dict(world_clips=1800),
    training=dict(
        trainable="adapter,connectors,mask_decoder",
        connector_lr=1e-3,
        beta2=0.98,
        warmup=0.05,
        steps=1400,
    ),
    stages=dict(text_steps=250),
    masks=dict(width=64, heads=4, queries=16, bce=2.0, dice=2.0),
)
CRAB_MASKS = dict(training=dict(trainable="mask_decoder,mask_tokens", epochs=30))

PRESETS = {
    "crab_plus-tiny": Preset(
        "crab_plus",
        "Crab+'s recipe on the shipped tiny base: I-LoRA on the built-in world",
        dict(adapter=dict(r=16, alpha=32)),
    ),
    "crab-tiny": Preset(
        "crab",
        "Crab's recipe on the shipped tiny base: --stage visual, audio, unified, masks",
        CRAB_TINY,
        stages=dict(masks=CRAB_TINY_MASKS),
    ),
    "pave-tiny": Preset(
        "pave",
        "PAVE's recipe on the shipped tiny base: a patch and LoRA, beside LoRA alone",
        PAVE_TINY,
    ),
    "crema-tiny": Preset(
        "crema",
        "CREMA's recipe on the shipped tiny base: modalities through its visual Q-Former",
        CREMA_TINY,
    ),
    "crab_plus-3b": Preset(
        "crab_plus",
        "Crab+ on Qwen2.5-Omni-3B: I-LoRA on its LM",
        with_values(CRAB_PLUS, backbone=dict(weights="Qwen/Qwen2.5-Omni-3B")),
    ),
    "crab_plus-7b": Preset(
        "crab_plus",
        "Crab+ on Qwen2.5-Omni-7B: I-LoRA on its LM",
        with_values(CRAB_PLUS, backbone=dict(weights="Qwen/Qwen2.5-Omni-7B")),
    ),
    "crab-7b": Preset(
        "crab",
        "Crab: CLIP-L + BEATs + Q-Formers + Llama-2-7b-chat, in stages",
        CRAB,
        stages=dict(masks=CRAB_MASKS),
    ),
    "pave-0.5b": Preset(
        "pave",
        "PAVE on LLaVA-OneVision-0.5B: a patch for a side channel, and LoRA on its LM",
        with_values(PAVE, backbone=dict(weights="llava-hf/llava-onevision-qwen2-0.5b-ov-hf")),
    ),
    "pave-7b": Preset(
        "pave",
        "PAVE on LLaVA-OneVision-7B",
        with_values(PAVE, backbone=dict(weights="llava-hf/llava-onevision-qwen2-7b-ov-hf")),
    ),
    "crema-xl": Preset(
        "crema", "CREMA on BLIP-2 with Flan-T5-XL: one Q-Former for all modalities", CREMA
    ),
    "tiny-base": Preset(
        "tinybase", "trains the tiny base itself from nothing on the built-in world"
    ),
}
