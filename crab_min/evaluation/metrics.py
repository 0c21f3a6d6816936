"""Strict metrics of answers: functions (prediction, gold) -> numbers in [0, 1].

    key          main number
    accuracy     1 where the canonical labels are equal
    segments     AVE: share of the seconds that have the right label
    event_f      UnAV: F over seconds, averaged over classes
    av_event_f   AVVP: segment F, averaged over audio, visual and audio-visual events
    first_box    ARIG, S4: IoU of the first box
    all_boxes    MS3: matched IoUs over the larger number of boxes
    exists_box   Ref-AVS: IoU, or 1 for a correct "false"
    rouge_l      captions: F1 of the longest common subsequence of words
    exact_match  ScanQA, SQA3D: 1 where the canonical text is one of the gold texts

A metric returns its main number under "metric", with other numbers that papers report. Numbers that
need a whole set of answers, such as CIDEr, are in the table SETS; those of texts are in
text_metrics.py. An answer that does not parse scores 0; it is counted, never dropped. The end of a
span is exclusive. Clips may be longer than the 10 seconds of AVE and LLP (canonical.clip_seconds).
Scorers that differ, as the authors released them, are in released_metrics.py; the metrics of masks
are in mask_metrics.py.
"""

from collections import Counter
from statistics import fmean, median_low
from typing import NamedTuple

from crab_min.answers import EXISTS, Answer, Box, normalize_label
from crab_min.errors import DataError
from crab_min.evaluation import released_metrics, text_metrics
from crab_min.evaluation.canonical import (
    canonical_choice,
    canonical_text,
    clip_seconds,
    label_per_second,
    seconds_by_class,
)
from crab_min.evaluation.text_metrics import common_words, words_of
from crab_min.tasks import Task


# --- labels ---------------------------------------------------------------------------------------
def accuracy(prediction: Answer, gold: Answer) -> dict[str, float]:
    """Compare two labels; the options of the question are those of the gold answer."""
    predicted_label = normalize_label(prediction.choice, gold.choices)
    gold_label = normalize_label(gold.choice, gold.choices)
    return {"metric": float(predicted_label == gold_label)}


def by_class(predictions: list[Answer], golds: list[Answer]) -> dict[str, float]:
    """Return UAR and weighted F1 of a set of emotion labels; WAR is the accuracy.

    UAR: recall, averaged over the gold classes. Weighted F1: F1 of each gold class, weighted by the
    number of its samples.
    """
    # Numbers of samples of each class
    predicted_labels = [canonical_choice(prediction) for prediction in predictions]
    gold_labels = [canonical_choice(gold) for gold in golds]
    predicted, expected = Counter(predicted_labels), Counter(gold_labels)
    correct = Counter(g for p, g in zip(predicted_labels, gold_labels) if p == g)

    recalls, weighted_f1s = [], []
    for label, n in expected.items():
        recalls.append(correct[label] / n)
        weighted_f1s.append(n * 2 * correct[label] / (predicted[label] + n))
    return {"uar": fmean(recalls), "weighted_f1": sum(weighted_f1s) / len(golds)}


# --- events ---------------------------------------------------------------------------------------
def segment_accuracy(prediction: Answer, gold: Answer) -> dict[str, float]:
    """Return the share of the seconds that have the right label, for AVE.

    A second without the event is right where the gold answer has none there either. The seconds are
    those of the clip.
    """
    count = clip_seconds(prediction, gold)
    labels = zip(label_per_second(prediction, count), label_per_second(gold, count))
    correct = [predicted == expected for predicted, expected in labels]
    released = released_metrics.segment_accuracy_released(prediction, gold)
    return {"metric": fmean(correct), "segment_accuracy_released": released}


class Counts(NamedTuple):
    """Numbers of seconds, or of whole events, of one class."""

    correct: int
    predicted: int
    gold: int


def segment_counts(predicted: set[int], gold: set[int]) -> Counts:
    """Count the seconds of one class."""
    return Counts(len(predicted & gold), len(predicted), len(gold))


def event_counts(predicted: set[int], gold: set[int]) -> Counts:
    """Count the events of one class.

    A predicted event is correct if its IoU with any gold event is .5 or more.
    """
    predicted_events, gold_events = consecutive(predicted), consecutive(gold)
    correct = 0
    for event in predicted_events:
        correct += any(2 * len(event & other) >= len(event | other) for other in gold_events)
    return Counts(correct, len(predicted_events), len(gold_events))


