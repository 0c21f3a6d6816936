"""Features of frozen encoders on disk: a clip is decoded and encoded once, for all runs and processes that name the same folder.

A file is called by the hash of all that its content depends on: the bytes of the clip, which frames or seconds of it, their size, and the
weights of the encoder. A clip that changes under its name, or another encoder, is simply another file; nothing is ever out of date.
"""
import hashlib
import json
import os
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from crab_min.encoders import MediaFeatures
from crab_min.interface import PromptPart
from crab_min.model import AVLanguageModel


@lru_cache(maxsize=None)
def hash_of(path: str, size: int, changed: int) -> str:
    """Of a file's bytes; read again when its size or its time of change is another."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FeatureCache:
    """The folder of a model's features. Side channels are not kept: most are files of features already."""

    def __init__(self, folder: str, model: AVLanguageModel):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        frozen = hashlib.sha256(f"{type(model).__name__} {model.frame_size} {getattr(model, 'mask_layers', '')}".encode())
        for name, weight in model.state_dict().items():
            if not name.startswith(("llm.model.language_model", "llm.model.layers", "llm.lm_head", "llm.model.embed", "masks")):       # what an encoder may be
                frozen.update(name.encode() + weight.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
        self.model = frozen.hexdigest()

    def file(self, part: PromptPart) -> Path | None:
        """Where the features of a part are, or would be."""
        if part.side or not os.path.isfile(part.path):
            return None
        stat = os.stat(part.path)
        what = json.dumps({**asdict(part), "path": hash_of(part.path, stat.st_size, stat.st_mtime_ns), "text": "", "model": self.model}, sort_keys=True)
        name = hashlib.sha256(what.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, part: PromptPart) -> MediaFeatures | None:
        """The features of a part; None where they are not there, or not whole."""
        if not (file := self.file(part)) or not file.exists():
            return None
        try:
            with safe_open(file, "pt") as stored:
                said, tensors = json.loads(stored.metadata()["media"]), {name: stored.get_tensor(name) for name in stored.keys()}
        except (SafetensorError, OSError, KeyError, ValueError):
            return None
        return MediaFeatures(said["kind"], tensors["features"], tensors.get("mask"), said["seconds"], [tensors[f"scale{i}"] for i in range(said["scales"])])

    def write(self, part: PromptPart, features: MediaFeatures) -> None:
        """Keep them; beside and renamed, as several processes may have made the same."""
        if not (file := self.file(part)):
            return
        file.parent.mkdir(exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        tensors = {"features": features.features, **({} if features.mask is None else {"mask": features.mask}), **{f"scale{i}": x for i, x in enumerate(features.scales)}}
        save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, temporary,
                  {"media": json.dumps({"kind": features.kind, "seconds": features.seconds, "scales": len(features.scales)})})
        temporary.rename(file)
