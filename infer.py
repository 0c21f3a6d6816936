"""Ask about a clip: `python infer.py clip.mp4 --ask "..."`, or one of the tasks: `--task ave`; or
score a whole split: `--eval`.

Without arguments it takes a test clip of the built-in world. The model is the newest finished run
under runs/, or --run, or the shipped adapter. The answer appears as it is generated, then what it
parses to, then the path of a picture.
"""

import argparse
import os
import sys

from crab_min.cli import Parser, run_command
from crab_min.installation import require_installation
from crab_min.tasks import TASKS

SAM2 = "facebook/sam2.1-hiera-large"
RENAMED = {"limit": "max-new-tokens", "without": "ablate"}


def parse_infer(arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments of infer.py."""
    description = "Ask about a clip, or score a split (--eval)."
    parser = Parser(prog="infer.py", description=description)

    ask = parser.add_argument_group("ask")
    ask.add_argument("clip", nargs="*", help="videos; a video's own sound is used without --audio")
    ask.add_argument("--ask", help="a question about the clip (for ref_avs: what is to be found)")
    ask.add_argument("--task", help=f"one of the tasks: {', '.join(TASKS)}")
    ask.add_argument(
        "--audio",
        action="append",
        help="a sound file, or a video whose sound is used; twice for v2a",
    )
    ask.add_argument("--image", help="an image, for s4, ms3, ref_avs and arig")
    ask.add_argument(
        "--frame-index",
        type=int,
        default=0,
        help="which fifth (s4, ms3) or tenth (ref_avs) of the sound goes with the image",
    )
    ask.add_argument("--second-video", help="the second video of a2v")
    ask.add_argument(
        "--options", help="options of a multiple-choice question (avqa_thu), comma-separated"
    )
    ask.add_argument(
        "--index",
        type=int,
        default=0,
        help="without a clip: which test sample of the built-in world",
    )
    ask.add_argument("--seed", type=int, default=0, help="without a clip: the seed of the world")
    ask.add_argument(
        "--json", action="store_true", help="print one JSON line per clip and nothing else"
    )
    ask.add_argument("--picture", help="where the picture goes (default: answers/CLIP_TASK.png)")
    ask.add_argument(
        "--routes", help="also draw which heads of I-LoRA served which tokens, to this PNG"
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--run",
        help="run folder of train.py (default: the newest finished one, else the shipped adapter)",
    )
    model.add_argument(
        "--side",
        action="append",
        help="PAVE, CREMA: a side channel, NAME or NAME=FILE, several times; none: the video "
        "alone (default: the run's)",
    )
    model.add_argument(
        "--patch", action="append", help="PAVE: a patch file to load beside the run's"
    )
    model.add_argument(
        "--skip",
        action="append",
        default=[],
        help="CREMA: a modality that is encoded without its adapter, several times",
    )
    model.add_argument(
        "--beams", type=int, default=1, help="beams of the search for an answer (CREMA: 5)"
    )
    model.add_argument(
        "--max-new-tokens",
        type=int,
        default=0,
        help="answer tokens at most (default: what the run says for the task)",
    )
    model.add_argument("--prompts", help="JSON file of instructions by task name, instead of ours")
    model.add_argument(
        "--masks",
        default="",
        choices=["", "decoder", "sam2", "box"],
        help="how masks are made: by the run's decoder (default where it has one), of box and "
        "points by SAM2, or the box itself",
    )
    model.add_argument(
        "--sam2", default=SAM2, help="with --masks sam2: path or hub id of a SAM2 checkpoint"
    )

    score = parser.add_argument_group("score a split")
    score.add_argument("--eval", action="store_true", help="answer and score a whole split")
    score.add_argument(
        "--data",
        help="AV-UIE v2 folder or .jsonl file (default: the world that the run was trained on)",
    )
    score.add_argument("--split", default="test", choices=["train", "test"], help="which split")
    score.add_argument(
        "--ablate",
        choices=["audio", "video"],
        help="other clips' sounds, or black pictures: what do answers rest on?",
    )
    score.add_argument("--tasks", default="all", help="comma-separated task names, or all")
    score.add_argument("--test-rows", type=int, default=0, help="rows per task (0: all)")
    score.add_argument(
        "--batch-size", type=int, default=50, help="samples that are answered together"
    )
    score.add_argument(
        "--allow-missing",
        action="store_true",
        help="score samples with unreadable files as wrong instead of stopping",
    )
    score.add_argument("--out", help="where predictions and metrics go (default: RUN/eval_SPLIT)")

    parser.add_argument(
        "--things",
        default="",
        help="things of the built-in world, as for train.py (default: those of the run)",
    )
    parser.add_argument(
        "--debug", action="store_true", help="show a traceback where something goes wrong"
    )
    flags = [option[2:] for action in parser._actions for option in action.option_strings]
    parser.check_flags(arguments, flags, RENAMED)
    return parser.parse_args(arguments)


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
