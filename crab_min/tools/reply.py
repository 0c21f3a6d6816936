"""One answer to a question about a clip: its text, its parsed form, its mask and its picture."""

import json
import time
from argparse import Namespace
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import TextStreamer

from crab_min.answers import TEXT, Answer
from crab_min.data import Sample
from crab_min.errors import RunError
from crab_min.evaluation.answering import DEFAULT_LIMIT, options, rank_options
from crab_min.evaluation.budget import TokenBudget
from crab_min.evaluation.masks import MakeMasks, masks_from_boxes, predict_masks
from crab_min.evaluation.pictures import draw_answer, draw_routing
from crab_min.evaluation.routing import routing_stats
from crab_min.evaluation.sam2 import Sam2
from crab_min.features import Features
from crab_min.model import AVLanguageModel
from crab_min.sources.own import split_question
from crab_min.tools.loading import LoadedRun


def mask_maker(given: Namespace, model: AVLanguageModel, budget: TokenBudget) -> MakeMasks | None:
    """Return the function that makes masks of answers.

    It uses --masks or the model's decoder.

    Returns:
        None without --masks if the model has no decoder.

    Raises:
        RunError: the model has no decoder.
        ModelError: SAM2 cannot be loaded.
    """
    if given.masks == "decoder" and not model.predicts_masks:
        raise RunError(
            "--masks decoder: the model has no mask decoder; train one with "
            "`python train.py crab-tiny --stage masks`, or use --masks sam2 or box"
        )
    if given.masks in ("sam2", "box"):
        sam2 = Sam2(given.sam2, model.device) if given.masks == "sam2" else None
        return lambda features, samples, texts: masks_from_boxes(samples, texts, sam2)
    if model.predicts_masks:
        return partial(predict_masks, model, budget)
    return None


@dataclass
class Reply:
    """The answer to one sample, and the files that show it."""

    sample: Sample
    text: str
    answer: Answer
    seconds: float
    picture: Path
    mask_file: Path | None = None
    no_mask: str = ""  # the reason why there is no mask

    @property
    def question(self) -> str:
        return split_question(self.sample.parts)[1]


def reply_to(
    sample: Sample,
    given: Namespace,
    run: LoadedRun,
    features: Features,
    make_masks: MakeMasks | None,
) -> Reply:
    """Answer one sample, and draw the answer, its mask and its routing."""
    # the answer and its mask
    began = time.time()
    model, task = run.model, sample.task
    text = answer_text(sample, given, run, features, show=not given.json)
    mask = make_masks(features, [sample], [text])[0] if make_masks else None
    answer = replace(task.parse(text), mask=mask)
    seconds = round(time.time() - began, 2)

    # pictures of the routing, the answer and the mask
    if given.routes:
        with_answer = model.collate([sample.parts], features([sample]), [text])
        draw_routing(Path(given.routes), {task.name: routing_stats(model, [with_answer])})
    default = Path("answers") / f"{Path(sample.media[0].path).stem}_{task.name}.png"
    picture = Path(given.picture or default)
    reply = Reply(sample, text, answer, seconds, picture)
    draw_answer(picture, sample, answer, text)
    if mask is not None:
        reply.mask_file = picture.with_name(f"{picture.stem}_mask.png")
        save_mask(mask, reply.mask_file)
    elif make_masks and task.mask_head:
        reply.no_mask = "the answer has no mask tokens, or does not parse"
    return reply


def answer_text(
    sample: Sample, given: Namespace, run: LoadedRun, features: Features, show: bool
) -> str:
    """Answer one sample: the likeliest option if the run was evaluated so, else new text.

    Args:
        show: print the answer; with a single beam token by token.
    """
    model = run.model
    if run.settings.run.eval_mode == "rank" and options(sample):
        text = rank_options(model, [sample], features([sample]), TokenBudget())[0]
    else:
        limit = given.max_new_tokens or run.saved.token_limits.get(sample.task.name, DEFAULT_LIMIT)
        streamer = None
        if show and given.beams == 1:
            streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
        batch = model.collate([sample.parts], features([sample]))
        text = model.generate(batch, limit, streamer, given.beams)[0]
        if streamer:
            return text
    if show:
        print(text)
    return text


def save_mask(mask: np.ndarray, file: Path) -> None:
    """Write a mask as a PNG: white where it is, or classes as they are."""
    classes = mask.dtype.kind == "i"
    pixels = mask if classes else (mask > 0.5) * 255
    Image.fromarray(pixels.astype(np.uint8)).save(file)


# --- printing ------------------------------------------------------------------------------------


def fields_of(answer: Answer) -> dict:
    """Return the fields of an answer that are not empty."""
    values = {
        "choice": answer.choice,
        "exists": answer.exists,
        "boxes": answer.boxes,
        "points": answer.points,
        "text": "" if answer.error else answer.text,
    }
    for name in ("events", "audio_events", "visual_events"):
        events = getattr(answer, name)
        values[name] = [{"label": label, "spans": spans} for label, spans in events]
    return {name: value for name, value in values.items() if value not in (None, "", [])}


def json_line(reply: Reply) -> str:
    """Return a reply as one line of JSON."""
    line = {"clip": reply.sample.media[0].path}
    if reply.mask_file:
        line["mask"] = str(reply.mask_file)
    elif reply.no_mask:
        line["no_mask"] = reply.no_mask
    line |= {
        "task": reply.sample.task.name,
        "question": reply.question,
        "text": reply.text,
        "parsed": fields_of(reply.answer),
        "error": reply.answer.error,
        "seconds": reply.seconds,
        "picture": str(reply.picture),
    }
    return json.dumps(line, ensure_ascii=False)


def describe_reply(reply: Reply) -> str:
    """Format the lines that are printed after a generated answer."""
    sample, answer = reply.sample, reply.answer
    lines = []
    if sample.task.form is not TEXT:  # a text is its own label
        label = json.dumps(fields_of(answer), ensure_ascii=False)
        lines.append(f"parsed: {f'no: {answer.error}' if answer.error else label}")
    if sample.id:
        lines.append(f"gold:   {sample.task.format(sample.gold)}")
    if reply.mask_file:
        share = (answer.mask > 0.5).mean()
        lines.append(f"mask:   {reply.mask_file}, {share:.1%} of the picture")
    elif reply.no_mask:
        lines.append(f"mask:   none, {reply.no_mask}")
    lines.append(f"{reply.seconds} s; picture: {reply.picture}")
    return "\n".join(lines)
