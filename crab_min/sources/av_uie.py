"""Annotation files -> rows in the form of AV-UIE v2; masks -> boxes.

AV-UIE v2 (Crab+) has a folder a task, with train.json and test.json. AV-UIE v1 (Crab) keeps the files of each source: `V1` says where they
lie below the data folder and how one of their rows becomes rows of the v2 form, so that tasks, prompts and metrics are the same for both.
So are the sources of PAVE (2503.19794) and CREMA (2402.05889) that neither has, rows of the same table: avsd/, scanqa/, sqa3d/, nextqa/ and
MUSIC-AVQA's own music-avqa/, each with the files of its authors and videos/NAME.mp4 (of a ScanNet scene: its frames as a film). Field names:
papers/crab.md 6, papers/crema_pave.md 6. Media are looked for where a row says, else where the end of its path lies below the folder.

Differs from the released v1 loader: a frame is shown, not all the frames of its clip; AVSS hears the frame's second in training too; the
training frame of AVSS and Ref-AVS is drawn from the name of the clip, so that every run and every rank draws the same one; the target of
a mask is its box and points as text. From PAVE: of AVSD every turn is a sample of its own, where five turns are answered in one.
"""
import csv
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from crab_min.answers import GRID, answer_tag, box_text, mask_box, points_text
from crab_min.errors import DataError
from crab_min.tasks import TASKS

CLASSES = 71                                           # of AVSS, with the background


def find(root: Path, task: str, split: str) -> tuple:
    """The file with the rows of a task and split, and its Source: ROOT/TASK/SPLIT.json and None, or the first of V1; (None, None) without any."""
    places = [(root / task / f"{split}.json", None), *((root / s.folder / s.files[split == "test"], s) for s in RELEASED_LAYOUTS.get(task, ()))]
    return next((place for place in places if place[0].is_file()), (None, None))


def annotation_file(root: Path, task: str, split: str) -> Path | None:
    return find(root, task, split)[0]


def read_rows(root: str | Path, task: str, split: str, limit: int = 0) -> list[dict]:
    """The rows of a task and split, the first `limit` of them (0: all). Raises DataError."""
    path, source = find(Path(root), task, split)
    if path is None:
        raise DataError(f"{root}: no {split}.json for {task}; expected {Path(root) / task / (split + '.json')}")
    rows = read_list(path)
    if source is None:
        return rows[:limit or None]
    folder, found = Path(root) / source.folder, []
    for index, row in enumerate(rows):
        part = str(row.get("split", split))
        if (part.startswith("test") if split == "test" else part == split) and (not limit or len(found) < limit):
            try:
                found += source.convert(folder, row, split == "train")
            except (KeyError, TypeError, ValueError, AttributeError, IndexError, OSError) as error:
                raise DataError(f"{path}, row {index}: {type(error).__name__}: {error}; a row of {task} as released was expected") from None
    return found[:limit or None]


def read_list(path: Path) -> list[dict]:
    """The objects of a JSON list, AVSD's dialogs, the lines of a .csv with a header, or the annotations of an LVIS file with image and name."""
    try:
        if path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8") as file:
                return list(csv.DictReader(file))
        rows = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(rows, dict) and {"images", "annotations", "categories"} <= rows.keys():
            images, names = {i["id"]: i for i in rows["images"]}, {c["id"]: c["name"] for c in rows["categories"]}
            rows = [{**a, "image": images[a["image_id"]], "name": names[a["category_id"]]} for a in rows["annotations"]]
        elif isinstance(rows, dict):
            rows = rows.get("dialogs", rows)
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: broken {path.suffix[1:].upper()} ({error}); repair or download the file again") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list of objects, one a sample")
    return rows


# --- masks -----------------------------------------------------------------------------------------------------------------
def read_mask(path: Path) -> np.ndarray:
    """A released mask (H, W, 3) uint8: black is nothing, a colour is an object. Raises DataError."""
    try:
        return np.asarray(Image.open(path).convert("RGB"))
    except OSError as error:
        raise DataError(f"{path}: mask missing or unreadable ({error}); it is needed for the gold") from None


