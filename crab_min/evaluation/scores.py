"""Scores of answers by task: numbers, tables and predictions/TASK.jsonl.

No answer is skipped. An answer that does not parse counts as wrong and lowers the column `parsed`.
"""

import json
import re
from pathlib import Path

from crab_min.answers import Answer
from crab_min.data import Sample
from crab_min.evaluation.answering import options
from crab_min.evaluation.metrics import best_constant, score
from crab_min.runs.folder import atomic_write
from crab_min.tasks import Task


def score_all(samples: list[Sample], texts: list[str]) -> dict[str, dict]:
    """Score answers by task.

    Returns:
        task -> "name" of the metric, "metric", "parsed" (share), "n", and "all" (further numbers).
        Where the task has types of questions also "types", the scores by type.
    """
    results = {}
    for task, rows in by_task(samples, texts).items():
        answers = [task.parse(text) for _, text in rows]
        golds = [sample.gold for sample, _ in rows]
        results[task.name] = score(task, answers, golds) | {"name": task.metric}
        types = score_types(task, rows)
        if types:
            results[task.name]["types"] = types
    return results


def sample_score(sample: Sample, text: str) -> float:
    """Score one answer by the metric of its task."""
    answer = sample.task.parse(text)
    return score(sample.task, [answer], [sample.gold], whole=False)["metric"]


def score_types(task: Task, rows: list[tuple[Sample, str]]) -> dict[str, dict]:
    """Score the answers of a task by type of question.

    Returns:
        type -> "metric", "n", and "constant", the metric of the best constant answer; {} if the
        rows name no types.
    """
    groups: dict[str, list[tuple[Answer, Answer]]] = {}  # pairs of a predicted and a gold answer
    for sample, text in rows:
        groups.setdefault(question_type(sample), []).append((task.parse(text), sample.gold))
    if set(groups) == {""} or (task.types == BY_SPLIT and len(groups) == 1):
        return {}

    types = {}
    for name, pairs in sorted(groups.items()):
        answers, golds = map(list, zip(*pairs))
        result = score(task, answers, golds)
        constant = best_constant(task, golds, golds)[0]
        types[name] = {"metric": result["metric"], "n": result["n"], "constant": constant}
    return types


# Ref-AVS reports its three test splits apart
BY_SPLIT = ("split",)
SPLITS = {"test_s": "seen", "test_u": "unseen", "test_n": "null"}


def question_type(sample: Sample) -> str:
    """Return the type of a sample's question; "" if its row names none."""
    if sample.task.types == BY_SPLIT:
        return SPLITS.get(sample.row.get("split"), "")
    names = [str(sample.row.get(field, "")) for field in sample.task.types]
    return " ".join(re.sub(r'[][",]', "", name) for name in names)


def by_task(samples: list[Sample], *values: list) -> dict[Task, list[tuple]]:
    """Group rows (sample, value, ...) by task, in the order in which the tasks appear.

    Args:
        values: lists of one value per sample, such as its text.
    """
    groups: dict[Task, list[tuple]] = {}
    for row in zip(samples, *values):
        groups.setdefault(row[0].task, []).append(row)
    return groups


def constants(train: list[Sample], test: list[Sample]) -> dict[str, float]:
    """Return the score of the best constant answer, by task.

    One answer is given to all test samples. The candidates are the gold answers of the training
    rows, and for multiple choice the option at each position.
    """
    scores = {}
    for task, rows in by_task(test).items():
        golds = [sample.gold for (sample,) in rows]
        candidates = [sample.gold for sample in train if sample.task.name == task.name]
        candidates += [Answer(choice=str(i)) for i in range(len(golds[0].choices))]
        scores[task.name] = best_constant(task, candidates, golds)[0]
    return scores


def chance(samples: list[Sample]) -> dict[str, float]:
    """Return the score of guessing, for the tasks whose samples all have options."""
    chances = {}
    for task, rows in by_task(samples).items():
        counts = [len(options(sample)) for (sample,) in rows]
        if all(counts):
            chances[task.name] = sum(1 / count for count in counts) / len(counts)
    return chances


def write_predictions(folder: Path, samples: list[Sample], texts: list[str]) -> None:
    """Write TASK.jsonl: per sample the text, the target, and whether the text parses."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, rows in by_task(samples, texts).items():
        lines = []
        for sample, text in rows:
            reason = task.parse(text).error
            line = {
                "id": sample.id,
                "task": task.name,
                "text": text,
                "target": sample.target or task.format(sample.gold),
                "parsed": reason is None,
            }
            if reason:
                line["reason"] = reason
            lines.append(json.dumps(line, ensure_ascii=False))
        atomic_write(folder / f"{task.name}.jsonl", "\n".join(lines) + "\n")


def training_table(results: dict[str, dict]) -> str:
    """Format the table at the end of training.

    Args:
        results: as in metrics.json under "tasks".
    """
    lines = ["task      metric              base  trained  constant  parsed     n"]
    for task, r in results.items():
        base = f"{r['base']:.3f}" if "base" in r else "-"  # --no-baseline
        lines.append(
            f"{task:<9} {r['name']:<17} {base:>6} {r['metric']:>8.3f} "
            f"{r['constant']:>9.3f} {r['parsed']:>7.2f} {r['n']:>5}"
        )
    better = sum(result["metric"] > result["constant"] for result in results.values())
    lines.append(f"better than the best constant answer: {better} of {len(results)} tasks")
    lenient = {task: r["base_lenient"] for task, r in results.items() if "base_lenient" in r}
    if lenient:
        cells = [f"{task} {metric:.3f}" for task, metric in lenient.items()]
        lines.append(f"base, where a label without its tag counts: {', '.join(cells)}")
    return "\n".join(lines)


def evaluation_table(results: dict[str, dict]) -> str:
    """Format the table of `infer.py --eval`.

    It has further numbers and types of questions.
    """
    lines = ["task      metric             score  parsed     n"]
    for task, r in results.items():
        # one line per task
        line = f"{task:<9} {r['name']:<17} {r['metric']:>6.3f} {r['parsed']:>7.2f} {r['n']:>5}"
        lines.append(line)

        # indented: further numbers, then one line per type of question
        if r["all"]:
            numbers = [f"{name} {value:.3f}" for name, value in r["all"].items()]
            lines.append("  " + "  ".join(numbers))
        for name, t in r.get("types", {}).items():
            constant = f"(best constant answer {t['constant']:.3f})"
            lines.append(f"  {name:<25} {t['metric']:>6.3f}  {constant} {t['n']:>5}")
    return "\n".join(lines)
