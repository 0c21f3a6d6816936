"""The steps that all recipes share.

They open a run, load its rows, score the baseline, train and finish.

A recipe calls, in this order:

    open_run             joins the processes and chooses the run folder
    load_backbone        calls load_model, a function of the recipe
    load_rows            reads the samples and encodes their media
    add_trained_parts    a function of the recipe
    begin                sets what learns, writes config.json, scores the baseline
    train_model
    evaluate_test_rows
    finish               writes predictions, pictures and metrics.json

infer.py and `--plan` call these functions of a recipe's module: run_settings, load_model,
add_trained_parts, prepare_samples, built_in_data, and side_shape if it has side channels. Defaults
of the first four stand at the end of this file; a recipe names those that it takes.
"""

import csv
import json
import random
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from crab_min.backbones import load
from crab_min.config import Settings
from crab_min.data import Sample, form_of, pick_tasks, read_splits
from crab_min.devices import describe_device
from crab_min.errors import RunError
from crab_min.evaluation.answering import Decoding, generate_answers, token_limits
from crab_min.evaluation.budget import TokenBudget
from crab_min.evaluation.lenient import score_baseline
from crab_min.evaluation.page import write_card, write_page
from crab_min.evaluation.pictures import draw_curves, draw_scores, draw_sheet
from crab_min.evaluation.report import Evaluation, best_and_worst, evaluate
from crab_min.evaluation.scores import (
    by_task,
    chance,
    constants,
    score_all,
    training_table,
    write_predictions,
)
from crab_min.features import Features
from crab_min.interface import QuestionForm, load_prompts
from crab_min.model import AVLanguageModel
from crab_min.runs import processes
from crab_min.runs.asking import asking_command, card_command
from crab_min.runs.folder import SavedRun, atomic_write, choose_folder, lock_run, write_trained
from crab_min.runs.log import check_tracker
from crab_min.side_channels import add_side_channels, limit_media
from crab_min.trained_parts import unadapted
from crab_min.trainer import fit, trained_parameters

ANSWERS = "answers.partial.jsonl"  # to the test rows, while they are being answered
# bounds on the samples that a run learns which names neither steps nor epochs
LEAST_SAMPLES = 2400
MOST_SAMPLES = 4800
MOST_SAMPLES_UNKNOWN = 20800  # where pictures and sounds are new to the tiny base


@dataclass
class Run:
    """A training run; a recipe fills in its model, rows and steps one after the other.

    Attributes:
        recipe: name of the recipe's module.
        name: the run folder is runs/NAME, if --out names no other.
        began: time at which the run was opened, in seconds.
        model: set by the recipe.
        features, train_rows, test_rows: set by load_rows.
        form, prompts: how one's own questions and the tasks are worded; set by load_rows.
        held_out: training rows that only choose the best checkpoint; set by load_rows.
        decoding, steps: set by begin.
        lock: the locked file in the run folder; set by begin, on the first process alone.
    """

    recipe: str
    name: str
    settings: Settings
    device: torch.device
    folder: Path
    began: float = field(default_factory=time.time)
    model: AVLanguageModel = field(init=False)
    features: Features = field(init=False)
    train_rows: list[Sample] = field(init=False)
    test_rows: list[Sample] = field(init=False)
    held_out: list[Sample] = field(init=False)
    form: QuestionForm | None = field(init=False)
    prompts: dict[str, str] = field(init=False)
    decoding: Decoding = field(init=False)
    steps: range = field(init=False)
    lock: TextIO = field(init=False)


def open_run(recipe: str, name: str, settings: Settings) -> Run:
    """Join the other processes, choose the run folder and seed the random generators.

    Raises:
        RunError: the folder is that of another run, --init-from names no run, or the tracker of
            --log-to is not installed.
    """
    check_tracker(settings.run.log_to)
    start = settings.training.init_from
    if start and not Path(start, "config.json").exists():
        raise RunError(f"--init-from {start}: no run of train.py is there; name a finished one")
    device = processes.start(settings.run.device, settings.backbone.pretrained)
    folder = processes.on_first(lambda: choose_folder(settings, name))
    torch.manual_seed(settings.training.seed)
    return Run(recipe, name, settings, device, folder)


def load_backbone(run: Run, load_model: Callable) -> None:
    """Load the frozen backbone of a run onto its device.

    With --fsdp its LM is shared out first: one device need not hold it.

    Args:
        load_model: (settings, device=...) -> model, of the recipe.
    """
    fsdp = run.settings.training.fsdp
    run.model = load_model(run.settings, device="cpu" if fsdp else run.device)
    if fsdp:
        processes.shard(run.model.llm)
        run.model.is_sharded = True
    run.model.to(run.device)
    run.model.bf16 = run.settings.training.bf16


# --- rows ----------------------------------------------------------------------------------------


