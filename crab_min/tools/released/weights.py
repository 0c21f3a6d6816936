"""State dicts of released files, given our names.

    weights = convert(read_state_dict("finetune_weights.bin"), "crab_plus")

A table of names is applied strictly: a name that fits no row is an error, so what is lost is
written down in the tables and nowhere else. Beyond new names, two things change: q, k and v that
torch packs into one weight are split, and the I-LoRA heads lora_B0, lora_B1, ... (out, R) become
one matrix (out, K R). Rank R and number of heads K are read from the shapes.
"""

import pickle
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from crab_min.beats import refuse_lfs_pointers
from crab_min.errors import ModelError
from crab_min.tools.released import TABLES
from crab_min.tools.released.patterns import DROPPED, compile_pattern

# --- files ---------------------------------------------------------------------------------------
# what safetensors and torch raise for a file that is broken or holds more than weights
UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
)


def read_checkpoint(path: str | Path):
    """Load a released file to the CPU without running code that it may contain.

    A torch file in the zip format is mapped into memory, not copied.

    Args:
        path: a .safetensors file, or else a file of torch.save (.bin, .pt, .pth).

    Returns:
        What the file holds, mostly a state dict.

    Raises:
        ModelError: the file does not exist or cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(
            f"{path}: no such file; give the path of a downloaded .safetensors, .bin, .pt or .pth"
        )
    refuse_lfs_pointers(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UNREADABLE as error:
        raise ModelError(
            f"{path}: not a whole file of weights and nothing else ({type(error).__name__}); is it "
            "a web page in the file's place, or half a download? Download it again"
        ) from error


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a released file by their released names.

    LAVIS, and with it CREMA, saves the weights under "model", beside the state of the optimizer.

    Raises:
        ModelError: the file cannot be read, or holds something else than weights.
    """
    state = read_checkpoint(path)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(w, Tensor) for w in state.values()):
        raise ModelError(
            f"{path}: expected the weights of a model by their names, found something else; give "
            "the authors' file of weights (a whole model or a state of an optimizer will not do)"
        )
    return state


# --- names ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class OurName:
    """Our name of a released weight."""

    name: str | None  # None: dropped
    head: int | None  # which head of I-LoRA, where several released weights share our name


def convert(state: dict[str, Tensor], table: str) -> dict[str, Tensor]:
    """Give released weights our names.

    Args:
        state: weights by their released names.
        table: a key of TABLES.

    Returns:
        The weights by our names, without those that the table drops.

    Raises:
        ModelError: no such table, a name that the table does not know, two weights that would get
            the same name, or a missing head of I-LoRA.
    """
    state = split_qkv(state)

    # heads of I-LoRA are collected by the linear that they belong to, all else is only renamed
    converted: dict[str, Tensor] = {}
    heads: dict[str, dict[int, Tensor]] = defaultdict(dict)  # our name -> head -> B_k (out, R)
    released_name: dict[OurName, str] = {}

    for name, ours in rename(state, table).items():
        if ours.name is None:
            continue
        if ours in released_name:
            raise ModelError(
                f"{released_name[ours]} and {name} would both become {ours.name}; "
                "convert them one at a time"
            )
        released_name[ours] = name
        if ours.head is None:
            converted[ours.name] = state[name]
        else:
            heads[ours.name][ours.head] = state[name]

    for name, weights in heads.items():
        converted[name] = stack_heads(name, weights)
    return converted


def rename(names: Iterable[str], table: str) -> dict[str, OurName]:
    """Look released names up in a table.

    Raises:
        ModelError: no such table, or names that it does not know.
    """
    if table not in TABLES:
        raise ModelError(
            f"table {table!r}: no such table, expected one of {', '.join(TABLES)}; "
            "give the one of the file's paper"
        )

    # look every name up, so that one error shows all that are unknown
    rows = [(compile_pattern(released), ours) for released, ours in TABLES[table].items()]
    renamed, unknown = {}, []
    for name in names:
        ours = look_up(name, rows)
        if ours is None:
            unknown.append(name)
        else:
            renamed[name] = ours

    if unknown:
        examples = ", ".join(unknown[:20])
        if len(unknown) > 20:
            examples += ", ..."
        raise ModelError(
            f"table {table!r} does not know {len(unknown)} of {len(renamed) + len(unknown)} names: "
            f"{examples}; is this the checkpoint of another model or stage? "
            f"The tables are {', '.join(TABLES)}"
        )
    return renamed


