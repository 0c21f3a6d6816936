"""Answers to questions about clips: the work of infer.py."""

import importlib
import json
import os
import sys
import time
from argparse import Namespace
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image
from transformers import TextStreamer

from crab_min.answers import Answer
from crab_min.config import Settings
from crab_min.data import Sample, pick_tasks, read_samples
from crab_min.devices import choose_device, describe_device
from crab_min.errors import DataError, ModelError, RunError
from crab_min.evaluation.answering import DEFAULT_LIMIT
from crab_min.evaluation.budget import TokenBudget
from crab_min.evaluation.masks import MakeMasks, masks_from_boxes, predict_masks
from crab_min.evaluation.pictures import draw_answer, draw_routing
from crab_min.evaluation.routing import routing_stats
from crab_min.evaluation.sam2 import Sam2
from crab_min.features import Features
from crab_min.interface import build_prompt, load_prompts, prompt_text
from crab_min.model import ASSETS, AVLanguageModel
from crab_min.runs.folder import SavedRun, load_saved_run
from crab_min.tasks import TASKS, Task


@dataclass
class LoadedRun:
    """A run that is loaded to answer.

    Attributes:
        saved: the contents of its config.json.
        recipe: the module of its recipe.
    """

    folder: Path
    saved: SavedRun
    recipe: ModuleType
    model: AVLanguageModel

    @property
    def settings(self) -> Settings:
        return self.saved.settings


def load_run(folder: str, device: str = "") -> LoadedRun:
    """Load a run with its trained parts, ready to answer.

    Args:
        folder: "" for the newest finished run under runs/, else the shipped adapter.
        device: as devices.choose_device takes it.

    Raises:
        RunError: the folder is not that of a run, or there is no such device.
        ModelError: its weights cannot be loaded.
    """
    # the folder
    if not folder:
        finished = sorted(Path("runs").glob("*/metrics.json"), key=lambda p: p.stat().st_mtime)
        folder = finished[-1].parent if finished else ASSETS / "crab_plus-tiny"

    # the model, as its recipe loads it, with the trained parts and prompts of the run
    saved = load_saved_run(Path(folder))
    recipe = importlib.import_module(f"crab_min.recipes.{saved.recipe}")
    on = choose_device(device, saved.settings.backbone.pretrained)
    if on.type != "cpu":
        print(f"device: {describe_device(on)}", file=sys.stderr)
    model = recipe.load_model(saved.settings, device=on)
    model.load_trained(Path(folder))
    if saved.layout:
        model.layout = saved.layout
    model.to(on)
    model.bf16 = saved.settings.training.bf16
    return LoadedRun(Path(folder), saved, recipe, model.eval())


def apply_model_flags(run: LoadedRun, given: Namespace) -> None:
    """Load the patches of --patch, and switch off the modalities of --skip.

    Raises:
        RunError: the model has no such modality.
        ModelError: a patch does not fit the model.
    """
    for file in given.patch:
        run.model.load_patch(Path(file))
    skippable = getattr(run.model, "skipped_modalities", None)
    known = ["rgb", *run.model.side_names] if skippable is not None else []
    for name in given.skip:
        if name not in known:
            raise RunError(
                f"--skip {name}: the model has no such modality, but "
                f"{', '.join(known) or 'none, as it is not a run of CREMA'}"
            )
        skippable.add(name)


# --- samples -------------------------------------------------------------------------------------


def prepare(samples: list[Sample], given: Namespace, run: LoadedRun) -> list[Sample]:
    """Put samples into the form of the run, with the side channels of --side.

    Raises:
        RunError: the model has no such side channel.
    """
    if not given.side:
        return run.recipe.prepare_samples(samples, run.settings)

    # NAME, NAME=FILE or none
    names: list[str] = []
    files: dict[str, str] = {}
    for side in given.side:
        name, _, file = side.partition("=")
        if name != "none":
            names.append(name)
        if file:
            files[name] = file
    for name in names:
        if name not in run.model.side_names:
            raise RunError(
                f"--side {name}: the model has no such patch or modality, but "
                f"{', '.join(run.model.side_names) or 'none'}; a patch is loaded with --patch FILE"
            )

    # rows name the files of their side channels
    if files:
        samples = [with_side_files(sample, names, files) for sample in samples]
    return run.recipe.prepare_samples(samples, run.settings, names)


def with_side_files(sample: Sample, names: list[str], files: dict[str, str]) -> Sample:
    """Name the files of side channels in a sample's row.

    By default they are its own sound or video.
    """
    sides = {}
    for name in names:
        kind = "audio" if name == "audio" else "video"
        default = next((part.path for part in sample.media if part.kind == kind), None)
        sides[name] = files.get(name, default)
    return replace(sample, row={**sample.row, "sides": sides})


