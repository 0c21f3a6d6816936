# %% [markdown]
# # 15. Explicit reasoning: does the label rest on it?
#
# * Paper: [Crab](https://arxiv.org/abs/2503.13068), why explicit reasoning lets tasks cooperate
# * Code: [world](../crab_min/world/scenes.py), [answering.py](../crab_min/evaluation/answering.py)
# * Read first: [10](10_crab_data.py)
#
# Crab's claim: tasks help each other when the training text says how an answer is found, and only
# then gives the label. In the built-in world such text follows from the scene, exactly.

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import numpy as np
import torch

from crab_min.answers import Answer
from crab_min.backbones.composed import load_base
from crab_min.data import read_samples
from crab_min.evaluation.answering import Decoding, generate_answers
from crab_min.evaluation.pictures import draw_answer
from crab_min.features import Features
from crab_min.model import ASSETS
from crab_min.world.folders import WorldConfig, build_world
from crab_min.world.questions import questions
from crab_min.world.rendering import Renderer

# %% [markdown]
# ## A scene is symbols
#
# It says what there is, where, and in which seconds it is seen and heard. Frames, sound, masks and
# questions are computed from the symbols. Nothing is measured afterwards, so no label is wrong.

# %%
renderer = Renderer()
scene = renderer.scene("train", "many", 3)
for thing in scene.objects:
    place = thing.position if thing.seen else "off screen"
    print(f"{thing.label:<9} {place:<11} seen {thing.seen}, heard {thing.heard}")
print("frames", renderer.frames(scene, np.arange(10) + 0.5).shape)
for question in list(questions(scene))[::4]:
    print(f"{question.text} {question.evidence} So {question.answer}.")

# %% [markdown]
# ## The clip is a file, and a row points to it
#
# The world's folder has the layout of AV-UIE v2 and is read like real data. `target` is the text to
# learn: the reasoning, then the label. With `--target label` it is the label alone.

# %%
root = build_world(WorldConfig(world_clips=48, world_test=4), seed=1)
sample = read_samples(root, ["avvp"], "train")[0]
# figure: a training row of AVVP: frames, sound, the events, and the reasoned text to learn
draw_answer(Path("answers/15_crab_reasoning.png"), sample, sample.gold, sample.target)
samples = read_samples(root, ["avqa"], "train")[:24]
for sample, label in zip(samples[:3], read_samples(root, ["avqa"], "train", target="label")):
    print(f"{sample.row['question']}\n  reasoning: {sample.target}\n  label: {label.target}")

# %% [markdown]
# ## Does the label rest on the reasoning?
#
# The shipped adapter was trained on reasoned targets of other clips. We give it the beginning of an
# answer, and take the label of the smallest loss. In naive lines:
#
# $$
# \hat y = \arg\max_y \sum_i \log p(y_i \mid \text{clip, question, reasoning}, y_{<i})
# $$


# %%
def naive_losses(model, batch):
    length = batch.longest_answer
    labels = batch.labels[:, -length:]  # answers end the rows
    log_p = model.logits(batch, length + 1)[:, :-1].log_softmax(-1)  # each predicts the next token
    losses = -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return losses.masked_fill(labels < 0, 0.0)  # (B, length)


@torch.no_grad()
def likeliest_label(sample, answer):
    reasoning = answer.split("<answer>")[0]
    labels = sorted({s.gold.choice for s in samples if s.row["type"] == sample.row["type"]})
    texts = [reasoning + sample.task.format(Answer(choice=label)) for label in labels]
    media = features([sample] * len(labels))
    batch = model.collate([sample.parts] * len(labels), media, texts)
    losses = model.token_losses(batch)
    assert torch.allclose(losses, naive_losses(model, batch), atol=1e-4)
    return labels[int(losses.sum(1).argmin())]


model = load_base()
model.load_trained(ASSETS / "crab_plus-tiny")
features = Features(model.eval())
features.prepare(samples)
texts = generate_answers(model, features, samples, Decoding(limits={"avqa": 58}))
targets, empty = [sample.target for sample in samples], [""] * len(samples)
for name, answers in (("no", empty), ("the model's own", texts), ("the annotated", targets)):
    labels = [likeliest_label(*pair) for pair in zip(samples, answers)]
    right = sum(label == sample.gold.choice for label, sample in zip(labels, samples))
    print(f"after {name} reasoning {right} of {len(samples)} labels are right")

# The same with the annotated reasoning of a clip that has this question and another answer:
follows, pairs = 0, 0
for sample in samples:
    others = [s for s in samples if s.row["question"] == sample.row["question"]]
    others = [s for s in others if s.gold.choice != sample.gold.choice]
    if others:
        pairs += 1
        follows += likeliest_label(sample, others[0].target) == others[0].gold.choice
print(f"{follows} of {pairs} labels follow the foreign reasoning, against what is seen and heard")

# %% [markdown]
# The label is read off the reasoning, so this is what has to be learned. Whether it pays, two
# trainings show: `python train.py crab_plus-tiny`, and the same with `--target label`.
#
# ## Exercises
#
# 1. Without what was trained no reasoning is used. Change
#    `model.load_trained(ASSETS / "crab_plus-tiny")` to `print("the base")`; expect
#    `after the annotated reasoning 1`: fourteen.
# 2. Give every row the reasoning of another one. Change `("the annotated", targets)` to
#    `("the annotated", targets[::-1])`; expect
#    `after the annotated reasoning 1`: eleven, where the own row's gives 23.
