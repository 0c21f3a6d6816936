"""Frozen encoders: frames and sound -> features, for all four papers.

An encoder is any module that maps frames (B, T, H, W, 3) or segments of sound (B, T, N) to features
(B, T, S, D) and has a `width` D. T is the caller's time step: one frame, or one segment of sound.
The rest of the code asks for nothing else, so a small CNN with a `width` and such a `forward` can
stand in for any of them (`register`). Who builds a model decides what is frozen.

    encoder         published weights                       paper           features taken
    VisionEncoder   CLIP (2103.00020)                       Crab            a layer below the last
                    SigLIP (2303.15343)                     PAVE            a layer below the last
                    BLIP-2's ViT-g (2301.12597)             CREMA           the last layer, unnormed
    AudioEncoder    BEATs (2212.09058), see beats.py        Crab, CREMA     the last layer

As in the released codes CLIP's class token is left out and ViT-g's is kept. What differs: frames
are resized to the encoder's square input without cropping, where released processors cut the middle
out, because a box on the 224 x 224 grid must mean the whole frame.

Shapes: B clips, T time steps, S tokens per step, D width, N samples of sound.

Page of the course: docs/course/11_crab_branches.md.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
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

from crab_min.beats import Beats, BeatsConfig, fbank, load_beats, refuse_lfs_pointers
from crab_min.devices import in_float32
from crab_min.errors import ModelError


@dataclass
class MediaFeatures:
    """The features of one video, image or sound. Their axes depend on the backbone.

    A composed backbone has (T, S, D); side channels are (U, S, W) everywhere.
    """

    kind: str
    features: Tensor
    mask: Tensor | None = None  # True for a real feature; None if all are
    seconds: float = 0  # length of the video or sound
    # of an image for which masks are predicted: the layers that the mask decoder reads
    scales: list[Tensor] = field(default_factory=list)
    # of a video or image in a batch: its side channels by name
    sides: dict[str, "MediaFeatures"] = field(default_factory=dict)

    def side_tokens(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Return the side channels as pairs: features (U, S, W), mask (U, S) or None."""
        return {name: (side.features, side.mask) for name, side in self.sides.items()}


def attach_sides(medium: MediaFeatures, views: dict[str, list[MediaFeatures]]) -> MediaFeatures:
    """Return a medium with its side channels, each of one or several views, by name."""
    if not views:
        return medium
    sides = {name: interleave_views(name, own) for name, own in views.items()}
    return replace(medium, sides=sides)


def interleave_views(name: str, views: list[MediaFeatures]) -> MediaFeatures:
    """Make one side channel of several views (U, S, W): all views of a step, then the next step.

    Raises:
        ModelError: views of different shapes.
    """
    if len(views) == 1:
        return views[0]
    shapes = sorted({tuple(view.features.shape) for view in views})
    if len(shapes) > 1:
        raise ModelError(f"side channel {name}: views of different shapes, {shapes}")
    features = torch.stack([view.features for view in views], 1).flatten(0, 1)  # (U views, S, W)
    return replace(views[0], features=features, mask=None)


# --- frames ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Family:
    """The common properties of the vision models of one family."""

    model: type[PreTrainedModel]
    mean: list[float]  # of the pixels that its weights were trained with, in [0, 1]
    std: list[float]
    dropped: int = 0  # tokens before the first patch that are left out
    kept: int = 0  # tokens before the first patch that are passed on
    overrides: dict = field(default_factory=dict)  # entries of its config


FAMILIES = {
    "clip_vision_model": Family(CLIPVisionModel, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, dropped=1),
    "siglip_vision_model": Family(
        SiglipVisionModel,
        IMAGENET_STANDARD_MEAN,
        IMAGENET_STANDARD_STD,
        overrides={"vision_use_head": False},  # its pooling head serves the last layer
    ),
    "blip_2_vision_model": Family(Blip2VisionModel, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, kept=1),
}


