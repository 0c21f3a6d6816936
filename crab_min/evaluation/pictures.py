"""Pictures: an answer with its media, scores and curves of a run, a sheet of answers, routing.

Functions that take `axes` draw into them; functions that take `path` write a PNG file. A medium is
(name, kind, arrays, seconds) with kind "image", "video" or "audio", as `data.load_for_figure` gives
it. Boxes and points are on the 224 x 224 grid, times are in seconds. matplotlib needs no display.
"""

import csv
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from crab_min.answers import GRID, Answer, Box, Event
from crab_min.evaluation.routing import KINDS, RoutingStats

COLOURS = ("#d1495b", "#00798c", "#edae49", "#30638e", "#6a994e", "#8d6a9f")
RED, TEAL, YELLOW = COLOURS[:3]
GREY = "#b8bcc4"
GOLD_BOX = "#3ddc4b"
CORRECT, WRONG = "#2e7d32", "#b3261e"


# --- figures and texts ----------------------------------------------------------------------------
def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, that needs no display and no pyplot."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; the file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.rename(path)


def printable(text: str) -> str:
    """Return a model's text as matplotlib can draw it, without control characters.

    A dollar sign stays one; matplotlib would begin a formula with it.
    """
    for character in set(text):
        if not character.isprintable() and character not in "\n\t":
            text = text.replace(character, "?")
    return text.replace("$", r"\$")


def wrapped(text: str, columns: int) -> str:
    """Return a model's text in lines of at most `columns` characters."""
    return "\n".join(textwrap.wrap(printable(text), columns))


# --- media ----------------------------------------------------------------------------------------
def draw_frames(axes: Axes, frames: np.ndarray, seconds: float) -> None:
    """Draw frames (T, H, W, 3) as a strip, each over the time for which it stands."""
    duration = seconds / len(frames)
    for i, frame in enumerate(frames):
        axes.imshow(frame, extent=(i * duration, (i + 0.97) * duration, 0, 1), aspect="auto")
    axes.set(xlim=(0, seconds), ylim=(0, 1), yticks=[])


def draw_wave(axes: Axes, segments: list[np.ndarray], seconds: float) -> None:
    """Draw the loudness of audio segments (waves at any rate), spread over `seconds`."""
    # The peak of each of about 600 pieces
    wave = np.concatenate(segments)
    size = max(1, len(wave) // 600)
    whole = wave[: len(wave) // size * size]
    peaks = np.abs(whole).reshape(-1, size).max(1) if len(wave) else np.zeros(1)

    times = np.linspace(0, seconds, len(peaks))
    axes.fill_between(times, -peaks, peaks, color="#5c677d", linewidth=0)
    axes.set(xlim=(0, seconds), yticks=[])


def draw_image(axes: Axes, image: np.ndarray, answer: Answer, gold: Answer) -> None:
    """Draw an image (H, W, 3) with the mask, boxes and points of an answer.

    The gold boxes are dashed. A gold mask is drawn on a copy of the image to the right.
    """
    axes.imshow(tinted(image, answer.mask), extent=(0, GRID, GRID, 0))
    if gold.mask is not None:
        left, right = GRID + 6, 2 * GRID + 6
        axes.imshow(tinted(image, gold.mask), extent=(left, right, GRID, 0))
        axes.set(xlim=(0, right), ylim=(GRID, 0))

    for box in gold.boxes:
        draw_box(axes, box, GOLD_BOX, linewidth=1.8, linestyle="--")
    for i, (box, points) in enumerate(answer.objects()):
        colour = COLOURS[i % len(COLOURS)]
        draw_box(axes, box, colour, linewidth=2.5)
        if points:
            axes.scatter(*zip(*points), s=60, color=colour, edgecolors="white", zorder=3)
    axes.set(xticks=[], yticks=[])


def draw_box(axes: Axes, box: Box, colour: str, **line) -> None:
    x1, y1, x2, y2 = box
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, **line))


