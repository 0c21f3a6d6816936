"""From scenes to the 19 AV-UIE v2 folders: rows with reasoned answers, media files.

Every row is computed from the symbolic scene, never from pixels, and written with the released field names (papers/crab.md 6.1):
train rows carry the reasoned target (evidence first: who, where, when; then the label in its tag), test rows only the gold fields.
Clips are shared: all folders point into `ave/video` and `ave/audio`, as the released annotations do with `../../`.
"""
import hashlib
import json
import math
import os
import random
import shutil
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from crab_min.answers import answer_tag, box_text, event_tag, points_text
from crab_min.config import WorldConfig
from crab_min.media.workers import exit_with_parent
from crab_min.media.read import write_audio, write_video
from crab_min.sources.av_uie import box_and_points
from crab_min.world.questions import (
    MOVES,
    NUMBERS,
    balanced,
    choices,
    hears,
    listing,
    named,
    placed_at,
    questions,
    sentence,
    sounds,
)
from crab_min.world.scenes import FPS, VERSION, Renderer, Scene
from crab_min.world.things import RATE, SECONDS, SIZE

EMOTION_FIELD = {"meld": "Emotion", "cremad": "emotion", "mafw": "emotion", "dfew": "emotion", "mer24": "discrete"}
ROWS = 3                                               # a change of rows alone needs a new number here, and no new base
TRAIN_ONLY = ("mer24", "unav", "avcap")


# --- rows ------------------------------------------------------------------------------------------------------------------
def overlap(a, b) -> list:
    """The seconds that two lists of spans share, as spans."""
    on = [any(s <= t < e for s, e in a) and any(s <= t < e for s, e in b) for t in range(SECONDS)] + [False]
    edges = [t for t in range(SECONDS + 1) if on[t] != (on[t - 1] if t else False)]
    return list(zip(edges[::2], edges[1::2]))


def clip(scene: Scene) -> dict:
    return {"video_path": f"../../ave/video/{scene.name}.mp4", "audio_path": f"../../ave/audio/{scene.name}.mp3"}


def clip_rows(renderer: Renderer, scenes: dict[str, list[Scene]], rng: random.Random, count: int) -> dict[str, list]:
    """Rows of the folders that show whole clips, each with the target text under "text" (moved to its field by `finish`)."""
    rows, asked = defaultdict(list), defaultdict(list)
    for s in scenes["one"] + scenes["many"]:
        seen, heard = s.seen, s.heard
        both = [o for o in heard if overlap(o.seen, o.heard)]
        if s.kind == "one":
            o, = both
            (start, end), = o.heard
            rows["ave"].append({"video_path": f"{s.name}.mp4", "audio_path": f"{s.name}.mp3", "event": o.label, "vid": s.name, "start_time": start, "end_time": end,
                                "text": f"{sentence(*map(hears, seen))} So {event_tag('event', o.label, o.heard)}."})
        elif both:
            events = [event_tag("event", o.label, overlap(o.seen, o.heard)) for o in both]
            rows["unav"].append({**clip(s), "vid": s.name, "text": f"{sentence(*map(hears, seen))} So {' '.join(events)}."})
        if s.kind == "many":
            raw = " ".join(f"{name}: " + " ".join(f"{o.label}," + ",".join(f"({a} {b})" for a, b in spans) for o, spans in group)
                           for name, group in (("audio", [(o, o.heard) for o in heard]), ("visual", [(o, o.seen) for o in seen])) if group)
            tags = [event_tag("visual_event", o.label, o.seen) for o in seen] + [event_tag("audio_event", o.label, o.heard) for o in heard]
            evidence = sentence(f"{named(seen)} can be seen", f"{named(heard)} can be heard")
            rows["avvp"].append({**clip(s), "filename": s.name, "vid": s.name, "event": raw, "text": f"{evidence} So {' '.join(tags)}."})
        rows["avcap"].append({**clip(s), "video_id": s.name, "seen": sights(s), "heard": sentence(*map(hears, heard)),
                              "text": f"{sights(s)} {sentence(*map(hears, heard))}"})
        stratum = s.kind, len(seen), len(heard)                              # what eyes or ears alone may count tells nothing of the answer
        for modality, kind, question, answer, evidence in questions(s):
            asked["avqa"].append(((modality, kind), stratum if modality == "Audio-Visual" else (), answer,
                                  {**clip(s), "video_id": s.name, "type": json.dumps([modality, kind]), "question": question, "answer": answer,
                                   "text": f"{evidence} So {answer_tag(answer)}."}))
        for question, options, right, evidence in choices(s, rng):
            asked["avqa_thu"].append((question, stratum, options[right],
                                      {**clip(s), "video_name": s.name, "video_id": s.name, "question_relation": "Both", "question_type": "Where",
                                       "multi_choice": options, "question_text": question, "answer": right,
                                       "text": f"{evidence} So {answer_tag(options[right])}."}))
    for task, key, wanted in (("avqa", "question_id", 2 * count), ("avqa_thu", "id", count)):
        rows[task] = [{**row, key: i} for i, row in enumerate(balanced(asked[task], wanted, rng))]
    for s in scenes["action"]:
        o = s.objects[0]
        action = renderer.things[o.thing].action
        rows["ks"].append({**clip(s), "action": action, "text": f"{sentence(f'the {o.label} is seen', hears(o))} So {answer_tag(action)}."})
        rows["ucf"].append({**clip(s), "label": s.movement.title(), "text": f"{sentence(f'the {o.label} {MOVES[s.movement]}')} So {answer_tag(s.movement)}."})
    for s in scenes["face"]:
        face = "the mouth is hidden" if s.masked else f"the face looks {s.emotion}"
        text = f"{sentence(face, f'the voice sounds {s.emotion}')} So {answer_tag(s.emotion)}."
        for i, (task, name) in enumerate(EMOTION_FIELD.items()):
            if s.split != "train" or s.index % len(EMOTION_FIELD) == i:       # one task in five folders: its clips are dealt out for training
                rows[task].append({**clip(s), name: s.emotion, "text": text})
    return rows


