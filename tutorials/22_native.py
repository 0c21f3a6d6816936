# %% [markdown]
# # 22. I-LoRA on a native audio-visual LM
#
# * Paper: [Crab+](https://arxiv.org/abs/2603.04128), the base model and where I-LoRA sits
# * Code: [omni.py](../crab_min/backbones/omni.py): `OmniModel`;
#   [model.py](../crab_min/model.py): `LLM_LINEARS`
# * Read first: [11](11_crab_branches.py), [12](12_crab_ilora.py)
#
# Crab puts encoders and connectors in front of a text LM and has to align them first. Crab+ takes
# Qwen2.5-Omni, which has its own, so that I-LoRA is all that learns. Here its thinker has random
# weights and 0.2 million parameters; classes, tokens and positions are those of the real one.

# %%
import re
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import torch

from crab_min.backbones.load import load_model
from crab_min.config import AdapterConfig, BackboneConfig
from crab_min.data import read_samples
from crab_min.evaluation.figures import new_figure, save
from crab_min.features import Features
from crab_min.model import LLM_LINEARS
from crab_min.trainer import collate_answers
from crab_min.world.folders import WorldConfig, build_world

model = load_model(BackboneConfig(backbone="omni", weights="tiny-random"))
root = build_world(WorldConfig(world_clips=48, world_test=4), seed=0)
samples = read_samples(root, ["ave"], "train")[:1]
batch = collate_answers(model, samples, Features(model)(samples))
for kind, marks in model.media_tokens.items():
    print(f"{kind}: {int((batch.ids == marks.placeholder).sum())} tokens")

# %% [markdown]
# ## Positions in time, height and width
#
# A pair of frames has 8 x 8 tokens, a second of sound 25. One position stands for 40 ms, so that a
# frame and the sound of the same moment can be compared. Of the pair of frames at time step $t$ and
# row $h$, column $w$ of its grid, in a video whose pairs span $\delta$ seconds:
#
# $$
# p = p_0 + (\lfloor 25\, \delta\, t \rfloor,\; h,\; w)
# $$
#
# | symbol | variable |
# |---|---|
# | $p_0$, the position after the text before it | `start` |
# | $\delta$, seconds of a pair of frames | `inputs["video_second_per_grid"]`: 2 |
# | $p$, positions of the tokens of the video | `naive`: (3, 320) |

# %%
DELTA = 2.0
inputs = model.extra_lm_inputs(batch)
positions, _ = model.thinker.get_rope_index(
    batch.ids,
    video_grid_thw=inputs["video_grid_thw"],
    attention_mask=batch.attention,
    audio_seqlens=inputs["feature_attention_mask"].sum(1),
    second_per_grids=inputs["video_second_per_grid"],
)  # (3, 1, L)
video = batch.ids[0] == model.media_tokens["video"].placeholder
start = positions[0, 0, video].min()
t, h, w = torch.meshgrid(torch.arange(5), torch.arange(8), torch.arange(8), indexing="ij")
naive = start + torch.stack([(25 * DELTA * t).floor(), h, w]).flatten(1)  # (3, 5 * 8 * 8)
assert torch.allclose(naive, positions[:, 0, video].float())
print("times of the five pairs of frames:", [int(p) for p in naive[0].unique() - start])

# %% [markdown]
# The released Crab+ gives $\delta = 2$ for every clip. That is right for ten frames of ten seconds,
# and wrong for a minute. Here each video brings its own length.
#
# ## Where I-LoRA sits, and how large it is
#
# On the seven linears of every layer of the LM. With rank $r$, heads $K$ and a linear of $d_i$
# inputs, $d_o$ outputs: $\; r d_i + K d_i + K r d_o$ parameters, for A, the router and the B. The
# released weights hold I-LoRA of both encoders too. By our reading of its training code these get
# no gradient and add nothing, so here only the LM has one.

# %%
linears = {n: m for n, m in model.llm.named_modules() if re.fullmatch(LLM_LINEARS, n)}
model.add_adapter(AdapterConfig(r=8, alpha=16, heads=3))
counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
formula = 0
for linear in linears.values():
    d_i, d_o = linear.in_features, linear.out_features
    formula += 8 * d_i + 3 * d_i + 3 * 8 * d_o
assert counted == formula
layers = {(3584, 3584): 2, (3584, 512): 2, (3584, 18944): 2, (18944, 3584): 1}  # Qwen2.5-Omni-7B
full = 28 * sum(n * (128 * i + 3 * i + 3 * 128 * o) for (i, o), n in layers.items())
print(f"here {counted:,} in {len(linears)} linears; at 7B with r = 128 {full:,}")

left, right = (figure := new_figure(8, 3)).subplots(1, 2)
first = int(video.int().argmax())  # token of the video
for name, row in zip(("time", "height", "width"), positions[:, 0]):
    left.plot(row, label=name)
    right.plot(range(first, first + 64), row[first : first + 64])
left.set(xlabel="token of the prompt and answer", ylabel="position", title="all tokens")
right.set(xlabel="token", title="the first pair of frames")
left.legend()
# figure: the three positions of each token; left, the steps of time are the five pairs of frames
save(figure, Path("answers/22_native.png"))

# %% [markdown]
# ## Exercises
#
# 1. Read the video as if it lasted a minute. Change `DELTA = 2.0` to `DELTA = 12.0`; expect
#    `AssertionError`: the clip has ten seconds.
# 2. At which rank has I-LoRA a sixteenth of the size? Change `(128 * i + 3 * i + 3 * 128 * o)` to
#    `(8 * i + 3 * i + 3 * 8 * o)`; expect `at 7B with r = 128 4`: 43 million, not 682.
