"""Crab (2503.13068): connectors aligned per modality, then all tasks, then the mask decoder.

python train.py crab-tiny --stage visual     align the visual Q-Former on captions, LM frozen
python train.py crab-tiny --stage audio      align the audio Q-Former
python train.py crab-tiny --stage unified    connectors and I-LoRA on all tasks
python train.py crab-tiny --stage masks      mask tokens and mask decoder

Each stage is a run that starts from the run of the stage before. (crab-7b: the same at full size.)
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from crab_min.answers import MASK_TOKENS
from crab_min.backbones import load
from crab_min.config import CrabSettings
from crab_min.data import Sample, gold_mask
from crab_min.errors import RunError
from crab_min.evaluation.answering import plan_batches
from crab_min.evaluation.report import Evaluation, evaluate
from crab_min.model import ASSETS, AVLanguageModel, Batch
from crab_min.recipes.common import Run, begin, finish, load_rows, open_run, train_model
from crab_min.side_channels import add_side_channels, limit_frames
from crab_min.sources.av_uie import mask_path
from crab_min.tasks import TASKS
from crab_min.trainer import collate_answers
from crab_min.world.folders import build_world


@dataclass
class Alignment:
    """An aligning stage: the kind of medium, its connector, and the caption of it alone."""

    kind: str
    connector: str
    caption: str


ALIGN = {
    "visual": Alignment("video", "visual_qformer", "seen"),
    "audio": Alignment("audio", "audio_qformer", "heard"),
}
STAGE_BEFORE = {"audio": "visual", "unified": "audio", "masks": "unified"}


# --- the stages ----------------------------------------------------------------------------------


def train(settings: CrabSettings, preset: str) -> dict:
    """Train a stage, by default in runs/PRESET-STAGE; return the numbers of metrics.json."""
    stage = settings.stages.stage
    settings = run_settings(settings)
    init_from = settings.training.init_from or default_start(settings, preset)
    settings = replace(settings, training=replace(settings.training, init_from=init_from))
    run = open_run("crab", f"{preset}-{stage}", settings)
    run.model = load_model(settings).to(run.device)
    if stage in ALIGN:
        run.model.reset_connector(ALIGN[stage].connector)
    load_rows(run, built_in_data, prepare_samples)
    add_trained_parts(run.model, settings)
    begin(run)

    if stage == "masks":
        train_masks(run)
    else:
        train_model(run)
    test = run.rows.test
    return finish(run, evaluate_model(run.model, run.features, test, run.decoding, settings))


def run_settings(settings: CrabSettings) -> CrabSettings:
    """Return the settings with what their stage decides.

    Raises:
        RunError: settings exclude each other.
    """
    stage = settings.stages.stage
    if settings.stages.text_steps and not learns_decoder_alone(settings):
        raise RunError(
            "--text-steps wants --stage masks, --trainable with mask_decoder and "
            "--cache-features: what the LM makes of the answers is kept then"
        )
    if stage in ALIGN:
        return replace(
            settings,
            data=replace(settings.data, tasks="avcap"),
            adapter=replace(settings.adapter, adapter="none"),
            training=replace(settings.training, trainable=ALIGN[stage].connector),
        )
    if stage == "masks":
        tasks = settings.data.tasks
        if tasks == "all":
            tasks = ",".join(name for name, task in TASKS.items() if task.mask_head)
        return replace(
            settings,
            data=replace(settings.data, tasks=tasks),
            masks=replace(settings.masks, decoder=True),
        )
    return settings


def default_start(settings: CrabSettings, preset: str) -> str:
    """Return the run that a stage starts from: that of the stage before.

    The mask stage on the shipped base starts from the shipped adapter.

    Raises:
        RunError: the stage before is not finished.
    """
    stage, backbone = settings.stages.stage, settings.backbone
    if stage == "masks" and not (backbone.base or backbone.llm):
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
    in_stage = settings.stages.stage == "masks" and settings.data.cache_features
    return in_stage and "mask_decoder" in settings.training.parts and not learns_tokens(settings)


def learns_tokens(settings: CrabSettings) -> bool:
    """Tell whether the embeddings of the mask tokens learn, through the LM."""
    return "mask_tokens" in settings.training.parts


def train_masks(run: Run) -> None:
    """Learn the text of the answers first, then the masks.

    Where the token embeddings do not learn, the LM is frozen in the second phase: it reads each
    answer once, and the decoder learns from what was kept.
    """
    settings = run.settings
    text_steps = settings.stages.text_steps
    if text_steps >= len(run.steps):
        raise RunError(
            f"--text-steps {text_steps}: of {len(run.steps)} steps none is left for the masks; "
            "give more --steps, or fewer --text-steps"
        )
    if text_steps:
        train_model(run, range(text_steps))
    if learns_decoder_alone(settings):
        cache_answers(run)
    if not learns_tokens(settings):
        # the decoder's many small products gain nothing from bfloat16
        settings = replace(settings, training=replace(settings.training, bf16=False))
    steps = range(text_steps, run.steps.stop)
    train_model(run, steps, settings=settings, collate=collate_with_masks)


def cache_answers(run: Run) -> None:
    """Let the frozen LM read the answers of all training rows once."""
    run.model.eval()
    rows = run.rows.train
    with tqdm(total=len(rows), desc="reading answers", unit="row") as bar:
        for samples, media in run.features.batches(plan_batches(rows), strict=False):
            run.model.cache_answer_states(collate_answers(run.model, samples, media))
            bar.update(len(samples))
    run.model.train()
    run.model.calibrate_masks()


def collate_with_masks(model: AVLanguageModel, samples: list[Sample], media: list) -> Batch:
    """Make a batch with the gold masks of its samples."""
    batch = collate_answers(model, samples, media)
    batch.masks = [mask_tensor(sample, model) for sample in samples]
    return batch


def mask_tensor(sample: Sample, model: AVLanguageModel) -> torch.Tensor | None:
    """Return the gold mask of a sample (1, H, W): 0 or 1, or classes; None where it has none."""
    mask = gold_mask(sample, model.frame_size)
    if mask is None:
        return None
    dtype = torch.float32 if mask.dtype == bool else torch.long
    return torch.from_numpy(mask)[None].to(model.device, dtype)


# --- rows ----------------------------------------------------------------------------------------


def prepare_samples(
    samples: list[Sample], settings: CrabSettings, side_channels: list[str] | None = None
) -> list[Sample]:
    """Put samples into the form that a stage learns.

    Args:
        side_channels: names for a patch that was loaded beside the run's adapter (infer.py).
    """
    if settings.stages.stage in ALIGN:
        samples = keep_modality(samples, ALIGN[settings.stages.stage])
    if settings.masks.decoder:
        samples = add_mask_tokens(samples)
    if side_channels:
        samples = add_side_channels(samples, side_channels)
    return limit_frames(samples, settings.data.frames)


def keep_modality(samples: list[Sample], alignment: Alignment) -> list[Sample]:
    """Return captions of one modality: the other medium and its marker leave the prompt.

    The target is the row's caption of that modality alone where it has one, else the whole one.
    """
    changed = []
    for sample in samples:
        parts = []
        for i, part in enumerate(sample.parts):
            following = sample.parts[i + 1].kind if i + 1 < len(sample.parts) else "text"
            kept = ("text", alignment.kind)
            if part.kind in kept and following in kept:
                parts.append(part)
        parts[0] = replace(parts[0], text=parts[0].text.lstrip("\n"))
        target = sample.row.get(alignment.caption, sample.target)
        changed.append(replace(sample, parts=parts, target=target))
    return changed


def add_mask_tokens(samples: list[Sample], in_target: bool = True) -> list[Sample]:
    """Return samples whose answers end in mask tokens where they name a box, with their mask files.

    One set of tokens stands for all that is meant, as one mask of MS3 does. Samples of other tasks
    stay as they are.

    Args:
        in_target: False leaves the target text as it is.
    """
    changed = []
    for sample in samples:
        if sample.task.mask_head:
            answer = sample.task.parse(sample.target) if sample.target else sample.gold
            image = next(part.path for part in sample.media if part.kind == "image")
            file = mask_path(Path(image), sample.task.name, sample.row)
            mask = str(file) if answer.boxes and file.exists() else ""
            target = sample.target
            if answer.boxes and target and in_target:
                target += "".join(MASK_TOKENS)
            sample = replace(sample, mask=mask, target=target)
        changed.append(sample)
    return changed


# --- what infer.py and --plan call ---------------------------------------------------------------


def load_model(settings: CrabSettings, empty: bool = False) -> AVLanguageModel:
    """Load the frozen backbone, or build it without weights.

    It has a mask decoder where the settings have one.
    """
    return load.load_model(settings.backbone, settings.masks, empty)


def add_trained_parts(
    model: AVLanguageModel, settings: CrabSettings, widths: dict[str, int] | None = None
) -> None:
    """Add what learns beside the backbone's connectors and mask decoder.

    Args:
        widths: of the features of each side channel; here there is none.
    """
    model.add_adapter(settings.adapter)


def built_in_data(settings: CrabSettings) -> Path:
    """Build the built-in world and return its folder; for masks, with more pictures."""
    still = settings.stages.stage == "masks"
    return build_world(settings.world, settings.training.seed, still=still)


def evaluate_model(
    model, features, samples, decoding, settings: CrabSettings, **options
) -> Evaluation:
    """Answer and score samples, and their masks; arguments as of report.evaluate."""
    return evaluate(model, features, samples, decoding, **options)
