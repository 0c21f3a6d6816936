"""The settings of a run: one dataclass per concern, one class per recipe.

A recipe's class groups the dataclasses. A field made with `flag` is a flag of train.py or infer.py:
`batch_size` is `--batch-size`. Other fields are set by presets and converters alone. Nothing here
imports torch, so `--help` and a wrong flag are answered at once.
"""

import os
from dataclasses import Field, dataclass, field, fields, replace
from typing import Literal

from crab_min.errors import RunError


def flag(default, text: str):
    """Make a dataclass field that is also a flag, with its explanation in the help."""
    return field(default=default, metadata={"help": text})


DEVICE_HELP = (
    "cuda, cpu or mps (default: cuda, else cpu; on a CPU pretrained weights must be asked for)"
)


# --- what every recipe has -----------------------------------------------------------------------


@dataclass
class DataConfig:
    """The rows that a run learns, and the way their media are read."""

    data: str = flag(
        "",
        "your own table (.csv: clip,label or clip,question,answer; .jsonl), a folder of class "
        "folders, or an AV-UIE folder (AVUIE_2); several as PATH:SHARE,PATH:SHARE; without it the "
        "built-in world",
    )
    test: str = flag(
        "",
        "test rows, of any form of --data (default: test.csv or test.jsonl beside your own data, "
        "else a fifth of its clips)",
    )
    tasks: str = flag("all", "comma-separated task names, or all")
    target: Literal["reasoning", "label"] = flag(
        "reasoning", "training target: reasoning followed by the label, or the label alone"
    )
    prompts: str = flag("", "JSON file of instructions by task name, instead of ours")
    features: str = flag(
        "",
        "NAME=FOLDER,...: the files of a side channel or modality, named like the clips (pave, "
        "crema); tools.features writes such folders",
    )
    frames: int = flag(0, "frames per video (0: as its task has it, mostly 10)")
    max_frames: int = flag(0, "frames per video at most (0: no limit)")
    max_audio_seconds: float = flag(
        0, "seconds of a sound at most, from its start; what follows is not heard (0: no limit)"
    )
    test_rows: int = flag(0, "test rows per task (0: all)")
    max_bad: float = flag(0.01, "share of unreadable training files above which the run stops")
    allow_missing: bool = flag(
        False,
        "train without the rows whose files are gone, however many, and score those of the test "
        "split as wrong",
    )
    cache_features: bool = flag(True, "keep the features of the frozen encoders in memory")
    workers: int = flag(min(4, os.cpu_count() or 1), "processes that decode media")

    def __post_init__(self):
        for name, folder in self.feature_folders.items():
            if not name or not folder:
                raise RunError(f"--features {self.features}: give NAME=FOLDER, or several with ,")

    @property
    def feature_folders(self) -> dict[str, str]:
        """Return the folders of `features` by side channel."""
        folders = {}
        for item in filter(None, self.features.split(",")):
            name, _, folder = item.strip().partition("=")
            folders[name] = folder
        return folders


@dataclass
class WorldConfig:
    """The size of the built-in world, and the things in it."""

    things: str = flag(
        "", "folder of NAME.png cut-outs and NAME.ogg/.wav/.mp3 recordings to build the world from"
    )
    world_clips: int = flag(900, "training clips of the built-in world")
    world_test: int = flag(100, "test clips of the built-in world, per kind of scene")


@dataclass
class BackboneConfig:
    """The frozen model. Weights are named by local path or hub id."""

    backbone: Literal["composed", "omni", "llava_onevision", "blip2"] = flag(
        "composed",
        "composed (encoders + Q-Formers + LM), omni (Qwen2.5-Omni), llava_onevision, "
        "or blip2 (CREMA)",
    )
    base: str = flag("", "composed, blip2: folder of a base, or random (default: the shipped base)")
    vision: str = flag("", "composed, instead of a base: CLIP or SigLIP")
    audio: str = flag(
        "",
        "BEATs checkpoint (BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt): composed, instead of "
        "a base; llava_onevision and blip2, for sound beside a video",
    )
    llm: str = flag("", "composed, instead of a base: a causal LM for chat in Llama 2's format")
    weights: str = flag(
        "",
        "omni, llava_onevision, blip2: their weights; tiny-random: small random weights of the "
        "same classes, to try a command",
    )
    load_in_4bit: bool = flag(
        False, "the frozen LM in 4 bits (NF4), a quarter of its memory; needs bitsandbytes"
    )
    # text between two videos or two sounds of a prompt; the released Crab+ has none there
    separate_media: bool = True

    @property
    def pretrained(self) -> str:
        """Return the path or hub id of the LM's pretrained weights; "" for a tiny model."""
        if self.weights == "tiny-random":
            return ""
        return self.llm if self.backbone == "composed" else self.weights


