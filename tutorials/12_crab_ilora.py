# %% [markdown]
# # 12. Interaction-aware LoRA
#
# * Paper: [Crab](https://arxiv.org/abs/2503.13068), interaction-aware LoRA; the same in Crab+
# * Code: [ilora.py](../crab_min/ilora.py): `ILoraLinear`, `route`, `loop_form`, `stacked_form`
# * Read first: [00](00_one_clip.py)
#
# LoRA adds one low-rank update $B A$ to a frozen linear. I-LoRA has several B, its *heads*, for one
# A, and weighs them anew for every token: one head may serve video tokens, another the words of an
# answer.

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import torch
from peft import get_peft_model
from torch import nn

from crab_min.backbones.composed import load_base
from crab_min.config import AdapterConfig
from crab_min.data import read_samples
from crab_min.evaluation.pictures import new_figure, save
from crab_min.features import Features, Mixer
from crab_min.ilora import ILoraConfig, ILoraLinear, loop_form, route
from crab_min.trainer import collate_answers
from crab_min.world.folders import WorldConfig, build_world

# %% [markdown]
# ## The equation
#
# $$
# y = W x + b + \frac{\alpha}{r} \sum_{k=1}^{K} w_k\, B_k A\, x, \qquad w = \mathrm{softmax}(R x)
# $$
#
# | symbol | variable |
# |---|---|
# | $x$, a token; $W$ and $b$, frozen | `x`: (tokens, 6); `linear`, from 6 to 4 |
# | $A$, shared by the $K$ heads; $r$, its rank | `layer.ilora_A`: (r, 6) |
# | $B_1 \dots B_K$, side by side | `layer.ilora_B`: (4, K r); zero at the start |
# | $R$, the router; $w$, weights that sum to 1 | `layer.ilora_router`: (K, 6); `w`: (tokens, K) |
# | $\alpha / r$, a constant | `4 / 2` here |
#
# Crab has K = 3, r = 8, $\alpha$ = 16; Crab+ has K = 3, r = 128, $\alpha$ = 256. In training a
# dropout stands before A (0.05 and 0.1), not before the router. The naive lines add the heads one
# by one, as `loop_form` does. The layer computes one product for all:
# $\sum_k w_k B_k A x = [B_1 \dots B_K]\,[w_1 A x; \dots; w_K A x]$.

# %%
torch.manual_seed(0)
heads = 3
linear, x = nn.Linear(6, 4), torch.randn(2, 6)  # two tokens
layer = ILoraLinear(linear, "default", ILoraConfig(r=2, alpha=4, heads=heads, dropout=0.0))
A, R, B = [p["default"].weight for p in (layer.ilora_A, layer.ilora_router, layer.ilora_B)]
assert torch.equal(layer(x), linear(x))  # B is zero: a new adapter changes nothing

nn.init.normal_(B)
w = (x @ R.T).softmax(-1)  # (2, heads), each token by itself
naive = linear(x)
for k in range(heads):
    naive = naive + 4 / 2 * w[:, k : k + 1] * (x @ A.T @ B[:, 2 * k : 2 * k + 2].T)
assert torch.allclose(layer(x), naive, atol=1e-6)
assert torch.allclose(loop_form(linear(x), x @ A.T, route(x @ R.T), B, 4 / 2), naive, atol=1e-6)
print("weights of the heads for each token, in percent:", (100 * w).round().int().tolist())

# With equal B the weights do not matter, as they sum to 1: this is LoRA.
B.data[:] = B[:, :2].repeat(1, heads)
assert torch.allclose(layer(x), linear(x) + 4 / 2 * x @ A.T @ B[:, :2].T, atol=1e-5)

# %% [markdown]
# One line makes it an adapter of any Hugging Face model. Crab adapts the seven linears of every
# layer of Llama-2-7b: 45,162,496 parameters. Here it is the LM of the shipped tiny base:

# %%
adapted = get_peft_model(
    load_base().llm, ILoraConfig(r=8, heads=heads, target_modules="all-linear")
)
adapted.print_trainable_parameters()

# %% [markdown]
# ## LoRA against I-LoRA: the same rank, the same batches
#
# Four tasks: matching, actions, questions, boxes ([21](21_interface.py) shows them). Here is the
# loop in full; later pages call `backward` and `update` of `trainer.py`.

# %%
root = build_world(WorldConfig(world_clips=48, world_test=4), seed=0)
train = read_samples(root, ["a2v", "ks", "avqa", "arig"], "train")
features = Features(load_base())  # of the frozen encoders, which both runs share
features.prepare(train)
axes = new_figure(6, 3).subplots()
for adapter in ("lora", "ilora"):
    torch.manual_seed(0)
    model = load_base()
    model.add_adapter(AdapterConfig(adapter=adapter, r=8, alpha=16, heads=heads, dropout=0.0))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=4e-3, weight_decay=0)
    losses = []
    for _, samples in zip(range(20), Mixer(train, 8, seed=0)):
        # read: prompts and answers as token ids, media as features
        batch = collate_answers(model, samples, features(samples))
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
    axes.plot(losses, label=adapter)
axes.set(xlabel="step", ylabel="loss per answer token", xticks=range(0, 20, 4))
axes.legend()
# figure: the loss of LoRA and I-LoRA over 20 steps, too few to say which is better
save(axes.figure, Path("answers/12_crab_ilora.png"))

# %% [markdown]
# What longer runs say, with LoRA of the same size too: [20](20_interference.py).
#
# ## Exercises
#
# 1. One head has no choice. Change `heads = 3` to `heads = 1`; expect `[[100], [100]]`.
# 2. Which rank gives LoRA the size of I-LoRA? Change `(adapter=adapter, r=8, alpha=16` to
#    `(adapter=adapter, r=8 if adapter == "ilora" else 18, alpha=16`; expect
#    `lora: 262,656 parameters`.
