"""Metrics of segmentation masks for S4, MS3, AVSS and Ref-AVS: mIoU (J), F and S.

Let M be the predicted and G the gold mask of a frame, as sets of pixels:

    P = |M and G| / |M|                       precision
    R = |M and G| / |G|                       recall
    J = |M and G| / |M or G|                  IoU; mIoU is its mean over frames
    F = (1 + b2) P R / (b2 P + R)             with b2 = 0.3, so that precision weighs more
    S = sqrt(|M| / all pixels)                where the object is absent; 0 is right

Crab and Crab+ average J and F in two ways, which differ in the threshold and in frames whose gold
mask is empty. Both are here:

    soft    Crab's, from AVSBench: scores in [0, 1], F at the best of 255 thresholds
    hard    Crab+'s, for the binary masks of SAM2; the stricter one

An invalid answer has no mask. Give zeros for it, and it is scored; the released Crab+ leaves it
out.

Shapes: N frames, H x W pixels, C classes, K thresholds.
"""

import numpy as np

BETA2 = 0.3
THRESHOLDS = np.linspace(0, 1 - 1e-10, 255)


def f_measure(intersection, predicted, gold):
    """Return F of numbers of pixels (any one shape), 0 where a denominator is 0."""
    precision = divide_or_zero(intersection, predicted)
    recall = divide_or_zero(intersection, gold)
    return divide_or_zero((1 + BETA2) * precision * recall, BETA2 * precision + recall)


def divide_or_zero(numerator, denominator):
    """Return numerator / denominator, 0 where the denominator is 0."""
    zeros = np.zeros(np.shape(numerator))
    return np.divide(numerator, denominator, out=zeros, where=np.asarray(denominator) > 0)


def soft(scores: np.ndarray, gold: np.ndarray) -> dict[str, float]:
    """Return mIoU and F as Crab computes them.

    The IoU is taken at the threshold .5. For a frame whose gold mask is empty it is replaced by the
    share of the pixels that are not predicted. Such frames do not count for F: the curves of F
    over the threshold are averaged over the others, and F is the maximum of the mean curve.

    Args:
        scores: (N, H, W) in [0, 1].
        gold: masks (N, H, W).

    Returns:
        {"miou", "f"}, in [0, 1].
    """
    gold = gold.astype(bool)
    masks = scores > 0.5
    gold_is_empty = ~gold.any((1, 2))  # (N,)

    # mIoU
    intersection = (masks & gold).sum((1, 2))  # (N,)
    union = (masks | gold).sum((1, 2))
    share_not_predicted = (~masks).mean((1, 2))
    iou = np.where(gold_is_empty, share_not_predicted, intersection / np.maximum(union, 1))

    # F at each threshold; a pixel is predicted if its score is at or above the threshold
    curves = []
    for frame_scores, frame_gold in zip(scores[~gold_is_empty], gold[~gold_is_empty]):
        predicted = count_at_or_above(THRESHOLDS, frame_scores.ravel())  # (K,)
        intersection = count_at_or_above(THRESHOLDS, frame_scores[frame_gold])  # (K,)
        curves.append(f_measure(intersection, predicted, frame_gold.sum()))
    f = np.mean(curves, 0).max() if curves else 0.0
    return {"miou": float(iou.mean()), "f": float(f)}


def count_at_or_above(thresholds: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return how many values (n,) are at or above each threshold, (K,)."""
    return values.size - np.searchsorted(np.sort(values), thresholds)


def hard(masks: np.ndarray, gold: np.ndarray) -> dict[str, float]:
    """Return mIoU and F as Crab+ computes them: means over frames of binary masks.

    Where both masks of a frame are empty, its IoU and F are 1.

    Args:
        masks, gold: (N, H, W).

    Returns:
        {"miou", "f"}, in [0, 1].
    """
    masks, gold = masks.astype(bool), gold.astype(bool)
    intersection = (masks & gold).sum((1, 2))  # (N,)
    predicted = masks.sum((1, 2))
    expected = gold.sum((1, 2))
    union = predicted + expected - intersection

    iou = np.where(union, intersection / np.maximum(union, 1), 1)
    f = np.where(union, f_measure(intersection, predicted, expected), 1)
    return {"miou": float(iou.mean()), "f": float(f.mean())}


def null_s(masks: np.ndarray, of_background: bool = False) -> float:
    """Return S of masks (N, H, W) that should be empty; 0 is right.

    This is the null split of Ref-AVS. S of a frame is the square root of the share of pixels in the
    mask.

    of_background: take the pixels in the mask over those outside it, as the released Crab+ does,
    and leave out frames that the mask covers; Ref-AVS and Crab divide by all pixels.
    """
    share = masks.astype(bool).mean((1, 2))  # (N,)
    if of_background:
        share = share[share < 1]
        share = share / (1 - share)
    return float(np.sqrt(share).mean()) if share.size else 0.0


def by_class(classes: np.ndarray, gold: np.ndarray, count: int) -> dict[str, float]:
    """Return mIoU and F over classes, for AVSS.

    The scores of a class are averaged over the frames in which it is gold or predicted, and then
    over classes. Pixels without a gold class (-1) are left out. Class 0 is the background; where
    the background is to be left out, the released code drops the last class instead.

    Args:
        classes, gold: class maps (N, H, W) of integers from 0 to count - 1.
        count: the number of classes C.

    Returns:
        {"miou", "f", "miou_no_background", "f_no_background"}, in [0, 1].
    """
    # Sums over frames for each class
    iou, f, frames = np.zeros(count), np.zeros(count), np.zeros(count)  # (C,)
    for frame, frame_gold in zip(classes, gold):
        labelled = frame_gold >= 0
        frame, frame_gold = frame[labelled], frame_gold[labelled]  # (pixels,)
        intersection = np.bincount(frame_gold[frame == frame_gold], minlength=count)  # (C,)
        predicted = np.bincount(frame, minlength=count)
        expected = np.bincount(frame_gold, minlength=count)
        union = predicted + expected - intersection
        iou += intersection / np.maximum(union, 1)
        f += f_measure(intersection, predicted, expected)
        frames += union > 0

    # Means over the classes that occur, with and without the background
    occurs = frames > 0
    foreground = occurs & (np.arange(count) > 0)
    iou, f = iou / np.maximum(frames, 1), f / np.maximum(frames, 1)
    return {
        "miou": mean_or_zero(iou[occurs]),
        "f": mean_or_zero(f[occurs]),
        "miou_no_background": mean_or_zero(iou[foreground]),
        "f_no_background": mean_or_zero(f[foreground]),
    }


def mean_or_zero(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0
