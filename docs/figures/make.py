"""Make the pictures of README.md and docs/.

    python docs/figures/make.py                     all of them
    python docs/figures/make.py scores curves       these two
    python docs/figures/make.py scores curves --run runs/crab_plus-tiny

A fresh clone is enough: answers and routing come from the shipped adapter on a small world, the
pictures of the mask decoder and of CREMA's exits from pages 13 and 44. The default run's scores
and log are in default_run/; --run replaces them with those of another run.
"""

import argparse
import json
import runpy
import shutil
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

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
    line,
    save_picture,
)
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from crab_min.answers import GRID
from crab_min.cli import parse_train
from crab_min.config import ModalityConfig, WorldConfig
from crab_min.data import Sample, gold_mask, load_media, read_samples
from crab_min.evaluation.pictures import (
    RED,
    TEAL,
    draw_exits,
    draw_frames,
    draw_image,
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
from crab_min.tools.plan import GPUS, plan
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
    strip, wave, spans_row = top.subplots(3, 1, height_ratios=[1.1, 0.8, 0.6])
    draw_frames(strip, frames, seconds)
    draw_wave(wave, waves, seconds)
    for start, end in spans:
        spans_row.barh(0, end - start, left=start, height=0.8, color=TEAL)
        text = f"{label}, {start} to {end} s"
        spans_row.text(start + 0.15, 0, text, va="center", color="white")
    spans_row.set(xlim=(0, seconds), ylim=(-0.6, 0.6), yticks=[], xlabel="seconds")
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
    overlap = sample_score(place, place_text)
    legend = f"box and points: the answer\ndashed: the gold box\nIoU of the boxes: {overlap:.2f}"
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
    """Draw the four papers as columns between what they share: input, LM, answers."""
    figure, axes = canvas(7.4, rows=123)

    # from media to features
    box(axes, 0, 0, 22, 8, "frames")
    box(axes, 26, 0, 22, 8, "sound")
    box(axes, 52, 0, 48, 8, "flow, depth, 3D, another view")
    for x in (11, 37, 76):
        arrow(axes, (x, 8), (x, 12))
    prompt = "unified interface: media in order, then the question"
    box(axes, 0, 12, 100, 8, prompt, PAPERS["Crab+"])
    arrow(axes, (50, 20), (50, 24))
    box(axes, 0, 24, 100, 8, "frozen encoders: CLIP, SigLIP, ViT-g, BEATs, your own")

    # what each paper has of its own, down to the LM
    for i, (paper, colour) in enumerate(PAPERS.items()):
        axes.text(26 * i + 8, 36, paper, ha="right", va="center", color=colour, weight="bold")
        arrow(axes, (26 * i + 11, 32), (26 * i + 11, 40))
    box(axes, 0, 40, 22, 14, "Q-Formers, for\nframes and\nfor sound", PAPERS["Crab"], size=10)
    box(axes, 26, 40, 22, 14, "the LLM's own\nprojectors", PAPERS["Crab+"], size=10)
    box(axes, 52, 40, 15, 14, "the LLM's\nprojector", size=10)
    box(axes, 78, 40, 22, 14, "one Q-Former,\nMMQA per\nmodality", PAPERS["CREMA"], size=10)
    arrow(axes, (63, 54), (63, 59))
    arrow(axes, (71, 32), (71, 59))
    axes.text(72.2, 46, "side", rotation=90, ha="left", va="center", color=GREY, size=10)
    box(axes, 52, 59, 22, 11, "patch:\n$z + g(v, s)$", PAPERS["PAVE"], size=10)
    arrow(axes, (89, 54), (89, 59))
    box(axes, 78, 59, 22, 11, "self-gated\nfusion", PAPERS["CREMA"], size=10)
    for x, top in ((11, 54), (37, 54), (63, 70), (89, 70)):
        arrow(axes, (x, top), (x, 75))

    # the LM and its adapters
    box(axes, 0, 75, 100, 20, "")
    axes.text(50, 79.5, "frozen LLM", ha="center", va="center", color=DARK)
    adapter = "I-LoRA: $W x + (\\alpha / r)\\,\\Sigma_k w_k B_k A\\,x$"
    box(axes, 2, 84, 46, 9, adapter, PAPERS["Crab"])
    box(axes, 52, 84, 22, 9, "LoRA", PAPERS["PAVE"])
    axes.text(89, 88.5, "no adapter", ha="center", va="center", color=GREY)

    # answers
    arrow(axes, (50, 95), (50, 99))
    text = "unified interface: reasoning, then <answer>, <event>, box, points"
    box(axes, 0, 99, 100, 8, text, PAPERS["Crab+"])
    for x in (11, 37):
        arrow(axes, (x, 107), (x, 111))
    box(axes, 0, 111, 22, 12, "mask tokens,\nmask decoder", PAPERS["Crab"], size=10)
    box(axes, 26, 111, 22, 12, "box, points,\nSAM2", PAPERS["Crab+"], size=10)
    axes.text(76, 117, "no masks", ha="center", va="center", color=GREY)
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
        axes.set(title=f"head {head}: $w_{head}$", xlabel="layer", xticks=range(len(layers)))
    all_axes[0].set_yticks(range(len(kinds)), kinds)
    bar = bottom.colorbar(image, ax=all_axes, ticks=[0, 1 / heads, 2 / heads])
    bar.ax.set_yticklabels(["0", "1/3", "2/3"])
    save_picture(figure, "ilora")


def draw_layer(axes: Axes) -> None:
    """Draw a linear with I-LoRA: W, the shared A, one B per head, the router."""
    colour = PAPERS["Crab"]
    axes.set(xlim=(0, 100), ylim=(60, 0))
    axes.axis("off")
    axes.text(1, 31, "$x$", va="center", fontsize=14)
    for y in (5, 31, 55):
        line(axes, [(5, 31), (10, 31), (10, y), (14, y)])
    box(axes, 14, 0, 54, 10, "$W$, frozen")
    box(axes, 14, 25, 12, 12, "$A$", colour)
    box(axes, 14, 50, 40, 10, "router: $w = softmax(R\\,x)$", colour)

    # the router weights the output of each head; their sum is added to the frozen linear's output
    line(axes, [(54, 55), (64, 55), (64, 19)], colour)
    arrow(axes, (64, 55), (64, 46), colour)
    for k, top in enumerate((15, 26.5, 38)):
        box(axes, 38, top, 14, 8, f"$B_{k}$", colour)
        arrow(axes, (26, 31), (38, top + 4))
        line(axes, [(52, top + 4), (60, top + 4)])
        box(axes, 60, top, 8, 8, f"$w_{k}$", colour)
        line(axes, [(68, top + 4), (79, 28)])
    line(axes, [(68, 5), (79, 28)])
    axes.text(82, 28, "$+$", ha="center", va="center", fontsize=16)
    arrow(axes, (85, 28), (93, 28))
    axes.text(96, 28, "$y$", va="center", fontsize=14)
    axes.text(70, 55, "for each token", va="center", color=GREY)


# --- the heads by task ----------------------------------------------------------------------------
def heads_routing() -> None:
    """Draw the mean weight of each head by task, kind of token and linear, over all layers.

    The samples are test clips with their gold labels.
    """
    shipped = Shipped()
    tasks = ("ks", "avqa", "ave", "s4")
    stats = [mean_routing(shipped, task) for task in tasks]
    heads = len(next(iter(stats[0].values())))

    figure = new_figure(WIDTH, 7.2)
    all_axes = figure.subplots(len(tasks), heads, sharex=True, sharey="row")
    for task, share, row in zip(tasks, stats, all_axes):
        kinds = [kind for kind in KINDS if any(key[0] == kind for key in share)]
        linears = list(dict.fromkeys(linear for _, linear in share))
        for head, axes in enumerate(row):
            table = [[share[kind, linear][head] for linear in linears] for kind in kinds]
            image = axes.imshow(table, cmap="RdBu_r", vmin=0, vmax=2 / heads, aspect="auto")
            axes.set_xticks(range(len(linears)), linears, rotation=90)
            axes.set_title(f"{task}, head {head}")
        row[0].set_yticks(range(len(kinds)), kinds)
    bar = figure.colorbar(image, ax=all_axes, ticks=[0, 1 / heads, 2 / heads], aspect=40)
    bar.ax.set_yticklabels(["0", "1/3", "2/3"])
    save_picture(figure, "heads_routing")


def mean_routing(shipped: Shipped, task: str) -> dict[tuple[str, str], np.ndarray]:
    """Return the mean weight of each head by kind of token and linear, over all layers."""
    samples = shipped.samples(task)
    prompts = [sample.parts for sample in samples]
    targets = [sample.task.format(sample.gold) for sample in samples]
    batch = shipped.model.collate(prompts, shipped.features(samples), targets)
    by_linear = defaultdict(list)
    for key, weights in routing_stats(shipped.model, [batch]).share.items():
        by_linear[key.kind, key.linear.split(".")[-1].removesuffix("_proj")].append(weights)
    return {key: np.mean(layers, 0) for key, layers in by_linear.items()}


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
    """Draw the two token layouts, and gradient norms with the exit rule, from page 44."""
    exits = run_tutorial("44_sequential.py")["exits"]
    figure = new_figure(WIDTH, 6.0)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.35])
    draw_layouts(top.subplots())
    axes = bottom.subplots()
    draw_exits(axes, exits)
    default = ModalityConfig().exit_threshold
    axes.set_title(
        "dashed: tau · mean of the earlier norms; circle: exit, above it\n"
        f"tau = {exits.threshold} here, to show exits; default {default}"
    )
    save_picture(figure, "crema")


