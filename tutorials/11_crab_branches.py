# %% [markdown]
# # 11. From frames and sound to tokens
#
# Paper: Crab (arXiv 2503.13068), the visual and audio branches of the unified audio-visual
# interface. Code in `crab_min/`: `encoders.py`, `qformer.py`, `backbones/composed.py`.
# Half a minute on a CPU; the first run builds a world.
#
# A frame gives 144 features here, a second of sound 48. The LM gets a few tokens in their place.

# %%
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from crab_min.backbones.composed import load_base
from crab_min.data import load_media, read_samples
from crab_min.evaluation.pictures import draw_wave, new_figure, save
from crab_min.world.folders import WorldConfig, build_world

torch.set_grad_enabled(False)
model = load_base()  # the shipped tiny base
root = build_world(WorldConfig(world_clips=48, world_test=4), seed=0)
sample = read_samples(root, ["ave"], "test")[0]
(frames, seconds), (waves, _) = [load_media(part, model.frame_size) for part in sample.media]
label, spans = sample.gold.events[0]
print(f"{label} from {spans[0][0]} to {spans[0][1]} s; frames {frames.shape}, {len(waves)} waves")

# %% [markdown]
# ## Encoders, frozen
#
# Every frame and every segment of sound is encoded by itself. CLIP's features stand for patches of
# the frame, BEATs' for 160 ms and 16 of the 128 bands of a spectrogram.

# %%
visual = model.vision(torch.from_numpy(frames)[None])
audio, mask = model.audio([torch.from_numpy(wave) for wave in waves])
print(f"features (clip, steps, S, width): {tuple(visual.shape)} and {tuple(audio.shape)}")

# %% [markdown]
# ## Q-Former: a few learned queries attend to all features of one time step
#
#     tokens_t = MLP(QFormer(queries, LayerNorm(features_t)))
#
# A layer is post-norm BERT: self-attention of the queries, cross-attention to the features, and a
# feed-forward. In naive lines, with the weights kept (qformer.py multiplies in another order):


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
# ## Tokens in the prompt
#
# The prompt has one placeholder per token, and `embed` puts the tokens there. At Crab's size that
# is 32 for each of 10 frames and 10 segments, 640 tokens of width 4096. No token knows its second:
# their order tells it, and the tiny base adds a learned code of the second. So ten times the same
# frame gives ten different tokens:

# %%
media = model.encode("video", [np.stack([frames[0]] * 10)], [seconds])
batch = model.collate([sample.parts[:2]], [media])
placeholders = batch.ids == model.media_tokens["video"].placeholder
tokens = model.embed(batch)[placeholders].unflatten(0, (10, -1))  # (T, Q, D)
naive = model.visual_qformer(media[0].features[None])[0] + model.time.weight[:10, None]
assert torch.allclose(tokens, naive + model.number.weight[0], atol=1e-4)
print("first and last frame differ by up to", (tokens[0] - tokens[-1]).abs().max().item())

# %% [markdown]
# ## What each visual and each audio query attends to: answers/11_crab_branches.png

# %%
second = spans[0][0]
maps = [weights.view(12, 12) for weights in visual_weights[second]]
maps += [weights.view(-1, 8).T.flip(0) for weights in audio_weights[second]]  # (bands, times)
figure = new_figure(12, 4)
(image, *visual_axes), (sound, *audio_axes) = figure.subplots(2, visual_weights.shape[1] + 1)
image.imshow(frames[second])
draw_wave(sound, [waves[second]], 1)
for axes, weights in zip([*visual_axes, *audio_axes], maps):
    axes.imshow(weights, cmap="magma", aspect="auto")
for axes in figure.axes:
    axes.axis("off")
save(figure, Path("answers/11_crab_branches.png"))

# %% [markdown]
# ## Exercises
#
# 1. Set `second` to one without the sound. Expect the maps of the audio queries to change much more
#    than those of the visual ones: the thing is still in the picture.
# 2. Shuffle `frames` before `model.vision`. Expect `visual_tokens` shuffled alike, since each time
#    step is encoded by itself; the codes of the seconds are added later.
