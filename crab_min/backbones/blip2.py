"""CREMA (2402.05889): any modality beside a video in a frozen LM, through one Q-Former, in as many tokens however many modalities there are.

    [P_t, Z_t]_t, [P_t]_t, [Zbar_t]_t, question        join = "concat": Zbar behind the video, as released
    [P_t, Z_t + Zbar_t]_t, question                    join = "add": Zbar on top of it

Z_t: the Q tokens of frame t; Zbar_t: those of all other modalities as one (fusion.GatedFusion); P_t: the words "Frame t: ". A modality is a
side channel of the video: what an encoder made of a sound, of pictures (flow, depth, normals, thermal, touch), of 3D points, or of anything
that encoders.register names. A clip without a modality has zero tokens in its place (data.lacking counts them).

`learn` and `EarlyExit` are CREMA's modality-sequential training: for each batch a step a modality, on its own parts and the fusion, until
the norm g of its gradient grows beyond tau times the mean of the epochs before. Differs from the released code: g is the mean over an epoch (there
the last step's alone counts); steps of sound are aligned with the frames (there their mean stands at each; `aligned=False`).

Shapes: T frames, S encoder tokens, W their width, Q queries, D width of the LM.
"""
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from crab_min.backbones.composed import PLACEHOLDERS, ComposedModel, coded, load_base, padded
from crab_min.backbones.sizes import TINY_MODEL
from crab_min.crema import MultimodalConfig, MultimodalQFormer, SelfGatedFusion, over_frames
from crab_min.encoders import AudioEncoder, MediaFeatures, VisionEncoder
from crab_min.errors import ModelError
from crab_min.model import AVLanguageModel, check_fit, missing_weights
from crab_min.pave import Patches


@dataclass
class CremaConfig:
    """How modalities are joined and trained."""
    modalities: str = field(default="", metadata={"help": "CREMA: comma-separated, rgb first: rgb,audio,flow,depth,normals,thermal,touch,points, or any name that rows have "
                                                          "under \"sides\" or that encoders.register names"})
    join: str = field(default="concat", metadata={"help": "CREMA: the fused modalities behind the video's tokens, or added to them", "choices": ["concat", "add"]})
    modality_rank: int = field(default=64, metadata={"help": "CREMA: rank of a modality's adapter in the Q-Former"})
    modality_dropout: float = field(default=0., metadata={"help": "CREMA: share of the side modalities that a training sample goes without, so that any few of them will do"})
    sequential: bool = field(default=True, metadata={"help": "CREMA: a step a modality for each batch; else all of them in one"})
    temperature: float = field(default=1.8, metadata={"help": "CREMA: a modality exits when its gradient grows beyond this many times its mean (0: never)"})


