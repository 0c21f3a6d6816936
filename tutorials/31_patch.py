# %% [markdown]
# # 31. Temporal-aligned cross-attention
#
# * Paper: [PAVE](https://arxiv.org/abs/2503.19794), patching and temporal-aligned cross-attention
# * Code: [pave.py](../crab_min/pave.py): `Patch`, `Block`, `neighbourhood`, `Patches`
# * Read first: [30](30_video_llm.py)
#
# A *patch* $g$ adds what a side channel (sound, more frames, depth) knows to the tokens of each
# frame, so the LLM reads as many as before. Frame $k$ attends to the side tokens at its own time,
# $N(k)$, and to no others:
#
# $$ z'(k) = z(k) + g\big(v(k), \lbrace s(j) : j \in N(k) \rbrace\big) $$
#
# Inside $g$, frame and side tokens are projected to the patch's width, $x = P v(k)$ and
# $m_j = R s(j)$. Then come a few blocks of cross-attention and an MLP, at last an MLP to the width
# of the LLM and a LayerNorm:
#
# $$ x \leftarrow x + \mathrm{softmax}\big(W_q x (W_k m)^\top / \sqrt d\big) W_v m, \quad
# x \leftarrow x + \mathrm{MLP}(\mathrm{LayerNorm}(x)), \quad
# g = \mathrm{LayerNorm}(\mathrm{MLP}(x)) $$
#
# | symbol | variable | shape | meaning |
# |---|---|---|---|
# | $z$ | `z` | (B, T, Q, D) | the video's tokens for the LLM, Q per frame |
# | $v$ | `v` | (B, T, Q, V) | the same before the projector to the LLM |
# | $s$ | `side` | (B, U, S, W) | side tokens: U steps in time, S tokens per step |
# | $N(k)$ | `partition_steps(U, T)[k]` | | side steps at the time of frame $k$ |
# | $P$, $R$ | `patch.video`, `patch.side` | (C, V), (C, W) | to the patch's width C; released 512 |
# | $d$ | | | width of each of the heads; released 4 of 128, in 2 blocks |
#
# The released code takes $W_k$ for $W_v$, by a slip; `shared_kv` does so for released weights. One
# released patch has rotary positions (`rope`), the others none.

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import torch

from crab_min.backbones.composed import load_base
from crab_min.config import SideChannelConfig
from crab_min.data import read_samples
from crab_min.evaluation.figures import new_figure, save
from crab_min.features import Features
from crab_min.pave import partition_steps
from crab_min.recipes.pave import RELEASED_SHAPES
from crab_min.side_channels import add_side_channels
from crab_min.world.side_channels import build_side_world

# %% [markdown]
# ## N(k): the steps are shared out in order
#
# The steps of a side channel are cut into T contiguous parts, one per frame; the first parts are
# one longer where they do not divide, so late frames drift from their true time. The released side
# channels and 32 frames: sound of a minute, fast video of two minutes at 2 frames per second, depth
# of the same 32 frames, 4 cameras in turn.

# %%
figure = new_figure(9, 3)
for axes, (name, (steps, _, _)) in zip(figure.subplots(1, 4, sharey=True), RELEASED_SHAPES.items()):
    parts = partition_steps(steps, 32)
    print(f"{name}: {steps} steps; the first frame has {len(parts[0])}, the last {len(parts[-1])}")
    attended = torch.stack([torch.isin(torch.arange(steps), part) for part in parts])
    axes.imshow(attended, aspect="auto", cmap="Blues", interpolation="nearest")
    axes.set(title=f"{name}, {steps} steps", xlabel="step j")
figure.axes[0].set_ylabel("frame k")
# figure: N(k) of the released side channels; a dark cell is a step that the frame attends to
save(figure, Path("answers/31_patch.png"))

# %% [markdown]
# ## A new patch changes nothing
#
# The side channel is a stream of 25 small frames per second. Here a Q-Former stands before the
# projector, and its states are $v$. The last LayerNorm begins with gain and bias zero, so the patch
# adds zero, and in the first step only these two have a gradient.

# %%
file = build_side_world("", 120, 0, seed=0, names=["fast"])
samples = add_side_channels(read_samples(file, [], "train")[:1], ["fast"])
model = load_base()
(video, stream), *_ = Features(model)(samples)
side = stream.features[None].float()  # (1, 250, 4, W)
v = model.visual_qformer.query_states(video.features[None].float())  # (1, 10, Q, V)
z = model.visual_qformer.mlp(v)  # (1, 10, Q, D)

model.add_side_channel("fast", side.shape[-1], SideChannelConfig(side="fast", width=128))
patch = model.patches["fast"].requires_grad_(True)
patched = z + patch(v, side)
print("z' = z:", torch.equal(patched, z))
patched.square().sum().backward()
print("with a gradient:", [name for name, p in patch.named_parameters() if p.grad.any()])

# %% [markdown]
# ## The patch in naive lines, one frame after another


# %%
def naive_patch(v, side):
    added = []
    for frame, steps in zip(v, partition_steps(len(side), len(v))):
        x = patch.video(frame)  # (Q, C)
        s = patch.side(side[steps].flatten(0, 1))  # (K, C), the K side tokens of N(k)
        for block in patch.blocks:
            heads = block.query(x), block.key(s), block.value(s)
            q, k, value = [y.unflatten(-1, (block.heads, -1)).transpose(0, 1) for y in heads]
            weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)  # (heads, Q, K)
            x = x + (weights @ value).transpose(0, 1).flatten(1)
            x = x + block.mlp(block.norm(x))
        added.append(patch.norm(patch.out(x)))
    return torch.stack(added)  # (T, Q, D)


torch.nn.init.ones_(patch.norm.weight)  # as if it had learned
naive = naive_patch(v[0], side[0, torch.arange(250)])
assert torch.allclose(patch(v, side)[0], naive, atol=1e-5)

FRAME = 3  # attends to no step of another
side.requires_grad_(True)
patch(v, side)[0, FRAME, :, 0].sum().backward()  # all D of a LayerNorm sum to zero
reached = side.grad[0].abs().sum((1, 2)).nonzero()[:, 0]
print(f"frame {FRAME} attends to the steps {reached.min()} to {reached.max()}")

# %% [markdown]
# ## Exercises
#
# 1. The last frame attends to another second. Change `FRAME = 3` to `FRAME = 9`; expect
#    `the steps 225 to 249`.
# 2. Each frame attends to its own second, so the order of the seconds matters. Change
#    `torch.arange(250)` to `torch.arange(250).flip(0)`; expect `AssertionError`. Within a second it
#    does not: `torch.arange(250).view(10, 25).flip(1).flatten()` passes.
