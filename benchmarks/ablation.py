"""What the heads, the rank and the router of I-LoRA are worth in joint training.

    python benchmarks/ablation.py            # over an hour on one core; the same command goes on
    python benchmarks/ablation.py --quick    # to try it: fewer tasks, rows, seeds and adapters

The joint arms of benchmarks/transfer.py, with one thing changed at a time: heads, rank, or a router
that gives each head the same weight. Each is compared with REFERENCE on the same test rows.

Not here: a router that decides once per sample. It would have to see the prompt alone, and a
linear sees a row of a training batch with its answer.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from common import ROOT
from transfer import JOINT, Arm, Study, differences, shares

from crab_min.backbones.load import load_model
from crab_min.config import AdapterConfig, Settings, WorldConfig
from crab_min.model import AVLanguageModel
from crab_min.runs.folder import atomic_write
from crab_min.tasks import TASKS

REFERENCE = "3 heads, rank 16"
UNIFORM = "3 heads, rank 16, uniform"
ADAPTERS = {
    REFERENCE: AdapterConfig("ilora", r=16, alpha=32, heads=3, dropout=0),
    "1 head, rank 16": AdapterConfig("ilora", r=16, alpha=32, heads=1, dropout=0),
    "2 heads, rank 16": AdapterConfig("ilora", r=16, alpha=32, heads=2, dropout=0),
    "4 heads, rank 16": AdapterConfig("ilora", r=16, alpha=32, heads=4, dropout=0),
    "3 heads, rank 4": AdapterConfig("ilora", r=4, alpha=8, heads=3, dropout=0),
    "3 heads, rank 32": AdapterConfig("ilora", r=32, alpha=64, heads=3, dropout=0),
    UNIFORM: AdapterConfig("ilora", r=16, alpha=32, heads=3, dropout=0),
}


class Ablation(Study):
    """The joint arms of the study, with ADAPTERS of this file."""

    def make_model(self, arm: Arm, settings: Settings) -> AVLanguageModel:
        model = load_model(settings.backbone)
        model.add_adapter(ADAPTERS[arm.adapter])
        model.set_trainable(settings.training.parts)
        if arm.adapter == UNIFORM:
            fix_router(model)
        return model


def fix_router(model: AVLanguageModel) -> None:
    """Give each head the weight 1 / K for every token, for good: softmax of zeros."""
    for name, weight in model.named_parameters():
        if "ilora_router" in name:
            weight.data.zero_()
            weight.requires_grad_(False)


def summarize(study: Study, seeds: list[int], adapters: list[str], resamples: int) -> dict:
    """Return by adapter the metric of each task, their mean, and verdicts against REFERENCE."""
    summary = {}
    for adapter in adapters:
        tasks = {}
        for task in study.tested:
            reference = study.scores(task, [Arm(REFERENCE, "reasoning", s, JOINT) for s in seeds])
            changed = study.scores(task, [Arm(adapter, "reasoning", s, JOINT) for s in seeds])
            tasks[task.name] = differences(reference, changed, resamples)[task.metric]
        summary[adapter] = {
            "tasks": {name: column["joint"] for name, column in tasks.items()},
            "mean": float(np.mean([column["joint"] for column in tasks.values()])),
            "share of tasks": shares([column["verdict"] for column in tasks.values()]),
        }
    return summary


def markdown(summary: dict) -> str:
    """Return the tables of a summary as Markdown."""
    lines = ["| adapter | mean | tasks that lose | tie | gain |", "|---|---|---|---|---|"]
    for name, result in summary.items():
        cells = [f"{100 * value:.0f} %" for value in result["share of tasks"].values()]
        if name == REFERENCE:
            cells = ["", "", ""]
        lines.append(f"| {name} | {result['mean']:.3f} | {' | '.join(cells)} |")
    tasks = list(summary[REFERENCE]["tasks"])
    lines += ["", f"| task, metric | {' | '.join(summary)} |", "|---" * (len(summary) + 1) + "|"]
    for task in tasks:
        cells = [f"{result['tasks'][task]:.3f}" for result in summary.values()]
        lines.append(f"| {task}, {TASKS[task].metric} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small study, to try the command")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128, help="samples per task and arm")
    parser.add_argument("--resamples", type=int, default=500, help="of the bootstrap")
    parser.add_argument("--out", default=str(ROOT / "runs/ablation"))
    args = parser.parse_args()

    # the size of the study
    out, samples, seeds = Path(args.out), args.samples, list(range(args.seeds))
    tasks, adapters = [name for name, task in TASKS.items() if task.v2], list(ADAPTERS)
    world, test_rows, resamples = WorldConfig(), 0, args.resamples
    if args.quick:
        out, samples, seeds = out.with_name(f"{out.name}-quick"), 16, [0]
        tasks, adapters = ["ks", "avqa", "arig"], [REFERENCE, UNIFORM]
        world, test_rows, resamples = WorldConfig(world_clips=48, world_test=8), 8, 50

    # the arms that have not ended
    out.mkdir(parents=True, exist_ok=True)
    study = Ablation(out, world, tasks, samples, test_rows)
    arms = [Arm(adapter, "reasoning", seed, JOINT) for seed in seeds for adapter in adapters]
    left = study.left(arms)
    print(f"{len(arms)} arms, {len(left)} of them to be trained")
    study.run_all(left)

    summary = summarize(study, seeds, adapters, resamples)
    atomic_write(out / "ablation.json", json.dumps(summary, indent=1))
    print(markdown(summary))


if __name__ == "__main__":
    main()
