"""An audio-visual LM: media tokens in the prompt of a Hugging Face LM, an adapter.

    media   -> encode  -> features      a frozen encoder; kept or computed anew
    prompts -> collate -> Batch         token ids with a placeholder for each media token
    Batch   -> embed   -> embeddings    media tokens take the place of the placeholders
            -> LM      -> loss | text

Only the adapter is trained (I-LoRA of Crab, 2503.13068, and Crab+, 2603.04128, or LoRA), and other
parts where they are asked for. The LM is not modified: tokens go in through `inputs_embeds`, and
answers come from its own `generate`. How media become features and tokens is what the backbones
(backbones/) differ in.

Shapes: B samples, L length, D width of the LM, V words, T frames or sound segments.

Page of the course: docs/course/00_one_clip.md.
"""

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedTokenizerFast

from crab_min import trained_parts
from crab_min.config import AdapterConfig
from crab_min.devices import bf16_autocast
from crab_min.encoders import MediaFeatures, attach_sides
from crab_min.errors import ModelError
from crab_min.ilora import ILoraConfig
from crab_min.interface import PromptLayout, PromptPart
from crab_min.trained_parts import SavedPart

# PEFT calls a method that transformers has deprecated; a user cannot change that
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")

ASSETS = Path(__file__).parent / "assets"
# the linears of every layer of the LM, seven in Llama and Qwen2.5
LLM_LINEARS = r"model\.(language_model\.)?layers\.\d+\.(self_attn\.\w+_proj|mlp\.(\w+\.)*\w+_proj)"
NO_LABEL = -100  # of tokens that are not learned, as in transformers


@dataclass
class MediaTokens:
    """Token ids that stand in a prompt for one kind of medium."""

    before: list[int]
    placeholder: int  # once for each token of the medium
    after: list[int]


