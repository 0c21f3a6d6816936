"""The training loop: frozen base, adapter (and connectors) trained on a mixture of tasks, in the order things happen.

The loss is the cross-entropy summed over the answer tokens of a batch and divided by their number; AdamW, linear warm-up, cosine
decay, gradient clipping. A run lives in a folder (DESIGN.md, "Run folder"): killed at any moment and started again with the same
command it goes on from its last state and ends with the same losses, because the batch of a step depends on (seed, step) alone and the
optimizer and the random generators are part of the state.
"""
import csv
import fcntl
import itertools
import json
import math
import random
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from crab_min.backbones import BackboneConfig, load_model
from crab_min.data import MASKED, Sample, examined_data, gold_mask, one_sense, pick_tasks, read_samples, with_masks, with_sides
from crab_min.crema import CremaConfig, CremaModel, EarlyExit
from crab_min.evaluate import answer, cell, constants, draw_masks, examine_masks, mask_table, options, plan_batches, score_all, table, token_limits, write_predictions
from crab_min.features import Features, Mixer
from crab_min.flags import RunError, write_whole
from crab_min.interface import TASKS, load_prompts, parse
from crab_min.metrics import score
from crab_min.model import ASSETS, AdapterConfig, AVLanguageModel, half_products
from crab_min.sides import add_sides, built_in, modalities, score_subsets, side_names, subset_table
from crab_min.viz import draw_scores, draw_sheet, draw_subsets
from crab_min.world_tasks import WorldConfig


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
    frames: int = field(default=0, metadata={"help": "with --side or --modalities: frames of a video (0: as the task has it; PAVE: 32, CREMA: 4)"})
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
    batch_size: int = field(default=16, metadata={"help": "samples a step"})
    lr: float = field(default=4e-3, metadata={"help": "peak learning rate of the adapter"})
    connector_lr: float = field(default=5e-4, metadata={"help": "peak learning rate of connectors and word embeddings"})
    warmup: float = field(default=.03, metadata={"help": "share of the steps in which the learning rate rises"})
    clip: float = field(default=1.0, metadata={"help": "largest norm of the gradient"})
    mix: float = field(default=.5, metadata={"help": "a task is drawn with probability ~ rows ** mix (0: all alike, 1: by rows)"})
    seed: int = field(default=0, metadata={"help": "seed of the world, the order and the initial adapter"})
    save_every: int = field(default=100, metadata={"help": "steps between two saved states"})
    half: bool = field(default=True, metadata={"help": "matrix products in bfloat16 where the machine has instructions for them; weights stay in float32"})
    checkpointing: bool = field(default=False, metadata={"help": "gradient checkpointing: less memory, a forward more"})
    cache_features: bool = field(default=True, metadata={"help": "keep the features of the frozen encoders in memory"})
    max_bad: float = field(default=.01, metadata={"help": "share of unreadable training files above which the run stops"})
    test_rows: int = field(default=0, metadata={"help": "rows a task to test on (0: all)"})
    out: str = field(default="", metadata={"help": "run folder (default: runs/PRESET, or the next free runs/PRESET-2, ...)"})


# Crab's aligning stages: the sense whose captions are learned, and the connector that is trained, from nothing
ALIGN = {"visual": ("video", "visual_qformer"), "audio": ("audio", "audio_qformer")}


def staged(config: TrainConfig, preset: str) -> TrainConfig:
    """The config with what its stage decides: an aligning stage trains one connector on captions; each starts from the run of the one before. Raises RunError."""
    if not config.stage:
        return config
    if config.stage == "masks":
        if config.text_steps and not ("decoder" in config.train and config.cache_features):
            raise RunError("--text-steps wants --train decoder, adapter+decoder or adapter+connectors+decoder, and --cache-features: what the LM makes of the answers is kept then")
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


