"""LLaVA-OneVision, the video LM that PAVE patches (2503.19794). It takes no sound.

The model of transformers is used as it is. Its video features are taken where it computes them: a
hook on its projector gives what goes in, which the patches query with, and its own call gives the
tokens that come out. As in PAVE a learned newline follows every row of a frame's grid (transformers
puts one behind the whole video), and an image is a video of one frame. Sound is a side channel
alone: through BEATs, or from a file of features.

Shapes: T frames, R x R tokens per frame after the model's pooling, V width of its vision encoder,
D LM width.
"""

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from crab_min.backbones.common import encode_sounds, load_beats, load_pretrained, named_weights
from crab_min.backbones.empty import counting_tokenizer, without_weights
from crab_min.backbones.omni import QWEN_CHAT
from crab_min.backbones.patched import PatchedModel
from crab_min.backbones.tiny_random import LLAVA_TOKENS, tiny_llava
from crab_min.config import BackboneConfig
from crab_min.encoders import AudioEncoder, MediaFeatures
from crab_min.model import MediaTokens
from crab_min.pave import Patches


class LlavaModel(PatchedModel):
    """LLaVA-OneVision and, for sound as a side channel, a BEATs."""

    encodes_in_tokens = True

    def __init__(
        self,
        llava: LlavaOnevisionForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        audio: AudioEncoder | None,
    ):
        placeholder = llava.config.video_token_index
        super().__init__(
            llava,
            tokenizer,
            {kind: MediaTokens([], placeholder, []) for kind in ("video", "image")},
            bos_ids=[],
            eos_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
            layout=QWEN_CHAT,
        )
        vision = llava.config.vision_config
        self.audio = audio
        self.frame_size = vision.image_size
        patches_per_side = vision.image_size // vision.patch_size
        self.grid_side = -(-patches_per_side // 2)  # R; pooling halves the grid, rounding up
        self.patches = Patches()
        self.patch_widths = (vision.hidden_size, llava.config.text_config.hidden_size)

    @property
    def llava(self) -> nn.Module:
        """Return the transformers model without its head, with or without an adapter."""
        return self.base_lm.model

    @torch.no_grad()
    def encode(self, kind: str, media: list, seconds: list[float]) -> list[MediaFeatures]:
        """Prepare pixels (T, 3, H, W) in -1 .. 1; encode a second view and sound.

        Raises:
            ModelError: sound without a BEATs.
        """
        if kind == "audio":
            return encode_sounds(self.audio, media)
        pixels = []
        for frames in media:
            x = torch.as_tensor(frames).to(self.device).permute(0, 3, 1, 2)  # (T, 3, H, W)
            pixels.append(x.float() / 127.5 - 1)
        if kind == "view":
            return [MediaFeatures(kind, self.queries_and_tokens(x)[0]) for x in pixels]
        return [MediaFeatures(kind, x) for x in pixels]

    @torch.no_grad()
    def queries_and_tokens(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode frames (T, 3, H, W).

        Returns:
            features before the projector (T, R R, V), and tokens (T, R R, D).
        """
        llava = self.llava
        projected = []
        with llava.multi_modal_projector.register_forward_hook(
            lambda module, inputs, output: projected.append(inputs[0])
        ):
            video = pixels.to(self.device, llava.vision_tower.dtype)[None]  # (1, T, 3, H, W)
            output = llava.get_video_features(pixel_values_videos=video)
        tokens = output.pooler_output[0, :-1]  # (T R R, D), without the newline at its end
        queries = llava.apply_pooling(projected[0]).float()  # (T, R R, V)
        return queries, tokens.unflatten(0, (len(pixels), -1))

    def token_count(self, medium: MediaFeatures) -> int:
        own = len(medium.features) * self.grid_side * (self.grid_side + 1)
        return own + self.patches.count_tokens(medium.side_tokens())

    def tokens(self, media: list[MediaFeatures], media_index: list[int]) -> list[Tensor]:
        """Compute the tokens (T R (R + 1), D) of each medium, with what the patches add."""
        queries, tokens = zip(*[self.queries_and_tokens(medium.features) for medium in media])
        sides = [medium.side_tokens() for medium in media]
        with_newlines = []
        for x, side in zip(self.patches.add_to(tokens, queries, sides), sides):
            x = x.to(tokens[0].dtype)  # (T, R R, D)
            x = x.unflatten(1, (self.grid_side, self.grid_side))  # (T, R, R, D)
            newline = self.llava.image_newline.to(x.dtype).expand(*x.shape[:2], 1, -1)
            x = torch.cat([x, newline], 2).flatten(1, 2)  # (T, R (R + 1), D)
            with_newlines.append(self.patches.join_tokens(x, side))
        return with_newlines


def load_llava(config: BackboneConfig, empty: bool) -> LlavaModel:
    """Load LLaVA-OneVision, and a BEATs for sound as a side channel.

    Args:
        empty: build it without weights (empty.py).

    Raises:
        ModelError: weights that are not there.
    """
    weights = config.weights
    if weights == "tiny-random":
        llava, tokenizer = tiny_llava()
    elif empty:
        llava = without_weights(LlavaOnevisionForConditionalGeneration, weights)
        tokenizer = counting_tokenizer("<|im_end|>", LLAVA_TOKENS)
    else:
        not_in_4_bits = [".*vision_tower", ".*multi_modal_projector", "lm_head"]
        with named_weights("LLaVA-OneVision", weights):
            llava = load_pretrained(
                LlavaOnevisionForConditionalGeneration, weights, config.load_in_4bit, not_in_4_bits
            )
            tokenizer = AutoTokenizer.from_pretrained(weights)
    return LlavaModel(llava, tokenizer, load_beats(config, empty))
