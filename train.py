"""The command to train: `python train.py [PRESET] [--flag value ...]`.

Without arguments it builds the audio-visual world and trains I-LoRA on the shipped tiny base, for
all tasks of Crab+ (arXiv 2603.04128). At the end it prints the scores of the frozen base, the
trained model and the best constant answer, one line per task. `python train.py --list` shows the
presets.
"""

import importlib
import os
import sys

from crab_min.cli import parse_train, run_command
from crab_min.installation import require_installation
from crab_min.recipes.presets import PRESETS


def main(arguments: list[str]) -> int:
    """Train or plan as the arguments say, and return the exit code."""
    given, settings = parse_train(arguments)
    name = PRESETS[given.preset].recipe

    def command() -> None:
        # environment variables are read when the libraries are imported
        require_installation()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # safe to fork after tokenizing
        if os.environ.get("RANK", "0") != "0":
            os.environ["TQDM_DISABLE"] = "1"  # only the first process shows progress bars

        # torch is imported from here on
        from crab_min.runs import processes

        recipe = importlib.import_module(f"crab_min.recipes.{name}")
        if given.plan:
            from crab_min.tools.plan import plan, report

            print(report(plan(recipe, settings)))
        else:
            recipe.train(settings, given.preset)
            processes.end()

    return run_command(command, given.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
