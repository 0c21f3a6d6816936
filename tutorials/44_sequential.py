# %% [markdown]
# # 44. CREMA: any modality through one Q-Former
#
# Paper: CREMA (arXiv 2402.05889). Code in `crab_min/`: `crema.py`, `backbones/blip2.py`. Half a
# minute on a CPU; the first run builds a world. A modality brings queries, a norm, a projection and
# low-rank pairs in the frozen Q-Former. All but the video are fused into one stream of tokens.

# %%
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from crab_min.backbones.load import load_model
from crab_min.config import BackboneConfig, ModalityConfig
from crab_min.crema import EarlyExit
from crab_min.data import read_samples
from crab_min.encoders import register
from crab_min.evaluation.pictures import new_figure, save
from crab_min.features import Features
from crab_min.side_channels import add_side_channels
from crab_min.world.rendering import Renderer
from crab_min.world.side_channels import build_side_world, make_show

# %% [markdown]
# ## An encoder of one's own: `register` makes its name a modality of every video
#
# `draw` can be a depth-estimation pipeline of transformers; here brightness stands for depth.


# %%
class DepthEncoder(torch.nn.Module):
    """Frames (1, T, H, W, 3) -> features (1, T, S, width) of their depth, drawn in grey."""

    def __init__(self, draw, vision):
        super().__init__()
        self.draw, self.vision, self.width = draw, vision, vision.width

    def forward(self, frames):
        grey = torch.stack([self.draw(frame) for frame in frames[0]])  # (T, h, w) uint8
        return self.vision(grey[None, ..., None].expand(-1, -1, -1, -1, 3))


torch.manual_seed(0)
model = load_model(BackboneConfig(backbone="blip2"))  # the tiny base; one Q-Former for all
register("own_depth", DepthEncoder(lambda frame: frame.float().mean(-1).byte(), model.vision))
SIDES = ["flow", "depth", "own_depth"]  # a thing trembles, one is near; the video shows neither
file = build_side_world("", 120, 0, seed=0, names=SIDES[:2], together=True)
samples = add_side_channels(read_samples(file, [], "train")[:104:2], SIDES)
media = model.collate([s.parts for s in samples], Features(model)(samples)).media
model.configure(ModalityConfig(fusion="add", modality_rank=16))
for name, side in media[0].sides.items():
    model.add_side_channel(name, width=side.features.shape[-1])
assert not model.fusion.linear.weight.any()  # new modalities change no token, and add none
gold = torch.zeros(len(media), 10, 2)  # of each second: does it tremble, is it near?
for clip in range(len(media)):
    scene, marked = make_show(Renderer(), "train", clip, seed=0)
    for column, name in enumerate(SIDES[:2]):
        gold[clip, slice(*scene.objects[marked[name]].seen[0]), column] = 1

# %% [markdown]
# ## Modality-sequential training, with a linear probe in the place of the LM
#
#     y = W x + b + B_m A_m x                     modality-adaptive modules (MMQA)
#     Z = sigmoid(F) * F, F = W [Z_1; ...] + b    self-gated fusion
#     g_e > tau * mean(g_0 .. g_(e-1))            early exit after epoch e >= 5, g_e a gradient norm
#
# A tau of 0.7 shows an exit; with the LM: `python train.py crema-tiny --modality-sequential`.


# %%
def logits_of(model, probe, media):
    tokens = torch.stack(model.tokens(media, [0] * len(media)))  # (B, T Q, D)
    return probe(tokens.unflatten(1, (10, -1)).mean(2))  # (B, T, 2)


probe, exits = torch.nn.Linear(192, 2), EarlyExit(["rgb", *SIDES], threshold=0.7)
optimizer = torch.optim.AdamW([*probe.parameters(), *model.parameters()], lr=2e-3)
for step in range(14):  # two make an epoch
    chosen = torch.randperm(32)[:16]
    with model.frozen_tokens():  # tokens of modalities that do not learn are computed once
        for name in exits.live:
            model.set_active_modalities([name])
            logits = logits_of(model, probe, [media[i] for i in chosen])
            torch.nn.BCEWithLogitsLoss()(logits, gold[chosen]).backward()
            exits.add_norm(name, model.gradient_norm(name))
            optimizer.step()
            optimizer.zero_grad()
    exits.end_step(last=step % 2 == 1)
for kept in ([], ["flow"], ["depth"], SIDES):
    clips = [replace(m, sides={name: m.sides[name] for name in kept}) for m in media[32:]]
    second = logits_of(model, probe, clips).argmax(1)  # (B, 2)
    trembles, near = gold[32:].gather(1, second[:, None]).mean((0, 1))
    print(f"rgb {kept}: found in new clips {trembles:.2f} that tremble, {near:.2f} that are near")

# The three equations in naive lines
linear = model.multimodal.adapted_linears()[0]
A, B, x = linear.A["flow"].weight, linear.B["flow"].weight, torch.randn(3, 128)
linear.modality = "flow"  # as in the Q-Former's forward
assert torch.allclose(linear(x), linear.base(x) + x @ A.T @ B.T, atol=1e-5)
Z = {name: torch.randn(4, 192) for name in SIDES}
F = model.fusion.linear(torch.cat(list(Z.values()), -1))
assert torch.allclose(model.fusion(Z), F.sigmoid() * F, atol=1e-6)
axes = new_figure(6, 3).subplots()
for name, norms in exits.norms.items():
    grown = [e for e in range(5, len(norms)) if norms[e] > 0.7 * sum(norms[:e]) / e]
    assert exits.exit_epochs.get(name) == next(iter(grown), None)
    axes.plot(norms, label=f"{name} exits after epoch {grown[0]}" if grown else name)
axes.legend()
save(axes.figure, Path("answers/44_sequential.png"))

# %% [markdown]
# ## Exercises
#
# 1. Train jointly: one update per batch, `set_active_modalities(exits.live)`. Expect that table.
# 2. Set `model.skipped_modalities = {"flow"}` before the table: A and B of flow are left out, as
#    CREMA does zero-shot. Expect no loss: its queries and projection are enough for these clips.