def draw_layouts(axes: Axes) -> None:
    """Draw the tokens that the LM gets for four frames; a box is the Q tokens of one."""
    axes.set(xlim=(0, 100), ylim=(50, 0))
    axes.axis("off")
    video, fused = KIND_COLOURS["video"], PAPERS["CREMA"]
    gate = "of each frame: $Z = sigmoid(F) \\cdot F$,  $F = W\\,[Z_{audio}; Z_{flow}; ...] + b$"
    axes.text(0, 2, gate, va="center")
    axes.text(0, 12, "--fusion concat (default): Z behind the video's tokens v", va="center")
    for frame in range(4):
        box(axes, frame * 11, 16, 10, 9, f"v({frame})", video)
        box(axes, 46 + frame * 11, 16, 10, 9, f"Z({frame})", fused)
    axes.text(0, 34, "--fusion add: as many tokens as the video alone", va="center")
    for frame in range(4):
        box(axes, frame * 18, 38, 17, 9, f"v({frame}) + Z({frame})", fused)
    for left, row in ((92, 20.5), (74, 42.5)):
        axes.text(left, row, "text", va="center", color=GREY)


def run_tutorial(name: str) -> dict:
    """Run a tutorial and return the values of its variables."""
    return runpy.run_path(str(ROOT / "tutorials" / name))


