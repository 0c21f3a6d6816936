"""CREMA's method: any modality beside a video, through one frozen Q-Former.

Paper: CREMA (2402.05889). Three parts, in the paper's order:

1. Multimodal Q-Former with modality-adaptive modules (MMQA). All modalities share one frozen
   Q-Former. A modality m brings queries, a norm, a projection to the LM, and low-rank pairs inside
   the query and value projections of every self-attention:

       W x + b + B_m A_m x              B_m = 0: the Q-Former first acts as the frozen one

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
theirs, and so do converted weights, `MMQAModule.normed`).

Page of the course: docs/course/42_mmqa.md.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2QFormerModel

from crab_min.errors import ModelError
from crab_min.qformer import QFormerConfig, blip2_qformer, encode_per_step, make_mlp


# --- 1. multimodal Q-Former, MMQA -----------------------------------------------------------------
@dataclass
class MultimodalConfig(QFormerConfig):
    """Sizes of the Q-Former (defaults: BLIP-2's) and of its modalities (CREMA's)."""

    width_in: int = 1408  # W
    width_out: int = 2048  # D
    layers: int = 12
    mlp_depth: int = 1  # linears from a query to the LM (the tiny base has two)
    cross_every: int = 2
    rank: int = 64  # R


class MMQAModule(nn.Module):
    """The parts of one modality, beside its low-rank pairs in the Q-Former."""

    def __init__(self, config: MultimodalConfig, width: int):
        """Make the parts for features of `width`; a linear `input` leads from there to W."""
        super().__init__()
        self.width = width
        self.query = nn.Parameter(0.02 * torch.randn(1, config.queries, config.hidden))
        # released: only sound has a width of its own (BEATs' 768)
        if width == config.width_in:
            self.input = nn.Identity()
        else:
            self.input = nn.Linear(width, config.width_in)
        self.norm = nn.LayerNorm(config.width_in)
        self.normed = True  # False leaves the norm out, as released for 3D points
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
        """Wrap the linears of a shared `qformer`; None makes a random one."""
        super().__init__()
        self.config = config
        self.parts = nn.ModuleDict()  # modality -> MMQAModule
        if qformer is None:
            qformer = blip2_qformer(config)
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
        module = self.module_of(name)
        if features.ndim != 4 or features.shape[-1] != module.width:
            raise ModelError(
                f"modality {name!r}: wants features (samples, steps, tokens, {module.width}), got "
                f"{tuple(features.shape)}; are they another encoder's, or another modality's? One "
                f"of another width is a modality of its own: add(name, width)"
            )
        features = module.input(features)  # (B, T, S, W)
        if module.normed:
            features = module.norm(features)

        # the low-rank pairs of this modality act, and of no other
        linears = self.adapted_linears()
        for linear in linears:
            linear.modality = name if adapted else None
        try:
            states = encode_per_step(self.qformer, module.query, features, mask)
        finally:
            for linear in linears:
                linear.modality = None
        return module.out(states)  # (B, T, Q, D)

    def adapted_linears(self) -> list[MMQALinear]:
        """Return the linears of the Q-Former that have low-rank pairs."""
        return [module for module in self.qformer.modules() if isinstance(module, MMQALinear)]

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
        for linear in self.adapted_linears():
            linear.add(name, self.config.rank)

    def remove(self, name: str) -> None:
        """Remove a modality and its pairs. Raises ModelError: no such modality."""
        self.module_of(name)
        del self.parts[name]
        for linear in self.adapted_linears():
            del linear.A[name]
            del linear.B[name]

    def module_of(self, name: str) -> MMQAModule:
        """Return the module of a modality. Raises ModelError: no such modality."""
        if name not in self.parts:
            raise ModelError(
                f"modality {name!r}: not in this Q-Former, which has "
                f"{', '.join(self.parts) or 'none yet'}; add({name!r}, width) first"
            )
        return self.parts[name]

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """Return the parameters of one modality by their names in this module.

        They are what a step on this modality trains. Raises ModelError: no such modality.
        """
        self.module_of(name)
        pair = (f".A.{name}.weight", f".B.{name}.weight")
        parameters = {}
        for key, parameter in self.named_parameters():
            in_pair = key.startswith("qformer.") and key.endswith(pair)
            if in_pair or key.startswith(f"parts.{name}."):
                parameters[key] = parameter
        return parameters


# --- 2. self-gated multimodal query fusion --------------------------------------------------------
class SelfGatedFusion(nn.Module):
    """The tokens of all modalities but the video as one stream, Z = sigmoid(F) * F.

    Args:
        names: the modalities that are fused; the columns of the linear follow their order.
        width: D.
        gated: False leaves out the gate, for comparison: Z = F.

    Raises:
        ModelError: no names, or one of them twice.
    """

    def __init__(self, names: list[str], width: int, gated: bool = True):
        super().__init__()
        if not names or len(set(names)) < len(names):
            raise ModelError(
                f"fusion of {list(names)}: give the names of the side modalities, one or more, "
                f"each once"
            )
        self.names = list(names)
        self.gated = gated
        self.linear = nn.Linear(len(names) * width, width)

    def forward(self, sides: dict[str, Tensor]) -> Tensor:
        """Fuse the tokens of several modalities.

        Args:
            sides: name -> tokens (B, ..., D), all of one shape; zeros in a sample that lacks the
                modality. A modality that is not there counts as zeros.

        Returns:
            (B, ..., D), as many tokens as one of the modalities has.

        Raises:
            ModelError: an unknown name, unequal shapes.
        """
        self.check(sides)
        zeros = torch.zeros_like(next(iter(sides.values())))  # (B, ..., D)
        tokens = [sides.get(name, zeros) for name in self.names]  # Z_1 .. Z_M-1
        # the gate is a sigmoid of the fused tokens themselves
        fused = self.linear(torch.cat(tokens, -1))  # F = W [Z_1; ...; Z_M-1] + b
        return F.silu(fused) if self.gated else fused  # sigmoid(F) * F

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
        self.exit_epochs: dict[str, int] = {}  # modality -> the epoch at whose end it exited
        # of the current epoch
        self.sums = dict.fromkeys(names, 0.0)
        self.steps = 0

    @property
    def live(self) -> list[str]:
        """Return the modalities that are still trained."""
        return [name for name in self.norms if name not in self.exit_epochs]

    def add_norm(self, name: str, norm: float) -> None:
        """Add the gradient norm that a step found for a modality."""
        self.sums[name] += norm

    def end_step(self, last: bool) -> None:
        """Count a step; after the last one of an epoch decide who exits."""
        self.steps += 1
        if not last:
            return
        # an exited modality is encoded and fused as before, and only its updates stop
        for name in self.live:
            norm = self.sums[name] / self.steps  # g_e
            if self.should_exit(self.norms[name], norm):
                self.exit_epochs[name] = len(self.norms[name])
            self.norms[name].append(norm)
        # start the next epoch
        self.sums = dict.fromkeys(self.sums, 0.0)
        self.steps = 0

    def should_exit(self, earlier: list[float], norm: float) -> bool:
        """Apply the rule: g_e > tau * mean(g_0 .. g_(e-1)), from epoch FIRST_EXIT on."""
        if not self.threshold or len(earlier) < FIRST_EXIT:
            return False
        return norm > self.threshold * sum(earlier) / len(earlier)

    def state(self) -> dict:
        """Return what a checkpoint needs; it can be written as JSON."""
        state = {"norms": self.norms, "sums": self.sums, "steps": self.steps}
        return state | {"exits": self.exit_epochs}

    def restore(self, state: dict) -> None:
        """Take up the state of a checkpoint."""
        self.norms = state["norms"]
        self.sums = state["sums"]
        self.steps = state["steps"]
        self.exit_epochs = state["exits"]