# --- the run folder --------------------------------------------------------------------------------------------------------
def choose_folder(config: TrainConfig, preset: str) -> Path:
    """The folder of this run, checked but not touched: a new one, or an interrupted run of the same command. Raises RunError."""
    wanted = asdict(config)
    for number in itertools.count(1):
        folder = Path(config.out or f"runs/{preset}" + (f"-{number}" if number > 1 else ""))
        if not folder.exists() or not any(folder.iterdir()):
            return folder
        try:
            found = json.loads((folder / "config.json").read_text())["train"]
        except (OSError, ValueError, KeyError):
            raise RunError(f"{folder}: exists and is not a run of train.py; choose another --out or remove it") from None
        differs = [k for k in wanted if found.get(k) != wanted[k]]
        if not (folder / "metrics.json").exists() and not differs:
            return folder
        if config.out and differs and not (folder / "metrics.json").exists():
            raise RunError(f"{folder}: an interrupted run with another --{differs[0].replace('_', '-')} ({found.get(differs[0])!r}, now {wanted[differs[0]]!r}); "
                           "use its value to continue it, or another --out")
        if config.out:
            raise RunError(f"{folder}: this run is finished and will not be overwritten; choose another --out or remove it")


def lock(folder: Path):
    """Hold the folder until the process ends. Raises RunError where another process holds it."""
    file = open(folder / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise RunError(f"{folder}: in use by another process; wait for it, or choose another --out") from None
    return file


def save_state(folder: Path, step: int, model: AVLanguageModel, optimizer: torch.optim.Optimizer, exits: EarlyExit | None = None) -> None:
    """state/step_N/: trained weights, optimizer moments, random state; appears whole, then replaces the older ones."""
    temporary, final = folder / "state" / f".step_{step}", folder / "state" / f"step_{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_trained(temporary)
    moments = {f"{i}.{key}": torch.as_tensor(value).contiguous() for i, state in optimizer.state_dict()["state"].items() for key, value in state.items()}
    save_file({**moments, "rng": torch.get_rng_state()}, temporary / "optimizer.safetensors")
    if exits:
        write_whole(temporary / "exits.json", json.dumps(exits.state()))
    temporary.rename(final)
    for old in (folder / "state").iterdir():
        if old != final:
            shutil.rmtree(old)


def load_state(folder: Path, model: AVLanguageModel, optimizer: torch.optim.Optimizer, exits: EarlyExit | None = None) -> int:
    """Restore the newest state into model and optimizer; the step it was saved after (0: there is none)."""
    states = sorted((folder / "state").glob("step_*"), key=lambda p: int(p.name[5:]))
    if not states:
        return 0
    model.restore_trained(states[-1])
    if exits:
        exits.restore(json.loads((states[-1] / "exits.json").read_text()))
    tensors = load_file(states[-1] / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop("rng"))
    state: dict = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(states[-1].name[5:])


# --- the run ---------------------------------------------------------------------------------------------------------------
def learning_rate(step: int, steps: int, warmup: float) -> float:
    """The factor on the peak learning rate: linear warm-up, then cosine to zero."""
    rise = max(1, round(steps * warmup))
    return min((step + 1) / rise, .5 + .5 * math.cos(math.pi * min(1, max(0, step - rise) / max(1, steps - rise))))


def auto_steps(rows: int, config: TrainConfig) -> int:
    """Three passes, within what a laptop does in ten minutes; more for pictures and sounds that the tiny base has never met."""
    return max(300, min(1300 if config.things or config.data else 760, round(3 * rows / config.batch_size)))


def run(config: TrainConfig, preset: str) -> dict:
    """One training run from annotations to metrics.json, which is returned. Raises the named errors of what it reads."""
    began, config = time.time(), staged(config, preset)
    folder = choose_folder(config, f"{preset}-{config.stage}" if config.stage else preset)
    tasks, prompts = pick_tasks(config.tasks), load_prompts(config.prompts) if config.prompts else None
    torch.manual_seed(config.seed)
    model = load_model(config).to("cuda" if torch.cuda.is_available() else "cpu")
    if config.stage in ALIGN:
        model.renew(config.train)
    root = config.data or str(built_in(config, config.seed))
    train = read_samples(root, tasks, "train", config.target, prompts)
    examined = [t for t in tasks if "test" in TASKS[t].splits]
    test = read_samples(examined_data(root), examined, "test", config.target, prompts, config.test_rows) if examined and examined_data(root) else []
    if config.stage in ALIGN:
        train = one_sense(train, ALIGN[config.stage][0])
    if config.masks:
        train, test = with_masks(train), with_masks(test)
    if config.side or config.modalities:
        train, test = (with_sides(rows, side_names(config), config.frames, needed=not config.modalities) for rows in (train, test))
    features = Features(model, config.cache_features, config.max_bad)
    features.prepare(test)                                                    # strict: a missing test clip is an error
    train = features.prepare(train, strict=False)

    model.add_adapter(config)
    add_sides(model, features, train, config)
    if config.start:
        model.restore_trained(Path(config.start))
    if "adapter" not in config.train.split("+"):                              # it comes from another run and stays
        model.llm.requires_grad_(False)
    model.train_beside(config.train)
    if isinstance(model, CremaModel):
        model.learn(modalities(config))
    if config.checkpointing:
        model.llm.activation_checkpointing_enable({"use_reentrant": False})
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    steps = config.steps or round(config.epochs * len(train) / config.batch_size) or auto_steps(len(train), config)
    if config.text_steps >= steps:
        raise RunError(f"--text-steps {config.text_steps}: of {steps} steps none is left for the masks; give more --steps, or fewer --text-steps")
    limits, by_option = token_limits(model, train), config.answers == "options"
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder)
    write_whole(folder / "config.json", json.dumps({"preset": preset, "train": asdict(config), "steps": steps, "limits": limits}, indent=1))
    print(f"{folder}: {len(train)} training rows and {len(test)} test rows of {len({s.task.name for s in train})} tasks, {steps} steps of {config.batch_size}")
    print(f"trained: {sum(p.numel() for p in trained.values()):,} of {sum(p.numel() for p in model.parameters()):,} parameters, in "
          + ", ".join(sorted({name_of(n) for n in trained})))

    if not (folder / "base.json").exists():
        write_whole(folder / "base.json", json.dumps(score_all(test, answer(model, features, test, limits, desc="frozen base", by_option=by_option))))
    loop(config, model, features, train, steps, folder)
    model.save_trained(folder)
    metrics = examine(config, model, features, train, test, limits, folder) | {"seconds": round(time.time() - began, 1), "steps": steps, "unreadable": len(features.bad)}
    write_whole(folder / "metrics.json", json.dumps(metrics, indent=1))
    shutil.rmtree(folder / "state", ignore_errors=True)
    held.close()
    print(f"loss a token: {metrics['loss']['first']:.3f} in the first tenth of the steps, {metrics['loss']['last']:.3f} in the last")
    print(f"{metrics['seconds']:.0f} s; everything is in {folder}/. Ask about a clip: python infer.py CLIP.mp4 --ask \"...\" --run {folder}")
    return metrics


