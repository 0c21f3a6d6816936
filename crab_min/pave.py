"""PAVE's patch: temporal-aligned cross-attention from a video to a side channel.

Paper: PAVE (2503.19794), "Temporal-aligned cross-attention". A side channel is a second signal of
the same clip, such as its sound, more frames per second, depth, or another camera. A patch g adds
what it finds there to the tokens of each frame. The number of tokens does not change.

    z'(k) = z(k) + g(v(k), {s(j) : j in N(k)})                for every frame k

    g is a few blocks of      x <- x + softmax(W_q x (W_k s)^T / sqrt(d)) W_v s
                              x <- x + MLP(LayerNorm(x))
    then an MLP to the LM's width and a LayerNorm, whose gain and bias start at zero: a new patch
    changes nothing, bit for bit.

    symbol  variable                   shape            meaning
    z       tokens                     (B, T, Q, D)     the video's tokens for the LM
    v       videos, video              (B, T, Q, V)     the same before the projector of the LM
    s       sides, side                (B, U, S, W)     tokens of the side channel
    N(k)    partition_steps(U, T)[k]                    the side steps at the time of frame k
    g       Patch                      (B, T, Q, D)

Shapes: B videos, T frames, Q tokens per frame, V their width; U side steps, S tokens per step, W
their width; D width of the LM, C of the patch; K side tokens that one frame attends to.

What differs from the released code: values have a projection of their own, as in the paper's
equations (released: the key's serves for both; `shared_kv` does so too, for released weights); a
batch of videos with side channels of any lengths is one call (released: a loop over the samples);
any short side channel is interpolated to exactly T steps.

Page of the course: docs/course/31_patch.md.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from crab_min.errors import ModelError


@dataclass
class PatchConfig:
    """Sizes of a patch. Released: 512 wide, 4 heads, 2 blocks (3 for MUSIC-AVQA)."""

    video: int  # V
    side: int  # W
    out: int  # D
    hidden: int = 512  # C
    heads: int = 4
    layers: int = 2
    shared_kv: bool = False  # values through the key projection, as released
    rope: bool = False  # rotary positions, as in the released patch for video of the 0.5B model
    merge: str = "patch"  # or "concat", "interleave": see SideTokens


class Block(nn.Module):
    """Cross-attention from a frame to its side tokens, then an MLP, both added to it."""

    def __init__(self, config: PatchConfig):
        super().__init__()
        width = config.hidden
        self.heads = config.heads
        # no output projection after the attention, as released
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = None if config.shared_kv else nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width, bias=False),
            nn.GELU(),
            nn.Linear(2 * width, width, bias=False),
        )

    def forward(
        self, x: Tensor, side: Tensor, valid: Tensor, angles: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Let every frame attend to its side tokens.

        Args:
            x: frames (N, Q, C) with N = B T.
            side: the side tokens of each frame (N, K, C).
            valid: (N, K), True for a token, False for padding.
            angles: of the rotary positions of queries (N, Q, 64) and keys (N, K, 64), or None.

        Returns:
            (N, Q, C).
        """
        q = self.query(x)
        k = self.key(side)
        v = k if self.value is None else self.value(side)
        q, k, v = self.split_heads(q), self.split_heads(k), self.split_heads(v)
        if angles is not None:
            q, k = apply_rope(q, angles[0]), apply_rope(k, angles[1])

        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])
        x = x + attended.transpose(1, 2).flatten(2)  # (N, Q, C)
        return x + self.mlp(self.norm(x))

    def split_heads(self, x: Tensor) -> Tensor:
        """Split the heads: (N, Q, C) -> (N, heads, Q, C / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Patch(nn.Module):
    """The function g: video and side tokens -> what is added to the video's tokens."""

    def __init__(self, config: PatchConfig):
        super().__init__()
        self.config = config
        width = config.hidden
        self.side = nn.Linear(config.side, width)
        self.video = nn.Linear(config.video, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.out = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, config.out)
        )
        self.norm = nn.LayerNorm(config.out)

        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # with a gain of zero (LayerNorm's bias is zero already) a new patch adds nothing
        nn.init.zeros_(self.norm.weight)

    def forward(
        self,
        video: Tensor,
        side: Tensor,
        steps: list[int] | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Compute g(v, s).

        Args:
            video: tokens before the LM's projector (B, T, Q, V).
            side: side tokens (B, U, S, W).
            steps: side steps of each sample, where `side` is padded in time; None: all have U.
            valid: (B, U, S), True for a token, False for padding; None: all are.

        Returns:
            (B, T, Q, D).
        """
        batch, frames, queries, _ = video.shape
        if steps is None:
            steps = [side.shape[1]] * batch
        if valid is None:
            valid = torch.ones(side.shape[:3], dtype=torch.bool, device=side.device)

        # the side tokens at the time of each frame
        keys, key_valid, index = neighbourhood(self.side(side), valid, steps, frames)

        angles = None
        if self.config.rope:
            angles = rope_angles(self.config, queries, side.shape[2], steps, index)

        x = self.video(video).flatten(0, 1)  # (B T, Q, C)
        for block in self.blocks:
            x = block(x, keys, key_valid, angles)
        return self.norm(self.out(x)).unflatten(0, (batch, frames))  # (B, T, Q, D)


class SideTokens(nn.Module):
    """Side tokens in the LM's prompt itself, to compare the patch with.

    They are projected to the LM's width, and stand behind the video ("concat") or behind the frame
    of their time ("interleave"). The released code has both and uses neither.
    """

    def __init__(self, config: PatchConfig):
        super().__init__()
        self.config = config
        self.out = nn.Linear(config.side, config.out)

    def forward(self, video: Tensor, side: Tensor, valid: Tensor | None) -> Tensor:
        """Join side tokens to those of a video.

        Args:
            video: tokens for the LM (T, Q, D).
            side: (U, S, W).
            valid: (U, S), True for a token, False for padding; None: all are.

        Returns:
            (T Q + real side tokens, D).
        """
        side = self.out(side.float()).to(video.dtype)  # (U, S, D)
        if valid is None:
            valid = torch.ones(side.shape[:2], dtype=torch.bool, device=side.device)
        if self.config.merge == "concat":
            return torch.cat([video.flatten(0, 1), side[valid]])
        joined = []
        for frame, steps in zip(video, partition_steps(len(side), len(video))):
            joined += [frame, side[steps][valid[steps]]]
        return torch.cat(joined)


def make_patch(config: PatchConfig) -> nn.Module:
    """Make what joins a side channel to the video."""
    return Patch(config) if config.merge == "patch" else SideTokens(config)


# --- N(k): which side tokens belong to which frame ------------------------------------------------
def neighbourhood(
    side: Tensor, valid: Tensor, steps: list[int], frames: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gather the side tokens at the time of each frame, N(k).

    Args:
        side: (B, U, S, C).
        valid: (B, U, S), True for a token, False for padding.
        steps: side steps of each sample. A side channel of fewer steps than the video has frames
            is interpolated to as many.
        frames: T.

    Returns:
        The side tokens of each frame (B T, K, C), K = most * S; which of them are tokens (B T, K);
        and their side steps (B T, most), -1 where a frame has fewer than the most.
    """
    if min(steps) < frames:
        side, valid = lengthen_short(side, valid, steps, frames)

    # the steps of each frame, padded with -1 to the frame that has most
    parts: list[Tensor] = []
    for count in steps:
        parts += partition_steps(max(count, frames), frames)
    index = pad_sequence(parts, batch_first=True, padding_value=-1).to(side.device)  # (B T, most)

    # gather them: frame t of sample b takes side[b, index[b T + t]]
    sample = torch.arange(len(steps), device=side.device).repeat_interleave(frames)[:, None]
    step = index.clamp(min=0)
    keys = side[sample, step]  # (B T, most, S, C)
    key_valid = valid[sample, step] & (index >= 0)[..., None]  # (B T, most, S)
    return keys.flatten(1, 2), key_valid.flatten(1, 2), index


def partition_steps(steps: int, frames: int) -> tuple[Tensor, ...]:
    """Share out side steps to frames in contiguous parts, the first ones one longer."""
    return torch.arange(steps).tensor_split(frames)


def lengthen_short(
    side: Tensor, valid: Tensor, steps: list[int], frames: int
) -> tuple[Tensor, Tensor]:
    """Interpolate side channels (B, U, S, C) of fewer than `frames` steps to as many."""
    rows, valid_rows = [], []
    for row, valid_row, count in zip(side, valid, steps):
        if count < frames:
            row = interpolate_time(row[:count], frames)  # (T, S, C)
            # a token that is real at any step is real at all of them
            valid_row = valid_row[:count].any(0).expand(frames, -1)  # (T, S)
        rows.append(row)
        valid_rows.append(valid_row)
    return pad_sequence(rows, batch_first=True), pad_sequence(valid_rows, batch_first=True)


def interpolate_time(x: Tensor, length: int) -> Tensor:
    """Interpolate x (U, S, C) to (length, S, C); the first and the last step stay."""
    x = x.permute(1, 2, 0)  # (S, C, U)
    return F.interpolate(x, size=length, mode="linear", align_corners=True).permute(2, 0, 1)


# --- rotary positions, which one released patch has -----------------------------------------------
# Qwen2-VL's: of the 64 frequencies of a head of 128, how many turn with the time, the row and the
# column
ROPE_SECTIONS = (16, 24, 24)
ROPE_BASE = 1e4


def rope_angles(
    config: PatchConfig, queries: int, side_tokens: int, steps: list[int], index: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the angles (B T, Q, 64) of the queries and (B T, K, 64) of the keys.

    The square grid of a side step is spread over the grid of a frame, and the frames over the side
    steps. All positions are whole numbers, as released.

    Args:
        index: the side steps of each frame (B T, most), see `neighbourhood`.
    """
    grid, side_grid = math.isqrt(queries), math.isqrt(side_tokens)
    square = grid**2 == queries and side_grid**2 == side_tokens
    if not square or config.hidden != 128 * config.heads:
        raise ModelError(
            f"rope: needs square grids and heads of 128; got {queries} tokens per frame, "
            f"{side_tokens} per side step, heads of {config.hidden // config.heads}"
        )

    # the time of each frame, counted in side steps
    frames = len(index) // len(steps)
    times = [torch.linspace(0, max(count, frames) - 1, frames).long() for count in steps]
    of_queries = angles_at(torch.cat(times)[:, None], torch.arange(grid))

    # rows (and columns) of the side tokens on the grid of a frame; a single one in its middle
    spread = torch.tensor([grid // 2])
    if side_grid > 1:
        spread = torch.linspace(0, grid - 1, side_grid).long()
    of_keys = angles_at(index.cpu(), spread)
    return of_queries.to(index.device), of_keys.to(index.device)


def angles_at(times: Tensor, grid: Tensor) -> Tensor:
    """Compute the angles of tokens in time-major order.

    They follow from time, row and column of a token.

    Args:
        times: (N, steps).
        grid: rows, and columns, of a time step (G,).

    Returns:
        (N, steps * G * G, 64).
    """
    time, row, column = torch.broadcast_tensors(times[:, :, None, None], grid[:, None], grid)
    positions = torch.stack([time, row, column], -1).flatten(1, 3)  # (N, steps G G, 3)
    frequencies = ROPE_BASE ** (-torch.arange(64) / 64)  # (64,)
    return positions.repeat_interleave(torch.tensor(ROPE_SECTIONS), -1) * frequencies


def apply_rope(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate coordinates i, i + 64 of x (N, heads, K, 128) by angle i of (N, K, 64)."""
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


# --- the patches of a model -----------------------------------------------------------------------
class Patches(nn.ModuleDict):
    """The patches of a model by side channel. A clip may lack any channel."""

    def add_to(
        self,
        tokens: list[Tensor],
        videos: list[Tensor],
        sides: list[dict[str, tuple[Tensor, Tensor | None]]],
    ) -> list[Tensor]:
        """Add to each video's tokens what the patches find in its side channels.

        Args:
            tokens: z, the tokens of each video for the LM (T, Q, D).
            videos: v, the same before the projector (T, Q, V).
            sides: s, for each video name -> (features (U, S, W), mask (U, S) or None if all are
                real). Channels without a patch are ignored.

        Returns:
            z' (T, Q, D) of each video; z itself where no patch has a side channel.

        Raises:
            ModelError: features of another shape or width than a patch takes.
        """
        # videos that share a side channel and a shape go through its patch together
        groups = defaultdict(list)
        for i, (video, side) in enumerate(zip(videos, sides)):
            for name in side.keys() & self.keys():
                if self[name].config.merge == "patch":
                    groups[name, video.shape[:2]].append(i)

        patched = list(tokens)
        for (name, _), chosen in sorted(groups.items()):
            patch = self[name]
            channel = [sides[i][name] for i in chosen]
            check_side_channel(name, channel, patch.config.side)
            side, valid, steps = pad_side_channels(channel, videos[0].device)
            video = torch.stack([videos[i] for i in chosen])  # (B, T, Q, V)
            for i, update in zip(chosen, patch(video, side, steps, valid)):
                patched[i] = patched[i] + update  # z' = z + g(v, s)
        return patched

    def join_tokens(self, video: Tensor, sides: dict[str, tuple[Tensor, Tensor | None]]) -> Tensor:
        """Return the tokens of a video (T, Q, D) for the prompt, and of its side channels.

        Those of a patch are in the video's tokens already. Returns (tokens, D).

        Raises:
            ModelError: features of another shape or width.
        """
        joined = video.flatten(0, 1)
        for name in self.in_prompt(sides):
            check_side_channel(name, [sides[name]], self[name].config.side)
            features, mask = sides[name]
            mask = None if mask is None else mask.to(video.device)
            joined = self[name](video, features.to(video.device), mask)
        return joined

    def count_tokens(self, sides: dict[str, tuple[Tensor, Tensor | None]]) -> int:
        """Return the number of side tokens in the prompt of a video."""
        count = 0
        for name in self.in_prompt(sides):
            features, mask = sides[name]
            count += features.shape[:2].numel() if mask is None else int(mask.sum())
        return count

    def in_prompt(self, sides: dict) -> list[str]:
        """Return the side channel of a video that has tokens in the prompt: none or one."""
        return [name for name in self if name in sides and self[name].config.merge != "patch"][:1]


def check_side_channel(name: str, channel: list[tuple], width: int) -> None:
    """Raise ModelError unless all features of a side channel are (U, S, width)."""
    if any(features.ndim != 3 for features, _ in channel):
        raise ModelError(
            f"patch {name}: this model's encoder gives no features (steps, tokens, width) of it; "
            f'give them as a file (.npy, .pt) under "sides"'
        )
    widths = sorted({features.shape[2] for features, _ in channel})
    if widths != [width]:
        raise ModelError(
            f"patch {name}: reads side tokens {width} wide, got {widths}; give it features of the "
            f"encoder that it learned from (infer.py: --side {name}=FILE)"
        )


def pad_side_channels(
    channel: list[tuple[Tensor, Tensor | None]], device: torch.device
) -> tuple[Tensor, Tensor, list[int]]:
    """Pad the side tokens of several videos to one tensor.

    Args:
        channel: of each video its features (U, S, W), and a mask (U, S) or None.

    Returns:
        The tokens (B, U, S, W) in float32, which of them are real (B, U, S), and the side steps of
        each video.
    """
    most_tokens = max(features.shape[1] for features, _ in channel)
    tokens, valid = [], []
    for features, mask in channel:
        if mask is None:
            mask = torch.ones(features.shape[:2], dtype=torch.bool)
        missing = most_tokens - features.shape[1]
        tokens.append(F.pad(features.to(device, torch.float32), (0, 0, 0, missing)))
        valid.append(F.pad(mask.to(device), (0, missing)))
    steps = [len(features) for features in tokens]
    return pad_sequence(tokens, batch_first=True), pad_sequence(valid, batch_first=True), steps
