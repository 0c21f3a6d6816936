"""CREMA (2402.05889): a frozen LM, and any modality beside a video.

    [P_t, Z_t]_t, [P_t]_t, [Zbar_t]_t, question    "concat": Zbar behind the video, as released
    [P_t, Z_t + Zbar_t]_t, question                "add": Zbar on top of the video
    one modality after the other, question         "none": not fused (unfused.py)

Z_t are the Q tokens of frame t and P_t the words "Frame t: ". Zbar_t are the tokens of all other
modalities, fused into Q tokens however many modalities there are (self-gated fusion, crema.py). All
go through one frozen Q-Former. A modality is a side channel of the video: what an encoder makes of
a sound, of pictures (flow, depth, normals, thermal, touch), of 3D points, or of anything that
encoders.register names. A clip without a modality has zero tokens in its place.

In modality-sequential training each batch gives one update per modality, of its own parameters and
the fusion (`set_active_modalities`). The passes of a batch share the tokens of the modalities that
do not learn (`frozen_tokens`).

What differs from the released code: the steps of a sound are aligned with the frames (released:
the mean of all steps at every frame; `aligned=False` does so too).

Shapes: T frames, S encoder tokens, W their width, Q queries, D LM width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, PreTrainedTokenizerFast

from crab_min.backbones.common import load_beats, load_pretrained, named_weights
from crab_min.backbones.composed import (
    PLACEHOLDERS,
    ComposedModel,
    add_embeddings,
    load_base,
    pad_tokens,
)
from crab_min.backbones.empty import counting_tokenizer, without_weights
from crab_min.backbones.tiny_random import tiny_blip2
from crab_min.backbones.unfused import steps_of, unfused_tokens
from crab_min.config import BackboneConfig, ModalityConfig
from crab_min.crema import MultimodalConfig, MultimodalQFormer, SelfGatedFusion, over_frames
from crab_min.encoders import AudioEncoder, MediaFeatures, VisionEncoder
from crab_min.errors import ModelError
from crab_min.interface import PromptLayout, PromptPart
from crab_min.model import NO_LABEL, AVLanguageModel, Batch, MediaTokens
from crab_min.qformer import use_few_queries
from crab_min.trained_parts import SavedPart


class Blip2(Blip2ForConditionalGeneration):
    """BLIP-2 as it is loaded: its Q-Former in float32, what is larger in bfloat16."""

    _keep_in_fp32_modules_strict = {"qformer", "query_tokens", "language_projection"}


class CremaModel(AVLanguageModel):
    """Encoders, an LM, and one Q-Former for all modalities; "rgb" is the video.

    Args:
        frame_prefix: the words before a frame.
        time: embedding that a base was trained with (composed.add_embeddings).
        number: likewise.
    """

    def __init__(
        self,
        llm: nn.Module,
        tokenizer: PreTrainedTokenizerFast,
        bos_ids: list[int],
        eos_id: int,
        layout: PromptLayout,
        vision: VisionEncoder,
        audio: AudioEncoder | None,
        multimodal: MultimodalQFormer,
        frame_prefix: str = "Frame {}: ",
        time: nn.Embedding | None = None,
        number: nn.Embedding | None = None,
    ):
        placeholder = tokenizer.convert_tokens_to_ids(PLACEHOLDERS["video"])
        media_tokens = {kind: MediaTokens([], placeholder, []) for kind in ("video", "image")}
        super().__init__(llm, tokenizer, media_tokens, bos_ids, eos_id, layout)
        self.vision = vision
        self.audio = audio
        self.multimodal = multimodal
        self.frame_prefix = frame_prefix
        self.time = time
        self.number = number
        self.frame_size = vision.size

        self.has_video = True  # False while modalities are trained without one
        # how modalities are fused
        self.fusion: SelfGatedFusion | None = None  # there is none before the first side modality
        self.fusion_mode = "concat"
        self.gated = True
        self.unfused_names: list[str] = []  # "none": the side modalities, in their order
        self.aligned = True
        # how they are trained, and which of them are read without their adapters (zero-shot)
        self.modality_dropout = 0.0
        self.active_modalities: set[str] = set()
        self.skipped_modalities: set[str] = set()
        self.cached_tokens: dict[str, Tensor] | None = None  # inside of `frozen_tokens`

    @property
    def is_encoder_decoder(self) -> bool:
        """Tell whether the LM reads the prompt with an encoder (T5)."""
        return self.llm.config.is_encoder_decoder

    # sounds through BEATs, all else as pictures: (T, S, W) each
    encode = ComposedModel.encode

    # --- prompts
    def arrange(
        self, parts: list[PromptPart], media: list[MediaFeatures]
    ) -> tuple[list[PromptPart], list[MediaFeatures]]:
        """Return parts and media as the LM is shown them: without a video the modalities alone."""
        kinds = {part.kind for part in parts if not part.side}
        if kinds != {"text"}:
            return super().arrange(parts, media)
        sides = iter(media)
        shown_parts, shown_media = [], []
        for part in parts:
            if part.side:
                shown_media.append(replace(next(sides), kind=part.side))
                part = replace(part, kind=part.side)
            shown_parts.append(part)
        return shown_parts, shown_media

    @property
    def appends_fused(self) -> bool:
        """Tell whether fused tokens have places of their own behind the video's."""
        return self.fusion is not None and self.fusion_mode == "concat"

    def token_count(self, medium: MediaFeatures) -> int:
        if self.fusion_mode == "none":
            steps = steps_of(medium, self.side_names, self.frame_prefix)
            return len(steps) * self.multimodal.config.queries
        video = len(medium.features) * self.multimodal.config.queries
        return 2 * video if self.appends_fused else video

    def placeholder_ids(self, medium: MediaFeatures) -> list[int]:
        frames = len(medium.features)
        placeholder = self.media_tokens[medium.kind].placeholder
        queries = [placeholder] * self.multimodal.config.queries
        if self.fusion_mode == "none":
            ids = []
            for step in steps_of(medium, self.side_names, self.frame_prefix):
                ids += self.encode_text(step.words) + queries
            return ids
        prefixes = [self.encode_text(self.frame_prefix.format(t + 1)) for t in range(frames)]

        # [P_t, Z_t]_t
        ids = []
        for prefix in prefixes:
            ids += prefix + queries

        # [P_t]_t, [Zbar_t]_t
        if self.appends_fused:
            for prefix in prefixes:
                ids += prefix
            ids += queries * frames
        return ids

    def lengths_by_join(self, medium: MediaFeatures) -> dict[str, int]:
        """Return the prompt tokens of a video with its modalities fused, and not fused."""
        if self.fusion is None:
            return {}
        unfused = 0
        for step in steps_of(medium, self.side_names, self.frame_prefix):
            unfused += len(self.encode_text(step.words)) + self.multimodal.config.queries
        return {"fused": len(self.placeholder_ids(medium)), "not fused": unfused}

    def collate(
        self,
        prompts: list[list[PromptPart]],
        media: list[list[MediaFeatures]],
        targets: list[str] | None = None,
    ) -> Batch:
        if self.training and self.modality_dropout and self.has_video:
            kept = [self.drop_modalities(*sample) for sample in zip(prompts, media)]
            prompts, media = map(list, zip(*kept))
        # an LM with an encoder has its answers apart from the prompt, padded on the right
        batch = super().collate(prompts, media, None if self.is_encoder_decoder else targets)
        if self.is_encoder_decoder and targets:
            answers = [torch.tensor(self.answer_ids(text), device=self.device) for text in targets]
            batch.labels = pad_sequence(answers, batch_first=True, padding_value=NO_LABEL)
        return batch

    def drop_modalities(
        self, parts: list[PromptPart], media: list[MediaFeatures]
    ) -> tuple[list[PromptPart], list[MediaFeatures]]:
        """Return a prompt and its media without a random share of the side modalities."""
        names = dict.fromkeys(part.side for part in parts if part.side)
        dropped = {name for name in names if torch.rand(()) < self.modality_dropout}
        media_parts = [part for part in parts if part.kind != "text"]
        kept = [own for part, own in zip(media_parts, media) if part.side not in dropped]
        return [part for part in parts if part.side not in dropped], kept

    def token_losses(self, batch: Batch) -> Tensor:
        if not self.is_encoder_decoder:
            return super().token_losses(batch)
        output = self.llm(
            inputs_embeds=self.embed(batch),
            attention_mask=batch.attention,
            labels=batch.labels,
            use_cache=False,
        )
        logits = output.logits.mT.float()  # (B, V, longest answer)
        return F.cross_entropy(logits, batch.labels, ignore_index=NO_LABEL, reduction="none")

    # --- tokens
    def tokens(self, media: list[MediaFeatures], media_index: list[int]) -> list[Tensor]:
        """Compute the tokens (token_count, D) of each video with its other modalities."""
        if self.fusion_mode == "none":
            return unfused_tokens(self, media, media_index)

        # Z, and Zbar on top of it or behind it
        lengths = [len(medium.features) for medium in media]
        streams = [self.encode_modality("rgb", media)]  # (sum of T, Q, D) each
        if self.fusion is not None:
            fused = self.fuse(media)
            if self.fusion_mode == "add":
                streams = [streams[0] + fused]
            else:
                streams.append(fused)

        # of each video all its Z, then its Zbar
        by_video = []
        for stream in streams:
            stream = add_embeddings(stream, lengths, media_index, self.time, self.number)
            by_video.append(stream.split(lengths))  # (T, Q, D) each
        return [torch.cat(video).flatten(0, 1) for video in zip(*by_video)]

    def encode_modality(self, name: str, media: list[MediaFeatures]) -> Tensor:
        """Compute the tokens (sum of T, Q, D) of one modality of several clips."""
        # an earlier pass of this batch has computed them
        if self.cached_tokens is not None and name in self.cached_tokens:
            return self.cached_tokens[name]

        features, mask = pad_tokens(media, self.device)  # (1, sum of T, S, W)
        is_adapted = name not in self.skipped_modalities
        tokens = self.multimodal(name, features, mask, adapted=is_adapted)[0]  # (sum of T, Q, D)
        if self.cached_tokens is not None and name not in self.active_modalities:
            self.cached_tokens[name] = tokens.detach()
        return tokens

    @contextmanager
    def frozen_tokens(self) -> Iterator[None]:
        """Share tokens of modalities that do not learn between the passes of a batch.

        Every forward pass inside has to be of the same batch. `set_active_modalities` drops the
        tokens of the modalities that learn from then on.
        """
        self.cached_tokens = {}
        try:
            yield
        finally:
            self.cached_tokens = None

    def fuse(self, videos: list[MediaFeatures]) -> Tensor:
        """Fuse the other modalities of each video into one stream (sum of T, Q, D)."""
        tokens = {name: self.tokens_at_frames(name, videos) for name in self.fusion.names}
        return self.fusion(tokens)

    def tokens_at_frames(self, name: str, videos: list[MediaFeatures]) -> Tensor:
        """Compute the tokens (sum of T, Q, D) of one modality at the frames of the videos.

        They are zero where a video lacks the modality.
        """
        sizes = self.multimodal.config
        tokens = []
        for video in videos:
            frames = len(video.features)
            tokens.append(torch.zeros(frames, sizes.queries, sizes.width_out, device=self.device))

        # the videos that have it, all in one call; its own steps become the video's
        positions = [i for i, video in enumerate(videos) if name in video.sides]
        if positions:
            sides = [videos[i].sides[name] for i in positions]
            steps = [len(side.features) for side in sides]
            encoded = self.encode_modality(name, sides).split(steps)  # (its own steps, Q, D) each
            for i, own in zip(positions, encoded):
                tokens[i] = over_frames(own[None], len(tokens[i]), self.aligned)[0]  # (T, Q, D)
        return torch.cat(tokens)

    # --- modalities
    @property
    def side_names(self) -> list[str]:
        if self.fusion_mode == "none":
            return [name for name in self.unfused_names if name in self.multimodal.parts]
        return self.fusion.names if self.fusion is not None else []

    def choose_modalities(self, config: ModalityConfig) -> None:
        """Take how modalities are joined; without rgb they stand in the prompt by themselves."""
        self.fusion_mode = config.fusion
        self.gated = config.gated
        self.unfused_names = [name for name in config.names if name != "rgb"]
        self.has_video = config.has_video
        if not self.has_video:
            self.media_tokens |= dict.fromkeys(self.unfused_names, self.media_tokens["video"])

    def configure(self, config: ModalityConfig) -> None:
        """Take the settings of a run, before modalities are added. rgb gets a new adapter."""
        self.choose_modalities(config)
        self.modality_dropout = config.modality_dropout
        self.multimodal.config.rank = config.modality_rank
        for linear in self.multimodal.adapted_linears():
            linear.add("rgb", config.modality_rank)

    def add_side_channel(
        self, name: str, width: int, settings: ModalityConfig | None = None
    ) -> None:
        """Add a side modality with features `width` wide; the others stay as they are.

        It starts with the queries, norm and projection that rgb has, and with zero columns in the
        fusion.

        Raises:
            ModelError: a name that is taken, or that cannot be one.
        """
        self.multimodal.add(name, width)
        rgb = self.multimodal.module_of("rgb").state_dict()  # without an input projection
        self.multimodal.module_of(name).load_state_dict(rgb, strict=False)
        if self.fusion_mode != "none":
            self.rebuild_fusion([*self.side_names, name])

    def rebuild_fusion(self, names: list[str]) -> None:
        """Make the fusion of the modalities `names`, with the columns that it had of them.

        Columns of new modalities are zero, so that they change nothing at first.
        """
        d = self.multimodal.config.width_out  # a modality has d columns
        old, self.fusion = self.fusion, SelfGatedFusion(names, d, self.gated).to(self.device)
        new = self.fusion.linear
        nn.init.zeros_(new.weight)
        nn.init.zeros_(new.bias)
        if old is None:
            return
        old_columns = dict(zip(old.names, old.linear.weight.split(d, 1)))
        with torch.no_grad():
            new.bias.copy_(old.linear.bias)
            for name, columns in zip(names, new.weight.split(d, 1)):
                if name in old_columns:
                    columns.copy_(old_columns[name])

    # --- what is trained
    def modality_parameters(self, name: str) -> list[nn.Parameter]:
        """Return what a step on one modality trains: its own parameters and the fusion."""
        parameters = list(self.multimodal.parameters_of(name).values())
        if self.fusion is not None:
            parameters += self.fusion.parameters()
        return parameters

    def set_active_modalities(self, names: list[str]) -> None:
        """Train these modalities and the fusion, and no other modality.

        Raises:
            ModelError: a modality that the model does not have.
        """
        there = ["rgb", *self.side_names]
        for name in names:
            if name not in there:
                raise ModelError(
                    f"modality {name!r}: not in this model, which has {', '.join(there)}"
                )
        # the fusion learns with every modality, and stays as it is
        self.multimodal.requires_grad_(False)
        self.active_modalities = set(names)
        for name in names:
            if self.cached_tokens is not None:
                self.cached_tokens.pop(name, None)  # they are about to change
            for parameter in self.modality_parameters(name):
                parameter.requires_grad_(True)

    def gradient_norm(self, name: str) -> float:
        """Return the L2 norm of the gradient of a modality's adapter, all its A and B."""
        norms = []
        for key, parameter in self.multimodal.parameters_of(name).items():
            in_adapter = not key.startswith("parts.")  # queries, norm and projection
            if in_adapter and parameter.grad is not None:
                norms.append(parameter.grad.norm())
        return torch.stack(norms).norm().item() if norms else 0.0

    def trainable_modules(self) -> dict[str, nn.Module]:
        modules = super().trainable_modules()
        for name in ["rgb", *self.side_names]:
            modules[f"modality_{name}"] = nn.ParameterList(
                self.multimodal.parameters_of(name).values()
            )
        if self.fusion is not None:
            modules["fusion"] = self.fusion
        return modules

    def set_trainable(self, parts: list[str]) -> None:
        super().set_trainable(parts)
        self.set_active_modalities(self.trained_modalities)

    @property
    def trained_modalities(self) -> list[str]:
        """Return the modalities that a run trains, rgb among them if it has a video."""
        return ["rgb", *self.side_names] if self.has_video else self.side_names

    # --- files
    def parts_to_save(self) -> list[str]:
        """Return all modalities and the fusion, and what else learns or was loaded."""
        parts = [f"modality_{name}" for name in self.trained_modalities]
        if self.fusion is not None:
            parts.append("fusion")
        # released weights bring a frozen Q-Former of their own
        if "shared_qformer" in self.loaded_parts:
            parts.append("shared_qformer")
        return list(dict.fromkeys([*super().parts_to_save(), *parts]))

    def part_state(self, name: str) -> dict[str, Tensor]:
        if name == "shared_qformer":  # what all modalities share
            state = self.multimodal.qformer.state_dict(prefix="qformer.")
            return {k: v for k, v in state.items() if ".A." not in k and ".B." not in k}
        if name.startswith("modality_"):
            parameters = self.multimodal.parameters_of(name.removeprefix("modality_"))
            return {key: parameter.data for key, parameter in parameters.items()}
        return super().part_state(name)

    def part_config(self, name: str) -> dict:
        if name == "fusion":
            return {"names": self.side_names, "mode": self.fusion_mode, "aligned": self.aligned}
        if name.startswith("modality_"):
            name = name.removeprefix("modality_")
            module = self.multimodal.module_of(name)
            return {"width": module.width, "rank": self.rank_of(name), "normed": module.normed}
        return super().part_config(name)

    def prepare_part(self, part: SavedPart) -> None:
        if part.name == "fusion":
            self.fusion_mode = part.config["mode"]
            self.aligned = part.config["aligned"]
            if part.config["names"] != self.side_names:
                self.rebuild_fusion(part.config["names"])
        elif part.name.startswith("modality_"):
            name = part.name.removeprefix("modality_")
            self.prepare_modality(name, part.config["width"], part.config["rank"])
            self.multimodal.module_of(name).normed = part.config.get("normed", True)
        elif part.name != "shared_qformer":
            super().prepare_part(part)

    def prepare_modality(self, name: str, width: int, rank: int) -> None:
        """Make a modality of this width and rank, unless it is there."""
        self.multimodal.config.rank = rank
        if name in self.multimodal.parts:
            if (self.multimodal.module_of(name).width, self.rank_of(name)) == (width, rank):
                return
            self.multimodal.remove(name)
        self.multimodal.add(name, width)

    def rank_of(self, name: str) -> int:
        """Return the rank of a modality's adapter in the Q-Former."""
        return self.multimodal.adapted_linears()[0].A[name].out_features


