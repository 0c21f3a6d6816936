"""The composed backbone with Crab's mask decoder (2503.13068).

Answers end in mask tokens. The LM's states that predict these tokens, and two layers of the vision
encoder for the image, become the mask (masks.py). The loss is the mean cross-entropy of the answer
tokens plus the mean loss of the masks, L_txt + L_mask.

Where only the decoder learns, the LM computes the same for an answer each time.
`cache_answer_states` keeps that, and training then runs without the LM.

Shapes: B samples, S scales, M mask tokens per scale, D LM width, W encoder width, C channels of a
mask: 1, or 71 classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crab_min.answers import MASK_TOKENS
from crab_min.backbones.composed import CRAB_TOKENS, ComposedModel
from crab_min.config import MaskDecoderConfig
from crab_min.encoders import MediaFeatures
from crab_min.interface import FRAME
from crab_min.masks import MaskBranch, MaskConfig, loss_of_masks
from crab_min.model import NO_LABEL, Batch, cross_entropy


@dataclass
class AnswerStates:
    """The states of a frozen LM at one answer, on which the mask decoder is trained."""

    mask_states: Tensor | None  # (S M, D) that predict the mask tokens; None without these
    states: Tensor  # (n, D) that predict n of its tokens
    labels: Tensor  # (n,) these tokens


class MaskingModel(ComposedModel):
    """A composed model whose answers can hold a mask."""

    predicts_masks = True
    mask_branch: MaskBranch
    mask_config: MaskDecoderConfig
    mask_token_ids: list[int]
    cached_states: dict[str, AnswerStates]  # by sample; where there are any, the LM does not run

    def add_mask_decoder(self, config: MaskDecoderConfig) -> None:
        """Add mask tokens to the vocabulary, and a new decoder; before any adapter."""
        self.tokenizer.add_tokens(list(CRAB_TOKENS), special_tokens=True)  # their ids come first
        self.tokenizer.add_tokens(list(MASK_TOKENS))
        self.mask_token_ids = self.tokenizer.convert_tokens_to_ids(list(MASK_TOKENS))
        sizes = MaskConfig(
            width_in=self.vision.width,
            width_out=self.llm.config.hidden_size,
            width=config.width,
            heads=config.heads,
            queries=config.queries,
            feedforward=8 * config.width,
            chained=config.chained,
            low=self.frame_size // 2,
            size=self.frame_size,
        )
        self.mask_branch = MaskBranch(sizes, self.llm, self.mask_token_ids[0])
        self.mask_branch.requires_grad_(False)
        self.mask_config = config
        self.cached_states = {}

    def layers_of_tokens(self) -> list[nn.Module]:
        return [self.llm.get_input_embeddings().words, self.llm.get_output_embeddings().head]

    @property
    def stop_ids(self) -> list[int]:
        """Return the token ids that end an answer: the end and the last mask token."""
        return [self.eos_id, self.mask_token_ids[-1]]

    def answer_ids(self, text: str) -> list[int]:
        """Return the token ids of an answer. The last mask token needs no end behind it."""
        ids = self.encode_text(text)
        if ids and ids[-1] == self.mask_token_ids[-1]:
            return ids
        return [*ids, self.eos_id]

    # --- media
    @property
    def mask_layers(self) -> list[int]:
        """Return the vision layers that the decoder takes: 14 and 22 of CLIP-L's 24."""
        depth = self.vision.model.config.num_hidden_layers
        return [round(depth * 14 / 24), round(depth * 22 / 24)]

    @torch.no_grad()
    def encode(
        self, kind: str, media: list, seconds: list[float] | None = None
    ) -> list[MediaFeatures]:
        """Encode several media of one kind; images also for the mask decoder."""
        if kind != "image":
            return super().encode(kind, media, seconds)
        frames = torch.stack([torch.as_tensor(medium) for medium in media])  # (M, 1, H, W, 3)
        features, *scales = self.vision.hidden(frames, [self.vision.layer, *self.mask_layers])
        encoded = []
        for i in range(len(media)):
            layers = [scale[i, 0] for scale in scales]  # (S, W) each
            encoded.append(MediaFeatures(kind, features[i], scales=layers))
        return encoded

    # --- the loss
    def forward(self, batch: Batch) -> Tensor:
        """Compute (L_txt + L_mask) times the answer tokens, by which the caller divides."""
        gold = {row: mask for row, mask in enumerate(batch.masks) if mask is not None}
        if not gold:
            return super().forward(batch)

        # the text, and the states that become masks
        if self.cached_states:
            text_loss, states = self.cached_loss_and_states(batch)
        else:
            losses, _, states = self.token_losses_and_states(batch)
            text_loss = losses.sum() / batch.answer_tokens

        # the masks; classes instead of one mask are long
        semantic = [mask is not None and mask.dtype == torch.long for mask in batch.masks]
        logits = self.mask_logits(batch, states, semantic)
        weights = self.mask_config
        masks_loss = loss_of_masks(logits, gold, weights.bce, weights.dice)
        return batch.answer_tokens * (text_loss + masks_loss)

    def token_losses_and_states(self, batch: Batch) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Run the LM: losses of the answer tokens, and its last states.

        Returns:
            losses (B, n) at the places of the longest answer, 0 where there is no answer token;
            states (B, n + 1, D) at these places and at the one before them; and row -> the states
            (S M, D) that predict its mask tokens, if it has all.
        """
        last = batch.longest_answer + 1
        output = self.base_lm.get_decoder()(
            inputs_embeds=self.embed(batch), attention_mask=batch.attention, use_cache=False
        )
        states = output.last_hidden_state[:, -last:]
        logits = self.llm.get_output_embeddings()(states)
        mask_states = self.mask_branch.find(batch.ids[:, -last:], states)
        return cross_entropy(logits, batch.labels), states, mask_states

    def cached_loss_and_states(self, batch: Batch) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the loss of cached answer tokens, and the cached mask states by row."""
        cached = [self.cached_states[key] for key in batch.keys]
        states = torch.cat([answer.states for answer in cached])  # (all n, D)
        labels = torch.cat([answer.labels for answer in cached])  # (all n,)
        logits = self.llm.get_output_embeddings()(states).float()  # (all n, V)
        mask_states = {}
        for row, answer in enumerate(cached):
            if answer.mask_states is not None:
                mask_states[row] = answer.mask_states
        return F.cross_entropy(logits, labels), mask_states

    def mask_logits(
        self, batch: Batch, states: dict[int, Tensor], semantic: list[bool]
    ) -> dict[int, Tensor]:
        """Decode the masks of rows that have states and an image.

        Args:
            states: row -> states of its mask tokens (S M, D).
            semantic: which rows of the batch want classes instead of one mask.

        Returns:
            row -> logits (C, size, size).
        """
        images = self.last_images(batch)
        logits: dict[int, Tensor] = {}
        for wanted in (False, True):
            rows = [row for row in states if row in images and semantic[row] == wanted]
            if not rows:
                continue
            stacked = torch.stack([states[row] for row in rows])  # (n, S M, D)
            layers = []
            for scale in zip(*[images[row].scales for row in rows]):
                layers.append(torch.stack([x.to(self.device).float() for x in scale]))  # (n, S, W)
            logits |= zip(rows, self.mask_branch(stacked, layers, wanted))
        return logits

    def last_images(self, batch: Batch) -> dict[int, MediaFeatures]:
        """Return the last image of each row that has one."""
        images = {}
        media = iter(batch.media)
        for row, count in enumerate(batch.media_counts):
            for _ in range(count):
                medium = next(media)
                medium = medium.sides.get(FRAME, medium)
                if medium.scales:
                    images[row] = medium
        return images

    @torch.no_grad()
    def predict_masks(self, batch: Batch, semantic: list[bool]) -> list[Tensor | None]:
        """Predict the mask (C, size, size), in [0, 1], of each row of a batch.

        Args:
            batch: collated with the answers that the model gave.
            semantic: which rows want classes instead of one mask.

        Returns:
            None for a row whose answer has not all mask tokens.
        """
        with self.inference_autocast():
            _, _, states = self.token_losses_and_states(batch)
        logits = self.mask_logits(batch, states, semantic)
        masks: list[Tensor | None] = [None] * batch.rows
        for row, row_logits in logits.items():
            masks[row] = row_logits.softmax(0) if semantic[row] else row_logits.sigmoid()
        return masks

    # --- training without the LM
    @torch.no_grad()
    def cache_answer_states(self, batch: Batch, text_tokens: int = 16) -> None:
        """Keep what the LM makes of each answer of a batch, by `batch.keys`.

        Args:
            text_tokens: of the other tokens of an answer so many are kept, evenly spread. Only the
                output rows of the mask tokens can still learn from them.
        """
        with self.inference_autocast():
            _, states, mask_states = self.token_losses_and_states(batch)
        labels = batch.labels[:, -states.shape[1] :]
        for row, key in enumerate(batch.keys):
            places = (labels[row] != NO_LABEL).nonzero().flatten()
            is_mask_token = torch.isin(labels[row][places], self.mask_branch.ids)
            text = places[~is_mask_token]
            spread = torch.linspace(
                0, len(text) - 1, min(text_tokens, len(text)), device=self.device
            )
            kept = torch.cat([text[spread.long()], places[is_mask_token]])
            self.cached_states[key] = AnswerStates(
                mask_states.get(row), states[row][kept - 1].clone(), labels[row][kept]
            )

    def calibrate_masks(self) -> None:
        """Let the decoder take states centred and scaled, by the cached ones."""
        answers = self.cached_states.values()
        states = [answer.mask_states for answer in answers if answer.mask_states is not None]
        self.mask_branch.calibrate(torch.stack(states))

    # --- what is trained
    def trainable_modules(self) -> dict[str, nn.Module]:
        modules = super().trainable_modules()
        # the LM's own rows, without those of the mask tokens
        modules["embeddings"], modules["head"] = self.layers_of_tokens()
        return modules | {"mask_decoder": self.mask_branch}

    def trainable_names(self) -> list[str]:
        return [*super().trainable_names(), "mask_tokens"]

    def set_trainable(self, parts: list[str]) -> None:
        """Choose what learns, also "mask_decoder" and "mask_tokens".

        The decoder is all of the branch but the input embeddings of the mask tokens
        ("mask_tokens"). Without these no gradient passes the LM.
        """
        super().set_trainable(parts)
        self.mask_branch.read.requires_grad_("mask_tokens" in parts)
