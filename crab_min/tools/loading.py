"""The model that answers: a run with its trained parts, or a model as it was pretrained."""

import importlib
import json
import re
import sys
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError

from crab_min.backbones.load import backbone_of, load_model
from crab_min.config import RECIPES, Settings, with_values
from crab_min.devices import choose_device, describe_device
from crab_min.errors import RunError
from crab_min.interface import QuestionForm
from crab_min.model import ASSETS, AVLanguageModel
from crab_min.recipes import common
from crab_min.recipes.presets import PRESETS
from crab_min.runs.folder import SavedRun, load_saved_run
from crab_min.tools.released.wording import missing_words

SHIPPED = ASSETS / "crab_plus-tiny"
NO_RUN = (
    "no model: name one with --model, such as --model Qwen/Qwen2.5-Omni-3B (the size of its "
    "download is said first); or a run with --run; or train one, python train.py --data "
    "labels.csv; --demo asks the shipped model of the synthetic world"
)


@dataclass
class LoadedRun:
    """A model that is loaded to answer.

    Attributes:
        folder: of its run; of a pretrained model its name.
        saved: the contents of its config.json.
        recipe: the module of its recipe.
        form: how a question is put; None for that of a task.
    """

    folder: Path
    saved: SavedRun
    recipe: ModuleType
    model: AVLanguageModel
    form: QuestionForm | None = None

    @property
    def settings(self) -> Settings:
        return self.saved.settings

    @property
    def is_pretrained(self) -> bool:
        """Tell whether it is a model without a run."""
        return not self.saved.recipe

    @property
    def is_shipped(self) -> bool:
        """Tell whether it is the shipped model, which knows the synthetic world alone."""
        return self.folder == SHIPPED

    @property
    def learned_the_world(self) -> bool:
        """Tell whether it learned the built-in world."""
        return not self.is_pretrained and not self.settings.data.data


def load_asked(given: Namespace) -> LoadedRun:
    """Load the model that the flags of infer.py name, with its patches.

    Raises:
        RunError: none is named and no run is finished; the flags exclude each other.
        ModelError: its weights cannot be loaded.
    """
    names = [name for name in ("run", "model", "demo") if getattr(given, name)]
    if len(names) > 1:
        raise RunError(f"--{' and --'.join(names)}: give one of them")
    if given.model and given.model != SHIPPED.name:
        run = load_pretrained_model(given.model, given.device, given.load_in_4bit)
    else:
        shipped = given.demo or given.model == SHIPPED.name
        folder = str(SHIPPED) if shipped else given.run
        paths = {
            "weights": given.weights,
            "vision": given.vision,
            "audio": given.audio_encoder,
            "llm": given.llm,
        }
        run = load_run(folder, given.device, given.load_in_4bit, paths)
    apply_model_flags(run, given)
    return run


def load_run(
    folder: str, device: str = "", load_in_4bit: bool = False, paths: dict[str, str] | None = None
) -> LoadedRun:
    """Load a run with its trained parts, ready to answer.

    Args:
        folder: "" for the newest finished run under runs/.
        device: as devices.choose_device takes it.
        load_in_4bit: the LM in 4 bits, also where it was trained otherwise.
        paths: where parts of the base model are on this machine, by the name of their setting;
            "" for what the run's config.json says.

    Raises:
        RunError: the folder is not that of a run, there is no run, or there is no such device.
        ModelError: its weights cannot be loaded.
    """
    # the folder
    if not folder:
        finished = sorted(Path("runs").glob("*/metrics.json"), key=lambda p: p.stat().st_mtime)
        if not finished:
            raise RunError(NO_RUN)
        folder = finished[-1].parent

    # a run on the hub, such as OWNER/NAME
    if not Path(folder).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        folder = fetch_run(str(folder))

    # the model, as its recipe loads it, with the trained parts and prompts of the run
    saved = load_saved_run(Path(folder))
    if load_in_4bit:
        saved.settings = with_values(saved.settings, load_in_4bit=True)
    given = {name: path for name, path in (paths or {}).items() if path}
    saved.settings = with_values(saved.settings, **given)
    recipe = importlib.import_module(f"crab_min.recipes.{saved.recipe}")
    on = choose_device(device, saved.settings.backbone.pretrained)
    if on.type != "cpu":
        print(f"device: {describe_device(on)}", file=sys.stderr)
    model = recipe.load_model(saved.settings, device=on)
    if saved.layout:
        model.use_layout(saved.layout)
        if saved.layout.paper:
            note_missing_words(saved)
    model.load_trained(Path(folder))
    model.to(on)
    model.bf16 = saved.settings.training.bf16
    return LoadedRun(Path(folder), saved, recipe, model.eval(), saved.form)


