"""Answers to questions about clips: the work of infer.py."""

import sys
from argparse import Namespace

from crab_min.errors import ModelError
from crab_min.evaluation.budget import TokenBudget
from crab_min.features import Features
from crab_min.interface import prompt_text
from crab_min.tools.converse import converse
from crab_min.tools.loading import load_asked
from crab_min.tools.many import answer_many
from crab_min.tools.questions import check_media, samples_of, split_positional
from crab_min.tools.reply import describe_reply, json_line, mask_maker, reply_to

TOY_MODEL = (
    "note: this model of 4 million parameters knows the built-in synthetic world alone; for clips "
    "of your own name another with --model, or train one"
)


def ask(given: Namespace) -> None:
    """Answer the question about each clip, or many questions, or one after the other.

    Args:
        given: the flags of infer.py.
    """
    # the model; what it is, if it is the toy model
    split_positional(given)
    check_media(given)
    run = load_asked(given)
    has_clip = bool(given.clip or given.image or given.audio)
    is_toy = run.is_shipped and has_clip
    asks_itself = given.ask or given.task or (run.form and run.form.question)
    if given.questions or (has_clip and not asks_itself):
        if is_toy:
            print(TOY_MODEL, file=sys.stderr)
        answer = answer_many if given.questions else converse
        answer(given, run)
        return

    # the samples in the form of the run, and their features
    samples = samples_of(given, run)
    features = Features(run.model, keep=True)
    features.prepare(samples)
    if is_toy:
        print(TOY_MODEL, file=sys.stderr)

    # without SAM2 the box still says where
    make_masks, no_mask = None, ""
    try:
        make_masks = mask_maker(given, run.model, TokenBudget())
    except ModelError as error:
        no_mask = str(error)

    # an answer is printed while it is generated
    for sample in samples:
        if not given.json:
            prompt = " ".join(prompt_text(sample.parts).split())  # on one line
            print(f"model: {run.folder}\nprompt: {prompt}\nanswer: ", end="", flush=True)
        reply = reply_to(sample, given, run, features, make_masks)
        if not reply.no_mask:
            reply.no_mask = no_mask
        print(json_line(reply) if given.json else describe_reply(reply))
