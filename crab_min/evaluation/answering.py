"""Answers for a split, their scores, and the files and the table that show them; shared by the end of training and `infer.py --eval`.

Decoding is greedy, unless beams are asked for, with a limit of tokens for each task (the longest target of its training rows and a margin, kept in config.json).
Nothing is skipped: an answer that does not parse counts as wrong and lowers `parsed`.
"""
import json
import re
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from crab_min.answers import GRID, Answer
from crab_min.backbones.composed import ComposedModel
from crab_min.cli import atomic_write
from crab_min.data import MASKED, Sample, gold_mask, load_for_figure, swap_audio
from crab_min.evaluation.mask_metrics import by_class, hard, null_s, soft
from crab_min.evaluation.metrics import best_constant, score
from crab_min.evaluation.sam2 import Sam2, box_mask
from crab_min.features import Features
from crab_min.media.read import read_image
from crab_min.model import AVLanguageModel
from crab_min.runs import processes
from crab_min.sources.av_uie import CLASSES


def token_limits(model: AVLanguageModel, samples: list[Sample], margin: int = 8) -> dict[str, int]:
    """How many tokens an answer may have, by task: its longest training target and a margin."""
    limits: dict[str, int] = {}
    for s in samples:
        limits[s.task.name] = max(limits.get(s.task.name, 0), len(model.encode_text(s.target)) + margin)
    return limits


def plan_batches(samples: list[Sample], batch_size: int) -> list[list[Sample]]:
    """Samples that are answered together: of one task, and of about one length, the longest first."""
    order = sorted(samples, key=lambda s: (s.task.name, -sum(len(p.text) for p in s.parts), s.id))
    groups = [list(group) for _, group in groupby(order, lambda s: s.task.name)]
    return [group[i:i + batch_size] for group in groups for i in range(0, len(group), batch_size)]


def generate_answers(model: AVLanguageModel, features: Features, samples: list[Sample], limits: dict[str, int], batch_size: int = 50, desc: str = "answering",
           partial: Path | None = None, strict: bool = True, by_option: bool = False, beams: int = 1) -> list[str]:
    """The model's text for every sample, in their order; "" for an unreadable one, which is an error where `strict`. Several processes share the work.

    by_option: of a sample that has options, the likeliest one (`choose`), and nothing is generated.
    partial: a file that keeps the answers of the batches done so far, for a run that is killed: with the same plan it goes on after them.
    """
    training, plan = model.training, plan_batches(samples, batch_size)
    texts = read_partial(partial, plan) if partial else {}
    left = [batch for batch in plan if batch[0].id not in texts]
    if not processes.is_sharded(model):                                                 # else all have to go through the LM equally often
        left = left[processes.rank()::processes.count()]
    model.eval()
    with tqdm(total=sum(map(len, left)), desc=desc, unit="sample") as bar:
        for whole, (batch, media) in zip(left, features.batches(left, strict)):
            if by_option and batch and all(options(s) for s in batch):
                said = rank_options(model, batch, media)
            else:
                said = model.generate(model.collate([s.parts for s in batch], media), limits.get(whole[0].task.name, 128), beams=beams) if batch else []
            new = {s.id: "" for s in whole} | {s.id: text for s, text in zip(batch, said)}
            texts |= new
            if partial:
                with open(partial, "a") as file:
                    file.write(json.dumps(new) + "\n")
            bar.update(len(whole))
    model.train(training)
    for theirs in processes.gather(texts):
        texts |= theirs
    return [texts[s.id] for s in samples]


def options(sample: Sample) -> list[str]:
    """The answers to choose from, as the model would write them; none for an open question."""
    return [sample.task.format(Answer(choice=str(o))) for o in sample.row.get("options") or sample.row.get("multi_choice") or []]


@torch.no_grad()
def rank_options(model: AVLanguageModel, samples: list[Sample], media: list) -> list[str]:
    """The option of each sample that the model finds likeliest: the sum of the log probabilities of its tokens."""
    pairs = [(i, text) for i, s in enumerate(samples) for text in options(s)]
    losses = []
    for some in (pairs[i:i + 64] for i in range(0, len(pairs), 64)):
        batch = model.collate([samples[i].parts for i, _ in some], [media[i] for i, _ in some], [text for _, text in some])
        losses += model.losses(batch).sum(1).tolist()
    best: dict[int, tuple] = {}
    for (i, text), loss in zip(pairs, losses):
        best[i] = min(best.get(i, (loss, text)), (loss, text))
    return [best[i][1] for i in range(len(samples))]


