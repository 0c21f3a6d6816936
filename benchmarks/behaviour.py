"""Record what the commands do at seed 0, to compare it before and after a change of shape.

    python benchmarks/behaviour.py record OUT.json        # in a checkout; ten minutes on 2 cores
    python benchmarks/behaviour.py compare A.json B.json  # exit code 1 if a measurement differs

Recorded are losses and gradient norms of 20 steps of each recipe, the trained weights, `--plan` of
the large presets, scores of five rows per task, and the flags.
"""

import csv
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

WORLD = "--world-clips 48 --world-test 8 --test-rows 2 --steps 20"
RUNS = {
    "crab_plus": f"crab_plus-tiny {WORLD}",
    "visual": f"crab-tiny --stage visual {WORLD}",
    "audio": f"crab-tiny --stage audio {WORLD} --init-from OUT/visual",
    "unified": f"crab-tiny --stage unified {WORLD} --init-from OUT/audio",
    "masks": f"crab-tiny --stage masks {WORLD} --text-steps 10",
    "pave": f"pave-tiny --no-compare-lora {WORLD}",
    "crema": f"crema-tiny {WORLD}",
    "sequential": f"crema-tiny --modality-sequential {WORLD} --steps 5",
    "two_processes": f"crab_plus-tiny {WORLD} --batch-size 8",
}
PLANS = "crab_plus-3b crab_plus-7b crab-7b pave-0.5b pave-7b crema-xl".split()
EVALUATION = "--eval --test-rows 5 --run OUT/crab_plus --out OUT/crab_plus/eval"


# What a part's file and its tensors were called before parts had files of their own.
OLD_NAMES = {
    r"^embeddings\.": "words.",
    r"^modality_\w+?\.": "multimodal.",
    r"^mask_decoder\.": "masks.",
    r"^patch_\w+?\.": "",
}


def run(command: list[str]) -> str:
    """Run a command and return what it printed; stop if it fails."""
    print("+", *command, flush=True)
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(ended.stdout + ended.stderr)
    return ended.stdout


def weights(folder: Path) -> dict:
    """Return the norm and a hash of each trained file's tensors, whatever the files are called."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        if "checkpoints" in file.parts or "state" in file.parts:
            continue
        part = f"{file.stem}." if file.parent.name == "parts" else ""
        for name, tensor in load_file(file).items():
            name = part + name
            for pattern, old in OLD_NAMES.items():
                name = re.sub(pattern, old, name)
            bits = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:12]
            found[name] = {"norm": tensor.float().norm().item(), "bits": bits}
    return found


def record(file: Path) -> None:
    out = Path("runs/behaviour")
    python, torchrun = [sys.executable], [sys.executable, "-m", "torch.distributed.run"]
    found: dict = {"runs": {}, "plans": {}}
    for name, arguments in RUNS.items():
        many = [*torchrun, "--nproc-per-node", "2"] if name == "two_processes" else python
        arguments = arguments.replace("OUT", str(out)).split()
        run([*many, "train.py", *arguments, "--out", str(out / name)])
        rows = list(csv.DictReader(open(out / name / "log.csv")))
        steps = [[float(row["loss"]), float(row["grad_norm"])] for row in rows]
        found["runs"][name] = {"steps": steps, "weights": weights(out / name)}
    run([*python, "infer.py", *EVALUATION.replace("OUT", str(out)).split()])
    metrics = json.loads((out / "crab_plus/eval/metrics.json").read_text())["tasks"]
    found["evaluation"] = {task: result["metric"] for task, result in metrics.items()}
    for preset in PLANS:
        found["plans"][preset] = run([*python, "train.py", preset, "--plan"])
    for script in ("train.py", "infer.py"):
        found[script] = sorted(set(re.findall(r"--[a-z][\w-]*", run([*python, script, "--help"]))))
    file.write_text(json.dumps(found, indent=1))


def compare(before: dict, after: dict) -> bool:
    """Print what differs; return whether anything measured does."""
    worse = False
    for name, run_before in before["runs"].items():
        run_after = after["runs"][name]
        steps = zip(run_before["steps"], run_after["steps"], strict=True)
        step = max(abs(x - y) / max(1, abs(x)) for a, b in steps for x, y in zip(a, b))
        old, new = run_before["weights"], run_after["weights"]
        same = old.keys() & new.keys()
        bits = sum(old[key]["bits"] == new[key]["bits"] for key in same)
        norm = max(abs(old[key]["norm"] - new[key]["norm"]) for key in same)
        print(
            f"{name:<14} losses and norms differ by at most {step:.1e}; "
            f"{bits} of {len(old)} tensors equal in every bit, norms within {norm:.1e}; "
            f"gone {sorted(old.keys() - new.keys())[:4]}, new {sorted(new.keys() - old.keys())[:4]}"
        )
        worse |= step > 1e-6
    for part in ("evaluation", "plans", "train.py", "infer.py"):
        if before[part] != after[part]:
            print(f"{part}: before {before[part]}\n{part}: after  {after[part]}")
            worse |= part == "evaluation"
    return worse


if __name__ == "__main__":
    if sys.argv[1:2] == ["record"]:
        record(Path(sys.argv[2]))
    else:
        sys.exit(compare(*(json.loads(Path(file).read_text()) for file in sys.argv[2:4])))
