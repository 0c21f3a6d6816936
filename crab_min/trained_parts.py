"""The files of what was trained: adapter/ (PEFT) and parts/NAME.safetensors.

There is one file per trained part: a connector, the embeddings, a patch, a modality, the mask
decoder. It holds the part's weights and, in its header, the settings that the part is made from
(the sizes of a patch, the width of a modality). A model says what its parts are:

    parts_to_save()     their names
    part_state(name)    the weights of one, which share the model's memory
    part_config(name)   its settings
    prepare_part(part)  makes the part where the model lacks it, or refuses it

The end of this file reads what earlier versions wrote.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crab_min.errors import ModelError

LLM_LAYER = re.compile(r"model\.(language_model\.)?layers\.\d+\.")
ADAPTER_FILE = "adapter_model.safetensors"


@dataclass
class SavedPart:
    """A part as it was read from a file."""

    name: str
    state: dict[str, Tensor]
    config: dict
    source: str  # where it comes from, for errors


def unadapted(llm: nn.Module) -> list[str]:
    """Return the matrices in the layers of an LM that have no adapter, such as a mixture's experts.

    The number of a layer is left out of their names.
    """
    names = {}
    for name, parameter in llm.named_parameters():
        adapted = "lora_" in name or ".base_layer." in name
        layer = LLM_LAYER.search(name)
        if layer and parameter.ndim > 1 and not adapted:
            names[name[layer.end() :]] = None
    return list(names)


def save_trained(model, folder: Path) -> None:
    """Write the adapter and the trained parts of a model into a folder."""
    copy_trained(model)(folder)


def copy_trained(model) -> Callable[[Path], None]:
    """Copy the adapter and the trained parts of a model to the CPU.

    Returns:
        A function that writes the copies into a folder, while the model may learn on.
    """
    adapter = None
    if isinstance(model.llm, PeftModel):
        named = model.llm.named_parameters()
        adapter = copy_to_cpu({name: weight for name, weight in named if "lora_" in name})
    parts = {}
    for name in model.parts_to_save():
        parts[name] = copy_to_cpu(model.part_state(name)), model.part_config(name)

    def write(folder: Path) -> None:
        if adapter is not None:
            # False: embeddings are a part of their own; "auto" would ask the hub about them
            model.llm.save_pretrained(
                folder / "adapter", state_dict=adapter, save_embedding_layers=False
            )
        for name, (state, config) in parts.items():
            save_part(folder, name, state, config)

    return write


def copy_to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors on the CPU, which later steps do not change."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def save_part(folder: Path, name: str, state: dict[str, Tensor], config: dict) -> None:
    """Write parts/NAME.safetensors of a run folder."""
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in state.items()}
    header = {"format": "pt", "config": json.dumps(config)}
    save_file(state, folder / "parts" / f"{name}.safetensors", header)


def load_trained(model, folder: Path | str) -> None:
    """Put a new adapter and the parts of a run folder onto a fresh model.

    Raises:
        ModelError: nothing to load, or weights that do not fit.
    """
    folder = Path(folder)
    if (folder / "adapter").is_dir():
        config = PeftConfig.from_pretrained(str(folder / "adapter"))
        model.llm = get_peft_model(model.llm, config)
    elif not read_parts(folder):
        raise ModelError(f"{folder}: neither adapter/ nor parts/; give a finished run of train.py")
    restore_trained(model, folder)


def restore_trained(model, folder: Path) -> None:
    """Put the values of a run folder into the adapter and the parts that are there.

    Raises:
        ModelError: weights that do not fit.
    """
    if (folder / "adapter").is_dir() and isinstance(model.llm, PeftModel):
        file = folder / "adapter" / ADAPTER_FILE
        state = read_weights(file)
        own = get_peft_model_state_dict(model.llm, save_embedding_layers=False)
        check_fit(state, own, file)
        set_peft_model_state_dict(model.llm, state)
    load_parts(model, read_parts(folder))


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read a file of weights. Raises ModelError: not there, or not whole."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: cannot be read ({error}); copy the run folder again") from None


def load_parts(model, parts: list[SavedPart]) -> None:
    """Put parts into a model, which makes those that it lacks before any is filled."""
    for part in parts:
        model.prepare_part(part)
    for part in parts:
        own = model.part_state(part.name)
        check_fit(part.state, own, part.source)
        with torch.no_grad():
            for key, value in part.state.items():
                own[key].copy_(value)
        # what came from a run goes on into the next one, whether it learns there or not
        model.loaded_parts.add(part.name)


def read_parts(folder: Path) -> list[SavedPart]:
    """Read the parts of a run folder, also those in one of the old forms."""
    parts = [read_part(file) for file in sorted((folder / "parts").glob("*.safetensors"))]
    parts += [read_patch(file) for file in sorted((folder / "patches").glob("*.safetensors"))]
    return parts + read_old_parts(folder)


def read_part(file: Path) -> SavedPart:
    """Read parts/NAME.safetensors."""
    state, config = read_with_header(file, "config", "a trained part")
    return SavedPart(file.stem, state, config, str(file))


def read_patch(file: Path) -> SavedPart:
    """Read a patch: parts/patch_NAME.safetensors, or patches/NAME.safetensors (old)."""
    if file.stem.startswith("patch_"):
        return read_part(file)
    state, config = read_with_header(file, "patch", "a patch")
    return SavedPart(f"patch_{file.stem}", state, config, str(file))


def read_with_header(file: Path, key: str, what: str) -> tuple[dict[str, Tensor], dict]:
    """Read the weights of a file, and the settings that its header has under `key`.

    Raises:
        ModelError: no such file, or not one with this header.
    """
    try:
        with safe_open(file, "pt") as opened:
            config = json.loads((opened.metadata() or {})[key])
        return load_file(file), config
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{file}: not {what} ({type(error).__name__}: {error}); "
            "give a file that train.py has written into its run folder"
        ) from None


def check_fit(state: dict[str, Tensor], own: dict[str, Tensor], where: Path | str) -> None:
    """Compare the names and shapes of weights with a model's own.

    Raises:
        ModelError: they differ; the text names the first ones.
    """
    reshaped = []
    for name, value in state.items():
        if name in own and value.shape != own[name].shape:
            expected = tuple(own[name].shape)
            reshaped.append(f"{name} is {tuple(value.shape)}, expected {expected}")
    differences = {
        "missing": sorted(own.keys() - state.keys()),
        "unknown": sorted(state.keys() - own.keys()),
        "of another shape": reshaped,
    }
    texts = []
    for what, names in differences.items():
        if names:
            more = ", ..." if len(names) > 3 else ""
            texts.append(f"{len(names)} {what} ({', '.join(names[:3])}{more})")
    if texts:
        raise ModelError(
            f"{where}: of the {len(own)} weights expected, {'; '.join(texts)}. Is it of another "
            "base, --adapter, --r (rows of A) or --heads (rows of the router), or not whole?"
        )


# --- earlier forms --------------------------------------------------------------------------------

OLD_NAMES = {"words": "embeddings", "masks": "mask_decoder"}


def read_old_parts(folder: Path) -> list[SavedPart]:
    """Read modules.safetensors, and modalities.safetensors of CREMA.

    The header of the latter says what its parts are made from.
    """
    weights: dict[str, Tensor] = {}
    configs: dict[str, dict] = {}
    modules, modalities = folder / "modules.safetensors", folder / "modalities.safetensors"
    if modules.exists():
        weights |= read_weights(modules)
    if modalities.exists():
        state, about = read_with_header(modalities, "crema", "the modalities of a run of train.py")
        weights |= state
        for name, width in about["widths"].items():
            configs[f"modality_{name}"] = {"width": width, "rank": about["rank"]}
        if about["fused"]:
            fusion = {"names": about["fused"], "mode": about["join"], "aligned": about["aligned"]}
            configs["fusion"] = fusion

    # the parts that the header names, and those of the weights
    parts = {name: SavedPart(name, {}, configs[name], f"{folder}, {name}") for name in configs}
    for key, value in weights.items():
        name, key = old_part(key)
        part = parts.setdefault(name, SavedPart(name, {}, {}, f"{folder}, {name}"))
        part.state[key] = value
    return list(parts.values())


def old_part(key: str) -> tuple[str, str]:
    """Return the part that a weight belongs to, and the name of the weight in it."""
    module, key = key.split(".", 1)
    if module != "multimodal":
        return OLD_NAMES.get(module, module), key
    names = key.split(".")
    if names[0] == "parts":  # parts.NAME.norm.weight
        return f"modality_{names[1]}", key
    if names[-3] in ("A", "B"):  # qformer. ... .query.A.NAME.weight
        return f"modality_{names[-2]}", key
    return "shared_qformer", key  # a converted run also has the frozen Q-Former's own
