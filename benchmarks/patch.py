"""What PAVE's patch costs in one batched call, beside a loop over the samples as in the released code.

    python benchmarks/patch.py [--device cuda --dtype bfloat16] [--json]

The two take turns in every repeat, forward and backward, and give the same numbers; times are medians, ratios are what is worth comparing.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tqdm import tqdm

from crab_min.pave import Patch, PatchConfig

# name: patch, samples, frames, tokens a frame, side steps of each sample (they take turns), tokens a step
SIZES = {"0.5B, sound of a minute": (PatchConfig(1152, 1024, 896), 4, 32, 196, (59,), 1),
         "0.5B, sounds of 10 to 60 s": (PatchConfig(1152, 1024, 896), 4, 32, 196, (59, 9, 40, 29), 1),
         "7B, LLaVA-3D": (PatchConfig(1152, 1024, 3584), 2, 32, 196, (32,), 576),
         "tiny, sound": (PatchConfig(128, 128, 192, 128), 16, 10, 6, (10,), 48),
         "tiny, 25 frames a second": (PatchConfig(128, 192, 192, 128), 16, 10, 6, (250,), 4)}


def measure(name: str, repeats: int, device: str, dtype: torch.dtype) -> dict:
    config, samples, frames, grid, steps, tokens = SIZES[name]
    torch.manual_seed(0)
    patch, lengths = Patch(config).to(device, dtype), [steps[i % len(steps)] for i in range(samples)]
    torch.nn.init.normal_(patch.norm.weight)
    video, side = (torch.randn(samples, n, s, w, device=device, dtype=dtype) for n, s, w in ((frames, grid, config.video), (max(lengths), tokens, config.side)))
    ways = {"batched": lambda: patch(video, side, lengths), "loop": lambda: torch.cat([patch(video[i:i + 1], side[i:i + 1, :n]) for i, n in enumerate(lengths)])}
    difference, times = (ways["batched"]() - ways["loop"]()).abs().max().item(), {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            began = time.perf_counter()
            run().sum().backward()
            if device != "cpu":
                torch.cuda.synchronize()
            times[way].append(1e3 * (time.perf_counter() - began))
    row = {way: statistics.median(t) for way, t in times.items()}
    return {"name": name, "samples": samples, **row, "loop_over_batched": row["loop"] / row["batched"], "difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", action="store_true", help="print one list, a row a size, and nothing else")
    given = parser.parse_args()
    rows = [measure(name, given.repeats, given.device, getattr(torch, given.dtype)) for name in tqdm(SIZES, disable=given.json)]
    if given.json:
        print(json.dumps(rows))
        return
    print(f"{'forward and backward, ms':<28}{'samples':>8}{'batched':>10}{'loop':>10}{'loop / batched':>16}{'largest difference':>20}")
    for r in rows:
        print(f"{r['name']:<28}{r['samples']:>8}{r['batched']:>10.1f}{r['loop']:>10.1f}{r['loop_over_batched']:>16.2f}{r['difference']:>20.1e}")


if __name__ == "__main__":
    main()
