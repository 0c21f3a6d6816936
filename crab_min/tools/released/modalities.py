"""Modalities in CREMA's released files (2402.05889): which are whole, and how they are joined."""

import re

import torch
from torch import Tensor

from crab_min.errors import ModelError
from crab_min.tools.released.weights import missing_modalities

# CREMA's names of modalities where ours differ
OUR_MODALITY_NAMES = {"norm": "normals", "pc": "points"}
UNNORMED = ("points",)  # the released code has their norm, and does not use it
# a modality inside the name of a weight: its own parts, or its low-rank pair
MODALITY_IN_NAME = re.compile(r"(?P<before>\.(?:parts|A|B)\.)(?P<modality>\w+)(?=\.)")


def rename_modalities(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give CREMA's modalities our names."""

    def our_name(match: re.Match) -> str:
        modality = match["modality"]
        return match["before"] + OUR_MODALITY_NAMES.get(modality, modality)

    return {MODALITY_IN_NAME.sub(our_name, name): w for name, w in weights.items()}


def add_missing_adapters(weights: dict[str, Tensor], names: list[str]) -> list[str]:
    """Give zero adapters to modalities that have none in the files, but all else.

    So released files have the video of the zero-shot runs, which is read without one.

    Returns:
        A line that names them, or none.
    """
    base = re.compile(r"(.*\.(?:query|value))\.base\.weight")
    lines = []
    for name, absent in missing_modalities(weights, names).items():
        linears = [match[1] for match in map(base.fullmatch, list(weights)) if match]
        if absent != ["adapter"] or not linears:
            continue
        for linear in linears:
            out, width = weights[f"{linear}.base.weight"].shape
            weights[f"{linear}.A.{name}.weight"] = torch.zeros(1, width)
            weights[f"{linear}.B.{name}.weight"] = torch.zeros(out, 1)
        lines.append(f"{name} has no adapter in these files, as in the zero-shot runs")
    return lines


def check_modalities(weights: dict[str, Tensor], names: list[str]) -> None:
    """Raise ModelError unless rgb comes first, or is not there, and all modalities are whole."""
    missing = missing_modalities(weights, names)
    if (names[:1] == ["rgb"] or len(names) == 1) and not missing:
        return

    # say what is wrong, and which modalities could be named instead
    problems = [f"{name} lacks {', '.join(parts)}" for name, parts in missing.items()]
    if not problems:
        problems = ["name rgb first, or one modality alone"]
    present = {name.split(".")[2] for name in weights if name.startswith("multimodal.parts.")}
    whole = [name for name in sorted(present) if not missing_modalities(weights, [name])]
    raise ModelError(
        f"--side {','.join(names)}: {'; '.join(problems)}; whole in these files: "
        f"{', '.join(whole) or 'none'} (training in sequence saves the last trained alone). "
        "Give the other files too, or name those that are whole"
    )


def check_fusion(weights: dict[str, Tensor], names: list[str]) -> list[str]:
    """Check that the fusion has columns for all the modalities but rgb, or that there is none.

    Returns:
        A line that says what follows where there is none.

    Raises:
        ModelError: a fusion of other modalities.
    """
    fusion = weights.get("fusion.linear.weight")  # (width, width x fused modalities)
    if fusion is None:
        order = "one after the other" if len(names) > 1 else "alone"
        return [f"no fusion in these files: {'+'.join(names)} in the prompt, {order}"]
    width, columns = fusion.shape
    expected = len(names) - 1
    if columns == expected * width:
        return []
    wanted = f"one of the {expected} beside rgb, in this order" if expected else "none"
    raise ModelError(
        f"--side {','.join(names)}: a fusion of {columns // width} modalities in these files, "
        f"expected {wanted}. Name rgb and the modalities that were fused"
    )
