"""The metrics of every task, on answers worked out by hand.

tests/test_goldens.py compares them with the authors' own scorers.
"""

import random
import time

import pytest

from crab_min.answers import Answer
from crab_min.data import Sample
from crab_min.errors import DataError
from crab_min.evaluation.canonical import canonical_text
from crab_min.evaluation.lenient import lenient_metrics
from crab_min.evaluation.metrics import best_constant, score
from crab_min.evaluation.scores import score_all, training_table
from crab_min.tasks import TASKS

UNPARSED = Answer(error="no tag", text="...")


def main_number(task, prediction, gold):
    return score(TASKS[task], [prediction], [gold])["metric"]


def choices(*labels):
    return [Answer(choice=label) for label in labels]


def event(label, *spans):
    return Answer(events=[(label, list(spans))])


def boxes(*boxes, exists=None):
    return Answer(boxes=list(boxes), exists=exists)


def texts(*texts):
    """Return a gold answer with several right texts."""
    return Answer(text=texts[0], choices=texts)


# --- labels ---------------------------------------------------------------------------------------
def test_accuracy_counts_unparsed_answers_as_wrong():
    predictions = [*choices("Yes.", "no"), UNPARSED, *choices("yes")]
    result = score(TASKS["avqa"], predictions, choices("yes", "yes", "yes", "yes"))
    assert (result["metric"], result["parsed"], result["n"]) == (0.5, 0.75, 4)


@pytest.mark.parametrize(
    ("task", "prediction", "gold", "expected"),
    [
        ("ucf", "playing violin", "PlayingViolin", 1),
        ("avqa", "2", "two", 1),
        ("avqa", "no", "piano", 0),  # a part of the label is not enough
    ],
)
def test_labels_are_compared_in_canonical_form(task, prediction, gold, expected):
    assert main_number(task, *choices(prediction, gold)) == expected


def test_an_option_is_right_by_text_index_or_letter():
    row = {"answer": 2, "multi_choice": ["rain", "dog", "Cat"]}
    gold = TASKS["avqa_thu"].gold_answer(row)
    for label in ("cat", "2", "C"):
        assert main_number("avqa_thu", Answer(choice=label), gold) == 1
    for label in ("dog", "1"):
        assert main_number("avqa_thu", Answer(choice=label), gold) == 0


def test_emotions_by_class():
    """Of three joy two are found, of one anger one, of one fear none.

    joy: recall 2/3, F1 4/5; anger, which is predicted twice: recall 1, F1 2/3. An unparsed answer
    is of no class.
    """
    golds = choices("joy", "joy", "joy", "anger", "fear")
    predictions = [*choices("Joy", "joy", "anger", "anger"), UNPARSED]
    result = score(TASKS["meld"], predictions, golds)
    assert result["metric"] == 0.6
    assert result["all"] == {
        "uar": pytest.approx((2 / 3 + 1 + 0) / 3),
        "weighted_f1": pytest.approx((3 * 4 / 5 + 1 * 2 / 3 + 0) / 5),
    }


def test_the_released_avqa_scorer_takes_parts_of_words_and_leaves_out_answers_that_are_no_gold():
    """ "piano" contains "no" and is right, "guitar" is not a gold label and is not counted."""
    predictions = [*choices("piano", "two", "guitar"), UNPARSED]
    result = score(TASKS["avqa"], predictions, choices("no", "two", "two", "piano"))
    assert result["metric"] == 0.25
    assert result["all"] == {
        "substring_released": 1,
        "counted_released": 0.5,
        "gold_in_answer": 0.5,
        "part_of_gold": 0.25,
    }


def test_cremas_avqa_score_takes_an_answer_that_is_part_of_the_gold():
    """Right: "guitar", "2" and "no". Wrong: more than the gold label, and an unparsed answer."""
    predictions = [*choices("guitar", "2", "no", "acoustic guitar"), UNPARSED]
    golds = choices("acoustic guitar", "two", "piano", "guitar", "yes")
    result = score(TASKS["avqa"], predictions, golds)
    assert result["metric"] == 1 / 5 and result["all"]["part_of_gold"] == 3 / 5


def test_paves_scorer_looks_for_the_gold_label_in_any_answer():
    predictions = choices("There are two of them", "no piano", "None")
    golds = choices("two", "no", "yes")
    assert score(TASKS["avqa"], predictions, golds)["all"]["gold_in_answer"] == 2 / 3


