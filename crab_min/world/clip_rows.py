"""Rows of the AV-UIE v2 folders that show whole clips.

A row has the released field names, and its reasoned target under "text": the evidence first (who,
where, when), then the label in its tag. folders.py moves the text to the field of its folder.
"""

import json
import random
from collections import defaultdict

from crab_min.answers import answer_tag, event_tag
from crab_min.world.clauses import (
    MOVES,
    NUMBERS,
    clause_heard,
    join_with_and,
    list_of_names,
    sentence,
)
from crab_min.world.questions import Question, balanced, choices, questions
from crab_min.world.rendering import Renderer
from crab_min.world.scenes import Object, Scene, Scenes, Span

Rows = dict[str, list[dict]]  # folder -> rows
# emotion folder: its field with the emotion
EMOTION_FIELD = dict(
    meld="Emotion", cremad="emotion", mafw="emotion", dfew="emotion", mer24="discrete"
)
ENDINGS = {"video": "mp4", "audio": "wav"}
# folder: the medium that is given, and the medium of which one of two is to be chosen
MATCHES = {"a2v": ("audio", "video"), "v2a": ("video", "audio")}


def clip_rows(renderer: Renderer, scenes: Scenes, rng: random.Random, count: int) -> Rows:
    """Make the rows of all folders that show one whole clip.

    count: rows of avqa_thu, and half the rows of avqa, as far as there are enough.
    """
    with_things = scenes["one"] + scenes["many"]
    rows: Rows = {
        "ave": [ave_row(scene) for scene in scenes["one"]],
        "avcap": [avcap_row(scene) for scene in with_things],
        "unav": [unav_row(scene) for scene in scenes["many"] if seen_while_heard(scene)],
        "avvp": [avvp_row(scene) for scene in scenes["many"]],
    }

    # Collect all questions, then choose. The order of the random calls decides what a seed gives.
    asked, offered = [], []
    for scene in with_things:
        asked += [(scene, question) for question in questions(scene)]
        offered += [(scene, question) for question in choices(scene, rng)]
    asked, offered = balanced(asked, 2 * count, rng), balanced(offered, count, rng)
    rows["avqa"] = [avqa_row(*pair, number) for number, pair in enumerate(asked)]
    rows["avqa_thu"] = [avqa_thu_row(*pair, number) for number, pair in enumerate(offered)]

    # Actions and emotions. Five folders have the emotion task: in training each has its own clips.
    rows["ks"] = [ks_row(scene, renderer) for scene in scenes["action"]]
    rows["ucf"] = [ucf_row(scene) for scene in scenes["action"]]
    for position, (folder, field) in enumerate(EMOTION_FIELD.items()):
        rows[folder] = []
        for scene in scenes["face"]:
            if scene.split != "train" or scene.index % len(EMOTION_FIELD) == position:
                rows[folder].append(emotion_row(scene, field))
    return rows


# --- parts of rows --------------------------------------------------------------------------------
def media_path(scene: Scene, medium: str) -> str:
    """Return the path of a clip from the folder of a task: all share ave's clips."""
    return f"../../ave/{medium}/{scene.name}.{ENDINGS[medium]}"


def clip_paths(scene: Scene) -> dict[str, str]:
    return {f"{medium}_path": media_path(scene, medium) for medium in ENDINGS}


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
    """Make a row of AVE: the one event that is both seen and heard."""
    (event,) = seen_while_heard(scene)
    ((start, end),) = event.heard
    tag = event_tag("event", event.label, event.heard)
    return {
        "video_path": f"{scene.name}.mp4",
        "audio_path": f"{scene.name}.wav",
        "event": event.label,
        "vid": scene.name,
        "start_time": start,
        "end_time": end,
        "text": reasoned(all_heard(scene.seen), tag),
    }


def unav_row(scene: Scene) -> dict:
    """Make a row of UnAV: all events that are both seen and heard."""
    tags = []
    for obj in seen_while_heard(scene):
        tags.append(event_tag("event", obj.label, overlap(obj.seen, obj.heard)))
    text = reasoned(all_heard(scene.seen), " ".join(tags))
    return {**clip_paths(scene), "vid": scene.name, "text": text}


