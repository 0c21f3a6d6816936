"""Write a run folder from the authors' released files, for `infer.py --run`.

    python -m crab_min.tools.convert crab_plus finetune_weights.bin --out runs/released

The tables of names stand in `released/`, one module per paper, and `released/weights.py` applies
them. This module sorts the weights into the parts of a run: adapter, patches, modalities, and
other trained modules.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from crab_min.cli import Parser, run_command
from crab_min.config import RECIPES, Settings, with_values
from crab_min.errors import ModelError
from crab_min.model import peft_config
from crab_min.pave import Patch, PatchConfig, Patches
from crab_min.recipes.presets import PRESETS
from crab_min.runs.folder import SavedRun, atomic_write
from crab_min.tools.released.weights import (
    adapter_sizes,
    convert,
    missing_modalities,
    read_state_dict,
    select_ending,
)
from crab_min.trained_parts import check_fit, save_part

# the preset whose backbone the released weights belong to
DEFAULT_PRESETS = {
    "crab": "crab-7b",
    "crab-pretrain": "crab-7b",
    "crab_plus": "crab_plus-7b",
    "pave": "pave-7b",
    "crema": "crema-xl",
}

PATCH_HEADS = 4  # of all released patches; the weights do not show it

# CREMA's names of modalities where ours differ
OUR_MODALITY_NAMES = {"norm": "normals", "pc": "points"}
# a modality inside the name of a weight: its own parts, or its low-rank pair
MODALITY_IN_NAME = re.compile(r"(?P<before>\.(?:parts|A|B)\.)(?P<modality>\w+)(?=\.)")


# --- parts of a run ------------------------------------------------------------------------------
@dataclass
class ModalitiesHeader:
    """Header of modalities.safetensors, by which `CremaModel` builds what the weights need."""

    widths: dict[str, int]  # width of the features of each modality
    fused: list[str]  # modalities that the fusion takes, in the order of its columns
    rank: int  # of the low-rank pairs
    join: str = "concat"  # fused tokens follow the video's, as released
    aligned: bool = False  # a modality of other steps than the video's is averaged, as released


@dataclass
class ReleasedModel:
    """Released weights by our names, sorted into the parts of a run."""

    # adapter
    adapter: dict[str, Tensor]  # by the names of PEFT
    rank: int
    heads: int  # 0: plain LoRA
    encoder_tensors: int  # adapter tensors of the encoders, which are left out

    # other trained parts
    patches: Patches  # PAVE
    modalities: ModalitiesHeader | None  # CREMA; `modules` go to modalities.safetensors then
    modules: dict[str, Tensor]  # connectors (Crab), Q-Former and fusion (CREMA)

    def describe(self) -> str:
        """Return one line that counts the parts."""
        text = "no adapter"
        if self.adapter:
            heads = f", {self.heads} heads" if self.heads else ""
            text = f"{len(self.adapter)} adapter tensors (r {self.rank}{heads})"
        if self.patches:
            text += f", {len(self.patches)} patches ({', '.join(self.patches)})"
        text += f", {len(self.modules)} other tensors"
        if self.encoder_tensors:
            text += f"; {self.encoder_tensors} tensors in the encoders left out, their B is zero"
        return text


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
    modules = {name: w for name, w in weights.items() if "lora_" not in name}

    # adapter of the LM, and its sizes
    lm_adapter = drop_encoder_adapters(adapter)
    rank, heads = read_adapter_sizes(lm_adapter)

    # parts that only PAVE and CREMA have
    patches = take_patches(modules, sides)
    modalities = None
    if paper == "crema":
        modules = rename_modalities(modules)
        modalities = read_modalities(modules, sides)
        modules = keep_modalities(modules, sides)

    return ReleasedModel(
        adapter=lm_adapter,
        rank=rank,
        heads=heads,
        encoder_tensors=len(adapter) - len(lm_adapter),
        patches=patches,
        modalities=modalities,
        modules=modules,
    )


def read_adapter_sizes(adapter: dict[str, Tensor]) -> tuple[int, int]:
    """Read (r, heads) from an adapter's shapes; heads is 0 for plain LoRA, r is 0 for none.

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


