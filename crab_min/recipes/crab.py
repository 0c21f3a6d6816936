"""Crab (2503.13068): aligned connectors, then all tasks, then the mask decoder.

The connectors are aligned per modality.

python train.py crab-tiny --stage visual     align the visual Q-Former on captions, LM frozen
python train.py crab-tiny --stage audio      align the audio Q-Former
python train.py crab-tiny --stage unified    connectors and I-LoRA on all tasks
python train.py crab-tiny --stage masks      mask tokens and mask decoder

Each stage is a run that starts from the run of the stage before. At full size: crab-7b. The paper
aligns on other data than the built-in world has, which --data and --tasks name:

python train.py crab-7b --stage visual --data llava_558k.json                 image captions
python train.py crab-7b --stage audio --tasks audiocaps --data DATA           AudioCaps
python train.py crab-7b --stage masks-align --data DATA                       LVIS; then masks

Page of the course: docs/course/14_crab_training.md.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from crab_min.answers import MASK_TOKENS
from crab_min.backbones import load
from crab_min.config import CrabSettings, with_values
from crab_min.data import Sample, gold_mask
from crab_min.errors import DataError, RunError
from crab_min.evaluation.answering import plan_batches
from crab_min.interface import PromptPart
from crab_min.model import ASSETS, AVLanguageModel, Batch
from crab_min.recipes import common
from crab_min.sources.av_uie import mask_path
from crab_min.tasks import TASKS
from crab_min.trainer import collate_answers
from crab_min.world.folders import build_world

# stage that aligns a connector -> the kinds of media, and the field that captions them alone
ALIGN = {"visual": (("video", "image"), "seen"), "audio": (("audio",), "heard")}
MASKS = ("masks-align", "masks")  # stages of the mask decoder
STAGE_BEFORE = {"audio": "visual", "unified": "audio", "masks-align": "unified", "masks": "unified"}


# --- the stages ----------------------------------------------------------------------------------


def train(settings: CrabSettings, preset: str) -> dict:
    """Train a stage, by default in runs/PRESET-STAGE.

    Returns:
        The numbers of its metrics.json.
    """
    # a stage starts from the run of the stage before
    stage = settings.stages.stage
    settings = run_settings(settings)
    settings = with_values(settings, init_from=starting_run(settings, preset))
    run = common.open_run("crab", f"{preset}-{stage}", settings)

    # the frozen LM with its connectors; an aligning stage begins with a new one
    common.load_backbone(run, load_model)
    if stage in ALIGN:
        run.model.reset_connector(f"{stage}_qformer")
    common.load_rows(run, built_in_data, prepare_samples)

    # what learns: the connector of an aligning stage, else I-LoRA and what --trainable names
    add_trained_parts(run.model, settings)
    common.begin(run)
    if stage in MASKS:
        train_masks(run)
    else:
        common.train_model(run)
    return common.finish(run, common.evaluate_test_rows(run))


def run_settings(settings: CrabSettings) -> CrabSettings:
    """Return the settings with the values that their stage fixes.

    Raises:
        RunError: settings exclude each other.
    """
    stage = settings.stages.stage
    if settings.stages.text_steps and not learns_decoder_alone(settings):
        raise RunError(
            "--text-steps wants --stage masks or masks-align, --trainable with mask_decoder and "
            "--cache-features: what the LM makes of the answers is kept then"
        )

    # one connector learns from captions
    if stage in ALIGN:
        connector = f"{stage}_qformer"
        tasks = "avcap" if settings.data.tasks == "all" else settings.data.tasks
        return with_values(settings, tasks=tasks, adapter="none", trainable=connector)

    # the tasks that have masks, and a decoder
    if stage in MASKS:
        check_text_steps(settings, settings.training.steps)
        tasks = settings.data.tasks
        if tasks == "all":
            with_masks = [name for name, task in TASKS.items() if task.mask_head]
            with_masks.remove("lvis")
            tasks = "lvis" if stage == "masks-align" else ",".join(with_masks)
        return with_values(settings, tasks=tasks, masks_decoder=True)
    return settings


def check_text_steps(settings: CrabSettings, steps: int) -> None:
    """Raise RunError if --text-steps leaves none of the steps for the masks.

    Args:
        steps: of the whole run; 0 if they depend on the rows.
    """
    text_steps = settings.stages.text_steps
    if steps and text_steps >= steps:
        raise RunError(
            f"--text-steps {text_steps}: of {steps} steps none is left for the masks; "
            "give more --steps, or fewer --text-steps"
        )


def starting_run(settings: CrabSettings, preset: str) -> str:
    """Return the folder of the run from which a stage starts; "" for the first stage.

    By default that is the run of the stage before; for masks that of masks-align, if there is one.
    The mask stages on the shipped base start from the shipped adapter.

    Raises:
        RunError: the stage before is not finished.
    """
    stage, backbone = settings.stages.stage, settings.backbone
    if settings.training.init_from:
        return settings.training.init_from
    aligned = f"runs/{preset}-masks-align"
    if stage == "masks" and (Path(aligned) / "metrics.json").exists():
        return aligned
    if stage in MASKS and not (backbone.base or backbone.llm):
        return str(ASSETS / "crab_plus-tiny")
    if stage not in STAGE_BEFORE:
        return ""
    before = STAGE_BEFORE[stage]
    start = f"runs/{preset}-{before}"
    if not (Path(start) / "metrics.json").exists():
        raise RunError(
            f"--stage {stage} starts from a finished run of --stage {before}, and {start} is none; "
            f"run --stage {before} first, or name one with --init-from"
        )
    return start


# --- the mask stage ------------------------------------------------------------------------------


def learns_decoder_alone(settings: CrabSettings) -> bool:
    """Tell whether the mask decoder learns from cached states of the LM."""
    if settings.stages.stage not in MASKS or learns_tokens(settings):
        return False
    return settings.data.cache_features and "mask_decoder" in settings.training.parts


def learns_tokens(settings: CrabSettings) -> bool:
    """Tell whether the embeddings of the mask tokens learn, through the LM."""
    return "mask_tokens" in settings.training.parts


def train_masks(run: common.Run) -> None:
    """Train on the text of the answers first, then on the masks.

    Where the embeddings of the mask tokens do not learn, the LM is frozen in the second phase. Each
    answer passes through it once, and the decoder learns from the cached states.

    Raises:
        RunError: --text-steps leaves no step for the masks.
    """
    settings = run.settings
    text_steps = settings.stages.text_steps
    check_text_steps(settings, len(run.steps))

    # first phase: text alone
    if text_steps:
        common.train_model(run, steps=range(text_steps))

    # second phase: masks
    options = {"collate": collate_with_masks}
    if learns_decoder_alone(settings):
        options["before_first_step"] = lambda: cache_answers(run)
    if not learns_tokens(settings):
        # the many small products of the decoder gain nothing from bfloat16
        settings = with_values(settings, bf16=False)
    steps = range(text_steps, run.steps.stop)
    common.train_model(run, steps=steps, settings=settings, **options)


def cache_answers(run: common.Run) -> None:
    """Cache the states that the frozen LM gives the answers of all training rows."""
    run.model.eval()
    rows = run.train_rows
    with tqdm(total=len(rows), desc="reading answers", unit="row") as bar:
        for samples, media in run.features.batches(plan_batches(rows), strict=False):
            cache_batch(run, samples, media)
            bar.update(len(samples))
    run.model.train()
    run.model.calibrate_masks()


def cache_batch(run: common.Run, samples: list[Sample], media: list) -> None:
    """Cache the states of the answers of a batch, as many at once as memory holds."""
    model = run.model

    def cache(rows: list[tuple]) -> list[tuple]:
        model.cache_answer_states(collate_answers(model, *zip(*rows)))
        return rows

    lengths = []
    for sample, features in zip(samples, media):
        lengths.append(model.row_length(sample.parts, features, sample.target))
    run.decoding.budget.run(cache, list(zip(samples, media)), lengths)


def collate_with_masks(model: AVLanguageModel, samples: list[Sample], media: list) -> Batch:
    """Collate samples into a batch with their gold masks."""
    batch = collate_answers(model, samples, media)
    for sample in samples:
        mask = gold_mask(sample, model.frame_size)
        if mask is not None:
            # classes of AVSS, else 0 and 1
            dtype = torch.float32 if mask.dtype == bool else torch.long
            mask = torch.from_numpy(mask)[None].to(model.device, dtype)  # (1, H, W)
        batch.masks.append(mask)
    return batch


# --- rows ----------------------------------------------------------------------------------------


def prepare_samples(
    samples: list[Sample], settings: CrabSettings, side_channels: list[str] | None = None
) -> list[Sample]:
    """Put samples into the form that a stage learns.

    Args:
        side_channels: those that infer.py --side names, for patches that --patch has loaded.
    """
    if settings.stages.stage in ALIGN:
        samples = keep_modality(samples, *ALIGN[settings.stages.stage])
    if settings.masks.decoder:
        samples = add_mask_tokens(samples)
    return common.prepare_samples(samples, settings, side_channels)


def keep_modality(samples: list[Sample], kinds: tuple[str, ...], caption: str) -> list[Sample]:
    """Return samples of a caption task without the other medium and its marker.

    Args:
        kinds: of the media that stay.
        caption: the field with the caption of this modality alone, which becomes the target. Rows
            without it keep their target.

    Raises:
        RunError: a sample has no such medium.
    """
    changed = []
    for sample in samples:
        parts: list[PromptPart] = []
        for part in sample.parts:
            if part.kind in ("text", *kinds):
                parts.append(part)
            elif parts and parts[-1].kind == "text":
                parts.pop()  # a text right before the other medium is its marker
        parts[0] = replace(parts[0], text=parts[0].text.lstrip("\n"))
        if all(part.kind == "text" for part in parts):
            raise RunError(f"{sample.id}: no {' or '.join(kinds)} in it to align the connector on")
        target = sample.row.get(caption, sample.target)
        changed.append(replace(sample, parts=parts, target=target))
    return changed


def add_mask_tokens(samples: list[Sample], in_target: bool = True) -> list[Sample]:
    """Give samples their mask files, and put mask tokens behind answers with a box.

    One set of tokens stands for all objects that are meant, as one mask of MS3 does. Samples of
    tasks without masks stay as they are.

    Args:
        in_target: False leaves the target text as it is.
    """
    changed = []
    missing = []
    for sample in samples:
        if not sample.task.mask_head:
            changed.append(sample)
            continue
        answer = sample.task.parse(sample.target) if sample.target else sample.gold

        # an object that is denied has no mask
        mask = ""
        if answer.boxes:
            image = next(part.path for part in sample.media if part.kind == "image")
            mask = str(mask_path(Path(image), sample.task.name, sample.row))
            if not os.path.exists(mask) and "polygons" not in sample.row:
                missing.append(mask)
                mask = ""
        target = sample.target
        if answer.boxes and target and in_target:
            target += "".join(MASK_TOKENS)
        changed.append(replace(sample, mask=mask, target=target))
    if missing:
        text = f"{len(missing)} masks are missing, the first is {missing[0]}"
        if not any(sample.mask for sample in changed):
            raise DataError(f"{text}; no row has one")
        tqdm.write(f"note: {text}; their rows learn text alone")
    return changed


# --- what infer.py and --plan call, beside run_settings and prepare_samples ----------------------

add_trained_parts = common.add_trained_parts


def load_model(
    settings: CrabSettings, empty: bool = False, device: torch.device | str | None = None
) -> AVLanguageModel:
    """Load the frozen backbone, with a mask decoder if the settings have one.

    Args:
        empty: build it without reading weights.
        device: where it is loaded to (load.load_model).
    """
    return load.load_model(settings.backbone, settings.masks, empty, device)


def built_in_data(settings: CrabSettings) -> Path:
    """Build the built-in world and return its folder; for masks it has more pictures."""
    if settings.stages.stage == "masks-align" and settings.data.tasks == "lvis":
        raise RunError(
            "--stage masks-align: LVIS is not in the built-in world; name it with --data"
        )
    still = settings.stages.stage in MASKS
    return build_world(settings.world, settings.training.seed, still=still)
