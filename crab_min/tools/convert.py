"""Released checkpoints -> run folders, and back: one table of names a paper, applied strictly in both directions.

    python -m crab_min.tools.convert crab_plus finetune_weights.bin --out runs/released
    python -m crab_min.tools.convert crab_plus runs/released --back finetune_weights.bin

A row of a table is (released name, our name) with {places} that stand for the same in both; our name None: a released weight that serves
nothing and is dropped. A name that fits no row is an error, so what is lost is written down here and nowhere else. One thing is more than a
new name: the released I-LoRA keeps its heads apart (lora_B0, lora_B1, ...), ours side by side in one matrix. Rank and heads are read from
the shapes. The names are those of the authors' code; no released file has been opened to check them. BEATs needs no table:
beats.load_beats takes the published names as they are.
"""
import argparse
import json
import pickle
import re
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crab_min.cli import Parser, atomic_write, run_command
from crab_min.recipes.presets import PRESETS
from crab_min.errors import ModelError
from crab_min.trained_parts import check_fit
from crab_min.pave import Patch, PatchConfig, Patches
from crab_min.trainer import TrainConfig

PLACES = {"at": r"(|.+\.)", "layer": r"(layers\.\d+\..+)", "n": r"(\d+)", "k": r"(\d+)", "m": r"(\w+)", "layer_number": r"(\d+)", "x": r"(\w+(?:\.\w+)*)"}  # what a {place} stands for


def under(released: str, ours: str, table: list) -> list:
    """The rows of `table` with prefixes before both names."""
    return [(released + name, None if new is None else ours + new) for name, new in table]


def ilora(at: str = "{at}", ours: str | None = None) -> list:
    """The adapter of the linears at `at` (a path with places and a final dot)."""
    ours = at if ours is None else ours
    return [(at + "lora_A.weight", ours + "ilora_A.weight"), (at + "lora_route.weight", ours + "ilora_router.weight"),
            (at + "lora_B{k}.weight", ours + "ilora_B.weight")]                 # joined in the order of k


BERT = [                                               # with queries alone, the text half is never run
    ("embeddings.LayerNorm.{x}", "layernorm.{x}"),
    ("embeddings.{x}", None),
    *((f"encoder.layer.{{n}}.{kind}.self.{{x}}", f"encoder.layer.{{n}}.{kind}.attention.{{x}}") for kind in ("attention", "crossattention")),
    *((name, name) for name in (f"encoder.layer.{{n}}.{part}.{{x}}" for part in ("attention.output", "crossattention.output", "intermediate_query", "output_query"))),
    ("encoder.layer.{n}.intermediate.{x}", None), ("encoder.layer.{n}.output.{x}", None)]


def qformer(sense: str) -> list:
    """Crab's visual or audio connector."""
    return [(f"{sense}_ln.{{x}}", "norm.{x}"), (f"{sense}_query_tokens", "query"), (f"{sense}_proj.{{x}}", "mlp.{x}"),
            *under(f"{sense}_Qformer.bert.", "qformer.", BERT), (f"{sense}_Qformer.cls.{{x}}", None)]               # the vocabulary head


# values go through the key projection in the released code: v_linear never learns, and serves nothing
PATCH = [("input_mapping.{x}", "side.{x}"), ("query_input_mapping.{x}", "video.{x}"), ("cross_attn_layers.{n}.attn.q_linear.{x}", "blocks.{n}.query.{x}"),
         ("cross_attn_layers.{n}.attn.k_linear.{x}", "blocks.{n}.key.{x}"), ("cross_attn_layers.{n}.attn.v_linear.{x}", None),
         ("cross_attn_layers.{n}.ffn.0.{x}", "blocks.{n}.norm.{x}"), ("cross_attn_layers.{n}.ffn.1.{x}", "blocks.{n}.mlp.0.{x}"),
         ("cross_attn_layers.{n}.ffn.3.{x}", "blocks.{n}.mlp.2.{x}"), ("output_mapping.{x}", "out.{x}"), ("output_norm.{x}", "norm.{x}")]


def wrapped(linear: str) -> list:
    """BERT with the self-attention's query and value inside a wrapper, where the released names end in `linear` (.w in CREMA, nothing in BLIP-2)."""
    theirs, ours = "encoder.layer.{n}.attention.self.", "encoder.layer.{n}.attention.attention."
    return [(theirs + "key.{x}", ours + "key.{x}"), *((f"{theirs}{part}{linear}.{{x}}", f"{ours}{part}.base.{{x}}") for part in ("query", "value")),
            *(row for row in BERT if not row[0].startswith(theirs))]