# --- events ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        (event("violin, fiddle", (0, 6)), 1),
        (event("violin, fiddle", (2, 8)), 0.6),
        (event("violin, fiddle", (0, 2), (4, 9999)), 0.4),
        (event("dog", (0, 6)), 0.4),  # the background is right
    ],
)
def test_ave_counts_seconds_with_the_right_label(prediction, expected):
    gold = event("Violin, fiddle", (0, 6))
    assert main_number("ave", prediction, gold) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("task", "duration", "spans", "expected"),
    [
        ("ave", 0, [(15, 20)], 1),
        ("ave", 0, [(30, 40)], 25 / 40),  # to 40 s: 5 missed, 10 invented
        ("ave", 60, [(30, 40)], 45 / 60),
        ("ave", 60, [(15, 20), (50, 60)], 50 / 60),
        ("ave", 0, [(0, 5)], 10 / 20),  # to 20 s: 5 missed, 5 invented
        ("unav", 0, [(15, 20)], 1),
        ("unav", 0, [(30, 40)], 0),
        ("unav", 0, [(10, 20)], 2 * 5 / 15),
        ("unav", 60, [(15, 20), (50, 60)], 2 * 5 / 20),
        ("avvp", 0, [(15, 20)], 1),
        ("avvp", 0, [(30, 40)], 0),
        ("avvp", 60, [(10, 20)], 2 * 5 / 15),
    ],
)
def test_events_after_ten_seconds_count(task, duration, spans, expected):
    gold = event("dog", (15, 20))
    prediction = event("dog", *spans)
    if task == "avvp":
        gold = Answer(audio_events=gold.events, visual_events=gold.events)
        prediction = Answer(audio_events=prediction.events, visual_events=prediction.events)
    gold.seconds = duration
    assert main_number(task, prediction, gold) == pytest.approx(expected)


def test_unav_at_its_real_length():
    """Two events in a minute: speech to the end is right, a second dog is not."""
    gold = Answer(events=[("dog", [(2, 7), (41, 45)]), ("speech", [(20, 60)])])
    prediction = Answer(events=[("dog", [(2, 7), (50, 54)]), ("speech", [(20, 60)])])
    result = score(TASKS["unav"], [prediction], [gold])
    assert result["metric"] == pytest.approx((2 * 5 / 18 + 1) / 2)
    assert result["all"]["miou"] == pytest.approx((1 + 0 + 1) / 3)
    assert result["all"]["f1_at_50"] == pytest.approx(2 * 2 / 6)


def test_a_row_may_name_the_length_of_its_clip():
    row = {"event": "Dog", "start_time": 2, "end_time": 8, "duration": 59.6}
    gold = TASKS["ave"].gold_answer(row)
    assert gold.seconds == 60
    assert main_number("ave", event("dog", (2, 8), (40, 50)), gold) == pytest.approx(50 / 60)


def test_the_released_ave_scorer_includes_the_end_and_counts_unparsed_answers_as_right():
    gold = event("Violin, fiddle", (0, 6))
    result = score(TASKS["ave"], [UNPARSED, event("violin, fiddle", (0, 3))], [gold, gold])
    assert result["metric"] == pytest.approx((0 + 0.7) / 2) and result["parsed"] == 0.5
    assert result["all"]["segment_accuracy_released"] == pytest.approx((1 + 0.7) / 2)


def test_an_event_that_is_no_class_does_not_count_as_parsed():
    gold = event("Violin, fiddle", (0, 6))
    result = score(TASKS["ave"], [event("dog", (0, 6))], [gold], labels=["Violin, fiddle"])
    assert result["parsed"] == 0


def test_avvp_main_number_is_the_mean_of_audio_visual_and_both():
    gold = Answer(audio_events=[("Dog", [(0, 10)])], visual_events=[("Dog", [(0, 4)])])
    assert main_number("avvp", gold, gold) == 1
    audio_alone = Answer(audio_events=[("dog", [(0, 10)])])
    result = score(TASKS["avvp"], [audio_alone, UNPARSED], [gold, gold])
    assert result["all"]["segment_audio"] == 0.5 and result["all"]["segment_visual"] == 0
    assert result["metric"] == pytest.approx(1 / 6) and result["parsed"] == 0.5


