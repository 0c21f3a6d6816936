"""Scorers as their authors released them, where they are lenient or odd.

Each stands beside a strict metric of metrics.py, so that a run can be compared with published
numbers. Crab and Crab+ release no scorer for AVE and MUSIC-AVQA; those here are MokA's, from the
same laboratory. `substring_released` takes lists of predicted and gold Answers; the others take one
pair, and their number is the mean over the set.

Page of the course: docs/course/53_metrics.md.
"""

import re
from statistics import fmean

from crab_min.answers import NUMBER_WORDS, Answer
from crab_min.evaluation.canonical import canonical_choice, canonical_text, label_per_second

# The score of an answer that does not parse, where it is not 0. The AVE scorer fills its arrays for
# parsed clips alone and divides by all: the others count as ten correct background seconds.
UNPARSED_SCORES = {"segment_accuracy_released": 1.0}


def segment_accuracy_released(prediction: Answer, gold: Answer) -> float:
    """Score AVE as MokA's ave_eval.py does: a span includes the second at its end."""
    predicted = label_per_second(prediction, end_inclusive=True)
    expected = label_per_second(gold, end_inclusive=True)
    return fmean(p == g for p, g in zip(predicted, expected))


def substring_released(predictions: list[Answer], golds: list[Answer]) -> dict[str, float]:
    """Score MUSIC-AVQA as MokA's avqa_eval.py: is the gold label part of the answer?

    "piano" is right for "no". Answers outside the vocabulary, here the gold labels of the set, are
    left out; `counted_released` is the share of the answers that are not.
    """
    vocabulary = {canonical_choice(gold) for gold in golds}
    correct = []
    for prediction, gold in zip(predictions, golds):
        if canonical_choice(prediction) in vocabulary:
            correct.append(str(gold.choice).lower() in str(prediction.choice).lower())
    return {
        "substring_released": fmean(correct) if correct else 0.0,
        "counted_released": len(correct) / len(golds),
    }


def gold_in_answer(prediction: Answer, gold: Answer) -> bool:
    """Score MUSIC-AVQA as PAVE's calculate_acc.py: is the gold label part of the answer?

    Letters are small on both sides; an answer of any length counts, and none is left out.
    """
    text = prediction.text if prediction.choice is None else prediction.choice
    return str(gold.choice).lower() in text.lower()


def part_of_gold(prediction: Answer, gold: Answer) -> bool:
    """Score MUSIC-AVQA as CREMA's task `gqa`: is the answer part of the gold label?

    "guitar" is right for "acoustic guitar", and "a" for "piano". A missing answer is compared as
    "unanswerable". Labels are in canonical form, where CREMA writes 1 to 10 as words and the
    underscores of the gold label as spaces.
    """
    return (canonical_choice(prediction) or "unanswerable") in canonical_choice(gold)


def refined(prediction: Answer, gold: Answer) -> bool:
    """Score ScanQA and SQA3D by refined exact match.

    It is that of PAVE's scanqa_evaluator.py, which comes from LEO. Without spaces, a gold text is
    part of the answer or the answer is part of a gold text. "no" is right for "piano", and so is an
    empty answer, which is part of everything.
    """
    predicted_text = without_spaces(prediction.text)
    gold_texts = [without_spaces(text) for text in gold.choices or (gold.text,)]
    return any(predicted_text in text or text in predicted_text for text in gold_texts)


def without_spaces(text: str) -> str:
    return canonical_text(text).replace(" ", "")


def substring_of_gold(prediction: Answer, gold: Answer) -> bool:
    """Score SQA3D as CREMA's task `sqa3d`: is the answer part of the gold text?

    CREMA calls this EM. "a" is right for "table", and so is an empty answer. Only the first gold
    text counts. Of the answer only the first line counts, and where the gold text is one word only
    the last word of this line; it is compared in lower case, without commas, with 1 to 10 as words.
    """
    line = prediction.text.replace(",", "").strip().split("\n")[0].rstrip().lower()
    gold_is_one_word = " " not in gold.text
    predicted_text = line.split(" ")[-1] if gold_is_one_word else line
    if re.fullmatch("[1-9]|10", predicted_text):
        predicted_text = NUMBER_WORDS[int(predicted_text)]
    return predicted_text in gold.text
