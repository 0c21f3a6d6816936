"""BEATs, the frozen audio encoder of Crab and CREMA, and its filter bank.

Paper: BEATs (2212.09058). A log-mel picture of the sound (10 ms x 128 mel bins) is cut into
16 x 16 patches, and a transformer runs over the patches in time-major order: patch s is row s // 8
(160 ms) and column s % 8 (16 mel bins). One second is 6 rows, 48 patches.

Three things differ from a plain post-norm transformer:

    position    a grouped convolution over the patches is added once, and T5's bucketed relative
                position bias enters every attention
    gate        each head's query scales that bias:
                bias'(q) = (g_1 (a g_2 - 1) + 2) bias,        g_1, g_2 = sigmoid(sums of W q)
    deep norm   x = LN(alpha x + f(x)),  alpha = (2 layers)^(1/4); the weights of f are shrunk by
                (8 layers)^(-1/4) at the start (2203.00555)

    symbol      variable
    W           Attention.grep_linear
    a           Attention.grep_a, one per head
    alpha       Layer.alpha

Shapes: B sounds, N samples, F frames of the filter bank, S patches (F // 16 * 8), D width, H heads.

Parameters carry the released names, so that the published file loads as it is. What differs from
the released code: the bias is computed once per forward and its table exists once (released: one
table, listed under every layer); q is not divided by 32 and multiplied back, a float16 guard that
does not change the result; padding never reaches a real patch, so that a sound in a padded batch
has the features that it has alone.
"""

import math
import pickle
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torchaudio.compliance import kaldi

from crab_min.errors import ModelError

MELS = 128
WINDOW, SHIFT = 400, 160  # samples: 25 ms, 10 ms
# mean and standard deviation of AudioSet's log-mel values, from the released code
MEAN = 15.41663
STD = 6.55582
DOWNLOAD = (
    "BEATs needs its published checkpoint, e.g. BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt "
    "(Crab's): download it from github.com/microsoft/unilm, folder beats, to any place on this "
    "machine, and give its path"
)


@dataclass
class BeatsConfig:
    """Sizes, named as in the released `cfg`; the defaults are those of iter3+ (90 M)."""

    input_patch_size: int = 16
    embed_dim: int = 512  # width of a patch before it is projected to encoder_embed_dim
    conv_bias: bool = False
    encoder_layers: int = 12
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_attention_heads: int = 12
    conv_pos: int = 128  # kernel of the positional convolution, in patches
    conv_pos_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800  # patches; all larger distances share the last bucket
    deep_norm: bool = True
    dropout: float = 0.0

    @classmethod
    def from_dict(cls, values: dict) -> "BeatsConfig":
        """Read a released `cfg`, or our own fields.

        Entries that only matter in pre-training are ignored.

        Raises:
            ModelError: an option that is not implemented here. No published BEATs uses one.
        """
        only_values = {
            "layer_norm_first": False,
            "relative_position_embedding": True,
            "gru_rel_pos": True,
            "activation_fn": "gelu",
        }
        for name, expected in only_values.items():
            if values.get(name, expected) != expected:
                raise ModelError(
                    f"BEATs option {name}={values[name]!r} is not implemented, only {expected!r}; "
                    f"use a published BEATs checkpoint or train one with {name}={expected!r}"
                )
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


def fbank(wave: Tensor) -> Tensor:
    """Compute the normalised log-mel filter bank of 16 kHz sound.

    Args:
        wave: (B, N) in [-1, 1], N of at least 400 samples.

    Returns:
        (B, F, 128), windows of 25 ms every 10 ms. Only whole windows count:
        F = 1 + (N - 400) // 160, so one second gives 98 frames.
    """
    # one call: the sounds stand one behind the other, each filled up to whole shifts of 10 ms
    frames = 1 + (wave.shape[1] - WINDOW) // SHIFT
    filled = F.pad(wave, (0, -wave.shape[1] % SHIFT))  # (B, shifts * SHIFT)
    line = F.pad(filled.flatten(), (0, WINDOW))[None]  # (1, B * shifts * SHIFT + WINDOW)
    bank = kaldi.fbank(
        line * 2**15,  # Kaldi expects the range of 16-bit integers
        num_mel_bins=MELS,
        sample_frequency=16000,
        frame_length=25,
        frame_shift=10,
    )
    # windows that reach into the next sound are left out
    shifts = filled.shape[1] // SHIFT
    bank = bank[: len(wave) * shifts].unflatten(0, (-1, shifts))[:, :frames]  # (B, F, 128)
    return (bank - MEAN) / (2 * STD)


