"""Released files without a download: their names and shapes, and our weights under their names."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from crab_min.runs.folder import load_saved_run
from crab_min.tools.released import TABLES
from crab_min.tools.released.modalities import OUR_MODALITY_NAMES
from crab_min.tools.released.patterns import DROPPED, compile_pattern
from crab_min.tools.released.weights import adapter_sizes
from crab_min.trained_parts import read_parts

HEADS = 3
PEFT = "base_model.model."  # before the names of a model that PEFT wrapped


# --- shapes of released files --------------------------------------------------------------------
def adapter_shapes(linear: str, d_in: int, d_out: int, r: int) -> dict[str, tuple]:
    """Return names and shapes of Crab's and Crab+'s adapter of one linear."""
    shapes = {"lora_route": (HEADS, d_in), "lora_A": (r, d_in)}
    for k in reversed(range(HEADS)):  # the order in the file does not matter
        shapes[f"lora_B{k}"] = (d_out, r)
    return {f"{linear}.{part}.weight": shape for part, shape in shapes.items()}


@dataclass
class CrabPlusSizes:
    """Sizes of Qwen2.5-Omni-7B and of Crab+'s adapter; layers as in the release."""

    layers: int = 28
    audio_layers: int = 32
    vision_blocks: int = 32
    hidden: int = 3584
    intermediate: int = 18944
    key_value: int = 512
    audio: int = 1280
    vision: tuple[int, int] = (1280, 3420)
    r: int = 128


def crab_plus_shapes(s: CrabPlusSizes) -> dict[str, tuple]:
    """Return names and shapes of Crab+'s finetune_weights.bin."""
    linears = {}  # name -> (in, out)
    for i in range(s.layers):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        linears[attention + "q_proj"] = linears[attention + "o_proj"] = (s.hidden, s.hidden)
        linears[attention + "k_proj"] = linears[attention + "v_proj"] = (s.hidden, s.key_value)
        linears[mlp + "gate_proj"] = linears[mlp + "up_proj"] = (s.hidden, s.intermediate)
        linears[mlp + "down_proj"] = (s.intermediate, s.hidden)
    for i in range(s.audio_layers):
        for part in "qkv":
            linears[f"audio_tower.layers.{i}.self_attn.{part}_proj"] = (s.audio, s.audio)
    for i in range(s.vision_blocks):
        mlp = f"visual.blocks.{i}.mlp."
        linears[mlp + "gate_proj"] = linears[mlp + "up_proj"] = s.vision
        linears[mlp + "down_proj"] = s.vision[::-1]

    shapes = {}
    for linear, (d_in, d_out) in linears.items():
        shapes |= adapter_shapes(PEFT + linear, d_in, d_out, s.r)
    return shapes


def crab_plus(sizes: CrabPlusSizes) -> dict[str, Tensor]:
    """Return random weights of Crab+; in the encoders every B is zero, as in the release."""
    weights = random_weights(crab_plus_shapes(sizes))
    for name, weight in weights.items():
        if ".lora_B" in name and ".model.layers." not in name:
            weight.zero_()
    return weights


@dataclass
class CrabSizes:
    """Sizes of Crab with Llama-2-7b, CLIP-L and BEATs."""

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 11008
    r: int = 8
    vision: int = 1024
    audio: int = 768
    qformer_layers: int = 2
    qformer_hidden: int = 768
    qformer_intermediate: int = 3072
    visual_queries: int = 32
    audio_queries: int = 32
    vocabulary: int = 30522  # of BERT


def crab_adapter_shapes(s: CrabSizes) -> dict[str, tuple]:
    """Return names and shapes of the adapter in Crab's finetune_weights.bin."""
    linears = {f"self_attn.{part}_proj": (s.hidden, s.hidden) for part in "qkvo"}
    linears["mlp.gate_proj"] = linears["mlp.up_proj"] = (s.hidden, s.intermediate)
    linears["mlp.down_proj"] = (s.intermediate, s.hidden)
    shapes = {}
    for i in range(s.layers):
        for linear, (d_in, d_out) in linears.items():
            shapes |= adapter_shapes(f"{PEFT}model.layers.{i}.{linear}", d_in, d_out, s.r)
    return shapes


def crab_connector_shapes(s: CrabSizes) -> dict[str, tuple]:
    """Return names and shapes of both connectors, in a file of an aligning stage."""
    visual = connector_shapes(s, "visual", s.vision, s.visual_queries)
    audio = connector_shapes(s, "audio", s.audio, s.audio_queries)
    return {
        **{f"model.vl_projector.{name}": shape for name, shape in visual.items()},
        **{f"model.al_projector.{name}": shape for name, shape in audio.items()},
    }


