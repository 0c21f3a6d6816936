# %% [markdown]
# # 13. The segmentation branch: from mask tokens to a mask
#
# * Paper: [Crab](https://arxiv.org/abs/2503.13068), segmentation branch and its losses
# * Code: [masks.py](../crab_min/masks.py): `MaskDecoder`, `mask_loss`;
#   [masking.py](../crab_min/backbones/masking.py)
# * Read first: [11](11_crab_branches.py)
#
# An LM writes no pixels. It ends its answer with six mask tokens. Its last states $h_i$, from which
# it predicts them, go to a decoder, which finds in the picture what they describe: tokens 0 to 2 at
# a coarse level $l = 0$, 3 to 5 at a fine one. A level has a prompt $u_l$ and takes features $F_l$
# of one layer of the vision encoder (released: 14 and 22 of 24; paper: 14 and the last but one):
#
# $$
# u_l = \tfrac{1}{3} \textstyle\sum_i \mathrm{MLP}(h_i), \quad q = \mathrm{generate}(Q, u_l) + e_l,
# \quad (q, F_l') = \mathrm{TwoWay}(q, F_l), \quad z_l = \mathrm{mix}(q \cdot F_l')
# $$
#
# Learned queries $Q$ (300; here 16) attend to the prompt; $e_l$ is learned. Then queries and
# picture attend to each other (`TwoWay`, of Segment Anything). A query times every pixel is a map;
# `mix` makes one of all, the logits $z_l$. $F_1$ is made twice as fine and weighted by where $z_0$
# found something. The mask is where $(z_0 + z_1) / 2 > 0$.

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import torch

from crab_min.backbones.load import load_model
from crab_min.config import BackboneConfig, MaskDecoderConfig, TrainingConfig
from crab_min.data import gold_mask, load_media, read_samples
from crab_min.evaluation.pictures import RED, new_figure, save
from crab_min.features import Features, Mixer
from crab_min.masks import mask_loss, resize
from crab_min.model import ASSETS
from crab_min.recipes.crab import add_mask_tokens, collate_with_masks
from crab_min.trainer import backward, collate_answers, make_optimizer, set_learning_rate, update
from crab_min.world.folders import WorldConfig, build_world

# Answers about the same picture that have different masks
root = build_world(WorldConfig(world_clips=120, world_test=12), seed=0, still=True)
by_clip = {}
for sample in add_mask_tokens(read_samples(root, ["s4", "ref_avs"], "train")):
    if sample.mask:
        by_clip.setdefault(sample.row["vid"], {}).setdefault(gold_mask(sample).tobytes(), sample)
groups = [list(samples.values()) for samples in by_clip.values() if len(samples) > 1]
train, new = sum(groups[:5], []), sum(groups[5:13], [])
other_of = {s.id: group[i - 1] for group in groups for i, s in enumerate(group)}


def gold_of(samples):
    masks = [torch.from_numpy(gold_mask(sample, 96)) for sample in samples]
    return torch.stack(masks)[:, None].float()  # (B, 1, 96, 96)


# %% [markdown]
# ## Answers with mask tokens, several about each picture
#
# S4 asks for the thing that sounds, Ref-AVS for one that is described; only the states tell which.
# The LM is frozen, so they are computed once.

# %%
print(f"{len(train)} answers about 5 pictures, such as {train[0].target}")

torch.manual_seed(0)
sizes = MaskDecoderConfig(decoder=True, width=64, heads=4, queries=16, bce=2.0, dice=2.0)
model = load_model(BackboneConfig(), sizes)
model.load_trained(ASSETS / "crab_plus-tiny")
model.set_trainable(["mask_decoder"])
features = Features(model)
model.cache_answer_states(collate_answers(model, train + new, features(train + new)))
model.calibrate_masks()  # the decoder takes states centred and scaled


@torch.no_grad()
def levels_of(samples):
    branch, decoder = model.mask_branch, model.mask_branch.decoder
    states = torch.stack([model.cached_states[s.id].mask_states for s in samples])  # (B, 6, D)
    scales = [image.scales for image, *_ in features(samples)]
    layers = [torch.stack(layer).float() for layer in zip(*scales)]  # two, (B, 12 x 12, W)
    u = decoder.prompt((states - branch.mean) / branch.std)
    u = u.unflatten(1, (2, 3)).mean(2)  # (B, 2, C)
    coarse = decoder.decode_level(0, u[:, :1], decoder.image_of(layers[0], None), False)
    fine = decoder.decode_level(1, u[:, 1:], decoder.image_of(layers[1], coarse), False)
    logits = resize((resize(coarse, 48) + resize(fine, 48)) / 2, 96)  # (B, 1, 96, 96)
    assert torch.allclose(logits, branch(states, layers), atol=1e-4)
    return coarse, fine, logits  # of 24, 48 and 96 pixels per side


