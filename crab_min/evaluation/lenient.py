"""The lenient reading of answers, for the zero-shot column of the frozen base.

A base that was never taught our tags answers "It is a dog." instead of <answer> dog</answer>.
Its strict score is then 0, whatever it knows. The lenient reading takes the one label that a text
names as its answer. A text that names several labels, or none, stays wrong.

It is for tasks with one label from a closed set: the options of a row or of a task, else the gold
labels of all rows. The trained model is always scored strictly.
"""

import re

from crab_min.answers import CHOICE, Answer, normalize_label
from crab_min.data import Sample
from crab_min.evaluation.metrics import score
from crab_min.evaluation.scores import by_task, score_all


def score_baseline(samples: list[Sample], texts: list[str], known: list[Sample]) -> dict[str, dict]:
    """Score the answers of the frozen base by task, strictly and leniently.

    Args:
        known: as in lenient_metrics.

    Returns:
        As scores.score_all, with "lenient" where lenient_metrics has the task.
    """
    scores = score_all(samples, texts)
    for task, metric in lenient_metrics(samples, texts, known).items():
        scores[task]["lenient"] = metric
    return scores


def lenient_metrics(
    samples: list[Sample], texts: list[str], known: list[Sample]
) -> dict[str, float]:
    """Score answers by task, read leniently.

    Args:
        known: rows whose gold labels are the labels of their task.

    Returns:
        task -> its metric, for the tasks with one label.
    """
    labels: dict[str, set[str]] = {}
    for sample in [*known, *samples]:
        if sample.task.form is CHOICE:
            labels.setdefault(sample.task.name, set()).add(sample.gold.choice)

    metrics = {}
    for task, rows in by_task(samples, texts).items():
        if task.form is not CHOICE:
            continue
        answers = []
        for sample, text in rows:
            options = sample.gold.choices or task.options or tuple(labels[task.name])
            answers.append(read_leniently(sample, text, options))
        golds = [sample.gold for sample, _ in rows]
        metrics[task.name] = score(task, answers, golds, whole=False)["metric"]
    return metrics


def read_leniently(sample: Sample, text: str, options: tuple[str, ...]) -> Answer:
    """Read an answer; without its tag, the one option that the text is or names."""
    answer = sample.task.parse(text)
    if not answer.error:
        return answer

    # the whole text, also a letter such as "(B)"
    names = {normalize_label(option) for option in options}
    whole = normalize_label(text, sample.gold.choices)
    if whole in names:
        return Answer(choice=whole)

    # the options in it; of "guitar" and "acoustic guitar" the longer one
    words = normalize_label(text)
    named = {name for name in names if re.search(rf"\b{re.escape(name)}\b", words)}
    longest = [name for name in named if not any(name in other for other in named - {name})]
    return Answer(choice=longest[0]) if len(longest) == 1 else answer
