"""Crab+ (2603.04128): I-LoRA on the LM, trained on all tasks at once through text.

python train.py crab_plus-tiny

At full size: crab_plus-3b and crab_plus-7b.
"""

from pathlib import Path

from crab_min.config import Settings
from crab_min.data import Sample
from crab_min.recipes.common import (
    add_trained_parts,
    begin,
    evaluate_test_rows,
    finish,
    load_model,
    load_rows,
    open_run,
    train_model,
)
from crab_min.side_channels import add_side_channels, limit_frames
from crab_min.world.folders import build_world


def train(settings: Settings, preset: str) -> dict:
    """Train a run, by default in runs/PRESET, and return the numbers of its metrics.json."""
    run = open_run("crab_plus", preset, settings)

    # the frozen audio-visual LM, and the rows of all tasks, with answers as text
    run.model = load_model(settings).to(run.device)
    load_rows(run, built_in_data, prepare_samples)

    # what learns: the adapter, and the connectors and embeddings that --trainable names
    add_trained_parts(run.model, settings)
    begin(run)
    train_model(run)
    return finish(run, evaluate_test_rows(run))


# --- what infer.py and --plan call, beside load_model and add_trained_parts of common.py ---------


def run_settings(settings: Settings) -> Settings:
    """Return the settings with which a run trains: those that were given."""
    return settings


def prepare_samples(
    samples: list[Sample], settings: Settings, side_channels: list[str] | None = None
) -> list[Sample]:
    """Put samples into the form that a run learns.

    Args:
        side_channels: the side channels of patches that infer.py --patch has loaded.
    """
    if side_channels:
        samples = add_side_channels(samples, side_channels)
    return limit_frames(samples, settings.data.frames)


def built_in_data(settings: Settings) -> Path:
    """Build the built-in world and return its folder."""
    return build_world(settings.world, settings.training.seed)
