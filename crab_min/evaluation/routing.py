"""Seeing the heads: the routing weights of I-LoRA by layer, linear, head and kind of token (what Crab 2503.13068 and Crab+ 2603.04128 show as pictures).

    with record_routes(model) as routes:
        model(batch)
    routes.share["video", 3, "mlp.up_proj"]            # (K,) mean weight of each head over the video tokens

Shapes: B samples, L length, K heads.
"""
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from crab_min.errors import ModelError
from crab_min.ilora import ILoraLayer, route
from crab_min.model import AVLanguageModel

KINDS = ("text", "video", "image", "audio", "answer")  # of tokens: the prompt's words, its media, what is answered


@dataclass
class RoutingStats:
    """Sums over the tokens that passed; `share` and `entropy` are their means. A key is (kind, layer, linear)."""
    weights: dict[tuple, np.ndarray] = field(default_factory=dict)              # (K,)
    entropies: dict[tuple, float] = field(default_factory=dict)
    counts: dict[tuple, int] = field(default_factory=dict)

    def add(self, key: tuple, w: Tensor) -> None:
        """w (n, K): the routing weights of n tokens."""
        entropy = -(w * w.clamp(min=1e-12).log()).sum() / math.log(max(2, w.shape[1]))
        self.weights[key] = self.weights.get(key, 0) + w.sum(0).cpu().numpy()
        self.entropies[key] = self.entropies.get(key, 0) + entropy.item()
        self.counts[key] = self.counts.get(key, 0) + len(w)

    @property
    def share(self) -> dict[tuple, np.ndarray]:
        """Mean weight (K,) of each head; they sum to 1."""
        return {key: w / self.counts[key] for key, w in self.weights.items()}

    @property
    def entropy(self) -> dict[tuple, float]:
        """How undecided the router is, as the mean over tokens of its entropy: 0, always one head alone; 1, all heads alike."""
        return {key: e / self.counts[key] for key, e in self.entropies.items()}


@contextmanager
def record_routing_stats(model: AVLanguageModel) -> Iterator[RoutingStats]:
    """Collect the routes of every batch that the model is given inside the block. Raises ModelError where the LM has no I-LoRA."""
    layers = {name: layer for name, layer in model.llm.named_modules() if isinstance(layer, ILoraLayer) and re.search(r"layers\.\d+\.", name)}
    if not layers:
        raise ModelError("this model has no I-LoRA adapter, so nothing is routed; give a run that was trained with --adapter ilora")
    routes, kinds, embed, hooks = RoutingStats(), None, model.embed, []

    def note(batch):
        nonlocal kinds
        kinds = torch.where(batch["labels"] == -100, KINDS.index("text"), KINDS.index("answer"))                # (B, L)
        for kind, (_, place, _) in model.marks.items():
            kinds[batch["ids"] == place] = KINDS.index(kind)
        kinds[batch["attention"] == 0] = -1
        return embed(batch)

    for name, layer in layers.items():
        number, linear = re.search(r"layers\.(\d+)\.(.+)$", name).groups()

        def keep(router, inputs, logits, key=(int(number), linear)):
            w = route(logits.detach())                                                                          # (B, L, K)
            now = kinds if w.shape[:2] == kinds.shape else torch.full(w.shape[:2], KINDS.index("answer"), device=w.device)   # generating, word by word
            for i in now.unique().tolist():
                if i >= 0:
                    routes.add((KINDS[i], *key), w[now == i])
        hooks += [router.register_forward_hook(keep) for router in layer.ilora_router.values()]
    model.embed = note
    try:
        yield routes
    finally:
        del model.embed                                                                                         # the class's own again
        for hook in hooks:
            hook.remove()
