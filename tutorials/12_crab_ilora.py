# %% [markdown]
# # 12. I-LoRA, from the equation to a trained router
#
# Papers: Crab (arXiv 2503.13068) and Crab+ (2603.04128), Interaction-aware LoRA. Code in
# `crab_min/`: `ilora.py`, `evaluation/routing.py`. A minute on a CPU; the first run builds a world.
#
# LoRA adds one low-rank update to a linear. I-LoRA has several B for one A, weighed anew for every
# token: one head may serve video tokens, another the words of an answer.

# %%
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peft import get_peft_model
from torch import nn
from tqdm import tqdm

from crab_min.backbones.composed import load_base
from crab_min.config import AdapterConfig
from crab_min.data import read_samples
from crab_min.evaluation.pictures import draw_routing
from crab_min.evaluation.routing import routing_stats
from crab_min.features import Features, Mixer
from crab_min.ilora import ILoraConfig, ILoraLinear, loop_form, route
from crab_min.world.folders import WorldConfig, build_world

# %% [markdown]
# ## The equation
#
#     y = W x + (alpha / r) * sum_k w_k B_k A x,     w = softmax(R x)
#
# `loop_form` adds the heads one by one. The layer needs a single product for all of them.

# %%
torch.manual_seed(0)
linear, x = nn.Linear(6, 4, bias=False), torch.randn(2, 6)  # two tokens
layer = ILoraLinear(linear, "default", ILoraConfig(r=2, alpha=4, heads=3, dropout=0.0))
A, R, B = [p["default"].weight for p in (layer.ilora_A, layer.ilora_router, layer.ilora_B)]
assert torch.equal(layer(x), linear(x))  # B is zero at the start: a new adapter changes nothing
nn.init.normal_(B)  # (4, 6): three B of (4, 2) side by side
w = route(x @ R.T)  # (2, 3), each token by itself
assert torch.allclose(layer(x), loop_form(linear(x), x @ A.T, w, B, scaling=4 / 2), atol=1e-6)

# With three equal B the weights do not matter, as they sum to 1: this is LoRA.
B.data[:] = B[:, :2].repeat(1, 3)
assert torch.allclose(layer(x), linear(x) + 4 / 2 * x @ A.T @ B[:, :2].T, atol=1e-5)

# One line makes it an adapter of any Hugging Face model.
adapted = get_peft_model(load_base().llm, ILoraConfig(r=8, heads=3, target_modules="all-linear"))
adapted.print_trainable_parameters()

# %% [markdown]
# ## LoRA against I-LoRA: the same rank, the same batches
#
# The loop in full; later pages call `backward` and `update` of `trainer.py`.

# %%
TASKS = ["a2v", "ks", "avqa", "arig"]
root = build_world(WorldConfig(world_clips=48, world_test=4), seed=0)
train = read_samples(root, TASKS, "train")
features = Features(load_base())  # of the frozen encoders, which both runs share
features.prepare(train)


def batch_of(model, samples):
    prompts = [sample.parts for sample in samples]
    return model.collate(prompts, features(samples), [sample.target for sample in samples])


def train_adapter(adapter):
    torch.manual_seed(0)
    model = load_base()
    model.add_adapter(AdapterConfig(adapter=adapter, r=8, alpha=16, dropout=0.0))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=4e-3, weight_decay=0)
    losses = []
    for _, samples in zip(tqdm(range(30), desc=adapter), Mixer(train, 12, seed=0)):
        # read: prompts and answers as token ids, media as features
        batch = batch_of(model, samples)
        # backward: the gradient of the mean loss per answer token
        loss = model(batch) / batch.answer_tokens
        loss.backward()
        # update: clip the gradient, then a step of the optimizer
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    size = sum(parameter.numel() for parameter in learned)
    print(f"{adapter}: {size:,} parameters, loss per token {losses[0]:.2f}, then {losses[-1]:.2f}")
    return model


train_adapter("lora")
model = train_adapter("ilora")

# %% [markdown]
# Thirty steps cannot say which is better; `python train.py crab_plus-tiny --adapter lora` can.
#
# ## Which head serves which tokens?

# %%
stats = {}
for name in TASKS:
    samples = [sample for sample in train if sample.task.name == name][:16]
    stats[name] = routing_stats(model, [batch_of(model, samples)])
draw_routing(Path("answers/12_crab_ilora.png"), stats)
print("the most one-sided router of each task; all are in answers/12_crab_ilora.png")
for name, task_stats in stats.items():
    _, key = max((weights.max(), key) for key, weights in task_stats.share.items())
    print(name, task_stats.share[key].round(2), *key)

# %% [markdown]
# ## Exercises
#
# 1. Set `heads=1` in `AdapterConfig`. Expect every weight to be 1: the router has no choice.
# 2. Give LoRA `r=18`. Expect about as many parameters as I-LoRA has with `r=8`.