@dataclass
class AdapterConfig:
    """The adapter on the LM."""

    adapter: Literal["ilora", "lora", "none"] = flag("ilora", "adapter on the LM")
    r: int = flag(8, "rank of the adapter")
    alpha: float = flag(16, "adapter scale: the update is multiplied by alpha / r")
    heads: int = flag(3, "heads of I-LoRA: one B each, weighted token by token by the router")
    dropout: float = flag(0.05, "dropout before A")


@dataclass
class TrainingConfig:
    """The loop: which parts learn, how long, how fast."""

    trainable: str = flag(
        "adapter,connectors,embeddings",
        "comma-separated parts that learn: adapter, connectors (Q-Formers), embeddings, "
        "mask_decoder, mask_tokens, or the name of one connector; patches and modalities always do",
    )
    init_from: str = flag("", "run folder whose trained parts are the starting point")
    steps: int = flag(
        0,
        "optimizer steps (0: three passes over the rows, of at least 2,400 samples and at most "
        "4,800, or 20,800 with --things or --data)",
    )
    epochs: float = flag(0, "passes over the training rows, instead of a number of steps")
    batch_size: int = flag(16, "samples per batch; effective: times --grad-accum times processes")
    grad_accum: int = flag(1, "batches per step and process")
    group_by_length: bool = flag(False, "steps of samples of one length: faster, learns less")
    lr: float = flag(4e-3, "peak learning rate of the adapter")
    connector_lr: float = flag(5e-4, "peak learning rate of everything else that learns")
    warmup: float = flag(0.03, "share of the steps in which the learning rate rises")
    beta2: float = flag(
        0.999, "AdamW's beta2; .98 where gradients have spikes, as in a mask decoder"
    )
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    task_sampling_exponent: float = flag(0.5, "p(task) ~ rows ** exponent (0: uniform, 1: by rows)")
    bf16: bool = flag(True, "matrix products in bfloat16 where the hardware has them")
    gradient_checkpointing: bool = flag(False, "less memory for one more forward pass")
    fsdp: bool = flag(False, "with torchrun: each GPU keeps a share of the frozen LM (FSDP2)")
    seed: int = flag(0, "seed of the world, of the order and of the new parameters")

    def __post_init__(self):
        if self.grad_accum < 1 or self.batch_size < 1:
            raise RunError(
                f"--batch-size {self.batch_size} --grad-accum {self.grad_accum}: both start at 1"
            )

    @property
    def parts(self) -> list[str]:
        """Return the names of `trainable`."""
        return [name.strip() for name in self.trainable.split(",") if name.strip()]


@dataclass
class RunConfig:
    """The run folder: where it is, what it keeps, how the run is evaluated."""

    out: str = flag("", "run folder (default: runs/PRESET, or the next free runs/PRESET-2, ...)")
    device: Literal["", "cuda", "cpu", "mps"] = flag("", DEVICE_HELP)
    log_to: Literal["", "tensorboard", "wandb"] = flag(
        "", "also log to tensorboard (in RUN/tensorboard) or wandb, which must be installed"
    )
    save_every: int = flag(100, "steps between two checkpoints (0: by --save-minutes alone)")
    save_minutes: float = flag(0, "minutes between two checkpoints (0: by --save-every alone)")
    keep_checkpoints: int = flag(1, "how many of the newest checkpoints stay")
    baseline: bool = flag(True, "score the frozen model before training")
    baseline_rows: int = flag(
        50, "test rows per task that the frozen model answers before training (0: all)"
    )
    eval_every: int = flag(
        0,
        "steps between two evaluations on held-out training rows; the best stays in RUN/best "
        "(0: none)",
    )
    eval_rows: int = flag(64, "held-out rows for --eval-every")
    eval_mode: Literal["generate", "rank"] = flag(
        "generate",
        "evaluation: generate text, or rank the options of a question by their likelihood",
    )
    eval_batch_tokens: int = flag(
        16384,
        "tokens that are answered together, prompts and answers; halved where memory is short",
    )


