"""Crab+ (2603.04128): I-LoRA on the LM, trained on all tasks at once through text.

python train.py crab_plus-tiny

At full size: crab_plus-3b and crab_plus-7b.
"""

from pathlib import Path

from crab_min.config import Settings
from crab_min.recipes import common
from crab_min.world.folders import build_world


def train(settings: Settings, preset: str) -> dict:
    """Train a run, by default in runs/PRESET, and return its metrics.json."""
    run = common.open_run("crab_plus", preset, settings)

    # the frozen audio-visual LM, and the rows of all tasks, with answers as text
    common.load_backbone(run, load_model)
    common.load_rows(run, built_in_data, prepare_samples)

    # what learns: the adapter, and the connectors and embeddings that --trainable names
    add_trained_parts(run.model, settings)
    common.begin(run)
    common.train_model(run)
    return common.finish(run, common.evaluate_test_rows(run))


# --- what infer.py and --plan call ---------------------------------------------------------------

run_settings = common.run_settings
load_model = common.load_model
add_trained_parts = common.add_trained_parts
prepare_samples = common.prepare_samples


def built_in_data(settings: Settings) -> Path:
    """Build the built-in world and return its folder."""
    return build_world(settings.world, settings.training.seed)
