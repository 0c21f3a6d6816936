"""Crab+ (2603.04128): I-LoRA on the LM, trained on all tasks at once through text.

python train.py crab_plus-tiny (crab_plus-3b, crab_plus-7b)
"""

from pathlib import Path

from crab_min.backbones import load
from crab_min.config import Settings
from crab_min.data import Sample
from crab_min.evaluation.report import Evaluation, evaluate
from crab_min.model import AVLanguageModel
from crab_min.recipes.common import begin, finish, load_rows, open_run, train_model
from crab_min.side_channels import add_side_channels, limit_frames
from crab_min.world.folders import build_world


def train(settings: Settings, preset: str) -> dict:
    """Train a run, by default in runs/PRESET, and return the numbers of its metrics.json."""
    run = open_run("crab_plus", preset, settings)

    # the frozen audio-visual LM, and the rows of all tasks as text
    run.model = load_model(settings).to(run.device)
    load_rows(run, built_in_data, prepare_samples)

    # what learns: the adapter; connectors and embeddings where --trainable names them
    add_trained_parts(run.model, settings)
    begin(run)
    train_model(run)
    test = run.rows.test
    return finish(run, evaluate_model(run.model, run.features, test, run.decoding, settings))


# --- what infer.py and --plan call ---------------------------------------------------------------


def run_settings(settings: Settings) -> Settings:
    """Return the settings with which a run trains."""
    return settings


def load_model(settings: Settings, empty: bool = False) -> AVLanguageModel:
    """Load the frozen backbone, or build it without weights."""
    return load.load_model(settings.backbone, empty=empty)


def add_trained_parts(
    model: AVLanguageModel, settings: Settings, widths: dict[str, int] | None = None
) -> None:
    """Add what learns.

    Args:
        widths: of the features of each side channel; here there is none.
    """
    model.add_adapter(settings.adapter)


def prepare_samples(
    samples: list[Sample], settings: Settings, side_channels: list[str] | None = None
) -> list[Sample]:
    """Put samples into the form that a run learns.

    Args:
        side_channels: names for a patch that was loaded beside the run's adapter (infer.py).
    """
    if side_channels:
        samples = add_side_channels(samples, side_channels)
    return limit_frames(samples, settings.data.frames)


def built_in_data(settings: Settings) -> Path:
    """Build the built-in world and return its folder."""
    return build_world(settings.world, settings.training.seed)


def evaluate_model(model, features, samples, decoding, settings: Settings, **options) -> Evaluation:
    """Answer and score samples; arguments as of report.evaluate."""
    return evaluate(model, features, samples, decoding, **options)
