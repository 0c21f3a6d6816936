# %% [markdown]
# # 53. Metrics, official and strict
#
# * Code: [metrics.py](../crab_min/evaluation/metrics.py): `score`;
#   [released_metrics.py](../crab_min/evaluation/released_metrics.py)
# * Read first: [21](21_interface.py)
#
# Published numbers come from released scorers, and some of these are lenient. Each stands here
# beside a strict twin, so that a run can be compared with a paper and with the truth.

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import torch

from crab_min.answers import Answer
from crab_min.evaluation.figures import GREY, TEAL, new_figure, save
from crab_min.evaluation.metrics import score
from crab_min.tasks import TASKS

# %% [markdown]
# ## AVE: which seconds have the event?
#
# $$
# \mathrm{strict} = \frac{1}{10} \sum_{t} [\, y_t = \hat y_t \,], \quad y_t = \text{label for }
# s \le t < e; \qquad \mathrm{released:}\; s \le t \le e
# $$
#
# Two more things differ in the release: seconds without an event count as right where both say so,
# and an answer that does not parse counts as ten right seconds of background.

# %%
task = TASKS["ave"]
gold_text = "<event> dog, (2 6)</event>"
said = "<event> dog, (2 10)</event>"


def naive(text, end_inclusive):
    """Share of seconds alike, for texts that parse."""
    rows = []
    for answer in (task.parse(text), task.parse(gold_text)):
        ((label, ((start, end),)),) = answer.events
        end += int(end_inclusive)
        rows.append([label if start <= t < end else None for t in range(10)])
    return sum(a == b for a, b in zip(*rows)) / 10


result = score(task, [task.parse(said)], [task.parse(gold_text)])
released = result["all"]["segment_accuracy_released"]
library = torch.tensor([result["metric"], released])
assert torch.allclose(torch.tensor([naive(said, False), naive(said, True)]), library)
print(f"gold 2 to 6: strict {result['metric']:.1f}, released {released:.1f}")
unparsed = score(task, [task.parse("a dog barks")], [task.parse(gold_text)])
print(
    f"does not parse: {unparsed['metric']:.1f}, {unparsed['all']['segment_accuracy_released']:.1f}"
)

# %% [markdown]
# MokA's published file of 402 AVE answers gives 0.771 with its own scorer, and 0.758 if the five
# answers that do not parse are wrong.
#
# ## MUSIC-AVQA: the same word, or a part of it?

# %%
task = TASKS["avqa"]
pairs = [("piano", "no"), ("no", "no"), ("piano", "piano"), ("I cannot tell", "yes")]
predictions = [task.parse(f"<answer> {said}</answer>") for said, _ in pairs]
golds = [Answer(choice=label) for _, label in pairs]
for (said, label), prediction, gold in zip(pairs, predictions, golds):
    alone = score(task, [prediction], [gold])
    print(f"{said!r} for {label!r}: strict {alone['metric']:.0f}, contained {int(label in said)}")

# %% [markdown]
# The released scorer asks whether the label is contained in the answer, so "piano" is right for
# "no". It leaves out answers that are not in its list of 42 words: MokA counts 9,059 of 9,129.
#
# | number | an answer is right if | answers |
# |---|---|---|
# | `strict` | it is the label | all |
# | `substring_released`, of MokA | it contains the label | those in the list |
# | `gold_in_answer`, of PAVE | it contains the label | all |
# | `part_of_gold`, of CREMA | the label contains it | all |
#
# `parsed` and `counted_released` are shares of answers that can be read, and that are in the list;
# here the list is the labels of these four rows.

# %%
whole = score(task, predictions, golds)
names = {"strict": whole["metric"], "parsed": whole["parsed"], **whole["all"]}
for name, value in names.items():
    print(f"{name:<20} {value:.2f}")
axes = new_figure(7, 2.6).subplots()
colours = [TEAL if name == "strict" else GREY for name in names]
axes.barh(list(names), list(names.values()), color=colours)
axes.invert_yaxis()
axes.set(xlabel="share of four answers, of which two are right", xlim=(0, 1))
# figure: one set of four answers by every number that is computed for MUSIC-AVQA
save(axes.figure, Path("answers/53_metrics.png"))

# %% [markdown]
# ## Exercises
#
# 1. A second later at the start. Change `said = "<event> dog, (2 10)</event>"` to
#    `said = "<event> dog, (3 10)</event>"`; expect `gold 2 to 6: strict 0.5`.
# 2. A label that is part of nothing. Change `("piano", "no")` to `("drum", "no")`; expect
#    `'drum' for 'no': strict 0`.
