"""The Q-Former, Crab's connector from an encoder to the LM.

Paper: Crab (2503.13068), the visual and audio branches of the "unified audio-visual interface".
Learned queries attend to the tokens that a frozen encoder made of one time step:

    tokens_t = MLP(QFormer(queries, LayerNorm(features_t)))      t: a frame or a segment of sound

A layer of the Q-Former is post-norm BERT: self-attention among the queries, cross-attention to the
encoder's tokens, feed-forward. The MLP (Linear, GELU, Linear) leads to the width of the LM. Every
time step is encoded by itself, so that its tokens keep their position in time.

    symbol      variable                    shape
    features    features                    (B, T, S, W)     from the encoder
    queries     QFormerConnector.query      (1, Q, hidden)   shared by all time steps
    tokens      forward(features)           (B, T, Q, D)     for the LM

Shapes: B samples, T time steps, S encoder tokens of one, Q queries, W encoder width, D LM width.

The Q-Former itself is transformers' `Blip2QFormerModel`, whose cross-attention is computed in
another order (`FewQueriesAttention`), because the queries are few and the encoder's tokens many.

What differs from the released code: Crab vendors a BERT whose text half (word embeddings, a second
feed-forward, a vocabulary head) it never runs, and keeps those weights in its checkpoints; here
they do not exist, and the converter drops them. Crab uses a dropout of 0.1 in training (bert-base's
config); here there is none.

Page of the course: docs/course/11_crab_branches.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerMultiHeadAttention

# sdpa's backward is slow on a CPU
ATTENTION = "sdpa" if torch.cuda.is_available() else "eager"


@dataclass
class QFormerConfig:
    """Sizes of a connector. The defaults are Crab's."""

    width_in: int  # W
    width_out: int  # D
    queries: int = 32  # Q
    hidden: int = 768
    layers: int = 2
    heads: int = 12
    intermediate: int = 3072  # width of the feed-forward
    mlp_depth: int = 2  # linears of the MLP at the end
    cross_every: int = 1  # every how many layers there is a cross-attention, from the first on


class QFormerConnector(nn.Module):
    """LayerNorm, Q-Former and MLP: features (B, T, S, W) -> tokens (B, T, Q, D)."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.width_in)
        self.query = nn.Parameter(0.02 * torch.randn(1, config.queries, config.hidden))
        self.qformer = blip2_qformer(config)
        self.mlp = make_mlp(config)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the tokens (B, T, Q, D) for the LM.

        Args:
            features: (B, T, S, W).
            mask: (B, T, S), True for a real feature, False for padding; None if all are real.
        """
        return self.mlp(self.query_states(features, mask))

    def query_states(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the queries after the Q-Former and before the MLP (B, T, Q, hidden).

        PAVE's patch takes them as the video tokens before the projector.
        """
        return encode_per_step(self.qformer, self.query, self.norm(features), mask)


class FewQueriesAttention(nn.Module):
    """Cross-attention that makes no key and no value of the encoder's tokens x (S, W).

    Of each head, with queries q (Q, d):

        softmax(q (x K + b)^T / sqrt(d)) (x V + c)  =  softmax((q K^T) x^T / sqrt(d)) x V + c

    b adds one number to all scores of a query, which the softmax does not see; c stays, because the
    weights of a softmax sum to 1. The left side multiplies S tokens by K and V, the right side Q
    queries of every head. By count of multiplications the right side costs 0.2 of the left one in
    the tiny base and 0.6 in Crab, where it keeps somewhat more for the backward pass.

    Args:
        attention: transformers' module, whose linears are taken over.
    """

    def __init__(self, attention: Blip2QFormerMultiHeadAttention):
        super().__init__()
        self.heads = attention.num_attention_heads
        self.query, self.key, self.value = attention.query, attention.key, attention.value

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """Return the states (B, Q, hidden) and the weights (B, heads, Q, S).

        Args:
            hidden_states: of the queries (B, Q, hidden).
            attention_mask: of the queries; not used.
            encoder_hidden_states: x (B, S, W).
            encoder_attention_mask: (B, 1, Q, S), True for a real token; or what is added to scores.
        """
        x = encoder_hidden_states
        q = self.query(hidden_states).unflatten(-1, (self.heads, -1))  # (B, Q, heads, d)
        K = self.key.weight.unflatten(0, (self.heads, -1))  # (heads, d, W)
        V = self.value.weight.unflatten(0, (self.heads, -1))  # (heads, d, W)

        # the scores of all heads in one product
        queries = torch.einsum("bqhd,hdw->bhqw", q, K) * q.shape[-1] ** -0.5  # (B, heads, Q, W)
        scores = (queries.flatten(1, 2) @ x.mT).unflatten(1, queries.shape[1:3])  # (B, heads, Q, S)
        mask = encoder_attention_mask
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask
        weights = scores.softmax(-1)

        # the means of x by these weights, then V
        means = (weights.flatten(1, 2) @ x).view_as(queries)  # (B, heads, Q, W)
        states = torch.einsum("bhqw,hdw->bqhd", means, V).flatten(2)  # (B, Q, hidden)
        return states + self.value.bias, weights


def use_few_queries(qformer: Blip2QFormerModel) -> Blip2QFormerModel:
    """Compute the cross-attentions of a Q-Former as FewQueriesAttention does; return it."""
    for layer in qformer.encoder.layer:
        if layer.has_cross_attention:
            layer.crossattention.attention = FewQueriesAttention(layer.crossattention.attention)
    return qformer


def blip2_qformer(config: QFormerConfig) -> Blip2QFormerModel:
    """Build a Q-Former of random weights, without dropout."""
    qformer = Blip2QFormerModel(
        Blip2QFormerConfig(
            attn_implementation=ATTENTION,
            hidden_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.intermediate,
            encoder_hidden_size=config.width_in,
            cross_attention_frequency=config.cross_every,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    return use_few_queries(qformer)


def make_mlp(config: QFormerConfig) -> nn.Sequential:
    """Build the MLP to the LM's width: `mlp_depth` linears with GELUs in between."""
    layers = [nn.Linear(config.hidden, config.width_out)]
    for _ in range(config.mlp_depth - 1):
        layers += [nn.GELU(), nn.Linear(config.width_out, config.width_out)]
    return nn.Sequential(*layers)


def encode_per_step(
    qformer: Blip2QFormerModel, query: Tensor, features: Tensor, mask: Tensor | None
) -> Tensor:
    """Run the Q-Former on every time step by itself.

    Args:
        query: (1, Q, hidden).
        features: (B, T, S, W).
        mask: (B, T, S), True for a real feature; None if all are.

    Returns:
        The states of the queries after the last layer (B, T, Q, hidden).
    """
    batch, steps = features.shape[:2]
    states = qformer(
        query.expand(batch * steps, -1, -1),  # (B T, Q, hidden)
        encoder_hidden_states=features.flatten(0, 1),  # (B T, S, W)
        encoder_attention_mask=None if mask is None else mask.flatten(0, 1),  # (B T, S)
    ).last_hidden_state  # (B T, Q, hidden)
    return states.unflatten(0, (batch, steps))  # (B, T, Q, hidden)