def examine(config: TrainConfig, model: AVLanguageModel, features: Features, train: list[Sample], test: list[Sample], limits: dict, folder: Path) -> dict:
    """What a trained model makes of the test rows: predictions, pictures and tables, and the numbers of metrics.json, beside those of base.json and log.csv."""
    texts = answer(model, features, test, limits, desc="trained model", by_option=config.answers == "options")
    write_predictions(folder / "predictions", test, texts)
    base, blind = json.loads((folder / "base.json").read_text()), constants(train, test)
    results = {task: {"name": next(s.task.metric for s in test if s.task.name == task), **r, "base": base[task]["metric"], "blind": blind[task]}
               for task, r in score_all(test, texts).items()}
    for task, r in results.items():
        if all(chances := [1 / len(options(s)) if options(s) else 0 for s in test if s.task.name == task]):
            r["chance"] = sum(chances) / len(chances)
    subsets = score_subsets(model, features, test, texts, limits, config) if isinstance(model, CremaModel) and test else {}
    masks = draw_masks(model, features, test, texts) if config.masks else [None] * len(test)
    segmented = examine_masks(model, features, test, masks, limits, partial(draw_masks, model)) if config.masks else {}
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
        scored = sorted(((score(s.task, [parse(s.task, t)], [s.gold], whole=False)["metric"], s.id, s, t, m) for s, t, m in few), key=lambda one: one[:2], reverse=True)
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