def note_missing_words(saved: SavedRun) -> None:
    """Say which of its authors' words a run of released weights is asked without."""
    line = missing_words(saved.layout.paper, saved.prompts)
    if line:
        print(f"note: {line}", file=sys.stderr)


def fetch_run(name: str) -> Path:
    """Fetch a run from the hub, or return its folder in the cache.

    Raises:
        RunError: there is none, or no network.
    """
    try:
        config = json.loads(Path(hf_hub_download(name, "config.json")).read_text(encoding="utf-8"))
        if not {"recipe", "train"} & config.keys():  # "train" in runs of the first version
            raise RunError(f"{name}: a model and no run; ask it with --model {name}")
        return Path(snapshot_download(name))
    except (HTTPError, OSError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise RunError(
            f"{name}: no such folder, and no run of that name could be fetched from the hub "
            f"({reason}); give a finished run with --run, or train one: python train.py"
        ) from None


def load_pretrained_model(
    name: str, device: str = "", load_in_4bit: bool = False, empty: bool = False
) -> LoadedRun:
    """Load a pretrained model without a run; questions are put to it as they are.

    Args:
        name: a preset, a hub id, or a folder with the model's config.json.
        empty: build it without weights, to count tokens; nothing is downloaded.

    Raises:
        RunError: there is no such device.
        ModelError: a model of another kind, or weights that cannot be loaded.
    """
    if name in PRESETS and PRESETS[name].recipe != "tinybase":
        preset = PRESETS[name]
        backbone = with_values(RECIPES[preset.recipe](), **preset.values).backbone
    else:
        backbone = backbone_of(name)
    backbone = replace(backbone, load_in_4bit=load_in_4bit)
    saved = SavedRun(name, "", Settings(backbone=backbone))
    if empty:
        model = load_model(backbone, empty=True)
        return LoadedRun(Path(name), saved, common, model, QuestionForm())
    for weights in filter(None, (backbone.weights, backbone.llm, backbone.vision)):
        announce_download(weights)

    on = choose_device(device, backbone.pretrained)
    print(f"device: {describe_device(on)}", file=sys.stderr)
    model = load_model(backbone, device=on).to(on)
    return LoadedRun(Path(name), saved, common, model, QuestionForm())


def announce_download(name: str) -> None:
    """Print the size of a model on the hub that is not on this machine yet."""
    if Path(name).exists() or name == "tiny-random":
        return
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        files = HfApi().model_info(name, files_metadata=True).siblings
        size = sum(f.size or 0 for f in files if not f.rfilename.endswith((".bin", ".pt", ".pth")))
        print(f"{name}: {size / 1e9:.1f} GB to download, once", file=sys.stderr)
    except (HTTPError, OSError) as error:
        reason = type(error).__name__
        print(f"{name}: to download; the hub does not say the size ({reason})", file=sys.stderr)


def apply_model_flags(run: LoadedRun, given: Namespace) -> None:
    """Load the patches of --patch, switch off the modalities of --skip, and settle --beams.

    Raises:
        RunError: the model has no such modality.
        ModelError: a patch does not fit the model.
    """
    given.beams = given.beams or run.model.layout.beams
    if given.features:
        run.saved.settings = with_values(run.settings, features=given.features)
    for file in given.patch:
        run.model.load_patch(Path(file))
    skippable = getattr(run.model, "skipped_modalities", None)
    known = ["rgb", *run.model.side_names] if skippable is not None else []
    for name in given.skip:
        if name not in known:
            raise RunError(
                f"--skip {name}: the model has no such modality, but "
                f"{', '.join(known) or 'none, as it is not a run of CREMA'}"
            )
        skippable.add(name)
