"""Make the pictures of README.md and docs/.

    python docs/figures/make.py                     all of them
    python docs/figures/make.py scores run_folder   these two
    python docs/figures/make.py scores --run runs/crab_plus-tiny

A fresh clone is enough: answers come from the shipped adapter on a small world, the pictures of the
mask decoder and of CREMA's exits from tutorials 5 and 7. The default run's scores and log are in
default_run/; --run replaces them with those of another run.
"""

import argparse
import json
import runpy
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import matplotlib.image
import numpy as np
import torch
from drawing import (
    DARK,
    GREY,
    HERE,
    KIND_COLOURS,
    PALE,
    PAPERS,
    WIDTH,
    arrow,
    box,
    canvas,
    save_picture,
)
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from crab_min.answers import GRID
from crab_min.cli import parse_train
from crab_min.config import WorldConfig
from crab_min.crema import FIRST_EXIT, EarlyExit
from crab_min.data import Sample, gold_mask, load_media, read_samples
from crab_min.evaluation.pictures import (
    RED,
    TEAL,
    YELLOW,
    draw_curves,
    draw_frames,
    draw_image,
    draw_scores,
    draw_wave,
    new_figure,
)
from crab_min.evaluation.routing import KINDS, PADDING, routing_stats, token_kinds
from crab_min.evaluation.scores import sample_score
from crab_min.features import Features
from crab_min.model import ASSETS, NO_LABEL
from crab_min.pave import partition_steps
from crab_min.recipes import crab_plus
from crab_min.tasks import TASKS
from crab_min.tools.loading import load_run
from crab_min.tools.plan import plan
from crab_min.world.folders import build_world

ROOT = HERE.parents[1]
DEFAULT_RUN = HERE / "default_run"
WORLD = WorldConfig(world_clips=48, world_test=12)


class Shipped:
    """The shipped adapter, and samples of a small world."""

    def __init__(self):
        self.root = build_world(WORLD, seed=0)
        self.run = load_run(str(ASSETS / "crab_plus-tiny"))
        self.model = self.run.model
        self.features = Features(self.model, keep=True)

    def samples(self, task: str, split: str = "test") -> list[Sample]:
        """Return the samples of a task and split."""
        return read_samples(self.root, [task], split)

    def answer(self, sample: Sample) -> str:
        """Return the text that the model generates for a sample."""
        batch = self.model.collate([sample.parts], self.features([sample]))
        return self.model.generate(batch, 80, None, 1)[0]


# --- the clip of the README -----------------------------------------------------------------------
def answer() -> None:
    """Draw a clip, the time of its event and the box of what sounds, as the model answers.

    It is the first test clip with a silent object whose event is right to the second.
    """
    shipped = Shipped()
    for event, place in zip(shipped.samples("ave"), shipped.samples("s4")):
        event_text, place_text = shipped.answer(event), shipped.answer(place)
        if sample_score(event, event_text) == 1 and "silent" in event_text:
            break
    else:
        raise SystemExit("answer: no test clip with a silent object is answered right")
    (frames, seconds), (waves, _) = [load_media(part, GRID) for part in event.media]
    label, spans = event.task.parse(event_text).events[0]

    figure = new_figure(WIDTH, 6.2)
    top, bottom = figure.subfigures(2, 1, height_ratios=[3.3, 2.9])
    question = event.parts[-1].text.strip()
    top.suptitle(f"video + sound: {question}", x=0.02, ha="left", fontsize=11)
    strip, wave, line = top.subplots(3, 1, height_ratios=[1.1, 0.8, 0.6])
    draw_frames(strip, frames, seconds)
    draw_wave(wave, waves, seconds)
    for start, end in spans:
        line.barh(0, end - start, left=start, height=0.8, color=TEAL)
        line.text(start + 0.15, 0, f"{label}, {start} to {end} s", va="center", color="white")
    line.set(xlim=(0, seconds), ylim=(-0.6, 0.6), yticks=[], xlabel="seconds")
    for axes in (strip, wave):
        axes.set_xticks([])
    top.supxlabel(wrap(event_text, 62), x=0.02, ha="left", color=TEAL, fontsize=11)

    image = load_media(place.media[0], GRID)[0]
    question = place.parts[-1].text.strip()
    bottom.suptitle(f"image + sound: {question}", x=0.02, ha="left", fontsize=11)
    left, right = bottom.subplots(1, 2, width_ratios=[1, 1.15])
    draw_image(left, image[0], place.task.parse(place_text), place.gold)
    right.axis("off")
    right.text(0, 0.98, wrap(place_text, 30), va="top", color=TEAL, transform=right.transAxes)
    legend = "box and points: the answer\ndashed: the gold box"
    right.text(0, 0.02, legend, va="bottom", color=GREY, transform=right.transAxes)
    save_picture(figure, "answer")


