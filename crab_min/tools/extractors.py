"""Encoders and estimators whose output `tools.features` keeps in files.

    name           reads             gives, per clip                                 of
    beats          sound             (seconds, 48, D) features                       BEATs
    clip, siglip   frames            (T, S, D) features, layer -2                    transformers
    flow           frames            (T, size, size, 3) pictures                     OpenCV
    depth          frames            (T, size, size) pictures, near is bright        transformers
    normals        frames            (T, size, size, 3) pictures of the unit vectors transformers
    imagebind      sound             (seconds - 1, 1024) features, 2 s each second   its own package
    languagebind   2 frames a second (T, 4, D) features                              its own package

The last two are what PAVE (2503.19794) reads. Their code is not part of crab_min: it is imported
where it is installed. They were tried here on stand-ins of the same interface alone.

Shapes: T frames, S tokens, D width.
"""

import importlib
import re
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModelForDepthEstimation,
    AutoModelForNormalEstimation,
)

from crab_min.backbones.common import named_weights
from crab_min.encoders import FAMILIES, AudioEncoder, VisionEncoder
from crab_min.errors import ModelError

SAMPLE_RATE = 16000  # Hz
TOGETHER = 32  # frames, or seconds of sound, that pass through a model at once
# models whose depth is a distance; all others give its inverse, up to scale
METRIC = {"zoedepth", "glpn", "chmv2", "tipsv2_dpt"}
LANGUAGEBIND_FRAMES = 8  # of a clip, as its temporal attention was trained


class Extractor:
    """A frozen model with what it reads of a clip.

    Attributes:
        kind: of the prompt part that is decoded: "video", "flow" or "audio".
        size: pixels per side of the square frames; 0 for the one that is asked for.
        rate: frames per second; 0 for a fixed number of frames.
    """

    kind = "video"
    size = 0
    rate = 0.0

    def __init__(self, weights: str, device: torch.device):
        self.device = device

    def __call__(self, media) -> np.ndarray:
        """Return the content of a clip's file.

        Args:
            media: frames (T, H, W, 3) uint8, or the wave of a sound (N,) float32 at 16 kHz.
        """
        raise NotImplementedError


# --- sound ----------------------------------------------------------------------------------------
class BeatsFeatures(Extractor):
    """BEATs' features of each second."""

    kind = "audio"

    def __init__(self, weights: str, device: torch.device):
        self.encoder = AudioEncoder(weights).to(device).eval()

    def __call__(self, media) -> np.ndarray:
        seconds = cut_windows(media, length=1, step=1)  # (U, 16000)
        features = [self.encoder(part[None])[0][0] for part in seconds.split(TOGETHER)]
        return to_half(torch.cat(features))  # (U, 48, D)


class ImageBindAudio(Extractor):
    """ImageBind's embedding of two seconds, each second, as PAVE keeps them."""

    kind = "audio"

    def __init__(self, weights: str, device: torch.device):
        super().__init__(weights, device)
        source = "pip install git+https://github.com/facebookresearch/ImageBind"
        self.data = import_installed("imagebind.data", source)
        models = import_installed("imagebind.models.imagebind_model", source)
        self.modality = models.ModalityType.AUDIO
        if weights:
            self.model = models.imagebind_huge(pretrained=False)
            self.model.load_state_dict(torch.load(weights, "cpu", weights_only=True))
        else:
            self.model = models.imagebind_huge(pretrained=True)  # downloads them, as it does
        self.model.to(device).eval()

    def __call__(self, media) -> np.ndarray:
        spectra = []
        for wave in cut_windows(media, length=2, step=1):
            mel = self.data.waveform2melspec(wave[None], SAMPLE_RATE, 128, 204)  # (1, 128, 204)
            spectra.append((mel + 4.268) / 9.138)  # its mean and deviation
        embeddings = []
        for part in torch.stack(spectra).split(TOGETHER):  # (n, 1, 128, 204)
            embeddings.append(self.model({self.modality: part.to(self.device)})[self.modality])
        return to_half(torch.cat(embeddings))  # (U, 1024)


def cut_windows(wave: np.ndarray, length: int, step: int) -> Tensor:
    """Cut a wave (N,) into windows (U, 16000 length) of `length` seconds, one each `step` seconds.

    A sound that is shorter than one window, or ends within a second, is padded with silence.
    """
    x = torch.from_numpy(np.array(wave, np.float32))
    window, hop = length * SAMPLE_RATE, step * SAMPLE_RATE
    if len(x) < window:
        x = F.pad(x, (0, window - len(x)))
    if length == step:
        x = F.pad(x, (0, -len(x) % window))
    return x.unfold(0, window, hop).contiguous()


# --- frames ---------------------------------------------------------------------------------------
class VisionFeatures(Extractor):
    """The features of CLIP or SigLIP, of the layer below the last."""

    def __init__(self, weights: str, device: torch.device):
        self.encoder = VisionEncoder(weights).to(device).eval()
        self.size = self.encoder.size

    def __call__(self, media) -> np.ndarray:
        return to_half(self.encoder(torch.from_numpy(media)[None])[0])  # (T, S, D)


class Flow(Extractor):
    """Pictures of the optical flow, which the decoder draws (media/flow.py)."""

    kind = "flow"

    def __call__(self, media) -> np.ndarray:
        return media


