"""The composed backbone: CLIP and BEATs, a Q-Former connector for each, and any Hugging Face causal LM (Crab 2503.13068, section 3.2).

Each frame and each stretch of sound passes its encoder and its Q-Former by itself and becomes a few tokens in the prompt.
One difference from Crab: optional learned codes are added to the tokens, of the frame or second they belong to (`time_steps`) and of
the first or second video, image or sound of the prompt (`numbers`). They help a small LM to say *when* and *in which*; with 0 it is Crab.

Shapes: T frames or sound segments, S encoder tokens each, W encoder width, Q queries, D width of the LM.
"""
import itertools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from crab_min.answers import MASK_TOKENS
from crab_min.encoders import ATTENTION, AudioEncoder, MediaFeatures, VisionEncoder
from crab_min.errors import ModelError
from crab_min.masks import MaskBranch, SegmentConfig, loss_of_masks
from crab_min.model import ASSETS, AVLanguageModel, cross_entropy, missing_weights
from crab_min.pave import Patches
from crab_min.qformer import QFormerConfig, QFormerConnector

PLACEHOLDERS = {"video": "<video>", "image": "<image>", "audio": "<audio>"}
SPECIALS = ("<pad>", "<s>", "</s>", *PLACEHOLDERS.values())


@dataclass
class ModelConfig:
    """What a composed model is made of; plain values, so that it travels as JSON."""
    vision: dict | str                                 # transformers config of a CLIP or SigLIP vision model, or a path or hub id
    audio: dict | str                                  # BEATs config, or the path of a published checkpoint
    visual_qformer: dict                               # queries, hidden, layers, heads, intermediate
    audio_qformer: dict
    llm: dict | str                                    # transformers config of a causal LM, or a path or hub id
    vision_layer: int = -2                             # hidden state given to the Q-Former (Crab: the one below the last)
    time_steps: int = 0                                # rows of the learned time code (0: none, as in Crab)
    numbers: int = 0                                   # rows of the learned code of the first, second ... video, image or sound of a prompt (0: none, as in Crab)
    template: list = field(default_factory=lambda: ["", "\n"])                  # text before and after the prompt