def distance_buckets(length: int, buckets: int, max_distance: int, device=None) -> Tensor:
    """Compute T5's bucket (S, S) of every distance key - query of `length` patches.

    Half of the buckets serve each sign. Near distances have a bucket each, far ones share them by
    the logarithm of the distance.
    """
    position = torch.arange(length, device=device)
    distance = position[None, :] - position[:, None]  # (S query, S key)
    half = buckets // 2
    exact = half // 2  # distances below this have a bucket each

    # the logarithm runs from 0 at `exact` to 1 at `max_distance`
    far = distance.abs()
    log = torch.log(far.float().clamp(min=1) / exact) / math.log(max_distance / exact)
    shared = (exact + (log * (half - exact)).long()).clamp(max=half - 1)
    return (distance > 0) * half + torch.where(far < exact, far, shared)


class Attention(nn.Module):
    """Self-attention with a position bias scaled by each head's query."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.grep_linear = nn.Linear(width // heads, 8)  # two gates, each a sum of four
        self.grep_a = nn.Parameter(torch.ones(1, heads, 1, 1))

    def forward(self, x: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        """Attend from every patch of x (B, S, D) to the real ones.

        Args:
            bias: relative position bias (H, S, S).
            mask: (B, S), True for a real patch.
        """
        q = self.split_heads(self.q_proj(x))  # (B, H, S, D / H)
        k = self.split_heads(self.k_proj(x))
        v = self.split_heads(self.v_proj(x))

        # scale the bias by the query of each head, and hide padding
        gates = torch.sigmoid(self.grep_linear(q).unflatten(-1, (2, 4)).sum(-1))  # (B, H, S, 2)
        gate_1, gate_2 = gates.split(1, dim=-1)  # (B, H, S, 1)
        bias = (gate_1 * (gate_2 * self.grep_a - 1) + 2) * bias  # (B, H, S, S)
        bias = bias.masked_fill(~mask[:, None, None], torch.finfo(bias.dtype).min)

        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B, H, S, D / H)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, S, D)

    def split_heads(self, x: Tensor) -> Tensor:
        """Split the heads: (B, S, D) -> (B, H, S, D / H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Layer(nn.Module):
    """Attention and feed-forward, each followed by LN(alpha x + f(x))."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        width, hidden = config.encoder_embed_dim, config.encoder_ffn_embed_dim
        self.alpha = (2 * config.encoder_layers) ** 0.25 if config.deep_norm else 1.0
        self.self_attn = Attention(width, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        residual = self.alpha * x
        x = self.self_attn_layer_norm(residual + self.dropout(self.self_attn(x, bias, mask)))
        residual = self.alpha * x
        return self.final_layer_norm(residual + self.dropout(self.fc2(F.gelu(self.fc1(x)))))


class Encoder(nn.Module):
    """The positional convolution, a layer norm and the layers."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        self.config = config
        width, kernel = config.encoder_embed_dim, config.conv_pos

        # the positional convolution, with a gain for each position of its kernel
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=config.conv_pos_groups)
        nn.init.normal_(conv.weight, std=math.sqrt(4 / (kernel * width)))
        nn.init.zeros_(conv.bias)
        self.pos_conv = nn.Sequential(weight_norm(conv, dim=2))

        self.layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.encoder_layers))

        # the bias table that all layers share is kept in the first one, as in the released file
        table = nn.Embedding(config.num_buckets, config.encoder_attention_heads)
        self.layers[0].self_attn.relative_attention_bias = table
        self.init_layers()

    def init_layers(self) -> None:
        """Initialise the layers; deep norm shrinks values, output and feed-forward."""
        shrink = (8 * self.config.encoder_layers) ** -0.25 if self.config.deep_norm else 1.0
        for name, module in self.layers.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                shrunk = name.endswith(("v_proj", "out_proj", "fc1", "fc2"))
                nn.init.xavier_normal_(module.weight, gain=shrink if shrunk else 1.0)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Encode patches x (B, S, D), of which those where `mask` (B, S) is True are real."""
        length = x.shape[1]

        # positions by convolution, which reads its neighbours: padding must be zero here
        x = x * mask[..., None]
        position = self.pos_conv(x.transpose(1, 2)).transpose(1, 2)  # (B, S or S + 1, D)
        position = position[:, :length]  # an even kernel gives one more
        x = self.dropout(self.layer_norm(x + F.gelu(position)))  # (B, S, D)

        # the relative position bias, the same for all layers
        buckets = distance_buckets(
            length, self.config.num_buckets, self.config.max_distance, x.device
        )
        table = self.layers[0].self_attn.relative_attention_bias
        bias = table(buckets).permute(2, 0, 1)  # (H, S, S)

        for layer in self.layers:
            x = layer(x, bias, mask)
        return x


class Beats(nn.Module):
    """Filter banks (B, F, 128) -> features (B, S, D), D = config.encoder_embed_dim."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        self.config = config
        patch, width = config.input_patch_size, config.embed_dim
        self.patch_embedding = nn.Conv2d(1, width, patch, stride=patch, bias=config.conv_bias)
        self.layer_norm = nn.LayerNorm(width)
        if width == config.encoder_embed_dim:
            self.post_extract_proj = nn.Identity()
        else:
            self.post_extract_proj = nn.Linear(width, config.encoder_embed_dim)
        self.encoder = Encoder(config)

    def forward(self, fbank: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode filter banks.

        Args:
            fbank: (B, F, 128) with F of at least 16 frames, one row of patches. Frames that do not
                fill a last row are dropped.
            mask: (B, F), True for a real frame; None if all are.

        Returns:
            Features (B, S, D) and a mask (B, S), True for a real patch. A patch is real when all
            its frames are, so a padded sound has the patches that it has alone.
        """
        batch, frames, mels = fbank.shape
        patch = self.config.input_patch_size
        rows, columns = frames // patch, mels // patch

        # cut into patches, in time-major order
        x = self.patch_embedding(fbank[:, None])  # (B, embed_dim, rows, columns)
        x = x.flatten(2).transpose(1, 2)  # (B, S, embed_dim)
        x = self.post_extract_proj(self.layer_norm(x))  # (B, S, D)

        # which patches are real
        if mask is None:
            mask = torch.ones(batch, frames, dtype=torch.bool, device=x.device)
        mask = mask[:, : rows * patch].reshape(batch, rows, patch).all(-1)  # (B, rows)
        mask = mask.repeat_interleave(columns, dim=1)  # (B, S)
        return self.encoder(x, mask), mask


def load_beats(source: str | Path | dict) -> Beats:
    """Load BEATs with published weights, in evaluation mode.

    Args:
        source: a published `.pt` file, or its content {"cfg": dict, "model": state dict}. The
            classifier of a fine-tuned file (`predictor.*`) is dropped.

    Raises:
        ModelError: no such file, not a BEATs file, an option that is not implemented, missing or
            unexpected weights.
    """
    if isinstance(source, dict):
        name, content = "the given dict", source
    else:
        name, content = str(source), read_file(source)
    if not isinstance(content, dict) or not {"cfg", "model"} <= content.keys():
        raise ModelError(f"{name}: expected a dict with `cfg` and `model`. {DOWNLOAD}")

    beats = Beats(BeatsConfig.from_dict(content["cfg"]))
    try:
        missing, unexpected = beats.load_state_dict(own_weights(content["model"]), strict=False)
    except RuntimeError as error:  # shapes
        reason = " ".join(str(error).split())
        raise ModelError(f"{name}: its weights do not fit its cfg: {reason}. {DOWNLOAD}") from error
    if missing or unexpected:
        raise ModelError(
            f"{name}: missing weights {missing}, unexpected weights {unexpected}. {DOWNLOAD}"
        )
    return beats.eval()


def own_weights(released: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the classifier of released weights, and all but one copy of the bias table."""
    weights = {}
    for name, weight in released.items():
        if name.startswith("predictor."):
            continue
        # one table is listed under every layer's name; the released code uses the last one listed
        if name.endswith("self_attn.relative_attention_bias.weight"):
            name = "encoder.layers.0.self_attn.relative_attention_bias.weight"
        weights[name] = weight
    return weights


def refuse_lfs_pointers(path: str | Path) -> None:
    """Raise ModelError if git-lfs has left a line of text in place of weights.

    Args:
        path: a file or a folder of weights, or a name that is neither.
    """
    path = Path(path)
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.bin")]
    for file in sorted(files):
        with open(file, "rb") as opened:
            if opened.read(40).startswith(b"version https://git-lfs"):
                raise ModelError(
                    f"{file}: a git-lfs pointer instead of the weights; `git lfs pull` in that "
                    "folder fetches them"
                )


def read_file(path: str | Path):
    """Read a foreign `.pt` file without running any code from it. Raises ModelError."""
    if not Path(path).is_file():
        raise ModelError(f"{path}: no such file. {DOWNLOAD}")
    refuse_lfs_pointers(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:  # a web page, half a download
        reason = str(error).splitlines()[0]
        raise ModelError(f"{path}: not a file of torch weights ({reason}). {DOWNLOAD}") from error
