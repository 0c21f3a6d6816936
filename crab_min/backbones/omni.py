"""The native backbone: Qwen2.5-Omni's thinker from transformers, which sees and hears by itself (Crab+ 2603.04128).

The model is used as it is: its own processors, encoders, positions, LM. We only put its encoders' tokens into the prompt ourselves, so
that a prompt is built by the same function as for the composed backbone, and say of every video how many seconds a pair of its frames
spans, sample by sample (its processor takes one rate for a whole call and assumes two frames a second where none is given).
What differs from the released code: padding on the left; a separator between the two videos of a2v and the two sounds of v2a (theirs
are run together; `separate=False` does the same); seconds a grid from the clip's length, where theirs is always 2.0.

Shapes: M media, P patches of 14 x 14 pixels and two frames, F mel frames of 10 ms, D width of the LM.
"""
from dataclasses import replace

import numpy as np
import tokenizers
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

from crab_min.encoders import MediaFeatures
from crab_min.interface import PromptPart
from crab_min.model import AVLanguageModel, missing_weights
from crab_min.pave import Patches

RATE = 16000                                           # Hz
TEMPLATE = ["<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"]
MARKS = {"video": ("vision_bos", "video", "vision_eos"), "image": ("vision_bos", "image", "vision_eos"), "audio": ("audio_bos", "audio", "audio_eos")}


