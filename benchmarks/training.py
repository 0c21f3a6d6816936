"""How fast training goes: what feeding costs, and what a step of a paper's LM costs.

    python benchmarks/training.py                                     # feeding
    python benchmarks/training.py --lm 7b [--layers N] [--tokens N]   # a step

Feeding: small runs of train.py that take turns. Samples per second of the steps are from each run's
log.csv; those of the whole run count what comes before and after the steps too.

A step: forward, backward and AdamW of Crab+'s LM with random weights and I-LoRA, on random
embeddings, with 80 learned tokens per sample. It is measured as ours and as released: one product
per head, reentrant checkpointing. MFU counts 4 operations per weight and token.

Ratios are what is worth comparing.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from common import NO_BARS, ROOT, peak_bytes, seconds_of, take_turns
from ilora import HeadLoop
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from crab_min.backbones.sizes import HUB_SIZES
from crab_min.ilora import ILoraConfig, ILoraLinear
from crab_min.model import LLM_LINEARS
from crab_min.tools.plan import PEAK
from crab_min.world.folders import WorldConfig, build_world

# --- feeding --------------------------------------------------------------------------------------
# How features are kept: flags.
FEEDING = {
    "decoded each time, 0 workers": "--no-cache-features --workers 0",
    "decoded each time, 2 workers": "--no-cache-features --workers 2",
    "in memory": "--cache-features",
    "in memory, by length": "--cache-features --group-by-length",
}


@dataclass
class Speed:
    """The speed of one run."""

    steps: float  # samples per second of the steps
    waiting: float  # share of the steps' time spent waiting for features
    tokens: float  # padded tokens per sample
    whole_run: float  # samples per second of the whole run


def feeding(steps: int, repeats: int) -> str:
    """Return the table of small runs: medians over `repeats` rounds of all of them."""
    speeds: dict[str, list[Speed]] = {name: [] for name in FEEDING}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_world(WorldConfig(world_clips=300, world_test=20), 0, folder / "data" / "world")
        for number in tqdm(range(repeats), desc="rounds"):
            for name, flags in tqdm(FEEDING.items(), desc="runs", leave=False):
                out = folder / f"{number}-{name.replace(' ', '-')}"
                speeds[name].append(run_speed(out, flags, steps))

    # medians of each column
    medians = {}
    for name, runs in speeds.items():
        columns = zip(*(astuple(run) for run in runs))
        medians[name] = Speed(*(statistics.median(column) for column in columns))
    best = max(speed.steps for speed in medians.values())

    header = f"{'features':<34}{'samples/s':>11}{'of the best':>13}{'waiting':>9}"
    lines = [header + f"{'places a sample':>17}{'samples/s, whole run':>22}"]
    for name, speed in medians.items():
        lines.append(
            f"{name:<34}{speed.steps:>11.1f}{speed.steps / best:>13.2f}{speed.waiting:>9.0%}"
            f"{speed.tokens:>17.0f}{speed.whole_run:>22.1f}"
        )
    return "\n".join(lines)


def run_speed(out: Path, flags: str, steps: int) -> Speed:
    """Train into the folder `out`, on the world in the folder around it."""
    command = [sys.executable, str(ROOT / "train.py"), "--world-clips", "300", "--world-test", "20"]
    command += ["--test-rows", "1", "--steps", str(steps), "--save-every", "1000"]
    command += [*flags.split(), "--out", str(out)]
    began = time.time()
    subprocess.run(command, cwd=out.parent, check=True, capture_output=True, env=NO_BARS)
    run_seconds = time.time() - began

    # without the first steps, which meet new shapes
    rows = list(csv.DictReader(open(out / "log.csv")))[5:]
    total = {}
    for column in ("seconds", "wait", "rows", "padded_tokens"):
        total[column] = sum(float(row[column]) for row in rows)
    samples_per_step = total["rows"] / len(rows)
    return Speed(
        steps=total["rows"] / total["seconds"],
        waiting=total["wait"] / total["seconds"],
        tokens=total["padded_tokens"] / total["rows"],
        whole_run=steps * samples_per_step / run_seconds,
    )


# --- a step of an LM ------------------------------------------------------------------------------
@dataclass
class Way:
    """One way of training an LM."""

    checkpointing: bool
    released: bool

    def describe(self, dtype: torch.dtype) -> str:
        checkpointing = "on" if self.checkpointing else "off"
        weights = str(dtype).removeprefix("torch.")
        ilora = "as released" if self.released else "ours"
        return f"{checkpointing:<14}{weights:<10}{ilora:<13}"


# the released recipe has checkpointing
WAYS = [Way(True, False), Way(True, True), Way(False, False)]


def make_lm(size: str, layers: int) -> nn.Module:
    """Make the thinker of Qwen2.5-Omni with random weights; its encoders have one layer each."""
    config = Qwen2_5OmniThinkerConfig(**HUB_SIZES[f"Qwen/Qwen2.5-Omni-{size.upper()}"])
    if layers:
        config.text_config.num_hidden_layers = layers
        config.text_config.layer_types = config.text_config.layer_types[:layers]
    config.vision_config.depth, config.audio_config.encoder_layers = 1, 1
    return Qwen2_5OmniThinkerForConditionalGeneration(config)


def weights_of_linears(llm: nn.Module) -> int:
    """Count the weights that each token is multiplied with."""
    linears = [module for module in llm.modules() if isinstance(module, nn.Linear)]
    return sum(linear.weight.numel() for linear in linears)


def prepare_lm(size: str, layers: int, way: Way, device: str) -> tuple[nn.Module, int]:
    """Make Crab+'s LM of a size with random weights and I-LoRA, ready to train.

    Returns:
        The LM, and the number of frozen weights that each token is multiplied with.
    """
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        llm = make_lm(size, layers).to(dtype).requires_grad_(False)
    llm.model.visual = llm.model.audio_tower = None  # encoders run before, without gradients
    weights = weights_of_linears(llm)
    config = ILoraConfig(r=128, alpha=256, target_modules=LLM_LINEARS)
    peft_model = get_peft_model(llm.to(device), config)
    if way.released:
        for name, module in list(peft_model.named_modules()):
            if isinstance(module, ILoraLinear):
                peft_model.set_submodule(name, HeadLoop(module))
    if way.checkpointing:
        llm.gradient_checkpointing_enable({"use_reentrant": way.released})
    return peft_model.train(), weights


def make_step(lm: nn.Module, batch: int, tokens: int, device: str) -> Callable[[], None]:
    """Return a function that makes one optimizer step."""
    base = lm.get_base_model()
    trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4)
    width, answer = base.config.text_config.hidden_size, min(80, tokens)
    x = torch.randn(batch, tokens, width, device=device, dtype=lm.dtype, requires_grad=True)
    labels = torch.randint(1000, (batch * answer,), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            mask = torch.ones(batch, tokens, dtype=torch.long, device=device)
            out = base.model(inputs_embeds=x, attention_mask=mask, use_cache=False)
            logits = base.lm_head(out.last_hidden_state[:, -answer:])  # (B, answer, V)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def lm_steps(
    size: str, layers: int, tokens: int, batches: list[int], repeats: int, device: str
) -> str:
    """Return the table of one LM: a line per way of training and batch size."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    operations = 0  # of the GPU per second at most
    for name, value in PEAK.items():
        if name in gpu:
            operations = value
            break
    header = f"{'batch':>5}  {'checkpointing':<14}{'weights':<10}{'I-LoRA':<13}"
    lines = [
        f"{gpu or 'CPU'}, crab_plus-{size} with {layers or 'all'} layers, {tokens} tokens a sample",
        header + f"{'s a step':>10}{'samples/s':>11}{'MFU':>6}{'peak GB':>9}",
    ]
    for way in WAYS:
        lm, weights = prepare_lm(size, layers, way, device)
        for batch in batches:
            start = f"{batch:>5}  {way.describe(lm.dtype)}"
            try:
                step = make_step(lm, batch, tokens, device)
                seconds, peak = step_costs(step, repeats, device)
            except torch.OutOfMemoryError:
                lines.append(start + "out of memory")
                break
            mfu = ""
            if operations:
                mfu = f"{4 * weights * batch * tokens / seconds / operations:.0%}"
            costs = f"{seconds:>10.3f}{batch / seconds:>11.2f}{mfu:>6}{peak / 1e9:>9.2f}"
            lines.append(start + costs)
            print(lines[-1], file=sys.stderr)
        del lm
        torch.cuda.empty_cache()
    return "\n".join(lines)


def step_costs(step: Callable[[], None], repeats: int, device: str) -> tuple[float, int]:
    """Return the median seconds of a step, and the most bytes that are allocated during one."""
    times = take_turns({"step": lambda: seconds_of(step, device)}, repeats, warm_up=1)["step"]
    allocated = torch.cuda.memory_allocated() if device == "cuda" else 0
    return statistics.median(times), allocated + peak_bytes(step, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    help_text = "measure a step of this LM instead of feeding"
    parser.add_argument("--lm", default="", choices=["", "3b", "7b"], help=help_text)
    parser.add_argument("--layers", type=int, default=0, help="of the LM (0: all)")
    parser.add_argument("--tokens", type=int, default=1024, help="per sample")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.lm:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        sizes = (args.lm, args.layers, args.tokens, args.batches)
        print(lm_steps(*sizes, args.repeats, device))
    else:
        print(feeding(args.steps, args.repeats))


if __name__ == "__main__":
    main()
