"""Rows of the AV-UIE v2 folders that show whole clips.

A row has the released field names, and its reasoned target under "text": the evidence first (who,
where, when), then the label in its tag. folders.py moves the text to the field of its folder.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterator

from crab_min.answers import answer_tag, event_tag
from crab_min.world.clauses import (
    MOVES,
    NUMBERS,
    clause_heard,
    join_with_and,
    list_of_names,
    sentence,
)
from crab_min.world.questions import Candidate, balanced, choices, questions
from crab_min.world.rendering import Renderer
from crab_min.world.scenes import Object, Scene, Scenes, Span

Rows = dict[str, list[dict]]  # folder -> rows
# emotion folder: its field with the emotion
EMOTION_FIELD = dict(
    meld="Emotion", cremad="emotion", mafw="emotion", dfew="emotion", mer24="discrete"
)


def clip_rows(renderer: Renderer, scenes: Scenes, rng: random.Random, count: int) -> Rows:
    """Make the rows of all folders that show one whole clip.

    count: rows of avqa_thu, and half the rows of avqa, as far as there are enough.
    """
    # Events.
    rows: Rows = defaultdict(list)
    for scene in scenes["one"]:
        rows["ave"].append(ave_row(scene))
        rows["avcap"].append(avcap_row(scene))
    for scene in scenes["many"]:
        if seen_while_heard(scene):
            rows["unav"].append(unav_row(scene))
        rows["avvp"].append(avvp_row(scene))
        rows["avcap"].append(avcap_row(scene))

    # Collect all questions, then choose. The order of the random calls decides what a seed gives.
    asked = [row for scene in scenes["one"] + scenes["many"] for row in avqa_candidates(scene)]
    chosen = []
    for scene in scenes["one"] + scenes["many"]:
        chosen += avqa_thu_candidates(scene, rng)
    for number, row in enumerate(balanced(asked, 2 * count, rng)):
        rows["avqa"].append({**row, "question_id": number})
    for number, row in enumerate(balanced(chosen, count, rng)):
        rows["avqa_thu"].append({**row, "id": number})

    # Actions and emotions. Five folders have the emotion task: in training each has its own clips.
    for scene in scenes["action"]:
        rows["ks"].append(ks_row(scene, renderer))
        rows["ucf"].append(ucf_row(scene))
    for scene in scenes["face"]:
        for position, (folder, field) in enumerate(EMOTION_FIELD.items()):
            if scene.split != "train" or scene.index % len(EMOTION_FIELD) == position:
                rows[folder].append(emotion_row(scene, field))
    return rows


# --- parts of rows --------------------------------------------------------------------------------
def video_path(scene: Scene) -> str:
    """Return the path of a clip from the folder of a task: all share ave's clips."""
    return f"../../ave/video/{scene.name}.mp4"


def audio_path(scene: Scene) -> str:
    return f"../../ave/audio/{scene.name}.mp3"


def clip_paths(scene: Scene) -> dict[str, str]:
    return {"video_path": video_path(scene), "audio_path": audio_path(scene)}


def reasoned(evidence: str, answer: str) -> str:
    """Return a target text: the evidence, and the answer that follows from it."""
    return f"{evidence} So {answer}."


def overlap(first: list[Span], second: list[Span]) -> list[Span]:
    """Return the spans that two lists of spans share."""
    shared = []
    for first_start, first_end in first:
        for second_start, second_end in second:
            start, end = max(first_start, second_start), min(first_end, second_end)
            if start < end:
                shared.append((start, end))
    return shared


def seen_while_heard(scene: Scene) -> list[Object]:
    """Return the objects that are heard while they are seen."""
    return [obj for obj in scene.heard if overlap(obj.seen, obj.heard)]


def all_heard(objects: list[Object]) -> str:
    """Return one sentence that says when each object is heard."""
    return sentence(*map(clause_heard, objects))