class VisionEncoder(nn.Module):
    """CLIP, SigLIP or BLIP-2's ViT: frames (B, T, H, W, 3) -> features (B, T, S, D).

    Args:
        name_or_config: a local folder or hub id, whose weights are loaded in float32; or a
            transformers config as a dict, {"model_type": "clip_vision_model", ...}, for random
            weights or a state dict of one's own; or a model.
        layer: the hidden state that is returned. 0 is the embeddings, -1 the last layer, -2 the one
            below it (Crab's).

    Attributes:
        width: D.
        size: pixels of the square input.
        tokens: S.

    Raises:
        ModelError: an unknown kind of model, weights that cannot be found or do not fit, no such
            layer.
    """

    FRAMES_PER_PASS = 32  # bounds the memory of a long video

    def __init__(self, name_or_config: str | Path | dict | PreTrainedModel, layer: int = -2):
        super().__init__()
        if isinstance(name_or_config, PreTrainedModel):
            self.model = name_or_config
        elif isinstance(name_or_config, dict):
            self.model = build_vision(name_or_config)
        else:
            self.model = load_vision(str(name_or_config))

        config = self.model.config
        depth = config.num_hidden_layers
        if not -depth - 1 <= layer <= depth:
            raise ModelError(
                f"layer {layer}: this vision model has hidden states 0 to {depth}; "
                f"choose one, or count from the end (-2 is the one below the last)"
            )
        family = FAMILIES[config.model_type]
        self.layer = layer
        self.dropped = family.dropped
        self.width = config.hidden_size
        self.size = config.image_size
        self.tokens = (config.image_size // config.patch_size) ** 2 + family.kept

        mean, std = torch.tensor(family.mean), torch.tensor(family.std)
        self.register_buffer("mean", mean[:, None, None], persistent=False)  # (3, 1, 1)
        self.register_buffer("std", std[:, None, None], persistent=False)

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Stay in evaluation mode: what a frozen encoder gives does not depend on chance."""
        return super().train(False)

    def forward(self, frames: Tensor) -> Tensor:
        """Encode frames (B, T, H, W, 3) uint8 of any size on any device to (B, T, S, D)."""
        return self.hidden(frames, [self.layer])[0]

    def hidden(self, frames: Tensor, layers: list[int]) -> list[Tensor]:
        """Return several hidden states (B, T, S, D); Crab's mask decoder reads two."""
        batch, steps = frames.shape[:2]
        passes: list[list[Tensor]] = [[] for _ in layers]
        for part in frames.flatten(0, 1).split(self.FRAMES_PER_PASS):  # (n, H, W, 3)
            states = self.model(self.pixels(part), output_hidden_states=True).hidden_states
            for outputs, layer in zip(passes, layers):
                outputs.append(states[layer][:, self.dropped :])  # (n, S, D)
        return [torch.cat(outputs).unflatten(0, (batch, steps)) for outputs in passes]

    def pixels(self, frames: Tensor) -> Tensor:
        """Turn frames (n, H, W, 3) uint8 into normalised input (n, 3, size, size)."""
        x = frames.to(self.mean.device).permute(0, 3, 1, 2).float() / 255  # (n, 3, H, W)
        size = (self.size, self.size)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bilinear", antialias=True).clamp(0, 1)
        return ((x - self.mean) / self.std).to(self.model.dtype)


def family_of(model_type: str | None, name: str) -> Family:
    """Look up the family of a model type. Raises ModelError."""
    if model_type not in FAMILIES:
        raise ModelError(
            f"{name}: model_type {model_type!r} is no vision encoder known here; "
            f"expected {' or '.join(FAMILIES)}, or a pretrained CLIP or SigLIP that contains one"
        )
    return FAMILIES[model_type]


def build_vision(config: dict) -> PreTrainedModel:
    """Build a vision model of random weights from a config. Raises ModelError."""
    family = family_of(config.get("model_type"), "the given config")
    values = {**config, **family.overrides}
    return family.model(AutoConfig.for_model(**values, attn_implementation="sdpa"))


def load_vision(name: str) -> PreTrainedModel:
    """Load a pretrained vision model in evaluation mode. Raises ModelError."""
    refuse_lfs_pointers(name)
    try:
        config = AutoConfig.from_pretrained(name)
        # a whole CLIP or SigLIP has a text half too
        config = getattr(config, "vision_config", config)
        family = family_of(config.model_type, name)
        config.update(family.overrides)
        model, report = family.model.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, SafetensorError) as error:  # nothing there, no network, half a download
        reason = str(error).splitlines()[0].rstrip(".")
        raise ModelError(
            f"vision encoder {name}: cannot be loaded ({reason}). Give a folder with the "
            f"config.json and model.safetensors of a CLIP or SigLIP model; where there is a "
            f"network, `hf download openai/clip-vit-large-patch14 --local-dir FOLDER` fetches the "
            f"one for Crab"
        ) from error
    if report["missing_keys"]:
        raise ModelError(
            f"vision encoder {name}: its weights lack {sorted(report['missing_keys'])[:3]}, which "
            f"its config.json asks for; download it again, or give the weights that belong to the "
            f"config"
        )
    return model


