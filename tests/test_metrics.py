"""The metric of every task on answers worked out by hand (tests/test_goldens.py: against the authors' own scorers)."""
import random
import time

import pytest

from crab_min.answers import Answer
from crab_min.evaluation.canonical import canonical_text
from crab_min.evaluation.metrics import best_constant, score
from crab_min.tasks import TASKS

ERROR = Answer(error="no tag", text="...")


def metric(task, prediction, right):
    return score(TASKS[task], [prediction], [right])["metric"]


def test_accuracy_counts_unreadable_answers_as_wrong():
    yes, no = Answer(choice="yes"), Answer(choice="no")
    result = score(TASKS["avqa"], [Answer(choice="Yes."), no, ERROR, yes], [yes] * 4)
    assert (result["metric"], result["parsed"], result["n"]) == (.5, .75, 4)
    assert metric("ucf", Answer(choice="playing violin"), Answer(choice="PlayingViolin")) == 1
    assert metric("avqa", Answer(choice="no"), Answer(choice="piano")) == 0        # not a substring
    assert metric("avqa", Answer(choice="2"), Answer(choice="two")) == 1


def test_an_option_is_right_by_text_index_or_letter():
    right = TASKS["avqa_thu"].gold_answer({"answer": 2, "multi_choice": ["rain", "dog", "Cat"]})
    assert [metric("avqa_thu", Answer(choice=c), right) for c in ("cat", "2", "C", "dog", "1")] == [1, 1, 1, 0, 0]


def event(label, *spans):
    return Answer(events=[(label, list(spans))])


def test_ave_counts_seconds_with_the_right_label():
    right = event("Violin, fiddle", (0, 6))
    assert metric("ave", event("violin, fiddle", (0, 6)), right) == 1
    assert metric("ave", event("violin, fiddle", (2, 8)), right) == pytest.approx(.6)
    assert metric("ave", event("violin, fiddle", (0, 2), (4, 9999)), right) == pytest.approx(.4)
    assert metric("ave", event("dog", (0, 6)), right) == pytest.approx(.4)         # the background is right
    result = score(TASKS["ave"], [ERROR, event("violin, fiddle", (0, 3))], [right, right])
    assert result["metric"] == pytest.approx(.35) and result["parsed"] == .5
    assert result["all"]["segment_accuracy_released"] == pytest.approx((1 + .7) / 2)
    assert score(TASKS["ave"], [event("dog", (0, 6))], [right], labels=["Violin, fiddle"])["parsed"] == 0


def test_avvp_main_number_is_the_mean_of_audio_visual_and_both():
    right = Answer(audio_events=[("Dog", [(0, 10)])], visual_events=[("Dog", [(0, 4)])])
    assert metric("avvp", right, right) == 1
    result = score(TASKS["avvp"], [Answer(audio_events=[("dog", [(0, 10)])]), ERROR], [right, right])
    assert result["all"]["segment_audio"] == .5 and result["all"]["segment_visual"] == 0
    assert result["metric"] == pytest.approx(1 / 6) and result["parsed"] == .5


def test_unav_is_the_mean_over_classes():
    right = Answer(events=[("dog", [(0, 4)]), ("cat", [(5, 10)])])
    assert metric("unav", right, right) == 1
    assert metric("unav", event("dog", (0, 4)), right) == .5
    assert metric("unav", event("dog", (2, 6)), event("dog", (0, 4))) == .5
    assert metric("unav", Answer(), Answer()) == 1                                 # nothing to find, nothing found


def test_unav_spans_are_matched_one_to_one():
    """Gold: dog 0-4, dog 6-10, cat 0-10. Said: dog 0-4 (IoU 1), dog 1-5 (3/5, but its gold is taken), cat 5-10 (1/2); dog 6-10 is missed."""
    right = Answer(events=[("dog", [(0, 4), (6, 10)]), ("cat", [(0, 10)])])
    result = score(TASKS["unav"], [Answer(events=[("dog", [(0, 4), (1, 5)]), ("Cat", [(5, 10)])])], [right])["all"]
    assert result == {"miou": pytest.approx((1 + 0 + .5) / 3), "f1_at_30": pytest.approx(2 * 2 / 6), "f1_at_50": pytest.approx(2 * 2 / 6),
                      "f1_at_70": pytest.approx(2 * 1 / 6)}


def boxes(*found, exists=None):
    return Answer(boxes=list(found), exists=exists)