# --- events ---------------------------------------------------------------------------------------
def ave_row(scene: Scene) -> dict:
    """AVE: the one event that is both seen and heard."""
    (event,) = seen_while_heard(scene)
    ((start, end),) = event.heard
    tag = event_tag("event", event.label, event.heard)
    return {
        "video_path": f"{scene.name}.mp4",
        "audio_path": f"{scene.name}.mp3",
        "event": event.label,
        "vid": scene.name,
        "start_time": start,
        "end_time": end,
        "text": reasoned(all_heard(scene.seen), tag),
    }


def unav_row(scene: Scene) -> dict:
    """UnAV: all events that are both seen and heard."""
    tags = []
    for obj in seen_while_heard(scene):
        tags.append(event_tag("event", obj.label, overlap(obj.seen, obj.heard)))
    text = reasoned(all_heard(scene.seen), " ".join(tags))
    return {**clip_paths(scene), "vid": scene.name, "text": text}


def avvp_row(scene: Scene) -> dict:
    """AVVP: what is seen and what is heard, each with its seconds."""
    seen, heard = scene.seen, scene.heard
    tags = [event_tag("visual_event", obj.label, obj.seen) for obj in seen]
    tags += [event_tag("audio_event", obj.label, obj.heard) for obj in heard]
    evidence = sentence(
        f"{list_of_names(seen)} can be seen", f"{list_of_names(heard)} can be heard"
    )
    raw_audio = " ".join(raw_event(obj.label, obj.heard) for obj in heard)
    raw_visual = " ".join(raw_event(obj.label, obj.seen) for obj in seen)
    return {
        **clip_paths(scene),
        "filename": scene.name,
        "vid": scene.name,
        "event": f"audio: {raw_audio} visual: {raw_visual}",
        "text": reasoned(evidence, " ".join(tags)),
    }


def raw_event(label: str, spans: list[Span]) -> str:
    """Return an event as AVVP's field "event" has it: "dog,(2 7),(8 9)"."""
    return ",".join([label, *(f"({start} {end})" for start, end in spans)])


def avcap_row(scene: Scene) -> dict:
    """AVCap: a caption of the picture and one of the sound."""
    names = join_with_and([f"a {obj.label}" for obj in scene.seen])
    verb = "are" if len(scene.seen) > 1 else "is"
    seen = sentence(f"{names} {verb} seen, the place is {scene.place}")
    heard = all_heard(scene.heard)
    return {
        **clip_paths(scene),
        "video_id": scene.name,
        "seen": seen,
        "heard": heard,
        "text": f"{seen} {heard}",
    }


# --- questions ------------------------------------------------------------------------------------
def what_one_sense_counts(scene: Scene) -> tuple:
    """Return what eyes or ears alone can count. Answers are balanced within each such stratum."""
    return scene.kind, len(scene.seen), len(scene.heard)


def avqa_candidates(scene: Scene) -> Iterator[Candidate]:
    """MUSIC-AVQA: all open questions about a scene."""
    for modality, kind, text, answer, evidence in questions(scene):
        stratum = what_one_sense_counts(scene) if modality == "Audio-Visual" else ()
        row = {
            **clip_paths(scene),
            "video_id": scene.name,
            "type": json.dumps([modality, kind]),
            "question": text,
            "answer": answer,
            "text": reasoned(evidence, answer_tag(answer)),
        }
        yield Candidate((modality, kind), stratum, answer, row)


def avqa_thu_candidates(scene: Scene, rng: random.Random) -> Iterator[Candidate]:
    """AVQA (Tsinghua): all multiple-choice questions about a scene."""
    for text, options, right, evidence in choices(scene, rng):
        answer = options[right]
        row = {
            **clip_paths(scene),
            "video_name": scene.name,
            "video_id": scene.name,
            "question_relation": "Both",
            "question_type": "Where",
            "multi_choice": options,
            "question_text": text,
            "answer": right,
            "text": reasoned(evidence, answer_tag(answer)),
        }
        yield Candidate(text, what_one_sense_counts(scene), answer, row)


