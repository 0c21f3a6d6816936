"""The heads of I-LoRA on a test set: what they are used for, and what each is worth.

    python -m crab_min.tools.heads --run runs/crab_plus-tiny [--rows 25]

Crab (2503.13068) shows that its heads have abilities of their own. Here the same question is asked
in two ways of a finished run:

    routing.png    mean weight of each head by task, kind of token, layer and linear
    heads.json     metric of each task with all heads, without head k, with head k alone

A head that is left out has its weight w_k set to zero. The weights of the others stay as they are,
so that a head alone adds no more than its share of the update, not what it could do with all of it.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from crab_min.cli import Parser, run_command
from crab_min.data import Sample, evaluation_data, read_samples
from crab_min.errors import ModelError
from crab_min.evaluation.answering import Decoding, generate_answers, plan_batches
from crab_min.evaluation.pictures import draw_routing
from crab_min.evaluation.routing import RoutingStats, routing_stats
from crab_min.evaluation.scores import by_task, score_all
from crab_min.features import Features
from crab_min.ilora import ILoraLinear
from crab_min.model import AVLanguageModel
from crab_min.runs.folder import atomic_write
from crab_min.tasks import TASKS
from crab_min.tools.loading import LoadedRun, load_run
from crab_min.tools.questions import built_in_data


def count_heads(model: AVLanguageModel) -> int:
    """Return the number of heads of a model's adapter.

    Raises:
        ModelError: it has no I-LoRA adapter, or one with a single head.
    """
    for module in model.llm.modules():
        if isinstance(module, ILoraLinear):
            for router in module.ilora_router.values():
                if router.out_features > 1:
                    return router.out_features
    raise ModelError("no adapter with several heads; give a run that was trained with --heads 2")


@contextmanager
def heads_kept(model: AVLanguageModel, kept: set[int]) -> Iterator[None]:
    """Set the weights of all heads but `kept` to zero inside the block."""
    saved = []
    with torch.no_grad():
        for module in model.llm.modules():
            if isinstance(module, ILoraLinear):
                for name, B in module.ilora_B.items():
                    saved.append((B.weight, B.weight.clone()))
                    # the columns of B are those of head 0, of head 1, ...
                    blocks = B.weight.chunk(module.ilora_router[name].out_features, dim=1)
                    for k, block in enumerate(blocks):
                        if k not in kept:
                            block.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in saved:
                weight.copy_(value)


def read_test_rows(run: LoadedRun, data: str, rows: int) -> list[Sample]:
    """Return test rows in the form of a run, of --data or of the run's built-in world."""
    settings = run.settings
    own_test = run.folder / "test.jsonl"
    if data:
        root = evaluation_data(data) or data
    elif own_test.is_file():
        root = own_test
    else:
        root = built_in_data(run, "", settings.training.seed, "test")
    samples = read_samples(root, list(TASKS), "test", settings.data.target, limit=rows)
    return run.recipe.prepare_samples(samples, settings)


def routing_by_task(
    model: AVLanguageModel, features: Features, samples: list[Sample]
) -> dict[str, RoutingStats]:
    """Return the statistics of the routing over prompts and right answers, by task."""
    stats = {}
    for task, rows in by_task(samples).items():
        batches = []
        for batch in plan_batches([sample for (sample,) in rows]):
            prompts = [sample.parts for sample in batch]
            answers = [task.format(sample.gold) for sample in batch]
            batches.append(model.collate(prompts, features(batch), answers))
        stats[task.name] = routing_stats(model, batches)
    return stats


def score_heads(
    model: AVLanguageModel, features: Features, samples: list[Sample], decoding: Decoding
) -> dict[str, dict[str, float]]:
    """Return the metric of each task with all heads, without each head, and with each alone."""
    heads = set(range(count_heads(model)))
    variants = {"all": heads}
    variants |= {f"without {k}": heads - {k} for k in sorted(heads)}
    variants |= {f"{k} alone": {k} for k in sorted(heads)}
    variants["none"] = set()
    metrics = {}
    for title, kept in variants.items():
        with heads_kept(model, kept):
            texts = generate_answers(model, features, samples, decoding, f"heads: {title}")
        scores = score_all(samples, texts)
        metrics[title] = {task: result["metric"] for task, result in scores.items()}
    return metrics


def table(metrics: dict[str, dict[str, float]]) -> str:
    """Format the metric of each task (rows) with each choice of heads (columns)."""
    titles = list(metrics)
    lines = ["task      " + "".join(f"{title:>11}" for title in titles)]
    for task in metrics["all"]:
        cells = "".join(f"{metrics[title][task]:>11.3f}" for title in titles)
        lines.append(f"{task:<10}{cells}")
    means = [sum(column.values()) / len(column) for column in metrics.values()]
    lines.append("mean      " + "".join(f"{mean:>11.3f}" for mean in means))
    return "\n".join(lines)


def study_heads(given: argparse.Namespace) -> None:
    """Write routing.png and heads.json, and print the table."""
    run = load_run(given.run)
    count_heads(run.model)
    samples = read_test_rows(run, given.data, given.rows)
    features = Features(run.model, run.settings.data.cache_features)
    features.prepare(samples)

    # what the heads are used for
    out = Path(given.out or run.folder / "heads")
    out.mkdir(parents=True, exist_ok=True)
    draw_routing(out / "routing.png", routing_by_task(run.model, features, samples))

    # what each is worth
    metrics = score_heads(run.model, features, samples, Decoding(run.saved.token_limits))
    atomic_write(out / "heads.json", json.dumps(metrics, indent=1))
    print(table(metrics))
    print(f"{len(samples)} test rows; routing.png and heads.json are in {out}/")


def make_parser() -> Parser:
    """Make the parser of the command."""
    parser = Parser(prog="-m crab_min.tools.heads", description=__doc__.split("\n")[0])
    parser.add_argument("--run", default="", help="run folder (default: the newest finished run)")
    parser.add_argument("--data", default="", help="AV-UIE folder (default: the run's world)")
    parser.add_argument("--rows", type=int, default=25, help="test rows per task (0: all)")
    parser.add_argument("--out", default="", help="folder (default: RUN/heads)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = make_parser().parse_args(arguments)
    return run_command(lambda: study_heads(given), given.debug)


if __name__ == "__main__":
    sys.exit(main())
