"""Each recipe of the README on this GPU: three steps and an evaluation batch, beside --plan.

    python benchmarks/gpu.py --out gpu.json    # perhaps ten minutes on one GPU of 80 GB: not timed
    python benchmarks/gpu.py --tiny            # the same at toy sizes, on a CPU too

Models have the real sizes and random weights, so nothing is downloaded. For --load-in-4bit the LM
is built in bfloat16 and then quantized, where a run does so while it reads a file. A recipe that
does not fit, that lacks bitsandbytes, or for which no time is left, says so in its row. Media are
noise of the length that --plan assumes.

    planned, peak    GB of memory: the estimate of --plan, and the most that torch allocated (CUDA)
    encode           share of a step in frozen encoders and connectors
    adapter          share of a forward pass that is the adapter's
    optimizer        share of a step in the update
"""

import argparse
import gc
import importlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from common import now, peak_bytes, seconds_of
from ilora import SIZES, measure, table
from torch import nn

from crab_min.backbones.common import import_bitsandbytes
from crab_min.cli import parse_train
from crab_min.config import Settings, with_values
from crab_min.data import SAMPLE_RATE, Sample
from crab_min.devices import choose_device, describe_device
from crab_min.encoders import MediaFeatures
from crab_min.evaluation.answering import DEFAULT_LIMIT
from crab_min.interface import PromptPart, audio_windows
from crab_min.model import AVLanguageModel, Batch
from crab_min.recipes.presets import PRESETS
from crab_min.tools.measure import ANSWER, answered_together, lm_stacks
from crab_min.tools.plan import CLIP_SECONDS, build_model, example_samples, plan
from crab_min.trainer import backward, collate_answers, make_optimizer, update

RECIPES = [
    "crab_plus-7b",
    "crab_plus-7b --load-in-4bit --r 32 --alpha 64 --batch-size 1",
    "crab_plus-3b --load-in-4bit",
    "crab-7b --stage visual",
    "crab-7b --stage unified",
    "crab-7b --stage unified --load-in-4bit",
    "crab-7b --stage masks",
    "pave-7b --batch-size 8",
    "pave-7b --load-in-4bit --batch-size 2",
    "pave-0.5b --batch-size 4",
    "crema-xl --modalities rgb,audio,flow",
]
TINY = [
    "crab_plus-7b --weights tiny-random --batch-size 2 --tasks a2v --eval-batch-tokens 2000",
    "crab-tiny --stage unified --batch-size 2 --tasks a2v --eval-batch-tokens 2000",
    "crab-tiny --stage masks --batch-size 2 --tasks s4 --eval-batch-tokens 2000",
    "pave-7b --weights tiny-random --batch-size 2 --frames 4",
    "crema-xl --weights tiny-random --batch-size 2",
]
STEPS = 3


@dataclass
class Row:
    """What was measured of a recipe; None where it did not come to that."""

    recipe: str
    note: str = ""
    planned_training: float | None = None  # GB
    peak_training: float | None = None
    planned_evaluation: float | None = None
    peak_evaluation: float | None = None
    step_seconds: float | None = None  # the last of STEPS
    samples_per_second: float | None = None
    encode: float | None = None  # shares
    adapter: float | None = None
    optimizer: float | None = None
    tokens_per_second: float | None = None  # generated, all rows of the batch together
    loss: float | None = None


# --- one recipe -----------------------------------------------------------------------------------


def measure_recipe(command: str, device: torch.device) -> Row:
    """Train a recipe for STEPS steps, and answer a batch of its longest prompt.

    Raises:
        torch.OutOfMemoryError: the GPU is too small.
        RunError: a loss or a gradient is not finite.
    """
    given, settings = parse_train(command.split())
    recipe = importlib.import_module(f"crab_min.recipes.{PRESETS[given.preset].recipe}")
    settings = recipe.run_settings(with_values(settings, init_from=""))
    row = Row(command)
    generating = with_values(settings, eval_mode="generate")
    memory = next(iter(plan(recipe, generating).memory.values()))
    row.planned_training = memory.training / 1e9
    row.planned_evaluation = memory.evaluation / 1e9

    torch.manual_seed(0)
    model, features = random_model(recipe, settings, device)
    samples = example_samples(recipe, settings)
    sample = max(samples, key=lambda s: model.prompt_length(s.parts, features(s)))
    measure_training(row, model, settings, sample, features)
    model.zero_grad(set_to_none=True)
    gc.collect()
    measure_evaluation(row, model, generating, sample, features)
    return row


