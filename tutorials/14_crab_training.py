# %% [markdown]
# # 14. Training: align each branch, then all tasks, then masks
#
# * Paper: [Crab](https://arxiv.org/abs/2503.13068), training stages
# * Code: [recipes/crab.py](../crab_min/recipes/crab.py): `train`, `keep_modality`, `train_masks`;
#   [trainer.py](../crab_min/trainer.py): `rate_factor`, `fit`
# * Read first: [11](11_crab_branches.py), [12](12_crab_ilora.py), [13](13_crab_masks.py)
#
# A new connector gives the LM noise. So Crab first teaches each branch alone to be understood, with
# the LM frozen: captions of videos, captions of sounds. Only then does I-LoRA learn, on all tasks.

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import math

import torch

from crab_min.cli import parse_train
from crab_min.data import read_samples
from crab_min.evaluation.figures import new_figure, save
from crab_min.interface import prompt_text
from crab_min.recipes import crab
from crab_min.tools.plan import count_parts
from crab_min.trainer import rate_factor
from crab_min.world.folders import WorldConfig, build_world

# %% [markdown]
# ## The same row in each stage
#
# The paper aligns the visual branch on Video-LLaVA's data, the audio branch on AudioCaps, and the
# segmentation branch on LVIS; the last is not in this repository. Then come five epochs of AV-UIE.
# Below, `avcap` is captioning, and "language model" its embeddings: the tiny base learns new words.

# %%
RANK = "16"
root = build_world(WorldConfig(world_clips=48, world_test=4), seed=0)
for stage in ("visual", "audio", "unified", "masks"):
    _, settings = parse_train(["crab-tiny", "--stage", stage, "--r", RANK])
    settings = crab.run_settings(settings)
    model = crab.load_model(settings)
    crab.add_trained_parts(model, settings)
    model.set_trainable(settings.training.parts)
    learns = {name: count.trained for name, count in count_parts(model).items() if count.trained}
    print(f"\n{stage}: tasks {settings.data.tasks}")
    print("  learns", ", ".join(f"{name} {size:,}" for name, size in learns.items()))
    task = "s4" if stage == "masks" else "avcap"
    (sample, *_) = crab.prepare_samples(read_samples(root, [task], "train"), settings)
    print("  " + prompt_text(sample.parts).replace("\n", "\n  "))
    print("  ->", sample.target)

# %% [markdown]
# ## The learning rate
#
# AdamW; in every stage a linear warm-up over the first $w = 3$ % of the steps, then a cosine:
#
# $$
# \eta_t = \eta \cdot \min\Big( \frac{t + 1}{r},\; \frac{1}{2}
# \Big(1 + \cos \frac{\pi (t - r)}{N - r}\Big) \Big), \qquad r = w N
# $$
#
# | symbol | variable |
# |---|---|
# | $t$, $N$, step and steps | `t`, `STEPS` |
# | $r$, steps of the warm-up | `rise` |

# %%
STEPS, WARMUP = 400, 0.03
rise = round(STEPS * WARMUP)
naive = []
for t in range(STEPS):
    cosine = 0.5 * (1 + math.cos(math.pi * max(0, t - rise) / (STEPS - rise)))
    naive.append(min((t + 1) / rise, cosine))
library = [rate_factor(t, STEPS, WARMUP) for t in range(STEPS)]
assert torch.allclose(torch.tensor(naive), torch.tensor(library))
print(f"largest at step {1 + library.index(max(library))} of {STEPS}")

axes = new_figure(6, 2.6).subplots()
axes.plot(library)
axes.set(xlabel="step", ylabel="factor on the learning rate")
# figure: the factor on the learning rate over the steps of a stage
save(axes.figure, Path("answers/14_crab_training.png"))

# %% [markdown]
# Each stage is a run of its own that starts from the one before:
#
#     python train.py crab-tiny --stage visual
#     python train.py crab-tiny --stage audio
#     python train.py crab-tiny --stage unified
#     python train.py crab-tiny --stage masks
#
# ## Exercises
#
# 1. Half of the steps for the warm-up. Change `WARMUP = 400, 0.03` to `WARMUP = 400, 0.5`; expect
#    `largest at step 200`.
# 2. Half the rank of I-LoRA. Change `RANK = "16"` to `RANK = "8"`; expect
#    `adapter in the language model 263,680`.
