"""What several tests share: a small built world, the shipped base, the real clips."""
import os
from pathlib import Path

import pytest
import torch

from crab_min.backbones.composed import load_base
from crab_min.world.folders import WorldConfig, build_world

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """The AVUIE_2 folder of a world of 32 training and 16 test clips."""
    return build_world(WorldConfig(world_clips=24, world_test=4), 0, tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def tiny_model():
    return load_base()


@pytest.fixture(scope="session")
def real_media():
    """The AVUIE_2 folder of real clips."""
    root = Path(os.environ.get("CRAB_MEDIA", Path(__file__).parents[1] / "../shared/media")) / "AVUIE_2"
    if not root.is_dir():
        pytest.skip(f"no real clips at {root}; set CRAB_MEDIA")
    return root
