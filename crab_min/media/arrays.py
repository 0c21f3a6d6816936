"""Features and points in array files."""
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from crab_min.errors import MediaError


def read_array(path: str, frames: int, size: int) -> np.ndarray:
    """A side channel that was computed before, in a .npy, .pt or .safetensors: numbers (U, W), (U, S, W) or (U, rows, columns, W) -> (U, S, W) float32.

    Bytes (uint8) are pictures (U, rows, columns[, 1 or 3]) -> `frames` of them, spread over time (frames, size, size, 3). Raises MediaError.
    """
    x = load_array(path)
    if x.dtype == np.uint8:
        x = x[..., None] if x.ndim == 3 else x
        if x.ndim != 4 or not x.size or x.shape[-1] not in (1, 3):
            raise MediaError(f"{path}: bytes of shape {x.shape}; pictures are (steps, rows, columns), grey, or (steps, rows, columns, 3); save features as floats")
        chosen = x[((np.arange(frames) + .5) * len(x) / frames).astype(int)].repeat(3 // x.shape[-1], -1)
        return np.stack([np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR)) for picture in chosen])
    x = x.astype(np.float32)
    if not 2 <= x.ndim <= 4 or not x.size or not np.isfinite(x).all():
        raise MediaError(f"{path}: an array of shape {x.shape}{'' if np.isfinite(x).all() else ' with values that are not finite'}; a side channel is (steps, width), "
                         "(steps, tokens, width) or (steps, rows, columns, width)")
    return x[:, None] if x.ndim == 2 else x.reshape(len(x), -1, x.shape[-1])


def load_array(path: str) -> np.ndarray:
    """The one array of a .npy, .pt or .safetensors. Raises MediaError."""
    try:
        if path.endswith(".npy"):
            return np.asarray(np.load(path))
        x = load_file(path) if path.endswith(".safetensors") else torch.load(path, map_location="cpu", weights_only=True)
        x = next(iter(x.values())) if isinstance(x, dict) else x
        return np.asarray(x) if isinstance(x, np.ndarray) else (x if x.dtype == torch.uint8 else x.float()).numpy()
    except (OSError, ValueError, SafetensorError, RuntimeError, EOFError, AttributeError, StopIteration, pickle.UnpicklingError) as error:
        raise MediaError(f"{path}: not one array of numbers ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); save one with numpy.save or "
                         "torch.save") from None


# 3D points as 3D-LLM gives them, for CREMA: features (N, W) of a scene in one folder, their places (N, 3) in the other
POINTS = "voxelized_features_sam_nonzero_preprocess", "voxelized_voxels_sam_nonzero_preprocess"


def read_points(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(places (U, N, 3) of points, their features (U, N, W) or None): a .npz with xyz (N, 3) or (U, N, 3) and perhaps features, or 3D-LLM's pair. Raises MediaError."""
    if path.endswith(".npz"):
        try:
            with np.load(path) as file:
                xyz, features = file["xyz"], file["features"] if "features" in file else None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise MediaError(f"{path}: not 3D points ({type(error).__name__}: {error}); numpy.savez(FILE, xyz=..., features=...) with xyz (N, 3) or (steps, N, 3)") from None
    else:
        features, xyz = load_array(path), load_array(str(Path(path.replace(*POINTS)).with_suffix(".npy")))
    xyz, features = (x[None] if x is not None and x.ndim == 2 else x for x in (xyz, features))
    if xyz.ndim != 3 or xyz.shape[-1] != 3 or not xyz.size or features is not None and features.shape[:2] != xyz.shape[:2]:
        raise MediaError(f"{path}: places {xyz.shape} and features {None if features is None else features.shape} of points; xyz is (N, 3) or (steps, N, 3), features (N, width)")
    return xyz, features


def point_code(xyz: np.ndarray, features: np.ndarray | None = None, most: int = 5000) -> np.ndarray:
    """Points as tokens (U, N, W): features (U, N, W) + 0.01 * the sines and cosines of their whole-numbered places xyz (U, N, 3), W // 3 for each coordinate, as in CREMA.

    Without features the sines and cosines alone, W = 96. Of more than `most` points as many are taken, evenly (there: at random).
    """
    if xyz.shape[1] > most:
        chosen = np.linspace(0, xyz.shape[1] - 1, most).astype(int)
        xyz, features = xyz[:, chosen], None if features is None else features[:, chosen]
    width = 96 if features is None else features.shape[-1]
    each = width // 3
    turns = xyz[..., None].astype(np.float32) / 10000 ** (np.arange(0, each, 2) / each)          # (U, N, 3, (each + 1) // 2)
    code = np.stack([np.sin(turns), np.cos(turns)], -1).reshape(*turns.shape[:-1], -1)[..., :each].reshape(*xyz.shape[:2], -1)
    code = np.pad(code, ((0, 0), (0, 0), (0, width - code.shape[-1])))
    return np.float32(code if features is None else features + .01 * code)
