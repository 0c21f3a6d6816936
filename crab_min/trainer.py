"""The training loop: frozen base, adapter (and connectors) trained on a mixture of tasks, in the order things happen.

The loss is the cross-entropy summed over the answer tokens of a step, of all its batches on all processes, and divided by their number;
AdamW, linear warm-up, cosine decay, gradient clipping. A run lives in a folder (checkpoints.py): killed at any moment and started again with
the same command it goes on from its last state and ends with the same losses, because the batches of a step depend on the seed and on
how many came before alone, and the optimizer and the random generators are part of the state.
"""
import csv
import itertools
import json
import math
import random
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from crab_min.backbones.blip2 import CremaConfig, CremaModel
from crab_min.backbones.load import BackboneConfig, load_model
from crab_min.cli import atomic_write
from crab_min.crema import EarlyExit
from crab_min.data import (
    MASKED,
    Sample,
    add_mask_tokens,
    add_side_channels,
    evaluation_data,
    gold_mask,
    keep_modality,
    limit_frames,
    pick_tasks,
    read_samples,
)
from crab_min.errors import RunError
from crab_min.evaluation.answering import (
    cell,
    constants,
    evaluate_masks,
    generate_answers,
    mask_table,
    options,
    plan_batches,
    predict_masks,
    score_all,
    table,
    token_limits,
    write_predictions,
)
from crab_min.evaluation.metrics import score
from crab_min.evaluation.pictures import draw_curves, draw_scores, draw_sheet, draw_subsets
from crab_min.features import WORKERS, Features, Mixer
from crab_min.interface import load_prompts
from crab_min.model import ASSETS, AdapterConfig, AVLanguageModel, bf16_autocast
from crab_min.runs import processes
from crab_min.runs.folder import (
    atomic_replace,
    choose_folder,
    load_state,
    lock_run,
    save_state,
    save_trained,
    states_of,
)
from crab_min.runs.log import RunLog, asked_to_stop, multiplied
from crab_min.sides import add_sides, built_in, modalities, score_subsets, side_names, subset_table
from crab_min.tasks import TASKS
from crab_min.world.folders import WorldConfig


