# %% [markdown]
# # 21. The unified input and output interface
#
# * Paper: [Crab+](https://arxiv.org/abs/2603.04128), unified input and output interface, AV-UIE v2
# * Code: [tasks.py](../crab_min/tasks.py): `TASKS`; [interface.py](../crab_min/interface.py):
#   `build_prompt`; [answers.py](../crab_min/answers.py): `Answer`, `OutputForm`
# * Read first: [00](00_one_clip.py)
#
# Crab+ trains matching, emotion, questions, localisation and boxes with one loss: each is put as
# "media and an instruction in, explicit reasoning and a label in a fixed form out".

# %%
import re
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import torch

from crab_min.data import read_samples
from crab_min.evaluation.metrics import score
from crab_min.evaluation.pictures import draw_answer
from crab_min.interface import build_prompt, prompt_text
from crab_min.tasks import TASKS
from crab_min.world.folders import WorldConfig, build_world

SHOWN = ["a2v", "ucf", "meld", "avqa", "ave", "avvp", "ref_avs"]

# %% [markdown]
# ## A dataset is a row of TASKS
#
# What the fields of an annotation mean stands in a row of `TASKS`. AV-UIE v2 has 222 thousand rows
# of 17 datasets in 19 folders; those below come from the built-in world, which has the same layout.
# `frames` are spread over the clip; `audio` is the part of the sound that is taken (`tenths`: all,
# in ten parts); `target` is the field with the text to learn; `metric` counts right seconds.

# %%
root = build_world(WorldConfig(world_clips=48, world_test=4), seed=0)
samples = {name: read_samples(root, [name], "train")[0] for name in SHOWN}
task, row = TASKS["ave"], samples["ave"].row
print("A row of ave/train.json:")
for field, value in row.items():
    print(f"  {field:<14} {value}")
print("and the row of TASKS that reads it:")
for field in ("family", "instruction", "frames", "audio", "target", "metric"):
    print(f"  {field:<14} {getattr(task, field)}")

# %% [markdown]
# ## Input: from a row to a prompt
#
# `build_prompt` makes a list of parts: text, and media that are decoded later. Training, evaluation
# and `infer.py` call it. `a2v` asks which of two videos goes with a sound, `ucf` for an action,
# `meld` for an emotion, `avqa` a question of its own, `ave` and `avvp` for events and times,
# `ref_avs` for the place of a described thing. Crab+ first says which media follow, and its
# instructions are its authors'; ours are worded by us (`--prompts FILE.json` replaces them).

# %%
for part in build_prompt(task, row, root="data"):
    print(part.kind, repr(part.text or part.path))
for name, sample in samples.items():
    print(f"\n{name}:\n{prompt_text(sample.parts)}")

# %% [markdown]
# ## Output: explicit reasoning, then the label
#
# The target has prose first (who, where, when), then the label. With `--target label` the model
# learns the label alone. There are few forms:
#
# | form | meaning |
# |---|---|
# | `<answer> one</answer>` | a word, or several |
# | `<event> bell, (2 8)</event>` | a label and whole seconds: from 2 up to 8, so 2 to 7 |
# | `<visual_event>`, `<audio_event>` | the same, apart for what is seen and what is heard |
# | `[84,145,140,205]` | a box x1, y1, x2, y2 on the picture at 224 x 224 |
# | `[103,173]` | a point x, y |

# %%
for name, sample in samples.items():
    answer = sample.task.parse(sample.target)
    print(f"\n{name}: {sample.target}\n  label alone: {sample.task.format(answer)}")

# %% [markdown]
# ## From a text to a score
#
# Segment accuracy of AVE is the share of the 10 seconds with the right label, or rightly without
# one (the released scorer counts the second $e$ too: [53](53_metrics.py)). In naive lines, for
# texts with exactly one event:
#
# $$
# \mathrm{accuracy} = \frac{1}{10} \sum_{t=0}^{9} [\, y_t = \hat y_t \,], \qquad
# y_t = \text{label if } s \le t < e, \text{ else none}
# $$
#
# with $y_t$ = `gold`, $\hat y_t$ = `predicted`, $s$ = `start`, $e$ = `end`.


# %%
def naive_segment_accuracy(text, gold_text):
    labels = []
    for one_text in (text, gold_text):
        label, start, end = re.search(r"<event> (.+), \((\d+) (\d+)\)</event>", one_text).groups()
        labels.append([label if int(start) <= t < int(end) else None for t in range(10)])
    return sum(predicted == gold for predicted, gold in zip(*labels)) / 10


gold_text = "<event> dog, (2 9)</event>"
gold = task.parse(gold_text)
for text in (gold_text, "<event> dog, (0 5)</event>", "<event> cat, (2 9)</event>"):
    library = score(task, [task.parse(text)], [gold])["metric"]
    naive = naive_segment_accuracy(text, gold_text)
    assert torch.allclose(torch.tensor(naive), torch.tensor(library))
    print(f"{text:<30} segment accuracy {library:.1f}")

# Models do not write like annotators. `parse` takes what it can; the rest is scored wrong.
texts = ["I hear it. <event>Dog, (2 9)", "<Event> DOG ,( 2 , 9 ) </Event>"]
texts += ["<event>dog</event> <range>2,9</range>", "the dog, from 2 to 9"]
for text in texts:
    answer = task.parse(text)
    value = score(task, [answer], [gold])["metric"]
    print(f"{text:<40} segment accuracy {value:.1f} {answer.error or ''}")

sample, picture = samples["avvp"], Path("answers/21_interface.png")
print("drawn:", *[part.kind for part in sample.media])
# figure: a row of AVVP: frames, sound, a bar for every event seen or heard, and the text to learn
draw_answer(picture, sample, sample.gold, sample.target)

# %% [markdown]
# ## Exercises
#
# 1. A box and points in place of events; the same function draws them. Change
#    `samples["avvp"], Path(` to `samples["ref_avs"], Path(`; expect `drawn: image audio`.
# 2. Shift an interval by a second. Change `"<event> dog, (0 5)</event>"` to
#    `"<event> dog, (3 10)</event>"`; expect `segment accuracy 0.8`.