@dataclass
class Settings:
    """The settings that every recipe has, by concern."""

    data: DataConfig = field(default_factory=DataConfig)
    world: WorldConfig = field(default_factory=WorldConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def side_channels(self) -> list[str]:
        """Return the side channels of a video, by name."""
        return []

    @property
    def sequential(self) -> bool:
        """Tell whether the video and each side channel are trained in separate updates."""
        return False


# --- what one paper needs ------------------------------------------------------------------------


@dataclass
class StageConfig:
    """Crab's training stages."""

    stage: Literal["visual", "audio", "unified", "masks-align", "masks"] = flag(
        "visual",
        "visual or audio (align that connector on captions), unified (all tasks), "
        "masks-align (the mask decoder on LVIS), masks (the mask decoder on all tasks with masks)",
    )
    text_steps: int = flag(0, "masks: the first steps, which learn the text of the answers alone")


@dataclass
class MaskDecoderConfig:
    """Crab's mask decoder; the widths of what it reads come from the backbone."""

    decoder: bool = False  # answers end in mask tokens, from which a decoder predicts masks
    width: int = 256
    heads: int = 8
    queries: int = 300
    # a layer of the query generator starts from the output of the layer before; in the released
    # code each layer starts from the learned queries
    chained: bool = True
    bce: float = 1.0  # weight of the cross-entropy of a mask's pixels
    dice: float = 0.5  # weight of the dice loss


@dataclass
class SideChannelConfig:
    """PAVE's side channels, and the size of a patch."""

    side: str = flag(
        "audio",
        "comma-separated side channels: audio, fast (25 frames per second), depth, view, or a name "
        'that rows of a .jsonl have under "sides"; none: no sound in the prompt and no patch',
    )
    compare_lora: bool = flag(
        False, "train LoRA alone first, and print both beside the frozen model"
    )
    compare: str = flag(
        "",
        "train several runs and print one table: merge (a patch, or side tokens in the prompt)",
    )
    # how side tokens join the video: through a patch, or as tokens of the LM's prompt
    merge: Literal["patch", "concat", "interleave"] = "patch"
    freeze_patch: str = flag(
        "", "comma-separated side channels whose patches come from --init-from and do not learn"
    )
    # training rows of MUSIC-AVQA whose type names the sound come twice, as released
    double_audio_rows: bool = False
    # the channels that questions of the built-in world are about; "": those of `side`
    questions: str = ""
    width: int = 512
    layers: int = 2
    rope: bool = False  # rotary positions in time, row and column
    shared_kv: bool = False  # values through the key projection, as released

    def __post_init__(self):
        for name in self.frozen:
            if name not in self.channels:
                raise RunError(f"--freeze-patch {name}: not among --side {self.side}")

    @property
    def frozen(self) -> list[str]:
        """Return the names of `freeze_patch`."""
        return [name.strip() for name in self.freeze_patch.split(",") if name.strip()]

    @property
    def channels(self) -> list[str]:
        """Return the names of `side`, without "none"."""
        names = [name.strip() for name in self.side.split(",")]
        return [name for name in names if name not in ("", "none")]


@dataclass
class ModalityConfig:
    """CREMA's modalities, how they are fused, and how they are trained."""

    modalities: str = flag(
        "rgb,audio",
        "comma-separated, rgb first: rgb, audio, flow, depth, normals, thermal, touch, points, or "
        'a name that rows have under "sides" or that encoders.register names; without rgb they are '
        "trained with no video, as on captions",
    )
    fusion: Literal["concat", "add", "none"] = flag(
        "concat", "fused tokens behind the video's, or added to them; none: all tokens, not fused"
    )
    gated: bool = True  # the fused tokens pass through their own sigmoid, as in the paper
    compare: str = flag(
        "", "train several runs and print one table: fusion (its designs), order (of modalities)"
    )
    modality_rank: int = flag(64, "rank of a modality's adapter in the Q-Former")
    modality_dropout: float = flag(
        0.0, "share of its side modalities that a training sample goes without"
    )
    modality_sequential: bool = flag(
        True, "one update per modality and batch; else one joint update"
    )
    exit_threshold: float = flag(
        1.8, "tau: a modality exits when its gradient norm exceeds tau times its mean (0: never)"
    )

    def __post_init__(self):
        names = self.names
        if not self.has_video and self.fusion != "none":
            raise RunError(
                f"--modalities {self.modalities}: name rgb, the video, first; without it give "
                "--fusion none"
            )
        if "rgb" in names[1:] or len(set(names)) < len(names) or not all(names):
            raise RunError(
                f"--modalities {self.modalities}: name rgb, the video, first, and each other "
                "modality once; one alone goes with --fusion none"
            )

    @property
    def names(self) -> list[str]:
        """Return the names of `modalities`, rgb first."""
        return [name.strip() for name in self.modalities.split(",")]

    @property
    def has_video(self) -> bool:
        """Tell whether there is a video, which the other modalities stand beside."""
        return self.names[0] == "rgb"


@dataclass
class CrabSettings(Settings):
    """The settings of Crab's recipe."""

    stages: StageConfig = field(default_factory=StageConfig)
    masks: MaskDecoderConfig = field(default_factory=MaskDecoderConfig)


@dataclass
class PaveSettings(Settings):
    """The settings of PAVE's recipe."""

    patch: SideChannelConfig = field(default_factory=SideChannelConfig)

    @property
    def side_channels(self) -> list[str]:
        return self.patch.channels


@dataclass
class CremaSettings(Settings):
    """The settings of CREMA's recipe."""

    crema: ModalityConfig = field(default_factory=ModalityConfig)

    @property
    def side_channels(self) -> list[str]:
        return [name for name in self.crema.names if name != "rgb"]

    @property
    def sequential(self) -> bool:
        return self.crema.modality_sequential


@dataclass
class BaseConfig:
    """The length of each stage of the tiny base."""

    see_steps: int = flag(1100, "steps of stage see (64 pictures each)")
    hear_steps: int = flag(700, "steps of stage hear (24 clips each)")
    practice: float = flag(1, "factor on the steps of the lessons with which stage read begins")
    read_steps: int = flag(3000, "steps on statements of every form (24 scenes each)")
    base_lr: float = flag(2e-3, "peak learning rate of stages see and hear")
    read_lr: float = flag(1.5e-3, "peak learning rate of stage read")
    check_scenes: int = flag(100, "scenes per figure on which the finished base is evaluated")
    seed: int = flag(0, "seed of the scenes and of the initial weights")
    out: str = flag("runs/tiny-base", "folder of the base")


@dataclass
class BaseSettings:
    """The settings of the recipe that makes the tiny base."""

    base: BaseConfig = field(default_factory=BaseConfig)


# name of a recipe, which is a module of crab_min.recipes -> its settings class
RECIPES = {
    "crab": CrabSettings,
    "crab_plus": Settings,
    "crema": CremaSettings,
    "pave": PaveSettings,
    "tinybase": BaseSettings,
}


# --- infer.py ------------------------------------------------------------------------------------


@dataclass
class AskConfig:
    """A question about a clip; without one, each line of the input is asked."""

    ask: str = flag(
        "",
        "the question, if it is not the last word of the command (for ref_avs: what is to be "
        "found); without any the model stays loaded and answers line by line",
    )
    questions: str = flag(
        "",
        "a file of questions, one per line, or .csv or .jsonl; each is asked about each clip, and "
        "--out is the table of answers",
    )
    task: str = flag("", "a task instead of a question, such as ave; see crab_min/tasks.py")
    audio: list = flag(None, "a sound, or a video whose sound is used; twice for v2a")
    image: str = flag("", "an image, for s4, ms3, ref_avs and arig")
    second_video: str = flag("", "the second video of a2v")
    frame_index: int = flag(0, "which fifth (s4, ms3) or tenth (ref_avs) of the sound it is")
    options: str = flag("", "options of a multiple-choice question, comma-separated")
    dialogue: str = flag("", "the dialogue about the clip, for avsd")
    situation: str = flag("", "where one stands in the room, for sqa3d")
    name: str = flag("", "the object to be found, for lvis")
    start: float = flag(0, "second at which the part of the clip begins that is asked about")
    end: float = flag(0, "second at which it ends (0: the end of the clip)")
    demo: bool = flag(False, "the shipped model of the built-in synthetic world")
    index: int = flag(0, "without a clip: which test sample of the built-in world")
    seed: int = flag(0, "without a clip: seed of the world")
    things: str = flag("", "things of the built-in world, as for train.py (default: the run's)")
    json: bool = flag(False, "print one JSON line per clip and nothing else")
    picture: str = flag("", "where the picture goes (default: answers/CLIP_TASK.png)")
    routes: str = flag("", "also draw which heads of I-LoRA served which tokens, to this PNG")


@dataclass
class AnswerConfig:
    """The run that answers, and how."""

    run: str = flag("", "run folder (default: the newest finished one under runs/)")
    model: str = flag(
        "",
        "a pretrained model instead of a run: hub id or folder of Qwen2.5-Omni, LLaVA-OneVision "
        "or BLIP-2, or a preset",
    )
    weights: str = flag("", "of a run's base model, where they are now (default: as in its config)")
    vision: str = flag("", "of a run: its vision encoder, likewise")
    audio_encoder: str = flag("", "of a run: its BEATs checkpoint, likewise")
    llm: str = flag("", "of a run: its LM, likewise")
    load_in_4bit: bool = flag(
        False, "the frozen LM in 4 bits (NF4), a quarter of its memory; needs bitsandbytes"
    )
    side: list = flag(None, "PAVE, CREMA: a side channel, NAME or NAME=FILE; none: the video alone")
    patch: list = flag(None, "PAVE: a patch file to load beside the run's")
    features: str = flag("", "NAME=FOLDER,...: files of side channels, in place of the run's")
    skip: list = flag(None, "CREMA: a modality that is encoded without its adapter")
    beams: int = flag(
        0, "beams of the search for an answer (default: 1; of released CREMA 5, as its authors)"
    )
    max_new_tokens: int = flag(0, "answer tokens at most (default: what the run says)")
    prompts: str = flag("", "JSON file of instructions by task name, instead of ours")
    device: Literal["", "cuda", "cpu", "mps"] = flag("", DEVICE_HELP)
    masks: Literal["", "decoder", "sam2", "box"] = flag(
        "",
        "masks by the run's decoder (default where it has one), by SAM2 from box and points, "
        "or the box itself",
    )
    sam2: str = flag("facebook/sam2.1-hiera-large", "path or hub id of a SAM2 checkpoint")


@dataclass
class ScoreConfig:
    """A whole split that is answered and scored."""

    eval: bool = flag(False, "answer and score a split")
    data: str = flag("", "rows of any form that train.py takes (default: the run's test rows)")
    split: Literal["train", "test"] = flag("test", "which split")
    ablate: Literal["", "audio", "video"] = flag(
        "", "other clips' sounds (audio), or black pictures (video): what do answers rest on?"
    )
    tasks: str = flag("all", "comma-separated task names, or all")
    test_rows: int = flag(0, "rows per task (0: all)")
    eval_batch_tokens: int = flag(
        RunConfig.eval_batch_tokens,
        "tokens that are answered together, prompts and answers; halved where memory is short",
    )
    allow_missing: bool = flag(False, "score samples with unreadable files as wrong")
    compare: Literal["", "paper"] = flag(
        "", "paper: also print the numbers beside the published ones, with their sources"
    )
    out: str = flag(
        "",
        "where predictions and metrics go (default: RUN/eval_SPLIT); with --questions the .csv or "
        ".jsonl of answers",
    )


# the flags of infer.py; their values stay in the Namespace of argparse
INFER = {"ask": AskConfig, "answer": AnswerConfig, "score": ScoreConfig}


# --- settings from values ------------------------------------------------------------------------


def groups_of(settings: type) -> dict[str, type]:
    """Return the dataclass of each group of a settings class, by the group's name."""
    return {group.name: group.default_factory for group in fields(settings)}


def flag_fields(group: type) -> list[Field]:
    """Return the fields of a group that are flags.

    Their names are unique over all groups.
    """
    return [f for f in fields(group) if "help" in f.metadata]


def settings_from(settings: type, values: dict[str, dict]):
    """Build settings of a class from values by group, as config.json has them.

    Raises:
        RunError: a group or a field that the recipe does not have.
    """
    groups = groups_of(settings)
    try:
        return settings(**{name: groups[name](**group) for name, group in values.items()})
    except (KeyError, TypeError) as error:
        raise RunError(
            f"{settings.__name__}: {error}; the settings come from another version of crab_min, "
            "or from another recipe"
        ) from None


def setting_names(settings: type) -> dict[str, tuple[str, str]]:
    """Return by name the group and the field of each setting of a class.

    The name of a flag is that of its field. Other fields are named GROUP_FIELD: `patch_width`.
    """
    names = {}
    for group, config in groups_of(settings).items():
        flags = flag_fields(config)
        for f in fields(config):
            names[f.name if f in flags else f"{group}_{f.name}"] = (group, f.name)
    return names


def with_values(settings, **values):
    """Return settings in which the settings of these names have other values."""
    names = setting_names(type(settings))
    changes: dict[str, dict] = {}
    for name, value in values.items():
        group, field_name = names[name]
        changes.setdefault(group, {})[field_name] = value
    groups = {group: replace(getattr(settings, group), **new) for group, new in changes.items()}
    return replace(settings, **groups)


# --- the first version ---------------------------------------------------------------------------

# old name of a field and its flag -> new name
RENAMED = {
    "accumulate": "grad_accum",
    "answers": "eval_mode",
    "checkpointing": "gradient_checkpointing",
    "clip": "max_grad_norm",
    "group": "group_by_length",
    "half": "bf16",
    "join": "fusion",
    "keep": "keep_checkpoints",
    "mix": "task_sampling_exponent",
    "quantize": "load_in_4bit",
    "sequential": "modality_sequential",
    "start": "init_from",
    "temperature": "exit_threshold",
    "train": "trainable",
    "arms": "compare_lora",
}
# old name of a field, whose flag is gone -> name of a setting that presets have
PRESET_ONLY = {"patch_layers": "patch_layers", "patch_rope": "patch_rope"}
PRESET_ONLY |= {"patch_size": "patch_width", "shared_kv": "patch_shared_kv"}
for size in ("width", "heads", "queries", "chained", "bce", "dice"):
    PRESET_ONLY[f"mask_{size}"] = f"masks_{size}"
# new name of a setting -> its old values -> the new values
OLD_VALUES = {
    "backbone": {"native": "omni", "llava": "llava_onevision", "crema": "blip2"},
    "eval_mode": {"text": "generate", "options": "rank"},
    "load_in_4bit": {"4bit": True, "": False},
    "masks_decoder": {"decoder": True, "": False},
    "trainable": {
        "decoder": "mask_decoder",
        "masks": "mask_decoder,mask_tokens",
        "words": "embeddings",
    },
}


def settings_from_old(values: dict) -> tuple[str, Settings]:
    """Convert the flat settings of a config.json of the first version.

    Args:
        values: old field name -> value.

    Returns:
        The name of the recipe, and its settings.
    """
    # names and values as they are today; "a+b" became "a,b"
    new_names = {**RENAMED, **PRESET_ONLY, "about": "patch_questions", "masks": "masks_decoder"}
    named = {new_names.get(name, name): value for name, value in values.items()}
    for name, renamed in OLD_VALUES.items():
        if name in named:
            parts = [str(renamed.get(part, part)) for part in str(named[name]).split("+")]
            named[name] = renamed.get(named[name], ",".join(parts))

    # the recipe
    if named.get("modalities"):
        recipe = "crema"
    elif named.get("side") or named.get("patch_questions"):
        recipe = "pave"
    elif named.get("stage") or named.get("masks_decoder"):
        recipe = "crab"
        named["stage"] = named.get("stage") or "unified"
    else:
        recipe = "crab_plus"

    # the settings that it has; the first version had those of all recipes
    settings = RECIPES[recipe]
    known = {name: named[name] for name in setting_names(settings) if name in named}
    return recipe, with_values(settings(), **known)
