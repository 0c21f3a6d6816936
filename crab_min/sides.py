"""The side channels and modalities of a run: which they are, from which world, what they add to the model, what they are worth (PAVE, CREMA).

`config` is a trainer.TrainConfig throughout.
"""
from pathlib import Path

from crab_min.backbones.blip2 import CremaModel
from crab_min.data import Sample, add_side_channels, count_missing
from crab_min.errors import RunError
from crab_min.evaluation.answering import generate_answers, score_all
from crab_min.features import Features
from crab_min.model import AVLanguageModel
from crab_min.pave import PatchConfig
from crab_min.world.folders import build_world
from crab_min.world.side_channels import CHANNELS, build_side_world


def side_names(config) -> list[str]:
    """The side channels of --side, or the modalities of --modalities but rgb; none for "none". Raises RunError."""
    return modalities(config)[1:] if config.modalities else [name.strip() for name in config.side.split(",") if name.strip() not in ("", "none")]


def modalities(config) -> list[str]:
    """The names of --modalities. Raises RunError."""
    names = [name.strip() for name in config.modalities.split(",")]
    if names[0] != "rgb" or len(set(names)) < len(names) or not all(names):
        raise RunError(f"--modalities {config.modalities}: name rgb, the video, first, and each other modality once")
    if config.backbone != "crema" or config.side:
        raise RunError(f"--modalities {config.modalities}: of --backbone crema alone (got {config.backbone}), and without --side ({config.side or 'none'}); for patches give --side")
    return names


def world_channels(config) -> list[str]:
    """Which questions of the built-in world a run is about: those for its side channels, or --about where it has none. Raises RunError."""
    names = config.about.split(",") if config.about else side_names(config) or ["audio"] * bool(config.modalities)
    if not names or set(names) - set(CHANNELS):
        raise RunError(f"{'--modalities' if config.modalities else '--side'} {','.join(names) or config.side}: the built-in world has the side channels "
                       f"{', '.join(CHANNELS)}; for others give --data")
    return names


def built_in(config, seed: int) -> Path:
    """The built-in world of a run: for side channels the questions about them."""
    if config.side or config.modalities:
        return build_side_world(config.things, config.world_clips, config.world_test, seed, world_channels(config), together=bool(config.modalities))
    return build_world(config, seed, still=config.stage == "masks")


def add_sides(model: AVLanguageModel, features: Features, train: list[Sample], config) -> None:
    """A new patch, or modality, for each side channel of the training rows; its width is that of the channel's features. Raises RunError."""
    if isinstance(model, CremaModel):
        model.configure(config)
    for name in side_names(config):
        sample = next((s for s in train if any(p.side == name for p in s.parts)), None)
        if sample is None:
            raise RunError(f"{'--modalities' if config.modalities else '--side'} {name}: no training row has it; rows of a .jsonl name files under \"sides\"")
        width = dict(zip([p.side for p in sample.media], features([sample])[0]))[name].features.shape[-1]
        if isinstance(model, CremaModel):
            model.add_side(name, width)
        else:
            video, out = model.patch_widths
            model.patches.add(name, PatchConfig(video, width, out, config.patch_size, layers=config.patch_layers, shared_kv=config.shared_kv, rope=config.patch_rope))
    model.patches.to(model.device)


def score_subsets(model: CremaModel, features: Features, test: list[Sample], texts: list[str], limits: dict, config) -> dict:
    """{"subsets": {"rgb": {kind of question: accuracy}, "rgb+audio": ..., all of them}, "missing": {modality: test clips without it}}.

    test: with all modalities; texts: what was answered with them.
    """
    names, found = modalities(config), {}
    every = [["rgb"], *(["rgb", name] for name in names[1:]), names]
    for some in dict.fromkeys(map(tuple, every)):
        rows = add_side_channels(test, some[1:], needed=False)
        said = texts if list(some) == names else generate_answers(model, features, rows, limits, desc="+".join(some), by_option=config.answers == "options")
        scores = score_all(rows, said)
        found["+".join(some)] = {kind or task: t["metric"] for task, r in scores.items() for kind, t in (r.get("types") or {"": r}).items()}
    return {"subsets": found, "missing": count_missing(test, names[1:])}


def subset_table(subsets: dict) -> str:
    """The lines for score_subsets: a row a set of modalities, a column a kind of question."""
    kinds, wide = sorted({kind for row in subsets.values() for kind in row}), max(map(len, subsets)) + 2
    lines = [f"{'modalities':<{wide}}" + "".join(f"{kind:>{max(9, len(kind) + 2)}}" for kind in kinds)]
    return "\n".join(lines + [f"{some:<{wide}}" + "".join(f"{row[kind]:>{max(9, len(kind) + 2)}.3f}" for kind in kinds) for some, row in subsets.items()])