# --- weights --------------------------------------------------------------------------------------


def from_base(base: ComposedModel) -> CremaModel:
    """Make a model of the tiny base, whose visual connector all modalities share."""
    connector = base.visual_qformer
    sizes = MultimodalConfig(**asdict(connector.config))
    multimodal = MultimodalQFormer(sizes, connector.qformer)
    multimodal.add("rgb", sizes.width_in)
    rgb = multimodal.module_of("rgb")
    rgb.query.data.copy_(connector.query)
    rgb.norm.load_state_dict(connector.norm.state_dict())
    rgb.out.load_state_dict(connector.mlp.state_dict())
    return CremaModel(
        base.llm,
        base.tokenizer,
        base.bos_ids,
        base.eos_id,
        base.layout,
        base.vision,
        base.audio,
        multimodal,
        frame_prefix="",
        time=base.time,
        number=base.number,
    )


def from_blip2(
    blip: Blip2ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    audio: AudioEncoder | None,
) -> CremaModel:
    """Make a model of BLIP-2, whose LM may be Flan-T5 or one without an encoder."""
    # its Q-Former, and rgb as BLIP-2 reads images
    vision = VisionEncoder(blip.vision_model, layer=-1)
    qformer = blip.config.qformer_config
    sizes = MultimodalConfig(
        width_out=blip.language_projection.out_features,
        width_in=vision.width,
        queries=blip.config.num_query_tokens,
        hidden=qformer.hidden_size,
        layers=qformer.num_hidden_layers,
        heads=qformer.num_attention_heads,
        intermediate=qformer.intermediate_size,
        cross_every=qformer.cross_attention_frequency,
    )
    multimodal = MultimodalQFormer(sizes, use_few_queries(blip.qformer.float()))
    multimodal.add("rgb", vision.width)
    rgb = multimodal.module_of("rgb")
    rgb.query.data.copy_(blip.query_tokens)
    rgb.norm.load_state_dict(blip.vision_model.post_layernorm.state_dict())
    rgb.out[0].load_state_dict(blip.language_projection.state_dict())

    # a prompt of T5 ends with its end token, as in BLIP-2
    llm = blip.language_model
    if llm.config.is_encoder_decoder:
        bos_ids, layout = [], PromptLayout("", tokenizer.eos_token)
    else:
        bos_ids, layout = [tokenizer.bos_token_id], PromptLayout("", "\n")
    eos_id = tokenizer.eos_token_id
    return CremaModel(llm, tokenizer, bos_ids, eos_id, layout, vision, audio, multimodal)


def load_blip2(config: BackboneConfig, empty: bool) -> CremaModel:
    """Load BLIP-2 with a BEATs, or a base where no weights are named.

    Args:
        empty: build it without weights (empty.py).

    Raises:
        ModelError: weights that are not there.
    """
    weights = config.weights
    if not weights:
        return from_base(load_base(config.base, empty=empty))
    if weights == "tiny-random":
        blip, tokenizer = tiny_blip2(PLACEHOLDERS["video"])
    elif empty:
        blip = without_weights(Blip2ForConditionalGeneration, weights)
        tokenizer = counting_tokenizer("</s>", {"video_token": PLACEHOLDERS["video"]})
    else:
        not_in_4_bits = [".*vision_model", ".*qformer", ".*language_projection", "lm_head"]
        with named_weights("BLIP-2", weights):
            blip = load_pretrained(Blip2, weights, config.load_in_4bit, not_in_4_bits)
            tokenizer = AutoTokenizer.from_pretrained(weights)
        # the embedding of the placeholder is never looked up
        tokenizer.add_tokens([PLACEHOLDERS["video"]], special_tokens=True)
    return from_blip2(blip, tokenizer, load_beats(config, empty))
