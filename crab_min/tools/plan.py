"""What a run needs, before anything is downloaded: `python train.py PRESET --plan`.

The run's own model is asked. Its recipe builds it as for training, under the flags that were given,
but on the meta device: every tensor has a shape and a precision, and none has memory.

    parameters    counted by part
    tokens        black media are encoded, and the model says how many tokens they become
    activations   counted in forwards on tensors without values, see `activation_bytes`
    evaluation    computed from the LM's sizes, see `evaluation_bytes`

All is for one GPU. Left out are what frozen encoders need while they run, and what the CUDA
libraries take for themselves (about a gigabyte, which "fits" adds).

Shapes: B samples, L tokens of a prompt with its answer, D width of the LM.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crab_min.answers import Answer
from crab_min.config import Settings
from crab_min.data import SAMPLE_RATE, Sample, pick_tasks
from crab_min.encoders import MediaFeatures
from crab_min.errors import DataError
from crab_min.evaluation.answering import BATCH_SIZE, DEFAULT_LIMIT, RANKED_TOGETHER
from crab_min.interface import PromptPart, audio_windows, build_prompt
from crab_min.masks import MASK_TOKEN_COUNT
from crab_min.model import AVLanguageModel, index_by_kind
from crab_min.tasks import TASKS, Task

CLIP_SECONDS = {"spread": 60.0, "fifths": 5.0, "fifth": 5.0}  # sounds by audio window; else 10 s
# in the place of a question, or of what else fills a slot of an instruction
SLOT_TEXT = "Which of the things that are seen in the video is heard before the bell rings?"
ANSWER = 80  # tokens of a reasoned answer, about

GPUS = (16, 24, 48, 80)  # GB
# dense bfloat16 operations per second at most
PEAK = {"3090": 71e12, "4090": 165e12, "A100": 312e12, "H100": 989e12}
# the share of it that training is taken to use: a guess
SHARE = 0.3
# bytes per weight in NF4 (QLoRA, 2305.14314): 4 bits, an 8-bit scale for 64 of them, and a float
# for 256 scales
NF4 = (4 + 8 / 64 + 32 / 64 / 256) / 8


@dataclass
class Count:
    """Parameters of a part."""

    trained: int = 0
    frozen: int = 0


@dataclass
class Prompt:
    """The prompt of a task: its tokens with an answer, and its media without values."""

    tokens: int
    media: list[MediaFeatures]


@dataclass
class PatchCost:
    """What a patch adds to the model, and to its forward on the longest prompt."""

    parameters: int
    operations: int


@dataclass
class Memory:
    """Bytes that a run needs on a GPU."""

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    evaluation: int  # all that is there while the greatest batch is answered

    @property
    def training(self) -> int:
        """All that is there in a training step."""
        weights = self.frozen + self.trained
        return weights + self.gradients + self.optimizer + self.activations

    def fits(self, gigabytes: int) -> bool:
        """Whether a GPU holds it, with a gigabyte for CUDA and a twentieth lost between blocks."""
        needed = max(self.training, self.evaluation)
        return needed / 1e9 * 1.05 + 1 < gigabytes * 2**30 / 1e9


@dataclass
class Plan:
    """All that `report` prints."""

    parts: dict[str, Count]
    tokens: dict[str, int]  # of a sample, by task
    operations: float  # of the LM in a training step, for a sample of the mean length
    memory: dict[str, Memory]  # by the precision of the LM's weights
    base_operations: int  # of the frozen model's forward on the longest prompt
    patches: dict[str, PatchCost]
    batch_size: int
    eval_rows: int
    checkpointing: bool
    whole_qformers: int

    @property
    def trained(self) -> int:
        return sum(count.trained for count in self.parts.values())

    @property
    def frozen(self) -> int:
        return sum(count.frozen for count in self.parts.values())


def plan(recipe: ModuleType, settings: Settings) -> Plan:
    """Count what a run of a recipe needs.

    Args:
        recipe: a module of crab_min.recipes.

    Raises:
        ModelError: a model whose sizes are not known here.
        DataError: no task has a prompt with the run's side channels.
    """
    settings = recipe.run_settings(settings)
    training = settings.training

    # the model as it trains
    model = recipe.load_model(settings, empty=True)
    sides = {name: side_features(model, recipe, settings, name) for name in settings.side_channels}
    widths = {name: medium.features.shape[-1] for name, medium in sides.items()}
    with torch.device("meta"):
        recipe.add_trained_parts(model, settings, widths)
    model.set_trainable(training.parts)
    parts, qformers = count_parts(model), whole_qformers(model)

    # its prompts; the longest one decides about memory
    prompts = example_prompts(model, recipe, settings, sides)
    tokens = {task: prompt.tokens for task, prompt in prompts.items()}
    longest = max(prompts.values(), key=lambda prompt: prompt.tokens)
    # a product and its sum for each weight: forward, backward to the inputs, and with
    # checkpointing the forward again
    passes = 6 if training.gradient_checkpointing else 4
    multiplied = sum(linear.weight.numel() for linear in lm_linears(model))
    operations = passes * multiplied * sum(tokens.values()) / len(tokens)

    # from here on the model runs, on tensors without values
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill(model)
        longest.media = [without_values(medium) for medium in longest.media]
        memory = memory_by_precision(model, settings, longest)
        base_operations, patches = patch_costs(model, longest, parts)
    return Plan(
        parts=parts,
        tokens=tokens,
        operations=operations,
        memory=memory,
        base_operations=base_operations,
        patches=patches,
        batch_size=training.batch_size,
        eval_rows=eval_rows(settings),
        checkpointing=training.gradient_checkpointing,
        whole_qformers=qformers,
    )


# --- parameters ----------------------------------------------------------------------------------

# how the names of a part's parameters begin, and its title
PARTS = [
    (r"vision\.|llm\..*\.(visual|vision_tower)\.", "vision encoder"),
    (r"audio\.|llm\..*\.audio_tower\.", "audio encoder"),
    (r"llm\..*\.(multi_modal_projector|image_newline)", "projector"),
    (r"visual_qformer\.", "visual connector"),
    (r"audio_qformer\.", "audio connector"),
    (r"(time|number)\.", "time and number"),
    (r"multimodal\.(?:parts|.*\.[AB])\.(\w+)\.", r"modality \1"),
    (r"multimodal\.", "shared Q-Former"),
    (r"fusion\.", "fusion"),
    (r"mask_branch\.|llm\..*\.rows$", "mask decoder and tokens"),
    (r"llm\..*lora_", "adapter in the language model"),
    (r"llm\..*lm_head\.", "head"),
    (r"llm\.", "language model"),
    (r"patches\.(\w+)\.", r"patch for \1"),
]


def part_of(name: str) -> tuple[int, str]:
    """Return the part of a parameter: its place in the table, and its title."""
    for place, (pattern, title) in enumerate(PARTS):
        match = re.match(pattern, name)
        if match:
            return place, match.expand(title)
    raise AssertionError(f"{name}: belongs to no part")


def count_parts(model: AVLanguageModel) -> dict[str, Count]:
    """Count the parameters of each part; a head that is tied to the embeddings has none."""
    counts: dict[str, Count] = {}
    by_place = sorted(model.named_parameters(), key=lambda named: part_of(named[0])[0])
    for name, parameter in by_place:
        count = counts.setdefault(part_of(name)[1], Count())
        if parameter.requires_grad:
            count.trained += parameter.numel()
        else:
            count.frozen += parameter.numel()
    return counts


def whole_qformers(model: AVLanguageModel) -> int:
    """Count the parameters of one whole Q-Former per modality, with which CREMA compares itself.

    Its queries, norm and projection are counted, and no adapters and no fusion. 0 for a model
    without modalities.
    """
    shared = own = 0
    for name, parameter in model.named_parameters():
        if name.startswith("multimodal.parts."):
            own += parameter.numel()
        elif name.startswith("multimodal.") and not re.search(r"\.[AB]\.", name):
            shared += parameter.numel()
    return own + shared * (1 + len(model.side_names))


# --- the LM --------------------------------------------------------------------------------------


def lm_of(model: AVLanguageModel) -> nn.Module:
    """Return the LM without PEFT's wrapper; an adapter stays inside."""
    return model.llm.get_base_model() if hasattr(model.llm, "get_base_model") else model.llm


