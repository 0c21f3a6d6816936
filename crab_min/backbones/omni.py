"""Qwen2.5-Omni's thinker, which has encoders of its own (Crab+, 2603.04128).

The model of transformers is used as it is: its processors, encoders, positions and LM. Two things
are done here. The tokens of its encoders are put into the prompt, so that one function builds the
prompts of every backbone. And each video says how many seconds a pair of its frames spans; the
processor of transformers takes one rate for a whole call, and assumes two frames per second where
none is given.

What differs from the released code: padding on the left. Our layout has text between the two
videos of a2v and the two sounds of v2a, and seconds of a pair of frames from the clip's length; the
released one runs them together (`separate_media=False`) and always has 2.0 (`seconds_per_grid`).

Shapes: P patches of 14 x 14 pixels and two frames, F mel frames of 10 ms, D width of the LM.

Page of the course: docs/course/22_native.md.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from crab_min.backbones.common import load_pretrained, named_weights
from crab_min.backbones.empty import counting_tokenizer, without_weights
from crab_min.backbones.patched import PatchedModel
from crab_min.backbones.tiny_random import OMNI_TOKENS, omni_processor, tiny_omni
from crab_min.config import BackboneConfig
from crab_min.devices import in_float32
from crab_min.encoders import MediaFeatures
from crab_min.interface import PromptLayout, PromptPart
from crab_min.model import Batch, MediaTokens
from crab_min.pave import Patches

RATE = 16000  # Hz
QWEN_CHAT = PromptLayout(
    before="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
    after="<|im_end|>\n<|im_start|>assistant\n",
    turn="\n<|im_start|>user\n",
    system="You are a helpful assistant.",
)
# kind -> the tokenizer's names of the tokens before a medium, its placeholder, after it
MARKS = {
    "video": ("vision_bos", "video", "vision_eos"),
    "image": ("vision_bos", "image", "vision_eos"),
    "audio": ("audio_bos", "audio", "audio_eos"),
}


class OmniModel(PatchedModel):
    """Qwen2.5-Omni's thinker and its processor.

    Frames are 224 x 224 pixels: 64 tokens per pair of frames; sound has 25 tokens per second.
    """

    joins_tokens = False  # its positions are those of the video's own grid
    frame_size = 224
    encodes_in_tokens = True

    def __init__(
        self,
        thinker: Qwen2_5OmniThinkerForConditionalGeneration,
        processor: Qwen2_5OmniProcessor,
        layout: PromptLayout = QWEN_CHAT,
    ):
        tokenizer = processor.tokenizer
        media_tokens = {}
        for kind, names in MARKS.items():
            before, placeholder, after = (getattr(tokenizer, f"{name}_token_id") for name in names)
            media_tokens[kind] = MediaTokens([before], placeholder, [after])
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        super().__init__(thinker, tokenizer, media_tokens, bos_ids=[], eos_id=end, layout=layout)
        self.processor = processor

        # there is no state before a projector: patches query with the tokens themselves
        width = thinker.config.text_config.hidden_size
        self.patches = Patches()
        self.patch_widths = (width, width)

    @property
    def thinker(self) -> Qwen2_5OmniThinkerForConditionalGeneration:
        """Return the transformers model, with or without an adapter in it."""
        return self.base_lm

    @property
    def media_device(self) -> torch.device:
        """Return where frames and sounds are processed: beside the encoders, if that is a GPU."""
        return self.device

    # --- media
    def encode(self, kind: str, media: list, seconds: list[float]) -> list[MediaFeatures]:
        """Prepare what the encoders take: patches (P, 1176), or mel frames (F, 128).

        The encoders themselves run in `tokens`.
        """
        # what is neither sound nor image is a video, or another view of it
        others = {"audio": self.mel_frames, "image": self.image_patches}
        features = others.get(kind, self.video_patches)(media)
        return [MediaFeatures(kind, x, seconds=length) for x, length in zip(features, seconds)]

    def mel_frames(self, sounds: list[list]) -> list[Tensor]:
        """Compute the mel frames (F, 128) of several sounds, the waves of each joined.

        The extractor of transformers pads to 300 s by default, of which the model takes none. A
        window of silence behind the longest sound is all that its last frames can reach.
        """
        waves = []
        for sound in sounds:
            wave = np.concatenate([np.asarray(array) for array in sound])
            # at least a second, as in the release
            waves.append(np.pad(wave, (0, max(0, RATE - len(wave)))))
        extractor = self.processor.feature_extractor
        with in_float32(self.media_device):  # a logarithm wants it
            mel = extractor(
                waves,
                sampling_rate=RATE,
                return_attention_mask=True,
                truncation=False,
                max_length=max(map(len, waves)) + extractor.n_fft,
                padding="max_length",
                return_tensors="pt",
                device=str(self.media_device),
            )
        frames = mel["input_features"].mT  # (M, longest F, 128)
        return [x[: int(mask.sum())] for x, mask in zip(frames, mel["attention_mask"])]

    def image_patches(self, images: list) -> list[Tensor]:
        """Cut images (1, H, W, 3) into patches (P, 1176) each."""
        processor = self.processor.image_processor
        images = [self.channels_first(image)[0] for image in images]  # (3, H, W) each
        patches = processor(images=images, do_resize=False, return_tensors="pt")
        counts = patches["image_grid_thw"].prod(-1).tolist()
        return list(patches["pixel_values"].split(counts))

    def video_patches(self, videos: list) -> list[Tensor]:
        """Cut videos (T, H, W, 3) into patches (P, 1176) each, first in time, then in space."""
        patches = self.processor.video_processor(
            videos=[self.channels_first(video) for video in videos],
            do_resize=False,
            do_sample_frames=False,
            cap_pixels_per_frame=False,
            return_tensors="pt",
        )
        counts = patches["video_grid_thw"].prod(-1).tolist()
        return list(patches["pixel_values_videos"].split(counts))

    def channels_first(self, frames: np.ndarray) -> Tensor:
        """Return frames (T, H, W, 3) as (T, 3, H, W) where they are processed."""
        return torch.as_tensor(np.asarray(frames)).to(self.media_device).permute(0, 3, 1, 2)

    def grid(self, medium: MediaFeatures) -> tuple[int, int, int]:
        """Return pairs of frames, rows and columns of the patches of frames."""
        side = self.frame_size // self.processor.image_processor.patch_size
        return len(medium.features) // side**2, side, side

    def token_count(self, medium: MediaFeatures) -> int:
        if medium.kind == "audio":
            # a convolution and a pooling of stride 2
            return ((len(medium.features) - 1) // 2 - 1) // 2 + 1
        return len(medium.features) // self.processor.image_processor.merge_size**2

    def tokens(self, media: list[MediaFeatures], media_index: list[int]) -> list[Tensor]:
        """Compute the tokens (token_count, D) of each medium: the encoders', and patched."""
        tokens = self.encoder_tokens(media)
        patched = [i for i, medium in enumerate(media) if medium.sides]
        videos = []
        for i in patched:
            pairs = self.grid(media[i])[0]
            videos.append(tokens[i].unflatten(0, (pairs, -1)))  # (T, S, D)
        queries = [video.float() for video in videos]
        sides = [media[i].side_tokens() for i in patched]
        for i, video in zip(patched, self.patches.add_to(videos, queries, sides)):
            tokens[i] = video.flatten(0, 1).to(tokens[i].dtype)  # (T * S, D)
        return tokens

    @torch.no_grad()
    def encoder_tokens(self, media: list[MediaFeatures]) -> list[Tensor]:
        """Compute the tokens (token_count, D) of each medium, all of a kind in one call."""
        tokens: list = [None] * len(media)
        for kind in self.media_tokens:
            of_kind = [i for i, medium in enumerate(media) if medium.kind == kind]
            if not of_kind:
                continue
            encode = self.sound_tokens if kind == "audio" else self.frame_tokens
            for i, medium_tokens in zip(of_kind, encode([media[i] for i in of_kind])):
                tokens[i] = medium_tokens
        return tokens

    def frame_tokens(self, media: list[MediaFeatures]) -> list[Tensor]:
        """Compute the tokens (token_count, D) of several videos, or of several images."""
        thinker = self.thinker
        patches = torch.cat([self.as_input(medium) for medium in media])  # (all P, 1176)
        grids = torch.tensor([self.grid(medium) for medium in media], device=thinker.device)
        is_image = media[0].kind == "image"
        encode = thinker.get_image_features if is_image else thinker.get_video_features
        return encode(patches, grids).pooler_output

    def sound_tokens(self, media: list[MediaFeatures]) -> list[Tensor]:
        """Compute the tokens (token_count, D) of several sounds."""
        mel = [self.as_input(medium) for medium in media]
        mel = pad_sequence(mel, batch_first=True)  # (M, F, 128)
        mask = frame_mask(media, self.thinker.device)
        output = self.thinker.get_audio_features(mel.mT, feature_attention_mask=mask)
        tokens = output.last_hidden_state  # (all tokens, D)
        return tokens.split([self.token_count(medium) for medium in media])

    def as_input(self, medium: MediaFeatures) -> Tensor:
        """Return features in the device and precision of the encoders."""
        return medium.features.to(self.thinker.device, self.thinker.dtype)

    # --- prompts
    def arrange(
        self, parts: list[PromptPart], media: list[MediaFeatures]
    ) -> tuple[list[PromptPart], list[MediaFeatures]]:
        if not self.layout.separate_media:
            parts, media = run_together(parts, media)
        return super().arrange(parts, media)

    def extra_lm_inputs(self, batch: Batch) -> dict:
        """Return what the thinker computes its positions in time, height and width from."""
        device = batch.ids.device
        videos = [medium for medium in batch.media if medium.kind == "video"]
        images = [medium for medium in batch.media if medium.kind == "image"]
        sounds = [medium for medium in batch.media if medium.kind == "audio"]
        inputs = {"input_ids": batch.ids}
        if images:
            grids = [self.grid(medium) for medium in images]
            inputs["image_grid_thw"] = torch.tensor(grids, device=device)
        if videos:
            grids = [self.grid(medium) for medium in videos]
            seconds = [medium.seconds / grid[0] for medium, grid in zip(videos, grids)]
            if self.layout.seconds_per_grid:
                seconds = [self.layout.seconds_per_grid] * len(videos)
            inputs["video_grid_thw"] = torch.tensor(grids, device=device)
            inputs["video_second_per_grid"] = torch.tensor(seconds, device=device)
        if sounds:
            inputs["feature_attention_mask"] = frame_mask(sounds, device)
        return inputs

    def logits(self, batch: Batch, last: int) -> Tensor:
        """Compute the logits (B, last, V) at the last positions alone; V is 152 thousand."""
        # the thinker's own forward has no `logits_to_keep`, so its model and its head are called
        output = self.thinker.model(
            inputs_embeds=self.embed(batch),
            attention_mask=batch.attention,
            **self.extra_lm_inputs(batch),
            use_cache=False,
        )
        return self.thinker.lm_head(output.last_hidden_state[:, -last:])

    def generate(
        self, batch: Batch, max_new_tokens: int, streamer=None, beams: int = 1
    ) -> list[str]:
        # the thinker's own forward would compute the logits of whole prompts
        def keep_last(head: nn.Module, inputs: tuple[Tensor]) -> Tensor:
            return inputs[0][:, -1:]  # (B, L, D) -> (B, 1, D)

        with self.thinker.lm_head.register_forward_pre_hook(keep_last):
            return super().generate(batch, max_new_tokens, streamer, beams)


