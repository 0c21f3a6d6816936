"""What the recipes share: opening a run, its rows, the frozen baseline, the end.

A recipe calls, in this order: open_run (folder, device), its own load_model, load_rows (features,
rows), its own add_trained_parts, begin (what learns, config.json, baseline), train_model, finish.

infer.py and `--plan` call of every recipe module: load_model, add_trained_parts, prepare_samples,
built_in_data, evaluate_model.
"""

import csv
import json
import random
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from crab_min.config import Settings
from crab_min.data import Sample, evaluation_data, pick_tasks, read_samples
from crab_min.errors import RunError
from crab_min.evaluation.answering import Decoding, generate_answers, options, token_limits
from crab_min.evaluation.pictures import draw_curves, draw_scores, draw_sheet
from crab_min.evaluation.report import Evaluation, best_and_worst
from crab_min.evaluation.scores import (
    chance,
    constants,
    score_all,
    training_table,
    write_predictions,
)
from crab_min.features import Features
from crab_min.interface import load_prompts
from crab_min.model import AVLanguageModel
from crab_min.runs import processes
from crab_min.runs.folder import SavedRun, atomic_write, choose_folder, lock_run, save_trained
from crab_min.tasks import TASKS
from crab_min.trainer import fit, trained_parameters

LEAST_STEPS, MOST_STEPS, MOST_STEPS_UNKNOWN = 300, 760, 1300  # of a run that names no number


@dataclass
class Rows:
    """The samples of a run; `held_out` are training rows that only choose the best checkpoint."""

    train: list[Sample]
    test: list[Sample]
    held_out: list[Sample] = field(default_factory=list)


@dataclass
class Run:
    """A training run: its folder, model and rows, as the recipe makes them one after the other."""

    recipe: str
    name: str
    settings: Settings
    device: torch.device
    folder: Path
    began: float = field(default_factory=time.time)
    model: AVLanguageModel = None
    features: Features = None
    rows: Rows = None
    decoding: Decoding = None
    steps: range = range(0)
    lock: object = None


def open_run(recipe: str, name: str, settings: Settings) -> Run:
    """Join the other processes, choose the run folder and seed the random generators.

    Raises:
        RunError: the folder is that of another run, or --init-from names no run.
    """
    start = settings.training.init_from
    if start and not Path(start, "config.json").exists():
        raise RunError(f"--init-from {start}: no run of train.py is there; name a finished one")
    device = processes.start()
    folder = processes.on_first(lambda: choose_folder(settings, name))
    torch.manual_seed(settings.training.seed)
    return Run(recipe, name, settings, device, folder)


# --- rows ----------------------------------------------------------------------------------------


def load_rows(run: Run, built_in_data: Callable[[Settings], Path], prepare: Callable) -> None:
    """Read the rows of a run, decode and encode their media; sets run.features and run.rows.

    An unreadable training file is skipped and counted; a missing test file is an error.

    Args:
        built_in_data: makes the data of a run without --data.
        prepare: (samples, settings) -> samples in the form of the paper.
    """
    settings, data = run.settings, run.settings.data
    # wrong names are an error before the world is built
    tasks = pick_tasks(data.tasks)
    prompts = load_prompts(data.prompts) if data.prompts else None
    root = data.data or processes.on_first(lambda: str(built_in_data(settings)))

    train = read_samples(root, tasks, "train", data.target, prompts)
    tested = [name for name in tasks if "test" in TASKS[name].splits]
    test_root, test = evaluation_data(root), []
    if tested and test_root:
        test = read_samples(test_root, tested, "test", data.target, prompts, data.test_rows)

    run.features = Features(run.model, data.cache_features, data.max_bad, data.workers)
    test = run.features.prepare(prepare(test, settings))
    train = run.features.prepare(prepare(train, settings), strict=False)
    run.rows = hold_out(Rows(train, test), settings)


