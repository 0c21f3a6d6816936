"""Counts of an annotation file, and the figure of those of a copy of AV-UIE."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from crab_min.evaluation.figures import GREY, RED, TEAL, YELLOW, new_figure, save

SHOWN_LABELS = 5  # the most frequent ones, each apart


@dataclass
class SplitReport:
    """Contents of one annotation file."""

    rows: int
    bad_rows: int  # rows that make no sample
    labels: dict[str, int]  # how often each label occurs
    unparsed_targets: int  # training targets outside the output grammar
    reasoned: int = 0  # training targets with words besides the label
    words: list[float] | None = None  # shortest, median and longest target; None: it has none
    files: int = 0
    missing: int = 0  # files that do not exist
    unreadable: int = 0  # files that exist and cannot be decoded
    seconds: list[float] | None = None  # shortest, median and longest file; None: none was read


def draw_statistics(path: Path, splits: dict[str, SplitReport]) -> None:
    """Draw one line per annotation file in three panels, by name task/split."""
    figure = new_figure(12, 1.5 + 0.25 * len(splits))
    rows, words, labels = figure.subplots(1, 3, sharey=True)
    names, counts = list(splits), list(splits.values())
    draw_rows(rows, names, counts)
    draw_words(words, counts)
    draw_labels(labels, counts)
    rows.set_yticks(range(len(names)), names, fontsize=8)
    rows.set(ylim=(len(names) - 0.4, -0.6))  # from top to bottom, in all panels
    save(figure, path)


def draw_rows(axes: Axes, names: list[str], counts: list[SplitReport]) -> None:
    """Draw the rows of each file: reasoned, with a label or caption alone, for testing."""
    for line, (name, split) in enumerate(zip(names, counts)):
        if name.endswith("/test"):
            axes.barh(line, split.rows, color=GREY)
            continue
        axes.barh(line, split.reasoned, color=TEAL)
        axes.barh(line, split.rows - split.reasoned, left=split.reasoned, color=YELLOW)
    axes.set(title="rows", xlabel="number")
    for label, colour in (("reasoned", TEAL), ("label or caption", YELLOW), ("test", GREY)):
        axes.barh(0, 0, color=colour, label=label)
    axes.legend(fontsize=8)


def draw_words(axes: Axes, counts: list[SplitReport]) -> None:
    """Draw the shortest, median and longest target of each training file."""
    for line, split in enumerate(counts):
        if split.words:
            least, middle, most = split.words
            axes.plot([least, most], [line, line], color=GREY, linewidth=3)
            axes.plot(middle, line, "o", color=RED, markersize=5)
    axes.set(title="words of a target: least, median, most", xlabel="words", xlim=(0, None))


def draw_labels(axes: Axes, counts: list[SplitReport]) -> None:
    """Draw the share of the most frequent labels of each file, and how many labels there are."""
    for line, split in enumerate(counts):
        total = sum(split.labels.values())
        left = 0.0
        for label, count in Counter(split.labels).most_common(SHOWN_LABELS):
            width = count / total
            axes.barh(line, width, left=left, color=TEAL, edgecolor="white", alpha=0.8)
            if width > 0.03 * len(label):
                axes.text(left + 0.01, line, label, fontsize=7, va="center", color="white")
            left += width
        if total:
            axes.text(1.02, line, str(len(split.labels)), fontsize=8, va="center")
    axes.set(title=f"share of the {SHOWN_LABELS} most frequent labels; number", xlim=(0, 1.12))
