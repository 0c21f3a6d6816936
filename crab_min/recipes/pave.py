"""PAVE (2503.19794): a patch on a frozen video LLM.

It adds a side channel to the video tokens.

python train.py pave-tiny --side audio

The paper's other side channels are fast, depth and view. At full size: pave-0.5b and pave-7b. With
--compare-lora LoRA alone is trained first, on the same questions without the side channel.
"""

from pathlib import Path

from crab_min.config import PaveSettings, with_values
from crab_min.data import Sample
from crab_min.errors import RunError
from crab_min.model import AVLanguageModel
from crab_min.recipes import common
from crab_min.recipes.arms import check_comparison, train_arms, train_once
from crab_min.runs import processes
from crab_min.side_channels import add_side_channels, limit_media
from crab_min.world.side_channels import CHANNELS, SHAPES, build_side_world

# name of a comparison -> title of a run -> the settings that it changes
COMPARISONS = {
    "merge": {
        "patch": {"patch_merge": "patch"},
        "concatenated": {"patch_merge": "concat"},
        "interleaved": {"patch_merge": "interleave"},
    }
}


def train(settings: PaveSettings, preset: str) -> dict:
    """Train a patch and LoRA, by default in runs/PRESET-SIDE.

    Returns:
        The numbers of its metrics.json.
    """
    side = settings.patch.side
    if settings.patch.compare:
        check_comparison(settings.patch.compare, COMPARISONS)
        shared = with_values(settings, compare="", compare_lora=False)
        arms = COMPARISONS[settings.patch.compare]
        return train_arms(shared, f"{preset}-{side}", arms, train_patch)["patch"]
    if settings.patch.compare_lora:
        return compare(settings, preset)
    return train_patch(settings, f"{preset}-{side}")


def train_patch(settings: PaveSettings, name: str) -> dict:
    """Train one run, by default in runs/NAME, and return its metrics.json."""
    run = common.open_run("pave", name, settings)

    # the frozen video LLM; prompts without sound, with the side channels of the video
    common.load_backbone(run, load_model)
    common.load_rows(run, built_in_data, prepare_samples)

    # what learns: LoRA on the LM, and a patch per side channel
    add_trained_parts(run.model, settings, common.side_channel_widths(run))
    common.begin(run)
    common.train_model(run)
    return common.finish(run, common.evaluate_test_rows(run))


# --- LoRA alone beside the patch -----------------------------------------------------------------


def compare(settings: PaveSettings, preset: str) -> dict:
    """Train LoRA alone, then LoRA with the patch, and print a table.

    It shows both beside the frozen model. Both runs answer the same questions, which only the side
    channel settles.

    Returns:
        The numbers of metrics.json of the run with the patch.
    """
    side, out = settings.patch.side, settings.run.out
    name = f"{preset}-{side}"
    with_patch = with_values(settings, compare_lora=False)
    out = f"{out}-without" if out else ""
    asked = ",".join(settings.patch.channels)
    without = with_values(
        with_patch, side="none", freeze_patch="", features="", patch_questions=asked, out=out
    )

    # LoRA alone is not trained again if a command before this one was interrupted
    lora = train_once(without, f"{name}-without", train_patch)
    patch = train_once(with_patch, name, train_patch)
    if processes.rank() == 0:
        print(comparison_table(lora, patch))
    return patch


def comparison_table(lora: dict, patch: dict) -> str:
    """Format the scores of guessing, frozen model, LoRA alone and patch.

    They are by type of question. Guessing is one over the number of options, or the best constant
    answer where there are none. The frozen model is the same in both runs.

    Args:
        lora, patch: the numbers of metrics.json of both runs.
    """
    lines = ["questions about      chance    base     LoRA alone  with the patch     n"]
    for task, result in patch["tasks"].items():
        guess = result.get("chance", result["constant"])
        lora_alone = common.types_of(task, lora["tasks"][task])
        base = common.types_of(task, lora["base"].get(task, {}))
        for name, with_patch in common.types_of(task, result).items():
            # the frozen model was perhaps asked no row of it
            frozen = f"{base[name]['metric']:.3f}" if name in base else "-"
            lines.append(
                f"{name:<18}{guess:>9.3f}{frozen:>8}"
                f"{lora_alone[name]['metric']:>15.3f}{with_patch['metric']:>16.3f}"
                f"{with_patch['n']:>6}"
            )
    return "\n".join(lines)


# --- what infer.py and --plan call ---------------------------------------------------------------

run_settings = common.run_settings
load_model = common.load_model

# (steps, tokens per step, width) of the features that the released patches read
RELEASED_SHAPES = {
    "audio": (59, 1, 1024),  # ImageBind, one step per second of a minute
    "fast": (240, 4, 1024),  # LanguageBind, two steps per second of two minutes
    "depth": (32, 576, 1024),  # LLaVA-3D
    "view": (128, 196, 1152),  # the frames of four cameras
}


def side_shape(name: str, settings: PaveSettings) -> tuple[int, int, int] | None:
    """Return the shape of a side channel's features for --plan, which reads no data.

    Returns:
        (steps, tokens per step, width): for pretrained weights as the released patches read them,
        else as the built-in world has them, except that audio is the released one's; None for
        pictures, which the model's vision encoder encodes.
    """
    if settings.backbone.weights not in ("", "tiny-random"):
        return RELEASED_SHAPES.get(name, RELEASED_SHAPES["audio"])
    return {"audio": RELEASED_SHAPES["audio"], **SHAPES}.get(name)


def add_trained_parts(
    model: AVLanguageModel, settings: PaveSettings, widths: dict[str, int]
) -> None:
    """Add what learns: an adapter on the LM, and one patch per side channel.

    Args:
        widths: feature width of each side channel.
    """
    model.add_adapter(settings.adapter)
    for name in settings.side_channels:
        model.add_side_channel(name, widths[name], settings.patch)


def prepare_samples(
    samples: list[Sample], settings: PaveSettings, side_channels: list[str] | None = None
) -> list[Sample]:
    """Put samples into PAVE's form.

    The prompt has no sound, and the side channels stand behind the video.

    Args:
        side_channels: names that replace those of the run.
    """
    names = settings.patch.channels if side_channels is None else side_channels
    samples = add_side_channels(samples, names, folders=settings.data.feature_folders)
    if settings.patch.double_audio_rows:
        samples = double_audio_rows(samples)
    return limit_media(samples, settings.data)


def double_audio_rows(samples: list[Sample]) -> list[Sample]:
    """Return samples in which training rows of a type with "Audio" in it come twice.

    So PAVE trains on MUSIC-AVQA: all of its rows but those of type Visual are doubled.
    """
    doubled = []
    for sample in samples:
        learned_twice = sample.target and "Audio" in str(sample.row.get("type", ""))
        doubled += [sample] * (2 if learned_twice else 1)
    return doubled


def built_in_data(settings: PaveSettings) -> Path:
    """Build the world whose questions only the side channels settle.

    Returns its train.jsonl.

    Raises:
        RunError: the built-in world has no such side channel.
    """
    patch, world = settings.patch, settings.world
    names = patch.questions.split(",") if patch.questions else patch.channels
    if not names or set(names) - set(CHANNELS):
        raise RunError(
            f"--side {','.join(names)}: the built-in world has the side channels "
            f"{', '.join(CHANNELS)}; for others give --data"
        )
    seed = settings.training.seed
    return build_side_world(world.things, world.world_clips, world.world_test, seed, names)
