"""What a run needs, before anything is downloaded: `python train.py PRESET --plan`.

Parameters are counted on models without memory (the meta device), built from the few numbers in config.py. What a forward keeps for its
backward is counted too, not derived: the LM's forward runs on tensors without values, once with one layer and once with two, under the
same code that will train; the difference is a layer. All sizes are for one GPU; encoders run without gradients and are left out of the
activations, and so is what the CUDA libraries take for themselves (about a gigabyte).
"""
import math
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from crab_min.backbones.composed import load_tokenizer
from crab_min.backbones.sizes import (
    CLIP_LARGE,
    FLAN_T5_XL,
    LLAMA_2_7B,
    LLAVA,
    QWEN_OMNI,
    TINY_MODEL,
    VIT_G,
)
from crab_min.beats import Beats, BeatsConfig
from crab_min.crema import MultimodalConfig, MultimodalQFormer, SelfGatedFusion
from crab_min.data import MASKED, pick_tasks
from crab_min.encoders import ATTENTION, FAMILIES
from crab_min.interface import audio_windows
from crab_min.masks import MASK_TOKEN_COUNT, SCALES, MaskDecoder
from crab_min.model import ASSETS, AdapterConfig
from crab_min.pave import Patch, PatchConfig
from crab_min.qformer import QFormerConfig, QFormerConnector
from crab_min.runs.log import PEAK
from crab_min.sides import modalities, side_names
from crab_min.tasks import TASKS, Task
from crab_min.trainer import ALIGN, TrainConfig

GPUS = (16, 24, 48, 80)                                # GB
NF4 = (4 + 8 / 64 + 32 / 64 / 256) / 8                 # bytes a weight: 4 bits, an 8-bit scale for 64 of them, a float for 256 scales (QLoRA, 2305.14314)
CLIP_SECONDS = {"spread": 60., "fifths": 5., "fifth": 5.}                       # length of the sound files of a task; else 10 s


@dataclass
class Sizes:
    """The models of a preset as plain configs; `native` holds the thinker or LLaVA-OneVision, or the other fields the parts of a composed model."""
    native: dict | None = None
    llava: bool = False
    vision: dict | None = None
    audio: dict | None = None
    llm: dict | None = None
    visual_qformer: dict | None = None
    audio_qformer: dict | None = None


def sizes_of(preset: str) -> Sizes:
    """The configs of a preset's models."""
    if preset.startswith("crab_plus-") and preset.removeprefix("crab_plus-") in QWEN_OMNI:
        return Sizes(native=QWEN_OMNI[preset.removeprefix("crab_plus-")])
    if preset.startswith("pave-") and preset.removeprefix("pave-") in LLAVA:
        return Sizes(native=LLAVA[preset.removeprefix("pave-")], llava=True)
    if preset == "crema-xl":
        return Sizes(vision=VIT_G, audio={}, llm=FLAN_T5_XL)
    if preset == "crab-7b":
        return Sizes(vision=CLIP_LARGE, audio={}, llm=LLAMA_2_7B, visual_qformer={}, audio_qformer={})
    tiny = {k: TINY_MODEL[k] for k in ("vision", "audio", "llm", "visual_qformer", "audio_qformer")}
    return Sizes(**tiny | {"llm": dict(tiny["llm"], vocab_size=len(load_tokenizer(ASSETS / "base" / "tokenizer.json")))})


def make_lm(sizes: Sizes, layers: int | None = None) -> nn.Module:
    """The LM of a composed model, or the whole thinker; `layers` replaces the number of its LM's layers (and of the thinker's encoders)."""
    if sizes.native is None:
        config = AutoConfig.for_model(**sizes.llm)
        config.num_hidden_layers = layers or config.num_hidden_layers
        if config.is_encoder_decoder:
            config.num_decoder_layers = config.num_hidden_layers
            return AutoModelForSeq2SeqLM.from_config(config)
        return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION if config.hidden_size < 1024 else "sdpa")
    config = LlavaOnevisionConfig(**sizes.native) if sizes.llava else Qwen2_5OmniThinkerConfig(**sizes.native)
    if layers:
        config.text_config.num_hidden_layers = layers
        config.text_config.layer_types = config.text_config.layer_types[:layers]
        if sizes.llava:
            config.vision_config.num_hidden_layers = 1
        else:
            config.vision_config.depth, config.audio_config.encoder_layers = 1, 1
    return (LlavaOnevisionForConditionalGeneration if sizes.llava else Qwen2_5OmniThinkerForConditionalGeneration)(config)


