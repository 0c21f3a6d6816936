"""Masks of answers, and their scores.

Masks come from a mask decoder, SAM2 or the box itself.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from crab_min.answers import GRID
from crab_min.data import Sample, gold_mask
from crab_min.evaluation.answering import plan_batches
from crab_min.evaluation.budget import TokenBudget
from crab_min.evaluation.mask_metrics import by_class, hard, null_s, soft
from crab_min.evaluation.sam2 import Sam2, box_mask
from crab_min.evaluation.scores import by_task, question_type
from crab_min.features import Features
from crab_min.media.read import read_image
from crab_min.model import AVLanguageModel
from crab_min.sources.av_uie import CLASSES
from crab_min.tasks import Task

Masks = list[np.ndarray | None]
MakeMasks = Callable[[Features, list[Sample], list[str]], Masks]


@torch.no_grad()
def predict_masks(
    model: AVLanguageModel,
    budget: TokenBudget,
    features: Features,
    samples: list[Sample],
    texts: list[str],
) -> Masks:
    """Predict the masks of answers with the model's mask decoder.

    The texts go through the LM once more, because the states of the mask tokens depend on media,
    prompt and text alone.

    Args:
        budget: how many tokens go through the LM together.

    Returns:
        Per sample (size, size) scores in [0, 1], or for AVSS classes; None for a text without all
        mask tokens, and for tasks without masks.
    """
    # by id: batches have another order
    text_of = {sample.id: text for sample, text in zip(samples, texts)}
    with_masks = [sample for sample in samples if sample.task.mask_head]
    masks: dict[str, np.ndarray | None] = {}
    was_training = model.training
    model.eval()

    # an unreadable image has no mask
    for batch, media in features.batches(plan_batches(with_masks), strict=False):
        if not batch:
            continue
        semantic = batch[0].task.mask_head == "classes"
        rows, lengths = [], []
        for sample, features_of_sample in zip(batch, media):
            answer = text_of[sample.id]
            rows.append((sample.parts, features_of_sample, answer))
            lengths.append(model.row_length(sample.parts, features_of_sample, answer))

        predict = partial(predict_part, model, semantic)
        predicted = budget.run(predict, rows, lengths)
        masks |= {sample.id: mask for sample, mask in zip(batch, predicted)}
    model.train(was_training)
    return [masks.get(sample.id) for sample in samples]


def predict_part(model: AVLanguageModel, semantic: bool, rows: list[tuple]) -> Masks:
    """Predict a mask (size, size) per row: scores in half precision, or classes.

    Args:
        rows: prompt, features of its media, and answer of each sample.
    """
    batch = model.collate(*zip(*rows))
    masks: Masks = []
    for mask in model.predict_masks(batch, [semantic] * batch.rows):
        # (classes, size, size) or (1, size, size)
        if mask is not None:
            mask = mask.argmax(0) if len(mask) > 1 else mask[0].half()
            mask = mask.cpu().numpy()
        masks.append(mask)
    return masks


def masks_from_boxes(samples: list[Sample], texts: list[str], sam2: Sam2 | None) -> Masks:
    """Make masks from the boxes and points of answers (Crab+'s second stage).

    Args:
        sam2: segments the image at its own size. None fills the boxes themselves, on the grid.

    Returns:
        Per sample (H, W), empty where the answer denies the object; None for a text that does not
        parse, and for tasks without masks.
    """
    masks: Masks = []
    desc = "SAM2" if sam2 else "boxes"
    bar = tqdm(samples, desc=desc, unit="image", disable=len(samples) < 32)
    for sample, text in zip(bar, texts):
        answer = sample.task.parse(text)
        if not sample.task.mask_head or answer.error:
            masks.append(None)
        elif sam2:
            image = next(part.path for part in sample.media if part.kind == "image")
            object_masks = sam2.masks(read_image(image, None), answer.objects())
            masks.append(object_masks.any(0))
        else:
            masks.append(box_mask(answer, GRID, GRID))
    return masks


def score_masks(samples: list[Sample], masks: Masks) -> dict[str, dict]:
    """Score masks by task, on 224 x 224 pixels. A missing mask counts as an empty one.

    Returns:
        task -> numbers. Over samples whose gold mask is not empty: "miou" and "f" (Crab's, on
        scores), "hard_miou" and "hard_f" (Crab+'s, on binary masks), or for AVSS the numbers by
        class; "coverage", the share of these samples with a predicted mask; and "n". Over samples
        with an empty gold mask (Ref-AVS's null split): "null_s", "null_s_background" and "null_n".
        The test splits of Ref-AVS are scored apart too: "ref_avs seen", "unseen", "null".
    """
    results = {}
    for task, rows in by_task(samples, masks).items():
        if not task.mask_head:
            continue
        results[task.name] = score_task_masks(task, rows)
        splits: dict[str, list[tuple]] = {}
        for row in rows:
            splits.setdefault(question_type(row[0]), []).append(row)
        if len(splits) > 1:
            for split in sorted(splits.keys() - {""}):
                results[f"{task.name} {split}"] = score_task_masks(task, splits[split])
    return results


def score_task_masks(task: Task, rows: list[tuple]) -> dict[str, float]:
    """Score the masks of a task, see `score_masks`; rows: (sample, mask or None)."""
    gold = np.stack([on_grid(gold_mask(sample, GRID)) for sample, _ in rows])  # (N, 224, 224)
    predicted = np.stack([on_grid(mask) for _, mask in rows])  # (N, 224, 224)
    has_object = gold.any((1, 2))  # (N,)
    has_mask = np.array([mask is not None for _, mask in rows])

    # samples with an object
    coverage = float(has_mask[has_object].mean()) if has_object.any() else 0.0
    result = {"coverage": coverage, "n": int(has_object.sum())}
    predicted_object, gold_object = predicted[has_object], gold[has_object]
    if task.mask_head == "classes":
        result |= by_class(predicted_object.astype(int), gold_object.astype(int), CLASSES)
    elif has_object.any():
        result |= soft(predicted_object, gold_object)
        binary = hard(predicted_object > 0.5, gold_object)
        result |= {f"hard_{name}": value for name, value in binary.items()}

    # samples without one
    if not has_object.all():
        predicted_null = predicted[~has_object] > 0.5
        result["null_s"] = null_s(predicted_null)
        result["null_s_background"] = null_s(predicted_null, of_background=True)
        result["null_n"] = len(predicted_null)
    return result


def on_grid(mask: np.ndarray | None) -> np.ndarray:
    """Resize a mask (h, w) to the grid, (224, 224); the result is empty for None.

    Scores are resized bilinearly, classes and booleans by the nearest pixel.
    """
    if mask is None:
        return np.zeros((GRID, GRID))
    mode = "nearest" if mask.dtype.kind in "ib" else "bilinear"
    tensor = torch.from_numpy(mask)[None, None].float()
    return F.interpolate(tensor, (GRID, GRID), mode=mode)[0, 0].numpy()


def mask_table(scores: dict[str, dict], picked: dict[str, dict]) -> str:
    """Format the scores of masks, one line per task.

    Args:
        scores: as score_masks returns them.
        picked: description -> numbers, as swaps.picked returns them.
    """
    lines = []
    for task, result in scores.items():
        numbers = [f"{name} {round(value, 3)}" for name, value in result.items()]
        lines.append(f"masks of {task}: {', '.join(numbers)}")
    lines += [f"{name}: {r['picked']:.3f} of {r['n']}" for name, r in picked.items()]
    return "\n".join(lines)
