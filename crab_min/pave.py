"""PAVE's patch (2503.19794, section 3): a side channel is added to the tokens of a video, each stretch of it to the frame of that time.

    z'_k = z_k + g(v_k, s_k)        z: tokens for the LM; v: the same before the projector; s_k: the side tokens of frame k's stretch

g is a few blocks of cross-attention from v_k to s_k and an MLP, with a norm at the end whose gain and bias start at zero: a new patch
changes nothing, bit for bit. The number of tokens stays what it was. Differs from the released code: values have weights of their own, as
in the paper's equations (there the key's serve for both; `shared_kv` does the same, for released weights); a batch is one call.

Shapes: B videos, T frames, Q tokens a frame, V their width; U side steps, S tokens a step, W their width; D width of the LM, C of the patch.
"""
import json
import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from crab_min.encoders import MediaFeatures
from crab_min.errors import ModelError
from crab_min.trained_parts import check_fit

ROPE_SECTIONS, ROPE_BASE = (16, 24, 24), 1e4           # frequencies of time, row, column in a head of 128 (Qwen2-VL)


@dataclass
class PatchConfig:
    """Sizes of a patch; the released ones are 512 wide with 4 heads and 2 blocks (3 for Music-AVQA)."""
    video: int                                         # V
    side: int                                          # W
    out: int                                           # D
    hidden: int = 512                                  # C
    heads: int = 4
    layers: int = 2
    shared_kv: bool = False                            # values through the key projection, as released
    rope: bool = False                                 # rotary positions in time, row and column (the released 0.5B video patch)


class Block(nn.Module):
    """Cross-attention without output projection, then an MLP; both added to the queries."""

    def __init__(self, c: PatchConfig):
        super().__init__()
        self.heads = c.heads
        self.query, self.key = nn.Linear(c.hidden, c.hidden), nn.Linear(c.hidden, c.hidden)
        self.value = None if c.shared_kv else nn.Linear(c.hidden, c.hidden)
        self.norm = nn.LayerNorm(c.hidden)
        self.mlp = nn.Sequential(nn.Linear(c.hidden, 2 * c.hidden, bias=False), nn.GELU(), nn.Linear(2 * c.hidden, c.hidden, bias=False))

    def forward(self, x: Tensor, side: Tensor, real: Tensor, turns: tuple | None) -> Tensor:
        """x (N, Q, C), side (N, K, C) of which `real` (N, K) are tokens, turns: angles of queries and keys, or None -> (N, Q, C)."""
        q, k = self.query(x), self.key(side)
        v = k if self.value is None else self.value(side)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))         # (N, heads, Q or K, C / heads)
        if turns is not None:
            q, k = apply_rope(q, turns[0]), apply_rope(k, turns[1])
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None]).transpose(1, 2).flatten(2)
        return x + self.mlp(self.norm(x))


