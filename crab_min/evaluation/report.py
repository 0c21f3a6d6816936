"""An evaluation at the end of training, or of `infer.py --eval`: answers, scores, pictures."""

import random
from dataclasses import dataclass, field, replace
from functools import partial as partial_function
from pathlib import Path

import numpy as np

from crab_min.answers import GRID
from crab_min.data import Sample, gold_mask, load_media
from crab_min.evaluation.answering import Decoding, generate_answers
from crab_min.evaluation.masks import MakeMasks, Masks, mask_table, predict_masks, score_masks
from crab_min.evaluation.metrics import score
from crab_min.evaluation.scores import by_task, score_all
from crab_min.evaluation.swaps import evaluate_picked
from crab_min.features import Features
from crab_min.model import AVLanguageModel


@dataclass
class Evaluation:
    """The answers of a model on a split, and their scores.

    Attributes:
        texts: one answer per sample.
        masks: one mask or None per sample.
        scores: task -> numbers, as scores.score_all gives them.
        numbers: further numbers for metrics.json, by name.
        tables: further tables to print.
    """

    samples: list[Sample]
    texts: list[str]
    masks: Masks
    scores: dict[str, dict]
    numbers: dict = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)


def evaluate(
    model: AVLanguageModel,
    features: Features,
    samples: list[Sample],
    decoding: Decoding,
    make_masks: MakeMasks | None = None,
    desc: str = "answering",
    partial: Path | None = None,
    strict: bool = True,
) -> Evaluation:
    """Answer samples, and score the answers and their masks, if masks can be made.

    Args:
        make_masks: makes masks of answers; by default the model's mask decoder, if it has one.
        desc, partial, strict: as in answering.generate_answers.
    """
    # text alone
    texts = generate_answers(model, features, samples, decoding, desc, partial, strict)
    if make_masks is None and model.predicts_masks:
        make_masks = partial_function(predict_masks, model)
    if make_masks is None:
        return Evaluation(samples, texts, [None] * len(samples), score_all(samples, texts))

    # masks as well
    masks = make_masks(features, samples, texts)
    mask_scores = score_masks(samples, masks)
    picked = evaluate_picked(model, features, samples, masks, decoding, make_masks)
    numbers = {"masks": mask_scores, "picked": picked}
    scores = score_all(samples, texts)
    return Evaluation(samples, texts, masks, scores, numbers, [mask_table(mask_scores, picked)])


# --- pictures ------------------------------------------------------------------------------------


def load_for_figure(sample: Sample) -> list[tuple]:
    """Decode the media of a sample for pictures.draw_answer.

    Returns:
        (name, kind, arrays, seconds) per medium that can be drawn.
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


def sheet_cell(sample: Sample, text: str, mask: np.ndarray | None) -> tuple:
    """Make the cell of one sample for pictures.draw_sheet."""
    answer = replace(sample.task.parse(text), mask=mask)
    gold = replace(sample.gold, mask=gold_mask(sample))
    return (
        f"{sample.task.name}: {sample.parts[-1].text.strip()}",
        load_for_figure(sample),
        answer,
        text,
        gold,
        sample.target or sample.task.format(sample.gold),
        sample_score(sample, text),
    )


def sample_score(sample: Sample, text: str) -> float:
    """Score one answer by the metric of its task."""
    answer = sample.task.parse(text)
    return score(sample.task, [answer], [sample.gold], whole=False)["metric"]


def best_and_worst(evaluation: Evaluation, seed: int) -> list[tuple]:
    """Make sheet cells of the best and the worst of eight answers, for every second task."""

    def rank(row: tuple) -> tuple:
        sample, (text, _) = row
        return sample_score(sample, text), sample.id

    rng = random.Random(seed)
    cells = []
    answers = list(zip(evaluation.texts, evaluation.masks))
    for rows in list(by_task(evaluation.samples, answers).values())[::2]:
        candidates = rng.sample(rows, min(8, len(rows)))
        candidates.sort(key=rank, reverse=True)
        chosen = candidates[:1]
        if len(candidates) > 1:
            chosen.append(candidates[-1])
        cells += [sheet_cell(sample, text, mask) for sample, (text, mask) in chosen]
    return cells


def some_of_each_task(evaluation: Evaluation, count: int = 9) -> dict[str, list[tuple]]:
    """Make sheet cells of random answers to each task; empty answers are left out.

    Args:
        count: answers per task at most.

    Returns:
        task -> cells.
    """
    answers = list(zip(evaluation.texts, evaluation.masks))
    sheets = {}
    for task, rows in by_task(evaluation.samples, answers).items():
        answered = [(sample, text, mask) for sample, (text, mask) in rows if text]
        chosen = random.Random(0).sample(answered, min(count, len(answered)))
        if chosen:
            sheets[task.name] = [sheet_cell(*row) for row in chosen]
    return sheets