def hold_out(rows: Rows, settings: Settings) -> Rows:
    """Take training rows away for --eval-every."""
    if not settings.run.eval_every:
        return rows
    count = min(settings.run.eval_rows, len(rows.train) // 2)
    held_out = random.Random(settings.training.seed).sample(rows.train, count)
    ids = {sample.id for sample in held_out}
    train = [sample for sample in rows.train if sample.id not in ids]
    return Rows(train, rows.test, held_out)


def steps_of(settings: Settings, rows: int) -> int:
    """Return the optimizer steps of a run: as given, by epochs, or three passes over the rows.

    Three passes are bounded by what a laptop does in ten minutes; by more where pictures and
    sounds are new to the tiny base.
    """
    training = settings.training
    samples_per_step = training.batch_size * training.grad_accum * processes.count()
    if training.steps:
        return training.steps
    if training.epochs:
        return max(1, round(training.epochs * rows / samples_per_step))
    unknown = settings.world.things or settings.data.data
    most = MOST_STEPS_UNKNOWN if unknown else MOST_STEPS
    return max(LEAST_STEPS, min(most, round(3 * rows / samples_per_step)))


def side_channel_widths(run: Run) -> dict[str, int]:
    """Return the width of the features of each side channel of a run.

    Raises:
        RunError: no training row has one of them.
    """
    names = run.settings.side_channels
    return {name: side_channel_width(run.features, run.rows.train, name) for name in names}


def side_channel_width(features: Features, rows: list[Sample], name: str) -> int:
    """Return the width of a side channel's tokens, as the first training row has it.

    Raises:
        RunError: no row has this side channel.
    """
    for sample in rows:
        names = [part.side for part in sample.media]
        if name in names:
            media = features([sample])[0]
            return media[names.index(name)].features.shape[-1]
    raise RunError(
        f"no training row has the side channel {name}; rows of a .jsonl name their files "
        'under "sides"'
    )


# --- the beginning -------------------------------------------------------------------------------


def begin(run: Run) -> None:
    """Set what learns, lock the run folder, write config.json, and score before training.

    New parts add nothing yet (their last weights are zero), so this is the score of the frozen
    model, or with --init-from of the run that training starts from.
    """
    model, training = run.model, run.settings.training
    if training.init_from:
        model.restore_trained(Path(training.init_from))
    model.set_trainable(training.parts)
    if training.gradient_checkpointing:
        model.llm.activation_checkpointing_enable({"use_reentrant": False})
    learned = describe_trained(model)
    if training.fsdp:
        processes.shard(model.llm)

    run.steps = range(steps_of(run.settings, len(run.rows.train)))
    run.decoding = Decoding(token_limits(model, run.rows.train), run.settings.run.eval_mode)
    if processes.rank() == 0:
        run.lock = lock_run(run.folder)
        saved = SavedRun(run.name, run.recipe, run.settings, len(run.steps))
        saved = replace(saved, token_limits=run.decoding.limits, layout=model.layout)
        saved.save(run.folder)
        print(describe_run(run))
        print(learned)
    evaluate_baseline(run)


def describe_run(run: Run) -> str:
    """Say how much is trained on, and for how long."""
    tasks = {sample.task.name for sample in run.rows.train}
    training = run.settings.training
    sizes = [training.batch_size, training.grad_accum, processes.count()]
    samples = " x ".join(str(size) for i, size in enumerate(sizes) if i == 0 or size > 1)
    return (
        f"{run.folder}: {len(run.rows.train)} training rows and {len(run.rows.test)} test rows of "
        f"{len(tasks)} tasks, {len(run.steps)} steps of {samples}"
    )


def describe_trained(model: AVLanguageModel) -> str:
    """Say how many parameters are trained, and in which parts."""
    trained = sum(parameter.numel() for parameter in trained_parameters(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    parts = [
        name
        for name, module in model.trainable_modules().items()
        if any(parameter.requires_grad for parameter in module.parameters())
    ]
    if any("lora_" in name for name, p in model.named_parameters() if p.requires_grad):
        parts.insert(0, "adapter")
    return f"trained: {trained:,} of {total:,} parameters, in {', '.join(parts)}"


def evaluate_baseline(run: Run) -> None:
    """Score the test rows before training, once per run; kept in base.json."""
    if processes.on_first(lambda: (run.folder / "base.json").exists()):
        return
    test = run.rows.test
    texts = generate_answers(run.model, run.features, test, run.decoding, "frozen base")
    if processes.rank() == 0:
        atomic_write(run.folder / "base.json", json.dumps(score_all(test, texts)))


def held_out_metric(run: Run) -> Callable[[], float] | None:
    """Return a function that computes the mean metric on held-out rows; None without such rows."""
    rows = run.rows.held_out
    if not rows:
        return None

    def evaluate() -> float:
        texts = generate_answers(run.model, run.features, rows, run.decoding, "held-out rows")
        metrics = [result["metric"] for result in score_all(rows, texts).values()]
        return sum(metrics) / len(metrics)

    return evaluate


def train_model(run: Run, steps: range | None = None, **options) -> None:
    """Train through `steps`, by default all of the run; options as of trainer.fit."""
    steps = run.steps if steps is None else steps
    options = {"settings": run.settings, "evaluate": held_out_metric(run), **options}
    with training_errors(run):
        fit(run.model, run.features, run.rows.train, folder=run.folder, steps=steps, **options)
    if processes.rank() == 0:
        save_trained(run.folder, run.model)


@contextmanager
def training_errors(run: Run):
    """Say what to do about errors in the loop, and draw the curves however it ends."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"out of memory ({str(error).split('.')[0]}); lower --batch-size and raise "
            "--grad-accum as much: the step stays the same. --gradient-checkpointing, --frames "
            "and --load-in-4bit save too; --plan says what the parts need"
        ) from error
    except OSError as error:
        raise RunError(
            f"{run.folder}: cannot be written ({error.strerror}); free some space, then the same "
            "command continues from the last checkpoint"
        ) from error
    finally:
        if processes.rank() == 0:
            with suppress(OSError):  # a full disk, which is named already
                draw_curves(run.folder / "curves.png", run.folder / "log.csv")


# --- the end -------------------------------------------------------------------------------------


def finish(run: Run, evaluation: Evaluation) -> dict:
    """Write and print what a run ends with; return the numbers of metrics.json."""
    if processes.rank():
        return {}
    folder, rows = run.folder, run.rows
    write_predictions(folder / "predictions", evaluation.samples, evaluation.texts)
    base = json.loads((folder / "base.json").read_text(encoding="utf-8"))
    constant = constants(rows.train, rows.test)
    chances = chance(rows.test, lambda sample: len(options(sample)))
    results = evaluation.scores
    for task, result in results.items():
        result |= {"base": base[task]["metric"], "constant": constant[task]}
        if task in chances:
            result["chance"] = chances[task]
    if results:
        draw_scores(folder / "scores.png", results)
        cells = best_and_worst(evaluation, run.settings.training.seed)
        draw_sheet(folder / "answers.png", cells)
        print(training_table(results))
    for table in evaluation.tables:
        print(table)

    metrics = {
        "tasks": results,
        "base": base,
        "loss": losses_of(folder / "log.csv"),
        **evaluation.numbers,
        "seconds": round(time.time() - run.began, 1),
        "steps": len(run.steps),
        "unreadable": len(run.features.unreadable),
    }
    atomic_write(folder / "metrics.json", json.dumps(metrics, indent=1))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    run.lock.close()
    loss = metrics["loss"]
    print(
        f"loss per token: {loss['first']:.3f} in the first tenth of the steps, "
        f"{loss['last']:.3f} in the last"
    )
    print(
        f"{metrics['seconds']:.0f} s; everything is in {folder}/. Ask about a clip: "
        f'python infer.py CLIP.mp4 --ask "..." --run {folder}'
    )
    return metrics


def losses_of(log: Path) -> dict[str, float]:
    """Return the mean loss of the first and of the last tenth of the steps."""
    with open(log, encoding="utf-8") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    tenth = max(1, len(losses) // 10)
    return {"first": sum(losses[:tenth]) / tenth, "last": sum(losses[-tenth:]) / tenth}