def tinted(image: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Return an image (H, W, 3) with a mask (h, w) over it, in one colour per class.

    mask: integer classes, where 0 is left as it is; or truth values or scores, drawn above .5.
    """
    if mask is None:
        return image
    # The class of each pixel, from the nearest pixel of the mask
    height, width = image.shape[:2]
    classes = mask if mask.dtype.kind == "i" else (mask > 0.5).astype(int)
    rows = np.arange(height) * mask.shape[0] // height
    columns = np.arange(width) * mask.shape[1] // width
    classes = classes[rows[:, None], columns]  # (H, W)

    # Half image, half colour
    colours = np.array([list(bytes.fromhex(colour[1:])) for colour in COLOURS])
    blended = image // 2 + colours[classes % len(COLOURS)] // 2
    return np.where(classes[..., None] > 0, blended, image).astype(np.uint8)


def draw_medium(
    axes: Axes, kind: str, arrays, seconds: float, answer: Answer, gold: Answer | None = None
) -> None:
    """Draw an image with boxes, the frames of a video, or the loudness of audio."""
    if kind == "image":
        draw_image(axes, arrays[0], answer, gold or Answer())
    elif kind == "video":
        draw_frames(axes, arrays, seconds)
    else:
        draw_wave(axes, arrays, seconds)


# --- one answer -----------------------------------------------------------------------------------
def draw_answer(path: Path, media: list[tuple], title: str, answer: Answer, text: str) -> None:
    """Draw one answer: the question, each medium, a time line of the events, the text.

    media: (name, kind, arrays, seconds) in the order of the prompt.
    """
    problem = f"   [does not parse: {answer.error}]" if answer.error else ""
    caption = textwrap.fill(printable(text + problem), 110)
    rows = event_rows(answer)

    # One row of the figure for each medium, and one for the time line
    height_of = {"image": 4.2, "video": 1.1, "audio": 1.1}
    heights = [height_of[kind] for _, kind, _, _ in media]
    if rows:
        heights.append(0.45 * len(rows))
    margins = 0.55 * len(heights) + 0.9 + 0.22 * caption.count("\n")
    figure = new_figure(10, sum(heights) + margins)
    all_axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]

    # The media, the time line, and the texts around them
    for axes, (name, kind, arrays, seconds) in zip(all_axes, media):
        draw_medium(axes, kind, arrays, seconds, answer)
        axes.set_title(name, fontsize=9, loc="left")
    if rows:
        draw_events(all_axes[-1], rows, max(seconds for *_, seconds in media))
    figure.suptitle(wrapped(title, 100), fontsize=12, x=0.01, ha="left")
    figure.supxlabel(caption, fontsize=10, x=0.01, ha="left")
    save(figure, path)


def event_rows(answer: Answer) -> list[Event]:
    """Return the events of an answer; for AVVP the labels say whether they are visual or audio."""
    rows = list(answer.events)
    rows += [(f"{label} (visual)", spans) for label, spans in answer.visual_events]
    rows += [(f"{label} (audio)", spans) for label, spans in answer.audio_events]
    return rows


def draw_events(axes: Axes, rows: list[Event], seconds: float) -> None:
    """Draw a time line with one row per event and one bar per span."""
    last = seconds
    for i, (_, spans) in enumerate(rows):
        colour = COLOURS[i % len(COLOURS)]
        for start, end in spans:
            axes.barh(i, end - start, left=start, height=0.6, color=colour)
            axes.text(start + 0.1, i, f"{start}-{end} s", va="center", fontsize=8, color="white")
            last = max(last, end)
    axes.set(xlim=(0, last), ylim=(len(rows) - 0.5, -0.5), xlabel="seconds")
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])


# --- a sheet of answers ---------------------------------------------------------------------------
class SheetCell(NamedTuple):
    """One answer on a sheet."""

    title: str
    media: list[tuple]  # as for draw_answer
    answer: Answer
    text: str  # of the model
    gold: Answer
    gold_text: str
    score: float  # in [0, 1]


def draw_sheet(path: Path, cells: list[tuple], columns: int = 3) -> None:
    """Draw many answers on one page.

    cells: `SheetCell`s, or tuples of its fields.
    """
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    figure = new_figure(5.4 * columns, 3.3 * rows)
    subfigures = figure.subfigures(rows, columns, squeeze=False)
    for subfigure, cell in zip(subfigures.flat, cells):
        draw_cell(subfigure, SheetCell(*cell))
    save(figure, path)


def draw_cell(figure: SubFigure, cell: SheetCell) -> None:
    """Draw one answer of a sheet; its text is green where the score is above a half."""
    # The media
    height_of = {"image": 3, "video": 1.4, "audio": 0.5}
    heights = [height_of[kind] for _, kind, _, _ in cell.media]
    all_axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, (_, kind, arrays, seconds) in zip(all_axes, cell.media):
        if kind == "video":  # about five frames
            arrays = arrays[:: max(1, len(arrays) // 5)]
        draw_medium(axes, kind, arrays, seconds, cell.answer, cell.gold)
        axes.set(xticks=[])

    # The texts
    answer, gold = wrapped(f"answer: {cell.text}", 80), wrapped(f"gold: {cell.gold_text}", 80)
    caption = f"{answer}\n{gold}\nscore {cell.score:.2f}"
    colour = CORRECT if cell.score > 0.5 else WRONG
    figure.suptitle(wrapped(cell.title, 72), fontsize=9, x=0.02, ha="left")
    figure.supxlabel(caption, fontsize=8, x=0.02, ha="left", color=colour)


# --- numbers of a run -----------------------------------------------------------------------------
def draw_scores(path: Path, results: dict[str, dict]) -> None:
    """Draw three bars per task: the best constant answer, the frozen base, the trained model.

    results: {task: numbers} as in metrics.json under "tasks".
    """
    bars = (
        ("constant", "best constant answer", GREY),
        ("base", "frozen base", YELLOW),
        ("metric", "trained", TEAL),
    )
    figure = new_figure(max(5, 0.75 * len(results) + 1.5), 4)
    axes = figure.subplots()
    positions = np.arange(len(results))
    for i, (key, label, colour) in enumerate(bars):
        values = [result[key] for result in results.values()]
        axes.bar(positions + 0.27 * (i - 1), values, 0.27, label=label, color=colour)

    names = [f"{task}\n{result['name'].replace('_', ' ')}" for task, result in results.items()]
    axes.set_xticks(positions, names, fontsize=8)
    axes.set(ylim=(0, 1), ylabel="score on test clips")
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.12), frameon=False)
    axes.grid(axis="y", alpha=0.3)
    save(figure, path)


def draw_curves(path: Path, log: Path) -> None:
    """Draw the course of a run from its log.csv; nothing where it has fewer than two rows.

    Four plots: the loss, the metric on held-out rows (the gradient norm where it was not measured),
    the learning rate, the speed.
    """
    rows = list(csv.DictReader(log.read_text().splitlines())) if log.exists() else []
    if len(rows) < 2:
        return
    columns = {}  # an empty cell is NaN
    for name in ("step", "loss", "lr", "grad_norm", "seconds", "wait", "padded_tokens", "metric"):
        columns[name] = np.array([float(row[name] or "nan") for row in rows])
    step = columns["step"]

    # Top: loss, metric or gradient norm
    figure = new_figure(10, 6)
    (loss, metric), (rate, speed) = figure.subplots(2, 2, sharex=True)
    draw_loss(loss, step, columns["loss"])
    if np.isnan(columns["metric"]).all():
        metric.plot(step, columns["grad_norm"], color=GREY, lw=0.8)
        metric.set(ylabel="gradient norm")
    else:
        measured = ~np.isnan(columns["metric"])
        metric.plot(step[measured], columns["metric"][measured], "o-", color=TEAL)
        metric.set(ylabel="mean metric, held-out rows", ylim=(0, 1))

    # Bottom: learning rate, speed
    rate.plot(step, columns["lr"], color=RED)
    rate.set(xlabel="step", ylabel="learning rate")
    waiting = columns["wait"].sum() / columns["seconds"].sum()
    speed.plot(step, columns["padded_tokens"] / columns["seconds"], color=TEAL, lw=0.8)
    speed.set(xlabel="step", ylabel="tokens per second, with padding")
    speed.set_title(f"waiting for data: {waiting:.0%} of the time", fontsize=9, loc="left")
    for axes in (loss, metric, rate, speed):
        axes.grid(alpha=0.3)
    save(figure, path)


def draw_loss(axes: Axes, step: np.ndarray, loss: np.ndarray) -> None:
    """Draw the loss of each step and its running mean."""
    window = max(1, len(loss) // 50)
    running_mean = np.convolve(loss, np.ones(window) / window, "valid")
    axes.plot(step, loss, color=GREY, lw=0.8)
    axes.plot(step[window - 1 :], running_mean, color=TEAL)
    axes.set(ylabel="loss per token", yscale="log" if loss.min() > 0 else "linear")


def draw_subsets(path: Path, subsets: dict[str, dict[str, float]]) -> None:
    """Draw the accuracies of a CREMA model on sets of its modalities, as for draw_grid."""
    n_kinds = len(next(iter(subsets.values())))
    figure = new_figure(2.6 + 0.9 * n_kinds, 1.2 + 0.42 * len(subsets))
    draw_grid(figure.subplots(), subsets)
    save(figure, path)


def draw_grid(axes: Axes, subsets: dict[str, dict[str, float]]) -> None:
    """Draw a table of accuracies: {set of modalities: {kind of question: accuracy}}."""
    kinds = sorted({kind for accuracies in subsets.values() for kind in accuracies})
    table = np.zeros((len(subsets), len(kinds)))
    for i, accuracies in enumerate(subsets.values()):
        table[i] = [accuracies[kind] for kind in kinds]
    axes.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        colour = "white" if value > 0.6 else "black"
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_yticks(range(len(subsets)), subsets)
    axes.set_title("accuracy by kind of question", fontsize=9, loc="left")


# --- routing --------------------------------------------------------------------------------------
@dataclass
class RoutingGrid:
    """What the maps of one figure have in common."""

    kinds: list[str]  # of tokens: one map each
    layers: list[int]  # the rows of a map
    linears: list[str]  # the columns of a map, each with `heads` cells
    heads: int


def draw_routing(path: Path, stats: dict[str, RoutingStats]) -> None:
    """Draw the routing of I-LoRA as maps, one per entry of `stats` and kind of token.

    A map has one row per layer and one column per linear and head. Its values are the mean weights
    of the heads; 1 / heads is white. At the right of each row stands the entropy of the routers by
    layer: 0, one head alone; 1, all heads alike.

    stats: by title, such as the name of a task.
    """
    # One row per entry: a map for each kind of token, then the entropy
    grid = routing_grid(list(stats.values()))
    map_width = 0.17 * grid.heads * len(grid.linears)
    row_height = 1.3 + 0.16 * len(grid.layers)
    figure = new_figure(3.5 + map_width * len(grid.kinds), 0.6 + row_height * len(stats))
    widths = [map_width] * len(grid.kinds) + [2]
    all_axes = figure.subplots(len(stats), len(widths), squeeze=False, width_ratios=widths)

    for (title, task_stats), (*maps, entropy_axes) in zip(stats.items(), all_axes):
        for axes, kind in zip(maps, grid.kinds):
            n_tokens = task_stats.token_counts.get((kind, grid.layers[0], grid.linears[0]))
            if n_tokens is None:  # this entry has no such tokens
                axes.axis("off")
                continue
            image = draw_routing_map(axes, task_stats, kind, grid)
            axes.set_title(f"{title}: {n_tokens} {kind} tokens", fontsize=8, loc="left")
        maps[0].set_ylabel("layer", fontsize=8)
        draw_entropy(entropy_axes, task_stats, grid)

    # The maps share one scale
    bar = figure.colorbar(image, ax=all_axes[:, :-1], shrink=0.8, pad=0.01)
    bar.set_label(f"mean weight of each of {grid.heads} heads", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    save(figure, path)


def routing_grid(all_stats: list[RoutingStats]) -> RoutingGrid:
    """Return the kinds of tokens in any statistics, and the layers and linears of the first."""
    share = all_stats[0].share
    kinds = {key[0] for stats in all_stats for key in stats.token_counts}
    return RoutingGrid(
        kinds=[kind for kind in KINDS if kind in kinds],
        layers=sorted({layer for _, layer, _ in share}),
        linears=list(dict.fromkeys(linear for _, _, linear in share)),
        heads=len(next(iter(share.values()))),
    )


def draw_routing_map(axes: Axes, stats: RoutingStats, kind: str, grid: RoutingGrid) -> AxesImage:
    """Draw the mean weight of each head for one kind of token."""
    share = stats.share
    table = []
    for layer in grid.layers:
        table.append(np.concatenate([share[kind, layer, linear] for linear in grid.linears]))
    # (layers, linears * heads)
    image = axes.imshow(table, cmap="RdBu_r", vmin=0, vmax=2 / grid.heads, aspect="auto")

    # A name under the heads of each linear and a line between linears; at most about 8 layer names
    firsts = np.arange(len(grid.linears)) * grid.heads
    names = [linear.split(".")[-1].removesuffix("_proj") for linear in grid.linears]
    axes.set_xticks(firsts + (grid.heads - 1) / 2, names, fontsize=7)
    bottom = len(grid.layers) - 0.5
    axes.vlines(firsts[1:] - 0.5, -0.5, bottom, color="black", linewidth=0.6)
    every = max(1, len(grid.layers) // 8)
    axes.set_yticks(range(0, len(grid.layers), every), grid.layers[::every], fontsize=7)
    return image


def draw_entropy(axes: Axes, stats: RoutingStats, grid: RoutingGrid) -> None:
    """Draw the entropy of the routers of each layer, one line per kind of token."""
    entropy = stats.entropy
    for kind, colour in zip(grid.kinds, COLOURS):
        if (kind, grid.layers[0], grid.linears[0]) not in entropy:
            continue
        means = []
        for layer in grid.layers:
            means.append(np.mean([entropy[kind, layer, linear] for linear in grid.linears]))
        axes.plot(means, range(len(grid.layers)), marker=".", color=colour, label=kind)
    axes.set(xlim=(0, 1.02), ylim=(len(grid.layers) - 0.5, -0.5), yticks=[])
    axes.set_title("entropy", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=6, loc="lower left")
