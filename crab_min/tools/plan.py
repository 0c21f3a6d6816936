"""The needs of a run, before anything is downloaded.

The command is `python train.py PRESET --plan`.

The run's own model is asked. Its recipe builds it as for training, under the flags that were given,
but on the meta device: every tensor has a shape and a precision, and none has memory.

    parameters    counted by part
    tokens        black media are encoded, and the model says how many tokens they become
    memory        see measure.py: activations are counted in forwards, evaluation's are computed
    operations    counted in forwards

All is for one GPU. Left out is what the CUDA libraries take for themselves (about a gigabyte, which
"fits" adds).

Page of the course: docs/course/51_memory.md.
"""

import re
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from crab_min.answers import Answer
from crab_min.config import Settings
from crab_min.data import SAMPLE_RATE, Sample, pick_tasks, read_splits
from crab_min.encoders import MediaFeatures
from crab_min.errors import DataError
from crab_min.evaluation.scores import by_task
from crab_min.interface import PromptPart, audio_windows, build_prompt, load_prompts
from crab_min.model import AVLanguageModel
from crab_min.recipes.common import rows_of_each_task
from crab_min.tasks import TASKS, Task
from crab_min.tools.lengths import part_seconds, read_media, sample_seconds
from crab_min.tools.measure import (
    ANSWER,
    Prompt,
    activation_bytes,
    answered_together,
    encoding_bytes,
    evaluation_bytes,
    fill,
    lm_dtype,
    lm_linears,
    lm_operations,
    token_operations,
    without_values,
)

CLIP_SECONDS = {"spread": 60.0, "fifths": 5.0, "fifth": 5.0}  # sounds by audio window; else 10 s
# in the place of a question, or of what else fills a slot of an instruction
SLOT_TEXT = "Which of the things that are seen in the video is heard before the bell rings?"

MEASURED = 500  # clips per task whose length is read

GPUS = (16, 24, 48, 80)  # GB
# dense bfloat16 operations per second at most
PEAK = {"3090": 71e12, "4090": 165e12, "A100": 312e12, "H100": 989e12}
SHARE = 0.3  # of the peak that training is taken to use: a guess
# bytes per weight in NF4 (QLoRA, 2305.14314): 4 bits, an 8-bit scale for 64 of them, and a float
# for 256 scales
NF4 = (4 + 8 / 64 + 32 / 64 / 256) / 8


@dataclass
class Count:
    """Parameters of a part."""

    trained: int = 0
    frozen: int = 0


@dataclass
class Memory:
    """Bytes that a run needs on a GPU."""

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    encoding: int  # frozen encoders at work, before there are activations
    evaluation: int  # all that is there while the greatest batch is answered

    @property
    def training(self) -> int:
        """Return the bytes of all that is there in a training step."""
        weights = self.frozen + self.trained
        return weights + self.gradients + self.optimizer + max(self.activations, self.encoding)

    @property
    def needed(self) -> float:
        """Return the gigabytes (GiB) of a GPU that holds it.

        It needs a gigabyte more for CUDA, and a twentieth is lost between blocks.
        """
        return (max(self.training, self.evaluation) * 1.05 + 1e9) / 2**30

    def fits(self, gigabytes: float) -> bool:
        """Tell whether a GPU of so many gigabytes (GiB) holds it."""
        return self.needed < gigabytes


@dataclass
class Plan:
    """All that `report` prints.

    Attributes:
        parts: parameters by part.
        whole_qformers: parameters of a whole Q-Former per modality; 0 without modalities.
        tokens: of a sample, by task.
        operations: of the LM in a training step, for a sample of the mean length.
        base_operations: of the frozen model's forward on the longest prompt, if it has patches.
        patch_operations: what each patch adds to them.
        join_operations: of the LM's forward on the longest prompt, by how modalities are joined.
        memory: by the precision of the LM's weights.
    """

    settings: Settings
    parts: dict[str, Count]
    whole_qformers: int
    tokens: dict[str, int]
    operations: float
    base_operations: int
    patch_operations: dict[str, int]
    join_operations: dict[str, int]
    memory: dict[str, Memory]

    @property
    def trained(self) -> int:
        return sum(count.trained for count in self.parts.values())

    @property
    def frozen(self) -> int:
        return sum(count.frozen for count in self.parts.values())


@dataclass
class Clips:
    """Rows of --data, and what is known of their files.

    Attributes:
        samples: at most MEASURED rows of each task.
        seconds: length of each file, by path.
        errors: the reason why a file cannot be read, by path.
    """

    samples: list[Sample]
    seconds: dict[str, float]
    errors: dict[str, str]


