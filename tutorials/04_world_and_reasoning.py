"""Tutorial 4: from a scene to a clip, a question and a reasoned answer. Read beside Crab (arXiv 2503.13068), the section on the AV-UIE data.

    python tutorials/04_world_and_reasoning.py      (about four minutes on a CPU; the first time it also builds a small world)

Crab's claim is that tasks help each other when the training text says *how* an answer is found: who, where, when, and only then the label.
On real clips such text has to be written by a model and checked by people. In the built-in world it follows from the scene, exactly, so
the claim can be tried: this script takes one scene apart, then trains twice, once on reasoned targets and once on bare labels.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from crab_min.data import load_for_figure, read_samples
from crab_min.evaluation.answering import table
from crab_min.evaluation.pictures import draw_answer
from crab_min.tasks import TASKS
from crab_min.trainer import TrainConfig, run
from crab_min.world.folders import WorldConfig, build_world
from crab_min.world.questions import questions
from crab_min.world.rendering import Renderer

# 1. A scene is symbols: what there is, where, and in which seconds it is seen and heard. It is drawn from (seed, split, kind, index) alone.
renderer = Renderer()
scene = next(s for s in (renderer.scene("train", "many", i) for i in range(1000))
             if len(s.seen) == len(s.heard) == 2 and len(s.objects) == 3)
print(f"Scene {scene.name}, at the place {scene.place!r}:")
for o in scene.objects:
    print(f"  {o.label:<8} {'off screen' if not o.seen else f'{o.position}, seen {o.seen}':<28} {f'heard {o.heard}' if o.heard else 'silent'}")

# 2. Frames, sound and masks are computed from the symbols; nothing is measured afterwards, so no label can be wrong.
print(f"\nframes {renderer.frames(scene, np.arange(10) + .5).shape}, wave {renderer.wave(scene).shape}, "
      f"pixels of the {scene.objects[0].label} at 5.5 s: {int((renderer.mask(scene, scene.objects[0], 5.5) > 0).sum())}")

# 3. So are questions. An audio-visual one asks where something sounds: the eyes know what is where, the ears what sounds when.
#    (tests/test_world.py fits the best rule it can from all visual facts alone, and from all audio facts alone: it stays near guessing.)
print("\nSome questions about it, each with its evidence:")
for modality, kind, question, answer, evidence in list(questions(scene))[::2]:
    print(f"  {modality + ' ' + kind:<26} {question:<64} {evidence} So {answer}.")

# 4. The clip and the rows that point to it are files in the AV-UIE v2 layout, read like the real data.
config = WorldConfig(world_clips=240, world_test=12)
root = build_world(config, seed=0)
sample = next(s for s in read_samples(root, ["avvp"], "train") if len(s.gold.audio_events) == 2)
draw_answer(Path("answers/tutorial_04.png"), load_for_figure(sample), sample.parts[-1].text.strip(), TASKS["avvp"].parse(sample.target), sample.target)
print("\nanswers/tutorial_04.png shows a clip of it with its events.")

# 5. Reasoned targets against bare labels: the same clips, questions, steps and adapter. A reasoned answer is longer, so a
#    step costs more; what it may buy is that the label can be read off the evidence just written.
for target in ("reasoning", "label"):
    out = Path("runs") / f"tutorial_04_{target}"
    if not (out / "metrics.json").exists():
        run(TrainConfig(world_clips=240, world_test=12, target=target, tasks="ave,avqa,meld,ucf", steps=120, out=str(out), r=16, alpha=32), "crab_plus-tiny")
print("\nreasoning, then label, after 120 steps each:")
for target in ("reasoning", "label"):
    print(f"\n--target {target}\n" + table(json.loads((Path("runs") / f"tutorial_04_{target}" / "metrics.json").read_text())["tasks"]))

print("""
Two cautions. A minute on 240 clips is far from the end of either curve: the table of the README is the long run. And a thing of another world
(--things FOLDER) that was never in training has one recording and one picture: its name cannot be known, so it stays at chance by nature.
Now change steps=120 to steps=600, remove runs/tutorial_04_* and run it again: a few times the passes, and the tables show which target gains more.""")
