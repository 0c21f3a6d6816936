"""Questions about one clip, one after the other; the model stays loaded."""

import sys
from argparse import Namespace
from collections.abc import Iterator

from crab_min.errors import DataError, UserError
from crab_min.features import Features
from crab_min.tools.loading import LoadedRun
from crab_min.tools.questions import clips_of, next_question, question_sample
from crab_min.tools.reply import answer_text

SHOWN = 3  # clips that are named, at most


def converse(given: Namespace, run: LoadedRun) -> None:
    """Answer the questions that come on standard input, each about the clips.

    A further question continues the conversation where the model's prompts have a form for that.
    Else each question is asked by itself.

    Args:
        given: the flags of infer.py, without a question.

    Raises:
        DataError: the input ends before a question.
    """
    clips = clips_of(given) or [None]
    keeps_history = run.form is not None and run.model.layout.turn is not None and len(clips) == 1
    names = ", ".join(clip.name for clip in clips if clip) or "the media"
    if len(clips) > SHOWN:
        names = f"{len(clips)} clips"
    if sys.stdin.isatty():
        print(f"{run.folder}: ask about {names}; an empty line or Ctrl-D ends", file=sys.stderr)

    features = Features(run.model, keep=True)
    last = None  # the sample and the answer before
    question = ""
    for question in read_questions():
        for clip in clips:
            try:
                if keeps_history and last:
                    sample = next_question(*last, question, "")
                else:
                    sample = question_sample(given, run, clip, question)
                if len(clips) > 1:
                    print(f"{clip.name}: ", end="", flush=True)
                text = answer_text(sample, given, run, features, show=True)
            except UserError as error:  # of this question; the next one may be right
                print(f"error: {error}", file=sys.stderr)
                continue
            last = (sample, text)
    if not question and not sys.stdin.isatty():
        raise DataError(f'what about {names}? python infer.py CLIP "...", or give --task')


def read_questions() -> Iterator[str]:
    """Yield lines of standard input until an empty line, or the end of the input."""
    prompt = "question: " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            if prompt:
                print()
            return
        if not line:
            return
        yield line