@dataclass
class Batch:
    """A batch of samples as the LM takes them, padded on the left."""

    ids: Tensor  # (B, L)
    attention: Tensor  # (B, L), 0 for padding
    # (B, L) the answers' ids, NO_LABEL elsewhere; of an LM with an encoder (B, longest answer)
    labels: Tensor
    media: list[MediaFeatures]  # of all rows, in reading order
    media_counts: list[int]  # media of each row
    # of each medium: 0 for the first of its kind in its prompt, 1 for the second, ...
    media_index: list[int]

    # where masks learn: the ids of the samples, and their gold masks (1, H, W), 0. and 1., or
    # classes (long); None for a row without one
    keys: list[str] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Return the number of samples."""
        return len(self.ids)

    @property
    def padded_tokens(self) -> int:
        """Return the number of tokens that the LM computes on, padding included."""
        return self.ids.numel()

    @property
    def answer_tokens(self) -> int:
        """Return the number of tokens that are learned."""
        return int((self.labels != NO_LABEL).sum())

    @property
    def longest_answer(self) -> int:
        """Return the number of learned tokens of the row that has most."""
        return int((self.labels != NO_LABEL).sum(1).max())


class AVLanguageModel(nn.Module):
    """Encoders and an LM; each backbone is a subclass.

    A subclass defines `frame_size`, `encode`, `token_count` and `tokens`, what its LM takes beside
    the embeddings (`extra_lm_inputs`), and what of it can be trained (`trainable_modules`).

    Args:
        llm: a transformers LM; PEFT wraps it once it has an adapter.
        media_tokens: the token ids of each kind of medium that may stand in a prompt.
        bos_ids: token ids that begin every prompt.
        eos_id: the token that ends an answer.
        layout: text before and after every prompt.
    """

    frame_size: int  # pixels per side of the square frames that it takes
    connectors: tuple[str, ...] = ()  # the trainable modules between encoders and LM
    predicts_masks = False
    encodes_in_tokens = False  # `encode` prepares media, and the encoders run in `tokens`
    bf16 = True  # autocast on a GPU, as in training (devices.py)
    is_sharded = False  # processes share the LM's layers (processes.shard) and run it together

    def __init__(
        self,
        llm: nn.Module,
        tokenizer: PreTrainedTokenizerFast,
        media_tokens: dict[str, MediaTokens],
        bos_ids: list[int],
        eos_id: int,
        layout: PromptLayout,
    ):
        super().__init__()
        self.llm = llm
        # a hub's defaults of generation, such as a penalty on repetitions, are not taken
        llm.generation_config = GenerationConfig.from_model_config(llm.config)
        self.tokenizer = tokenizer
        self.media_tokens = media_tokens
        self.bos_ids = bos_ids
        self.eos_id = eos_id
        self.layout = layout
        self.loaded_parts: set[str] = set()  # those that came from a run folder

    @property
    def device(self) -> torch.device:
        return self.llm.get_input_embeddings().weight.device

    @property
    def base_lm(self) -> nn.Module:
        """Return the LM without PEFT's wrapper; an adapter stays inside."""
        return self.llm.get_base_model() if isinstance(self.llm, PeftModel) else self.llm

    @property
    def stop_ids(self) -> list[int]:
        """Return the token ids after which an answer ends."""
        return [self.eos_id]

    def inference_autocast(self) -> torch.autocast:
        """Return the precision in which the model encodes, generates and scores."""
        return bf16_autocast(self.device, self.bf16 and self.device.type == "cuda")

    def use_layout(self, layout: PromptLayout) -> None:
        """Take the layout of a run, before its trained parts are loaded."""
        self.layout = layout

    # --- what a backbone defines
    def encode(self, kind: str, media: list, seconds: list[float]) -> list[MediaFeatures]:
        """Encode several media of one kind. Encoders are frozen: the result can be kept.

        Args:
            kind: "video", "image" or "audio".
            media: frames (T, H, W, 3) uint8 each, all of the same shape, or T waves (N,) each.
            seconds: length of each medium.
        """
        raise NotImplementedError

    def token_count(self, medium: MediaFeatures) -> int:
        """Return the number of tokens of a medium in the prompt."""
        raise NotImplementedError

    def tokens(self, media: list[MediaFeatures], media_index: list[int]) -> list[Tensor]:
        """Compute the tokens (token_count, D) of each medium.

        Args:
            media_index: for each medium whether it is the first (0), second (1) ... of its kind.
        """
        raise NotImplementedError

    def extra_lm_inputs(self, batch: Batch) -> dict:
        """Return what the LM takes beside `inputs_embeds` and `attention_mask`."""
        return {}

    def logits(self, batch: Batch, last: int) -> Tensor:
        """Compute the logits (B, last, V) at the last positions alone."""
        output = self.llm(
            inputs_embeds=self.embed(batch),
            attention_mask=batch.attention,
            logits_to_keep=last,
            use_cache=False,
        )
        return output.logits

    # --- from prompts to batches
    def collate(
        self,
        prompts: list[list[PromptPart]],
        media: list[list[MediaFeatures]],
        targets: list[str] | None = None,
    ) -> Batch:
        """Make a batch of prompts, their media and, in training, their answers.

        Args:
            prompts: the parts of each sample (interface.build_prompt).
            media: the features of the media parts of each sample, in order.
            targets: the answers that are learned; None to generate.
        """
        # side channels leave the prompts: they have no tokens of their own
        samples = [self.arrange(parts, list(features)) for parts, features in zip(prompts, media)]
        media = [features for _, features in samples]

        # token ids: the prompt, then the answer, which alone is learned
        limit = getattr(self.base_lm.config.get_text_config(), "max_position_embeddings", None)
        rows, labels = [], []
        for number, (parts, features) in enumerate(samples):
            prompt = self.prompt_ids(parts, features)
            answer = self.answer_ids(targets[number]) if targets else []
            rows.append(prompt + answer)
            labels.append([NO_LABEL] * len(prompt) + answer)
            if limit and len(rows[-1]) > limit:
                files = ", ".join(part.path for part in parts if part.path)
                raise ModelError(
                    f"a prompt and answer of {len(rows[-1])} tokens, the LM takes {limit}; ask "
                    f"for fewer frames or a part of {files or 'the text'}"
                )

        # left padding, so that every prompt or answer ends at the end of its row
        return Batch(
            ids=self.pad_left(rows, self.tokenizer.pad_token_id),
            attention=self.pad_left([[1] * len(row) for row in rows], 0),
            labels=self.pad_left(labels, NO_LABEL),
            media=[medium for features in media for medium in features],
            media_counts=[len(features) for features in media],
            media_index=[index for features in media for index in index_by_kind(features)],
        )

    def arrange(
        self, parts: list[PromptPart], media: list[MediaFeatures]
    ) -> tuple[list[PromptPart], list[MediaFeatures]]:
        """Return the parts and the media of a prompt as the LM is shown them.

        Each side channel is taken out and attached to the video before it; of several parts with
        one name the steps are interleaved.
        """
        media_parts = [part for part in parts if part.kind != "text"]
        in_prompt: list[MediaFeatures] = []
        views: list[dict[str, list[MediaFeatures]]] = []  # of each medium, by side channel
        for part, features in zip(media_parts, media):
            if part.side:
                views[-1].setdefault(part.side, []).append(features)
            else:
                in_prompt.append(features)
                views.append({})
        with_sides = [attach_sides(medium, own) for medium, own in zip(in_prompt, views)]
        return [part for part in parts if not part.side], with_sides

    def prompt_length(self, parts: list[PromptPart], media: list[MediaFeatures]) -> int:
        """Return the number of tokens of a prompt, given what `collate` takes."""
        return len(self.prompt_ids(*self.arrange(parts, list(media))))

    def row_length(self, parts: list[PromptPart], media: list[MediaFeatures], answer: str) -> int:
        """Return the number of tokens of a prompt with its answer."""
        return self.prompt_length(parts, media) + len(self.answer_ids(answer))

    def prompt_ids(self, parts: list[PromptPart], media: list[MediaFeatures]) -> list[int]:
        """Return the token ids of a prompt, with placeholders for its media."""
        system = next((part.text for part in parts if part.role == "system"), "")
        ids = [*self.bos_ids, *self.opening_ids(system)]
        after = self.encode_layout(self.layout.after)
        longest = max(0, self.layout.text_tokens - len(after)) or None
        remaining = iter(media)
        for part in parts:
            if part.role == "assistant":  # an answer given before, and the next question's opening
                ids += after + self.answer_ids(part.text)
                ids += self.encode_layout(self.layout.turn or "")
            elif part.role == "system":
                continue
            elif part.kind == "text":
                ids += self.encode_text(part.text)[:longest]
            elif part.kind not in self.media_tokens:
                raise ModelError(
                    f"{part.kind}: not in a prompt of this model, which takes "
                    f"{', '.join(self.media_tokens)}. Train a pave or crema preset, in which sound "
                    "is a side channel of the video, or take another --backbone"
                )
            else:
                ids += self.placeholder_ids(next(remaining))
        return ids + after

    def opening_ids(self, system: str) -> list[int]:
        """Return the token ids before a prompt, with a system text of its own if it has one."""
        layout = self.layout
        if not system:
            return self.encode_layout(layout.before)
        if not layout.system:  # the template has none: it is the first line of the prompt
            return [*self.encode_layout(layout.before), *self.encode_text(system + "\n")]
        before, after = layout.before.split(layout.system)
        ids = [*self.encode_layout(before), *self.encode_text(system)]
        return ids + self.encode_layout(after)

    def placeholder_ids(self, medium: MediaFeatures) -> list[int]:
        """Return the token ids that stand in a prompt for a medium."""
        marks = self.media_tokens[medium.kind]
        placeholders = [marks.placeholder] * self.token_count(medium)
        return [*marks.before, *placeholders, *marks.after]

    def answer_ids(self, text: str) -> list[int]:
        """Return the token ids of an answer and its end."""
        return [*self.encode_text(text), self.eos_id]

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text, in which special tokens are but text."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_layout(self, text: str) -> list[int]:
        """Return the token ids of a text of the layout, whose special tokens are meant."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def pad_left(self, rows: list[list[int]], value: int) -> Tensor:
        """Return rows of unequal length as one tensor (B, L)."""
        longest = max(len(row) for row in rows)
        padded = [[value] * (longest - len(row)) + row for row in rows]
        return torch.tensor(padded, device=self.device)

    # --- from batches to losses and answers
    def embed(self, batch: Batch) -> Tensor:
        """Compute input embeddings (B, L, D): words, and media tokens at the placeholders."""
        placeholders = [marks.placeholder for marks in self.media_tokens.values()]
        is_placeholder = torch.isin(batch.ids, torch.tensor(placeholders, device=batch.ids.device))
        # an embedding of the placeholders is never used, and need not exist
        words = batch.ids.masked_fill(is_placeholder, 0)
        embeddings = self.llm.get_input_embeddings()(words)  # (B, L, D)
        if batch.media:
            tokens = torch.cat(self.shared_tokens(batch))  # (all placeholders, D), in reading order
            tokens = tokens.to(embeddings.dtype)
            embeddings = embeddings.masked_scatter(is_placeholder[..., None], tokens)
        return embeddings

    def shared_tokens(self, batch: Batch) -> list[Tensor]:
        """Compute the tokens of each medium of a batch, once for rows that share a clip.

        Rows often ask different questions about one clip, or try different answers to one question.
        Their features are then the same tensors in memory.
        """
        # one medium stands for all that have the same tensors and index
        keys = []
        unique: dict[tuple, tuple[MediaFeatures, int]] = {}
        for medium, index in zip(batch.media, batch.media_index):
            keys.append((index, tensor_ids(medium)))
            unique.setdefault(keys[-1], (medium, index))
        media, indices = zip(*unique.values())
        tokens = dict(zip(unique, self.tokens(list(media), list(indices))))
        return [tokens[key] for key in keys]

    def token_losses(self, batch: Batch) -> Tensor:
        """Compute the loss (B, longest answer) of each answer token, 0 for no token."""
        # answers end the rows, and each token is predicted at the place before it
        return cross_entropy(self.logits(batch, batch.longest_answer + 1), batch.labels)

    def forward(self, batch: Batch) -> Tensor:
        """Compute the loss, summed over the answer tokens of the batch."""
        return self.token_losses(batch).sum()

    @torch.no_grad()
    def generate(
        self, batch: Batch, max_new_tokens: int, streamer=None, beams: int = 1
    ) -> list[str]:
        """Answer each row: greedily, or with the best sequence of a beam search."""
        extra = self.extra_lm_inputs(batch)
        with self.inference_autocast():
            ids = self.llm.generate(
                inputs_embeds=self.embed(batch),
                attention_mask=batch.attention,
                **extra,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=beams,
                streamer=streamer,
                synced_gpus=self.is_sharded,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.stop_ids,
            )
        if "input_ids" in extra:  # an LM that is given the prompt's ids returns them too
            ids = ids[:, batch.ids.shape[1] :]
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    # --- side channels (PAVE, CREMA)
    @property
    def side_names(self) -> list[str]:
        """Return the side channels of a video that the model takes."""
        return []

    def add_side_channel(self, name: str, width: int, settings) -> None:
        """Add what reads the features, `width` wide, of a side channel.

        Raises:
            ModelError: a backbone that reads none, or a name that it cannot have.
        """
        raise ModelError(f"side channel {name}: this backbone reads none")

    def load_patch(self, file: Path | str) -> None:
        """Add the patch of a side channel from a file of a run (PAVE).

        Raises:
            ModelError: a backbone without patches, or a file that does not fit.
        """
        raise ModelError(f"{file}: this backbone takes no patches; use another backbone's run")

    # --- what is trained
    def add_adapter(self, config: AdapterConfig) -> None:
        """Freeze everything and put a new adapter on the LM."""
        self.requires_grad_(False)
        adapter = peft_config(config)
        if adapter is not None:
            self.llm = get_peft_model(self.llm, adapter)

    def trainable_modules(self) -> dict[str, nn.Module]:
        """Return what can be trained beside the adapter, by name."""
        return {"embeddings": self.llm.get_input_embeddings()}

    def trainable_names(self) -> list[str]:
        """Return the names that `set_trainable` takes."""
        names = ["adapter", "connectors", "embeddings", *self.trainable_modules()]
        return list(dict.fromkeys(names))

    def check_trainable(self, parts: list[str]) -> None:
        """Refuse a name that `set_trainable` does not take.

        Raises:
            ModelError: a name that this model does not have.
        """
        known = self.trainable_names()
        for name in parts:
            if name not in known:
                raise ModelError(
                    f"--trainable {name}: this model has no such part, but {', '.join(known)}"
                )

    def set_trainable(self, parts: list[str]) -> None:
        """Choose what learns, after the adapter and everything else has been added.

        Args:
            parts: "adapter" (without it the LM is frozen with its adapter), "connectors", or names
                of `trainable_modules`. Patches and modalities always learn.

        Raises:
            ModelError: a name that this model does not have.
        """
        self.check_trainable(parts)
        if "adapter" not in parts:
            self.llm.requires_grad_(False)
        for name, module in self.trainable_modules().items():
            is_chosen_connector = name in self.connectors and "connectors" in parts
            if name in parts or is_chosen_connector:
                module.requires_grad_(True)

    # --- files; `model.save_trained(folder)` writes what learned, the others read it
    save_trained = trained_parts.save_trained
    load_trained = trained_parts.load_trained
    restore_trained = trained_parts.restore_trained

    def parts_to_save(self) -> list[str]:
        """Return the parts that differ from the base: they learn, or were loaded."""
        names = []
        for name, module in self.trainable_modules().items():
            learns = any(parameter.requires_grad for parameter in module.parameters())
            if learns or name in self.loaded_parts:
                names.append(name)
        return names

    def part_state(self, name: str) -> dict[str, Tensor]:
        """Return the weights of a part by name. They share the model's memory."""
        return self.trainable_modules()[name].state_dict()

    def part_config(self, name: str) -> dict:
        """Return what a part's file says of it beside its weights."""
        return {}

    def prepare_part(self, part: SavedPart) -> None:
        """Make the model ready to take the weights of a part.

        Raises:
            ModelError: a part that this model does not have.
        """
        names = self.trainable_modules()
        if part.name not in names:
            raise ModelError(
                f"{part.source}: a module this model does not have: {part.name}; it has "
                f"{', '.join(names)}"
            )


