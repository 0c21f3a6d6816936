"""What several tests share: a small built world, the shipped base, the real clips."""

import hashlib
import os
from pathlib import Path

# weights that are not there are an error at once, without retries over a network
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from crab_min.backbones.composed import load_base  # noqa: E402
from crab_min.config import WorldConfig  # noqa: E402
from crab_min.world.folders import build_world  # noqa: E402

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def small_world(pytestconfig):
    """The AVUIE_2 folder of a world of 34 training and 18 test clips.

    It is kept in .pytest_cache until the code that makes it changes (`pytest --cache-clear`
    removes it); tests only read it.
    """
    code = hashlib.sha256()
    for folder in ("world", "media", "sources"):
        for file in sorted((ROOT / "crab_min" / folder).glob("*.py")):
            code.update(file.read_bytes())
    cache = pytestconfig.cache.mkdir(f"world-{code.hexdigest()[:8]}")
    return build_world(WorldConfig(world_clips=24, world_test=4), 0, cache)


@pytest.fixture(scope="session")
def tiny_model():
    return load_base()


@pytest.fixture(scope="session")
def real_media():
    """The AVUIE_2 folder of real clips."""
    default = ROOT / "../shared/media"
    root = Path(os.environ.get("CRAB_MEDIA", default)) / "AVUIE_2"
    if not root.is_dir():
        pytest.skip(f"no real clips at {root}; set CRAB_MEDIA")
    return root
