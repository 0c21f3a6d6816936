"""Tutorial 7: CREMA, any modality through one Q-Former. Read beside arXiv 2402.05889 and crab_min/backbones/blip2.py.

    python tutorials/07_crema.py                    (about four minutes on a CPU; builds a small world the first time)

The LM, the encoder and the Q-Former are frozen. A modality brings its own queries, low-rank adapters inside the Q-Former, a norm and a projection.
All modalities but the video are fused into one stream, so that the LM reads as many tokens with seven of them as with one.
"""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from crab_min.backbones.blip2 import CremaConfig, load_crema
from crab_min.crema import EarlyExit
from crab_min.data import add_side_channels, limit_frames, load_media, read_samples
from crab_min.evaluation.answering import rank_options
from crab_min.evaluation.pictures import draw_frames, draw_grid, save
from crab_min.features import Features, Mixer
from crab_min.world.side_channels import build_side_world

SIDES, FRAMES, BATCHES, BATCH = ["flow", "depth"], 5, 240, 16
CONFIG = CremaConfig(join="add", modality_rank=16, modality_dropout=.3)

# 1. Questions that no frame can answer: which thing trembles (flow), which is near (depth). Every row has both modalities; it is about one.
file = build_side_world("", 240, 40, 0, SIDES, together=True)
rows = {split: read_samples(file.with_name(f"{split}.jsonl"), [], split) for split in ("train", "test")}
train, test = (limit_frames(add_side_channels(rows[split], SIDES), FRAMES) for split in ("train", "test"))
print("parts of a prompt:", ", ".join(f"{p.side} (a modality)" if p.side else p.kind for p in test[0].parts), f"-> {test[0].parts[-1].text!r} {test[0].row['options']}")


# 2. A modality in five lines: a model, the features of its clips, their width, its name. Its fusion starts at zero and changes nothing.
def new_model():
    torch.manual_seed(0)
    model = load_crema("")
    features = Features(model, store=kept)
    widths = {p.side: m.features.shape[-1] for p, m in zip(train[0].media, features(train[:1])[0])}
    model.configure(CONFIG)
    for name in SIDES:
        model.add_side(name, widths[name])
    return model, features


kept: dict = {}                                                               # features of the frozen encoder, shared by the models below
model, features = new_model()
features.prepare(train + test)
own = {name: sum(p.numel() for p in model.multimodal.own(name).values()) for name in ["rgb", *SIDES]}
print("parameters of its own:", own, "fusion:", sum(p.numel() for p in model.fusion.parameters()), "shared and frozen Q-Former:", sum(
    p.numel() for p in model.multimodal.qformer.parameters()) - sum(p.numel() for pair in model.multimodal.pairs().values() for side in (pair.A, pair.B) for p in side.parameters()))
media = model.collate([test[0].parts], features(test[:1]))["media"][0]
print("tokens that the LM reads for a video:", model.count(media), "added to the video's (--join add), or with --join concat", 2 * model.count(media), "however many modalities")


# 3. The same batches, learned jointly (a step a batch) and in sequence (a step a modality, each on its own parts and the fusion).
def accuracy(model, sides: list[str]) -> dict[str, float]:
    asked, right = limit_frames(add_side_channels(rows["test"], sides), FRAMES), {}
    model.eval()
    for s, text in zip(asked, rank_options(model, asked, features(asked))):
        right.setdefault(s.row["type"], []).append(s.gold.choice in text)
    model.train()
    return {kind: sum(found) / len(found) for kind, found in right.items()}


def fit(sequential: bool):
    model, features = new_model()
    names = ["rgb", *SIDES]
    exits, began, steps = EarlyExit(names, 1.4), time.time(), 0
    model.train().learn(names)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0)
    epoch = len(train) // BATCH
    for step, some in zip(bar := tqdm(range(BATCHES), desc="in sequence" if sequential else "jointly"), Mixer(train, BATCH, 0)):
        batch = model.collate([s.parts for s in some], features(some), [s.target for s in some])
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, (step + 1) / 10, (BATCHES - step) / (BATCHES / 2))
        for learned in [[name] for name in exits.live] if sequential else [names]:
            model.learn(learned)
            loss, tokens = model(batch)
            (loss / tokens).backward()
            for name in learned:
                exits.note(name, model.gradient_norm(name))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
        if sequential:
            exits.end_step((step + 1) % epoch == 0)
        bar.set_postfix(loss=f"{loss.item() / tokens:.3f}")
    return model, exits, steps, time.time() - began


print(f"{'training':<12}{'steps':>7}{'seconds':>9}   accuracy with all modalities; exits (epoch, counted from 0)")
for sequential in (False, True):
    model, exits, steps, seconds = fit(sequential)
    print(f"{'in sequence' if sequential else 'jointly':<12}{steps:>7}{seconds:>9.0f}   {accuracy(model, SIDES)}; {exits.exits if sequential else '-'}")

# 4. What each modality adds, by kind of question; and the norms that decide when one has had enough (the rule looks from the sixth epoch on).
table = {"+".join(["rgb", *sides]): accuracy(model, sides) for sides in ([], *([name] for name in SIDES), SIDES)}
for name, row in table.items():
    print(f"{name:<20}", row)
figure = Figure(figsize=(11, 6.2), layout="constrained")
FigureCanvasAgg(figure)
top, bottom = figure.subfigures(2, 1, height_ratios=[1.5, 1.4])
shown = next(s for s in test if s.row["type"] == SIDES[0])
for axes, part in zip(top.subplots(len(shown.media), 1), shown.media):
    arrays, _ = load_media(part, 96)
    draw_frames(axes, arrays, 10)
    axes.set_title(f"{part.side or 'rgb: ' + shown.parts[-1].text.strip() + ' ' + shown.gold.choice}", fontsize=9, loc="left")
left, right = bottom.subplots(1, 2)
draw_grid(left, table)
for name, norms in exits.norms.items():
    line, = right.plot(norms, marker=".", label=name)
    limits = [1.4 * sum(norms[:e]) / e for e in range(5, len(norms))]
    right.plot(range(5, len(norms)), limits, linestyle=":", color=line.get_color())
right.set(xlabel="epoch")
right.set_title("mean gradient norm of each adapter; dotted: it exits above this", fontsize=9, loc="left")
right.legend()
save(figure, Path("answers/tutorial_07.png"))
print("picture: answers/tutorial_07.png")

# One line to change: SIDES = ["touch", "points"], or the name of an encoder of your own (encoders.register); the tokens of the LM stay as many.
