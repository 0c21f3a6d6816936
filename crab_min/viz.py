"""Pictures: an answer over its clip, the scores of a run, a sheet of its answers, the routes of I-LoRA.

Boxes and points are on the 224 x 224 grid, times in seconds. matplotlib draws without a display.
"""
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from crab_min.interface import GRID, Answer
from crab_min.routes import KINDS, Routes

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


def draw_image(axes, image: np.ndarray, answer: Answer) -> None:
    """One image (H, W, 3) with the boxes and points of an answer."""
    axes.imshow(image, extent=(0, GRID, GRID, 0))
    for i, (box, points) in enumerate(answer.objects()):
        x1, y1, x2, y2 = box
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, linewidth=2.5, edgecolor=COLOURS[i % len(COLOURS)]))
        if points:
            axes.scatter(*zip(*points), s=60, color=COLOURS[i % len(COLOURS)], edgecolors="white", zorder=3)
    axes.set(xticks=[], yticks=[])


def draw_medium(axes, kind: str, arrays, seconds: float, answer: Answer) -> None:
    """An image with the answer's boxes, a strip of frames, or a sound's loudness; arrays as data.load_media gives them."""
    if kind == "image":
        draw_image(axes, arrays[0], answer)
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
    words = textwrap.fill(f"{text}" + (f"   [does not parse: {answer.error}]" if answer.error else ""), 110)
    figure = Figure(figsize=(10, sum(heights) + .55 * len(heights) + .9 + .22 * words.count("\n")), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(heights), 1, gridspec_kw={"height_ratios": heights}, squeeze=False)[:, 0]
    for axes, (name, kind, arrays, seconds) in zip(rows, media):
        draw_medium(axes, kind, arrays, seconds, answer)
        axes.set_title(name, fontsize=9, loc="left")
    if timeline:
        draw_events(rows[-1], answer, max(seconds for *_, seconds in media))
    figure.suptitle("\n".join(textwrap.wrap(title, 100)), fontsize=12, x=.01, ha="left")
    figure.supxlabel(words, fontsize=10, x=.01, ha="left")
    save(figure, path)


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


def draw_sheet(path: Path, cells: list[tuple], columns: int = 3) -> None:
    """A contact sheet: what was seen and heard, asked and answered, three a row, green where the score is above a half.

    cells: (title, media as for draw_answer, answer, text, gold text, score in 0..1).
    """
    rows = -(-len(cells) // columns)
    figure = Figure(figsize=(5.4 * columns, 3.3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for part, (title, media, answer, text, gold, score) in zip(figure.subfigures(rows, columns, squeeze=False).flat, cells):
        heights = [3 if kind == "image" else 1.4 if kind == "video" else .5 for _, kind, _, _ in media]
        for axes, (_, kind, arrays, seconds) in zip(part.subplots(len(media), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0], media):
            draw_medium(axes, kind, arrays[::max(1, len(arrays) // 5)] if kind == "video" else arrays, seconds, answer)
            axes.set(xticks=[])
        part.suptitle("\n".join(textwrap.wrap(title, 72)), fontsize=9, x=.02, ha="left")
        part.supxlabel("\n".join(textwrap.wrap(f"says: {text}", 80) + textwrap.wrap(f"gold: {gold}", 80) + [f"score {score:.2f}"]), fontsize=8, x=.02, ha="left",
                       color="#2e7d32" if score > .5 else "#b3261e")
    save(figure, path)


def draw_routes(path: Path, routes: Routes) -> None:
    """A map for each kind of token, a row a layer, a column a linear and head: mean weight, white where it is one over the number of heads.

    Beside it, how undecided the router of each layer is: 0, one head alone; 1, all alike.
    """
    share, entropy = routes.share, routes.entropy
    kinds = [k for k in KINDS if any(key[0] == k for key in share)]
    layers, linears = sorted({layer for _, layer, _ in share}), list(dict.fromkeys(linear for *_, linear in share))
    heads = len(next(iter(share.values())))
    figure = Figure(figsize=(1.5 + .17 * heads * len(linears) * len(kinds) + 2.5, 2.2 + .16 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    *maps, last = figure.subplots(1, len(kinds) + 1, width_ratios=[.17 * heads * len(linears)] * len(kinds) + [2])
    for axes, kind in zip(maps, kinds):
        grid = np.array([np.concatenate([share[kind, layer, linear] for linear in linears]) for layer in layers])        # (layers, linears * heads)
        image = axes.imshow(grid, cmap="RdBu_r", vmin=0, vmax=2 / heads, aspect="auto")
        axes.set_xticks(np.arange(len(linears)) * heads + (heads - 1) / 2, [linear.split(".")[-1].removesuffix("_proj") for linear in linears], rotation=90, fontsize=8)
        axes.set_yticks(range(len(layers)) if len(layers) <= 12 else range(0, len(layers), 4), layers if len(layers) <= 12 else layers[::4], fontsize=8)
        axes.vlines(np.arange(1, len(linears)) * heads - .5, -.5, len(layers) - .5, color="black", linewidth=.6)
        axes.set_title(f"{kind} ({routes.counts[kind, layers[0], linears[0]]} tokens)", fontsize=9)
    maps[0].set_ylabel("layer")
    figure.colorbar(image, ax=maps, label=f"mean weight of each of {heads} heads", shrink=.8)
    for i, kind in enumerate(kinds):
        last.plot([np.mean([entropy[kind, layer, linear] for linear in linears]) for layer in layers], range(len(layers)), marker=".", color=COLOURS[i], label=kind)
    last.set(xlim=(0, 1.02), ylim=(len(layers) - .5, -.5), yticks=[], xlabel="entropy")
    last.legend(fontsize=7, loc="lower left")
    save(figure, path)
