"""The presets of train.py: recipes with values that differ from their defaults."""

from dataclasses import dataclass, field


@dataclass
class Preset:
    """A recipe with values for its settings.

    Attributes:
        values: name of a setting (config.setting_names) -> value.
        stages: name of a stage of Crab -> the values that it adds.
    """

    recipe: str
    description: str
    values: dict = field(default_factory=dict)
    stages: dict[str, dict] = field(default_factory=dict)


# fmt: off
# one line per concern: data, world, backbone, adapter, training, evaluation, what the paper needs

# papers' values at full size that several presets share
LARGE = dict(
    cache_features=False, task_sampling_exponent=1.0, gradient_checkpointing=True,
    save_every=0, save_minutes=20,
)
CRAB_PLUS = LARGE | dict(
    backbone="omni",
    r=128, alpha=256, dropout=0.1,
    trainable="adapter", lr=1e-4, batch_size=4, epochs=5,
)
PAVE = LARGE | dict(
    tasks="avqa", target="label", frames=32,
    backbone="llava_onevision",
    adapter="lora", r=64, alpha=16, dropout=0.05,
    trainable="adapter", lr=2e-5, connector_lr=2e-5, max_grad_norm=0.1, batch_size=16, epochs=2,
    patch_double_audio_rows=True,
)
CREMA = dict(
    task_sampling_exponent=1.0,
    tasks="avqa", target="label", frames=4,
    backbone="blip2", weights="Salesforce/blip2-flan-t5-xl",
    adapter="none",
    trainable="adapter", lr=2e-4, connector_lr=2e-4, batch_size=24, epochs=20,
    eval_mode="rank",
)

PRESETS = {
    # on the shipped base
    "crab_plus-tiny": Preset(
        "crab_plus", "Crab+'s recipe on the shipped tiny base: I-LoRA on the built-in world",
        dict(
            r=16, alpha=32, dropout=0,
            batch_size=4, grad_accum=2, beta2=0.98, bf16=False, baseline_rows=25,
        ),
    ),
    "crab-tiny": Preset(
        "crab", "Crab's recipe on the shipped tiny base: --stage visual, audio, unified, masks",
        dict(r=16, alpha=32, steps=400),
        stages=dict.fromkeys(("masks-align", "masks"), dict(
            world_clips=1800,
            trainable="adapter,connectors,mask_decoder", connector_lr=1e-3, beta2=0.98,
            warmup=0.05, text_steps=250, steps=1400,
            masks_width=64, masks_heads=4, masks_queries=16, masks_bce=2.0, masks_dice=2.0,
        )),
    ),
    "pave-tiny": Preset(
        "pave", "PAVE's recipe on the shipped tiny base: a patch and LoRA, beside LoRA alone",
        dict(
            world_clips=600, world_test=200,
            adapter="lora", r=16, alpha=32, dropout=0,
            trainable="adapter", connector_lr=5e-3, steps=400,
            eval_mode="rank", baseline_rows=0,
            patch_width=128, compare_lora=True,
        ),
    ),
    "crema-tiny": Preset(
        "crema", "CREMA's recipe on the shipped tiny base: modalities through its visual Q-Former",
        CREMA | dict(
            frames=5,
            world_clips=450, world_test=60,
            weights="",
            lr=5e-3, connector_lr=5e-3, batch_size=16, steps=900,
            modalities="rgb,audio,flow,depth,thermal", fusion="add",
            modality_rank=16, modality_dropout=0.3, modality_sequential=False,
        ),
    ),

    # at full size
    "crab_plus-3b": Preset(
        "crab_plus", "Crab+ on Qwen2.5-Omni-3B: I-LoRA on its LM",
        CRAB_PLUS | dict(weights="Qwen/Qwen2.5-Omni-3B"),
    ),
    "crab_plus-7b": Preset(
        "crab_plus", "Crab+ on Qwen2.5-Omni-7B: I-LoRA on its LM",
        CRAB_PLUS | dict(weights="Qwen/Qwen2.5-Omni-7B"),
    ),
    "crab-7b": Preset(
        "crab", "Crab: CLIP-L + BEATs + Q-Formers + Llama-2-7b-chat, in stages",
        LARGE | dict(
            vision="openai/clip-vit-large-patch14",
            audio="BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt",
            llm="meta-llama/Llama-2-7b-chat-hf",
            r=8, alpha=16, dropout=0.05,
            trainable="adapter,connectors", lr=1e-4, connector_lr=1e-4, batch_size=8, epochs=5,
        ),
        stages={
            "masks-align": dict(trainable="mask_decoder,mask_tokens"),
            "masks": dict(trainable="mask_decoder,mask_tokens", epochs=30),
        },
    ),
    "pave-0.5b": Preset(
        "pave", "PAVE on LLaVA-OneVision-0.5B: a patch for a side channel, and LoRA on its LM",
        PAVE | dict(weights="llava-hf/llava-onevision-qwen2-0.5b-ov-hf"),
    ),
    "pave-7b": Preset(
        "pave", "PAVE on LLaVA-OneVision-7B",
        PAVE | dict(weights="llava-hf/llava-onevision-qwen2-7b-ov-hf"),
    ),
    "crema-xl": Preset(
        "crema", "CREMA on BLIP-2 with Flan-T5-XL: one Q-Former for all modalities",
        LARGE | CREMA,
    ),
    "tiny-base": Preset(
        "tinybase", "trains the tiny base itself from nothing on the built-in world",
    ),
}
