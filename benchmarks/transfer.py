"""Negative transfer: what joint training of all tasks costs each task, or gives it.

    python benchmarks/transfer.py            # about two hours on 2 cores; the same command goes on
    python benchmarks/transfer.py --quick    # a few minutes: fewer tasks, rows, seeds and adapters
    python benchmarks/transfer.py --share 2/2    # side by side with a process that trains 1/2

Crab+ (2603.04128) reports that joint training makes many tasks worse than training on each alone,
and that explicit reasoning and I-LoRA turn this around. Here both are measured in the built-in
world. An arm is an adapter x a target x a seed x (one task alone | all tasks jointly). In both a
task gives the same number of the same samples, so that only the company differs.

    difference = metric after joint training - metric after training on the task alone

A task gains or loses where the bootstrap interval of the difference excludes zero; else it is a
tie. Resampled are the test rows, the same ones for both arms; seeds are averaged.

Each arm leaves OUT/ARM.json with its answers, from which all numbers are computed. OUT also gets
transfer.json (differences and shares), transfer.md (tables) and transfer.png.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from common import ROOT
from tqdm import tqdm

from crab_min.answers import Answer
from crab_min.backbones.load import load_model
from crab_min.config import AdapterConfig, Settings, WorldConfig, with_values
from crab_min.data import Sample, read_samples
from crab_min.evaluation.answering import Decoding, generate_answers, token_limits
from crab_min.evaluation.metrics import score
from crab_min.features import Features
from crab_min.model import AVLanguageModel
from crab_min.runs.folder import atomic_write
from crab_min.tasks import TASKS, Task
from crab_min.trainer import backward, collate_answers, make_optimizer, set_learning_rate, update
from crab_min.world.folders import build_world

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

# "lora, wide" has about as many parameters (510,720) as "ilora" (507,392)
ADAPTERS = {
    "lora": AdapterConfig("lora", r=16, alpha=32, dropout=0),
    "lora, wide": AdapterConfig("lora", r=35, alpha=70, dropout=0),
    "ilora": AdapterConfig("ilora", r=16, alpha=32, dropout=0),
}
TARGETS = ("reasoning", "label")
JOINT = "all tasks"
BATCH_SIZE = 4


@dataclass(frozen=True)
class Arm:
    """One training run of the study."""

    adapter: str
    target: str
    seed: int
    tasks: str  # name of a task, or JOINT

    @property
    def name(self) -> str:
        return "-".join(map(str, (self.adapter, self.target, self.tasks, self.seed)))


class Study:
    """The encoded world, and the answers of the arms that have ended.

    Args:
        tasks: names of the tasks that train jointly. Those with test rows are also trained alone.
        samples: samples per task and arm.
        test_rows: test rows per task; 0 for all.
    """

    def __init__(
        self, out: Path, world: WorldConfig, tasks: list[str], samples: int, test_rows: int
    ):
        self.out = out
        self.samples = samples
        root = build_world(world, seed=0)
        self.train = {}
        for target in TARGETS:
            self.train[target] = read_samples(root, tasks, "train", target)
        tested = [name for name in tasks if "test" in TASKS[name].splits]
        self.test = read_samples(root, tested, "test", limit=test_rows)

        # the frozen encoders are the same in every arm: each medium is encoded once
        self.features = Features(load_model(Settings().backbone), keep=True)
        self.features.prepare(self.train["reasoning"] + self.test)

    @property
    def tested(self) -> list[Task]:
        """The tasks with test rows."""
        return list(dict.fromkeys(sample.task for sample in self.test))

    def file(self, arm: Arm) -> Path:
        return self.out / f"{arm.name}.json"

    def left(self, arms: list[Arm]) -> list[Arm]:
        """Return the arms that have not ended."""
        return [arm for arm in arms if not self.file(arm).exists()]

    def run_all(self, arms: list[Arm]) -> None:
        """Train arms one after the other, with a bar over all of their samples."""
        total = sum(len(self.training_samples(arm)) for arm in arms)
        with tqdm(total=total, desc="arms", unit="sample") as bar:
            for arm in arms:
                bar.set_postfix_str(arm.name)
                self.run(arm, bar)

    def run(self, arm: Arm, bar: tqdm) -> None:
        """Train an arm, answer the test rows of its tasks, and write its file."""
        settings = with_values(Settings(), seed=arm.seed)
        torch.manual_seed(arm.seed)
        model = self.make_model(arm, settings)
        self.features.model = model

        # learn and answer
        train = self.training_samples(arm)
        test = [sample for sample in self.test if arm.tasks in (JOINT, sample.task.name)]
        loss = train_on(model, self.features, train, settings, bar)
        decoding = Decoding(token_limits(model, train))
        texts = generate_answers(model, self.features, test, decoding)
        answers = {sample.id: text for sample, text in zip(test, texts)}
        atomic_write(self.file(arm), json.dumps({"loss": loss, "answers": answers}))

    def make_model(self, arm: Arm, settings: Settings) -> AVLanguageModel:
        """Return a fresh model: adapter, connectors and embeddings train, as in crab_plus-tiny."""
        model = load_model(settings.backbone)
        model.add_adapter(ADAPTERS[arm.adapter])
        model.set_trainable(settings.training.parts)
        return model

    def training_samples(self, arm: Arm) -> list[Sample]:
        """Return the samples of an arm in random order, equally many of each task.

        A task has the same samples in both of its arms. If it has too few, they come again.
        """
        chosen = []
        for name in dict.fromkeys(sample.task.name for sample in self.train[arm.target]):
            if arm.tasks in (JOINT, name):
                rows = [s for s in self.train[arm.target] if s.task.name == name]
                random.Random(f"{arm.seed}/{name}").shuffle(rows)
                repeats = -(-self.samples // len(rows))
                chosen += (rows * repeats)[: self.samples]
        random.Random(arm.seed).shuffle(chosen)
        return chosen

    def scores(self, task: Task, arms: list[Arm]) -> "TaskScores":
        """Return the answers of a task in several arms, ready to be scored on any rows."""
        rows = [sample for sample in self.test if sample.task is task]
        answers = []
        for arm in arms:
            texts = json.loads(self.file(arm).read_text(encoding="utf-8"))["answers"]
            answers.append([task.parse(texts[sample.id]) for sample in rows])
        return TaskScores(task, [sample.gold for sample in rows], answers)


def train_on(
    model: AVLanguageModel,
    features: Features,
    samples: list[Sample],
    settings: Settings,
    bar: tqdm,
) -> float:
    """Train once on the samples in their order; return the mean loss of the last tenth."""
    training = settings.training
    optimizer = make_optimizer(model, training)
    batches = [samples[i : i + BATCH_SIZE] for i in range(0, len(samples), BATCH_SIZE)]
    losses = []
    model.train()
    for step, batch in enumerate(batches):
        set_learning_rate(optimizer, step, range(len(batches)), training.warmup)
        collated = collate_answers(model, batch, features(batch))
        losses.append(backward(model, [collated], training.bf16).loss)
        update(optimizer, training.max_grad_norm)
        bar.update(len(batch))
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


# --- differences and their intervals --------------------------------------------------------------


@dataclass
class TaskScores:
    """The answers of several arms to the test rows of one task.

    Attributes:
        answers: one list per arm (seed), each with one answer per row.
    """

    task: Task
    golds: list[Answer]
    answers: list[list[Answer]]

    def columns(self, rows: np.ndarray) -> dict[str, float]:
        """Return the metrics on some rows, rows that come several times counting as often.

        Args:
            rows: (n,) indices.

        Returns:
            name of the metric -> its mean over the arms.
        """
        golds = [self.golds[i] for i in rows]
        values: dict[str, list[float]] = {}
        for answers in self.answers:
            result = score(self.task, [answers[i] for i in rows], golds)
            for name, value in {self.task.metric: result["metric"], **result["all"]}.items():
                values.setdefault(name, []).append(value)
        return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def differences(single: TaskScores, joint: TaskScores, resamples: int) -> dict[str, dict]:
    """Compare two ways of training one task.

    Args:
        resamples: of the bootstrap.

    Returns:
        name of a metric -> "single", "joint", "difference", its 95 % interval "low" and "high",
        and "verdict": gain, loss or tie.
    """
    count = len(single.golds)
    all_rows = np.arange(count)
    before, after = single.columns(all_rows), joint.columns(all_rows)

    # the same resampled rows for both
    rng = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {name: [] for name in before}
    for _ in range(resamples):
        rows = rng.integers(count, size=count)
        single_columns, joint_columns = single.columns(rows), joint.columns(rows)
        for name in before:
            # a metric of a class that was not drawn is missing
            if name in single_columns and name in joint_columns:
                drawn[name].append(joint_columns[name] - single_columns[name])

    table = {}
    for name in before:
        low, high = np.percentile(drawn[name], [2.5, 97.5])
        table[name] = {
            "single": before[name],
            "joint": after[name],
            "difference": after[name] - before[name],
            "low": float(low),
            "high": float(high),
            "verdict": verdict(low, high),
        }
    return table


def verdict(low: float, high: float) -> str:
    """Return what an interval of joint minus single says."""
    if low > 0:
        return "gain"
    return "loss" if high < 0 else "tie"


def shares(verdicts: list[str]) -> dict[str, float]:
    """Return the share of each verdict."""
    return {name: verdicts.count(name) / len(verdicts) for name in ("loss", "tie", "gain")}


# --- tables and figure ----------------------------------------------------------------------------


def summarize(study: Study, seeds: list[int], adapters: list[str], resamples: int) -> dict:
    """Return the differences and shares of every adapter and target: transfer.json."""
    summary = {}
    for adapter in adapters:
        for target in TARGETS:
            tasks = {}
            for task in study.tested:
                alone = [Arm(adapter, target, seed, task.name) for seed in seeds]
                joint = [Arm(adapter, target, seed, JOINT) for seed in seeds]
                single_scores, joint_scores = study.scores(task, alone), study.scores(task, joint)
                tasks[task.name] = differences(single_scores, joint_scores, resamples)

            # main metric of each task, and every column
            mains = [tasks[task.name][task.metric] for task in study.tested]
            columns = [column for table in tasks.values() for column in table.values()]
            summary[f"{adapter}, {target}"] = {
                "tasks": tasks,
                "share of tasks": shares([main["verdict"] for main in mains]),
                "share of columns": shares([column["verdict"] for column in columns]),
                "mean single": float(np.mean([main["single"] for main in mains])),
                "mean joint": float(np.mean([main["joint"] for main in mains])),
            }
    return summary


def markdown(summary: dict) -> str:
    """Return the tables of a summary as Markdown."""
    lines = [
        "| adapter, target | mean alone | mean joint | tasks that lose | tie | gain "
        "| columns that lose | tie | gain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in summary.items():
        cells = [f"{result['mean single']:.3f}", f"{result['mean joint']:.3f}"]
        for share in ("share of tasks", "share of columns"):
            cells += [f"{100 * value:.0f} %" for value in result[share].values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| task, metric | adapter, target | alone | joint | difference | 95 % | |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, result in summary.items():
        for task, table in result["tasks"].items():
            column = table[TASKS[task].metric]
            lines.append(
                f"| {task}, {TASKS[task].metric} | {name} | {column['single']:.3f} "
                f"| {column['joint']:.3f} | {column['difference']:+.3f} "
                f"| {column['low']:+.3f} to {column['high']:+.3f} | {column['verdict']} |"
            )
    return "\n".join(lines) + "\n"


def draw(summary: dict, path: Path) -> None:
    """Draw the difference of each task with its interval: a row of targets, colours of adapters."""
    tasks = list(next(iter(summary.values()))["tasks"])
    figure, rows = pyplot.subplots(
        len(TARGETS), figsize=(10, 6), sharex=True, sharey=True, layout="constrained"
    )
    for axes, target in zip(rows, TARGETS):
        adapters = [name for name in ADAPTERS if f"{name}, {target}" in summary]
        for number, adapter in enumerate(adapters):
            result = summary[f"{adapter}, {target}"]["tasks"]
            columns = [result[task][TASKS[task].metric] for task in tasks]
            x = np.arange(len(tasks)) + 0.2 * (number - (len(adapters) - 1) / 2)
            y = np.array([column["difference"] for column in columns])
            low = y - [column["low"] for column in columns]
            high = [column["high"] for column in columns] - y
            errors = np.clip([low, high], 0, None)
            axes.errorbar(x, y, errors, fmt="o", markersize=4, label=adapter)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_ylabel("joint minus alone")
        axes.set_title(f"target: {target}")
    rows[0].legend(loc="lower right", ncols=len(ADAPTERS))
    rows[-1].set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
    figure.suptitle("What joint training gives each task, with 95 % bootstrap intervals")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


# --- the command ----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small study, to try the command")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128, help="samples per task and arm")
    parser.add_argument("--share", default="1/1", help="k/n: every n-th arm from the k-th on")
    parser.add_argument("--resamples", type=int, default=500, help="of the bootstrap")
    parser.add_argument("--out", default=str(ROOT / "runs/transfer"))
    args = parser.parse_args()
    first, step = map(int, args.share.split("/"))
    if not 1 <= first <= step:
        parser.error(f"--share {args.share}: give 1/1, or 1/2 and 2/2")

    # the size of the study
    out, samples, seeds = Path(args.out), args.samples, list(range(args.seeds))
    tasks, adapters = [name for name, task in TASKS.items() if task.v2], list(ADAPTERS)
    world, test_rows, resamples = WorldConfig(), 0, args.resamples
    if args.quick:
        out, samples, seeds = out.with_name(f"{out.name}-quick"), 16, [0]
        tasks, adapters = ["ks", "avqa", "arig"], ["ilora"]
        world, test_rows, resamples = WorldConfig(world_clips=48, world_test=8), 8, 50

    # the arms that have not ended
    out.mkdir(parents=True, exist_ok=True)
    study = Study(out, world, tasks, samples, test_rows)
    arms = []
    for seed in seeds:
        for adapter in adapters:
            for target in TARGETS:
                names = [task.name for task in study.tested]
                arms += [Arm(adapter, target, seed, name) for name in [JOINT, *names]]
    own = arms[first - 1 :: step]
    left = study.left(own)
    print(f"{len(arms)} arms, {len(own)} in this share, {len(left)} of them to be trained")
    study.run_all(left)

    # what came out, once all shares have ended
    missing = study.left(arms)
    if missing:
        print(
            f"{len(missing)} arms of other shares have not ended; start this again when they have"
        )
        return
    summary = summarize(study, seeds, adapters, resamples)
    atomic_write(out / "transfer.json", json.dumps(summary, indent=1))
    atomic_write(out / "transfer.md", markdown(summary))
    draw(summary, out / "transfer.png")
    print(markdown(summary))


if __name__ == "__main__":
    main()