def consecutive(seconds: set[int]) -> list[set[int]]:
    """Split seconds into events, which are maximal sets of consecutive seconds."""
    events: list[set[int]] = []
    for second in sorted(seconds):
        if second - 1 not in seconds:
            events.append(set())
        events[-1].add(second)
    return events


def f1(correct: int, predicted: int, gold: int) -> float:
    """Return F1 = 2 correct / (predicted + gold), or 1 where both of these are 0."""
    return 2 * correct / (predicted + gold) if predicted + gold else 1.0


def class_f(counts: list[Counts]) -> float:
    """Average F1 over the classes that are predicted or gold; 1 if there is none."""
    scores = [f1(*c) for c in counts if c.predicted + c.gold]
    return fmean(scores) if scores else 1.0


def event_f(prediction: Answer, gold: Answer) -> dict[str, float]:
    """Return F over seconds for UnAV, and what detection papers report of whole spans.

    metric: F over seconds, averaged over classes. miou: the best IoU of each gold span, averaged.
    f1_at_30, f1_at_50, f1_at_70: F1 of the spans, matched one to one at this IoU or more.
    """
    # F over seconds, by class
    predicted_seconds = seconds_by_class(prediction.events)
    gold_seconds = seconds_by_class(gold.events)
    counts = []
    for label in predicted_seconds.keys() | gold_seconds.keys():
        predicted_here = predicted_seconds.get(label, set())
        gold_here = gold_seconds.get(label, set())
        counts.append(segment_counts(predicted_here, gold_here))
    scores = {"metric": class_f(counts)}

    # The best IoU of each gold span
    predicted_spans, gold_spans = labelled_spans(prediction), labelled_spans(gold)
    overlaps = span_overlaps(predicted_spans, gold_spans)
    best_ious = [0.0] * len(gold_spans)
    for overlap, _, j in overlaps:
        best_ious[j] = max(best_ious[j], overlap)
    scores["miou"] = fmean(best_ious) if best_ious else float(not predicted_spans)

    # F1 of whole spans
    matched = match_one_to_one(overlaps)
    for percent, threshold in ((30, 0.3), (50, 0.5), (70, 0.7)):
        correct = sum(overlap >= threshold for overlap in matched)
        scores[f"f1_at_{percent}"] = f1(correct, len(predicted_spans), len(gold_spans))
    return scores


def labelled_spans(answer: Answer) -> list[tuple[str, int, int]]:
    """Return (canonical label, start, end) for each span of the events of an answer."""
    return [(normalize_label(label), *span) for label, spans in answer.events for span in spans]


def span_overlaps(predicted: list[tuple], gold: list[tuple]) -> list[tuple[float, int, int]]:
    """Return (IoU, index in predicted, index in gold) for spans that overlap.

    Only spans of one label are paired.
    """
    overlaps = []
    for i, (label, start, end) in enumerate(predicted):
        for j, (gold_label, gold_start, gold_end) in enumerate(gold):
            intersection = min(end, gold_end) - max(start, gold_start)
            if label == gold_label and intersection > 0:
                union = end - start + gold_end - gold_start - intersection
                overlaps.append((intersection / union, i, j))
    return overlaps


def match_one_to_one(overlaps: list[tuple[float, int, int]]) -> list[float]:
    """Match predictions to golds, the largest IoU first, and return these IoUs.

    overlaps: (IoU, index of the prediction, index of the gold); each index is matched once.
    """
    matched = []
    matched_predictions, matched_golds = set(), set()
    for overlap, i, j in sorted(overlaps, reverse=True):
        if i not in matched_predictions and j not in matched_golds:
            matched.append(overlap)
            matched_predictions.add(i)
            matched_golds.add(j)
    return matched


def av_event_f(prediction: Answer, gold: Answer) -> dict[str, float]:
    """Return AVVP's segment and event F.

    They are computed as in avvp_eval_metrics.py of Crab and Crab+, which is made for 10 seconds.

    metric: "type@AV" of segments, the mean of their audio, visual and audio-visual F.
    """
    count = clip_seconds(prediction, gold)
    predicted, expected = av_seconds(prediction, count), av_seconds(gold, count)
    segment = av_f_scores(predicted, expected, segment_counts)
    event = av_f_scores(predicted, expected, event_counts)
    scores = {"metric": fmean(segment[kind] for kind in ("audio", "visual", "audio_visual"))}
    scores |= {f"segment_{kind}": value for kind, value in segment.items()}
    scores |= {f"event_{kind}": value for kind, value in event.items()}
    return scores


