"""The tiny base: a small CLIP, BEATs, two Q-Formers and a Llama, trained from nothing on what the built-in world shows and sounds like.

`python train.py tiny-base` makes it in three stages: see and hear (senses.py), then read (reading.py), in which the LM learns to put into words what
eyes and ears report. The base never sees an instruction, an answer tag, a question, a sound to be matched with one of two videos, or a test seed
(split "base" has its own): what a task asks and how it is answered is left to the adapter.
"""
import json
import time
from dataclasses import asdict, dataclass, field
from functools import partial
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
from crab_min.errors import ModelError
from crab_min.tinybase.captions import corpus
from crab_min.tinybase.pretrain_encoders import train_hear, train_see
from crab_min.tinybase.pretrain_lm import check_base, train_read
from crab_min.world.rendering import Renderer


@dataclass
class BaseConfig:
    """How long each stage of the base lasts."""
    see_steps: int = field(default=1100, metadata={"help": "steps of stage see (64 pictures each)"})
    hear_steps: int = field(default=700, metadata={"help": "steps of stage hear (24 clips each)"})
    practice: float = field(default=1, metadata={"help": "factor on the steps of the lessons with which stage read begins"})
    read_steps: int = field(default=3000, metadata={"help": "steps on statements of every form (24 scenes each) with which stage read ends"})
    base_lr: float = field(default=2e-3, metadata={"help": "peak learning rate of stages see and hear"})
    read_lr: float = field(default=1.5e-3, metadata={"help": "peak learning rate of stage read"})
    check_scenes: int = field(default=100, metadata={"help": "scenes that the finished base is examined on, for each figure"})
    seed: int = field(default=0, metadata={"help": "seed of the scenes and of the initial weights"})
    out: str = field(default="runs/tiny-base", metadata={"help": "folder of the base"})


def train_tokenizer(corpus: list[str], merges: int = 1000) -> Tokenizer:
    """Byte-level BPE with single digits: 256 bytes, the special tokens, and `merges` merges learned from the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=len(alphabet) + len(SPECIALS) + merges, show_progress=False,
                                                              special_tokens=list(SPECIALS), initial_alphabet=alphabet))
    return tokenizer


def wake(model: ComposedModel) -> None:
    """Initial weights for small widths: the libraries' (0.02) suit 768 and more; at 128 all attention is uniform at first."""
    for part in (model.visual_qformer, model.audio_qformer, model.llm.model):
        for linear in (m for m in part.modules() if isinstance(m, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
    for connector in (model.visual_qformer, model.audio_qformer):
        nn.init.normal_(connector.query)
    nn.init.normal_(model.vision.model.embeddings.position_embedding.weight, std=.3)
    nn.init.normal_(model.llm.get_input_embeddings().weight, std=model.llm.config.hidden_size ** -.5)


def train_base(config: BaseConfig) -> None:
    """Make the base and write it to its folder, with base.json: what it reaches, how long it took, and the log of the three stages.

    Killed and started again with the same command, it goes on after the last finished stage (stage.json).
    """
    folder, seed, began = Path(config.out), config.seed, time.time()
    if (folder / "base.json").exists():
        raise ModelError(f"{folder}: holds a finished base, which will not be overwritten; choose another --out")
    renderer, done = Renderer(), {"stages": [], "seconds": 0, "log": [], "config": asdict(config)}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "stage.json").exists():
        done = json.loads((folder / "stage.json").read_text())
        if done["config"] != asdict(config):
            raise ModelError(f"{folder}: an interrupted base with other settings ({done['config']}); use them to continue it, or another --out")
        model = load_base(folder).train()
    else:
        torch.manual_seed(seed)
        train_tokenizer(corpus(renderer, seed)).save(str(folder / "tokenizer.json"))
        model = ComposedModel(ModelConfig(**TINY_MODEL), load_tokenizer(folder / "tokenizer.json"))
        wake(model)
    stages = {"see": partial(train_see, steps=config.see_steps, lr=config.base_lr), "hear": partial(train_hear, steps=config.hear_steps, lr=config.base_lr),
              "read": partial(train_read, practice=config.practice, steps=config.read_steps, lr=config.read_lr)}
    for name, stage in stages.items():
        if name in done["stages"]:
            continue
        torch.manual_seed(seed)
        stage(model, renderer, seed=seed, log=done["log"].append)
        model.save_base(folder)
        done = {**done, "stages": done["stages"] + [name], "seconds": done["seconds"] + time.time() - began}
        began = time.time()
        (folder / "stage.json").write_text(json.dumps(done))
    reached = {**check_base(model, renderer, seed, config.check_scenes), "minutes": round(done["seconds"] / 60, 1), "config": asdict(config)}
    (folder / "base.json").write_text(json.dumps({**reached, "log": done["log"]}, indent=1) + "\n")
    (folder / "stage.json").unlink()
    print(f"{folder}: {json.dumps(reached)}")
