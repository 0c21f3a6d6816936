"""Metrics of free texts over a whole set: CIDEr-D, BLEU-4, ROUGE-L.

They follow pycocoevalcap, which papers use, but for its tokenizer: that is written in Java, and
here the words of a text are its runs of letters and digits. Numbers so differ a little, hence the
keys `..._own_words`. METEOR is not there: it needs Java, or WordNet. Of a question with several
right answers (`choices` of the gold answer) all are references.

Each function takes the predicted and the gold answers of a set and returns its number by name.
"""

import math
import re
from collections import Counter
from statistics import fmean

from crab_min.answers import Answer

BETA = 1.2  # of ROUGE-L's F: how much recall counts


def words_of(answer: Answer) -> list[str]:
    """Return the words of a text: runs of letters and digits, in lower case.

    A text that did not parse has none.
    """
    return [] if answer.error else split_words(answer.text)


def split_words(text: str) -> list[str]:
    """Return the runs of letters and digits of a text, in lower case."""
    return re.findall(r"\w+", text.lower())


def references_of(gold: Answer) -> list[list[str]]:
    """Return the words of each right answer."""
    return [split_words(text) for text in gold.choices or (gold.text,)]


def common_words(predicted: list[str], expected: list[str]) -> int:
    """Return the length of the longest common subsequence (LCS) of two lists of words."""
    # lcs[j]: length of the LCS of the predicted words so far and expected[:j]
    lcs = [0] * (len(expected) + 1)
    for word in predicted:
        previous, lcs = lcs, [0]
        for j, other in enumerate(expected):
            longest = previous[j] + 1 if word == other else max(previous[j + 1], lcs[j])
            lcs.append(longest)
    return lcs[-1]


def ngrams(words: list[str]) -> list[Counter]:
    """Count the n-grams of a text, for n = 1, 2, 3, 4."""
    counts = []
    for n in (1, 2, 3, 4):
        shifted = [words[k:] for k in range(n)]
        counts.append(Counter(zip(*shifted)))
    return counts


def cider(predictions: list[Answer], golds: list[Answer]) -> dict[str, float]:
    """Return CIDEr-D (Vedantam et al. 2015) times 10, as is customary.

    CIDEr-D is the cosine of tf-idf vectors of n-grams, averaged over n = 1 to 4 and over the
    references. The weight of a predicted n-gram is clipped at its weight in the reference, and a
    Gaussian punishes differences in length.
    """
    # of how many samples the references have each n-gram
    references = []
    frequency: Counter = Counter()
    for gold in golds:
        counted = [ngrams(words) for words in references_of(gold)]
        references.append(counted)
        frequency.update({gram for by_n in counted for counts in by_n for gram in counts})

    def tf_idf(counts: Counter) -> dict[tuple, float]:
        log_n = math.log(len(golds))
        return {g: n * (log_n - math.log(max(1, frequency[g]))) for g, n in counts.items()}

    scores = []
    for prediction, own_references in zip(predictions, references):
        candidate = ngrams(words_of(prediction))
        similar = [cider_similarity(candidate, reference, tf_idf) for reference in own_references]
        scores.append(10 * fmean(similar))
    return {"cider_own_words": fmean(scores)}


def cider_similarity(candidate: list[Counter], reference: list[Counter], tf_idf) -> float:
    """Return the similarity of a text and one reference, given the n-grams of both."""
    # the released CIDEr-D measures lengths in bigrams; sigma is 6
    difference = candidate[1].total() - reference[1].total()
    length_penalty = math.exp(-(difference**2) / (2 * 6**2))
    cosines = 0.0
    for candidate_counts, reference_counts in zip(candidate, reference):
        x, y = tf_idf(candidate_counts), tf_idf(reference_counts)
        norm = math.hypot(*x.values()) * math.hypot(*y.values())
        product = sum(min(weight, y[g]) * y[g] for g, weight in x.items() if g in y)
        cosines += length_penalty * product / norm if norm else 0.0
    return cosines / 4


def bleu_4(predictions: list[Answer], golds: list[Answer]) -> dict[str, float]:
    """Return BLEU-4 (Papineni et al. 2002) of the set: one precision per n over all samples.

    The length of a sample's reference is that which is closest to the text's.
    """
    matched, guessed = [0] * 4, [0] * 4
    length, reference_length = 0, 0
    for prediction, gold in zip(predictions, golds):
        words, references = words_of(prediction), references_of(gold)
        length += len(words)
        closest = min((abs(len(r) - len(words)), len(r)) for r in references)
        reference_length += closest[1]
        counted = [ngrams(reference) for reference in references]
        for n, counts in enumerate(ngrams(words)):
            guessed[n] += counts.total()
            for gram, count in counts.items():
                matched[n] += min(count, max(by_n[n][gram] for by_n in counted))

    if not length or not all(matched):
        return {"bleu_4_own_words": 0.0}
    precision = fmean(math.log(m / g) for m, g in zip(matched, guessed))
    brevity = min(0.0, 1 - reference_length / length)
    return {"bleu_4_own_words": math.exp(precision + brevity)}


def rouge_l_coco(predictions: list[Answer], golds: list[Answer]) -> dict[str, float]:
    """Return ROUGE-L (Lin 2004): the best precision and the best recall of the references."""
    scores = []
    for prediction, gold in zip(predictions, golds):
        words = words_of(prediction)
        precision = recall = 0.0
        for reference in references_of(gold):
            common = common_words(words, reference)
            precision = max(precision, common / max(len(words), 1))
            recall = max(recall, common / max(len(reference), 1))
        weighted = recall + BETA**2 * precision
        scores.append((1 + BETA**2) * precision * recall / weighted if weighted else 0.0)
    return {"rouge_l_coco_own_words": fmean(scores)}