@dataclass
class TrainConfig(BackboneConfig, AdapterConfig, CremaConfig, WorldConfig):
    """Everything a training run can be told; every field is a flag of train.py."""
    data: str = field(default="", metadata={"help": "AV-UIE v2 folder (AVUIE_2), or a .jsonl file of your own; without it the built-in world is built and used"})
    tasks: str = field(default="all", metadata={"help": "comma-separated task names, or all"})
    target: str = field(default="reasoning", metadata={"help": "what is learned: evidence then label, or the label alone", "choices": ["reasoning", "label"]})
    prompts: str = field(default="", metadata={"help": "JSON file of instructions by task name, instead of ours"})
    stage: str = field(default="", metadata={"help": "of Crab: visual or audio (align that connector on captions, LM frozen), unified (all tasks), masks (a mask decoder)",
                                             "choices": ["", "visual", "audio", "unified", "masks"]})
    start: str = field(default="", metadata={"help": "run folder whose adapter and modules training starts from (default with --stage: the run of the stage before; masks on the shipped base: the shipped adapter)"})
    side: str = field(default="", metadata={"help": "PAVE: side channels that are patched in, comma-separated: audio, fast (25 frames a second), or a name that rows of a "
                                            ".jsonl have under \"sides\"; none: a prompt without sound, and no patch. Without --data: audio, fast, depth, view of the built-in world"})
    frames: int = field(default=0, metadata={"help": "frames of a video (0: as its task has it, mostly 10; PAVE: 32, CREMA: 4); fewer take less memory"})
    patch_size: int = field(default=512, metadata={"help": "width of a patch"})
    patch_layers: int = field(default=2, metadata={"help": "blocks of a patch"})
    patch_rope: bool = field(default=False, metadata={"help": "rotary positions in a patch, in time, row and column"})
    shared_kv: bool = field(default=False, metadata={"help": "values of a patch through its key projection, as released"})
    answers: str = field(default="text", metadata={"help": "how the run is examined: by what it writes, or of a question with options by the likeliest one", "choices": ["text", "options"]})
    about: str = field(default="", metadata={"help": "PAVE, --side none: which channels the questions of the built-in world are about"})
    arms: bool = field(default=False, metadata={"help": "PAVE: a run without the side channel first, and a table of both and the frozen base"})
    train: str = field(default="adapter+connectors+words", metadata={"help": "what is trained beside patches: the adapter, the connectors (Q-Formers), the word embeddings; masks: the mask "
                                                                             "decoder and the mask tokens; decoder: the same but for how the tokens are read, at half the time a step",
                                                                     "choices": ["adapter", "adapter+words", "adapter+connectors", "adapter+connectors+words", "decoder", "adapter+decoder",
                                                                                 "adapter+connectors+decoder", "masks", "adapter+masks", "adapter+connectors+masks"]})
    text_steps: int = field(default=0, metadata={"help": "with decoder: of the steps, how many learn the text of the answers first; then the adapter and the connectors stay as they are"})
    steps: int = field(default=0, metadata={"help": "optimizer steps (0: three passes over the rows, at least 300, at most 760, or 1300 with --things or --data)"})
    epochs: float = field(default=0, metadata={"help": "passes over the training rows, instead of the number of steps"})
    batch_size: int = field(default=16, metadata={"help": "samples that a process takes at once; a step has this times --accumulate times the number of processes"})
    accumulate: int = field(default=1, metadata={"help": "batches of a process a step: more samples a step than memory holds"})
    max_tokens: int = field(default=0, metadata={"help": "tokens, with padding, that a process takes at once: a batch of more is passed in parts, and the step stays the same (0: any number)"})
    group: bool = field(default=False, metadata={"help": "batches of samples of about one length: less padding, at the price of less mixed batches"})
    lr: float = field(default=4e-3, metadata={"help": "peak learning rate of the adapter"})
    connector_lr: float = field(default=5e-4, metadata={"help": "peak learning rate of connectors and word embeddings"})
    warmup: float = field(default=.03, metadata={"help": "share of the steps in which the learning rate rises"})
    beta2: float = field(default=.999, metadata={"help": "AdamW: how long the mean of the squared gradient remembers; .98 where the gradient has spikes, as a mask decoder's"})
    clip: float = field(default=1.0, metadata={"help": "largest norm of the gradient"})
    mix: float = field(default=.5, metadata={"help": "a task is drawn with probability ~ rows ** mix (0: all alike, 1: by rows)"})
    seed: int = field(default=0, metadata={"help": "seed of the world, the order and the initial adapter"})
    save_every: int = field(default=100, metadata={"help": "steps between two saved states"})
    keep: int = field(default=1, metadata={"help": "how many of the newest states stay"})
    eval_every: int = field(default=0, metadata={"help": "steps between two examinations on --eval-rows rows that are kept out of training; the best stays in RUN/best (0: none)"})
    eval_rows: int = field(default=64, metadata={"help": "with --eval-every: how many rows"})
    fsdp: bool = field(default=False, metadata={"help": "with torchrun: each GPU keeps its share of the frozen LM (FSDP2), for an LM that one alone does not hold"})
    half: bool = field(default=True, metadata={"help": "matrix products in bfloat16 where the machine has instructions for them; weights stay in float32"})
    checkpointing: bool = field(default=False, metadata={"help": "gradient checkpointing: less memory, a forward more"})
    cache_features: bool = field(default=True, metadata={"help": "keep the features of the frozen encoders in memory"})
    workers: int = field(default=WORKERS, metadata={"help": "processes that decode media"})
    feature_cache: str = field(default="", metadata={"help": "folder that keeps them on disk, for later runs and other processes"})
    max_bad: float = field(default=.01, metadata={"help": "share of unreadable training files above which the run stops"})
    test_rows: int = field(default=0, metadata={"help": "rows a task to test on (0: all)"})
    out: str = field(default="", metadata={"help": "run folder (default: runs/PRESET, or the next free runs/PRESET-2, ...)"})


# Crab's aligning stages: the sense whose captions are learned, and the connector that is trained, from nothing
ALIGN = {"visual": ("video", "visual_qformer"), "audio": ("audio", "audio_qformer")}


