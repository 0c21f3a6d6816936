"""Released checkpoints -> ours: one table of names for each module or paper, applied strictly.

A table is a list of (pattern, replacement): a released name is looked up in it from the top, and the first pattern that
fits the whole name gives our name, or None where the released weight serves nothing and is dropped. A name that fits no
row is an error, so what is lost is written down here and nowhere else. One thing is more than a new name: the released
I-LoRA keeps its heads apart (lora_B0, lora_B1, ...), ours side by side in one matrix.
The names are those of the authors' code; no released file has been opened to check them. BEATs needs no table:
beats.load_beats takes the published names as they are.

    state = convert(read_checkpoint("finetune_weights.bin"), "crab")
    adapter = {name: w for name, w in state.items() if "ilora_" in name}
    r, heads = adapter_sizes(adapter)                  # for ILoraConfig
    peft.set_peft_model_state_dict(model, adapter)
"""
import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


class ConvertError(ValueError):
    """A checkpoint that cannot be read or does not have the expected names: which, what was expected, what to do."""


def under(released: str, ours: str, table: list) -> list:
    """The rows of `table` for names that begin with the pattern `released`; what they become begins with `ours`."""
    return [(released + pattern, None if name is None else ours + name) for pattern, name in table]


ILORA = [                                              # the linear's own path stays
    (r"(|.+\.)lora_A\.weight", r"\1ilora_A.weight"),
    (r"(|.+\.)lora_route\.weight", r"\1ilora_router.weight"),
    (r"(|.+\.)lora_B\d+\.weight", r"\1ilora_B.weight"),                                 # joined in the order of k
]
BERT = [                                               # with queries alone, the text half is never run
    (r"embeddings\.LayerNorm\.(\w+)", r"layernorm.\1"),
    (r"embeddings\.(word_embeddings\.weight|position_embeddings\.weight|position_ids)", None),
    (r"encoder\.layer\.(\d+\.(?:cross)?attention)\.self\.(.+)", r"encoder.layer.\1.attention.\2"),
    (r"encoder\.layer\.(\d+\.(?:cross)?attention\.output\..+)", r"encoder.layer.\1"),
    (r"encoder\.layer\.(\d+\.(?:intermediate|output)_query\..+)", r"encoder.layer.\1"),
    (r"encoder\.layer\.\d+\.(intermediate|output)\..+", None),
]
QFORMER = [                                            # Crab's visual connector and its audio connector
    (r"(?:visual|audio)_ln\.(\w+)", r"norm.\1"),
    (r"(?:visual|audio)_query_tokens", "query"),
    (r"(?:visual|audio)_proj\.(\d+\.\w+)", r"mlp.\1"),
    *under(r"(?:visual|audio)_Qformer\.bert\.", "qformer.", BERT),
    (r"(?:visual|audio)_Qformer\.cls\..+", None),                                       # the vocabulary head
]
CRAB = r"(?:base_model\.model\.)?model\."              # PEFT wrapped the whole model, but not in the first stage
THINKER = r"base_model\.model\.(?:thinker\.)?"        # of Qwen2.5-Omni, whose parts transformers 5 has under model.
TABLES = {
    "ilora": ILORA,
    "qformer": QFORMER,
    "crab": [*under(CRAB + r"vl_projector\.", "visual_qformer.", QFORMER),
             *under(CRAB + r"al_projector\.", "audio_qformer.", QFORMER),
             *under(r"(?=base_model\.model\.model\.layers\.)", "", ILORA)],
    "crab_plus": [*under(THINKER + r"model\.(?=layers\.)", "base_model.model.model.language_model.", ILORA),
                  *under(THINKER + r"(?=(?:audio_tower|visual)\.)", "base_model.model.model.", ILORA)],
}


def convert(state: dict[str, Tensor], table: str) -> dict[str, Tensor]:
    """The weights `state`, given by released names, by our names. table: a key of TABLES.

    Raises ConvertError: no such table, names that the table does not know, two that would become one, a head missing.
    """
    if table not in TABLES:
        raise ConvertError(f"table {table!r}: no such table, expected one of {', '.join(TABLES)}")
    found: dict[str, dict[str, Tensor]] = {}           # our name -> {released name: weight}
    unknown = []
    for name, weight in state.items():
        for pattern, ours in TABLES[table]:
            if match := re.fullmatch(pattern, name):
                if ours is not None:
                    found.setdefault(match.expand(ours), {})[name] = weight
                break
        else:
            unknown.append(name)
    if unknown:
        shown = ", ".join(unknown[:20]) + (", ..." if len(unknown) > 20 else "")
        raise ConvertError(f"table {table!r} does not know {len(unknown)} of {len(state)} names: {shown}; is this the "
                           f"checkpoint of another model or stage? The tables are {', '.join(TABLES)}")
    return {ours: join(ours, released) for ours, released in found.items()}


def join(ours: str, released: dict[str, Tensor]) -> Tensor:
    """One weight of those that share our name: the heads B_k (out, R) side by side (out, K R); else there is one."""
    if ours.endswith("ilora_B.weight"):
        heads = {int(re.search(r"(\d+)\.weight$", name)[1]): weight for name, weight in released.items()}
        if sorted(heads) != list(range(len(heads))):
            raise ConvertError(f"{ours}: has the heads {sorted(heads)}, expected 0 to {max(heads)}; is the file whole?")
        return torch.cat([heads[k] for k in sorted(heads)], dim=1)
    if len(released) > 1:
        raise ConvertError(f"{' and '.join(released)} would both become {ours}; convert them one at a time")
    return next(iter(released.values()))


def adapter_sizes(state: dict[str, Tensor]) -> tuple[int, int]:
    """(r, heads) of a converted adapter, read from its weights. Raises ConvertError when they do not fit together."""
    parts = {part: {name.removesuffix(part): weight.shape for name, weight in state.items() if name.endswith(part)}
             for part in ("ilora_A.weight", "ilora_router.weight", "ilora_B.weight")}
    A, router, B = parts.values()
    sizes = {(A[linear][0], router[linear][0]) for linear in A.keys() & router.keys()}
    if len(sizes) != 1 or not A.keys() == router.keys() == B.keys():
        raise ConvertError(f"not one I-LoRA adapter: {len(A)} A, {len(router)} routers and {len(B)} B of (r, heads) "
                           f"{sorted(sizes)}; expected as many of each, all of the same r and heads")
    r, heads = sizes.pop()
    for linear, shape in B.items():
        if shape[1] != r * heads:
            raise ConvertError(f"{linear}ilora_B.weight: {shape[1]} columns, expected {r * heads} for r={r} and "
                               f"heads={heads}; is the file whole?")
    return r, heads


def read_checkpoint(path: str | Path):
    """What a released file holds, on the CPU: .safetensors, or else a torch file (.bin, .pt), of which no code is run.

    A torch file in today's format is mapped, not copied, into memory. Raises ConvertError: missing or unreadable.
    """
    path = Path(path)
    if not path.is_file():
        raise ConvertError(f"{path}: no such file; give the path of a downloaded .safetensors, .bin or .pt")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError) as error:
        raise ConvertError(f"{path}: not a whole file of weights and nothing else ({type(error).__name__}); is it a "
                           f"web page in the file's place, or half a download? Download it again") from error
