# %% [markdown]
# # 44. Modality-sequential training and early exit
#
# * Paper: [CREMA](https://arxiv.org/abs/2402.05889), modality-sequential training, early exit
# * Code: [crema.py](../crab_min/recipes/crema.py): `SequentialStep`; `EarlyExit`
# * Read first: [43](43_fusion.py)
#
# Every batch gives one update per modality, of its own parameters $\theta_m$ and of the fusion
# $\phi$, so that the modalities do not disturb each other:
#
# $$ (\theta_m, \phi) \leftarrow (\theta_m, \phi) - \eta \nabla_{\theta_m, \phi} L, \quad m \le M $$
#
# They need different amounts of training. One exits at the end of epoch $e \ge 5$ (the first is 0)
# if its gradient has grown beyond $\tau$ times its mean so far. It is still encoded and fused, and
# learns no more:
#
# $$ g_e > \tau \cdot \frac{1}{e} \sum_{i < e} g_i $$
#
# | symbol | variable |
# |---|---|
# | $\theta_m$, $\phi$ | `model.modality_parameters(m)`, which contain those of `model.fusion` |
# | $\eta$, $L$, $M$ | learning rate, loss, modalities with the video |
# | $g_e$ | `exits.norms[m][e]`, norm of the gradient of $A_m, B_m$ ([42](42_mmqa.py)), by epoch |
# | $\tau$ | `TAU`; in the paper's scripts 1.8, and 1.4 for MUSIC-AVQA |
#
# $g_e$ is the mean over the steps of an epoch; the released code keeps the last step's, by a slip.

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

from dataclasses import replace

import torch

from crab_min.backbones.load import load_model
from crab_min.config import BackboneConfig, ModalityConfig
from crab_min.crema import FIRST_EXIT, EarlyExit
from crab_min.data import read_samples
from crab_min.evaluation.pictures import draw_exits, new_figure, save
from crab_min.features import Features
from crab_min.side_channels import add_side_channels
from crab_min.world.rendering import Renderer
from crab_min.world.side_channels import build_side_world, make_show

# %% [markdown]
# ## A task that needs two modalities
#
# In each clip a thing trembles, and one is near. Flow and depth show it, the video does not.

# %%
SIDES = ["flow", "depth"]
file = build_side_world("", 120, 0, seed=0, names=SIDES, together=True)
samples = add_side_channels(read_samples(file, [], "train")[:104:2], SIDES)  # two rows per clip
torch.manual_seed(0)
model = load_model(BackboneConfig(backbone="blip2"))  # the tiny base; one Q-Former for all
media = model.collate([s.parts for s in samples], Features(model)(samples)).media
model.configure(ModalityConfig(fusion="add", modality_rank=16))
for name in SIDES:
    model.add_side_channel(name, width=media[0].sides[name].features.shape[-1])
gold = torch.zeros(len(media), 10, 2)  # of each second: does it tremble, is it near?
for clip in range(len(media)):
    scene, marked = make_show(Renderer(), "train", clip, seed=0)
    for column, name in enumerate(SIDES):
        gold[clip, slice(*scene.objects[marked[name]].seen[0]), column] = 1

UPDATED = "flow"
model.set_active_modalities([UPDATED])
learning = [p.numel() for p in model.parameters() if p.requires_grad]
print(f"an update of {UPDATED}: {sum(learning):,} parameters")

# %% [markdown]
# ## The loop, with a linear probe in the place of the LLM
#
# $\tau$ is 0.7 to show exits within seconds. A step takes one batch and updates each live modality
# once, with the whole model's loss. A video without a side modality has zeros for it.

# %%
TAU = 0.7
probe, exits = torch.nn.Linear(192, 2), EarlyExit(["rgb", *SIDES], threshold=TAU)
optimizer = torch.optim.AdamW([*probe.parameters(), *model.parameters()], lr=2e-3)


def logits_of(media):
    tokens = torch.stack(model.tokens(media, [0] * len(media)))  # (B, T Q, D)
    return probe(tokens.unflatten(1, (10, -1)).mean(2))  # (B, T, 2)


for step in range(14):  # two make an epoch
    chosen = torch.randperm(32)[:16]
    with model.frozen_tokens():  # tokens of modalities that do not learn are computed once
        for name in exits.live:
            model.set_active_modalities([name])
            logits = logits_of([media[i] for i in chosen])
            torch.nn.BCEWithLogitsLoss()(logits, gold[chosen]).backward()
            exits.add_norm(name, model.gradient_norm(name))
            optimizer.step()
            optimizer.zero_grad()
    exits.end_step(last=step % 2 == 1)
print("learning until the end:", ", ".join(exits.live))

for kept in ([], ["flow"], ["depth"], SIDES):
    clips = [replace(m, sides={name: m.sides[name] for name in kept}) for m in media[32:]]
    second = logits_of(clips).argmax(1)  # (B, 2)
    trembles, near = gold[32:].gather(1, second[:, None]).mean((0, 1))
    print(f"rgb {kept}: found in new clips {trembles:.2f} that tremble, {near:.2f} that are near")

# the rule and the norm in naive lines
for name, norms in exits.norms.items():
    grown = [e for e in range(FIRST_EXIT, len(norms)) if norms[e] > TAU * sum(norms[:e]) / e]
    assert exits.exit_epochs.get(name) == (grown[0] if TAU and grown else None)
model.set_active_modalities(["depth"])
logits_of(media[:4]).sum().backward()
named = model.multimodal.parameters_of("depth").items()
gradients = [p.grad.flatten() for key, p in named if ".A." in key or ".B." in key]
assert torch.allclose(torch.cat(gradients).norm(), torch.tensor(model.gradient_norm("depth")))
draw_exits((figure := new_figure(7, 3.5)).subplots(), exits)
# figure: gradient norm by epoch; dashed, tau times the mean before; a circle: above it, so it exits
save(figure, Path("answers/44_sequential.png"))

# %% [markdown]
# Each side modality finds its own thing, and the two do not disturb each other. Whether the order
# pays is another question: with the LLM and five modalities of our world, training in sequence had
# 0.55 where joint training had 0.875 in the same time
# ([results](../docs/results.md#crema-on-the-tiny-base)).
#
# ## Exercises
#
# 1. Without a threshold none exits. Change `TAU = 0.7` to `TAU = 0.0`; expect
#    `learning until the end: rgb, flow, depth`.
# 2. How many parameters does the video bring? Change `UPDATED = "flow"` to `UPDATED = "rgb"`;
#    expect `update of rgb: 153,152 parameters`: as many as flow, whose features are as wide.
