"""Pictures: an answer with its media, a sheet of answers, scores, curves, routing.

Functions that take `axes` draw into them; functions that take `path` write a PNG file. A medium is
(name, kind, arrays, seconds) with kind "image", "video" or "audio", as `load_for_figure` gives it.
Boxes and points are on the 224 x 224 grid, times are in seconds. matplotlib needs no display.
"""

import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from crab_min.answers import GRID, Answer, Box, Event
from crab_min.crema import FIRST_EXIT, EarlyExit
from crab_min.data import Sample, gold_mask, load_media
from crab_min.evaluation.figures import (
    COLOURS,
    CORRECT,
    GOLD_BOX,
    GREY,
    RED,
    TEAL,
    WRONG,
    YELLOW,
    new_figure,
    save,
)
from crab_min.evaluation.routing import KINDS, RouterKey, RoutingStats
from crab_min.evaluation.scores import sample_score
from crab_min.sources.own import split_question


# --- figures and texts ----------------------------------------------------------------------------
def wrapped(text: str, columns: int) -> str:
    """Return a model's text in lines of at most `columns` characters.

    Control characters are left out. A dollar sign stays one; matplotlib would begin a formula with
    it.
    """
    for character in set(text):
        if not character.isprintable() and character not in "\n\t":
            text = text.replace(character, "?")
    return textwrap.fill(text.replace("$", r"\$"), columns)


# --- media ----------------------------------------------------------------------------------------
def load_for_figure(sample: Sample) -> list[tuple]:
    """Decode the media of a sample that can be drawn.

    Returns (name, kind, arrays, seconds) of each.
    """
    media = []
    for part in sample.media:
        if part.kind in ("fast", "points"):
            continue
        arrays, seconds = load_media(part, GRID)
        if part.kind == "array" and arrays.dtype != "uint8":  # stored features, not pictures
            continue
        kind = "video" if part.kind in ("view", "flow", "array") else part.kind
        name = f"{part.side or part.kind}: {Path(part.path).name}"
        media.append((name, kind, arrays, seconds or 10.0))
    return media


def draw_frames(axes: Axes, frames: np.ndarray, seconds: float) -> None:
    """Draw frames (T, H, W, 3) as a strip, each over the time for which it stands."""
    duration = seconds / len(frames)
    for i, frame in enumerate(frames):
        axes.imshow(frame, extent=(i * duration, (i + 0.97) * duration, 0, 1), aspect="auto")
    axes.set(xlim=(0, seconds), ylim=(0, 1), yticks=[])


def draw_wave(axes: Axes, segments: list[np.ndarray], seconds: float) -> None:
    """Draw the loudness of audio segments (waves at any rate), spread over `seconds`."""
    pieces = np.array_split(np.abs(np.concatenate(segments)), 600)
    peaks = np.array([piece.max(initial=0) for piece in pieces])
    times = np.linspace(0, seconds, len(peaks))
    axes.fill_between(times, -peaks, peaks, color="#5c677d", linewidth=0)
    axes.set(xlim=(0, seconds), yticks=[])


def draw_image(axes: Axes, image: np.ndarray, answer: Answer, gold: Answer) -> None:
    """Draw an image (H, W, 3) with the mask, boxes and points of an answer.

    The gold boxes are dashed. A gold mask is drawn on a copy of the image to the right.
    """
    draw_masked(axes, image, answer.mask)
    if gold.mask is not None:
        draw_masked(axes, image, gold.mask, left=GRID + 6)
        axes.set(xlim=(0, 2 * GRID + 6))

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


def draw_masked(axes: Axes, image: np.ndarray, mask: np.ndarray | None, left: int = 0) -> None:
    """Draw an image (H, W, 3) on the grid, and a mask (h, w) over it.

    The mask has one colour per class.

    mask: integer classes, where 0 is left as it is; or truth values or scores, drawn above .5.
    """
    extent = (left, left + GRID, GRID, 0)
    axes.imshow(image, extent=extent)
    if mask is not None:
        classes = mask if mask.dtype.kind == "i" else mask > 0.5
        colours = np.ma.masked_where(classes <= 0, classes % len(COLOURS))
        palette, last = ListedColormap(COLOURS), len(COLOURS) - 1
        axes.imshow(
            colours, palette, extent=extent, alpha=0.5, vmin=0, vmax=last, interpolation="nearest"
        )


def draw_medium(
    axes: Axes, kind: str, arrays, seconds: float, answer: Answer, gold: Answer
) -> None:
    """Draw an image with boxes, the frames of a video, or the loudness of audio."""
    if kind == "image":
        draw_image(axes, arrays[0], answer, gold)
    elif kind == "video":
        draw_frames(axes, arrays, seconds)
    else:
        draw_wave(axes, arrays, seconds)