class Patch(nn.Module):
    """video (B, T, Q, V) before the projector, side (B, U, S, W) -> what is added to the video's tokens (B, T, Q, D)."""

    def __init__(self, config: PatchConfig):
        super().__init__()
        self.config = c = config
        self.side, self.video = nn.Linear(c.side, c.hidden), nn.Linear(c.video, c.hidden)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.out = nn.Sequential(nn.Linear(c.hidden, 2 * c.hidden), nn.GELU(), nn.Linear(2 * c.hidden, c.out))
        self.norm = nn.LayerNorm(c.out)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.norm.weight)

    def forward(self, video: Tensor, side: Tensor, steps: list[int] | None = None, real: Tensor | None = None) -> Tensor:
        """steps: side steps of each sample, where `side` is padded; real (B, U, S): which side tokens are not padding (None: all)."""
        (b, t, q, _), s = video.shape, side.shape[2]
        steps = steps or [side.shape[1]] * b
        real = torch.ones(side.shape[:3], dtype=torch.bool, device=side.device) if real is None else real
        keys, shown, index = neighbourhood(self.side(side), real, steps, t)
        turns = self.turns(t, q, s, steps, index) if self.config.rope else None
        x = self.video(video).flatten(0, 1)                                                      # (B T, Q, C)
        for block in self.blocks:
            x = block(x, keys, shown, turns)
        return self.norm(self.out(x)).unflatten(0, (b, t))                                       # (B, T, Q, D)

    def turns(self, t: int, q: int, s: int, steps: list[int], index: Tensor) -> tuple[Tensor, Tensor]:
        """Angles (B T, Q, 64) of the queries and (B T, K, 64) of the keys: the grid of a side step is spread over that of a frame."""
        grid, small = math.isqrt(q), math.isqrt(s)
        if grid ** 2 != q or small ** 2 != s or self.config.hidden != 128 * self.config.heads:
            raise ModelError(f"rope: wants square grids and heads of 128; got {q} tokens a frame, {s} a side step, heads of {self.config.hidden // self.config.heads}")
        spread = torch.linspace(0, grid - 1, small).long() if small > 1 else torch.tensor([grid // 2])       # whole numbers, as released
        when = torch.stack([torch.linspace(0, max(n, t) - 1, t).long() for n in steps])          # (B, T)
        return tuple(rope_angles(positions(when, places).to(index.device)) for when, places in (
            (when.flatten()[:, None], torch.arange(grid)), (index.flatten(0, 1).cpu(), spread)))


def neighbourhood(x: Tensor, real: Tensor, steps: list[int], frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """The side tokens that each frame reads: (B T, K, C), which of them are tokens (B T, K), and their steps (B, T, most), -1 for none.

    x (B, U, S, C) of which `steps` are real in time and `real` (B, U, S) in all; one shorter than the video is stretched to its length.
    """
    if min(steps) < frames:
        longer = [(interpolate_time(row[:n], frames), shown[:n].any(0).expand(frames, -1)) if n < frames else (row, shown) for row, shown, n in zip(x, real, steps)]
        x, real = (torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in zip(*longer))
    index = [partition_steps(max(n, frames), frames) for n in steps]
    most = max(i.shape[1] for i in index)
    index = torch.stack([F.pad(i, (0, most - i.shape[1]), value=-1) for i in index]).to(x.device)
    sample, step = torch.arange(len(steps), device=x.device)[:, None, None], index.clamp(min=0)
    shown = real[sample, step] & (index >= 0)[..., None]                                         # (B, T, most, S)
    return x[sample, step].flatten(2, 3).flatten(0, 1), shown.flatten(2, 3).flatten(0, 1), index


def partition_steps(steps: int, frames: int) -> Tensor:
    """(frames, most) which side steps belong to each frame, -1 where there are fewer: contiguous, the first ones one longer."""
    parts = torch.arange(steps).tensor_split(frames)
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=-1)


def interpolate_time(x: Tensor, length: int) -> Tensor:
    """x (U, S, C) -> (length, S, C), linear in time, first and last kept."""
    return F.interpolate(x.permute(1, 2, 0), size=length, mode="linear", align_corners=True).permute(2, 0, 1)


def positions(when: Tensor, grid: Tensor) -> Tensor:
    """(N, steps * grid ** 2, 3): time, row and column of tokens at the steps `when` (N, steps), in time-major order."""
    t, y, x = torch.broadcast_tensors(when[:, :, None, None], grid[:, None], grid)
    return torch.stack([t, y, x], -1).flatten(1, 3)


def rope_angles(places: Tensor) -> Tensor:
    """(N, K, 3) -> (N, K, 64): the first frequencies turn with time, the next with the row, the last with the column."""
    frequency = ROPE_BASE ** (-torch.arange(64, device=places.device) / 64)
    return places.repeat_interleave(torch.tensor(ROPE_SECTIONS, device=places.device), -1) * frequency


def apply_rope(x: Tensor, turn: Tensor) -> Tensor:
    """x (N, heads, K, 128) turned by angles (N, K, 64), coordinate i with i + 64."""
    a, b = x.chunk(2, -1)
    cos, sin = turn.cos()[:, None], turn.sin()[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


# --- side channels ---------------------------------------------------------------------------------------------------------


class Patches(nn.ModuleDict):
    """The patches of a model by the name of their side channel; each is optional for a clip."""

    def forward(self, videos: list[Tensor], sides: list[dict[str, MediaFeatures]]) -> list[Tensor | int]:
        """What to add to each of the videos' tokens: videos (T, Q, V) before the projector -> (T, Q, D), 0 where no patch has a side channel."""
        added, groups = [0] * len(videos), defaultdict(list)
        for i, (video, side) in enumerate(zip(videos, sides)):
            for name in side.keys() & self.keys():
                groups[name, video.shape[:2]].append(i)
        for (name, _), chosen in sorted(groups.items()):
            patch, found = self[name], [sides[i][name] for i in chosen]
            if any(m.features.ndim != 3 for m in found):
                raise ModelError(f"patch {name}: this model's encoder gives no features (steps, tokens, width) of it; give them as a file (.npy, .pt) under \"sides\"")
            most = [max(m.features.shape[axis] for m in found) for axis in (0, 1)]
            if any(m.features.shape[2] != patch.config.side for m in found):
                raise ModelError(f"patch {name}: reads side tokens {patch.config.side} wide, got {sorted({m.features.shape[2] for m in found})}; is it another "
                                 "encoder's feature file, or the patch of another side channel?")
            fill = [(0, most[1] - m.features.shape[1], 0, most[0] - m.features.shape[0]) for m in found]
            x = torch.stack([F.pad(m.features.to(videos[0].device, torch.float32), (0, 0, *f)) for m, f in zip(found, fill)])
            real = torch.stack([F.pad(torch.ones(m.features.shape[:2], dtype=torch.bool) if m.mask is None else m.mask.cpu(), f) for m, f in zip(found, fill)])
            update = patch(torch.stack([videos[i] for i in chosen]), x, [len(m.features) for m in found], real.to(x.device))
            for i, value in zip(chosen, update):
                added[i] = added[i] + value
        return added

    def add(self, name: str, config: PatchConfig) -> None:
        self[name] = Patch(config)

    def save(self, folder: Path) -> None:
        """folder/NAME.safetensors for each: its weights, and its sizes in the header."""
        for name, patch in self.items():
            folder.mkdir(parents=True, exist_ok=True)
            state = {key: value.contiguous() for key, value in patch.state_dict().items()}
            save_file(state, folder / f"{name}.safetensors", {"format": "pt", "patch": json.dumps(asdict(patch.config))})

    def load(self, file: Path, video: int, out: int) -> None:
        """Add (or replace) the patch of a file, for video tokens `video` wide before the projector and `out` for the LM. Raises ModelError."""
        try:
            with safe_open(file, "pt") as opened:
                config = PatchConfig(**json.loads((opened.metadata() or {})["patch"]))
            state = load_file(file)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{file}: not a patch ({type(error).__name__}: {error}); give a patches/NAME.safetensors of a run of train.py --side NAME") from None
        if (config.video, config.out) != (video, out):
            raise ModelError(f"{file}: a patch for video tokens {config.video} wide and an LM of {config.out}; this model has {video} and {out}. Use it with the model "
                             "that it was trained on")
        name = Path(file).stem
        if name not in self or self[name].config != config:
            self.add(name, config)
        check_fit(state, self[name].state_dict(), file)
        self[name].load_state_dict(state)


# --- CREMA: side modalities become one stream beside the video ---------------------------------------------------------------


