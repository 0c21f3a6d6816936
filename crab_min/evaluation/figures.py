"""Colours, an empty figure, and a PNG file that appears whole or not at all."""

from pathlib import Path

from matplotlib.figure import Figure

COLOURS = ("#d1495b", "#00798c", "#edae49", "#30638e", "#6a994e", "#8d6a9f")
RED, TEAL, YELLOW = COLOURS[:3]
GREY = "#b8bcc4"
GOLD_BOX = "#3ddc4b"
CORRECT, WRONG = "#2e7d32", "#b3261e"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, that needs no display and no pyplot."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; the file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.rename(path)
