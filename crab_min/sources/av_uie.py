"""The annotation files of AV-UIE v2 (Crab+) and the masks they go with.

AV-UIE v2 has one folder per task, with train.json and test.json: lists of rows, one per sample. The
other releases are read into rows of this form (rows.py), so that tasks, prompts and metrics are the
same for all of them.

Differs from the release: the target of a mask is text, its box and three points.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from crab_min.answers import GRID, Box, Point, mask_box
from crab_min.errors import DataError, MediaError
from crab_min.media.kinds import replace_folder
from crab_min.media.read import read_image
from crab_min.text_files import read_csv, read_json

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
    if path.suffix == ".csv":
        _, numbered = read_csv(path, HEADERS.get(path.name))
        rows = [row for _, row in numbered]
    else:
        content = read_json(path)
        try:
            rows = find_rows(content)
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            expected = "not an annotation file that is known here"
            raise DataError(f"{path}: {expected} ({reason}); download it again") from None
    if rows == []:
        raise DataError(f"{path}: no rows; download it again, or remove it")
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

    Raises:
        ValueError: an id stands there twice. KeyError and TypeError: another form.
    """
    images = {image["id"]: image for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    if len(images) < len(content["images"]) or len(names) < len(content["categories"]):
        raise ValueError("two images or two categories have one id")
    return [
        {**row, "image": images[row["image_id"]], "name": names[row["category_id"]]}
        for row in content["annotations"]
    ]


# --- masks ----------------------------------------------------------------------------------------


def mask_path(frame: Path, task: str, row: dict) -> Path:
    """Return where the release keeps the mask of a frame. Raises DataError."""
    if "polygons" in row:  # which are the mask
        return frame.with_suffix(".png")
    try:
        if task == "ref_avs":
            number = row.get("frame_idx", row.get("idx"))
            folder = frame.parents[3] / "gt_mask" / row["vid"] / f"fid_{row['fid']}"
            return folder / f"0000{number}.png"
        return replace_folder(frame.with_suffix(".png"), "frames", "labels_rgb")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        expected = "CLIP/frames/NUMBER.jpg was expected, and of ref_avs the fields vid and fid"
        raise DataError(f"{frame}: no mask goes with it ({error}); {expected}") from None


def read_mask(path: Path, row: dict | None = None) -> np.ndarray:
    """Read a mask (H, W, 3) uint8: black is nothing, a colour is an object.

    Args:
        row: its annotation; one with polygons (LVIS) has no file.

    Raises DataError.
    """
    if row and "polygons" in row:
        return draw_polygons(row["polygons"], row["image_size"])
    try:
        return read_image(path, size=None)
    except MediaError as error:
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


def read_gold_mask(path: Path, row: dict, classes: bool, size: int = 0) -> np.ndarray:
    """Read a mask as (H, W) bool, or as the class per pixel, int64.

    Args:
        row: its annotation.
        classes: the colours are those of AVSS.
        size: pixels per side of the result, by the nearest pixel; 0 for the file's own size.
    """
    mask = read_mask(path, row)  # (H, W, 3)
    mask = mask_classes(mask) if classes else mask.max(-1) > 0
    if not size:
        return mask
    # the nearest row and column of the file for each of the result
    height, width = mask.shape
    rows, columns = np.arange(size) * height // size, np.arange(size) * width // size
    return mask[rows[:, None], columns]


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
