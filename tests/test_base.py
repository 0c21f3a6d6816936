"""The making of the tiny base, at a few steps: stages, resuming, what it says; and that its statements are true and none of the tasks' own."""
import json
import random

import pytest

import train
from crab_min import base
from crab_min.interface import TASKS, mask_box
from crab_min.statements import pair_statements, statements
from crab_min.world import SECONDS, Renderer

FEW = ["tiny-base", "--see-steps", "1", "--hear-steps", "1", "--read-steps", "3", "--check-scenes", "2", "--out"]


def test_an_interrupted_base_goes_on_after_its_last_stage(tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "base")

    def interrupted(*_):
        raise ValueError("the power went")
    with monkeypatch.context() as patch:
        patch.setattr(base, "train_read", interrupted)
        assert train.main([*FEW, out]) == 2
    assert json.loads((tmp_path / "base" / "stage.json").read_text())["stages"] == ["see", "hear"]
    assert train.main([*FEW[:2], "2", *FEW[3:], out]) == 2 and "other settings" in capsys.readouterr().err
    assert train.main([*FEW, out]) == 0
    made = json.loads((tmp_path / "base" / "base.json").read_text())
    assert [line["stage"] for line in made["log"]] == ["see", "hear", "read"] and 0 <= made["box_iou"] <= 1
    assert train.main([*FEW, out]) == 2 and "not be overwritten" in capsys.readouterr().err
    assert not (tmp_path / "base" / "stage.json").exists()


@pytest.fixture(scope="module")
def renderer():
    return Renderer()


def test_statements_are_true(renderer):
    rng, checked = random.Random(0), 0
    for index in range(60):
        scene = renderer.scene("base", "many", index, 0)
        for text in statements(renderer, scene, rng, None, True, range(SECONDS)) + statements(renderer, scene, rng, 4.5, True, None):
            named = [o for o in scene.objects if f"the {o.label} " in text or f"the {o.label}." in text]
            if " is heard from " in text and " is at " not in text:
                start, end = (int(w.strip(".")) for w in text.split(" heard from ")[1].split(" to "))
                assert named[0].heard == [(start, end)]
                checked += 1
            elif " is at " in text:
                assert mask_box(renderer.mask(scene, named[0], 4.5)) == tuple(int(w.strip(".")) for w in text.split(" is at ")[1].split())
                checked += 1
            elif text.endswith("can be heard.") and not text.startswith("at "):
                assert {o.label for o in named} == {o.label for o in scene.objects if o.heard}
                checked += 1
    assert checked > 60


def test_statements_say_nothing_in_the_words_of_a_task(renderer):
    rng, asks = random.Random(1), [task.ask for task in TASKS.values() if not task.slots]
    scenes = [renderer.scene("base", kind, index, 0) for kind in ("one", "many", "action", "face") for index in range(25)]
    lines = [line for scene in scenes for line in statements(renderer, scene, rng, None, True, range(SECONDS))]
    lines += [line for a, b in zip(scenes[:25], scenes[1:25]) for line in pair_statements([a, b], "video", rng)]
    assert not [line for line in lines if "<" in line or "?" in line or any(ask in line for ask in asks)]
