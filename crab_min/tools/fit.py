"""Settings that fit a GPU: `python train.py PRESET --fit [GB]`.

What costs nothing but time comes first. In this order, until `--plan` says that the run fits:

    evaluation in smaller batches
    the frozen LM in 4 bits
    gradient checkpointing
    smaller batches, and as many more of them per step: the effective batch stays
    fewer seconds of sound, fewer frames
"""

from collections.abc import Iterator
from types import ModuleType

import torch

from crab_min.config import RunConfig, Settings, with_values
from crab_min.errors import RunError
from crab_min.tools.plan import GPUS, Memory, Plan, plan, read_clips

LEAST_EVALUATION = 2048  # tokens that are answered together, at least
SECONDS, FRAMES = (30, 10), (16, 8, 4)  # limits on media that are tried, one after the other


def fit(recipe: ModuleType, settings: Settings, gigabytes: float) -> tuple[Settings, str]:
    """Return settings with which a run fits a GPU, and a text that says what was chosen.

    Args:
        recipe: a module of crab_min.recipes.
        gigabytes: memory of the GPU (GiB); 0 for that of the GPU of this machine.

    Raises:
        RunError: no GPU and no number, or nothing that is tried here makes the run fit.
    """
    gigabytes = gigabytes or card_gigabytes()
    chosen: dict[str, str] = {}  # the first flag of a choice -> all of its flags
    clips = None
    if settings.data.data:
        clips = read_clips(recipe, recipe.run_settings(settings))
    result = plan(recipe, settings, clips)
    for flags, values in smaller_settings(settings, result):
        if memory_of(result).fits(gigabytes):
            break
        smaller = with_values(settings, **values)
        smaller_result = plan(recipe, smaller, clips)
        if memory_of(smaller_result).needed < memory_of(result).needed:  # else it is of no use
            settings, result = smaller, smaller_result
            chosen[flags.split()[0]] = flags

    needed = memory_of(result).needed
    flags = " ".join(chosen.values())
    if needed >= gigabytes:
        enough = next((gpu for gpu in GPUS if gpu > needed), None)
        nearest = f"a GPU of {enough} GB would do" if enough else "no single GPU listed is enough"
        raise RunError(
            f"--fit {gigabytes:g}: with {flags or 'nothing left to save'} the run still "
            f"needs {needed:.1f} GB; {nearest}, or a smaller model (python train.py --list), or "
            "a lower --r"
        )
    text = f"fit into {gigabytes:g} GB: {flags or 'as it is'}; estimated {needed:.1f} GB"
    return settings, text


def card_gigabytes() -> float:
    """Return the memory of the GPU of this machine (GiB).

    Raises:
        RunError: there is none.
    """
    if not torch.cuda.is_available():
        raise RunError("--fit: no GPU here whose memory could be read; name it, as in --fit 24")
    return torch.cuda.get_device_properties(0).total_memory / 2**30


def memory_of(result: Plan) -> Memory:
    """Return the memory of a run as its settings are: the first column of the plan."""
    return next(iter(result.memory.values()))


def smaller_settings(settings: Settings, result: Plan) -> Iterator[tuple[str, dict]]:
    """Yield what may be tried, one after the other: flags as text, and the settings' values.

    Args:
        result: the plan of the settings as they are.
    """
    yield (
        f"--eval-batch-tokens {LEAST_EVALUATION}",
        {"eval_batch_tokens": min(LEAST_EVALUATION, RunConfig.eval_batch_tokens)},
    )
    if "4-bit LM" in result.memory and not settings.backbone.load_in_4bit:
        yield "--load-in-4bit", {"load_in_4bit": True}
    training = settings.training
    if not training.gradient_checkpointing:
        yield "--gradient-checkpointing", {"gradient_checkpointing": True}

    # each batch is at most half of the one before; in sequential training a step is one batch
    batch, accumulated = training.batch_size, training.grad_accum
    while batch > 1 and not settings.sequential:
        smaller = next(size for size in range(batch // 2, 0, -1) if batch % size == 0)
        batch, accumulated = smaller, accumulated * (batch // smaller)
        values = {"batch_size": batch, "grad_accum": accumulated}
        yield f"--batch-size {batch} --grad-accum {accumulated}", values
    for seconds in SECONDS:
        yield f"--max-audio-seconds {seconds}", {"max_audio_seconds": float(seconds)}
    for frames in FRAMES:
        yield f"--max-frames {frames}", {"max_frames": frames}
