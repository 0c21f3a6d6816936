"""Tutorial 2: from frames and waves to tokens. Read beside Crab (arXiv 2503.13068), the section on the visual and the audio branch.

    python tutorials/02_encoders_and_qformer.py     (half a minute on a CPU; the first time it also builds a small world)

An LM reads vectors of its own width, a few hundred at most. A frame gives 144 patch features here, a second of sound 48, of the
encoders' width. This script follows one clip through encoders and connectors and draws what the connectors' queries look at.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from crab_min.backbones.composed import load_base
from crab_min.data import load_media, read_samples
from crab_min.evaluation.pictures import draw_wave, save
from crab_min.world.folders import WorldConfig, build_world

# 1. A clip: frames (T, H, W, 3), and its sound in stretches that go with the frames.
model = load_base()
sample = read_samples(build_world(WorldConfig(world_clips=48, world_test=4), seed=0), ["ave"], "test")[0]
(frames, seconds), (waves, _) = (load_media(part, model.frame_size) for part in sample.media)
(label, ((start, end), *_)), = sample.gold.events
print(f"{Path(sample.media[0].path).name}: {len(frames)} frames of {frames.shape[1]} x {frames.shape[2]} pixels, "
      f"{len(waves)} stretches of sound of {len(waves[0]) / 16000:.0f} s; {label} from {start} to {end}\n")

# 2. Encoders, frozen: every frame and every stretch by itself. BEATs reads a spectrogram in patches of 160 ms x 16 of 128 bands.
patches = model.vision(torch.from_numpy(frames)[None])
sound, real = model.audio([torch.from_numpy(w) for w in waves])
side = int(patches.shape[2] ** .5)
print(f"vision encoder  {tuple(patches.shape)}: clips, frames, {side} x {side} patches, width")
print(f"audio encoder   {tuple(sound.shape)}: clips, stretches, {sound.shape[2] // 8} times x 8 bands, width\n")

# 3. Connectors: a few learned queries read all features of one time step (cross-attention), an MLP brings them to the LM's width.
looked = {}
for name, connector in (("video", model.visual_qformer), ("audio", model.audio_qformer)):
    attention = connector.qformer.encoder.layer[-1].crossattention.attention
    attention.register_forward_hook(lambda module, inputs, output, name=name: looked.__setitem__(name, output[1]))          # (T, heads, Q, S)
    c = connector.config
    print(f"{name} connector: LayerNorm, {c.layers} layers with {c.queries} queries of width {c.hidden}, MLP to width {c.width_out}; "
          f"{sum(p.numel() for p in connector.parameters()):,} parameters")
with torch.no_grad():
    seen, heard = model.visual_qformer(patches), model.audio_qformer(sound, real)
print(f"\nvideo {tuple(seen.shape[1:])} and sound {tuple(heard.shape[1:])}: {seen[0].shape[0] * seen.shape[2]} + {heard[0].shape[0] * heard.shape[2]} places in the prompt.")
print("At full size (Crab): 10 frames x 32 queries + 10 stretches x 32 queries = 640 places of width 4096.")

# 4. When? A token does not know its second. The order in the prompt tells it, and on the tiny base a learned code for each second too.
with torch.no_grad():
    first, last = model.tokens(model.encode("video", [np.stack([frames[0]] * 10)], [seconds]), [0])[0].unflatten(0, (10, -1))[[0, -1]]
print(f"\nTen times the same frame: its tokens have length {first.norm(dim=-1).mean():.2f}, and those of the first and the last differ by "
      f"{(first - last).norm(dim=-1).mean():.2f}, the difference of the codes of second 0 and second 9.")

# 5. What the queries look at, in the last layer, mean over heads, while the thing sounds.
queries = model.visual_qformer.config.queries
figure = Figure(figsize=(12, 4.4), layout="constrained")
FigureCanvasAgg(figure)
axes = figure.subplots(2, queries + 1)
moment = start
axes[0, 0].imshow(frames[moment])
axes[0, 0].set_title(f"frame {moment}", fontsize=9)
draw_wave(axes[1, 0], [waves[moment]], 1)
axes[1, 0].set_title(f"second {moment}: {label if start <= moment < end else 'no ' + label}", fontsize=9)
for q, (above, below) in enumerate(axes[:, 1:].T):
    grid = looked["video"][moment].mean(0)[q].view(side, side).numpy()
    above.imshow(frames[moment])
    above.imshow(grid, cmap="magma", alpha=.65, extent=(-.5, frames.shape[2] - .5, frames.shape[1] - .5, -.5))
    above.set_title(f"visual query {q}", fontsize=9)
    if q < model.audio_qformer.config.queries:
        below.imshow(looked["audio"][moment].mean(0)[q].view(-1, 8).T.numpy(), origin="lower", aspect="auto", cmap="magma")
        below.set_title(f"audio query {q}", fontsize=9)
        below.set(xlabel="160 ms", ylabel="band")
    else:
        below.axis("off")
for a in axes.flat:
    a.set(xticks=[], yticks=[])
save(figure, Path("answers/tutorial_02.png"))
print("\nLook at answers/tutorial_02.png: the frame and what each visual query attends to, the sound and what each audio query attends to.")
print("Now set `moment` to a second in which nothing sounds and run it again: which queries move?")
