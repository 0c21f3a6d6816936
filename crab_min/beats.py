"""BEATs, the audio encoder of Crab and CREMA (Chen et al. 2022, arXiv 2212.09058), and the filter bank it reads.

A log-mel picture of the sound (10 ms x 128 mel bins) is cut into 16 x 16 patches, and a transformer runs over the
patches in time-major order: patch s is row s // 8 (160 ms) and column s % 8 (16 mel bins). 1 s is 6 rows, 48 patches.
Three things differ from a plain post-norm transformer:
  position   a grouped convolution over the patches is added once; T5's bucketed relative bias enters every attention
  gate       head and query scale that bias:  bias'(q) = (g_a (g_b a - 1) + 2) bias,  g_a, g_b = sigmoid(sums of W q)
  deep norm  x = LN(alpha x + f(x)),  alpha = (2 layers)^(1/4), f's weights shrunk by (8 layers)^(-1/4) at the start
Parameters carry the released names, so the published file loads as it is. What differs from the released code: the
bias is computed once a forward and its table exists once (released: one table, listed under every layer); q is not
divided by 32 and multiplied back, a float16 guard without effect on the result; padding never reaches a real patch,
so that a sound in a padded batch has the features it has alone.

Shapes: B sounds, N samples, F fbank frames, S patches (F // 16 * 8), D width, H heads.
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

MELS, MEAN, STD = 128, 15.41663, 6.55582               # of AudioSet's log-mel values, from the released code
WEIGHTS = ("BEATs needs its published checkpoint, e.g. BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt (Crab's): "
           "download it from github.com/microsoft/unilm, folder beats, to any place on this machine, and give its path")


@dataclass
class BeatsConfig:
    """Sizes under the names of the released `cfg`; the defaults are the published iter3+ model's (90 M parameters)."""
    input_patch_size: int = 16
    embed_dim: int = 512                               # width of a patch before it is projected to encoder_embed_dim
    conv_bias: bool = False
    encoder_layers: int = 12
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_attention_heads: int = 12
    conv_pos: int = 128                                # kernel of the positional convolution, in patches
    conv_pos_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800                            # patches; beyond it every distance shares the last bucket
    deep_norm: bool = True
    dropout: float = 0.0

    @classmethod
    def from_dict(cls, values: dict) -> "BeatsConfig":
        """Read a released `cfg` (or our own fields). What only matters in pre-training is passed over.

        Raises ModelError for an option of the released code that is not here (no published BEATs uses one).
        """
        fixed = {"layer_norm_first": False, "relative_position_embedding": True, "gru_rel_pos": True,
                 "activation_fn": "gelu"}
        for name, expected in fixed.items():
            if values.get(name, expected) != expected:
                raise ModelError(f"BEATs option {name}={values[name]!r} is not implemented, only {expected!r}; "
                                   f"use a published BEATs checkpoint or train one with {name}={expected!r}")
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


def fbank(wave: Tensor) -> Tensor:
    """Normalised log-mel filter bank (B, F, 128) of 16 kHz waves (B, N) in [-1, 1]: windows of 25 ms every 10 ms.

    F = 1 + (N - 400) // 160; N must be 400 or more. Only whole windows count, so 1 s gives 98 frames.
    """
    options = dict(num_mel_bins=MELS, sample_frequency=16000, frame_length=25, frame_shift=10)
    banks = [kaldi.fbank(w[None] * 2 ** 15, **options) for w in wave]
    return (torch.stack(banks) - MEAN) / (2 * STD)                                      # (B, F, 128)


def distance_buckets(length: int, buckets: int, max_distance: int, device=None) -> Tensor:
    """T5's buckets (S, S) of key - query: half for each sign; near distances have one each, far ones share by log."""
    place = torch.arange(length, device=device)
    distance = place[None, :] - place[:, None]                                          # (S query, S key)
    half, far = buckets // 2, distance.abs()
    exact = half // 2
    log = torch.log(far.float().clamp(min=1) / exact) / math.log(max_distance / exact)  # 0 at exact, 1 at the maximum
    shared = (exact + (log * (half - exact)).long()).clamp(max=half - 1)
    return (distance > 0) * half + torch.where(far < exact, far, shared)


class Attention(nn.Module):
    """Self-attention whose relative position bias is scaled by each head's query (released: `gru_rel_pos`)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.grep_linear = nn.Linear(width // heads, 8)                                 # two gates, each a sum of four
        self.grep_a = nn.Parameter(torch.ones(1, heads, 1, 1))

    def forward(self, x: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        """x (B, S, D), bias (H, S, S), mask (B, S) True = real."""
        (b, s, d), heads = x.shape, self.heads
        q, k, v = (p(x).view(b, s, heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        gates = torch.sigmoid(self.grep_linear(q).view(b, heads, s, 2, 4).sum(-1))      # q: (B, H, S, D/H)
        g_a, g_b = gates.split(1, dim=-1)                                               # (B, H, S, 1) each
        bias = (g_a * (g_b * self.grep_a - 1) + 2) * bias                               # (B, H, S, S)
        bias = bias.masked_fill(~mask[:, None, None], torch.finfo(bias.dtype).min)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out_proj(y.transpose(1, 2).reshape(b, s, d))                        # (B, S, D)


class Layer(nn.Module):
    """Attention and feed-forward, each followed by LN(alpha x + f(x))."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        width, hidden = config.encoder_embed_dim, config.encoder_ffn_embed_dim
        self.alpha = (2 * config.encoder_layers) ** 0.25 if config.deep_norm else 1.0
        self.self_attn = Attention(width, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        x = self.self_attn_layer_norm(self.alpha * x + self.dropout(self.self_attn(x, bias, mask)))
        return self.final_layer_norm(self.alpha * x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))


