"""PAVE (2503.19794): names in its released files.

The files are adapter_model.bin (LoRA) and non_lora_trainables.bin (patches).
"""

from crab_min.tools.released.patterns import DROPPED, under

# One patch. The released code computes values with the key projection, so v_linear never learns.
# fmt: off
PATCH = {
    "input_mapping.{rest}": "side.{rest}",
    "query_input_mapping.{rest}": "video.{rest}",
    "cross_attn_layers.{n}.attn.q_linear.{rest}": "blocks.{n}.query.{rest}",
    "cross_attn_layers.{n}.attn.k_linear.{rest}": "blocks.{n}.key.{rest}",
    "cross_attn_layers.{n}.attn.v_linear.{rest}": DROPPED,
    "cross_attn_layers.{n}.ffn.0.{rest}": "blocks.{n}.norm.{rest}",
    "cross_attn_layers.{n}.ffn.1.{rest}": "blocks.{n}.mlp.0.{rest}",
    "cross_attn_layers.{n}.ffn.3.{rest}": "blocks.{n}.mlp.2.{rest}",
    "output_mapping.{rest}": "out.{rest}",
    "output_norm.{rest}": "norm.{rest}",
}
# fmt: on

PAVE = {
    **under(PATCH, released="base_model.model.model.temporal_aggregator.", ours="patches.0."),
    **under(PATCH, released="base_model.model.model.temporal_aggregator2.", ours="patches.1."),
    # LoRA: PEFT's names inside a layer stay, transformers has the layers below language_model
    "base_model.model.model.layers.{n}.{rest}": (
        "base_model.model.model.language_model.layers.{n}.{rest}"
    ),
}
