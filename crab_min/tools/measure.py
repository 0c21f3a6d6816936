"""Memory and operations of a model, for plan.py.

They are measured on tensors without values.

A model without weights (backbones/empty.py) cannot run on the meta device, since attention chooses
its kernel by device. Inside of a FakeTensorMode `fill` therefore gives it CPU tensors that have
shapes and no values. The code that trains runs on them in a second, whatever the size.

Shapes: B samples, L tokens of a prompt with its answer, D width of the LM, V words.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from crab_min.config import Settings
from crab_min.encoders import MediaFeatures
from crab_min.evaluation.answering import BATCH_SIZE, DEFAULT_LIMIT, RANKED_TOGETHER
from crab_min.evaluation.budget import TokenBudget
from crab_min.features import ENCODED_TOGETHER
from crab_min.masks import MASK_TOKEN_COUNT
from crab_min.model import AVLanguageModel, index_by_kind
from crab_min.runs.processes import stack_layers, stacks

ANSWER = 80  # tokens of a reasoned answer, about


@dataclass
class Prompt:
    """A prompt.

    Attributes:
        tokens: of it and an answer.
        media: their features.
        raw: what the encoders take, of one medium per kind: kind -> (array, seconds).
    """

    tokens: int
    media: list[MediaFeatures]
    raw: dict[str, tuple] = field(default_factory=dict)


# --- tensors without values ----------------------------------------------------------------------


def fill(model: AVLanguageModel) -> None:
    """Replace the meta tensors of a model, inside of a FakeTensorMode.

    What is tied stays tied.
    """
    filled: dict[nn.Parameter, nn.Parameter] = {}
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


# --- the LM --------------------------------------------------------------------------------------


def lm_stacks(model: AVLanguageModel) -> list[nn.Module]:
    """Return the LM's decoder, and before it its encoder if it has one."""
    return stacks(model.base_lm)


def lm_layers(model: AVLanguageModel) -> list[nn.ModuleList]:
    """Return the layers of each stack."""
    return [stack_layers(stack) for stack in lm_stacks(model)]


def lm_linears(model: AVLanguageModel) -> list[nn.Linear]:
    """Return the frozen linears of the LM's layers."""
    linears = []
    for stack in lm_stacks(model):
        for name, module in stack.named_modules():
            if isinstance(module, nn.Linear) and "lora_" not in name:
                linears.append(module)
    return linears


def lm_width(model: AVLanguageModel) -> int:
    """Return D."""
    return model.llm.get_input_embeddings().weight.shape[1]


def lm_dtype(model: AVLanguageModel) -> torch.dtype:
    """Return the precision of the LM's weights."""
    return model.llm.get_input_embeddings().weight.dtype


