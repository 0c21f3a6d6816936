"""Benchmarks of multiple choice, and of a label out of a fixed list.

PAVE (2503.19794) is evaluated on VideoMME, MVBench, MLVU, AVQA and Ego-Exo4D's demonstrator
proficiency, CREMA (2402.05889) on Touch-QA, Thermal-QA and PerceptionTest. Their rows become
AV-UIE v2 rows: `question`, `multi_choice`, and `answer`, the index of the right option.

Each function takes the folder of a source, one of its rows, and whether it is for training, and
yields the rows that this one becomes. Where the folders lie: RELEASED_LAYOUTS in rows.py. The
released names of Touch-QA's and Thermal-QA's files were not known, nor those of VGGSound's clips.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from crab_min.sources.pave_crema import side_channels, video_path

EXO_VIEWS = 4  # of Ego-Exo4D, as many as PAVE's patch reads
LETTER = re.compile(r"\(?([A-Z])[.):]\s*")  # before an option: "B. a dog"


def choice(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """Convert a question of VideoMME, MVBench or MLVU.

    VideoMME has `options` with letters and a letter as `answer`; the others have `candidates`, one
    of which is the answer. Rows of MLVU without candidates (summaries) are left out. The type is
    VideoMME's duration, or the file of the row.
    """
    candidates = row.get("options") or row.get("candidates")
    if not candidates:
        return
    options = [LETTER.sub("", str(option), count=1).strip() for option in candidates]
    changed = {
        **row,
        "video_path": find_clip(folder, row),
        "multi_choice": options,
        "answer": answer_index(row["answer"], options),
        "type": row["duration"] if "options" in row else row["file"],
    }
    changed.pop("options", None)  # in a row of one's own they are texts without letters
    if row.get("end"):  # MVBench asks about a part of some clips, in seconds
        changed["clip_seconds"] = (float(row["start"]), float(row["end"]))
    yield changed


def find_clip(folder: Path, row: dict) -> str:
    """Return the path of a clip: below video/, perhaps in a folder named like the row's file."""
    if "videoID" in row:  # VideoMME's videos are named by YouTube's ids
        return video_path(folder, row["videoID"])
    apart = folder / "video" / row["file"] / row["video"]
    return str((apart if apart.exists() else folder / "video" / row["video"]).absolute())


def answer_index(answer: str | int, options: list[str]) -> int:
    """Return the index of an answer: a letter or one of the options. Raises ValueError."""
    if isinstance(answer, int):
        return answer
    text = answer.strip()
    if re.fullmatch("[A-Z]", text) and text not in options:
        return ord(text) - ord("A")
    return options.index(text)


def avqa(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """Convert a question of AVQA, whose answer is an index already."""
    video = video_path(folder, row["video_name"])
    yield {**row, "video_path": video, "audio_path": video}


def perception(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """Convert a question of PerceptionTest; av_uie.find_rows has taken it out of its video."""
    video = video_path(folder, row["video_id"])
    options, answer = row["options"], row["answer_id"]
    yield {**row, "video_path": video, "multi_choice": options, "answer": answer}


def sensed(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """Convert a question of Touch-QA or Thermal-QA in the form of SeViLA and CREMA.

    Its clip is named by the question: frames in video_frames/, or a film in clips/. The start and
    the end of a row are frames of the longer video, from which the clip was cut.
    """
    name = str(row["question_id"])
    frames = folder / "video_frames" / name
    video = frames if frames.is_dir() else folder / "clips" / f"{name}.mp4"
    yield {
        **row,
        "video_path": str(video.absolute()),
        "multi_choice": [row[f"a{i}"] for i in range(row["num_option"])],
        "sides": side_channels(folder, name),
    }


def egoexo(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """Convert a take of Ego-Exo4D: its ego video, and up to four exo views as one side channel.

    Features of its views are found by the name of the take.
    """
    paths = row["video_paths"]
    exo = [str(folder / paths[name]) for name in sorted(paths) if name.startswith("exo")]
    yield {
        **row,
        "video_path": str((folder / paths["ego"]).absolute()),
        "clip_name": row["take_uid"],
        "sides": {"view": exo[:EXO_VIEWS]},
    }


def vggsound(folder: Path, row: dict, train: bool) -> Iterator[dict]:
    """Convert a line of vggsound.csv: YouTube's id, the first second, the label."""
    video = video_path(folder, f"{row['id']}_{int(row['second']):06d}")
    yield {**row, "video_path": video, "audio_path": video}
