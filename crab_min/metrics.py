"""A metric for every task, as pure functions on (prediction, gold) Answers (papers/crab.md 2.7 and 5).

accuracy    canonical labels are equal                   segments    AVE: share of the 10 seconds with the right event
event_f     UnAV: F over seconds, mean over classes      av_event_f  AVVP: event_f for audio, visual and both at once
first_box   arig, s4: IoU of the first box               all_boxes   MS3: matched IoUs over the larger number of boxes
exists_box  Ref-AVS: IoU, or rightly "false"             rouge_l     F1 of the longest common subsequence of words

A prediction that does not parse is scored 0 and counted, never dropped, and the end of a span is exclusive. Released
scorers differ: AVE's takes unparsed clips for ten right background seconds and ends inclusive (reported as
segment_accuracy_released), MUSIC-AVQA's skips them and looks for the answer as a substring. AVVP's agrees.
"""
import re
from collections import Counter
from statistics import fmean, median_low

from crab_min.interface import Answer, Task, canonical, write

SECONDS = 10                                           # AVE and LLP clips, and UnAV as cut for AV-UIE v2


# --- choices -------------------------------------------------------------------------------------------------------
def accuracy(prediction: Answer, gold: Answer) -> dict:
    return {"metric": float(canonical(prediction.choice, gold.choices) == canonical(gold.choice, gold.choices))}


# --- events --------------------------------------------------------------------------------------------------------
def seconds_of(spans, inclusive: bool = False) -> set:
    """The seconds 0 .. 9 that the spans cover; inclusive: second `end` too, as the released AVE scorer has it."""
    return {t for start, end in spans for t in range(start, end + inclusive) if t < SECONDS}


def timeline(events, inclusive: bool = False) -> list:
    """For each second the label of the one event, None where it does not happen."""
    (label, spans), = events
    on = seconds_of(spans, inclusive)
    return [canonical(label) if t in on else None for t in range(SECONDS)]


def segments(prediction: Answer, gold: Answer) -> dict:
    """AVE segment accuracy: the share of the seconds with the right label or rightly without one."""
    shares = [fmean(p == g for p, g in zip(timeline(prediction.events, inclusive), timeline(gold.events, inclusive)))
              for inclusive in (False, True)]
    return {"metric": shares[0], "segment_accuracy_released": shares[1]}


def class_seconds(events) -> dict:
    return {canonical(label): seconds_of(spans) for label, spans in events}


def runs(seconds: set) -> list:
    """Seconds -> maximal (start, end)."""
    starts = sorted(t for t in seconds if t - 1 not in seconds)
    return list(zip(starts, sorted(t + 1 for t in seconds if t + 1 not in seconds)))


def segment_counts(prediction: set, gold: set) -> tuple:
    """(predicted and right, predicted, gold) seconds of one class."""
    return len(prediction & gold), len(prediction), len(gold)


def event_counts(prediction: set, gold: set) -> tuple:
    """The same for whole events: maximal runs of seconds, right if the IoU with one of gold is at least 1/2."""
    found, wanted = ([set(range(*run)) for run in runs(seconds)] for seconds in (prediction, gold))
    return sum(any(2 * len(p & g) >= len(p | g) for g in wanted) for p in found), len(found), len(wanted)


def f_score(counts: list) -> float:
    """Mean over classes of F = 2 right / (predicted + gold); classes in neither are left out, 1 if there is none."""
    scores = [2 * right / (predicted + wanted) for right, predicted, wanted in counts if predicted + wanted]
    return fmean(scores) if scores else 1.


def event_f(prediction: Answer, gold: Answer) -> dict:
    found, wanted = class_seconds(prediction.events), class_seconds(gold.events)
    return {"metric": f_score([segment_counts(found.get(c, set()), wanted.get(c, set())) for c in found | wanted])}


def av_f_scores(found: dict, wanted: dict, counts) -> dict:
    """One video's F for audio, visual, audio_visual (seconds where both hold) and all (counts of audio + of visual).

    found, wanted: {"audio" | "visual": {class: seconds}}; counts: segment_counts or event_counts.
    """
    rows: dict = {"audio": [], "visual": [], "audio_visual": [], "all": []}
    for c in set().union(*found.values(), *wanted.values()):
        audio, visual = ((found[side].get(c, set()), wanted[side].get(c, set())) for side in ("audio", "visual"))
        rows["audio"].append(counts(*audio))
        rows["visual"].append(counts(*visual))
        rows["audio_visual"].append(counts(audio[0] & visual[0], audio[1] & visual[1]))
        rows["all"].append(tuple(a + v for a, v in zip(counts(*audio), counts(*visual))))
    return {name: f_score(row) for name, row in rows.items()}