def attention(theirs: str, ours: str) -> list:
    return [(f"{theirs}.{old}_proj.{{x}}", f"{ours}.{new}.{{x}}") for old, new in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out"))]


def two_way() -> list:
    """The layers of the mask decoder's two two-way transformers."""
    theirs, ours = "transformer.{n}.layers.{layer_number}.", "two_way.{n}.layers.{layer_number}."
    layer = [*attention("self_attn", "self_attention"), *attention("cross_attn_token_to_image", "to_image"), *attention("cross_attn_image_to_token", "to_queries"),
             *((f"norm{k + 1}.{{x}}", f"norms.{k}.{{x}}") for k in range(4)), ("mlp.lin1.{x}", "mlp.0.{x}"), ("mlp.lin2.{x}", "mlp.2.{x}")]
    return [*under(theirs, ours, layer), *attention("transformer.{n}.final_attn_token_to_image", "two_way.{n}.final"), ("transformer.{n}.norm_final_attn.{x}", "two_way.{n}.norm.{x}")]


MASKS = [("text_hidden_fcs.0.{x}", "prompt.{x}"), ("image_feature_neck.{x}", "neck.{x}"), ("no_mask_embed.weight", "no_mask"),
         ("pe_layer.positional_encoding_gaussian_matrix", "places.0.matrix"), *under("mask_decoder.", "", [
             ("pe1.positional_encoding_gaussian_matrix", "places.1.matrix"), ("avs_query_tokens.weight", "queries"), ("level_embed.weight", "level"), *two_way(),
             *under("query_generator.layers.{n}.", "generator.{n}.", [*attention("self_attn", "self_attention"), *attention("cross_attn", "cross_attention"), ("ffn.{x}", "mlp.{x}"),
                                                                      *((f"norm{k + 1}.{{x}}", f"norms.{k}.{{x}}") for k in range(3))]),
             *((f"{old}.layers.{k}.{{x}}", f"{new}.{2 * k}.{{x}}") for old, new in (("hyper_mlp_out", "mix"), ("hyper_mlp", "mlp")) for k in range(3)),
             ("output_upscaling.{x}", "upscale.{x}"), ("upsample_2x.{x}", "finer.{x}"), ("ms3_s4_classfier.{x}", "binary.{x}"), ("avss_classifier.{x}", "classes.{x}")])]
PAIRS = [(f"encoder.layer.{{n}}.attention.self.{part}.w_{which.lower()}_{{m}}.weight", f"encoder.layer.{{n}}.attention.attention.{part}.{which}.{{m}}.weight")
         for part in ("query", "value") for which in "AB"]
FROZEN = [(f"{part}.{{x}}", None) for part in ("visual_encoder", "audio_encoder", "t5_model", "Qformer.cls")]
PRETRAIN = [*under("model.vl_projector.", "visual_qformer.", qformer("visual")), *under("model.al_projector.", "audio_qformer.", qformer("audio"))]
PEFT = "base_model.model."                             # what PEFT puts before the names of all that it wraps
TABLES = {
    "ilora": ilora(),
    "patch": PATCH,
    "qformer": [*qformer("visual"), *qformer("audio")],
    "masks": MASKS,
    "crab-pretrain": PRETRAIN,                         # of the aligning stages, before PEFT wrapped the model
    "crab": [*under(PEFT, "", PRETRAIN), *ilora(PEFT + "model.{layer}."), *PRETRAIN],
    "pave": [*under(PEFT + "model.temporal_aggregator.", "patches.0.", PATCH), *under(PEFT + "model.temporal_aggregator2.", "patches.1.", PATCH),
             (PEFT + "model.{layer}", PEFT + "model.language_model.{layer}")],                    # LoRA of PEFT, at transformers' path
    "crema": [*under("Qformer.bert.", "multimodal.qformer.", [*PAIRS, *wrapped(".w")]), ("query_tokens_{m}", "multimodal.parts.{m}.query"),
              ("t5_proj_{m}.{x}", "multimodal.parts.{m}.out.0.{x}"), ("ln_{m}.{x}", "multimodal.parts.{m}.norm.{x}"),
              ("projection_{m}.{x}", "multimodal.parts.{m}.input.{x}"), ("fusion.0.{x}", "fusion.linear.{x}"),
              ("{m}_gradsel_embed", None), *FROZEN],                            # the first is never used, the rest are the encoders and the LM
    "blip2": [*under("Qformer.bert.", "multimodal.qformer.", wrapped("")), ("query_tokens", "multimodal.parts.rgb.query"),
              ("t5_proj.{x}", "multimodal.parts.rgb.out.0.{x}"), ("ln_vision.{x}", "multimodal.parts.rgb.norm.{x}"), *FROZEN],
    # of Qwen2.5-Omni, whose parts transformers 5 has under model.
    "crab_plus": [row for thinker in ("", "thinker.") for row in (
        *ilora(PEFT + thinker + "model.{layer}.", PEFT + "model.language_model.{layer}."),
        *ilora(PEFT + thinker + "audio_tower.{x}.", PEFT + "model.audio_tower.{x}."),
        *ilora(PEFT + thinker + "visual.{x}.", PEFT + "model.visual.{x}."))]}


def pattern(name: str) -> re.Pattern:
    """The names that a name with places stands for."""
    return re.compile("".join(PLACES[piece[1:-1]] if piece.startswith("{") else re.escape(piece) for piece in re.split(r"(\{\w+\})", name)))


def places(name: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", name)


def rows_of(table: str) -> list:
    if table not in TABLES:
        raise ModelError(f"table {table!r}: no such table, expected one of {', '.join(TABLES)}")
    return TABLES[table]


def rename(names, rows: list, table: str) -> dict[str, tuple[str | None, dict]]:
    """{name: (new name or None, what its places stand for)} by the first of the rows (from, to) that fits. Raises ModelError for unknown names."""
    compiled, renamed, unknown = [(pattern(old), places(old), new) for old, new in rows], {}, []
    for name in names:
        for regex, at, new in compiled:
            if match := regex.fullmatch(name):
                stands = dict(zip(at, match.groups()))
                renamed[name] = (new if new is None else new.format(**{"k": "{k}", **stands}), stands)
                break
        else:
            unknown.append(name)
    if unknown:
        shown = ", ".join(unknown[:20]) + (", ..." if len(unknown) > 20 else "")
        raise ModelError(f"table {table!r} does not know {len(unknown)} of {len(renamed) + len(unknown)} names: {shown}; is this the "
                           f"checkpoint of another model or stage? The tables are {', '.join(TABLES)}")
    return renamed


def convert(state: dict[str, Tensor], table: str) -> dict[str, Tensor]:
    """The weights `state`, given by released names, by our names. table: a key of TABLES.

    Raises ModelError: no such table, names that the table does not know, two that would become one, a head missing.
    """
    found: dict[str, dict] = {}                        # our name -> {released name: (head, weight)}
    state = apart(state)
    for name, (ours, stands) in rename(state, rows_of(table), table).items():
        if ours is not None:
            found.setdefault(ours, {})[name] = (int(stands.get("k", -1)), state[name])
    return {ours: join(ours, released) for ours, released in found.items()}


def apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torch's packed projections (in_proj_weight, in_proj_bias) of a query, a key and a value as one each; all else as it is."""
    return {name.replace("in_proj_", f"{part}_proj.") if part else name: one for name, weight in state.items() for part, one in
            (zip("qkv", (w.contiguous() for w in weight.chunk(3))) if "in_proj_" in name else [("", weight)])}


def packed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse, where torch packs them: in the query generator of the mask decoder."""
    found: dict = {}
    for name, weight in state.items():
        place = re.fullmatch(r"(.*query_generator\..*attn\.)[qkv]_proj\.(\w+)", name)
        found.setdefault(place.expand(r"\1in_proj_\2") if place else name, []).append(weight)
    return {name: torch.cat(weights) if len(weights) > 1 else weights[0] for name, weights in found.items()}


def join(ours: str, released: dict[str, tuple[int, Tensor]]) -> Tensor:
    """One weight of those that share our name: the heads B_k (out, R) side by side (out, K R); else there is one."""
    heads = dict(sorted(released.values(), key=lambda pair: pair[0]))
    if -1 in heads:
        if len(released) > 1:
            raise ModelError(f"{' and '.join(released)} would both become {ours}; convert them one at a time")
        return heads[-1]
    if list(heads) != list(range(len(heads))):
        raise ModelError(f"{ours}: has the heads {list(heads)}, expected 0 to {max(heads)}; is the file whole?")
    return torch.cat(list(heads.values()), dim=1)


def revert(state: dict[str, Tensor], table: str) -> dict[str, Tensor]:
    """The weights `state`, given by our names, by the released ones; what `convert` dropped is not there. Raises ModelError."""
    adapter = {name: weight for name, weight in state.items() if "ilora_" in name}
    heads, found = adapter_sizes(adapter)[1] if adapter else 0, {}
    for name, (released, _) in rename(state, [(ours, old) for old, ours in rows_of(table) if ours is not None], table).items():
        if "{k}" not in released:
            found[released] = state[name]
            continue
        for k, B in enumerate(state[name].chunk(heads, dim=1)):
            found[released.format(k=k)] = B.contiguous()
    return packed(found)


def from_blip2(state: dict[str, Tensor], modality: str) -> dict[str, Tensor]:
    """BLIP-2's Q-Former as the frozen one, and its queries, norm and projection as the start of a visual modality (CREMA). Raises ModelError."""
    return {name.replace(".parts.rgb.", f".parts.{modality}."): weight for name, weight in convert(state, "blip2").items()}


def missing_modalities(state: dict[str, Tensor], wanted: list[str]) -> dict[str, list[str]]:
    """{modality: its parts that a converted CREMA checkpoint lacks} for the `wanted` that are not whole; released ones often hold the last trained alone."""
    parts = {"queries": "parts.{}.query", "norm": "parts.{}.norm.weight", "projection": "parts.{}.out.0.weight", "adapter": ".query.A.{}.weight"}
    lacks = {m: [part for part, end in parts.items() if not any(name.endswith(end.format(m)) for name in state)] for m in wanted}
    return {m: gone for m, gone in lacks.items() if gone}


def adapter_sizes(state: dict[str, Tensor]) -> tuple[int, int]:
    """(r, heads) of a converted adapter, read from its weights. Raises ModelError when they do not fit together."""
    parts = {part: {name.removesuffix(part): weight.shape for name, weight in state.items() if name.endswith(part)}
             for part in ("ilora_A.weight", "ilora_router.weight", "ilora_B.weight")}
    A, router, B = parts.values()
    sizes = {(A[linear][0], router[linear][0]) for linear in A.keys() & router.keys()}
    if len(sizes) != 1 or not A.keys() == router.keys() == B.keys():
        raise ModelError(f"not one I-LoRA adapter: {len(A)} A, {len(router)} routers and {len(B)} B of (r, heads) "
                           f"{sorted(sizes)}; expected as many of each, all of the same r and heads")
    r, heads = sizes.pop()
    for linear, shape in B.items():
        if shape[1] != r * heads:
            raise ModelError(f"{linear}ilora_B.weight: {shape[1]} columns, expected {r * heads} for r={r} and "
                               f"heads={heads}; is the file whole?")
    return r, heads


def read_checkpoint(path: str | Path):
    """What a released file holds, on the CPU: .safetensors, or else a torch file (.bin, .pt), of which no code is run.

    A torch file in today's format is mapped, not copied, into memory. Raises ModelError: missing or unreadable.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such file; give the path of a downloaded .safetensors, .bin or .pt")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError) as error:
        raise ModelError(f"{path}: not a whole file of weights and nothing else ({type(error).__name__}); is it a "
                           f"web page in the file's place, or half a download? Download it again") from error


# --- run folders -----------------------------------------------------------------------------------------------------------
def split_encoders(state: dict[str, Tensor], wanted: bool) -> tuple[dict[str, Tensor], int]:
    """(the adapter without its parts in the encoders of Qwen2.5-Omni, how many tensors were left out).

    In the released Crab+ they never got a gradient (reentrant checkpointing of frozen inputs), so that their B is zero and they do nothing;
    where it is not, leaving them out would change the answers. Raises ModelError.
    """
    extra = [name for name in state if ".audio_tower." in name or ".visual." in name]
    if wanted or not extra:
        return state, 0
    trained = [name for name in extra if name.endswith("ilora_B.weight") and state[name].any()]
    if trained:
        raise ModelError(f"{len(trained)} adapters in the encoders are not zero ({trained[0]}, ...), so the model needs them; convert with --encoder-adapters")
    return {name: weight for name, weight in state.items() if name not in set(extra)}, len(extra)


def patch_of(state: dict[str, Tensor]) -> Patch:
    """A released patch; its sizes are read from its weights; all released ones have four heads."""
    hidden, blocks = state["side.bias"].shape[0], {name.split(".")[1] for name in state if name.startswith("blocks.")}
    patch = Patch(PatchConfig(state["video.weight"].shape[1], state["side.weight"].shape[1], state["norm.weight"].shape[0], hidden, 4, len(blocks), shared_kv=True))
    check_fit(state, patch.state_dict(), "the released patch")
    patch.load_state_dict(state)
    return patch


NAMES = {"norm": "normals", "pc": "points"}            # CREMA's names of modalities where ours differ


def named(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The weights of a MultimodalQFormer with other names for its modalities."""
    return {re.sub(r"(\.(?:parts|[AB])\.)(\w+)(?=\.)", lambda at: at[1] + names.get(at[2], at[2]), key): weight for key, weight in state.items()}


def modalities_of(state: dict[str, Tensor], names: list[str]) -> dict:
    """What crema.CremaModel wants to know of released weights, whose fusion has the columns of `names` without rgb in this order. Raises ModelError."""
    lacks = missing_modalities(state, names)
    there = sorted({key.split(".")[2] for key in state if key.startswith("multimodal.parts.")} - lacks.keys())
    if lacks or names[:1] != ["rgb"]:
        raise ModelError(f"--side {','.join(names)}: {'; '.join(f'{name} lacks ' + ', '.join(parts) for name, parts in lacks.items()) or 'name rgb first'}; whole in these files: "
                           f"{', '.join(there) or 'none'} (training in sequence saves the last trained alone). Give the other files too, or name those that are whole")
    width, found = state["multimodal.parts.rgb.out.0.weight"].shape[0], state.get("fusion.linear.weight")
    if len(names) > 1 and (found is None or found.shape[1] != width * (len(names) - 1)):
        raise ModelError(f"--side {','.join(names)}: {'no fusion weights' if found is None else f'a fusion of {found.shape[1] // width} modalities'} in these files; "
                           f"{len(names) - 1} beside rgb want a fusion, with columns in their order")
    widths = {name: state.get(f"multimodal.parts.{name}.input.weight", state[f"multimodal.parts.{name}.norm.weight"]).shape[-1] for name in names}
    return {"widths": widths, "fused": names[1:], "join": "concat", "aligned": False, "rank": next(weight.shape[0] for key, weight in state.items() if ".A." in key)}


def to_run(paper: str, files: list[str], out: Path, encoder_adapters: bool, preset: str, sides: list[str]) -> str:
    """Write a run folder from released files; what was done, in a line. Raises ModelError."""
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out}: exists and is not empty; choose another --out or remove it")
    state: dict[str, Tensor] = {}
    for file in files:
        new = convert(read_checkpoint(file), paper)
        if twice := state.keys() & new.keys():
            raise ModelError(f"{file}: {sorted(twice)[0]} and {len(twice) - 1} others were in a file before it; give each weight once")
        state |= new
    adapter, dropped = split_encoders({name: weight for name, weight in state.items() if "lora_" in name}, encoder_adapters)
    modules = {name: weight.contiguous() for name, weight in state.items() if "lora_" not in name}
    patches = Patches()
    for number in range(1 + max((int(name.split(".")[1]) for name in modules if name.startswith("patches.")), default=-1)):
        if number == len(sides):
            raise ModelError(f"{', '.join(files)}: more patches than names in --side {','.join(sides)}; name one for each, the first patch first")
        start = f"patches.{number}."
        patches[sides[number]] = patch_of({name.removeprefix(start): modules.pop(name) for name in list(modules) if name.startswith(start)})
    config = replace(TrainConfig(**{**PRESETS[preset][1], "stage": ""}), encoder_adapters=encoder_adapters)
    config = replace(config, side=",".join(patches))
    if paper == "crema":
        modules = named(modules, NAMES)
        about = modalities_of(modules, sides)
        modules = {key: weight for key, weight in modules.items() if not (at := re.search(r"\.(?:parts|[AB])\.(\w+)\.", key)) or at[1] in sides}
        config = replace(config, modalities=",".join(sides), join=about["join"], modality_rank=about["rank"])
        out.mkdir(parents=True, exist_ok=True)
        save_file(modules, out / "modalities.safetensors", {"format": "pt", "crema": json.dumps(about)})
    out.mkdir(parents=True, exist_ok=True)
    patches.save(out / "patches")
    if adapter:
        if paper == "pave":
            config = replace(config, r=next(weight.shape[0] for name, weight in adapter.items() if "lora_A" in name))
        else:
            r, heads = adapter_sizes(adapter)
            config = replace(config, r=r, heads=heads, alpha=2 * r)             # both papers scale by 2
        config.build().save_pretrained(out / "adapter")
        save_file({name: weight.contiguous() for name, weight in adapter.items()}, out / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    else:
        config = replace(config, adapter="none")
    if modules and paper != "crema":
        save_file(modules, out / "modules.safetensors")
    atomic_write(out / "config.json", json.dumps({"preset": preset, "train": asdict(config), "steps": 0, "limits": {}, "converted": [str(f) for f in files]}, indent=1))
    atomic_write(out / "metrics.json", json.dumps({"tasks": {}, "seconds": 0, "steps": 0}))
    said = f"{len(adapter)} adapter tensors (r {config.r}{'' if paper == 'pave' else f', {config.heads} heads'})" if adapter else "no adapter"
    said += f", {len(patches)} patches ({', '.join(patches)})" if patches else ""
    return (f"{out}: {said}, {len(modules)} tensors beside it" + (f"; {dropped} tensors in the encoders left out, their B is zero" if dropped else "")
            + ". It was trained with other instructions: for its answers give them with --prompts")


def from_run(paper: str, run: Path, file: Path) -> str:
    """Write a released-style file from a run folder; what was done, in a line. Raises ModelError."""
    state: dict[str, Tensor] = {}
    for part in (run / "adapter" / "adapter_model.safetensors", run / "modules.safetensors", run / "modalities.safetensors"):
        state |= load_file(part) if part.exists() else {}
    sides = json.loads((run / "config.json").read_text())["train"]["side"].split(",") if (run / "patches").is_dir() else []
    for number, side in enumerate(sides):                                       # in the order in which they were named
        state |= {f"patches.{number}.{name}": weight for name, weight in load_file(run / "patches" / f"{side}.safetensors").items()}
    if not state:
        raise ModelError(f"{run}: neither adapter/ nor patches/ nor modules.safetensors nor modalities.safetensors; give a finished run of train.py")
    state = revert(named(state, {ours: theirs for theirs, ours in NAMES.items()}) if paper == "crema" else state, paper)
    temporary = file.with_name(f".{file.name}")
    torch.save(state, temporary)
    temporary.rename(file)
    return f"{file}: {len(state)} tensors by the names of {paper}"


def main(arguments: list[str]) -> int:
    parser = Parser(prog="-m crab_min.tools.convert", description="Released checkpoints to run folders, and back.", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paper", choices=["crab", "crab-pretrain", "crab_plus", "pave", "crema"], help="whose names")
    parser.add_argument("files", nargs="+", help="released files (.bin, .pt, .safetensors); with --back a run folder")
    parser.add_argument("--out", default="", help="the run folder to write (default: runs/PAPER-released)")
    parser.add_argument("--back", help="the file to write, by the released names")
    parser.add_argument("--encoder-adapters", action="store_true", help="keep Crab+'s adapters in the encoders")
    parser.add_argument("--side", default="", help="comma-separated; pave: the names of its patches' side channels (default: audio); crema: its modalities in the order of "
                                                   "its fusion (default: rgb,audio)")
    parser.add_argument("--preset", default="", choices=["", *PRESETS], help="whose backbone the run names (default: the paper's large one)")
    parser.add_argument("--debug", action="store_true", help="show a traceback where something goes wrong")
    given = parser.parse_args(arguments)

    def run():
        if given.back:
            print(from_run(given.paper, Path(given.files[0]), Path(given.back)))
        else:
            preset = given.preset or {"crab_plus": "crab_plus-7b", "pave": "pave-7b", "crema": "crema-xl"}.get(given.paper, "crab-7b")
            sides = given.side or {"crema": "rgb,audio"}.get(given.paper, "audio")
            print(to_run(given.paper, given.files, Path(given.out or f"runs/{given.paper}-released"), given.encoder_adapters, preset, sides.split(",")))
    return run_command(run, given.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
