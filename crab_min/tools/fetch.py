"""Released weights from the hub, checked and converted: one command per paper.

    python -m crab_min.tools.fetch crab_plus
    python -m crab_min.tools.fetch crab --files avs --from DOWNLOADS/

It downloads what the authors publish, or takes it from a folder, writes a run folder
(tools/convert.py) and prints the infer.py line that asks it. The base model of the run is loaded by
infer.py itself, from the hub or from the paths of --weights, --vision, --audio-encoder and --llm.
"""

import argparse
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HTTPError

from crab_min.beats import refuse_lfs_pointers
from crab_min.cli import Parser, run_command
from crab_min.errors import ModelError
from crab_min.recipes.presets import PRESETS
from crab_min.tools.convert import DEFAULT_PRESETS, convert_files

# Crab's was fine-tuned to classify sounds, CREMA's was not
BEATS_OF_CRAB = "BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt"
BEATS_OF_CREMA = "BEATs_iter3_plus_AS2M.pt"
ROTARY = "v5_1_2"  # in the name of PAVE's video patch for 0.5B
BEATS_WHERE = (
    "not here, and sound needs it. Its authors link it in github.com/microsoft/unilm, folder "
    "beats. The right file has about 360 MB, and the keys cfg and model; give it to infer.py with "
    "--audio-encoder"
)


@dataclass(frozen=True)
class Release:
    """The published files of a paper.

    Attributes:
        repo: on the hub.
        kind: "model" or "dataset", of the repository.
        files: name of a model -> its files; the first one is the default.
        tables: name of a model whose weights have other names than those of the paper.
        sides: name of a model -> its side channels or modalities, see tools/convert.py.
        beats: the file of its BEATs, if it needs one.
        reads_features: a clip is asked about with a file of features of its side channel.
    """

    repo: str
    files: dict[str, list[str]]
    kind: str = "model"
    tables: dict[str, str] = field(default_factory=dict)
    sides: dict[str, str] = field(default_factory=dict)
    beats: str = ""
    reads_features: bool = False


# fmt: off
RELEASES = {
    "crab_plus": Release(
        "Jayson236/Crab_Plus", {"unified": ["finetune_weights.bin"]}, kind="dataset",
    ),
    "crab": Release(
        "ahsgdxhs/Crab",
        {
            "unified": ["finetune_weights.bin"],
            "avs": ["finetune_weights.bin", "avs_finetune_weights.bin"],
            "avss": ["finetune_weights.bin", "avss_finetune_weights.bin"],
            "visual": ["visual_pretrain.bin"],
            "audio": ["audio_pretrain.bin"],
        },
        tables={"visual": "crab-pretrain", "audio": "crab-pretrain"}, beats=BEATS_OF_CRAB,
    ),
    "pave": Release(
        "zhuomingliu/PAVE",
        {
            "avsd-0.5b": ["pave_v5_1_3_lora_avsd_imagebind.zip"],
            "avsd-7b": ["pave_5_1_3_lora_avsd_7B_imagebind.zip"],
            "scanqa-0.5b": ["pave_scanqa_v5_1_3_3d_lora.zip"],
            "scanqa-7b": ["pave_scanqa_v5_1_3_3d_lora_7B.zip"],
            "video-7b": ["pave_v5_1_3_lora_7B.zip"],
        },
        sides={"scanqa-0.5b": "depth", "scanqa-7b": "depth", "video-7b": "fast"},
        reads_features=True,
    ),
    "crema": Release(
        "Shoubin/CREMA", {"zero-shot": ["crema_pretrained.pth"], "initial": ["crema_initial.pth"]},
        sides={"initial": "rgb"}, beats=BEATS_OF_CREMA,
    ),
}
# fmt: on


def fetch(given: argparse.Namespace) -> None:
    """Fetch the files of a paper, convert them, and print how the run is asked.

    Raises:
        ModelError: no network, or files that are missing or cannot be used.
    """
    release = RELEASES[given.paper]
    name = given.files or next(iter(release.files))
    wanted = release.files.get(name) or name.split(",")
    if ROTARY in name:
        raise ModelError(
            f"--files {name}: its patch has rotary positions, which its weights do not show, and "
            f"would answer wrongly; choose from {', '.join(release.files)}"
        )
    folder = Path(given.from_folder) if given.from_folder else None
    files = [find(folder, file) if folder else download(release, file) for file in wanted]

    # zips hold a folder of several files
    with tempfile.TemporaryDirectory() as unpacked:
        weights = []
        for file in files:
            is_zip = file.suffix == ".zip"
            weights += unpack(file, Path(unpacked)) if is_zip else [str(file)]
        table = release.tables.get(name, given.paper)
        out = Path(given.out or f"runs/{given.paper}-released")
        preset = given.preset or preset_of(given.paper, wanted)
        default_sides = "rgb,audio" if given.paper == "crema" else "audio"
        sides = (given.side or release.sides.get(name) or default_sides).split(",")
        beats = find_beats(folder, release.beats) if release.beats else ""
        print(convert_files(table, weights, out, preset, sides, given.prompts_from, beats))

    if release.beats and not beats:
        print(f"note: {release.beats}: {BEATS_WHERE}")
    flags = f" --side {sides[0]}=FEATURES.pt" if release.reads_features else ""
    print(f'python infer.py CLIP.mp4 "What happens?" --run {out}{flags}')


