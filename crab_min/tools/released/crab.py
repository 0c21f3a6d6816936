"""Crab (2503.13068): names in its released files, and our names for them.

Our names are those of I-LoRA, the connectors and the mask decoder.

Crab publishes finetune_weights.bin (connectors and I-LoRA, after the unified stage), the
connectors of its aligning stages, and the mask decoders avs_ and avss_finetune_weights.bin.
"""

from crab_min.tools.released.patterns import DROPPED, under

# I-LoRA of any linear; the released code keeps the heads B_k apart
ILORA = {
    "{path}lora_A.weight": "{path}ilora_A.weight",
    "{path}lora_route.weight": "{path}ilora_router.weight",
    "{path}lora_B{head}.weight": "{path}ilora_B.weight",
}

# The connectors are BERT with cross-attention. Only queries pass through it, so the half of it that
# reads text (embeddings, intermediate, output and the vocabulary head cls) serves nothing.
# fmt: off
VISUAL_CONNECTOR = {
    "visual_ln.{rest}": "norm.{rest}",
    "visual_query_tokens": "query",
    "visual_proj.{rest}": "mlp.{rest}",
    "visual_Qformer.bert.embeddings.LayerNorm.{rest}": "qformer.layernorm.{rest}",
    "visual_Qformer.bert.embeddings.{rest}": DROPPED,
    "visual_Qformer.bert.encoder.layer.{n}.attention.self.{rest}":
        "qformer.encoder.layer.{n}.attention.attention.{rest}",
    "visual_Qformer.bert.encoder.layer.{n}.attention.output.{rest}":
        "qformer.encoder.layer.{n}.attention.output.{rest}",
    "visual_Qformer.bert.encoder.layer.{n}.crossattention.self.{rest}":
        "qformer.encoder.layer.{n}.crossattention.attention.{rest}",
    "visual_Qformer.bert.encoder.layer.{n}.crossattention.output.{rest}":
        "qformer.encoder.layer.{n}.crossattention.output.{rest}",
    "visual_Qformer.bert.encoder.layer.{n}.intermediate_query.{rest}":
        "qformer.encoder.layer.{n}.intermediate_query.{rest}",
    "visual_Qformer.bert.encoder.layer.{n}.output_query.{rest}":
        "qformer.encoder.layer.{n}.output_query.{rest}",
    "visual_Qformer.bert.encoder.layer.{n}.intermediate.{rest}": DROPPED,
    "visual_Qformer.bert.encoder.layer.{n}.output.{rest}": DROPPED,
    "visual_Qformer.cls.{rest}": DROPPED,
}

AUDIO_CONNECTOR = {
    "audio_ln.{rest}": "norm.{rest}",
    "audio_query_tokens": "query",
    "audio_proj.{rest}": "mlp.{rest}",
    "audio_Qformer.bert.embeddings.LayerNorm.{rest}": "qformer.layernorm.{rest}",
    "audio_Qformer.bert.embeddings.{rest}": DROPPED,
    "audio_Qformer.bert.encoder.layer.{n}.attention.self.{rest}":
        "qformer.encoder.layer.{n}.attention.attention.{rest}",
    "audio_Qformer.bert.encoder.layer.{n}.attention.output.{rest}":
        "qformer.encoder.layer.{n}.attention.output.{rest}",
    "audio_Qformer.bert.encoder.layer.{n}.crossattention.self.{rest}":
        "qformer.encoder.layer.{n}.crossattention.attention.{rest}",
    "audio_Qformer.bert.encoder.layer.{n}.crossattention.output.{rest}":
        "qformer.encoder.layer.{n}.crossattention.output.{rest}",
    "audio_Qformer.bert.encoder.layer.{n}.intermediate_query.{rest}":
        "qformer.encoder.layer.{n}.intermediate_query.{rest}",
    "audio_Qformer.bert.encoder.layer.{n}.output_query.{rest}":
        "qformer.encoder.layer.{n}.output_query.{rest}",
    "audio_Qformer.bert.encoder.layer.{n}.intermediate.{rest}": DROPPED,
    "audio_Qformer.bert.encoder.layer.{n}.output.{rest}": DROPPED,
    "audio_Qformer.cls.{rest}": DROPPED,
}
# fmt: on
CONNECTORS = {**VISUAL_CONNECTOR, **AUDIO_CONNECTOR}