def connector_shapes(s: CrabSizes, kind: str, width: int, queries: int) -> dict[str, tuple]:
    """Return names and shapes of the visual or the audio connector."""
    hidden = s.qformer_hidden
    shapes = {
        **norm(f"{kind}_ln", width),
        f"{kind}_query_tokens": (1, queries, hidden),
        **linear(f"{kind}_proj.0", hidden, s.hidden),
        **linear(f"{kind}_proj.2", s.hidden, s.hidden),
        f"{kind}_Qformer.cls.predictions.bias": (s.vocabulary,),
        f"{kind}_Qformer.bert.embeddings.word_embeddings.weight": (s.vocabulary, hidden),
        f"{kind}_Qformer.bert.embeddings.position_embeddings.weight": (512, hidden),
        **norm(f"{kind}_Qformer.bert.embeddings.LayerNorm", hidden),
    }
    for n in range(s.qformer_layers):
        layer = f"{kind}_Qformer.bert.encoder.layer.{n}."
        for attention, key_width in (("attention", hidden), ("crossattention", width)):
            shapes |= linear(f"{layer}{attention}.self.query", hidden, hidden)
            shapes |= linear(f"{layer}{attention}.self.key", key_width, hidden)
            shapes |= linear(f"{layer}{attention}.self.value", key_width, hidden)
            shapes |= linear(f"{layer}{attention}.output.dense", hidden, hidden)
            shapes |= norm(f"{layer}{attention}.output.LayerNorm", hidden)
        for half in ("", "_query"):  # for text, for queries
            shapes |= linear(f"{layer}intermediate{half}.dense", hidden, s.qformer_intermediate)
            shapes |= linear(f"{layer}output{half}.dense", s.qformer_intermediate, hidden)
            shapes |= norm(f"{layer}output{half}.LayerNorm", hidden)
    return shapes


def linear(name: str, d_in: int, d_out: int) -> dict[str, tuple]:
    return {f"{name}.weight": (d_out, d_in), f"{name}.bias": (d_out,)}


def norm(name: str, width: int) -> dict[str, tuple]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def random_weights(shapes: dict[str, tuple], make: Callable = torch.randn) -> dict[str, Tensor]:
    return {name: make(shape) for name, shape in shapes.items()}


# --- our weights under released names: the inverse of convert ------------------------------------
def revert(state: dict[str, Tensor], table: str) -> dict[str, Tensor]:
    """Give weights with our names the released ones; what `convert` drops stays away."""
    rows = []
    for released, ours in TABLES[table].items():
        if ours is not DROPPED:
            rows.append((compile_pattern(ours), released))

    adapter = {name: weight for name, weight in state.items() if "ilora_" in name}
    heads = adapter_sizes(adapter)[1] if adapter else 0

    reverted = {}
    for name, weight in state.items():
        released, wildcards = look_up(name, rows)
        if "{head}" not in released:
            reverted[released.format(**wildcards)] = weight
            continue
        for k, B in enumerate(weight.chunk(heads, dim=1)):
            reverted[released.format(**wildcards, head=k)] = B.contiguous()
    return pack_qkv(reverted)


def look_up(name: str, rows: list[tuple[re.Pattern, str]]) -> tuple[str, dict[str, str]]:
    """Return the released name of the first row that fits, and what its wildcards stand for."""
    for pattern, released in rows:
        match = pattern.fullmatch(name)
        if match:
            return released, {"thinker": "", **match.groupdict()}
    raise KeyError(name)


def pack_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pack q, k and v where torch does: in the query generator of the mask decoder."""
    projection = re.compile(r"(.*query_generator\..*attn\.)[qkv]_proj\.(\w+)")
    weights: dict[str, list[Tensor]] = {}
    for name, weight in state.items():
        match = projection.fullmatch(name)
        packed_name = match.expand(r"\1in_proj_\2") if match else name
        weights.setdefault(packed_name, []).append(weight)
    return {
        name: torch.cat(parts) if len(parts) == 3 else parts[0] for name, parts in weights.items()
    }


def write_released(paper: str, run: Path, file: Path) -> None:
    """Write a file as the authors release it from a run folder."""
    state: dict[str, Tensor] = {}
    adapter = run / "adapter" / "adapter_model.safetensors"
    if adapter.exists():
        state |= load_file(adapter)
    # patches are numbered in the order in which --side named them
    sides = load_saved_run(run).settings.patch.channels if paper == "pave" else []
    for part in read_parts(run):
        before = name_in_table(part.name, sides)
        state |= {f"{before}.{name}": weight for name, weight in part.state.items()}
    if paper == "crema":
        state = with_crema_names(state)
    torch.save(revert(state, paper), file)


def name_in_table(part: str, sides: list[str]) -> str:
    """Return what stands before the weights of a part in the tables of released names."""
    if part.startswith("patch_"):
        return f"patches.{sides.index(part.removeprefix('patch_'))}"
    if part.startswith("modality_") or part == "shared_qformer":
        return "multimodal"
    return {"embeddings": "words", "mask_decoder": "masks"}.get(part, part)


def with_crema_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give our modalities CREMA's names."""
    for released, ours in OUR_MODALITY_NAMES.items():
        modality = re.compile(rf"(\.(?:parts|A|B)\.){ours}(?=\.)")
        state = {modality.sub(rf"\g<1>{released}", name): w for name, w in state.items()}
    return state
