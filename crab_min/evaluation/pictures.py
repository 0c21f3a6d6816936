"""Pictures: an answer over its clip, the scores of a run, a sheet of its answers, the routes of I-LoRA.

Boxes and points are on the 224 x 224 grid, times in seconds. matplotlib draws without a display.
"""
import csv
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from crab_min.answers import GRID, Answer
from crab_min.evaluation.routing import KINDS, RoutingStats

COLOURS = ("#d1495b", "#00798c", "#edae49", "#30638e", "#6a994e", "#8d6a9f")
RATE = 16000


def draw_frames(axes, frames: np.ndarray, seconds: float) -> None:
    """A strip of frames (T, H, W, 3), left to right, each over the stretch of time that it stands for."""
    for i, frame in enumerate(frames):
        axes.imshow(frame, extent=(i * seconds / len(frames), (i + .97) * seconds / len(frames), 0, 1), aspect="auto")
    axes.set(xlim=(0, seconds), ylim=(0, 1), yticks=[])


def draw_wave(axes, segments: list, seconds: float) -> None:
    """The loudness of the sound (list of waves at 16 kHz), stretched over `seconds`."""
    wave = np.concatenate(segments)
    size = max(1, len(wave) // 600)
    peaks = np.abs(wave[:len(wave) // size * size]).reshape(-1, size).max(1) if len(wave) else np.zeros(1)
    times = np.linspace(0, seconds, len(peaks))
    axes.fill_between(times, -peaks, peaks, color="#5c677d", linewidth=0)
    axes.set(xlim=(0, seconds), yticks=[])


def draw_events(axes, answer: Answer, seconds: float) -> None:
    """A row a label, a bar a span."""
    rows = [(f"{label} ({kind})" if kind else label, spans) for kind, events in
            (("", answer.events), ("seen", answer.visual_events), ("heard", answer.audio_events)) for label, spans in events]
    for i, (_, spans) in enumerate(rows):
        for start, end in spans:
            axes.barh(i, end - start, left=start, height=.6, color=COLOURS[i % len(COLOURS)])
            axes.text(start + .1, i, f"{start}-{end} s", va="center", fontsize=8, color="white")
    axes.set(xlim=(0, max([seconds] + [e for _, spans in rows for _, e in spans])), ylim=(len(rows) - .5, -.5), xlabel="seconds")
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])


def draw_image(axes, image: np.ndarray, answer: Answer, gold: Answer) -> None:
    """One image (H, W, 3) with the mask, boxes and points of an answer, and dashed the right boxes; beside it, where there is one, the right mask."""
    axes.imshow(tinted(image, answer.mask), extent=(0, GRID, GRID, 0))
    if gold.mask is not None:
        axes.imshow(tinted(image, gold.mask), extent=(GRID + 6, 2 * GRID + 6, GRID, 0))
        axes.set(xlim=(0, 2 * GRID + 6), ylim=(GRID, 0))
    for x1, y1, x2, y2 in gold.boxes:
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, linewidth=1.8, linestyle="--", edgecolor="#3ddc4b"))
    for i, (box, points) in enumerate(answer.objects()):
        x1, y1, x2, y2 = box
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, linewidth=2.5, edgecolor=COLOURS[i % len(COLOURS)]))
        if points:
            axes.scatter(*zip(*points), s=60, color=COLOURS[i % len(COLOURS)], edgecolors="white", zorder=3)
    axes.set(xticks=[], yticks=[])