def staged(config: TrainConfig, preset: str) -> TrainConfig:
    """The config with what its stage decides: an aligning stage trains one connector on captions; each starts from the run of the one before. Raises RunError for
    settings that exclude each other."""
    if config.sequential and config.modalities and config.accumulate > 1:
        raise RunError(f"--accumulate {config.accumulate}: with --sequential a batch is passed once for each modality; give --accumulate 1, or --no-sequential")
    if config.max_tokens and (config.fsdp or config.sequential and config.modalities):
        raise RunError(f"--max-tokens {config.max_tokens}: not with --{'fsdp' if config.fsdp else 'sequential'}, where batches are passed as they are; lower --batch-size")
    if config.fsdp and config.quantize:
        raise RunError("--quantize 4bit: not with --fsdp, which spreads weights that are not quantized; give one of them")
    if config.text_steps and not (config.stage == "masks" and "decoder" in config.train and config.cache_features):
        raise RunError("--text-steps wants --stage masks, --train with decoder and --cache-features: what the LM makes of the answers is kept then")
    if not config.stage:
        return config
    if config.stage == "masks":
        config = replace(config, masks="decoder", tasks=",".join(MASKED) if config.tasks == "all" else config.tasks)
        if not (config.base or config.llm or config.start):
            return replace(config, start=str(ASSETS / "crab_plus-tiny"))
    before = {"audio": "visual", "unified": "audio", "masks": "unified"}.get(config.stage)
    start = config.start or (f"runs/{preset}-{before}" if before else "")
    if before and not (Path(start) / "metrics.json").exists():
        raise RunError(f"--stage {config.stage} starts from a finished run of --stage {before}, and {start} is none; run --stage {before} first, or name one with --start")
    if config.stage not in ALIGN:
        return replace(config, start=start)
    return replace(config, start=start, tasks="avcap", train=ALIGN[config.stage][1], adapter="none")


# --- the run ---------------------------------------------------------------------------------------------------------------
def learning_rate(step: int, steps: int, warmup: float, text_steps: int = 0) -> float:
    """The factor on the peak learning rate: linear warm-up, then cosine to zero; once for the steps that learn text alone, and again for the others."""
    step, steps = (step, text_steps) if step < text_steps else (step - text_steps, steps - text_steps)
    rise = max(1, round(steps * warmup))
    return min((step + 1) / rise, .5 + .5 * math.cos(math.pi * min(1, max(0, step - rise) / max(1, steps - rise))))


def auto_steps(rows: int, config: TrainConfig) -> int:
    """Three passes, within what a laptop does in ten minutes; more for pictures and sounds that the tiny base has never met."""
    return max(300, min(1300 if config.things or config.data else 760, round(3 * rows / (config.batch_size * config.accumulate * processes.count()))))