# --- sound ----------------------------------------------------------------------------------------
class AudioEncoder(nn.Module):
    """BEATs: segments of 16 kHz sound -> features (B, T, S, D) and a mask (B, T, S).

    One second gives S = 48 tokens (6 rows of 160 ms x 8 bands), two seconds give 96.

    Args:
        config_or_path: a BEATs config as a dict, for random weights or a state dict of one's own;
            or the path of a published `.pt` file.

    Attributes:
        width: D.
        beats: the Beats module, which takes filter banks.

    Raises:
        ModelError: see beats.load_beats.
    """

    def __init__(self, config_or_path: str | Path | dict):
        super().__init__()
        if isinstance(config_or_path, dict):
            self.beats = Beats(BeatsConfig.from_dict(config_or_path))
        else:
            self.beats = load_beats(config_or_path)
        self.width = self.beats.config.encoder_embed_dim
        # samples of one row of patches: 400 of a frame's window, and 160 for each further frame
        self.shortest = 400 + 160 * (self.beats.config.input_patch_size - 1)

    def train(self, mode: bool = True) -> "AudioEncoder":
        """Stay in evaluation mode, as VisionEncoder."""
        return super().train(False)

    def forward(
        self, segments: list[Tensor] | Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode the segments of one clip or of several.

        Args:
            segments: the waves of one clip, a list of T tensors (N_t,); or padded waves (B, T, N).
            lengths: (B, T), samples of each padded wave; None if all N are real.

        Returns:
            Features (B, T, S, D) and a mask (B, T, S). Features where it is False mean nothing. A
            segment too short for one row of patches (0.175 s) is padded with silence to that.
        """
        if not isinstance(segments, Tensor):
            lengths = torch.tensor([[len(wave) for wave in segments]])  # (1, T)
            segments = pad_sequence(list(segments), batch_first=True)[None]  # (1, T, N)
        batch, steps, samples = segments.shape
        if lengths is None:
            lengths = torch.full((batch, steps), samples)
        weight = self.beats.patch_embedding.weight

        # filter banks of all segments, padded to the longest
        waves = segments.flatten(0, 1).to(weight.device).float()  # (B T, N)
        waves = F.pad(waves, (0, max(0, self.shortest - samples)))
        with in_float32(weight.device):  # a logarithm wants it
            banks = fbank(waves)  # (B T, F, 128)

        # frames whose window contains no padding
        lengths = lengths.flatten().to(weight.device).clamp(min=self.shortest)  # (B T,)
        whole = 1 + (lengths - 400) // 160
        mask = torch.arange(banks.shape[1], device=weight.device) < whole[:, None]  # (B T, F)

        features, mask = self.beats(banks.to(weight.dtype), mask)  # (B T, S, D), (B T, S)
        return features.unflatten(0, (batch, steps)), mask.unflatten(0, (batch, steps))


# --- encoders of one's own ------------------------------------------------------------------------
# by the name of the side channel or modality that they encode, in place of the model's own encoder
ENCODERS: dict[str, nn.Module] = {}


def register(name: str, encoder: nn.Module) -> None:
    """Use `encoder` for the side channel or modality `name`, in every model.

    It is frozen, and not saved with a run. A row that names no file for the channel gets its video.

    Args:
        encoder: a module with a `width` D. Its forward gets the content of the channel's file,
            frames (1, T, H, W, 3) uint8, segments of sound (1, T, N) or numbers (1, U, S, W), and
            returns features (1, T, S, D).

    Raises:
        ModelError: not such a module.
    """
    if not isinstance(encoder, nn.Module) or not isinstance(getattr(encoder, "width", None), int):
        raise ModelError(
            f"encoder of {name!r}: give a torch module with a `width` and a forward of frames "
            f"(B, T, H, W, 3) to features (B, T, S, width), got {encoder!r}"
        )
    ENCODERS[name] = encoder.requires_grad_(False).eval()


@torch.no_grad()
def encode_own(name: str, arrays, device: torch.device) -> Tensor:
    """Encode with a registered encoder.

    Args:
        arrays: one array, or a list of waves (N_t,), as data.load_media returns them.

    Returns:
        Features (T, S, D).

    Raises:
        ModelError: the encoder returned another shape than its `width` promises.
    """
    encoder = ENCODERS[name].to(device)
    if isinstance(arrays, list):
        x = pad_sequence([torch.as_tensor(wave) for wave in arrays], batch_first=True)  # (T, N)
    else:
        x = torch.as_tensor(arrays)
    features = encoder(x[None].to(device))  # (1, T, S, D)
    if features.ndim != 4 or len(features) != 1 or features.shape[-1] != encoder.width:
        raise ModelError(
            f"encoder of {name!r}: gave {tuple(features.shape)} for {tuple(x[None].shape)}; its "
            f"width is {encoder.width}, so (1, steps, tokens, {encoder.width}) was expected"
        )
    return features[0]


def encode_side(kind: str, arrays: np.ndarray | Tensor) -> MediaFeatures:
    """Make side tokens (U, S, W) without an encoder.

    Args:
        kind: "fast" for a dense stream of small frames (U, 16, 16, 3) uint8: the four quarters of a
            frame are its tokens (U, 4, 192), relative to the clip's mean. Any other kind is an
            array (U, S, W), which is taken as it is.
    """
    x = torch.as_tensor(np.ascontiguousarray(arrays)).float()
    if kind == "fast":
        x = (x - x.mean(0)) / 255  # (U, 16, 16, 3)
        x = x.unflatten(2, (2, -1)).unflatten(1, (2, -1))  # (U, 2, 8, 2, 8, 3)
        x = x.transpose(2, 3).flatten(1, 2).flatten(2)  # (U, 4, 192)
    return MediaFeatures(kind, x)
