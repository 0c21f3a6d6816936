"""Conversion of the authors' released files to a run folder for `infer.py --run`.

    python -m crab_min.tools.convert crab_plus finetune_weights.bin --prompts-from Crab_Plus/

The run is asked in its authors' form (released/layouts.py). Their words are read from a clone of
their repository, or from a file (released/wording.py).

The tables of names stand in `released/`, one module per paper, and `released/weights.py` applies
them. This module sorts the weights into the files of a run, as train.py writes them: adapter/ and
parts/NAME.safetensors.
"""

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from crab_min.cli import Parser, run_command
from crab_min.config import RECIPES, Settings, with_values
from crab_min.errors import ModelError
from crab_min.model import peft_config
from crab_min.pave import Patch, PatchConfig
from crab_min.recipes.presets import PRESETS
from crab_min.runs.folder import SavedRun, atomic_write
from crab_min.tools.released.layouts import released_form
from crab_min.tools.released.mask_rows import MASKS_NOTE, split_mask_rows
from crab_min.tools.released.modalities import (
    MODALITY_IN_NAME,
    UNNORMED,
    add_missing_adapters,
    check_fusion,
    check_modalities,
    rename_modalities,
)
from crab_min.tools.released.weights import adapter_sizes, convert, read_state_dict
from crab_min.tools.released.wording import Wording, missing_words, read_wording
from crab_min.trained_parts import ADAPTER_FILE, SavedPart, check_fit, save_part

# the preset whose backbone the released weights belong to
DEFAULT_PRESETS = {
    "crab": "crab-7b",
    "crab-pretrain": "crab-7b",
    "crab_plus": "crab_plus-7b",
    "pave": "pave-7b",
    "crema": "crema-xl",
}

# what the weights do not show: the heads of all released patches, and how CREMA fuses modalities
PATCH_HEADS = 4
# fused tokens follow the video's; the steps of a modality are averaged, not aligned with frames
RELEASED_FUSION = {"mode": "concat", "aligned": False}


@dataclass
class ReleasedModel:
    """Released weights by our names, sorted into what a run folder holds.

    Attributes:
        adapter: by the names of PEFT; without an adapter empty.
        rank, heads: sizes of the adapter; 0 heads are plain LoRA.
        encoder_tensors: how many adapter tensors of the encoders are left out.
        parts: what else is trained, by name.
        sides: the side channels that have a patch (PAVE), or the modalities, rgb first (CREMA).
        notes: what else the files say of the model.
    """

    adapter: dict[str, Tensor]
    rank: int
    heads: int
    encoder_tensors: int
    parts: dict[str, SavedPart]
    sides: list[str]
    notes: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """Return one line that names the parts."""
        text = "no adapter"
        if self.adapter:
            heads = f", {self.heads} heads" if self.heads else ""
            text = f"{len(self.adapter)} adapter tensors (r {self.rank}{heads})"
        if self.parts:
            text += f", {', '.join(self.parts)}"
        if self.encoder_tensors:
            text += f"; {self.encoder_tensors} tensors in the encoders left out, their B is zero"
        return "; ".join([text, *self.notes])


def sort_weights(weights: dict[str, Tensor], paper: str, sides: list[str]) -> ReleasedModel:
    """Sort converted weights into the parts of a run.

    Args:
        weights: all weights of a released model by our names.
        paper: "crema" has modalities; for all others the names decide.
        sides: side channels of the patches (PAVE), or modalities in the order of their columns in
            the fusion, rgb first (CREMA).

    Raises:
        ModelError: parts are missing, do not fit together, or do not fit `sides`.
    """
    adapter = {name: w for name, w in weights.items() if "lora_" in name}
    others = {name: w for name, w in weights.items() if "lora_" not in name}

    # adapter of the LM, and its sizes
    lm_adapter = drop_encoder_adapters(adapter)
    rank, heads = read_adapter_sizes(lm_adapter)

    # is all there that `sides` names?
    check_patches(others, sides)
    notes = []
    if paper == "crema":
        others = rename_modalities(others)
        notes = add_missing_adapters(others, sides)
        check_modalities(others, sides)
        notes += check_fusion(others, sides)

    if any(name.startswith("mask_decoder.") for name in others):
        others = split_mask_rows(others)
        notes = [MASKS_NOTE]

    # the other parts, with what their files say of them
    parts = {}
    for name, state in group_by_part(others, sides).items():
        parts[name] = SavedPart(name, state, part_config(name, state, sides), "the released files")

    return ReleasedModel(
        adapter=lm_adapter,
        rank=rank,
        heads=heads,
        encoder_tensors=len(adapter) - len(lm_adapter),
        parts=parts,
        sides=[side for side in sides if {f"patch_{side}", f"modality_{side}"} & parts.keys()],
        notes=notes,
    )