# --- masks ----------------------------------------------------------------------------------------
def masks() -> None:
    """Draw the levels of Crab's mask decoder, as page 13 trains it on five pictures."""
    page = run_tutorial("13_crab_masks.py")
    samples = page["train"][:2] + page["new"][:2]
    levels = [level.sigmoid().numpy() for level in page["levels_of"](samples)]
    figure = new_figure(WIDTH, 5.2)
    all_axes = figure.subplots(len(samples), 5)
    for i, (sample, row) in enumerate(zip(samples, all_axes)):
        row[0].imshow(load_media(sample.media[0], 96)[0][0])
        row[0].set_ylabel("trained" if i < 2 else "new")
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
    """Draw the score of each task: best constant answer and trained model.

    The tasks of the emotion family share one bar: in the built-in world they have the same clips.
    """
    results = json.loads((DEFAULT_RUN / "metrics.json").read_text(encoding="utf-8"))["tasks"]
    bars = {}
    for task, result in results.items():
        family = TASKS[task].family
        label = "emotion: 4 folders" if family == "emotion" else f"{family}: {task}"
        assert bars.get(label, result) == result, f"{task}: not the scores of {label}"
        bars[label] = result

    figure = new_figure(WIDTH, 5.8)
    axes = figure.subplots()
    rows = np.arange(len(bars))
    trained = [result["metric"] for result in bars.values()]
    constant = [result["constant"] for result in bars.values()]
    axes.barh(rows - 0.12, trained, 0.56, label="trained", color=TEAL)
    axes.barh(rows + 0.3, constant, 0.26, label="best constant answer", color=GREY)
    for row, result in zip(rows, bars.values()):
        text = f" {result['name'].replace('_', ' ')}"
        axes.text(0, row - 0.12, text, va="center", color="white", size=10)
    axes.set_yticks(rows, list(bars))
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6), xlabel="score on test clips")
    axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(-0.3, 1), frameon=False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    save_picture(figure, "scores")


def curves() -> None:
    """Draw the loss of the default run by step."""
    log = np.genfromtxt(DEFAULT_RUN / "log.csv", delimiter=",", names=True)
    window = len(log) // 50
    running_mean = np.convolve(log["loss"], np.ones(window) / window, "valid")
    figure = new_figure(WIDTH, 3.0)
    axes = figure.subplots()
    axes.plot(log["step"], log["loss"], ".", color=GREY, ms=3, label="one step")
    axes.plot(log["step"][window - 1 :], running_mean, color=TEAL, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss per answer token", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_picture(figure, "curves")


# --- memory ---------------------------------------------------------------------------------------
def memory() -> None:
    """Draw the estimated memory of a run of Crab+ on Qwen2.5-Omni by batch size.

    It is that of training or of evaluation, whichever is larger.
    """
    small = "--load-in-4bit --r 32 --alpha 64"
    commands = {
        "7B, r 128": "crab_plus-7b",
        "7B, 4 bits, r 32": f"crab_plus-7b {small}",
        "3B, r 128": "crab_plus-3b",
        "3B, 4 bits, r 32": f"crab_plus-3b {small}",
    }
    sizes = (1, 4, 8, 16)
    figure = new_figure(WIDTH, 4.2)
    axes = figure.subplots()
    for (label, command), colour in zip(commands.items(), (TEAL, TEAL, RED, RED)):
        needed = []
        for size in sizes:
            _, settings = parse_train([*command.split(), "--batch-size", str(size)])
            memory = next(iter(plan(crab_plus, settings).memory.values()))
            needed.append(max(memory.training, memory.evaluation) / 2**30)
        style = "o--" if "4 bits" in label else "o-"
        axes.plot(sizes, needed, style, label=label, color=colour)
    axes.set(xticks=sizes, yticks=[0, *GPUS], ylim=(0, 86))
    axes.set(xlabel="samples per batch", ylabel="GiB; lines: sizes of GPUs")
    axes.grid(axis="y")
    axes.set_title("Crab+ on Qwen2.5-Omni: estimated, not measured")
    axes.legend(ncols=2, loc="upper left", bbox_to_anchor=(0, 0.9), frameon=False)
    save_picture(figure, "memory")


ALL = (answer, papers, tokens, ilora, heads_routing, pave, crema, masks, scores, curves, memory)
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
