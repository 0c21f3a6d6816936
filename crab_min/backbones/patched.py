"""Backbones whose videos take patches (PAVE, pave.py), one per side channel."""

from dataclasses import asdict
from pathlib import Path

from torch import nn

from crab_min import trained_parts
from crab_min.config import SideChannelConfig
from crab_min.errors import ModelError
from crab_min.model import AVLanguageModel
from crab_min.pave import PatchConfig, Patches, make_patch
from crab_min.trained_parts import SavedPart


class PatchedModel(AVLanguageModel):
    """An audio-visual LM with patches. A clip may lack any of their side channels.

    A subclass sets `patches`, adds what they find to the tokens of its videos, and sets
    `patch_widths`: the width of a video's tokens before the projector, which a patch queries with,
    and the width of the LM.
    """

    patches: Patches
    patch_widths: tuple[int, int]
    frozen_patches: list[str] = []  # those of a run that this one starts from (--freeze-patch)
    joins_tokens = True  # side tokens can stand in its prompt

    @property
    def side_names(self) -> list[str]:
        return list(self.patches)

    def add_side_channel(self, name: str, width: int, settings: SideChannelConfig) -> None:
        """Add a new patch for the side channel `name`, of features `width` wide."""
        if settings.merge != "patch" and not self.joins_tokens:
            raise ModelError(f"merge {settings.merge}: this backbone takes patches alone")
        if settings.merge != "patch" and self.patches:
            raise ModelError(f"merge {settings.merge}: goes with one side channel")
        video_width, lm_width = self.patch_widths
        sizes = PatchConfig(
            video=video_width,
            side=width,
            out=lm_width,
            hidden=settings.width,
            layers=settings.layers,
            shared_kv=settings.shared_kv,
            rope=settings.rope,
            merge=settings.merge,
        )
        self.patches[name] = make_patch(sizes)
        self.patches.to(self.device)
        self.frozen_patches = settings.frozen

    def load_patch(self, file: Path | str) -> None:
        trained_parts.load_parts(self, [trained_parts.read_patch(Path(file))])

    # --- files
    def trainable_modules(self) -> dict[str, nn.Module]:
        modules = super().trainable_modules()
        return modules | {f"patch_{name}": patch for name, patch in self.patches.items()}

    def set_trainable(self, parts: list[str]) -> None:
        super().set_trainable(parts)
        for name in self.frozen_patches:
            if f"patch_{name}" not in self.loaded_parts:
                raise ModelError(
                    f"--freeze-patch {name}: no such patch to start from; give --init-from a run "
                    f"with --side {name}"
                )
        for name, patch in self.patches.items():
            patch.requires_grad_(name not in self.frozen_patches)

    def part_config(self, name: str) -> dict:
        if name.startswith("patch_"):
            return asdict(self.patches[name.removeprefix("patch_")].config)
        return super().part_config(name)

    def prepare_part(self, part: SavedPart) -> None:
        if not part.name.startswith("patch_"):
            return super().prepare_part(part)
        try:
            config = PatchConfig(**part.config)
        except TypeError as error:
            raise ModelError(f"{part.source}: not a patch ({error})") from None
        if (config.video, config.out) != self.patch_widths:
            video_width, lm_width = self.patch_widths
            raise ModelError(
                f"{part.source}: a patch for video tokens {config.video} wide and an LM of "
                f"{config.out}; this model has {video_width} and {lm_width}. Use it with the model "
                "that it was trained on"
            )
        name = part.name.removeprefix("patch_")
        if name not in self.patches or self.patches[name].config != config:
            self.patches[name] = make_patch(config)
            self.patches.to(self.device)
