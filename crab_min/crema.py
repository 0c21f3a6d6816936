"""TODO."""
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2QFormerModel

from crab_min.errors import ModelError
from crab_min.qformer import blip2_qformer, encode_per_step, make_mlp


class SelfGatedFusion(nn.Module):
    """The tokens of the side modalities `names`, all D wide, as one (2402.05889, Fig. 1): Z = sigmoid(F) * F, F = W [Z_1; ...; Z_M-1] + b.

    That is SiLU after a linear, so its columns follow the order of `names` (without the video, which is not fused). Raises ModelError: no names.
    """

    def __init__(self, names: list[str], width: int):
        super().__init__()
        if not names or len(set(names)) < len(names):
            raise ModelError(f"fusion of {list(names)}: give the names of the side modalities, one or more, each once")
        self.names, self.linear = list(names), nn.Linear(len(names) * width, width)

    def forward(self, sides: dict[str, Tensor], present: dict[str, Tensor] | None = None) -> Tensor:
        """sides: name -> tokens (B, ..., D), all of one shape -> (B, ..., D), as many tokens as one of them has.

        A name that is not given, or whose `present` (B,) is False for a sample, counts as zero tokens. Raises ModelError: unknown name, unequal shapes.
        """
        shapes, width = {name: tuple(x.shape) for name, x in sides.items()}, self.linear.out_features
        if len(set(shapes.values())) != 1 or not sides.keys() <= set(self.names) or next(iter(shapes.values()))[-1] != width:
            raise ModelError(f"fusion of {', '.join(self.names)}: wants one or more of these, all of one shape and {width} wide, got {shapes or 'none'}; over_frames "
                             "gives a modality of other steps the video's")
        rows = [sides.get(name, torch.zeros_like(next(iter(sides.values())))) for name in self.names]
        for i, name in enumerate(self.names):
            if present and name in present:
                rows[i] = rows[i].masked_fill(~present[name].view(-1, *[1] * (rows[i].ndim - 1)), 0)
        return F.silu(self.linear(torch.cat(rows, -1)))


def over_frames(x: Tensor, frames: int, aligned: bool = False) -> Tensor:
    """Tokens (B, U, Q, D) of a modality in steps of its own (stretches of sound, 3D) -> (B, frames, Q, D): their mean over U at each frame, as released;
    aligned: at each frame the mean of the steps of its time."""
    if aligned:
        return F.adaptive_avg_pool1d(x.flatten(2).mT, frames).mT.unflatten(2, x.shape[2:])
    return x.mean(1, keepdim=True).expand(-1, frames, -1, -1)


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


class MMQALinear(nn.Module):
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


class MMQAModule(nn.Module):
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
            attention.query, attention.value = MMQALinear(attention.query), MMQALinear(attention.value)

    def pairs(self) -> dict[str, MMQALinear]:
        """The adapted linears by their path."""
        return {path: module for path, module in self.named_modules() if isinstance(module, MMQALinear)}

    def add(self, name: str, width: int) -> None:
        """A new modality with features `width` wide; nothing of the others is touched. Raises ModelError: a name that is taken or cannot be one."""
        if name in self.parts:
            raise ModelError(f"modality {name!r}: is there already (of width {self.parts[name].width}); remove it first, or choose another name")
        if not name.isidentifier() or hasattr(self.parts, name):
            raise ModelError(f"modality {name!r}: cannot be a name in torch; give one of letters, digits and _ that is no method of a module, such as 'depth'")
        weight = self.qformer.layernorm.weight
        self.parts[name] = MMQAModule(self.config, width).to(weight.device, weight.dtype)
        for pair in self.pairs().values():
            pair.add(name, self.config.rank)

    def remove(self, name: str) -> None:
        """Take a modality and its pairs away. Raises ModelError: no such modality."""
        self.of(name)
        for holder in (self.parts, *(holder for pair in self.pairs().values() for holder in (pair.A, pair.B))):
            del holder[name]

    def of(self, name: str) -> MMQAModule:
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
        return part.out(encode_per_step(self.qformer, part.query, part.norm(part.input(features)), mask))


FIRST_EXIT = 5                                         # the epoch, counted from 0, at whose end the first exit may be


class EarlyExit:
    """When a modality has had enough (CREMA's modality-adaptive early exit): at the end of epoch e >= 5, if g_e > tau * mean(g_0 .. g_(e-1))."""

    def __init__(self, names: list[str], temperature: float):
        self.temperature, self.norms = temperature, {name: [] for name in names}                 # the means of the epochs
        self.sums, self.steps, self.exits = dict.fromkeys(names, 0.), 0, {}                      # of this epoch; name -> the epoch at whose end it went

    @property
    def live(self) -> list[str]:
        return [name for name in self.norms if name not in self.exits]

    def note(self, name: str, norm: float) -> None:
        self.sums[name] += norm

    def end_step(self, last: bool) -> None:
        """last: of an epoch, after which it is decided who goes."""
        self.steps += 1
        if not last:
            return
        for name in self.live:
            before, now = self.norms[name], self.sums[name] / self.steps
            if self.temperature and len(before) >= FIRST_EXIT and now > self.temperature * sum(before) / len(before):
                self.exits[name] = len(before)
            before.append(now)
        self.sums, self.steps = dict.fromkeys(self.sums, 0.), 0

    def state(self) -> dict:
        return {"norms": self.norms, "sums": self.sums, "steps": self.steps, "exits": self.exits}

    def restore(self, state: dict) -> None:
        self.__dict__.update(state)