def sights(s: Scene) -> str:
    return sentence(f"{listing([f'a {o.label}' for o in s.seen])} {'are' if len(s.seen) > 1 else 'is'} seen, the place is {s.place}")


def match_rows(scenes: list[Scene], rng: random.Random, count: int) -> dict[str, list]:
    """Pairs of clips in each of which one thing is seen and heard, and nothing heard in one is seen in the other."""
    rows = defaultdict(list)
    for _ in range(20 * count):
        a, b = rng.sample(scenes, 2)
        (x,), (y,) = ([o for o in s.objects if o.seen and o.heard] for s in (a, b))
        if any({o.label for o in one.heard} & {o.label for o in other.seen} for one, other in ((a, b), (b, a))):
            continue
        task, right = ("a2v", "v2a")[len(rows["a2v"]) > len(rows["v2a"])], rng.randrange(2)
        first, second = ((a, x), (b, y)) if right == 0 else ((b, y), (a, x))
        base, number = "../../ave", NUMBERS[right + 1]
        medium, named_first = ("video", a.heard) if task == "a2v" else ("audio", a.seen)
        where = [f"the {o.label} is in {f'{medium} {number}' if o is x else 'neither'}" for o in named_first]
        text = f"{sentence(*where)} So {answer_tag(number)}."
        if task == "a2v":
            rows[task].append({"video1_path": f"{base}/video/{first[0].name}.mp4", "video2_path": f"{base}/video/{second[0].name}.mp4",
                               "audio_path": f"{base}/audio/{a.name}.mp3", "correct_video": right + 1, "audio_event": x.label, "video1_event": first[1].label,
                               "video2_event": second[1].label, "text": text})
        else:
            rows[task].append({"video_path": f"{base}/video/{a.name}.mp4", "audio1_path": f"{base}/audio/{first[0].name}.mp3",
                               "audio2_path": f"{base}/audio/{second[0].name}.mp3", "correct_audio": right + 1, "audio1_event": first[1].label,
                               "video_event": x.label, "audio2_event": second[1].label, "text": text})
        if len(rows["v2a"]) == count:
            break
    return rows


def located(s: Scene, objects: list, masks: list, t: float) -> str:
    """What is seen at second t and which of it, the objects, is heard, then where these are: a mask each, or none."""
    where = [f"The {o.label} is at {box_text(box)} points {points_text(points)}." for o, (box, points) in zip(objects, map(box_and_points, masks))]
    return " ".join([sentence(*(sounds(o, o in objects) for o in s.seen if o.seen_at(t))), *where])


