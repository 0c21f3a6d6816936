# %% [markdown]
# # 24. What each head serves: routing by task and by kind of token
#
# * Paper: [Crab+](https://arxiv.org/abs/2603.04128) and Crab, the figures of routing weights
# * Code: [routing.py](../crab_min/evaluation/routing.py): `routing_stats`, `token_kinds`;
#   [heads.py](../crab_min/tools/heads.py)
# * Read first: [12](12_crab_ilora.py)
#
# Crab describes its heads as serving temporal, spatial and pixel-level interaction. Its code gives
# no head such a role: whatever a head does, it has learned. If heads specialise, the router shows
# it: of three heads, some get more than 1/3 for some kind of token (words of the prompt, video,
# sound, words of the answer). We look at the shipped adapter, trained on all tasks of Crab+.

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import torch

from crab_min.backbones.composed import load_base
from crab_min.data import read_samples
from crab_min.evaluation.pictures import draw_routing_map, new_figure, save
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
NAMES = ["a2v", "ks", "avqa", "arig"]  # matching, action, question, box
SHOWN = ("text", "video", "audio", "answer")  # kinds of tokens
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
# | $x_i$, input of one linear of the LM, for token $i$ | `caught[0]`: (B, L, D) |
# | $R$, the router of this linear, with $K = 3$ heads | `linear.ilora_router`: (K, D) |
# | $\bar w$, by kind, layer and linear | `stats.share[kind, layer, linear]`: (K,) |
#
# In naive lines for one linear, `down_proj` of the last layer: catch what goes in, and weigh it
# again.

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
for kind in SHOWN:
    naive = w[kinds == KINDS.index(kind)].mean(0)
    library = stats["avqa"].share[RouterKey(kind, 3, "mlp.down_proj")]
    assert torch.allclose(naive, torch.from_numpy(library).float(), atol=1e-4)
    print(f"avqa, layer 3, down_proj, {kind:<6}: {[round(x) for x in (100 * naive).tolist()]} %")

# %% [markdown]
# ## All routers
#
# How far the routers are from even weights: the share of the preferred head, on average over the
# 4 x 7 linears, in percent. The pictures of `arig` are images.

# %%
for name, result in stats.items():
    largest = {}
    for key, weights in result.share.items():
        largest.setdefault(key.kind, []).append(100 * weights.max())
    means = [f"{kind} {sum(values) / len(values):.0f}" for kind, values in largest.items()]
    print(f"{name:<5} {', '.join(means)}")

share = stats["avqa"].share
linears = list(dict.fromkeys(key.linear for key in share))
figure = new_figure(7, 4.6)
for axes, kind in zip(figure.subplots(2, 2, sharey=True).flat, SHOWN):
    image = draw_routing_map(axes, share, kind, [0, 1, 2, 3], linears)
    axes.set(title=f"{kind} tokens", xlabel="linear, heads 0 1 2", ylabel="layer")
figure.colorbar(image, ax=figure.axes, label="mean weight of a head")
# figure: question answering: mean weight of three heads by kind of token, layer and linear
save(figure, Path("answers/24_routing.png"))

# %% [markdown]
# White is 1/3, red more, blue less. A head that is red for video tokens and blue for answers serves
# video there. The number of a head means nothing from linear to linear or from run to run.
#
# Routing says which head is asked, not what it is worth. That is measured by leaving heads out, one
# at a time: `python -m crab_min.tools.heads --run runs/crab_plus-tiny`, with numbers in
# [results.md](../docs/results.md#what-the-heads-of-i-lora-are-worth).
#
# ## Exercises
#
# 1. Give every token the same router input. Change `w = route(caught[0] @` to
#    `w = route(0 * caught[0] @`; expect `AssertionError`: even weights are not what was learned.
# 2. How rarely is the last head asked? Change `100 * weights.max()` to `100 * weights.min()`;
#    expect `answer 2`: some twenty percent.
