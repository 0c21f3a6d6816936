# %% [markdown]
# # 21. One interface for all tasks
#
# Paper: Crab+ (arXiv 2603.04128), the unified input and output interface. Code in `crab_min/`:
# `tasks.py`, `answers.py`, `interface.py`. Half a minute on a CPU; the first run builds a world.
#
# Matching, emotion, questions, localisation, boxes: Crab+ trains them all with one loss, since each
# is put as "media and an instruction in, explicit reasoning and a label in a fixed form out". We
# follow one row of each kind from the annotation file to the score, and draw one.

# %%
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

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
# An annotation is a row of JSON. What its fields mean stands in a row of `TASKS`. The rows below
# come from the built-in world, which is written in the layout of AV-UIE v2.

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
print(f"  {'form':<14} {task.form.name}\n  {'gold':<14} {', '.join(task.gold[1:])}\n")

# %% [markdown]
# ## Input: from a row to a prompt
#
# `build_prompt` makes a list of parts: text, and media that are decoded later. Training, evaluation
# and `infer.py` call the same function. `prompt_text` shows the list as one string.

# %%
for part in build_prompt(task, row, root="data"):
    print(part.kind, repr(part.text or part.path))
for name, sample in samples.items():
    print(f"\n{name}:\n{prompt_text(sample.parts)}")

# %% [markdown]
# ## Output: explicit reasoning, then the label
#
# The target text has prose first (who, where, when) and then the label in its form. With
# `--target label` the model learns the label alone; `parse` and `format` cut it out of the text.

# %%
for name, sample in samples.items():
    answer = sample.task.parse(sample.target)
    print(f"\n{name}: {sample.target}\n  label alone: {sample.task.format(answer)}")

# %% [markdown]
# ## From a text to a score
#
# Segment accuracy of AVE is the share of the 10 seconds with the right label, or rightly without
# one. In a few naive lines, for texts exactly in the form of EVENT:


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
    assert abs(naive_segment_accuracy(text, gold_text) - library) < 1e-9
    print(f"{text:<30} segment accuracy {library:.1f}")

# %% [markdown]
# Models do not write like annotators. `parse` takes what it can; the rest is scored wrong.

# %%
texts = ["I hear it. <event>Dog, (2 9)", "<Event> DOG ,( 2 , 9 ) </Event>"]
texts += ["<event>dog</event> <range>2,9</range>", "the dog, from 2 to 9"]
for text in texts:
    answer = task.parse(text)
    value = score(task, [answer], [gold])["metric"]
    print(f"{text:<40} segment accuracy {value:.1f} {answer.error or ''}")

# %% [markdown]
# ## A picture of a row

# %%
sample, picture = samples["avvp"], Path("answers/21_interface.png")
draw_answer(picture, sample, sample.gold, sample.target)
print(f"\n{picture}: the frames, the sound, and a bar for every event that is seen or heard.")

# %% [markdown]
# ## Exercises
#
# 1. Draw `samples["ref_avs"]` instead. Expect an image with a box and three points in place of the
#    bars: the same function, since `Answer` has a field for each of them.
# 2. Add a row to `TASKS` for clips with one label each: copy `ks`, change the instruction and the
#    field of the label, and call `build_prompt` and `gold_answer` on a row written by hand. Expect
#    a prompt like that of `ucf`, and for a wrong field name a `DataError` that lists the fields.