def lm_loss(model: AVLanguageModel, rows: int, length: int) -> Tensor:
    """Run the LM, and the loss on ANSWER tokens of each row, as token_losses does."""
    lm = model.base_lm
    x = torch.zeros(rows, length, lm_width(model), dtype=lm_dtype(model), requires_grad=True)
    labels = torch.zeros(rows, ANSWER, dtype=torch.long)
    if lm.config.is_encoder_decoder:
        mask = torch.ones(rows, length, dtype=torch.long)
        return lm(inputs_embeds=x, attention_mask=mask, labels=labels, use_cache=False).loss

    (decoder,) = lm_stacks(model)
    mask = attention_mask(decoder, rows, length, x.dtype)
    hidden = decoder(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
    logits = lm.get_output_embeddings()(hidden[:, -ANSWER - 1 :])  # (B, ANSWER + 1, V)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten())


def attention_mask(decoder: nn.Module, rows: int, length: int, dtype: torch.dtype) -> Tensor:
    """Return a whole mask (B, 1, L, L); transformers looks at the values of one that is (B, L)."""
    adds_mask = decoder.config._attn_implementation == "eager"  # to its logits
    return torch.zeros(rows, 1, length, length, dtype=dtype if adds_mask else torch.bool)


def measure_layer(model: AVLanguageModel, measure: Callable[[], int]) -> tuple[int, int]:
    """Measure something of the LM with one layer and with two.

    Returns:
        what it would be without layers, and what each layer adds.
    """
    values = []
    for count in (1, 2):
        with first_layers(model, count):
            values.append(measure())
    layer = values[1] - values[0]
    return values[0] - layer, layer


@contextmanager
def first_layers(model: AVLanguageModel, count: int) -> Iterator[None]:
    """Take all layers but the first ones out of the LM."""
    lists = lm_layers(model)
    whole = [list(layers) for layers in lists]
    for layers in lists:
        del layers[count:]
    try:
        yield
    finally:
        for layers, all_layers in zip(lists, whole):
            layers.extend(all_layers[count:])


# --- memory --------------------------------------------------------------------------------------


def bytes_kept(model: nn.Module, forward: Callable, bf16: bool) -> int:
    """Count what a forward keeps for its backward pass; parameters are not counted.

    Args:
        bf16: matrix products in bfloat16, as trainer.backward computes them on a GPU.
    """
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # by their number

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    hooks = saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def activation_bytes(model: AVLanguageModel, settings: Settings, prompt: Prompt) -> int:
    """Count what a training step on such prompts keeps for its backward pass.

    Nothing is derived from the architecture: the code that trains runs, and hooks see each tensor
    that autograd keeps. Counted are the LM, what makes tokens of features (connectors, patches,
    modalities), and the mask decoder. Frozen encoders keep nothing.
    """
    batch, bf16 = settings.training.batch_size, settings.training.bf16
    model.train()
    if settings.sequential:  # one modality learns in an update; the video has most tokens
        for name in settings.side_channels:
            model.trainable_modules()[f"modality_{name}"].requires_grad_(False)
    total = lm_activation_bytes(model, settings, prompt.tokens)

    # tokens of one row, and of two: what is kept of weights is kept once
    def tokens(rows: int) -> list[Tensor]:
        return model.tokens(rows * prompt.media, rows * index_by_kind(prompt.media))

    one = bytes_kept(model, lambda: tokens(1), bf16)
    two = bytes_kept(model, lambda: tokens(2), bf16)
    total += one + (batch - 1) * (two - one)

    # masks, one per row, where the prompt has an image
    images = [medium for medium in prompt.media if medium.scales]
    if images:
        states = torch.zeros(batch, MASK_TOKEN_COUNT, lm_width(model))  # (B, tokens, D)
        features = [scale.expand(batch, -1, -1) for scale in images[-1].scales]  # (B, S, W) each
        total += bytes_kept(model, lambda: model.mask_branch(states, features), bf16=False)
    return total


def lm_activation_bytes(model: AVLanguageModel, settings: Settings, length: int) -> int:
    """Count what the LM keeps of a batch.

    It runs with one layer and with two; every layer keeps as much. With gradient checkpointing
    there are the inputs of all layers, and the rest of one at a time.

    Args:
        length: tokens of each row.
    """
    training = settings.training

    def loss() -> Tensor:
        return lm_loss(model, training.batch_size, length)

    rest, layer = measure_layer(model, lambda: bytes_kept(model, loss, training.bf16))
    depth = len(lm_layers(model)[0])
    if not training.gradient_checkpointing:
        return rest + depth * layer
    inputs = training.batch_size * length * lm_width(model) * lm_dtype(model).itemsize
    return rest + layer + depth * inputs


def encoding_bytes(model: AVLanguageModel, settings: Settings, prompt: Prompt) -> int:
    """Count what frozen encoders and connectors hold at the widest moment, beside the weights.

    Encoders take ENCODED_TOGETHER media at once. Those that run in `tokens` take all media of a
    batch, of training or of evaluation. A side channel takes no more than its video.
    """
    in_bf16 = lm_dtype(model) == torch.bfloat16
    peaks = [0]
    if not model.encodes_in_tokens:
        for kind, (array, seconds) in prompt.raw.items():
            media = ENCODED_TOGETHER * [array]
            if kind == "audio":  # equal sounds are encoded once, so make these differ
                media = [[wave + i for wave in waves] for i, waves in enumerate(media)]
            encode = partial(model.encode, kind, media, ENCODED_TOGETHER * [seconds])
            peaks.append(peak_bytes(model, encode, in_bf16))

    together = answered_together(settings, prompt.tokens - ANSWER)
    rows = max(settings.training.batch_size, together)

    @torch.no_grad()
    def tokens() -> None:
        model.tokens(rows * prompt.media, rows * index_by_kind(prompt.media))

    return max(*peaks, peak_bytes(model, tokens, in_bf16))


def cache_bytes(model: AVLanguageModel) -> int:
    """Compute the bytes of the keys and values of one token in all layers of the LM."""
    config = model.base_lm.config.get_text_config()
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_width = getattr(config, "head_dim", None) or lm_width(model) // config.num_attention_heads
    return 2 * len(lm_layers(model)[-1]) * kv_heads * head_width * lm_dtype(model).itemsize


def answered_together(settings: Settings, prompt_tokens: int) -> int:
    """Return how many prompts of so many tokens evaluation answers together.

    An answer has DEFAULT_LIMIT tokens, an option that is ranked ANSWER.
    """
    ranks = settings.run.eval_mode == "rank"
    most = RANKED_TOGETHER if ranks else BATCH_SIZE
    tokens = prompt_tokens + (ANSWER if ranks else DEFAULT_LIMIT)
    return TokenBudget(settings.run.eval_batch_tokens).rows(most * [tokens], most)


def evaluation_bytes(model: AVLanguageModel, settings: Settings, prompt: Prompt) -> int:
    """Count what evaluation takes beside the weights for a batch of such prompts.

    The LM reads the prompts with one layer and with two: each layer adds its keys and values to
    what there is at the widest moment. Answers of DEFAULT_LIMIT tokens add theirs.
    """
    length = prompt.tokens - ANSWER
    rows = answered_together(settings, length)

    @torch.no_grad()
    def answer() -> None:
        if settings.run.eval_mode == "rank":
            lm_loss(model, rows, prompt.tokens)
        else:
            read_prompts(model, rows, length)

    in_bf16 = lm_dtype(model) == torch.bfloat16
    rest, layer = measure_layer(model, lambda: peak_bytes(model, answer, in_bf16))
    depth = len(lm_layers(model)[0])
    if settings.run.eval_mode == "rank":
        return rest + depth * layer
    cached = DEFAULT_LIMIT  # tokens whose keys and values that forward pass does not make
    if model.base_lm.config.is_encoder_decoder:
        cached += length  # those of the prompt, for the decoder's cross-attention
    return rest + depth * layer + rows * cached * cache_bytes(model)


def read_prompts(model: AVLanguageModel, rows: int, length: int) -> None:
    """Run the LM on prompts and keep the logits of their last tokens, as `generate` begins."""
    lm = model.base_lm
    x = torch.zeros(rows, length, lm_width(model), dtype=lm_dtype(model))
    if lm.config.is_encoder_decoder:
        lm.encoder(inputs_embeds=x, attention_mask=torch.ones(rows, length, dtype=torch.long))
        return
    (decoder,) = lm_stacks(model)
    mask = attention_mask(decoder, rows, length, x.dtype)
    output = decoder(inputs_embeds=x, attention_mask=mask, use_cache=True)
    lm.get_output_embeddings()(output.last_hidden_state[:, -1:])  # (B, 1, V)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make, as long as they are there.

    Args:
        others: tensors that do not count.
    """

    def __init__(self, others: Iterable[Tensor]):
        super().__init__()
        self.current = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in others}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed; views share one."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.current += size
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        """Forget a storage that was freed."""
        self.known.discard(key)
        self.current -= size


def peak_bytes(model: nn.Module, forward: Callable, bf16: bool) -> int:
    """Count the most bytes that a forward holds at once, beside the model.

    Args:
        bf16: matrix products in bfloat16, as a GPU computes them.
    """
    in_bf16 = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live, in_bf16:
        forward()
    return live.peak


# --- operations ----------------------------------------------------------------------------------


def operations_of(forward: Callable) -> int:
    """Count the operations of a forward, two for a product and its sum.

    Attention runs as plain products, since not every kernel of it is counted.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward()
    return counter.get_total_flops()


def lm_operations(model: AVLanguageModel, length: int) -> int:
    """Count the operations of the LM on a row of `length` tokens."""

    def loss() -> Tensor:
        return lm_loss(model, 1, length)

    rest, layer = measure_layer(model, lambda: operations_of(loss))
    return rest + len(lm_layers(model)[0]) * layer


def token_operations(model: AVLanguageModel, media: list[MediaFeatures], sides: list[str]) -> int:
    """Count the operations that make tokens of media.

    Of their side channels those in `sides` count.
    """
    chosen = []
    for medium in media:
        kept = {name: side for name, side in medium.sides.items() if name in sides}
        chosen.append(replace(medium, sides=kept))
    return operations_of(lambda: model.tokens(chosen, index_by_kind(chosen)))