class Estimator(Extractor):
    """A model of transformers that estimates a map of each frame."""

    model_class: type

    def __init__(self, weights: str, device: torch.device):
        super().__init__(weights, device)
        with named_weights("estimator", weights):
            self.processor = AutoImageProcessor.from_pretrained(weights)
            self.model = self.model_class.from_pretrained(weights).to(device).eval()

    def estimate(self, frames: np.ndarray, field: str) -> Tensor:
        """Return the maps (T, C, H, W) of frames (T, H, W, 3), in the frames' size."""
        # padding would have to be cut off the map again
        options = {"do_pad": False} if getattr(self.processor, "do_pad", False) else {}
        maps = []
        for part in torch.from_numpy(frames).split(TOGETHER):
            inputs = self.processor(list(part.numpy()), return_tensors="pt", **options)
            output = self.model(inputs["pixel_values"].to(self.device))
            estimated = getattr(output, field).float()
            if estimated.ndim == 3:
                estimated = estimated[:, None]  # (n, 1, h, w)
            maps.append(F.interpolate(estimated, frames.shape[1:3], mode="bilinear").cpu())
        return torch.cat(maps)


class Depth(Estimator):
    """Grey pictures of the depth of a clip's frames, on one scale; near is bright."""

    model_class = AutoModelForDepthEstimation

    def __call__(self, media) -> np.ndarray:
        depth = self.estimate(media, "predicted_depth")[:, 0]  # (T, H, W)
        if gives_distance(self.model.config):
            depth = 1 / depth.clamp(min=1e-3)
        low, high = depth.min(), depth.max()
        grey = (depth - low) / (high - low).clamp(min=1e-9)
        return (255 * grey).round().byte().numpy()


def gives_distance(config) -> bool:
    """Tell whether a depth model gives distances, so that far is large."""
    trained_on_meters = re.search("nyu|kitti", str(config.name_or_path).lower())
    is_metric = getattr(config, "depth_estimation_type", "") == "metric"
    return config.model_type in METRIC or is_metric or bool(trained_on_meters)


class Normals(Estimator):
    """Pictures of the surface normals of a clip's frames: -1 to 1 of x, y, z becomes 0 to 255."""

    model_class = AutoModelForNormalEstimation

    def __call__(self, media) -> np.ndarray:
        normals = F.normalize(self.estimate(media, "normals"), dim=1)  # (T, 3, H, W)
        pictures = (255 * (normals + 1) / 2).round().byte()
        return pictures.permute(0, 2, 3, 1).contiguous().numpy()


class LanguageBindVideo(Extractor):
    """LanguageBind's video tokens in 2 x 2 squares, two frames a second, as PAVE keeps them."""

    size = 224
    rate = 2.0

    def __init__(self, weights: str, device: torch.device):
        super().__init__(weights, device)
        source = "clone https://github.com/PKU-YuanGroup/LanguageBind and add it to PYTHONPATH"
        package = import_installed("languagebind", source)
        with named_weights("LanguageBind", weights):
            model = package.LanguageBindVideo.from_pretrained(weights)
        self.vision: nn.Module = model.vision_model.to(device).eval()

    def __call__(self, media) -> np.ndarray:
        family = FAMILIES["clip_vision_model"]  # it was trained with CLIP's mean and deviation
        mean, std = torch.tensor(family.mean), torch.tensor(family.std)
        pixels = (torch.from_numpy(media).float() / 255 - mean) / std  # (T, H, W, 3)
        tokens = []
        for part in pixels.split(LANGUAGEBIND_FRAMES):
            # the last clip repeats its last frame
            last = part[-1:].expand(LANGUAGEBIND_FRAMES - len(part), -1, -1, -1)
            clip = torch.cat([part, last]).permute(3, 0, 1, 2)[None]  # (1, 3, 8, H, W)
            states = self.vision(pixel_values=clip.to(self.device)).last_hidden_state
            states = states.reshape(LANGUAGEBIND_FRAMES, -1, states.shape[-1])  # (8, 1 + S, D)
            tokens.append(states[: len(part), 1:])  # without the class token
        return to_half(pool_grid(torch.cat(tokens), 2))  # (T, 4, D)


def pool_grid(tokens: Tensor, side: int) -> Tensor:
    """Average square grids of tokens (T, S, D) to (T, side * side, D)."""
    grid = round(tokens.shape[1] ** 0.5)
    x = tokens.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)  # (T, D, grid, grid)
    return F.adaptive_avg_pool2d(x, side).flatten(2).mT  # (T, side side, D)


def to_half(features: Tensor) -> np.ndarray:
    """Return features as an array of half precision, as they are kept."""
    return features.half().cpu().numpy()


def import_installed(name: str, source: str) -> ModuleType:
    """Import a package that crab_min does not ship.

    Raises:
        ModelError: it is not installed; the text says where it comes from.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(
            f"--encoder {name.split('.')[0]}: its code is not installed ({error}); {source}"
        ) from None


# name -> extractor, and the weights that are loaded where --weights names none
EXTRACTORS: dict[str, tuple[type[Extractor], str]] = {
    "beats": (BeatsFeatures, "BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt"),
    "clip": (VisionFeatures, "openai/clip-vit-large-patch14"),
    "siglip": (VisionFeatures, "google/siglip-so400m-patch14-384"),
    "flow": (Flow, ""),
    "depth": (Depth, "Intel/zoedepth-nyu-kitti"),
    "normals": (Normals, "facebook/sapiens2-normal-0.4b"),
    "imagebind": (ImageBindAudio, ""),
    "languagebind": (LanguageBindVideo, "LanguageBind/LanguageBind_Video_FT"),
}
