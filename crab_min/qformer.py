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
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from crab_min.encoders import ATTENTION
from crab_min.errors import ModelError


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
        return read_steps(self.qformer, self.query, self.norm(features), mask)


def blip2_qformer(c: "QFormerConfig | MultimodalConfig", cross_every: int) -> Blip2QFormerModel:
    """A Q-Former of the sizes `c` without dropout, with cross-attention in layers 0, cross_every, 2 cross_every, ..."""
    return Blip2QFormerModel(Blip2QFormerConfig(
        attn_implementation=ATTENTION, hidden_size=c.hidden, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        intermediate_size=c.intermediate, encoder_hidden_size=c.width_in, cross_attention_frequency=cross_every,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def make_mlp(c: "QFormerConfig | MultimodalConfig") -> nn.Sequential:
    """Linears with a GELU between them, from a query to the width of the LM."""
    widths = [c.hidden] + [c.width_out] * c.mlp_depth
    steps = [step for pair in zip(widths, widths[1:]) for step in (nn.Linear(*pair), nn.GELU())]
    return nn.Sequential(*steps[:-1])                                                   # no GELU after the last


def read_steps(qformer: Blip2QFormerModel, query: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """The queries (1, Q, hidden) after reading each time step of x (B, T, S, W) by itself (B, T, Q, hidden). mask (B, T, S): True = a real token."""
    b, t = x.shape[:2]
    mask = None if mask is None else mask.flatten(0, 1)                                 # (B T, S)
    y = qformer(query.expand(b * t, -1, -1), encoder_hidden_states=x.flatten(0, 1), encoder_attention_mask=mask).last_hidden_state
    return y.unflatten(0, (b, t))                                                       # (B, T, Q, hidden)


# --- CREMA -------------------------------------------------------------------------------------------------------------------
@dataclass
class MultimodalConfig:
    """BLIP-2's sizes and CREMA's rank; width_out is the LM's D (2048 in the paper), width_in what the Q-Former reads."""
    width_out: int
    width_in: int = 1408
    queries: int = 32
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072
    cross_every: int = 2                               # cross-attention in every second layer
    rank: int = 64
    mlp_depth: int = 1                                 # linears from a query to the LM (the tiny base has two)


class ModalLinear(nn.Module):
    """y = W x + b + B_m A_m x for the modality m = `current`, W x + b for None. Not to be recomputed in the backward pass: `current` has moved on."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.A, self.B, self.current = base, nn.ModuleDict(), nn.ModuleDict(), None

    def add(self, name: str, rank: int) -> None:
        """A pair for the modality `name`: A (R, in) kaiming, B (out, R) zero."""
        place = {"bias": False, "device": self.base.weight.device, "dtype": self.base.weight.dtype}
        self.A[name], self.B[name] = nn.Linear(self.base.in_features, rank, **place), nn.Linear(rank, self.base.out_features, **place)
        nn.init.kaiming_uniform_(self.A[name].weight, a=math.sqrt(5))
        nn.init.zeros_(self.B[name].weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y if self.current is None else y + self.B[self.current](self.A[self.current](x))


class Modality(nn.Module):
    """What a modality has of its own beside the low-rank pairs: features (B, T, S, width) -> input -> norm (B, T, S, W); queries; out to the LM."""

    def __init__(self, c: MultimodalConfig, width: int):
        super().__init__()
        self.width, self.query = width, nn.Parameter(0.02 * torch.randn(1, c.queries, c.hidden))
        self.input = nn.Identity() if width == c.width_in else nn.Linear(width, c.width_in)
        self.norm, self.out = nn.LayerNorm(c.width_in), make_mlp(c)


class MultimodalQFormer(nn.Module):
    """One frozen Q-Former for all modalities (CREMA, Fig. 1): (name, features (B, T, S, width)) -> tokens (B, T, Q, D)."""

    def __init__(self, config: MultimodalConfig, qformer: Blip2QFormerModel | None = None):
        """qformer: the one to be shared (its linears are wrapped); None: a random one of the sizes of `config`."""
        super().__init__()
        self.config, self.parts = config, nn.ModuleDict()
        self.qformer = (qformer or blip2_qformer(config, config.cross_every)).requires_grad_(False)
        for layer in self.qformer.encoder.layer:
            attention = layer.attention.attention                                       # of the queries among themselves
            attention.query, attention.value = ModalLinear(attention.query), ModalLinear(attention.value)

    def pairs(self) -> dict[str, ModalLinear]:
        """The adapted linears by their path."""
        return {path: module for path, module in self.named_modules() if isinstance(module, ModalLinear)}

    def add(self, name: str, width: int) -> None:
        """A new modality with features `width` wide; nothing of the others is touched. Raises ModelError: a name that is taken or cannot be one."""
        if name in self.parts:
            raise ModelError(f"modality {name!r}: is there already (of width {self.parts[name].width}); remove it first, or choose another name")
        if not name.isidentifier() or hasattr(self.parts, name):
            raise ModelError(f"modality {name!r}: cannot be a name in torch; give one of letters, digits and _ that is no method of a module, such as 'depth'")
        weight = self.qformer.layernorm.weight
        self.parts[name] = Modality(self.config, width).to(weight.device, weight.dtype)
        for pair in self.pairs().values():
            pair.add(name, self.config.rank)

    def remove(self, name: str) -> None:
        """Take a modality and its pairs away. Raises ModelError: no such modality."""
        self.of(name)
        for holder in (self.parts, *(holder for pair in self.pairs().values() for holder in (pair.A, pair.B))):
            del holder[name]

    def of(self, name: str) -> Modality:
        """The parts of a modality. Raises ModelError: no such modality."""
        if name not in self.parts:
            raise ModelError(f"modality {name!r}: not in this Q-Former, which has {', '.join(self.parts) or 'none yet'}; add({name!r}, width) first")
        return self.parts[name]

    def own(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of one modality by their names in this module: what a step on it trains. Raises ModelError: no such modality."""
        modules = {f"parts.{name}": self.of(name), **{f"{at}.{which}.{name}": getattr(pair, which)[name] for at, pair in self.pairs().items() for which in "AB"}}
        return {f"{at}.{key}": parameter for at, module in modules.items() for key, parameter in module.named_parameters()}

    def forward(self, name: str, features: Tensor, mask: Tensor | None = None, adapted: bool = True) -> Tensor:
        """tokens (B, T, Q, D) of the modality `name`. mask (B, T, S): True = a real token; adapted=False: without its pairs, as CREMA does zero-shot.

        Raises ModelError: no such modality, features of another shape or width.
        """
        part = self.of(name)
        if features.ndim != 4 or features.shape[-1] != part.width:
            raise ModelError(f"modality {name!r}: wants features (samples, steps, tokens, {part.width}), got {tuple(features.shape)}; are they another encoder's, or "
                             "another modality's? One of another width is a modality of its own: add(name, width)")
        for pair in self.pairs().values():
            pair.current = name if adapted else None
        return part.out(read_steps(self.qformer, part.query, part.norm(part.input(features)), mask))
