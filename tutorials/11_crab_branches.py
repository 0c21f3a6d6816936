# %% [markdown]
# # 11. The visual and the audio branch: from frames and sound to tokens
#
# * Paper: [Crab](https://arxiv.org/abs/2503.13068), visual branch and audio branch
# * Code: [encoders.py](../crab_min/encoders.py): `VisionEncoder`, `AudioEncoder`;
#   [qformer.py](../crab_min/qformer.py): `QFormerConnector`
# * Read first: [00](00_one_clip.py)
#
# A frame gives 144 features here, a second of sound 48. The LM gets a few tokens in their place.

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import torch

from crab_min.backbones.composed import load_base
from crab_min.data import load_media, read_samples
from crab_min.evaluation.pictures import draw_wave, new_figure, save
from crab_min.world.folders import WorldConfig, build_world

torch.set_grad_enabled(False)
model = load_base()  # the shipped tiny base
root = build_world(WorldConfig(world_clips=48, world_test=4), seed=0)
sample = read_samples(root, ["ave"], "test")[0]
(frames, _), (waves, _) = [load_media(part, model.frame_size) for part in sample.media]
label, spans = sample.gold.events[0]
print(f"{label} from {spans[0][0]} to {spans[0][1]} s; frames {frames.shape}, {len(waves)} waves")

# %% [markdown]
# ## Encoders, frozen
#
# Every frame and every segment of sound is encoded by itself: CLIP has a feature per patch (of its
# last layer but one), BEATs one per 160 ms and 16 of the 128 bands of a spectrogram. In Crab they
# are 256 features of 1,024 numbers per frame of CLIP-L, and 48 of 768 per second of sound.

# %%
visual = model.vision(torch.from_numpy(frames)[None])
audio, mask = model.audio([torch.from_numpy(wave) for wave in waves])
print(f"features (clip, steps, S, width): {tuple(visual.shape)} and {tuple(audio.shape)}")

# %% [markdown]
# ## Q-Former: a few learned queries attend to all features of one time step
#
# $$
# X_t = \mathrm{MLP}(\mathrm{QFormer}(Q, \mathrm{LN}(F_t))), \qquad
# \mathrm{attend}(x, s) = \mathrm{LN}\Big(x + W_o\,
# \mathrm{softmax}\Big(\tfrac{W_q x (W_k s)^\top}{\sqrt d}\Big) W_v s\Big)
# $$
#
# | symbol | variable |
# |---|---|
# | $F_t$, features of a time step; S of them, W wide | `features`: (T, S, W) |
# | $Q$, learned queries | `connector.query`: (Q, hidden) |
# | $X_t$, tokens for the LM, D wide | `visual_tokens`: (T, Q, D) |
# | $x$ and $s$: what attends, and to what; $d$, the width of a head | `x`, `source` |
#
# A layer is post-norm BERT: self-attention $\mathrm{attend}(x, x)$, cross-attention
# $\mathrm{attend}(x, F_t)$, feed-forward. Crab has two layers with 32 queries per frame and 32 per
# segment of sound, so 640 tokens for ten seconds. In naive lines:


# %%
def attend(block, x, source, heads):
    """x <- LayerNorm(x + Linear(softmax(q k / sqrt(d)) v)), and the weights."""
    attention = block.attention
    q, k, v = attention.query(x), attention.key(source), attention.value(source)
    q, k, v = [y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v)]
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)  # (T, heads, Q, S)
    mixed = (weights @ v).transpose(1, 2).flatten(2)  # (T, Q, hidden)
    return block.output.LayerNorm(x + block.output.dense(mixed)), weights


def naive_connector(connector, features):
    """Features (T, S, W) of one clip -> tokens (T, Q, D), and the last layer's weights."""
    features = connector.norm(features)
    x = connector.qformer.layernorm(connector.query).expand(len(features), -1, -1)
    for layer in connector.qformer.encoder.layer:
        x, _ = attend(layer.attention, x, x, connector.config.heads)
        x, weights = attend(layer.crossattention, x, features, connector.config.heads)
        x = layer.output_query(layer.intermediate_query(x), x)  # feed-forward
    return connector.mlp(x), weights.mean(1)  # the weights are averaged over heads


visual_tokens, visual_weights = naive_connector(model.visual_qformer, visual[0])
audio_tokens, audio_weights = naive_connector(model.audio_qformer, audio[0])
assert torch.allclose(visual_tokens, model.visual_qformer(visual)[0], atol=1e-4)
assert torch.allclose(audio_tokens, model.audio_qformer(audio, mask)[0], atol=1e-4)
print(f"tokens: video {tuple(visual_tokens.shape)}, sound {tuple(audio_tokens.shape)}")

# %% [markdown]
# ## What each query attends to

# %%
second = spans[0][0]
maps = [weights.view(12, 12) for weights in visual_weights[second]]
maps += [weights.view(-1, 8).T.flip(0) for weights in audio_weights[second]]  # (bands, times)
figure = new_figure(9, 3)
(image, *visual_axes), (sound, *audio_axes) = figure.subplots(2, visual_weights.shape[1] + 1)
image.imshow(frames[second])
draw_wave(sound, [waves[second]], 1)
for i, (axes, weights) in enumerate(zip([*visual_axes, *audio_axes], maps)):
    axes.imshow(weights, cmap="magma", aspect="auto")
    axes.set_title(f"query {i % len(visual_axes)}")
image.set_title("frame")
sound.set_title("1 s of sound")
for axes in figure.axes:
    axes.axis("off")
# figure: a frame, a second of sound, and where each query attends; sound: time right, pitch up
save(figure, Path("answers/11_crab_branches.png"))

# %% [markdown]
# ## Exercises
#
# 1. A token comes from its own frame alone, so fewer frames are fewer tokens. Change
#    `visual = model.vision(torch.from_numpy(frames)[None])` to
#    `visual = model.vision(torch.from_numpy(frames[:8])[None])`; expect `video (8, 6, 192)`.
# 2. A query spreads one whole attention over the features. Give each feature its own instead:
#    change `q.shape[-1] ** 0.5).softmax(-1)` to `q.shape[-1] ** 0.5).sigmoid()`; expect
#    `AssertionError`.
