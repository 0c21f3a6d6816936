"""Statistics of I-LoRA's routing: mean weights of the heads.

There is one mean per kind of token, layer and linear. Crab (2503.13068) and Crab+ (2603.04128) show
as pictures which heads of I-LoRA serve which tokens. For the tokens t of one kind and the routing
weights w_k(t) of one adapted linear, this is

    share_k = mean over t of w_k(t)

    stats = routing_stats(model, batches)
    stats.share["video", 3, "mlp.up_proj"]      # (K,) over the video tokens, in layer 3

Shapes: B samples, L tokens, K heads, N tokens of one kind.

Page of the course: docs/course/24_routing.md.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from crab_min.errors import ModelError
from crab_min.ilora import ILoraLinear, route
from crab_min.model import NO_LABEL, AVLanguageModel, Batch

# Kinds of tokens: the text of the prompt, the media in it, and the answer
KINDS = ("text", "video", "image", "audio", "answer")
PADDING = -1
# Name of an adapted linear in the LM; an audio tower has `layers` too, but not in such a decoder
IN_LAYER = re.compile(r".*\bmodel(\.language_model)?\.layers\.(?P<layer>\d+)\.(?P<linear>.+)")


class RouterKey(NamedTuple):
    """The kind of the tokens and the router that weighs the heads for them."""

    kind: str  # one of KINDS
    layer: int
    linear: str  # name inside the layer, such as "mlp.up_proj"


@dataclass
class RoutingStats:
    """Statistics by router and kind of token."""

    share: dict[RouterKey, np.ndarray]  # the mean weight (K,) of each head; they sum to 1
    token_counts: dict[RouterKey, int]


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the routing weights: `with record_routing(model) as weights: model(...)`.

    Yields:
        name of the adapted linear in `model` -> w (..., K) of its last forward, in float32,
        without gradient.
    """
    weights: dict[str, Tensor] = {}

    def record(name: str, router: nn.Module, inputs: tuple, logits: Tensor) -> None:
        weights[name] = route(logits.detach())

    # a hook on every router, which is removed at the end of the block
    with ExitStack() as hooks:
        for name, layer in model.named_modules():
            if isinstance(layer, ILoraLinear):
                for router in layer.ilora_router.values():
                    hooks.enter_context(router.register_forward_hook(partial(record, name)))
        yield weights


@torch.no_grad()
def routing_stats(model: AVLanguageModel, batches: Iterable[Batch]) -> RoutingStats:
    """Run a model on batches and return the statistics of its routing.

    Raises:
        ModelError: the LM has no I-LoRA adapter.
    """
    linears = adapted_linears(model.llm)
    if not linears:
        raise ModelError(
            "this model has no I-LoRA adapter, so nothing is routed; give a run that was trained "
            "with --adapter ilora"
        )
    weight_sums: dict[RouterKey, np.ndarray] = {}  # (K,)
    token_counts: Counter[RouterKey] = Counter()
    for batch in batches:
        with record_routing(model.llm) as weights:
            model(batch)

        # the tokens of each kind, at each router
        kinds = token_kinds(model, batch)  # (B, L)
        for name, (layer, linear) in linears.items():
            for index, kind in enumerate(KINDS):
                w = weights[name][kinds == index]  # (B, L, K) -> (N, K)
                if len(w):
                    key = RouterKey(kind, layer, linear)
                    weight_sums[key] = weight_sums.get(key, 0) + w.sum(0).cpu().numpy()
                    token_counts[key] += len(w)
    share = {key: sums / token_counts[key] for key, sums in weight_sums.items()}
    return RoutingStats(share, token_counts)


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
    in_prompt = batch.labels == NO_LABEL
    kinds = torch.where(in_prompt, KINDS.index("text"), KINDS.index("answer"))  # (B, L)
    for kind, tokens in model.media_tokens.items():
        kinds[batch.ids == tokens.placeholder] = KINDS.index(kind)
    kinds[batch.attention == 0] = PADDING
    return kinds
