"""Tutorial 1: nineteen datasets, one interface. Read beside Crab+ (arXiv 2603.04128), the section on the unified input and output interface.

    python tutorials/01_unified_interface.py        (a minute on a CPU; the first time it also builds a small world)

Matching, emotion, question answering, localisation, boxes: Crab+ trains them all with one loss, because every task is put as
"media and an instruction in, reasoning and a tagged label out". This script follows one row of each kind from the annotation file to the
number, and draws it.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from crab_min.data import load_for_figure, read_samples
from crab_min.evaluation.metrics import score
from crab_min.evaluation.pictures import draw_answer
from crab_min.tasks import TASKS
from crab_min.world.folders import WorldConfig, build_world

SHOWN = ["a2v", "ucf", "meld", "avqa", "ave", "avvp", "ref_avs"]

# 1. An annotation is a row of JSON; what its fields mean is a row of TASKS. Neither is code.
root = build_world(WorldConfig(world_clips=48, world_test=4), seed=0)
samples = {task: read_samples(root, [task], "train")[0] for task in SHOWN}
row, task = samples["ave"].row, TASKS["ave"]
print(f"A row of ave/train.json:\n  {row}\n")
print(f"The row of TASKS that reads it:\n  family {task.family}, {task.frames} frames, sound as {task.audio}, parser {task.parser}, metric {task.metric}\n")

# 2. The prompt builder turns a row into parts. The same function serves training, evaluation and infer.py.
print("The prompt and the target of one row of each kind:")
for sample in samples.values():
    prompt = "".join(p.text if p.kind == "text" else f"<{p.kind}>" for p in sample.parts).replace("\n", " | ")
    print(f"  {sample.task.name:<8} {prompt}\n           -> {sample.target}")

# 3. The target has prose first (who, where, when) and then the label in its tag. --target label trains on the tag alone.
print("\nThe same targets as labels alone:")
for sample in samples.values():
    print(f"  {sample.task.name:<8} {sample.task.format(sample.task.parse(sample.target))}")

# 4. Models do not write like annotators. The parser takes what it can, and says why where it cannot; nothing is dropped.
print("\nWhat a model might write for the ave row, and what it is worth:")
(label, ((start, end), *_)), = samples["ave"].gold.events
for text in (f"I hear it. <event>{label}, ({start} {end})</event>", f"<Event> {label.upper()} ,( {start} , {end} ) ", f"<event>{label}</event> <range>{start},10</range>",
             "<event>whale, (0 10)</event>", f"the {label}, from {start} to {end}"):
    answer = task.parse(text)
    result = score(task, [answer], [samples["ave"].gold])
    print(f"  {text:<58} segment accuracy {result['metric']:.1f}{'   (' + answer.error + ')' if answer.error else ''}")

# 5. A picture of a row: what the model sees and hears, and the gold answer over it.
sample = samples["avvp"]
picture = Path("answers/tutorial_01.png")
draw_answer(picture, load_for_figure(sample), sample.parts[-1].text.strip(), sample.gold, sample.target)
print(f"\nLook at {picture}: the frames, the sound, and a bar for every event seen or heard.")
print('Now change "avvp" in step 5 to "ref_avs" and run it again: the time line becomes a box and three points, from the same function.')
