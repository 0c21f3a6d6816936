"""Every tutorial runs as a script, prints what its page shows and draws its picture."""

import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.py"))
# what a reader of each page gets to see
PRINTED = {
    "21_interface": "A row of ave/train.json:",
    "11_crab_branches": "features (clip, steps, S, width): (1, 10, 144, 128)",
    "12_crab_ilora": "the most one-sided router of each task",
    "15_crab_reasoning": "frames (10, 96, 96, 3)",
    "13_crab_masks": "answers about 5 pictures, such as",
    "31_patch": "with a gradient: ['norm.weight', 'norm.bias']",
    "44_sequential": "rgb ['flow']: found in new clips",
    "50_own_clips": "15 clips: making a dog bark",
    "10_crab_data": "thrown out, time: A ",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One folder for all pages, several of which use the same world."""
    return tmp_path_factory.mktemp("tutorials")


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs(page, folder):
    command = [sys.executable, str(page)]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert PRINTED[page.stem] in run.stdout
    picture = f"answers/{page.stem}.png"
    if picture in page.read_text(encoding="utf-8"):
        assert (folder / picture).exists()