# a file of the aligning stages, before PEFT wrapped the model
CRAB_PRETRAIN = {
    **under(VISUAL_CONNECTOR, released="model.vl_projector.", ours="visual_qformer."),
    **under(AUDIO_CONNECTOR, released="model.al_projector.", ours="audio_qformer."),
}

# The mask decoder. Where torch packs query, key and value as in_proj_weight and in_proj_bias,
# `weights.split_qkv` has made them q_proj, k_proj and v_proj before a name is looked up.
# fmt: off
MASK_DECODER = {
    # prompt from the mask tokens' states, and the image's features
    "text_hidden_fcs.0.{rest}": "prompt.{rest}",
    "image_feature_neck.{rest}": "neck.{rest}",
    "no_mask_embed.weight": "no_mask",
    "pe_layer.positional_encoding_gaussian_matrix": "places.0.matrix",
    "mask_decoder.pe1.positional_encoding_gaussian_matrix": "places.1.matrix",
    "mask_decoder.avs_query_tokens.weight": "queries",
    "mask_decoder.level_embed.weight": "level",

    # query generator
    "mask_decoder.query_generator.layers.{n}.self_attn.q_proj.{rest}":
        "generator.{n}.self_attention.query.{rest}",
    "mask_decoder.query_generator.layers.{n}.self_attn.k_proj.{rest}":
        "generator.{n}.self_attention.key.{rest}",
    "mask_decoder.query_generator.layers.{n}.self_attn.v_proj.{rest}":
        "generator.{n}.self_attention.value.{rest}",
    "mask_decoder.query_generator.layers.{n}.self_attn.out_proj.{rest}":
        "generator.{n}.self_attention.out.{rest}",
    "mask_decoder.query_generator.layers.{n}.cross_attn.q_proj.{rest}":
        "generator.{n}.cross_attention.query.{rest}",
    "mask_decoder.query_generator.layers.{n}.cross_attn.k_proj.{rest}":
        "generator.{n}.cross_attention.key.{rest}",
    "mask_decoder.query_generator.layers.{n}.cross_attn.v_proj.{rest}":
        "generator.{n}.cross_attention.value.{rest}",
    "mask_decoder.query_generator.layers.{n}.cross_attn.out_proj.{rest}":
        "generator.{n}.cross_attention.out.{rest}",
    "mask_decoder.query_generator.layers.{n}.ffn.{rest}": "generator.{n}.mlp.{rest}",
    "mask_decoder.query_generator.layers.{n}.norm1.{rest}": "generator.{n}.norms.0.{rest}",
    "mask_decoder.query_generator.layers.{n}.norm2.{rest}": "generator.{n}.norms.1.{rest}",
    "mask_decoder.query_generator.layers.{n}.norm3.{rest}": "generator.{n}.norms.2.{rest}",

    # layers of the two two-way transformers
    "mask_decoder.transformer.{n}.layers.{i}.self_attn.q_proj.{rest}":
        "two_way.{n}.layers.{i}.self_attention.query.{rest}",
    "mask_decoder.transformer.{n}.layers.{i}.self_attn.k_proj.{rest}":
        "two_way.{n}.layers.{i}.self_attention.key.{rest}",
    "mask_decoder.transformer.{n}.layers.{i}.self_attn.v_proj.{rest}":
        "two_way.{n}.layers.{i}.self_attention.value.{rest}",
    "mask_decoder.transformer.{n}.layers.{i}.self_attn.out_proj.{rest}":
        "two_way.{n}.layers.{i}.self_attention.out.{rest}",
    "mask_decoder.transformer.{n}.layers.{i}.cross_attn_token_to_image.q_proj.{rest}":
        "two_way.{n}.layers.{i}.to_image.query.{rest}",
    "mask_decoder.transformer.{n}.layers.{i}.cross_attn_token_to_image.k_proj.{rest}":
        "two_way.{n}.layers.{i}.to_image.key.{rest}",
    "mask_decoder.transformer.{n}.layers.{i}.cross_attn_token_to_image.v_proj.{rest}":
        "two_way.{n}.layers.{i}.to_image.value.{rest}",
    "mask_decoder.transformer.{n}.layers.{i}.cross_attn_token_to_image.out_proj.{rest}":
        "two_way.{n}.layers.{i}.to_image.out.{rest}",
    "mask_decoder.transformer.{n}.layers.{i}.cross_attn_image_to_token.q_proj.{rest}":
        "two_way.{n}.layers.{i}.to_queries.query.{rest}",
    "mask_decoder.transformer.{n}.layers.{i}.cross_attn_image_to_token.k_proj.{rest}":
        "two_way.{n}.layers.{i}.to_queries.key.{rest}",
    "mask_decoder.transformer.{n}.layers.{i}.cross_attn_image_to_token.v_proj.{rest}":
        "two_way.{n}.layers.{i}.to_queries.value.{rest}",
    "mask_decoder.transformer.{n}.layers.{i}.cross_attn_image_to_token.out_proj.{rest}":
        "two_way.{n}.layers.{i}.to_queries.out.{rest}",
    "mask_decoder.transformer.{n}.layers.{i}.mlp.lin1.{rest}":
        "two_way.{n}.layers.{i}.mlp.0.{rest}",
    "mask_decoder.transformer.{n}.layers.{i}.mlp.lin2.{rest}":
        "two_way.{n}.layers.{i}.mlp.2.{rest}",
    "mask_decoder.transformer.{n}.layers.{i}.norm1.{rest}": "two_way.{n}.layers.{i}.norms.0.{rest}",
    "mask_decoder.transformer.{n}.layers.{i}.norm2.{rest}": "two_way.{n}.layers.{i}.norms.1.{rest}",
    "mask_decoder.transformer.{n}.layers.{i}.norm3.{rest}": "two_way.{n}.layers.{i}.norms.2.{rest}",
    "mask_decoder.transformer.{n}.layers.{i}.norm4.{rest}": "two_way.{n}.layers.{i}.norms.3.{rest}",

    # their last attention
    "mask_decoder.transformer.{n}.final_attn_token_to_image.q_proj.{rest}":
        "two_way.{n}.final.query.{rest}",
    "mask_decoder.transformer.{n}.final_attn_token_to_image.k_proj.{rest}":
        "two_way.{n}.final.key.{rest}",
    "mask_decoder.transformer.{n}.final_attn_token_to_image.v_proj.{rest}":
        "two_way.{n}.final.value.{rest}",
    "mask_decoder.transformer.{n}.final_attn_token_to_image.out_proj.{rest}":
        "two_way.{n}.final.out.{rest}",
    "mask_decoder.transformer.{n}.norm_final_attn.{rest}": "two_way.{n}.norm.{rest}",

    # maps and classes; "classfier" is the released spelling
    "mask_decoder.hyper_mlp.layers.0.{rest}": "mlp.0.{rest}",
    "mask_decoder.hyper_mlp.layers.1.{rest}": "mlp.2.{rest}",
    "mask_decoder.hyper_mlp.layers.2.{rest}": "mlp.4.{rest}",
    "mask_decoder.hyper_mlp_out.layers.0.{rest}": "mix.0.{rest}",
    "mask_decoder.hyper_mlp_out.layers.1.{rest}": "mix.2.{rest}",
    "mask_decoder.hyper_mlp_out.layers.2.{rest}": "mix.4.{rest}",
    "mask_decoder.output_upscaling.{rest}": "upscale.{rest}",
    "mask_decoder.upsample_2x.{rest}": "finer.{rest}",
    "mask_decoder.ms3_s4_classfier.{rest}": "binary.{rest}",
    "mask_decoder.avss_classifier.{rest}": "classes.{rest}",
}
# fmt: on

# a file of the unified stage, or of the mask stage, whose names PEFT begins with base_model.model.
CRAB = {
    **under(CRAB_PRETRAIN, released="base_model.model.", ours=""),
    **CRAB_PRETRAIN,
    **under(
        MASK_DECODER,
        released="base_model.model.model.seg_module.",
        ours="mask_decoder.decoder.",
    ),
    "base_model.model.model.embed_tokens.weight": "embeddings.weight",
    "base_model.model.lm_head.weight": "head.weight",
    "base_model.model.model.layers.{n}.{rest}.lora_A.weight": (
        "base_model.model.model.layers.{n}.{rest}.ilora_A.weight"
    ),
    "base_model.model.model.layers.{n}.{rest}.lora_route.weight": (
        "base_model.model.model.layers.{n}.{rest}.ilora_router.weight"
    ),
    "base_model.model.model.layers.{n}.{rest}.lora_B{head}.weight": (
        "base_model.model.model.layers.{n}.{rest}.ilora_B.weight"
    ),
}
