"""What PAVE's patch costs in one batched call, next to a loop over the samples as released.

    python benchmarks/patch.py [--device cuda --dtype bfloat16] [--json]

The two take turns in every repeat, forward and backward, and give the same numbers. Times are
medians; ratios are what is worth comparing.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from common import add_device_flags, make_parser, seconds_of, take_turns
from torch import Tensor
from tqdm import tqdm

from crab_min.pave import Patch, PatchConfig


@dataclass
class Size:
    """A batch of videos with their side channels, and the patch that reads them."""

    name: str
    config: PatchConfig
    samples: int
    frames: int
    tokens: int  # per frame
    side_steps: tuple[int, ...]  # of the samples, which take turns
    side_tokens: int  # per step


SIZES = (
    Size("0.5B, sound of a minute", PatchConfig(1152, 1024, 896), 4, 32, 196, (59,), 1),
    Size(
        "0.5B, sounds of 10 to 60 s", PatchConfig(1152, 1024, 896), 4, 32, 196, (59, 9, 40, 29), 1
    ),
    Size("7B, LLaVA-3D", PatchConfig(1152, 1024, 3584), 2, 32, 196, (32,), 576),
    Size("tiny, sound", PatchConfig(128, 128, 192, 128), 16, 10, 6, (10,), 48),
    Size("tiny, 25 frames a second", PatchConfig(128, 192, 192, 128), 16, 10, 6, (250,), 4),
)


def measure(size: Size, repeats: int, device: str, dtype: torch.dtype) -> dict:
    """Return milliseconds of the two ways, their ratio, and the largest difference of results."""
    config = size.config
    torch.manual_seed(0)
    patch = Patch(config).to(device, dtype)
    torch.nn.init.normal_(patch.norm.weight)  # zero in a new patch
    lengths = [size.side_steps[i % len(size.side_steps)] for i in range(size.samples)]

    # (B, T, Q, V) and (B, U, S, W)
    video = torch.randn(
        size.samples, size.frames, size.tokens, config.video, device=device, dtype=dtype
    )
    side = torch.randn(
        size.samples, max(lengths), size.side_tokens, config.side, device=device, dtype=dtype
    )

    def batched() -> Tensor:
        return patch(video, side, lengths)

    def loop() -> Tensor:
        outputs = []
        for i, length in enumerate(lengths):
            outputs.append(patch(video[i : i + 1], side[i : i + 1, :length]))
        return torch.cat(outputs)

    def forward_and_backward(way: Callable[[], Tensor]) -> None:
        way().sum().backward()

    difference = (batched() - loop()).abs().max().item()
    ways = {"batched": batched, "loop": loop}
    measures = {}
    for name, way in ways.items():
        measures[name] = partial(seconds_of, partial(forward_and_backward, way), device)
    row = {"name": size.name, "samples": size.samples}
    for name, times in take_turns(measures, repeats).items():
        row[name] = 1000 * statistics.median(times)
    row["loop_over_batched"] = row["loop"] / row["batched"]
    row["difference"] = difference
    return row


def table(rows: list[dict]) -> str:
    header = f"{'forward and backward, ms':<28}{'samples':>8}{'batched':>10}{'loop':>10}"
    lines = [header + f"{'loop / batched':>16}{'largest difference':>20}"]
    for row in rows:
        lines.append(
            f"{row['name']:<28}{row['samples']:>8}{row['batched']:>10.1f}{row['loop']:>10.1f}"
            f"{row['loop_over_batched']:>16.2f}{row['difference']:>20.1e}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = make_parser(__doc__, repeats=9)
    add_device_flags(parser, "cpu")
    args = parser.parse_args()

    rows = []
    for size in tqdm(SIZES, disable=args.json):
        rows.append(measure(size, args.repeats, args.device, getattr(torch, args.dtype)))
    print(json.dumps(rows) if args.json else table(rows))


if __name__ == "__main__":
    main()
