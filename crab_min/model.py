"""What every audio-visual LM here has in common: media tokens in a prompt, an adapter on the LM, files.

What the encoders make of the media takes the place of placeholders in the prompt, and a Hugging Face LM answers in text. Only the
adapter (I-LoRA, Crab 2503.13068, eq. 3-5; Crab+ 2603.04128) and, where asked, parts beside it are trained. The LM is not modified:
tokens go in through `inputs_embeds`, answers come out of its own `generate`. The two kinds of backbone say how media become tokens:
composed.py (CLIP + BEATs + Q-Formers + any causal LM) and native.py (Qwen2.5-Omni, which has encoders of its own).

Shapes: B samples, L length, D width of the LM, T frames or sound segments, S tokens each.
"""
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from crab_min.encoders import MediaFeatures
from crab_min.errors import ModelError
from crab_min.ilora import ILoraConfig

warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")       # peft's own call, nothing a user can change
ASSETS = Path(__file__).parent / "assets"
LINEARS = r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
LLM_LINEARS = r"model\.(language_model\.)?" + LINEARS                          # the seven linears of every layer of the LM
# Crab+'s release names them without a path, which in Qwen2.5-Omni also fits q, k, v of the audio encoder and the MLPs of the vision encoder
RELEASED_LINEARS = rf"({LLM_LINEARS}|model\.audio_tower\.layers\.\d+\.self_attn\.[qkv]_proj|model\.visual\.blocks\.\d+\.mlp\.(gate|up|down)_proj)"


@dataclass
class AdapterConfig:
    """The adapter on the LM: which method, and its size (Crab: r 8, alpha 16, dropout .05, 3 heads; Crab+: r 128, alpha 256, dropout .1)."""
    adapter: str = field(default="ilora", metadata={"help": "adapter on the LM", "choices": ["ilora", "lora", "none"]})
    r: int = field(default=8, metadata={"help": "rank of the adapter"})
    alpha: float = field(default=16, metadata={"help": "adapter scale: the update is multiplied by alpha / r"})
    heads: int = field(default=3, metadata={"help": "heads of I-LoRA (one B each, chosen by the router token by token)"})
    dropout: float = field(default=0.05, metadata={"help": "dropout before A"})
    encoder_adapters: bool = field(default=False, metadata={"help": "adapters in Qwen2.5-Omni's encoders too, as in the released Crab+ (where they never trained)"})

    def build(self):
        """The PEFT config of this adapter, or None."""
        targets = RELEASED_LINEARS if self.encoder_adapters else LLM_LINEARS
        if self.adapter == "ilora":
            return ILoraConfig(r=self.r, alpha=self.alpha, heads=self.heads, dropout=self.dropout, target_modules=targets)
        if self.adapter == "lora":
            return LoraConfig(r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=targets)
        return None