def peft_config(config: AdapterConfig) -> PeftConfig | None:
    """Return the PEFT config of an adapter on all linears of the LM, or None."""
    if config.adapter == "none":
        return None
    shared = {"r": config.r, "target_modules": LLM_LINEARS}
    if config.adapter == "lora":
        return LoraConfig(lora_alpha=config.alpha, lora_dropout=config.dropout, **shared)
    return ILoraConfig(alpha=config.alpha, heads=config.heads, dropout=config.dropout, **shared)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss of each of the last n - 1 labels (B, n - 1), 0 for NO_LABEL.

    Args:
        logits: (B, n, V) at the last n positions; each predicts the label after it.
        labels: (B, L).
    """
    targets = labels[:, 1 - logits.shape[1] :]  # (B, n - 1)
    predictions = logits[:, :-1].mT.float()  # (B, V, n - 1)
    return F.cross_entropy(predictions, targets, ignore_index=NO_LABEL, reduction="none")


def index_by_kind(media: list[MediaFeatures]) -> list[int]:
    """Return for each medium of a prompt how many of its kind come before it."""
    kinds = [medium.kind for medium in media]
    return [kinds[:i].count(kind) for i, kind in enumerate(kinds)]


def tensor_ids(medium: MediaFeatures) -> tuple:
    """Return a key that two media share if they are the same tensors in memory.

    Their sides are included.
    """
    sides = [(name, id(side.features)) for name, side in sorted(medium.sides.items())]
    return id(medium.features), *sides
