"""Mask metrics by hand on masks of four pixels."""
import numpy as np
import pytest

from crab_min.evaluation.mask_metrics import by_class, hard, null_s, soft

GOLD = np.array([[[1, 1], [0, 0]], [[0, 0], [0, 0]]], bool)                   # two frames: the upper half, nothing


def test_soft_by_hand():
    """Frame 1: of 2 pixels 1 is found, and 1 wrongly: IoU 1/3. Frame 2: 3 of 4 are rightly left out. F: at .85, P 1, R 1/2."""
    scores = np.array([[[.9, .2], [.8, 0]], [[.7, 0], [0, 0]]])
    found = soft(scores, GOLD)
    assert found["miou"] == pytest.approx((1 / 3 + 3 / 4) / 2)
    assert found["f"] == pytest.approx(1.3 * 1 * .5 / (.3 * 1 + .5))
    assert soft(scores[1:], GOLD[1:])["f"] == 0        # nothing to find in any frame


def test_hard_by_hand():
    """Frame 1: IoU 1/3, P = R = 1/2 = F. Frame 2, nothing to find: 1 for an empty mask, 0 for another."""
    one = np.array([[[1, 0], [1, 0]]], bool)
    assert hard(np.concatenate([one, np.zeros_like(one)]), GOLD) == pytest.approx({"miou": (1 / 3 + 1) / 2, "f": (1 / 2 + 1) / 2})
    assert hard(np.concatenate([one, one]), GOLD) == pytest.approx({"miou": 1 / 6, "f": 1 / 4})
    assert hard(np.zeros((1, 2, 2)), GOLD[:1]) == {"miou": 0, "f": 0}


def test_null_s_in_both_forms():
    """A fifth of the pixels covered: the root of 1/5 of all, of 1/4 of the background."""
    mask = np.zeros((1, 5, 5))
    mask[0, 0] = 1
    assert null_s(mask) == pytest.approx(.2 ** .5) and null_s(mask, of_background=True) == pytest.approx(.5)
    assert null_s(np.ones((1, 2, 2)), of_background=True) == 0 and null_s(np.ones((1, 2, 2))) == 1


def test_avss_by_hand():
    """Frame 1: class 0 IoU 2/3 (P 1, R 2/3), class 1 IoU 1/2 (P 1/2, R 1). Frame 2, a pixel of no class: class 0 all right, class 2 missed."""
    gold = np.array([[[0, 0], [0, 1]], [[0, 0], [2, -1]]])
    guess = np.array([[[0, 0], [1, 1]], [[0, 0], [1, 1]]])
    f = {0: (1.3 * 2 / 3 / (.3 + 2 / 3) + 1) / 2, 1: 1.3 * .5 / (.15 + 1) / 2, 2: 0}
    iou = {0: (2 / 3 + 1) / 2, 1: (1 / 2 + 0) / 2, 2: 0}                      # class 1 is predicted in frame 2 too
    found = by_class(guess, gold, 5)
    assert found["miou"] == pytest.approx(sum(iou.values()) / 3) and found["f"] == pytest.approx(sum(f.values()) / 3)
    assert found["miou_no_background"] == pytest.approx((iou[1] + iou[2]) / 2)
