"""A metric for every task, as pure functions on (prediction, gold) Answers (papers/crab.md 2.7 and 5). Of masks: mask_metrics.py.

accuracy    canonical labels are equal                   segments    AVE: share of the 10 seconds with the right event
event_f     UnAV: F over seconds, mean over classes      av_event_f  AVVP: event_f for audio, visual and both at once
first_box   arig, s4: IoU of the first box               all_boxes   MS3: matched IoUs over the larger number of boxes
exists_box  Ref-AVS: IoU, or rightly "false"             rouge_l     F1 of the longest common subsequence of words
exact_match ScanQA, SQA3D: a cleaned text equals a gold

Beside the main number stand others that papers report: each sample's own, and those of a whole set (SETS: recall and F1
by class for emotions, CIDEr for captions). A prediction that does not parse is scored 0 and counted, never dropped, and
the end of a span is exclusive. Released scorers differ: AVE's takes unparsed clips for ten right background seconds and
ends inclusive (segment_accuracy_released), MUSIC-AVQA's leaves out answers outside of its vocabulary and looks for the
answer as a substring (substring_released), CREMA's for the answer in gold (part_of_gold); PAVE's and CREMA's take parts of
3D answers (refined, substring_of_gold). AVVP's agrees.
"""
import math
import re
from collections import Counter
from functools import lru_cache
from statistics import fmean, median_low

from crab_min.answers import WORDS, Answer, normalize_label
from crab_min.tasks import Task

SECONDS = 10                                           # AVE and LLP clips, and UnAV as cut for AV-UIE v2


# --- choices -------------------------------------------------------------------------------------------------------
def accuracy(prediction: Answer, gold: Answer) -> dict:
    return {"metric": float(normalize_label(prediction.choice, gold.choices) == normalize_label(gold.choice, gold.choices))}


# --- events --------------------------------------------------------------------------------------------------------
def seconds_of(spans, inclusive: bool = False) -> set:
    """The seconds 0 .. 9 that the spans cover; inclusive: second `end` too, as the released AVE scorer has it."""
    return {t for start, end in spans for t in range(start, end + inclusive) if t < SECONDS}


def timeline(events, inclusive: bool = False) -> list:
    """For each second the label of the one event, None where it does not happen."""
    (label, spans), = events
    on = seconds_of(spans, inclusive)
    return [normalize_label(label) if t in on else None for t in range(SECONDS)]


def segments(prediction: Answer, gold: Answer) -> dict:
    """AVE segment accuracy: the share of the seconds with the right label or rightly without one."""
    shares = [fmean(p == g for p, g in zip(timeline(prediction.events, inclusive), timeline(gold.events, inclusive)))
              for inclusive in (False, True)]
    return {"metric": shares[0], "segment_accuracy_released": shares[1]}


def one_to_one(pairs: list) -> list:
    """The overlaps that are left of (overlap, i, j) when each i and each j is used once, the largest overlap first."""
    held, used_i, used_j = [], set(), set()
    for overlap, i, j in sorted(pairs, reverse=True):
        if i not in used_i and j not in used_j:
            held, used_i, used_j = [*held, overlap], used_i | {i}, used_j | {j}
    return held


def class_seconds(events) -> dict:
    return {normalize_label(label): seconds_of(spans) for label, spans in events}


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


def span_ious(prediction: Answer, gold: Answer) -> list:
    """(IoU, index of the predicted span, index of the gold span) of all pairs of one label that overlap."""
    found, wanted = ([(normalize_label(label), *span) for label, spans in a.events for span in spans] for a in (prediction, gold))
    pairs = []
    for i, (label, start, end) in enumerate(found):
        for j, (other, first, last) in enumerate(wanted):
            both = min(end, last) - max(start, first)
            if label == other and both > 0:
                pairs.append((both / (end - start + last - first - both), i, j))
    return pairs


def event_f(prediction: Answer, gold: Answer) -> dict:
    """UnAV: F over seconds; F1 over whole spans, each matched once where the IoU is .3, .5, .7 or more; mean IoU of the gold spans."""
    found, wanted = class_seconds(prediction.events), class_seconds(gold.events)
    spans = sum(len(s) for _, s in prediction.events), sum(len(s) for _, s in gold.events)
    overlaps = span_ious(prediction, gold)
    held, best = one_to_one(overlaps), [max((overlap for overlap, _, other in overlaps if other == j), default=0.) for j in range(spans[1])]
    return {"metric": f_score([segment_counts(found.get(c, set()), wanted.get(c, set())) for c in found | wanted]),
            "miou": fmean(best) if best else float(not spans[0]),
            **{f"f1_at_{name}": 2 * sum(overlap >= least for overlap in held) / sum(spans) if sum(spans) else 1.
               for name, least in (("30", .3), ("50", .5), ("70", .7))}}



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
    """IoU of the first predicted box with the gold box (the best of them, where a mask has several).

    As VGG-SS counts, for ARIG: the share of IoU >= 1/2, and the area under that share over the thresholds 0, .05 ... 1.
    """
    overlap = max((iou(first, box) for first in prediction.boxes[:1] for box in gold.boxes), default=0.)
    reached = sum(overlap >= i / 20 for i in range(21))
    return {"metric": overlap, "iou_at_50": float(overlap >= .5), "auc": (reached - .5 - .5 * (reached == 21)) / 20}


