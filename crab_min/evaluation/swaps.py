"""Whether a mask follows the sound, measured on pictures of two things of which one sounds.

Rows of the built-in world's s4 name the box of the silent thing ("silent") and a sound of it
("swapped"). With the one sound the one thing is meant, with the other sound the other.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from crab_min.answers import GRID
from crab_min.data import Sample
from crab_min.evaluation.answering import Decoding, generate_answers
from crab_min.evaluation.masks import MakeMasks, Masks, resized
from crab_min.features import Features
from crab_min.model import AVLanguageModel


def evaluate_picked(
    model: AVLanguageModel,
    features: Features,
    samples: list[Sample],
    masks: Masks,
    decoding: Decoding,
    make_masks: MakeMasks,
) -> dict[str, dict]:
    """Measure how often the sounding one of two things is picked, with either sound.

    Args:
        masks: those of the samples, as `make_masks` made them.
    """
    results = {"picked the sounding one of two": picked(samples, masks)}
    swapped = swap_audio(samples)
    if swapped:
        texts = generate_answers(model, features, swapped, decoding, "with another's sound")
        swapped_masks = make_masks(features, swapped, texts)
        results["followed the other's sound"] = picked(swapped, swapped_masks)
    return {name: result for name, result in results.items() if result}


def picked(samples: list[Sample], masks: Masks) -> dict[str, float]:
    """Return the share of samples whose mask covers more of the thing that is meant.

    Samples that do not have exactly one silent thing are left out; {} if none is left.
    """
    right = []
    for sample, mask in zip(samples, masks):
        silent = list((sample.row.get("silent") or {}).values())
        if len(silent) != 1:
            continue
        meant, other = covered(mask, sample.gold.boxes[0]), covered(mask, silent[0])
        right.append(meant > other)
    return {"picked": float(np.mean(right)), "n": len(right)} if right else {}


def covered(mask: np.ndarray | None, box: tuple) -> int:
    """Count the pixels of a mask inside a box of the grid."""
    if mask is None:
        return 0
    x1, y1, x2, y2 = box
    return int((resized(mask, GRID, GRID) > 0.5)[y1:y2, x1:x2].sum())


def swap_audio(samples: list[Sample]) -> list[Sample]:
    """Return the samples that have another sound, with that sound: now the other thing is meant."""
    changed = []
    for sample in samples:
        sound = sample.row.get("swapped")
        if not sound:
            continue
        boxes = {**sample.row["silent"], sample.row["a_obj"]: sample.gold.boxes[0]}
        meant = sound["event"]
        silent = {label: box for label, box in boxes.items() if label != meant}
        row = {**sample.row, "a_obj": meant, "silent": silent}
        file = Path(sound["audio_path"]).name
        parts = []
        for part in sample.parts:
            if part.kind == "audio":
                path = str(Path(part.path).with_name(file))
                part = replace(part, path=path, index=sound["frame_idx"])
            parts.append(part)
        gold = replace(sample.gold, boxes=[tuple(boxes[meant])])
        changed.append(replace(sample, parts=parts, row=row, gold=gold))
    return changed
