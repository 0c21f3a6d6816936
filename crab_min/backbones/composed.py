"""CLIP and BEATs, a Q-Former connector for each, any causal LM (Crab, 2503.13068).

    features = encoder(frames or sound)                        (T, S, W), frozen
    queries  = Q-Former(features), each time step by itself    (T, Q, hidden)
    tokens   = MLP(queries)                                    (T, Q, D), T * Q in the prompt

What differs from Crab: learned embeddings can be added to the tokens, of the frame or second that
they belong to (`time_steps`), and of the first or second video, image or sound of the prompt
(`numbers`). They help a small LM to say when, and in which. With none of them it is Crab.

Shapes: T frames or sound segments, S encoder tokens of each, W encoder width, Q queries, D LM
width.
"""

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from crab_min.backbones.common import encode_sounds, load_pretrained, named_weights
from crab_min.backbones.patched import PatchedModel
from crab_min.backbones.tiny_random import same_random_weights
from crab_min.encoders import AudioEncoder, MediaFeatures, VisionEncoder
from crab_min.errors import ModelError
from crab_min.interface import PromptLayout, PromptPart
from crab_min.model import ASSETS, MediaTokens
from crab_min.pave import Patches
from crab_min.qformer import ATTENTION, QFormerConfig, QFormerConnector

PLACEHOLDERS = {"video": "<video>", "image": "<image>", "audio": "<audio>"}
# the tokens that Crab adds to Llama-2, in the order of their ids; MASK_TOKENS follow
CRAB_TOKENS = (
    *("<image>", "<image_start>", "<image_end>"),
    *("<video>", "<video_start>", "<video_end>"),
    *("<audio>", "<audio_start>", "<audio_end>"),
    *("<mask_start>", "<mask_end>"),
)
SPECIALS = ("<pad>", "<s>", "</s>", *PLACEHOLDERS.values())
VISUAL, AUDIO = ("video", "image"), ("audio",)


@dataclass
class ModelConfig:
    """The parts of a composed model, as plain values that can be written as JSON."""

    vision: dict | str  # transformers config of a CLIP or SigLIP vision model, or a path or hub id
    audio: dict | str  # BEATs config, or the path of a published checkpoint
    llm: dict | str  # transformers config of a causal LM, or a path or hub id
    # queries, hidden, layers, heads, intermediate; Crab's where they are not named
    visual_qformer: dict = field(default_factory=dict)
    audio_qformer: dict = field(default_factory=dict)
    vision_layer: int = -2  # hidden state given to the Q-Former (Crab: the one below the last)
    time_steps: int = 0  # rows of the time embedding (0: none, as in Crab)
    numbers: int = 0  # rows of the embedding of the first, second ... medium of its kind
    template: list = field(default_factory=lambda: ["", "\n"])  # of PromptLayout, in order