def measure_training(
    row: Row, model: AVLanguageModel, settings: Settings, sample: Sample, features: Callable
) -> None:
    """Fill in what STEPS steps on batches of a sample take."""
    training, device = settings.training, model.device.type
    rows = training.batch_size
    learned = replace(sample, target="word" * ANSWER)  # a token has four characters
    if training.gradient_checkpointing:
        model.llm.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(model, training)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]

    def train_batch() -> Batch:
        media = [features(sample) for _ in range(rows)]  # different clips: nothing is shared
        return collate_answers(model, rows * [learned], media)

    def steps() -> None:
        for _ in range(STEPS):
            began = now(device)
            batch = train_batch()
            encoded = now(device)
            row.loss = backward(model, [batch], training.bf16).loss
            differentiated = now(device)
            update(optimizer, training.max_grad_norm)
            ended = now(device)
        row.step_seconds = ended - began
        row.encode = (encoded - began) / row.step_seconds
        row.optimizer = (ended - differentiated) / row.step_seconds

    model.train()
    row.peak_training = peak_gigabytes(steps, device)
    row.samples_per_second = rows / row.step_seconds
    row.encode += tokens_share(model, train_batch(), row.step_seconds)
    row.adapter = adapter_share(model, train_batch())


def measure_evaluation(
    row: Row, model: AVLanguageModel, settings: Settings, sample: Sample, features: Callable
) -> None:
    """Fill in what a batch of prompts takes, as many as are answered together."""
    model.eval()
    length = model.prompt_length(sample.parts, features(sample))
    rows = answered_together(settings, length)
    batch = model.collate(rows * [sample.parts], [features(sample) for _ in range(rows)])

    def answer() -> None:
        seconds = seconds_of(lambda: model.generate(batch, DEFAULT_LIMIT), model.device.type)
        row.tokens_per_second = rows * DEFAULT_LIMIT / seconds

    row.peak_evaluation = peak_gigabytes(answer, model.device.type)


def random_model(
    recipe: ModuleType, settings: Settings, device: torch.device
) -> tuple[AVLanguageModel, Callable]:
    """Build the model of a recipe on the device, with what learns.

    Returns:
        the model, and a function that makes features of a sample's media.
    """
    meta, sides = build_model(recipe, settings)
    is_tiny = settings.backbone.pretrained == ""
    if is_tiny:
        model = recipe.load_model(settings, device=device)
    else:  # built in bfloat16, where float32 would not fit
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = recipe.load_model(settings, empty=True, device=device)
        finally:
            torch.set_default_dtype(torch.float32)
    model.to(device)
    if settings.backbone.load_in_4bit:
        quantize(model)
    widths = {name: medium.features.shape[-1] for name, medium in sides.items()}
    with device:
        recipe.add_trained_parts(model, settings, widths)
    model.set_trainable(settings.training.parts)

    # the precision of every weight is that of a run
    for parameter, planned in zip(model.parameters(), meta.parameters(), strict=True):
        if parameter.is_floating_point():  # not packed into 4 bits
            parameter.data = parameter.data.to(planned.dtype)
    for buffer, planned in zip(model.buffers(), meta.buffers(), strict=True):
        buffer.data = buffer.data.to(planned.dtype)

    def features(sample: Sample) -> list[MediaFeatures]:
        media = []
        for part in sample.media:
            if part.side:
                shape = sides[part.side].features.shape
                noise = torch.randn(shape, device=device, dtype=torch.float16)
                media.append(replace(sides[part.side], features=noise, mask=None))
            else:
                media.append(encode_noise(model, part))
        return media

    return model, features


def quantize(model: AVLanguageModel) -> None:
    """Put the linears of the LM into NF4, as backbones.common.load_pretrained does.

    Raises:
        ModelError: bitsandbytes cannot be used here.
    """
    bnb = import_bitsandbytes()
    nf4 = {"quant_type": "nf4", "compress_statistics": True}
    for stack in lm_stacks(model):
        for name, linear in list(stack.named_modules()):
            if not isinstance(linear, nn.Linear):
                continue
            sizes = linear.in_features, linear.out_features
            small = bnb.nn.Linear4bit(
                *sizes, bias=False, compute_dtype=torch.bfloat16, device="meta", **nf4
            )
            weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, **nf4)
            small.weight = weight.to(linear.weight.device)  # this quantizes
            small.bias = linear.bias
            stack.set_submodule(name, small)
    model.llm.is_loaded_in_4bit = True  # PEFT asks


