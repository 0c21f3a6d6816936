"""Boxes, arrows and files for the pictures that make.py draws."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from crab_min.evaluation.pictures import new_figure

HERE = Path(__file__).parent
WIDTH = 6.0  # inches; with text of 11 points a picture can be read on a phone
DPI = 150
COLOURS = 256  # per file; a palette makes it small
DARK, GREY, PALE = "#22272e", "#8a919c", "#eef0f3"
# one colour per paper, in every picture
PAPERS = {"Crab": "#b23a48", "Crab+": "#00798c", "PAVE": "#30638e", "CREMA": "#9a6700"}
# one colour per kind of token
KIND_COLOURS = {
    "text": "#8a919c",
    "video": "#30638e",
    "image": "#6a994e",
    "audio": "#edae49",
    "answer": "#d1495b",
}

matplotlib.rcParams.update({"font.size": 11, "axes.titlesize": 11, "axes.titlelocation": "left"})


def canvas(height: float, columns: float = 100, rows: float = 100) -> tuple[Figure, Axes]:
    """Return a figure of a height in inches, and axes of columns x rows without frame."""
    figure = new_figure(WIDTH, height)
    axes = figure.subplots()
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes,
    left: float,
    top: float,
    width: float,
    height: float,
    text: str,
    colour: str = GREY,
    size: float = 11,
) -> None:
    """Draw a box with centred text; its colour says what it belongs to."""
    tint = [0.82 + 0.18 * channel for channel in to_rgb(colour)]
    style = "round,pad=0,rounding_size=1.2"
    frame = FancyBboxPatch(
        (left, top), width, height, boxstyle=style, facecolor=tint, edgecolor=colour, linewidth=1.5
    )
    axes.add_patch(frame)
    frame.set_clip_on(False)  # the whole line where the box touches the edge
    middle = (left + width / 2, top + height / 2)
    axes.text(*middle, text, ha="center", va="center", fontsize=size, color=DARK)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = DARK
) -> None:
    """Draw an arrow between two points."""
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def line(axes: Axes, points: list[tuple[float, float]], colour: str = DARK) -> None:
    """Draw a line through points, behind the boxes."""
    axes.plot(*zip(*points), color=colour, lw=1.2, zorder=0)


def save_picture(figure: Figure, name: str) -> None:
    """Write a picture, opaque and with a palette, and print its size."""
    path = HERE / f"{name}.png"
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    figure.savefig(path, dpi=DPI, facecolor="white")
    Image.open(path).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")