class CremaModel(AVLanguageModel):
    """A vision and an audio encoder, one Q-Former for all modalities, and an LM, all frozen; "rgb" is there from the beginning."""

    def __init__(self, llm: nn.Module, tokenizer: PreTrainedTokenizerFast, ends: tuple, template: list[str], vision: VisionEncoder, audio: AudioEncoder | None,
                 multimodal: MultimodalQFormer, prefix: str = "Frame {}: ", time: nn.Embedding | None = None, number: nn.Embedding | None = None):
        """prefix: the words before a frame. time, number: codes that a base was trained with (composed.coded)."""
        place = tokenizer.convert_tokens_to_ids(PLACEHOLDERS["video"])
        super().__init__(llm, tokenizer, {"video": ([], place, []), "image": ([], place, [])}, ends, template)
        self.vision, self.audio, self.multimodal, self.prefix, self.time, self.number = vision, audio, multimodal, prefix, time, number
        self.frame_size, self.patches, self.fusion = vision.size, Patches(), None
        self.join, self.aligned, self.skipped = "concat", True, set()          # skipped: modalities without their adapters (zero-shot)
        self.dropout = 0.                              # of whole modalities, in training
        self.learned: set[str] = set()                 # the modalities that are trained now
        self.held: dict[str, tuple[list[Tensor], Tensor]] = {}                 # what the others have read of this batch, for its next pass
        self.kept: set[str] = set()                    # weights of the frozen Q-Former that came with a converted run, and go on into the next

    @property
    def side_names(self) -> list[str]:
        return self.fusion.names if self.fusion else []

    @torch.no_grad()
    def encode(self, kind: str, media: list, seconds: list[float] | None = None) -> list[MediaFeatures]:
        """Frozen features (T, S, W) of several media of one kind; all but sounds are pictures. Raises ModelError."""
        if kind == "audio":
            if self.audio is None:
                raise ModelError("modality audio: no audio encoder; name a BEATs checkpoint with --audio, or give features as files (.npy, .pt) under \"sides\"")
            heard = [self.audio([torch.as_tensor(wave) for wave in waves]) for waves in media]
            return [MediaFeatures(kind, x[0], mask[0]) for x, mask in heard]
        return [MediaFeatures(kind, x) for x in self.vision(torch.stack([torch.as_tensor(m) for m in media]))]

    # --- prompts
    def count(self, media: MediaFeatures) -> int:
        return len(media.features) * self.multimodal.config.queries * (2 if self.fusion and self.join == "concat" else 1)

    def place(self, media: MediaFeatures) -> list[int]:
        frames, (_, placeholder, _) = len(media.features), self.marks[media.kind]
        queries, words = [placeholder] * self.multimodal.config.queries, [self.encode_text(self.prefix.format(t + 1)) for t in range(frames)]
        ids = [i for P in words for i in P + queries]
        return ids + sum(words, []) + queries * frames if self.fusion and self.join == "concat" else ids

    def tokens(self, media: list[MediaFeatures], numbers: list[int]) -> list[Tensor]:
        """Tokens (count, D) of each video: its own and, where there is a fusion, those of its other modalities."""
        lengths = [len(m.features) for m in media]
        streams = [self.read("rgb", media)]                                # (sum of T, Q, D) each
        if self.fusion:
            more = self.fuse([m.sides for m in media], lengths)
            streams = [streams[0] + more] if self.join == "add" else [*streams, more]
        streams = [coded(x, lengths, numbers, self.time, self.number).split(lengths) for x in streams]
        return [torch.cat([part.flatten(0, 1) for part in parts]) for parts in zip(*streams)]

    def read(self, name: str, media: list[MediaFeatures]) -> Tensor:
        """The tokens (sum of T, Q, D) of several clips' features (T, S, W) of one modality; in training from what is held, where it is not learned."""
        features = [m.features for m in media]
        before, tokens = self.held.get(name, ([], None))
        if self.training and len(before) == len(features) and all(a is b for a, b in zip(before, features)):
            return tokens
        tokens = self.multimodal(name, *padded(features, [m.mask for m in media], self.device), adapted=name not in self.skipped)[0]
        if self.training and name not in self.learned:
            self.held[name] = features, tokens.detach()
        return tokens

    def fuse(self, sides: list[dict[str, MediaFeatures]], lengths: list[int]) -> Tensor:
        """The other modalities of each clip as one stream (sum of T, Q, D). What a clip lacks is zero."""
        q, d = self.multimodal.config.queries, self.multimodal.config.width_out
        tokens, present = {}, {}                                                                 # (sum of T, Q, D), (sum of T,) of each modality
        for name in self.fusion.names:
            have = [i for i, found in enumerate(sides) if name in found]
            found = dict.fromkeys(range(len(sides)))
            if have:
                media = [sides[i][name] for i in have]
                found |= zip(have, self.read(name, media).split([len(m.features) for m in media]))
            tokens[name] = torch.cat([torch.zeros(n, q, d, device=self.device) if x is None else over_frames(x[None], n, self.aligned)[0] for x, n in zip(found.values(), lengths)])
            present[name] = torch.cat([torch.full((n,), x is not None, device=self.device) for x, n in zip(found.values(), lengths)])
        return self.fusion(tokens, present)

    def collate(self, prompts: list[list], media: list[list[MediaFeatures]], targets: list[str] | None = None) -> dict:
        apart = self.llm.config.is_encoder_decoder                            # an LM with an encoder has its answers apart
        batch = super().collate(prompts, media, None if apart else targets)
        if self.training and self.dropout:
            batch["media"] = [replace(m, sides={name: side for name, side in m.sides.items() if torch.rand(()) >= self.dropout}) for m in batch["media"]]
        if apart and targets:
            rows = [torch.tensor(self.encode_text(text) + [self.ends[1]], device=self.device) for text in targets]
            batch["labels"] = pad_sequence(rows, batch_first=True, padding_value=-100)
        return batch

    def losses(self, batch: dict) -> Tensor:
        if not self.llm.config.is_encoder_decoder:
            return super().losses(batch)
        logits = self.llm(inputs_embeds=self.embed(batch), attention_mask=batch["attention"], labels=batch["labels"]).logits
        return F.cross_entropy(logits.mT.float(), batch["labels"], ignore_index=-100, reduction="none")

    # --- modalities
    def configure(self, config: CremaConfig) -> None:
        """Take the settings of a run; rgb gets a new adapter of their rank."""
        self.join, self.dropout, self.multimodal.config.rank = config.join, config.modality_dropout, config.modality_rank
        for pair in self.multimodal.pairs().values():
            pair.add("rgb", config.modality_rank)

    def add_side(self, name: str, width: int) -> None:
        """A new side modality, which starts as rgb stands (queries, norm and projection), and columns of the fusion of its own; nothing of the others is touched.

        Raises ModelError.
        """
        self.multimodal.add(name, width)
        rgb, new = self.multimodal.of("rgb"), self.multimodal.of(name)
        for part in ("norm", "out"):
            getattr(new, part).load_state_dict(getattr(rgb, part).state_dict())
        new.query.data.copy_(rgb.query)
        self.widen([*self.side_names, name])

    def widen(self, names: list[str]) -> None:
        """The fusion for the side modalities `names`, with the columns of those that it had; new ones start at zero, where they change nothing."""
        d, old = self.multimodal.config.width_out, self.fusion
        fusion = SelfGatedFusion(names, d).to(self.device)
        with torch.no_grad():
            fusion.linear.weight.zero_()
            fusion.linear.bias.zero_() if old is None else fusion.linear.bias.copy_(old.linear.bias)
            for i, name in enumerate(names):
                if old and name in old.names:
                    j = old.names.index(name)
                    fusion.linear.weight[:, i * d:(i + 1) * d] = old.linear.weight[:, j * d:(j + 1) * d]
        self.fusion = fusion

    def remove_side(self, name: str) -> None:
        """Take a side modality and its columns of the fusion away. Raises ModelError: no such modality."""
        if name not in self.side_names:
            raise ModelError(f"modality {name!r}: not in this model, which has rgb{''.join(', ' + n for n in self.side_names)}")
        self.multimodal.remove(name)
        left = [n for n in self.side_names if n != name]
        self.widen(left) if left else setattr(self, "fusion", None)

    # --- training
    def own(self, name: str) -> list[nn.Parameter]:
        """What a step on the modality `name` trains: its parts and the fusion."""
        return [*self.multimodal.own(name).values(), *(self.fusion.parameters() if self.fusion else ())]

    def learn(self, names: list[str]) -> None:
        """Train these modalities and the fusion, and no other."""
        self.multimodal.requires_grad_(False)
        self.learned = set(names)
        for name in names:
            self.held.pop(name, None)
            for parameter in self.own(name):
                parameter.requires_grad_(True)

    def gradient_norm(self, name: str) -> float:
        """The L2 norm of the gradient of a modality's adapter (all its A and B)."""
        found = [p.grad.norm() for key, p in self.multimodal.own(name).items() if not key.startswith("parts.") and p.grad is not None]
        return torch.stack(found).norm().item() if found else 0.

    # --- files
    def save_trained(self, folder: Path) -> None:
        """As every model, and modalities.safetensors: what each modality has of its own and the fusion, with their names and widths in the header."""
        super().save_trained(folder)
        about = {"widths": {name: part.width for name, part in self.multimodal.parts.items()}, "fused": self.side_names, "join": self.join,
                 "aligned": self.aligned, "rank": self.multimodal.config.rank}
        state = self.own_state() | {name: value for name, value in self.state_dict().items() if name in self.kept}
        save_file({name: value.contiguous() for name, value in state.items()}, folder / "modalities.safetensors", {"format": "pt", "crema": json.dumps(about)})

    def own_state(self) -> dict[str, Tensor]:
        state = {f"multimodal.{key}": p.data for name in self.multimodal.parts for key, p in self.multimodal.own(name).items()}
        return state | ({f"fusion.{key}": value for key, value in self.fusion.state_dict().items()} if self.fusion else {})

    def load_trained(self, folder: Path) -> None:
        if (Path(folder) / "adapter").is_dir() or not (Path(folder) / "modalities.safetensors").exists():
            super().load_trained(folder)
        else:
            self.restore_trained(Path(folder))

    def restore_trained(self, folder: Path) -> None:
        super().restore_trained(folder)
        file = folder / "modalities.safetensors"
        try:
            with safe_open(file, "pt") as opened:
                about = json.loads((opened.metadata() or {})["crema"])
            state = load_file(file)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ModelError(f"{file}: not the modalities of a run ({type(error).__name__}: {error}); give a run of train.py crema-..., or convert a released one") from None
        self.join, self.aligned = about["join"], about["aligned"]
        if ({name: part.width for name, part in self.multimodal.parts.items()}, self.multimodal.config.rank) != (about["widths"], about["rank"]):
            self.multimodal.config.rank = about["rank"]
            for name in list(self.multimodal.parts):
                self.multimodal.remove(name)
            for name, width in about["widths"].items():
                self.multimodal.add(name, width)
        if about["fused"] != self.side_names:
            self.widen(about["fused"])
        self.kept = {key for key in state if key.startswith("multimodal.qformer.") and ".A." not in key and ".B." not in key}       # of a converted run
        check_fit({key: value for key, value in state.items() if key not in self.kept}, self.own_state(), file)
        self.load_state_dict(state, strict=False)
        self.held.clear()


