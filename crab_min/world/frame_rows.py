"""Rows of the AV-UIE v2 folders that show one frame.

Frames and masks that they name are written with them.

S4 and ARIG ask for the one thing that sounds, MS3 for all things that sound, Ref-AVS for the thing
that a phrase refers to. Rows are made as in clip_rows.py.

A frame of S4, ARIG and MS3 is taken at second 1, 3, 5, 7 or 9. The two seconds of sound around it
belong to it: the seconds 0 to 2, 2 to 4, and so on.
"""

import random
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from crab_min.answers import answer_tag, box_text, points_text
from crab_min.sources.av_uie import box_and_points
from crab_min.world.clauses import clause_if_heard, clause_where_heard_at, join_with_and, sentence
from crab_min.world.clip_rows import Rows, reasoned
from crab_min.world.rendering import Renderer
from crab_min.world.scenes import Object, Scene, Scenes
from crab_min.world.things import SECONDS


class Frame:
    """One frame of a scene, with the objects that a row asks for and their masks.

    These objects are the targets.
    """

    def __init__(self, renderer: Renderer, scene: Scene, time: float, targets: list[Object]):
        self.scene, self.time, self.targets = scene, time, targets
        self.picture = renderer.frames(scene, [time])[0]  # (96, 96, 3)
        self.masks = [renderer.mask(scene, obj, time) for obj in targets]  # (96, 96) each
        self.visible = [obj for obj in scene.seen if obj.seen_at(time)]
        self.others = [obj for obj in self.visible if obj not in targets]

    @property
    def audio_path(self) -> str:
        return f"../ave/audio/{self.scene.name}.wav"

    def save(self, picture: Path, mask: Path) -> None:
        """Write the picture, and one mask of all targets."""
        nothing = np.zeros_like(self.picture[..., 0])  # (96, 96)
        joint = np.maximum.reduce([nothing, *self.masks])
        for path, array in ((picture, self.picture), (mask, joint)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path, quality=95)

    def sound_sentence(self) -> str:
        """Return whether each visible thing is heard, the targets being those that are."""
        return sentence(*(clause_if_heard(obj, obj in self.targets) for obj in self.visible))

    def location_text(self) -> str:
        """Return where each target is, its box and three points, after a space each."""
        text = ""
        for obj, mask in zip(self.targets, self.masks):
            box, points = box_and_points(mask)
            text += f" The {obj.label} is at {box_text(box)} points {points_text(points)}."
        return text


def frame_rows(
    renderer: Renderer, scenes: Scenes, rng: random.Random, root: Path, still: bool = False
) -> Rows:
    """Make the rows of all folders that show one frame.

    Writes frames and masks below `root`.

    still: S4 has the training pictures of two things twice, with the sound of either.
    """
    rows: Rows = defaultdict(list)
    frames = []  # of the rows of S4
    for scene in scenes["one"] + scenes["many"]:
        # Chosen even where there is nothing to choose: each call decides what the later ones give.
        times = [time for time in range(1, SECONDS, 2) if sounding(scene, time)]
        time = rng.choice(times or [None])
        if time is not None:
            frame = Frame(renderer, scene, time, sounding(scene, time))
            if scene.kind == "one":
                row = sounding_row(frame, frame, root / "s4", f"AVS/v1s/{scene.name}")
                rows["s4"].append(row)
                rows["arig"].append(arig_row(frame, row))
                frames.append(frame)
            else:
                row = sounding_row(frame, frame, root / "ms3", f"AVS/v1m/{scene.name}")
                rows["ms3"].append(row)
        if scene.index % 2 == 0:  # every other clip is enough for Ref-AVS
            rows["ref_avs"].append(ref_avs_row(renderer, scene, rng, root / "ref_avs"))

    # The same pictures with another sound: a note in test rows, rows of their own for training.
    for frame, row in list(zip(frames, rows["s4"])):
        if frame.scene.split == "test":
            note_other_sound(row, frame, choose_other_sound(frame, frames, rng), renderer)
        elif still:
            other = choose_other_sound(frame, frames, rng)
            if other is not None:
                folder = f"AVS/v1s/{frame.scene.name}_swapped"
                swapped = Frame(renderer, frame.scene, frame.time, frame.others[:1])
                rows["s4"].append(sounding_row(swapped, other, root / "s4", folder))
    return rows


# --- S4, MS3, ARIG --------------------------------------------------------------------------------
def heard_around(obj: Object, time: int) -> bool:
    """Tell whether an object is heard in the two seconds of sound around a frame."""
    return obj.heard_at(time - 1) or obj.heard_at(time)


def sounding(scene: Scene, time: int) -> list[Object]:
    """Return the objects that are in the frame at a second and heard around it."""
    return [obj for obj in scene.seen if obj.seen_at(time) and heard_around(obj, time)]


