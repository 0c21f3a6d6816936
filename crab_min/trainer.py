"""The training loop: `backward`, `update`, a step of both, and `fit`.

The loss of a step is the mean over its N answer tokens, on all processes and in all batches:

    L = -1/N sum log p(token | prompt, answer so far)

(A mean of the batches' means would weigh tokens of short answers more.) AdamW; linear warm-up, then
cosine decay; gradient clipping.

A run that is killed continues from its last checkpoint when the same command is started again. It
ends with the same losses: the batches of a step depend on the seed and on their number alone, and
a checkpoint holds the optimizer and the random generators.

What differs between papers is an argument: the `step` (CREMA's modality-sequential training makes
one update per modality) and `collate` (Crab's mask stage adds masks to a batch).
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from crab_min.config import RunConfig, Settings, TrainingConfig
from crab_min.data import Sample
from crab_min.devices import bf16_autocast
from crab_min.errors import RunError
from crab_min.features import Features, Mixer
from crab_min.interface import PromptPart
from crab_min.model import AVLanguageModel, Batch
from crab_min.runs import processes
from crab_min.runs.folder import (
    Progress,
    Writer,
    background_writer,
    load_checkpoint,
    save_best,
    save_checkpoint,
)
from crab_min.runs.log import LogRow, open_log, stop_requested

FRAME_TOKENS = 32  # about the length of a frame, an image or a second of sound
GROUPED_STEPS = 16  # that --group-by-length sorts together


# --- one step ------------------------------------------------------------------------------------


@dataclass
class StepResult:
    """The numbers of a step, over all processes.

    Of several updates they are those of the last one.
    """

    loss: float  # mean cross-entropy per answer token; of Crab's mask stage with the masks' loss
    answer_tokens: int
    rows: int
    padded_tokens: int  # all tokens that the LM computed on
    grad_norm: float = 0.0  # before clipping
    active: str = ""  # CREMA: the modalities that were trained


def backward(model: AVLanguageModel, batches: list[Batch], bf16: bool) -> StepResult:
    """Fill .grad with the gradient of L, the same on all processes, and return L.

    Args:
        batches: of this process.
        bf16: matrix products in bfloat16 where the hardware has them.

    Raises:
        RunError: the loss is not finite.
    """
    answer_tokens, rows, padded_tokens = processes.sum_all(
        sum(batch.answer_tokens for batch in batches),
        sum(batch.rows for batch in batches),
        sum(batch.padded_tokens for batch in batches),
    )
    # processes that share the LM gather its layers together, so each runs it equally often
    passes = len(batches)
    if model.is_sharded:
        passes = max(processes.gather(passes))
    loss = 0.0
    for batch in batches:
        with bf16_autocast(model.device, bf16):
            batch_loss = model(batch)  # summed over the batch's answer tokens
        (batch_loss / answer_tokens).backward()
        loss += batch_loss.item() / answer_tokens
    for _ in range(passes - len(batches)):
        run_without_samples(model, bf16)
    processes.add_gradients(trained_parameters(model))

    (loss,) = processes.sum_all(loss)
    if not math.isfinite(loss):
        raise RunError(f"the loss is {loss}")
    return StepResult(loss, answer_tokens, rows, padded_tokens)


def run_without_samples(model: AVLanguageModel, bf16: bool) -> None:
    """Run the LM forward and backward for the other processes; the gradient stays as it is.

    A process does so in place of a batch of which no sample can be read.
    """
    batch = model.collate([[PromptPart("text", text="?")]], [[]], [""])
    with bf16_autocast(model.device, bf16):
        loss = model(batch)
    (0 * loss).backward()


def update(optimizer: Optimizer, max_grad_norm: float) -> float:
    """Clip the gradient, make an optimizer step, clear the gradient.

    Returns:
        The norm of the gradient before clipping.

    Raises:
        RunError: the gradient is not finite; this call has changed no weight.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if not math.isfinite(norm):
        raise RunError(f"the norm of the gradient is {norm}")
    optimizer.step()
    optimizer.zero_grad()
    return norm


