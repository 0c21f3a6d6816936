"""The making of the tiny base, at a few steps: stages, resuming, what it says; and that its statements are true and none of the tasks' own."""
import json
import random
import re
from collections import Counter

import pytest

import train
from crab_min.answers import GRID, mask_box
from crab_min.tasks import TASKS
from crab_min.tinybase import make as base
from crab_min.tinybase.captions import content_words, pair_statements, scene_statements, with_keywords_or_recap
from crab_min.world.clauses import at_position
from crab_min.world.rendering import Renderer
from crab_min.world.things import SECONDS

FEW = ["tiny-base", "--see-steps", "1", "--hear-steps", "1", "--practice", "0.002", "--read-steps", "3", "--check-scenes", "2", "--out"]


def test_an_interrupted_base_goes_on_after_its_last_stage(tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "base")

    def interrupted(*_, **__):
        raise ValueError("the power went")
    with monkeypatch.context() as patch:
        patch.setattr(base, "train_read", interrupted)
        assert train.main([*FEW, out]) == 2
    assert json.loads((tmp_path / "base" / "stage.json").read_text())["stages"] == ["see", "hear"]
    assert train.main([*FEW[:2], "2", *FEW[3:], out]) == 2 and "other settings" in capsys.readouterr().err
    assert train.main([*FEW, out]) == 0
    made = json.loads((tmp_path / "base" / "base.json").read_text())
    assert [line["stage"] for line in made["log"]] == ["see", "hear", "read: statements"] and 0 <= made["box_iou"] <= 1
    assert train.main([*FEW, out]) == 2 and "not be overwritten" in capsys.readouterr().err
    assert not (tmp_path / "base" / "stage.json").exists()


@pytest.fixture(scope="module")
def renderer():
    return Renderer()


def test_statements_are_true(renderer):
    rng, checked = random.Random(0), Counter()
    for index in range(80):
        scene = renderer.scene("base", "many", index, 0)
        for text in scene_statements(renderer, scene, rng, True, None, range(SECONDS)) + scene_statements(renderer, scene, rng, True, 4.5):
            named = [o for label in re.findall(r"[Tt]he ([a-z]+)", text) for o in scene.objects if o.label == label]
            if match := re.fullmatch(r"The \w+ is heard from (\d+) to (\d+).", text):
                assert named[0].heard == [(int(match[1]), int(match[2]))]
            elif match := re.fullmatch(r"The \w+ is at ([\d ]+).", text):
                assert mask_box(renderer.mask(scene, named[0], 4.5)) == tuple(map(int, match[1].split()))
            elif match := re.fullmatch(r"The \w+ is (high|low).", text):
                top, bottom = mask_box(renderer.mask(scene, named[0], 4.5))[1::2]
                assert match[1] == ("high" if top + bottom < GRID else "low")
            elif match := re.fullmatch(r"Heard (first|last) is the \w+.", text):
                spans = [o.heard[0] for o in scene.heard]
                assert named[0].heard[0] == (min(spans) if match[1] == "first" else max(spans, key=lambda span: span[1]))
            elif re.fullmatch(r"The .* can be heard.", text) and " on the " not in text and " in the " not in text:
                assert named == scene.heard
            elif match := re.fullmatch(r"On the (left|right) is the \w+.*", text):
                assert named[-1].position == match[1]
            elif match := re.fullmatch(r"The .* and next to the \w+ the \w+ is heard (longer|shorter|earlier|later).", text):
                (start, end), (other_start, other_end) = named[-1].heard[0] if named[-1].heard else (0, 0), named[-2].heard[0] if named[-2].heard else (0, 0)
                assert {"longer": end - start > other_end - other_start, "shorter": end - start < other_end - other_start,
                        "earlier": start < other_start, "later": start > other_start}[match[1]]
            else:
                continue
            checked[text.split()[0] + text.split()[-1][-3:]] += 1
    assert sum(checked.values()) > 150 and {"Thegh.", "Theow.", "Theer."} < set(checked) and any(key.startswith("Heard") for key in checked), checked


def test_statements_about_two_media_are_true(renderer):
    rng, checked, scenes = random.Random(0), 0, [renderer.scene("base", "one", index, 0) for index in range(40)]
    for a, b, c in zip(scenes, scenes[1:], scenes[2:]):
        for text in pair_statements([a, b], c, "video", rng):
            if match := re.fullmatch(r"The (\w+) is in video (one|two).", text):
                mine, other = (a, b) if match[2] == "one" else (b, a)
                assert match[1] in {o.label for o in mine.seen} - {o.label for o in other.seen}
                checked += 1
            elif match := re.fullmatch(r"The (\w+) is in neither.", text):
                assert match[1] not in {o.label for o in a.seen + b.seen}
                checked += 1
    assert checked > 30


def test_a_lesson_says_one_form_of_statement_about_each_thing(renderer):
    rng = random.Random(0)
    for index in range(20):
        scene = renderer.scene("base", "many", index, 0)
        said = scene_statements(renderer, scene, rng, True, None, range(SECONDS), ("sounds",))
        assert sorted(said) == sorted(f"The {o.label} is {'heard' if o.heard else 'silent'}." for o in scene.seen)
        said = scene_statements(renderer, scene, rng, True, None, range(SECONDS), ("shown",))
        assert sorted(said) == sorted(f"The {o.label} is " + (f"{at_position(o.position)}." if o.seen else "not in the picture.") for o in scene.heard)


def test_keywords_and_recaps_are_words_of_the_statements():
    rng, said = random.Random(0), ["The dog is heard from 2 to 7.", "On the left is the cat, silent."]
    assert content_words(said[0]) == ["dog", "heard", "2", "7"]
    made = {with_keywords_or_recap(said, rng) for _ in range(200)}
    assert ("", " ".join(said)) in made and ("\ndog; cat", " ".join(said)) in made
    assert ("\n7; left", " ".join(said) + " In short: dog heard 2 7, left cat silent.") in made


def test_statements_say_nothing_in_the_words_of_a_task(renderer):
    rng, asks = random.Random(1), [task.instruction for task in TASKS.values() if not task.slots]
    scenes = [renderer.scene("base", kind, index, 0) for kind in ("one", "many", "action", "face") for index in range(25)]
    lines = [line for scene in scenes for line in scene_statements(renderer, scene, rng, True, None, range(SECONDS))]
    lines += [line for three in zip(scenes[:25], scenes[1:25], scenes[2:25]) for line in pair_statements(three[:2], three[2], "video", rng)]
    assert not [line for line in lines if "<" in line or "?" in line or any(ask in line for ask in asks)]
