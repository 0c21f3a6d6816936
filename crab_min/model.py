"""The composed audio-visual language model: frozen encoders, Q-Former connectors and a causal LM with an adapter.

Crab (2503.13068, section 3.2): CLIP and BEATs features of every frame and every stretch of sound pass a Q-Former each, the
resulting tokens take the place of placeholders in the prompt, and the LM answers in text. Only the adapter (I-LoRA, Crab
eq. 3-5) and, where asked, the connectors are trained. The LM is any Hugging Face causal LM; it is not modified: tokens go in
through `inputs_embeds`, answers come out of its own `generate`.
One difference from Crab: optional learned codes are added to the tokens, of the frame or second they belong to (`time_steps`) and of
the first or second video, image or sound of the prompt (`numbers`). They help a small LM to say *when* and *in which*; with 0 it is Crab.

Shapes: B samples, M media of a batch, T frames or sound segments, S encoder tokens each, Q queries, D width of the LM, L length.
"""
import json
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from crab_min.encoders import ATTENTION, AudioEncoder, VisionEncoder
from crab_min.ilora import ILoraConfig
from crab_min.qformer import QFormerConfig, QFormerConnector

warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")       # peft's own call, nothing a user can change
PLACEHOLDERS = {"video": "<video>", "image": "<image>", "audio": "<audio>"}
SPECIALS = ("<pad>", "<s>", "</s>", *PLACEHOLDERS.values())
ASSETS = Path(__file__).parent / "assets"
TARGETS = r".*layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"        # the seven linears of every LM layer


class ModelError(ValueError):
    """A model folder that cannot be used: the path, what is wrong, what to do."""


@dataclass
class ModelConfig:
    """What a composed model is made of; plain values, so that it travels as JSON."""
    vision: dict | str                                 # transformers config of a CLIP or SigLIP vision model, or a path or hub id
    audio: dict | str                                  # BEATs config, or the path of a published checkpoint
    visual_qformer: dict                               # queries, hidden, layers, heads, intermediate
    audio_qformer: dict
    llm: dict                                          # transformers config of a causal LM
    vision_layer: int = -2                             # hidden state given to the Q-Former (Crab: the one below the last)
    time_steps: int = 0                                # rows of the learned time code (0: none, as in Crab)
    numbers: int = 0                                   # rows of the learned code of the first, second ... video, image or sound of a prompt (0: none, as in Crab)
    template: list = field(default_factory=lambda: ["", "\n"])                  # text before and after the prompt


@dataclass
class AdapterConfig:
    """The adapter on the LM: which method, and its size (Crab: r 8, alpha 16, dropout .05, 3 heads)."""
    adapter: str = field(default="ilora", metadata={"help": "adapter on the LM", "choices": ["ilora", "lora", "none"]})
    r: int = field(default=8, metadata={"help": "rank of the adapter"})
    alpha: float = field(default=16, metadata={"help": "adapter scale: the update is multiplied by alpha / r"})
    heads: int = field(default=3, metadata={"help": "heads of I-LoRA (one B each, chosen by the router token by token)"})
    dropout: float = field(default=0.05, metadata={"help": "dropout before A"})

    def build(self):
        """The PEFT config of this adapter, or None."""
        if self.adapter == "ilora":
            return ILoraConfig(r=self.r, alpha=self.alpha, heads=self.heads, dropout=self.dropout, target_modules=TARGETS)
        if self.adapter == "lora":
            return LoraConfig(r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=TARGETS)
        return None


@dataclass
class MediaFeatures:
    """Frozen-encoder features of one video, image or stretch of sound: (T, S, W), and which of the S are real (audio)."""
    kind: str
    features: Tensor
    mask: Tensor | None = None

    @property
    def steps(self) -> int:
        return self.features.shape[0]