class ComposedModel(AVLanguageModel):
    """Encoders + connectors + LM."""

    def __init__(self, config: ModelConfig, tokenizer: PreTrainedTokenizerFast):
        vision, audio, llm = VisionEncoder(config.vision, config.vision_layer), AudioEncoder(config.audio), load_llm(config.llm, tokenizer)
        places = {kind: tokenizer.convert_tokens_to_ids(token) for kind, token in PLACEHOLDERS.items()}
        super().__init__(llm, tokenizer, {kind: ([], place, []) for kind, place in places.items()}, ([tokenizer.bos_token_id], tokenizer.eos_token_id),
                         config.template)
        self.config, self.vision, self.audio, self.frame_size = config, vision, audio, vision.size
        width = llm.config.hidden_size
        self.visual_qformer = QFormerConnector(QFormerConfig(vision.width, width, **config.visual_qformer))
        self.audio_qformer = QFormerConnector(QFormerConfig(audio.width, width, **config.audio_qformer))
        self.time = nn.Embedding(config.time_steps, width) if config.time_steps else None
        self.number = nn.Embedding(config.numbers, width) if config.numbers else None
        self.patches, self.patch_widths = Patches(), (self.visual_qformer.config.hidden, width)

    @torch.no_grad()
    def encode(self, kind: str, media: list, seconds: list[float] | None = None) -> list[MediaFeatures]:
        """Frozen features (T, S, W) of several media of one kind."""
        if kind == "audio":
            features = []
            for segments in media:
                x, mask = self.audio([torch.as_tensor(s) for s in segments])                     # (1, T, S, W), (1, T, S)
                features.append(MediaFeatures(kind, x[0], mask[0]))
            return features
        scales = self.mask_layers if kind == "image" else []
        x, *scales = self.vision.hidden(torch.stack([torch.as_tensor(m) for m in media]), [self.vision.layer, *scales])      # (M, T, S, W) each
        return [MediaFeatures(kind, f, scales=[scale[i, 0] for scale in scales]) for i, f in enumerate(x)]

    def count(self, media: MediaFeatures) -> int:
        return len(media.features) * (self.audio_qformer if media.kind == "audio" else self.visual_qformer).config.queries

    def tokens(self, media: list[MediaFeatures], numbers: list[int]) -> list[Tensor]:
        """Tokens (T * Q, D) of each medium: connector, plus the codes of its frame's or segment's time and of its number in its prompt."""
        tokens: list = [None] * len(media)
        for connector, kinds in ((self.visual_qformer, ("video", "image")), (self.audio_qformer, ("audio",))):
            chosen = [i for i, m in enumerate(media) if m.kind in kinds]
            if not chosen:
                continue
            lengths = [len(media[i].features) for i in chosen]
            read = connector.query_states(*padded([media[i].features for i in chosen], [media[i].mask for i in chosen], self.device))[0]             # (sum of T, Q, hidden)
            y = connector.mlp(read)                                                              # (sum of T, Q, D)
            y = coded(y, lengths, [numbers[i] for i in chosen], self.time, self.number)
            sides = [media[i].side_tokens() for i in chosen]
            patched = self.patches.add_to(y.split(lengths), read.split(lengths), sides)          # (T, Q, D) each
            for i, part in zip(chosen, patched):
                tokens[i] = part.flatten(0, 1)                                                   # (T * Q, D)
        return tokens

    # --- masks (Crab)
    @property
    def mask_layers(self) -> list[int]:
        """The hidden states of the vision encoder that the mask decoder reads: 14 and 22 of CLIP-L's 24, and the like of another depth."""
        depth = self.vision.model.config.num_hidden_layers
        return [round(depth * 14 / 24), round(depth * 22 / 24)] if self.masks else []

    def add_masks(self, config: SegmentConfig) -> None:
        """Six mask tokens behind the words of the LM, and a new decoder of the masks they stand for. Before an adapter is put on the LM."""
        self.tokenizer.add_tokens(list(MASK_TOKENS))
        first = self.tokenizer.convert_tokens_to_ids(MASK_TOKENS[0])
        self.masks = MaskBranch(config.sizes(self.vision.width, self.llm.config.hidden_size, self.frame_size), self.llm, first).requires_grad_(False)
        self.mask_weights, self.held = (config.mask_bce, config.mask_dice), {}

    def read_answers(self, batch: dict) -> tuple[Tensor, Tensor]:
        """(the cross-entropy of each answer token (B, places), 0 where there is none; the states (B, places + 1, D) there and one place before)."""
        keep = int((batch["labels"] != -100).sum(1).max()) + 1
        out = self.llm(inputs_embeds=self.embed(batch), attention_mask=batch["attention"], logits_to_keep=keep, output_hidden_states=True)
        return cross_entropy(out.logits, batch["labels"]), out.hidden_states[-1][:, -keep:]

    def mask_logits(self, batch: dict, states: dict[int, Tensor], classes: list[bool]) -> dict[int, Tensor]:
        """{row: logits (1 or 71, size, size)} for {row: states of its mask tokens (S M, D)}; each is of the last image of its row."""
        images = iter(batch["media"])
        scales = [[m.scales for m in itertools.islice(images, n) if m.scales][-1:] for n in batch["counts"]]
        found = {}
        for wanted in (False, True):
            some = [(i, state, *scales[i]) for i, state in states.items() if classes[i] == wanted and scales[i]]
            if some:
                at, state, layers = zip(*some)
                features = [torch.stack([x.to(self.device).float() for x in layer]) for layer in zip(*layers)]        # (n, S, W) each
                found |= zip(at, self.masks(torch.stack(state), features, wanted))
        return found

    def forward(self, batch: dict) -> tuple[Tensor, int]:
        """As without masks, but where the batch has gold masks their loss is added to the mean cross-entropy (L_txt + L_mask)."""
        gold = {i: mask for i, mask in enumerate(batch.get("masks", [])) if mask is not None}
        if not gold:
            return super().forward(batch)
        classes, tokens = [mask is not None and mask.dtype == torch.long for mask in batch["masks"]], int((batch["labels"] != -100).sum())
        if self.held:                                                         # of the text only where mask tokens stand can still be learned
            kept = [self.held[key] for key in batch["keys"]]
            states = {i: state for i, (state, *_) in enumerate(kept) if state is not None}
            before, said = (torch.cat(parts) for parts in list(zip(*kept))[1:])
            loss = F.cross_entropy(self.llm.get_output_embeddings()(before).float(), said)
        else:
            losses, states = self.read_answers(batch)
            loss, states = losses.sum() / tokens, self.masks.find(batch["ids"][:, -states.shape[1]:], states)
        return tokens * (loss + loss_of_masks(self.mask_logits(batch, states, classes), gold, *self.mask_weights)), tokens

    @torch.no_grad()
    def hold(self, batch: dict, keys: list, others: int = 16) -> None:
        """Keep what the LM, which is frozen and does not learn to read the mask tokens, makes of each answer: training the decoder then needs no LM.

        held: key -> (states that predict its mask tokens or None, states before these and `others` of its tokens, those tokens).
        """
        states = self.read_answers(batch)[1]
        labels, found = batch["labels"][:, -states.shape[1]:], self.masks.find(batch["ids"][:, -states.shape[1]:], states)
        for i, key in enumerate(keys):
            at = (labels[i] != -100).nonzero().flatten()
            new = torch.isin(labels[i][at], self.masks.ids)
            text = at[~new]
            at = torch.cat([text[torch.linspace(0, len(text) - 1, min(others, len(text)), device=at.device).long()], at[new]])
            self.held[key] = found.get(i), states[i][at - 1].clone(), labels[i][at]

    @torch.no_grad()
    def masks_of(self, batch: dict, classes: list[bool]) -> list[Tensor | None]:
        """The mask (1 or 71, size, size) of each answer of a batch that was collated with what the model said, in [0, 1]; None without mask tokens."""
        states = self.read_answers(batch)[1]
        found = self.mask_logits(batch, self.masks.find(batch["ids"][:, -states.shape[1]:], states), classes)
        return [(found[i].softmax(0) if classes[i] else found[i].sigmoid()) if i in found else None for i in range(len(batch["ids"]))]

    def trainable_modules(self) -> dict[str, nn.Module]:
        named = {"visual_qformer": self.visual_qformer, "audio_qformer": self.audio_qformer, "time": self.time, "number": self.number, **super().trainable_modules()}
        return {name: module for name, module in named.items() if module is not None}

    def renew(self, name: str) -> None:
        """A new random connector in the place of `name`, for a stage that aligns it from nothing."""
        setattr(self, name, QFormerConnector(getattr(self, name).config).to(self.device))

    def save_base(self, folder: Path) -> None:
        """The whole base in one folder: config.json, model.safetensors (half precision), tokenizer.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=1) + "\n")
        state = {k: v.half().contiguous() for k, v in self.state_dict().items()}
        if self.llm.config.tie_word_embeddings:
            state.pop("llm.lm_head.weight")
        save_file(state, folder / "model.safetensors")
        self.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


def padded(features: list[Tensor], masks: list[Tensor | None], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Features (T, S, W) of several media as one (1, sum of T, longest S, W), and which are real (1, sum of T, longest S), or None where all are.

    masks (T, S): which features of a medium are real, None = all.
    """
    longest = max(x.shape[1] for x in features)
    x = torch.cat([F.pad(each.to(device).float(), (0, 0, 0, longest - each.shape[1])) for each in features])[None]
    if all(mask is None for mask in masks) and all(each.shape[1] == longest for each in features):
        return x, None
    real = [torch.ones(each.shape[:2], dtype=torch.bool) if mask is None else mask for each, mask in zip(features, masks)]
    return x, torch.cat([F.pad(mask.to(device), (0, longest - mask.shape[1])) for mask in real])[None]


