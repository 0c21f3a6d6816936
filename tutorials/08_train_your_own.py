"""Tutorial 8: a folder of clips and a table of labels become a model that knows them.

    python tutorials/08_train_your_own.py                                     (three minutes on a CPU; clips of the built-in world, as if they were yours)
    python tutorials/08_train_your_own.py --clips FOLDER --labels TABLE.csv   (your own: a line "file,label" for each clip)

What is yours is written as annotation rows of AV-UIE, looked at, planned, trained on, and examined on clips that were held out.
"""
import argparse
import csv
import json
import os
import random
import shutil
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import infer
import train
from crab_min.tools import check
from crab_min.world.folders import WorldConfig, build_world

parser = argparse.ArgumentParser()
parser.add_argument("--clips", type=Path, default=Path("data/mine/clips"), help="folder of clips")
parser.add_argument("--labels", type=Path, default=Path("data/mine/labels.csv"), help="CSV file with the columns file and label")
parser.add_argument("--preset", default="crab_plus-tiny", help="what to train; crab_plus-7b for real clips and a GPU")
given = parser.parse_args()

# 1. What you have: clips in a folder, and a table that says what happens in each. Here the built-in world lends both.
if not given.labels.exists():
    world = build_world(WorldConfig(world_clips=240, world_test=40), seed=1) / "ks"
    given.clips.mkdir(parents=True, exist_ok=True)
    lines = ["file,label"]
    for split in ("train", "test"):
        for row in json.loads((world / f"{split}.json").read_text()):
            clip = Path(os.path.normpath(world / "video" / row["video_path"]))
            shutil.copy(clip, given.clips / clip.name)
            lines.append(f"{clip.name},{row['action']}")
    given.labels.write_text("\n".join(lines) + "\n")
by_label = defaultdict(list)
for line in csv.DictReader(open(given.labels)):
    by_label[line["label"]].append(line["file"])
print(f"{given.labels}: {sum(map(len, by_label.values()))} clips, " + ", ".join(f"{label} {len(files)}" for label, files in sorted(by_label.items())))

# 2. Rows: which task of AV-UIE asks what you ask? For a label of what is done it is ks: a clip, its sound, its action. A fifth of each label is for testing.
# Clips stay where they are: paths are relative to ks/video/ and ks/audio/. A clip with sound serves as both.
root, rows = given.labels.with_name("AVUIE_2"), defaultdict(list)
for label, files in by_label.items():
    random.Random(0).shuffle(files)
    for i, file in enumerate(files):
        path = os.path.relpath(given.clips / file, root / "ks" / "video")
        rows["test" if i % 5 == 0 else "train"].append({"video_path": path, "audio_path": path, "action": label})
for split, some in rows.items():
    (root / "ks").mkdir(parents=True, exist_ok=True)
    (root / "ks" / f"{split}.json").write_text(json.dumps(some, indent=1))
print("a row:", json.dumps(rows["train"][0]))
print("With a field \"label\" (\"The dog opens its mouth, barking is heard. So <answer>barking</answer>.\") it would learn to give reasons; without, the label alone.")

# 3. Look before you train: is each file there, does it decode, how long is it?
own = ["--data", str(root), "--tasks", "ks"]
assert check.main([*own, "--out", str(root / "check.json")]) == 0

# 4. Will it fit? Nothing is downloaded for the answer.
assert train.main(["crab_plus-7b", *own, "--plan"]) == 0

# 5. Train. Killed, or stopped with Ctrl-C, it goes on with the same command; curves.png in the run folder shows how it went.
assert train.main([given.preset, *own, "--steps", "200", "--eval-every", "50", "--eval-rows", "12", "--out", "runs/mine"]) == 0

# 6. Examine it on the clips that were held out, and again with other clips' sounds and with black pictures: what did the answers rest on? Of the built-in
# world on sound alone (accuracy 1.00, 0.00 and 1.00 when we ran it): an action is always heard there.
for flags in ([], ["--without", "sound"], ["--without", "frames"]):
    print("\nexamined " + " ".join(flags))
    assert infer.main(["--eval", *own, "--run", "runs/mine", "--out", "runs/mine/" + "-".join(["eval", *flags[1:]]), *flags]) == 0
first = rows["test"][0]
assert infer.main([str(given.clips / Path(first["video_path"]).name), "--task", "ks", "--run", "runs/mine"]) == 0
print(f"right is: {first['action']}")
