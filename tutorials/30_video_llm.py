# %% [markdown]
# # 30. The video LLM that is patched
#
# * Paper: [PAVE](https://arxiv.org/abs/2503.19794), background on video LLMs
# * Code: [llava_onevision.py](../crab_min/backbones/llava_onevision.py): `LlavaModel`
#
# A video LLM takes a few frames of a clip and turns each into tokens of a language model:
#
# $$ v = E(x), \qquad z = \mathrm{pool}(P(v)), \qquad \mathrm{answer} = \mathrm{LLM}([z; t]) $$
#
# | symbol | variable | shape | meaning |
# |---|---|---|---|
# | $x$ | `pixels` | (T, 3, H, W) | frames, spread evenly over the clip |
# | $E$ | `llava.vision_tower` | | SigLIP, frozen |
# | $v$ | `v` | (T, N, V) | features of the N patches of a frame |
# | $P$ | `llava.multi_modal_projector` | | an MLP to the width D of the LLM |
# | $z$ | `z` | (T, R R, D) | tokens of a frame, pooled to a grid of R x R |
# | $t$ | | | tokens of the question |

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import torch
from torch.nn import functional as F

from crab_min.backbones.load import load_model
from crab_min.config import BackboneConfig
from crab_min.data import load_media, read_samples
from crab_min.encoders import MediaFeatures
from crab_min.evaluation.pictures import draw_frames, new_figure, save
from crab_min.side_channels import add_side_channels
from crab_min.world.side_channels import build_side_world

# %% [markdown]
# ## From frames to tokens
#
# The model has LLaVA-OneVision's classes and small random weights, so nothing is downloaded. These
# are the steps one by one, and then the library's call.

# %%
model = load_model(BackboneConfig(backbone="llava_onevision", weights="tiny-random"))
file = build_side_world("", 120, 0, seed=0, names=["fast"])
sample = add_side_channels(read_samples(file, [], "train"), ["fast"])[0]
video, stream = sample.media
frames = load_media(video, model.frame_size)[0]  # (10, 56, 56, 3) uint8


def pool(x, grid, smaller):
    """Resize the square grid of tokens (T, N, D) to (T, smaller * smaller, D)."""
    x = x.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)  # (T, D, grid, grid)
    x = F.interpolate(x, size=(smaller, smaller), mode="bilinear")
    return x.flatten(2).mT  # (T, smaller * smaller, D)


def add_newlines(z, newline):
    """Put the LLM's newline after each row of the grid: (T, R R, D) -> (T, R (R + 1), D)."""
    side = round(z.shape[1] ** 0.5)
    rows = z.unflatten(1, (side, side))  # (T, R, R, D)
    return torch.cat([rows, newline.expand(*rows.shape[:2], 1, -1)], 2).flatten(1, 2)


llava = model.llava
medium = model.encode("video", [frames], [10.0])[0]
with torch.no_grad():
    v = llava.vision_tower(medium.features, output_hidden_states=True).hidden_states[-1]
    z = pool(llava.multi_modal_projector(v), grid=4, smaller=2)  # 56 pixels in patches of 14
    naive = add_newlines(z, llava.image_newline)
    tokens = model.tokens([medium], [0])[0]  # (T R (R + 1), D)
print("v", tuple(v.shape), " z", tuple(z.shape), " with newlines", tuple(naive.shape))
print("the library's tokens", tuple(tokens.shape))
assert torch.allclose(tokens, naive.flatten(0, 1), atol=1e-5)

# %% [markdown]
# ## The same at full size
#
# The released model reads 32 frames of 384 x 384 pixels in patches of 14. `empty=True` builds it
# without weights, on torch's meta device.

# %%
FRAMES = 32
name = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"
large = load_model(BackboneConfig(backbone="llava_onevision", weights=name), empty=True)
pixels = torch.empty(FRAMES, 3, large.frame_size, large.frame_size, device="meta")
patches = (large.frame_size // 14) ** 2
count = large.token_count(MediaFeatures("video", pixels))
print(f"{patches} patches of a frame become {large.grid_side} x {large.grid_side} tokens")
print(f"{FRAMES} frames: {count:,} tokens")

# %% [markdown]
# ## What lies between two frames is lost
#
# In this clip the light flashes: for 0.12 s the picture is a negative. The ten frames do not show
# it. More frames cost tokens: 25 per second would be 52,500 here. PAVE leaves the prompt as it is,
# and adds what a *side channel* knows to the tokens that are there ([next page](31_patch.py)).

# %%
dense = load_media(stream, model.frame_size)[0]  # (250, 16, 16, 3)
brightness = dense.mean((1, 2, 3))
change = abs(brightness[1:] - brightness[:-1])
flash = (change.argmax() + 1) / 25
print(f"{sample.parts[-1].text} At {flash:.2f} s. There is one frame per second.")
top, bottom = (figure := new_figure(8, 2.6)).subplots(2, 1)
draw_frames(top, load_media(video, 96)[0], 10)
top.set(title="10 frames: what the video LLM reads", xticks=[])
bottom.plot([step / 25 for step in range(250)], brightness, lw=1)
bottom.set(title="brightness, 25 frames per second", xlim=(0, 10), xlabel="seconds", yticks=[])
# figure: above, ten frames; below, the flash at 1.7 seconds, which lies between two of them
save(figure, Path("answers/30_video_llm.png"))

# %% [markdown]
# ## Exercises
#
# 1. Half of the frames are half of the prompt. Change `FRAMES = 32` to `FRAMES = 16`; expect
#    `16 frames: 3,360 tokens`.
# 2. Pool before the projector, which is not linear (it has a GELU). Change
#    `pool(llava.multi_modal_projector(v), grid=4, smaller=2)` to
#    `llava.multi_modal_projector(pool(v, grid=4, smaller=2))`; expect `AssertionError`.
