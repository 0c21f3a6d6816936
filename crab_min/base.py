"""The tiny base: a small CLIP, BEATs, two Q-Formers and a Llama, trained from nothing on what the built-in world shows and sounds like.

`python train.py tiny-base` makes it in three stages, each a loop a page long:
  see    vision encoder + visual Q-Former: what is where, read from the Q-Former's tokens by a small probe (thrown away after)
  hear   BEATs + audio Q-Former: what sounds in this second, and how a voice feels, the same way
  read   the LM (and the connectors, slowly) on statements about scenes: places, things, boxes, spans, movements, voices
The base never sees an instruction, an answer tag, a question, a matching pair or a test seed (split "base" has its own):
what a task asks and how it is answered is left to the adapter. The probes are why a 2-million-parameter LM learns to look at all
in minutes: without them the connectors get their first useful gradient only after the LM has learned to read them.

Shapes: B scenes of a batch, C things of the world, Q queries, D width.
"""
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from crab_min.beats import fbank
from crab_min.config import TINY_MODEL
from crab_min.interface import GRID, TASKS, Part
from crab_min.metrics import iou
from crab_min.model import SPECIALS, AVLanguageModel, MediaFeatures, ModelConfig, ModelError, load_tokenizer
from crab_min.world import EMOTIONS, SECONDS, SIZE, Renderer, Scene
from crab_min.world_tasks import ORDERS, at, clip_rows, only, placed

IMAGE_AT = 4.5                                         # second of the image in check_base


@dataclass
class BaseConfig:
    """How long each stage of the base lasts."""
    see_steps: int = field(default=1600, metadata={"help": "steps of stage see (64 pictures each)"})
    hear_steps: int = field(default=1000, metadata={"help": "steps of stage hear (24 clips each)"})
    read_steps: int = field(default=4500, metadata={"help": "steps of stage read (24 scenes each)"})
    base_lr: float = field(default=2e-3, metadata={"help": "peak learning rate of stages see and hear"})
    read_lr: float = field(default=1e-3, metadata={"help": "peak learning rate of stage read"})
    seed: int = field(default=0, metadata={"help": "seed of the scenes and of the initial weights"})
    out: str = field(default="runs/tiny-base", metadata={"help": "folder of the base"})


# --- what is true of a scene, in words -----------------------------------------------------------------------------------
NUMBERS = ("no", "one", "two", "three", "four")


def box_of(mask: np.ndarray) -> list[int] | None:
    """The box [x1, y1, x2, y2] of a mask (H, W) on the 224 grid; None where it is empty."""
    ys, xs = np.nonzero(mask)
    if not len(xs):
        return None
    h, w = mask.shape
    return [round(GRID * float(v)) for v in (xs.min() / w, ys.min() / h, (xs.max() + 1) / w, (ys.max() + 1) / h)]


def words(labels: list[str]) -> str:
    return " and ".join(f"the {label}" for label in labels) if labels else "nothing"


