# %% [markdown]
# # 20. Task heterogeneity and negative transfer
#
# * Paper: [Crab+](https://arxiv.org/abs/2603.04128), the problem and the claim
# * Code: [transfer.py](../benchmarks/transfer.py): `differences`, `shares`
# * Read first: [12](12_crab_ilora.py)
#
# Negative transfer: a model trained on all tasks is worse at one than a model of that task alone.
# Crab+ reports that nearly 55 % of tasks degrade with ordinary LoRA, and that nearly 88 % gain with
# its method. This page shows how such a number is made, on a study in our small world.

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import json

import numpy as np
import torch

from crab_min.answers import Answer
from crab_min.evaluation.figures import GREY, RED, TEAL, new_figure, save
from crab_min.model import ASSETS
from crab_min.tasks import TASKS

sys.path.append(str(ASSETS.parents[1] / "benchmarks"))
from transfer import TaskScores, differences, shares

# %% [markdown]
# ## Heterogeneity: one clip, many kinds of answers
#
# All folders of AV-UIE v2 by media, kind of task, and form of the label. All share one adapter.

# %%
families = {}
for task in TASKS.values():
    if task.v2:
        kinds = dict.fromkeys(medium.kind for medium in task.media)
        key = f"{' and '.join(kinds)}, {task.family} -> {task.form.name}"
        families.setdefault(key, []).append(task.name)
for key, names in families.items():
    print(f"{key:<42} {', '.join(names)}")

# %% [markdown]
# ## The measure
# $$
# \Delta_t = s_t^{\text{joint}} - s_t^{\text{alone}}, \qquad
# \text{share that loses} = \frac{1}{T} \, \big|\{ t : \text{the 95 \% interval of } \Delta_t
# \text{ is below } 0 \}\big|
# $$
#
# | symbol | variable |
# |---|---|
# | $s_t$, metric of task t on its test rows | `row["joint"]`, `row["single"]` |
# | $\Delta_t$ and its interval | `row["difference"]`, `row["low"]`, `row["high"]` |
#
# A task loses or gains only if chance in the choice of test rows does not explain it; the paper
# names no such interval. A bootstrap draws test rows again and again, the same for both models. In
# naive lines:

# %%
rng = np.random.default_rng(1)
gold = rng.integers(4, size=200)
alone = np.where(rng.random(200) < 0.6, gold, 3 - gold)  # right with probability 0.6
joint = np.where(rng.random(200) < 0.7, gold, 3 - gold)

draws, rng = [], np.random.default_rng(0)
for _ in range(300):
    rows = rng.integers(200, size=200)
    draws.append((joint == gold)[rows].mean() - (alone == gold)[rows].mean())
naive = np.percentile(draws, [2.5, 97.5])

answers = [[Answer(choice=str(x)) for x in labels] for labels in (gold, alone, joint)]
before, after = [TaskScores(TASKS["ks"], answers[0], [arm]) for arm in answers[1:]]
library = differences(before, after, 300)["accuracy"]
interval = torch.tensor([library["low"], library["high"]])
assert torch.allclose(torch.tensor(naive).float(), interval.float(), atol=1e-6)
print(f"{library['difference']:+.3f}, 95 %: {naive[0]:+.3f} to {naive[1]:+.3f}", library["verdict"])

# %% [markdown]
# ## The study
#
# `python benchmarks/transfer.py` trained each of the 16 tasks alone and all together, with three
# seeds, and wrote [transfer.json](../docs/figures/transfer.json), which
# [results.md](../docs/results.md) shows. Per task both arms learn from the same 128 samples once.

# %%
study = json.loads(
    (ASSETS.parents[1] / "docs" / "figures" / "transfer.json").read_text(encoding="utf-8")
)
METHOD = "lora"
tables = {}
for target in ("reasoning", "label"):
    result = study[f"{METHOD}, {target}"]
    table = {name: table[TASKS[name].metric] for name, table in result["tasks"].items()}
    verdicts = shares([row["verdict"] for row in table.values()])
    assert verdicts == result["share of tasks"]
    plain = np.mean([row["difference"] < 0 for row in table.values()])
    print(f"{METHOD}, {target}: {verdicts['loss']:.1%} lose, {verdicts['gain']:.1%} gain;", end=" ")
    print(f"without the interval {plain:.1%} lose")
    tables[target] = table
figure = new_figure(8, 4)
for axes, (target, table) in zip(figure.subplots(1, 2, sharey=True), tables.items()):
    colour = {"gain": TEAL, "loss": RED, "tie": GREY}
    for i, row in enumerate(table.values()):
        axes.plot([row["low"], row["high"]], [i, i], color=colour[row["verdict"]])
        axes.plot(row["difference"], i, "o", color=colour[row["verdict"]])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(table)), table)
    axes.set(title=f"learns {target}", xlabel="joint minus alone", xlim=(-0.4, 0.5))
# figure: joint minus alone by task with its 95 % interval; green gains, red loses, grey is a tie
save(figure, Path("answers/20_interference.png"))

# %% [markdown]
# Here joint training helps most tasks if they learn explicit reasoning, fewer if they learn labels:
# the direction of the papers' claim. Nothing near 55 % of the tasks loses.
#
# ## Exercises
#
# 1. Does I-LoRA avoid losses that LoRA has? Change `METHOD = "lora"` to `METHOD = "ilora"`; expect
#    `ilora, label: 6.2% lose`, the same share as with LoRA.
# 2. An interval from ten rows proves nothing. Change `rows = rng.integers(200, size=200)` to
#    `rows = rng.integers(10, size=10)`; expect `AssertionError`.