def lm_stacks(model: AVLanguageModel) -> list[nn.Module]:
    """Return the LM's decoder, and its encoder if it has one, without the head."""
    lm = lm_of(model)
    return [lm.encoder, lm.decoder] if lm.config.is_encoder_decoder else [lm.get_decoder()]


def lm_linears(model: AVLanguageModel) -> list[nn.Linear]:
    """Return the frozen linears of the LM's layers, which each token is multiplied with."""
    linears = []
    for stack in lm_stacks(model):
        for name, module in stack.named_modules():
            if isinstance(module, nn.Linear) and "lora_" not in name:
                linears.append(module)
    return linears


def lm_layers(model: AVLanguageModel) -> list[nn.ModuleList]:
    """Return the layers of each stack."""
    return [stack.block if hasattr(stack, "block") else stack.layers for stack in lm_stacks(model)]


def lm_width(model: AVLanguageModel) -> int:
    """Return the width of the LM's embeddings."""
    return model.llm.get_input_embeddings().weight.shape[1]


def lm_dtype(model: AVLanguageModel) -> torch.dtype:
    """Return the precision of the LM's weights."""
    return model.llm.get_input_embeddings().weight.dtype


def measure_layer(model: AVLanguageModel, measure: Callable[[], int]) -> tuple[int, int]:
    """Measure the LM with one layer and with two.

    Returns:
        what it measures without layers, and for a layer.
    """
    values = []
    for count in (1, 2):
        with first_layers(model, count):
            values.append(measure())
    layer = values[1] - values[0]
    return values[0] - layer, layer


