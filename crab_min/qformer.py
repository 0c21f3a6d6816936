"""The Q-Former connector of Crab (2503.13068, section 3.2): learned queries read the encoder's tokens of one time step.

    LayerNorm -> Q-Former -> MLP (Linear, GELU, Linear) to the width of the LM

A layer of the Q-Former is post-norm BERT: self-attention among the queries, cross-attention to the encoder's tokens,
feed-forward. It is transformers' `Blip2QFormerModel`. What differs from the released code: Crab vendors a BERT whose
text half (word embeddings, a second feed-forward, a vocabulary head) it never runs, and keeps its weights in the
checkpoint; here they do not exist, and convert.py names what it drops. Crab drops out 0.1 in training (bert-base's
config); here nothing is dropped out.
Every frame or stretch of sound is read by itself, so that its tokens keep their place in time.

Shapes: B samples, T frames or stretches of sound, S encoder tokens of one, Q queries, W encoder width, D LM width.
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
        self.qformer = Blip2QFormerModel(Blip2QFormerConfig(
            attn_implementation=ATTENTION, hidden_size=c.hidden, num_hidden_layers=c.layers, num_attention_heads=c.heads,
            intermediate_size=c.intermediate, encoder_hidden_size=c.width_in, cross_attention_frequency=1,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
        widths = [c.hidden] + [c.width_out] * c.mlp_depth
        steps = [step for pair in zip(widths, widths[1:]) for step in (nn.Linear(*pair), nn.GELU())]
        self.mlp = nn.Sequential(*steps[:-1])                                           # no GELU after the last

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.mlp(self.read(features, mask))

    def read(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """The queries after the Q-Former, before the MLP (B, T, Q, hidden). mask (B, T, S): True = a real token; None = all are."""
        b, t = features.shape[:2]
        x = self.norm(features).flatten(0, 1)                                           # (B T, S, W)
        query = self.query.expand(b * t, -1, -1)                                        # (B T, Q, hidden)
        mask = None if mask is None else mask.flatten(0, 1)                             # (B T, S)
        y = self.qformer(query, encoder_hidden_states=x, encoder_attention_mask=mask).last_hidden_state
        return y.unflatten(0, (b, t))                                                   # (B, T, Q, hidden)