def image_rows(renderer: Renderer, scenes: dict[str, list[Scene]], rng: random.Random, root: Path, still: bool = False) -> dict[str, list]:
    """Rows of the folders that show one frame, with the frame and its mask written below `root`.

    still: s4 has the pictures of two things for training a second time, where the other of them sounds.
    """
    rows, pairs = defaultdict(list), []

    def write(task, folder, picture, mask, scene, t):
        for path, array in ((f"{folder}/{picture}", renderer.frames(scene, [t])[0]), (f"{folder}/{mask}", mask_image)):
            (root / task / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / task / path, quality=95)

    for s in scenes["one"] + scenes["many"]:
        audio = f"../ave/audio/{s.name}.mp3"
        audible = {i: [o for o in s.seen if o.seen_at(2 * i + 1) and (o.heard_at(2 * i) or o.heard_at(2 * i + 1))] for i in range(5)}
        index = rng.choice([i for i in audible if audible[i]] or [-1])
        if index >= 0:                                                       # S4 and ARIG: one sounding object, MS3: one or more
            task, folder = ("s4", f"AVS/v1s/{s.name}") if s.kind == "one" else ("ms3", f"AVS/v1m/{s.name}")
            objects = audible[index]
            masks = [renderer.mask(s, o, 2 * index + 1) for o in objects]
            mask_image = np.maximum.reduce(masks)
            write(task, folder, f"frames/{index}.jpg", f"labels_rgb/{index}.png", s, 2 * index + 1)
            name = listing([o.label for o in objects])
            row = {"audio_path": audio, "vid": s.name, "uid": f"{s.name}_{index}", "a_obj": name, "frame_idx": index, "image_path": f"{folder}/frames/{index}.jpg"}
            rows[task].append({**row, "text": located(s, objects, masks, 2 * index + 1)})
            if task == "s4":
                pairs.append((s, rows[task][-1]))
                who, box = located(s, objects, [], 2 * index + 1), box_and_points(masks[0])[0]
                rows["arig"].append({"audio_path": audio, "a_obj": name, "image_path": f"../s4/{folder}/frames/{index}.jpg", "top_left": list(box[:2]),
                                     "bottom_right": list(box[2:]), "frame_idx": index, "text": f"{who} The {name} is at {box_text(box)}."})
        if s.index % 2:
            continue
        index = rng.randrange(SECONDS)                                       # Ref-AVS: every other clip
        t, folder = index + .5, f"REFAVS/media/{s.name}"
        seen = [o for o in s.seen if o.seen_at(t)]
        label = rng.choice([o.label for o in s.objects] + [renderer.things[rng.randrange(len(renderer.things))].label])
        expressions = {f"the {label}": [o for o in seen if o.label == label], "the thing that is heard": [o for o in seen if o.heard_at(t)],
                       "the thing that is silent": [o for o in seen if not o.heard_at(t)],
                       f"the thing on the {(side := rng.choice(('left', 'right')))}": [o for o in seen if o.side == side]}
        usable = [(e, fit) for e, fit in expressions.items() if len(fit) == 1] * 3 + [(e, fit) for e, fit in expressions.items() if not fit]
        expression, fit = rng.choice(usable or [("the thing that is not there", [])])
        mask_image = renderer.mask(s, fit[0], t) if fit else np.zeros((SIZE, SIZE), np.uint8)
        write("ref_avs", "REFAVS", f"media/{s.name}/frames/{index}.jpg", f"gt_mask/{s.name}/fid_1/0000{index}.png", s, t)
        text = f"{sentence(*(placed_at(o, t) for o in seen)) if seen else 'Nothing can be seen.'} So {answer_tag('true' if fit else 'false')}."
        if fit:
            box, points = box_and_points(mask_image)
            text += f" The {fit[0].label} is at {box_text(box)} points {points_text(points)}."
        rows["ref_avs"].append({"audio_path": audio, "vid": s.name, "fid": 1, "uid": f"{s.name}_1", "image_path": f"{folder}/frames/{index}.jpg", "idx": index,
                                "description": expression, "text": text})
    for s, row in pairs if still or pairs and pairs[0][0].split == "test" else []:
        t = 2 * row["frame_idx"] + 1
        shown = [o for o in s.seen if o.seen_at(t)]
        silent = [o for o in shown if o.label != row["a_obj"]]
        if s.split == "test":                                                # for evaluate.picked and data.swapped
            row["silent"] = {o.label: box_and_points(renderer.mask(s, o, t))[0] for o in silent}
        for o in silent[:1]:                                                 # another clip's sound, in which of these things only this one is heard
            fitting = [{"audio_path": other["audio_path"], "frame_idx": i} for clip, other in pairs for i in [other["frame_idx"]] if other["a_obj"] == o.label
                       and not {x.label for x in shown if x is not o} & {x.label for x in clip.objects if x.heard_at(2 * i) or x.heard_at(2 * i + 1)}]
            if not fitting:
                continue
            sound = rng.choice(fitting)
            i = sound["frame_idx"]
            if s.split == "test":
                row["swapped"] = {**sound, "event": o.label}
            else:
                folder, mask_image = f"AVS/v1s/{s.name}_swapped", renderer.mask(s, o, t)
                write("s4", folder, f"frames/{i}.jpg", f"labels_rgb/{i}.png", s, t)
                rows["s4"].append({**row, **sound, "a_obj": o.label, "uid": f"{s.name}_swapped_{i}", "image_path": f"{folder}/frames/{i}.jpg",
                                   "text": located(s, [o], [mask_image], t)})
    return rows


