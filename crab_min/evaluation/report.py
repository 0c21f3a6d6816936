"""An evaluation at the end of training, or of `infer.py --eval`.

It holds answers, scores, and what to draw.
"""

import random
from dataclasses import dataclass, field
from functools import partial as partial_function
from pathlib import Path

from crab_min.data import Sample
from crab_min.evaluation.answering import Decoding, generate_answers
from crab_min.evaluation.masks import MakeMasks, Masks, mask_table, predict_masks, score_masks
from crab_min.evaluation.scores import by_task, sample_score, score_all
from crab_min.evaluation.swaps import picked, swap_audio
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
    partial: Path | None = None,
    strict: bool = True,
) -> Evaluation:
    """Answer samples, and score the answers and their masks, if masks can be made.

    Args:
        make_masks: makes masks of answers; by default the model's mask decoder, if it has one.
        partial, strict: as in answering.generate_answers.
    """
    # text
    texts = generate_answers(model, features, samples, decoding, partial=partial, strict=strict)
    evaluation = Evaluation(samples, texts, [None] * len(samples), score_all(samples, texts))

    # masks
    if make_masks is None and model.predicts_masks:
        make_masks = partial_function(predict_masks, model, decoding.budget)
    if make_masks is None:
        return evaluation
    evaluation.masks = make_masks(features, samples, texts)
    mask_scores = score_masks(samples, evaluation.masks)

    # do they follow the sound? asked of the samples of the built-in world that have another one
    follows = {"picked the sounding one of two": picked(samples, evaluation.masks)}
    swapped = swap_audio(samples)
    if swapped:
        swapped_texts = generate_answers(
            model, features, swapped, decoding, "with another's sound", strict=strict
        )
        swapped_masks = make_masks(features, swapped, swapped_texts)
        follows["followed the other's sound"] = picked(swapped, swapped_masks)
    follows = {name: result for name, result in follows.items() if result}

    evaluation.numbers = {"masks": mask_scores, "picked": follows}
    evaluation.tables = [mask_table(mask_scores, follows)]
    return evaluation


# --- answers for a sheet --------------------------------------------------------------------------


def best_and_worst(evaluation: Evaluation, seed: int) -> list[tuple]:
    """Return the best and the worst of random answers to every second task; of one task three each.

    Empty answers are left out, such as those to clips that are gone.

    Returns:
        (sample, text, mask), as pictures.draw_sheet takes them.
    """

    def rank(row: tuple) -> tuple:
        sample, text, _ = row
        return sample_score(sample, text), sample.id

    rng = random.Random(seed)
    chosen = []
    tasks = by_task(evaluation.samples, evaluation.texts, evaluation.masks)
    count = 3 if len(tasks) == 1 else 1
    for rows in list(tasks.values())[::2]:
        answered = [row for row in rows if row[1]]
        candidates = rng.sample(answered, min(8 * count, len(answered)))
        candidates.sort(key=rank, reverse=True)
        chosen += candidates[:count] + candidates[count:][-count:]
    return chosen


def some_of_each_task(evaluation: Evaluation) -> dict[str, list[tuple]]:
    """Choose nine random answers to each task; empty answers are left out.

    Returns:
        task -> (sample, text, mask), as pictures.draw_sheet takes them.
    """
    chosen = {}
    tasks = by_task(evaluation.samples, evaluation.texts, evaluation.masks)
    for task, rows in tasks.items():
        answered = [row for row in rows if row[1]]
        if answered:
            chosen[task.name] = random.Random(0).sample(answered, min(9, len(answered)))
    return chosen
