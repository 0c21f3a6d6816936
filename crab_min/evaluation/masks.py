"""Masks that stand for answers: predicted by the model's decoder, or made of boxes and points."""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from crab_min.answers import GRID
from crab_min.data import Sample, gold_mask
from crab_min.evaluation.answering import BATCH_SIZE, plan_batches
from crab_min.evaluation.mask_metrics import by_class, hard, null_s, soft
from crab_min.evaluation.sam2 import Sam2, box_mask
from crab_min.evaluation.scores import by_task
from crab_min.features import Features
from crab_min.media.read import read_image
from crab_min.model import AVLanguageModel
from crab_min.sources.av_uie import CLASSES

Masks = list[np.ndarray | None]
MakeMasks = Callable[[Features, list[Sample], list[str]], Masks]


@torch.no_grad()
def predict_masks(
    model: AVLanguageModel, features: Features, samples: list[Sample], texts: list[str]
) -> Masks:
    """Predict the masks of answers with the model's mask decoder.

    The states of the mask tokens depend on media, prompt and text alone, so the texts go through
    the LM once more and no mask has to be kept with them.

    Returns:
        Per sample (size, size): scores in [0, 1], of AVSS classes; None for a text without all
        mask tokens, and for tasks without masks.
    """
    text_of = {sample.id: text for sample, text in zip(samples, texts)}
    with_masks = [sample for sample in samples if sample.task.mask_head]
    masks: dict[str, np.ndarray | None] = {}
    was_training = model.training
    model.eval()
    # an unreadable image has no answer, and no mask either
    for batch, media in features.batches(plan_batches(with_masks, BATCH_SIZE), strict=False):
        if not batch:
            continue
        answers = [text_of[sample.id] for sample in batch]
        collated = model.collate([sample.parts for sample in batch], media, answers)
        semantic = [sample.task.mask_head == "classes" for sample in batch]
        for sample, mask in zip(batch, model.predict_masks(collated, semantic)):
            if mask is not None:
                mask = mask.argmax(0) if len(mask) > 1 else mask[0].half()
                masks[sample.id] = mask.cpu().numpy()
    model.train(was_training)
    return [masks.get(sample.id) for sample in samples]


def masks_from_boxes(samples: list[Sample], texts: list[str], sam2: Sam2 | None) -> Masks:
    """Make masks of the boxes and points of answers (Crab+'s second stage).

    Args:
        sam2: segments the image at its own size; None: the boxes themselves, filled, on the grid.

    Returns:
        Per sample (H, W), empty where the answer denies the object; None for a text that does not
        parse, and for tasks without masks.
    """
    masks: Masks = []
    desc, quiet = "SAM2" if sam2 else "boxes", len(samples) < 32
    for sample, text in zip(tqdm(samples, desc=desc, unit="image", disable=quiet), texts):
        answer = sample.task.parse(text)
        if not sample.task.mask_head or answer.error:
            masks.append(None)
        elif sam2:
            image = next(part.path for part in sample.media if part.kind == "image")
            masks.append(sam2.mask(read_image(image, None), answer))
        else:
            masks.append(box_mask(answer, GRID, GRID))
    return masks


def score_masks(samples: list[Sample], masks: Masks) -> dict[str, dict]:
    """Score masks by task, on 224 x 224 pixels; no mask counts as an empty one.

    Returns:
        task -> over the samples that have something to find: "miou" and "f" (Crab's, on scores),
        "hard_miou" and "hard_f" (Crab+'s, on binary masks), or of AVSS the numbers by class;
        "coverage", the share of them with a mask, and "n". Over the others (Ref-AVS's null split):
        "null_s", "null_s_background" and "null_n".
    """
    results = {}
    for task, rows in by_task(samples, masks).items():
        if not task.mask_head:
            continue
        gold = np.stack([gold_or_empty(sample) for sample, _ in rows])
        predicted = np.stack([on_grid(mask) for _, mask in rows])
        there = gold.any((1, 2))
        has_mask = np.array([mask is not None for _, mask in rows])
        result = {"coverage": float(has_mask[there].mean()) if there.any() else 0.0}
        result["n"] = int(there.sum())
        if task.mask_head == "classes":
            result |= by_class(predicted[there].astype(int), gold[there].astype(int), CLASSES)
        elif there.any():
            result |= soft(predicted[there], gold[there])
            binary = hard(predicted[there] > 0.5, gold[there])
            result |= {f"hard_{name}": value for name, value in binary.items()}
        if not there.all():
            nothing = predicted[~there] > 0.5
            result["null_s"] = null_s(nothing)
            result["null_s_background"] = null_s(nothing, of_background=True)
            result["null_n"] = len(nothing)
        results[task.name] = result
    return results


def gold_or_empty(sample: Sample) -> np.ndarray:
    """Return the gold mask of a sample on the grid, empty where it has none."""
    mask = gold_mask(sample, GRID)
    return np.zeros((GRID, GRID), bool) if mask is None else mask


def on_grid(mask: np.ndarray | None) -> np.ndarray:
    """Return a predicted mask on the grid, empty for None."""
    return np.zeros((GRID, GRID)) if mask is None else resized(mask, GRID, GRID)


def resized(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize scores (h, w) bilinearly; classes, and true or false, by the nearest pixel."""
    mode = "nearest" if mask.dtype.kind in "ib" else "bilinear"
    tensor = torch.from_numpy(mask)[None, None].float()
    return F.interpolate(tensor, (height, width), mode=mode)[0, 0].numpy()


def mask_table(scores: dict[str, dict], picked: dict[str, dict]) -> str:
    """Format the scores of masks, and how often the sounding one of two things was picked."""
    lines = [
        "masks of    mIoU      F  hard mIoU  hard F  coverage     n"
        "   null: S of all, of the background, n"
    ]
    for task, r in scores.items():
        line = (
            f"{task:<9} {r.get('miou', 0):>6.3f} {r.get('f', 0):>6.3f} "
            f"{r.get('hard_miou', 0):>10.3f} {r.get('hard_f', 0):>7.3f} "
            f"{r['coverage']:>9.2f} {r['n']:>5}"
        )
        if "null_s" in r:
            line += f"   {r['null_s']:.3f} {r['null_s_background']:.3f} {r['null_n']}"
        lines.append(line)
    lines += [f"{name}: {r['picked']:.3f} of {r['n']}" for name, r in picked.items()]
    return "\n".join(lines)