@contextmanager
def first_layers(model: AVLanguageModel, count: int) -> Iterator[None]:
    """Take all but the first layers out of the LM."""
    stacks = lm_layers(model)
    whole = [list(layers) for layers in stacks]
    for layers in stacks:
        del layers[count:]
    try:
        yield
    finally:
        for layers, all_layers in zip(stacks, whole):
            layers.extend(all_layers[count:])


# --- prompts -------------------------------------------------------------------------------------


def example_prompts(
    model: AVLanguageModel,
    recipe: ModuleType,
    settings: Settings,
    sides: dict[str, MediaFeatures],
) -> dict[str, Prompt]:
    """Make a prompt of each task, as the recipe and the model lay it out.

    Media have their exact number of tokens, for clips of CLIP_SECONDS; text has about as many.

    Args:
        sides: the features of each side channel.
    """
    prompts: dict[str, Prompt] = {}
    encoded: dict[tuple, MediaFeatures] = {}
    for sample in example_samples(recipe, settings):
        features = []
        for part in sample.media:
            key = (part.side, part.kind, part.frames, part.window)
            if key not in encoded:
                encoded[key] = sides[part.side] if part.side else encode_black(model, part)
            features.append(encoded[key])

        parts, media = model.arrange(sample.parts, features)
        tokens = len(model.prompt_ids(parts, media)) + ANSWER
        prompts[sample.task.name] = Prompt(tokens, media)
    return prompts


def example_samples(recipe: ModuleType, settings: Settings) -> list[Sample]:
    """Return a sample without content of each task, in the form of the recipe.

    Raises:
        DataError: none of the tasks can have it.
    """
    names = pick_tasks(settings.data.tasks)
    if settings.data.tasks == "all":
        names = [name for name in names if TASKS[name].v2]
    samples: list[Sample] = []
    for name in names:
        try:
            sample = example_sample(TASKS[name], settings.side_channels)
            samples += recipe.prepare_samples([sample], settings)
        except DataError:  # side channels stand beside one video, and this task has two
            if name == names[-1] and not samples:
                raise
    return samples