def mask_path(frame: Path, task: str, row: dict) -> Path:
    """Where the mask of a frame is, as released: labels_rgb beside frames, or Ref-AVS's gt_mask."""
    if task == "ref_avs":
        return frame.parents[3] / "gt_mask" / row["vid"] / f"fid_{row['fid']}" / f"0000{row.get('frame_idx', row.get('idx'))}.png"
    return Path(str(frame.with_suffix(".png")).replace("/frames/", "/labels_rgb/"))


def mask_classes(mask: np.ndarray) -> np.ndarray:
    """The classes (H, W) int64 of an AVSS mask (H, W, 3), whose colour number k has bit i of k as bit 7 - i // 3 of channel i % 3 (PASCAL VOC's palette); -1: no class."""
    k = np.zeros(mask.shape[:2], np.int64)
    for i in range(24):
        k |= (mask[..., i % 3].astype(np.int64) >> (7 - i // 3) & 1) << i
    return np.where(k < CLASSES, k, -1)


def mask_objects(mask: np.ndarray, task: str) -> list[np.ndarray]:
    """The objects (H, W) bool of a mask (H, W, 3): of ms3 a group of connected columns each, of avss a colour each, else one."""
    there = mask.max(-1) > 0
    if task == "avss":
        return [(mask == colour).all(-1) for colour in np.unique(mask[there], axis=0)]
    columns = np.flatnonzero(there.any(0))
    groups = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1) if task == "ms3" else [columns]
    return [there & np.isin(np.arange(there.shape[1]), xs) for xs in groups if len(xs)]


def box_and_points(mask: np.ndarray) -> tuple[tuple, list]:
    """The box (x1, y1, x2, y2) and three points (x, y) of a mask (H, W) that is not empty, as integers on the 224 x 224 grid.

    The points lie where the mask's columns reach a quarter, a half and three quarters of its area, midway down each column.
    """
    (ys, xs), (h, w) = np.nonzero(mask), mask.shape
    columns = [np.sort(xs)[int(len(xs) * q)] for q in (.25, .5, .75)]
    return mask_box(mask), [(int(GRID * (x + .5) / w), int(GRID * (np.median(ys[xs == x]) + .5) / h)) for x in columns]


# --- AV-UIE v1 -------------------------------------------------------------------------------------------------------------
def below(folder: Path, path: str) -> str:
    """The file `path` itself, or where its end lies below `folder`: the released rows hold the authors' absolute paths."""
    parts = Path(path).parts
    places = [Path(path), *(folder.joinpath(*parts[i:]) for i in range(path.startswith("/"), len(parts)))]
    return str(next((p.absolute() for p in places if p.exists()), (folder / path.lstrip("/")).absolute()))


def clip(folder: Path, name: str, video: str, audio: str = "audio_data") -> dict:
    return {"video_path": str((folder / video / f"{name}.mp4").absolute()), "audio_path": str((folder / audio / f"{name}.mp3").absolute())}


def written(folder: Path, name, train: bool) -> str:
    return (folder / "converted_label" / f"{name}.txt").read_text(encoding="utf-8").strip() if train else ""


def avqa(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    yield {**row, "video_path": below(folder, row["video_path"]), "audio_path": below(folder, row["audio_path"]),
           "label": written(folder, row["question_id"], train)}


def ave(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    yield {**row, **clip(folder, row["vid"], "AVE"), "label_content": written(folder, row["vid"], train)}


def avvp(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    text = row.get("label")                            # null: Gemini's text was thrown away
    for tag in ("audio", "visual"):
        text = text and text.replace(f"<{tag}>", f"<{tag}_event>").replace(f"</{tag}>", f"</{tag}_event>")
    if text or not train:
        yield {**row, **clip(folder, row["vid"], "llp_videos"), "label_content": text}


def avcap(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    yield {**row, **clip(folder, row["video_id"], "video_data"), "label_content": row["desc"]}


def audiocaps(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    yield {**row, "audio_path": str((folder / "audio_data" / f"{row['audiocap_id']}.wav").absolute()), "label_content": row["caption"]}


def frame(folder: Path, task: str, image: Path, audio: Path, row: dict, train: bool, said: str) -> Iterator[dict]:
    """A row of one frame with the boxes of its mask; in training frames without an object are left out, except where absence is an answer."""
    row = {**row, "image_path": str(image.absolute()), "visual_path": str(image.absolute()), "audio_path": str(audio.absolute()), "frame_idx": int(image.stem)}
    objects = [box_and_points(m) for m in mask_objects(read_mask(mask_path(image.absolute(), task, row)), task)]
    boxes = "; ".join(f"{box_text(box)} {points_text(points)}" for box, points in objects)
    exists = f"{answer_tag(str(bool(objects)).lower())} " if task == "ref_avs" else ""
    if objects or exists or not train:
        yield {**row, "gold_boxes": [box for box, _ in objects], "label_content" if not exists else "output": f"{said} {exists}{boxes}".strip()}


def avs(task: str, version: str, training: Callable[[str], list[int]], frames: int, window: str) -> Callable:
    """The reader of S4 (v1s), MS3 (v1m) and AVSS (v2): which frames of a clip are trained on; all are tested."""
    def convert(folder: Path, row: dict, train: bool) -> Iterator[dict]:
        place = folder / version / row["uid"]
        for i in training(row["uid"]) if train else range(frames):
            yield from frame(folder, task, place / "frames" / f"{i}.jpg", place / "audio.wav", {**row, "window": window}, train, f"The sounding object is {row['a_obj']}.")
    return convert


def drawn(name: str) -> list[int]:
    return [random.Random(name).randrange(10)]


def ref_avs(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    vid, thing, _ = row["uid"].rsplit("_", 2)
    media, fields = folder / "media" / vid, {**row, "vid": vid, "description": row["exp"].lower(), "object": row["exp"].lower(), "window": "tenths"}
    for i in drawn(f"{row['uid']} {row['fid']} {row['exp']}") if train else range(10):
        yield from frame(folder, "ref_avs", media / "frames" / f"{i}.jpg", media / "audio.wav", fields, train, f"It is {thing}.")


def arig(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    image = below(folder, row["frame_path"])
    if row["top_left"][0] != 1000:                     # no sounding object
        yield {**row, "image_path": image, "visual_path": image, "audio_path": below(folder, row["audio_path"]), "frame_idx": int(Path(image).stem),
               "label_content": f"The sounding object is {row['a_obj']}. {box_text((*row['top_left'], *row['bottom_right']))}"}


def lvis(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    image = row["image"]
    if row["area"] >= 1000:                            # pixels, as released
        (x, y, w, h), across, down = row["bbox"], GRID / image["width"], GRID / image["height"]
        box = round(x * across), round(y * down), round((x + w) * across), round((y + h) * down)
        yield {"image_path": str((folder / "/".join(image["coco_url"].split("/")[-2:])).absolute()), "name": row["name"].replace("_", " "),
               "gold_boxes": [box], "label_content": box_text(box)}


# --- PAVE and CREMA --------------------------------------------------------------------------------------------------------
def film(folder: Path, name) -> str:
    return str((folder / "videos" / f"{name}.mp4").absolute())                               # its sound is in it


def sides(folder: Path, name) -> dict:
    """{"sides": {channel: path}} of CREMA's channels that are there, else {}: a folder of pictures for a video, 3D-LLM's features for a scene."""
    places = {"depth": folder / f"videos_depth/{name}", "flow": folder / f"videos_flow/{name}", "normals": folder / f"videos_norm/{name}",
              "points": folder / f"voxelized_features_sam_nonzero_preprocess/{name}.pt"}
    found = {channel: str(place.absolute()) for channel, place in places.items() if place.exists()}
    return {"sides": found} if found else {}


def avsd(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """The last question of a dialogue of about ten after all turns before it, with their gold answers; in training every question so."""
    video = film(folder, row["image_id"])
    for turns in range(1, len(row["dialog"]) + 1) if train else [len(row["dialog"])]:
        *before, last = row["dialog"][:turns]
        said = "".join(f"Question: {turn['question'].strip()} Answer: {turn['answer'].strip()} " for turn in before)
        yield {"image_id": row["image_id"], "video_path": video, "audio_path": video,
               "dialogue": f"{said}Question: {last['question'].strip()}", "answer": last["answer"]}


def scene(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """ScanQA and SQA3D: trained on the first of the answers. The type of a question is the word it begins with, as SQA3D is tabled."""
    question = row["question"].lower().lstrip()
    yield {**row, "video_path": film(folder, row["scene_id"]), "answer": TASKS[folder.name].gold_answer(row).text, **sides(folder, row["scene_id"]),
           "type": next((word for word in ("what", "is", "how", "can", "which") if question.startswith(word)), "other")}


def music_avqa(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """MUSIC-AVQA's own rows (json_update): <Object> and the like in a question stand for its templ_values, in their order."""
    video, answer, values = film(folder, row["video_id"]), row["anser"].replace("_", " "), json.loads(row["templ_values"])
    yield {**row, "video_path": video, "audio_path": video, "type": " ".join(json.loads(row["type"])), "answer": answer, "label": answer_tag(answer),
           "question": re.sub(r"<\w+>", lambda _: values.pop(0), row["question_content"])}


def nextqa(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """NExT-QA as SeViLA and CREMA have it; the type of a question is what its qid begins with (CW, TN, DL, ...)."""
    row = {**row, "video_path": film(folder, row["video"]), "multi_choice": [row[f"a{i}"] for i in range(row["num_option"])], "type": row["qid"].split("_")[0]}
    yield {**row, "label": answer_tag(TASKS["nextqa"].gold_answer(row).choice), **sides(folder, row["video"])}


@dataclass(frozen=True)
class Source:
    """Where AV-UIE v1, PAVE or CREMA keeps a task, below the data folder, and how a row of it becomes rows of the v2 form."""
    folder: str
    files: tuple[str, str]                             # for training, for the test ("": none)
    convert: Callable[[Path, dict, bool], Iterator[dict]]


RELEASED_LAYOUTS = {                                                 # the first source whose file is there counts
    "avqa": [Source("music-avqa", ("valid_train_samples.json", "test_samples.json"), avqa),
             Source("music-avqa", ("avqa-train.json", "avqa-test.json"), music_avqa)],
    "ave": [Source("ave/AVE_Dataset", ("valid_train_samples.json", "test_samples.json"), ave)],
    "avvp": [Source("avvp", ("train_samples.json", "test_samples.json"), avvp)],
    "s4": [Source("AVS", ("s4_samples.json",) * 2, avs("s4", "v1s", lambda uid: [0], 5, "fifths"))],
    "ms3": [Source("AVS", ("ms3_samples.json",) * 2, avs("ms3", "v1m", lambda uid: [0, 1, 2, 3, 4], 5, "fifths"))],
    "avss": [Source("AVS", ("avss_samples.json",) * 2, avs("avss", "v2", drawn, 10, "tenth"))],
    "arig": [Source("AVS", ("v1s_grounding_samples.json",) * 2, arig)],
    "ref_avs": [Source("ref-avs/REFAVS", ("metadata.csv",) * 2, ref_avs)],
    "avcap": [Source("valor", ("train_samples.json", ""), avcap)],
    "audiocaps": [Source("audiocaps", ("train.csv", "test.csv"), audiocaps)],
    "lvis": [Source("lvis", ("lvis_v1_train.json", "lvis_v1_val.json"), lvis)],
    "avsd": [Source("avsd", ("train_set4DSTC7-AVSD.json", "mock_test_set4DSTC10-AVSD_from_DSTC7_singref.json"), avsd)],
    "scanqa": [Source("scanqa", ("ScanQA_v1.0_train.json", "ScanQA_v1.0_val.json"), scene)],
    "sqa3d": [Source("sqa3d", ("SQA_train.json", "SQA_test.json"), scene)],
    "nextqa": [Source("nextqa", ("nextqa_train.json", "nextqa_val.json"), nextqa)],
}