# --- patches (PAVE) ------------------------------------------------------------------------------
def take_patches(modules: dict[str, Tensor], sides: list[str]) -> Patches:
    """Build the patches 0, 1, ... from their weights, which are removed from `modules`.

    Raises:
        ModelError: there are more patches than sides, or one is not whole.
    """
    # number of a patch -> its weights by their names in a patch
    weights: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name in list(modules):
        if name.startswith("patches."):
            _, number, rest = name.split(".", 2)
            weights[int(number)][rest] = modules.pop(name)

    if weights and max(weights) >= len(sides):
        raise ModelError(
            f"more patches ({max(weights) + 1}) than names in --side {','.join(sides)}; name the "
            "side channel of each, the first patch first"
        )
    patches = Patches()
    for number, state in sorted(weights.items()):
        patches[sides[number]] = build_patch(state)
    return patches


def build_patch(state: dict[str, Tensor]) -> Patch:
    """Build a released patch; its sizes are read from the shapes of its weights.

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
    patch = Patch(config)
    check_fit(state, patch.state_dict(), "the released patch")
    patch.load_state_dict(state)
    return patch


# --- modalities (CREMA) --------------------------------------------------------------------------
def rename_modalities(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give CREMA's modalities our names."""

    def our_name(match: re.Match) -> str:
        modality = match["modality"]
        return match["before"] + OUR_MODALITY_NAMES.get(modality, modality)

    return {MODALITY_IN_NAME.sub(our_name, name): w for name, w in weights.items()}


def keep_modalities(weights: dict[str, Tensor], wanted: list[str]) -> dict[str, Tensor]:
    """Return the weights of these modalities, and those that belong to no single modality."""
    kept = {}
    for name, weight in weights.items():
        match = MODALITY_IN_NAME.search(name)
        if match is None or match["modality"] in wanted:
            kept[name] = weight
    return kept


def read_modalities(weights: dict[str, Tensor], names: list[str]) -> ModalitiesHeader:
    """Read from released weights what their model looks like.

    Args:
        weights: the weights by our names.
        names: the modalities of the model: rgb, then the others in the order of the fusion.

    Raises:
        ModelError: a modality is not whole, or the fusion is for another number of them.
    """
    check_modalities(weights, names)
    check_fusion(weights, names)

    widths = {}
    for name in names:
        # features pass the input projection if their width is not the Q-Former's, else the norm
        norm = weights[f"multimodal.parts.{name}.norm.weight"]
        first = weights.get(f"multimodal.parts.{name}.input.weight", norm)
        widths[name] = first.shape[-1]
    pairs = select_ending(weights, ".query.A.rgb.weight")  # one per layer, each (rank, in)
    rank = len(next(iter(pairs.values())))
    return ModalitiesHeader(widths, names[1:], rank)


def check_modalities(weights: dict[str, Tensor], names: list[str]) -> None:
    """Raise ModelError unless rgb comes first and each of the modalities is whole."""
    missing = missing_modalities(weights, names)
    if names[:1] == ["rgb"] and not missing:
        return

    # say what is wrong, and which modalities could be named instead
    problems = [f"{name} lacks {', '.join(parts)}" for name, parts in missing.items()]
    if not problems:
        problems = ["name rgb first"]
    present = {name.split(".")[2] for name in weights if name.startswith("multimodal.parts.")}
    whole = [name for name in sorted(present) if not missing_modalities(weights, [name])]
    raise ModelError(
        f"--side {','.join(names)}: {'; '.join(problems)}; whole in these files: "
        f"{', '.join(whole) or 'none'} (training in sequence saves the last trained alone). "
        "Give the other files too, or name those that are whole"
    )


