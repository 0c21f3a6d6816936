"""Tutorial 6: PAVE, a patch for a side channel. Read beside arXiv 2503.19794, section 3, and crab_min/pave.py.

    python tutorials/06_pave.py                     (about two minutes on a CPU; builds a small world the first time)

A video LM sees ten frames of a clip. Between two of them the light flashes. A stream of 25 frames a second has it; 250 frames would be 1,500
tokens of this LM. The patch lets each frame read its own 25 of them and adds what it finds to that frame's tokens: the prompt stays as long.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from crab_min.backbones.composed import load_base
from crab_min.data import add_side_channels, load_media, read_samples
from crab_min.evaluation.answering import rank_options
from crab_min.evaluation.pictures import draw_frames, save
from crab_min.features import Features, Mixer
from crab_min.model import AdapterConfig
from crab_min.pave import PatchConfig, partition_steps
from crab_min.world.side_channels import build_side_world

# 1. A question that ten frames cannot answer. The side channel stands in the prompt beside its video, and has no tokens of its own.
file = build_side_world("", 300, 40, 0, ["fast"])
train, test = (add_side_channels(read_samples(file.with_name(f"{split}.jsonl"), [], split), ["fast"]) for split in ("train", "test"))
print("parts of a prompt:", ", ".join(f"{p.kind} (side channel)" if p.side else p.kind for p in test[0].parts), f"-> {test[0].parts[-1].text!r} {test[0].row['options']}")

# 2. The model, a patch, and why its last norm begins with a gain of zero.
torch.manual_seed(0)
model = load_base()
features = Features(model)
features.prepare(train + test)
batch = model.collate([s.parts for s in test[:4]], features(test[:4]), ["<answer> dog</answer>"] * 4)
before = model.losses(batch)
width = batch["media"][0].sides["fast"].features.shape[-1]
model.patches.add("fast", PatchConfig(model.patch_widths[0], width, model.patch_widths[1], hidden=128))
patch = model.patches["fast"]
print(f"a new patch of {sum(p.numel() for p in patch.parameters()):,} parameters leaves the losses bit-identical: {torch.equal(model.losses(batch), before)}")
print("so that training starts from the video LM as it was; in the first step only that gain and bias have a gradient, the rest follows")

# 3. Frame k reads stretch k alone: 250 steps for 10 frames are 25 each; 59 for 32 (sound a second, in the paper) are 27 pairs and 5 alone.
print("side steps a frame, 250 for 10:", (partition_steps(250, 10) >= 0).sum(1).tolist(), " 59 for 32:", (partition_steps(59, 32) >= 0).sum(1).tolist())

# 4. Train the patch, and a LoRA with it; everything else is frozen.
model.add_adapter(AdapterConfig(adapter="lora", r=16, alpha=32, dropout=0))
model.patches.requires_grad_(True)
base = rank_options(model, test, features(test))                                    # LoRA and patch are still no-ops: this is the frozen model
lora = [p for n, p in model.named_parameters() if p.requires_grad and "lora" in n]
optimizer = torch.optim.AdamW([{"params": lora, "lr": 4e-3}, {"params": model.patches.parameters(), "lr": 5e-3}], weight_decay=0)
model.train()
for step, some in zip(bar := tqdm(range(250), desc="patch and LoRA"), Mixer(train, 16, 0)):
    loss, tokens = model(model.collate([s.parts for s in some], features(some), [s.target for s in some]))
    (loss / tokens).backward()
    torch.nn.utils.clip_grad_norm_(lora + list(model.patches.parameters()), 1.)
    for group, peak in zip(optimizer.param_groups, (4e-3, 5e-3)):
        group["lr"] = peak * min(1, (step + 1) / 10, (250 - step) / 125)
    optimizer.step()
    optimizer.zero_grad()
    bar.set_postfix(loss=f"{loss.item() / tokens:.3f}")
model.eval()
patched = rank_options(model, test, features(test))
alone = add_side_channels(test, [])                                                  # the same questions, patch unused
unheard = rank_options(model, alone, features(alone))
for name, said in (("frozen base", base), ("patched", patched), ("patched, without its side channel", unheard)):
    print(f"{name:<36} {sum(s.gold.choice in text for s, text in zip(test, said))} of {len(test)} right")

# 5. What a frame attends to: the weights of the last block, over the 25 steps of each frame's stretch, for a clip.
sample = next(s for s, text in zip(test, patched) if s.gold.choice in text)
media = model.collate([sample.parts], features([sample]))["media"][0]
kept = {}
hooks = [linear.register_forward_hook(lambda module, given, out, name=name: kept.update({name: out})) for name, linear in
         (("query", patch.blocks[-1].query), ("key", patch.blocks[-1].key))]
with torch.no_grad():
    model.tokens([media], [0])
for hook in hooks:
    hook.remove()
q, k = (x.unflatten(-1, (patch.config.heads, -1)).transpose(1, 2) for x in (kept["query"], kept["key"]))       # (10 frames, heads, 6 or 25 x 4, 32)
weights = (q @ k.mT / q.shape[-1] ** .5).softmax(-1).mean(2)                                                   # (10, heads, 100), over the queries
by_step = weights.unflatten(-1, (25, 4)).sum(-1).transpose(0, 1).flatten(1)                                    # (heads, 250)
dense, _ = load_media(next(p for p in sample.media if p.side), 96)
light = np.abs(np.diff(dense.astype(float).mean((1, 2, 3)), prepend=dense[0].mean()))
figure = Figure(figsize=(11, 4.6), layout="constrained")
FigureCanvasAgg(figure)
top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[1.4, .6, 1.6])
draw_frames(top, load_media(sample.media[0], 96)[0], 10)
top.set_title(f"the ten frames; {sample.parts[-1].text} {sample.gold.choice}", fontsize=9, loc="left")
middle.plot(np.arange(250) / 25, light, color="#d1495b")
middle.set_title("change of brightness in the dense stream", fontsize=9, loc="left")
middle.set_yticks([])
bottom.imshow(by_step, extent=(0, 10, patch.config.heads - .5, -.5), aspect="auto", cmap="Blues")
bottom.vlines(range(1, 10), -.5, patch.config.heads - .5, color="black", linewidth=.5)
bottom.set(xlabel="seconds", ylabel="head", yticks=range(patch.config.heads), xlim=(0, 10))
bottom.set_title("attention of each frame, within its own second", fontsize=9, loc="left")
save(figure, Path("answers/tutorial_06.png"))
print("picture: answers/tutorial_06.png")
