"""Encoders: what turns frames and sound into features, for every paper here.

An encoder is any module that maps frames (B, T, H, W, 3) or stretches of sound to features (B, T, S, D) and says its
width D. T is the caller's time step: one frame, or one stretch. The rest of the code asks for nothing else, so a small
CNN with a `width` and the same `forward` can stand in for CLIP, SigLIP or BEATs without a branch anywhere. Whoever
builds a model decides what is frozen.

CLIP (Radford et al. 2021; Crab, LLaVA), SigLIP (Zhai et al. 2023; LLaVA-OneVision) and BLIP-2's ViT-g (CREMA) come from
transformers, BEATs from beats.py. As in the released codes, the patches of a hidden layer below the last are taken, without
CLIP's class token; of ViT-g the last layer with it, before its norm. What differs: frames are squashed to the encoder's square input, where released processors cut the middle out,
because a box on the 224 x 224 grid must mean the whole frame.

Shapes: B clips, T frames or stretches of sound, S tokens of one, D width, N samples.
"""
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForDepthEstimation,
    Blip2VisionModel,
    CLIPVisionModel,
    PreTrainedModel,
    SiglipVisionModel,
)
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from crab_min.beats import Beats, BeatsConfig, fbank, load_beats
from crab_min.errors import ModelError

ATTENTION = "sdpa" if torch.cuda.is_available() else "eager"       # of models made from a config; sdpa's backward is slow on a CPU


class Family(NamedTuple):
    """What the vision models of one family have in common."""
    model: type[PreTrainedModel]
    mean: list                                         # of the pixels its weights were trained with, in [0, 1]
    std: list
    prefix: int                                        # tokens before the first patch that are left out: CLIP's class token
    fixed: dict                                        # config entries: SigLIP's pooling head serves the last layer


FAMILIES = {
    "clip_vision_model": Family(CLIPVisionModel, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, 1, {}),
    "siglip_vision_model": Family(SiglipVisionModel, IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, 0,
                                  {"vision_use_head": False}),
    "blip_2_vision_model": Family(Blip2VisionModel, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, 0, {}),
}


def family_of(model_type: str | None, name: str) -> Family:
    if model_type not in FAMILIES:
        raise ModelError(f"{name}: model_type {model_type!r} is no vision encoder known here; "
                           f"expected {' or '.join(FAMILIES)}, or a pretrained CLIP or SigLIP that contains one")
    return FAMILIES[model_type]