def make_vision(sizes: Sizes) -> nn.Module:
    config = AutoConfig.for_model(**sizes.vision)
    return FAMILIES[config.model_type].model(config)


def make_modalities(sizes: Sizes, config: TrainConfig, width: int) -> nn.ModuleDict:
    """CREMA's trained parts for an LM `width` wide: a MultimodalQFormer with the modalities of a run, and their fusion."""
    vision, audio = AutoConfig.for_model(**sizes.vision).hidden_size, BeatsConfig.from_dict(sizes.audio).encoder_embed_dim
    c, q = MultimodalConfig(width, vision, rank=config.modality_rank), sizes.visual_qformer
    if q:                                              # the tiny base's own
        c = replace(c, **{k: q[k] for k in ("queries", "hidden", "layers", "heads", "intermediate")}, cross_every=1, mlp_depth=2)
    qformer, names = MultimodalQFormer(c), modalities(config)
    for name in names:
        qformer.add(name, audio if name == "audio" else 96 if name == "points" and q else vision)
    return nn.ModuleDict({"qformer": qformer, **({"fusion": SelfGatedFusion(names[1:], width)} if names[1:] else {})})


def count_parameters(sizes: Sizes, adapter: AdapterConfig, train: str, patches: dict[str, PatchConfig] = {}, crema: TrainConfig | None = None) -> dict[str, tuple[int, int]]:
    """{part: (trained, frozen)} parameters of the whole model; crema: the run, where it is one with modalities."""
    with torch.device("meta"):
        lm = make_lm(sizes)
        lm.requires_grad_(False)
        peft_config = adapter.build()
        lm = get_peft_model(lm, peft_config) if peft_config else lm
        base = lm.get_base_model() if peft_config else lm
        parts = {"language model": base}
        if sizes.llava:
            parts = {"vision encoder": base.model.vision_tower, "projector": base.model.multi_modal_projector, "language model": base.model.language_model, "head": base.lm_head}
        elif sizes.native is not None:
            parts = {"vision encoder": base.model.visual, "audio encoder": base.model.audio_tower, "language model": base.model.language_model, "head": base.lm_head}
        elif crema:
            encoders = {"vision encoder": make_vision(sizes), "audio encoder": Beats(BeatsConfig.from_dict(sizes.audio))}
            for part in encoders.values():
                part.requires_grad_(False)
            made = make_modalities(sizes, crema, base.config.hidden_size)
            own = {f"modality {name}": nn.ParameterList(made["qformer"].own(name).values()) for name in modalities(crema)}
            parts = encoders | own | {"shared Q-Former": made["qformer"], **({"fusion": made["fusion"]} if "fusion" in made else {}), **parts}
        else:
            clip, beats = make_vision(sizes), Beats(BeatsConfig.from_dict(sizes.audio))
            width = base.config.hidden_size
            connectors = {"visual connector": QFormerConnector(QFormerConfig(clip.config.hidden_size, width, **sizes.visual_qformer)),
                          "audio connector": QFormerConnector(QFormerConfig(beats.config.encoder_embed_dim, width, **sizes.audio_qformer))}
            for part in (clip, beats, *connectors.values()):
                part.requires_grad_(False)
            for name, part in connectors.items():
                part.requires_grad_("connectors" in train or name.replace(" connector", "_qformer") in train)
            if "words" in train:
                base.get_input_embeddings().requires_grad_(True)
            parts = {"vision encoder": clip, "audio encoder": beats, **connectors, **parts}
        parts |= {f"patch for {name}": Patch(config) for name, config in patches.items()}
    counted, found = {}, set()
    for name, part in parts.items():
        new = [(n, p) for n, p in part.named_parameters() if id(p) not in found]                    # a tied head is counted once
        found |= {id(p) for _, p in new}
        counted[name] = tuple(sum(p.numel() for n, p in new if "lora_" not in n and p.requires_grad == learns) for learns in (True, False))
        if extra := sum(p.numel() for n, p in new if "lora_" in n):
            counted[f"adapter in the {name}"] = (extra, 0)
    return counted


