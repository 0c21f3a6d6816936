"""Train crab_min: `python train.py [PRESET] [--field value ...]`.

Without arguments: builds the audio-visual world, trains I-LoRA on the shipped tiny base for all tasks of Crab+ (arXiv 2603.04128),
and prints a line a task: frozen base, trained, best constant answer. `python train.py --list` shows the presets.
"""
import os
import sys

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")                      # worker processes are forked after the tokenizer was used
if os.environ.get("RANK", "0") != "0":                                        # of several processes (torchrun) one shows how far they are
    os.environ["TQDM_DISABLE"] = "1"

from crab_min.installation import require_installation

require_installation()

from crab_min.cli import Parser, add_flags, from_flags, run_command  # noqa: E402
from crab_min.recipes.presets import PRESETS, STAGES  # noqa: E402
from crab_min.runs import processes  # noqa: E402
from crab_min.tinybase.make import BaseConfig, train_base  # noqa: E402
from crab_min.tools.plan import plan, report  # noqa: E402
from crab_min.trainer import TrainConfig, run, run_arms  # noqa: E402


def main(arguments: list[str]) -> int:
    preset = arguments[0] if arguments and not arguments[0].startswith("-") else "crab_plus-tiny"
    parser = Parser(prog="train.py", description=__doc__.split("\n")[0], epilog="presets: " + ", ".join(PRESETS))
    if preset not in PRESETS:
        parser.error(f"unknown preset {preset!r}; choose from {', '.join(PRESETS)}")
    parser.add_argument("preset", nargs="?", default=preset, help="what to train (default: crab_plus-tiny)")
    parser.add_argument("--list", action="store_true", help="list the presets and stop")
    parser.add_argument("--plan", action="store_true", help="say how large the model is and whether it fits, and stop; downloads nothing")
    parser.add_argument("--debug", action="store_true", help="show a traceback where something goes wrong")
    description, defaults = PRESETS[preset]
    add_flags(parser, BaseConfig if preset == "tiny-base" else TrainConfig, defaults)
    given = parser.parse_args(arguments)
    if stage := STAGES.get((preset, getattr(given, "stage", ""))):
        parser.set_defaults(**stage)
        given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(f"{name:<16} {text}" for name, (text, _) in PRESETS.items()))
        return 0
    if preset == "tiny-base":
        return run_command(lambda: train_base(from_flags(BaseConfig, given)), given.debug)
    if given.plan:
        return run_command(lambda: print(report(plan(from_flags(TrainConfig, given), preset))), given.debug)
    config = from_flags(TrainConfig, given)
    try:
        return run_command(lambda: run_arms(config, preset) if config.arms else run(config, preset), given.debug)
    finally:
        processes.end()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