# --- adapter -------------------------------------------------------------------------------------
def read_adapter_sizes(adapter: dict[str, Tensor]) -> tuple[int, int]:
    """Read (r, heads) from an adapter's shapes.

    heads is 0 for plain LoRA, r is 0 for none.

    Raises:
        ModelError: an I-LoRA adapter is not whole.
    """
    if any("ilora_" in name for name in adapter):
        return adapter_sizes(adapter)
    for name, weight in adapter.items():
        if "lora_A" in name:
            return len(weight), 0
    return 0, 0


def drop_encoder_adapters(adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapter without its parts in the encoders of Qwen2.5-Omni.

    In the released Crab+ these never got a gradient, because gradient checkpointing was reentrant
    and the encoders' inputs need none. Their B is zero, so they change nothing.

    Raises:
        ModelError: they did train, so that the model needs them.
    """
    encoders = {n: w for n, w in adapter.items() if ".audio_tower." in n or ".visual." in n}
    trained = [n for n, w in encoders.items() if n.endswith("ilora_B.weight") and w.any()]
    if trained:
        raise ModelError(
            f"{len(trained)} adapters in the encoders are not zero ({trained[0]}, ...), as all are "
            "in the released Crab+. crab_min adapts the LM alone and cannot run this model; give a "
            "checkpoint whose encoders have no adapter, or one of zeros"
        )
    return {name: w for name, w in adapter.items() if name not in encoders}


# --- other parts ---------------------------------------------------------------------------------
def group_by_part(weights: dict[str, Tensor], sides: list[str]) -> dict[str, dict[str, Tensor]]:
    """Return part -> its weights by their names in it.

    Modalities that are not wanted are left out.
    """
    states: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, weight in weights.items():
        part, key = name.split(".", 1)
        if part == "patches":  # patches.0.side.weight
            number, key = key.split(".", 1)
            part = f"patch_{sides[int(number)]}"
        elif part == "multimodal":  # multimodal.parts.rgb.query, or a weight of all modalities
            match = MODALITY_IN_NAME.search(name)
            if match and match["modality"] not in sides:
                continue
            part = f"modality_{match['modality']}" if match else "shared_qformer"
        states[part][key] = weight
    return states


def part_config(name: str, state: dict[str, Tensor], sides: list[str]) -> dict:
    """Return what a part's file says of it beside its weights.

    By this a model makes the part.
    """
    if name.startswith("patch_"):
        return asdict(read_patch_config(state))
    if name.startswith("modality_"):
        modality = name.removeprefix("modality_")
        # features pass the input projection if their width is not the Q-Former's, else the norm
        norm = state[f"parts.{modality}.norm.weight"]
        first = state.get(f"parts.{modality}.input.weight", norm)
        ranks = [len(weight) for key, weight in state.items() if f".A.{modality}." in key]
        normed = modality not in UNNORMED
        return {"width": first.shape[-1], "rank": ranks[0], "normed": normed}
    if name == "fusion":
        return {"names": sides[1:], **RELEASED_FUSION}
    return {}


def read_patch_config(state: dict[str, Tensor]) -> PatchConfig:
    """Read the sizes of a released patch from the shapes of its weights.

    Raises:
        ModelError: weights are missing, or their shapes do not fit together.
    """
    missing = {"side.weight", "video.weight", "norm.weight"} - state.keys()
    if missing:
        raise ModelError(
            f"the released patch lacks {', '.join(sorted(missing))}; is the file whole? "
            "Download it again"
        )

    hidden, side_width = state["side.weight"].shape
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    config = PatchConfig(
        video=state["video.weight"].shape[1],
        side=side_width,
        out=state["norm.weight"].shape[0],
        hidden=hidden,
        heads=PATCH_HEADS,
        layers=len(blocks),
        shared_kv=True,
    )
    check_fit(state, Patch(config).state_dict(), "the released patch")
    return config


def check_patches(weights: dict[str, Tensor], sides: list[str]) -> None:
    """Raise ModelError if there are more patches (PAVE) than names of side channels."""
    numbers = [int(name.split(".")[1]) for name in weights if name.startswith("patches.")]
    count = max(numbers, default=-1) + 1
    if count > len(sides):
        raise ModelError(
            f"more patches ({count}) than names in --side {','.join(sides)}; name the "
            "side channel of each, the first patch first"
        )


# --- run folder ----------------------------------------------------------------------------------
def convert_files(
    paper: str,
    files: list[str],
    out: Path,
    preset: str,
    sides: list[str],
    prompts_from: str = "",
    audio: str = "",
) -> str:
    """Write a run folder from released files.

    Args:
        paper: a paper of DEFAULT_PRESETS, whose names the files have.
        files: the released files; one model may lie in several.
        out: the run folder, which must be new or empty.
        preset: a preset with the backbone of the released model.
        sides: names of side channels or modalities, see `sort_weights`.
        prompts_from: a file or folder with the authors' words; "" for none.
        audio: the BEATs checkpoint of the run, if it is known already.

    Returns:
        A summary: what the run holds, and which of the authors' words are missing.

    Raises:
        ModelError: the folder is not empty, the preset is another paper's, or the files cannot be
            used.
    """
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out}: exists and is not empty; choose another --out or remove it")
    recipe = PRESETS[DEFAULT_PRESETS[paper]].recipe
    if PRESETS[preset].recipe != recipe:
        names = [name for name, other in PRESETS.items() if other.recipe == recipe]
        raise ModelError(f"--preset {preset}: files of {paper} want one of {', '.join(names)}")
    wording = read_wording(paper, prompts_from) if prompts_from else Wording()
    weights = read_files(paper, files)
    try:
        model = sort_weights(weights, paper, sides)
    except ModelError as error:
        raise ModelError(f"{', '.join(files)}: {error}") from error
    settings = run_settings(preset, model)
    if audio:
        settings = with_values(settings, audio=audio)
    write_run(out, model, settings, paper, preset, wording, files)
    lines = [f"{out}: {model.describe()}", missing_words(paper, wording.prompts)]
    return "\n".join(filter(None, lines))


def read_files(paper: str, files: list[str]) -> dict[str, Tensor]:
    """Read released files and give their weights our names.

    Raises:
        ModelError: a file cannot be used, or a weight stands in two of them.
    """
    weights: dict[str, Tensor] = {}
    for file in files:
        released = read_state_dict(file)
        try:
            new = convert(released, paper)
        except ModelError as error:
            raise ModelError(f"{file}: {error}") from error

        # CREMA's file of a task replaces what it trained of the file that it started from
        twice = sorted(weights.keys() & new.keys())
        if twice and paper != "crema":
            raise ModelError(
                f"{file}: {twice[0]} and {len(twice) - 1} others were in a file before it; "
                "give each weight once"
            )
        weights |= new
    return weights


def run_settings(preset: str, model: ReleasedModel) -> Settings:
    """Return the settings of a preset, changed to what the released weights are."""
    values = PRESETS[preset].values | {"adapter": "none"}
    if model.adapter:
        values = PRESETS[preset].values | {"r": model.rank}
    if model.heads:
        # Crab and Crab+ both scale the update by alpha / r = 2
        values |= {"heads": model.heads, "alpha": 2 * model.rank}

    recipe = PRESETS[preset].recipe
    sides = ",".join(model.sides)
    if recipe == "crab":
        values |= stage_values(model)
    elif recipe == "pave":
        values |= {"side": sides or "none"}
    elif recipe == "crema":
        rank = max(model.parts[f"modality_{side}"].config["rank"] for side in model.sides)
        fusion = RELEASED_FUSION["mode"] if "fusion" in model.parts else "none"
        values |= {"modalities": sides, "modality_rank": rank, "fusion": fusion}
        values |= {"eval_mode": "rank"}  # of options the likeliest letter, as released
    return with_values(RECIPES[recipe](), **values)


def stage_values(model: ReleasedModel) -> dict:
    """Return the settings of the stage of Crab that the files come from.

    Raises:
        ModelError: a mask decoder without the model that it was trained on.
    """
    if "mask_decoder" not in model.parts:
        connectors = [name.removesuffix("_qformer") for name in model.parts]
        is_aligned_alone = len(connectors) == 1 and not model.adapter
        return {"stage": connectors[0] if is_aligned_alone else "unified"}
    if not model.adapter or "visual_qformer" not in model.parts:
        raise ModelError(
            "a mask decoder alone: the adapter and the connectors that it was trained with are in "
            "another file, finetune_weights.bin of the unified stage; give both files"
        )
    state = model.parts["mask_decoder"].state
    queries, width = state["decoder.queries"].shape
    return {
        "stage": "masks",
        "masks_decoder": True,
        "masks_queries": queries,
        "masks_width": width,
        "masks_chained": False,  # each layer of the query generator starts anew, as released
    }


def write_run(
    out: Path,
    model: ReleasedModel,
    settings: Settings,
    paper: str,
    preset: str,
    wording: Wording,
    files: list[str],
) -> None:
    """Write the parts of a run, its settings and form, and metrics of a run without a step."""
    out.mkdir(parents=True, exist_ok=True)

    # weights
    if model.adapter:
        peft_config(settings.adapter).save_pretrained(out / "adapter")
        adapter = {name: weight.contiguous() for name, weight in model.adapter.items()}
        save_file(adapter, out / "adapter" / ADAPTER_FILE, {"format": "pt"})
    for part in model.parts.values():
        save_part(out, part.name, part.state, part.config)

    # settings, and the form in which it is asked
    form = released_form(paper)
    layout = wording.put_into(form.layout)
    prompts = form.prompts | wording.prompts
    saved = SavedRun(preset, PRESETS[preset].recipe, settings, 0, form.token_limits(), layout)
    saved.prompts = prompts
    saved.save(out)
    metrics = {"tasks": {}, "seconds": 0, "steps": 0, "converted": [str(file) for file in files]}
    atomic_write(out / "metrics.json", json.dumps(metrics))


# --- command -------------------------------------------------------------------------------------
def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="-m crab_min.tools.convert",
        description="Write a run folder from released checkpoints.",
    )
    parser.add_argument("paper", choices=list(DEFAULT_PRESETS), help="whose names the files have")
    parser.add_argument(
        "files", nargs="+", help="released files (.bin, .pt, .pth, .safetensors) of one model"
    )
    parser.add_argument(
        "--out", default="", help="the run folder to write (default: runs/PAPER-released)"
    )
    parser.add_argument(
        "--side",
        default="",
        help="comma-separated; pave: the side channels of its patches (default: audio); crema: its "
        "modalities in the order of its fusion (default: rgb,audio)",
    )
    parser.add_argument(
        "--preset",
        default="",
        choices=["", *PRESETS],
        help="whose backbone the run names (default: the paper's large one)",
    )
    parser.add_argument(
        "--prompts-from",
        default="",
        metavar="PATH",
        help="the authors' words: a clone of their repository, or a .json file "
        "(released/wording.py)",
    )
    parser.add_argument(
        "--debug", action="store_true", help="show a traceback where something goes wrong"
    )
    return parser


def main(arguments: list[str]) -> int:
    given = make_parser().parse_args(arguments)
    out = given.out or f"runs/{given.paper}-released"
    preset = given.preset or DEFAULT_PRESETS[given.paper]
    default_sides = "rgb,audio" if given.paper == "crema" else "audio"
    sides = (given.side or default_sides).split(",")

    def run():
        words = given.prompts_from
        print(convert_files(given.paper, given.files, Path(out), preset, sides, words))

    return run_command(run, given.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
