"""CREMA's method: any modality beside a video, through one frozen Q-Former.

Paper: CREMA (2402.05889). Three parts, in the paper's order:

1. Multimodal Q-Former with modality-adaptive modules (MMQA). All modalities share one frozen
   Q-Former. A modality m brings queries, a norm, a projection to the LM, and low-rank pairs inside
   the queries and values of every self-attention:

       W x + b + B_m A_m x              B_m = 0 at the start: a new modality changes nothing

2. Self-gated multimodal query fusion. The tokens Z_1 .. Z_M-1 of all modalities but the video
   become one stream, so that the LM reads as many tokens with seven modalities as with two:

       F = W [Z_1; ...; Z_M-1] + b,     Z = sigmoid(F) * F,     which is SiLU after a linear

3. Modality-sequential training with modality-adaptive early exit. A step trains one modality at a
   time. With g_e the mean gradient norm of its low-rank pairs in epoch e, it exits at the end of
   epoch e >= 5 when its gradient has grown beyond tau times the mean so far:

       g_e > tau * mean(g_0 .. g_(e-1))

    symbol          variable
    W, b            MMQALinear.base, frozen
    A_m, B_m        MMQALinear.A[name] (R, in), MMQALinear.B[name] (out, R)
    Z_m             MultimodalQFormer.forward(name, features)            (B, T, Q, D)
    fusion W, b     SelfGatedFusion.linear, columns in the order of `names`
    g_0 .. g_(e-1)  EarlyExit.norms[name]
    tau             EarlyExit.threshold

Shapes: B samples, T frames, U steps of a modality, S encoder tokens per step, Q queries, W width
that the Q-Former reads, D width of the LM, R rank.

What differs from the released code: wrapped linears in place of a fork of BERT; no dropout before A
(released: 0.1), while BERT's own 0.1 stays where BLIP-2's Q-Former is loaded; g_e is the mean over
the epoch (released: the last step's norm); steps of sound can be aligned with the frames (released:
their mean stands at each frame); every modality's LayerNorm is used (released: 3D points skip
theirs, so released weights of `pc` read otherwise here).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2QFormerModel

from crab_min.errors import ModelError
from crab_min.qformer import blip2_qformer, encode_per_step, make_mlp


# --- 1. multimodal Q-Former, MMQA -----------------------------------------------------------------
@dataclass
class MultimodalConfig:
    """Sizes of the Q-Former (BLIP-2's) and of its modalities (CREMA's)."""

    width_out: int  # D; 2048 in the paper
    width_in: int = 1408  # W
    queries: int = 32  # Q
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072  # width of the feed-forward
    cross_every: int = 2  # cross-attention in every second layer
    rank: int = 64  # R
    mlp_depth: int = 1  # linears from a query to the LM (the tiny base has two)


class MMQAModule(nn.Module):
    """The parts of one modality, beside its low-rank pairs in the Q-Former."""

    def __init__(self, config: MultimodalConfig, width: int):
        """width: of the modality's features; a linear `input` leads from there to W."""
        super().__init__()
        self.width = width
        self.query = nn.Parameter(0.02 * torch.randn(1, config.queries, config.hidden))
        # released: only sound has a width of its own (BEATs' 768)
        if width == config.width_in:
            self.input = nn.Identity()
        else:
            self.input = nn.Linear(width, config.width_in)
        self.norm = nn.LayerNorm(config.width_in)
        self.out = make_mlp(config)  # the projection to the LM


class MMQALinear(nn.Module):
    """A frozen linear with a low-rank pair for each modality: y = W x + b + B_m A_m x.

    Which modality m acts is set by MultimodalQFormer for the time of its forward, because
    transformers' Q-Former calls this layer with x alone. So this forward must not be run again in
    the backward pass (gradient checkpointing), where m is no longer set.
    """

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.A = nn.ModuleDict()
        self.B = nn.ModuleDict()
        self.modality: str | None = None

    def add(self, name: str, rank: int) -> None:
        """Add the pair of a modality, or start it anew: A (R, in) random, B (out, R) zero."""
        # the base may be on its device already, in half precision
        like = {"device": self.base.weight.device, "dtype": self.base.weight.dtype}
        self.A[name] = nn.Linear(self.base.in_features, rank, bias=False, **like)
        self.B[name] = nn.Linear(rank, self.base.out_features, bias=False, **like)
        nn.init.kaiming_uniform_(self.A[name].weight, a=math.sqrt(5))
        nn.init.zeros_(self.B[name].weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)  # W x + b
        if self.modality is None:
            return y
        return y + self.B[self.modality](self.A[self.modality](x))


