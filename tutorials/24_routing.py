# %% [markdown]
# # 24. What each head serves: routing by task and by kind of token
#
# * Paper: [Crab+](https://arxiv.org/abs/2603.04128) and Crab, the figures of routing weights
# * Code: [routing.py](../crab_min/evaluation/routing.py): `routing_stats`, `token_kinds`;
#   [heads.py](../crab_min/tools/heads.py)
# * Read first: [12](12_crab_ilora.py)
#
# Nobody tells a head what it is for. If heads specialise, the router shows it: its weights differ
# from 1/3 for some kind of token. We look at the shipped adapter, trained on all tasks.

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import torch

from crab_min.backbones.composed import load_base
from crab_min.data import read_samples
from crab_min.evaluation.pictures import draw_routing
from crab_min.evaluation.routing import (
    KINDS,
    RouterKey,
    adapted_linears,
    routing_stats,
    token_kinds,
)
from crab_min.features import Features
from crab_min.ilora import route
from crab_min.model import ASSETS
from crab_min.trainer import collate_answers
from crab_min.world.folders import WorldConfig, build_world

torch.set_grad_enabled(False)
NAMES = ["a2v", "ks", "avqa", "arig"]
model = load_base()
model.load_trained(ASSETS / "crab_plus-tiny")
model.eval()
root = build_world(WorldConfig(world_clips=48, world_test=4), seed=0)
samples = {name: read_samples(root, [name], "train")[:8] for name in NAMES}
features = Features(model)
batches = {name: collate_answers(model, rows, features(rows)) for name, rows in samples.items()}

# %% [markdown]
# ## The mean weight of a head
#
# $$
# \bar w_k(\text{kind}) = \frac{1}{|S|} \sum_{i \in S} w_{k}(x_i), \qquad
# w(x) = \mathrm{softmax}(R x), \qquad S = \{ i : \text{token } i \text{ is of this kind} \}
# $$
#
# | symbol | variable |
# |---|---|
# | $x_i$, input of one linear of the LM | `x`: (B, L, D) |
# | $R$, its router | `linear.ilora_router`: (K, D) |
# | $\bar w$, by kind, layer and linear | `stats.share[kind, layer, linear]`: (K,) |
#
# In naive lines for one linear: catch what goes in, and weigh it again.

# %%
stats = {name: routing_stats(model, [batch]) for name, batch in batches.items()}

where = {place: name for name, place in adapted_linears(model.llm).items()}
linear = model.llm.get_submodule(where[3, "mlp.down_proj"])
caught = []
hook = linear.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
model(batches["avqa"])
hook.remove()
w = route(caught[0] @ linear.ilora_router["default"].weight.T)  # (B, L, K)
kinds = token_kinds(model, batches["avqa"])  # (B, L)
for kind in ("text", "video", "audio", "answer"):
    naive = w[kinds == KINDS.index(kind)].mean(0)
    library = stats["avqa"].share[RouterKey(kind, 3, "mlp.down_proj")]
    assert torch.allclose(naive, torch.from_numpy(library).float(), atol=1e-4)
    print(f"avqa, layer 3, down_proj, {kind:<6}: {[round(x) for x in (100 * naive).tolist()]} %")

# %% [markdown]
# ## All routers
#
# How far a router is from even weights, over all linears:

# %%
for kind in ("text", "video", "audio", "answer"):
    largest = [w.max() for key, w in stats["avqa"].share.items() if key.kind == kind]
    print(f"{kind:<6} the preferred head has {100 * sum(largest) / len(largest):.0f} % on average")
# figure: mean weight of each of three heads by task, kind of token, layer and linear; white is 1/3
draw_routing(Path("answers/24_routing.png"), stats)

# %% [markdown]
# Routing says which head is asked, not what it is worth. That is measured by leaving heads out, one
# at a time: `python -m crab_min.tools.heads --run runs/crab_plus-tiny`, with numbers in
# [results.md](../docs/results.md#what-the-heads-of-i-lora-are-worth). The number of a head means
# nothing from run to run.
#
# ## Exercises
#
# 1. Give every token the same router input. Change `w = route(caught[0] @` to
#    `w = route(0 * caught[0] @`; expect `AssertionError`: even weights are not what was learned.
# 2. How rarely is the last head asked? Change `[w.max() for key` to `[w.min() for key`; expect
#    `answer the preferred head has 2`: some twenty percent.