def preset_of(paper: str, files: list[str]) -> str:
    """Return the preset with the base model of released files, by its size in their names."""
    if paper == "pave":
        return "pave-7b" if "7B" in files[0] else "pave-0.5b"
    return DEFAULT_PRESETS[paper]


# --- files ---------------------------------------------------------------------------------------
def find(folder: Path, name: str) -> Path:
    """Find a file below a folder. Raises ModelError: it is not there, or a part of it."""
    found = sorted(folder.rglob(Path(name).name)) if folder.is_dir() else []
    halves = [*folder.rglob(f"{Path(name).name}.*")] if folder.is_dir() else []
    if not found:
        state = f", but {halves[0].name}, half a download" if halves else ""
        raise ModelError(f"--from {folder}: no {name} there{state}; download it there")
    return found[0]


def find_beats(folder: Path | None, name: str) -> str:
    """Return the path of BEATs in a folder or here; "" if it is in neither."""
    places = [Path(name), *(folder.rglob(name) if folder else ())]
    return next((str(place.absolute()) for place in places if place.is_file()), "")


def download(release: Release, name: str) -> Path:
    """Download a file of a release, or return it from the hub's cache.

    Raises:
        ModelError: no network, or no such file.
    """
    try:
        api = HfApi()
        info = api.repo_info(release.repo, repo_type=release.kind, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings}
        if name not in sizes:
            raise ModelError(
                f"{release.repo}: has no {name} on the hub; name one with --files: "
                f"{', '.join(n for n in sizes if n.endswith(('.bin', '.pth', '.pt', '.zip')))}"
            )
        print(f"{release.repo}/{name}: {sizes[name] / 1e9:.2f} GB", file=sys.stderr)
        file = Path(hf_hub_download(release.repo, name, repo_type=release.kind))
    except (HTTPError, OSError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ModelError(
            f"{release.repo}/{name}: cannot be downloaded ({reason}); where there is a network: "
            f"hf download {release.repo} {name} --repo-type {release.kind} --local-dir FOLDER; "
            "then give --from FOLDER"
        ) from None
    if sizes[name] and file.stat().st_size != sizes[name]:
        raise ModelError(
            f"{file}: {file.stat().st_size} bytes, expected {sizes[name]}; remove it, and fetch it "
            "again"
        )
    return file


def unpack(file: Path, folder: Path) -> list[str]:
    """Unpack the weights of a zip (PAVE), and return their paths.

    Raises:
        ModelError: not a whole zip, or one without weights.
    """
    refuse_lfs_pointers(file)
    try:
        with zipfile.ZipFile(file) as packed:
            names = [name for name in packed.namelist() if is_weights(name)]
            for name in names:
                target = folder / Path(name).name  # wherever the zip says that it goes
                target.write_bytes(packed.read(name))
    except (zipfile.BadZipFile, OSError) as error:
        raise ModelError(
            f"{file}: not a whole zip ({error}), is it half a download? Fetch it again"
        ) from None
    missing = {"adapter_model", "non_lora_trainables"} - {Path(name).stem for name in names}
    if missing:
        raise ModelError(f"{file}: no {' and no '.join(sorted(missing))} in it; is it PAVE's?")
    return [str(folder / Path(name).name) for name in names]


def is_weights(name: str) -> bool:
    """Tell whether a file of a zip holds what PAVE trained."""
    stem = Path(name).stem
    suffix = Path(name).suffix
    return stem in ("adapter_model", "non_lora_trainables") and suffix in (".bin", ".safetensors")


# --- command -------------------------------------------------------------------------------------
def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="-m crab_min.tools.fetch",
        description="Download released weights, convert them to a run, and say how to ask it.",
    )
    models = "; ".join(f"{paper}: {', '.join(r.files)}" for paper, r in RELEASES.items())
    parser.add_argument("paper", choices=list(RELEASES), help="whose weights")
    parser.add_argument(
        "--files",
        default="",
        help=f"which of its models ({models}), or file names, comma-separated (default: the first)",
    )
    parser.add_argument(
        "--from",
        dest="from_folder",
        default="",
        metavar="FOLDER",
        help="take the files from there, and download nothing",
    )
    parser.add_argument(
        "--out", default="", help="the run folder to write (default: runs/PAPER-released)"
    )
    parser.add_argument("--side", default="", help="as for tools.convert (default: by the model)")
    parser.add_argument(
        "--preset", default="", choices=["", *PRESETS], help="as for tools.convert (likewise)"
    )
    parser.add_argument(
        "--prompts-from",
        default="",
        metavar="PATH",
        help="the authors' words: a clone of their repository, or a .json file",
    )
    parser.add_argument(
        "--debug", action="store_true", help="show a traceback where something goes wrong"
    )
    return parser


def main(arguments: list[str]) -> int:
    given = make_parser().parse_args(arguments)
    return run_command(lambda: fetch(given), given.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
