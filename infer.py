"""Ask about a clip: `python infer.py clip.mp4 --ask "..."`, or one of the tasks: `--task ave`; or
score a whole split: `--eval`.

Without arguments it takes a test clip of the built-in world. The model is the newest finished run
under runs/, or --run, or the shipped adapter. The answer appears as it is generated, then what it
parses to, then the path of a picture.
"""

import os
import sys

from crab_min.cli import parse_infer, run_command
from crab_min.installation import require_installation


def main(arguments: list[str]) -> int:
    given = parse_infer(arguments)

    def command() -> None:
        require_installation()
        # torch is imported from here on
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if given.eval:
            from crab_min.tools.evaluate import evaluate_split

            evaluate_split(given)
        else:
            from crab_min.tools.ask import ask

            ask(given)

    return run_command(command, given.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
