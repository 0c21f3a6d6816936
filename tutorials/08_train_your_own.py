"""Tutorial 8: from a folder of clips and a table of labels to a trained model, with the same commands as for the papers' data.

    python tutorials/08_train_your_own.py      (about four minutes on a CPU; the first time it also builds the world)

The clips are those of the built-in world, as if they were yours: all that is taken from it is a folder of videos and a CSV that says what is heard in each
and when. Everything after step 1 is what you would do. What a run wants to know of data is in README.md, "Your own data".
"""
import csv
import json
import random
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import infer
import train
from crab_min import data
from crab_min.interface import event_tag
from crab_min.world_tasks import WorldConfig, build_world

mine = Path("data/mine")
shutil.rmtree(mine, ignore_errors=True)

# 1. What you have: clips and a table. (Here 340 clips of the world in which one thing is seen and heard.)
(mine / "clips").mkdir(parents=True)
world, table = build_world(WorldConfig(), 0), [["file", "label", "start", "end"]]
for split in ("train", "test"):
    for row in json.loads((world / "ave" / f"{split}.json").read_text()):
        shutil.copy(world / "ave" / "video" / row["video_path"], mine / "clips")
        table.append([row["video_path"], row["event"], row["start_time"], row["end_time"]])
with open(mine / "labels.csv", "w", newline="") as file:
    csv.writer(file).writerows(table)
print(f"{mine}/labels.csv, {len(table) - 1} rows:", *(",".join(map(str, row)) for row in table[:4]), sep="\n  ")

# 2. Rows. The task `ave` asks "which event, from when to when?"; its fields are in interface.py, TASKS. What the model learns to write is the text under
#    "label_content": the evidence in words, then the label in the tag that the answer is read from. The sound is taken from the video file.
#    Clips of one recording belong on one side of the split, or the test measures memory; these are all different scenes.
rows = list(csv.DictReader(open(mine / "labels.csv")))
random.Random(0).shuffle(rows)
splits = {"test": rows[:80], "train": rows[80:]}
(mine / "AVUIE_2" / "ave").mkdir(parents=True)
for split, some in splits.items():
    made = []
    for row in some:
        span = int(row["start"]), int(row["end"])
        path = f"../../clips/{row['file']}"
        text = f"The {row['label']} is heard. So {event_tag('event', row['label'], [span])}."
        made.append({"video_path": path, "audio_path": path, "event": row["label"], "vid": Path(row["file"]).stem, "start_time": span[0], "end_time": span[1], "label_content": text})
    (mine / "AVUIE_2" / "ave" / f"{split}.json").write_text(json.dumps(made, indent=1))
print(f"\na row of {mine}/AVUIE_2/ave/train.json:\n  {json.dumps(made[0])}")

# 3. Look before you train: rows, labels, lengths, files that are missing or cannot be read.
print("\n$ python -m crab_min.data check --data data/mine/AVUIE_2 --headers")
assert data.main(["check", "--data", str(mine / "AVUIE_2"), "--headers"]) == 0

# 4. What will it need? The plan counts parameters, tokens a sample and memory without weights; for crab_plus-7b it says which GPU holds it.
print("\n$ python train.py --plan --data data/mine/AVUIE_2 --tasks ave")
assert train.main(["--plan", "--data", str(mine / "AVUIE_2"), "--tasks", "ave"]) == 0

# 5. Train. Every 50 steps it is examined on rows that are kept out of training, and the best state stays in best/; Ctrl-C stops it cleanly, and
#    the same command goes on. With several GPUs: torchrun --nproc-per-node N train.py ...
shutil.rmtree("runs/mine", ignore_errors=True)
flags = ["--data", str(mine / "AVUIE_2"), "--tasks", "ave", "--steps", "200", "--eval-every", "50", "--out", "runs/mine"]
print(f"\n$ python train.py {' '.join(flags)}")
assert train.main(flags) == 0

# 6. Read the result twice: a number, and the answers behind it. `constant` is what the best single answer would get.
metrics = json.loads(Path("runs/mine/metrics.json").read_text())["tasks"]["ave"]
print(f"\nseconds right: {metrics['metric']:.3f}, before training {metrics['base']:.3f}, best constant answer {metrics['blind']:.3f}")
print("how it went: runs/mine/curves.png; what it said: runs/mine/answers.png and runs/mine/predictions/ave.jsonl")

# 7. Does it listen? The same questions with other clips' sounds, asked of the best state.
print("\n$ python infer.py --eval --without sound --run runs/mine/best")
assert infer.main(["--eval", "--without", "sound", "--data", str(mine / "AVUIE_2"), "--tasks", "ave", "--run", "runs/mine/best", "--out", "runs/mine/deaf"]) == 0
