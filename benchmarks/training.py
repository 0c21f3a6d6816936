"""How fast training goes: what feeding costs, and what a step of a paper's LM costs.

    python benchmarks/training.py                                   # feeding: small runs of train.py that take turns
    python benchmarks/training.py --lm 7b [--layers N] [--tokens N]     # a step of Crab+'s LM with random weights: I-LoRA here, and as released

Feeding: samples a second of the steps, from each run's log.csv, and of the whole run with what comes before and after. A step: forward, backward
and AdamW on random embeddings, 80 learned tokens a sample; as released is a product a head and reentrant checkpointing. Ratios are what is
worth comparing. MFU counts 4 operations a weight and token, as the bar of train.py does.
"""
import argparse
import csv
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from ilora import Loop, peak_bytes, wait
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers.utils import is_bitsandbytes_available

from crab_min.backbones.load import quantize
from crab_min.ilora import ILoraConfig, ILoraLinear
from crab_min.model import LLM_LINEARS
from crab_min.runs.log import PEAK, multiplied
from crab_min.tools.plan import make_lm, sizes_of
from crab_min.world.folders import WorldConfig, build_world

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
FEEDING = {                                                                   # name: flags; the disk is filled by the first run that names it
    "decoded each time, 0 workers": ["--no-cache-features", "--workers", "0"],
    "decoded each time, 2 workers": ["--no-cache-features", "--workers", "2"],
    "on disk, first run": ["--no-cache-features", "--workers", "2", "--feature-cache", "features{}"],
    "on disk, second run": ["--no-cache-features", "--workers", "2", "--feature-cache", "features{}"],
    "in memory": ["--cache-features"],
    "in memory, second run from disk": ["--cache-features", "--feature-cache", "features{}"],
    "in memory, by length": ["--cache-features", "--group"],
}


def feeding(steps: int, repeats: int) -> str:
    """The table of small runs, medians over `repeats` rounds of all of them."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in FEEDING}
    with tempfile.TemporaryDirectory() as folder:
        build_world(WorldConfig(world_clips=300, world_test=20), 0, Path(folder) / "data" / "world")
        common = [sys.executable, str(TRAIN), "--world-clips", "300", "--world-test", "20", "--test-rows", "1", "--steps", str(steps), "--save-every", "1000"]
        for i in tqdm(range(repeats), desc="rounds"):
            for name, flags in tqdm(FEEDING.items(), desc="runs", leave=False):
                out, began = Path(folder) / f"{len(found[name])}-{name.replace(' ', '-')}", time.time()
                subprocess.run([*common, *(flag.format(i) for flag in flags), "--out", str(out)], cwd=folder, check=True, capture_output=True, env=os.environ | {"TQDM_DISABLE": "1"})
                rows = list(csv.DictReader(open(out / "log.csv")))[5:]        # without the first, which meet new shapes
                seconds, wanted, places = (sum(float(row[column]) for row in rows) for column in ("seconds", "rows", "places"))
                found[name].append((wanted / seconds, places / wanted, sum(float(row["wait"]) for row in rows) / seconds, steps * wanted / len(rows) / (time.time() - began)))
    lines = [f"{'features':<34}{'samples/s':>11}{'of the best':>13}{'waiting':>9}{'places a sample':>17}{'samples/s, whole run':>22}"]
    medians = {name: [statistics.median(column) for column in zip(*each)] for name, each in found.items()}
    best = max(each[0] for each in medians.values())
    lines += [f"{name:<34}{speed:>11.1f}{speed / best:>13.2f}{waiting:>9.0%}{places:>17.0f}{whole:>22.1f}" for name, (speed, places, waiting, whole) in medians.items()]
    return "\n".join(lines)


def prepared(name: str, layers: int, four_bit: bool, released: bool, checkpointing: bool, device: str) -> tuple[nn.Module, int]:
    """Crab+'s LM of a size with random weights and I-LoRA, ready to train, and how many frozen weights a place is multiplied with."""
    torch.manual_seed(0)
    with torch.device(device):
        llm = make_lm(sizes_of(f"crab_plus-{name}"), layers).to(torch.bfloat16 if device == "cuda" else torch.float32).requires_grad_(False)
    llm.model.visual = llm.model.audio_tower = None                           # encoders run without gradients, before
    size = multiplied(llm)
    if four_bit:
        quantize(llm)
    peft = get_peft_model(llm.to(device), ILoraConfig(r=128, alpha=256, target_modules=LLM_LINEARS))
    if released:
        for module, layer in [(n, m) for n, m in peft.named_modules() if isinstance(m, ILoraLinear)]:
            peft.set_submodule(module, Loop(layer))
    if checkpointing:
        llm.gradient_checkpointing_enable({"use_reentrant": released})
    return peft.train(), size