def encode_noise(model: AVLanguageModel, part: PromptPart) -> MediaFeatures:
    """Encode noise of the length that --plan assumes for a part."""
    rng = np.random.default_rng()
    seconds = 10.0
    if part.kind == "audio":
        seconds = CLIP_SECONDS.get(part.window, 10.0)
        media = []
        for start, end in audio_windows(part.window, seconds):
            media.append(0.1 * rng.standard_normal(round(SAMPLE_RATE * (end - start)), np.float32))
    else:
        frames = 1 if part.kind == "image" else part.frames
        size = model.frame_size
        media = rng.integers(0, 256, (frames, size, size, 3), np.uint8)
    with torch.no_grad(), model.inference_autocast():
        medium = model.encode(part.kind, [media], [seconds])[0]
    medium.features = medium.features.half()
    return medium


def tokens_share(model: AVLanguageModel, batch: Batch, step: float) -> float:
    """Return the share of a step in which media tokens are made of features."""

    def embed() -> None:
        with torch.no_grad(), model.inference_autocast():
            model.embed(batch)

    return seconds_of(embed, model.device.type) / step


def adapter_share(model: AVLanguageModel, batch: Batch) -> float:
    """Return the share of a forward pass that the adapter on the LM takes; 0 without one."""
    if not hasattr(model.llm, "disable_adapter"):
        return 0.0

    def forward() -> None:
        with torch.no_grad(), model.inference_autocast():
            model(batch)

    forward()
    with_adapter = seconds_of(forward, model.device.type)
    with model.llm.disable_adapter():
        without = seconds_of(forward, model.device.type)
    return max(0.0, 1 - without / with_adapter)


def peak_gigabytes(run: Callable[[], None], device: str) -> float | None:
    """Return the most memory that there is during a call, in GB; None on a CPU."""
    if device != "cuda":
        run()
        return None
    before = torch.cuda.memory_allocated()
    return (before + peak_bytes(run, device)) / 1e9


# --- the table ------------------------------------------------------------------------------------

COLUMNS = {
    "planned_training": ("planned", ".1f"),
    "peak_training": ("peak", ".1f"),
    "planned_evaluation": ("planned", ".1f"),
    "peak_evaluation": ("peak", ".1f"),
    "step_seconds": ("s a step", ".2f"),
    "samples_per_second": ("samples/s", ".2f"),
    "encode": ("encode", ".0%"),
    "adapter": ("adapter", ".0%"),
    "optimizer": ("optimizer", ".0%"),
    "tokens_per_second": ("tokens/s", ".0f"),
    "loss": ("loss", ".2f"),
}


def format_rows(rows: list[Row]) -> str:
    """Format the rows: memory of training and of evaluation in GB, speed, shares."""
    width = max(len(row.recipe) for row in rows) + 2
    lines = [" " * width + f"{'training':>20}{'evaluation':>20}"]
    lines.append(" " * width + "".join(f"{title:>10}" for title, _ in COLUMNS.values()))
    for row in rows:
        cells = []
        for name, (_, form) in COLUMNS.items():
            value = getattr(row, name)
            cells.append("" if value is None else format(value, form))
        lines.append(f"{row.recipe:<{width}}" + "".join(f"{cell:>10}" for cell in cells) + row.note)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--minutes", type=float, default=9, help="no recipe begins after these")
    parser.add_argument("--out", default="", help="also write everything to this JSON file")
    args = parser.parse_args()
    device = choose_device()
    began = time.time()

    # the recipes
    rows: list[Row] = []
    for command in TINY if args.tiny else RECIPES:
        if time.time() - began > 60 * args.minutes:
            rows.append(Row(command, note="  no time left"))
            continue
        try:
            rows.append(measure_recipe(command, device))
        except (torch.OutOfMemoryError, ValueError) as error:
            rows.append(Row(command, note="  " + str(error).split(".")[0]))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(format_rows(rows[-1:]), flush=True)

    # I-LoRA beside LoRA and the loop over heads of the released code
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = SIZES[:1] if args.tiny else SIZES
    layers = [measure(size, 512, 5, device.type, dtype) for size in sizes]

    print(f"\n{describe_device(device)}, torch {torch.__version__}, {time.time() - began:.0f} s")
    print(f"{format_rows(rows)}\n\n{table(layers)}")
    if args.out:
        result = {"device": describe_device(device), "torch": torch.__version__}
        result |= {"recipes": [asdict(row) for row in rows], "layers": layers}
        Path(args.out).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
