"""Rows of a task and split, from AV-UIE v2 or from another release, as it was released.

    rows = read_rows("data", "ave", "train")      # data/ave/train.json, or Crab's files of AVE

A task's AV-UIE v2 folder comes first. Without one, RELEASED_LAYOUTS tells where the files of AV-UIE
v1 (Crab), of PAVE or of CREMA lie below the data folder, and how one of their rows becomes rows of
the v2 form. Media are looked for at the path that a row names, or else at the end of that path
below the source's folder.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from crab_min.errors import DataError
from crab_min.sources import crab_v1, pave_crema
from crab_min.sources.av_uie import read_list

NO_FILE = ""  # for a split that was not released


@dataclass(frozen=True)
class Layout:
    """Where a release keeps the rows of a task, and how they are converted."""

    convert: Callable[[Path, dict, bool], Iterator[dict]]  # (folder, row, train) -> rows as in v2
    folder: str  # below the data folder
    train: str  # file with the training rows
    test: str | None = None  # file with the test rows; None: the same, its rows name their split

    def file(self, root: Path, split: str) -> Path:
        name = self.train
        if split == "test" and self.test is not None:
            name = self.test
        return root / self.folder / name


# The first layout of a task whose file is there counts.
# fmt: off
RELEASED_LAYOUTS = {
    # AV-UIE v1 (Crab)
    "avqa": [
        Layout(crab_v1.avqa, "music-avqa", "valid_train_samples.json", "test_samples.json"),
        Layout(pave_crema.music_avqa, "music-avqa", "avqa-train.json", "avqa-test.json"),
    ],
    "ave": [
        Layout(crab_v1.ave, "ave/AVE_Dataset", "valid_train_samples.json", "test_samples.json"),
    ],
    "avvp": [Layout(crab_v1.avvp, "avvp", "train_samples.json", "test_samples.json")],
    "s4": [Layout(crab_v1.s4, "AVS", "s4_samples.json")],
    "ms3": [Layout(crab_v1.ms3, "AVS", "ms3_samples.json")],
    "avss": [Layout(crab_v1.avss, "AVS", "avss_samples.json")],
    "arig": [Layout(crab_v1.arig, "AVS", "v1s_grounding_samples.json")],
    "ref_avs": [Layout(crab_v1.ref_avs, "ref-avs/REFAVS", "metadata.csv")],
    "avcap": [Layout(crab_v1.avcap, "valor", "train_samples.json", NO_FILE)],
    # what Crab's connectors are pretrained on
    "audiocaps": [Layout(crab_v1.audiocaps, "audiocaps", "train.csv", "test.csv")],
    "lvis": [Layout(crab_v1.lvis, "lvis", "lvis_v1_train.json", "lvis_v1_val.json")],
    # PAVE and CREMA
    "avsd": [
        Layout(pave_crema.avsd, "avsd", "train_set4DSTC7-AVSD.json",
               "mock_test_set4DSTC10-AVSD_from_DSTC7_singref.json"),
    ],
    "scanqa": [
        Layout(pave_crema.scanqa, "scanqa", "ScanQA_v1.0_train.json", "ScanQA_v1.0_val.json"),
    ],
    "sqa3d": [Layout(pave_crema.sqa3d, "sqa3d", "SQA_train.json", "SQA_test.json")],
    "nextqa": [Layout(pave_crema.nextqa, "nextqa", "nextqa_train.json", "nextqa_val.json")],
}
# fmt: on


def annotation_file(root: Path, task: str, split: str) -> Path | None:
    """Return the file with the rows of a task and split, or None if there is none."""
    path, _ = find_layout(root, task, split)
    return path


def find_layout(root: Path, task: str, split: str) -> tuple[Path | None, Layout | None]:
    """Return the file with the rows of a task and split, and its layout (None: AV-UIE v2)."""
    path = root / task / f"{split}.json"
    if path.is_file():
        return path, None
    for layout in RELEASED_LAYOUTS.get(task, ()):
        path = layout.file(root, split)
        if path.is_file():
            return path, layout
    return None, None


def read_rows(root: str | Path, task: str, split: str, limit: int = 0) -> list[dict]:
    """Read the rows of a task and split, in the form of AV-UIE v2.

    Args:
        root: the data folder.
        task: a name of TASKS.
        split: "train" or "test".
        limit: largest number of rows; 0: all.

    Raises:
        DataError: no file for the task, or a row that is not as released.
    """
    root = Path(root)
    path, layout = find_layout(root, task, split)
    if path is None:
        expected = root / task / f"{split}.json"
        raise DataError(f"{root}: no {split}.json for {task}; expected {expected}")
    released = read_list(path)
    if layout is None:
        return released[: limit or None]

    rows: list[dict] = []
    for index, row in enumerate(released):
        if limit and len(rows) >= limit:
            break
        if not in_split(row, split):
            continue
        try:
            rows += layout.convert(root / layout.folder, row, split == "train")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OSError) as error:
            reason = f"{type(error).__name__}: {error}"
            expected = f"a row of {task} as released was expected"
            raise DataError(f"{path}, row {index}: {reason}; {expected}") from None
    return rows[: limit or None]


def in_split(row: dict, split: str) -> bool:
    """Tell if a row belongs to a split; a row that names none does."""
    named = str(row.get("split", split))
    if split == "test":
        return named.startswith("test")  # Ref-AVS has test_s, test_u and test_n
    return named == split