class ComposedModel(PatchedModel):
    """Encoders, connectors and an LM."""

    connectors = ("visual_qformer", "audio_qformer", "time", "number")

    def __init__(
        self, config: ModelConfig, tokenizer: PreTrainedTokenizerFast, load_in_4bit: bool = False
    ):
        # encoders, LM, and the token ids of its prompts
        vision = VisionEncoder(config.vision, config.vision_layer)
        audio = AudioEncoder(config.audio)
        llm = load_llm(config.llm, tokenizer, load_in_4bit)
        media_tokens = {}
        for kind, token in PLACEHOLDERS.items():
            media_tokens[kind] = MediaTokens([], tokenizer.convert_tokens_to_ids(token), [])
        super().__init__(
            llm,
            tokenizer,
            media_tokens,
            bos_ids=[tokenizer.bos_token_id],
            eos_id=tokenizer.eos_token_id,
            layout=PromptLayout(*config.template),
        )
        self.config = config
        self.vision = vision
        self.audio = audio
        self.frame_size = vision.size

        # connectors, and the optional embeddings of time and of the medium's number
        width = llm.config.hidden_size
        visual = QFormerConfig(vision.width, width, **config.visual_qformer)
        sound = QFormerConfig(audio.width, width, **config.audio_qformer)
        self.visual_qformer = QFormerConnector(visual)
        self.audio_qformer = QFormerConnector(sound)
        self.time = nn.Embedding(config.time_steps, width) if config.time_steps else None
        self.number = nn.Embedding(config.numbers, width) if config.numbers else None

        # patches query with the Q-Former's output, before the MLP
        self.patches = Patches()
        self.patch_widths = (visual.hidden, width)

    def use_layout(self, layout: PromptLayout) -> None:
        """Take the layout of a run; tokens around its media get embeddings.

        Crab draws these at random, and neither trains nor saves them before its mask stage.
        """
        super().use_layout(layout)
        if not layout.marks:
            return
        self.tokenizer.add_tokens(list(CRAB_TOKENS), special_tokens=True)
        count = 1 + max(self.tokenizer.convert_tokens_to_ids(list(CRAB_TOKENS)))
        for layer in self.layers_of_tokens():
            add_rows(layer, count)
        for kind, names in layout.marks.items():
            before, after = self.tokenizer.convert_tokens_to_ids(list(names))
            placeholder = self.media_tokens[kind].placeholder
            self.media_tokens[kind] = MediaTokens([before], placeholder, [after])

    def layers_of_tokens(self) -> list[nn.Module]:
        """Return the layers that get rows for the tokens around media."""
        return [self.llm.get_input_embeddings()]

    def prompt_ids(self, parts: list[PromptPart], media: list[MediaFeatures]) -> list[int]:
        """Return the token ids of a prompt, with placeholders for its media.

        A `joined` layout is tokenized from one medium to the next: a tokenizer may make one token
        of the end of the template and the beginning of a text.
        """
        if not self.layout.joined:
            return super().prompt_ids(parts, media)
        layout = self.layout
        ids, text = [*self.bos_ids], layout.before
        remaining = iter(media)
        for part in parts:
            if part.role == "system":
                text = text.replace(layout.system, part.text)
            elif part.role == "assistant":  # an answer given before
                ids += self.encode_text(text + layout.after) + self.answer_ids(part.text)
                ids, text = ids + self.encode_layout(layout.turn or ""), ""
            elif part.kind == "text":
                text += part.text
            else:
                ids += self.encode_text(text) + self.placeholder_ids(next(remaining))
                text = ""
        return ids + self.encode_text(text + layout.after)

    # --- media
    @torch.no_grad()
    def encode(
        self, kind: str, media: list, seconds: list[float] | None = None
    ) -> list[MediaFeatures]:
        """Encode several media of one kind: features (T, S, W) of each."""
        if kind == "audio":
            return encode_sounds(self.audio, media)
        frames = torch.stack([torch.as_tensor(medium) for medium in media])  # (M, T, H, W, 3)
        return [MediaFeatures(kind, features) for features in self.vision(frames)]

    def token_count(self, medium: MediaFeatures) -> int:
        connector = self.audio_qformer if medium.kind in AUDIO else self.visual_qformer
        own = len(medium.features) * connector.config.queries
        return own + self.patches.count_tokens(medium.side_tokens())

    def tokens(self, media: list[MediaFeatures], media_index: list[int]) -> list[Tensor]:
        """Compute the tokens (T * Q, D) of each medium."""
        tokens: list = [None] * len(media)
        for kinds, connector in ((VISUAL, self.visual_qformer), (AUDIO, self.audio_qformer)):
            positions = [i for i, medium in enumerate(media) if medium.kind in kinds]
            if not positions:
                continue
            group = [media[i] for i in positions]
            lengths = [len(medium.features) for medium in group]

            # the connector, for the frames of all videos and images or the segments of all sounds
            features, mask = pad_tokens(group, self.device)  # (1, sum of T, S, W)
            queries = connector.query_states(features, mask)[0]  # (sum of T, Q, hidden)
            connected = connector.mlp(queries)  # (sum of T, Q, D)
            index = [media_index[i] for i in positions]
            connected = add_embeddings(connected, lengths, index, self.time, self.number)

            # what the patches add to each medium
            sides = [medium.side_tokens() for medium in group]
            patched = self.patches.add_to(connected.split(lengths), queries.split(lengths), sides)
            for i, medium_tokens, side in zip(positions, patched, sides):
                # (T * Q, D), and side tokens that join the prompt themselves
                tokens[i] = self.patches.join_tokens(medium_tokens, side)
        return tokens

    # --- what is trained
    def trainable_modules(self) -> dict[str, nn.Module]:
        modules = {name: getattr(self, name) for name in self.connectors}
        modules |= super().trainable_modules()
        return {name: module for name, module in modules.items() if module is not None}

    def reset_connector(self, name: str) -> None:
        """Replace a connector by a random one, for a stage that aligns it from nothing."""
        connector = QFormerConnector(getattr(self, name).config)
        setattr(self, name, connector.to(self.device))

    # --- the whole model in a folder
    def save_base(self, folder: Path) -> None:
        """Write config.json, model.safetensors (half precision) and tokenizer.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self.config), indent=1) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        state = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        if self.llm.config.tie_word_embeddings:
            state.pop("llm.lm_head.weight")
        save_file(state, folder / "model.safetensors")
        self.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


@torch.no_grad()
def add_rows(layer: nn.Embedding | nn.Linear, count: int) -> None:
    """Give embeddings or an output layer `count` rows; new ones are random, the same each time."""
    weight = layer.weight
    missing = count - len(weight)
    if missing <= 0:
        return
    with same_random_weights():
        rows = torch.randn(missing, weight.shape[1]) * weight.float().std().cpu()
    weight = torch.cat([weight, rows.to(weight.device, weight.dtype)])
    layer.weight = nn.Parameter(weight, requires_grad=False)


def pad_tokens(media: list[MediaFeatures], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Put all steps of several media into one tensor, padded to one number of tokens.

    Returns:
        features (1, sum of T, longest S, W), and which of them are real (1, sum of T, longest S),
        or None where all are.
    """
    longest = max(medium.features.shape[1] for medium in media)
    features, masks = [], []
    for medium in media:
        missing = longest - medium.features.shape[1]
        x = medium.features.to(device).float()  # (T, S, W)
        features.append(F.pad(x, (0, 0, 0, missing)))  # (T, longest S, W)
        mask = medium.mask
        if mask is None:
            mask = torch.ones(medium.features.shape[:2], dtype=torch.bool)  # (T, S)
        masks.append(F.pad(mask.to(device), (0, missing)))  # (T, longest S)

    # no mask where it would say nothing: attention without one is faster
    same_length = all(medium.features.shape[1] == longest for medium in media)
    if same_length and all(medium.mask is None for medium in media):
        return torch.cat(features)[None], None
    return torch.cat(features)[None], torch.cat(masks)[None]