@contextmanager
def storages(module: nn.Module, half: bool):
    """A dict that fills with what a forward of `module` keeps for its backward: {name of a storage: (its bytes, itself)}; parameters are not counted."""
    own, kept = {p.untyped_storage()._cdata for p in module.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage.nbytes(), storage)                  # the storage is kept so that no later one takes its name
        return tensor
    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=half):
        yield kept


def kept_bytes(lm: nn.Module, batch: int, length: int, answer: int, half: bool) -> int:
    """Bytes that the LM's forward keeps for its backward on `batch` prompts of `length` tokens, of which `answer` are learned; parameters not counted."""
    base = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
    if base.config.is_encoder_decoder:
        x, mask = torch.zeros(batch, length, base.config.hidden_size, dtype=base.dtype, requires_grad=True), torch.ones(batch, length, dtype=torch.long)
        with storages(lm, half) as kept:
            loss = base(inputs_embeds=x, attention_mask=mask, labels=torch.zeros(batch, answer, dtype=torch.long)).loss
        return sum(size for size, _ in kept.values()) if loss is not None else 0
    decoder = getattr(base.model, "language_model", base.model)
    x = torch.zeros(batch, length, decoder.config.hidden_size, dtype=base.dtype, requires_grad=True)
    eager = decoder.config._attn_implementation == "eager"
    mask = torch.zeros(batch, 1, length, length, dtype=base.dtype if eager else torch.bool)
    mask = {"full_attention": mask, "sliding_attention": mask} if decoder is not base.model else mask
    with storages(lm, half) as kept:
        hidden = decoder(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
        loss = F.cross_entropy(base.lm_head(hidden[:, -answer - 1:])[:, :-1].flatten(0, 1).float(), torch.zeros(batch * answer, dtype=torch.long))
    return sum(size for size, _ in kept.values()) if loss is not None else 0


def pretend(lm: nn.Module) -> None:
    """Put CPU tensors without values in the place of meta tensors, so that the code of the CPU runs (attention chooses its kernel by device)."""
    for module in lm.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def activations(sizes: Sizes, adapter: AdapterConfig, batch: int, length: int, answer: int, checkpointing: bool, half: bool) -> int:
    """Bytes of activations of a training step: all layers', or with checkpointing their inputs and one layer's."""
    found = []
    for layers in (1, 2):
        with torch.device("meta"):
            lm = make_lm(sizes, layers).requires_grad_(False).train().to(torch.bfloat16 if half else torch.float32)
            peft_config = adapter.build()
            lm = get_peft_model(lm, peft_config) if peft_config else lm
        with FakeTensorMode():
            pretend(lm)
            found.append(kept_bytes(lm, batch, length, answer, half))
    one, two = found
    layer, rest = two - one, 2 * one - two
    text = make_config(sizes)
    if not checkpointing:
        return rest + layer * text.num_hidden_layers
    return rest + layer + text.num_hidden_layers * batch * length * text.hidden_size * (2 if half else 4)


def modality_bytes(sizes: Sizes, config: TrainConfig, half: bool) -> int:
    """Bytes of activations of CREMA's Q-Former in a training step: of one modality in sequential training, else of all; the fusion is left out."""
    with torch.device("meta"):
        width, vision = make_config(sizes).hidden_size, AutoConfig.for_model(**sizes.vision)
        qformer = make_modalities(sizes, replace(config, modalities="rgb"), width)["qformer"]
    with FakeTensorMode():
        pretend(qformer)
        x = torch.zeros(1, config.batch_size * config.frames, (vision.image_size // vision.patch_size) ** 2, vision.hidden_size)
        with storages(qformer, half) as kept:
            tokens = qformer("rgb", x)
    return sum(size for size, _ in kept.values()) * (1 if config.sequential else len(modalities(config))) if tokens is not None else 0


def make_decoder(sizes: Sizes, config: TrainConfig) -> MaskDecoder:
    """Crab's mask decoder beside these models."""
    vision = AutoConfig.for_model(**sizes.vision)
    return MaskDecoder(config.sizes(vision.hidden_size, make_config(sizes).hidden_size, vision.image_size))


def decoder_bytes(sizes: Sizes, config: TrainConfig) -> int:
    """Bytes of activations of the mask decoder in a training step, each sample with a mask."""
    vision = AutoConfig.for_model(**sizes.vision)
    with torch.device("meta"):
        decoder = make_decoder(sizes, config)
    with FakeTensorMode():
        pretend(decoder)
        features = [torch.zeros(config.batch_size, (vision.image_size // vision.patch_size) ** 2, vision.hidden_size) for _ in range(SCALES)]
        with storages(decoder, False) as kept:
            logits = decoder(torch.zeros(config.batch_size, MASK_TOKEN_COUNT, make_config(sizes).hidden_size), features)
    return sum(size for size, _ in kept.values()) if logits is not None else 0


def make_config(sizes: Sizes):
    """The transformers config of the LM."""
    if sizes.native is None:
        return AutoConfig.for_model(**sizes.llm)
    return (LlavaOnevisionConfig if sizes.llava else Qwen2_5OmniThinkerConfig)(**sizes.native).text_config


# side steps, tokens a step and width, as the released patches have them: ImageBind each second of a minute, LanguageBind twice a second for two, LLaVA-3D, four cameras
SIDES = {"audio": (59, 1, 1024), "fast": (240, 4, 1024), "depth": (32, 576, 1024), "view": (128, 196, 1152)}


def patch_sizes(sizes: Sizes, config: TrainConfig) -> tuple[dict[str, PatchConfig], tuple[int, int]]:
    """The patches of a run by name, and (frames, tokens a frame) of the videos that they read."""
    if sizes.llava:
        vision = LlavaOnevisionConfig(**sizes.native).vision_config
        width, grid = vision.hidden_size, math.ceil(vision.image_size // vision.patch_size / 2) ** 2
    elif config.modalities:
        return {}, (config.frames, 0)
    elif sizes.native is None:
        connector = QFormerConfig(1, 1, **sizes.visual_qformer)
        width, grid = connector.hidden, connector.queries
    else:
        width, grid = make_config(sizes).hidden_size, 64
    return {name: PatchConfig(width, SIDES.get(name, SIDES["audio"])[2], make_config(sizes).hidden_size, config.patch_size, layers=config.patch_layers,
                              shared_kv=config.shared_kv, rope=config.patch_rope) for name in side_names(config)}, (config.frames or 10, grid)


def flops(module: nn.Module, *inputs, **named) -> int:
    """Floating-point operations of a forward on tensors without values, two for a multiplication and its addition."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs, **named)
    return counter.get_total_flops()


def patch_costs(sizes: Sizes, config: TrainConfig, tokens: int) -> dict[str, tuple[int, int]]:
    """{patch, and "base": the frozen model on `tokens` tokens (LLaVA-OneVision: with its encoder): (parameters, FLOPs)}."""
    patches, (frames, grid) = patch_sizes(sizes, config)
    found = {}
    with torch.device("meta"):
        for name, c in patches.items():
            steps, count, width = SIDES.get(name, SIDES["audio"])
            patch = Patch(c)
            found[name] = sum(p.numel() for p in patch.parameters()), flops(patch, torch.empty(1, frames, grid, c.video), torch.empty(1, steps, count, width))
        lm = make_lm(sizes)
        decoder, mask = getattr(lm.model, "language_model", lm.model), torch.empty(1, 1, tokens, tokens, dtype=torch.bool)
        mask = mask if decoder is lm.model else {"full_attention": mask, "sliding_attention": mask}
        spent = flops(decoder, inputs_embeds=torch.empty(1, tokens, make_config(sizes).hidden_size), attention_mask=mask, use_cache=False)
        if sizes.llava:
            side = lm.config.vision_config.image_size
            spent += flops(lm.model.vision_tower, torch.empty(frames, 3, side, side))
        found["base"] = sum(p.numel() for p in lm.parameters()), spent
    return found


def media_tokens(sizes: Sizes, task: Task, config: TrainConfig) -> int:
    """Tokens of the media of one prompt."""
    total = 0
    for kind in [medium.kind for medium in task.media]:
        if (config.side or config.modalities) and kind == "audio":            # a side channel has none
            continue
        if config.modalities:
            queries, prefix = (sizes.visual_qformer or {"queries": 32})["queries"], 0 if sizes.visual_qformer else 4        # "Frame 1: "
            total += (config.frames or task.frames) * (queries + prefix) * (2 if config.join == "concat" and side_names(config) else 1)
            continue
        if sizes.llava:
            grid = math.isqrt(patch_sizes(sizes, config)[1][1])
            total += grid * (grid + 1) * (1 if kind == "image" else config.frames or task.frames)
            continue
        windows = audio_windows(task.audio, CLIP_SECONDS.get(task.audio, 10.))
        if sizes.native is not None:
            seconds = max(1, round(sum(end - start for start, end in windows)))
            total += 25 * seconds if kind == "audio" else 64 if kind == "image" else 64 * -(-task.frames // 2)
        else:
            connector = QFormerConfig(1, 1, **(sizes.audio_qformer if kind == "audio" else sizes.visual_qformer))
            total += connector.queries * (len(windows) if kind == "audio" else 1 if kind == "image" else task.frames)
    return total


def text_tokens(task: Task) -> int:
    """About how many tokens the words of a prompt are: four characters each, 20 for what fills a slot, 30 for the chat format."""
    return len(task.instruction) // 4 + 20 * len(task.slots) + 8 * len(task.media) + 30


SHARE = .3                                             # of a GPU's peak that a training run is taken to use: a guess, until train.py shows its own (MFU)
ANSWER = 80                                            # about how many tokens a reasoned answer has


def plan(config: TrainConfig, preset: str) -> dict:
    """Everything that `report` prints, as numbers: parameters by part, tokens by task, bytes in bfloat16 and with a 4-bit LM."""
    sizes, adapter = sizes_of(preset), AdapterConfig(**{k: getattr(config, k) for k in AdapterConfig.__dataclass_fields__})
    train, masks = ALIGN.get(config.stage, ("", config.train))[1], bool(config.masks) or config.stage == "masks"
    tasks = ",".join(MASKED) if config.stage == "masks" and config.tasks == "all" else config.tasks
    if "adapter" not in train.split("+"):                                      # it stays as the stage before has left it
        adapter = replace(adapter, adapter="none")
    parts = count_parameters(sizes, adapter, train, patch_sizes(sizes, config)[0], config if config.modalities else None)
    if masks:
        with torch.device("meta"):
            parts["mask decoder and tokens"] = (sum(p.numel() for p in make_decoder(sizes, config).parameters()) + 2 * MASK_TOKEN_COUNT * make_config(sizes).hidden_size, 0)
    lengths = {name: media_tokens(sizes, task, config) + text_tokens(task) + ANSWER for name, task in TASKS.items() if task.v2
               and (tasks == "all" or name in pick_tasks(tasks)) and not ((config.side or config.modalities) and name in ("a2v", "v2a"))}
    trained, frozen = (sum(n[i] for n in parts.values()) for i in (0, 1))
    half = sizes.native is not None or preset.endswith(("7b", "xl"))
    with torch.device("meta"):
        lm = make_lm(sizes)
    decoder = lm if lm.config.is_encoder_decoder else getattr(lm.model, "language_model", lm.model)
    linears = sum(m.weight.numel() for name, m in decoder.named_modules() if isinstance(m, nn.Linear) and name != "lm_head")
    weights = frozen * (2 if half else 4)
    learned = {"adapter and trained weights": 4 * trained, "gradients": 4 * trained, "optimizer (AdamW)": 8 * trained,
               "activations": activations(sizes, adapter, config.batch_size, max(lengths.values()), ANSWER, config.checkpointing, half)}
    if config.modalities:
        learned["activations"] += modality_bytes(sizes, config, half)
    if masks:
        learned["activations"] += decoder_bytes(sizes, config)
    memory = {"bfloat16" if half else "float32": {"frozen weights": weights, **learned}}
    if half:
        memory["4-bit LM"] = {"frozen weights": round(weights - linears * (2 - NF4)), **learned}
    return {"preset": preset, "parts": {name: {"trained": t, "frozen": f} for name, (t, f) in parts.items()}, "trained": trained, "frozen": frozen,
            "patches": patch_costs(sizes, config, max(lengths.values())) if config.side else {}, "whole": whole_qformers(sizes, config) if config.modalities else 0, "tokens": lengths,
            "operations": (6 if config.checkpointing else 4) * linears * sum(lengths.values()) / len(lengths), "batch_size": config.batch_size, "checkpointing": config.checkpointing, "memory": memory}


def whole_qformers(sizes: Sizes, config: TrainConfig) -> int:
    """Parameters of a Q-Former a modality, trained whole (with its queries, norm and projection, without adapters and fusion): what CREMA compares itself with."""
    with torch.device("meta"):
        qformer = make_modalities(sizes, config, make_config(sizes).hidden_size)["qformer"]
    return sum(p.numel() for name, p in qformer.named_parameters() if ".A." not in name and ".B." not in name and ".parts." not in f".{name}") * len(
        modalities(config)) + sum(p.numel() for p in qformer.parts.parameters())


def report(found: dict) -> str:
    """The lines that `--plan` prints."""
    lines = [f"{'part':<36}{'trained':>16}{'frozen':>16}"]
    lines += [f"{name:<36}{n['trained']:>16,}{n['frozen']:>16,}" for name, n in found["parts"].items()]
    lines += [f"{'all':<36}{found['trained']:>16,}{found['frozen']:>16,}", "", "tokens a sample, about (media exactly, for clips of 10 s, of 60 s in avqa):"]
    lines += ["  " + "  ".join(f"{task} {n}" for task, n in list(found["tokens"].items())[i:i + 7]) for i in range(0, len(found["tokens"]), 7)]
    lines.append(f"time: {found['operations'] / 1e12:.1f} TFLOPs a sample of the mean length in the LM, without encoders and decoding; 100,000 samples at {SHARE:.0%} of a GPU's peak: "
                 + ", ".join(f"{name} {found['operations'] * 1e5 / SHARE / PEAK[name] / 3600:.1f} h" for name in ("3090", "4090", "A100", "H100")))
    base = found["patches"].get("base")
    for name, (count, spent) in found["patches"].items():
        share = "" if name == "base" else f", {count / base[0]:.2%} and {spent / base[1]:.2%} of the base"
        lines.append(f"{'the frozen base' if name == 'base' else f'patch for {name}'}: {count:,} parameters, {spent / 1e12:.3f} TFLOPs for the longest sample{share}")
    if found["whole"]:
        lines.append(f"a Q-Former a modality, trained whole, would be {found['whole']:,} parameters; trained here: {found['trained']:,}, {1 - found['trained'] / found['whole']:.1%} fewer")
    lines += ["", f"memory in GB, {found['batch_size']} samples of {max(found['tokens'].values())} tokens a step, gradient checkpointing {'on' if found['checkpointing'] else 'off'}:"]
    names = list(found["memory"])
    lines.append(f"  {'':<30}" + "".join(f"{name:>12}" for name in names))
    for row in next(iter(found["memory"].values())):
        lines.append(f"  {row:<30}" + "".join(f"{found['memory'][name][row] / 1e9:>12.2f}" for name in names))
    totals = {name: sum(found["memory"][name].values()) / 1e9 for name in names}
    lines.append(f"  {'together':<30}" + "".join(f"{totals[name]:>12.2f}" for name in names))
    for gpu in GPUS:                                                            # a gigabyte for CUDA itself, a twentieth lost between blocks
        lines.append(f"  {f'fits {gpu} GB':<30}" + "".join(f"{'yes' if totals[name] * 1.05 + 1 < gpu * 1.073 else 'no':>12}" for name in names))
    return "\n".join(lines)
