"""The tiny base: a small CLIP, BEATs, two Q-Formers and a Llama.

They are trained on the built-in world.

`python train.py tiny-base` makes it from nothing in three stages: see and hear
(pretrain_encoders.py), then read (pretrain_lm.py), in which the LM learns to put into words what
the encoders report. The base never meets an instruction, an answer tag, a question, a sound to be
matched with one of two videos, or a test seed (split "base" has its own). What a task asks and how
it is answered is left to the adapter.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from crab_min.backbones.composed import (
    SPECIALS,
    ComposedModel,
    ModelConfig,
    load_base,
    load_tokenizer,
)
from crab_min.backbones.sizes import TINY_MODEL
from crab_min.config import BaseConfig
from crab_min.errors import ModelError
from crab_min.runs.folder import atomic_write
from crab_min.tinybase.captions import corpus
from crab_min.tinybase.check import check_base
from crab_min.tinybase.pretrain_encoders import train_hear, train_see
from crab_min.tinybase.pretrain_lm import train_read
from crab_min.world.rendering import Renderer

MERGES = 1000  # of the tokenizer; its other tokens are 256 bytes and the special tokens


@dataclass
class Progress:
    """The progress of a base: base.json, by which an interrupted run continues."""

    config: dict
    stages: list[str] = field(default_factory=list)
    minutes: float = 0
    log: list[dict] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)  # of the finished base

    def save(self, folder: Path) -> None:
        atomic_write(folder / "base.json", json.dumps(asdict(self), indent=1) + "\n")


def train_base(config: BaseConfig) -> None:
    """Make the base and write it to its folder, with base.json.

    This has figures, time and the log. An interrupted run continues with the same command after its
    last finished stage.

    Raises:
        ModelError: the folder holds a finished base, or an interrupted one with other settings.
    """
    folder, renderer = Path(config.out), Renderer()
    folder.mkdir(parents=True, exist_ok=True)
    model, progress = start_or_continue(folder, renderer, config)

    # the stages that are not done yet
    for name, train in (("see", train_see), ("hear", train_hear), ("read", train_read)):
        if name in progress.stages:
            continue
        began = time.time()
        torch.manual_seed(config.seed)
        train(model, renderer, config, progress.log.append)
        model.save_base(folder)
        progress.stages.append(name)
        progress.minutes += (time.time() - began) / 60
        progress.save(folder)

    # what the base reaches
    progress.figures = check_base(model, renderer, config.seed, config.check_scenes)
    progress.save(folder)
    print(f"{folder}: made in {progress.minutes:.1f} minutes, {json.dumps(progress.figures)}")


def start_or_continue(
    folder: Path, renderer: Renderer, config: BaseConfig
) -> tuple[ComposedModel, Progress]:
    """Return a new base and its progress, or those of an interrupted run."""
    # an interrupted run: the model as it was after its last finished stage
    if (folder / "base.json").exists():
        progress = Progress(**json.loads((folder / "base.json").read_text(encoding="utf-8")))
        if progress.figures:
            raise ModelError(
                f"{folder}: holds a finished base, which will not be overwritten; "
                "choose another --out"
            )
        if progress.config != asdict(config):
            raise ModelError(
                f"{folder}: an interrupted base with other settings ({progress.config}); "
                "use them to continue it, or another --out"
            )
        return load_base(folder).train(), progress

    # a new one: tokenizer and random weights
    torch.manual_seed(config.seed)
    train_tokenizer(corpus(renderer, config.seed)).save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    model = ComposedModel(ModelConfig(**TINY_MODEL), tokenizer)
    init_weights(model)
    return model, Progress(asdict(config))


def train_tokenizer(corpus: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer with single digits."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + len(SPECIALS) + MERGES,
        show_progress=False,
        special_tokens=list(SPECIALS),
        initial_alphabet=alphabet,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def init_weights(model: ComposedModel) -> None:
    """Initialise the weights for small widths.

    The libraries' standard deviation of 0.02 suits widths of 768 and more; at 128 all attention
    would be uniform at first.
    """
    for part in (model.visual_qformer, model.audio_qformer, model.llm.model):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
    for connector in (model.visual_qformer, model.audio_qformer):
        nn.init.normal_(connector.query)
    nn.init.normal_(model.vision.model.embeddings.position_embedding.weight, std=0.3)
    width = model.llm.config.hidden_size
    nn.init.normal_(model.llm.get_input_embeddings().weight, std=width**-0.5)
