"""What I-LoRA costs next to a frozen linear, PEFT's LoRA of the same rank, and its naive form.

    python benchmarks/ilora.py [--tokens 512 4096] [--device cuda --dtype bfloat16] [--json]

There is one table per linear. The four layers take turns in every repeat, and times are medians;
ratios are what is worth comparing. Memory is measured apart: parameters, their gradients, the bytes
that a forward keeps for its backward (parameters not counted), and the most that a forward and a
backward hold at once.
"""

import json
import platform
import statistics
from functools import partial

import torch
from common import add_device_flags, make_parser, now, peak_bytes, take_turns
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

from crab_min.ilora import ILoraConfig, ILoraLinear, route

# d_in, d_out, r: a linear of a small LM; the q and up projections of Qwen2.5-7B
SIZES = ((576, 1536, 16), (3584, 3584, 128), (3584, 18944, 128))
HEADS = 3


class HeadLoop(nn.Module):
    """I-LoRA's equation as it reads, on the weights of `layer`: one full-width product per head."""

    def __init__(self, layer: ILoraLinear):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        low = layer.ilora_A["default"](x)  # (..., r)
        w = route(layer.ilora_router["default"](x)).to(x.dtype)  # (..., K)
        heads = layer.ilora_B["default"].weight.chunk(w.shape[-1], dim=1)  # (D_out, r) each
        update = sum(w[..., k : k + 1] * (low @ B_k.T) for k, B_k in enumerate(heads))
        return layer.base_layer(x) + layer.scaling["default"] * update  # (..., D_out)


def layers_of(
    d_in: int, d_out: int, r: int, device: str, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """Return the four layers on one frozen weight, with every adapter weight at random."""
    torch.manual_seed(0)
    frozen = nn.Linear(d_in, d_out, bias=False, device=device, dtype=dtype).requires_grad_(False)
    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0)
    lora = LoraLinear(frozen, "default", config, r=r, lora_alpha=2 * r)
    config = ILoraConfig(r=r, alpha=2 * r, heads=HEADS, dropout=0)
    ours = ILoraLinear(frozen, "default", config)
    for layer in (lora, ours):
        layer.to(dtype)
        for parameter in layer.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.02)
    return {"frozen": frozen, "lora": lora, "loop": HeadLoop(ours), "ours": ours}


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Return the bytes that a forward keeps for its backward, without the layer's parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    saved = {}  # address of a storage -> its bytes, so that each is counted once

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(x)
    total = sum(saved.values())
    del output  # only now: it keeps the saved tensors, and so their addresses, alive
    return total


def measure(
    size: tuple[int, int, int], tokens: int, repeats: int, device: str, dtype: torch.dtype
) -> dict:
    """Return milliseconds and bytes of each layer, and the ratios."""
    d_in, d_out, r = size
    layers = layers_of(d_in, d_out, r, device, dtype)
    x = torch.randn(1, tokens, d_in, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(1, tokens, d_out, device=device, dtype=dtype)

    def step(layer: nn.Module) -> tuple[float, float]:
        """Return the seconds of a forward, and of a forward and a backward."""
        x.grad = None
        layer.zero_grad(set_to_none=True)
        began = now(device)
        y = layer(x)
        middle = now(device)
        y.backward(grad)
        return middle - began, now(device) - began

    steps = {name: partial(step, layer) for name, layer in layers.items()}
    times = take_turns(steps, repeats, warm_up=2)

    row = {"d_in": d_in, "d_out": d_out, "r": r, "heads": HEADS, "tokens": tokens}
    row |= {"device": device, "dtype": str(dtype).removeprefix("torch.")}
    for name, layer in layers.items():
        forward, both = zip(*times[name])
        trained = [p for p in layer.parameters() if p.requires_grad]
        trained_bytes = sum(p.numel() * p.element_size() for p in trained)
        row[name] = {
            "forward_ms": 1000 * statistics.median(forward),
            "both_ms": 1000 * statistics.median(both),
            "parameter_bytes": trained_bytes,
            "gradient_bytes": trained_bytes,
            "saved_bytes": saved_bytes(layer, x),
            "peak_bytes": peak_bytes(steps[name], device),
        }

    # ratios of the times of forward and backward
    frozen, lora, loop, ours = (row[name]["both_ms"] for name in layers)
    row["ours_over_lora"] = ours / lora
    row["loop_over_ours"] = loop / ours
    row["overhead_loop_over_ours"] = (loop - frozen) / (ours - frozen)
    return row


def table(rows: list[dict]) -> str:
    header = f"  {'layer':<8}{'forward ms':>12}{'+ backward':>12}{'/ frozen':>10}"
    header += f"{'adapter MB':>12}{'gradient MB':>12}{'saved MB':>10}{'peak MB':>10}"
    lines = []
    for row in rows:
        size = f"{row['d_in']} -> {row['d_out']}, r {row['r']}, {HEADS} heads"
        lines.append(f"{size}, {row['tokens']} tokens, {row['dtype']} on {row['device']}")
        lines.append(header)
        for name in ("frozen", "lora", "loop", "ours"):
            lines.append(f"  {name:<8}" + layer_columns(row[name], row["frozen"]))
        lines.append(
            f"  ours / LoRA {row['ours_over_lora']:.2f}; loop / ours {row['loop_over_ours']:.2f}; "
            f"time above the frozen linear, loop / ours {row['overhead_loop_over_ours']:.1f}"
        )
    return "\n".join(lines)


def layer_columns(layer: dict, frozen: dict) -> str:
    ratio = layer["both_ms"] / frozen["both_ms"]
    text = f"{layer['forward_ms']:>12.2f}{layer['both_ms']:>12.2f}{ratio:>10.2f}"
    text += f"{layer['parameter_bytes'] / 1e6:>12.2f}{layer['gradient_bytes'] / 1e6:>12.2f}"
    return text + f"{layer['saved_bytes'] / 1e6:>10.2f}{layer['peak_bytes'] / 1e6:>10.2f}"


def main() -> None:
    parser = make_parser(__doc__, repeats=20)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    add_device_flags(parser, "cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    rows = []
    for tokens in args.tokens:
        for size in tqdm(SIZES, desc=f"{tokens} tokens", disable=args.json):
            dtype = getattr(torch, args.dtype)
            rows.append(measure(size, tokens, args.repeats, args.device, dtype))
    if args.json:
        print(json.dumps(rows))
        return
    if args.device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        processor = platform.processor() or platform.machine()
        machine = f"{processor}, {torch.get_num_threads()} threads"
    print(f"{machine}; torch {torch.__version__}; medians of {args.repeats} interleaved repeats")
    print(table(rows))


if __name__ == "__main__":
    main()
