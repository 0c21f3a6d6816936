"""Features, flow, depth or normals of a folder of clips, one file per clip.

    python -m crab_min.tools.features --encoder depth --data clips --out depth
    python train.py crema-tiny --data rows.jsonl --modalities rgb,depth --features depth=depth

Encoders and what their files hold: extractors.py. A file is named like its clip and is written
whole or not at all. The same command continues: clips that have a file are left out.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from crab_min.cli import Parser, run_command
from crab_min.data import decode_ahead
from crab_min.devices import choose_device
from crab_min.errors import DataError, MediaError, RunError
from crab_min.interface import PromptPart
from crab_min.media.kinds import media_kind
from crab_min.media.read import media_seconds
from crab_min.runs.folder import atomic_write
from crab_min.tools.extractors import EXTRACTORS, Extractor

SETTINGS = "features.json"  # in the folder of the files: what made them


# --- clips ----------------------------------------------------------------------------------------
def find_clips(folder: Path, kind: str) -> dict[str, Path]:
    """Find the clips below a folder, by name.

    Args:
        kind: "video" (also a folder of pictures is a clip) or "audio" (sounds and videos).

    Raises:
        DataError: no such folder, no clips, or two different ones of one name.
    """
    if not folder.is_dir():
        raise DataError(f"--data {folder}: no such folder")
    wanted = ("video", "audio") if kind == "audio" else ("video",)
    clips: dict[str, Path] = {}
    for path, _, files in sorted(os.walk(folder, followlinks=True)):
        kinds = {media_kind(file) for file in files}
        if kind == "video" and kinds == {"image"}:
            add_clip(clips, Path(path).name, Path(path))
            continue
        for file in sorted(files):
            if media_kind(file) in wanted and not file.startswith("."):
                add_clip(clips, Path(file).stem, Path(path, file))
    if not clips:
        raise DataError(f"--data {folder}: no {' or '.join(wanted)} files in it")
    return clips


def add_clip(clips: dict[str, Path], name: str, path: Path) -> None:
    """Add a clip; of a sound and a video of one name the sound is read.

    Raises DataError: another clip of this name and kind.
    """
    other = clips.setdefault(name, path)
    if other == path or same_clip(other, path):
        return
    if media_kind(other) != media_kind(path):
        clips[name] = path if media_kind(path) == "audio" else other
        return
    raise DataError(f"{path} and {other} have one name; features are found by the clip's name")


def same_clip(first: Path, second: Path) -> bool:
    """Tell whether two files are most likely copies: they have one size."""
    both_files = first.is_file() and second.is_file()
    return both_files and first.stat().st_size == second.stat().st_size


def clip_part(path: Path, extractor: Extractor, frames: int) -> PromptPart:
    """Return what is decoded of a clip.

    Args:
        frames: number of frames, where the extractor has no rate of its own.

    Raises MediaError.
    """
    if extractor.kind == "audio":
        return PromptPart("audio", path=str(path), window="whole")
    if extractor.rate:
        frames = max(1, round(extractor.rate * media_seconds(path)))
    return PromptPart(extractor.kind, path=str(path), frames=frames)


# --- files ----------------------------------------------------------------------------------------
def extract(given: argparse.Namespace) -> None:
    """Write the files of all clips that have none yet, and print what could not be read.

    Raises:
        RunError: the folder holds the files of other settings.
        ModelError: weights that cannot be loaded, or code that is not installed.
    """
    extractor_class, default = EXTRACTORS[given.encoder]
    weights = given.weights or default
    out = Path(given.out or f"{given.data.rstrip('/')}_{given.encoder}")
    clips = find_clips(Path(given.data), "audio" if extractor_class.kind == "audio" else "video")
    remaining = {name: p for name, p in clips.items() if not (out / f"{name}.npy").exists()}
    settings = {"encoder": given.encoder, "weights": weights}
    settings |= {"frames": given.frames, "size": given.size}
    check_settings(out / SETTINGS, settings)
    print(f"{out}: {len(clips)} clips, {len(clips) - len(remaining)} of them done before")
    if not remaining:
        return

    extractor = extractor_class(weights, choose_device(given.device))
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / SETTINGS, json.dumps(settings, indent=1) + "\n")
    names, parts, reasons = [], [], []
    for name, path in remaining.items():
        try:
            parts.append([clip_part(path, extractor, given.frames)])
            names.append(name)
        except MediaError as error:
            reasons.append(str(error))

    # workers decode the next clips while the model works on this one
    loader = decode_ahead(parts, extractor.size or given.size, given.workers)
    with torch.inference_mode():
        for name, (loaded,) in tqdm(zip(names, loader), total=len(names), unit="clip"):
            if loaded.error:
                reasons.append(loaded.error)
                continue
            media = loaded.arrays[0] if extractor.kind == "audio" else loaded.arrays
            write_array(out / f"{name}.npy", extractor(media))
    for reason in reasons:
        print(f"skipped: {reason}")
    if reasons:
        raise RunError(f"{len(reasons)} of {len(clips)} clips have no file; see the lines above")


def check_settings(file: Path, settings: dict) -> None:
    """Compare the settings with those that the files of a folder were made with.

    Raises RunError: they differ.
    """
    if not file.exists():
        return
    earlier = json.loads(file.read_text(encoding="utf-8"))
    if earlier != settings:
        raise RunError(f"{file}: files of {earlier}, not of {settings}; give another --out")


def write_array(file: Path, array: np.ndarray) -> None:
    """Write a .npy under a temporary name, then rename it."""
    temporary = file.with_name(f".{file.name}.tmp")
    with open(temporary, "wb") as opened:
        np.save(opened, array)
    temporary.rename(file)


# --- command --------------------------------------------------------------------------------------
def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="-m crab_min.tools.features", description="Features of clips, one file per clip."
    )
    parser.add_argument(
        "--encoder", required=True, choices=list(EXTRACTORS), help="what to compute"
    )
    parser.add_argument("--data", required=True, help="folder of clips, searched with its folders")
    parser.add_argument("--out", default="", help="folder of the files (default: DATA_ENCODER)")
    parser.add_argument(
        "--weights", default="", help="path or hub id (default: those of the papers where free)"
    )
    parser.add_argument("--frames", type=int, default=32, help="frames per video (default: 32)")
    parser.add_argument(
        "--size", type=int, default=224, help="pixels per side of pictures (default: 224)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that decode (default: 2)")
    parser.add_argument("--device", default="", help="cuda, cpu or mps (default: cuda, else cpu)")
    parser.add_argument(
        "--debug", action="store_true", help="show a traceback where something goes wrong"
    )
    return parser


def main(arguments: list[str]) -> int:
    given = make_parser().parse_args(arguments)
    return run_command(lambda: extract(given), given.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