# --- weights -----------------------------------------------------------------------------------------------------------------
def from_base(base: ComposedModel) -> CremaModel:
    """On a composed model (the tiny base): its visual connector is the Q-Former that all modalities share, and where each starts."""
    c, connector = base.visual_qformer.config, base.visual_qformer
    sizes = MultimodalConfig(c.width_out, c.width_in, c.queries, c.hidden, c.layers, c.heads, c.intermediate, cross_every=1, mlp_depth=c.mlp_depth)
    multimodal = MultimodalQFormer(sizes, connector.qformer)
    multimodal.add("rgb", c.width_in)
    rgb = multimodal.of("rgb")
    rgb.query.data.copy_(connector.query)
    rgb.norm.load_state_dict(connector.norm.state_dict())
    rgb.out.load_state_dict(connector.mlp.state_dict())
    return CremaModel(base.llm, base.tokenizer, base.ends, base.template, base.vision, base.audio, multimodal, "", base.time, base.number)


def from_blip2(blip: Blip2ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, audio: AudioEncoder | None) -> CremaModel:
    """On BLIP-2 of transformers, whose LM may be Flan-T5 or another with or without an encoder."""
    q, vision = blip.config.qformer_config, VisionEncoder(blip.vision_model, layer=-1)
    multimodal = MultimodalQFormer(MultimodalConfig(blip.language_projection.out_features, vision.width, blip.config.num_query_tokens, q.hidden_size, q.num_hidden_layers,
                                                    q.num_attention_heads, q.intermediate_size, q.cross_attention_frequency), blip.qformer.float())
    multimodal.add("rgb", vision.width)
    rgb = multimodal.of("rgb")
    rgb.query.data.copy_(blip.query_tokens)
    rgb.norm.load_state_dict(blip.vision_model.post_layernorm.state_dict())
    rgb.out[0].load_state_dict(blip.language_projection.state_dict())
    llm, apart = blip.language_model, blip.language_model.config.is_encoder_decoder            # of T5 a prompt ends with its end token, as of BLIP-2
    begin, after = ([], tokenizer.eos_token) if apart else ([tokenizer.bos_token_id], "\n")
    return CremaModel(llm, tokenizer, (begin, tokenizer.eos_token_id), ["", after], vision, audio, multimodal)


