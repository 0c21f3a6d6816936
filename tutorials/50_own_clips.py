# %% [markdown]
# # 50. Train on clips of your own
#
# * Code: [own.py](../crab_min/sources/own.py): `read_own_rows`, `split_rows`;
#   [check.py](../crab_min/tools/check.py), [train.py](../train.py), [infer.py](../infer.py)
#
# From a folder of clips and a table of labels to a model that answers. For clips of your own change
# LABELS: a CSV file with the columns clip and label. Where it does not exist, the built-in world
# lends 60 clips, as if they were yours.

# %%
import csv
import json
import sys
from collections import Counter
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

import infer
import train
from crab_min.evaluation.figures import TEAL, new_figure, save
from crab_min.media.write import write_video
from crab_min.sources.own import read_own_rows, split_rows
from crab_min.tools import check
from crab_min.world.rendering import Renderer
from crab_min.world.scenes import FPS
from crab_min.world.things import RATE, SECONDS

LABELS, RUN = Path("data/mine/labels.csv"), Path("runs/mine")
PRESET, STEPS = "crab_plus-tiny", "20"  # for real clips and a GPU: crab_plus-7b --fit, more steps


def lend_clips():
    LABELS.parent.mkdir(parents=True, exist_ok=True)
    renderer, lines = Renderer(), ["clip,label"]
    counts = dict.fromkeys(["dog", "drum", "car", "bird"], 15)
    times = [frame / FPS for frame in range(SECONDS * FPS)]
    for index in range(400):  # until each label has its clips
        scene = renderer.scene("train", "action", index, seed=1)
        thing = renderer.things[scene.objects[0].thing]
        if counts.get(thing.label):
            counts[thing.label] -= 1
            frames, wave = renderer.frames(scene, times), renderer.wave(scene)
            write_video(LABELS.parent / f"{scene.name}.mp4", frames, wave, FPS, RATE)
            lines.append(f"{scene.name}.mp4,{thing.action}")
    LABELS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if not LABELS.exists():
    lend_clips()
with open(LABELS, encoding="utf-8") as table:
    labels = Counter(line["label"] for line in csv.DictReader(table))
for label, count in labels.items():
    print(f"{count} clips: {label}")

# %% [markdown]
# ## From the table to prompts
#
# One reader takes tables, class folders and .jsonl files, and makes rows of one form: a
# conversation and its media. The question lists the labels. A fifth of the clips of each label is
# for testing; the choice is the same each time.

# %%
rows = split_rows(read_own_rows(LABELS), seed=0)
print("a row:", json.dumps(rows[0]["messages"], indent=1))
by_split = Counter((row["split"], row["messages"][1]["content"]) for row in rows)
assert all(by_split["test", answer] == 3 for split, answer in by_split if len(labels) == 4)
print("rows:", Counter(row["split"] for row in rows))

# %% [markdown]
# ## Check, then train
#
# The check decodes every file. A run that was stopped continues when the command is given again.
# A finished one is kept: choose another RUN to train anew. A step has 8 samples: two batches of 4,
# as this preset has `--grad-accum 2`. In the table of scores `base` is the model before training,
# `constant` the best single answer given to all clips, `parsed` the share of answers that have the
# right form. `report.html` in the run shows scores, confusions, the best and the worst clips.

# %%
own = ["--data", str(LABELS)]
report = ["--out", str(LABELS.with_name("check.json"))]
assert check.main([*own, *report, "--figure", str(LABELS.with_name("check.png"))]) == 0
if not (RUN / "metrics.json").exists():
    size = ["--steps", STEPS, "--batch-size", "4"]
    assert train.main([PRESET, *own, *size, "--out", str(RUN)]) == 0
print("size of the page:", (RUN / "report.html").stat().st_size, "bytes")

# %% [markdown]
# ## Evaluate: what do the answers rest on?
#
# The test clips again, then with the sounds of other clips, then with black pictures. If the score
# falls, the answers rest on what was taken away. The lent clips get the sound of another label, and
# no answer is right; without pictures all are. So this model only listens. (`uar` is the mean
# recall of the labels.)

# %%
accuracies = {}
for flags in ([], ["--ablate", "audio"], ["--ablate", "video"]):
    out = RUN / "_".join(["eval", *flags[1:]])
    assert infer.main(["--eval", "--run", str(RUN), "--out", str(out), *flags]) == 0
    scores = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["tasks"]
    accuracies[" ".join(flags) or "as it is"] = scores["own"]["metric"]
print(accuracies)
axes = new_figure(6, 2).subplots()
axes.barh(
    ["as they are", "with other sounds", "with black pictures"], accuracies.values(), color=TEAL
)
axes.set(xlim=(0, 1), xlabel="accuracy on the test clips")
axes.invert_yaxis()
# figure: accuracy on the test clips as they are, with the sounds of others, with black pictures
save(axes.figure, Path("answers/50_own_clips.png"))

# %% [markdown]
# ## Ask: one clip, then many
#
# The run keeps the form of its question, so a clip is enough. Many clips and questions go through
# one command, which continues where it was stopped. So small a run knows its own question alone.

# %%
clip = next(row["videos"][0] for row in rows if row["split"] == "test")
assert infer.main(["--run", str(RUN), clip]) == 0
questions = LABELS.with_name("questions.txt")
questions.write_text(f"Which of these is it: {', '.join(sorted(labels))}?\n", encoding="utf-8")
answers = LABELS.with_name("answers.csv")
answers.unlink(missing_ok=True)
many = ["--questions", str(questions), "--run", str(RUN), "--out", str(answers)]
assert infer.main([*many, clip]) == 0
print(answers.read_text(encoding="utf-8"))

# %% [markdown]
# ## Exercises
#
# 1. Ask what it never learned. Change `Which of these is it: {', '.join(sorted(labels))}?` to
#    `Is it a dog?`; expect `Is it a dog?`.
# 2. What would a real model need? Nothing is downloaded for a plan. Change
#    `assert infer.main(["--run", str(RUN), clip]) == 0` to
#    `train.main(["crab_plus-7b", *own, "--fit", "24", "--plan"])`; expect `--load-in-4bit`.
