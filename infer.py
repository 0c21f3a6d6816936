"""Ask about a clip: `python infer.py clip.mp4 --ask "..."`, or one of the tasks: `--task ave`; or score a whole split: `--eval`.

Without arguments it takes a test clip of the built-in world. The model is the newest finished run under runs/, or --run, or the
shipped adapter. The answer appears as it is written, then what it parses to, then the path of a picture.
"""
import json
import os
import random
import sys
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from crab_min.installation import require_installation

require_installation()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import TextStreamer  # noqa: E402

from crab_min.answers import Answer  # noqa: E402
from crab_min.backbones.blip2 import CremaModel  # noqa: E402
from crab_min.backbones.load import BackboneConfig, load_model  # noqa: E402
from crab_min.cli import Parser, atomic_write, run_command  # noqa: E402
from crab_min.data import (  # noqa: E402
    MASKED,
    Sample,
    ablate_modality,
    add_mask_tokens,
    add_side_channels,
    count_missing,
    limit_frames,
    load_for_figure,
    pick_tasks,
    read_samples,
)
from crab_min.errors import (
    DataError,  # noqa: E402
    ModelError,  # noqa: E402
    RunError,  # noqa: E402
)
from crab_min.evaluation.answering import (  # noqa: E402
    cell,
    evaluate_masks,
    generate_answers,
    mask_table,
    masks_from_boxes,
    predict_masks,
    score_all,
    write_predictions,
)
from crab_min.evaluation.pictures import draw_answer, draw_routing, draw_sheet  # noqa: E402
from crab_min.evaluation.routing import record_routing_stats  # noqa: E402
from crab_min.evaluation.sam2 import Sam2  # noqa: E402
from crab_min.features import Features  # noqa: E402
from crab_min.interface import build_prompt, load_prompts  # noqa: E402
from crab_min.model import ASSETS, AVLanguageModel  # noqa: E402
from crab_min.tasks import TASKS  # noqa: E402
from crab_min.world.folders import WorldConfig, build_world  # noqa: E402
from crab_min.world.side_channels import CHANNELS, build_side_world  # noqa: E402

DEFAULT_LIMIT = 160                                    # answer tokens of a task that the run was not trained on


