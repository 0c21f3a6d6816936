# %% [markdown]
# # 51. What a training run needs in memory, before it starts
#
# * Code: [plan.py](../crab_min/tools/plan.py): `plan`; [fit.py](../crab_min/tools/fit.py): `fit`
# * Read first: [22](22_native.py)
#
# `python train.py PRESET --plan` builds the recipe's own model without weights, counts, and prints.
# `--fit 24` searches for settings that fit 24 GB. Nothing is downloaded. This page counts by hand.
# The estimates have not been compared with a GPU yet.

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import torch

from crab_min.cli import parse_train
from crab_min.evaluation.figures import COLOURS, new_figure, save
from crab_min.recipes import crab_plus
from crab_min.tools.fit import fit
from crab_min.tools.plan import plan

PRESET = ["crab_plus-3b"]
_, settings = parse_train(PRESET)
result = plan(crab_plus, settings)
print(f"frozen {result.frozen:,}, trained {result.trained:,} parameters")

# %% [markdown]
# ## Bytes per parameter
#
# $$
# M = \underbrace{2 N_f}_{\text{frozen, bf16}} + \underbrace{4 N_t}_{\text{trained}} +
# \underbrace{4 N_t}_{\text{gradients}} + \underbrace{8 N_t}_{\text{AdamW}} + \text{activations}
# $$
#
# | symbol | variable |
# |---|---|
# | $N_f$, $N_t$, frozen and trained parameters | `result.frozen`, `result.trained` |
# | $M$, bytes while training | `memory.training` |
#
# With 4 bits per weight of the LM (NF4) the frozen part shrinks; what learns stays in float32. Here
# a GB is $2^{30}$ bytes; "needed" adds one for CUDA, and a twentieth that is lost between blocks.

# %%
memory = result.memory["bfloat16"]
naive = [2 * result.frozen, 4 * result.trained, 4 * result.trained, 8 * result.trained]
library = [memory.frozen, memory.trained, memory.gradients, memory.optimizer]
assert torch.allclose(torch.tensor(naive).double(), torch.tensor(library).double())
assert memory.training == sum(naive) + memory.activations
for precision, needs in result.memory.items():
    print(f"{precision}: training {needs.training / 2**30:.1f} GB, needed {needs.needed:.1f} GB")

# %% [markdown]
# Activations depend on the longest prompt, the batch and gradient checkpointing; evaluation holds
# the keys and values of a batch of answers. Both are counted by running one layer on tensors
# without values.

# %%
chosen, text = fit(crab_plus, settings, 16)
print(text)

figure = new_figure(7, 2.4)
axes = figure.subplots()
for i, needs in enumerate(result.memory.values()):
    left = 0.0
    for name, colour in zip(
        ("frozen", "trained", "gradients", "optimizer", "activations"), COLOURS
    ):
        size = getattr(needs, name) / 2**30
        axes.barh(i, size, left=left, color=colour, label=name if i == 0 else None)
        left += size
axes.set_yticks(range(len(result.memory)), result.memory)
axes.set(xlabel="GB while training")
axes.legend(ncols=5, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.25), frameon=False)
# figure: memory of a training step of Crab+ 3B by what fills it, with the LM in bf16 and in 4 bits
save(figure, Path("answers/51_memory.png"))

# %% [markdown]
# ## Exercises
#
# 1. The 7B model. Change `PRESET = ["crab_plus-3b"]` to `PRESET = ["crab_plus-7b"]`; expect
#    `trained 682,350,592`. Here `fit` stops: 16 GB are not enough for it.
# 2. What does the rank cost? Change `PRESET = ["crab_plus-3b"]` to
#    `PRESET = ["crab_plus-3b", "--r", "32"]`; expect `trained 12`: about a quarter.