def example_sample(task: Task, side_channels: list[str]) -> Sample:
    """Make a sample of a task, with a text of usual length in its slots."""
    # vid and fid: what Ref-AVS names its masks by
    row = {"frame_idx": 0, "vid": "0", "fid": "0"}
    row |= {medium.fields[0]: "media/0/frames/0.jpg" for medium in task.media}
    row |= {slot.fields[0]: SLOT_TEXT for slot in task.slots}
    row["sides"] = {name: f"{name}.npy" for name in side_channels}
    return Sample(task.name, task, build_prompt(task, row), target="", gold=Answer(), row=row)


def encode_black(model: AVLanguageModel, part: PromptPart) -> MediaFeatures:
    """Encode a black clip, or silence, as long as those of the part's task."""
    if part.kind == "audio":
        seconds = CLIP_SECONDS.get(part.window, 10.0)
        windows = audio_windows(part.window, seconds)
        waves = [np.zeros(round(SAMPLE_RATE * (end - start))) for start, end in windows]
        return model.encode("audio", [waves], [seconds])[0]
    frames = 1 if part.kind == "image" else part.frames
    pixels = np.zeros((frames, model.frame_size, model.frame_size, 3), np.uint8)
    return model.encode(part.kind, [pixels], [10.0])[0]


def side_features(
    model: AVLanguageModel, recipe: ModuleType, settings: Settings, name: str
) -> MediaFeatures:
    """Return features of a side channel: of the model's encoders, or as a file would have them."""
    has_beats = getattr(model, "audio", None) is not None
    if name == "audio" and has_beats:
        return encode_black(model, PromptPart("audio"))
    if name in recipe.SIDE_FEATURES:
        return MediaFeatures(name, torch.empty(recipe.SIDE_FEATURES[name], device="meta"))
    return encode_black(model, PromptPart("view", frames=settings.data.frames or Task.frames))


# --- memory --------------------------------------------------------------------------------------


def memory_by_precision(
    model: AVLanguageModel, settings: Settings, longest: Prompt
) -> dict[str, Memory]:
    """Count the bytes of a run, also with the LM in 4 bits where that can be had.

    Returns:
        "bfloat16" or "float32", and "4-bit LM" -> its bytes. With --load-in-4bit that alone.
    """
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    whole = Memory(
        frozen=frozen,
        trained=trained,
        gradients=trained,
        optimizer=2 * trained,  # AdamW's two moments
        activations=activation_bytes(model, settings, longest),
        evaluation=frozen + trained + evaluation_bytes(model, settings, longest),
    )
    if settings.run.eval_every:  # the optimizer stays where it is
        whole.evaluation += whole.optimizer

    dtype = lm_dtype(model)
    columns = {str(dtype).removeprefix("torch."): whole}
    if dtype == torch.bfloat16:  # pretrained weights, which bitsandbytes quantizes as they load
        saved = sum(linear.weight.numel() * (2 - NF4) for linear in lm_linears(model))
        columns["4-bit LM"] = replace(
            whole, frozen=round(frozen - saved), evaluation=round(whole.evaluation - saved)
        )
    if settings.backbone.load_in_4bit:
        return {"4-bit LM": columns["4-bit LM"]}
    return columns


