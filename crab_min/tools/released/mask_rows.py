"""The rows of the mask tokens in Crab's released embeddings and output layer (2503.13068)."""

import torch
from torch import Tensor

from crab_min.answers import MASK_TOKENS
from crab_min.errors import ModelError

MASK_TOKEN_COUNT = len(MASK_TOKENS)
MASKS_NOTE = (
    "masks: the positional encodings are not in these files, as the release draws them anew at "
    "each start, so its masks differ from run to run; here one draw is kept"
)


def split_mask_rows(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the mask tokens' rows of Crab's embeddings and output layer to its mask decoder.

    What the files lack is added: the positional encodings, and a calibration that does nothing.

    Raises:
        ModelError: a part of the files is missing.
    """
    needed = {"embeddings.weight", "head.weight", "mask_decoder.decoder.no_mask"}
    if needed - weights.keys():
        missing = ", ".join(sorted(needed - weights.keys()))
        raise ModelError(f"the mask decoder's files lack {missing}; is the file whole?")
    embeddings, head = weights["embeddings.weight"], weights["head.weight"]
    width = weights["mask_decoder.decoder.no_mask"].shape[-1]
    generator = torch.Generator().manual_seed(0)
    added = {
        "embeddings.weight": embeddings[:-MASK_TOKEN_COUNT],
        "head.weight": head[:-MASK_TOKEN_COUNT],
        "mask_decoder.read": embeddings[-MASK_TOKEN_COUNT:],
        "mask_decoder.said": head[-MASK_TOKEN_COUNT:],
        "mask_decoder.mean": torch.zeros(embeddings.shape[1]),
        "mask_decoder.std": torch.ones(embeddings.shape[1]),
    }
    for level in range(2):
        matrix = torch.randn(2, width // 2, generator=generator)
        added[f"mask_decoder.decoder.places.{level}.matrix"] = matrix
    return weights | added
