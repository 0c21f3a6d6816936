"""Reading features, pictures and 3D points from array files.

The files are .npy, .npz, .pt and .safetensors.

Shapes: U steps in time, S tokens per step, W wide; N points.
"""

import os
import pickle
import zipfile

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from crab_min.errors import MediaError
from crab_min.media.kinds import replace_folder

SUFFIXES = (".npy", ".pt", ".safetensors", ".npz")
# Released features whose shape alone does not tell their steps (PAVE)
LLAVA_3D_TOKENS = 24 * 24  # of a frame; a scene is one row of 32 frames, (1, 18432, 1024)
LANGUAGEBIND_STEP = (5, 1024)  # a class token, then 2 x 2 tokens

# 3D points as 3D-LLM releases them, for CREMA: two folders, with the features of a scene (N, W) in
# the first and the coordinates (N, 3) of the same points in the second.
POINTS = "voxelized_features_sam_nonzero_preprocess", "voxelized_voxels_sam_nonzero_preprocess"


HALF_MAX = float(np.finfo(np.float16).max)  # features are kept in half precision


# --- features and pictures ------------------------------------------------------------------------


def read_array(path: str, frames: int, size: int) -> np.ndarray:
    """Read a side channel that was computed before: features, or pictures as bytes.

    Args:
        path: a .npy, .pt or .safetensors file with one array. Numbers are features (U, W),
            (U, S, W) or (U, rows, columns, W); bytes (uint8) are pictures (U, rows, columns),
            with a last axis of 1 or 3 or none.
        frames: number of pictures, spread evenly over time. All steps of features are kept.
        size: side of the square pictures in pixels.

    Returns:
        Features (U, S, W) float32, or pictures (frames, size, size, 3) uint8.

    Raises:
        MediaError: a file that is missing, broken or holds another shape.
    """
    array = load_array(path)
    if array.dtype == np.uint8:
        return spread_pictures(path, array, frames, size)
    features = released_steps(array.astype(np.float32))
    finite = bool((np.abs(features) <= HALF_MAX).all())
    if not 2 <= features.ndim <= 4 or not features.size or not finite:
        reason = "" if finite else " with values that are not finite in half precision"
        raise MediaError(
            f"{path}: an array of shape {features.shape}{reason}; a side channel is "
            "(steps, width), (steps, tokens, width) or (steps, rows, columns, width)"
        )
    if features.ndim == 2:
        return features[:, None]  # (U, 1, W)
    return features.reshape(len(features), -1, features.shape[-1])  # (U, S, W)


def released_steps(features: np.ndarray) -> np.ndarray:
    """Bring features that PAVE releases into steps and tokens; others stay as they are.

    LLaVA-3D's frames stand in one row of tokens, (1, T * 576, W). LanguageBind's steps begin with a
    class token, which PAVE leaves out.

    Args:
        features: of any number of axes.
    """
    shape = features.shape
    if len(shape) == 3 and shape[0] == 1 and shape[1] % LLAVA_3D_TOKENS == 0:
        return features.reshape(-1, LLAVA_3D_TOKENS, shape[2])  # (T, 576, W)
    if len(shape) == 3 and shape[1:] == LANGUAGEBIND_STEP:
        return features[:, 1:]  # (U, 4, W)
    return features


def spread_pictures(path: str, pictures: np.ndarray, frames: int, size: int) -> np.ndarray:
    """Return `frames` pictures (frames, size, size, 3) spread evenly over time."""
    if pictures.ndim == 3:
        pictures = pictures[..., None]  # (U, rows, columns, 1): grey
    if pictures.ndim != 4 or not pictures.size or pictures.shape[-1] not in (1, 3):
        raise MediaError(
            f"{path}: bytes of shape {pictures.shape}; pictures are (steps, rows, columns), grey, "
            "or (steps, rows, columns, 3); save features as floats"
        )
    # the pictures in the middle of `frames` equal parts, as read_video takes them
    chosen = ((np.arange(frames) + 0.5) * len(pictures) / frames).astype(int)
    pictures = pictures[chosen].repeat(3 // pictures.shape[-1], -1)  # (frames, rows, columns, 3)
    resized = []
    for picture in pictures:
        image = Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR)
        resized.append(np.asarray(image))
    return np.stack(resized)


