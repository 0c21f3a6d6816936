"""Optical flow between two frames, and flow as pictures."""

import cv2
import numpy as np
from matplotlib.colors import hsv_to_rgb

FLOW_GAP = 0.09  # seconds between the two frames: at 25 frames per second, the next but one
FULL_COLOUR = 6 / 96  # part of the picture's width; what moves as far has the full colour


def optical_flow(first: list[np.ndarray], second: list[np.ndarray]) -> np.ndarray:
    """Estimate the flow between pairs of grey images.

    It uses OpenCV's dense inverse search.

    Args:
        first: T images (H, W) uint8.
        second: the T images that follow them.

    Returns:
        (T, H, W, 2): motion to the right and down, in parts of the picture's width.
    """
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow = []
    for before, after in zip(first, second):
        before, after = np.ascontiguousarray(before), np.ascontiguousarray(after)
        flow.append(search.calc(before, after, None))  # (H, W, 2), in pixels
    return np.stack(flow) / first[0].shape[1]


def flow_pictures(flow: np.ndarray) -> np.ndarray:
    """Draw flow (T, H, W, 2) as pictures (T, H, W, 3) uint8.

    The hue is the direction, the saturation the distance in parts of the width: white is at rest.
    """
    x, y = flow[..., 0], flow[..., 1]  # (T, H, W)
    hue = np.arctan2(y, x) / (2 * np.pi) % 1
    saturation = np.minimum(1, np.hypot(x, y) / FULL_COLOUR)
    colours = hsv_to_rgb(np.stack([hue, saturation, np.ones_like(hue)], -1))  # (T, H, W, 3)
    return (255 * colours).round().astype(np.uint8)
