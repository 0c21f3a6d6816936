# %% [markdown]
# # 32. Side channels: sound, 3D, another camera, more frames
#
# * Paper: [PAVE](https://arxiv.org/abs/2503.19794), the tasks with a side channel each
# * Code: [side_channels.py](../crab_min/side_channels.py): `add_side_channels`; `encode_side`
# * Read first: [31](31_patch.py)
#
# One patch fits any second signal of a clip. It only has to become side tokens with time in front:
#
# $$ s = E_s(\mathrm{signal}) \in \mathbb{R}^{U \times S \times W} $$
#
# | channel | released $E_s$ | (U, S, W) there | here |
# |---|---|---|---|
# | sound | ImageBind, a step per second | (59, 1, 1024) | `audio`, BEATs: (10, 48, 128) |
# | 3D | LLaVA-3D on 32 frames with depth | (32, 576, 1024) | `depth`, pictures: (10, 144, 128) |
# | other cameras | SigLIP, 4 cameras in turn | (128, 196, 1152) | `view`: (10, 144, 128) |
# | more frames | LanguageBind, 2 per second | (240, 4, 1024) | `fast`, pixels: (250, 4, 192) |

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import torch
from torch import nn

from crab_min.backbones.composed import load_base
from crab_min.config import SideChannelConfig
from crab_min.data import load_media, read_samples
from crab_min.encoders import encode_side
from crab_min.evaluation.pictures import draw_channels
from crab_min.features import Features
from crab_min.pave import interpolate_time
from crab_min.side_channels import add_side_channels
from crab_min.world.side_channels import build_side_world

# %% [markdown]
# ## Four channels of one clip, each of which marks one thing; the video shows no marks

# %%
CHANNELS = ["audio", "depth", "view", "fast"]
file = build_side_world("", 120, 0, seed=0, names=CHANNELS, together=True)
rows = read_samples(file, [], "train")[:: len(CHANNELS)][:80]  # a row per channel
sample = add_side_channels(rows[:1], CHANNELS)[0]
torch.manual_seed(0)
model = load_base()
features = Features(model)
for part, side in zip(sample.media[1:], features([sample])[0][1:]):
    print(f"{part.side}: (U, S, W) = {tuple(side.features.shape)}")

# %% [markdown]
# ## In naive lines: a dense stream, and a channel of few steps
#
# A small frame of the stream gives four tokens, its quarters, relative to the mean of the clip. A
# channel with fewer steps than the video has frames is interpolated to one step per frame.

# %%
stream = load_media(sample.media[4], 96)[0]  # (250, 16, 16, 3)
x = torch.as_tensor(stream).float()
x = (x - x.mean(0)) / 255
quarters = [x[:, :8, :8], x[:, :8, 8:], x[:, 8:, :8], x[:, 8:, 8:]]
tokens = torch.stack([quarter.flatten(1) for quarter in quarters], 1)  # (250, 4, 192)
assert torch.allclose(tokens, encode_side("fast", stream).features, atol=1e-6)

STEPS = 4
short = torch.randn(STEPS, 1, 8)  # (U, S, W)
times = torch.linspace(0, STEPS - 1, 10)  # of 10 frames, in steps
left = times.long().clamp(max=STEPS - 2)
naive = torch.lerp(short[left], short[left + 1], (times - left)[:, None, None])
assert torch.allclose(interpolate_time(short, 10), naive, atol=1e-6)
print("frames at the steps", ", ".join(f"{time:.2f}" for time in times))

# %% [markdown]
# ## In which second does the light flash?
#
# A linear probe stands in the place of the LLM ([runs with it](../docs/results.md)).

# %%
media = features(add_side_channels(rows, ["fast"]))
side = torch.stack([stream.features.float() for _, stream in media])  # (B, 250, 4, W)
v = model.visual_qformer.query_states(torch.stack([video.features.float() for video, _ in media]))
z = model.visual_qformer.mlp(v)  # (B, 10, Q, D)
second = side.diff(dim=1).abs().mean((2, 3)).argmax(1) // 25  # of the flash, the largest change
model.add_side_channel("fast", side.shape[-1], SideChannelConfig(side="fast", width=128))
patch = model.patches["fast"].requires_grad_(True)


def logits_of(clips, patched):
    tokens = z[clips] + patch(v[clips], side[clips]) if patched else z[clips]
    return probe(tokens.mean(2))[..., 0]  # (B, T)


for patched in (False, True):
    probe = nn.Linear(z.shape[-1], 1)
    optimizer = torch.optim.AdamW([*probe.parameters(), *patch.parameters()], lr=3e-3)
    for _ in range(50):
        clips = torch.randint(20, 80, (16,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits_of(clips, patched), second[clips]).backward()
        optimizer.step()
    right = int((logits_of(slice(20), patched).argmax(1) == second[:20]).sum())
    print(f"{'z + g(v, s)' if patched else 'z alone'}: {right} of 20 new clips right")

# which steps of the stream the answer rests on: the gradient of its logit
side = side[:1].requires_grad_(True)
logits_of([0], patched=True).max().backward()
curves = {
    "fast: brightness of 25 frames per second": stream.mean((1, 2, 3)),
    "gradient of the answer by step of the stream": side.grad[0].norm(dim=(1, 2)).numpy(),
}
# figure: a clip and its side channels by second; depth: red is near; the last two rows: the flash
draw_channels(Path("answers/32_channels.png"), sample, curves)

# %% [markdown]
# ## Exercises
#
# 1. Any channel with a file is one more name. Change `"view", "fast"]` to
#    `"view", "fast", "thermal"]`; expect `thermal: (U, S, W) = (10, 144, 128)`.
# 2. Seven steps for ten frames. Change `STEPS = 4` to `STEPS = 7`; expect `0.00, 0.67, 1.33`.
