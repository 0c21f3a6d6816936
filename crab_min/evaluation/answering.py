"""Answers of a model to many samples.

Text is generated greedily, or by beam search, with a token limit per task. Questions with options
can instead be answered by the likeliest option, without generating text.
"""

import json
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from tqdm import tqdm

from crab_min.data import Sample
from crab_min.evaluation.budget import TokenBudget
from crab_min.features import Features, cut
from crab_min.interface import PromptPart
from crab_min.model import AVLanguageModel
from crab_min.runs import processes
from crab_min.runs.folder import atomic_write

BATCH_SIZE = 50  # samples per batch, at most
RANKED_TOGETHER = 64  # options per batch when they are ranked, at most
DEFAULT_LIMIT = 160  # answer tokens of a task that the run was not trained on
NOTHING = PromptPart("text", text="?")  # the prompt of a process that has no sample left
MARGIN = 8  # answer tokens beyond the longest training target


@dataclass
class Decoding:
    """The settings of decoding.

    Attributes:
        limits: maximum number of answer tokens, by task; DEFAULT_LIMIT for other tasks.
        mode: "generate" text, or "rank" the options of a question by their likelihood.
        beams: beams of the search; 1 is greedy decoding.
        budget: how many tokens are answered together.
    """

    limits: dict[str, int]
    mode: str = "generate"
    beams: int = 1
    budget: TokenBudget = field(default_factory=TokenBudget)

    def limit(self, sample: Sample) -> int:
        """Return the maximum number of answer tokens of a sample."""
        return self.limits.get(sample.task.name, DEFAULT_LIMIT)


def token_limits(model: AVLanguageModel, samples: list[Sample]) -> dict[str, int]:
    """Return the token limit of each task: its longest target and a margin."""
    limits: dict[str, int] = {}
    for sample in samples:
        tokens = len(model.encode_text(sample.target)) + MARGIN
        limits[sample.task.name] = max(limits.get(sample.task.name, 0), tokens)
    return limits


def plan_batches(samples: list[Sample]) -> list[list[Sample]]:
    """Make batches of samples of one task and of similar length, the longest first."""

    def longest_first(sample: Sample) -> tuple:
        return sample.task.name, -sum(len(part.text) for part in sample.parts), sample.id

    batches = []
    ordered = sorted(samples, key=longest_first)
    for _, group in groupby(ordered, key=lambda sample: sample.task.name):
        of_task = list(group)
        batches += cut(of_task, BATCH_SIZE)
    return batches


def generate_answers(
    model: AVLanguageModel,
    features: Features,
    samples: list[Sample],
    decoding: Decoding,
    desc: str = "answering",
    partial: Path | None = None,
    strict: bool = True,
) -> list[str]:
    """Answer every sample; several processes share the work.

    Args:
        desc: label of the progress bar.
        partial: file to which the answers of each batch are written. An evaluation that was killed
            continues from it, if its batches are the same.
        strict: make an unreadable sample an error; else its answer is "".

    Returns:
        The texts, in the order of the samples.
    """
    # the batches that are still to be answered, and the share of this process: some of them, or
    # with a sharded LM, which all processes must run equally often, some rows of each
    plan = plan_batches(samples)
    texts = processes.on_first(lambda: read_partial(partial, plan)) if partial else {}
    batches = [batch for batch in plan if batch[0].id not in texts]
    rank, count = processes.rank(), processes.count()
    if model.is_sharded:
        shares = [batch[rank::count] for batch in batches]
    else:
        shares = batches = batches[rank::count]

    # answers; an unreadable sample keeps ""
    was_training = model.training
    model.eval()
    with tqdm(total=sum(map(len, shares)), desc=desc, unit="sample") as bar:
        for batch, share, (readable, media) in zip(
            batches, shares, features.batches(shares, strict)
        ):
            ranked = decoding.mode == "rank" and all(options(sample) for sample in batch)
            answered = answer_batch(model, readable, media, decoding, ranked)
            if model.is_sharded:
                for others in processes.gather(answered):
                    answered |= others
            answers = {sample.id: answered.get(sample.id, "") for sample in batch}
            texts |= answers
            if partial and (not model.is_sharded or rank == 0):
                with open(partial, "a", encoding="utf-8") as file:
                    file.write(json.dumps(answers) + "\n")
            bar.update(len(share))
    model.train(was_training)

    # the answers of all processes
    for gathered in processes.gather(texts):
        texts |= gathered
    return [texts[sample.id] for sample in samples]