def all_boxes(prediction: Answer, gold: Answer) -> dict:
    """Boxes are matched one to one, the largest IoU first; the sum of the IoUs over the larger number of boxes."""
    pairs = [(iou(p, g), i, j) for i, p in enumerate(prediction.boxes) for j, g in enumerate(gold.boxes)]
    return {"metric": sum(one_to_one(pairs)) / max(len(prediction.boxes), len(gold.boxes), 1)}


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


# --- short free answers --------------------------------------------------------------------------------------------
@lru_cache(100_000)
def cleaned(text: str) -> str:
    """The form in which free answers are compared: "The 2 chairs." == "two chairs".

    Lower case, every sign that is no letter or digit a blank, 0 to 20 in words, without a, an, the (unless that is all
    there is). LEO's clean_answer, which PAVE uses, also mends slips of its data and takes none for zero: numbers differ a
    little.
    """
    words = [WORDS[int(w)] if re.fullmatch("1?[0-9]|20", w) else w for w in re.findall(r"[^\W_]+", text.lower())]
    return " ".join([w for w in words if w not in ("a", "an", "the")] or words)


def exact_match(prediction: Answer, gold: Answer) -> dict:
    """EM@1: 1 where the cleaned answer is one of the cleaned golds (choices, else the text); an empty one is none of them."""
    said = cleaned(prediction.text)
    return {"metric": float(bool(said) and said in map(cleaned, gold.choices or (gold.text,)))}


# --- a whole set ---------------------------------------------------------------------------------------------------
def said(answer: Answer) -> str:
    """The canonical choice, "" where there is none."""
    return "" if answer.error or answer.choice is None else normalize_label(answer.choice, answer.choices)


def by_class(predictions: list[Answer], golds: list[Answer]) -> dict:
    """Emotions: UAR, the mean over gold classes of their recall, and F1 by class, weighted by the classes' samples. WAR is the accuracy."""
    pairs = [(said(p), said(g)) for p, g in zip(predictions, golds)]
    right, found, wanted = Counter(g for p, g in pairs if p == g), Counter(p for p, _ in pairs), Counter(g for _, g in pairs)
    return {"uar": fmean(right[c] / n for c, n in wanted.items()),
            "weighted_f1": sum(n * 2 * right[c] / (found[c] + n) for c, n in wanted.items()) / len(pairs)}


def substring_released(predictions: list[Answer], golds: list[Answer]) -> dict:
    """MUSIC-AVQA's released scorer: right if gold is part of the answer ("no" in "piano"); answers that are nobody's gold are not counted."""
    vocabulary = {said(g) for g in golds}
    counted = [(p, g) for p, g in zip(predictions, golds) if said(p) in vocabulary]
    return {"substring_released": fmean(str(g.choice).lower() in str(p.choice).lower() for p, g in counted) if counted else 0.,
            "counted_released": len(counted) / len(golds)}


def part_of_gold(predictions: list[Answer], golds: list[Answer]) -> dict:
    """What CREMA calls accuracy on MUSIC-AVQA: right too if the answer is part of the gold ("guitar" of "acoustic guitar", "a" of "piano").

    No answer reads "unanswerable". Compared in canonical form, where CREMA writes 1 to 10 in words and gold's underscores as blanks.
    """
    return {"part_of_gold": fmean((said(p) or "unanswerable") in said(g) for p, g in zip(predictions, golds))}


def refined(predictions: list[Answer], golds: list[Answer]) -> dict:
    """PAVE's (LEO's) lenient EM, as released: right too where, without blanks, a gold is part of the answer or the answer part of a gold.

    So "no" is right for "piano", and so is an empty answer, which is part of everything and wrong for exact_match.
    """
    texts = [[cleaned(text).replace(" ", "") for text in (p.text, *(g.choices or (g.text,)))] for p, g in zip(predictions, golds)]
    return {"refined": fmean(any(answer in right or right in answer for right in rights) for answer, *rights in texts)}