@torch.no_grad()
def predict_masks(model: ComposedModel, features: Features, samples: list[Sample], texts: list[str], batch_size: int = 50) -> list[np.ndarray | None]:
    """The mask (size, size) that each text stands for: scores in [0, 1], of avss classes; None for a text without all mask tokens, and for other tasks.

    The states of the mask tokens depend on the media, the prompt and the text alone, so the texts are read once more, and masks need not be kept with them.
    """
    training, masks, texts = model.training, {}, dict(zip((s.id for s in samples), texts))
    model.eval()
    plan = [batch for batch in plan_batches(samples, batch_size) if batch[0].task.name in MASKED]
    for batch, media in features.batches(plan, strict=False):                 # an unreadable image has no mask, and no answer either
        if not batch:
            continue
        found = model.masks_of(model.collate([s.parts for s in batch], media, [texts[s.id] for s in batch]), [s.task.name == "avss" for s in batch])
        masks |= {s.id: m if m is None else (m.argmax(0) if len(m) > 1 else m[0].half()).cpu().numpy() for s, m in zip(batch, found)}
    model.train(training)
    return [masks.get(s.id) for s in samples]


def masks_from_boxes(samples: list[Sample], texts: list[str], sam2: Sam2 | None) -> list[np.ndarray | None]:
    """The mask (H, W) that SAM2 makes of the boxes and points of each text, at the image's own size, or without it the boxes themselves, filled, on the
    grid; empty where an object is denied; None for a text that does not parse, and for other tasks."""
    masks: list = []
    for s, text in zip(tqdm(samples, desc="SAM2" if sam2 else "boxes", unit="image", disable=len(samples) < 32), texts):
        parsed, image = s.task.parse(text), next((p.path for p in s.media if p.kind == "image"), None)
        if s.task.name not in MASKED or parsed.error:
            masks.append(None)
        else:
            masks.append(sam2.mask(read_image(image, None), parsed) if sam2 else box_mask(parsed, GRID, GRID))
    return masks


def score_masks(samples: list[Sample], masks: list[np.ndarray | None]) -> dict[str, dict]:
    """{task: numbers of its masks} on 224 x 224 pixels; no mask counts as an empty one.

    miou, f: Crab's, on scores; hard_miou, hard_f: Crab+'s, on masks; of avss by class; all over the samples that have something to find.
    coverage: the share of these with a mask. null_s, null_s_background, null_n: of those without (Ref-AVS's null split).
    """
    result = {}
    for task in dict.fromkeys(s.task.name for s in samples if s.task.name in MASKED):
        pairs = [(s, m) for s, m in zip(samples, masks) if s.task.name == task]
        gold = np.stack([np.zeros((GRID, GRID), bool) if (g := gold_mask(s, GRID)) is None else g for s, _ in pairs])
        said = np.stack([np.zeros((GRID, GRID)) if m is None else resized(m, GRID, GRID) for _, m in pairs])
        there = gold.any((1, 2))
        entry = {"coverage": float(np.mean([m is not None for (_, m), g in zip(pairs, there) if g])) if there.any() else 0., "n": int(there.sum())}
        if task == "avss":
            entry |= by_class(said[there].astype(int), gold[there].astype(int), CLASSES)
        elif there.any():
            entry |= soft(said[there], gold[there]) | {f"hard_{name}": value for name, value in hard(said[there] > .5, gold[there]).items()}
        if not there.all():
            none = said[~there] > .5
            entry |= {"null_s": null_s(none), "null_s_background": null_s(none, of_background=True), "null_n": len(none)}
        result[task] = entry
    return result