def run(config: TrainConfig, preset: str) -> dict:
    """One training run from annotations to metrics.json, which is returned. Raises the named errors of what it reads."""
    began, config, device = time.time(), staged(config, preset), processes.start()
    folder = processes.on_first(lambda: choose_folder(asdict(config), config.out, f"{preset}-{config.stage}" if config.stage else preset))
    tasks, prompts = pick_tasks(config.tasks), load_prompts(config.prompts) if config.prompts else None
    torch.manual_seed(config.seed)
    model = load_model(config).to(device)
    if config.stage in ALIGN:
        model.renew(config.train)
    root = config.data or processes.on_first(lambda: str(built_in(config, config.seed)))
    train = read_samples(root, tasks, "train", config.target, prompts)
    examined = [t for t in tasks if "test" in TASKS[t].splits]
    test = read_samples(evaluation_data(root), examined, "test", config.target, prompts, config.test_rows) if examined and evaluation_data(root) else []
    if config.stage in ALIGN:
        train = keep_modality(train, ALIGN[config.stage][0])
    if config.masks:
        train, test = add_mask_tokens(train), add_mask_tokens(test)
    if config.side or config.modalities:
        train, test = (add_side_channels(rows, side_names(config), needed=not config.modalities) for rows in (train, test))
    train, test = limit_frames(train, config.frames), limit_frames(test, config.frames)
    features = Features(model, config.cache_features, config.max_bad, config.feature_cache, config.workers)
    features.prepare(test)                                                    # strict: a missing test clip is an error
    train = features.prepare(train, strict=False)
    held_out = random.Random(config.seed).sample(train, min(config.eval_rows, len(train) // 2)) if config.eval_every else []
    apart = {s.id for s in held_out}
    train = [s for s in train if s.id not in apart]

    model.add_adapter(config)
    add_sides(model, features, train, config)
    if config.start:
        model.restore_trained(Path(config.start))
    if "adapter" not in config.train.split("+"):                              # it comes from another run and stays
        model.llm.requires_grad_(False)
    model.set_trainable(config.train)
    if isinstance(model, CremaModel):
        model.learn(modalities(config))
    if config.checkpointing:
        model.llm.activation_checkpointing_enable({"use_reentrant": False})
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if config.fsdp:
        processes.shard(model.llm)
    steps = config.steps or round(config.epochs * len(train) / (config.batch_size * config.accumulate * processes.count())) or auto_steps(len(train), config)
    if config.text_steps >= steps:
        raise RunError(f"--text-steps {config.text_steps}: of {steps} steps none is left for the masks; give more --steps, or fewer --text-steps")
    limits, by_option = token_limits(model, train), config.answers == "options"
    size = 12 * sum(p.numel() for p in trained.values())                      # bytes of a state: weights and two moments
    held = lock_run(folder, (config.keep + 3) * size) if processes.rank() == 0 else None
    if processes.rank() == 0:
        atomic_write(folder / "config.json", json.dumps({"preset": preset, "train": asdict(config), "steps": steps, "limits": limits, "processes": processes_of(folder)}, indent=1))
        print(f"{folder}: {len(train)} training rows and {len(test)} test rows of {len({s.task.name for s in train})} tasks, {steps} steps of "
              + " x ".join(str(n) for n in (config.batch_size, config.accumulate, processes.count()) if n > 1 or n == config.batch_size))
        print(f"trained: {sum(p.numel() for p in trained.values()):,} of {sum(p.numel() for p in model.parameters()):,} parameters, in "
              + ", ".join(sorted({name_of(n) for n in trained})))

    if not processes.on_first(lambda: (folder / "base.json").exists()):
        base = score_all(test, generate_answers(model, features, test, limits, desc="frozen base", by_option=by_option))
        if processes.rank() == 0:
            atomic_write(folder / "base.json", json.dumps(base))
    try:
        loop(config, model, features, train, held_out, limits, steps, folder)
    except torch.OutOfMemoryError as error:
        raise RunError(f"out of memory ({str(error).split('.')[0]}); lower --batch-size and raise --accumulate as much, or give --max-tokens; the step stays the same. "
                       "--checkpointing, --frames and --quantize 4bit save too; `--plan` says what the parts need") from error
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror}); free some space, then the same command goes on from the last state") from error
    finally:
        if processes.rank() == 0:
            with suppress(OSError):                                           # a full disk, which is named already
                draw_curves(folder / "curves.png", folder / "log.csv")
    if processes.rank() == 0:
        save_trained(folder, model)
    metrics = examine(config, model, features, train, test, limits, folder) | {"seconds": round(time.time() - began, 1), "steps": steps, "unreadable": len(features.bad)}
    if processes.rank() == 0:
        atomic_write(folder / "metrics.json", json.dumps(metrics, indent=1))
        shutil.rmtree(folder / "state", ignore_errors=True)
        held.close()
        print(f"loss a token: {metrics['loss']['first']:.3f} in the first tenth of the steps, {metrics['loss']['last']:.3f} in the last")
        print(f"{metrics['seconds']:.0f} s; everything is in {folder}/. Ask about a clip: python infer.py CLIP.mp4 --ask \"...\" --run {folder}")
    return metrics


def processes_of(folder: Path) -> list[list[int]]:
    """[[step, processes from then on], ...] of a run: with another number of processes it goes on with the next batches, but with other dropout and other sums."""
    try:
        before = json.loads((folder / "config.json").read_text())["processes"]
    except (OSError, ValueError, KeyError):
        before = []
    step = max((int(s.name[5:]) for s in states_of(folder)), default=0)
    return before if before and before[-1][1] == processes.count() else [*(b for b in before if b[0] < step), [step, processes.count()]]