def wrap(text: str, columns: int) -> str:
    """Break a text at spaces and after commas between numbers."""
    lines, line = [], ""
    for word in text.replace(",[", ", [").split(" "):
        if len(line) + len(word) > columns and line:
            lines.append(line.rstrip())
            line = ""
        line += word + " "
    return "\n".join([*lines, line.rstrip()])


# --- the four papers ------------------------------------------------------------------------------
def papers() -> None:
    """Draw the four papers as one stack of blocks, from media to answers."""
    figure, axes = canvas(6.6, rows=110)
    crab, crab_plus_, pave_, crema_ = PAPERS.values()

    # from the top: media, encoders, connectors, what a paper adds, the LM, answers, masks
    for left, text in ((0, "frames"), (26, "sound")):
        box(axes, left, 0, 22, 8, text)
    box(axes, 56, 0, 44, 8, "flow, depth, 3D, another view")
    for x in (11, 37, 78):
        arrow(axes, (x, 8), (x, 13))
    box(axes, 0, 13, 100, 8, "frozen encoders: CLIP, SigLIP, ViT-g, BEATs, your own")
    for x in (16, 50, 84):
        arrow(axes, (x, 21), (x, 26))
    box(axes, 0, 26, 31, 13, "projectors of the\nLLM (PAVE too)", crab_plus_)
    box(axes, 34.5, 26, 31, 13, "a Q-Former for\nframes, one for sound", crab)
    box(axes, 69, 26, 31, 13, "one Q-Former, MMQA\nper modality", crema_)
    for x in (16, 50, 84):
        arrow(axes, (x, 39), (x, 44))
    box(axes, 0, 44, 65.5, 11, "patch: $z(k) + g(v(k), s_{N(k)})$", pave_)
    box(axes, 69, 44, 31, 11, "self-gated fusion", crema_)
    for x in (33, 84):
        arrow(axes, (x, 55), (x, 60))
    text = "frozen LLM + I-LoRA: $W x + (\\alpha / r)\\,\\Sigma_k w_k B_k A\\,x$"
    box(axes, 0, 60, 100, 11, f"{text}\n(PAVE: LoRA; CREMA: no adapter)", crab)
    arrow(axes, (50, 71), (50, 76))
    text = "unified interface: reasoning, then <answer>, <event>, box, points"
    box(axes, 0, 76, 100, 8, text, crab_plus_)
    for x in (24, 76):
        arrow(axes, (x, 84), (x, 89))
    box(axes, 0, 89, 48, 8, "mask tokens → decoder → mask", crab)
    box(axes, 52, 89, 48, 8, "box and points → SAM2", crab_plus_)

    # the papers' colours; I-LoRA and the interface are in two of them
    names = {"Crab": "Crab (I-LoRA: Crab+ too)", "Crab+": "Crab+", "PAVE": "PAVE", "CREMA": "CREMA"}
    for left, (paper, text) in zip((0, 48, 66, 83), names.items()):
        axes.add_patch(Rectangle((left, 103), 3, 4, color=PAPERS[paper]))
        axes.text(left + 4.5, 105, text, va="center", color=DARK)
    save_picture(figure, "papers")