def av_seconds(answer: Answer, count: int) -> dict[str, dict[str, set[int]]]:
    """Return {"audio" or "visual": {label: seconds}} of the first `count` seconds."""
    return {
        "audio": seconds_by_class(answer.audio_events, count),
        "visual": seconds_by_class(answer.visual_events, count),
    }


def av_f_scores(predicted: dict, gold: dict, count) -> dict[str, float]:
    """Return the F of one video for audio, visual, audio_visual and all events.

    audio_visual: seconds in which a class is both heard and seen. all: audio and visual counts of a
    class added up.

    Args:
        predicted, gold: {"audio" or "visual": {label: seconds}}.
        count: `segment_counts` or `event_counts`.
    """
    counts: dict[str, list[Counts]] = {"audio": [], "visual": [], "audio_visual": [], "all": []}
    for label in set().union(*predicted.values(), *gold.values()):
        # The seconds of this class, (predicted, gold)
        audio = predicted["audio"].get(label, set()), gold["audio"].get(label, set())
        visual = predicted["visual"].get(label, set()), gold["visual"].get(label, set())
        both = audio[0] & visual[0], audio[1] & visual[1]

        audio_counts, visual_counts = count(*audio), count(*visual)
        counts["audio"].append(audio_counts)
        counts["visual"].append(visual_counts)
        counts["audio_visual"].append(count(*both))
        counts["all"].append(Counts(*(a + v for a, v in zip(audio_counts, visual_counts))))
    return {kind: class_f(class_counts) for kind, class_counts in counts.items()}


# --- boxes ----------------------------------------------------------------------------------------
def iou(a: Box, b: Box) -> float:
    """Return the intersection over union of two boxes; 0 where neither has an area."""
    overlap = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    intersection = area(*overlap)
    union = area(*a) + area(*b) - intersection
    return intersection / max(union, 1e-9)


def area(x1: float, y1: float, x2: float, y2: float) -> float:
    """Return the area of a box, 0 where it is inside out (boxes that do not overlap)."""
    return max(x2 - x1, 0) * max(y2 - y1, 0)


def first_box(prediction: Answer, gold: Answer) -> dict[str, float]:
    """Return the IoU of the first box with the gold box.

    If the mask has several boxes, the best IoU counts.

    For ARIG as VGG-SS scores it: iou_at_50, whose mean is the share of IoUs of .5 or more (cIoU),
    and auc, the area under this share as a function of the threshold 0, .05, ..., 1.
    """
    if prediction.boxes and gold.boxes:
        best = max(iou(prediction.boxes[0], box) for box in gold.boxes)
    else:
        best = 0.0
    # The curve is 1 at each threshold that is reached, and falls to 0 on the way to the next
    reached = sum(best >= i / 20 for i in range(21))
    auc = min(reached - 0.5, 20) / 20
    return {"metric": best, "iou_at_50": float(best >= 0.5), "auc": auc}


def all_boxes(prediction: Answer, gold: Answer) -> dict[str, float]:
    """Match boxes one to one and return their summed IoUs over the number of boxes.

    This is the larger number, of predicted or of gold boxes.
    """
    overlaps = []
    for i, predicted_box in enumerate(prediction.boxes):
        for j, gold_box in enumerate(gold.boxes):
            overlaps.append((iou(predicted_box, gold_box), i, j))
    n = max(len(prediction.boxes), len(gold.boxes), 1)
    return {"metric": sum(match_one_to_one(overlaps)) / n}


def exists_box(prediction: Answer, gold: Answer) -> dict[str, float]:
    """Return the IoU where the object exists, and 1 where it does not.

    An answer that is wrong about the existence scores 0.
    """
    correct = float(prediction.exists == gold.exists)
    if correct and gold.exists:
        return {"metric": first_box(prediction, gold)["metric"], "existence": correct}
    return {"metric": correct, "existence": correct}


# --- texts ----------------------------------------------------------------------------------------
def rouge_l(prediction: Answer, gold: Answer) -> dict[str, float]:
    """Return F1 of the longest common subsequence (LCS) of words."""
    predicted, expected = words_of(prediction), words_of(gold)
    common = common_words(predicted, expected)
    return {"metric": 2 * common / max(len(predicted) + len(expected), 1)}


def exact_match(prediction: Answer, gold: Answer) -> dict[str, float]:
    """Return EM@1: is the canonical text one of the gold texts? An empty one never is."""
    gold_texts = [canonical_text(text) for text in gold.choices or (gold.text,)]
    text = canonical_text(prediction.text)
    return {"metric": float(text != "" and text in gold_texts)}