def activation_bytes(model: AVLanguageModel, settings: Settings, longest: Prompt) -> int:
    """Count what a training step on the longest prompts keeps for its backward pass.

    Nothing is derived from the architecture: the code that will train runs on tensors without
    values, and hooks see each tensor that autograd keeps. The LM runs with one layer and with two;
    the difference is a layer, and every layer keeps as much. With gradient checkpointing the LM
    keeps the inputs of its layers, and the rest of one layer at a time.

    Counted are the LM, what makes tokens of features (connectors, patches, modalities), and the
    mask decoder. Frozen encoders keep nothing.
    """
    batch, bf16 = settings.training.batch_size, settings.training.bf16
    model.train()
    if settings.sequential:  # one modality learns in an update; the video has most tokens
        for name in settings.side_channels:
            model.trainable_modules()[f"modality_{name}"].requires_grad_(False)
    total = lm_activation_bytes(model, settings, longest.tokens)

    # one row and two, since what is kept of weights is kept once
    kept = []
    for rows in (1, 2):
        with saved_for_backward(model, bf16) as saved:
            model.tokens(rows * longest.media, rows * index_by_kind(longest.media))
        kept.append(saved.bytes)
    total += kept[0] + (batch - 1) * (kept[1] - kept[0])

    if model.predicts_masks:
        states = torch.zeros(batch, MASK_TOKEN_COUNT, lm_width(model))  # (B, S M, D)
        scales = next(medium.scales for medium in longest.media if medium.scales)
        features = [scale.expand(batch, -1, -1) for scale in scales]  # (B, S, W) each
        with saved_for_backward(model, bf16=False) as saved:
            model.mask_branch(states, features)
        total += saved.bytes
    return total


def lm_activation_bytes(model: AVLanguageModel, settings: Settings, length: int) -> int:
    """Count what the LM keeps, see `activation_bytes`; length: tokens of each prompt."""
    training = settings.training

    def kept() -> int:
        with saved_for_backward(model, training.bf16) as saved:
            lm_loss(model, training.batch_size, length)
        return saved.bytes

    rest, layer = measure_layer(model, kept)
    depth = len(lm_layers(model)[0])
    if not training.gradient_checkpointing:
        return rest + depth * layer
    inputs = training.batch_size * length * lm_width(model) * lm_dtype(model).itemsize
    return rest + layer + depth * inputs


def lm_loss(model: AVLanguageModel, batch: int, length: int) -> Tensor:
    """Run the LM on embeddings without values, and the loss of ANSWER tokens of each row.

    Its mask is given whole, (B, 1, L, L), as models of several kinds of media take it: they would
    look at the values of a mask (B, L).
    """
    lm = lm_of(model)
    x = torch.zeros(batch, length, lm_width(model), dtype=lm_dtype(model), requires_grad=True)
    labels = torch.zeros(batch, ANSWER, dtype=torch.long)
    if lm.config.is_encoder_decoder:
        mask = torch.ones(batch, length, dtype=torch.long)
        return lm(inputs_embeds=x, attention_mask=mask, labels=labels).loss
    hidden = lm_hidden(model, x)  # (B, L, D)
    logits = lm.get_output_embeddings()(hidden[:, -ANSWER - 1 :])  # (B, ANSWER + 1, V)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten())