def answer_batch(
    model: AVLanguageModel, samples: list[Sample], media: list, decoding: Decoding, ranked: bool
) -> dict[str, str]:
    """Answer a batch of samples of one task; return the texts by sample id.

    Args:
        ranked: rank the options of each sample instead of generating text.
    """
    if ranked:
        texts = rank_options(model, samples, media, decoding.budget)
    else:
        texts = generate_texts(model, samples, media, decoding)
    return {sample.id: text for sample, text in zip(samples, texts)}


def generate_texts(
    model: AVLanguageModel, samples: list[Sample], media: list, decoding: Decoding
) -> list[str]:
    """Generate the answers to samples of one task."""
    limit = max(map(decoding.limit, samples), default=1)
    rows = [(sample.parts, features) for sample, features in zip(samples, media)]
    # every beam has keys and values of its own
    lengths = [decoding.beams * (model.prompt_length(*row) + limit) for row in rows]

    def generate(part: list[tuple]) -> list[str]:
        batch = model.collate(*zip(*part))
        return model.generate(batch, limit, beams=decoding.beams)

    def accompany() -> None:
        model.generate(model.collate([[NOTHING]], [[]]), limit, beams=decoding.beams)

    return decoding.budget.run(generate, rows, lengths, accompany=accompany)


def options(sample: Sample) -> list[str]:
    """Return the options of a question as a model writes them.

    There are none for an open question.
    """
    choices = sample.row.get("options") or sample.row.get("multi_choice") or []
    return [sample.task.format_option(choices, index) for index in range(len(choices))]


@torch.no_grad()
def rank_options(
    model: AVLanguageModel, samples: list[Sample], media: list, budget: TokenBudget
) -> list[str]:
    """Return the likeliest option of each sample.

    It has the greatest sum of token log-probabilities.
    """
    # the loss of each option, summed over its tokens
    pairs = [(i, text) for i, sample in enumerate(samples) for text in options(sample)]
    prompt_lengths = [model.prompt_length(s.parts, x) for s, x in zip(samples, media)]
    lengths = [prompt_lengths[i] + len(model.answer_ids(text)) for i, text in pairs]

    def losses_of(ranked: list[tuple[int, str]]) -> list[float]:
        prompts = [samples[i].parts for i, _ in ranked]
        prompt_media = [media[i] for i, _ in ranked]
        texts = [text for _, text in ranked]
        batch = model.collate(prompts, prompt_media, texts)
        with model.inference_autocast():
            return model.token_losses(batch).sum(1).tolist()  # (options, tokens) -> (options,)

    def accompany() -> None:
        with model.inference_autocast():
            model.token_losses(model.collate([[NOTHING]], [[]], [""]))

    losses = budget.run(losses_of, pairs, lengths, RANKED_TOGETHER, accompany)

    # the smallest loss of each sample
    best: dict[int, tuple[float, str]] = {}
    for (i, text), loss in zip(pairs, losses):
        best[i] = min(best.get(i, (loss, text)), (loss, text))
    return [best[i][1] for i in range(len(samples))]


def read_partial(path: Path, plan: list[list[Sample]]) -> dict[str, str]:
    """Read the answers that an interrupted evaluation has written, one batch per line.

    Batches that are not in the plan, and an incomplete last line, are removed from the file.

    Returns:
        Texts by sample id.
    """
    planned = {tuple(sample.id for sample in batch) for batch in plan}
    kept: list[str] = []
    texts: dict[str, str] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            answers = json.loads(line)
        except ValueError:
            break
        if tuple(answers) in planned:
            kept.append(line + "\n")
            texts |= answers

    # new answers are appended to these
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(kept))
    return texts