def test_box_metrics():
    a, b, half = (0, 0, 10, 10), (100, 100, 120, 120), (0, 0, 10, 5)
    for task in ("arig", "s4"):
        assert metric(task, boxes(a), boxes(a)) == 1 and metric(task, boxes(half), boxes(a)) == .5
        assert metric(task, boxes(b, a), boxes(a)) == 0                            # the first box counts
        assert metric(task, boxes(a), boxes()) == 0 and metric(task, ERROR, boxes(a)) == 0
    assert score(TASKS["arig"], [boxes(half), boxes(b)], [boxes(a), boxes(a)])["all"] == {
        "iou_at_50": .5, "auc": pytest.approx((.525 + .025) / 2)}              # reaches 0 to .5: 10.5 steps of .05; 0 alone: half a step
    assert metric("ms3", boxes(b, a), boxes(a, b)) == 1 and metric("ms3", boxes(a), boxes(a, b)) == .5
    assert metric("ms3", boxes(half, a), boxes(a)) == .5 and metric("ms3", ERROR, boxes()) == 0
    assert metric("s4", boxes((5, 5, 5, 5)), boxes((5, 5, 5, 5))) == 0             # no area, no division by zero


def test_ref_avs_scores_existence_and_box():
    here, absent, half = boxes((0, 0, 10, 10), exists=True), boxes(exists=False), boxes((0, 0, 10, 5), exists=True)
    result = score(TASKS["ref_avs"], [half, absent, here, absent, ERROR], [here, absent, absent, here, absent])
    assert result == {"metric": pytest.approx(1.5 / 5), "parsed": .8, "n": 5, "all": {"existence": pytest.approx(.4)}}


def test_rouge_l():
    right = Answer(text="a dog barks at a cat")
    assert metric("avcap", Answer(text="A dog barks at a cat."), right) == 1
    assert metric("avcap", Answer(text="cat dog at"), right) == pytest.approx(2 * 2 / 9)
    assert metric("avcap", Answer(text="..."), right) == 0


def test_emotions_by_class():
    """joy: 2 of 3 found, F1 2 * 2 / (2 + 3); anger: 1 of 1, said twice, F1 2 * 1 / (2 + 1); the unread answer is of no class."""
    golds = [Answer(choice=c) for c in ("joy", "joy", "joy", "anger", "fear")]
    result = score(TASKS["meld"], [Answer(choice=c) for c in ("Joy", "joy", "anger", "anger")] + [ERROR], golds)
    assert result["metric"] == .6
    assert result["all"] == {"uar": pytest.approx((2 / 3 + 1 + 0) / 3), "weighted_f1": pytest.approx((3 * 4 / 5 + 1 * 2 / 3 + 0) / 5)}


def test_the_released_avqa_scorer_takes_parts_of_words_and_leaves_out_strange_answers():
    """Of four: "no" in "piano" is right there, "two" is right, "guitar" is nobody's gold and is not counted, one does not parse."""
    golds = [Answer(choice=c) for c in ("no", "two", "two", "piano")]
    result = score(TASKS["avqa"], [Answer(choice=c) for c in ("piano", "two", "guitar")] + [ERROR], golds)
    assert result["metric"] == .25 and result["all"] == {"substring_released": 1, "counted_released": .5, "part_of_gold": .25}


def test_cremas_avqa_score_takes_an_answer_that_is_part_of_the_gold():
    """Right there: "guitar", "2" (right anyway) and "no" of "piano"; not "acoustic guitar" for "guitar", and not an answer that is not read."""
    golds = [Answer(choice=c) for c in ("acoustic guitar", "two", "piano", "guitar", "yes")]
    result = score(TASKS["avqa"], [Answer(choice=c) for c in ("guitar", "2", "no", "acoustic guitar")] + [ERROR], golds)
    assert result["metric"] == 1 / 5 and result["all"]["part_of_gold"] == 3 / 5


def test_cider_by_hand():
    """Of two captions, every word of one is in one caption only: weight log 2. 1 of 2 words, 0 of 1 pairs, cosines 1/2 and 0, lengths equal."""
    golds = [Answer(text="dog barks"), Answer(text="cat sleeps")]
    both = score(TASKS["avcap"], golds, golds)["all"]["cider_own_words"]
    assert both == pytest.approx(10 * (1 + 1 + 0 + 0) / 4)                     # two words have no runs of three and four
    half = score(TASKS["avcap"], [Answer(text="Dog, sleeping!"), ERROR], golds)["all"]["cider_own_words"]
    assert half == pytest.approx(10 * .5 / 4 / 2)


def answers(*texts):
    return Answer(text=texts[0], choices=texts)


def test_free_answers_are_compared_without_articles_signs_and_digits():
    same = {"The 2 chairs.": "two chairs", " A brown_chair,\nleft": "brown chair left", "20": "twenty", "21": "21", "a": "a", "?!": "", "The theatre": "theatre"}
    assert {text: canonical_text(text) for text in same} == same


