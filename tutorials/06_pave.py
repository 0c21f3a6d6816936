# %% [markdown]
# # 6. A patch for a side channel
#
# Paper: PAVE (arXiv 2503.19794). Code in `crab_min/`: `pave.py`, `side_channels.py`,
# `backbones/patched.py`. A minute on a CPU; the first run builds a world.
#
# A video LM sees ten frames of a clip. Between two of them the light flashes. A stream of 25 frames
# per second has the flash, but 250 frames would be 1,500 tokens of this LM. A patch lets each frame
# look at its own 25 of them and adds what it finds to the frame's tokens. The prompt stays as long.

# %%
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tqdm import tqdm

from crab_min.backbones.composed import load_base
from crab_min.config import AdapterConfig, SideChannelConfig, TrainingConfig
from crab_min.data import load_media, read_samples
from crab_min.evaluation.answering import rank_options
from crab_min.evaluation.pictures import draw_frames, new_figure, save
from crab_min.features import Features, Mixer
from crab_min.pave import partition_steps
from crab_min.side_channels import add_side_channels
from crab_min.trainer import backward, collate_answers, make_optimizer, set_learning_rate, update
from crab_min.world.side_channels import build_side_world

# %% [markdown]
# ## A question that ten frames cannot answer

# %%
file = build_side_world("", 128, 32, seed=0, names=["fast"])
train = add_side_channels(read_samples(file, [], "train"), ["fast"])
test = add_side_channels(read_samples(file.with_name("test.jsonl"), [], "test"), ["fast"])
print([part.side or part.text or part.kind for part in test[0].parts], test[0].row["options"])
torch.manual_seed(0)
model = load_base()
features = Features(model)
features.prepare(train + test)
video, side = features(test[:1])[0]
print("video", *video.features.shape, "side channel", *side.features.shape)

# %% [markdown]
# ## A new patch changes nothing
#
#     z'(k) = z(k) + g(v(k), {s(j) : j in N(k)})      for every frame k
#
# The last layer of g is a LayerNorm whose gain and bias start at zero. So training starts from the
# video LM as it was. In the first step only this gain and bias have a gradient; the rest follows.

# %%
batch = collate_answers(model, test[:4], features(test[:4]))
before = model.token_losses(batch)
model.add_side_channel("fast", side.features.shape[-1], SideChannelConfig(width=128))
patch = model.patches["fast"]
assert torch.allclose(model.token_losses(batch), before)

# N(k) shares out the side steps among the frames, as equally as possible; -1 stands for no step
print("N(3) =", partition_steps(250, 10)[3].tolist())
print("59 seconds of sound for 32 frames:", partition_steps(59, 32).tolist())

# %% [markdown]
# ## A short training of the patch, with LoRA on the LM; all else is frozen

# %%
model.add_adapter(AdapterConfig(adapter="lora", r=8, alpha=16, dropout=0.0))
model.set_trainable(["adapter"])  # patches always learn
optimizer = make_optimizer(model, TrainingConfig(lr=4e-3, connector_lr=5e-3))
for step, samples in zip(bar := tqdm(range(200)), Mixer(train, 8, seed=0)):
    set_learning_rate(optimizer, step, range(200), warmup=0.05)
    batch = collate_answers(model, samples, features(samples))
    bar.set_postfix(loss=backward(model, [batch], bf16=False).loss)
    update(optimizer, max_grad_norm=1.0)

asked = {"with the side channel": test, "without": add_side_channels(test, [])}
for name, samples in asked.items():
    texts = rank_options(model, samples, features(samples))
    right = [text == sample.task.format(sample.gold) for sample, text in zip(samples, texts)]
    print(f"{name}: {sum(right)} of {len(right)} right; guessing one of four gives 8")

# %% [markdown]
# ## The patch in a few lines, and what each frame attends to

# %%
s, weights = side.features.float(), []  # (U, 4, W)
with torch.no_grad():
    v = model.visual_qformer.query_states(video.features[None].float(), None)[0]  # (T, Q, V)
    g = patch(v[None], s[None])[0]  # (T, Q, D)
    for k, steps in enumerate(partition_steps(len(s), len(v))):
        x, sides = patch.video(v[k : k + 1]), patch.side(s[steps].flatten(0, 1)[None])
        for block in patch.blocks:
            states = block.query(x), block.key(sides), block.value(sides)
            query, key, value = map(block.split_heads, states)  # (1, heads, Q or 100, C / heads)
            w = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)  # (1, heads, Q, 100)
            x = x + (w @ value).transpose(1, 2).flatten(2)  # (1, Q, C)
            x = x + block.mlp(block.norm(x))
        assert torch.allclose(patch.norm(patch.out(x))[0], g[k], atol=1e-4)
        weights.append(w[0].mean(1).unflatten(-1, (25, 4)).sum(-1))  # (heads, 25), last block

frames, stream = [load_media(part, 96)[0] for part in test[0].media]
figure = new_figure(11, 5)
top, middle, bottom = figure.subplots(3, 1, sharex=True)
draw_frames(top, frames, 10)
top.set_title(f"{test[0].parts[-1].text.strip()} {test[0].gold.choice}")
middle.plot(torch.arange(250) / 25, stream.mean((1, 2, 3)))  # the brightness
bottom.imshow(torch.cat(weights, 1), extent=(0, 10, 3.5, -0.5), aspect="auto", cmap="Blues")
bottom.vlines(range(1, 10), -0.5, 3.5, color="black", linewidth=0.5)  # the ends of N(k)
bottom.set(xlabel="seconds", ylabel="attention, by head", xlim=(0, 10))
save(figure, Path("answers/tutorial_06.png"))

# %% [markdown]
# ## Exercises
#
# 1. Give each test clip the side channel of the clip before it, in the media of `rank_options`.
#    Expect about a quarter right: the flash of another clip says nothing about this one.
# 2. Set the gain of a new patch, `patch.norm.weight`, to one. Expect the first assert to fail: the
#    LM would start with noise on its video tokens.
