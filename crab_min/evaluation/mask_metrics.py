"""Metrics of masks, as pure functions on arrays: S4 and MS3, AVSS, Ref-AVS (papers/crab.md 5).

Two readings stand side by side. `soft` is Crab's: scores in [0, 1], F at the best of 255 thresholds. `hard` is Crab+'s, on the masks that SAM2
gives, and the stricter one. An invalid answer has no mask: give zeros and it is scored, where the released Crab+ leaves it out.

Shapes: N frames, H x W pixels, C classes.
"""
import numpy as np

BETA2 = .3                                             # F weighs precision over recall
THRESHOLDS = np.linspace(0, 1 - 1e-10, 255)


def f_measure(right, predicted, wanted):
    """F of pixel counts, 0 where nothing is right."""
    precision, recall = (np.divide(right, n, out=np.zeros(np.shape(right)), where=np.asarray(n) > 0) for n in (predicted, wanted))
    below = BETA2 * precision + recall
    return np.divide((1 + BETA2) * precision * recall, below, out=np.zeros(np.shape(right)), where=below > 0)


def soft(scores: np.ndarray, gold: np.ndarray) -> dict[str, float]:
    """mIoU and F of scores (N, H, W) in [0, 1] against masks (N, H, W), as in Crab and AVSBench.

    A frame without anything to find counts the share of pixels rightly left out as its IoU, and is not in F. F: the curves of all frames are
    averaged, then its best threshold is taken.
    """
    mask, gold = scores > .5, gold.astype(bool)
    union, empty = (mask | gold).sum((1, 2)), ~gold.any((1, 2))
    iou = np.where(empty, (~mask).mean((1, 2)), (mask & gold).sum((1, 2)) / np.maximum(union, 1))
    curves = []
    for s, g in zip(scores[~empty], gold[~empty]):
        ranked, right = np.sort(s.ravel()), np.sort(s[g])                     # pixels at or above a threshold, by counting
        curves.append(f_measure(right.size - np.searchsorted(right, THRESHOLDS), ranked.size - np.searchsorted(ranked, THRESHOLDS), g.sum()))
    return {"miou": float(iou.mean()), "f": float(np.mean(curves, 0).max()) if curves else 0.}


def hard(masks: np.ndarray, gold: np.ndarray) -> dict[str, float]:
    """mIoU (J) and F of masks (N, H, W) against masks: frames averaged; where both are empty both are 1."""
    masks, gold = masks.astype(bool), gold.astype(bool)
    right, predicted, wanted = ((m).sum((1, 2)) for m in (masks & gold, masks, gold))
    union = predicted + wanted - right
    iou = np.where(union, right / np.maximum(union, 1), 1)
    return {"miou": float(iou.mean()), "f": float(np.where(union, f_measure(right, predicted, wanted), 1).mean())}


def null_s(masks: np.ndarray, of_background: bool = False) -> float:
    """S of expressions that mean nothing in the picture: the root of the share of pixels that masks (N, H, W) cover, averaged; 0 is right.

    of_background: covered pixels over uncovered ones, as the released Crab+ computes it (whole frames left out), where Ref-AVS has all pixels.
    """
    share = masks.astype(bool).mean((1, 2))
    share = share[share < 1] / (1 - share[share < 1]) if of_background else share
    return float(np.sqrt(share).mean()) if share.size else 0.


def by_class(classes: np.ndarray, gold: np.ndarray, count: int) -> dict[str, float]:
    """AVSS: mIoU and F over classes, of class maps (N, H, W) with values 0 (background) to count - 1.

    A class is averaged over the frames in which it is there or predicted, then classes are averaged; pixels without a gold class (-1) are
    left out. "..._no_background": without class 0 (the released code, which counts from elsewhere, drops the last class in its place).
    """
    sums, frames = np.zeros((2, count)), np.zeros(count)
    for c, g in zip(classes, gold):
        c, g = c[g >= 0], g[g >= 0]
        right, predicted, wanted = (np.bincount(x, minlength=count) for x in (g[c == g], c, g))
        union = predicted + wanted - right
        sums += [right / np.maximum(union, 1), f_measure(right, predicted, wanted)]
        frames += union > 0
    there = frames > 0
    means = sums / np.maximum(frames, 1)
    return {f"{name}{end}": float(row[keep].mean()) if keep.any() else 0. for name, row in zip(("miou", "f"), means)
            for end, keep in (("", there), ("_no_background", there & (np.arange(count) > 0)))}
