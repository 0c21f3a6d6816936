"""The command to ask about a clip, or to score a whole split.

    python infer.py clip.mp4 "What happens?"               a question
    python infer.py clip.mp4                               questions line by line
    python infer.py clips/ --questions questions.txt       many questions, answers to a table
    python infer.py clip.mp4 --task ave                    one of the tasks
    python infer.py --eval                                 a split

The model is that of --run or --model, else the newest finished run under runs/. It is asked in the
form in which it was trained. The answer appears while it is generated. Then its parsed form and
the path of a picture are printed.
"""

import os
import sys

from crab_min.cli import parse_infer, run_command
from crab_min.installation import require_installation


def main(arguments: list[str]) -> int:
    """Answer or evaluate as the arguments say, and return the exit code."""
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
