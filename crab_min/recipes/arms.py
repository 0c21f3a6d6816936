"""Runs that differ in a few settings, trained one after the other and printed as one table.

An arm is a name and the settings that it changes. Each arm is a run of its own, in runs/NAME-ARM or
OUT-ARM. The same command continues: an arm that an earlier command finished is not trained again.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from crab_min.config import Settings, with_values
from crab_min.errors import RunError
from crab_min.recipes.common import types_of
from crab_min.runs import processes
from crab_min.runs.folder import difference, load_saved_run


def train_arms(
    settings: Settings, name: str, arms: dict[str, dict], train: Callable[[Settings, str], dict]
) -> dict[str, dict]:
    """Train a run per arm, print their table, and return the numbers of each metrics.json.

    Args:
        arms: title -> name of a setting -> its value.
        train: trains one run, by default in runs/NAME.

    Raises:
        RunError: there is one arm alone.
    """
    if len(arms) < 2:
        raise RunError(f"--compare: nothing differs; there is {', '.join(arms) or 'nothing'} alone")
    numbers = {}
    out = settings.run.out
    for title, values in arms.items():
        arm = title.replace(" ", "_").replace(",", "-")
        own_out = f"{out}-{arm}" if out else ""
        changed = with_values(settings, **values, out=own_out)
        numbers[title] = train_once(changed, f"{name}-{arm}", train)
    if processes.rank() == 0:
        print(arm_table(numbers))
    return numbers


def check_comparison(name: str, known: Iterable[str]) -> None:
    """Raise RunError unless a comparison of this name is known."""
    if name not in known:
        raise RunError(f"--compare {name}: choose from {', '.join(known)}")


def train_once(settings: Settings, name: str, train: Callable[[Settings, str], dict]) -> dict:
    """Train a run, or return its metrics if an earlier command finished it."""
    folder = Path(settings.run.out or f"runs/{name}")
    if (folder / "metrics.json").exists():
        if not difference(load_saved_run(folder).settings, settings):
            return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return train(settings, name)


def arm_table(numbers: dict[str, dict]) -> str:
    """Format the metric of each type of question (rows) in each arm (columns)."""
    first = next(iter(numbers.values()))
    widths = [max(10, len(title) + 2) for title in numbers]
    titles = "".join(f"{title:>{width}}" for title, width in zip(numbers, widths))
    lines = [f"{'questions about':<18}{titles}     n"]
    for task, result in first["tasks"].items():
        for kind, scores in types_of(task, result).items():
            cells = ""
            for metrics, width in zip(numbers.values(), widths):
                cells += f"{types_of(task, metrics['tasks'][task])[kind]['metric']:>{width}.3f}"
            lines.append(f"{kind:<18}{cells}{scores['n']:>6}")
    return "\n".join(lines)