def examine(config: TrainConfig, model: AVLanguageModel, features: Features, train: list[Sample], test: list[Sample], limits: dict, folder: Path) -> dict:
    """What a trained model makes of the test rows: predictions, pictures and tables, and the numbers of metrics.json, beside those of base.json and log.csv."""
    texts = generate_answers(model, features, test, limits, desc="trained model", by_option=config.answers == "options")
    subsets = score_subsets(model, features, test, texts, limits, config) if isinstance(model, CremaModel) and test else {}
    masks = predict_masks(model, features, test, texts) if config.masks else [None] * len(test)
    segmented = evaluate_masks(model, features, test, masks, limits, partial(predict_masks, model)) if config.masks else {}
    if processes.rank():
        return {}
    write_predictions(folder / "predictions", test, texts)
    base, blind = json.loads((folder / "base.json").read_text()), constants(train, test)
    results = {task: {"name": next(s.task.metric for s in test if s.task.name == task), **r, "base": base[task]["metric"], "blind": blind[task]}
               for task, r in score_all(test, texts).items()}
    for task, r in results.items():
        if all(chances := [1 / len(options(s)) if options(s) else 0 for s in test if s.task.name == task]):
            r["chance"] = sum(chances) / len(chances)
    losses = [float(row["loss"]) for row in csv.DictReader(open(folder / "log.csv"))]
    tenth = max(1, len(losses) // 10)
    loss = {"first": sum(losses[:tenth]) / tenth, "last": sum(losses[-tenth:]) / tenth}
    if test:
        draw_scores(folder / "scores.png", results)
        draw_sheet(folder / "answers.png", sheet(test, texts, masks, config.seed))
        print(table(results))
        if config.masks:
            print(mask_table(segmented))
        if subsets:
            draw_subsets(folder / "modalities.png", subsets["subsets"])
            print(subset_table(subsets["subsets"]))
    return {"tasks": results, "base": base, "loss": loss, **subsets, **segmented}


def finished(config: TrainConfig, preset: str) -> dict | None:
    """The metrics of this very run, where an earlier command has finished it."""
    folder = Path(config.out or f"runs/{preset}")
    try:
        same = json.loads((folder / "config.json").read_text())["train"] == json.loads(json.dumps(asdict(config)))
        return json.loads((folder / "metrics.json").read_text()) if same else None
    except (OSError, ValueError, KeyError):
        return None


def run_arms(config: TrainConfig, preset: str) -> None:
    """PAVE's comparison: the frozen base, an adapter alone, and an adapter with the patch, all on the same questions."""
    arms = (replace(config, side="none", about=config.side, out=config.out and f"{config.out}-without"), f"{preset}-{config.side}-without"), (config, f"{preset}-{config.side}")
    alone, patched = (finished(*arm) or run(*arm) for arm in arms)
    print(f"{'questions about':<18}{'chance':>8}{'base':>8}{'adapter alone':>15}{'with the patch':>16}{'n':>6}")
    for task, r in patched["tasks"].items():
        for kind, t in (r.get("types") or {"": r}).items():
            before = (alone["tasks"][task].get("types") or {"": alone["tasks"][task]})[kind]
            base = (alone["base"][task].get("types") or {"": alone["base"][task]})[kind]
            print(f"{kind or task:<18}{r.get('chance', r['blind']):>8.3f}{base['metric']:>8.3f}{before['metric']:>15.3f}{t['metric']:>16.3f}{t['n']:>6}")


def sheet(samples: list[Sample], texts: list[str], masks: list, seed: int) -> list[tuple]:
    """The cells of draw_sheet: of every second task the best and the worst of a handful of its answers."""
    rng, cells = random.Random(seed), []
    for task in list(dict.fromkeys(s.task.name for s in samples))[::2]:
        few = rng.sample([(s, t, m) for s, t, m in zip(samples, texts, masks) if s.task.name == task], min(8, sum(s.task.name == task for s in samples)))
        scored = sorted(((score(s.task, [s.task.parse(t)], [s.gold], whole=False)["metric"], s.id, s, t, m) for s, t, m in few), key=lambda one: one[:2], reverse=True)
        cells += [cell(s, text, mask) for *_, s, text, mask in (scored[0], scored[-1])[:len(scored)]]
    return cells


def hold_answers(model: AVLanguageModel, features: Features, train: list[Sample]) -> None:
    """Let the LM read all answers once, where from now on only the mask decoder learns."""
    model.eval()
    with tqdm(total=len(train), desc="reading answers", unit="row") as bar:
        for samples, media in features.batches(plan_batches(train, 50), strict=False):
            model.hold(model.collate([s.parts for s in samples], media, [s.target for s in samples]), [s.id for s in samples])
            bar.update(len(samples))
    model.train()
    model.masks.calibrate(torch.stack([state for state, *_ in model.held.values() if state is not None]))


def mask_tensor(mask: np.ndarray | None, device: torch.device) -> torch.Tensor | None:
    """A gold mask as a loss wants it: (1, H, W), 0. or 1., or classes."""
    return None if mask is None else torch.from_numpy(mask)[None].to(device, torch.float32 if mask.dtype == bool else torch.long)


def name_of(parameter: str) -> str:
    """The part of the model a parameter belongs to, for the list of what is trained."""
    parameter = parameter.replace(".rows", ".masks")                        # of the mask tokens, in the LM's words
    return next((part for part in ("masks", "patches", "fusion", "multimodal", "ilora_A", "ilora_B", "ilora_router", "lora_A", "lora_B", "embed_tokens") if part in parameter), parameter.split(".")[0])


def prompt_lengths(model: AVLanguageModel, train: list[Sample]) -> dict[str, int]:
    """About how long each sample is, by id, to sort by: its words in tokens, and 32 for an image, a frame or a second of sound."""
    return {s.id: len(model.encode_text("".join(p.text for p in s.parts) + s.target)) + sum(32 * (1 if p.kind == "image" else p.frames) for p in s.media) for s in train}


def examine_between(model: AVLanguageModel, features: Features, held_out: list[Sample], limits: dict, config: TrainConfig) -> float:
    """The mean of the tasks' metrics on the rows that are kept out of training."""
    scores = score_all(held_out, generate_answers(model, features, held_out, limits, desc="held-out rows", by_option=config.answers == "options"))
    return sum(r["metric"] for r in scores.values()) / len(scores)


def keep_best(folder: Path, model: AVLanguageModel, progress: dict) -> None:
    """RUN/best: a run folder of its own, with the weights that were best so far on held-out rows."""
    def write(new: Path) -> None:
        model.save_trained(new)
        atomic_write(new / "config.json", (folder / "config.json").read_text())
        atomic_write(new / "progress.json", json.dumps(progress))
    if processes.rank() == 0:
        atomic_replace(folder / "best", write)


def optimizer_of(model: AVLanguageModel, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW on what is trained, the adapter and the rest each with its own peak learning rate."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = ([p for n, p in trained if "lora_" in n], config.lr), ([p for n, p in trained if "lora_" not in n], config.connector_lr)
    return torch.optim.AdamW([{"params": group, "peak": lr} for group, lr in groups if group], betas=(.9, config.beta2), weight_decay=0, fused=True)


def counts(batches: list[dict]) -> tuple[int, int, int]:
    """(answer tokens, samples, tokens with padding) of batches."""
    return sum(int((b["labels"] != -100).sum()) for b in batches), sum(len(b["ids"]) for b in batches), sum(b["ids"].numel() for b in batches)


def batches_of(model: AVLanguageModel, config: TrainConfig, samples: list[Sample], media: list, masks: bool) -> list[dict]:
    """Samples as the model wants them, with gold masks where these are learned; several batches where one would have more than --max-tokens."""
    batch = model.collate([s.parts for s in samples], media, [s.target for s in samples])
    if 0 < config.max_tokens < batch["ids"].numel() and len(samples) > 1:
        half = len(samples) // 2
        return [part for piece in (slice(half), slice(half, None)) for part in batches_of(model, config, samples[piece], media[piece], masks)]
    if masks:
        batch |= {"keys": [s.id for s in samples], "masks": [mask_tensor(gold_mask(s, model.frame_size), model.device) for s in samples]}
    return [batch]


def loop(config: TrainConfig, model: AVLanguageModel, features: Features, train: list[Sample], held_out: list[Sample], limits: dict, steps: int, folder: Path) -> None:
    """The steps themselves, from the last saved state on; a line of log.csv each. Modality-sequential: a pass for each live modality of every step."""
    optimizer = optimizer_of(model, config)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    exits = EarlyExit(modalities(config), config.temperature) if config.modalities and config.sequential else None
    if processes.rank():
        torch.manual_seed(config.seed + processes.rank())                               # other dropout on every process
    progress = {"step": 0, "batches": 0, "best": None} | load_state(folder, model, optimizer)
    if exits and "exits" in progress:
        exits.restore(progress["exits"])
    processes.broadcast_parameters(trained)
    done, window = progress["step"], config.accumulate * processes.count()
    lengths = prompt_lengths(model, train) if config.group else None
    order = Mixer(train, config.batch_size, config.seed, config.mix, lengths)
    first = progress["batches"] + processes.rank()                                      # of all batches a process takes each world()th
    batches = features.batches(itertools.islice(order, first, first + (steps - done) * window, processes.count()), strict=False)
    epoch, size = -(-len(train) // (config.batch_size * window)), multiplied(model.llm)
    model.train()
    with RunLog(folder, done) as log, asked_to_stop() as stop, tqdm(desc="training", unit="step", initial=done, total=steps) as bar:
        for step in range(done, steps):
            began, text_only = time.time(), step < config.text_steps
            if not text_only and "decoder" in config.train and config.cache_features and not model.held:
                hold_answers(model, features, train)
            read = [b for b in itertools.islice(batches, config.accumulate) if b[0]]             # without those of which nothing was readable
            waited = time.time() - began
            micro = [batch for samples, media in read for batch in batches_of(model, config, samples, media, bool(config.masks) and not text_only)]
            tokens, rows, places, stopped = processes.sum_all(*counts(micro), bool(stop))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(step, steps, config.warmup, config.text_steps)
            live, value, norm = exits.live if exits else [""], 0., torch.zeros(())
            for name in live if tokens else []:
                if exits:
                    model.learn([name])
                losses = 0.
                for batch in micro:
                    with bf16_autocast(config.half and (text_only or "decoder" not in config.train)):        # the decoder's many small products gain nothing
                        loss, _ = model(batch)
                    (loss / tokens).backward()
                    losses += loss.item() / tokens
                processes.add_gradients(trained)
                if exits:
                    exits.note(name, model.gradient_norm(name))
                norm = torch.nn.utils.clip_grad_norm_(trained, config.clip)
                optimizer.step()
                optimizer.zero_grad()
                value, = processes.sum_all(losses)
            if not live:                                                      # every modality has had enough
                break
            if exits:
                exits.end_step((step + 1) % epoch == 0)
                progress["exits"] = exits.state()
            progress |= {"step": step + 1, "batches": progress["batches"] + window}
            metric = None
            if held_out and (step + 1) % config.eval_every == 0:
                metric = examine_between(model, features, held_out, limits, config)
                if progress["best"] is None or metric > progress["best"]:
                    progress["best"] = metric
                    keep_best(folder, model, progress)
            log.add(step=step + 1, loss=f"{value:.6f}", tokens=tokens, lr=f"{optimizer.param_groups[0]['lr']:.6g}", grad_norm=f"{norm.item():.4f}", seconds=f"{time.time() - began:.3f}",
                    wait=f"{waited:.3f}", rows=rows, places=places, live="+".join(live), metric="" if metric is None else f"{metric:.4f}")
            bar.set_postfix_str(log.said(size), refresh=False)
            bar.update()
            if (step + 1) % config.save_every == 0 or step + 1 == steps or stopped:
                save_state(folder, progress, model, optimizer, config.keep)
            if stopped and step + 1 < steps:
                raise KeyboardInterrupt
    if exits and processes.rank() == 0:
        atomic_write(folder / "exits.json", json.dumps(exits.state(), indent=1))