def sounding_row(frame: Frame, sound: Frame, root: Path, folder: str) -> dict:
    """Write a frame and its mask to `root` / `folder` and return its row of S4 or MS3.

    sound: the frame whose sound the row has; it may be of another clip.
    """
    index = sound.time // 2
    picture = f"{folder}/frames/{index}.jpg"
    frame.save(root / picture, root / folder / "labels_rgb" / f"{index}.png")
    return {
        "audio_path": sound.audio_path,
        "vid": frame.scene.name,
        "uid": f"{Path(folder).name}_{index}",
        "a_obj": join_with_and([obj.label for obj in frame.targets]),
        "frame_idx": index,
        "image_path": picture,
        "text": frame.sound_sentence() + frame.location_text(),
    }


def arig_row(frame: Frame, s4_row: dict) -> dict:
    """Make a row of ARIG: the box of the thing that sounds.

    The picture is that of a row of S4.
    """
    box, _ = box_and_points(frame.masks[0])
    return {
        "audio_path": s4_row["audio_path"],
        "a_obj": s4_row["a_obj"],
        "image_path": f"../s4/{s4_row['image_path']}",
        "top_left": list(box[:2]),
        "bottom_right": list(box[2:]),
        "frame_idx": s4_row["frame_idx"],
        "text": f"{frame.sound_sentence()} The {s4_row['a_obj']} is at {box_text(box)}.",
    }


# --- the same picture, another sound --------------------------------------------------------------
def choose_other_sound(frame: Frame, frames: list[Frame], rng: random.Random) -> Frame | None:
    """Choose a frame around which the first silent thing is heard.

    No other thing in sight is heard there. None where no sound fits, or no thing is silent.
    """
    if not frame.others:
        return None
    wanted = frame.others[0]
    unwanted = {obj.label for obj in frame.visible if obj is not wanted}
    fitting = []
    for other in frames:
        heard = {obj.label for obj in other.scene.objects if heard_around(obj, other.time)}
        if other.targets[0].label == wanted.label and not unwanted & heard:
            fitting.append(other)
    return rng.choice(fitting) if fitting else None


def note_other_sound(row: dict, frame: Frame, sound: Frame | None, renderer: Renderer) -> None:
    """Add the boxes of the silent things, and a sound of the first, to a test row.

    They measure whether a mask follows the sound, see evaluation/swaps.py.
    """
    row["silent"] = {}
    for obj in frame.others:
        row["silent"][obj.label], _ = box_and_points(renderer.mask(frame.scene, obj, frame.time))
    if sound is not None:
        row["swapped"] = {
            "audio_path": sound.audio_path,
            "frame_idx": sound.time // 2,
            "event": frame.others[0].label,
        }


# --- Ref-AVS --------------------------------------------------------------------------------------
def ref_avs_row(renderer: Renderer, scene: Scene, rng: random.Random, root: Path) -> dict:
    """Write a frame and its mask, and return its row of Ref-AVS.

    The question is: does a phrase refer to a thing?
    """
    index = rng.randrange(SECONDS)
    time = index + 0.5
    phrase, targets = choose_phrase(renderer, scene, time, rng)
    frame = Frame(renderer, scene, time, targets)
    picture = f"REFAVS/media/{scene.name}/frames/{index}.jpg"
    frame.save(root / picture, root / f"REFAVS/gt_mask/{scene.name}/fid_1/0000{index}.png")

    evidence = "Nothing can be seen."
    if frame.visible:
        evidence = sentence(*(clause_where_heard_at(obj, time) for obj in frame.visible))
    text = reasoned(evidence, answer_tag("true" if targets else "false"))
    return {
        "audio_path": frame.audio_path,
        "vid": scene.name,
        "fid": 1,
        "uid": f"{scene.name}_1",
        "image_path": picture,
        "idx": index,
        "description": phrase,
        "split": "test_s",
        "text": text + frame.location_text(),
    }


def choose_phrase(
    renderer: Renderer, scene: Scene, time: float, rng: random.Random
) -> tuple[str, list[Object]]:
    """Choose a phrase that fits one thing in the frame or, less often, nothing in it.

    Returns:
        The phrase, and a list with the thing that it refers to, or an empty one.
    """
    visible = [obj for obj in scene.seen if obj.seen_at(time)]
    # A thing of the scene, which may be out of sight, or any thing.
    any_thing = renderer.things[rng.randrange(len(renderer.things))]
    label = rng.choice([obj.label for obj in scene.objects] + [any_thing.label])
    position = rng.choice(("left", "right"))
    phrases = {
        f"the {label}": [obj for obj in visible if obj.label == label],
        "the thing that is heard": [obj for obj in visible if obj.heard_at(time)],
        "the thing that is silent": [obj for obj in visible if not obj.heard_at(time)],
        f"the thing on the {position}": [obj for obj in visible if obj.position == position],
    }
    # Phrases that fit several things are of no use; those that fit one count three times.
    fit_one = [(phrase, fitting) for phrase, fitting in phrases.items() if len(fitting) == 1]
    fit_none = [(phrase, fitting) for phrase, fitting in phrases.items() if not fitting]
    return rng.choice(3 * fit_one + fit_none or [("the thing that is not there", [])])