# --- the tokens of one prompt ---------------------------------------------------------------------
def tokens() -> None:
    """Draw the token row of one training sample by kind, with the tokens that are learned."""
    shipped = Shipped()
    model = shipped.model
    sample = shipped.samples("avqa", "train")[0]
    media = shipped.features([sample])
    batch = model.collate([sample.parts], media, [sample.target])
    kinds = token_kinds(model, batch)[0]
    assert PADDING not in kinds
    learned = (batch.labels[0] != NO_LABEL).numpy()
    n_tokens = Counter(KINDS[kind] for kind in kinds)

    figure = new_figure(WIDTH, 4.0)
    row, table = figure.subplots(2, 1, height_ratios=[1, 2.1])
    for i, kind in enumerate(kinds):
        colour = KIND_COLOURS[KINDS[kind]]
        row.add_patch(Rectangle((i, 1.3), 1, 1.4, facecolor=colour, edgecolor="white", lw=0.3))
        row.add_patch(Rectangle((i, 0), 1, 0.8, facecolor=DARK if learned[i] else PALE))
    row.set(xlim=(0, len(kinds)), ylim=(0, 2.8), xticks=[0, len(kinds)])
    row.set_yticks([2, 0.4], ["kind", "loss"])
    row.set_title(f"one training sample of {sample.task.name}: {len(kinds)} tokens")
    for side in row.spines.values():
        side.set_visible(False)
    row.tick_params(left=False)

    # what each kind is
    question = sample.parts[-1].text.strip()
    per_frame = model.visual_qformer.config.queries
    per_segment = model.audio_qformer.config.queries
    meanings = {
        "text": wrap(f'"video:", "audio:", "{question}"', 44),
        "video": f"{len(media[0][0].features)} frames x {per_frame} queries",
        "audio": f"{len(media[0][1].features)} seconds x {per_segment} queries",
        "answer": wrap(sample.target, 44),
    }
    table.set(xlim=(0, 100), ylim=(len(meanings) + 0.6, -0.5))
    table.axis("off")
    for i, (kind, meaning) in enumerate(meanings.items()):
        table.add_patch(Rectangle((0, i - 0.25), 3, 0.5, color=KIND_COLOURS[kind]))
        table.text(5, i, f"{n_tokens[kind]} {kind}", va="center", weight="bold")
        table.text(26, i, meaning, va="center")
    note = f"dark under the row: {learned.sum()} tokens with a loss, the answer and its end"
    table.text(0, len(meanings), note, va="center", color=GREY)
    save_picture(figure, "tokens")


# --- I-LoRA ---------------------------------------------------------------------------------------
def ilora() -> None:
    """Draw the layer, and the mean weight of its heads by kind of token and layer.

    The samples are test clips with the answers that the model gives.
    """
    shipped = Shipped()
    samples = [s for task in ("avqa", "ave", "s4") for s in shipped.samples(task)]
    prompts = [sample.parts for sample in samples]
    targets = [shipped.answer(sample) for sample in samples]
    batch = shipped.model.collate(prompts, shipped.features(samples), targets)
    share = routing_stats(shipped.model, [batch]).share

    figure = new_figure(WIDTH, 5.4)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    draw_layer(top.subplots())

    # per head: kinds of tokens x layers, a mean over the linears of each layer
    layers = sorted({key.layer for key in share})
    kinds = [kind for kind in KINDS if any(key.kind == kind for key in share)]
    weights = np.zeros((len(kinds), len(layers), len(next(iter(share.values())))))
    for i, kind in enumerate(kinds):
        for j, layer in enumerate(layers):
            rows = [w for key, w in share.items() if (key.kind, key.layer) == (kind, layer)]
            weights[i, j] = np.mean(rows, 0)
    heads = weights.shape[-1]
    all_axes = bottom.subplots(1, heads, sharey=True)
    for head, axes in enumerate(all_axes):
        image = axes.imshow(
            weights[..., head], cmap="RdBu_r", vmin=0, vmax=2 / heads, aspect="auto"
        )
        axes.set(title=f"$w_{head + 1}$", xlabel="layer", xticks=range(len(layers)))
    all_axes[0].set_yticks(range(len(kinds)), kinds)
    bar = bottom.colorbar(image, ax=all_axes, ticks=[0, 1 / heads, 2 / heads])
    bar.ax.set_yticklabels(["0", "1/3", "2/3"])
    save_picture(figure, "ilora")


