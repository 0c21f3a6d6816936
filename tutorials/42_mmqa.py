# %% [markdown]
# # 42. Modality-adaptive modules: MMQA
#
# * Paper: [CREMA](https://arxiv.org/abs/2402.05889), multimodal Q-Former with MMQA modules
# * Code: [crema.py](../crab_min/crema.py): `MultimodalQFormer`, `MMQALinear`, `MMQAModule`
# * Read first: [40](40_qformer.py), [41](41_modalities.py)
#
# All modalities share one frozen Q-Former. A modality $m$ brings queries, a norm, a projection to
# the LLM, and a low-rank pair for the query and the value projection of every self-attention:
#
# $$ y = W x + b + B_m A_m x, \qquad B_m = 0 \text{ at the start (and no factor } \alpha / r) $$
#
# $$ Z_m = P_m\big(\mathrm{QFormer}_m(q_m, \mathrm{LayerNorm}_m(I_m X_m))\big) $$
#
# | symbol | variable | shape |
# |---|---|---|
# | $W, b$ | `linear.base`, frozen | (768, 768) in BLIP-2 |
# | $A_m, B_m$ | `linear.A[m].weight`, `linear.B[m].weight` | (64, 768), (768, 64) |
# | $q_m$ | `part.query` | (1, 32, 768) |
# | $I_m$ | `part.input`, where the encoder has another width | (1408, 768) for sound |
# | $P_m$ | `part.out` | (2048, 768) |
# | $X_m$, $Z_m$ | features of the encoder, tokens for the LLM | (B, T, S, W), (B, T, 32, 2048) |

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import torch
from torch import nn

from crab_min.crema import MultimodalConfig, MultimodalQFormer
from crab_min.evaluation.figures import COLOURS, GREY, new_figure, save

# %% [markdown]
# ## How many parameters a modality brings
#
# BLIP-2's sizes, on torch's meta device. Six modalities; sound is 768 wide (BEATs), all else 1408.

# %%
WIDTHS = {"rgb": 1408, "flow": 1408, "depth": 1408, "normals": 1408, "points": 1408, "audio": 768}
RANK = 64
TITLES = {"query": "queries", "input": "input", "norm": "norm", "out": "projection"}
with torch.device("meta"):
    full = MultimodalQFormer(MultimodalConfig(rank=RANK))
    shared = sum(parameter.numel() for parameter in full.parameters())
    for name, width in WIDTHS.items():
        full.add(name, width)
counts = {}  # modality -> part -> parameters
for name in WIDTHS:
    counts[name] = {"low-rank pairs": 0} | dict.fromkeys(TITLES.values(), 0)
    for key, parameter in full.parameters_of(name).items():
        title = TITLES[key.split(".")[2]] if key.startswith("parts.") else "low-rank pairs"
        counts[name][title] += parameter.numel()
    if name in ("rgb", "audio"):
        print(f"{name}: {sum(counts[name].values()):,}", counts[name])

# by hand: A and B of query and value in 12 layers; queries; projection; norm; input of the sound
visual = 12 * 2 * 2 * 768 * RANK + 32 * 768 + (768 * 2048 + 2048) + 2 * 1408
assert sum(counts["rgb"].values()) == visual
assert sum(counts["audio"].values()) == visual + 768 * 1408 + 1408
trained = sum(sum(parts.values()) for parts in counts.values())
low_rank = sum(parts["low-rank pairs"] for parts in counts.values())
whole = 6 * shared + trained - low_rank  # a Q-Former of its own for each, without pairs
print(f"trained: {trained:,}; six whole Q-Formers: {whole:,}; {1 - trained / whole:.1%} fewer")

left, right = (figure := new_figure(9, 2.6)).subplots(1, 2, width_ratios=[1, 2])
left.barh(["MMQA", "whole"], [trained / 1e6, whole / 1e6], color=[COLOURS[1], GREY])
left.set_title("six modalities, millions")
edge = torch.zeros(2)
for title, colour in zip(counts["rgb"], COLOURS):
    sizes = torch.tensor([counts[name][title] / 1e6 for name in ("rgb", "audio")])
    right.barh(["rgb", "audio"], sizes, left=edge, color=colour, label=title)
    edge += sizes
right.set_title("MMQA modules of one modality, millions")
figure.legend(loc="outside lower right", ncols=5, fontsize=8)
# figure: left, trained parameters of MMQA and of six whole Q-Formers; right, what they consist of
save(figure, Path("answers/42_mmqa.png"))

# %% [markdown]
# ## The low-rank pair in naive lines

# %%
small = MultimodalQFormer(MultimodalConfig(32, 64, 4, 48, 2, heads=4, intermediate=96, rank=4))
small.add("rgb", 32)
small.add("audio", 16)
linear = small.adapted_linears()[0]
nn.init.normal_(linear.B["audio"].weight)  # as if it had learned
A, B, x = linear.A["audio"].weight, linear.B["audio"].weight, torch.randn(3, 48)
linear.modality = "audio"  # MultimodalQFormer sets it for the time of its forward
assert torch.allclose(linear(x), linear.base(x) + x @ A.T @ B.T, atol=1e-5)
linear.modality = None

# %% [markdown]
# ## Zero-shot without the pairs, and a new modality
#
# For a modality that has learned queries and a projection but no pairs that fit, `adapted=False`
# leaves the pairs out. So CREMA answers about videos zero-shot, with what BLIP-2 brings
# (`python infer.py ... --skip rgb`). A new modality touches nothing of the others.

# %%
frames, sound = torch.randn(1, 5, 7, 32), torch.randn(1, 5, 7, 16)
adapted, frozen = small("audio", sound), small("audio", sound, adapted=False)
print("the pairs change the tokens of audio:", not torch.equal(adapted, frozen))
before = small("rgb", frames)
small.add("thermal", 32)
print("thermal changes the tokens of rgb:", not torch.equal(small("rgb", frames), before))
nn.init.ones_(linear.B["thermal"].weight)
print("... once it has learned:", not torch.equal(small("rgb", frames), before))

# %% [markdown]
# ## Exercises
#
# 1. A lower rank. Change `RANK = 64` to `RANK = 16`; expect `rgb: 2,192,128`.
# 2. As it is before training. Change `normal_(linear.B["audio"]` to `zeros_(linear.B["audio"]`;
#    expect `the pairs change the tokens of audio: False`.