class Encoder(nn.Module):
    """Positional convolution, layer norm and the layers."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        self.config, width, kernel = config, config.encoder_embed_dim, config.conv_pos
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=config.conv_pos_groups)
        nn.init.normal_(conv.weight, std=math.sqrt(4 / (kernel * width)))
        nn.init.zeros_(conv.bias)
        self.pos_conv = nn.Sequential(weight_norm(conv, dim=2))                         # a gain for each kernel place
        self.layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.encoder_layers))
        # the table that all layers share sits in the first one, as in the released file
        table = nn.Embedding(config.num_buckets, config.encoder_attention_heads)
        self.layers[0].self_attn.relative_attention_bias = table
        shrink = (8 * config.encoder_layers) ** -0.25 if config.deep_norm else 1.0      # deep norm, arXiv 2203.00555
        for name, module in self.layers.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                shrunk = name.endswith(("v_proj", "out_proj", "fc1", "fc2"))
                nn.init.xavier_normal_(module.weight, gain=shrink if shrunk else 1.0)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, S, D), mask (B, S) True = real -> (B, S, D)."""
        x = x * mask[..., None]                                                         # padding must be zero here
        position = self.pos_conv(x.transpose(1, 2)).transpose(1, 2)[:, :x.shape[1]]     # an even kernel gives one more
        x = self.dropout(self.layer_norm(x + F.gelu(position)))                         # (B, S, D)
        buckets = distance_buckets(x.shape[1], self.config.num_buckets, self.config.max_distance, x.device)
        bias = self.layers[0].self_attn.relative_attention_bias(buckets).permute(2, 0, 1)       # (H, S, S)
        for layer in self.layers:
            x = layer(x, bias, mask)
        return x


class Beats(nn.Module):
    """fbank (B, F, 128) -> features (B, S, D). `config.encoder_embed_dim` is D."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        self.config, size = config, config.input_patch_size
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, size, stride=size, bias=config.conv_bias)
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        same = config.embed_dim == config.encoder_embed_dim
        self.post_extract_proj = nn.Identity() if same else nn.Linear(config.embed_dim, config.encoder_embed_dim)
        self.encoder = Encoder(config)

    def forward(self, fbank: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features (B, S, D) of `fbank` (B, F, 128) and which patches are real (B, S).

        mask: (B, F) bool, True = a real frame; None = all are. A patch is real when all its frames are: a padded sound
        has the patches it has alone. Frames that do not fill a last row are dropped. F is 16 (one row) or more.
        """
        b, frames, mels = fbank.shape
        size = self.config.input_patch_size
        rows, columns = frames // size, mels // size
        x = self.patch_embedding(fbank[:, None]).flatten(2).transpose(1, 2)             # (B, S, embed_dim), time-major
        x = self.post_extract_proj(self.layer_norm(x))                                  # (B, S, D)
        if mask is None:
            mask = torch.ones(b, frames, dtype=torch.bool, device=x.device)
        mask = mask[:, :rows * size].reshape(b, rows, size).all(-1)                     # (B, rows)
        mask = mask.repeat_interleave(columns, dim=1)                                   # (B, S)
        return self.encoder(x, mask), mask


def load_beats(source: str | Path | dict) -> Beats:
    """BEATs with published weights, in evaluation mode.

    source: a published `.pt` file, or its content {"cfg": dict, "model": state dict}. The classifier of a fine-tuned
    file (`predictor.*`) is dropped. Raises ModelError: no such file, not a BEATs file, an option that is not
    implemented, missing or unexpected weights.
    """
    name, content = ("the given dict", source) if isinstance(source, dict) else (str(source), read_file(source))
    if not isinstance(content, dict) or not {"cfg", "model"} <= content.keys():
        raise ModelError(f"{name}: expected a dict with `cfg` and `model`. {WEIGHTS}")
    beats = Beats(BeatsConfig.from_dict(content["cfg"]))
    weights = {key: value for key, value in content["model"].items() if not key.startswith("predictor.")}
    tables = [key for key in weights if key.endswith("self_attn.relative_attention_bias.weight")]
    if tables:                                         # one table under every layer's name; released: the last one wins
        table = [weights.pop(key) for key in tables][-1]
        weights["encoder.layers.0.self_attn.relative_attention_bias.weight"] = table
    try:
        missing, unexpected = beats.load_state_dict(weights, strict=False)
    except RuntimeError as error:                      # shapes
        reason = " ".join(str(error).split())
        raise ModelError(f"{name}: its weights do not fit its cfg: {reason}. {WEIGHTS}") from error
    if missing or unexpected:
        raise ModelError(f"{name}: missing weights {missing}, unexpected weights {unexpected}. {WEIGHTS}")
    return beats.eval()


def read_file(path: str | Path):
    """What a foreign `.pt` file holds, without running any code from it."""
    if not Path(path).is_file():
        raise ModelError(f"{path}: no such file. {WEIGHTS}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:                   # a web page, half a download
        raise ModelError(f"{path}: not a file of torch weights ({str(error).splitlines()[0]}). {WEIGHTS}") from error
