# %% [markdown]
# # 40. Preliminary: the Q-Former
#
# * Paper: [CREMA](https://arxiv.org/abs/2402.05889), preliminary: Q-Former
# * Code: [qformer.py](../crab_min/qformer.py): `FewQueriesAttention`, `encode_per_step`
# * Read first: [11](11_crab_branches.py), which has Crab's connectors
#
# BLIP-2's Q-Former turns any number of encoder tokens $X$ into a fixed number of queries $H$. A
# layer is post-norm BERT, with LN for LayerNorm; every second one has the cross-attention:
#
# $$ H \leftarrow \mathrm{LN}\big(H + \mathrm{Attn}(H, H)\big), \qquad
#    H \leftarrow \mathrm{LN}\big(H + \mathrm{Attn}(H, X)\big), \qquad
#    H \leftarrow \mathrm{LN}\big(H + \mathrm{FFN}(H)\big) $$
#
# $$ \mathrm{Attn}(H, X) = W_o \mathrm{softmax}\big(H W_q (X W_k)^\top / \sqrt d\big) X W_v $$
#
# | symbol | variable | shape in CREMA |
# |---|---|---|
# | $H$ | `queries`, at first learned | (32, 768), of 12 heads with $d$ = 64 |
# | $X$ | `X`, tokens of a frame or of a second of sound | (257, 1408) from ViT-g |
# | Attn, FFN, LN | `layer.attention`, `layer.intermediate_query`, ... | |

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import torch
from torch.nn import functional as F

from crab_min.backbones.composed import load_base
from crab_min.crema import MultimodalConfig
from crab_min.data import load_media, read_samples
from crab_min.evaluation.figures import new_figure, save
from crab_min.qformer import QFormerConfig, blip2_qformer, encode_per_step
from crab_min.world.side_channels import build_side_world

# %% [markdown]
# ## A Q-Former in naive lines
#
# Of four layers and random weights, beside transformers' `Blip2QFormerModel`.


# %%
def attend(attention, output, H, X, heads=4):
    """Attn(H, X), then the sum with H and its LayerNorm."""
    parts = attention.query(H), attention.key(X), attention.value(X)
    q, k, v = [part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in parts]
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)  # (heads, Q, S)
    states = (weights @ v).transpose(0, 1).flatten(1)  # (Q, hidden)
    return output.LayerNorm(output.dense(states) + H)


def naive_qformer(qformer, H, X):
    H = qformer.layernorm(H)
    for layer in qformer.encoder.layer:
        H = attend(layer.attention.attention, layer.attention.output, H, H)
        if layer.has_cross_attention:
            H = attend(layer.crossattention.attention, layer.crossattention.output, H, X)
        output = layer.output_query
        hidden = F.gelu(layer.intermediate_query.dense(H))
        H = output.LayerNorm(output.dense(hidden) + H)
    return H


torch.manual_seed(0)
EVERY = 2
config = QFormerConfig(48, 64, hidden=32, layers=4, heads=4, intermediate=64, cross_every=EVERY)
qformer = blip2_qformer(config).eval()
queries, X = torch.randn(6, 32), torch.randn(20, 48)
with torch.no_grad():
    library = encode_per_step(qformer, queries[None], X[None, None], None)[0, 0]
    assert torch.allclose(library, naive_qformer(qformer, queries, X), atol=1e-5)
crossing = [i for i, layer in enumerate(qformer.encoder.layer) if layer.has_cross_attention]
print("layers with a cross-attention:", crossing)

# %% [markdown]
# The library computes the cross-attention in another order (`FewQueriesAttention`), which gives the
# same numbers for fewer products where there are few queries. The size of CREMA's Q-Former:

# %%
TOKENS = 257
with torch.device("meta"):
    large = blip2_qformer(MultimodalConfig())
print(f"parameters: {sum(p.numel() for p in large.parameters()):,}")
print(f"{TOKENS} tokens per frame of 1408 become 32 of 2048: {TOKENS / 32:.1f} times fewer")

# %% [markdown]
# ## Which part of a frame a query attends to
#
# The shipped tiny base has 6 queries per frame. The map is the mean over the heads of the last
# layer, of one frame.

# %%
model = load_base()
file = build_side_world("", 120, 0, seed=0, names=["depth"])
frames = load_media(read_samples(file, [], "train")[0].media[0], 96)[0][:1]  # (1, 96, 96, 3)
connector, maps = model.visual_qformer, []
last = connector.qformer.encoder.layer[-1].crossattention.attention
with last.register_forward_hook(lambda module, inputs, output: maps.append(output[1])):
    connector(model.vision(torch.as_tensor(frames)[None]))
weights = maps[0].mean(1)[0].unflatten(1, (12, 12))  # (6, 12, 12)
figure = new_figure(9, 1.7)
all_axes = figure.subplots(1, 7)
all_axes[0].imshow(frames[0])
for query, axes in enumerate(all_axes[1:]):
    axes.imshow(weights[query].detach(), cmap="magma")
    axes.set_title(f"query {query}", fontsize=9)
for axes in all_axes:
    axes.set(xticks=[], yticks=[])
# figure: a frame, and where each of the six queries of the tiny base attends
save(figure, Path("answers/40_qformer.png"))

# %% [markdown]
# ## Exercises
#
# 1. Crab has a cross-attention in every layer. Change `EVERY = 2` to `EVERY = 1`; expect
#    `[0, 1, 2, 3]`.
# 2. CLIP-L at 336 pixels has 577 tokens. Change `TOKENS = 257` to `TOKENS = 577`; expect `18.0`.