def load_array(path: str) -> np.ndarray:
    """Load the one array of a .npy, .pt or .safetensors file. Raises MediaError."""
    if not os.path.exists(path):
        raise MediaError(f"{path}: no such file; python -m crab_min.tools.features makes features")
    try:
        if path.endswith(".npy"):
            return np.asarray(np.load(path))
        if path.endswith(".safetensors"):
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, dict):
            content = next(iter(content.values()))
        if isinstance(content, np.ndarray):
            return content
        # numpy knows no bfloat16
        return (content if content.dtype == torch.uint8 else content.float()).numpy()
    except (
        OSError,
        ValueError,
        SafetensorError,
        RuntimeError,
        EOFError,
        AttributeError,
        StopIteration,
        pickle.UnpicklingError,
    ) as error:
        first_line = str(error).partition("\n")[0]
        reason = f"not one array of numbers ({type(error).__name__}: {first_line})"
        raise MediaError(f"{path}: {reason}; save one with numpy.save or torch.save") from None


# --- 3D points ------------------------------------------------------------------------------------


def read_points(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Read 3D points.

    Args:
        path: a .npz with `xyz` (N, 3) or (U, N, 3) and perhaps `features` (N, W) or (U, N, W), or
            3D-LLM's file of features, whose coordinates are found in the folder beside it.

    Returns:
        (xyz (U, N, 3), features (U, N, W) or None).

    Raises:
        MediaError: a file that is missing, broken or holds other shapes.
    """
    if path.endswith(".npz"):
        xyz, features = load_npz_points(path)
    else:
        features = load_array(path)
        try:
            coordinates = replace_folder(path, *POINTS).with_suffix(".npy")
        except ValueError:
            expected = f"a .npz of points, or a file in a folder {POINTS[0]}"
            raise MediaError(f"{path}: expected {expected}") from None
        xyz = load_array(str(coordinates))
    if xyz.ndim == 2:
        xyz = xyz[None]  # (1, N, 3): one step
    if features is not None and features.ndim == 2:
        features = features[None]  # (1, N, W)

    for values in (xyz, features):
        if values is not None and not (np.abs(values) <= HALF_MAX).all():
            raise MediaError(f"{path}: points with values that are not finite in half precision")
    fitting = features is None or features.shape[:2] == xyz.shape[:2]
    if xyz.ndim != 3 or xyz.shape[-1] != 3 or not xyz.size or not fitting:
        shape = None if features is None else features.shape
        raise MediaError(
            f"{path}: coordinates {xyz.shape} and features {shape} of points; xyz is (N, 3) or "
            "(steps, N, 3), features (N, width)"
        )
    return xyz, features


def load_npz_points(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Load `xyz` and, if they are there, `features` of a .npz file. Raises MediaError."""
    try:
        with np.load(path) as file:
            features = file["features"] if "features" in file else None
            return file["xyz"], features
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise MediaError(
            f"{path}: not 3D points ({type(error).__name__}: {error}); "
            "numpy.savez(FILE, xyz=..., features=...) with xyz (N, 3) or (steps, N, 3)"
        ) from None


def point_code(xyz: np.ndarray, features: np.ndarray | None = None, most: int = 5000) -> np.ndarray:
    """Encode points as tokens: features + 0.01 * the code of their coordinates.

    The code is made of sines and cosines.

    As in CREMA, except that of too many points some are taken evenly, there at random.

    Args:
        xyz: whole-numbered coordinates (U, N, 3). Each has W // 3 sines and cosines.
        features: (U, N, W). None: the sines and cosines alone are the tokens, and W is 96.
        most: the largest number of points.

    Returns:
        (U, N, W) float32.
    """
    if xyz.shape[1] > most:
        chosen = np.linspace(0, xyz.shape[1] - 1, most).astype(int)
        xyz = xyz[:, chosen]  # (U, most, 3)
        if features is not None:
            features = features[:, chosen]
    width = 96 if features is None else features.shape[-1]

    # sin(x / 10000^(i / n)), cos(x / 10000^(i / n)) for even i < n, of each coordinate x
    per_axis = width // 3
    frequencies = 10000 ** (np.arange(0, per_axis, 2) / per_axis)
    angles = xyz[..., None].astype(np.float32) / frequencies  # (U, N, 3, (per_axis + 1) // 2)
    code = np.stack([np.sin(angles), np.cos(angles)], -1)
    code = code.reshape(*angles.shape[:-1], -1)[..., :per_axis]  # (U, N, 3, per_axis)
    code = code.reshape(*xyz.shape[:2], -1)  # (U, N, 3 * per_axis)

    code = np.pad(code, ((0, 0), (0, 0), (0, width - code.shape[-1])))  # (U, N, W)
    if features is None:
        return np.float32(code)
    return np.float32(features + 0.01 * code)