def step_of(lm: nn.Module, batch: int, tokens: int, device: str):
    """A function that makes one optimizer step."""
    base, trained = lm.get_base_model(), [p for p in lm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4)
    x = torch.randn(batch, tokens, base.config.text_config.hidden_size, device=device, dtype=lm.dtype, requires_grad=True)
    labels = torch.randint(1000, (batch * min(80, tokens),), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            hidden = base.model(inputs_embeds=x, attention_mask=torch.ones(batch, tokens, dtype=torch.long, device=device), use_cache=False).last_hidden_state
            loss = F.cross_entropy(base.lm_head(hidden[:, -min(80, tokens):]).flatten(0, 1).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def lm_steps(name: str, layers: int, tokens: int, batches: list[int], repeats: int, device: str) -> str:
    """The table of one LM: a line for each batch size, checkpointing, 4 bits, and way."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    peak = next((peak for key, peak in PEAK.items() if key in gpu), 0)
    lines = [f"{gpu or 'CPU'}, crab_plus-{name} with {layers or 'all'} layers, {tokens} tokens a sample",
             f"{'batch':>5}  {'checkpointing':<14}{'weights':<10}{'I-LoRA':<13}{'s a step':>10}{'samples/s':>11}{'MFU':>6}{'peak GB':>9}"]
    for four_bit, checkpointing, released in itertools.product((False, True) if is_bitsandbytes_available() else (False,), (True, False), (False, True)):
        if released and (four_bit or not checkpointing):                      # the released recipe: bfloat16, checkpointing
            continue
        lm, size = prepared(name, layers, four_bit, released, checkpointing, device)
        for batch in batches:
            head = f"{batch:>5}  {'on' if checkpointing else 'off':<14}{'4 bits' if four_bit else str(lm.dtype)[6:]:<10}{'as released' if released else 'ours':<13}"
            try:
                step, times = step_of(lm, batch, tokens, device), []
                step()
                for _ in range(repeats):
                    began = wait(device)
                    step()
                    times.append(wait(device) - began)
                held = (torch.cuda.memory_allocated() if device == "cuda" else 0) + peak_bytes(step, device)
            except torch.OutOfMemoryError:
                lines.append(head + "out of memory")
                break
            seconds = statistics.median(times)
            lines.append(f"{head}{seconds:>10.3f}{batch / seconds:>11.2f}" + (f"{4 * size * batch * tokens / seconds / peak:>6.0%}" if peak else f"{'':>6}") + f"{held / 1e9:>9.2f}")
            print(lines[-1], file=sys.stderr)
        del lm
        torch.cuda.empty_cache()
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lm", default="", choices=["", "3b", "7b"], help="measure a step of this LM instead of feeding")
    parser.add_argument("--layers", type=int, default=0, help="of the LM (0: all)")
    parser.add_argument("--tokens", type=int, default=1024, help="a sample")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(lm_steps(given.lm, given.layers, given.tokens, given.batches, given.repeats, device) if given.lm else feeding(given.steps, given.repeats))


if __name__ == "__main__":
    main()