def coded(y: Tensor, lengths: list[int], numbers: list[int], time: nn.Embedding | None, number: nn.Embedding | None) -> Tensor:
    """Tokens y (sum of T, Q, D) of several media with the codes of their frame or second, 0 to T - 1 in each, and of their number in their prompt."""
    if time is not None:
        steps = torch.cat([torch.arange(n, device=y.device) for n in lengths])
        y = y + time(steps.clamp(max=time.num_embeddings - 1))[:, None]
    if number is not None:
        ranks = torch.cat([torch.full((n,), rank, device=y.device) for rank, n in zip(numbers, lengths)])
        y = y + number(ranks.clamp(max=number.num_embeddings - 1))[:, None]
    return y


def load_llm(name_or_config: dict | str, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    """A causal LM: pretrained, by path or hub id, or from a transformers config, for random weights or a state dict of one's own."""
    if isinstance(name_or_config, dict):
        config = dict(name_or_config, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                      pad_token_id=tokenizer.pad_token_id)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation=ATTENTION)
    try:
        return AutoModelForCausalLM.from_pretrained(name_or_config, dtype=torch.bfloat16)
    except OSError as error:
        raise missing_weights("language model", name_or_config, error) from error


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a base (the path of its tokenizer.json), or a pretrained one by path or hub id, with placeholders for media."""
    if str(name).endswith(".json"):
        return PreTrainedTokenizerFast(tokenizer_file=str(name), pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                       additional_special_tokens=list(PLACEHOLDERS.values()))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise missing_weights("tokenizer", str(name), error) from error
    tokenizer.add_tokens(list(PLACEHOLDERS.values()), special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def load_base(folder: str | Path = ASSETS / "base") -> ComposedModel:
    """The model in `folder` (written by `save_base`), in float32, frozen and in evaluation mode.

    "random": the shipped base's sizes and tokenizer with random weights, the same ones each time: what is the base worth?
    """
    if str(folder) == "random":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = ModelConfig(**json.loads((ASSETS / "base" / "config.json").read_text()))
            return ComposedModel(config, load_tokenizer(ASSETS / "base" / "tokenizer.json")).requires_grad_(False).eval()
    folder = Path(folder)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (folder / name).exists():
            raise ModelError(f"{folder / name}: missing; `python train.py tiny-base --out {folder}` makes a base")
    model = ComposedModel(ModelConfig(**json.loads((folder / "config.json").read_text())), load_tokenizer(folder / "tokenizer.json"))
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if unexpected or [k for k in missing if not k.startswith("llm.lm_head")]:
        raise ModelError(f"{folder}: weights do not fit config.json (missing {missing[:3]}, unexpected {unexpected[:3]})")
    model.llm.tie_weights()
    return model.requires_grad_(False).eval()