def draw_layer(axes: Axes) -> None:
    """Draw a linear with I-LoRA: W, the shared A, one B per head, the router."""
    colour = PAPERS["Crab"]
    axes.set(xlim=(0, 100), ylim=(58, 0))
    axes.axis("off")
    axes.text(1, 31, "$x$", va="center", fontsize=14)
    for y in (5, 31, 54):
        axes.plot([5, 10, 10, 14], [31, 31, y, y], color=DARK, lw=1.2)
    box(axes, 14, 0, 52, 10, "$W$, frozen")
    box(axes, 14, 25, 14, 12, "$A$", colour)
    box(axes, 14, 48, 52, 10, "router: $w = softmax(R\\,x)$", colour)
    for k, top in enumerate((15, 26.5, 38), 1):
        box(axes, 48, top, 18, 8, f"$w_{k}\\,B_{k}$", colour)
        arrow(axes, (28, 31), (48, top + 4))
        axes.plot([66, 78], [top + 4, 28], color=DARK, lw=1.2)
    axes.plot([66, 78], [5, 28], color=DARK, lw=1.2)
    axes.text(81, 28, "$+$", ha="center", va="center", fontsize=16)
    arrow(axes, (84, 28), (92, 28))
    axes.text(95, 28, "$y$", va="center", fontsize=14)
    axes.text(70, 53, "for each token", va="center", color=GREY)


# --- PAVE -----------------------------------------------------------------------------------------
def pave() -> None:
    """Draw N(k): which side steps each frame attends to, for the sound of a clip."""
    frames, steps = 32, 59
    figure = new_figure(WIDTH, 4.4)
    axes = figure.subplots()
    attended = np.zeros((frames, steps))
    for frame, part in enumerate(partition_steps(steps, frames)):
        attended[frame, part] = 1
    sizes = Counter(int(n) for n in attended.sum(1))
    axes.imshow(1 - attended, cmap="Blues_r", vmin=-0.4, vmax=1, aspect="auto")
    axes.set_xticks(np.arange(-0.5, steps), minor=True)
    axes.set_yticks(np.arange(-0.5, frames), minor=True)
    axes.grid(which="minor", color="white", lw=0.6)
    axes.tick_params(which="minor", length=0)
    axes.set(xlabel="step j of the side channel", ylabel="frame k of the video")
    axes.set_title("z′(k) = z(k) + g(v(k), {s(j): j ∈ N(k)})")
    lines = [f"{n} frames with {size} of {steps} steps each" for size, n in sizes.items()]
    axes.text(57, 2, "\n".join(lines), ha="right", va="top", color=DARK)
    save_picture(figure, "pave")


# --- CREMA ----------------------------------------------------------------------------------------
def crema() -> None:
    """Draw the two token layouts, and gradient norms with the exit rule, from tutorial 7."""
    exits = run_tutorial("07_crema.py")["exits"]
    figure = new_figure(WIDTH, 6.0)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.35])
    draw_layouts(top.subplots())
    draw_exits(bottom.subplots(), exits)
    save_picture(figure, "crema")


def draw_layouts(axes: Axes) -> None:
    """Draw the tokens that the LM gets for four frames; a box is the Q tokens of one."""
    axes.set(xlim=(0, 100), ylim=(42, 0))
    axes.axis("off")
    video, fused = PAPERS["PAVE"], PAPERS["CREMA"]
    axes.text(0, 2, "--fusion concat: fused tokens behind the video's", va="center")
    for i in range(4):
        box(axes, i * 11, 6, 10, 9, f"$v_{i + 1}$", video)
        box(axes, 46 + i * 11, 6, 10, 9, f"$Z_{i + 1}$", fused)
    axes.text(0, 24, "--fusion add: as many tokens as the video alone", va="center")
    for i in range(4):
        box(axes, i * 18, 28, 17, 9, f"$v_{i + 1} + Z_{i + 1}$", fused)
    for left, row in ((92, 10.5), (74, 32.5)):
        axes.text(left, row, "text", va="center", color=GREY)
    axes.text(0, 41, "Z = sigmoid(F) · F,  F = W [$Z_1$; $Z_2$; ...] + b", va="center")