def draw_channels(path: Path, sample: Sample, curves: dict[str, np.ndarray]) -> None:
    """Draw a video and its side channels one below the other, along one time.

    Args:
        curves: more rows, title -> values spread evenly over the clip.
    """
    media = load_for_figure(sample)
    rows = len(media) + len(curves)
    all_axes = new_figure(8, 1.1 * rows).subplots(rows, 1, squeeze=False)[:, 0]
    titles = [name.split(":")[0] for name, *_ in media] + list(curves)
    for axes, title in zip(all_axes, titles):
        axes.set_title(title, fontsize=8, loc="left")
    for axes, (_, kind, arrays, seconds) in zip(all_axes, media):
        draw_medium(axes, kind, arrays, seconds, Answer(), Answer())
    for axes, values in zip(all_axes[len(media) :], curves.values()):
        axes.stairs(values, np.linspace(0, seconds, len(values) + 1), baseline=None)
        axes.set(xlim=(0, seconds), yticks=[])
    save(all_axes[0].figure, path)


# --- answers --------------------------------------------------------------------------------------
def draw_answer(path: Path, sample: Sample, answer: Answer, text: str) -> None:
    """Draw one answer: the question, each medium, a time line of the events, the text."""
    figure = new_figure(10, 2 + 1.8 * len(sample.media))
    draw_on(figure, sample, answer, text)
    save(figure, path)


