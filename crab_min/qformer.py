"""The Q-Former connector of Crab: a few learned queries read the encoder's tokens of one frame or sound segment (papers/crab.md 1.1)."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel


@dataclass
class QFormerConfig:
    width_in: int
    width_out: int
    queries: int = 32
    hidden: int = 768
    layers: int = 2
    heads: int = 12
    intermediate: int = 3072
    mlp_depth: int = 2


class QFormerConnector(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = c = config
        self.norm = nn.LayerNorm(c.width_in)
        self.query = nn.Parameter(torch.randn(1, c.queries, c.hidden) * .02)
        self.qformer = Blip2QFormerModel(Blip2QFormerConfig(hidden_size=c.hidden, num_hidden_layers=c.layers, num_attention_heads=c.heads,
            intermediate_size=c.intermediate, encoder_hidden_size=c.width_in, cross_attention_frequency=1, hidden_dropout_prob=0., attention_probs_dropout_prob=0.))
        mlp = [nn.Linear(c.hidden, c.width_out)]
        for _ in range(c.mlp_depth - 1):
            mlp += [nn.GELU(), nn.Linear(c.width_out, c.width_out)]
        self.mlp = nn.Sequential(*mlp)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        B, T = features.shape[:2]
        x = self.norm(features).flatten(0, 1)
        y = self.qformer(query_embeds=self.query.expand(B * T, -1, -1), encoder_hidden_states=x,
                         encoder_attention_mask=None if mask is None else mask.flatten(0, 1)).last_hidden_state
        return self.mlp(y).unflatten(0, (B, T))