def add_embeddings(
    tokens: Tensor,
    lengths: list[int],
    media_index: list[int],
    time: nn.Embedding | None,
    number: nn.Embedding | None,
    times: Tensor | None = None,
) -> Tensor:
    """Add embeddings to the tokens (sum of T, Q, D) of several media.

    Args:
        lengths: T of each medium.
        media_index: whether it is the first (0), second ... of its kind in its prompt.
        time: embedding of the frame or second; late ones share the last row.
        number: embedding of `media_index`.
        times: frame or second of each step (sum of T,); None: counted in each medium.
    """
    if time is not None:
        if times is None:
            times = torch.cat([torch.arange(n, device=tokens.device) for n in lengths])
        tokens = tokens + time(times.clamp(max=time.num_embeddings - 1))[:, None]
    if number is not None:
        indices = torch.tensor(media_index, device=tokens.device)
        repeats = torch.tensor(lengths, device=tokens.device)
        indices = indices.repeat_interleave(repeats, output_size=sum(lengths))
        tokens = tokens + number(indices.clamp(max=number.num_embeddings - 1))[:, None]
    return tokens


# --- loading --------------------------------------------------------------------------------------


def load_llm(
    name_or_config: dict | str, tokenizer: PreTrainedTokenizerFast, load_in_4bit: bool = False
) -> nn.Module:
    """Load a causal LM by path or hub id, or make a random one from a config.

    Raises:
        ModelError: weights that are not there.
    """
    if isinstance(name_or_config, dict):
        special_tokens = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = AutoConfig.for_model(**name_or_config | special_tokens)
        return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    with named_weights("language model", name_or_config):
        return load_pretrained(AutoModelForCausalLM, name_or_config, load_in_4bit, ["lm_head"])


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerFast:
    """Load a base's tokenizer.json, or a pretrained tokenizer; add placeholders.

    Raises:
        ModelError: a tokenizer that is not there.
    """
    if str(name).endswith(".json"):
        return PreTrainedTokenizerFast(
            tokenizer_file=str(name),
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            additional_special_tokens=list(PLACEHOLDERS.values()),
        )
    with named_weights("tokenizer", str(name)):
        tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.add_tokens(list(CRAB_TOKENS), special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def load_base(
    folder: str | Path = "",
    model_class: type[ComposedModel] = ComposedModel,
    empty: bool = False,
) -> ComposedModel:
    """Load what `save_base` wrote, in float32, frozen and in evaluation mode.

    Args:
        folder: "" for the shipped base; "random" for its sizes and tokenizer with random weights,
            the same ones each time, to see what the base is worth.
        empty: build it without weights (empty.py).

    Raises:
        ModelError: a file that is missing, or weights that do not fit.
    """
    is_random = str(folder) == "random"
    folder = ASSETS / "base" if is_random or not folder else Path(folder)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (folder / name).exists():
            raise ModelError(
                f"{folder / name}: missing; `python train.py tiny-base --out {folder}` makes a base"
            )
    config = ModelConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    with same_random_weights() if is_random else nullcontext():
        model = model_class(config, load_tokenizer(folder / "tokenizer.json"))
    model.requires_grad_(False).eval()
    model.vision.model.set_attn_implementation("sdpa")  # fast where nothing goes backward
    if is_random or empty:
        return model

    # the head may be tied to the embeddings, and is not in the file then
    state = load_file(folder / "model.safetensors")
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.startswith("llm.lm_head")]
    if missing or unexpected:
        raise ModelError(
            f"{folder}: weights do not fit config.json (missing {missing[:3]}, "
            f"unexpected {unexpected[:3]})"
        )
    model.llm.tie_weights()
    return model
