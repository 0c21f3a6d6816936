# %% [markdown]
# # 54. Several GPUs
#
# * Code: [processes.py](../crab_min/runs/processes.py): `add_gradients`, `shard`;
#   [trainer.py](../crab_min/trainer.py): `backward`
# * Read first: [12](12_crab_ilora.py), [51](51_memory.py)
#
#     torchrun --nproc-per-node 2 train.py crab_plus-7b --data labels.csv
#
# Every process takes its share of the batches, and the gradients are summed. What must not change
# is the loss: the mean over all answer tokens, wherever they are. Here one process plays two.

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import torch

from crab_min.backbones.composed import load_base
from crab_min.cli import parse_train
from crab_min.config import AdapterConfig
from crab_min.data import read_samples
from crab_min.evaluation.figures import COLOURS, new_figure, save
from crab_min.features import Features
from crab_min.recipes import crab_plus
from crab_min.tools.plan import plan
from crab_min.trainer import backward, collate_answers, trained_parameters
from crab_min.world.folders import WorldConfig, build_world

# %% [markdown]
# ## The gradient of a step
#
# $$
# L = -\frac{1}{N} \sum_{b} \sum_{i \in b} \log p(y_i), \qquad
# \nabla L = \sum_b \frac{N_b}{N} \nabla L_b \;\ne\; \frac{1}{2} \sum_b \nabla L_b
# $$
#
# | symbol | variable |
# |---|---|
# | $b$, the batch of a process; $N_b$, its answer tokens | `batch`, `batch.answer_tokens` |
# | $N$, answer tokens of the step | `N` |
# | $\nabla L$ | `gradient(batches)` |
#
# One process answers with a word, the other with the long texts of AVVP.

# %%
root = build_world(WorldConfig(world_clips=48, world_test=4), seed=0)
torch.manual_seed(0)
model = load_base()
model.add_adapter(AdapterConfig(r=8, alpha=16, dropout=0.0))
features, batches = Features(model), []
SETS = [("ks", "label"), ("avvp", "reasoning")]
for name, target in SETS:
    samples = read_samples(root, [name], "train", target=target)[:4]
    batches.append(collate_answers(model, samples, features(samples)))
    print(f"{name}: {batches[-1].answer_tokens} answer tokens")


def gradient(batches):
    """Gradient of the mean loss per answer token of some batches, by the library."""
    model.zero_grad()
    backward(model, batches, bf16=False)
    return torch.cat([p.grad.flatten() for p in trained_parameters(model)])


parts = [gradient([batch]) for batch in batches]
N = sum(batch.answer_tokens for batch in batches)
naive = sum(batch.answer_tokens / N * part for batch, part in zip(batches, parts))
whole = gradient(batches)
assert torch.allclose(whole, naive, atol=1e-5)
mean_of_means = (parts[0] + parts[1]) / 2
error = (mean_of_means - whole).norm() / whole.norm()
print(f"the mean of the means is off by {error:.0%} of the gradient's length")

# %% [markdown]
# So `backward` asks all processes for their numbers of tokens first, and then sums. A process whose
# samples have no sound adds zeros for the audio Q-Former.
#
# ## A frozen LM that is too large for one GPU
#
# `shard` gives each process a part of every layer (FSDP2), and gathers a layer when it is computed.
# Of $M = F / n + R$ bytes per GPU only the frozen $F$ shrinks; what learns, $R$, is on each.

# %%
memory = plan(crab_plus, parse_train(["crab_plus-7b"])[1]).memory["bfloat16"]
frozen, rest = memory.frozen / 2**30, (memory.training - memory.frozen) / 2**30
print(f"Crab+ 7B: {frozen:.1f} GB frozen, {rest:.1f} GB for what learns and activations")
counts = [1, 2, 4, 8]
axes = new_figure(6, 2.6).subplots()
axes.bar([str(n) for n in counts], [frozen / n for n in counts], color=COLOURS[1], label="frozen")
bottom = [frozen / n for n in counts]
axes.bar([str(n) for n in counts], rest, bottom=bottom, color=COLOURS[2], label="the rest")
axes.set(xlabel="GPUs", ylabel="GB on each")
axes.legend()
# figure: memory per GPU of a training step of Crab+ 7B; only the frozen LM is spread
save(axes.figure, Path("answers/54_several_gpus.png"))

# %% [markdown]
# ## Exercises
#
# 1. With answers of like length the mean of means is nearly right. Change `("avvp", "reasoning")`
#    to `("ucf", "label")`; expect `is off by 1`: ten percent.
# 2. Weigh the processes equally. Change `naive = sum(batch.answer_tokens / N * part` to
#    `naive = sum(0.5 * part`; expect `AssertionError`.
