# %% [markdown]
# # 31. PAVE: a patch for a side channel
#
# Paper: PAVE (arXiv 2503.19794), temporal-aligned cross-attention. Code in `crab_min/`: `pave.py`,
# `side_channels.py`. Half a minute on a CPU; the first run builds a world.
#
# A video LM sees ten frames of a clip, and between two of them the light flashes. A stream of 25
# frames per second has it. The patch lets each frame attend to its own part of the stream, and adds
# what it finds to the frame's tokens. The prompt stays as long as it was.

# %%
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn
from torch.nn import functional as F

from crab_min.backbones.composed import load_base
from crab_min.config import SideChannelConfig
from crab_min.data import load_media, read_samples
from crab_min.evaluation.pictures import draw_frames, new_figure, save
from crab_min.features import Features
from crab_min.interface import prompt_text
from crab_min.pave import partition_steps
from crab_min.side_channels import add_side_channels
from crab_min.world.side_channels import build_side_world

# %% [markdown]
# ## A side channel stands in the prompt behind its video, and has no tokens of its own

# %%
file = build_side_world("", 120, 0, seed=0, names=["fast"])
samples = add_side_channels(read_samples(file, [], "train"), ["fast"])
print(f"{prompt_text(samples[0].parts)} {samples[0].row['options']}")

torch.manual_seed(0)
model = load_base()
media = Features(model)(samples)
video = torch.stack([video.features.float() for video, _ in media])
side = torch.stack([side.features.float() for _, side in media])  # (B, U, S, W)
v = model.visual_qformer.query_states(video)  # (B, T, Q, V)
z = model.visual_qformer.mlp(v)  # (B, T, Q, D), the tokens for the LM

# %% [markdown]
# ## z' = z + g(v, s)
#
# The patch g ends in a LayerNorm with gain and bias zero. So a new patch adds nothing, and in its
# first step only these two have a gradient.

# %%
model.add_side_channel("fast", side.shape[-1], SideChannelConfig(side="fast", width=128))
patch = model.patches["fast"].requires_grad_(True)
patched = z[:1] + patch(v[:1], side[:1])
assert torch.equal(patched, z[:1])
patched.square().sum().backward()
print("with a gradient:", [name for name, p in patch.named_parameters() if p.grad.any()])


# In naive lines: frame k attends to the side steps at its time, N(k). Of 250 these are 25.
def naive_patch(v, side):
    added, weights_of_frames = [], []
    for frame, steps in zip(v, partition_steps(len(side), len(v))):
        x = patch.video(frame)  # (Q, C)
        s = patch.side(side[steps].flatten(0, 1))  # (K, C)
        for block in patch.blocks:
            heads = block.query(x), block.key(s), block.value(s)
            q, k, value = [y.unflatten(-1, (block.heads, -1)).transpose(0, 1) for y in heads]
            weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)  # (heads, Q, K)
            x = x + (weights @ value).transpose(0, 1).flatten(1)
            x = x + block.mlp(block.norm(x))
        added.append(patch.norm(patch.out(x)))
        weights_of_frames.append(weights.mean((0, 1)))
    return torch.stack(added), torch.stack(weights_of_frames)  # (T, Q, D), (T, K)


# %% [markdown]
# ## A linear probe in the place of the LM: in which frame's second does the light flash?
#
# An LM needs more clips and some minutes: `python train.py pave-tiny --side fast --compare-lora`.

# %%
change = (side[:, 1:] - side[:, :-1]).abs().mean((2, 3))  # (B, U - 1), largest at the flash
second = (change.argmax(1) + 1) // 25


def logits_of(probe, i, patched):
    tokens = z[i] + patch(v[i], side[i]) if patched else z[i]
    return probe(tokens.mean(2))[..., 0]  # (B, T)


for patched in (False, True):
    probe = nn.Linear(z.shape[-1], 1)
    optimizer = torch.optim.AdamW([*probe.parameters(), *patch.parameters()], lr=3e-3)
    for _ in range(60):
        chosen = torch.randint(100, (16,))
        optimizer.zero_grad()
        F.cross_entropy(logits_of(probe, chosen, patched), second[chosen]).backward()
        optimizer.step()
    right = logits_of(probe, slice(100, 120), patched).argmax(1) == second[100:]
    print(f"{'z + g(v, s)' if patched else 'z alone'}: {int(right.sum())} of 20 test clips right")

with torch.no_grad():
    naive, weights = naive_patch(v[-1], side[-1])
    assert torch.allclose(patch(v[-1:], side[-1:])[0], naive, atol=1e-4)
frames, stream = [load_media(part, 96)[0] for part in samples[-1].media]
top, middle, bottom = new_figure(10, 4).subplots(3, 1)
draw_frames(top, frames, 10)
middle.plot(stream.mean((1, 2, 3)))  # brightness
bottom.plot(weights.unflatten(1, (25, 4)).sum(2).flatten())  # attention of each frame in its second
save(top.figure, Path("answers/31_patch.png"))

# %% [markdown]
# ## Exercises
#
# 1. Delay the stream: `side = side.roll(25, 1)` behind `second = ...`. Expect no more right than
#    with z alone, since no frame attends to its own second.
# 2. Shuffle the side steps within each second. Expect the same output: attention knows no order.