def statements(renderer: Renderer, scene: Scene, rng: random.Random, seen_at: float | None, sees: bool, hears: range | None) -> list[str]:
    """True sentences about what was shown: the frame at second `seen_at` or the whole clip, and the seconds `hears`."""
    facts, objects = [], scene.objects
    if sees:
        facts.append(f"the place is {scene.place}.")
    if scene.kind == "face":
        facts += [f"the face is {scene.emotion}."] * (sees and not scene.masked) + [f"the voice is {scene.emotion}."] * (hears is not None)
        facts += [f"the person is {'masked' if scene.masked else 'not masked'}."] * sees + [f"the person feels {scene.emotion}."] * (hears is not None)
        return rng.sample(facts, rng.randint(1, min(3, len(facts))))
    visible = [o for o in objects if (o.seen_at(seen_at) if seen_at is not None else o.seen)] if sees else []
    audible = [o for o in objects if hears is not None and any(s < hears.stop and e > hears.start for s, e in o.heard)]
    if sees:
        facts += [f"{NUMBERS[len(visible)]} things are seen.", f"{words([o.label for o in sorted(visible, key=lambda o: (o.x, o.y))])} can be seen."]
        for o in visible:
            if scene.movement:
                facts += [f"the {o.label} is {scene.movement}."] * (2 * (seen_at is None))
                continue
            facts += [f"the {o.label} is {at(o.side)}.", f"{at(o.side)} is the {o.label}."]
            if seen_at is not None and (box := box_of(renderer.mask(scene, o, seen_at))):
                facts += [f"the {o.label} is at {box[0]} {box[1]} {box[2]} {box[3]}."] * 3
            elif seen_at is None:
                facts.append("the {} is seen from {} to {}.".format(o.label, *o.seen[0]))
    if hears is not None:
        order = sorted(audible, key=lambda o: o.heard[0])
        facts += [f"{NUMBERS[len(audible)]} sounds are heard.", f"{words([o.label for o in order])} can be heard."]
        if len(hears) == SECONDS:
            second = rng.randrange(SECONDS)
            facts.append(f"at {second} {words([o.label for o in order if o.heard_at(second)])} can be heard.")
            facts += ["the {} is heard from {} to {}.".format(o.label, *o.heard[0]) for o in audible] * 2
            facts += [f"the {best.label} is heard {order}." for order, key in ORDERS.items() if (best := only(audible, key))]
    if sees and hears is not None:
        facts += [f"the {o.label} is {'' if o in visible else 'not '}seen and {'' if o in audible else 'not '}heard." for o in objects if o in visible + audible]
        if len(hears) == SECONDS and not scene.movement:
            facts += [placed(o) + "." for o in visible] * 2
        elif not scene.movement:
            facts += [f"the {o.label} is {at(o.side)} and is heard." for o in visible if o in audible]
    return list(dict.fromkeys(rng.sample(facts, rng.randint(3, min(7, len(facts))))))


def gibberish(text, rng: random.Random) -> str:
    """Random tokens, twice: copying is all the base can learn of the words that it is never told about."""
    ids = [rng.randrange(len(SPECIALS), len(text)) for _ in range(rng.randint(3, 14))]
    line = text.decode(ids)
    return f"{line}\n{line}"


COMMON = """a man a woman a boy a girl people someone child children baby face voice hand eyes mouth speech speaking talking singing laughing crying
walking running standing sitting dancing playing performing holding looking moving driving riding cutting cooking washing eating drinking music song
instrument guitar piano flute drum violin saxophone accordion cello trumpet stage street road house kitchen room garden field forest tree water river sea
beach rain wind storm fire engine motor machine truck train bus boat airplane helicopter motorcycle bicycle siren alarm horn chainsaw lawn mower hammer
animal dog cat horse cow sheep goat pig chicken rooster duck bird lion elephant black white red green blue yellow brown dark bright small large big little
old young long short high low loud quiet soft sharp happy sad angry surprised afraid disgusted neutral joy sadness anger fear first second third last left
right middle top bottom before after while during then when where which what who how many more less than between from until always never only both other
another picture image video audio sound sounds clip scene camera background there is are was were has have the this that these those with without and or
but not of in on at to for by its their his her it they he she making produces heard seen shown continues starts ends begins time range object event""".replace("\n", " ")


def train_tokenizer(corpus: list[str], merges: int = 1000) -> Tokenizer:
    """Byte-level BPE with single digits: 256 bytes, the special tokens, and `merges` merges learned from the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=len(alphabet) + len(SPECIALS) + merges, show_progress=False,
                                                              special_tokens=list(SPECIALS), initial_alphabet=alphabet))
    return tokenizer


# --- the stages ----------------------------------------------------------------------------------------------------------
def train_stage(name: str, modules: list, steps: int, lr: float, loss_of, log, slow: list = ()) -> None:
    """The loop the three stages share: AdamW, warm-up and cosine, bfloat16 products; `loss_of(step)` gives the loss and figures.

    slow: modules trained at a fifth of the learning rate.
    """
    groups = [{"params": [p for m in part for p in m.requires_grad_(True).parameters()], "lr": rate} for part, rate in ((modules, lr), (slow, lr / 5)) if part]
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 100, .5 + .5 * float(np.cos(np.pi * s / steps)) + .01))
    bar = tqdm(range(steps), desc=name, unit="step")
    for step in bar:
        with torch.autocast("cpu", torch.bfloat16):
            loss, figures = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            bar.set_postfix(loss=f"{loss.item():.3f}", **figures)
            log({"stage": name, "step": step, "loss": round(loss.item(), 4), **figures})


def probe(width: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256), nn.GELU(), nn.Linear(256, outputs))


def draw(renderer: Renderer, kinds: tuple, step: int, count: int, seed: int) -> list[Scene]:
    """Scenes never drawn before and never again: split "base", numbered by step."""
    return [renderer.scene("base", kinds[i % len(kinds)], step * count + i, seed) for i in range(count)]


def worn(media: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Frames (uint8) a little brighter, darker and noisier, waves (float32) a little louder, softer and hissing: files are never clean."""
    if media.dtype == np.uint8:
        noise = rng.normal(0, rng.uniform(0, 4), media.shape).astype(np.float32)
        return (media + noise + np.float32(rng.normal(0, 3))).clip(0, 255).astype(np.uint8)
    noise = rng.standard_normal(media.shape, np.float32) * np.float32(rng.uniform(0, .003))
    return media * np.float32(rng.uniform(.8, 1.2)) + noise


