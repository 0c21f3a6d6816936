"""Tutorial 5: from a word to a mask. Read beside Crab (arXiv 2503.13068), section 3.2, and crab_min/masks.py.

    python tutorials/05_segmentation.py             (about four minutes on a CPU; builds a small world the first time)

An LM cannot draw, but it can point at what it has in mind: it ends its answer with six words that mean nothing, and the states in which it is about
to say them go to a decoder, which looks at the picture for what they describe.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from crab_min.backbones.load import BackboneConfig, load_model
from crab_min.data import add_mask_tokens, gold_mask, load_media, read_samples
from crab_min.evaluation.answering import (
    generate_answers,
    masks_from_boxes,
    predict_masks,
    score_masks,
    token_limits,
)
from crab_min.evaluation.pictures import save, tinted
from crab_min.features import Features, Mixer
from crab_min.model import ASSETS
from crab_min.trainer import hold_answers, mask_tensor
from crab_min.world.folders import WorldConfig, build_world

# 1. An answer with mask tokens, and the mask that it stands for.
root = build_world(WorldConfig(world_clips=1600, world_test=30), 0, still=True)          # one frame and a sound a clip, no videos
train, test = (add_mask_tokens(read_samples(root, tasks, split)) for tasks, split in ((["s4", "ref_avs"], "train"), (["s4"], "test")))
print("the model should say:", train[0].target)
print("and this is its mask:", train[0].mask, gold_mask(train[0]).shape)

# 2. The shipped model, which answers with boxes; six new words and a new decoder, the only parts that are trained here.
torch.manual_seed(0)
model = load_model(BackboneConfig(masks="decoder", mask_width=64, mask_queries=16))
model.load_trained(ASSETS / "crab_plus-tiny")
model.requires_grad_(False)
model.set_trainable("decoder")
print(f"trained: {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters; the decoder reads the layers {model.mask_layers} of the vision encoder")
features = Features(model)
features.prepare(train + test)
limits = token_limits(model, train)
hold_answers(model, features, train)                                           # the LM is frozen: what it makes of each answer is computed once
states = torch.stack([state for state, *_ in model.held.values() if state is not None])
print("states that predict the six tokens of each answer:", tuple(states.shape), "-> prompts, one a scale:", tuple(model.masks.decoder.prompt(states).unflatten(1, (2, 3)).mean(2).shape))

# 3. Training: the cross-entropy of the six new words, and of each pixel, and dice, which does not care how large the thing is. For some hundred steps
# the decoder draws every object; then it finds out that the states say which one is meant, and the loss falls.
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
STEPS = 700
model.train()
for step, some in zip(bar := tqdm(range(STEPS), desc="decoder"), Mixer(train, 16, 0)):
    batch = model.collate([s.parts for s in some], features(some), [s.target for s in some])
    batch["keys"] = [s.id for s in some]
    batch["masks"] = [mask_tensor(gold_mask(s, model.frame_size), model.device) for s in some]
    loss, tokens = model(batch)
    (loss / tokens).backward()
    optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 50, (STEPS - step) / 350)
    optimizer.step()
    optimizer.zero_grad()
    bar.set_postfix(loss=f"{loss.item() / tokens:.3f}")

# 4. The decoder against the box alone, of the same answers to the same clips.
texts = generate_answers(model, features, test, limits)
decoded, boxes = predict_masks(model, features, test, texts), masks_from_boxes(test, texts, None)
for name, masks in (("decoder", decoded), ("box", boxes)):
    scores = score_masks(test, masks)["s4"]
    print(f"{name:<10} mean IoU {scores['hard_miou']:.3f}, F {scores['hard_f']:.3f}, coverage {scores['coverage']:.2f}")

# 5. What each level adds: the coarse one sees twice the vision encoder's grid, the fine one four times, guided by the coarse one.
levels: list = []
hooks = [model.masks.decoder.binary.register_forward_hook(lambda module, given, out: levels.append(out.detach()))]
few = test[:4]
predict_masks(model, features, few, texts[:4], batch_size=4)
for hook in hooks:
    hook.remove()
order = [i for i in sorted(range(4), key=lambda i: (-len(few[i].parts[-1].text), few[i].id))]           # draw_masks answers in another order
coarse, fine = ({few[i].id: x[0].sigmoid() for i, x in zip(order, level)} for level in levels)
figure = Figure(figsize=(11, 2.3 * len(few)), layout="constrained")
FigureCanvasAgg(figure)
grid = figure.subplots(len(few), 5, squeeze=False)
for line, s, text, mask in zip(grid, few, texts, decoded):
    image = load_media(next(p for p in s.media if p.kind == "image"), 96)[0][0]
    shown = [(tinted(image, gold_mask(s)), "gold"), (coarse[s.id], f"coarse level, {coarse[s.id].shape[0]} x {coarse[s.id].shape[1]}"),
             (fine[s.id], f"fine level, {fine[s.id].shape[0]} x {fine[s.id].shape[1]}"), (tinted(image, mask), "their mean, above a half"), (tinted(image, masks_from_boxes([s], [text], None)[0]), "box alone")]
    for axes, (picture, title) in zip(line, shown):
        axes.imshow(picture, vmin=0, vmax=1, cmap="Blues")
        axes.set_title(title, fontsize=8)
        axes.set(xticks=[], yticks=[])
    line[0].set_ylabel(s.row["a_obj"], fontsize=9)
save(figure, Path("answers/tutorial_05.png"))
print("picture: answers/tutorial_05.png")
print("to change: `chained=False` (--no-mask-chained of train.py), the released query generator, in which only the last layer counts")
