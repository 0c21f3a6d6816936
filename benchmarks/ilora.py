"""What I-LoRA costs beside a frozen linear, PEFT's LoRA of the same rank, and its equation read head by head.

    python benchmarks/ilora.py [--tokens 512 4096] [--device cuda --dtype bfloat16] [--json]

Each row is one linear. The four layers take turns in every repeat, so that what else the machine does meets all of them
alike, and times are medians; ratios are what is worth comparing. Memory is apart: parameters, their gradients, the bytes
that a forward keeps for its backward (parameters not counted), and the most that a forward and a backward hold at once.
"""
import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from crab_min.ilora import ILoraConfig, ILoraLinear, route

SIZES = ((576, 1536, 16), (3584, 3584, 128), (3584, 18944, 128))        # d_in, d_out, r: a small LM; q and up of Qwen2.5-7B
HEADS = 3


class Loop(nn.Module):
    """The equation as it reads: A once, then for each head a product of the full width, weighed and summed. Shares the weights of `layer`."""

    def __init__(self, layer: ILoraLinear):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        A, R, B, s = (part["default"] for part in (self.layer.ilora_A, self.layer.ilora_router, self.layer.ilora_B, self.layer.scaling))
        low, w = A(x), route(R(x)).to(x.dtype)
        update = sum(w[..., k:k + 1] * (low @ B_k.T) for k, B_k in enumerate(B.weight.chunk(HEADS, dim=1)))
        return self.layer.base_layer(x) + s * update


def layers_of(d_in: int, d_out: int, r: int, device: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The four layers by name, on the same frozen weight, with every adapter weight at random."""
    torch.manual_seed(0)
    frozen = nn.Linear(d_in, d_out, bias=False, device=device, dtype=dtype).requires_grad_(False)
    lora = LoraLinear(frozen, "default", LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0), r=r, lora_alpha=2 * r)
    ours = ILoraLinear(frozen, "default", ILoraConfig(r=r, alpha=2 * r, heads=HEADS, dropout=0))
    for layer in (lora, ours):
        layer.to(dtype)
        for parameter in layer.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=.02)
    return {"frozen": frozen, "lora": lora, "loop": Loop(ours), "ours": ours}


def wait(device: str) -> float:
    """The time, after the device has finished what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes of the tensors that a forward keeps for its backward, each storage once, without the layer's parameters."""
    own, kept = {p.untyped_storage().data_ptr() for p in layer.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)                                                          # alive until the count is made
    return sum(kept.values()) if y is not None else 0


def peak_bytes(step: Callable, device: str) -> int:
    """The most bytes that `step` holds at once, above what there was before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = sorted((e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(d_in: int, d_out: int, r: int, tokens: int, repeats: int, device: str, dtype: torch.dtype) -> dict:
    """One row: milliseconds and bytes of each layer, and the ratios."""
    layers = layers_of(d_in, d_out, r, device, dtype)
    x = torch.randn(1, tokens, d_in, device=device, dtype=dtype, requires_grad=True)
    g = torch.randn(1, tokens, d_out, device=device, dtype=dtype)
    forward, both = ({name: [] for name in layers} for _ in range(2))

    def step(layer):
        x.grad = None
        layer.zero_grad(set_to_none=True)
        began = wait(device)
        y = layer(x)
        middle = wait(device)
        y.backward(g)
        return middle - began, wait(device) - began

    for repeat in range(-2, repeats):                                         # two to warm up
        for name, layer in layers.items():
            times = step(layer)
            if repeat >= 0:
                forward[name].append(times[0])
                both[name].append(times[1])
    row = {"d_in": d_in, "d_out": d_out, "r": r, "heads": HEADS, "tokens": tokens, "device": device, "dtype": str(dtype).removeprefix("torch.")}
    for name, layer in layers.items():
        trained = sum(p.numel() * p.element_size() for p in layer.parameters() if p.requires_grad)
        row[name] = {"forward_ms": 1000 * statistics.median(forward[name]), "both_ms": 1000 * statistics.median(both[name]),
                     "parameter_bytes": trained, "gradient_bytes": trained, "saved_bytes": saved_bytes(layer, x), "peak_bytes": peak_bytes(lambda: step(layer), device)}
    time_of = {name: row[name]["both_ms"] for name in layers}
    row["ours_over_lora"] = time_of["ours"] / time_of["lora"]
    row["loop_over_ours"] = time_of["loop"] / time_of["ours"]
    row["overhead_loop_over_ours"] = (time_of["loop"] - time_of["frozen"]) / (time_of["ours"] - time_of["frozen"])
    return row


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        lines += [f"{row['d_in']} -> {row['d_out']}, r {row['r']}, {HEADS} heads, {row['tokens']} tokens, {row['dtype']} on {row['device']}",
                  f"  {'layer':<8}{'forward ms':>12}{'+ backward':>12}{'/ frozen':>10}{'adapter MB':>12}{'gradient MB':>12}{'saved MB':>10}{'peak MB':>10}"]
        for name in ("frozen", "lora", "loop", "ours"):
            m = row[name]
            lines.append(f"  {name:<8}{m['forward_ms']:>12.2f}{m['both_ms']:>12.2f}{m['both_ms'] / row['frozen']['both_ms']:>10.2f}"
                         + "".join(f"{m[key] / 1e6:>{width}.2f}" for key, width in (("parameter_bytes", 12), ("gradient_bytes", 12), ("saved_bytes", 10), ("peak_bytes", 10))))
        lines.append(f"  ours / LoRA {row['ours_over_lora']:.2f}; loop / ours {row['loop_over_ours']:.2f}; "
                     f"time above the frozen linear, loop / ours {row['overhead_loop_over_ours']:.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", action="store_true", help="print one list, a row a size, and nothing else")
    given = parser.parse_args()
    rows = [measure(*size, tokens, given.repeats, given.device, getattr(torch, given.dtype))
            for tokens in given.tokens for size in tqdm(SIZES, desc=f"{tokens} tokens", disable=given.json)]
    if given.json:
        print(json.dumps(rows))
        return
    machine = torch.cuda.get_device_name() if given.device == "cuda" else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{machine}; torch {torch.__version__}; medians of {given.repeats} interleaved repeats\n{table(rows)}")


if __name__ == "__main__":
    main()