def load_rows(
    run: Run, built_in_data: Callable[[Settings], Path], prepare_samples: Callable
) -> None:
    """Read the rows of a run and encode their media.

    An unreadable training file is skipped and counted. A missing test file is an error, or with
    --allow-missing its rows are wrong.

    Args:
        built_in_data: makes the data of a run without --data and returns its path.
        prepare_samples: (samples, settings) -> samples in the form of the paper.

    Raises:
        RunError: features of no side channel of the run; no training rows that can be read.
    """
    settings = run.settings
    data = settings.data

    # a wrong name is an error before the world is built
    run.model.check_trainable(settings.training.parts)
    for name in data.feature_folders:
        if name not in settings.side_channels:
            raise RunError(
                f"--features {name}=...: the run's side channels are "
                f"{', '.join(settings.side_channels) or 'none'}"
            )
    tasks = pick_tasks(data.tasks)
    prompts = load_prompts(data.prompts) if data.prompts else None
    root = data.data or processes.on_first(lambda: str(built_in_data(settings)))

    train, test = read_splits(data, root, tasks, prompts, settings.training.seed)
    run.form = form_of(train)
    run.prompts = prompts or {}
    if not test and processes.rank() == 0:
        print(
            f"warning: no test rows in {root}, so the run is not evaluated; name some with --test "
            "FILE, or in a column split"
        )

    # features of the frozen encoders
    max_bad = 1.0 if data.allow_missing else data.max_bad
    run.features = Features(run.model, data.cache_features, max_bad, data.workers)
    run.test_rows = prepare_samples(test, settings)
    run.features.prepare(run.test_rows, strict=not data.allow_missing)
    train = run.features.prepare(prepare_samples(train, settings), strict=False)

    # with --eval-every some random rows are not trained on
    run.held_out = []
    if settings.run.eval_every:
        count = min(settings.run.eval_rows, len(train) // 2)
        run.held_out = random.Random(settings.training.seed).sample(train, count)
    ids = {sample.id for sample in run.held_out}
    run.train_rows = [sample for sample in train if sample.id not in ids]
    if not run.train_rows:
        raise RunError(f"{root}: no row to train on is left; see what was skipped")


def steps_of(settings: Settings, rows: int) -> int:
    """Return the optimizer steps of a run.

    They are as given, by epochs, or three passes over the rows. The samples of three passes are
    bounded by what a laptop does in five minutes. The bound is higher where pictures and sounds are
    new to the tiny base.

    Args:
        rows: number of training rows.
    """
    training = settings.training
    if training.steps:
        return training.steps
    if training.epochs:
        return max(1, round(training.epochs * rows / samples_per_step(settings)))
    unknown = settings.world.things or settings.data.data
    most = MOST_SAMPLES_UNKNOWN if unknown else MOST_SAMPLES
    samples = max(LEAST_SAMPLES, min(most, 3 * rows))
    return max(1, round(samples / samples_per_step(settings)))


def samples_per_step(settings: Settings) -> int:
    """Return the number of samples of an optimizer step, over all processes."""
    return settings.training.batch_size * settings.training.grad_accum * processes.count()


def side_channel_widths(run: Run) -> dict[str, int]:
    """Return the feature width of each side channel.

    It is read from the first row that has the channel.

    Raises:
        RunError: no training row has a side channel of the run.
    """
    widths: dict[str, int] = {}
    names = run.settings.side_channels
    for sample in run.train_rows:
        present = {part.side for part in sample.media}
        if any(name in present and name not in widths for name in names):
            for part, medium in zip(sample.media, run.features([sample])[0]):
                if part.side:
                    widths[part.side] = medium.features.shape[-1]
    for name in names:
        if name not in widths:
            raise RunError(
                f"no training row has the side channel {name}; rows of a .jsonl name their files "
                'under "sides"'
            )
    return widths


# --- the beginning -------------------------------------------------------------------------------


def begin(run: Run) -> None:
    """Set what learns, lock the folder, write config.json, score before training.

    A new adapter or patch adds nothing yet, because its last weights are zero. So the baseline is
    the score of the frozen model, or with --init-from that of the run from which training starts.

    Raises:
        RunError: nothing learns, or another process uses the folder.
    """
    model = run.model
    training = run.settings.training

    # what learns
    if training.init_from:
        model.restore_trained(Path(training.init_from))
    model.set_trainable(training.parts)
    if training.gradient_checkpointing:
        model.llm.activation_checkpointing_enable({"use_reentrant": False})
    if not trained_parameters(model):
        raise RunError(
            f"--adapter {run.settings.adapter.adapter} --trainable {training.trainable}: nothing "
            "of the model learns; name a part, or an adapter"
        )

    # the folder belongs to this process from here on
    run.steps = range(steps_of(run.settings, len(run.train_rows)))
    budget = TokenBudget(run.settings.run.eval_batch_tokens, sharded=training.fsdp)
    limits = token_limits(model, run.train_rows)
    run.decoding = Decoding(limits, run.settings.run.eval_mode, budget=budget)
    if processes.rank() == 0:
        run.lock = lock_run(run.folder)
        steps = len(run.steps)
        saved = SavedRun(
            run.name,
            run.recipe,
            run.settings,
            steps,
            limits,
            model.layout,
            run.form,
            run.prompts,
        )
        saved.save(run.folder)
        write_own_rows(run.folder / "test.jsonl", run.test_rows)
        print(
            f"{run.folder}: {len(run.train_rows)} training rows and {len(run.test_rows)} test rows "
            f"of {len(limits)} tasks, {steps} steps of {samples_per_step(run.settings)} samples, "
            f"on {describe_device(run.device)}"
        )
        print(describe_trained(model))
    if run.settings.run.baseline:
        evaluate_baseline(run)


def write_own_rows(file: Path, samples: list[Sample]) -> None:
    """Write the rows of one's own among test samples to a .jsonl; nothing if there are none."""
    rows = {id(sample.row): sample.row for sample in samples if sample.task.name == "own"}
    lines = [json.dumps(row, ensure_ascii=False) for row in rows.values()]
    if lines:
        atomic_write(file, "\n".join(lines) + "\n")


def describe_trained(model: AVLanguageModel) -> str:
    """Describe in one line how many parameters are trained, and in which parts."""
    trained = sum(parameter.numel() for parameter in trained_parameters(model))
    total = sum(parameter.numel() for parameter in model.parameters())

    # the adapter is inside the LM; the other parts are modules of their own
    parts = []
    trained_names = [name for name, p in model.named_parameters() if p.requires_grad]
    if any("lora_" in name for name in trained_names):
        parts.append("adapter")
    for name, module in model.trainable_modules().items():
        if any(parameter.requires_grad for parameter in module.parameters()):
            parts.append(name)
    text = f"trained: {trained:,} of {total:,} parameters, in {', '.join(parts)}"
    without = unadapted(model.llm) if "adapter" in parts else []
    return f"{text}; without an adapter: {', '.join(without)}" if without else text


def evaluate_baseline(run: Run) -> None:
    """Score the test rows before training, strictly and leniently, and write base.json.

    Nothing is done if it exists already.
    """
    if processes.on_first(lambda: (run.folder / "base.json").exists()):
        return
    rows = rows_of_each_task(run.test_rows, run.settings.run.baseline_rows)
    unfinished = run.folder / "base.partial.jsonl"
    strict = not run.settings.data.allow_missing
    texts = generate_answers(
        run.model, run.features, rows, run.decoding, "frozen base", unfinished, strict
    )
    if processes.rank() == 0:
        scores = score_baseline(rows, texts, run.train_rows)
        atomic_write(run.folder / "base.json", json.dumps(scores))
        unfinished.unlink(missing_ok=True)


def rows_of_each_task(rows: list[Sample], count: int) -> list[Sample]:
    """Return `count` random rows of each task, all rows for 0.

    They are the same ones each time.
    """
    chosen = []
    for of_task in by_task(rows).values():
        samples = [sample for (sample,) in of_task]
        if 0 < count < len(samples):
            samples = random.Random(0).sample(samples, count)
        chosen += samples
    return chosen


# --- training and its end ------------------------------------------------------------------------


def train_model(run: Run, **options) -> None:
    """Train the model and save its trained parts.

    Args:
        options: arguments of trainer.fit; by default all steps with the settings of the run.
    """
    options = {"settings": run.settings, "steps": run.steps, **options}
    if run.held_out:
        options["evaluate"] = partial(held_out_metric, run)
    with training_errors(run):
        fit(run.model, run.features, run.train_rows, folder=run.folder, **options)
    if processes.rank() == 0:
        write_trained(run.folder, run.model)


def held_out_metric(run: Run) -> float:
    """Return the mean metric of the tasks on held-out rows."""
    rows = run.held_out
    texts = generate_answers(run.model, run.features, rows, run.decoding, "held-out rows")
    metrics = [result["metric"] for result in score_all(rows, texts).values()]
    return sum(metrics) / len(metrics)


@contextmanager
def training_errors(run: Run):
    """Add advice to errors of the training loop, and draw the curves however it ends."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"out of memory ({str(error).split('.')[0]}); lower --batch-size and raise "
            "--grad-accum as much: the step stays the same. --gradient-checkpointing, --frames "
            "and --load-in-4bit save too; --plan says what the parts need. The last checkpoint is "
            "kept"
        ) from error
    except OSError as error:
        raise RunError(
            f"{run.folder}: cannot be written ({error.strerror}); free some space, then the same "
            "command continues from the last checkpoint"
        ) from error
    finally:
        if processes.rank() == 0:
            with suppress(OSError):  # the disk is full, which the error above says already
                draw_curves(run.folder / "curves.png", run.folder / "log.csv")


def evaluate_test_rows(run: Run) -> Evaluation:
    """Answer and score the test rows of a run; it continues where it was killed."""
    return evaluate(
        run.model,
        run.features,
        run.test_rows,
        run.decoding,
        partial=run.folder / ANSWERS,
        strict=not run.settings.data.allow_missing,
    )


def finish(run: Run, evaluation: Evaluation) -> dict:
    """Write predictions, pictures and metrics.json, print tables, unlock the folder.

    Returns:
        The numbers of metrics.json; {} on all processes but the first.
    """
    if processes.rank() > 0:
        return {}
    folder, results = run.folder, evaluation.scores

    # scores beside those of the frozen model, the best constant answer and guessing
    base = {}
    if run.settings.run.baseline:
        base = json.loads((folder / "base.json").read_text(encoding="utf-8"))
    add_references(results, base, run)

    # predictions, pictures and tables
    write_predictions(folder / "predictions", evaluation.samples, evaluation.texts)
    if results:
        draw_scores(folder / "scores.png", results)
        chosen = best_and_worst(evaluation, run.settings.training.seed)
        if chosen:
            draw_sheet(folder / "answers.png", chosen)
        print(training_table(results))
    for table in evaluation.tables:
        print(table)
    rows = []
    if run.settings.data.data:
        rows = run.features.readable(run.test_rows) or run.train_rows
    command = asking_command(folder, rows, run.form)
    write_page(folder, run.settings, evaluation, command, type(run.settings)())
    write_card(folder, run.settings.backbone.pretrained, card_command(folder, run.form), results)

    # metrics.json, which says that the run is finished: its checkpoints can go
    loss = losses_of(folder / "log.csv")
    seconds = round(time.time() - run.began, 1)
    metrics = {
        "tasks": results,
        "base": base,
        "unreadable_files": len({part.path for part in run.features.unreadable}),
        "loss": loss,
        **evaluation.numbers,
        "seconds": seconds,
        "steps": len(run.steps),
    }
    atomic_write(folder / "metrics.json", json.dumps(metrics, indent=1))
    (folder / ANSWERS).unlink(missing_ok=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    run.lock.close()
    print(
        f"loss per token: {loss['first']:.3f} in the first tenth of the steps, "
        f"{loss['last']:.3f} in the last\n"
        f"{seconds:.0f} s; everything is in {folder}/, report.html shows it. Ask about a clip:\n"
        f"{command}"
    )
    return metrics


def add_references(results: dict[str, dict], base: dict[str, dict], run: Run) -> None:
    """Add reference scores to each task's result.

    They are those of the base model, a constant answer and guessing.
    """
    constant = constants(run.train_rows, run.test_rows)
    chances = chance(run.test_rows)
    for task, result in results.items():
        if base:
            result["base"] = base[task]["metric"]
            if "lenient" in base[task]:
                result["base_lenient"] = base[task]["lenient"]
        result["constant"] = constant[task]
        if task in chances:
            result["chance"] = chances[task]


def types_of(task: str, result: dict) -> dict[str, dict]:
    """Return the scores of a task by type of question.

    All are under its name if it has no types.
    """
    return result.get("types") or {task: result}


def losses_of(log: Path) -> dict[str, float]:
    """Return the mean loss of the first tenth of the steps, and of the last."""
    with open(log, encoding="utf-8") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    tenth = max(1, len(losses) // 10)
    return {"first": sum(losses[:tenth]) / tenth, "last": sum(losses[-tenth:]) / tenth}


# --- defaults of what infer.py and --plan call of a recipe ---------------------------------------


def run_settings(settings: Settings) -> Settings:
    """Return the settings with which a run trains: those that were given."""
    return settings


def load_model(
    settings: Settings, empty: bool = False, device: torch.device | str | None = None
) -> AVLanguageModel:
    """Load the frozen backbone.

    Args:
        empty: build it without reading weights.
        device: where it is loaded to (load.load_model).
    """
    return load.load_model(settings.backbone, empty=empty, device=device)


def add_trained_parts(
    model: AVLanguageModel, settings: Settings, widths: dict[str, int] | None = None
) -> None:
    """Add the adapter on the LM.

    Args:
        widths: feature width of each side channel; there is none here.
    """
    model.add_adapter(settings.adapter)


def prepare_samples(
    samples: list[Sample], settings: Settings, side_channels: list[str] | None = None
) -> list[Sample]:
    """Give the media of samples the frames and lengths that the settings name.

    Args:
        side_channels: those that infer.py --side names, for patches that --patch has loaded.
    """
    if side_channels:
        samples = add_side_channels(samples, side_channels)
    return limit_media(samples, settings.data)
