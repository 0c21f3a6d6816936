"""The annotation files of AV-UIE v2 (Crab+) and the masks they go with.

AV-UIE v2 has one folder per task, with train.json and test.json: lists of rows, one per sample. The
other releases are read into rows of this form (rows.py), so that tasks, prompts and metrics are the
same for all of them.

Differs from the release: the target of a mask is text, its box and three points.
"""

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from crab_min.answers import GRID, Box, Point, mask_box
from crab_min.errors import DataError

CLASSES = 71  # of AVSS, with the background
HEADERS = {"vggsound.csv": ["id", "second", "label", "split"]}  # of a .csv that has none


# --- annotation files -----------------------------------------------------------------------------


def read_list(path: Path) -> list[dict]:
    """Read the rows of an annotation file.

    Args:
        path: a JSON list of objects, or a JSON file of another form (`find_rows`), or a .csv with a
            header; or a folder of JSON lists, whose rows get their file's name as "file".

    Raises:
        DataError: a file that is broken or holds something else.
    """
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        return [{**row, "file": file.stem} for file in files for row in read_list(file)]
    try:
        if path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file, HEADERS.get(path.name)))
        else:
            rows = find_rows(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        form = path.suffix[1:].upper()
        raise DataError(f"{path}: broken {form} ({error}); repair or download it again") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list of objects, one per sample")
    return rows


def find_rows(content):
    """Return the list of rows in the content of a JSON file.

    They are the dialogs of AVSD, the annotations of LVIS (with their image and name) and of
    Ego-Exo4D, and the questions of PerceptionTest (with their video). Without a list, returns what
    is there instead of it.
    """
    if not isinstance(content, dict):
        return content
    if {"images", "annotations", "categories"} <= content.keys():
        return join_lvis(content)
    for name in ("dialogs", "annotations"):
        if name in content:
            return content[name]
    if content and all(isinstance(v, dict) and "mc_question" in v for v in content.values()):
        return join_videos(content)
    return content


def join_videos(content: dict) -> list[dict]:
    """Return the questions of a file of PerceptionTest, each with its video."""
    rows = []
    for video, about in content.items():
        rows += [{**question, "video_id": video} for question in about["mc_question"]]
    return rows


def join_lvis(content: dict) -> list[dict]:
    """Return the annotations of an LVIS file.

    Each has its image and the name of its category.
    """
    images = {image["id"]: image for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    return [
        {**row, "image": images[row["image_id"]], "name": names[row["category_id"]]}
        for row in content["annotations"]
    ]


# --- masks ----------------------------------------------------------------------------------------


def mask_path(frame: Path, task: str, row: dict) -> Path:
    """Return where the release keeps the mask of a frame."""
    if task == "ref_avs":
        number = row.get("frame_idx", row.get("idx"))
        folder = frame.parents[3] / "gt_mask" / row["vid"] / f"fid_{row['fid']}"
        return folder / f"0000{number}.png"
    return Path(str(frame.with_suffix(".png")).replace("/frames/", "/labels_rgb/"))


def read_mask(path: Path, row: dict | None = None) -> np.ndarray:
    """Read a mask (H, W, 3) uint8: black is nothing, a colour is an object.

    Args:
        row: its annotation; one with polygons (LVIS) has no file.

    Raises DataError.
    """
    if row and "polygons" in row:
        return draw_polygons(row["polygons"], row["image_size"])
    try:
        return np.asarray(Image.open(path).convert("RGB"))
    except OSError as error:
        reason = f"mask missing or unreadable ({error})"
        raise DataError(f"{path}: {reason}; it is needed for the gold") from None


def draw_polygons(polygons: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    """Draw the polygons of an object of LVIS as a mask (H, W, 3) uint8.

    Args:
        polygons: x and y in turn, in pixels.
        size: width and height of the image in pixels.
    """
    mask = Image.new("RGB", size)
    for polygon in polygons:
        ImageDraw.Draw(mask).polygon(polygon, fill="white")
    return np.asarray(mask)


def mask_classes(mask: np.ndarray) -> np.ndarray:
    """Return the classes (H, W) int64 of an AVSS mask (H, W, 3).

    The class is -1 where a colour is no class.

    The colours are the palette of PASCAL VOC: bit i of a class is bit 7 - i // 3 of channel i % 3.
    """
    classes = np.zeros(mask.shape[:2], np.int64)  # (H, W)
    for i in range(24):
        channel = mask[..., i % 3].astype(np.int64)
        classes |= (channel >> (7 - i // 3) & 1) << i
    return np.where(classes < CLASSES, classes, -1)


def mask_objects(mask: np.ndarray, task: str) -> list[np.ndarray]:
    """Split a mask (H, W, 3) into its objects (H, W) bool.

    An object is a colour (avss), a group of connected columns (ms3), or all of the mask.
    """
    occupied = mask.max(-1) > 0  # (H, W)
    if not occupied.any():
        return []
    if task == "avss":
        colours = np.unique(mask[occupied], axis=0)
        return [(mask == colour).all(-1) for colour in colours]
    if task != "ms3":
        return [occupied]

    columns = np.flatnonzero(occupied.any(0))
    gaps = np.flatnonzero(np.diff(columns) > 1)
    width = mask.shape[1]
    return [occupied & np.isin(np.arange(width), group) for group in np.split(columns, gaps + 1)]


def box_and_points(mask: np.ndarray) -> tuple[Box, list[Point]]:
    """Return the box and three points of a mask (H, W), on the 224 x 224 grid.

    The mask must not be empty. The points lie in the columns where the mask reaches a quarter, a
    half and three quarters of its area, midway down each column.
    """
    height, width = mask.shape
    ys, xs = np.nonzero(mask)
    points = []
    for share in (0.25, 0.5, 0.75):
        x = np.sort(xs)[int(len(xs) * share)]
        y = np.median(ys[xs == x])
        points.append((int(GRID * (x + 0.5) / width), int(GRID * (y + 0.5) / height)))
    return mask_box(mask), points