class AVLanguageModel(nn.Module):
    """Encoders + connectors + LM. `encode` runs the frozen part, `forward` gives the loss, `generate` the answers."""

    def __init__(self, config: ModelConfig, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vision, self.audio = VisionEncoder(config.vision, config.vision_layer), AudioEncoder(config.audio)
        llm = dict(config.llm, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                   eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        self.llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**llm), attn_implementation=ATTENTION)
        width = self.llm.config.hidden_size
        self.visual_qformer = QFormerConnector(QFormerConfig(self.vision.width, width, **config.visual_qformer))
        self.audio_qformer = QFormerConnector(QFormerConfig(self.audio.width, width, **config.audio_qformer))
        self.time = nn.Embedding(config.time_steps, width) if config.time_steps else None
        self.number = nn.Embedding(config.numbers, width) if config.numbers else None
        self.placeholder_ids = {k: tokenizer.convert_tokens_to_ids(t) for k, t in PLACEHOLDERS.items()}

    # --- from media to tokens
    @torch.no_grad()
    def encode(self, kind: str, media: list) -> list[MediaFeatures]:
        """Frozen features of several media of one kind.

        media: frames uint8 (T, H, W, 3) each, all with the same T, H, W ("video", "image"), or lists of T waves (N,) ("audio").
        """
        if kind == "audio":
            features = []
            for segments in media:
                x, mask = self.audio([torch.as_tensor(s) for s in segments])                     # (1, T, S, W), (1, T, S)
                features.append(MediaFeatures(kind, x[0], mask[0]))
            return features
        x = self.vision(torch.stack([torch.as_tensor(m) for m in media]))                        # (M, T, S, W)
        return [MediaFeatures(kind, f) for f in x]

    def connect(self, media: list[MediaFeatures], numbers: list[int]) -> list[Tensor]:
        """Tokens (T * Q, D) of each medium: connector, plus the codes of its frame's or segment's time and of its number (0, 1, ...) in its prompt."""
        tokens: list = [None] * len(media)
        for connector, kinds in ((self.visual_qformer, ("video", "image")), (self.audio_qformer, ("audio",))):
            chosen = [i for i, m in enumerate(media) if m.kind in kinds]
            if not chosen:
                continue
            longest = max(media[i].features.shape[1] for i in chosen)
            x = torch.cat([F.pad(media[i].features.float(), (0, 0, 0, longest - media[i].features.shape[1])) for i in chosen])
            mask = None                                                                          # x: (sum of T, S, W)
            if "audio" in kinds:
                mask = torch.cat([F.pad(media[i].mask, (0, longest - media[i].mask.shape[1])) for i in chosen])[None]
            y = connector(x[None], mask)[0]                                                      # (sum of T, Q, D)
            if self.time is not None:
                steps = torch.cat([torch.arange(media[i].steps, device=y.device) for i in chosen])
                y = y + self.time(steps.clamp(max=self.time.num_embeddings - 1))[:, None]
            if self.number is not None:
                ranks = torch.cat([torch.full((media[i].steps,), numbers[i], device=y.device) for i in chosen])
                y = y + self.number(ranks.clamp(max=self.number.num_embeddings - 1))[:, None]
            for i, part in zip(chosen, y.split([media[i].steps for i in chosen])):
                tokens[i] = part.flatten(0, 1)                                                   # (T * Q, D)
        return tokens

    # --- from prompts to batches
    def collate(self, prompts: list[list], media: list[list[MediaFeatures]], targets: list[str] | None = None) -> dict:
        """A left-padded batch: ids, attention (B, L), labels (B, L; -100 outside the answer) and its media in reading order.

        prompts: the parts of each sample (interface.build_prompt); media: the features of its media parts, in order.
        """
        text, rows, labels = self.tokenizer, [], []
        for i, parts in enumerate(prompts):
            queue, ids = iter(media[i]), [text.bos_token_id, *self.encode_text(self.config.template[0])]
            for part in parts:
                if part.kind == "text":
                    ids += self.encode_text(part.text)
                else:
                    queries = (self.audio_qformer if part.kind == "audio" else self.visual_qformer).config.queries
                    ids += [self.placeholder_ids[part.kind]] * (next(queue).steps * queries)
            ids += self.encode_text(self.config.template[1])
            answer = self.encode_text(targets[i]) + [text.eos_token_id] if targets else []
            rows.append(ids + answer)
            labels.append([-100] * len(ids) + answer)
        longest = max(map(len, rows))
        pad = [longest - len(row) for row in rows]
        return {"ids": torch.tensor([[text.pad_token_id] * p + row for p, row in zip(pad, rows)]),
                "attention": torch.tensor([[0] * p + [1] * len(row) for p, row in zip(pad, rows)]),
                "labels": torch.tensor([[-100] * p + row for p, row in zip(pad, labels)]),
                "media": [m for sample in media for m in sample],
                "numbers": [[n.kind for n in sample[:i]].count(m.kind) for sample in media for i, m in enumerate(sample)]}

    def encode_text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def embed(self, batch: dict) -> Tensor:
        """Prompt embeddings (B, L, D) with the media tokens in the place of their placeholders."""
        x = self.llm.get_input_embeddings()(batch["ids"])                                        # (B, L, D)
        if batch["media"]:
            tokens = torch.cat(self.connect(batch["media"], batch["numbers"])).to(x.dtype)
            places = torch.isin(batch["ids"], torch.tensor(list(self.placeholder_ids.values()), device=x.device))
            x = x.masked_scatter(places[..., None], tokens)
        return x

    def forward(self, batch: dict) -> tuple[Tensor, int]:
        """(sum of the cross-entropy over the answer tokens of the batch, their number)."""
        keep = int((batch["labels"] != -100).sum(1).max()) + 1                                   # left padding: answers end the rows
        logits = self.llm(inputs_embeds=self.embed(batch), attention_mask=batch["attention"], logits_to_keep=keep).logits
        labels = batch["labels"][:, -keep + 1:].reshape(-1)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels, ignore_index=-100, reduction="sum")
        return loss, int((labels != -100).sum())

    @torch.no_grad()
    def generate(self, batch: dict, limit: int, streamer=None) -> list[str]:
        """Greedy answers, at most `limit` tokens each."""
        out = self.llm.generate(inputs_embeds=self.embed(batch), attention_mask=batch["attention"], max_new_tokens=limit,
                                do_sample=False, streamer=streamer, pad_token_id=self.tokenizer.pad_token_id)
        return self.tokenizer.batch_decode(out, skip_special_tokens=True)

    # --- what is trained
    def add_adapter(self, config: AdapterConfig) -> None:
        """Freeze everything and put the adapter on the LM."""
        self.requires_grad_(False)
        if (peft_config := config.build()) is not None:
            self.llm = get_peft_model(self.llm, peft_config)

    def train_beside(self, parts: str) -> None:
        """Train more than the adapter: "connectors" (Q-Formers, codes of time and number), "words" (the embeddings, as Crab's segmentation stage), joined by +."""
        for name, module in self.beside().items():
            if ("words" if name == "words" else "connectors") in parts.split("+"):
                module.requires_grad_(True)

    def beside(self) -> dict[str, nn.Module]:
        """What can be trained beside the adapter, by its name in modules.safetensors."""
        named = {"visual_qformer": self.visual_qformer, "audio_qformer": self.audio_qformer, "time": self.time, "number": self.number,
                 "words": self.llm.get_input_embeddings()}
        return {name: module for name, module in named.items() if module is not None}

    # --- files
    def save_trained(self, folder: Path) -> None:
        """adapter/ (PEFT) and modules.safetensors (what was trained beside it), the model part of a run folder."""
        if isinstance(self.llm, PeftModel):
            self.llm.save_pretrained(folder / "adapter")
        state = {f"{name}.{key}": value.contiguous() for name, module in self.beside().items()
                 for key, value in module.state_dict().items() if any(p.requires_grad for p in module.parameters())}
        if state:
            save_file(state, folder / "modules.safetensors")

    def load_trained(self, folder: Path) -> None:
        """Read back what `save_trained` wrote: a new adapter on the LM, and the modules beside it. Raises ModelError."""
        folder = Path(folder)
        if (folder / "adapter").is_dir():
            self.llm = PeftModel.from_pretrained(self.llm, str(folder / "adapter"))
        elif not (folder / "modules.safetensors").exists():
            raise ModelError(f"{folder}: neither adapter/ nor modules.safetensors; give a finished run of train.py")
        self.load_modules(folder)

    def restore_trained(self, folder: Path) -> None:
        """Put the values that `save_trained` wrote into the adapter and the modules that are already there, still trainable."""
        if (folder / "adapter").is_dir():
            set_peft_model_state_dict(self.llm, load_file(folder / "adapter" / "adapter_model.safetensors"))
        self.load_modules(folder)

    def load_modules(self, folder: Path) -> None:
        if (folder / "modules.safetensors").exists():
            states: dict = {}
            for key, value in load_file(folder / "modules.safetensors").items():
                name, key = key.split(".", 1)
                states.setdefault(name, {})[key] = value
            for name, state in states.items():
                if name not in self.beside():
                    raise ModelError(f"{folder}/modules.safetensors: a module this model does not have: {name}")
                self.beside()[name].load_state_dict(state)

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