class Step:
    """A callable that the loop calls once per step.

    A paper that trains otherwise has a subclass.
    """

    finished = False  # nothing is left to train

    def __call__(
        self,
        model: AVLanguageModel,
        batches: list[Batch],
        optimizer: Optimizer,
        config: TrainingConfig,
    ) -> StepResult:
        """Learn from the batches of a step."""
        raise NotImplementedError

    def end(self, step: int) -> None:
        """Take note of the end of a step, counted from 1."""

    def state(self) -> dict:
        """Return what a checkpoint keeps of this object."""
        return {}

    def restore(self, state: dict) -> None:
        """Take back what `state` returned."""


class JointStep(Step):
    """One update of everything that is trained (Crab, Crab+, PAVE)."""

    def __call__(
        self,
        model: AVLanguageModel,
        batches: list[Batch],
        optimizer: Optimizer,
        config: TrainingConfig,
    ) -> StepResult:
        result = backward(model, batches, config.bf16)
        result.grad_norm = update(optimizer, config.max_grad_norm)
        return result


# --- all steps -----------------------------------------------------------------------------------


def collate_answers(model: AVLanguageModel, samples: list[Sample], media: list) -> Batch:
    """Make the batch of samples that learn to write their targets."""
    prompts = [sample.parts for sample in samples]
    batch = model.collate(prompts, media, [sample.target for sample in samples])
    batch.keys = [sample.id for sample in samples]  # for error messages and cached states
    return batch


def fit(
    model: AVLanguageModel,
    features: Features,
    samples: list[Sample],
    settings: Settings,
    folder: Path,
    steps: range,
    train_step: Step | None = None,
    collate: Callable = collate_answers,
    evaluate: Callable[[], float] | None = None,
    before_first_step: Callable[[], None] | None = None,
) -> None:
    """Train from the newest checkpoint in the run folder to the end of `steps`.

    Args:
        steps: the span of the schedule: range(0, a), then range(a, b) for Crab's two phases.
        train_step: learns from the batches of a step; a JointStep by default.
        collate: (model, samples, features of their media) -> Batch.
        evaluate: returns the metric on held-out rows, every `eval_every` steps.
        before_first_step: called when a checkpoint, if there is one, has been restored.
    """
    training, run = settings.training, settings.run
    train_step, optimizer = train_step or JointStep(), make_optimizer(model, training)
    progress = resume(folder, model, optimizer, train_step, training.seed, before_first_step)
    batches = features.batches(own_batches(model, samples, training, progress, steps), strict=False)
    saved_at = time.time()
    model.train()
    with (
        open_log(folder, progress.step, steps.stop, run.log_to) as log,
        stop_requested() as stop,
        background_writer() as writer,
    ):
        while progress.step < steps.stop and not train_step.finished:
            # read: the samples of this step as padded batches, without unreadable ones
            began = time.time()
            taken = list(itertools.islice(batches, training.grad_accum))
            waited = time.time() - began
            micro_batches = [collate(model, rows, media) for rows, media in taken if rows]

            # learn
            lr = set_learning_rate(optimizer, progress.step, steps, training.warmup)
            with naming_samples(progress.step + 1, micro_batches):
                result = train_step(model, micro_batches, optimizer, training)
            progress = end_step(progress, train_step, training)
            seconds = time.time() - began

            # evaluate
            metric = None
            if evaluate and progress.step % run.eval_every == 0:
                metric = keep_best(evaluate, folder, progress, model, writer)

            # log, save; a run that is stopped with Ctrl-C saves first
            log(LogRow(progress.step, lr, seconds, waited, metric, **asdict(result)))
            stopped = any(processes.gather(bool(stop)))
            last = progress.step == steps.stop or train_step.finished
            if last or stopped or is_time_to_save(run, progress.step, saved_at):
                save_checkpoint(folder, progress, model, optimizer, run.keep_checkpoints, writer)
                saved_at = time.time()
            if stopped and not last:
                raise KeyboardInterrupt