# --- a task ---------------------------------------------------------------------------------------
# Keys as in tasks.py and metrics.json. Of one sample: (prediction, gold) -> numbers
METRICS = {
    "accuracy": accuracy,
    "segments": segment_accuracy,
    "event_f": event_f,
    "av_event_f": av_event_f,
    "first_box": first_box,
    "all_boxes": all_boxes,
    "exists_box": exists_box,
    "rouge_l": rouge_l,
    "exact_match": exact_match,
}
# Of a whole set: (predictions, golds) -> numbers
SETS = {
    "by_class": by_class,
    "bleu_4": text_metrics.bleu_4,
    "cider": text_metrics.cider,
    "rouge_l_coco": text_metrics.rouge_l_coco,
    "substring_released": released_metrics.substring_released,
}
# As released: (prediction, gold) -> right or wrong; the number is the share of right answers
SHARES = {
    "gold_in_answer": released_metrics.gold_in_answer,
    "part_of_gold": released_metrics.part_of_gold,
    "refined": released_metrics.refined,
    "substring_of_gold": released_metrics.substring_of_gold,
}


def score(
    task: Task,
    predictions: list[Answer],
    golds: list[Answer],
    labels: list[str] | None = None,
    whole: bool = True,
) -> dict:
    """Score the answers of one task.

    Args:
        predictions, golds: answers of the same samples.
        labels: the classes of `ave`, if known. An event of another class counts as an answer that
            does not parse, as in the released scorer.
        whole: compute the further numbers of the set (SETS, SHARES) too, which take longer.

    Returns:
        {"metric": main number, "parsed": share of answers that parse, "n": samples, "all": the
        other numbers by name}, as fractions.

    Raises:
        ValueError: the lists differ in length or are empty.
    """
    if len(predictions) != len(golds) or not golds:
        raise ValueError(
            f"{task.name}: {len(predictions)} predictions for {len(golds)} golds; "
            f"expected one for each"
        )
    measure = METRICS[task.metric]
    classes = {normalize_label(label) for label in labels or ()}

    # The numbers of each sample
    results, parsed = [], []
    for prediction, gold in zip(predictions, golds):
        is_parsed = prediction.error is None and has_known_labels(prediction, classes)
        if is_parsed:
            result = measure(prediction, gold)
        else:
            names = measure(gold, gold)
            result = {name: released_metrics.UNPARSED_SCORES.get(name, 0.0) for name in names}
        parsed.append(is_parsed)
        results.append(result)

    # Their means, and the numbers of the set
    numbers = {}
    for name in results[0]:
        numbers[name] = fmean(result[name] for result in results)
    main_number = numbers.pop("metric")
    if whole:
        for name in task.set_metrics:
            if name in SETS:
                numbers |= SETS[name](predictions, golds)
            else:
                numbers[name] = fmean(map(SHARES[name], predictions, golds))
    return {"metric": main_number, "parsed": fmean(parsed), "n": len(golds), "all": numbers}


def has_known_labels(answer: Answer, classes: set[str]) -> bool:
    """Tell whether all events have labels of `classes`.

    Every label does if `classes` is empty.
    """
    return not classes or all(normalize_label(label) in classes for label, _ in answer.events)


def best_constant(
    task: Task, candidates: list[Answer], golds: list[Answer]
) -> tuple[float, Answer]:
    """Find the one answer that scores best when it is given to all samples.

    candidates: training answers. The 50 most frequent are tried and, for boxes, the median of each
    coordinate. Returns its score and the answer. Raises DataError where there are no candidates.
    """
    # The most frequent answers
    by_text = {task.format(answer): answer for answer in candidates}
    frequency = Counter(task.format(answer) for answer in candidates)
    constants = [by_text[text] for text, _ in frequency.most_common(50)]

    # The median box
    boxes = [answer.boxes[0] for answer in candidates if answer.boxes]
    if boxes:
        median_box = tuple(median_low(coordinates) for coordinates in zip(*boxes))
        exists = True if task.form is EXISTS else None
        constants.append(Answer(boxes=[median_box], exists=exists))

    if not constants:
        raise DataError(
            f"{task.name}: no answers to choose a constant from; expected training rows of the task"
        )
    scored = []
    for constant in constants:
        result = score(task, [constant] * len(golds), golds, whole=False)
        scored.append((result["metric"], constant))
    return max(scored, key=lambda pair: pair[0])
