"""Answers and scores of a whole split: `python infer.py --eval`."""

import json
from argparse import Namespace
from pathlib import Path

from crab_min.data import Sample, first_of_each_task, pick_tasks, read_samples, read_splits
from crab_min.errors import DataError
from crab_min.evaluation.ablation import ablate_modality
from crab_min.evaluation.answering import DEFAULT_LIMIT, Decoding
from crab_min.evaluation.budget import TokenBudget
from crab_min.evaluation.pictures import draw_sheet
from crab_min.evaluation.report import evaluate, some_of_each_task
from crab_min.evaluation.scores import evaluation_table, write_predictions
from crab_min.features import Features
from crab_min.interface import load_prompts
from crab_min.runs.folder import atomic_write
from crab_min.side_channels import count_missing
from crab_min.tools.compare import comparison
from crab_min.tools.loading import LoadedRun, load_asked
from crab_min.tools.questions import built_in_data, prepare
from crab_min.tools.reply import mask_maker


def evaluate_split(given: Namespace) -> None:
    """Answer and score a split of --data, by default the test rows of the run.

    An evaluation that was killed continues from the answers it has.

    Args:
        given: the flags of infer.py.
    """
    # the run, and the samples in its form
    run = load_asked(given)
    root, samples = read_split(given, run)

    # how they are decoded
    limits = {
        name: given.max_new_tokens or run.saved.token_limits.get(name, DEFAULT_LIMIT)
        for name in sorted({sample.task.name for sample in samples})
    }
    budget = TokenBudget(given.eval_batch_tokens)
    decoding = Decoding(limits, run.settings.run.eval_mode, given.beams, budget)
    make_masks = mask_maker(given, run.model, budget)

    # without --allow-missing an unreadable file is an error here, before anything is written
    features = Features(run.model, run.settings.data.cache_features, max_bad=1.0)
    readable = features.prepare(samples, strict=not given.allow_missing)

    # answers of an interrupted evaluation are kept if nothing that they depend on has changed
    suffix = f"_without_{given.ablate}" if given.ablate else ""
    folder = Path("answers") if run.is_pretrained or run.is_shipped else run.folder
    out = Path(given.out or folder / f"eval_{given.split}{suffix}")
    out.mkdir(parents=True, exist_ok=True)
    described = describe(given, run, root, samples, decoding)
    partial = continued_answers(out, described)

    # answers and scores
    strict = not given.allow_missing
    evaluation = evaluate(
        run.model, features, samples, decoding, make_masks, partial=partial, strict=strict
    )

    # files and tables
    write_predictions(out / "predictions", samples, evaluation.texts)
    for task, answers in some_of_each_task(evaluation).items():
        draw_sheet(out / "sheets" / f"{task}.png", answers)
    missing = len(samples) - len(readable)
    metrics = {
        "decoding": described | {"eval_batch_tokens": given.eval_batch_tokens},
        "tasks": evaluation.scores,
        **evaluation.numbers,
        "missing": missing,
        "without": count_missing(samples, run.model.side_names),
        "unreadable": list(features.unreadable.values()),
    }
    atomic_write(out / "metrics.json", json.dumps(metrics, indent=1))
    partial.unlink()
    print("\n".join([evaluation_table(evaluation.scores), *evaluation.tables]))
    if given.compare:
        print(comparison(evaluation, run.saved.recipe))
    print(f"{missing} rows with a missing clip; predictions, sheets and metrics.json are in {out}/")


def continued_answers(out: Path, described: dict) -> Path:
    """Return the file of the answers so far, emptied if it belongs to other settings.

    Args:
        described: all that the answers depend on, which is kept in decoding.json.
    """
    partial, decoding = out / "answers.partial.jsonl", out / "decoding.json"
    if decoding.exists() and json.loads(decoding.read_text(encoding="utf-8")) != described:
        partial.unlink(missing_ok=True)
    atomic_write(decoding, json.dumps(described, indent=1))
    return partial


def read_split(given: Namespace, run: LoadedRun) -> tuple[Path, list[Sample]]:
    """Return the path of the data, and its samples in the form of the run.

    Raises:
        DataError: rows that cannot be used; or a pretrained model without --data.
    """
    settings = run.settings
    tasks = pick_tasks(given.task or given.tasks)
    prompts = load_prompts(given.prompts) if given.prompts else run.saved.prompts
    target, seed = settings.data.target, settings.training.seed
    layout = run.model.layout
    kept = run.folder / "test.jsonl"  # test rows of one's own

    # --data, the test rows that the run kept, the run's data as it was split, or the built-in world
    if given.data or (given.split == "test" and kept.is_file()):
        root = Path(given.data or kept)
    elif run.is_pretrained:
        raise DataError(f"which rows? {run.folder} is no run; name some with --data")
    elif settings.data.data:
        root = Path(settings.data.data)
    else:
        root = built_in_data(run, given.things, seed, given.split)

    # samples
    if root == Path(settings.data.data) and not given.data:
        train, test = read_splits(settings.data, str(root), tasks, prompts, seed)
        samples = test if given.split == "test" else train
        if given.test_rows:
            samples = first_of_each_task(samples, given.test_rows)
    else:
        labels = run.form.options if run.form else ()
        form = (target, prompts, given.test_rows, layout, labels)
        samples = read_samples(root, tasks, given.split, *form)
    samples = prepare(samples, given, run)
    if given.ablate:  # after `prepare`: a sound may be a side channel
        samples = ablate_modality(samples, given.ablate)
    return root, samples


def describe(
    given: Namespace, run: LoadedRun, root: Path, samples: list[Sample], decoding: Decoding
) -> dict:
    """Return everything that the answers depend on, for decoding.json."""
    method = f"{given.beams} beams" if given.beams > 1 else "greedy"
    if decoding.mode == "rank":  # open questions have no options
        method = f"likeliest option, else {method}"
    return {
        "run": str(run.folder),
        "data": str(root),
        "split": given.split,
        "ablate": given.ablate,
        "prompts": bool(given.prompts),
        "limits": decoding.limits,
        "masks": given.masks,
        "sides": sorted({part.side for sample in samples for part in sample.media if part.side}),
        "decoding": method,
        "skip": sorted(given.skip),
    }
