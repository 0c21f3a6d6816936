"""Crab+ (2603.04128): names in finetune_weights.bin.

The file holds I-LoRA adapters of Qwen2.5-Omni's LM and of both its encoders. transformers 5 has the
LM below model.language_model and the encoders below model. The authors' list of trained parameters
has a prefix "thinker." that their code does not write to the file; both forms are taken.
"""

# fmt: off
CRAB_PLUS = {
    # LM
    "base_model.model.{thinker}model.layers.{n}.{rest}.lora_A.weight":
        "base_model.model.model.language_model.layers.{n}.{rest}.ilora_A.weight",
    "base_model.model.{thinker}model.layers.{n}.{rest}.lora_route.weight":
        "base_model.model.model.language_model.layers.{n}.{rest}.ilora_router.weight",
    "base_model.model.{thinker}model.layers.{n}.{rest}.lora_B{head}.weight":
        "base_model.model.model.language_model.layers.{n}.{rest}.ilora_B.weight",

    # audio encoder
    "base_model.model.{thinker}audio_tower.{rest}.lora_A.weight":
        "base_model.model.model.audio_tower.{rest}.ilora_A.weight",
    "base_model.model.{thinker}audio_tower.{rest}.lora_route.weight":
        "base_model.model.model.audio_tower.{rest}.ilora_router.weight",
    "base_model.model.{thinker}audio_tower.{rest}.lora_B{head}.weight":
        "base_model.model.model.audio_tower.{rest}.ilora_B.weight",

    # vision encoder
    "base_model.model.{thinker}visual.{rest}.lora_A.weight":
        "base_model.model.model.visual.{rest}.ilora_A.weight",
    "base_model.model.{thinker}visual.{rest}.lora_route.weight":
        "base_model.model.model.visual.{rest}.ilora_router.weight",
    "base_model.model.{thinker}visual.{rest}.lora_B{head}.weight":
        "base_model.model.model.visual.{rest}.ilora_B.weight",
}
# fmt: on