class AVLanguageModel(nn.Module):
    """Encoders + LM. `encode` makes what can be kept (data.Features), `forward` gives the loss, `generate` the answers.

    A backbone defines: `frame_size` (pixels of the square frames it takes), `encode`, `count`, `tokens`, what its LM wants to know
    beside the embeddings (`extra_lm_inputs`, `logits`), and `patches` (fusion.Patches) with the widths of the video tokens they serve.
    llm: a transformers LM, wrapped by PEFT once it has an adapter. marks: kind -> (token ids before a medium, its placeholder, ids after).
    ends: token ids that begin every prompt, and the one that ends an answer. template: text before and after every prompt.
    """
    frame_size: int
    patches: nn.ModuleDict                             # side channel -> patch (PAVE); a clip without that channel is left as it is
    patch_widths: tuple[int, int]                      # of a video's tokens before the projector, and in the LM
    masks: nn.Module | None                            # segment.MaskBranch, of a composed model that answers with masks

    def __init__(self, llm: nn.Module, tokenizer: PreTrainedTokenizerFast, marks: dict, ends: tuple[list[int], int], template: list[str]):
        super().__init__()
        self.llm, self.tokenizer, self.marks, self.ends, self.template, self.masks = llm, tokenizer, marks, ends, template, None
        self.loaded: set[str] = set()                  # parts beside the adapter that came from a run folder, and go on into the next

    @property
    def side_names(self) -> list[str]:
        """The side channels that it can read."""
        return list(self.patches)

    @property
    def stops(self) -> list[int]:
        """Token ids after which an answer ends: the end token, and the last mask token."""
        return [self.ends[1], self.masks.first + len(self.masks.read) - 1] if self.masks else [self.ends[1]]

    @property
    def device(self) -> torch.device:
        return self.llm.get_input_embeddings().weight.device

    # --- what a backbone defines
    def encode(self, kind: str, media: list, seconds: list[float]) -> list[MediaFeatures]:
        """Features of several media of one kind.

        media: frames uint8 (T, H, W, 3) each, all with the same T, H, W ("video", "image"), or lists of T waves (N,) ("audio");
        seconds: how long each is.
        """
        raise NotImplementedError

    def count(self, media: MediaFeatures) -> int:
        """Tokens of a medium in the prompt."""
        raise NotImplementedError

    def place(self, media: MediaFeatures) -> list[int]:
        """What stands in the prompt for a medium: token ids, with as many placeholders as it has tokens."""
        before, placeholder, after = self.marks[media.kind]
        return [*before, *[placeholder] * self.count(media), *after]

    def tokens(self, media: list[MediaFeatures], numbers: list[int]) -> list[Tensor]:
        """The tokens (count, D) of each medium; numbers: whether it is the first (0), second ... of its kind in its prompt."""
        raise NotImplementedError

    def extra_lm_inputs(self, batch: dict) -> dict:
        """What the LM's forward and generate take beside `inputs_embeds` and `attention_mask`."""
        return {}

    def logits(self, batch: dict, keep: int) -> Tensor:
        """(B, keep, V) at the last `keep` places."""
        return self.llm(inputs_embeds=self.embed(batch), attention_mask=batch["attention"], logits_to_keep=keep).logits

    # --- from prompts to batches
    def collate(self, prompts: list[list], media: list[list[MediaFeatures]], targets: list[str] | None = None) -> dict:
        """A left-padded batch: ids, attention (B, L), labels (B, L; -100 outside the answer) and its media in reading order.

        prompts: the parts of each sample (interface.build_prompt); media: the features of its media parts, in order.
        """
        rows, labels, (begin, end) = [], [], self.ends
        prompts, media = zip(*(attach_side_channels(parts, list(found)) for parts, found in zip(prompts, media)))
        for i, parts in enumerate(prompts):
            queue, ids = iter(media[i]), [*begin, *self.encode_text(self.template[0])]
            for part in parts:
                if part.kind == "text":
                    ids += self.encode_text(part.text)
                else:
                    ids += self.place(next(queue))
            ids += self.encode_text(self.template[1])
            answer = self.encode_text(targets[i]) if targets else []
            answer += [end] * (bool(targets) and answer[-1:] != self.stops[1:])
            rows.append(ids + answer)
            labels.append([-100] * len(ids) + answer)
        longest = max(map(len, rows))
        pad = [longest - len(row) for row in rows]
        return {"ids": torch.tensor([[self.tokenizer.pad_token_id] * p + row for p, row in zip(pad, rows)], device=self.device),
                "attention": torch.tensor([[0] * p + [1] * len(row) for p, row in zip(pad, rows)], device=self.device),
                "labels": torch.tensor([[-100] * p + row for p, row in zip(pad, labels)], device=self.device),
                "media": [m for sample in media for m in sample], "counts": [len(sample) for sample in media],
                "numbers": [[n.kind for n in sample[:i]].count(m.kind) for sample in media for i, m in enumerate(sample)]}

    def encode_text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def embed(self, batch: dict) -> Tensor:
        """Prompt embeddings (B, L, D) with the media tokens in the place of their placeholders."""
        places = torch.isin(batch["ids"], torch.tensor([placeholder for _, placeholder, _ in self.marks.values()], device=batch["ids"].device))
        x = self.llm.get_input_embeddings()(batch["ids"].masked_fill(places, 0))                 # (B, L, D); a placeholder needs no row of its own
        if batch["media"]:
            names = [(id(m.features), n, *sorted((name, id(side.features)) for name, side in m.sides.items())) for m, n in zip(batch["media"], batch["numbers"])]
            media = dict(zip(names, zip(batch["media"], batch["numbers"])))                      # rows that share a medium share its tokens
            tokens = dict(zip(media, self.tokens(*map(list, zip(*media.values())))))
            x = x.masked_scatter(places[..., None], torch.cat([tokens[name] for name in names]).to(x.dtype))
        return x

    def losses(self, batch: dict) -> Tensor:
        """(B, places) the cross-entropy of each answer token, 0 where there is none."""
        keep = int((batch["labels"] != -100).sum(1).max()) + 1                                   # left padding: answers end the rows
        return cross_entropy(self.logits(batch, keep), batch["labels"])

    def forward(self, batch: dict) -> tuple[Tensor, int]:
        """(sum of the cross-entropy over the answer tokens of the batch, their number)."""
        return self.losses(batch).sum(), int((batch["labels"] != -100).sum())

    @torch.no_grad()
    def generate(self, batch: dict, limit: int, streamer=None, beams: int = 1) -> list[str]:
        """Answers of at most `limit` tokens each: greedy, or the best that a search with several beams finds."""
        beside = self.extra_lm_inputs(batch)
        out = self.llm.generate(inputs_embeds=self.embed(batch), attention_mask=batch["attention"], **beside, max_new_tokens=limit, do_sample=False, num_beams=beams,
                                streamer=streamer, pad_token_id=self.tokenizer.pad_token_id, eos_token_id=self.stops)
        out = out[:, batch["ids"].shape[1]:] if "input_ids" in beside else out
        return self.tokenizer.batch_decode(out, skip_special_tokens=True)

    # --- what is trained
    def add_adapter(self, config: AdapterConfig) -> None:
        """Freeze everything and put the adapter on the LM."""
        self.requires_grad_(False)
        if (peft_config := config.build()) is not None:
            self.llm = get_peft_model(self.llm, peft_config)

    def trainable_modules(self) -> dict[str, nn.Module]:
        """What can be trained beside the adapter, by its name in modules.safetensors."""
        words = self.llm.get_input_embeddings()
        return {"words": words.words, "masks": self.masks} if self.masks else {"words": words}

    def set_trainable(self, parts: str) -> None:
        """Train more than the adapter: parts of `beside`, joined by +; "connectors" are all but the words (the embeddings, as Crab's segmentation stage)."""
        for name, module in self.trainable_modules().items():
            if ("words" if name == "words" else "connectors") in parts.split("+") or name in parts.split("+"):
                module.requires_grad_(True)
        if "decoder" in parts.split("+"):                                      # masks without what is read, so that no gradient passes the LM
            self.masks.requires_grad_(True)
            self.masks.read.requires_grad_(False)

    # --- files
    def save_trained(self, folder: Path) -> None:
        """adapter/ (PEFT), patches/ and modules.safetensors (what was trained beside them), the model part of a run folder."""
        if isinstance(self.llm, PeftModel):
            self.llm.save_pretrained(folder / "adapter")
        self.patches.save(folder / "patches")
        state = {f"{name}.{key}": value.contiguous() for name, module in self.trainable_modules().items()
                 for key, value in module.state_dict().items() if name in self.loaded or any(p.requires_grad for p in module.parameters())}
        if state:
            save_file(state, folder / "modules.safetensors")

    def load_trained(self, folder: Path) -> None:
        """Read back what `save_trained` wrote: a new adapter on the LM, and the modules beside it. Raises ModelError."""
        folder = Path(folder)
        if (folder / "adapter").is_dir():
            self.llm = get_peft_model(self.llm, PeftConfig.from_pretrained(str(folder / "adapter")))
        elif not any((folder / name).exists() for name in ("patches", "modules.safetensors")):
            raise ModelError(f"{folder}: neither adapter/ nor patches/ nor modules.safetensors; give a finished run of train.py")
        self.restore_trained(folder)

    def restore_trained(self, folder: Path) -> None:
        """Put the values that `save_trained` wrote into the adapter, the patches and the modules that are already there. Raises ModelError."""
        for file in sorted((folder / "patches").glob("*.safetensors")):
            self.patches.load(file, *self.patch_widths)
        self.patches.to(self.device)
        if (folder / "adapter").is_dir() and isinstance(self.llm, PeftModel):
            file = folder / "adapter" / "adapter_model.safetensors"
            state = load_file(file)
            check_fit(state, get_peft_model_state_dict(self.llm, save_embedding_layers=False), file)
            set_peft_model_state_dict(self.llm, state)
        if (file := folder / "modules.safetensors").exists():
            states: dict = {}
            for key, value in load_file(file).items():
                name, key = key.split(".", 1)
                states.setdefault(name, {})[key] = value
            for name, state in states.items():
                if name not in self.trainable_modules():
                    raise ModelError(f"{file}: a module this model does not have: {name}; it has {', '.join(self.trainable_modules())}")
                check_fit(state, self.trainable_modules()[name].state_dict(), f"{file}, {name}")
                self.trainable_modules()[name].load_state_dict(state)
                self.loaded.add(name)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, n - 1) of the last n - 1 labels (B, L) under the logits (B, n, V) before each, 0 where there is none."""
    return F.cross_entropy(logits[:, :-1].mT.float(), labels[:, 1 - logits.shape[1]:], ignore_index=-100, reduction="none")


def attach_side_channels(parts: list, media: list[MediaFeatures]) -> tuple[list, list[MediaFeatures]]:
    """A prompt without its side channels, which go to the video or image that they follow: they have no tokens of their own."""
    kept: list[MediaFeatures] = []
    for part, features in zip([p for p in parts if p.kind != "text"], media):
        if part.side:
            kept[-1] = replace(kept[-1], sides={**kept[-1].sides, part.side: features})
        else:
            kept.append(features)
    return [p for p in parts if not p.side], kept


def check_fit(state: dict[str, Tensor], own: dict[str, Tensor], where: Path | str) -> None:
    """Raises ModelError unless the weights `state` have the names and shapes of the model's `own`."""
    wrong = [f"{name} is {tuple(value.shape)}, expected {tuple(own[name].shape)}" for name, value in state.items() if name in own and value.shape != own[name].shape]
    found = {"missing": sorted(own.keys() - state.keys()), "unknown": sorted(state.keys() - own.keys()), "of another shape": wrong}
    said = [f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" for what, names in found.items() if names]
    if said:
        raise ModelError(f"{where}: of the {len(own)} weights expected, {'; '.join(said)}. Is it of another base, --adapter, --r (rows of A) or --heads (rows of the "
                         "router), or not whole?")


def bf16_autocast(wanted: bool = True) -> torch.autocast:
    """A context in which matrix products are in bfloat16, where the machine is faster at them than at float32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fast = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device, torch.bfloat16, enabled=wanted and fast)


def missing_weights(what: str, name: str, error: Exception) -> ModelError:
    """Weights that are not there and cannot be fetched: what to do."""
    return ModelError(f"{what} {name}: cannot be loaded ({str(error).splitlines()[0].rstrip('.')}). Where there is a network, `hf download {name} --local-dir "
                      "FOLDER` fetches it (some need an account that has accepted a licence); then name the FOLDER instead")