def look_up(name: str, rows: list[tuple[re.Pattern, str | None]]) -> OurName | None:
    """Return our name by the first row that fits, or None if no row does."""
    for pattern, ours in rows:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        if ours is DROPPED:
            return OurName(None, None)
        wildcards = match.groupdict()
        head = int(wildcards["head"]) if "head" in wildcards else None
        return OurName(ours.format(**wildcards), head)
    return None


# --- tensors -------------------------------------------------------------------------------------
def split_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split the q, k and v that torch's MultiheadAttention packs into one weight.

    x.in_proj_weight (3 D, D) becomes x.q_proj.weight, x.k_proj.weight and x.v_proj.weight, each
    (D, D), and x.in_proj_bias in the same way. All other weights stay.
    """
    split = {}
    for name, weight in state.items():
        if "in_proj_" not in name:
            split[name] = weight
            continue
        for part, rows in zip("qkv", weight.chunk(3)):
            split[name.replace("in_proj_", f"{part}_proj.")] = rows.contiguous()
    return split


def stack_heads(name: str, heads: dict[int, Tensor]) -> Tensor:
    """Put the heads B_k (out, R) of an I-LoRA side by side: (out, K R).

    Raises:
        ModelError: the heads are not numbered 0, 1, ... without a gap.
    """
    numbers = sorted(heads)
    if numbers != list(range(len(numbers))):
        raise ModelError(
            f"{name}: has the heads {numbers}, expected 0 to {numbers[-1]}; is the file whole? "
            "Download it again"
        )
    return torch.cat([heads[k] for k in numbers], dim=1)  # (out, K R)


# --- what is there -------------------------------------------------------------------------------
def adapter_sizes(state: dict[str, Tensor]) -> tuple[int, int]:
    """Read rank and number of heads of a converted I-LoRA adapter from its shapes.

    Returns:
        (r, heads)

    Raises:
        ModelError: the weights are not those of one adapter, or not whole.
    """
    # weights by the linear that they adapt
    A = select_ending(state, "ilora_A.weight")  # each (R, in)
    router = select_ending(state, "ilora_router.weight")  # each (K, in)
    B = select_ending(state, "ilora_B.weight")  # each (out, K R)

    # all linears have the same (R, K)
    sizes = {(len(A[linear]), len(router[linear])) for linear in A.keys() & router.keys()}
    if len(sizes) != 1 or not A.keys() == router.keys() == B.keys():
        raise ModelError(
            f"not one I-LoRA adapter: {len(A)} A, {len(router)} routers and {len(B)} B of "
            f"(r, heads) {sorted(sizes)}; expected as many of each, all of the same r and heads; "
            "is a file missing, or from another run?"
        )
    r, heads = sizes.pop()

    # and every B has the columns of K heads
    for linear, weight in B.items():
        if weight.shape[1] != r * heads:
            raise ModelError(
                f"{linear}ilora_B.weight: {weight.shape[1]} columns, expected {r * heads} for "
                f"r={r} and heads={heads}; is the file whole? Download it again"
            )
    return r, heads


def select_ending(state: dict[str, Tensor], ending: str) -> dict[str, Tensor]:
    """Return the weights whose names have this ending, by their names without it."""
    return {name.removesuffix(ending): w for name, w in state.items() if name.endswith(ending)}


# what each modality of CREMA has, and the ending of one of its weights
MODALITY_PARTS = {
    "queries": "parts.{}.query",
    "norm": "parts.{}.norm.weight",
    "projection": "parts.{}.out.0.weight",
    "adapter": ".query.A.{}.weight",
}


def missing_modalities(state: dict[str, Tensor], wanted: list[str]) -> dict[str, list[str]]:
    """Find what a converted CREMA checkpoint lacks.

    Sequential training in the released code often saves the last trained modality alone.

    Args:
        state: the weights by our names.
        wanted: names of modalities.

    Returns:
        The missing parts of each of the wanted modalities that is not whole.
    """
    missing = {}
    for modality in wanted:
        absent = []
        for part, ending in MODALITY_PARTS.items():
            if not select_ending(state, ending.format(modality)):
                absent.append(part)
        if absent:
            missing[modality] = absent
    return missing