def draw_exits(axes: Axes, exits: EarlyExit) -> None:
    """Draw the gradient norm of each modality by epoch, and tau times its mean so far."""
    colours = (TEAL, RED, YELLOW, PAPERS["PAVE"])
    for (name, norms), colour in zip(exits.norms.items(), colours):
        axes.plot(norms, ".-", label=name.replace("_", " "), color=colour)
        epochs = range(FIRST_EXIT, len(norms))
        limits = [exits.threshold * np.mean(norms[:epoch]) for epoch in epochs]
        axes.plot(epochs, limits, "--", color=colour, lw=1)
        if name in exits.exit_epochs:
            epoch = exits.exit_epochs[name]
            axes.plot(epoch, norms[epoch], "o", ms=13, mfc="none", color=colour)
    axes.set(xlabel="epoch e", ylabel="gradient norm $g_e$", yscale="log", ylim=(3e-4, None))
    axes.legend(ncols=2, loc="lower left", frameon=False)
    axes.set_title(f"circle: exit, above the dashed tau · mean (tau = {exits.threshold})")


def run_tutorial(name: str) -> dict:
    """Run a tutorial and return the values of its variables."""
    return runpy.run_path(str(ROOT / "tutorials" / name))


# --- masks ----------------------------------------------------------------------------------------
def masks() -> None:
    """Draw the stages of Crab's mask decoder, as tutorial 5 trains it on five pictures."""
    page = run_tutorial("05_segmentation.py")
    samples = page["train"][:3]
    levels = [level.sigmoid().numpy() for level in page["levels_of"](samples)]
    figure = new_figure(WIDTH, 4.1)
    all_axes = figure.subplots(len(samples), 5)
    for i, (sample, row) in enumerate(zip(samples, all_axes)):
        row[0].imshow(load_media(sample.media[0], 96)[0][0])
        maps = [gold_mask(sample), *(level[i, 0] for level in levels)]
        for axes, values in zip(row[1:], maps):
            axes.imshow(values, cmap="Blues", vmin=0, vmax=1)
        for axes in row:
            axes.set(xticks=[], yticks=[])
    for axes, title in zip(all_axes[0], ("picture", "gold", "coarse", "fine", "mean")):
        axes.set_title(title)
    save_picture(figure, "masks")


# --- the default run ------------------------------------------------------------------------------
def scores() -> None:
    """Draw the score of each task: best constant answer, frozen base, trained model."""
    results = json.loads((DEFAULT_RUN / "metrics.json").read_text(encoding="utf-8"))["tasks"]
    figure = new_figure(WIDTH, 6.4)
    axes = figure.subplots()
    rows = np.arange(len(results))
    bars = (
        ("metric", "trained", TEAL),
        ("base", "frozen base", YELLOW),
        ("constant", "best constant", GREY),
    )
    for i, (key, label, colour) in enumerate(bars):
        values = [result[key] for result in results.values()]
        axes.barh(rows + 0.27 * (i - 1), values, 0.27, label=label, color=colour)
    axes.set_yticks(rows, [f"{TASKS[task].family}  {task}" for task in results])
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6), xlabel="score on test clips")
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.35, 1.07), frameon=False)
    axes.grid(axis="x", alpha=0.3)
    save_picture(figure, "scores")


