# %% [markdown]
# # 10. AV-UIE: from labels to explicit reasoning
#
# * Paper: [Crab](https://arxiv.org/abs/2503.13068), the construction of AV-UIE
# * Code: [reason](../crab_min/tools/reason/__main__.py);
#   [verify.py](../crab_min/tools/reason/verify.py): `verify`
# * Read first: [00](00_one_clip.py)
#
# Public data sets have labels: "dog, from 2 to 8". Crab trains on text that says what is seen and
# heard, and only then gives the label. A chat model wrote the texts of AV-UIE from labels and
# worked examples, and people checked them: about 200 thousand rows of 9 tasks. Here a program
# checks what it can.

# %%
import re
import sys
from collections import Counter
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import numpy as np

from crab_min.data import read_samples
from crab_min.evaluation.figures import GREY, TEAL, new_figure, save
from crab_min.tools.reason.asking import conversation
from crab_min.tools.reason.briefs import closing_words, load_briefs, row_facts
from crab_min.tools.reason.rows import Attempt, Job
from crab_min.tools.reason.template import template
from crab_min.tools.reason.verify import Rules, clean, verify
from crab_min.world.folders import WorldConfig, build_world

root = build_world(WorldConfig(world_clips=48, world_test=4), seed=0)
sample = read_samples(root, ["ave"], "train", target="label")[0]
print("all that a labelled row teaches:", sample.target)

# %% [markdown]
# ## What a model is told
#
# Instructions, worked examples, the row's facts, and the closing words, which hold the label. The
# model writes what is missing at the end.

# %%
brief = load_briefs()["ave"]
prompt = brief.fill(row_facts(sample, seconds=10.0), closing_words(sample))
print(prompt)

# %% [markdown]
# ## What a model may write
#
# A text has to lead to the gold label, and must not contradict it. The first condition in naive
# lines; `verify` asks for the same, and for more: no times beyond the clip, no boxes that are not
# in the label, no talk of labels, some words before the closing ones.


# %%
def naive_check(sample, text):
    tag = re.search(r"<event>(.+?), \((\d+) (\d+)\)</event>\.$", text)
    ((label, spans),) = sample.gold.events
    return bool(tag) and (tag[1].strip(), [(int(tag[2]), int(tag[3]))]) == (label, spans)


((label, ((start, end),)),) = sample.gold.events
closing = closing_words(sample)
longer = f"So <event> {label}, ({start} {end + 1})</event>."
texts = [
    f"A {label} is in sight, and its sound begins after a while. {closing}",
    f"A {label} is in sight and sounds from {start} to {end}. {closing}",
    f"A {label} is in sight and sounds from {start} to {end + 5}. {closing}",
    f"A {label} is in sight at [10,20,90,80] and sounds. {closing}",
    f"The label says that a {label} sounds. {closing}",
    f"A {label} is in sight and sounds to the end. {longer}",
    f"A {label} is in sight and sounds.",
    f"{closing}",
]
kinds = [None, None, "time", "box", "leak", "wrong label", "unparsed", "too short"]
rules = Rules(instructions=brief.instructions())
for kind, text in zip(kinds, map(clean, texts)):
    rejection = verify(sample, text, rules, seconds=10.0)
    assert (rejection and rejection.kind) == kind
    assert naive_check(sample, text) or rejection
    verdict = f"thrown out, {rejection.kind}" if rejection else "verified"
    print(f"{verdict}: {text}")

# %% [markdown]
# ## Asked again
#
# A text that fails is sent back with the reason. After three failures the row keeps its label.

# %%
rejection = verify(sample, texts[2], rules, seconds=10.0)
job = Job(sample, brief, rules, seconds=10.0, attempts=[Attempt(texts[2], rejection)])
assert job.prompt == prompt
print(conversation(job, with_clip=False)[-1]["content"])

# %% [markdown]
# ## A whole folder, without a model
#
# The template makes sentences of a row's own fields. All of them must pass, in every task. The
# command does this, and writes a folder to train on:
#
#     python -m crab_min.tools.reason --data IN --out OUT --llm template --rewrite

# %%
rows = read_samples(root, list(load_briefs()), "train")
verdicts = Counter(verify(row, clean(template(row)), seconds=10.0) for row in rows)
print(f"verified: {verdicts[None]} of {len(rows)} template texts")
assert set(verdicts) == {None}
words = {}
for row in rows:
    pair = len(template(row).split()), len(closing_words(row).split())
    words.setdefault(row.task.name, []).append(pair)
means = np.array([np.mean(pairs, 0) for pairs in words.values()])  # (tasks, 2)
axes = new_figure(7, 3).subplots()
axes.bar(list(words), means[:, 0], color=TEAL, label="reasoned text")
axes.bar(list(words), means[:, 1], color=GREY, label="of these the closing words with the label")
axes.set(xlabel="task", ylabel="words per row")
axes.tick_params(axis="x", rotation=60)
axes.legend()
# figure: mean words of a reasoned text by task, and of its closing words, all that a label gives
save(axes.figure, Path("answers/10_crab_data.png"))

# %% [markdown]
# Whether reasoning pays, two trainings show: [20](20_interference.py).
#
# ## Exercises
#
# 1. A program knows the label alone. Say something false that the label does not contradict: change
#    `A {label} is in sight, and its sound begins after a while.` to
#    `A huge {label} on Mars, and its sound begins after a while.`; expect
#    `verified: A huge`. `--notes`, `--show-clip` and `--judge` are there for that.
# 2. Contradict the times. Change `is in sight and sounds from {start} to {end}. {closing}` to
#    `is in sight and sounds from {end} to {end + 9}. {closing}`; expect `AssertionError`.
