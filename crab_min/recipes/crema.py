"""CREMA (2402.05889): self-gated fusion and sequential training.

Any modality goes through one Q-Former.

python train.py crema-tiny --modalities rgb,audio,flow,depth,thermal
python train.py crema-tiny --modalities rgb,audio,flow --compare fusion

At full size: crema-xl. A new modality can be pretrained without a video, on captions of sound or of
3D points; the run with the video then starts from there:

python train.py crema-tiny --modalities audio --fusion none --tasks audiocaps --data DATA
python train.py crema-tiny --modalities rgb,audio --init-from runs/crema-tiny

Page of the course: docs/course/44_sequential.md.
"""

import json
import math
from pathlib import Path

import torch

from crab_min.config import CremaSettings, ModalityConfig, TrainingConfig
from crab_min.crema import EarlyExit
from crab_min.data import Sample
from crab_min.errors import RunError
from crab_min.evaluation.answering import generate_answers
from crab_min.evaluation.report import Evaluation
from crab_min.evaluation.scores import score_all
from crab_min.model import AVLanguageModel, Batch
from crab_min.recipes import common
from crab_min.recipes.arms import check_comparison, train_arms
from crab_min.runs import processes
from crab_min.runs.folder import atomic_write
from crab_min.side_channels import add_side_channels, count_missing, limit_media
from crab_min.trainer import Step, StepResult, backward, update
from crab_min.world.side_channels import CHANNELS, SHAPES, build_side_world


def train(settings: CremaSettings, preset: str) -> dict:
    """Train a run, by default in runs/PRESET, and return its metrics.json.

    With --compare several runs; returns the metrics.json of the first.
    """
    if settings.crema.compare:
        check_comparison(settings.crema.compare, ["fusion", "order"])
        numbers = train_arms(settings, preset, arms_of(settings), train)
        return next(iter(numbers.values()))
    settings = run_settings(settings)
    run = common.open_run("crema", preset, settings)

    # the frozen video LM; prompts without sound, with the modalities of the video
    common.load_backbone(run, load_model)
    common.load_rows(run, built_in_data, prepare_samples)

    # what learns: an adapter in the Q-Former, queries and a projection per modality; the fusion
    add_trained_parts(run.model, settings, common.side_channel_widths(run))
    common.begin(run)
    if settings.sequential:
        steps_per_epoch = math.ceil(len(run.train_rows) / common.samples_per_step(settings))
        train_step = SequentialStep(settings.crema, steps_per_epoch)
        common.train_model(run, train_step=train_step)
        if processes.rank() == 0:
            atomic_write(run.folder / "exits.json", json.dumps(train_step.state(), indent=1))
    else:
        common.train_model(run)

    # the test rows once more with fewer modalities
    evaluation = common.evaluate_test_rows(run)
    if run.test_rows and settings.crema.has_video:
        add_subsets(run, evaluation)
    return common.finish(run, evaluation)


def arms_of(settings: CremaSettings) -> dict[str, dict]:
    """Return the runs of --compare: title -> the settings that they change."""
    if settings.crema.compare == "order":
        names = settings.side_channels
        orders = [names[i:] + names[:i] for i in range(len(names))]
        return {
            ",".join(order): {"compare": "", "modalities": ",".join(["rgb", *order])}
            for order in orders
        }
    designs = {
        "add": {"fusion": "add"},
        "concat": {"fusion": "concat"},
        "add no gate": {"fusion": "add", "crema_gated": False},
        "concat no gate": {"fusion": "concat", "crema_gated": False},
        "not fused": {"fusion": "none"},
    }
    return {title: {"compare": "", **values} for title, values in designs.items()}


class SequentialStep(Step):
    """A step of modality-sequential training: one update per modality.

    All updates take the same batches. An update trains the modality's own parameters and the
    fusion. A modality exits when its gradient has grown (modality-adaptive early exit); the others
    go on.
    """

    def __init__(self, config: ModalityConfig, steps_per_epoch: int):
        self.exits = EarlyExit(config.names, config.exit_threshold)
        self.steps_per_epoch = steps_per_epoch

    @property
    def finished(self) -> bool:
        """Tell whether all modalities have exited."""
        return not self.exits.live

    def __call__(
        self, model: AVLanguageModel, batches: list[Batch], optimizer, config: TrainingConfig
    ) -> StepResult:
        with model.frozen_tokens():
            for name in self.exits.live:
                # backward, note the norm of the modality's gradient, update
                model.set_active_modalities([name])
                result = backward(model, batches, config.bf16)
                self.exits.add_norm(name, model.gradient_norm(name))
                result.grad_norm = update(optimizer, config.max_grad_norm)
        result.active = "+".join(self.exits.live)
        return result

    def end(self, step: int) -> None:
        self.exits.end_step(step % self.steps_per_epoch == 0)

    def state(self) -> dict:
        return self.exits.state()

    def restore(self, state: dict) -> None:
        if state:
            self.exits.restore(state)


# --- what each modality is worth -----------------------------------------------------------------


