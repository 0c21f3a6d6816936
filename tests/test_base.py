"""The making of the tiny base, at a few steps: its stages, resuming, lessons and checks.

Its statements are true, and none is in the words of a task.
"""

import json
import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

import train
from crab_min.answers import GRID, mask_box
from crab_min.backbones.composed import load_base
from crab_min.config import BaseConfig
from crab_min.tasks import TASKS
from crab_min.tinybase import check, make, pretrain_encoders, pretrain_lm
from crab_min.tinybase.captions import (
    content_words,
    pair_statements,
    scene_statements,
    with_keywords_or_recap,
)
from crab_min.world.clauses import at_position
from crab_min.world.rendering import Renderer
from crab_min.world.scenes import Object, Scene
from crab_min.world.things import SECONDS

STEPS = "--see-steps 1 --hear-steps 1 --practice 0.002 --read-steps 3 --check-scenes 2"
WHOLE = range(SECONDS)


@pytest.fixture(autouse=True)
def one_thread():
    """Several threads make tiny networks slower, on a busy machine a hundred times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def renderer():
    return Renderer()


@pytest.fixture
def small_batches(monkeypatch):
    """Every stage and lesson with a few scenes per step."""
    monkeypatch.setattr(pretrain_encoders, "PICTURES", 10)
    monkeypatch.setattr(pretrain_encoders, "CLIPS", 6)
    lessons = [replace(lesson, scenes=2) for lesson in pretrain_lm.LESSONS]
    monkeypatch.setattr(pretrain_lm, "LESSONS", tuple(lessons))
    monkeypatch.setattr(pretrain_lm, "STATEMENTS", replace(pretrain_lm.STATEMENTS, scenes=2))


# --- making the base ------------------------------------------------------------------------------
def test_an_interrupted_base_goes_on_after_its_last_stage(
    tmp_path, monkeypatch, capsys, small_batches
):
    folder = tmp_path / "base"
    command = ["tiny-base", *STEPS.split(), "--out", str(folder)]

    # stopped in the third stage
    def interrupted(*_, **__):
        raise ValueError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(make, "train_read", interrupted)
        assert train.main(command) == 2
    assert json.loads((folder / "base.json").read_text())["stages"] == ["see", "hear"]

    # other settings do not continue it, the same command does
    assert train.main([*command, "--see-steps", "2"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert train.main(command) == 0
    made = json.loads((folder / "base.json").read_text())
    assert [line["stage"] for line in made["log"]] == ["see", "hear", "read: statements"]
    assert 0 <= made["figures"]["box_iou"] <= 1

    # a finished base is kept
    assert train.main(command) == 2
    assert "not be overwritten" in capsys.readouterr().err


def test_a_lesson_ends_when_it_is_learned(renderer, monkeypatch):
    learned_at_once = pretrain_lm.Lesson(40, 1, "text", names=True, until=100)
    never_learned = pretrain_lm.Lesson(25, 1, "text", names=True)
    monkeypatch.setattr(pretrain_lm, "LESSONS", (learned_at_once, never_learned))
    steps, loss = Counter(), pretrain_lm.Curriculum.loss

    def counted_loss(self, step, lesson, earlier):
        steps[lesson] += 1
        return loss(self, step, lesson, ())  # without practice of earlier lessons

    monkeypatch.setattr(pretrain_lm.Curriculum, "loss", counted_loss)
    config = BaseConfig(practice=1, read_steps=0, read_lr=1e-4)
    pretrain_lm.train_read(load_base(), renderer, config, log=print)
    assert steps == {learned_at_once: 20, never_learned: 25}


def test_checks_score_completions_from_0_to_1():
    assert check.span_iou("from 2 to 7", "from 2 to 7") == 1
    assert check.span_iou("from 2 to 5", "from 3 to 7") == 2 / 5
    assert check.span_iou("silent", "from 3 to 7") == 0
    assert check.box_iou("10 20 60 80", "10 20 60 80") == 1
    assert check.box_iou("10 20 60", "10 20 60 80") == 0
    assert check.first_word("heard from 2 to 7", "heard")
    assert check.before_comma("dog, silent", "dog")


# --- statements -----------------------------------------------------------------------------------
def test_statements_are_true(renderer):
    rng, checked = random.Random(0), Counter()
    for index in range(80):
        scene = renderer.scene("base", "many", index, 0)
        about_clip = scene_statements(renderer, scene, rng, audio=WHOLE)
        about_frame = scene_statements(renderer, scene, rng, frame_at=4.5)
        for text in about_clip + about_frame:
            names = re.findall(r"[Tt]he ([a-z]+)", text)
            named = [obj for name in names for obj in scene.objects if obj.label == name]
            for pattern, is_true in CHECKS.items():
                if match := re.fullmatch(pattern, text):
                    assert is_true(renderer, scene, named, *match.groups()), text
                    checked[pattern] += 1
                    break
    assert sum(checked.values()) > 150
    assert not CHECKS.keys() - checked.keys()


def is_heard_from(renderer, scene: Scene, named: list[Object], start: str, end: str) -> bool:
    return named[0].heard == [(int(start), int(end))]


def has_box(renderer, scene: Scene, named: list[Object], box: str) -> bool:
    numbers = tuple(int(number) for number in box.split())
    return mask_box(renderer.mask(scene, named[0], 4.5)) == numbers


def is_high_or_low(renderer, scene: Scene, named: list[Object], height: str) -> bool:
    _, top, _, bottom = mask_box(renderer.mask(scene, named[0], 4.5))
    return height == ("high" if top + bottom < GRID else "low")


def is_heard_first_or_last(renderer, scene: Scene, named: list[Object], order: str) -> bool:
    spans = [obj.heard[0] for obj in scene.heard]
    if order == "first":
        return named[0].heard[0] == min(spans)
    return named[0].heard[0] == max(spans, key=lambda span: span[1])


def are_heard(renderer, scene: Scene, named: list[Object], names: str) -> bool:
    return " on the " in names or " in the " in names or named == scene.heard


def is_at_position(renderer, scene: Scene, named: list[Object], position: str) -> bool:
    return named[-1].position == position


def compares(renderer, scene: Scene, named: list[Object], judgement: str) -> bool:
    other, thing = named[-2:]
    start, end = thing.heard[0] if thing.heard else (0, 0)
    other_start, other_end = other.heard[0] if other.heard else (0, 0)
    return {
        "longer": end - start > other_end - other_start,
        "shorter": end - start < other_end - other_start,
        "earlier": start < other_start,
        "later": start > other_start,
    }[judgement]


# Patterns of statements, the first that fits counts: whether such a statement is true.
CHECKS = {
    r"The \w+ is heard from (\d+) to (\d+)\.": is_heard_from,
    r"The \w+ is at ([\d ]+)\.": has_box,
    r"The \w+ is (high|low)\.": is_high_or_low,
    r"Heard (first|last) is the \w+\.": is_heard_first_or_last,
    r"The (.*) can be heard\.": are_heard,
    r"On the (left|right) is the \w+.*": is_at_position,
    r"The .* and next to the \w+ the \w+ is heard (longer|shorter|earlier|later)\.": compares,
}


def test_statements_about_two_media_are_true(renderer):
    rng, checked = random.Random(0), 0
    scenes = [renderer.scene("base", "one", index, 0) for index in range(40)]
    for first, second, third in zip(scenes, scenes[1:], scenes[2:]):
        labels = {
            "one": {obj.label for obj in first.seen},
            "two": {obj.label for obj in second.seen},
        }
        for text in pair_statements([first, second], third, "video", rng):
            if match := re.fullmatch(r"The (\w+) is in video (one|two).", text):
                label, number = match.groups()
                other = "two" if number == "one" else "one"
                assert label in labels[number] - labels[other]
                checked += 1
            elif match := re.fullmatch(r"The (\w+) is in neither.", text):
                assert match[1] not in labels["one"] | labels["two"]
                checked += 1
    assert checked > 30


def test_a_lesson_says_one_form_of_statement_about_each_thing(renderer):
    rng = random.Random(0)
    for index in range(20):
        scene = renderer.scene("base", "many", index, 0)
        statements = scene_statements(renderer, scene, rng, audio=WHOLE, forms=("sounds",))
        sounds = [f"The {obj.label} is {'heard' if obj.heard else 'silent'}." for obj in scene.seen]
        assert sorted(statements) == sorted(sounds)

        statements = scene_statements(renderer, scene, rng, audio=WHOLE, forms=("shown",))
        shown = []
        for obj in scene.heard:
            where = at_position(obj.position) if obj.seen else "not in the picture"
            shown.append(f"The {obj.label} is {where}.")
        assert sorted(statements) == sorted(shown)


def test_keywords_and_recaps_are_words_of_the_statements():
    rng = random.Random(0)
    statements = ["The dog is heard from 2 to 7.", "On the left is the cat, silent."]
    text = " ".join(statements)
    assert content_words(statements[0]) == ["dog", "heard", "2", "7"]
    made = {with_keywords_or_recap(statements, rng) for _ in range(200)}
    assert ("", text) in made
    assert ("\ndog; cat", text) in made
    assert ("\n7; left", text + " In short: dog heard 2 7, left cat silent.") in made


def test_statements_say_nothing_in_the_words_of_a_task(renderer):
    rng = random.Random(1)
    instructions = [task.instruction for task in TASKS.values() if not task.slots]
    lines, ones = [], []
    for kind in ("one", "many", "action", "face"):
        for index in range(25):
            scene = renderer.scene("base", kind, index, 0)
            lines += scene_statements(renderer, scene, rng, audio=WHOLE)
            if kind == "one":
                ones.append(scene)
    for first, second, third in zip(ones, ones[1:], ones[2:]):
        lines += pair_statements([first, second], third, "video", rng)
    for line in lines:
        assert "<" not in line and "?" not in line
        assert not any(instruction in line for instruction in instructions)
