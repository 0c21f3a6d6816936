"""The training loop: `backward`, `update`, a step of both, and `fit`.

The loss of a step is the cross-entropy summed over the answer tokens of all its batches on all
processes, divided by the number of these tokens. AdamW; linear warm-up, then cosine decay; gradient
clipping. A run that is killed and started again with the same command continues from its last
checkpoint and ends with the same losses: the batches of a step depend on the seed and on how many
came before, and the optimizer and the random generators are part of a checkpoint.

What differs between papers is an argument: the `step` (CREMA makes one update per modality) and
`collate` (Crab's mask stage adds masks to a batch).
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from crab_min.config import Settings, TrainingConfig
from crab_min.data import Sample
from crab_min.errors import RunError
from crab_min.features import Features, Mixer
from crab_min.model import AVLanguageModel, Batch, bf16_autocast
from crab_min.runs import processes
from crab_min.runs.folder import Progress, load_checkpoint, save_best, save_checkpoint
from crab_min.runs.log import LogRow, RunLog, stop_requested

FRAME_TOKENS = 32  # about the length of a frame, an image or a second of sound


# --- one step ------------------------------------------------------------------------------------


@dataclass
class StepResult:
    """What a step did, over all processes."""

    loss: float  # mean cross-entropy per answer token
    answer_tokens: int
    rows: int
    padded_tokens: int  # what the LM computed on
    grad_norm: float = 0.0  # before clipping
    active: str = ""  # CREMA: the modalities that were trained


def backward(model: AVLanguageModel, batches: list[Batch], bf16: bool) -> StepResult:
    """Compute the gradient of the mean loss per answer token over all batches of a step.

    Args:
        batches: those of this process; the others have theirs.
        bf16: matrix products in bfloat16 where the hardware has them.

    Raises:
        RunError: the loss is not finite.
    """
    answer_tokens, rows, padded_tokens = processes.sum_all(
        sum(batch.answer_tokens for batch in batches),
        sum(batch.rows for batch in batches),
        sum(batch.padded_tokens for batch in batches),
    )
    loss = 0.0
    for batch in batches:
        with bf16_autocast(bf16):
            batch_loss = model(batch)  # summed over the batch's answer tokens
        (batch_loss / answer_tokens).backward()
        loss += batch_loss.item() / answer_tokens
    processes.add_gradients(trained_parameters(model))

    (loss,) = processes.sum_all(loss)
    if not math.isfinite(loss):
        raise RunError(f"the loss is {loss}")
    return StepResult(loss, answer_tokens, rows, padded_tokens)


def update(model: AVLanguageModel, optimizer: Optimizer, max_grad_norm: float) -> float:
    """Clip the gradient and make an optimizer step; return the norm before clipping.

    Raises:
        RunError: the gradient is not finite; no weight is changed.
    """
    norm = nn.utils.clip_grad_norm_(trained_parameters(model), max_grad_norm).item()
    if not math.isfinite(norm):
        raise RunError(f"the norm of the gradient is {norm}")
    optimizer.step()
    optimizer.zero_grad()
    return norm


class JointStep:
    """One update of everything that is trained (Crab, Crab+, PAVE)."""

    finished = False  # nothing is left to train

    def __call__(
        self,
        model: AVLanguageModel,
        batches: list[Batch],
        optimizer: Optimizer,
        config: TrainingConfig,
    ) -> StepResult:
        result = backward(model, batches, config.bf16)
        result.grad_norm = update(model, optimizer, config.max_grad_norm)
        return result

    def end(self, step: int) -> None:
        """Take note of the end of a step, counted from 1."""

    def state(self) -> dict:
        """Return what a checkpoint keeps of this object."""
        return {}

    def restore(self, state: dict) -> None:
        """Take back what `state` returned."""


# --- all steps -----------------------------------------------------------------------------------


def collate_answers(model: AVLanguageModel, samples: list[Sample], media: list) -> Batch:
    """Make the batch of samples whose target texts are learned."""
    prompts = [sample.parts for sample in samples]
    batch = model.collate(prompts, media, [sample.target for sample in samples])
    batch.keys = [sample.id for sample in samples]
    return batch


def fit(
    model: AVLanguageModel,
    features: Features,
    samples: list[Sample],
    settings: Settings,
    folder: Path,
    steps: range,
    step: JointStep | None = None,
    collate: Callable = collate_answers,
    evaluate: Callable[[], float] | None = None,
) -> None:
    """Train through `steps`, from the newest checkpoint in the run folder on.

    Args:
        steps: the span of the learning-rate schedule. Where a phase of a run ended, it left a
            checkpoint, and a second phase continues there.
        step: makes the updates of a step; a JointStep by default.
        evaluate: returns the metric on held-out rows, every `eval_every` steps.

    Raises:
        RunError: a loss or gradient is not finite; the last checkpoint is kept.
    """
    training, run = settings.training, settings.run
    step, optimizer = step or JointStep(), make_optimizer(model, training)
    progress = resume(folder, model, optimizer, step, training.seed)
    batches = features.batches(batch_order(model, samples, training, progress, steps), strict=False)
    model.train()
    with RunLog(folder, progress.step, steps.stop) as log, stop_requested() as stop:
        for number in range(progress.step, steps.stop):
            if step.finished:
                break

            # read: the samples of this step, as padded batches
            began = time.time()
            taken = list(itertools.islice(batches, training.grad_accum))
            waited = time.time() - began
            micro_batches = [collate(model, *batch) for batch in taken if batch[0]]

            # learn
            set_learning_rate(optimizer, number, steps, training.warmup)
            with naming_samples(number + 1, micro_batches):
                result = step(model, micro_batches, optimizer, training)
            progress = advance(progress, step, training)

            # evaluate
            metric = None
            if evaluate and progress.step % run.eval_every == 0:
                metric = evaluate()
                if progress.best is None or metric > progress.best:
                    progress.best = metric
                    save_best(folder, model, progress)

            # log, save
            lr, seconds = optimizer.param_groups[0]["lr"], time.time() - began
            log.add(LogRow(progress.step, lr, seconds, waited, metric, **asdict(result)))
            stopped, last = any(processes.gather(bool(stop))), progress.step == steps.stop
            if last or stopped or progress.step % run.save_every == 0:
                save_checkpoint(folder, progress, model, optimizer, run.keep_checkpoints)
            if stopped and not last:
                raise KeyboardInterrupt


# --- what the loop calls -------------------------------------------------------------------------


def resume(
    folder: Path, model: AVLanguageModel, optimizer: Optimizer, step: JointStep, seed: int
) -> Progress:
    """Restore the newest checkpoint, if there is one, and make all processes agree."""
    if processes.rank():
        torch.manual_seed(seed + processes.rank())  # other dropout on every process
    progress = load_checkpoint(folder, model, optimizer)
    step.restore(progress.step_state)
    processes.broadcast_parameters(trained_parameters(model))
    return progress


def advance(progress: Progress, step: JointStep, config: TrainingConfig) -> Progress:
    """Return the progress after one more step."""
    step.end(progress.step + 1)
    batches = progress.batches + config.grad_accum * processes.count()
    return Progress(progress.step + 1, batches, progress.best, step.state())


@contextmanager
def naming_samples(step: int, batches: list[Batch]):
    """Add the step and the samples to an error that a step raises."""
    try:
        yield
    except RunError as error:
        names = [key for batch in batches for key in batch.keys]
        raise RunError(
            f"step {step}: {error}; samples {', '.join(names)}. The last checkpoint is kept: "
            "look at these samples, or train with a lower --lr into another --out"
        ) from error


def batch_order(
    model: AVLanguageModel,
    samples: list[Sample],
    config: TrainingConfig,
    progress: Progress,
    steps: range,
) -> Iterator[list[Sample]]:
    """Return the batches that this process takes: of all batches every n-th of n processes."""
    lengths = prompt_lengths(model, samples) if config.group_by_length else None
    exponent = config.task_sampling_exponent
    order = Mixer(samples, config.batch_size, config.seed, exponent, lengths)
    first = progress.batches + processes.rank()
    left = (steps.stop - progress.step) * config.grad_accum * processes.count()
    return itertools.islice(order, first, first + left, processes.count())


def prompt_lengths(model: AVLanguageModel, samples: list[Sample]) -> dict[str, int]:
    """Return about how many tokens each sample has, by its id."""
    lengths = {}
    for sample in samples:
        text = "".join(part.text for part in sample.parts) + sample.target
        length = len(model.encode_text(text))
        for part in sample.media:
            length += FRAME_TOKENS * (1 if part.kind == "image" else part.frames)
        lengths[sample.id] = length
    return lengths


def set_learning_rate(optimizer: Optimizer, step: int, steps: range, warmup: float) -> None:
    """Set the learning rate of a step: linear warm-up, then cosine to zero over `steps`."""
    factor = learning_rate(step - steps.start, len(steps), warmup)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Return the factor on the peak learning rate at a step, counted from 0."""
    rise = max(1, round(steps * warmup))
    decay = max(0, step - rise) / max(1, steps - rise)
    return min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * min(1, decay)))


def make_optimizer(model: AVLanguageModel, config: TrainingConfig) -> AdamW:
    """Make AdamW on what is trained; the adapter and the rest each have a peak learning rate."""
    adapter, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (adapter if "lora_" in name else others).append(parameter)
    groups = [
        {"params": adapter, "peak": config.lr},
        {"params": others, "peak": config.connector_lr},
    ]
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, betas=(0.9, config.beta2), weight_decay=0, fused=True)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that learn."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
