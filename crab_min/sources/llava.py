"""Rows in LLaVA's form, in which PAVE (2503.19794) keeps its training data.

    {"id": 1, "video": "clips/7.mp4", "conversations": [{"from": "human", "value": "<image>\nWhy?"},
                                                        {"from": "gpt", "value": "Because ..."}]}

They become lines of a .jsonl of conversations (own.py). As in PAVE a video is known by its name
alone: the text before the first point of its file's name. It is looked for where the row names it,
then in the folder videos/ beside the annotations, as a film or a folder of frames.
"""

import os
from pathlib import Path

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def is_llava(row: dict) -> bool:
    """Tell whether a row is in LLaVA's form."""
    return "conversations" in row


def conversation_row(row: dict, folder: Path) -> dict:
    """Convert a row to messages and files, whose paths are relative to `folder`.

    Raises KeyError and its like where a row is of another form.
    """
    kind = "video" if "video" in row else "image"
    messages = []
    for message in row["conversations"]:
        text = message["value"].replace("<image>", f"<{kind}>")
        messages.append({"role": ROLES[message["from"]], "content": text})
    changed = {**row, "messages": messages}
    if kind == "video":
        changed["videos"] = [find_video(folder, row["video"])]
    elif "image" in row:
        changed["images"] = [row["image"]]
    return changed


def find_video(folder: Path, name: str) -> str:
    """Return the path of a video below `folder`."""
    if os.path.exists(folder / name):
        return name
    stem = Path(name).name.partition(".")[0]
    frames = folder / "videos" / stem
    return f"videos/{stem}" if os.path.isdir(frames) else f"videos/{stem}.mp4"