def resized(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scores (h, w) at another size, bilinear; classes and true or false by the nearest."""
    x = torch.from_numpy(mask)[None, None].float()
    return F.interpolate(x, (height, width), **({} if mask.dtype.kind in "ib" else {"mode": "bilinear"}))[0, 0].numpy()


def picked(samples: list[Sample], masks: list[np.ndarray | None]) -> dict[str, float]:
    """Of samples with two things in the picture, one of them silent (the world's s4): how often the mask has more pixels in the box of the one that is meant."""
    right = []
    for s, mask in zip(samples, masks):
        if len(s.row.get("silent") or ()) == 1:
            inside = [0 if mask is None else (resized(mask, GRID, GRID) > .5)[y1:y2, x1:x2].sum() for x1, y1, x2, y2 in (s.gold.boxes[0], *s.row["silent"].values())]
            right.append(inside[0] > inside[1])
    return {"picked": float(np.mean(right)), "n": len(right)} if right else {}


def evaluate_masks(model: AVLanguageModel, features: Features, test: list[Sample], masks: list, limits: dict, make_masks) -> dict[str, dict]:
    """{"masks": the numbers of masks, "picked": how often the thing that sounds was picked, with its own sound and with that of another thing in the picture}.

    make_masks: (features, samples, texts) -> masks, as the given ones were made.
    """
    chosen, other = {"picked the sounding one of two": picked(test, masks)}, swap_audio(test)
    texts = generate_answers(model, features, other, limits, desc="with another's sound") if other else []
    chosen["followed the other's sound"] = picked(other, make_masks(features, other, texts)) if other else {}
    return {"masks": score_masks(test, masks), "picked": {name: r for name, r in chosen.items() if r}}


def mask_table(results: dict[str, dict]) -> str:
    """The lines about masks that a run ends with, of what `examine_masks` found."""
    lines = [f"{'masks of':<9} {'mIoU':>6} {'F':>6} {'hard mIoU':>10} {'hard F':>7} {'coverage':>9} {'n':>5}   null: S of all, of the background, n"]
    for task, r in results["masks"].items():
        null = f"   {r['null_s']:.3f} {r['null_s_background']:.3f} {r['null_n']}" if "null_s" in r else ""
        lines.append(f"{task:<9} {r.get('miou', 0):>6.3f} {r.get('f', 0):>6.3f} {r.get('hard_miou', 0):>10.3f} {r.get('hard_f', 0):>7.3f} {r['coverage']:>9.2f} {r['n']:>5}{null}")
    return "\n".join(lines + [f"{name}: {r['picked']:.3f} of {r['n']}" for name, r in results["picked"].items()])


def read_partial(path: Path, plan: list[list[Sample]]) -> dict[str, str]:
    """The answers {id: text} of the batches of `plan` that the file has whole, a line each; a cut last line is dropped from it."""
    wanted, kept, texts = {tuple(s.id for s in batch) for batch in plan}, [], {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found = json.loads(line)
        except ValueError:
            break
        if tuple(found) in wanted:
            kept, texts = [*kept, line + "\n"], texts | found
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(kept))
    return texts


def cell(sample: Sample, text: str, mask: np.ndarray | None = None) -> tuple:
    """A cell of viz.draw_sheet."""
    parsed = replace(sample.task.parse(text), mask=mask)
    value = score(sample.task, [parsed], [sample.gold], whole=False)["metric"]
    return (f"{sample.task.name}: {sample.parts[-1].text.strip()}", load_for_figure(sample), parsed, text, replace(sample.gold, mask=gold_mask(sample)),
            sample.target or sample.task.format(sample.gold), value)


def score_all(samples: list[Sample], texts: list[str]) -> dict[str, dict]:
    """{task: {"metric", "parsed", "n", "all", and "types" where its questions have any}} of the answers."""
    result, types = {}, {}
    for s, text in zip(samples, texts):
        kind = " ".join(re.sub(r'[][",]', "", str(s.row.get(field, ""))) for field in s.task.types)
        types.setdefault(s.task, {}).setdefault(kind, []).append((s.task.parse(text), s.gold))
    for task, groups in types.items():
        result[task.name] = score(task, *zip(*(pair for group in groups.values() for pair in group)))
        if task.types and set(groups) != {""}:
            result[task.name]["types"] = {kind: {**{k: v for k, v in score(task, *zip(*group)).items() if k in ("metric", "n")},
                                                 "blind": best_constant(task, [g for _, g in group], [g for _, g in group])[0]}
                                          for kind, group in sorted(groups.items())}
    return result


def constants(train: list[Sample], test: list[Sample]) -> dict[str, float]:
    """What the best single training answer, given to every test sample, reaches: the blind baseline of each task."""
    blind = {}
    for task in dict.fromkeys(s.task.name for s in test):
        golds = [s.gold for s in test if s.task.name == task]
        candidates = [s.gold for s in train if s.task.name == task] + [Answer(choice=str(i)) for i in range(len(golds[0].choices))]   # "always the first"
        blind[task] = best_constant(next(s.task for s in test if s.task.name == task), candidates, golds)[0]
    return blind


def write_predictions(folder: Path, samples: list[Sample], texts: list[str]) -> None:
    """predictions/TASK.jsonl: a line a sample with id, task, text, target, parsed (and why not), whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in dict.fromkeys(s.task.name for s in samples):
        lines = []
        for s, text in zip(samples, texts):
            if s.task.name == task:
                reason = s.task.parse(text).error
                lines.append(json.dumps({"id": s.id, "task": task, "text": text, "target": s.target or s.task.format(s.gold), "parsed": reason is None,
                                         **({"reason": reason} if reason else {})}, ensure_ascii=False))
        atomic_write(folder / f"{task}.jsonl", "\n".join(lines) + "\n")


def table(results: dict[str, dict]) -> str:
    """The lines that a run ends with; `results` as in metrics.json under "tasks"."""
    lines = [f"{'task':<9} {'metric':<17} {'base':>6} {'trained':>8} {'constant':>9} {'parsed':>7} {'n':>5}"]
    for task, r in results.items():
        lines.append(f"{task:<9} {r['name']:<17} {r['base']:>6.3f} {r['metric']:>8.3f} {r['blind']:>9.3f} {r['parsed']:>7.2f} {r['n']:>5}")
    better = sum(r["metric"] > r["blind"] for r in results.values())
    return "\n".join(lines + [f"better than the best constant answer: {better} of {len(results)} tasks"])