def lm_hidden(model: AVLanguageModel, x: Tensor) -> Tensor:
    """Run the LM's decoder on embeddings x (B, L, D), without a cache; returns (B, L, D)."""
    (decoder,) = lm_stacks(model)
    is_eager = decoder.config._attn_implementation == "eager"  # it adds the mask to its logits
    dtype = x.dtype if is_eager else torch.bool
    mask = torch.zeros(len(x), 1, x.shape[1], x.shape[1], dtype=dtype)
    return decoder(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state


def eval_rows(settings: Settings) -> int:
    """Return how many prompts evaluation answers together."""
    return RANKED_TOGETHER if settings.run.eval_mode == "rank" else BATCH_SIZE


def evaluation_bytes(model: AVLanguageModel, settings: Settings, longest: Prompt) -> int:
    """Compute what the greatest batch of evaluation takes beside the weights.

    Counted are, for `eval_rows` prompts of the longest task and answers of DEFAULT_LIMIT tokens:
    the keys and values of all layers, and the widest moment while the prompts are read. That is a
    layer's MLP (gate, up and their product, beside the hidden states before and after it) or the
    logits, of whole prompts where the LM has no way to keep fewer (Qwen2.5-Omni). Where options
    are ranked, there are logits of ANSWER tokens, as they are and in float32.
    """
    lm, itemsize = lm_of(model), lm_dtype(model).itemsize
    config = lm.config.get_text_config()
    prompt = longest.tokens - ANSWER
    rows = eval_rows(settings)

    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_width = getattr(config, "head_dim", None) or lm_width(model) // config.num_attention_heads
    cached = 2 * len(lm_layers(model)[-1]) * kv_heads * head_width * itemsize
    cache = rows * (prompt + DEFAULT_LIMIT) * cached

    mlp_width = max(linear.out_features for linear in lm_linears(model))
    mlp = rows * prompt * (3 * mlp_width + 2 * lm_width(model)) * itemsize
    if settings.run.eval_mode == "rank":
        logits = rows * ANSWER * config.vocab_size * (itemsize + 4)
    elif config.is_encoder_decoder or "logits_to_keep" in inspect.signature(lm.forward).parameters:
        logits = rows * config.vocab_size * itemsize
    else:
        logits = rows * prompt * config.vocab_size * itemsize
    return cache + max(mlp, logits)


# --- tensors without values ----------------------------------------------------------------------


def fill(model: AVLanguageModel) -> None:
    """Put CPU tensors in the place of meta tensors, inside of a FakeTensorMode.

    They have no values either, but the code of a device runs on them: attention chooses its kernel
    by device.
    """
    filled: dict[nn.Parameter, nn.Parameter] = {}  # what is tied stays tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in filled:
                value = torch.empty(parameter.shape, dtype=parameter.dtype)
                filled[parameter] = nn.Parameter(value, parameter.requires_grad)
            module._parameters[name] = filled[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def without_values(medium: MediaFeatures) -> MediaFeatures:
    """Return features of the same shapes, inside of a FakeTensorMode."""
    return replace(
        medium,
        features=torch.zeros(medium.features.shape),
        mask=None,
        scales=[torch.zeros(scale.shape) for scale in medium.scales],
        sides={name: without_values(side) for name, side in medium.sides.items()},
    )


class Saved:
    """The storages of tensors that autograd keeps, by their number."""

    def __init__(self):
        self.storages: dict[int, torch.UntypedStorage] = {}

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@contextmanager
def saved_for_backward(model: nn.Module, bf16: bool) -> Iterator[Saved]:
    """Collect what a forward inside keeps for its backward pass; parameters are not counted."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    saved = Saved()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved.storages[storage._cdata] = storage
        return tensor

    hooks = saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        yield saved


# --- operations ----------------------------------------------------------------------------------


def patch_costs(
    model: AVLanguageModel, longest: Prompt, parts: dict[str, Count]
) -> tuple[int, dict[str, PatchCost]]:
    """Count what patches cost in a forward on the longest prompt.

    Returns:
        the operations of the frozen model, and the cost of each patch by its side channel.
    """
    names = [name for name in model.side_names if f"patch for {name}" in parts]
    if not names:
        return 0, {}
    alone = token_operations(model, longest, [])
    costs = {}
    for name in names:
        operations = token_operations(model, longest, [name]) - alone
        costs[name] = PatchCost(parts[f"patch for {name}"].trained, operations)
    rest, layer = measure_layer(
        model, lambda: operations_of(lambda: lm_loss(model, 1, longest.tokens))
    )
    return alone + rest + layer * len(lm_layers(model)[0]), costs


def token_operations(model: AVLanguageModel, longest: Prompt, names: list[str]) -> int:
    """Count the operations that make tokens of media with some of their side channels."""
    media = []
    for medium in longest.media:
        sides = {name: side for name, side in medium.sides.items() if name in names}
        media.append(replace(medium, sides=sides))
    return operations_of(lambda: model.tokens(media, index_by_kind(media)))


def operations_of(forward: Callable) -> int:
    """Count the operations of a forward, two for a product and its sum.

    Attention runs as plain products, since not every kernel of it is counted.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward()
    return counter.get_total_flops()


# --- the table -----------------------------------------------------------------------------------


def report(result: Plan) -> str:
    """Format a plan as `--plan` prints it."""
    sections = [part_lines(result), token_lines(result), cost_lines(result), memory_lines(result)]
    return "\n".join(line for lines in sections for line in lines)


def part_lines(result: Plan) -> list[str]:
    lines = [f"{'part':<36}{'trained':>16}{'frozen':>16}"]
    counts = result.parts | {"all": Count(result.trained, result.frozen)}
    for title, count in counts.items():
        lines.append(f"{title:<36}{count.trained:>16,}{count.frozen:>16,}")
    return lines


def token_lines(result: Plan) -> list[str]:
    lines = ["", "tokens a sample, about (media exactly, for clips of 10 s, of 60 s in avqa):"]
    cells = [f"{task} {tokens}" for task, tokens in result.tokens.items()]
    for start in range(0, len(cells), 7):
        lines.append("  " + "  ".join(cells[start : start + 7]))
    hours = []
    for gpu, peak in PEAK.items():
        hours.append(f"{gpu} {1e5 * result.operations / (SHARE * peak) / 3600:.1f} h")
    lines.append(
        f"time: {result.operations / 1e12:.1f} TFLOPs a sample of the mean length in the LM, "
        f"without encoders and decoding; 100,000 samples at {SHARE:.0%} of a GPU's peak: "
        + ", ".join(hours)
    )
    return lines


def cost_lines(result: Plan) -> list[str]:
    lines = []
    for name, cost in result.patches.items():
        lines.append(
            f"patch for {name}: {cost.parameters:,} parameters, {cost.operations / 1e12:.3f} "
            f"TFLOPs for the longest sample, {cost.parameters / result.frozen:.2%} and "
            f"{cost.operations / result.base_operations:.2%} of the base"
        )
    if result.patches:
        lines.append(
            f"the frozen base: {result.frozen:,} parameters, "
            f"{result.base_operations / 1e12:.3f} TFLOPs for the longest sample"
        )
    if result.whole_qformers:
        fewer = 1 - result.trained / result.whole_qformers
        lines.append(
            f"a Q-Former per modality, trained whole, would be {result.whole_qformers:,} "
            f"parameters; trained here: {result.trained:,}, {fewer:.1%} fewer"
        )
    return lines


def memory_lines(result: Plan) -> list[str]:
    longest = max(result.tokens.values())
    checkpointing = "on" if result.checkpointing else "off"
    rows = {
        "frozen weights": [memory.frozen for memory in result.memory.values()],
        "adapter and trained weights": [memory.trained for memory in result.memory.values()],
        "gradients": [memory.gradients for memory in result.memory.values()],
        "optimizer (AdamW)": [memory.optimizer for memory in result.memory.values()],
        "activations": [memory.activations for memory in result.memory.values()],
        "training, together": [memory.training for memory in result.memory.values()],
        f"evaluation, {result.eval_rows} samples": [
            memory.evaluation for memory in result.memory.values()
        ],
    }
    lines = [
        "",
        f"memory in GB, {result.batch_size} samples of {longest} tokens a step, gradient "
        f"checkpointing {checkpointing}:",
        f"  {'':<30}" + "".join(f"{name:>12}" for name in result.memory),
    ]
    for title, values in rows.items():
        lines.append(f"  {title:<30}" + "".join(f"{value / 1e9:>12.2f}" for value in values))
    for gpu in GPUS:
        answers = ["yes" if memory.fits(gpu) else "no" for memory in result.memory.values()]
        lines.append(f"  {f'fits {gpu} GB':<30}" + "".join(f"{answer:>12}" for answer in answers))
    return lines