def half_products(wanted: bool = True) -> torch.autocast:
    """A context in which matrix products are in bfloat16, where the machine is faster at them than at float32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fast = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device, torch.bfloat16, enabled=wanted and fast)


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(path), pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   additional_special_tokens=list(PLACEHOLDERS.values()))


def load_base(folder: str | Path = ASSETS / "base") -> AVLanguageModel:
    """The model in `folder` (written by `save_base`), in float32, frozen and in evaluation mode.

    "random": the shipped base's sizes and tokenizer with random weights, the same ones each time: what is the base worth?
    """
    if str(folder) == "random":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = ModelConfig(**json.loads((ASSETS / "base" / "config.json").read_text()))
            return AVLanguageModel(config, load_tokenizer(ASSETS / "base" / "tokenizer.json")).requires_grad_(False).eval()
    folder = Path(folder)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (folder / name).exists():
            raise ModelError(f"{folder / name}: missing; `python train.py tiny-base --out {folder}` makes a base")
    model = AVLanguageModel(ModelConfig(**json.loads((folder / "config.json").read_text())), load_tokenizer(folder / "tokenizer.json"))
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if unexpected or [k for k in missing if not k.startswith("llm.lm_head")]:
        raise ModelError(f"{folder}: weights do not fit config.json (missing {missing[:3]}, unexpected {unexpected[:3]})")
    model.llm.tie_weights()
    return model.requires_grad_(False).eval()