# --- what the loop calls -------------------------------------------------------------------------


def resume(
    folder: Path,
    model: AVLanguageModel,
    optimizer: Optimizer,
    train_step: Step,
    seed: int,
    before_first_step: Callable[[], None] | None,
) -> Progress:
    """Restore the newest checkpoint if there is one, and make processes agree."""
    if processes.rank():
        torch.manual_seed(seed + processes.rank())  # other dropout on every process
    progress = load_checkpoint(folder, model, optimizer)
    train_step.restore(progress.step_state)
    processes.broadcast_parameters(trained_parameters(model))
    if before_first_step:
        before_first_step()
    return progress


def is_time_to_save(run: RunConfig, step: int, saved_at: float) -> bool:
    """Tell whether a checkpoint is due; by minutes the first process decides for all.

    Args:
        saved_at: time of the last checkpoint, in seconds.
    """
    if run.save_every and step % run.save_every == 0:
        return True
    minutes = (time.time() - saved_at) / 60
    return bool(run.save_minutes) and processes.on_first(lambda: minutes > run.save_minutes)


def end_step(progress: Progress, train_step: Step, config: TrainingConfig) -> Progress:
    """Let the step object note the end of a step, and return the progress after it."""
    train_step.end(progress.step + 1)
    batches = progress.batches + config.grad_accum * processes.count()
    return Progress(progress.step + 1, batches, progress.best, train_step.state())


def keep_best(
    evaluate: Callable[[], float],
    folder: Path,
    progress: Progress,
    model: AVLanguageModel,
    writer: Writer,
) -> float:
    """Evaluate the held-out rows, and save the model if it is the best so far."""
    metric = evaluate()
    if progress.best is None or metric > progress.best:
        progress.best = metric
        save_best(folder, progress, model, writer)
    return metric


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


def own_batches(
    model: AVLanguageModel,
    samples: list[Sample],
    config: TrainingConfig,
    progress: Progress,
    steps: range,
) -> Iterator[list[Sample]]:
    """Return the samples of this process's batches.

    Process r of n takes r, r + n, r + 2n, ...
    """
    step_batches = config.grad_accum * processes.count()
    by_length = config.group_by_length or step_batches > 1
    order = Mixer(
        samples,
        config.batch_size,
        config.seed,
        config.task_sampling_exponent,
        length=partial(sample_length, model) if by_length else None,
        step_batches=step_batches,
        window=GROUPED_STEPS if config.group_by_length else 1,
    )
    first = progress.batches + processes.rank()
    remaining = max(0, steps.stop - progress.step) * step_batches
    if not remaining:
        return iter(())
    return itertools.islice(order, first, first + remaining, processes.count())


def sample_length(model: AVLanguageModel, sample: Sample) -> int:
    """Return a length to sort a sample by: about its number of tokens."""
    text = "".join(part.text for part in sample.parts) + sample.target
    length = len(model.encode_text(text))
    for part in sample.media:
        length += FRAME_TOKENS * (1 if part.kind == "image" else part.frames)
    return length


def set_learning_rate(optimizer: Optimizer, step: int, steps: range, warmup: float) -> float:
    """Set the learning rate of a step: linear warm-up, then cosine to zero.

    The schedule spans `steps`. Returns the rate of the first group of parameters.
    """
    factor = rate_factor(step - steps.start, len(steps), warmup)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return optimizer.param_groups[0]["lr"]


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Return the factor on the peak learning rate at step t, counted from 0.

    min((t + 1) / r, (1 + cos(pi (t - r) / (N - r))) / 2)        r = warmup N
    """
    rise = max(1, round(steps * warmup))
    decay = max(0, step - rise) / max(1, steps - rise)
    return min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * min(1, decay)))


def make_optimizer(model: AVLanguageModel, config: TrainingConfig) -> AdamW:
    """Make AdamW on what is trained.

    The LM's adapter is trained at `lr`, all else at `connector_lr`.
    """
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
