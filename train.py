"""Train: `python train.py [PRESET] [--flag value ...]`.

Without arguments it builds the audio-visual world, trains I-LoRA on the shipped tiny base for all
tasks of Crab+ (arXiv 2603.04128), and prints one line per task: frozen base, trained, best constant
answer. `python train.py --list` shows the presets.
"""

import importlib
import os
import sys

from crab_min.cli import parse_train, run_command
from crab_min.installation import require_installation
from crab_min.recipes.presets import PRESETS


def main(arguments: list[str]) -> int:
    given, settings = parse_train(arguments)
    name = PRESETS[given.preset].recipe

    def command() -> None:
        require_installation()
        # torch is imported from here on
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers are used, then forked
        if os.environ.get("RANK", "0") != "0":
            os.environ["TQDM_DISABLE"] = "1"  # of several processes one shows a progress bar
        from crab_min.runs import processes

        recipe = importlib.import_module(f"crab_min.recipes.{name}")
        try:
            if given.plan:
                from crab_min.tools.plan import plan, report

                print(report(plan(recipe, settings)))
            else:
                recipe.train(settings, given.preset)
        finally:
            processes.end()

    return run_command(command, given.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
