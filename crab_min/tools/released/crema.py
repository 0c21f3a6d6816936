"""CREMA (2402.05889): names in its checkpoints.

The Q-Former is BERT with cross-attention. Only queries pass through it, so the half of it that
reads text serves nothing. CREMA wraps query and value of the self-attention: query.w is BLIP-2's
linear, and query.w_a_{modality} and query.w_b_{modality} are a modality's low-rank pair.
"""

from crab_min.tools.released.patterns import DROPPED

# fmt: off
CREMA = {
    # low-rank pairs of a modality
    "Qformer.bert.encoder.layer.{n}.attention.self.query.w_a_{modality}.weight":
        "multimodal.qformer.encoder.layer.{n}.attention.attention.query.A.{modality}.weight",
    "Qformer.bert.encoder.layer.{n}.attention.self.query.w_b_{modality}.weight":
        "multimodal.qformer.encoder.layer.{n}.attention.attention.query.B.{modality}.weight",
    "Qformer.bert.encoder.layer.{n}.attention.self.value.w_a_{modality}.weight":
        "multimodal.qformer.encoder.layer.{n}.attention.attention.value.A.{modality}.weight",
    "Qformer.bert.encoder.layer.{n}.attention.self.value.w_b_{modality}.weight":
        "multimodal.qformer.encoder.layer.{n}.attention.attention.value.B.{modality}.weight",

    # frozen Q-Former
    "Qformer.bert.encoder.layer.{n}.attention.self.query.w.{rest}":
        "multimodal.qformer.encoder.layer.{n}.attention.attention.query.base.{rest}",
    "Qformer.bert.encoder.layer.{n}.attention.self.key.{rest}":
        "multimodal.qformer.encoder.layer.{n}.attention.attention.key.{rest}",
    "Qformer.bert.encoder.layer.{n}.attention.self.value.w.{rest}":
        "multimodal.qformer.encoder.layer.{n}.attention.attention.value.base.{rest}",
    "Qformer.bert.encoder.layer.{n}.attention.output.{rest}":
        "multimodal.qformer.encoder.layer.{n}.attention.output.{rest}",
    "Qformer.bert.encoder.layer.{n}.crossattention.self.{rest}":
        "multimodal.qformer.encoder.layer.{n}.crossattention.attention.{rest}",
    "Qformer.bert.encoder.layer.{n}.crossattention.output.{rest}":
        "multimodal.qformer.encoder.layer.{n}.crossattention.output.{rest}",
    "Qformer.bert.encoder.layer.{n}.intermediate_query.{rest}":
        "multimodal.qformer.encoder.layer.{n}.intermediate_query.{rest}",
    "Qformer.bert.encoder.layer.{n}.output_query.{rest}":
        "multimodal.qformer.encoder.layer.{n}.output_query.{rest}",
    "Qformer.bert.embeddings.LayerNorm.{rest}": "multimodal.qformer.layernorm.{rest}",

    # the Q-Former's half for text
    "Qformer.bert.embeddings.{rest}": DROPPED,
    "Qformer.bert.encoder.layer.{n}.intermediate.{rest}": DROPPED,
    "Qformer.bert.encoder.layer.{n}.output.{rest}": DROPPED,
    "Qformer.cls.{rest}": DROPPED,

    # a modality's queries, projection to the LM, norm, and projection to the Q-Former's input width
    "query_tokens_{modality}": "multimodal.parts.{modality}.query",
    "t5_proj_{modality}.{rest}": "multimodal.parts.{modality}.out.0.{rest}",
    "ln_{modality}.{rest}": "multimodal.parts.{modality}.norm.{rest}",
    "projection_{modality}.{rest}": "multimodal.parts.{modality}.input.{rest}",

    # self-gated fusion
    "fusion.0.{rest}": "fusion.linear.{rest}",

    # never used in the released code
    "{modality}_gradsel_embed": DROPPED,

    # frozen encoders and LM, which are loaded from files of their own
    "visual_encoder.{rest}": DROPPED,
    "audio_encoder.{rest}": DROPPED,
    "t5_model.{rest}": DROPPED,
}
# fmt: on