class MultimodalQFormer(nn.Module):
    """One frozen Q-Former for all modalities: features -> tokens (B, T, Q, D)."""

    def __init__(self, config: MultimodalConfig, qformer: Blip2QFormerModel | None = None):
        """qformer: the one to share, whose linears are wrapped; None: a random one."""
        super().__init__()
        self.config = config
        self.parts = nn.ModuleDict()  # modality -> MMQAModule
        if qformer is None:
            qformer = blip2_qformer(config, config.cross_every)
        self.qformer = qformer.requires_grad_(False)
        # CREMA adapts queries and values of the self-attention; cross-attention stays frozen
        for layer in self.qformer.encoder.layer:
            self_attention = layer.attention.attention
            self_attention.query = MMQALinear(self_attention.query)
            self_attention.value = MMQALinear(self_attention.value)

    def forward(
        self, name: str, features: Tensor, mask: Tensor | None = None, adapted: bool = True
    ) -> Tensor:
        """Compute the tokens Z_m of a modality.

        Args:
            name: the modality m.
            features: (B, T, S, width).
            mask: (B, T, S), True for a real feature; None if all are.
            adapted: False leaves out the low-rank pairs, as CREMA does zero-shot.

        Returns:
            (B, T, Q, D).

        Raises:
            ModelError: no such modality, features of another shape or width.
        """
        module = self.of(name)
        if features.ndim != 4 or features.shape[-1] != module.width:
            raise ModelError(
                f"modality {name!r}: wants features (samples, steps, tokens, {module.width}), got "
                f"{tuple(features.shape)}; are they another encoder's, or another modality's? One "
                f"of another width is a modality of its own: add(name, width)"
            )
        features = module.norm(module.input(features))  # (B, T, S, W)
        with self.adapted_to(name if adapted else None):
            states = encode_per_step(self.qformer, module.query, features, mask)
        return module.out(states)  # (B, T, Q, D)

    @contextmanager
    def adapted_to(self, name: str | None) -> Iterator[None]:
        """Let the low-rank pairs of a modality act inside the block; None: no pair."""
        linears = self.pairs().values()
        for linear in linears:
            linear.modality = name
        try:
            yield
        finally:
            for linear in linears:
                linear.modality = None

    def pairs(self) -> dict[str, MMQALinear]:
        """Return the linears with low-rank pairs by their path."""
        return {
            path: module for path, module in self.named_modules() if isinstance(module, MMQALinear)
        }

    # --- modalities come and go
    def add(self, name: str, width: int) -> None:
        """Add a modality with features `width` wide. Nothing of the others is touched.

        Raises:
            ModelError: a name that is taken or cannot be one.
        """
        if name in self.parts:
            raise ModelError(
                f"modality {name!r}: is there already (of width {self.parts[name].width}); remove "
                f"it first, or choose another name"
            )
        if not name.isidentifier() or hasattr(self.parts, name):
            raise ModelError(
                f"modality {name!r}: cannot be a name in torch; give one of letters, digits and _ "
                f"that is no method of a module, such as 'depth'"
            )
        weight = self.qformer.layernorm.weight  # for its device and type
        self.parts[name] = MMQAModule(self.config, width).to(weight.device, weight.dtype)
        for linear in self.pairs().values():
            linear.add(name, self.config.rank)

    def remove(self, name: str) -> None:
        """Remove a modality and its pairs. Raises ModelError: no such modality."""
        self.of(name)
        del self.parts[name]
        for linear in self.pairs().values():
            del linear.A[name]
            del linear.B[name]

    def of(self, name: str) -> MMQAModule:
        """Return the module of a modality. Raises ModelError: no such modality."""
        if name not in self.parts:
            raise ModelError(
                f"modality {name!r}: not in this Q-Former, which has "
                f"{', '.join(self.parts) or 'none yet'}; add({name!r}, width) first"
            )
        return self.parts[name]

    def own(self, name: str) -> dict[str, nn.Parameter]:
        """Return the parameters of one modality by their names in this module.

        They are what a step on this modality trains. Raises ModelError: no such modality.
        """
        # its own module, and its pair in every adapted linear
        modules = {f"parts.{name}": self.of(name)}
        for path, linear in self.pairs().items():
            modules[f"{path}.A.{name}"] = linear.A[name]
            modules[f"{path}.B.{name}"] = linear.B[name]
        parameters = {}
        for path, module in modules.items():
            for key, parameter in module.named_parameters():
                parameters[f"{path}.{key}"] = parameter
        return parameters