class EmptyOmniModel(OmniModel):
    """An OmniModel of whose encoders only the widest moment runs: an MLP on all patches or frames.

    The rest does not run because it looks at the values of grids.
    """

    @property
    def media_device(self) -> torch.device:
        return torch.device("cpu")

    def encoder_tokens(self, media: list[MediaFeatures]) -> list[Tensor]:
        encoders = self.thinker.model
        visual, sound = encoders.visual, encoders.audio_tower
        patches = sum(len(medium.features) for medium in media if medium.kind != "audio")
        frames = sum(len(medium.features) for medium in media if medium.kind == "audio")
        with torch.no_grad():
            if patches:
                visual.blocks[0].mlp(self.zeros(patches, visual.config.hidden_size))
            if frames:  # a convolution of stride 2
                sound.layers[0].fc1(self.zeros(frames // 2, sound.config.d_model))
        width = self.thinker.config.text_config.hidden_size
        return [self.zeros(self.token_count(medium), width) for medium in media]

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.thinker.dtype)


def frame_mask(sounds: list[MediaFeatures], device: torch.device) -> Tensor:
    """Return which mel frames of several sounds are not padding (M, longest F)."""
    ones = [torch.ones(len(sound.features), dtype=torch.long, device=device) for sound in sounds]
    return pad_sequence(ones, batch_first=True)


def run_together(
    parts: list[PromptPart], media: list[MediaFeatures]
) -> tuple[list[PromptPart], list[MediaFeatures]]:
    """Join a medium to the one before it, without text, where both are of one kind.

    So the released Crab+ lays out the two videos of a2v and the two sounds of v2a.
    """
    joined_parts, joined_media = [], []
    last = None  # where the last medium stands in joined_parts
    remaining = iter(media)
    for part in parts:
        if part.kind == "text":
            joined_parts.append(part)
            continue
        medium = next(remaining)
        if last is not None and joined_parts[last].kind == part.kind:
            del joined_parts[last + 1 :]  # the text between them
            before = joined_media[-1]
            features = torch.cat([before.features, medium.features])
            seconds = before.seconds + medium.seconds
            joined_media[-1] = replace(before, features=features, seconds=seconds)
        else:
            last = len(joined_parts)
            joined_parts.append(part)
            joined_media.append(medium)
    return joined_parts, joined_media


def load_omni(config: BackboneConfig, empty: bool) -> OmniModel:
    """Load Qwen2.5-Omni's thinker.

    Args:
        empty: build it without weights (empty.py).

    Raises:
        ModelError: weights that are not there.
    """
    weights = config.weights
    if weights == "tiny-random":
        thinker, processor = tiny_omni()
    elif empty:
        thinker = without_weights(Qwen2_5OmniThinkerForConditionalGeneration, weights)
        tokenizer = counting_tokenizer("<|im_end|>", OMNI_TOKENS)
        processor = omni_processor(thinker.config.audio_config.num_mel_bins, tokenizer)
    else:
        not_in_4_bits = [".*visual", ".*audio_tower", "lm_head"]
        with named_weights("Qwen2.5-Omni", weights):
            thinker = load_pretrained(
                Qwen2_5OmniThinkerForConditionalGeneration,
                weights,
                config.load_in_4bit,
                not_in_4_bits,
            )
            processor = Qwen2_5OmniProcessor.from_pretrained(weights)
    model_class = EmptyOmniModel if thinker.device.type == "meta" else OmniModel
    layout = replace(QWEN_CHAT, separate_media=config.separate_media)
    return model_class(thinker, processor, layout)