def check_fusion(weights: dict[str, Tensor], names: list[str]) -> None:
    """Raise ModelError unless the fusion has columns for all the modalities but rgb."""
    width = len(weights["multimodal.parts.rgb.out.0.weight"])  # of the LM
    fusion = weights.get("fusion.linear.weight")  # (width, width x fused modalities)
    expected = len(names) - 1
    columns = 0 if fusion is None else fusion.shape[1]
    if columns == expected * width:
        return
    found = f"a fusion of {columns // width} modalities" if columns else "no fusion weights"
    wanted = f"a fusion of the {expected} beside rgb, in this order" if expected else "none"
    raise ModelError(
        f"--side {','.join(names)}: {found} in these files, expected {wanted}. Name rgb and the "
        "modalities that were fused, or give the file of the fusion too"
    )


# --- run folder ----------------------------------------------------------------------------------
def convert_files(paper: str, files: list[str], out: Path, preset: str, sides: list[str]) -> str:
    """Write a run folder from released files.

    Args:
        paper: a paper of DEFAULT_PRESETS, whose names the files have.
        files: the released files; one model may lie in several.
        out: the run folder, which must be new or empty.
        preset: a preset with the backbone of the released model.
        sides: names of side channels or modalities, see `sort_weights`.

    Returns:
        A summary in one line.

    Raises:
        ModelError: the folder is not empty, or the files cannot be used.
    """
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out}: exists and is not empty; choose another --out or remove it")
    weights = read_files(paper, files)
    try:
        model = sort_weights(weights, paper, sides)
    except ModelError as error:
        raise ModelError(f"{', '.join(files)}: {error}") from error
    write_run(out, model, preset, files)
    return (
        f"{out}: {model.describe()}. It was trained with other instructions: "
        "for its answers give them with --prompts"
    )


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

        twice = sorted(weights.keys() & new.keys())
        if twice:
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
    if model.adapter and model.heads:
        # Crab and Crab+ both scale the update by alpha / r = 2
        values |= {"heads": model.heads, "alpha": 2 * model.rank}

    recipe = PRESETS[preset].recipe
    if recipe == "crab":
        values |= {"stage": "unified"}
    if recipe == "pave":
        values |= {"side": ",".join(model.patches) or "none"}
    if model.modalities:
        values |= {
            "modalities": ",".join(model.modalities.widths),
            "fusion": model.modalities.join,
            "modality_rank": model.modalities.rank,
        }
    return with_values(RECIPES[recipe](), **values)


def write_run(out: Path, model: ReleasedModel, preset: str, files: list[str]) -> None:
    """Write the parts of a run, its settings, and metrics of a run that took no step."""
    settings = run_settings(preset, model)
    out.mkdir(parents=True, exist_ok=True)

    # weights
    for name, patch in model.patches.items():
        save_part(out, f"patch_{name}", patch.state_dict(), asdict(patch.config))
    if model.adapter:
        peft_config(settings.adapter).save_pretrained(out / "adapter")
        save_weights(model.adapter, out / "adapter" / "adapter_model.safetensors")
    if model.modalities:
        header = {"crema": json.dumps(asdict(model.modalities))}
        save_weights(model.modules, out / "modalities.safetensors", header)
    elif model.modules:
        save_weights(model.modules, out / "modules.safetensors")

    # settings
    SavedRun(preset, PRESETS[preset].recipe, settings).save(out)
    metrics = {"tasks": {}, "seconds": 0, "steps": 0, "converted": [str(file) for file in files]}
    atomic_write(out / "metrics.json", json.dumps(metrics))


def save_weights(weights: dict[str, Tensor], file: Path, header: dict[str, str] | None = None):
    """Write weights as safetensors, with more fields in the file's header."""
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(contiguous, file, {"format": "pt", **(header or {})})


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
        print(convert_files(given.paper, given.files, Path(out), preset, sides))

    return run_command(run, given.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