def plan(recipe: ModuleType, settings: Settings, clips: Clips | None = None) -> Plan:
    """Count what a run of a recipe needs.

    Args:
        recipe: a module of crab_min.recipes.
        clips: of --data, if they have been read.

    Raises:
        ModelError: a model whose sizes are not known here.
        DataError: no task has a prompt with the run's side channels.
    """
    settings = recipe.run_settings(settings)
    model, sides = build_model(recipe, settings)
    parts = count_parts(model)
    qformers = whole_qformers(model)

    # the prompts of its tasks; the longest one decides about memory
    if settings.data.data:
        clips = clips or read_clips(recipe, settings)
        prompts = prompts_of_clips(model, recipe, settings, sides, clips)
    else:
        prompts = example_prompts(model, recipe, settings, sides)
    tokens = {task: prompt.tokens for task, prompt in prompts.items()}
    longest = max(prompts.values(), key=lambda prompt: prompt.tokens)
    # a product and its sum for each weight: forward, backward to the inputs, and with
    # checkpointing the forward again
    passes = 6 if settings.training.gradient_checkpointing else 4
    multiplied = sum(linear.weight.numel() for linear in lm_linears(model))
    operations = passes * multiplied * sum(tokens.values()) / len(tokens)

    # from here on the model runs, on tensors without values
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill(model)
        longest.media = [without_values(medium) for medium in longest.media]
        memory = memory_by_precision(model, settings, longest)
        base_operations, patch_operations = count_patch_operations(model, longest)
        join_operations = count_join_operations(model, longest)
    return Plan(
        settings=settings,
        parts=parts,
        whole_qformers=qformers,
        tokens=tokens,
        operations=operations,
        base_operations=base_operations,
        patch_operations=patch_operations,
        join_operations=join_operations,
        memory=memory,
    )


def build_model(
    recipe: ModuleType, settings: Settings
) -> tuple[AVLanguageModel, dict[str, MediaFeatures]]:
    """Build the model of a run without weights, with all that learns.

    Returns:
        the model, and the features of each side channel.
    """
    model = recipe.load_model(settings, empty=True)
    sides = {name: side_features(model, recipe, settings, name) for name in settings.side_channels}
    widths = {name: medium.features.shape[-1] for name, medium in sides.items()}
    with torch.device("meta"):
        recipe.add_trained_parts(model, settings, widths)
    model.set_trainable(settings.training.parts)
    return model, sides


# --- parameters ----------------------------------------------------------------------------------

# how the names of a part's parameters begin, and its title
PARTS = [
    (r"vision\.|llm\..*\.(visual|vision_tower)\.", "vision encoder"),
    (r"audio\.|llm\..*\.audio_tower\.", "audio encoder"),
    (r"llm\..*\.(multi_modal_projector|image_newline)", "projector"),
    (r"visual_qformer\.", "visual connector"),
    (r"audio_qformer\.", "audio connector"),
    (r"(time|number)\.", "time and number"),
    (r"multimodal\.(?:parts|.*\.[AB])\.(\w+)\.", r"modality \1"),
    (r"multimodal\.", "shared Q-Former"),
    (r"fusion\.", "fusion"),
    (r"mask_branch\.|llm\..*\.rows$", "mask decoder and tokens"),
    (r"llm\..*lora_", "adapter in the language model"),
    (r"llm\..*lm_head\.", "head"),
    (r"llm\.", "language model"),
    (r"patches\.(\w+)\.", r"patch for \1"),
]


def part_of(name: str) -> tuple[int, str]:
    """Return the part of a parameter: its place in the table, and its title."""
    for place, (pattern, title) in enumerate(PARTS):
        match = re.match(pattern, name)
        if match:
            return place, match.expand(title)
    raise AssertionError(f"{name}: belongs to no part")


def count_parts(model: AVLanguageModel) -> dict[str, Count]:
    """Count the parameters of each part.

    A head that is tied to the embeddings has none.
    """
    counts: dict[str, Count] = {}
    by_place = sorted(model.named_parameters(), key=lambda named: part_of(named[0])[0])
    for name, parameter in by_place:
        count = counts.setdefault(part_of(name)[1], Count())
        if parameter.requires_grad:
            count.trained += parameter.numel()
        else:
            count.frozen += parameter.numel()
    return counts


def whole_qformers(model: AVLanguageModel) -> int:
    """Count the parameters of one whole Q-Former per modality.

    CREMA compares itself with this. Its queries, norm and projection are counted, and no adapters
    and no fusion. 0 for a model without modalities.
    """
    shared = own = 0
    for name, parameter in model.named_parameters():
        if name.startswith("multimodal.parts."):
            own += parameter.numel()
        elif name.startswith("multimodal.") and not re.search(r"\.[AB]\.", name):
            shared += parameter.numel()
    return own + shared * (1 + len(model.side_names))


