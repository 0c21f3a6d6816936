"""LLaVA-OneVision from transformers, the video LM that PAVE patches (2503.19794, section 3.1). It sees and does not hear.

The model is used as it is. Its video features are read where it computes them: a hook on its projector gives what goes in (the queries of
a patch), its own call gives the tokens that come out. As in PAVE a learned newline follows every row of a frame's grid (transformers puts
one behind the whole video); an image is a video of one frame. Sound is a side channel alone: through BEATs, or from a feature file.

Shapes: T frames, R x R tokens a frame after the model's pooling, V width of its vision encoder, D width of the LM.
"""
import tokenizers
import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from crab_min.backbones.omni import TEMPLATE
from crab_min.backbones.sizes import TINY_MODEL
from crab_min.encoders import AudioEncoder, MediaFeatures
from crab_min.errors import ModelError
from crab_min.model import AVLanguageModel, missing_weights
from crab_min.pave import Patches


class LlavaModel(AVLanguageModel):
    """LLaVA-OneVision and, for sound as a side channel, a BEATs."""

    def __init__(self, llava: LlavaOnevisionForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, audio: AudioEncoder | None):
        place = llava.config.video_token_index
        super().__init__(llava, tokenizer, {kind: ([], place, []) for kind in ("video", "image")}, ([], tokenizer.convert_tokens_to_ids("<|im_end|>")), TEMPLATE)
        vision = llava.config.vision_config
        self.audio, self.frame_size, self.side = audio, vision.image_size, -(-(vision.image_size // vision.patch_size) // 2)
        self.patches, self.patch_widths = Patches(), (vision.hidden_size, llava.config.text_config.hidden_size)

    @property
    def llava(self) -> nn.Module:
        """The transformers model without its head, with or without an adapter inside."""
        return (self.llm.get_base_model() if hasattr(self.llm, "get_base_model") else self.llm).model

    @torch.no_grad()
    def encode(self, kind: str, media: list, seconds: list[float]) -> list[MediaFeatures]:
        """Pixels (T, 3, H, W) in -1 .. 1, for SigLIP; of a second view its features (T, R R, V); of a sound (T, S, W) of BEATs. Raises ModelError."""
        if kind == "audio":
            if self.audio is None:
                raise ModelError("--side audio: LLaVA-OneVision does not hear; name a BEATs checkpoint with --audio, or give features as files (.npy, .pt) under \"sides\"")
            heard = [self.audio([torch.as_tensor(wave) for wave in waves]) for waves in media]
            return [MediaFeatures(kind, x[0], mask[0]) for x, mask in heard]
        found = [MediaFeatures(kind, torch.as_tensor(frames).permute(0, 3, 1, 2).float() / 127.5 - 1) for frames in media]
        if kind == "view":
            found = [MediaFeatures(kind, self.look(m)[0]) for m in found]
        return found

    def look(self, media: MediaFeatures) -> tuple[Tensor, Tensor]:
        """(before the projector (T, R R, V), tokens (T, R R, D)) of frames."""
        seen, llava = [], self.llava
        hook = llava.multi_modal_projector.register_forward_hook(lambda module, given, out: seen.append(given[0]))
        try:
            pixels = media.features.to(self.device, llava.vision_tower.dtype)
            tokens = llava.get_video_features(pixel_values_videos=pixels[None]).pooler_output[0, :-1]          # without the newline at its end
        finally:
            hook.remove()
        return llava.apply_pooling(seen[0]).float(), tokens.unflatten(0, (len(pixels), -1))

    def count(self, media: MediaFeatures) -> int:
        return len(media.features) * self.side * (self.side + 1)

    def tokens(self, media: list[MediaFeatures], numbers: list[int]) -> list[Tensor]:
        """Tokens (T R (R + 1), D) of each medium, with what the patches add."""
        with torch.no_grad():
            queries, tokens = zip(*map(self.look, media)) if media else ((), ())
        rows = []
        patched = self.patches.add_to(tokens, queries, [m.side_tokens() for m in media])
        for before, x in zip(tokens, patched):
            x = x.to(before.dtype).unflatten(1, (self.side, self.side))
            newline = self.llava.image_newline.to(x.dtype).expand(*x.shape[:2], 1, -1)
            rows.append(torch.cat([x, newline], 2).flatten(0, 2))
        return rows


def load_llava(weights: str, audio: str = "", dtype: torch.dtype = torch.bfloat16) -> LlavaModel:
    """LLaVA-OneVision by local path or hub id, frozen and in evaluation mode; or "tiny-random". audio: a BEATs checkpoint. Raises ModelError."""
    if weights == "tiny-random":
        return tiny_random().requires_grad_(False).eval()
    try:
        llava = LlavaOnevisionForConditionalGeneration.from_pretrained(weights, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(weights)
    except OSError as error:
        raise missing_weights("LLaVA-OneVision", weights, error) from error
    return LlavaModel(llava, tokenizer, AudioEncoder(audio) if audio else None).requires_grad_(False).eval()


def tiny_random() -> LlavaModel:
    """The same classes with 0.3 million random parameters, the same ones each time, and a tokenizer that knows bytes only."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    text = Qwen2Tokenizer(vocab={c: i for i, c in enumerate(alphabet)}, merges=[], unk_token=None, bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                          extra_special_tokens={"im_start_token": "<|im_start|>", "image_token": "<image>", "video_token": "<video>"})
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56,
                       "patch_size": 14, "vision_use_head": False},
        text_config={"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                     "vocab_size": len(text)},
        image_token_index=text.image_token_id, video_token_index=text.video_token_id, image_grid_pinpoints=[[56, 56]])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlavaModel(LlavaOnevisionForConditionalGeneration(config), text, AudioEncoder(TINY_MODEL["audio"]))