def test_unav_is_the_mean_over_classes():
    gold = Answer(events=[("dog", [(0, 4)]), ("cat", [(5, 10)])])
    assert main_number("unav", gold, gold) == 1
    assert main_number("unav", event("dog", (0, 4)), gold) == 0.5
    assert main_number("unav", event("dog", (2, 6)), event("dog", (0, 4))) == 0.5
    assert main_number("unav", Answer(), Answer()) == 1  # nothing to find, nothing predicted


def test_unav_spans_are_matched_one_to_one():
    """dog 0-4 has IoU 1, dog 1-5 has 3/5 with a span that is taken, cat 5-10 has 1/2."""
    gold = Answer(events=[("dog", [(0, 4), (6, 10)]), ("cat", [(0, 10)])])
    prediction = Answer(events=[("dog", [(0, 4), (1, 5)]), ("Cat", [(5, 10)])])
    assert score(TASKS["unav"], [prediction], [gold])["all"] == {
        "miou": pytest.approx((1 + 0 + 0.5) / 3),
        "f1_at_30": pytest.approx(2 * 2 / 6),
        "f1_at_50": pytest.approx(2 * 2 / 6),
        "f1_at_70": pytest.approx(2 * 1 / 6),
    }


# --- boxes ----------------------------------------------------------------------------------------
BOX, HALF, ELSEWHERE = (0, 0, 10, 10), (0, 0, 10, 5), (100, 100, 120, 120)


@pytest.mark.parametrize("task", ["arig", "s4"])
def test_the_first_box_counts(task):
    gold = boxes(BOX)
    assert main_number(task, boxes(BOX), gold) == 1
    assert main_number(task, boxes(HALF), gold) == 0.5
    assert main_number(task, boxes(ELSEWHERE, BOX), gold) == 0
    assert main_number(task, UNPARSED, gold) == 0
    assert main_number(task, boxes(BOX), boxes()) == 0
    empty = boxes((5, 5, 5, 5))
    assert main_number(task, empty, empty) == 0  # no division by its area


def test_arig_reports_the_share_at_one_half_and_the_area_under_the_share():
    """An IoU of .5 reaches 10.5 of 20 steps between thresholds, an IoU of 0 half a step."""
    result = score(TASKS["arig"], [boxes(HALF), boxes(ELSEWHERE)], [boxes(BOX), boxes(BOX)])
    assert result["all"] == {"iou_at_50": 0.5, "auc": pytest.approx((0.525 + 0.025) / 2)}


def test_ms3_matches_all_boxes():
    assert main_number("ms3", boxes(ELSEWHERE, BOX), boxes(BOX, ELSEWHERE)) == 1
    assert main_number("ms3", boxes(BOX), boxes(BOX, ELSEWHERE)) == 0.5
    assert main_number("ms3", boxes(HALF, BOX), boxes(BOX)) == 0.5
    assert main_number("ms3", UNPARSED, boxes()) == 0


def test_ref_avs_scores_existence_and_box():
    here, absent = boxes(BOX, exists=True), boxes(exists=False)
    predictions = [boxes(HALF, exists=True), absent, here, absent, UNPARSED]
    result = score(TASKS["ref_avs"], predictions, [here, absent, absent, here, absent])
    assert result["metric"] == pytest.approx(1.5 / 5) and result["parsed"] == 0.8
    assert result["all"] == {"existence": pytest.approx(2 / 5)}


# --- texts ----------------------------------------------------------------------------------------
def test_rouge_l():
    gold = Answer(text="a dog barks at a cat")
    assert main_number("avcap", Answer(text="A dog barks at a cat."), gold) == 1
    assert main_number("avcap", Answer(text="cat dog at"), gold) == pytest.approx(2 * 2 / 9)
    assert main_number("avcap", Answer(text="..."), gold) == 0


def test_cider_by_hand():
    """Every word is in one of two captions, so all weights are log 2.

    Captions of two words have no 3-grams and 4-grams. Of the words of the first prediction 1 of 2
    is right and 0 of 1 pairs, so the cosines are 1/2 and 0; its length is right.
    """
    golds = [Answer(text="dog barks"), Answer(text="cat sleeps")]
    perfect = score(TASKS["avcap"], golds, golds)["all"]["cider_own_words"]
    assert perfect == pytest.approx(10 * (1 + 1 + 0 + 0) / 4)
    predictions = [Answer(text="Dog, sleeping!"), UNPARSED]
    half = score(TASKS["avcap"], predictions, golds)["all"]["cider_own_words"]
    assert half == pytest.approx(10 * 0.5 / 4 / 2)