# --- prompts -------------------------------------------------------------------------------------


def example_prompts(
    model: AVLanguageModel,
    recipe: ModuleType,
    settings: Settings,
    sides: dict[str, MediaFeatures],
) -> dict[str, Prompt]:
    """Make a prompt of each task, as the recipe and the model lay it out.

    Media have their exact number of tokens, for clips of CLIP_SECONDS; text has about as many.

    Args:
        sides: the features of each side channel.
    """
    prompts: dict[str, Prompt] = {}
    encoded: dict[tuple, MediaFeatures] = {}
    for sample in example_samples(recipe, settings):
        features = []
        for part in sample.media:
            key = (part.side, part.kind, part.frames, part.window, part.end)
            if key not in encoded:
                encoded[key] = sides[part.side] if part.side else encode_black(model, part)
            features.append(encoded[key])

        parts, media = model.arrange(sample.parts, features)
        tokens = len(model.prompt_ids(parts, media)) + ANSWER
        raw = {part.kind: black(model, part) for part in sample.media if not part.side}
        prompts[sample.task.name] = Prompt(tokens, media, raw)
    return prompts


def read_clips(recipe: ModuleType, settings: Settings) -> Clips:
    """Read the rows of --data, and the length of each of their files.

    Raises:
        DataError: rows that cannot be used.
    """
    data = settings.data
    prompts = load_prompts(data.prompts) if data.prompts else None
    train, test = read_splits(data, data.data, pick_tasks(data.tasks), prompts, 0)
    samples = rows_of_each_task(train + test, MEASURED)
    prepared = recipe.prepare_samples(samples, settings)
    parts = [part for sample in prepared for part in sample.media]
    seconds, errors = read_media(parts, decode=False, workers=data.workers)
    if errors:
        print(f"{len(errors)} unreadable files, such as: {next(iter(errors.values()))}")
    return Clips(samples, seconds, errors)