class OmniModel(AVLanguageModel):
    """Qwen2.5-Omni's thinker and its processor. Frames are 224 x 224: 64 tokens a pair of frames; sound is 25 tokens a second."""
    frame_size = 224

    def __init__(self, thinker: Qwen2_5OmniThinkerForConditionalGeneration, processor: Qwen2_5OmniProcessor, separate: bool = True):
        text = processor.tokenizer
        ids = {name: getattr(text, f"{name}_token_id") for marks in MARKS.values() for name in marks}
        marks = {kind: ([ids[before]], ids[place], [ids[after]]) for kind, (before, place, after) in MARKS.items()}
        super().__init__(thinker, text, marks, ([], text.convert_tokens_to_ids("<|im_end|>")), TEMPLATE)
        self.processor, self.separate = processor, separate
        self.patches, self.patch_widths = Patches(), (self.thinker.config.text_config.hidden_size,) * 2

    @property
    def thinker(self) -> Qwen2_5OmniThinkerForConditionalGeneration:
        """The transformers model, with or without an adapter around it."""
        return self.llm.get_base_model() if hasattr(self.llm, "get_base_model") else self.llm

    # --- media
    def encode(self, kind: str, media: list, seconds: list[float]) -> list[MediaFeatures]:
        """What the encoders take: patches (P, 1176) of frames in time-major order, mel frames (F, 128) of a sound (its waves joined)."""
        found = []
        for arrays, length in zip(media, seconds):
            if kind == "audio":
                wave = np.concatenate([np.asarray(a) for a in arrays])
                wave = np.pad(wave, (0, max(0, RATE - len(wave))))                               # at least a second, as in the release
                extractor = self.processor.feature_extractor
                heard = extractor(wave, sampling_rate=RATE, return_attention_mask=True, truncation=False, max_length=max(extractor.n_samples, len(wave)),
                                  padding="max_length", return_tensors="pt")
                x = heard["input_features"][0, :, :int(heard["attention_mask"].sum())].T         # (F, 128)
            else:
                frames = torch.as_tensor(np.asarray(arrays)).permute(0, 3, 1, 2)                 # (T, 3, H, W)
                if kind == "image":
                    x = self.processor.image_processor(images=[frames[0]], do_resize=False, return_tensors="pt")["pixel_values"]
                else:
                    x = self.processor.video_processor(videos=[frames], do_resize=False, do_sample_frames=False, cap_pixels_per_frame=False,
                                                       return_tensors="pt")["pixel_values_videos"]
            found.append(MediaFeatures(kind, x, seconds=length))
        return found

    def grid(self, media: MediaFeatures) -> tuple[int, int, int]:
        """(pairs of frames, rows, columns) of the patches of frames."""
        side = self.frame_size // self.processor.image_processor.patch_size
        return len(media.features) // side ** 2, side, side

    def count(self, media: MediaFeatures) -> int:
        if media.kind == "audio":
            return ((len(media.features) - 1) // 2 - 1) // 2 + 1                                 # a convolution and a pooling of stride 2
        return len(media.features) // self.processor.image_processor.merge_size ** 2

    def tokens(self, media: list[MediaFeatures], numbers: list[int]) -> list[Tensor]:
        """The encoders' tokens (count, D) of each medium. Without adapters in the encoders no gradient is kept for them."""
        thinker, found = self.thinker, [None] * len(media)
        learns = any(p.requires_grad for part in (thinker.model.visual, thinker.model.audio_tower) for p in part.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            for kind in ("video", "image", "audio"):
                chosen = [i for i, m in enumerate(media) if m.kind == kind]
                if not chosen:
                    continue
                features = [media[i].features.to(thinker.device, thinker.dtype) for i in chosen]
                if kind == "audio":
                    mask = pad_sequence([torch.ones(len(f), dtype=torch.long, device=f.device) for f in features], batch_first=True)
                    x = thinker.get_audio_features(pad_sequence(features, batch_first=True).mT, feature_attention_mask=mask).last_hidden_state
                    x = x.split([self.count(media[i]) for i in chosen])
                else:
                    grids = torch.tensor([self.grid(media[i]) for i in chosen], device=thinker.device)
                    look = thinker.get_image_features if kind == "image" else thinker.get_video_features
                    x = look(torch.cat(features), grids).pooler_output
                for i, tokens in zip(chosen, x):
                    found[i] = tokens
        patched = [i for i, m in enumerate(media) if m.sides]
        seen = [found[i].unflatten(0, (self.grid(media[i])[0], -1)) for i in patched]            # (T, S, D): its merger has no state before a projector
        sides = [media[i].side_tokens() for i in patched]
        for i, part in zip(patched, self.patches.add_to(seen, [x.float() for x in seen], sides)):
            found[i] = part.flatten(0, 1).to(found[i].dtype)
        return found

    # --- prompts
    def collate(self, prompts: list[list], media: list[list[MediaFeatures]], targets: list[str] | None = None) -> dict:
        if not self.separate:
            prompts, media = zip(*(run_together(parts, list(features)) for parts, features in zip(prompts, media)))
        return super().collate(prompts, media, targets)

    def extra_lm_inputs(self, batch: dict) -> dict:
        """Ids, grids, seconds and lengths: what the thinker computes its three-dimensional positions from."""
        device, of_kind = batch["ids"].device, {kind: [m for m in batch["media"] if m.kind == kind] for kind in MARKS}
        beside = {"input_ids": batch["ids"]}
        if of_kind["image"]:
            beside["image_grid_thw"] = torch.tensor([self.grid(m) for m in of_kind["image"]], device=device)
        if of_kind["video"]:
            grids = [self.grid(m) for m in of_kind["video"]]
            beside["video_grid_thw"] = torch.tensor(grids, device=device)
            beside["video_second_per_grid"] = torch.tensor([m.seconds / grid[0] for m, grid in zip(of_kind["video"], grids)], device=device)
        if of_kind["audio"]:
            beside["feature_attention_mask"] = pad_sequence([torch.ones(len(m.features), dtype=torch.long, device=device) for m in of_kind["audio"]], batch_first=True)
        return beside

    def logits(self, batch: dict, keep: int) -> Tensor:
        """(B, keep, V): the head, 152 thousand words wide, reads the last places alone."""
        thinker = self.thinker
        hidden = thinker.model(inputs_embeds=self.embed(batch), attention_mask=batch["attention"], **self.extra_lm_inputs(batch)).last_hidden_state
        return thinker.lm_head(hidden[:, -keep:])


def run_together(parts: list[PromptPart], media: list[MediaFeatures]) -> tuple[list[PromptPart], list[MediaFeatures]]:
    """A prompt as the released Crab+ has it: a medium that follows one of its kind is joined to it, without the text between them."""
    joined, features, last = [], [], None                                     # last: where the last medium stands in `joined`
    queue = iter(media)
    for part in parts:
        if part.kind == "text":
            joined.append(part)
            continue
        new = next(queue)
        if last is not None and joined[last].kind == part.kind:
            del joined[last + 1:]
            features[-1] = replace(features[-1], features=torch.cat([features[-1].features, new.features]), seconds=features[-1].seconds + new.seconds)
        else:
            last = len(joined)
            joined.append(part)
            features.append(new)
    return joined, features


def load_omni(weights: str, separate: bool = True, dtype: torch.dtype = torch.bfloat16) -> OmniModel:
    """The thinker of Qwen2.5-Omni, by local path or hub id, frozen and in evaluation mode; or "tiny-random". Raises ModelError."""
    if weights == "tiny-random":
        model = OmniModel(*tiny_random(), separate)
    else:
        try:
            thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(weights, dtype=dtype)
            processor = Qwen2_5OmniProcessor.from_pretrained(weights)
        except OSError as error:
            raise missing_weights("Qwen2.5-Omni", weights, error) from error
        model = OmniModel(thinker, processor, separate)
    return model.requires_grad_(False).eval()


def tiny_random() -> tuple[nn.Module, Qwen2_5OmniProcessor]:
    """A thinker of 0.2 million random parameters, the same ones each time, and a processor for it that knows bytes only."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    marks = {f"{name}_token": f"<|{name}|>" for marks in MARKS.values() for name in marks}
    text = Qwen2Tokenizer(vocab={c: i for i, c in enumerate(alphabet)}, merges=[], unk_token=None, bos_token=None, eos_token="<|im_end|>",
                          pad_token="<|endoftext|>", extra_special_tokens={**marks, "im_start_token": "<|im_start|>"})
    processor = Qwen2_5OmniProcessor(Qwen2VLImageProcessor(), Qwen2VLVideoProcessor(), WhisperFeatureExtractor(feature_size=16, return_attention_mask=True), text)
    config = Qwen2_5OmniThinkerConfig(
        text_config={"vocab_size": len(text), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                     "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [1]},
        audio_config={"num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "d_model": 32, "output_dim": 64},
        **{f"{kind}_token_index": getattr(text, f"{kind}_token_id") for kind in MARKS},
        vision_start_token_id=text.vision_bos_token_id, vision_end_token_id=text.vision_eos_token_id,
        audio_start_token_id=text.audio_bos_token_id, audio_end_token_id=text.audio_eos_token_id)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2_5OmniThinkerForConditionalGeneration(config), processor
