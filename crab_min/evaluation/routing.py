"""Statistics of I-LoRA's routing: the mean weight of each head by kind of token, layer and linear.

Crab (2503.13068) and Crab+ (2603.04128) show as pictures which heads of I-LoRA serve which tokens.
For the tokens t of one kind and the routing weights w_k(t) of one adapted linear, these are

    share_k  = mean over t of w_k(t)
    entropy  = mean over t of -sum_k w_k(t) log w_k(t) / log K      0: one head alone; 1: all alike

    with record_routing_stats(model) as stats:
        model(batch)
    stats.share["video", 3, "mlp.up_proj"]      # (K,) over the video tokens, in layer 3

Shapes: B samples, L tokens, K heads, N tokens of one kind.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from crab_min.errors import ModelError
from crab_min.ilora import ILoraLinear, record_routing
from crab_min.model import AVLanguageModel, Batch

# Kinds of tokens: the text of the prompt, the media in it, and the answer
KINDS = ("text", "video", "image", "audio", "answer")
PADDING = -1
# Name of an adapted linear in the LM; an audio tower has `layers` too, but not in such a decoder
IN_LAYER = re.compile(
    r"(?P<decoder>.*\bmodel(\.language_model)?)\.layers\.(?P<layer>\d+)\.(?P<linear>.+)"
)


class RouterKey(NamedTuple):
    """The kind of the tokens and the router that weighs the heads for them."""

    kind: str  # one of KINDS
    layer: int
    linear: str  # name inside the layer, such as "mlp.up_proj"


@dataclass
class RoutingStats:
    """Sums over tokens by router and kind of token; `share` and `entropy` are their means."""

    weight_sums: dict[RouterKey, np.ndarray] = field(default_factory=dict)  # (K,)
    entropy_sums: dict[RouterKey, float] = field(default_factory=dict)
    token_counts: dict[RouterKey, int] = field(default_factory=dict)

    def add(self, key: RouterKey, weights: Tensor) -> None:
        """Add the routing weights (N, K) of N tokens."""
        heads = weights.shape[1]
        entropy = -(weights * weights.clamp(min=1e-12).log()).sum() / math.log(max(2, heads))
        self.weight_sums[key] = self.weight_sums.get(key, 0) + weights.sum(0).cpu().numpy()
        self.entropy_sums[key] = self.entropy_sums.get(key, 0) + entropy.item()
        self.token_counts[key] = self.token_counts.get(key, 0) + len(weights)

    @property
    def share(self) -> dict[RouterKey, np.ndarray]:
        """The mean weight (K,) of each head; they sum to 1."""
        return {key: sums / self.token_counts[key] for key, sums in self.weight_sums.items()}

    @property
    def entropy(self) -> dict[RouterKey, float]:
        """The mean entropy of the routing weights: 0, one head alone; 1, all heads alike."""
        return {key: sums / self.token_counts[key] for key, sums in self.entropy_sums.items()}


@contextmanager
def record_routing_stats(model: AVLanguageModel) -> Iterator[RoutingStats]:
    """Collect routing statistics of every batch that the model processes inside the block.

    Raises:
        ModelError: the LM has no I-LoRA adapter.
    """
    linears = adapted_linears(model.llm)
    if not linears:
        raise ModelError(
            "this model has no I-LoRA adapter, so nothing is routed; give a run that was trained "
            "with --adapter ilora"
        )
    stats = RoutingStats()

    # Before the LM: the kinds of the tokens, which their embeddings no longer show
    embed = model.embed
    kinds: Tensor | None = None  # (B, L), of the batch that was embedded last

    def embed_and_note_kinds(batch):
        nonlocal kinds
        kinds = token_kinds(model, batch)
        return embed(batch)

    # After each forward of the LM's decoder, one per batch or per generated token: the weights
    weights: dict[str, Tensor] = {}

    def add_to_stats(decoder, inputs, output) -> None:
        for name, w in weights.items():
            if name in linears:
                add_weights(stats, linears[name], w, kinds)

    decoder_name = IN_LAYER.match(next(iter(linears)))["decoder"]
    hook = model.llm.get_submodule(decoder_name).register_forward_hook(add_to_stats)
    model.embed = embed_and_note_kinds
    try:
        with record_routing(model.llm) as weights:
            yield stats
    finally:
        del model.embed  # the method of the class is visible again
        hook.remove()


def adapted_linears(llm: nn.Module) -> dict[str, tuple[int, str]]:
    """Return {name in the LM: (layer, name in the layer)} of the linears with I-LoRA.

    Adapted linears of encoders, which the released Crab+ has too, are left out.
    """
    linears = {}
    for name, module in llm.named_modules():
        match = IN_LAYER.match(name)
        if isinstance(module, ILoraLinear) and match:
            linears[name] = int(match["layer"]), match["linear"]
    return linears


def token_kinds(model: AVLanguageModel, batch: Batch) -> Tensor:
    """Return the kind of each token of a batch: (B, L) indices of KINDS, or PADDING."""
    in_prompt = batch.labels == -100
    kinds = torch.where(in_prompt, KINDS.index("text"), KINDS.index("answer"))  # (B, L)
    for kind, tokens in model.media_tokens.items():
        kinds[batch.ids == tokens.placeholder] = KINDS.index(kind)
    kinds[batch.attention == 0] = PADDING
    return kinds


def add_weights(stats: RoutingStats, router: tuple[int, str], w: Tensor, kinds: Tensor) -> None:
    """Add the weights w (B, L, K) of a router (layer, linear) for tokens of `kinds` (B, L)."""
    if w.shape[:2] != kinds.shape:  # generation after the prompt, one token at a time
        kinds = torch.full(w.shape[:2], KINDS.index("answer"), device=w.device)
    for kind in kinds.unique().tolist():
        if kind != PADDING:
            stats.add(RouterKey(KINDS[kind], *router), w[kinds == kind])
