"""A test of whether masks follow the sound.

The pictures show one sounding and one silent thing. Rows of the built-in world's s4 name the box of
the silent thing ("silent"), and a sound that it makes ("swapped"). With the swapped sound the mask
has to move to the other thing.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from crab_min.data import Sample
from crab_min.evaluation.masks import Masks, on_grid


def picked(samples: list[Sample], masks: Masks) -> dict[str, float]:
    """Return the share of samples whose mask covers more of the sounding thing.

    Samples that do not have exactly one silent thing are left out.

    Returns:
        "picked", the share, and "n"; {} without such samples.
    """
    correct = []
    for sample, mask in zip(samples, masks):
        silent_boxes = list((sample.row.get("silent") or {}).values())
        if len(silent_boxes) != 1:
            continue
        on_sounding = covered(mask, sample.gold.boxes[0])
        on_silent = covered(mask, silent_boxes[0])
        correct.append(on_sounding > on_silent)
    if not correct:
        return {}
    return {"picked": float(np.mean(correct)), "n": len(correct)}


def covered(mask: np.ndarray | None, box: tuple) -> int:
    """Count the pixels of a mask inside a box of the grid."""
    x1, y1, x2, y2 = box
    return int((on_grid(mask) > 0.5)[y1:y2, x1:x2].sum())


def swap_audio(samples: list[Sample]) -> list[Sample]:
    """Return the samples that have a swapped sound.

    They get this sound, and its thing as the gold.
    """
    changed = []
    for sample in samples:
        sound = sample.row.get("swapped")
        if not sound:
            continue

        # the sounding and the silent thing change places
        boxes = {**sample.row["silent"], sample.row["a_obj"]: sample.gold.boxes[0]}
        sounding = sound["event"]
        silent = {label: box for label, box in boxes.items() if label != sounding}
        row = {**sample.row, "a_obj": sounding, "silent": silent}
        gold = replace(sample.gold, boxes=[tuple(boxes[sounding])])

        # the swapped sound lies beside the first one
        file = Path(sound["audio_path"]).name
        parts = []
        for part in sample.parts:
            if part.kind == "audio":
                path = str(Path(part.path).with_name(file))
                part = replace(part, path=path, index=sound["frame_idx"])
            parts.append(part)
        changed.append(replace(sample, parts=parts, row=row, gold=gold))
    return changed