def load_run(given) -> tuple[AVLanguageModel, dict, Path]:
    """(model, its config.json, its folder): --run, else the newest finished run, else the shipped adapter. Raises RunError."""
    finished = sorted(Path("runs").glob("*/metrics.json"), key=lambda p: p.stat().st_mtime)
    folder = Path(given.run) if given.run else finished[-1].parent if finished else ASSETS / "crab_plus-tiny"
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{folder}: not a run of train.py ({error}); give a finished run with --run, or train one: python train.py") from None
    model = load_model(BackboneConfig(**{f.name: config["train"][f.name] for f in fields(BackboneConfig) if f.name in config["train"]}))
    model.load_trained(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if given.skip:
        known = ["rgb", *model.side_names] if isinstance(model, CremaModel) else []
        if unknown := [name for name in given.skip if name not in known]:
            raise RunError(f"--skip {unknown[0]}: the model has no such modality, but {', '.join(known) or 'none, as it is no run of CREMA'}")
        model.skipped = set(given.skip)
    return model.eval(), config, folder


def choose_sides(samples: list[Sample], given, model: AVLanguageModel, config: dict) -> list[Sample]:
    """The samples as a run with patches (PAVE) or modalities (CREMA) wants them: with the side channels of --side, else those that it was trained with."""
    crema = isinstance(model, CremaModel)
    if given.patch and crema:
        raise RunError(f"--patch {given.patch[0]}: a run of CREMA takes no patches; name one of another backbone with --run")
    for file in given.patch or []:
        model.patches.load(file, *model.patch_widths)
    wanted = [side.split("=", 1) for side in given.side or side_names_of(config)]
    if not wanted and not crema:
        return limit_frames(samples, config["train"].get("frames", 0))
    names, files = [w[0] for w in wanted if w[0] != "none"], {w[0]: w[1] for w in wanted if len(w) == 2}
    if unknown := [n for n in names if n not in model.side_names]:
        raise RunError(f"--side {unknown[0]}: the model has no such patch or modality, but {', '.join(model.side_names) or 'none'}; a patch is loaded with --patch FILE")
    if files:
        def place(s: Sample, name: str) -> str | None:
            return files.get(name) or next((p.path for p in s.media if p.kind == ("audio" if name == "audio" else "video")), None)
        samples = [replace(s, row={**s.row, "sides": {name: place(s, name) for name in names}}) for s in samples]
    return limit_frames(add_side_channels(samples, names, needed=not crema), config["train"].get("frames", 0))


def side_names_of(config: dict) -> list[str]:
    """The side channels that a run was trained with."""
    return [n for n in (config["train"].get("modalities") or config["train"].get("side", "")).split(",") if n not in ("", "rgb")]


def built_in(config: dict, world: WorldConfig, seed: int) -> Path:
    """The built-in world, or for a run with side channels the questions about them."""
    train = config["train"]
    channels = [n for n in (train["about"].split(",") if train.get("about") else side_names_of(config)) if n in CHANNELS]
    if channels:
        return build_side_world(world.things, train["world_clips"], train["world_test"], seed, channels, together=bool(train.get("modalities"))).with_name("test.jsonl")
    if train.get("stage") == "masks":
        return build_world(WorldConfig(world.things, train["world_clips"], train["world_test"]), seed, still=True)
    return build_world(world, seed)


def mask_maker(given, model: AVLanguageModel):
    """How answers become masks, (features, samples, texts) -> masks: by --masks, or the model's decoder, or None. Raises RunError, ModelError."""
    if given.masks == "decoder" and not model.masks:
        raise RunError("--masks decoder: the model has no mask decoder; train one with `python train.py crab-tiny --stage masks`, or use --masks sam2 or box")
    if given.masks in ("sam2", "box"):
        second = Sam2(given.sam2) if given.masks == "sam2" else None
        return lambda features, samples, texts: masks_from_boxes(samples, texts, second)
    return partial(predict_masks, model) if model.masks else None


def row_of(given, task, clip: str | None) -> dict:
    """An annotation row from the command line; the prompt builder says what is missing."""
    sounds = given.audio or ([clip] if clip else [])
    row = {"video_path": clip, "video1_path": clip, "video2_path": given.second_video, "image_path": given.image, "audio_path": sounds[0] if sounds else None,
           "audio1_path": sounds[0] if sounds else None, "audio2_path": sounds[1] if len(sounds) > 1 else None, "frame_idx": given.frame_index,
           "question": given.ask, "question_text": given.ask, "description": given.ask, "multi_choice": given.options.split(",") if given.options else None}
    return {k: os.path.abspath(v) if k.endswith("_path") and v else v for k, v in row.items() if v is not None}


def as_json(a: Answer) -> dict:
    """The fields of an answer that say something."""
    named = {"choice": a.choice, "exists": a.exists, "boxes": a.boxes, "points": a.points, "text": a.text if not a.error else "",
             **{name: [{"label": label, "spans": spans} for label, spans in events]
                for name, events in (("events", a.events), ("audio_events", a.audio_events), ("visual_events", a.visual_events))}}
    return {k: v for k, v in named.items() if v not in (None, "", [])}


def ask(given) -> None:
    """One answer for each clip."""
    task = TASKS[pick_tasks(given.task)[0]] if given.task else TASKS["avqa"]
    if (given.clip or given.image) and not given.task and not given.ask:
        raise DataError(f"what about {given.clip[0] if given.clip else given.image}? give --ask \"...\" or --task, one of: {', '.join(TASKS)}")
    clips, gold = given.clip or [None], None
    model, config, folder = load_run(given)
    if not given.clip and not given.image:
        task = TASKS["s4"] if not given.task and model.masks else task
        root = built_in(config, WorldConfig(given.things), given.seed)
        example = read_samples(root, [task.name], "test" if "test" in task.splits else "train", limit=1 + given.index)[-1]
        clips, gold, task = [example], example.gold, example.task
        if not given.json:
            print(f"no clip given: {example.id} of the built-in world, {example.media[0].path}")
    samples = [c if isinstance(c, Sample) else Sample("", task, build_prompt(task, row_of(given, task, c), "", given.prompts), "", Answer(), {}) for c in clips]
    samples = choose_sides(samples, given, model, config)
    features, lost = Features(model, keep=True), ""
    features.prepare(samples)
    try:
        make_masks = mask_maker(given, model)
    except ModelError as error:                                               # no SAM2 here: the box still says where
        make_masks, lost = None, str(error)
    for sample in samples:
        began = time.time()
        if not given.json:
            print(f"model: {folder}\nprompt: {' '.join(''.join(p.text if p.kind == 'text' else f'<{p.side or p.kind} {Path(p.path).name}>' for p in sample.parts).split())}\nanswer: ", end="", flush=True)
        streamer = None if given.json or given.beams > 1 else TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
        limit = given.limit or config["limits"].get(task.name, DEFAULT_LIMIT)
        text = model.generate(model.collate([sample.parts], features([sample])), limit, streamer, given.beams)[0]
        if not given.json and given.beams > 1:
            print(text)
        mask = make_masks(features, [sample], [text])[0] if make_masks else None
        parsed, seconds = replace(task.parse(text), mask=mask), round(time.time() - began, 2)
        if given.routes:
            with record_routing_stats(model) as routes, torch.no_grad():
                model(model.collate([sample.parts], features([sample]), [text]))
            draw_routing(Path(given.routes), {task.name: routes})
        picture = Path(given.picture or Path("answers") / f"{Path(sample.media[0].path).stem}_{task.name}.png")
        question = sample.parts[-1].text.strip()
        draw_answer(picture, load_for_figure(sample), question, parsed, text)
        if mask is not None:
            file = picture.with_name(f"{picture.stem}_mask.png")
            Image.fromarray((mask > .5).astype(np.uint8) * 255 if mask.dtype.kind != "i" else mask.astype(np.uint8)).save(file)
        if given.json:
            print(json.dumps({"clip": sample.media[0].path, **({"mask": str(file)} if mask is not None else {"no_mask": lost} if lost else {}), "task": task.name, "question": question, "text": text, "parsed": as_json(parsed),
                              "error": parsed.error, "seconds": seconds, "picture": str(picture)}, ensure_ascii=False))
        else:
            print(f"parsed: {parsed.error and 'no: ' + parsed.error or json.dumps(as_json(parsed))}")
            if gold is not None:
                print(f"gold:   {task.format(gold)}")
            if mask is not None:
                print(f"mask:   {file}, {(mask > .5).mean():.1%} of the picture")
            elif lost or make_masks and task.name in MASKED:
                print(f"mask:   none, {lost or 'the answer has no mask tokens, or does not parse'}")
            print(f"{seconds} s; picture: {picture}")


def evaluate(given) -> None:
    """Answers and scores for a split of --data (default: the built-in world)."""
    model, config, folder = load_run(given)
    tasks = pick_tasks(given.task or given.tasks)
    world = WorldConfig(given.things or config["train"]["things"], config["train"]["world_clips"], config["train"]["world_test"])
    root = given.data or built_in(config, world, config["train"]["seed"])
    samples = read_samples(root, tasks, given.split, config["train"]["target"], given.prompts, given.test_rows)
    samples = choose_sides(samples, given, model, config)
    make_masks = mask_maker(given, model)
    samples = add_mask_tokens(samples, tokens=given.masks not in ("sam2", "box")) if make_masks else samples
    samples = ablate_modality(samples, given.without) if given.without else samples               # also of a sound that is a side channel
    by_option = config["train"].get("answers") == "options"
    features = Features(model, config["train"].get("cache_features", True), max_bad=1.0)
    out = Path(given.out or folder / f"eval_{given.split}{'_without_' + given.without if given.without else ''}")
    limits = {t: given.limit or config["limits"].get(t, DEFAULT_LIMIT) for t in sorted({s.task.name for s in samples})}
    decoding = {"run": str(folder), "data": str(root), "split": given.split, "without": given.without, "prompts": bool(given.prompts), "limits": limits,
                "batch_size": given.batch_size, "masks": given.masks, "sides": sorted({p.side for s in samples for p in s.media if p.side}),
                "decoding": "likeliest option" if by_option else "greedy" if given.beams == 1 else f"{given.beams} beams", "skip": sorted(given.skip)}
    unfinished = out / "answers.partial.jsonl"
    features.prepare(samples, strict=not given.allow_missing)
    if (out / "decoding.json").exists() and json.loads((out / "decoding.json").read_text()) != decoding:
        unfinished.unlink(missing_ok=True)                                    # of other settings
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "decoding.json", json.dumps(decoding, indent=1))
    said = generate_answers(model, features, samples, limits, given.batch_size, partial=unfinished, strict=not given.allow_missing, by_option=by_option, beams=given.beams)
    readable = {s.id for s in features.readable(samples)}                     # the others: no text, which is wrong, and counted
    results = score_all(samples, said)
    for task, r in results.items():
        pairs = [(s.target.strip(), t.strip()) for s, t in zip(samples, said) if s.task.name == task and s.target]
        r["name"] = next(s.task.metric for s in samples if s.task.name == task)
        if pairs:
            r["exact"] = sum(a == b for a, b in pairs) / len(pairs)
    write_predictions(out / "predictions", samples, said)
    masks = make_masks(features, samples, said) if make_masks else [None] * len(samples)
    segmented = evaluate_masks(model, features, samples, masks, limits, make_masks) if make_masks else {}
    for task in results:
        found = [each for each in zip(samples, said, masks) if each[0].task.name == task and each[0].id in readable]
        if found:
            draw_sheet(out / "sheets" / f"{task}.png", [cell(*each) for each in random.Random(0).sample(found, min(9, len(found)))])
    unfinished.unlink()
    counts = {"missing": len(samples) - len(readable), "without": count_missing(samples, model.side_names), "unreadable": list(features.bad.values())}
    atomic_write(out / "metrics.json", json.dumps({"decoding": decoding, "tasks": results, **segmented, **counts}, indent=1))
    print(f"{'task':<9} {'metric':<17} {'score':>6} {'exact':>6} {'parsed':>7} {'n':>5}")
    for task, r in results.items():
        exact = f"{r['exact']:.2f}" if "exact" in r else "-"
        print(f"{task:<9} {r['name']:<17} {r['metric']:>6.3f} {exact:>6} {r['parsed']:>7.2f} {r['n']:>5}")
        if r["all"]:
            print("  " + "  ".join(f"{name} {value:.3f}" for name, value in r["all"].items()))
        for kind, t in r.get("types", {}).items():
            print(f"  {kind:<25} {t['metric']:>6.3f}  (best constant answer {t['blind']:.3f}) {t['n']:>5}")
    if segmented:
        print(mask_table(segmented))
    with_target = [(s.target.strip(), t.strip()) for s, t in zip(samples, said) if s.target]
    if with_target:
        print(f"target text returned exactly: {sum(a == b for a, b in with_target)} of {len(with_target)} rows")
    print(f"{len(samples) - len(readable)} rows with a missing clip; predictions, sheets and metrics.json are in {out}/")