# where the target text of a training row goes, and what a test row does not have or calls otherwise
TARGET_FIELD = {"ucf": "new_label", "ref_avs": "output", **dict.fromkeys(("ave", "unav", "avvp", "avcap", "s4", "ms3", "arig"), "label_content")}
TRAIN_HIDES = {"arig": ("top_left", "bottom_right", "frame_idx")}
TEST_HIDES = {"a2v": ("audio_event", "video1_event", "video2_event"), "v2a": ("audio1_event", "video_event", "audio2_event")}
TEST_NAMES = {"ref_avs": {"image_path": "visual_path", "idx": "frame_idx", "description": "object"},
              **dict.fromkeys(("s4", "ms3", "arig"), {"image_path": "visual_path"})}


def finish(task: str, split: str, row: dict) -> dict:
    """A row with the released field names of its split."""
    row = dict(row)
    text = row.pop("text")
    if split == "train":
        return {**{k: v for k, v in row.items() if k not in TRAIN_HIDES.get(task, ())}, TARGET_FIELD.get(task, "label"): text}
    row = {TEST_NAMES.get(task, {}).get(k, k): v for k, v in row.items() if k not in TEST_HIDES.get(task, ())}
    return {**row, "split": "test_s"} if task == "ref_avs" else row


# --- the folder ------------------------------------------------------------------------------------------------------------
def write_clip(folder: str, seed: int, root: str, still: bool, scene_id: tuple) -> None:
    """Render and encode one clip, of a `still` world its sound alone; runs in a worker process."""
    global RENDERER
    if RENDERER is None or RENDERER[0] != folder:
        RENDERER = folder, Renderer(folder or None)
    renderer = RENDERER[1]
    scene = renderer.scene(*scene_id, seed)
    wave, base = renderer.wave(scene), Path(root, "ave")
    if not still:
        write_video(str(base / "video" / f"{scene.name}.mp4"), renderer.frames(scene, np.arange(SECONDS * FPS) / FPS), wave, FPS, RATE)
    write_audio(str(base / "audio" / f"{scene.name}.mp3"), wave, RATE)


RENDERER = None                                        # one a worker process: (folder, Renderer)


def build_world(config: WorldConfig, seed: int, cache: str | Path = "data/world", still: bool = False) -> Path:
    """The world's folder in the AV-UIE v2 layout, made where it is not there yet (about a minute on two cores).

    still: only the folders whose rows show one frame, without videos, which are most of the work.
    Cached by version, seed, sizes and things; it appears whole or not at all. Raises DataError for unusable things.
    """
    renderer = Renderer(config.things or None)
    name = f"v{VERSION}.{ROWS}-seed{seed}-{config.world_clips}-{config.world_test}{'-still' * still}"
    if config.things:
        digest = hashlib.sha256(b"".join(t.sprite.tobytes() + t.wave.tobytes() + t.label.encode() for t in renderer.things)).hexdigest()
        name += f"-{Path(config.things).resolve().name}-{digest[:8]}"
    final = Path(cache) / name / "AVUIE_2"
    if final.exists():
        return final
    root = final.parent.with_name(f"{name}.making-{os.getpid()}") / "AVUIE_2"
    shutil.rmtree(root.parent, ignore_errors=True)
    for sub in ("video", "audio"):
        (root / "ave" / sub).mkdir(parents=True)
    share = {"one": 1 / 4, "many": 5 / 12, **({} if still else {"action": 1 / 6, "face": 1 / 6})}
    sizes = {"train": {k: max(8, round(config.world_clips * v)) for k, v in share.items()}, "test": {k: math.ceil(config.world_test * (1.5 if k == "many" else 1)) for k in share}}
    try:
        for split, counts in sizes.items():
            rng = random.Random(f"{seed}/{split}")
            scenes = {kind: [renderer.scene(split, kind, i, seed) for i in range(n)] for kind, n in counts.items()}
            rows = {} if still else {**clip_rows(renderer, scenes, rng, counts["one"] * (2 if split == "train" else 1)), **match_rows(scenes["one"], rng, counts["one"])}
            rows |= image_rows(renderer, scenes, rng, root, still)
            for task, items in rows.items():
                if split == "train" or task not in TRAIN_ONLY:
                    (root / task).mkdir(exist_ok=True)
                    (root / task / f"{split}.json").write_text(json.dumps([finish(task, split, row) for row in items], indent=1))
        jobs = [(split, kind, i) for split, counts in sizes.items() for kind, n in counts.items() for i in range(n)]
        with ProcessPoolExecutor(min(os.cpu_count() or 1, 8), initializer=exit_with_parent) as pool:
            work = pool.map(partial(write_clip, config.things, seed, str(root), still), jobs, chunksize=8)
            list(tqdm(work, total=len(jobs), desc="building the world", unit="clip"))
        if not final.parent.exists():
            root.parent.rename(final.parent)
    finally:
        shutil.rmtree(root.parent, ignore_errors=True)
    return final