def test_texts_with_several_right_answers_by_hand():
    """BLEU-4, ROUGE-L and CIDEr as pycocoevalcap defines them, all right answers as references."""
    golds = [texts("a dog barks at the red door", "the dog barks"), texts("no")]
    predictions = [Answer(text="the dog barks at the red door"), Answer(text="no")]
    numbers = score(TASKS["scanqa"], predictions, golds)["all"]
    # n-grams that a reference has: 6 + 1 of 7 + 1 words ("the" once), all pairs, all triples, and
    # of the four groups of four words all but the first
    assert numbers["bleu_4_own_words"] == pytest.approx((7 / 8 * 3 / 4) ** (1 / 4))
    # precision 6/7 by the first reference, recall 1 by the second
    precision, recall = 6 / 7, 1.0
    f = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert numbers["rouge_l_coco_own_words"] == pytest.approx((f + 1) / 2)
    # a reference that is the prediction itself counts half, the other one does not lower it twice
    same = score(TASKS["scanqa"], [golds[0], golds[1]], golds)["all"]["cider_own_words"]
    alone = [texts(gold.text) for gold in golds]
    assert 0 < same < score(TASKS["scanqa"], alone, alone)["all"]["cider_own_words"]

    wrong = [Answer(text="x y", error="no text"), Answer(text="yes")]
    numbers = score(TASKS["scanqa"], wrong, golds)["all"]
    assert numbers["bleu_4_own_words"] == numbers["cider_own_words"] == 0


def test_an_answer_in_a_dialogue_is_scored_like_a_caption():
    """ "he runs" for "he sleeps": 1 of 2 words, 0 of 1 pairs. "she runs" is right."""
    predictions = [Answer(text="He runs."), Answer(text="she runs")]
    golds = [Answer(text="he sleeps"), Answer(text="she runs")]
    result = score(TASKS["avsd"], predictions, golds)
    assert result["metric"] == pytest.approx((0.5 + 1) / 2)
    cider = 10 * 0.5 / 4, 10 * (1 + 1) / 4
    assert result["all"] == {"cider_own_words": pytest.approx(sum(cider) / 2)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The 2 chairs.", "two chairs"),
        (" A brown_chair,\nleft", "brown chair left"),
        ("20", "twenty"),
        ("21", "21"),
        ("a", "a"),
        ("?!", ""),
        ("The theatre", "theatre"),
    ],
)
def test_free_answers_are_compared_without_articles_signs_and_digits(text, expected):
    assert canonical_text(text) == expected


@pytest.mark.parametrize(
    ("prediction", "strict", "refined"),
    [
        (Answer(text="A chair."), 1, 1),
        (Answer(text="chairs"), 0, 1),  # contains "chair"
        (Answer(text="own"), 0, 1),  # is part of "brownchair"
        (Answer(text="desk"), 0, 0),
        (Answer(text=" ", error="no text"), 0, 1),  # nothing is part of everything
    ],
)
def test_a_scene_answer_is_right_if_it_equals_any_gold_and_refined_if_one_is_part_of_the_other(
    prediction, strict, refined
):
    result = score(TASKS["scanqa"], [prediction], [texts("brown chair", "the chair")])
    assert result["metric"] == strict and result["all"]["refined"] == refined


def test_an_empty_answer_never_matches_exactly():
    assert main_number("scanqa", Answer(text="..."), texts("?")) == 0


@pytest.mark.parametrize(
    ("text", "gold", "strict", "refined", "substring"),
    [
        # "itistwoorthree" contains "two", and "two" is the last word of the first line
        ("It is two\nor three", "two", 0, 1, 1),
        ("2", "two", 1, 1, 1),
        ("a", "table", 0, 1, 1),
        ("brown, chair", "brown chair", 1, 1, 1),
        ("chair brown", "brown chair", 0, 0, 0),
        ("tables \nof wood", "table", 0, 1, 0),
        ("", "yes", 0, 1, 1),
    ],
)
def test_a_situated_answer_as_pave_and_as_crema_count_it(text, gold, strict, refined, substring):
    prediction = Answer(text=text, error=None if text else "no text")
    result = score(TASKS["sqa3d"], [prediction], [texts(gold)])
    assert result["metric"] == strict
    assert result["all"] == {"refined": refined, "substring_of_gold": substring}