def tinted(image: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """An image (H, W, 3) with a mask (h, w) over it, a colour a class; scores count from a half."""
    if mask is None:
        return image
    h, w = image.shape[:2]
    classes = mask if mask.dtype.kind == "i" else (mask > .5).astype(int)
    classes = classes[(np.arange(h) * mask.shape[0] // h)[:, None], np.arange(w) * mask.shape[1] // w]
    colours = np.array([[int(c[i:i + 2], 16) for i in (1, 3, 5)] for c in COLOURS])
    return np.where(classes[..., None] > 0, image // 2 + colours[classes % len(COLOURS)] // 2, image).astype(np.uint8)


def draw_medium(axes, kind: str, arrays, seconds: float, answer: Answer, gold: Answer = Answer()) -> None:
    """An image with boxes, a strip of frames, or a sound's loudness; arrays as data.load_media gives them."""
    if kind == "image":
        draw_image(axes, arrays[0], answer, gold)
    elif kind == "video":
        draw_frames(axes, arrays, seconds)
    else:
        draw_wave(axes, arrays, seconds)


def draw_answer(path: Path, media: list[tuple], title: str, answer: Answer, text: str) -> None:
    """Write the picture of one answer: each medium, the time line of its events, the question and the text.

    media: (name, kind, arrays, seconds) in the order of the prompt, arrays as data.load_media gives them.
    """
    timeline = bool(answer.events or answer.visual_events or answer.audio_events)
    heights = [4.2 if kind == "image" else 1.1 for _, kind, _, _ in media] + [.45 * max(1, len(answer.events + answer.visual_events + answer.audio_events))] * timeline
    words = textwrap.fill(shown(text + (f"   [does not parse: {answer.error}]" if answer.error else "")), 110)
    figure = Figure(figsize=(10, sum(heights) + .55 * len(heights) + .9 + .22 * words.count("\n")), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(heights), 1, gridspec_kw={"height_ratios": heights}, squeeze=False)[:, 0]
    for axes, (name, kind, arrays, seconds) in zip(rows, media):
        draw_medium(axes, kind, arrays, seconds, answer)
        axes.set_title(name, fontsize=9, loc="left")
    if timeline:
        draw_events(rows[-1], answer, max(seconds for *_, seconds in media))
    figure.suptitle("\n".join(textwrap.wrap(shown(title), 100)), fontsize=12, x=.01, ha="left")
    figure.supxlabel(words, fontsize=10, x=.01, ha="left")
    save(figure, path)


def shown(text: str) -> str:
    """Text of a model as matplotlib can draw it: no control characters, and a dollar is a dollar."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text).replace("$", r"\$")


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.rename(path)


def draw_scores(path: Path, results: dict) -> None:
    """Three bars a task: best constant answer, frozen base, trained; `results` as in metrics.json under "tasks"."""
    figure = Figure(figsize=(max(5, .75 * len(results) + 1.5), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes, places = figure.subplots(), np.arange(len(results))
    for i, (key, label, colour) in enumerate((("blind", "best constant answer", "#b8bcc4"), ("base", "frozen base", "#edae49"), ("metric", "trained", "#00798c"))):
        axes.bar(places + .27 * (i - 1), [r[key] for r in results.values()], .27, label=label, color=colour)
    axes.set_xticks(places, [f"{task}\n{r['name'].replace('_', ' ')}" for task, r in results.items()], fontsize=8)
    axes.set(ylim=(0, 1), ylabel="score on test clips")
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(.5, 1.12), frameon=False)
    axes.grid(axis="y", alpha=.3)
    save(figure, path)


def draw_curves(path: Path, log: Path) -> None:
    """How a run went, from its log.csv: loss and its running mean, held-out metric, learning rate, norm of the gradient, speed and waiting."""
    rows = list(csv.DictReader(log.read_text().splitlines())) if log.exists() else []
    if len(rows) < 2:
        return
    column = {name: np.array([float(row[name] or "nan") for row in rows]) for name in ("step", "loss", "lr", "grad_norm", "seconds", "wait", "places", "metric")}
    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    (loss, metric), (rate, speed) = figure.subplots(2, 2, sharex=True)
    step, width = column["step"], max(1, len(rows) // 50)
    mean = np.convolve(column["loss"], np.ones(width) / width, "valid")
    loss.plot(step, column["loss"], color="#b8bcc4", lw=.8)
    loss.plot(step[width - 1:], mean, color="#00798c")
    loss.set(ylabel="loss a token", yscale="log" if column["loss"].min() > 0 else "linear")
    there = ~np.isnan(column["metric"])
    if there.any():
        metric.plot(step[there], column["metric"][there], "o-", color="#00798c")
        metric.set(ylabel="mean metric, held-out rows", ylim=(0, 1))
    else:
        metric.plot(step, column["grad_norm"], color="#b8bcc4", lw=.8)
        metric.set(ylabel="norm of the gradient")
    rate.plot(step, column["lr"], color="#d1495b")
    rate.set(xlabel="step", ylabel="learning rate")
    speed.plot(step, column["places"] / column["seconds"], color="#00798c", lw=.8)
    speed.set(xlabel="step", ylabel="tokens a second, with padding", title=f"{column['wait'].sum() / column['seconds'].sum():.0%} of the time went with waiting for data")
    for axes in (loss, metric, rate, speed):
        axes.grid(alpha=.3)
    save(figure, path)


def draw_subsets(path: Path, subsets: dict[str, dict[str, float]]) -> None:
    """The picture of sides.score_subsets."""
    figure = Figure(figsize=(2.6 + .9 * len(next(iter(subsets.values()))), 1.2 + .42 * len(subsets)), layout="constrained")
    FigureCanvasAgg(figure)
    draw_grid(figure.subplots(), subsets)
    save(figure, path)


def draw_grid(axes, subsets: dict[str, dict[str, float]]) -> None:
    """A map of accuracies: a row a set of modalities, a column a kind of question."""
    kinds = sorted({kind for row in subsets.values() for kind in row})
    axes.imshow([[row[kind] for kind in kinds] for row in subsets.values()], cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(subsets.values()):
        for j, kind in enumerate(kinds):
            axes.text(j, i, f"{row[kind]:.2f}", ha="center", va="center", fontsize=9, color="white" if row[kind] > .6 else "black")
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_yticks(range(len(subsets)), subsets)
    axes.set_title("accuracy by kind of question", fontsize=9, loc="left")


def draw_sheet(path: Path, cells: list[tuple], columns: int = 3) -> None:
    """A contact sheet: what was seen and heard, asked and answered, three a row, green where the score is above a half.

    cells: (title, media as for draw_answer, answer, text, gold, gold text, score in 0..1).
    """
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    figure = Figure(figsize=(5.4 * columns, 3.3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for part, (title, media, answer, text, gold, gold_text, score) in zip(figure.subfigures(rows, columns, squeeze=False).flat, cells):
        heights = [3 if kind == "image" else 1.4 if kind == "video" else .5 for _, kind, _, _ in media]
        for axes, (_, kind, arrays, seconds) in zip(part.subplots(len(media), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0], media):
            draw_medium(axes, kind, arrays[::max(1, len(arrays) // 5)] if kind == "video" else arrays, seconds, answer, gold)
            axes.set(xticks=[])
        part.suptitle("\n".join(textwrap.wrap(shown(title), 72)), fontsize=9, x=.02, ha="left")
        part.supxlabel("\n".join(textwrap.wrap(shown(f"says: {text}"), 80) + textwrap.wrap(shown(f"gold: {gold_text}"), 80) + [f"score {score:.2f}"]), fontsize=8, x=.02, ha="left",
                       color="#2e7d32" if score > .5 else "#b3261e")
    save(figure, path)


def draw_routing(path: Path, routes: dict[str, RoutingStats]) -> None:
    """What routes.record_routes collected, by title (a task's name): a row each, and in it a map for each kind of token.

    A map has a row a layer, a column a linear and head: the head's mean weight, white where it is one over the number of heads. At the
    end of the row, how undecided the router of each layer is: 0, one head alone; 1, all alike.
    """
    first = next(iter(routes.values())).share
    kinds = [k for k in KINDS if any(key[0] == k for each in routes.values() for key in each.share)]
    layers, linears = sorted({layer for _, layer, _ in first}), list(dict.fromkeys(linear for *_, linear in first))
    heads, every = len(next(iter(first.values()))), max(1, len(layers) // 8)
    width = .17 * heads * len(linears)
    figure = Figure(figsize=(1 + width * len(kinds) + 2.5, .6 + (1.3 + .16 * len(layers)) * len(routes)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(routes), len(kinds) + 1, squeeze=False, width_ratios=[width] * len(kinds) + [2])
    for (title, each), (*maps, last) in zip(routes.items(), grid):
        share, entropy = each.share, each.entropy
        for i, (axes, kind) in enumerate(zip(maps, kinds)):
            if (kind, layers[0], linears[0]) not in share:                      # no such token in this task
                axes.axis("off")
                continue
            weights = [np.concatenate([share[kind, layer, linear] for linear in linears]) for layer in layers]   # (layers, linears * heads)
            image = axes.imshow(weights, cmap="RdBu_r", vmin=0, vmax=2 / heads, aspect="auto")
            axes.set_xticks(np.arange(len(linears)) * heads + (heads - 1) / 2, [linear.split(".")[-1].removesuffix("_proj") for linear in linears], fontsize=7)
            axes.set_yticks(range(0, len(layers), every), layers[::every], fontsize=7)
            axes.vlines(np.arange(1, len(linears)) * heads - .5, -.5, len(layers) - .5, color="black", linewidth=.6)
            axes.set_title(f"{title}: {each.counts[kind, layers[0], linears[0]]} {kind} tokens", fontsize=8, loc="left")
            undecided = [np.mean([entropy[kind, layer, linear] for linear in linears]) for layer in layers]
            last.plot(undecided, range(len(layers)), marker=".", color=COLOURS[i], label=kind)
        maps[0].set_ylabel("layer", fontsize=8)
        last.set(xlim=(0, 1.02), ylim=(len(layers) - .5, -.5), yticks=[])
        last.set_title("entropy", fontsize=8)
        last.tick_params(labelsize=7)
        last.legend(fontsize=6, loc="lower left")
    bar = figure.colorbar(image, ax=grid[:, :-1], shrink=.8, pad=.01)
    bar.set_label(f"mean weight of each of {heads} heads", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    save(figure, path)