# --- 2. self-gated multimodal query fusion --------------------------------------------------------
class SelfGatedFusion(nn.Module):
    """The tokens of all modalities but the video as one stream, Z = sigmoid(F) * F.

    Args:
        names: the modalities that are fused; the columns of the linear follow their order.
        width: D.

    Raises:
        ModelError: no names, or one of them twice.
    """

    def __init__(self, names: list[str], width: int):
        super().__init__()
        if not names or len(set(names)) < len(names):
            raise ModelError(
                f"fusion of {list(names)}: give the names of the side modalities, one or more, "
                f"each once"
            )
        self.names = list(names)
        self.linear = nn.Linear(len(names) * width, width)

    def forward(self, sides: dict[str, Tensor], present: dict[str, Tensor] | None = None) -> Tensor:
        """Fuse the tokens of several modalities.

        Args:
            sides: name -> tokens (B, ..., D), all of one shape. A missing modality counts as zeros.
            present: name -> (B,), False where a sample lacks the modality: its tokens count as
                zeros too.

        Returns:
            (B, ..., D), as many tokens as one of the modalities has.

        Raises:
            ModelError: an unknown name, unequal shapes.
        """
        self.check(sides)
        like = next(iter(sides.values()))  # (B, ..., D)

        # Z_1 .. Z_M-1, zeros where a modality is missing
        tokens = []
        for name in self.names:
            Z = sides.get(name, torch.zeros_like(like))
            if present and name in present:
                absent = ~present[name]
                Z = Z.masked_fill(absent.view(-1, *[1] * (Z.ndim - 1)), 0)
            tokens.append(Z)

        # the gate is a sigmoid of the fused tokens themselves
        fused = self.linear(torch.cat(tokens, -1))  # F = W [Z_1; ...; Z_M-1] + b
        return F.silu(fused)  # sigmoid(F) * F

    def check(self, sides: dict[str, Tensor]) -> None:
        """Raise ModelError unless all names are known and all tokens are of one shape."""
        shapes = {name: tuple(x.shape) for name, x in sides.items()}
        known = sides.keys() <= set(self.names)
        one_shape = len(set(shapes.values())) == 1
        width = self.linear.out_features
        if not known or not one_shape or next(iter(shapes.values()))[-1] != width:
            raise ModelError(
                f"fusion of {', '.join(self.names)}: wants one or more of these, all of one shape "
                f"and {width} wide, got {shapes or 'none'}; over_frames gives a modality of other "
                f"steps the video's"
            )


def over_frames(x: Tensor, frames: int, aligned: bool = False) -> Tensor:
    """Bring a modality with steps of its own (sound, 3D points) to the video's frames.

    Args:
        x: tokens (B, U, Q, D).
        frames: T.
        aligned: True averages the steps at the time of each frame; False puts the mean of all steps
            at every frame, as released.

    Returns:
        (B, T, Q, D).
    """
    if not aligned:
        return x.mean(1, keepdim=True).expand(-1, frames, -1, -1)
    # pooled along time, all tokens and channels alike
    by_time = x.flatten(2).mT  # (B, Q D, U)
    return F.adaptive_avg_pool1d(by_time, frames).mT.unflatten(2, x.shape[2:])


# --- 3. modality-adaptive early exit --------------------------------------------------------------
FIRST_EXIT = 5  # the first epoch, counted from 0, at whose end a modality may exit


class EarlyExit:
    """Modality-adaptive early exit: decides which modalities are trained on.

    Args:
        names: the modalities.
        threshold: tau; 0 means that none exits.
    """

    def __init__(self, names: list[str], threshold: float):
        self.threshold = threshold
        self.norms: dict[str, list[float]] = {name: [] for name in names}  # g_0, g_1, ...
        self.exits: dict[str, int] = {}  # modality -> the epoch at whose end it exited
        # of the current epoch
        self.sums = dict.fromkeys(names, 0.0)
        self.steps = 0

    @property
    def live(self) -> list[str]:
        """The modalities that are still trained."""
        return [name for name in self.norms if name not in self.exits]

    def note(self, name: str, norm: float) -> None:
        """Add the gradient norm that a step found for a modality."""
        self.sums[name] += norm

    def end_step(self, last: bool) -> None:
        """Count a step; after the last one of an epoch decide who exits."""
        self.steps += 1
        if not last:
            return
        # an exited modality is encoded and fused as before, and only its updates stop
        epoch_norms = {name: self.sums[name] / self.steps for name in self.live}  # g_e
        for name, norm in epoch_norms.items():
            if self.has_enough(self.norms[name], norm):
                self.exits[name] = len(self.norms[name])
            self.norms[name].append(norm)
        # start the next epoch
        self.sums = dict.fromkeys(self.sums, 0.0)
        self.steps = 0

    def has_enough(self, earlier: list[float], norm: float) -> bool:
        """Apply the rule: g_e > tau * mean(g_0 .. g_(e-1)), from epoch FIRST_EXIT on."""
        if not self.threshold or len(earlier) < FIRST_EXIT:
            return False
        return norm > self.threshold * sum(earlier) / len(earlier)

    def state(self) -> dict:
        """Return what a checkpoint needs; it can be written as JSON."""
        return {"norms": self.norms, "sums": self.sums, "steps": self.steps, "exits": self.exits}

    def restore(self, state: dict) -> None:
        """Take up the state of a checkpoint."""
        self.norms = state["norms"]
        self.sums = state["sums"]
        self.steps = state["steps"]
        self.exits = state["exits"]