def draw_sheet(path: Path, answers: list[tuple[Sample, str, np.ndarray | None]]) -> None:
    """Draw answers (sample, text, mask or None) on one page.

    Golds and scores are drawn with them.
    """
    columns = min(3 if len(answers) > 6 else 2, len(answers))
    rows = -(-len(answers) // columns)
    figure = new_figure(6 * columns, 4 * rows)
    subfigures = figure.subfigures(rows, columns, squeeze=False)
    for subfigure, (sample, text, mask) in zip(subfigures.flat, answers):
        answer = replace(sample.task.parse(text), mask=mask)
        gold = replace(sample.gold, mask=gold_mask(sample))
        draw_on(subfigure, sample, answer, text, gold)
    save(figure, path)


def draw_on(
    figure: Figure | SubFigure,
    sample: Sample,
    answer: Answer,
    text: str,
    gold: Answer | None = None,
) -> None:
    """Draw one answer, with a time line of its events, or with the gold answer.

    The score is drawn with the gold answer. Then the text is green if the score is above a half.
    """
    # One row for each medium, and one for the time line
    media = load_for_figure(sample)
    events = [] if gold else event_rows(answer)
    height_of = {"image": 4, "video": 1, "audio": 1}
    heights = [height_of[kind] for _, kind, _, _ in media]
    if events:
        heights.append(0.4 * len(events))
    all_axes = []
    if heights:  # points and stored features are not drawn
        all_axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, (name, kind, arrays, seconds) in zip(all_axes, media):
        draw_medium(axes, kind, arrays, seconds, answer, gold or Answer())
        axes.set_title(name, fontsize=8, loc="left")
    if events:
        draw_events(all_axes[-1], events, max((seconds for *_, seconds in media), default=0))

    # The question above, the answer below
    lines, colour = [f"answer: {text}"], "black"
    if answer.error:
        lines.append(f"does not parse: {answer.error}")
    if gold:
        score = sample_score(sample, text)
        colour = CORRECT if score > 0.5 else WRONG
        lines += [f"gold: {sample.target or sample.task.format(gold)}", f"score {score:.2f}"]
    columns = int(13 * figure.bbox.width / figure.dpi)  # as many characters as fit
    question = wrapped(f"{sample.task.name}: {split_question(sample.parts)[1]}", columns)
    caption = "\n".join(wrapped(line, columns) for line in lines)
    figure.suptitle(question, fontsize=9, x=0.01, ha="left")
    figure.supxlabel(caption, fontsize=9, x=0.01, ha="left", color=colour)


def event_rows(answer: Answer) -> list[Event]:
    """Return the events of an answer.

    For AVVP the labels say whether they are visual or audio.
    """
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


# --- numbers of a run -----------------------------------------------------------------------------
def draw_scores(path: Path, results: dict[str, dict]) -> None:
    """Draw three bars per task: best constant answer, frozen base, trained model.

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
        values = [result.get(key, np.nan) for result in results.values()]  # the base may be unknown
        axes.bar(positions + 0.27 * (i - 1), values, 0.27, label=label, color=colour)

    names = [f"{task}\n{result['name'].replace('_', ' ')}" for task, result in results.items()]
    axes.set_xticks(positions, names, fontsize=8)
    axes.set(ylim=(0, 1), ylabel="score on test clips")
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.12), frameon=False)
    axes.grid(axis="y", alpha=0.3)
    save(figure, path)


def draw_curves(path: Path, log: Path) -> None:
    """Draw the course of a run from its log.csv.

    Nothing is drawn where it has fewer than two rows.

    Four plots: the loss, the metric on held-out rows (the gradient norm where it was not measured),
    the learning rate, the speed.
    """
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    if len(lines) < 3:  # the first names the columns
        return
    # An empty cell is NaN; a line that was cut off is left out
    columns = np.genfromtxt(lines, delimiter=",", names=True, invalid_raise=False, ndmin=1)
    second = ("gradient norm", columns["grad_norm"], GREY)
    if not np.isnan(columns["metric"]).all():
        second = ("mean metric, held-out rows", columns["metric"], TEAL)

    # A dot per step, as some numbers are not measured at each
    figure = new_figure(10, 6)
    all_axes = figure.subplots(2, 2, sharex=True).flat
    curves = (
        ("loss per token", columns["loss"], GREY),
        second,
        ("learning rate", columns["lr"], RED),
        ("tokens per second, with padding", columns["padded_tokens"] / columns["seconds"], TEAL),
    )
    for axes, (label, values, colour) in zip(all_axes, curves):
        measured = ~np.isnan(values)
        axes.plot(columns["step"][measured], values[measured], ".-", color=colour, lw=0.8, ms=2)
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)

    # The running mean of the loss, and how much of the time was spent on data
    loss, *_, speed = figure.axes
    window = max(1, len(columns) // 50)
    running_mean = np.convolve(columns["loss"], np.ones(window) / window, "valid")
    loss.plot(columns["step"][window - 1 :], running_mean, color=TEAL)
    loss.set_yscale("log" if columns["loss"].min() > 0 else "linear")
    waiting = columns["wait"].sum() / columns["seconds"].sum()
    speed.set_title(f"waiting for data: {waiting:.0%} of the time", fontsize=9, loc="left")
    save(figure, path)


def draw_exits(axes: Axes, exits: EarlyExit) -> None:
    """Draw the gradient norm of each modality by epoch, and tau times its mean so far.

    A circle is where a modality exits.
    """
    for (name, norms), colour in zip(exits.norms.items(), COLOURS):
        axes.plot(norms, ".-", label=name, color=colour)
        for epoch in range(FIRST_EXIT, len(norms)):
            limit = exits.threshold * np.mean(norms[:epoch])
            axes.plot([epoch - 0.35, epoch + 0.35], [limit, limit], "--", color=colour, lw=1.5)
        if name in exits.exit_epochs:
            epoch = exits.exit_epochs[name]
            axes.plot(epoch, norms[epoch], "o", ms=13, mfc="none", color=colour)
    axes.set(xlabel="epoch e", ylabel="gradient norm $g_e$", yscale="log")
    axes.legend(ncols=2, frameon=False)


# --- routing --------------------------------------------------------------------------------------
def draw_routing(path: Path, stats: dict[str, RoutingStats]) -> None:
    """Draw the routing of I-LoRA as maps, one per entry of `stats` and kind of token.

    A map has one row per layer and one column per linear and head. Its values are the mean weights
    of the heads; 1 / heads is white.

    stats: by title, such as the name of a task.
    """
    # All entries have the same layers and linears; their kinds of tokens may differ
    keys = [key for task_stats in stats.values() for key in task_stats.token_counts]
    kinds = sorted({key.kind for key in keys}, key=KINDS.index)
    layers = sorted({key.layer for key in keys})
    linears = list(dict.fromkeys(key.linear for key in keys))

    # One row of maps per entry
    figure = new_figure(0.6 + 4 * len(kinds), 0.6 + (1.3 + 0.16 * len(layers)) * len(stats))
    all_axes = figure.subplots(len(stats), len(kinds), squeeze=False)
    for (title, task_stats), row in zip(stats.items(), all_axes):
        row[0].set_ylabel("layer", fontsize=8)
        for axes, kind in zip(row, kinds):
            n_tokens = task_stats.token_counts.get((kind, layers[0], linears[0]))
            if n_tokens is None:  # this entry has no such tokens
                axes.axis("off")
                continue
            image = draw_routing_map(axes, task_stats.share, kind, layers, linears)
            axes.set_title(f"{title}: {n_tokens} {kind} tokens", fontsize=8, loc="left")

    # The maps share one scale
    bar = figure.colorbar(image, ax=all_axes, shrink=0.8, pad=0.01)
    bar.set_label("mean weight of each head", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    save(figure, path)


def draw_routing_map(
    axes: Axes, share: dict[RouterKey, np.ndarray], kind: str, layers: list[int], linears: list[str]
) -> AxesImage:
    """Draw the mean weight of each head for one kind of token."""
    weights = np.array([w for key, w in share.items() if key.kind == kind])
    heads = weights.shape[1]
    table = weights.reshape(len(layers), -1)  # (layers * linears, heads) -> (layers, columns)
    image = axes.imshow(table, cmap="RdBu_r", vmin=0, vmax=2 / heads, aspect="auto")

    # A name under the heads of each linear and a line between linears; at most about 8 layer names
    firsts = np.arange(len(linears)) * heads
    names = [linear.split(".")[-1].removesuffix("_proj") for linear in linears]
    axes.set_xticks(firsts + (heads - 1) / 2, names, fontsize=7)
    axes.vlines(firsts[1:] - 0.5, -0.5, len(layers) - 0.5, color="black", linewidth=0.6)
    every = max(1, len(layers) // 8)
    axes.set_yticks(range(0, len(layers), every), layers[::every], fontsize=7)
    return image
