# %% [markdown]
# # 23. Two-stage segmentation: box and points, then SAM2
#
# * Paper: [Crab+](https://arxiv.org/abs/2603.04128), segmentation without a mask decoder
# * Code: [answers.py](../crab_min/answers.py): `parse_boxes`;
#   [sam2.py](../crab_min/evaluation/sam2.py): `Sam2`, `box_mask`;
#   [mask_metrics.py](../crab_min/evaluation/mask_metrics.py): `hard`
# * Read first: [13](13_crab_masks.py), [21](21_interface.py)
#
# Crab+ writes a box and three points as text. SAM2, which never learned with it, makes the mask. So
# segmentation is one more text task. SAM2's weights are not in this repository: we stop at what it
# is given, and measure what the box alone is worth.

# %%
import re
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import numpy as np
import torch

from crab_min.answers import GRID
from crab_min.data import gold_mask, load_media, read_samples
from crab_min.evaluation.mask_metrics import hard
from crab_min.evaluation.pictures import RED, YELLOW, draw_box, new_figure, save
from crab_min.evaluation.sam2 import box_mask
from crab_min.recipes.crab import add_mask_tokens
from crab_min.world.folders import WorldConfig, build_world

root = build_world(WorldConfig(world_clips=48, world_test=4), seed=0)
rows = [row for row in add_mask_tokens(read_samples(root, ["s4"], "train")) if row.mask][:24]
sample = rows[0]
text = sample.target.split("<mask")[0]
print(text)

# %% [markdown]
# ## From the text to a prompt for SAM2
#
# Coordinates are whole pixels of the picture at 224 x 224, so a number is a few tokens. The naive
# line is the pattern of the released script; the parser also takes what models write otherwise.

# %%
PATTERN = r"\[(\d+),(\d+)(?:,(\d+),(\d+))?\]"
naive = [tuple(int(x) for x in match if x) for match in re.findall(PATTERN, text)]
((box, points),) = sample.task.parse(text).objects()
assert naive == [tuple(box), *map(tuple, points)]
print("box", box, "points", points)
for other in ("[12, 30, 90, 80]", "[12.4,30.1,90,80]", "[90,80,12,30]"):
    answer = sample.task.parse(other)
    print(f"{other:<18} {len(re.findall(PATTERN, other))} by the pattern; parsed: {answer.boxes}")

# %% [markdown]
# `Sam2().masks(image, [(box, points)])` is the whole second stage.
#
# ## What a box is worth
#
# $$
# \mathcal{J} = \frac{|P \cap G|}{|P \cup G|}, \qquad
# \mathcal{F} = \frac{(1 + \beta^2)\, p\, r}{\beta^2 p + r}, \quad \beta^2 = 0.3
# $$
#
# | symbol | variable |
# |---|---|
# | $P$, the filled box; $G$, the gold mask | `predicted`, `gold`: (H, W) bool |
# | $p$, precision of the pixels; $r$, recall | `precision`, `recall` |

# %%
SHRINK = 0  # pixels that every side of the box moves inwards
masks, golds = [], []
for row in rows:
    answer = row.task.parse(row.target.split("<mask")[0])
    moved = [(a + SHRINK, b + SHRINK, c - SHRINK, d - SHRINK) for a, b, c, d in answer.boxes]
    answer.boxes = moved
    masks.append(box_mask(answer, GRID, GRID))
    golds.append(gold_mask(row, GRID) > 0)
predicted, gold = masks[0], golds[0]
both = (predicted & gold).sum()
precision, recall = both / predicted.sum(), both / gold.sum()
f = 1.3 * precision * recall / (0.3 * precision + recall)
naive = torch.tensor([both / (predicted | gold).sum(), f])
library = hard(np.stack(masks[:1]), np.stack(golds[:1]))
assert torch.allclose(naive, torch.tensor([library["miou"], library["f"]]).double())
print({name: round(value, 2) for name, value in hard(np.stack(masks), np.stack(golds)).items()})

figure = new_figure(8, 2.6)
for axes, row in zip(figure.subplots(1, 4), rows):
    image = load_media(row.media[0], GRID)[0][0]
    axes.imshow(image)
    axes.contour(gold_mask(row, GRID), [0.5], colors=YELLOW)
    for box, points in row.task.parse(row.target.split("<mask")[0]).objects():
        draw_box(axes, box, RED, linewidth=2)
        axes.scatter(*zip(*points), s=12, color="white", edgecolors="black", zorder=3)
    axes.axis("off")
# figure: red boxes and points as the LM writes them; yellow, the gold masks that SAM2 has to find
save(figure, Path("answers/23_sam2.png"))

# %% [markdown]
# So a right box alone has a J far below 1: the second stage is worth the rest. Where an answer has
# neither a box with a point nor three points, the released script leaves it out of the mean; here
# it is scored zero.
#
# ## Exercises
#
# 1. A box that is 12 pixels too small on each side: J falls, and F, which weighs precision more,
#    rises. Change `SHRINK = 0` to `SHRINK = 12`; expect `{'miou': 0.42, 'f': 0.7}`.
# 2. The pattern wants no spaces. Change `"[12, 30, 90, 80]"` to `"[12,30,90,80]"`; expect
#    `1 by the pattern; parsed: [(12, 30, 90, 80)]`.