def main(arguments: list[str]) -> int:
    parser = Parser(prog="infer.py", description=__doc__.split("\n")[0])
    parser.add_argument("clip", nargs="*", help="video files; its own sound is used unless --audio is given")
    parser.add_argument("--ask", help="a question about the clip (for ref_avs: the thing to find)")
    parser.add_argument("--task", help=f"one of the tasks: {', '.join(TASKS)}")
    parser.add_argument("--audio", action="append", help="a sound file (or a video whose sound is taken); twice for v2a")
    parser.add_argument("--image", help="an image, for s4, ms3, ref_avs and arig")
    parser.add_argument("--frame-index", type=int, default=0, help="which fifth (s4, ms3) or tenth (ref_avs) of the sound goes with the image")
    parser.add_argument("--second-video", help="the second video of a2v")
    parser.add_argument("--options", help="the options of a multiple-choice question (avqa_thu), comma-separated")
    parser.add_argument("--run", help="run folder of train.py (default: the newest finished one, else the shipped adapter)")
    parser.add_argument("--side", action="append", help="PAVE, CREMA: a side channel to use, NAME or NAME=FILE (several times; none: the video alone); default: the run's")
    parser.add_argument("--skip", action="append", default=[], help="CREMA: a modality that is read without its adapter, as in its zero-shot runs (several times)")
    parser.add_argument("--beams", type=int, default=1, help="beams of the search for an answer (CREMA: 5)")
    parser.add_argument("--masks", default="", choices=["", "decoder", "sam2", "box"], help="how a mask is made: by the run's decoder (default where it has one), of the box and points by SAM2, or the box itself")
    parser.add_argument("--sam2", default=Sam2.DEFAULT, help="with --masks sam2: path or hub id of a SAM2 checkpoint")
    parser.add_argument("--patch", action="append", help="PAVE: a patch file to load beside the run's (patches/NAME.safetensors)")
    parser.add_argument("--json", action="store_true", help="print one JSON line a clip and nothing else")
    parser.add_argument("--picture", help="where the picture goes (default: answers/CLIP_TASK.png)")
    parser.add_argument("--routes", help="also draw which head of I-LoRA served which tokens, to this PNG")
    parser.add_argument("--limit", type=int, default=0, help="answer tokens at most (default: what the run says for the task)")
    parser.add_argument("--prompts", help="JSON file of instructions by task name, instead of ours")
    parser.add_argument("--index", type=int, default=0, help="without a clip: which test sample of the built-in world")
    parser.add_argument("--things", default="", help="without a clip, and with --eval: the things of the world, as for train.py (default with --eval: those of the run)")
    parser.add_argument("--seed", type=int, default=0, help="without a clip: the seed of the world")
    parser.add_argument("--eval", action="store_true", help="answer and score a whole split")
    parser.add_argument("--data", help="with --eval: AV-UIE v2 folder or .jsonl file (default: the world the run was trained on)")
    parser.add_argument("--split", default="test", choices=["train", "test"], help="with --eval: which split")
    parser.add_argument("--without", choices=["sound", "frames"], help="with --eval: other clips' sounds, or black pictures: what do the answers rest on?")
    parser.add_argument("--tasks", default="all", help="with --eval: comma-separated task names, or all")
    parser.add_argument("--test-rows", type=int, default=0, help="with --eval: rows a task (0: all)")
    parser.add_argument("--batch-size", type=int, default=50, help="with --eval: samples answered together")
    parser.add_argument("--allow-missing", action="store_true", help="with --eval: score samples with unreadable files as wrong instead of stopping")
    parser.add_argument("--out", help="with --eval: where predictions and metrics go (default: RUN/eval_SPLIT)")
    parser.add_argument("--debug", action="store_true", help="show a traceback where something goes wrong")
    given = parser.parse_args(arguments)

    def run():
        if given.task and len(pick_tasks(given.task)) != 1:
            raise DataError(f"--task takes one task, got {given.task!r}; with --eval use --tasks")
        given.prompts = load_prompts(given.prompts) if given.prompts else None
        (evaluate if given.eval else ask)(given)
    return run_command(run, given.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