def loop(config: TrainConfig, model: AVLanguageModel, features: Features, train: list[Sample], steps: int, folder: Path) -> None:
    """The steps themselves, from the last saved state on; a line of log.csv each. Modality-sequential: a step for each live modality of every batch."""
    adapter = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
    others = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    optimizer = torch.optim.AdamW([{"params": g, "peak": lr} for g, lr in ((adapter, config.lr), (others, config.connector_lr)) if g], weight_decay=0)
    exits = EarlyExit(modalities(config), config.temperature) if config.modalities and config.sequential else None
    epoch = -(-len(train) // config.batch_size)
    done = load_state(folder, model, optimizer, exits)
    file, log = open_log(folder / "log.csv", done)
    batches = itertools.islice(Mixer(train, config.batch_size, config.seed, config.mix), done, steps)
    model.train()
    bar = tqdm(features.batches(batches, strict=False), desc="training", unit="step", initial=done, total=steps)
    for step, (samples, media) in enumerate(bar, done):
        if not samples:                                                       # all of them unreadable
            continue
        start, text_only = time.time(), step < config.text_steps
        if not text_only and "decoder" in config.train and config.cache_features and not model.held:
            hold_answers(model, features, train)
        batch = model.collate([s.parts for s in samples], media, [s.target for s in samples])
        if config.masks and not text_only:
            batch["keys"] = [s.id for s in samples]
            batch["masks"] = [mask_tensor(gold_mask(s, model.frame_size), model.device) for s in samples]
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (learning_rate(step, config.text_steps, config.warmup) if text_only else
                                           learning_rate(step - config.text_steps, steps - config.text_steps, config.warmup))
        live = exits.live if exits else [""]
        for name in live:
            if exits:
                model.learn([name])
            with half_products(config.half and (text_only or "decoder" not in config.train)):        # the decoder's many small products gain nothing
                loss, tokens = model(batch)
            (loss / tokens).backward()
            if exits:
                exits.note(name, model.gradient_norm(name))
            norm = torch.nn.utils.clip_grad_norm_(adapter + others, config.clip)
            optimizer.step()
            optimizer.zero_grad()
        if not live:                                                          # every modality has had enough
            break
        if exits:
            exits.end_step((step + 1) % epoch == 0)
        value = loss.item() / tokens
        log.writerow([step + 1, f"{value:.6f}", tokens, f"{optimizer.param_groups[0]['lr']:.6g}", f"{norm.item():.4f}", f"{time.time() - start:.3f}", "+".join(live)])
        bar.set_postfix(loss=f"{value:.3f}", tokens=tokens, **({"live": "+".join(live)} if exits else {}))
        if (step + 1) % config.save_every == 0 or step + 1 == steps:
            save_state(folder, step + 1, model, optimizer, exits)
    if exits:
        write_whole(folder / "exits.json", json.dumps(exits.state(), indent=1))
    file.close()


def open_log(path: Path, done: int):
    """(file, writer) of log.csv for the next step: what an interrupted run wrote after its last state is dropped."""
    header = ["step", "loss", "tokens", "lr", "grad_norm", "seconds", "live"]
    kept = list(csv.reader(path.read_text().splitlines()))[1:done + 1] if path.exists() and done else []
    write_whole(path, "\n".join(",".join(row) for row in [header, *kept]) + "\n")
    file = open(path, "a", buffering=1)
    return file, csv.writer(file, lineterminator="\n")