def substring_of_gold(predictions: list[Answer], golds: list[Answer]) -> dict:
    """What CREMA calls EM on SQA3D, as released: right if the answer is part of the first gold ("a" of "table"), as an empty one is.

    The answer: its first line in lower case, without commas; where the gold is one word, its last word; 1 to 10 in words.
    """
    def answer(p: Answer, g: Answer) -> str:
        line = p.text.replace(",", "").strip().split("\n")[0].rstrip().lower()
        word = line.split(" ")[-1] if " " not in g.text else line
        return WORDS[int(word)] if re.fullmatch("[1-9]|10", word) else word
    return {"substring_of_gold": fmean(answer(p, g) in g.text for p, g in zip(predictions, golds))}


def cider(predictions: list[Answer], golds: list[Answer]) -> dict:
    """CIDEr-D (Vedantam et al. 2015) with one reference each, times 10 as usual.

    The words are runs of letters and digits, where papers use a Java tokenizer, hence the name: numbers differ a little from theirs.
    """
    def grams(text: str) -> list[Counter]:
        words = re.findall(r"\w+", text.lower())
        return [Counter(zip(*(words[k:] for k in range(n)))) for n in (1, 2, 3, 4)]
    references = [grams(g.text) for g in golds]
    frequency = Counter(gram for reference in references for counts in reference for gram in counts)

    def vector(counts: Counter) -> dict:
        return {gram: n * (math.log(len(golds)) - math.log(max(1, frequency[gram]))) for gram, n in counts.items()}
    scores = []
    for prediction, reference in zip((grams("" if p.error else p.text) for p in predictions), references):
        shorter, sums = math.exp(-(prediction[1].total() - reference[1].total()) ** 2 / (2 * 6 ** 2)), 0.
        for p, r in zip(map(vector, prediction), map(vector, reference)):
            norm = math.hypot(*p.values()) * math.hypot(*r.values())
            sums += shorter * sum(min(v, r[gram]) * r[gram] for gram, v in p.items() if gram in r) / norm if norm else 0.
        scores.append(10 * sums / 4)
    return {"cider_own_words": fmean(scores)}


# --- a task --------------------------------------------------------------------------------------------------------
METRICS = {f.__name__: f for f in (accuracy, segments, event_f, av_event_f, first_box, all_boxes, exists_box, rouge_l, exact_match)}
SETS = {f.__name__: f for f in (by_class, substring_released, part_of_gold, refined, substring_of_gold, cider)}


def score(task: Task, predictions: list[Answer], golds: list[Answer], labels: list[str] | None = None, whole: bool = True) -> dict:
    """{"metric": main number, "parsed": share of readable predictions, "n": samples, "all": numbers}, as fractions.

    labels: the classes of `ave`, if known: an event that is none of them counts as unparsed, as in the released scorer.
    whole: with the numbers of the whole set (SETS), which take longer.
    Raises ValueError where the lists differ in length or are empty.
    """
    if len(predictions) != len(golds) or not golds:
        raise ValueError(f"{task.name}: {len(predictions)} predictions for {len(golds)} golds; expected one for each")
    known, measure, results, parsed = {normalize_label(c) for c in labels or ()}, METRICS[task.metric], [], []
    for prediction, gold in zip(predictions, golds):
        events = {normalize_label(label) for label, _ in prediction.events}
        parsed.append(prediction.error is None and (not known or events <= known))
        results.append(measure(prediction, gold) if parsed[-1] else dict.fromkeys(measure(gold, gold), 0.))
        if task.metric == "segments" and not parsed[-1]:
            results[-1]["segment_accuracy_released"] = 1.
    everything = {name: fmean(result[name] for result in results) for name in results[0]}
    for name in task.sets if whole else ():
        everything |= SETS[name](predictions, golds)
    return {"metric": everything.pop("metric"), "parsed": fmean(parsed), "n": len(golds), "all": everything}


def best_constant(task: Task, candidates: list[Answer], golds: list[Answer]) -> tuple[float, Answer]:
    """The best that one answer for all samples can score, and that answer.

    candidates: training answers; the 50 most frequent are tried and, for boxes, the median of each coordinate.
    """
    counts, by_text = Counter(task.format(answer) for answer in candidates), {task.format(a): a for a in candidates}
    constants = [by_text[text] for text, _ in counts.most_common(50)]
    boxes = [answer.boxes[0] for answer in candidates if answer.boxes]
    if boxes:
        middle = tuple(median_low(values) for values in zip(*boxes))
        constants.append(Answer(boxes=[middle], exists=True if task.parser == "exists" else None))
    if not constants:
        raise ValueError(f"{task.name}: no answers to choose a constant from")
    scores = [score(task, [answer] * len(golds), golds, whole=False)["metric"] for answer in constants]
    return max(scores), constants[scores.index(max(scores))]