def load_crema(weights: str, base: str = "", audio: str = "", dtype: torch.dtype = torch.bfloat16) -> CremaModel:
    """weights: BLIP-2 by path or hub id, or "tiny-random"; "": the base in the folder `base`, by default the shipped one. audio: a BEATs checkpoint. Raises ModelError."""
    if weights == "tiny-random":
        return tiny_random().requires_grad_(False).eval()
    if not weights:
        return from_base(load_base(base) if base else load_base()).requires_grad_(False).eval()
    try:
        blip = Blip2ForConditionalGeneration.from_pretrained(weights, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(weights)
    except (OSError, ValueError) as error:
        raise missing_weights("BLIP-2", weights, error) from error
    tokenizer.add_tokens([PLACEHOLDERS["video"]], special_tokens=True)                    # its embedding is never looked up
    return from_blip2(blip, tokenizer, AudioEncoder(audio) if audio else None).requires_grad_(False).eval()


def tiny_random() -> CremaModel:
    """The classes of BLIP-2 with a T5 and 0.3 million random parameters, the same ones each time, and a tokenizer that knows bytes only."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={token: i for i, token in enumerate(["<pad>", "</s>", *alphabet])}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>", additional_special_tokens=[PLACEHOLDERS["video"]])
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = Blip2Config(vision_config=sizes | {"hidden_size": 32, "intermediate_size": 48, "image_size": 56, "patch_size": 14},
                         qformer_config=sizes | {"hidden_size": 32, "intermediate_size": 48, "encoder_hidden_size": 32, "vocab_size": 8},
                         text_config={"model_type": "t5", "d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": len(tokenizer), "decoder_start_token_id": 0},
                         num_query_tokens=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blip = Blip2ForConditionalGeneration(config)
        nn.init.normal_(blip.query_tokens, std=.02)                           # transformers begins with zeros
        return from_blip2(blip, tokenizer, AudioEncoder(TINY_MODEL["audio"]))
