# %% [markdown]
# # 52. A modality of your own
#
# * Code: [encoders.py](../crab_min/encoders.py): `register`;
#   [side_channels.py](../crab_min/side_channels.py): `add_side_channels`
# * Read first: [11](11_crab_branches.py), [31](31_patch.py)
#
# An encoder is any module with a `width` that maps frames (1, T, H, W, 3), sound or numbers to
# features (1, T, S, width). `register` gives it a name, and that name is a side channel of every
# video, for PAVE's patch and for CREMA's Q-Former alike. Ours has no weights: edges in the picture.

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import torch
from torch.nn import functional as F

from crab_min.backbones.composed import load_base
from crab_min.config import AdapterConfig, SideChannelConfig
from crab_min.data import load_media, read_samples
from crab_min.encoders import register
from crab_min.evaluation.figures import new_figure, save
from crab_min.features import Features
from crab_min.side_channels import add_side_channels
from crab_min.trainer import backward, collate_answers
from crab_min.world.folders import WorldConfig, build_world

# %% [markdown]
# ## The encoder
#
# $$
# s_{t,p} = \frac{1}{|p|} \sum_{i,j \in p}
# \big( |x_{i+1,j} - x_{i,j}|,\; |x_{i,j+1} - x_{i,j}| \big)
# $$
#
# with $x$ the grey picture of frame $t$ and $p$ one of `GRID` x `GRID` cells.

# %%
GRID = 6


class EdgeEncoder(torch.nn.Module):
    """Frames (1, T, H, W, 3) uint8 -> features (1, T, GRID^2, 2): edges down and to the right."""

    width = 2

    def forward(self, frames):
        grey = frames[0].float().mean(-1) / 255  # (T, H, W)
        down = F.pad(grey.diff(dim=1), (0, 0, 0, 1)).abs()  # (T, H, W)
        right = F.pad(grey.diff(dim=2), (0, 1)).abs()
        cells = F.adaptive_avg_pool2d(torch.stack([down, right], 1), GRID)  # (T, 2, GRID, GRID)
        return cells.flatten(2).mT[None]  # (1, T, GRID^2, 2)


register("edges", EdgeEncoder())

# %% [markdown]
# ## In a model
#
# The channel stands in the prompt behind its video. Rows of a `.jsonl` may name a file for it under
# `sides`; without one it gets the video itself.

# %%
root = build_world(WorldConfig(world_clips=48, world_test=4), seed=0)
samples = add_side_channels(read_samples(root, ["ave"], "train")[:4], ["edges"])
torch.manual_seed(0)
model = load_base()
features = Features(model)
media = features(samples)
edges = media[0][1]  # behind its video
(frames, _) = load_media(samples[0].media[0], model.frame_size)
naive = torch.zeros(GRID, GRID)
size = len(frames[0]) // GRID
x = torch.from_numpy(frames[0]).float().mean(-1) / 255  # the first frame, (H, W)
for i in range(GRID):
    for j in range(GRID):
        rows, columns = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
        below = torch.cat([x[1:], x[-1:]])[rows, columns]
        naive[i, j] = (below - x[rows, columns]).abs().mean()
assert torch.allclose(naive.flatten(), edges.features[0, :, 0].float(), atol=2e-3)
print("features of the channel:", tuple(edges.features.shape))

model.add_adapter(AdapterConfig(adapter="lora", r=8, alpha=16, dropout=0.0))
batch = collate_answers(model, samples, media)
before = model(batch).item()
model.add_side_channel("edges", EdgeEncoder.width, SideChannelConfig(side="edges", width=64))
model.patches.requires_grad_(True)
batch = collate_answers(model, samples, media)
after = model(batch).item()
print(f"summed loss {before:.3f} without, {after:.3f} with a new patch: it adds nothing yet")
backward(model, [batch], bf16=False)
moved = [
    name for name, p in model.patches.named_parameters() if p.grad is not None and p.grad.any()
]
print("with a gradient:", moved)

figure = new_figure(7, 2.4)
left, middle, right = figure.subplots(1, 3)
left.imshow(frames[0])
left.set_title("frame")
for axes, channel, title in ((middle, 0, "edges downwards"), (right, 1, "edges to the right")):
    axes.imshow(edges.features[0, :, channel].float().view(GRID, GRID), cmap="magma")
    axes.set_title(title)
for axes in figure.axes:
    axes.axis("off")
# figure: a frame, and what the encoder makes of it: edges downwards, edges to the right
save(figure, Path("answers/52_new_modality.png"))

# %% [markdown]
# Rows of your own may name a file for the channel; see [data.md](../docs/data.md).
#
# ## Exercises
#
# 1. A finer grid has more features per frame. Change `GRID = 6` to `GRID = 8`; expect
#    `(10, 64, 2)`.
# 2. An encoder without a width is refused. Change `    width = 2` to `    size = 2`; expect
#    `ModelError`.
