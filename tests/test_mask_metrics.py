"""Metrics of masks, by hand on masks of a few pixels."""

import numpy as np
import pytest

from crab_min.evaluation.mask_metrics import by_class, hard, null_s, soft

# Two frames of 2 x 2 pixels: the upper half, nothing
GOLD = np.array([[[1, 1], [0, 0]], [[0, 0], [0, 0]]], bool)


def test_soft_by_hand():
    """Frame 1: one of two pixels is found and one is wrong. Frame 2: three of four are left out.

    F, of frame 1 alone, is best between the scores .8 and .9, where P is 1 and R 1/2.
    """
    scores = np.array([[[0.9, 0.2], [0.8, 0]], [[0.7, 0], [0, 0]]])
    result = soft(scores, GOLD)
    assert result["miou"] == pytest.approx((1 / 3 + 3 / 4) / 2)
    assert result["f"] == pytest.approx(1.3 * 1 * 0.5 / (0.3 * 1 + 0.5))
    assert soft(scores[1:], GOLD[1:])["f"] == 0  # no frame with anything to find


def test_hard_by_hand():
    """Frame 1: IoU 1/3, P = R = F = 1/2. Frame 2, with nothing to find: 1 for an empty mask."""
    left = np.array([[[1, 0], [1, 0]]], bool)
    empty = np.zeros_like(left)
    one_right = {"miou": (1 / 3 + 1) / 2, "f": (1 / 2 + 1) / 2}
    assert hard(np.concatenate([left, empty]), GOLD) == pytest.approx(one_right)
    assert hard(np.concatenate([left, left]), GOLD) == pytest.approx({"miou": 1 / 6, "f": 1 / 4})
    assert hard(empty, GOLD[:1]) == {"miou": 0, "f": 0}


def test_null_s_in_both_forms():
    """One fifth of the pixels is covered, which is one fourth of the background."""
    mask = np.zeros((1, 5, 5))
    mask[0, 0] = 1
    assert null_s(mask) == pytest.approx((1 / 5) ** 0.5)
    assert null_s(mask, of_background=True) == pytest.approx((1 / 4) ** 0.5)
    whole = np.ones((1, 2, 2))
    assert null_s(whole) == 1 and null_s(whole, of_background=True) == 0


def test_avss_by_hand():
    """Frame 1: class 0 has P 1, R 2/3, IoU 2/3; class 1 has P 1/2, R 1, IoU 1/2.

    Frame 2, with a pixel of no class: class 0 is right, class 2 is missed, class 1 is predicted
    wrongly and counts as 0. Classes 3 and 4 do not occur.
    """
    gold = np.array([[[0, 0], [0, 1]], [[0, 0], [2, -1]]])
    predicted = np.array([[[0, 0], [1, 1]], [[0, 0], [1, 1]]])
    iou = [(2 / 3 + 1) / 2, (1 / 2 + 0) / 2, 0]
    f_of_class_0 = 1.3 * 1 * 2 / 3 / (0.3 * 1 + 2 / 3)
    f_of_class_1 = 1.3 * 1 / 2 * 1 / (0.3 / 2 + 1)
    f = [(f_of_class_0 + 1) / 2, (f_of_class_1 + 0) / 2, 0]
    assert by_class(predicted, gold, 5) == pytest.approx(
        {
            "miou": sum(iou) / 3,
            "f": sum(f) / 3,
            "miou_no_background": sum(iou[1:]) / 2,
            "f_no_background": sum(f[1:]) / 2,
        }
    )