def row_of(given: Namespace, clip: str | None) -> dict:
    """Make an annotation row from the command line.

    build_prompt reports what is missing.
    """
    # by default the sound is that of the clip
    sounds = given.audio
    if not sounds and clip:
        sounds = [clip]
    paths = {
        "video_path": clip,
        "video1_path": clip,
        "video2_path": given.second_video,
        "image_path": given.image,
        "audio_path": sounds[0] if sounds else None,
        "audio1_path": sounds[0] if sounds else None,
        "audio2_path": sounds[1] if len(sounds) > 1 else None,
    }
    row = {name: os.path.abspath(path) for name, path in paths.items() if path}

    # every field in which a task looks for its question
    if given.ask:
        row |= dict.fromkeys(["question", "question_text", "description"], given.ask)
    if given.options:
        row["multi_choice"] = given.options.split(",")
    return {**row, "frame_idx": given.frame_index}


def samples_of(given: Namespace, run: LoadedRun) -> list[Sample]:
    """Return one sample per clip of the command line.

    Without a clip it is a test sample of the built-in world.
    """
    # clips, or one image
    if given.clip or given.image:
        task = chosen_task(given)
        prompts = load_prompts(given.prompts) if given.prompts else None
        samples = []
        for clip in given.clip or [None]:
            parts = build_prompt(task, row_of(given, clip), "", prompts)
            samples.append(Sample("", task, parts, "", Answer(), {}))
        return samples

    # a sample of the built-in world
    root = built_in_data(run, given.things, given.seed, "test")
    task = chosen_task(given, default="s4" if run.model.predicts_masks else "avqa")
    split = "test" if "test" in task.splits else "train"
    sample = read_samples(root, [task.name], split, limit=1 + given.index)[-1]
    if not given.json:
        print(f"no clip given: {sample.id} of the built-in world, {sample.media[0].path}")
    return [sample]


def built_in_data(run: LoadedRun, things: str, seed: int, split: str) -> Path:
    """Build the built-in world of a run, and return the path of the data of a split.

    Args:
        things: as for train.py; "" for those of the run.
    """
    settings = run.settings
    world = replace(settings.world, things=things or settings.world.things)
    training = replace(settings.training, seed=seed)
    root = run.recipe.built_in_data(replace(settings, world=world, training=training))
    # with side channels there is a file per split, else one folder
    return root.with_name(f"{split}.jsonl") if root.suffix == ".jsonl" else root


def chosen_task(given: Namespace, default: str = "avqa") -> Task:
    """Return the task of --task.

    Args:
        default: task of a question without --task.

    Raises:
        DataError: --task names several tasks, or a clip has neither a question nor a task.
    """
    if given.task:
        names = pick_tasks(given.task)
        if len(names) != 1:
            raise DataError(f"--task takes one task, got {given.task!r}; with --eval use --tasks")
        return TASKS[names[0]]
    file = given.clip[0] if given.clip else given.image
    if file and not given.ask:
        raise DataError(
            f'what about {file}? give --ask "..." or --task, one of: {", ".join(TASKS)}'
        )
    return TASKS[default]


# --- answers -------------------------------------------------------------------------------------


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
        return self.sample.parts[-1].text.strip()


def ask(given: Namespace) -> None:
    """Answer the question about each clip, and print the answers.

    Args:
        given: the flags of infer.py.
    """
    # the run, the samples in its form, and their features
    run = load_run(given.run, given.device)
    apply_model_flags(run, given)
    samples = prepare(samples_of(given, run), given, run)
    features = Features(run.model, keep=True)
    features.prepare(samples)

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


def reply_to(
    sample: Sample,
    given: Namespace,
    run: LoadedRun,
    features: Features,
    make_masks: MakeMasks | None,
) -> Reply:
    """Answer one sample, and draw the answer, its mask and its routing."""
    # a single beam can be printed token by token
    began = time.time()
    model, task = run.model, sample.task
    streamer = None
    if not given.json and given.beams == 1:
        streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)

    # the answer and its mask
    limit = given.max_new_tokens or run.saved.token_limits.get(task.name, DEFAULT_LIMIT)
    batch = model.collate([sample.parts], features([sample]))
    text = model.generate(batch, limit, streamer, given.beams)[0]
    if not given.json and given.beams > 1:
        print(text)
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
    parsed = f"no: {answer.error}" if answer.error else json.dumps(fields_of(answer))
    lines = [f"parsed: {parsed}"]
    if sample.id:
        lines.append(f"gold:   {sample.task.format(sample.gold)}")
    if reply.mask_file:
        share = (answer.mask > 0.5).mean()
        lines.append(f"mask:   {reply.mask_file}, {share:.1%} of the picture")
    elif reply.no_mask:
        lines.append(f"mask:   none, {reply.no_mask}")
    lines.append(f"{reply.seconds} s; picture: {reply.picture}")
    return "\n".join(lines)
