# %% [markdown]
# # 00. One clip, from file to answer
#
# * Papers: all four share this path
# * Code: [interface.py](../crab_min/interface.py): `build_prompt`;
#   [model.py](../crab_min/model.py): `AVLanguageModel.collate`, `embed`, `generate`
#
# A clip is frames and sound. Frozen encoders turn them into features, connectors into tokens, and
# the tokens take the place of placeholders in a prompt. From there on it is a language model.

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import torch

from crab_min.backbones.composed import load_base
from crab_min.data import load_media, read_samples
from crab_min.evaluation.pictures import draw_frames, draw_wave, new_figure, save
from crab_min.evaluation.scores import sample_score
from crab_min.interface import prompt_text
from crab_min.model import ASSETS
from crab_min.world.folders import WorldConfig, build_world

torch.set_grad_enabled(False)

# %% [markdown]
# ## A row of an annotation file, and its prompt
#
# The built-in world writes clips with exact labels, in the layout of AV-UIE v2.

# %%
root = build_world(WorldConfig(world_clips=48, world_test=4), seed=0)
sample = read_samples(root, ["ave"], "test")[1]
print(prompt_text(sample.parts))
target = sample.task.format(sample.gold)
print("label:", target)

# %% [markdown]
# ## File, arrays, features
#
# Here with the tiny base, whose encoders and LM have Crab's structure and 2 million parameters. The
# ten frames have 144 features each, one per patch; each second of sound, 16,000 numbers, has 48. A
# feature is 128 numbers.

# %%
model = load_base()
model.load_trained(ASSETS / "crab_plus-tiny")  # I-LoRA, trained on other clips
model.eval()
media, shown = [], []
for part in sample.media:
    arrays, seconds = load_media(part, model.frame_size)
    (features,) = model.encode(part.kind, [arrays], [seconds])
    media.append(features)
    shown.append(arrays)
    print(part.kind, arrays[0].shape, "x", len(arrays), "->", tuple(features.features.shape))

# %% [markdown]
# ## Features, tokens, prompt
#
# Connectors turn these features into few tokens: 6 per frame, 3 per second of sound. A prompt has
# one placeholder for each. With $e$ the embedding of a word and $z$ the media tokens,
#
# $$
# h_i = \begin{cases} z_{j(i)} & i \text{ is the } j\text{-th placeholder} \\
# e(\mathrm{id}_i) & \text{else} \end{cases}
# \qquad L = -\frac{1}{N} \sum_{i \in \text{answer}} \log p(\mathrm{id}_i \mid h_{<i})
# $$
#
# | symbol | variable |
# |---|---|
# | $z$, tokens of all media | `tokens`: (placeholders, D) |
# | $h$, input of the LM; D, its width | `h`: (1, length, D) |
# | $L$ and $N$, the loss and the tokens of the answer | `loss`, `batch.answer_tokens` |

# %%
batch = model.collate([sample.parts], [media], [target])
tokens = torch.cat(model.tokens(batch.media, batch.media_index))
is_placeholder = torch.zeros_like(batch.ids, dtype=torch.bool)
for marks in model.media_tokens.values():
    is_placeholder |= batch.ids == marks.placeholder
h = model.llm.get_input_embeddings()(batch.ids.masked_fill(is_placeholder, 0))
h[is_placeholder] = tokens
assert torch.allclose(h, model.embed(batch), atol=1e-5)
learned = batch.answer_tokens
print(f"{batch.ids.shape[1]} tokens: {int(is_placeholder.sum())} of media, {learned} of the answer")

logits = model.llm(inputs_embeds=h, attention_mask=batch.attention).logits  # (1, length, V)
log_p = logits[0, :-1].log_softmax(-1)  # each predicts the next token
loss = -log_p.gather(-1, batch.ids[0, 1:, None])[-learned:].mean()
assert torch.allclose(loss, model(batch) / learned, atol=1e-4)
print(f"loss per answer token {loss:.3f}")

# %% [markdown]
# ## The answer
#
# The loss is that of the label alone, while this model was trained to reason first. Without a
# target the prompt ends where the answer begins, and the model writes its own.

# %%
prompt = model.collate([sample.parts], [media])
(text,) = model.generate(prompt, max_new_tokens=60)
print(text, f"\nscore {sample_score(sample, text):.2f}")

figure = new_figure(9, 3)
video, sound, row = figure.subplots(3, 1)
draw_frames(video, shown[0], seconds)
draw_wave(sound, shown[1], seconds)
sound.set_xlabel("seconds")
kinds = is_placeholder.int() + 2 * (batch.labels >= 0)  # 0 text, 1 media, 2 answer
row.imshow(kinds, aspect="auto", cmap="viridis", interpolation="nearest")
row.set(yticks=[], xlabel="token: text dark, media green, answer yellow")
# figure: frames and sound of the clip, and its tokens in the order in which the LM reads them
save(figure, Path("answers/00_one_clip.png"))

# %% [markdown]
# ## Exercises
#
# 1. Ask about sound and picture of another task. Change `read_samples(root, ["ave"], "test")` to
#    `read_samples(root, ["avqa"], "test")`; expect `Question:`.
# 2. Leave out what was trained. Change `model.load_trained(ASSETS / "crab_plus-tiny")` to
#    `print("the base")`; expect `score 0.00`.