def prompts_of_clips(
    model: AVLanguageModel,
    recipe: ModuleType,
    settings: Settings,
    sides: dict[str, MediaFeatures],
    clips: Clips,
) -> dict[str, Prompt]:
    """Make the prompts of the median and the longest clip of each task in --data.

    Args:
        sides: the features of each side channel.

    Raises:
        DataError: no clip can be read.
    """
    samples = recipe.prepare_samples(clips.samples, settings)
    readable = [sample for sample in samples if not clips.errors.keys() & paths_of(sample)]
    seconds = clips.seconds
    chosen: dict[str, Prompt] = {}
    for task, rows in by_task(readable).items():
        ordered = sorted((s for (s,) in rows), key=lambda sample: sample_seconds(sample, seconds))
        for title, sample in (("median", ordered[len(ordered) // 2]), ("longest", ordered[-1])):
            prompt = measure_prompt(model, sample, seconds, sides)
            chosen[f"{task.name}, {title} of {sample_seconds(sample, seconds):.0f} s"] = prompt
    if not chosen:
        raise DataError(f"--data {settings.data.data}: no clip can be read")
    return chosen


def paths_of(sample: Sample) -> set[str]:
    """Return the paths of a sample's media."""
    return {part.path for part in sample.media}


def measure_prompt(
    model: AVLanguageModel,
    sample: Sample,
    seconds: dict[str, float],
    sides: dict[str, MediaFeatures] | None = None,
) -> Prompt:
    """Lay out the prompt of a sample whose clips are black and as long as they are.

    Args:
        seconds: length of each file.
        sides: the features of each side channel.
    """
    features, raw = [], {}
    for part in sample.media:
        if part.side:
            features.append(sides[part.side])
            continue
        features.append(encode_black(model, part, part_seconds(part, seconds)))
        raw[part.kind] = black(model, part, part_seconds(part, seconds))
    parts, media = model.arrange(sample.parts, features)
    return Prompt(len(model.prompt_ids(parts, media)) + ANSWER, media, raw)


def prompt_tokens(model: AVLanguageModel, sample: Sample, seconds: dict[str, float]) -> int:
    """Return the number of tokens of a sample's prompt, without an answer."""
    return measure_prompt(model, sample, seconds).tokens - ANSWER


def example_samples(recipe: ModuleType, settings: Settings) -> list[Sample]:
    """Return a sample without content of each task, in the form of the recipe.

    Raises:
        DataError: none of the tasks can have it.
    """
    names = pick_tasks(settings.data.tasks)
    if settings.data.tasks == "all":
        names = [name for name in names if TASKS[name].v2]
    samples: list[Sample] = []
    for name in names:
        try:
            sample = example_sample(TASKS[name], settings.side_channels)
            samples += recipe.prepare_samples([sample], settings)
        except DataError:  # side channels stand beside one video, and this task has two
            if name == names[-1] and not samples:
                raise
    return samples


def example_sample(task: Task, side_channels: list[str]) -> Sample:
    """Make a sample of a task, with a text of usual length in its slots."""
    # vid and fid: what Ref-AVS names its masks by
    row = {"frame_idx": 0, "vid": "0", "fid": "0"}
    row |= {medium.fields[0]: "media/0/frames/0.jpg" for medium in task.media}
    row |= {fields[0]: SLOT_TEXT for fields in task.slots.values()}
    row["sides"] = {name: f"{name}.npy" for name in side_channels}
    return Sample(task.name, task, build_prompt(task, row), target="", gold=Answer(), row=row)


def encode_black(model: AVLanguageModel, part: PromptPart, seconds: float = 0.0) -> MediaFeatures:
    """Encode a black clip, or silence.

    Args:
        seconds: its length; 0 for that of the clips of the part's task.
    """
    array, seconds = black(model, part, seconds)
    return model.encode(part.kind, [array], [seconds])[0]


def black(
    model: AVLanguageModel, part: PromptPart, seconds: float = 0.0
) -> tuple[np.ndarray | list[np.ndarray], float]:
    """Return a black clip or the windows of a silence, and its length in seconds."""
    if part.kind == "audio":
        seconds = seconds or CLIP_SECONDS.get(part.window, 10.0)
        if part.end:  # of --max-audio-seconds, or of a row
            seconds = min(seconds, part.end - part.start)
        windows = audio_windows(part.window, seconds)
        return [np.zeros(round(SAMPLE_RATE * (end - start))) for start, end in windows], seconds
    frames = 1 if part.kind == "image" else part.frames
    pixels = np.zeros((frames, model.frame_size, model.frame_size, 3), np.uint8)
    return pixels, seconds or 10.0


def side_features(
    model: AVLanguageModel, recipe: ModuleType, settings: Settings, name: str
) -> MediaFeatures:
    """Return features of a side channel.

    They are of the model's encoders, or as a file would have them.
    """
    has_beats = getattr(model, "audio", None) is not None
    if name == "audio" and has_beats:
        return encode_black(model, PromptPart("audio"))
    shape = recipe.side_shape(name, settings)
    if shape:
        return MediaFeatures(name, torch.empty(shape, device="meta"))
    return encode_black(model, PromptPart("view", frames=settings.data.frames or Task.frames))


# --- memory and operations ----------------------------------------------------------------------


def memory_by_precision(
    model: AVLanguageModel, settings: Settings, longest: Prompt
) -> dict[str, Memory]:
    """Count the bytes of a run, also with the LM in 4 bits where that can be had.

    Returns:
        "bfloat16" or "float32", and "4-bit LM" -> its bytes. With --load-in-4bit that alone.
    """
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    encoding = encoding_bytes(model, settings, longest)
    whole = Memory(
        frozen=frozen,
        trained=trained,
        gradients=trained,
        optimizer=2 * trained,  # AdamW's two moments
        activations=activation_bytes(model, settings, longest),
        encoding=encoding,
        evaluation=frozen + trained + max(encoding, evaluation_bytes(model, settings, longest)),
    )
    if settings.run.eval_every:  # the optimizer stays where it is
        whole.evaluation += whole.optimizer

    dtype = lm_dtype(model)
    columns = {str(dtype).removeprefix("torch."): whole}
    if dtype == torch.bfloat16:  # pretrained weights, which bitsandbytes quantizes as they load
        saved = sum(linear.weight.numel() * (2 - NF4) for linear in lm_linears(model))
        columns["4-bit LM"] = replace(
            whole, frozen=round(frozen - saved), evaluation=round(whole.evaluation - saved)
        )
    if settings.backbone.load_in_4bit:
        return {"4-bit LM": columns["4-bit LM"]}
    return columns


def count_patch_operations(model: AVLanguageModel, longest: Prompt) -> tuple[int, dict[str, int]]:
    """Count the operations of a forward on the longest prompt.

    Returns:
        those of the frozen model, and what each patch adds, by its side channel; (0, {}) for a
        model without patches.
    """
    patches = list(getattr(model, "patches", []))
    if not patches:
        return 0, {}
    without = token_operations(model, longest.media, [])
    added = {}
    for name in patches:
        added[name] = token_operations(model, longest.media, [name]) - without
    return without + lm_operations(model, longest.tokens), added


def count_join_operations(model: AVLanguageModel, longest: Prompt) -> dict[str, int]:
    """Count the operations of the LM on the longest prompt, by how modalities are joined.

    Returns {} for a model without modalities.
    """
    if not hasattr(model, "lengths_by_join"):
        return {}
    lengths = model.lengths_by_join(longest.media[0])
    others = longest.tokens - lengths.get("fused", 0)
    return {join: lm_operations(model, others + length) for join, length in lengths.items()}


# --- the table -----------------------------------------------------------------------------------


def report(result: Plan) -> str:
    """Format a plan as `--plan` prints it."""
    lines = [*part_lines(result), *token_lines(result), *cost_lines(result), *memory_lines(result)]
    return "\n".join(lines)


def part_lines(result: Plan) -> list[str]:
    lines = [f"{'part':<36}{'trained':>16}{'frozen':>16}"]
    counts = result.parts | {"all": Count(result.trained, result.frozen)}
    for title, count in counts.items():
        lines.append(f"{title:<36}{count.trained:>16,}{count.frozen:>16,}")
    return lines


def token_lines(result: Plan) -> list[str]:
    lengths = "of --data" if result.settings.data.data else "of 10 s, of 60 s in avqa"
    lines = ["", f"tokens a sample, about (media exactly, for clips {lengths}):"]
    cells = [f"{task} {tokens}" for task, tokens in result.tokens.items()]
    for start in range(0, len(cells), 7):
        lines.append("  " + "  ".join(cells[start : start + 7]))
    hours = []
    for gpu, peak in PEAK.items():
        hours.append(f"{gpu} {1e5 * result.operations / (SHARE * peak) / 3600:.1f} h")
    lines.append(
        f"time: {result.operations / 1e12:.1f} TFLOPs a sample of the mean length in the LM, "
        f"without encoders and decoding; 100,000 samples at {SHARE:.0%} of a GPU's peak: "
        + ", ".join(hours)
    )
    return lines


def cost_lines(result: Plan) -> list[str]:
    lines = []
    for name, operations in result.patch_operations.items():
        parameters = result.parts[f"patch for {name}"].trained
        lines.append(
            f"patch for {name}: {parameters:,} parameters, {operations / 1e12:.3f} "
            f"TFLOPs for the longest sample, {parameters / result.frozen:.2%} and "
            f"{operations / result.base_operations:.2%} of the base"
        )
    if result.patch_operations:
        lines.append(
            f"the frozen base: {result.frozen:,} parameters, "
            f"{result.base_operations / 1e12:.3f} TFLOPs for the longest sample"
        )
    for join, operations in result.join_operations.items():
        lines.append(
            f"modalities {join}: {operations / 1e12:.4f} TFLOPs of the LM for the longest sample"
        )
    if result.whole_qformers:
        fewer = 1 - result.trained / result.whole_qformers
        lines.append(
            f"a Q-Former per modality, trained whole, would be {result.whole_qformers:,} "
            f"parameters; trained here: {result.trained:,}, {fewer:.1%} fewer"
        )
    return lines


def memory_lines(result: Plan) -> list[str]:
    longest = max(result.tokens.values())
    training = result.settings.training
    together = answered_together(result.settings, longest - ANSWER)
    checkpointing = "on" if training.gradient_checkpointing else "off"
    lines = [
        "",
        f"memory in GB, {training.batch_size} samples of {longest} tokens a step, gradient "
        f"checkpointing {checkpointing}:",
        table_row("", list(result.memory)),
    ]
    titles = {
        "frozen": "frozen weights",
        "trained": "adapter and trained weights",
        "gradients": "gradients",
        "optimizer": "optimizer (AdamW)",
        "activations": "activations",
        "encoding": "or before, encoders at work",
        "training": "training, together",
        "evaluation": f"evaluation, {together} samples",
    }
    columns = result.memory.values()
    for name, title in titles.items():
        sizes = [getattr(memory, name) / 1e9 for memory in columns]
        lines.append(table_row(title, [f"{size:.2f}" for size in sizes]))
    for gpu in GPUS:
        answers = []
        for memory in columns:
            answers.append("yes" if memory.fits(gpu) else "no")
        lines.append(table_row(f"fits {gpu} GB", answers))
    return lines


def table_row(title: str, cells: list[str]) -> str:
    return f"  {title:<30}" + "".join(f"{cell:>12}" for cell in cells)
