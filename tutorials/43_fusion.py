# %% [markdown]
# # 43. Self-gated multimodal query fusion
#
# * Paper: [CREMA](https://arxiv.org/abs/2402.05889), self-gated multimodal query fusion
# * Code: [crema.py](../crab_min/crema.py): `SelfGatedFusion`, `over_frames`;
#   [blip2.py](../crab_min/backbones/blip2.py): the token layouts
# * Read first: [42](42_mmqa.py)
#
# With every modality the prompt would grow by its tokens. CREMA fuses all modalities but the video
# into one stream. A linear mixes them at each frame and query; its output also gates itself,
# between 0 and 1, so that it can shut out what is of no use. (A linear and SiLU are the same.)
#
# $$ F = W [Z_1; \dots; Z_{M-1}] + b, \qquad \bar Z = \sigma(F) \odot F $$
#
# | symbol | variable | shape |
# |---|---|---|
# | $M$ | modalities, with the video | |
# | $Z_m$ | `Z[m]`, tokens of one at the T frames of the video, Q per frame | (T, Q, D) |
# | $W, b$ | `model.fusion.linear` | (D, (M - 1) D), (D,) |
# | $F$, $\sigma(F)$ | `G`; the gate, a sigmoid | (T, Q, D) |
# | $\bar Z$ | `fused` | (T, Q, D), however many modalities |

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import torch
from torch import nn
from torch.nn import functional as F

from crab_min.backbones.load import load_model
from crab_min.config import BackboneConfig, ModalityConfig
from crab_min.crema import SelfGatedFusion
from crab_min.encoders import MediaFeatures
from crab_min.evaluation.figures import RED, TEAL, YELLOW, new_figure, save

# %% [markdown]
# ## From modalities to the tokens of the LLM
#
# A small random BLIP-2 with sound and flow. Sound has 8 steps here, the video 4 frames: two steps
# are averaged per frame (released: all steps, for every frame alike). New modalities have zero
# columns in W, so that they change nothing at first; we fill them, as after training.

# %%
torch.manual_seed(0)
model = load_model(BackboneConfig(backbone="blip2", weights="tiny-random"))
model.configure(ModalityConfig(fusion="concat", modality_rank=4))
model.add_side_channel("audio", width=16)
model.add_side_channel("flow", width=32)
print("zero columns at first:", not model.fusion.linear.weight.any())
nn.init.normal_(model.fusion.linear.weight, std=0.1)

X = {"rgb": torch.randn(4, 17, 32), "audio": torch.randn(8, 9, 16), "flow": torch.randn(4, 17, 32)}
sides = {name: MediaFeatures(name, X[name]) for name in ("audio", "flow")}
video = MediaFeatures("video", X["rgb"], sides=sides)
with torch.no_grad():
    Z = {name: model.multimodal(name, features[None])[0] for name, features in X.items()}
    Z["audio"] = Z["audio"].unflatten(0, (4, 2)).mean(1)  # (8, Q, D) -> (4, Q, D)
    G = model.fusion.linear(torch.cat([Z["audio"], Z["flow"]], -1))  # F of the equation
    fused = G.sigmoid() * G
    tokens = {}
    for mode in ("concat", "add"):
        model.fusion_mode = mode
        tokens[mode] = model.tokens([video], [0])[0]
        print(mode, tuple(tokens[mode].shape))
assert torch.allclose(tokens["concat"], torch.cat([Z["rgb"], fused]).flatten(0, 1), atol=1e-5)
assert torch.allclose(tokens["add"], (Z["rgb"] + fused).flatten(0, 1), atol=1e-5)
assert torch.allclose(fused, F.silu(G))

# %% [markdown]
# ## Three layouts
#
# | layout | the LLM reads | tokens |
# |---|---|---|
# | no fusion | the tokens of each modality | $M T Q$ |
# | `concat`, released | $Z_1 \dots Z_T$ of the video, then $\bar Z_1 \dots \bar Z_T$ | $2 T Q$ |
# | `add`, the paper's first version | $Z_t + \bar Z_t$ | $T Q$ |
#
# (The words "Frame t: " are not counted.) In that version `add` lost little: the paper's accuracy
# on MUSIC-AVQA with video, sound and flow is 80.6 %, and 80.8 % without fusion. On our tiny base
# `concat` stayed at chance for 400 steps, so our runs add
# ([results](../docs/results.md#crema-on-the-tiny-base)). The fusion has $(M - 1) D^2 + D$
# parameters; at CREMA's sizes, with 4 frames, 32 queries and D = 2048:

# %%
FRAMES, QUERIES, WIDTH = 4, 32, 2048
modalities = range(2, 6)
lengths = {
    "no fusion": [m * FRAMES * QUERIES for m in modalities],
    "concat": [2 * FRAMES * QUERIES for m in modalities],
    "add": [FRAMES * QUERIES for m in modalities],
}
for m in modalities:
    with torch.device("meta"):
        fusion = SelfGatedFusion([f"m{i}" for i in range(m - 1)], WIDTH)
    count = sum(parameter.numel() for parameter in fusion.parameters())
    assert count == (m - 1) * WIDTH**2 + WIDTH
    row = ", ".join(f"{name} {values[m - 2]}" for name, values in lengths.items())
    print(f"{m} modalities: fusion {count:,} parameters; tokens: {row}")
left, right = (figure := new_figure(8, 2.8)).subplots(1, 2)
x = torch.linspace(-6, 6, 100)
left.plot(x, x.sigmoid() * x, color=TEAL, label="sigmoid(F) F")
left.plot(x, x.sigmoid(), "--", color=YELLOW, label="the gate, sigmoid(F)")
left.set(xlabel="one number of F", title="what the gate lets through")
for (name, values), colour in zip(lengths.items(), (RED, YELLOW, TEAL)):
    right.plot(modalities, values, "o-", color=colour, label=name)
right.set(xlabel="modalities with the video", title="tokens for the LLM", ylim=(0, None))
right.set_xticks(modalities)
left.legend()
right.legend()
# figure: left, the self-gate; right, only without fusion the prompt grows with the modalities
save(figure, Path("answers/43_fusion.png"))

# %% [markdown]
# ## Exercises
#
# 1. The columns of W follow the order of the modalities. Change `[Z["audio"], Z["flow"]]` to
#    `[Z["flow"], Z["audio"]]`; expect `AssertionError`.
# 2. Twice the frames. Change `WIDTH = 4, 32` to `WIDTH = 8, 32`; expect
#    `no fusion 1280, concat 512`.
