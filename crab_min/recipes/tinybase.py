"""The tiny base itself, trained from scratch on the built-in world.

python train.py tiny-base
"""

from crab_min.config import BaseSettings
from crab_min.tinybase.make import train_base


def train(settings: BaseSettings, preset: str) -> None:
    """Train the base and write it into the folder that the settings name."""
    train_base(settings.base)
