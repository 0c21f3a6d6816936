"""Training data of the papers in its released form, made of the built-in world.

    python benchmarks/released_forms.py views data/views        # one question, four exo cameras
    python benchmarks/released_forms.py captions data/captions  # sounds and captions, as AudioCaps
    python benchmarks/released_forms.py objects data/objects    # objects with polygons, as LVIS

The runs on it are in docs/results.md. All of it is made of --seed.
"""

import argparse
import csv
import json
import random
from pathlib import Path

import cv2
import numpy as np
from common import ROOT  # noqa: F401
from PIL import Image
from tqdm import tqdm

from crab_min.media.write import write_audio, write_video
from crab_min.world.clip_rows import all_heard
from crab_min.world.rendering import RATE, Renderer
from crab_min.world.side_channels import VIEW_FPS, build_side_world, view_frames

CAMERAS = 4  # as many exo views as PAVE's patch reads
ENLARGED = 384  # pixels per side of a picture of 96: objects of LVIS below 1,000 are left out


def write_views(out: Path, clips: int, test: int, seed: int) -> None:
    """Write the questions about the second camera, between three others that see no star."""
    shows = build_side_world("", clips, test, seed, ["view"]).parent.absolute()
    cameras = out / "cameras"
    cameras.mkdir(parents=True)
    rng = random.Random(f"{seed}/cameras")
    for split in ("train", "test"):
        rows = []
        for line in tqdm((shows / f"{split}.jsonl").read_text().splitlines(), desc=split):
            row = json.loads(line)
            with_star = shows / row["sides"]["view"]
            views = [str(with_star)]
            for number in range(1, CAMERAS):
                empty = cameras / f"{with_star.stem}_{number}.mp4"
                noise = view_frames((0, 0), np.random.default_rng(rng.getrandbits(32)))
                write_video(empty, noise, None, VIEW_FPS, RATE)
                views.append(str(empty.absolute()))
            row["sides"]["view"] = rng.sample(views, CAMERAS)
            row["videos"] = [str(shows / video) for video in row["videos"]]
            rows.append(json.dumps(row))
        (out / f"{split}.jsonl").write_text("\n".join(rows) + "\n")


def write_captions(out: Path, clips: int, test: int, seed: int) -> None:
    """Write sounds of scenes and what is heard in them: audiocaps/train.csv and test.csv."""
    renderer = Renderer()
    sounds = out / "audiocaps/audio_data"
    sounds.mkdir(parents=True)
    number = 0
    for split, count in (("train", clips), ("test", test)):
        rows = []
        for index in tqdm(range(count), desc=split):
            scene = renderer.scene(split, ("one", "many")[index % 2], index, seed)
            write_audio(sounds / f"{number}.wav", renderer.wave(scene), RATE)
            rows.append({"audiocap_id": number, "caption": all_heard(scene.heard)})
            number += 1
        with open(out / f"audiocaps/{split}.csv", "w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)


def write_objects(out: Path, clips: int, test: int, seed: int) -> None:
    """Write pictures with the box and polygon of each thing: lvis/lvis_v1_train.json and _val."""
    renderer = Renderer()
    names = [thing.label for thing in renderer.things]
    categories = [{"id": i, "name": name.replace(" ", "_")} for i, name in enumerate(names)]
    for split, folder, count in (("train", "train2017", clips), ("val", "val2017", test)):
        (out / "lvis" / folder).mkdir(parents=True)
        images, annotations = [], []
        for index in tqdm(range(count), desc=split):
            kind = ("one", "many")[index % 2]
            scene = renderer.scene("train" if split == "train" else "test", kind, index, seed)
            second = random.Random(f"{seed}/{scene.name}").randrange(10) + 0.5
            seen = [obj for obj in scene.seen if obj.seen_at(second)]
            if not seen:
                continue
            (frame,) = renderer.frames(scene, [second])
            picture = Image.fromarray(frame).resize((ENLARGED, ENLARGED))
            picture.save(out / f"lvis/{folder}/{index}.png")
            url = f"http://images.cocodataset.org/{folder}/{index}.png"
            images.append({"id": index, "width": ENLARGED, "height": ENLARGED, "coco_url": url})
            for obj in seen:
                about = outline(renderer.mask(scene, obj, second))
                about |= {"id": len(annotations), "image_id": index, "category_id": obj.thing}
                annotations.append(about)
        content = {"images": images, "categories": categories, "annotations": annotations}
        (out / f"lvis/lvis_v1_{split}.json").write_text(json.dumps(content))


def outline(mask: np.ndarray) -> dict:
    """Return area, box and polygons of a mask (96, 96) in the enlarged picture, as in LVIS."""
    enlarged = np.asarray(Image.fromarray(mask).resize((ENLARGED, ENLARGED), Image.NEAREST))
    contours, _ = cv2.findContours(enlarged, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = [contour.flatten().tolist() for contour in contours if len(contour) > 2]
    x, y, width, height = cv2.boundingRect(enlarged)
    area = int((enlarged > 0).sum())
    return {"area": area, "bbox": [x, y, width, height], "segmentation": polygons}


# kind -> function, and the default numbers of training and test clips
KINDS = {
    "views": (write_views, 600, 200),
    "captions": (write_captions, 440, 60),
    "objects": (write_objects, 1200, 100),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("out", type=Path, help="folder that is not there yet")
    parser.add_argument("--clips", type=int, help="training clips or pictures")
    parser.add_argument("--test", type=int, help="test clips or pictures")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write, clips, test = KINDS[given.kind]
    write(given.out, given.clips or clips, given.test or test, given.seed)


if __name__ == "__main__":
    main()