# --- every task -----------------------------------------------------------------------------------
def random_gold(task, rng):
    span = tuple(sorted(rng.sample(range(11), 2)))
    label = rng.choice(["dog", "cat", "bell"])
    form = task.form.name
    if form in ("event", "events"):
        return event(label, span)
    if form == "av_events":
        return Answer(audio_events=[(label, [span])], visual_events=[("dog", [span])])
    if form == "text":
        words = rng.choices("a the dog cat barks sleeps under table".split(), k=12)
        return Answer(text=" ".join(words))
    if form == "choice":
        return Answer(choice=rng.choice(["one", "two", "two"]))
    if form == "exists" and rng.random() > 0.6:
        return boxes(exists=False)
    x = rng.randint(0, 100)
    return boxes((x, x, x + 50, x + 60), exists=True if form == "exists" else None)


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_golds_score_1_unparsed_answers_0_and_constants_between(task):
    rng = random.Random(task.name)
    golds = [random_gold(task, rng) for _ in range(100)]
    perfect = score(task, golds, golds)
    assert perfect["metric"] == pytest.approx(1) and perfect["parsed"] == 1
    unparsed = score(task, [UNPARSED] * 100, golds)
    assert unparsed["metric"] == unparsed["parsed"] == 0
    assert unparsed["all"].keys() == perfect["all"].keys()

    start = time.perf_counter()
    best, answer = best_constant(task, golds, golds)
    assert time.perf_counter() - start < 5
    assert 0 < best < 1 and score(task, [answer] * 100, golds)["metric"] == best


def test_the_best_constant_is_the_majority_or_the_median_box():
    golds = choices(*["yes"] * 6, *["no"] * 4)
    assert best_constant(TASKS["avqa"], golds, golds) == (0.6, Answer(choice="yes"))
    candidates = [boxes((0, 0, 100, 60)), boxes((0, 40, 60, 100)), boxes((50, 20, 100, 100))]
    median = boxes((0, 20, 100, 100))
    assert best_constant(TASKS["arig"], candidates, [median]) == (1, median)
    with pytest.raises(DataError, match="avqa: no answers"):
        best_constant(TASKS["avqa"], [], golds)


def test_lists_must_match():
    with pytest.raises(ValueError, match="1 predictions for 2"):
        score(TASKS["avqa"], [UNPARSED], [UNPARSED, UNPARSED])


# --- the frozen base ------------------------------------------------------------------------------
GUITARS = ("guitar", "acoustic guitar", "drum")


@pytest.mark.parametrize(
    "task, text, right",
    [
        ("avqa", "It is an Acoustic guitar.", 1),
        ("avqa", "<answer> acoustic guitar</answer>", 1),
        ("avqa", "A guitar.", 0),
        ("avqa", "The acoustic guitar or the drum", 0),
        ("avqa", "I cannot say", 0),
        ("avqa_thu", "(B)", 1),
        ("avqa_thu", "B. acoustic guitar", 1),
        ("a2v", "Video two fits.", 1),
    ],
)
def test_a_base_without_tags_is_right_where_it_names_the_label_alone(task, text, right):
    golds = {
        "avqa": Answer(choice="acoustic guitar"),
        "avqa_thu": Answer(choice="acoustic guitar", choices=GUITARS),
        "a2v": Answer(choice="two"),
    }
    sample = Sample("0", TASKS[task], [], "", golds[task], {})
    known = [Sample("1", TASKS[task], [], "", Answer(choice=name), {}) for name in GUITARS]
    assert lenient_metrics([sample], [text], known) == {task: right}
    # the trained model is scored strictly
    assert score_all([sample], [text])[task]["metric"] == (right and "<answer>" in text)


def test_events_and_boxes_have_no_lenient_score():
    sample = Sample("0", TASKS["ave"], [], "", Answer(events=[("dog", [(0, 3)])]), {})
    assert lenient_metrics([sample], ["A dog."], []) == {}


def test_a_table_without_a_baseline_has_a_dash():
    result = {"name": "accuracy", "metric": 1.0, "constant": 0.5, "parsed": 1.0, "n": 4}
    with_base = {**result, "base": 0.25}
    lines = training_table({"ks": result, "ucf": with_base}).splitlines()
    assert lines[1].split() == ["ks", "accuracy", "-", "1.000", "0.500", "1.00", "4"]
    assert lines[2].split() == ["ucf", "accuracy", "0.250", "1.000", "0.500", "1.00", "4"]
    assert lines[1].index("1.000") == lines[2].index("1.000")
