"""Q-Formers: learned queries read the encoder's tokens of one time step. Crab's connector (2503.13068, section 3.2):

    LayerNorm -> Q-Former -> MLP (Linear, GELU, Linear) to the width of the LM

A layer of the Q-Former is post-norm BERT: self-attention among the queries, cross-attention to the encoder's tokens,
feed-forward. It is transformers' `Blip2QFormerModel`. What differs from the released code: Crab vendors a BERT whose
text half (word embeddings, a second feed-forward, a vocabulary head) it never runs, and keeps its weights in the
checkpoint; here they do not exist, and convert.py names what it drops. Crab drops out 0.1 in training (bert-base's
config); here nothing is dropped out.
Every frame or stretch of sound is read by itself, so that its tokens keep their place in time.

`MultimodalQFormer` is CREMA's (2402.05889, Fig. 1): one frozen Q-Former for all modalities, for each its own small parts

    W x + b + B_m A_m x        queries and values of every self-attention; B_m = 0 at the start, so that a fresh modality reads as the frozen one does

What differs from the released code: wrapped linears in place of its fork of BERT, no dropout (there 0.1 before A and in BERT), no unused
weights; there the features of 3D points (pc) skip their LayerNorm, here every modality's is used, so released weights of pc read otherwise.

Shapes: B samples, T frames or stretches of sound, S encoder tokens of one, Q queries, W encoder width, D LM width, R rank.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from crab_min.encoders import ATTENTION


@dataclass
class QFormerConfig:
    """Crab's sizes; width_in is the encoder's width W, width_out the LM's D."""
    width_in: int
    width_out: int
    queries: int = 32
    hidden: int = 768
    layers: int = 2
    heads: int = 12
    intermediate: int = 3072                           # width of the feed-forward
    mlp_depth: int = 2                                 # linears of the MLP at the end


class QFormerConnector(nn.Module):
    """features (B, T, S, W) -> tokens (B, T, Q, D)."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = c = config
        self.norm = nn.LayerNorm(c.width_in)
        self.query = nn.Parameter(0.02 * torch.randn(1, c.queries, c.hidden))
        self.qformer = blip2_qformer(c, cross_every=1)
        self.mlp = make_mlp(c)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.mlp(self.read(features, mask))

    def read(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """The queries after the Q-Former, before the MLP (B, T, Q, hidden). mask (B, T, S): True = a real token; None = all are."""
        return encode_per_step(self.qformer, self.query, self.norm(features), mask)


def blip2_qformer(c: "QFormerConfig", cross_every: int) -> Blip2QFormerModel:
    """A Q-Former of the sizes `c` without dropout, with cross-attention in layers 0, cross_every, 2 cross_every, ..."""
    return Blip2QFormerModel(Blip2QFormerConfig(
        attn_implementation=ATTENTION, hidden_size=c.hidden, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        intermediate_size=c.intermediate, encoder_hidden_size=c.width_in, cross_attention_frequency=cross_every,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def make_mlp(c: "QFormerConfig") -> nn.Sequential:
    """Linears with a GELU between them, from a query to the width of the LM."""
    widths = [c.hidden] + [c.width_out] * c.mlp_depth
    steps = [step for pair in zip(widths, widths[1:]) for step in (nn.Linear(*pair), nn.GELU())]
    return nn.Sequential(*steps[:-1])                                                   # no GELU after the last


def encode_per_step(qformer: Blip2QFormerModel, query: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """The queries (1, Q, hidden) after reading each time step of x (B, T, S, W) by itself (B, T, Q, hidden). mask (B, T, S): True = a real token."""
    b, t = x.shape[:2]
    mask = None if mask is None else mask.flatten(0, 1)                                 # (B T, S)
    y = qformer(query.expand(b * t, -1, -1), encoder_hidden_states=x.flatten(0, 1), encoder_attention_mask=mask).last_hidden_state
    return y.unflatten(0, (b, t))                                                       # (B, T, Q, hidden)


# --- CREMA -------------------------------------------------------------------------------------------------------------------


