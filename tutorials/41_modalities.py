# %% [markdown]
# # 41. Modalities and their encoders
#
# * Paper: [CREMA](https://arxiv.org/abs/2402.05889), multimodal encoders; augmentation of a video
# * Code: [arrays.py](../crab_min/media/arrays.py): `point_code`;
#   [flow.py](../crab_min/media/flow.py); [encoders.py](../crab_min/encoders.py): `register`
# * Read first: [40](40_qformer.py)
#
# CREMA answers from any signal of a video. Some are recorded, some are estimated from its frames:
#
# | modality | in the paper | encoder there | in our world |
# |---|---|---|---|
# | video `rgb` | 4 frames | ViT-g of BLIP-2 | 10 frames, a small CLIP |
# | `flow`, `depth`, `normals` | UniMatch, ZoeDepth, Bae's normals | ViT-g, pictures | exact maps |
# | `thermal`, `touch` | a thermal camera, GelSight | ViT-g, pictures | exact maps |
# | `audio` | the clip's sound | BEATs | a small BEATs |
# | `points` | features of 3D-LLM | a code of the place is added | the code alone |
#
# Pictures of flow $(u, v)$ have the direction as hue and the length as saturation. A 3D point has
# its features $f$ and sines and cosines of its whole-numbered place, for even $i < n = W / 3$:
#
# $$ \mathrm{hue} = \frac{\mathrm{atan2}(v, u)}{2 \pi} \bmod 1, \qquad
#    s = f + 0.01 \big[ \sin(x / 10000^{i/n}), \cos(x / 10000^{i/n}), \dots \big]_{x, y, z} $$
#
# | symbol | variable | shape |
# |---|---|---|
# | $u, v$ | `MOTION`, in parts of the picture's width | right and down |
# | $x, y, z$ | `xyz` | (U, N, 3), N points in each of U steps |
# | $s$ | `code` | (U, N, W) |

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import colorsys

import numpy as np
import torch

from crab_min.backbones.load import load_model
from crab_min.config import BackboneConfig
from crab_min.data import read_samples
from crab_min.encoders import register
from crab_min.evaluation.pictures import draw_channels
from crab_min.features import Features
from crab_min.media.arrays import point_code, read_points
from crab_min.media.flow import FULL_COLOUR, flow_pictures
from crab_min.side_channels import add_side_channels
from crab_min.world.side_channels import build_side_world

# %% [markdown]
# ## One clip, eight signals
#
# In this clip each signal singles out one thing, and the video does not show which: it trembles in
# the flow, is near in the depth (red), turned aside in the normals, hot, rough, heard, or high up.
#
# An encoder of one's own is one line: `register` makes its name a modality of every video. This one
# takes brightness for depth; `draw` can be a depth-estimation pipeline of transformers.


# %%
class DepthEncoder(torch.nn.Module):
    """Frames (1, T, H, W, 3) -> features (1, T, S, width) of their depth, drawn in grey."""

    def __init__(self, draw, vision):
        super().__init__()
        self.draw, self.vision, self.width = draw, vision, vision.width

    def forward(self, frames):
        grey = torch.stack([self.draw(frame) for frame in frames[0]])  # (T, h, w) uint8
        return self.vision(grey[None, ..., None].expand(-1, -1, -1, -1, 3))


NAMES = ["flow", "depth", "normals", "thermal", "touch", "audio", "points"]
model = load_model(BackboneConfig(backbone="blip2"))  # the tiny base; one Q-Former for all
register("own_depth", DepthEncoder(lambda frame: frame.float().mean(-1).byte(), model.vision))
file = build_side_world("", 120, 0, seed=0, names=NAMES, together=True)
rows = read_samples(file, [], "train")[:1]
sample, own = [add_side_channels(rows, names)[0] for names in (NAMES, [*NAMES, "own_depth"])]
for part, medium in zip(own.media, Features(model)([own])[0]):
    print(f"{part.side or 'rgb'}: {part.kind}, (U, S, W) = {tuple(medium.features.shape)}")
xyz, _ = read_points(next(part.path for part in sample.media if part.side == "points"))
# figure: a clip and its signals by second; each but the video singles out one thing
draw_channels(Path("answers/41_modalities.png"), sample, {"points: height": xyz[..., 2].mean(1)})

# %% [markdown]
# ## Flow as a colour, and the code of a point, in naive lines

# %%
MOTION = (0.03, 0.0)  # to the right
picture = flow_pictures(np.array(MOTION).reshape(1, 1, 1, 2))[0, 0, 0]
hue = np.arctan2(MOTION[1], MOTION[0]) / (2 * np.pi) % 1
colour = colorsys.hsv_to_rgb(hue, min(1, np.hypot(*MOTION) / FULL_COLOUR), 1)
assert np.allclose(picture, np.round(255 * np.array(colour)))
print("colour of the motion:", picture.tolist())

WIDTH = 96
code = point_code(xyz, np.zeros((*xyz.shape[:2], WIDTH)))  # features f of zero
n = WIDTH // 3
naive = []
for coordinate in xyz[0, 0]:  # of the first point
    for i in range(0, n, 2):
        angle = coordinate / 10000 ** (i / n)
        naive += [0.01 * np.sin(angle), 0.01 * np.cos(angle)]
assert torch.allclose(torch.tensor(code[0, 0]), torch.tensor(naive).float(), atol=1e-6)
print(f"a point: {len(naive)} numbers, {n} per axis")

# %% [markdown]
# ## Exercises
#
# 1. Motion downwards has another hue. Change `(0.03, 0.0)` to `(0.0, 0.03)`; expect
#    `[194, 255, 133]`.
# 2. A wider code. Change `WIDTH = 96` to `WIDTH = 192`; expect `192 numbers, 64 per axis`.