# %% [markdown]
# ## The losses: cross-entropy of the pixels, and dice
#
# $$
# L = \lambda_1 L_{bce} + \lambda_2 \Big( 1 - \frac{2 \sum p_i g_i}{\sum p_i + \sum g_i} \Big),
# \quad L_{bce} = -\tfrac{1}{n} \sum_i \big( g_i \log p_i + (1 - g_i) \log (1 - p_i) \big)
# $$
#
# $p_i$: `p`, a pixel's probability; $g_i$: `gold`, 0 or 1; $\lambda$: `sizes.bce`, `sizes.dice`. It
# is added to the LM's loss. AVSS, with 71 classes, has the cross-entropy of the classes instead.

# %%
logits, gold = levels_of(train)[2], gold_of(train)
p = logits.sigmoid()
bce = -(gold * p.log() + (1 - gold) * (1 - p).log()).mean()
dice = 1 - 2 * (p * gold).sum((1, 2, 3)) / (p + gold).sum((1, 2, 3))
naive = sizes.bce * bce + sizes.dice * dice.mean()
assert torch.allclose(mask_loss(logits, gold, sizes.bce, sizes.dice), naive, atol=1e-3)
print(f"{naive:.2f} before training, with the weights {sizes.bce} and {sizes.dice}")

# A short training. IoU: the pixels that two masks share, among those of either.
optimizer = make_optimizer(model, TrainingConfig(connector_lr=1.5e-3, beta2=0.98))
for step, samples in zip(range(150), Mixer(train, 8, seed=0)):
    set_learning_rate(optimizer, step, range(150), warmup=0.05)
    backward(model, [collate_with_masks(model, samples, features(samples))], bf16=False)
    update(optimizer, max_grad_norm=1.0)
for name, samples in (("trained", train), ("new", new)):
    predicted = levels_of(samples)[2] > 0
    for what, asked in ("this", samples), ("another", [other_of[s.id] for s in samples]):
        both, either = predicted * gold_of(asked), predicted + gold_of(asked) > 0
        iou = (both.sum((1, 2, 3)) / either.sum((1, 2, 3))).mean()
        print(f"{name} pictures: IoU {iou:.2f} with the mask of {what} answer")

levels = [level[:, 0].sigmoid() for level in levels_of(train[:4])]
figure = new_figure(7, 7.2)
for i, row in enumerate(figure.subplots(4, 4, subplot_kw={"xticks": [], "yticks": []})):
    row[1].imshow(levels[0][i], cmap="Blues")
    row[2].imshow(levels[1][i], cmap="Blues")
    for axes, mask in (row[0], gold[i, 0]), (row[3], levels[2][i]):
        axes.imshow(load_media(train[i].media[0], 96)[0][0])
        axes.contour(mask, [0.5], colors=RED)
for axes, title in zip(figure.axes, ("gold", "coarse level", "fine level", "prediction")):
    axes.set_title(title)
# figure: four answers about two trained pictures: gold in red, both levels, and the prediction
save(figure, Path("answers/13_crab_masks.png"))

# %% [markdown]
# Five pictures are learned by heart; new ones need more. `python train.py crab-tiny --stage masks`
# puts 40 of 41 masks on that of two things that sounds
# ([results](../docs/results.md#crabs-mask-decoder)). The loss is that of the mean of the levels, so
# one may err where the other corrects it. A cell becomes 2 x 2 pixels: hence the chessboards.
#
# ## Exercises
#
# 1. With one answer per picture the decoder need not use the states: it learns the picture alone.
#    Change `train, new = sum(groups[:5], [])` to `train, new = [g[0] for g in groups[:5]]`; expect
#    `5 answers about 5 pictures`.
# 2. Weigh the losses as the release does. Change `bce=2.0, dice=2.0` to `bce=1.0, dice=0.5`; expect
#    `weights 1.0 and 0.5`.
