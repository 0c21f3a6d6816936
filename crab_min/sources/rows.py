"""Rows of a task and split, from AV-UIE v2 or another release.

The other release is read as it was released.

    rows = read_rows(Path("data"), "ave", "train")  # data/ave/train.json, or Crab's files of AVE

A task's AV-UIE v2 folder comes first. Without one, RELEASED_LAYOUTS tells where the files of AV-UIE
v1 (Crab), of PAVE or of CREMA lie below the data folder, and how one of their rows becomes rows of
the v2 form. Media are looked for at the path that a row names, or else at the end of that path
below the source's folder.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from crab_min.errors import DataError
from crab_min.sources import choices, crab_v1, pave_crema
from crab_min.sources.av_uie import read_list


@dataclass(frozen=True)
class Layout:
    """The place of a task's rows in a release, and the function that converts them."""

    task: str
    convert: Callable[[Path, dict, bool], Iterator[dict]]  # (folder, row, train) -> rows as in v2
    folder: str  # below the data folder
    train: str  # file with the training rows, or folder of such files; "" without any
    test: str  # likewise with the test rows; may be that of the training rows


# Errors of a row in which a field is missing or holds something else.
UNLIKE_RELEASED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError)

# The first layout of a task whose file is there counts.
# fmt: off
RELEASED_LAYOUTS = (
    # AV-UIE v1 (Crab)
    Layout("avqa", crab_v1.avqa, "music-avqa", "valid_train_samples.json", "test_samples.json"),
    Layout("ave", crab_v1.ave, "ave/AVE_Dataset", "valid_train_samples.json", "test_samples.json"),
    Layout("avvp", crab_v1.avvp, "avvp", "train_samples.json", "test_samples.json"),
    Layout("s4", crab_v1.s4, "AVS", "s4_samples.json", "s4_samples.json"),
    Layout("ms3", crab_v1.ms3, "AVS", "ms3_samples.json", "ms3_samples.json"),
    Layout("avss", crab_v1.avss, "AVS", "avss_samples.json", "avss_samples.json"),
    Layout("arig", crab_v1.arig, "AVS", "v1s_grounding_samples.json", "v1s_grounding_samples.json"),
    Layout("ref_avs", crab_v1.ref_avs, "ref-avs/REFAVS", "metadata.csv", "metadata.csv"),
    Layout("avcap", crab_v1.avcap, "valor", "train_samples.json", ""),
    # what Crab's connectors are pretrained on
    Layout("audiocaps", crab_v1.audiocaps, "audiocaps", "train.csv", "test.csv"),
    Layout("lvis", crab_v1.lvis, "lvis", "lvis_v1_train.json", "lvis_v1_val.json"),
    # PAVE and CREMA
    Layout("avqa", pave_crema.music_avqa, "music-avqa", "avqa-train.json", "avqa-test.json"),
    Layout("avsd", pave_crema.avsd, "avsd", "train_set4DSTC7-AVSD.json",
           "mock_test_set4DSTC10-AVSD_from_DSTC7_singref.json"),
    Layout("scanqa", pave_crema.scene, "scanqa", "ScanQA_v1.0_train.json", "ScanQA_v1.0_val.json"),
    Layout("sqa3d", pave_crema.scene, "sqa3d", "SQA_train.json", "SQA_test.json"),
    Layout("nextqa", pave_crema.nextqa, "nextqa", "nextqa_train.json", "nextqa_val.json"),
    Layout("avqa_thu", choices.avqa, "avqa", "train_qa.json", "val_qa.json"),
    Layout("videomme", choices.choice, "videomme", "", "videomme.json"),
    Layout("mvbench", choices.choice, "mvbench", "", "json"),
    Layout("mlvu", choices.choice, "mlvu", "", "json"),
    Layout("egoexo", choices.egoexo, "egoexo", "annotations/proficiency_demonstrator_train.json",
           "annotations/proficiency_demonstrator_val.json"),
    Layout("touchqa", choices.sensed, "touchqa", "touchqa_train.json", "touchqa_test.json"),
    Layout("thermalqa", choices.sensed, "thermalqa", "thermalqa_train.json", "thermalqa_test.json"),
    Layout("perceptiontest", choices.perception, "perceptiontest", "mc_question_train.json",
           "mc_question_valid.json"),
    Layout("vggsound", choices.vggsound, "vggsound", "vggsound.csv", "vggsound.csv"),
)
# fmt: on


def find_layout(root: Path, task: str, split: str) -> tuple[Path | None, Layout | None]:
    """Return the file with the rows of a task and split, and its layout.

    The layout is None for AV-UIE v2. The file is None where there is none.
    """
    path = root / task / f"{split}.json"
    if path.is_file():
        return path, None
    for layout in RELEASED_LAYOUTS:
        name = layout.train if split == "train" else layout.test
        path = root / layout.folder / name
        if layout.task == task and name and path.exists():
            return path, layout
    return None, None


def read_rows(root: Path, task: str, split: str, limit: int = 0) -> list[dict]:
    """Read the rows of a task and split, in the form of AV-UIE v2.

    Args:
        root: the data folder, in which `find_layout` finds a file for them.
        task: a name of TASKS.
        split: "train" or "test".
        limit: largest number of rows; 0: all.

    Raises:
        DataError: a broken file, or a row that is not as released.
    """
    path, layout = find_layout(root, task, split)
    released = read_list(path)
    if layout is None:
        return released[: limit or None]

    rows: list[dict] = []
    for index, row in enumerate(released):
        if limit and len(rows) >= limit:
            break
        # a row that names no split belongs to both; Ref-AVS has test_s, test_u and test_n
        if not str(row.get("split", split)).startswith(split):
            continue
        try:
            rows += layout.convert(root / layout.folder, row, split == "train")
        except UNLIKE_RELEASED as error:
            raise DataError(
                f"{path}, row {index}: {type(error).__name__}: {error}; "
                f"a row of {task} as released was expected"
            ) from None
    return rows[: limit or None]