def add_subsets(run: common.Run, evaluation: Evaluation) -> None:
    """Score the test rows with the video alone and with each modality beside it.

    Args:
        evaluation: of the test rows with all modalities. It gets the numbers and a table.
    """
    # "rgb", "rgb+audio", ... -> type of question, or task without types -> metric
    names = run.settings.crema.names
    subsets = {}
    for subset in [["rgb"], *(["rgb", name] for name in names[1:])]:
        if subset != names:
            title = "+".join(subset)
            rows = prepare_samples(run.test_rows, run.settings, subset[1:])
            strict = not run.settings.data.allow_missing
            texts = generate_answers(
                run.model, run.features, rows, run.decoding, title, strict=strict
            )
            subsets[title] = metric_by_type(score_all(rows, texts))
    subsets["+".join(names)] = metric_by_type(evaluation.scores)

    # numbers and table
    missing = count_missing(run.test_rows, run.settings.side_channels)
    evaluation.numbers |= {"subsets": subsets, "missing": missing}
    evaluation.tables.append(subset_table(subsets))


def metric_by_type(results: dict[str, dict]) -> dict[str, float]:
    """Return the metric of each type of question, or of the task if it has no types."""
    metrics = {}
    for task, result in results.items():
        for name, scores in common.types_of(task, result).items():
            metrics[name] = scores["metric"]
    return metrics


def subset_table(subsets: dict[str, dict[str, float]]) -> str:
    """Format the metric by subset of the modalities (rows) and type of question.

    The types are the columns.
    """
    types = sorted({name for scores in subsets.values() for name in scores})
    widths = {name: max(9, len(name) + 2) for name in types}
    title_width = max(len(title) for title in subsets) + 2
    header = "".join(f"{name:>{widths[name]}}" for name in types)
    lines = [f"{'modalities':<{title_width}}{header}"]
    for title, scores in subsets.items():
        cells = "".join(f"{scores[name]:>{widths[name]}.3f}" for name in types)
        lines.append(f"{title:<{title_width}}{cells}")
    return "\n".join(lines)


# --- what infer.py and --plan call ---------------------------------------------------------------


def side_shape(name: str, settings: CremaSettings) -> tuple[int, int, int] | None:
    """Return the shape of a modality's features for --plan, which reads no data.

    Returns:
        (steps, tokens per step, width), for audio of BEATs on ten windows of a sound; None for
        pictures, which the model's vision encoder encodes.
    """
    return {"audio": (10, 48, 768), **SHAPES}.get(name)


def run_settings(settings: CremaSettings) -> CremaSettings:
    """Return the settings with which a run trains: those that were given.

    Raises:
        RunError: settings exclude each other.
    """
    grad_accum = settings.training.grad_accum
    if settings.sequential and grad_accum > 1:
        raise RunError(
            f"--grad-accum {grad_accum}: with --modality-sequential a batch is passed once per "
            "modality; give --grad-accum 1, or --no-modality-sequential"
        )
    return settings


def load_model(
    settings: CremaSettings, empty: bool = False, device: torch.device | str | None = None
) -> AVLanguageModel:
    """Load the frozen backbone.

    Args:
        empty: build it without reading weights.
        device: where it is loaded to (load.load_model).

    Raises:
        RunError: the backbone has no Q-Former for several modalities.
    """
    if settings.backbone.backbone != "blip2":
        raise RunError(
            f"--backbone {settings.backbone.backbone}: modalities go through the Q-Former of "
            "--backbone blip2; for a side channel on another backbone train a pave preset"
        )
    model = common.load_model(settings, empty, device)
    model.choose_modalities(settings.crema)
    return model


def add_trained_parts(
    model: AVLanguageModel, settings: CremaSettings, widths: dict[str, int]
) -> None:
    """Add what learns: the parts of each modality and their fusion.

    If the run has an adapter on the LM, this is added too.

    Args:
        widths: feature width of each side modality.
    """
    model.add_adapter(settings.adapter)
    model.configure(settings.crema)
    for name in settings.side_channels:
        model.add_side_channel(name, widths[name], settings.crema)


def prepare_samples(
    samples: list[Sample], settings: CremaSettings, side_channels: list[str] | None = None
) -> list[Sample]:
    """Put samples into CREMA's form.

    The prompt has no sound, and the modalities stand behind the video. One without a video takes
    its place.

    Args:
        side_channels: names that replace those of the run.
    """
    names = settings.side_channels if side_channels is None else side_channels
    folders = settings.data.feature_folders
    samples = add_side_channels(
        samples, names, needed=False, folders=folders, with_video=settings.crema.has_video
    )
    return limit_media(samples, settings.data)


def built_in_data(settings: CremaSettings) -> Path:
    """Build the world with one question per modality; return its train.jsonl.

    Raises:
        RunError: the built-in world has no such modality.
    """
    world = settings.world
    names = settings.side_channels
    if not names:
        names = ["audio"]  # rgb alone needs questions too
    if set(names) - set(CHANNELS):
        raise RunError(
            f"--modalities {settings.crema.modalities}: the built-in world has "
            f"{', '.join(CHANNELS)}; for others give --data"
        )
    seed = settings.training.seed
    clips, test = world.world_clips, world.world_test
    return build_side_world(world.things, clips, test, seed, names, together=True)