# --- actions and emotions -------------------------------------------------------------------------
def ks_row(scene: Scene, renderer: Renderer) -> dict:
    """Kinetics-Sounds: which action makes the sound."""
    moving = scene.objects[0]
    action = renderer.things[moving.thing].action
    evidence = sentence(f"the {moving.label} is seen", clause_heard(moving))
    text = reasoned(evidence, answer_tag(action))
    return {**clip_paths(scene), "action": action, "text": text}


def ucf_row(scene: Scene) -> dict:
    """UCF: which movement is seen."""
    evidence = sentence(f"the {scene.objects[0].label} {MOVES[scene.movement]}")
    text = reasoned(evidence, answer_tag(scene.movement))
    return {**clip_paths(scene), "label": scene.movement.title(), "text": text}


def emotion_row(scene: Scene, field: str) -> dict:
    """MELD, CREMA-D, MAFW, DFEW, MER24: the emotion of a face and a voice."""
    face = "the mouth is hidden" if scene.masked else f"the face looks {scene.emotion}"
    evidence = sentence(face, f"the voice sounds {scene.emotion}")
    text = reasoned(evidence, answer_tag(scene.emotion))
    return {**clip_paths(scene), field: scene.emotion, "text": text}


# --- matching -------------------------------------------------------------------------------------
def match_rows(scenes: list[Scene], rng: random.Random, count: int) -> Rows:
    """Make rows of a2v and v2a: which of two videos a sound belongs to, or of two sounds a video.

    In each of the scenes one thing is seen and heard. Nothing that is heard in one scene of a pair
    is seen in the other.

    Args:
        count: rows per folder, if so many pairs are found in 20 tries per row.
    """
    rows: Rows = defaultdict(list)
    for _ in range(20 * count):
        asked, other = rng.sample(scenes, 2)
        if confusable(asked, other) or confusable(other, asked):
            continue

        # The scene asked about comes first or second, and the two folders take turns.
        right = rng.randrange(2)
        pair = (asked, other) if right == 0 else (other, asked)
        if len(rows["a2v"]) > len(rows["v2a"]):
            rows["v2a"].append(v2a_row(asked, pair, right))
        else:
            rows["a2v"].append(a2v_row(asked, pair, right))
        if len(rows["v2a"]) == count:
            break
    return rows


def confusable(sound: Scene, video: Scene) -> bool:
    """Tell whether something that is heard in one scene is seen in the other."""
    return bool({obj.label for obj in sound.heard} & {obj.label for obj in video.seen})


def event_of(scene: Scene) -> Object:
    """Return the one thing that is seen and heard."""
    (event,) = [obj for obj in scene.objects if obj.seen and obj.heard]
    return event


def a2v_row(asked: Scene, videos: tuple[Scene, Scene], right: int) -> dict:
    """A2V: a sound, and which of two videos it belongs to."""
    return {
        "video1_path": video_path(videos[0]),
        "video2_path": video_path(videos[1]),
        "audio_path": audio_path(asked),
        "correct_video": right + 1,
        "audio_event": event_of(asked).label,
        "video1_event": event_of(videos[0]).label,
        "video2_event": event_of(videos[1]).label,
        "text": match_text(asked, asked.heard, "video", right),
    }


def v2a_row(asked: Scene, sounds: tuple[Scene, Scene], right: int) -> dict:
    """V2A: a video, and which of two sounds belongs to it."""
    return {
        "video_path": video_path(asked),
        "audio1_path": audio_path(sounds[0]),
        "audio2_path": audio_path(sounds[1]),
        "correct_audio": right + 1,
        "audio1_event": event_of(sounds[0]).label,
        "video_event": event_of(asked).label,
        "audio2_event": event_of(sounds[1]).label,
        "text": match_text(asked, asked.seen, "audio", right),
    }


def match_text(asked: Scene, objects: list[Object], medium: str, right: int) -> str:
    """Return in which of two media each object is: only the event of the scene is in one."""
    number = NUMBERS[right + 1]
    clauses = []
    for obj in objects:
        where = f"{medium} {number}" if obj is event_of(asked) else "neither"
        clauses.append(f"the {obj.label} is in {where}")
    return reasoned(sentence(*clauses), answer_tag(number))