class VisionEncoder(nn.Module):
    """CLIP, SigLIP or BLIP-2's ViT: frames (B, T, H, W, 3) uint8 -> patch features (B, T, S, D).

    name_or_config: a local folder or hub id whose weights are loaded (in float32), a transformers config as a dict,
    {"model_type": "clip_vision_model", "hidden_size": 128, ...}, for random weights or a state dict of one's own, or a model.
    layer: which hidden state is given out; 0 is the embeddings, -1 the last layer, -2 the one below it (Crab's).
    Attributes: width D, size (pixels of the square input), tokens S.
    Raises ModelError: not CLIP or SigLIP, weights that cannot be found or do not fit, no such layer.
    """
    FRAMES_A_PASS = 32                                 # bounds the memory of a long video

    def __init__(self, name_or_config: str | Path | dict | PreTrainedModel, layer: int = -2):
        super().__init__()
        if isinstance(name_or_config, PreTrainedModel):
            self.model = name_or_config
        elif isinstance(name_or_config, dict):
            family = family_of(name_or_config.get("model_type"), "the given config")
            self.model = family.model(AutoConfig.for_model(**name_or_config | family.fixed, attn_implementation=ATTENTION))
        else:
            self.model = load_vision(str(name_or_config))
        config, self.layer = self.model.config, layer
        if not -config.num_hidden_layers - 1 <= layer <= config.num_hidden_layers:
            raise ModelError(f"layer {layer}: this vision model has hidden states 0 to {config.num_hidden_layers}; "
                               f"choose one, or count from the end (-2 is the one below the last)")
        family, self.width, self.size = FAMILIES[config.model_type], config.hidden_size, config.image_size
        self.tokens = (config.image_size // config.patch_size) ** 2 + (family.model is Blip2VisionModel)
        self.prefix = family.prefix
        self.register_buffer("mean", torch.tensor(family.mean)[:, None, None], persistent=False)    # (3, 1, 1)
        self.register_buffer("std", torch.tensor(family.std)[:, None, None], persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        """Features (B, T, S, D) of `frames` (B, T, H, W, 3), uint8, any size, any device."""
        return self.hidden(frames, [self.layer])[0]

    def hidden(self, frames: Tensor, layers: list[int]) -> list[Tensor]:
        """The patch features (B, T, S, D) of several hidden states at once (Crab's mask decoder reads two more)."""
        b, t = frames.shape[:2]
        passes = []
        for part in frames.flatten(0, 1).split(self.FRAMES_A_PASS):
            states = self.model(self.pixels(part), output_hidden_states=True).hidden_states
            passes.append([states[layer][:, self.prefix:] for layer in layers])
        return [torch.cat(parts).unflatten(0, (b, t)) for parts in zip(*passes)]        # (B, T, S, D) each

    def pixels(self, frames: Tensor) -> Tensor:
        """uint8 (n, H, W, 3) -> the model's normalised input (n, 3, size, size)."""
        x = frames.to(self.mean.device).permute(0, 3, 1, 2).float() / 255               # (n, 3, H, W)
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True).clamp(0, 1)
        return ((x - self.mean) / self.std).to(self.model.dtype)

    def config(self) -> dict:
        """JSON-able; `from_config` of it and the state dict give the encoder back."""
        return {"name_or_config": self.model.config.to_diff_dict(), "layer": self.layer}

    @classmethod
    def from_config(cls, config: dict) -> "VisionEncoder":
        return cls(**config)


def load_vision(name: str) -> PreTrainedModel:
    """A pretrained CLIP or SigLIP vision model in evaluation mode."""
    try:
        config = AutoConfig.from_pretrained(name)
        config = getattr(config, "vision_config", config)      # a whole CLIP or SigLIP has a text half too
        family = family_of(config.model_type, name)
        config.update(family.fixed)
        model, report = family.model.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    except (OSError, SafetensorError) as error:                # nothing there, no network, half a download
        reason = str(error).splitlines()[0].rstrip(".")
        raise ModelError(f"vision encoder {name}: cannot be loaded ({reason}). Give a folder with the config.json "
                           f"and model.safetensors of a CLIP or SigLIP model; where there is a network, `hf download "
                           f"openai/clip-vit-large-patch14 --local-dir FOLDER` makes the one for Crab") from error
    if report["missing_keys"]:
        raise ModelError(f"vision encoder {name}: its weights lack {sorted(report['missing_keys'])[:3]}, which its "
                           f"config.json asks for; download it again, or give the weights that belong to the config")
    return model


class AudioEncoder(nn.Module):
    """BEATs: stretches of 16 kHz sound -> features (B, T, S, D) and which of them are real (B, T, S).

    config_or_path: a BEATs config as a dict, for random weights or a state dict of one's own, or the path of a
    published `.pt` file.
    Attributes: width D, rate (Hz), beats (the Beats module, which takes filter banks).
    1 s gives S = 48 (6 rows of 160 ms x 8 bands), 2 s gives 96. Raises ModelError (beats.load_beats).
    """
    rate = 16000

    def __init__(self, config_or_path: str | Path | dict):
        super().__init__()
        loaded = not isinstance(config_or_path, dict)
        self.beats = load_beats(config_or_path) if loaded else Beats(BeatsConfig.from_dict(config_or_path))
        self.width = self.beats.config.encoder_embed_dim

    def forward(self, segments: list[Tensor] | Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features (B, T, S, D) and mask (B, T, S) of one clip's waves, a list of T (N_t,) (B = 1), or of (B, T, N).

        lengths: (B, T) samples of each padded wave; None = all N are real. A stretch too short for one row of patches
        (0.175 s) is padded with silence to that. Features where the mask is False mean nothing.
        """
        if not isinstance(segments, Tensor):
            lengths = torch.tensor([[len(wave) for wave in segments]])
            segments = pad_sequence(list(segments), batch_first=True)[None]             # (1, T, N)
        b, t, n = segments.shape
        device = self.beats.patch_embedding.weight.device
        shortest = 400 + 160 * (self.beats.config.input_patch_size - 1)                 # samples of one row of patches
        waves = F.pad(segments.flatten(0, 1).to(device).float(), (0, max(0, shortest - n)))     # (B * T, N)
        lengths = torch.full((b, t), n) if lengths is None else lengths
        banks = fbank(waves)                                                            # (B * T, F, 128)
        whole = 1 + (lengths.flatten().to(device).clamp(min=shortest) - 400) // 160     # frames that see no padding
        mask = torch.arange(banks.shape[1], device=device) < whole[:, None]             # (B * T, F)
        features, mask = self.beats(banks.to(self.beats.patch_embedding.weight.dtype), mask)
        return features.unflatten(0, (b, t)), mask.unflatten(0, (b, t))                 # (B, T, S, D), (B, T, S)

    def config(self) -> dict:
        """JSON-able; `from_config` of it and the state dict give the encoder back."""
        return {"config_or_path": asdict(self.beats.config)}

    @classmethod
    def from_config(cls, config: dict) -> "AudioEncoder":
        return cls(**config)


# --- encoders of one's own -------------------------------------------------------------------------------------------
ENCODERS: dict[str, nn.Module] = {}                    # of side channels and modalities by name, instead of the model's own


def register(name: str, encoder: nn.Module) -> None:
    """Let `encoder` read the side channel or modality `name`, in every model; it is frozen, and not saved with a run.

    It is given what the channel's file holds: frames (1, T, H, W, 3) uint8, stretches of sound (1, T, N) or numbers (1, U, S, W), and returns
    (1, T, S, D), D = its `width`. A row that names no file for it gets its video. Raises ModelError.
    """
    if not isinstance(encoder, nn.Module) or not isinstance(getattr(encoder, "width", None), int):
        raise ModelError(f"encoder of {name!r}: give a torch module with a `width` and a forward of frames (B, T, H, W, 3) to features (B, T, S, width), got {encoder!r}")
    ENCODERS[name] = encoder.requires_grad_(False).eval()


@torch.no_grad()
def encode_own(name: str, arrays, device: torch.device) -> Tensor:
    """The features (T, S, D) that a registered encoder makes of arrays as data.load_media gives them. Raises ModelError."""
    encoder, x = ENCODERS[name].to(device), pad_sequence([torch.as_tensor(wave) for wave in arrays], batch_first=True) if isinstance(arrays, list) else torch.as_tensor(arrays)
    found = encoder(x[None].to(device))
    if found.ndim != 4 or len(found) != 1 or found.shape[-1] != encoder.width:
        raise ModelError(f"encoder of {name!r}: gave {tuple(found.shape)} for {tuple(x[None].shape)}; its width is {encoder.width}, so (1, steps, tokens, {encoder.width}) was expected")
    return found[0]


class DepthEncoder(nn.Module):
    """A depth model of transformers before a vision encoder: frames (B, T, H, W, 3) -> features (B, T, S, D) of their depth as grey pictures, near is bright.

    name: a path or hub id, such as depth-anything/Depth-Anything-V2-Small-hf. Raises ModelError.
    """

    def __init__(self, name: str, vision: VisionEncoder):
        super().__init__()
        try:
            self.processor, self.depth = AutoImageProcessor.from_pretrained(name), AutoModelForDepthEstimation.from_pretrained(name)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"depth model {name}: cannot be loaded ({str(error).splitlines()[0]}); give a folder or hub id of a depth-estimation model of "
                               "transformers, such as depth-anything/Depth-Anything-V2-Small-hf, or depth as files under \"sides\"") from error
        self.vision, self.width = vision, vision.width

    def pictures(self, frames: Tensor) -> Tensor:
        """Depth of each frame (N, H, W, 3) uint8 as a grey picture (N, h, w, 3) uint8, from the farthest 0 to the nearest 255."""
        inputs = self.processor(images=list(frames.cpu().numpy()), return_tensors="pt").to(self.depth.device)
        x = self.depth(**inputs).predicted_depth                                        # (N, h, w), near is more
        low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
        return (255 * (x - low) / (high - low).clamp(min=1e-6)).to(torch.uint8)[..., None].expand(-1, -1, -1, 3)

    def forward(self, frames: Tensor) -> Tensor:
        return self.vision(self.pictures(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]))


@dataclass
class MediaFeatures:
    """What `encode` made of one video, image or sound. What the axes are, and what else is said, is the backbone's affair."""
    kind: str
    features: Tensor
    mask: Tensor | None = None                         # which of the features are real
    seconds: float = 0                                 # length of the video or sound
    scales: list = field(default_factory=list)         # of an image, where masks are made: the layers of its encoder that the mask decoder reads (segment.py)
    sides: dict = field(default_factory=dict)          # of a video or image in a batch: its side channels by name (fusion.py)


def encode_side(kind: str, arrays: np.ndarray | Tensor) -> MediaFeatures:
    """Side tokens without an encoder: of an array (U, S, W) itself; of a dense stream ("fast") (U, 16, 16, 3) uint8 its pixels, a token for each
    quarter, against the clip's mean (U, 4, 192)."""
    x = torch.as_tensor(np.ascontiguousarray(arrays)).float()
    if kind == "fast":
        x = ((x - x.mean(0)) / 255).unflatten(2, (2, -1)).unflatten(1, (2, -1))                  # (U, 2, 8, 2, 8, 3)
        x = x.transpose(2, 3).flatten(1, 2).flatten(2)
    return MediaFeatures(kind, x)
