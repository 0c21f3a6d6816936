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

The Q-Former itself is transformers' `Blip2QFormerModel`. What differs from the released code: Crab
vendors a BERT whose text half (word embeddings, a second feed-forward, a vocabulary head) it never
runs, and keeps those weights in its checkpoints; here they do not exist, and the converter drops
them. Crab uses a dropout of 0.1 in training (bert-base's config); here there is none.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

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


def blip2_qformer(config: QFormerConfig) -> Blip2QFormerModel:
    """Build a Q-Former of random weights, without dropout."""
    return Blip2QFormerModel(
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
