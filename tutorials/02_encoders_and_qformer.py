"""From frames and waves to tokens: CLIP, BEATs and the Q-Former connector, on the tiny base. Crab (2503.13068), section 3.2. About half a minute.

    python tutorials/02_encoders_and_qformer.py

Draws answers/02_encoders_and_qformer.png: a frame, the sound, what the queries of each connector look at.
"""
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from crab_min.composed import load_base
from crab_min.data import load_media, read_samples
from crab_min.viz import draw_wave, save
from crab_min.world_tasks import WorldConfig, build_world

model = load_base()
sample = read_samples(build_world(WorldConfig(), 0), ["ave"], "test", limit=1)[0]
video, audio = sample.media
frames, seconds = load_media(video, model.frame_size)
waves, _ = load_media(audio, model.frame_size)
print(f"{Path(video.path).name}: {len(frames)} frames of {frames.shape[1:3]} pixels, {len(waves)} stretches of sound of {len(waves[0]) / 16000:.1f} s; {sample.gold.events}\n")

# --- 1. encoders: frames (B, T, H, W, 3) -> patch features (B, T, S, W); waves -> features (B, T, S, W) and which are real
patches = model.vision(torch.from_numpy(frames)[None])
sound, real = model.audio([torch.from_numpy(w) for w in waves])
print(f"vision encoder  {tuple(patches.shape)}: clips, frames, {int(patches.shape[2] ** .5)} x {int(patches.shape[2] ** .5)} patches, width")
print(f"audio encoder   {tuple(sound.shape)}: clips, stretches, {sound.shape[2] // 8} rows of 160 ms x 8 bands, width\n")

# --- 2. connectors: learned queries read the S tokens of one time step, and an MLP brings them to the LM's width
looked = {}


def watch(name, connector):
    """Keep what the queries' cross-attention in the last layer looks at: (T, heads, Q, S)."""
    attention = connector.qformer.encoder.layer[-1].crossattention.attention
    attention.register_forward_hook(lambda module, inputs, output: looked.__setitem__(name, output[1] if isinstance(output, tuple) and len(output) > 1 else None))


for name, connector in (("video", model.visual_qformer), ("audio", model.audio_qformer)):
    watch(name, connector)
    c = connector.config
    print(f"{name} connector: LayerNorm -> {c.layers} layers, {c.queries} queries of {c.hidden} -> MLP to {c.width_out}; {sum(p.numel() for p in connector.parameters()):,} parameters")
with torch.no_grad():
    seen, heard = model.visual_qformer(patches), model.audio_qformer(sound, real)
print(f"\ntokens {tuple(seen.shape)} for the video and {tuple(heard.shape)} for the sound: {seen[0].shape[0] * seen.shape[2]} + {heard[0].shape[0] * heard.shape[2]} places in the prompt")
print("At full size (Crab): 10 frames x 32 queries + 10 stretches x 32 queries = 640 places of width 4096.")

# --- 3. what a batch knows of a clip: its tokens carry the code of their second, so that the LM can say when
with torch.no_grad():
    features = model.encode("video", [frames], [seconds])
    first, second = model.tokens(features, [0])[0].unflatten(0, (len(frames), -1))[:2]
print(f"\nthe same frame at another second differs by its time code: |time[1] - time[0]| = {(model.time.weight[1] - model.time.weight[0]).norm():.2f}, "
      f"a token's length {first.norm(dim=-1).mean():.2f}")

# --- the picture
moment = min(len(frames) - 1, sample.gold.events[0][1][0][0] + 1)
side = int(patches.shape[2] ** .5)
figure = Figure(figsize=(12, 5.4), layout="constrained")
FigureCanvasAgg(figure)
queries = model.visual_qformer.config.queries
axes = figure.subplots(2, queries + 1)
axes[0, 0].imshow(frames[moment])
axes[0, 0].set_title(f"frame {moment}", fontsize=9)
for q in range(queries):
    grid = looked["video"][moment].mean(0)[q].view(side, side).numpy()
    axes[0, q + 1].imshow(frames[moment])
    axes[0, q + 1].imshow(np.kron(grid / grid.max(), np.ones((8, 8))), cmap="magma", alpha=.6)
    axes[0, q + 1].set_title(f"visual query {q}", fontsize=9)
draw_wave(axes[1, 0], [waves[moment]], 1)
axes[1, 0].set_title(f"second {moment}", fontsize=9)
for q in range(queries):
    if q < model.audio_qformer.config.queries:
        axes[1, q + 1].imshow(looked["audio"][moment].mean(0)[q].view(-1, 8).T.numpy(), origin="lower", aspect="auto", cmap="magma")
        axes[1, q + 1].set_title(f"audio query {q}", fontsize=9)
    else:
        axes[1, q + 1].axis("off")
axes[1, 1].set(xlabel="160 ms rows", ylabel="bands")
for a in axes.flat[:queries + 1]:
    a.set(xticks=[], yticks=[])
save(figure, Path("answers/02_encoders_and_qformer.png"))
print("\npicture: answers/02_encoders_and_qformer.png")
print("Now change `moment` to a second outside of the event: the sound's queries have nothing loud to look at, and spread.")