def test_a_scene_answer_is_right_if_any_gold_is_equal_and_refined_if_one_is_part_of_the_other():
    """Golds: brown chair, chair. Strict, refined: "A chair." 1, 1; "chairs" 0, 1 (it holds chair); "own" 0, 1 (brownchair holds it); "desk" 0, 0;
    an answer that is not read 0, 1. Sums 1 and 4 of 5, and 4 of 5 are read."""
    right = answers("brown chair", "the chair")
    result = score(TASKS["scanqa"], [Answer(text=t) for t in ("A chair.", "chairs", "own", "desk")] + [Answer(text=" ", error="no text")], [right] * 5)
    assert result == {"metric": pytest.approx(1 / 5), "parsed": pytest.approx(4 / 5), "n": 5, "all": {"refined": pytest.approx(4 / 5)}}
    assert metric("scanqa", Answer(text="..."), answers("?")) == 0                     # nothing is not equal to nothing


def test_a_situated_answer_as_pave_and_as_crema_counts_it():
    """Strict, refined, substring of the gold, by answer:
    "It is two" and another line, for "two": 0, 1 (itistwoorthree holds it), 1 (the last word of its first line); "2" for "two": 1, 1, 1; "a" for "table": 0, 1, 1;
    "brown, chair" for "brown chair": 1, 1, 1; "chair brown" for "brown chair": 0, 0, 0 (two words are no part of it); "tables", a blank and another line, for "table": 0, 1, 0;
    not read, for "yes": 0, 1, 1. Sums 2, 6, 5 of 7."""
    said = ["It is two\nor three", "2", "a", "brown, chair", "chair brown", "tables \nof wood"]
    golds = [answers(text) for text in ("two", "two", "table", "brown chair", "brown chair", "table", "yes")]
    result = score(TASKS["sqa3d"], [Answer(text=t) for t in said] + [Answer(text="", error="no text")], golds)
    assert result["metric"] == pytest.approx(2 / 7)
    assert result["all"] == {"refined": pytest.approx(6 / 7), "substring_of_gold": pytest.approx(5 / 7)}


def test_an_answer_in_a_dialogue_is_scored_like_a_caption():
    """"he runs" for "he sleeps", and "she runs" as it should be. ROUGE-L: 2 * 1 / (2 + 2) and 1. CIDEr: every word is in one gold only, so weights are
    alike; 1 of 2 words and 0 of 1 pairs, 10 * .5 / 4; all words and the pair, 10 * 2 / 4."""
    result = score(TASKS["avsd"], [Answer(text="He runs."), Answer(text="she runs")], [Answer(text="he sleeps"), Answer(text="she runs")])
    assert result["metric"] == pytest.approx((.5 + 1) / 2) and result["all"] == {"cider_own_words": pytest.approx((1.25 + 5) / 2)}


def random_gold(task, rng):
    spans, label, x = [sorted(rng.sample(range(11), 2))], rng.choice(["dog", "cat", "bell"]), rng.randint(0, 100)
    if task.form.name in ("event", "events"):
        return event(label, *spans)
    if task.form.name == "av_events":
        return Answer(audio_events=[(label, spans)], visual_events=[("dog", spans)])
    if task.form.name == "text":
        return Answer(text=" ".join(rng.choices("a the dog cat barks sleeps under table".split(), k=12)))
    if task.form.name == "choice":
        return Answer(choice=rng.choice(["one", "two", "two"]))
    exists = rng.random() < .6 if task.form.name == "exists" else None
    return boxes(exists=False) if exists is False else boxes((x, x, x + 50, x + 60), exists=exists)


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_every_task_scores_its_golds_1_unreadable_answers_0_and_constants_between(task):
    rng = random.Random(task.name)
    golds = [random_gold(task, rng) for _ in range(100)]
    assert score(task, golds, golds)["metric"] == pytest.approx(1) and score(task, golds, golds)["parsed"] == 1
    lost = score(task, [ERROR] * 100, golds)
    assert lost["metric"] == lost["parsed"] == 0 and lost["all"].keys() == score(task, golds, golds)["all"].keys()
    start = time.perf_counter()
    best, answer = best_constant(task, golds, golds)
    assert 0 < best < 1 and score(task, [answer] * 100, golds)["metric"] == best
    assert time.perf_counter() - start < 5


def test_the_best_constant_is_the_majority_or_the_median_box():
    golds = [Answer(choice="yes")] * 6 + [Answer(choice="no")] * 4
    assert best_constant(TASKS["avqa"], golds, golds) == (.6, Answer(choice="yes"))
    candidates = [boxes((0, 0, 100, 60)), boxes((0, 40, 60, 100)), boxes((50, 20, 100, 100))]
    assert best_constant(TASKS["arig"], candidates, [boxes((0, 20, 100, 100))]) == (1, boxes((0, 20, 100, 100)))
    with pytest.raises(ValueError, match="avqa: no answers"):
        best_constant(TASKS["avqa"], [], golds)


def test_lists_must_match():
    with pytest.raises(ValueError, match="1 predictions for 2"):
        score(TASKS["avqa"], [ERROR], [ERROR, ERROR])