def avvp_row(scene: Scene) -> dict:
    """Make a row of AVVP: what is seen and what is heard, each with its seconds."""
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
    """Make a row of AVCap: a caption of the picture and one of the sound."""
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
def avqa_row(scene: Scene, question: Question, number: int) -> dict:
    """Make a row of MUSIC-AVQA: an open question."""
    return {
        **clip_paths(scene),
        "video_id": scene.name,
        "type": json.dumps([question.modality, question.kind]),
        "question": question.text,
        "answer": question.answer,
        "question_id": number,
        "text": reasoned(question.evidence, answer_tag(question.answer)),
    }


def avqa_thu_row(scene: Scene, question: Question, number: int) -> dict:
    """Make a row of AVQA (Tsinghua): a multiple-choice question."""
    return {
        **clip_paths(scene),
        "video_name": scene.name,
        "video_id": scene.name,
        "question_relation": "Both",
        "question_type": "Where",
        "multi_choice": question.options,
        "question_text": question.text,
        "answer": question.options.index(question.answer),
        "id": number,
        "text": reasoned(question.evidence, answer_tag(question.answer)),
    }


# --- actions and emotions -------------------------------------------------------------------------
def ks_row(scene: Scene, renderer: Renderer) -> dict:
    """Make a row of Kinetics-Sounds: which action makes the sound."""
    moving = scene.objects[0]
    action = renderer.things[moving.thing].action
    evidence = sentence(f"the {moving.label} is seen", clause_heard(moving))
    text = reasoned(evidence, answer_tag(action))
    return {**clip_paths(scene), "action": action, "text": text}


def ucf_row(scene: Scene) -> dict:
    """Make a row of UCF: which movement is seen."""
    evidence = sentence(f"the {scene.objects[0].label} {MOVES[scene.movement]}")
    text = reasoned(evidence, answer_tag(scene.movement))
    return {**clip_paths(scene), "label": scene.movement.title(), "text": text}


def emotion_row(scene: Scene, field: str) -> dict:
    """Make a row of MELD, CREMA-D, MAFW, DFEW or MER24: the emotion of a clip.

    A face and a voice show it.
    """
    face = "the mouth is hidden" if scene.masked else f"the face looks {scene.emotion}"
    evidence = sentence(face, f"the voice sounds {scene.emotion}")
    text = reasoned(evidence, answer_tag(scene.emotion))
    return {**clip_paths(scene), field: scene.emotion, "text": text}


# --- matching -------------------------------------------------------------------------------------
def match_rows(scenes: list[Scene], rng: random.Random, count: int) -> Rows:
    """Make rows of a2v and v2a.

    They ask which of two videos a sound belongs to, or which of two sounds a video. In each of the
    scenes one thing is seen and heard. Nothing that is heard in one scene of a pair is seen in the
    other.

    Args:
        count: rows per folder, if so many pairs are found in 20 tries per row.
    """
    rows: Rows = defaultdict(list)
    if len(scenes) < 2:
        return rows
    for _ in range(20 * count):
        asked, other = rng.sample(scenes, 2)
        if confusable(asked, other) or confusable(other, asked):
            continue

        # The scene asked about comes first or second, and the two folders take turns.
        right = rng.randrange(2)
        pair = (asked, other) if right == 0 else (other, asked)
        folder = "v2a" if len(rows["a2v"]) > len(rows["v2a"]) else "a2v"
        rows[folder].append(match_row(folder, asked, pair, right))
        if len(rows["v2a"]) == count:
            break
    return rows


def confusable(sound: Scene, video: Scene) -> bool:
    """Tell whether something that is heard in one scene is seen in the other."""
    return bool({obj.label for obj in sound.heard} & {obj.label for obj in video.seen})


def match_row(folder: str, asked: Scene, pair: tuple[Scene, Scene], right: int) -> dict:
    """Make a row of a2v or v2a: a sound or video, and two media of the other kind.

    The answer is which of them belongs to it.

    The evidence tells in which of the two each object is: only the event of the scene is in one.
    """
    given, other = MATCHES[folder]
    (event,) = seen_while_heard(asked)
    row = {
        f"{given}_path": media_path(asked, given),
        f"{given}_event": event.label,
        f"correct_{other}": right + 1,
    }
    for number, scene in enumerate(pair, 1):
        row[f"{other}{number}_path"] = media_path(scene, other)
        row[f"{other}{number}_event"] = seen_while_heard(scene)[0].label

    clauses = []
    for obj in asked.heard if given == "audio" else asked.seen:
        where = f"{other} {NUMBERS[right + 1]}" if obj is event else "neither"
        clauses.append(f"the {obj.label} is in {where}")
    row["text"] = reasoned(sentence(*clauses), answer_tag(NUMBERS[right + 1]))
    return row