def av_event_f(prediction: Answer, gold: Answer) -> dict:
    """AVVP: type average (the mean of audio, visual and audio-visual segment F) as the main number."""
    found, wanted = ({"audio": class_seconds(a.audio_events), "visual": class_seconds(a.visual_events)}
                     for a in (prediction, gold))
    scores = {f"{level}_{name}": value for level, counts in (("segment", segment_counts), ("event", event_counts))
              for name, value in av_f_scores(found, wanted, counts).items()}
    return {"metric": fmean(scores[f"segment_{name}"] for name in ("audio", "visual", "audio_visual")), **scores}


# --- boxes ---------------------------------------------------------------------------------------------------------
def iou(a, b) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    def area(x1, y1, x2, y2):
        return max(x2 - x1, 0) * max(y2 - y1, 0)
    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return both / max(area(*a) + area(*b) - both, 1e-9)


def first_box(prediction: Answer, gold: Answer) -> dict:
    """IoU of the first predicted box with the gold box (the best of them, where a mask has several)."""
    overlap = max((iou(first, box) for first in prediction.boxes[:1] for box in gold.boxes), default=0.)
    return {"metric": overlap, "iou_at_50": float(overlap >= .5)}


def all_boxes(prediction: Answer, gold: Answer) -> dict:
    """Boxes are matched one to one, the largest IoU first; the sum of the IoUs over the larger number of boxes."""
    pairs = [(iou(p, g), i, j) for i, p in enumerate(prediction.boxes) for j, g in enumerate(gold.boxes)]
    total, used_p, used_g = 0., set(), set()
    for overlap, i, j in sorted(pairs, reverse=True):
        if i not in used_p and j not in used_g:
            total, used_p, used_g = total + overlap, used_p | {i}, used_g | {j}
    return {"metric": total / max(len(prediction.boxes), len(gold.boxes), 1)}


def exists_box(prediction: Answer, gold: Answer) -> dict:
    """IoU where there is an object and one is predicted; 1 for a right "false", 0 for a wrong true or false."""
    right = prediction.exists == gold.exists
    overlap = first_box(prediction, gold)["metric"] if right and gold.exists else float(right)
    return {"metric": overlap, "existence": float(right)}


# --- captions ------------------------------------------------------------------------------------------------------
def rouge_l(prediction: Answer, gold: Answer) -> dict:
    """F1 of the longest common subsequence of lower-case words."""
    a, b = (re.findall(r"\w+", answer.text.lower()) for answer in (prediction, gold))
    row = [0] * (len(b) + 1)                           # row[j]: longest common subsequence of a[:i] and b[:j]
    for word in a:
        last, row = row, [0]
        for j, other in enumerate(b):
            row.append(last[j] + 1 if word == other else max(last[j + 1], row[j]))
    return {"metric": 2 * row[-1] / max(len(a) + len(b), 1)}


# --- a task --------------------------------------------------------------------------------------------------------
METRICS = {f.__name__: f for f in (accuracy, segments, event_f, av_event_f, first_box, all_boxes, exists_box, rouge_l)}


def score(task: Task, predictions: list[Answer], golds: list[Answer], labels: list[str] | None = None) -> dict:
    """{"metric": main number, "parsed": share of readable predictions, "n": samples, "all": numbers}, as fractions.

    labels: the classes of `ave`, if known: an event that is none of them counts as unparsed, as in the released scorer.
    Raises ValueError where the lists differ in length or are empty.
    """
    if len(predictions) != len(golds) or not golds:
        raise ValueError(f"{task.name}: {len(predictions)} predictions for {len(golds)} golds; expected one for each")
    known, measure, results, parsed = {canonical(c) for c in labels or ()}, METRICS[task.metric], [], []
    for prediction, gold in zip(predictions, golds):
        events = {canonical(label) for label, _ in prediction.events}
        parsed.append(prediction.error is None and (not known or events <= known))
        results.append(measure(prediction, gold) if parsed[-1] else dict.fromkeys(measure(gold, gold), 0.))
        if task.metric == "segments" and not parsed[-1]:
            results[-1]["segment_accuracy_released"] = 1.
    everything = {name: fmean(result[name] for result in results) for name in results[0]}
    return {"metric": everything.pop("metric"), "parsed": fmean(parsed), "n": len(golds), "all": everything}


def best_constant(task: Task, candidates: list[Answer], golds: list[Answer]) -> tuple[float, Answer]:
    """The best that one answer for all samples can score, and that answer.

    candidates: training answers; the 50 most frequent are tried and, for boxes, the median of each coordinate.
    """
    counts, by_text = Counter(write(task, answer) for answer in candidates), {write(task, a): a for a in candidates}
    constants = [by_text[text] for text, _ in counts.most_common(50)]
    boxes = [answer.boxes[0] for answer in candidates if answer.boxes]
    if boxes:
        middle = tuple(median_low(values) for values in zip(*boxes))
        constants.append(Answer(boxes=[middle], exists=True if task.parser == "exists" else None))
    if not constants:
        raise ValueError(f"{task.name}: no answers to choose a constant from")
    scores = [score(task, [answer] * len(golds), golds)["metric"] for answer in constants]
    return max(scores), constants[scores.index(max(scores))]
