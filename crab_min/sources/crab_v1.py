"""The annotation files of AV-UIE v1 (Crab, 2503.13068).

A released row becomes rows as in AV-UIE v2.

Each function takes the folder of a source, one of its rows, and whether it is for training. It
yields the rows that this one becomes: none if it is left out, several if a clip has several
annotated frames. Where the folders lie: RELEASED_LAYOUTS in rows.py.

Differs from the released loader:
  * of a clip with masks one frame is shown, not all of them;
  * AVSS has the sound of the frame's second in training too;
  * the training frame of AVSS and Ref-AVS is drawn from the name of the clip, so that every run and
    every process draws the same one;
  * the target of a mask is its box and three points, as text.
"""

import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from crab_min.answers import GRID, answer_tag, box_text, points_text
from crab_min.sources.av_uie import box_and_points, mask_objects, mask_path, read_mask
from crab_min.text_files import read_text

LVIS_AREA = 1000  # smallest area of an object that is asked for, in pixels, as in the release
SILENT = 1000  # first coordinate of a box where nothing sounds (ARIG)


# --- question answering, localisation, captions ---------------------------------------------------


def avqa(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """Convert a row of MUSIC-AVQA; Crab's reasoning is the target."""
    video = find_below(folder, row["video_path"])
    audio = find_below(folder, row["audio_path"])
    label = read_label(folder, row["question_id"]) if train else ""
    yield {**row, "video_path": video, "audio_path": audio, "label": label}


def ave(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """Convert a row of AVE; Crab's reasoning is the target."""
    label = read_label(folder, row["vid"]) if train else ""
    yield {**row, **clip_paths(folder, row["vid"], "AVE"), "label_content": label}


def avvp(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """Convert a row of LLP, with the names that the tags have in v2.

    The label is null where Crab threw the generated text away. Such training rows are left out.
    """
    label = re.sub("<(/?)(audio|visual)>", r"<\1\2_event>", row.get("label") or "")
    if label or not train:
        yield {**row, **clip_paths(folder, row["vid"], "llp_videos"), "label_content": label}


def avcap(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """Convert a row of VALOR, a caption of a clip."""
    paths = clip_paths(folder, row["video_id"], "video_data")
    yield {**row, **paths, "label_content": row["desc"]}


def audiocaps(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """Convert a row of AudioCaps, on which the audio connector is pretrained."""
    audio = (folder / "audio_data" / f"{row['audiocap_id']}.wav").absolute()
    yield {**row, "audio_path": str(audio), "label_content": row["caption"]}


def find_below(folder: Path, path: str) -> str:
    """Return `path` if it exists, else a file below `folder`.

    This is the file that matches the end of `path`. The released rows hold absolute paths of the
    authors' machines.
    """
    parts = Path(path.lstrip("/")).parts
    below = [folder.joinpath(*parts[start:]) for start in range(len(parts))]
    existing = (file for file in (Path(path), *below) if file.exists())
    return str(next(existing, below[0]).absolute())


def clip_paths(folder: Path, name: str, videos: str) -> dict[str, str]:
    """Return the fields with the video and the audio of a clip."""
    video = (folder / videos / f"{name}.mp4").absolute()
    audio = (folder / "audio_data" / f"{name}.mp3").absolute()
    return {"video_path": str(video), "audio_path": str(audio)}


def read_label(folder: Path, name: str | int) -> str:
    """Read a target text, which has a file of its own."""
    return read_text(folder / "converted_label" / f"{name}.txt").strip()


# --- segmentation and grounding -------------------------------------------------------------------


def s4(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """Convert a clip of AVSBench S4: one sounding object, trained on its first frame."""
    frames = [0] if train else range(5)
    yield from avsbench_rows("s4", folder / "v1s", frames, {**row, "window": "fifths"}, train)


def ms3(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """Convert a clip of AVSBench MS3: several sounding objects.

    All five frames are trained on.
    """
    yield from avsbench_rows("ms3", folder / "v1m", range(5), {**row, "window": "fifths"}, train)


def avss(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """Convert a clip of AVSBench-semantic, trained on one of its ten frames."""
    frames = [draw_frame(row["uid"])] if train else range(10)
    yield from avsbench_rows("avss", folder / "v2", frames, {**row, "window": "tenth"}, train)


def avsbench_rows(
    task: str, folder: Path, frames: Iterable[int], row: dict, train: bool
) -> Iterator[dict]:
    """Yield one row per frame; for training only of those with an object."""
    for number in frames:
        frame_row, boxes = read_frame(task, folder / row["uid"], number, row)
        if boxes or not train:
            text = f"The sounding object is {row['a_obj']}. {boxes}"
            yield {**frame_row, "label_content": text.strip()}


def ref_avs(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """Convert an expression of Ref-AVS, trained on one of ten frames.

    Frames without the object are kept: their answer is "false".
    """
    vid, thing, _ = row["uid"].rsplit("_", 2)
    frames = range(10)
    if train:
        frames = [draw_frame(f"{row['uid']} {row['fid']} {row['exp']}")]
    row = {**row, "vid": vid, "description": row["exp"].lower(), "window": "tenths"}
    for number in frames:
        frame_row, boxes = read_frame("ref_avs", folder / "media" / vid, number, row)
        exists = answer_tag(str(bool(boxes)).lower())
        yield {**frame_row, "output": f"It is {thing}. {exists} {boxes}".strip()}


def arig(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """Convert a frame of ARIG. Frames in which nothing sounds are left out."""
    if row["top_left"][0] == SILENT:
        return
    box = box_text((*row["top_left"], *row["bottom_right"]))
    yield {
        **row,
        "visual_path": find_below(folder, row["frame_path"]),
        "audio_path": find_below(folder, row["audio_path"]),
        "label_content": f"The sounding object is {row['a_obj']}. {box}",
    }


def lvis(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """Convert an object of LVIS, for pretraining on boxes and masks. Small ones are left out."""
    if row["area"] < LVIS_AREA:
        return
    # pixels of the image -> the 224 x 224 grid
    image = row["image"]
    across, down = GRID / image["width"], GRID / image["height"]
    x, y, width, height = row["bbox"]
    box = (x * across, y * down, (x + width) * across, (y + height) * down)
    # http://images.cocodataset.org/train2017/1.jpg lies at train2017/1.jpg
    name = "/".join(image["coco_url"].split("/")[-2:])
    changed = {
        "image_path": str((folder / name).absolute()),
        "name": row["name"].replace("_", " "),
        "label_content": box_text(map(round, box)),
        "gold_boxes": [tuple(map(round, box))],
    }
    if row.get("segmentation"):
        changed["polygons"] = row["segmentation"]
        changed["image_size"] = (image["width"], image["height"])
    yield changed


def read_frame(task: str, clip: Path, number: int, row: dict) -> tuple[dict, str]:
    """Return the row of one frame of a clip, and the text of its mask.

    The text has the boxes and points of the mask.
    """
    image = (clip / "frames" / f"{number}.jpg").absolute()
    row = {
        **row,
        "visual_path": str(image),
        "audio_path": str((clip / "audio.wav").absolute()),
        "frame_idx": number,
    }
    mask = read_mask(mask_path(image, task, row))
    objects = [box_and_points(object_mask) for object_mask in mask_objects(mask, task)]
    row["gold_boxes"] = [box for box, _ in objects]
    return row, "; ".join(f"{box_text(box)} {points_text(points)}" for box, points in objects)


def draw_frame(name: str) -> int:
    """Draw one of ten frames, the same one for the same name."""
    return random.Random(name).randrange(10)
