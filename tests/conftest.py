"""What several tests share: a small built world, the shipped base, the real clips."""

import os
from pathlib import Path

# weights that are not there are an error at once, without retries over a network
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from crab_min.backbones.composed import load_base  # noqa: E402
from crab_min.config import WorldConfig  # noqa: E402
from crab_min.world.folders import build_world  # noqa: E402

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """The AVUIE_2 folder of a world of 32 training and 16 test clips."""
    config = WorldConfig(world_clips=24, world_test=4)
    return build_world(config, 0, tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def tiny_model():
    return load_base()


@pytest.fixture(scope="session")
def real_media():
    """The AVUIE_2 folder of real clips."""
    default = Path(__file__).parents[1] / "../shared/media"
    root = Path(os.environ.get("CRAB_MEDIA", default)) / "AVUIE_2"
    if not root.is_dir():
        pytest.skip(f"no real clips at {root}; set CRAB_MEDIA")
    return root