def run_folder() -> None:
    """Draw the files of a run folder, three of them as pictures."""
    files = {
        "config.json": "every setting",
        "adapter/": "I-LoRA, as PEFT saves it",
        "parts/": "other trained parts",
        "log.csv, curves.png": "each step",
        "metrics.json, scores.png": "test scores",
        "predictions/TASK.jsonl": "every answer",
        "answers.png": "examples",
        "checkpoints/": "while it runs",
    }
    results = json.loads((DEFAULT_RUN / "metrics.json").read_text(encoding="utf-8"))["tasks"]
    with tempfile.TemporaryDirectory() as folder:
        curves_png, scores_png = Path(folder, "curves.png"), Path(folder, "scores.png")
        draw_curves(curves_png, DEFAULT_RUN / "log.csv")
        draw_scores(scores_png, results)
        pictures = [matplotlib.image.imread(path) for path in (curves_png, scores_png)]

    figure = new_figure(WIDTH, 5.0)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.4, 1])
    axes = top.subplots()
    axes.set(xlim=(0, 100), ylim=(len(files) + 0.6, -0.7))
    axes.axis("off")
    axes.text(0, 0, "runs/crab_plus-tiny/", va="center", weight="bold")
    for i, (name, meaning) in enumerate(files.items(), 1):
        axes.text(5, i, name, va="center", family="monospace")
        axes.text(60, i, meaning, va="center", color=GREY)
    for axes, picture, title in zip(
        bottom.subplots(1, 2, width_ratios=[1, 1.6]), pictures, ("curves.png", "scores.png")
    ):
        axes.imshow(picture)
        axes.set_title(title)
        axes.set(xticks=[], yticks=[])
    save_picture(figure, "run_folder")


# --- memory ---------------------------------------------------------------------------------------
def memory() -> None:
    """Draw the estimated memory of training by batch size, for Crab+ on Qwen2.5-Omni."""
    small = "--load-in-4bit --r 32 --alpha 64"
    commands = {
        "7B": "crab_plus-7b",
        "7B, 4 bits, r 32": f"crab_plus-7b {small}",
        "3B": "crab_plus-3b",
        "3B, 4 bits, r 32": f"crab_plus-3b {small}",
    }
    sizes = (1, 4, 8, 16)
    figure = new_figure(WIDTH, 4.2)
    axes = figure.subplots()
    for (label, command), colour in zip(commands.items(), (TEAL, TEAL, RED, RED)):
        gigabytes = []
        for size in sizes:
            _, settings = parse_train([*command.split(), "--batch-size", str(size)])
            memory = next(iter(plan(crab_plus, settings).memory.values()))
            gigabytes.append(memory.training / 1e9)
        line = "o--" if "4 bits" in label else "o-"
        axes.plot(sizes, gigabytes, line, label=label, color=colour)
    for gpu in (16, 24, 48):
        size = gpu * 2**30 / 1e9
        axes.axhline(size, color=GREY, lw=0.8)
        axes.text(17, size, f"{gpu} GB", va="center", color=GREY)
    axes.set(
        xticks=sizes, xlabel="samples per batch", ylabel="GB in training; lines: GPUs", ylim=(0, 72)
    )
    axes.set_title("Crab+ on Qwen2.5-Omni: estimated, not measured")
    axes.legend(ncols=2, loc="upper left", frameon=False)
    save_picture(figure, "memory")


ALL = (answer, papers, tokens, ilora, pave, crema, masks, scores, run_folder, memory)
PICTURES = {picture.__name__: picture for picture in ALL}


def main() -> None:
    """Make the pictures that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs="*", help=f"of {', '.join(PICTURES)} (default: all)")
    parser.add_argument("--run", help="a finished run, whose scores and log replace default_run/")
    given = parser.parse_args()
    unknown = [name for name in given.pictures if name not in PICTURES]
    if unknown:
        parser.error(f"no picture {unknown[0]}; choose from {', '.join(PICTURES)}")
    if given.run:
        for name in ("metrics.json", "log.csv"):
            shutil.copyfile(Path(given.run, name), DEFAULT_RUN / name)
    torch.manual_seed(0)
    for name in given.pictures or PICTURES:
        PICTURES[name]()


if __name__ == "__main__":
    main()
