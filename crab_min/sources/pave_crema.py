"""The annotation files of PAVE's (2503.19794) and CREMA's (2402.05889) tasks.

Their rows become AV-UIE v2 rows.

Each function takes the folder of a source, one of its rows, and whether it is for training, and
yields the rows that this one becomes. Where the folders lie: RELEASED_LAYOUTS in rows.py. A folder
has videos/NAME.mp4 or a folder of frames, videos/NAME/*.jpg, as PAVE and CREMA keep ScanNet.

Differs from PAVE: of AVSD every turn is a sample of its own; PAVE answers five turns in one.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from crab_min.answers import answer_tag

# A question's type is the word it begins with, as SQA3D's results are tabled.
QUESTION_TYPES = ("what", "is", "how", "can", "which")

# Side channels: where they lie in a source's folder. Of CREMA points are 3D-LLM's features, one
# file per scene; the others are folders of pictures, one per video. Of PAVE audio and fast are
# features of sounds (ImageBind) and of dense frames (LanguageBind), one file per video.
SIDE_CHANNELS = {
    "audio": "audio_features/{name}.pt",
    "fast": "fast_features/{name}.pt",
    "depth": "videos_depth/{name}",
    "flow": "videos_flow/{name}",
    "normals": "videos_norm/{name}",
    "touch": "videos_touch/{name}",
    "thermal": "videos_thermal/{name}",
    "points": "voxelized_features_sam_nonzero_preprocess/{name}.pt",
}


def avsd(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """Convert a dialogue of AVSD to questions, each after all turns before it.

    These turns have their gold answers. A dialogue has about ten turns. The last one is tested;
    each is a sample for training.
    """
    video = video_path(folder, row["image_id"])
    dialogue = row["dialog"]
    if not dialogue:
        raise ValueError("a dialog without turns")
    first = 1 if train else len(dialogue)
    sides = with_own_sound(side_channels(folder, row["image_id"]), video)
    for count in range(first, len(dialogue) + 1):
        *before, last = dialogue[:count]
        context = ""
        for turn in before:
            question, answer = turn["question"].strip(), turn["answer"].strip()
            context += f"Question: {question} Answer: {answer} "
        yield {
            "image_id": row["image_id"],
            "video_path": video,
            "audio_path": video,
            "dialogue": f"{context}Question: {last['question'].strip()}",
            "turns": [(turn["question"], turn["answer"]) for turn in dialogue[:count]],
            "answer": last["answer"],
            "sides": sides,
        }


def scene(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """Convert a question of ScanQA or SQA3D about a 3D scene.

    Its first answer is trained on.
    """
    question = row["question"].lower().lstrip()
    matching = [word for word in QUESTION_TYPES if question.startswith(word)]
    yield {
        **row,
        "video_path": video_path(folder, row["scene_id"]),
        "sides": side_channels(folder, row["scene_id"]),
        "type": matching[0] if matching else "other",
    }


def music_avqa(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """Convert a row of MUSIC-AVQA's own files (json_update), which spell "anser".

    <Object> and the like in a question stand for the row's templ_values, in their order.
    """
    video = video_path(folder, row["video_id"])
    answer = row["anser"].replace("_", " ")
    values = json.loads(row["templ_values"])
    question = re.sub(r"<\w+>", lambda _: values.pop(0), row["question_content"])
    yield {
        **row,
        "video_path": video,
        "audio_path": video,
        "type": " ".join(json.loads(row["type"])),
        "answer": answer,
        "label": answer_tag(answer),
        "question": question,
        "sides": with_own_sound(side_channels(folder, row["video_id"]), video),
    }


def nextqa(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """Convert a question of NExT-QA in the form of SeViLA and CREMA.

    Its type is what its qid begins with: CW, TN, DL, ...
    """
    yield {
        **row,
        "video_path": video_path(folder, row["video"]),
        "multi_choice": [row[f"a{i}"] for i in range(row["num_option"])],
        "sides": side_channels(folder, row["video"]),
        "type": row["qid"].split("_")[0],
    }


def video_path(folder: Path, name: str) -> str:
    """Return the path of a video, whose sound is in the same file, or of its frames' folder."""
    frames = folder / "videos" / name
    return str((frames if frames.is_dir() else frames.with_name(f"{name}.mp4")).absolute())


def with_own_sound(sides: dict[str, str], video: str) -> dict[str, str]:
    """Return side channels with those that a video has by itself, if there are others."""
    return {"audio": video, "fast": video, **sides} if sides else {}


def side_channels(folder: Path, name: str) -> dict[str, str]:
    """Return the paths of the side channels that are there, by name."""
    sides = {}
    for channel, pattern in SIDE_CHANNELS.items():
        path = folder / pattern.format(name=name)
        if path.exists():
            sides[channel] = str(path.absolute())
    return sides