def wake(model: AVLanguageModel) -> None:
    """Initial weights for small widths: the libraries' (0.02) suit 768; at 128 the queries look everywhere alike at first."""
    for connector in (model.visual_qformer, model.audio_qformer):
        for linear in (m for m in connector.modules() if isinstance(m, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
        nn.init.normal_(connector.query)
    nn.init.normal_(model.vision.model.embeddings.position_embedding.weight, std=.3)


def train_see(model: AVLanguageModel, renderer: Renderer, config: BaseConfig, seed: int, log) -> None:
    """Pictures: query q of the Q-Former tells which thing has its centre in cell q of a 3 x 2 grid, and its box; all together the place and
    the emotion of a face. Giving each query a place of its own is what makes it learn to look in minutes (DETR without the matching)."""
    things, places, rng = len(renderer.things), list(renderer.places), np.random.default_rng(seed)
    queries, width, side = model.visual_qformer.config.queries, model.llm.config.hidden_size, SIZE // 8
    cell_head, scene_head = probe(width, things + 1 + 4), probe(queries * width, len(places) + len(EMOTIONS) + 1)
    patch_head = nn.Linear(model.vision.width, things + 1 + 4 + queries)      # what each patch shows, its box, the patch's cell: a dense start
    own_cell = torch.arange(side ** 2).reshape(side, side)
    own_cell = (3 * (own_cell // side >= side // 2) + own_cell % side // (side // 3)).flatten()            # (S,)

    def loss_of(step):
        scenes, frames, cells, boxes, patches, edges = draw(renderer, ("one", "many", "many", "action", "face"), step, 64, seed), [], [], [], [], []
        for scene in scenes:
            t = float(rng.uniform(0, SECONDS))
            frames.append(renderer.frames(scene, [t]))
            cell, box, grid, edge = np.full(queries, things), np.zeros((queries, 4)), np.full((side, side), things), np.zeros((side, side, 4))
            for o in scene.objects if scene.kind != "face" else []:
                mask = renderer.mask(scene, o, t)
                if (b := box_of(mask)) is not None:
                    q = 3 * (b[1] + b[3] >= GRID) + min(3 * (b[0] + b[2]) // (2 * GRID), 2)
                    cell[q], box[q] = o.thing, np.array(b) / GRID
                    covered = mask.reshape(side, 8, side, 8).mean((1, 3)) > 80
                    grid[covered], edge[covered] = o.thing, box[q]
            cells.append(cell), boxes.append(box), patches.append(grid.ravel()), edges.append(edge.reshape(-1, 4))
        features = model.vision(torch.from_numpy(worn(np.stack(frames), rng)))                              # (B, 1, S, W)
        tokens = model.visual_qformer(features)[:, 0]                                                       # (B, Q, D)
        cell, box = cell_head(tokens).split([things + 1, 4], -1)                                            # (B, Q, C + 1), (B, Q, 4)
        place, face = scene_head(tokens.flatten(1)).split([len(places), len(EMOTIONS) + 1], 1)
        cell_gold, box_gold = torch.tensor(np.stack(cells)), torch.tensor(np.stack(boxes)).float()
        place_gold = torch.tensor([places.index(s.place) for s in scenes])
        face_gold = torch.tensor([EMOTIONS.index(s.emotion) if s.emotion and not s.masked else len(EMOTIONS) for s in scenes])
        off = (box - box_gold).abs().mean(-1)[cell_gold < things].mean()
        loss = 2 * F.cross_entropy(cell.flatten(0, 1), cell_gold.flatten(), torch.tensor([2.] * things + [1.])) + 10 * off
        loss = loss + .3 * F.cross_entropy(place, place_gold) + F.cross_entropy(face, face_gold)
        patch, edge, mine = patch_head(features[:, 0]).flatten(0, 1).split([things + 1, 4, queries], 1)     # (B * S, C + 1), (B * S, 4), (B * S, Q)
        patch_gold, edge_gold = torch.tensor(np.stack(patches)).flatten(), torch.tensor(np.stack(edges)).float().flatten(0, 1)
        rare = torch.cat([torch.full((things,), 10.), torch.ones(1)])                                       # nine patches in ten show no thing
        loss = loss + F.cross_entropy(patch, patch_gold, rare) + 10 * (edge - edge_gold).abs().mean(-1)[patch_gold < things].mean()
        loss = loss + .3 * F.cross_entropy(mine, own_cell.repeat(len(scenes)))
        found = (cell.argmax(-1) == cell_gold)[cell_gold < things].float().mean()
        patches_right = (patch.argmax(1) == patch_gold)[patch_gold < things].float().mean()
        return loss, {"patches": round(patches_right.item(), 2), "found": round(found.item(), 2), "box_off": round(GRID * off.item(), 1),
                      "face": round((face.argmax(1) == face_gold).float().mean().item(), 2)}

    train_stage("see", [model.vision, model.visual_qformer, cell_head, scene_head, patch_head], config.see_steps, config.base_lr, loss_of, log)


def seconds_of(waves: np.ndarray) -> Tensor:
    """fbank of every whole second of 10-s waves (B, N): (B, 10, 98, 128); a frame never reaches over the second's end."""
    whole = fbank(torch.from_numpy(waves))                                                                  # (B, 998, 128)
    return torch.stack([whole[:, 100 * i:100 * i + 98] for i in range(SECONDS)], 1)


def train_hear(model: AVLanguageModel, renderer: Renderer, config: BaseConfig, seed: int, log) -> None:
    """Sound: which things sound in each second (10, C) and the emotion of a voice, from the audio Q-Former's tokens."""
    things, count, noise = len(renderer.things), 24, np.random.default_rng(seed)
    queries = model.audio_qformer.config.queries * model.llm.config.hidden_size
    head = probe(queries, things + len(EMOTIONS) + 1)

    def loss_of(step):
        scenes = draw(renderer, ("one", "many", "many", "action", "face", "face"), step, count, seed)
        present = torch.tensor([[[any(o.thing == c and o.heard_at(s) for o in scene.objects) for c in range(things)]
                                 for s in range(SECONDS)] for scene in scenes]).float()                     # (B, 10, C)
        banks = seconds_of(np.stack([worn(renderer.wave(scene), noise) for scene in scenes]))
        features, _ = model.audio.beats(banks.flatten(0, 1))                                                # (B * 10, 48, W)
        out = head(model.audio_qformer(features[:, None]).flatten(1)).view(count, SECONDS, -1)              # (B, 10, C + 7)
        here, voice = out.split([things, len(EMOTIONS) + 1], -1)
        gold = torch.tensor([EMOTIONS.index(s.emotion) if s.emotion else len(EMOTIONS) for s in scenes])[:, None].expand(-1, SECONDS)
        loss = F.binary_cross_entropy_with_logits(here, present) * 5 + F.cross_entropy(voice.flatten(0, 1), gold.flatten())
        faces = gold[:, 0] < len(EMOTIONS)
        return loss, {"all_heard": round(((here > 0) == (present > 0)).all(-1).float().mean().item(), 2),
                      "voice": round((voice.argmax(-1) == gold)[faces].float().mean().item(), 2)}

    train_stage("hear", [model.audio, model.audio_qformer, head], config.hear_steps, config.base_lr, loss_of, log)


def show(model: AVLanguageModel, renderer: Renderer, scene: Scene, rng: random.Random, view: str = "") -> tuple[list[Part], list[tuple], Callable]:
    """One way of showing a scene: the parts of a prompt, the raw media, and a function that draws statements true of them.

    view: "image" (at second 4.5), "audio" (all of it), "clip" (both), or any way at random; "moment" is an image and its second of sound.
    """
    def part(kind):
        return Part("text", text=rng.choice(["", "", f"{kind}: "])), Part(kind)
    ways = ["audio", "clip", "clip"] if scene.kind in ("face", "action") else ["image", "image", "audio", "clip", "clip", "clip", "moment"]
    seen_at = IMAGE_AT if view else rng.randrange(SECONDS) + .5
    view = view or rng.choice(ways)
    seen_at = seen_at if view in ("image", "moment") else None
    parts, media, hears, noise = [], [], None, np.random.default_rng(rng.randrange(10 ** 9))
    if view in ("image", "moment"):
        parts += part("image")
        media.append(("image", worn(renderer.frames(scene, [seen_at]), noise)))
    if view == "clip":
        count = 4 if scene.kind == "face" else 10
        parts += part("video")
        media.append(("video", worn(renderer.frames(scene, [(i + .5) * SECONDS / count for i in range(count)]), noise)))
    if view in ("audio", "clip", "moment"):
        hears = range(int(seen_at), int(seen_at) + 1) if view == "moment" else range(0, 4 if scene.kind == "face" else SECONDS)
        parts += part("audio")
        media.append(("audio", (worn(renderer.wave(scene), noise), hears)))
    return parts, media, partial(statements, renderer, scene, rng, seen_at, view != "audio", hears)


def encode_all(model: AVLanguageModel, media: list[list[tuple]]) -> list[list[MediaFeatures]]:
    """Features of the raw media of a batch, each kind in one pass of its encoder."""
    out = [[None] * len(sample) for sample in media]
    with torch.no_grad():
        for kind in ("image", "video"):
            for count in {len(m[1]) for sample in media for m in sample if m[0] == kind}:
                where = [(i, j) for i, sample in enumerate(media) for j, m in enumerate(sample) if m[0] == kind and len(m[1]) == count]
                for (i, j), features in zip(where, model.encode(kind, [media[i][j][1] for i, j in where])):
                    out[i][j] = features
        where = [(i, j) for i, sample in enumerate(media) for j, m in enumerate(sample) if m[0] == "audio"]
        if where:
            banks = seconds_of(np.stack([media[i][j][1][0] for i, j in where]))
            chosen = torch.cat([bank[list(media[i][j][1][1])] for bank, (i, j) in zip(banks, where)])
            features, _ = model.audio.beats(chosen)                                                         # (sum of T, 48, W)
            for (i, j), f in zip(where, features.split([len(media[i][j][1][1]) for i, j in where])):
                out[i][j] = MediaFeatures("audio", f, torch.ones(f.shape[:2], dtype=torch.bool))
    return out


def train_read(model: AVLanguageModel, renderer: Renderer, config: BaseConfig, seed: int, log) -> None:
    """The LM learns to say what the connectors' tokens mean: statements in random order, loss on every word of them."""
    rng, count, shown = random.Random(seed), 24, []
    model.requires_grad_(False)

    def loss_of(step):
        if step % 8 == 7:
            prompts, media, targets = [[]] * count, [[]] * count, [gibberish(model.tokenizer, rng) for _ in range(count)]
        else:
            if step % 2 == 0:                                                 # encoding costs as much as a step: show each scene twice
                kinds = rng.choice([("one", "many", "many")] * 3 + [("action",), ("face",)])
                shown[:] = [show(model, renderer, scene, rng) for scene in draw(renderer, kinds, step + 10 ** 6, count, seed)]
                encoded = encode_all(model, [views[1] for views in shown])
                shown[:] = [(parts, features, say) for (parts, _, say), features in zip(shown, encoded)]
            prompts, media, targets = [s[0] for s in shown], [s[1] for s in shown], [" ".join(s[2]()) for s in shown]
        loss, tokens = model(model.collate(prompts, media, targets))
        return loss / tokens, {}

    train_stage("read", [model.llm, model.time], config.read_steps, config.read_lr, loss_of, log, slow=[model.visual_qformer, model.audio_qformer])


def corpus(renderer: Renderer, seed: int) -> list[str]:
    """What the tokenizer (not the model) learns its merges from: statements, and the words that tasks are put and answered in."""
    rng = random.Random(seed)                                                 # COMMON: English a user's own annotations may need
    scenes = {kind: [renderer.scene("base", kind, i, seed) for i in range(300)] for kind in ("one", "many", "action", "face")}
    lines = [" ".join(statements(renderer, s, rng, None, True, range(SECONDS))) for group in scenes.values() for s in group]
    rows = clip_rows(renderer, scenes, rng, 100)
    return lines + [row["text"] for task in rows.values() for row in task] + [row.get("question", "") for row in rows["avqa"]] + [task.ask for task in TASKS.values()] + [COMMON] * 3


def complete(model: AVLanguageModel, shown: list, beginnings: list[str], limit: int) -> list[str]:
    """How the model goes on after the beginning of a statement about each shown scene."""
    batch = model.collate([s[0] for s in shown], [s[1] for s in shown], beginnings)
    batch = {**batch, "ids": batch["ids"][:, :-1], "attention": batch["attention"][:, :-1]}                 # without the end of text
    return [text.split(".")[0].strip() for text in model.generate(batch, limit)]


def check_base(model: AVLanguageModel, renderer: Renderer, seed: int, count: int = 100) -> dict:
    """What the base says of scenes it was not trained on: places, emotions and movements (accuracy), spans (exact, and seconds' IoU), boxes (IoU)."""
    model.eval()
    rng, result = random.Random(seed), {}
    for name, kinds, view in (("place", ("one", "many"), "clip"), ("emotion", ("face",), "clip"), ("movement", ("action",), "clip"),
                              ("span", ("one", "many"), "audio"), ("span_in_clip", ("one", "many"), "clip"), ("box", ("one", "many"), "image")):
        scenes = [renderer.scene("base", kinds[i % len(kinds)], 5 * 10 ** 8 + i, seed) for i in range(count)]
        shown = [show(model, renderer, scene, rng, view) for scene in scenes]
        shown = list(zip([s[0] for s in shown], encode_all(model, [s[1] for s in shown])))
        objects = [next((o for o in s.objects if (o.heard if name.startswith("span") else o.seen)), s.objects[0]) for s in scenes]
        begin = {"place": "the place is", "emotion": "the person feels", "movement": "the {} is", "box": "the {} is at"}.get(name, "the {} is heard from")
        said = complete(model, shown, [begin.format(o.label) for o in objects], 16)
        numbers = [[int(v) for v in text.replace("to", " ").split() if v.isdigit()] for text in said]
        if name.startswith("span"):
            pairs = [(set(range(n[0], n[1])) if len(n) == 2 else set(), set(range(*o.heard[0]))) for n, o in zip(numbers, objects)]
            result[name + "_exact"] = sum(a == b for a, b in pairs) / count
            result[name + "_iou"] = sum(len(a & b) / len(a | b) for a, b in pairs) / count
        elif name == "box":
            gold = [box_of(renderer.mask(s, o, IMAGE_AT)) for s, o in zip(scenes, objects)]
            result["box_iou"] = sum(iou(n, g) if len(n) == 4 else 0 for n, g in zip(numbers, gold) if g) / sum(g is not None for g in gold)
        else:
            result[name] = sum(text == getattr(s, name) for text, s in zip(said, scenes)) / count
    model.train()
    return {k: round(v, 3) for k, v in result.items()}


def train_base(config: BaseConfig) -> None:
    """Make the base and write it to its folder, with base.json: what it reaches, how long it took, and the log of the three stages."""
    folder, seed, began = Path(config.out), config.seed, time.time()
    if (folder / "base.json").exists():
        raise ModelError(f"{folder}: holds a finished base, which will not be overwritten; choose another --out")
    torch.manual_seed(seed)
    renderer = Renderer()
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(corpus(renderer, seed)).save(str(folder / "tokenizer.json"))
    model = AVLanguageModel(ModelConfig(**TINY_MODEL), load_tokenizer(folder / "tokenizer.json"))
    wake(model)
    lines = []
    for stage in (train_see, train_hear, train_read):
        stage(model, renderer, config, seed, lines.append)
        model.save_base(folder)
    reached = {**check_base(model, renderer, seed), "minutes": round((time.time() - began) / 60, 1), "config": asdict(config)}
    (folder / "base.json").write_text(json.dumps({**reached, "log": lines}, indent=1) + "\n")
    print(f"{folder}: {json.dumps(reached)}")
