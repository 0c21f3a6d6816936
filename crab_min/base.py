"""The tiny base: a small CLIP, BEATs, two Q-Formers and a Llama, trained from nothing on what the built-in world shows and sounds like.

`python train.py tiny-base` makes it in three stages, each a loop a page long:
  see    vision encoder + visual Q-Former: what is where, read from the Q-Former's tokens by a small probe (thrown away after)
  hear   BEATs + audio Q-Former: what sounds in this second, and how a voice feels, the same way
  read   the LM (and the connectors, slowly). First lessons: copying, then looking things up by name, one form of statement at a time: "The dog is on the
         left. The cat is in the middle."; then statements of all forms: places, things, boxes, spans, movements, voices; half of the time with a
         keyword for each in the prompt, or repeated in short at the end: so the LM learns to look at words, not only at media
Without the lessons it learns what is on the left, where a look at one place is enough, but not where the dog is (assets/README.md).
The base never sees an instruction, an answer tag, a question, a sound to be matched with one of two videos, or a test seed (split
"base" has its own): what a task asks and how it is answered is left to the adapter. The probes are why a 2-million-parameter LM learns to look at all
in minutes: without them the connectors get their first useful gradient only after the LM has learned to read them.

Shapes: B scenes of a batch, C things of the world, Q queries, D width.
"""
import json
import random
import time
from collections import deque
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
from crab_min.interface import GRID, Part, mask_box
from crab_min.metrics import iou
from crab_min.model import SPECIALS, AVLanguageModel, MediaFeatures, ModelConfig, ModelError, half_products, load_base, load_tokenizer
from crab_min.statements import annotated, corpus, pair_statements, statements
from crab_min.world import EMOTIONS, SECONDS, SIZE, Renderer, Scene
from crab_min.world_tasks import ORDERS, at, only, times

IMAGE_AT = 4.5                                         # second of the image in check_base
BINS = GRID // 10 + 1                                  # the tens of a box edge, 0 to 22, stage see


@dataclass
class BaseConfig:
    """How long each stage of the base lasts."""
    see_steps: int = field(default=1100, metadata={"help": "steps of stage see (64 pictures each)"})
    hear_steps: int = field(default=700, metadata={"help": "steps of stage hear (24 clips each)"})
    practice: float = field(default=1, metadata={"help": "factor on the steps of the lessons with which stage read begins"})
    read_steps: int = field(default=5000, metadata={"help": "steps of stage read on statements of every form (24 scenes each)"})
    base_lr: float = field(default=2e-3, metadata={"help": "peak learning rate of stages see and hear"})
    read_lr: float = field(default=1.5e-3, metadata={"help": "peak learning rate of stage read"})
    check_scenes: int = field(default=100, metadata={"help": "scenes that the finished base is examined on, for each figure"})
    seed: int = field(default=0, metadata={"help": "seed of the scenes and of the initial weights"})
    out: str = field(default="runs/tiny-base", metadata={"help": "folder of the base"})


def gibberish(text, rng: random.Random) -> str:
    """Random tokens, to be said again: copying is all the base can learn of the words that it is never told about."""
    return text.decode([rng.randrange(len(SPECIALS), len(text)) for _ in range(rng.randint(3, 14))])


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
def train_stage(name: str, modules: list, steps: int, lr: float, loss_of, log, slow: list = (), steady: float = 0) -> None:
    """The loop the three stages share: AdamW, warm-up and cosine, bfloat16 products; `loss_of(step)` gives the loss and figures.

    slow: modules trained at a fifth of the learning rate; steady: the share of the steps before the rate falls.
    """
    groups = [{"params": [p for m in part for p in m.requires_grad_(True).parameters()], "lr": rate} for part, rate in ((modules, lr), (slow, lr / 5)) if part]
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 100, .51 + .5 * np.cos(np.pi * max(0, s / steps - steady) / (1 - steady))))
    bar, recent = tqdm(range(steps), desc=name, unit="step"), deque(maxlen=50)
    for step in bar:
        with half_products():
            loss, figures = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if step % 50 == 49 or step == steps - 1:
            mean = sum(recent) / len(recent)
            bar.set_postfix(loss=f"{mean:.3f}", **figures)
            log({"stage": name, "step": step + 1, "loss": round(mean, 4), **figures})


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
    """Initial weights for small widths: the libraries' (0.02) suit 768 and more; at 128 all attention is uniform at first."""
    for part in (model.visual_qformer, model.audio_qformer, model.llm.model):
        for linear in (m for m in part.modules() if isinstance(m, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
    for connector in (model.visual_qformer, model.audio_qformer):
        nn.init.normal_(connector.query)
    nn.init.normal_(model.vision.model.embeddings.position_embedding.weight, std=.3)
    nn.init.normal_(model.llm.get_input_embeddings().weight, std=model.llm.config.hidden_size ** -.5)


@dataclass
class Seen:
    """What a frame shows: Q cells of a 3 x 2 grid (thing with its centre there, its box / 224), S patches of 8 x 8 pixels (the same)."""
    cell: np.ndarray                                   # (Q,), the number of things where the cell is empty
    box: np.ndarray                                    # (Q, 4)
    patch: np.ndarray                                  # (S,)
    edge: np.ndarray                                   # (S, 4)


def seen(renderer: Renderer, scene: Scene, t: float) -> Seen:
    none, side = len(renderer.things), SIZE // 8
    cell, box, patch, edge = np.full(6, none), np.zeros((6, 4)), np.full((side, side), none), np.zeros((side, side, 4))
    for o in scene.objects if scene.kind != "face" else []:
        mask = renderer.mask(scene, o, t)
        if (b := mask_box(mask)) is not None:
            q = 3 * (b[1] + b[3] >= GRID) + min(3 * (b[0] + b[2]) // (2 * GRID), 2)
            cell[q], box[q] = o.thing, np.array(b) / GRID
            covered = mask.reshape(side, 8, side, 8).mean((1, 3)) > 80
            patch[covered], edge[covered] = o.thing, box[q]
    return Seen(cell, box, patch.ravel(), edge.reshape(-1, 4))


def train_see(model: AVLanguageModel, renderer: Renderer, config: BaseConfig, seed: int, log) -> None:
    """Pictures: query q of the Q-Former tells which thing has its centre in cell q of a 3 x 2 grid, and its box; all together the place and
    the emotion of a face. Giving each query a place of its own is what makes it learn to look in minutes (DETR without the matching)."""
    things, places, rng = len(renderer.things), list(renderer.places), np.random.default_rng(seed)
    queries, width, side = model.visual_qformer.config.queries, model.llm.config.hidden_size, SIZE // 8
    if queries != 6:
        raise ModelError(f"visual_qformer: {queries} queries, stage see needs 6, one a cell of its grid")
    cell_head, scene_head = probe(width, things + 1 + 4), probe(queries * width, len(places) + len(EMOTIONS) + 1)
    digit_head = nn.Linear(width, 4 * BINS)            # the tens of its edges: digits that can be read off linearly can be put into words
    patch_head = nn.Linear(model.vision.width, things + 1 + 4 + queries)      # what each patch shows, its box, the patch's cell: a dense start
    own_cell = torch.arange(side ** 2).reshape(side, side)
    own_cell = (3 * (own_cell // side >= side // 2) + own_cell % side // (side // 3)).flatten()            # (S,)

    def loss_of(step):
        scenes = draw(renderer, ("one", "many", "many", "action", "face"), step, 64, seed)
        times = rng.uniform(0, SECONDS, len(scenes))
        golds = [seen(renderer, scene, t) for scene, t in zip(scenes, times)]
        frames = np.stack([renderer.frames(scene, [t]) for scene, t in zip(scenes, times)])
        features = model.vision(torch.from_numpy(worn(frames, rng)))                                        # (B, 1, S, W)
        tokens = model.visual_qformer(features)[:, 0]                                                       # (B, Q, D)
        cell, box = cell_head(tokens).split([things + 1, 4], -1)                                            # (B, Q, C + 1), (B, Q, 4)
        place, face = scene_head(tokens.flatten(1)).split([len(places), len(EMOTIONS) + 1], 1)
        cell_gold, box_gold = torch.tensor(np.stack([g.cell for g in golds])), torch.tensor(np.stack([g.box for g in golds])).float()
        place_gold = torch.tensor([places.index(s.place) for s in scenes])
        face_gold = torch.tensor([EMOTIONS.index(s.emotion) if s.emotion and not s.masked else len(EMOTIONS) for s in scenes])
        there = cell_gold < things
        off = (box - box_gold).abs().mean(-1)[there].mean()
        digits = digit_head(tokens)[there].unflatten(-1, (4, BINS))                                         # (objects, 4, BINS)
        loss = 2 * F.cross_entropy(cell.flatten(0, 1), cell_gold.flatten(), torch.tensor([2.] * things + [1.])) + 10 * off
        loss = loss + .5 * F.cross_entropy(digits.flatten(0, 1), ((box_gold[there] * GRID).round() / 10).long().flatten())
        loss = loss + .3 * F.cross_entropy(place, place_gold) + F.cross_entropy(face, face_gold)
        patch, edge, mine = patch_head(features[:, 0]).flatten(0, 1).split([things + 1, 4, queries], 1)     # (B * S, C + 1), (B * S, 4), (B * S, Q)
        patch_gold, edge_gold = torch.tensor(np.concatenate([g.patch for g in golds])), torch.tensor(np.concatenate([g.edge for g in golds])).float()
        rare = torch.cat([torch.full((things,), 10.), torch.ones(1)])                                       # nine patches in ten show no thing
        loss = loss + F.cross_entropy(patch, patch_gold, rare) + 10 * (edge - edge_gold).abs().mean(-1)[patch_gold < things].mean()
        loss = loss + .3 * F.cross_entropy(mine, own_cell.repeat(len(scenes)))
        found = (cell.argmax(-1) == cell_gold)[there].float().mean()
        return loss, {"found": round(found.item(), 2), "box_off": round(GRID * off.item(), 1), "face": round((face.argmax(1) == face_gold).float().mean().item(), 2)}

    train_stage("see", [model.vision, model.visual_qformer, cell_head, scene_head, digit_head, patch_head], config.see_steps, config.base_lr, loss_of, log)


def banks_of(waves: np.ndarray, seconds: int = 1) -> Tensor:
    """fbank of the consecutive pieces of `seconds` s of 10-s waves (B, N): (B, T, F, 128); a frame never reaches over its piece's end."""
    whole, hop = fbank(torch.from_numpy(waves)), 100 * seconds                                              # (B, 998, 128)
    return torch.stack([whole[:, start:start + hop - 2] for start in range(0, 100 * SECONDS, hop)], 1)


def train_hear(model: AVLanguageModel, renderer: Renderer, config: BaseConfig, seed: int, log) -> None:
    """Sound: which things sound in each second (10, C) and the emotion of a voice, from the audio Q-Former's tokens."""
    things, count, noise = len(renderer.things), 24, np.random.default_rng(seed)
    queries = model.audio_qformer.config.queries * model.llm.config.hidden_size
    head = probe(queries, things + len(EMOTIONS) + 1)

    def loss_of(step):
        seconds = 2 if step % 3 == 2 else 1                                                                 # a piece of sound is 1 or 2 s long
        scenes = draw(renderer, ("one", "many", "many", "action", "face", "face"), step, count, seed)
        present = torch.tensor([[[any(o.thing == c and any(o.heard_at(t) for t in range(start, start + seconds)) for o in scene.objects) for c in range(things)]
                                 for start in range(0, SECONDS, seconds)] for scene in scenes]).float()     # (B, T, C)
        banks = banks_of(np.stack([worn(renderer.wave(scene), noise) for scene in scenes]), seconds)
        features, _ = model.audio.beats(banks.flatten(0, 1))                                                # (B * T, 48 or 96, W)
        out = head(model.audio_qformer(features[:, None]).flatten(1)).unflatten(0, (count, -1))             # (B, T, C + 7)
        here, voice = out.split([things, len(EMOTIONS) + 1], -1)
        gold = torch.tensor([EMOTIONS.index(s.emotion) if s.emotion else len(EMOTIONS) for s in scenes])[:, None].expand(-1, here.shape[1])
        loss = F.binary_cross_entropy_with_logits(here, present) * 5 + F.cross_entropy(voice.flatten(0, 1), gold.flatten())
        faces = gold[:, 0] < len(EMOTIONS)
        return loss, {"all_heard": round(((here > 0) == (present > 0)).all(-1).float().mean().item(), 2),
                      "voice": round((voice.argmax(-1) == gold)[faces].float().mean().item(), 2)}

    train_stage("hear", [model.audio, model.audio_qformer, head], config.hear_steps, config.base_lr, loss_of, log)


@dataclass
class Shown:
    """One or two scenes as the LM meets them: the parts of a prompt, its media, and a function that draws true statements about them.

    media: ("image" or "video", frames (T, H, W, 3)), or ("audio", wave (N,), seconds a piece, pieces); `train_read` puts features in their place.
    """
    parts: list[Part]
    media: list
    say: Callable


def show(model: AVLanguageModel, renderer: Renderer, scene: Scene, rng: random.Random, view: str = "", others: tuple[Scene, ...] = (),
         seen_at: float | None = None) -> Shown:
    """One way of showing a scene.

    view: "image" (at second seen_at, or any), "audio" (all of it), "clip" (frames and all sound), "still" (image and all sound), "moment" (image and the
    piece of sound around it), or any of these at random; with the two scenes of `others` it is "pair", three media: the sound of the last scene and two
    videos, or its frames and two sounds; or "frames", two videos of one frame.
    """
    noise, count = np.random.default_rng(rng.randrange(10 ** 9)), 4 if scene.kind == "face" else SECONDS
    ways = ["audio", "clip", "clip"] if scene.kind in ("face", "action") else ["image", "image", "audio", "clip", "clip", "clip", "moment", "moment", "still"]
    seen_at, shown = seen_at or rng.randrange(SECONDS) + .5, Shown([], [], None)
    view, seconds = view or rng.choice(ways), rng.choice([1, 1, 2])

    def add(kind, medium, number=""):
        marker = f"{kind}{number}: " if number or rng.random() < .5 else ""
        shown.parts += Part("text", text="\n" * bool(shown.parts) + marker), Part(kind)
        shown.media.append((kind, *medium))

    def video(scene):
        return worn(renderer.frames(scene, [(i + .5) * SECONDS / count for i in range(count)]), noise),

    def audio(scene, seconds, pieces):
        return worn(renderer.wave(scene), noise), seconds, pieces

    if others:
        second, third = others
        kind, alone, take = rng.choice([("video", "audio", video), ("audio", "video", partial(audio, seconds=1, pieces=range(SECONDS)))])
        if view == "frames":
            kind, alone, take, count = "video", "audio", video, 1
        else:
            add(alone, audio(third, 1, range(SECONDS)) if alone == "audio" else video(third))
        for number, one in ((" one", scene), (" two", second)):
            add(kind, take(one), number)
        shown.say = partial(pair_statements, [scene, second], third, kind, rng)
        return shown
    hears = None
    if view in ("image", "moment", "still"):
        add("image", (worn(renderer.frames(scene, [seen_at]), noise),))
    if view == "clip":
        add("video", video(scene))
    if view in ("audio", "clip", "still"):
        hears = range(count)
        add("audio", audio(scene, 1, hears))
    if view == "moment":
        piece = int(seen_at) // seconds
        hears = range(piece * seconds, (piece + 1) * seconds)
        add("audio", audio(scene, seconds, range(piece, piece + 1)))
    shown.say = partial(statements, renderer, scene, rng, seen_at if view in ("image", "moment", "still") else None, view != "audio", hears)
    return shown


def encode_all(model: AVLanguageModel, batch: list[Shown]) -> list[Shown]:
    """The batch with the features of the media in their place, each kind and length in one pass of its encoder."""
    groups: dict = {}
    for shown in batch:
        for j, (kind, array, *pieces) in enumerate(shown.media):
            groups.setdefault((kind, pieces[0] if pieces else len(array)), []).append((shown.media, j))
    with torch.no_grad():
        for (kind, size), where in groups.items():
            if kind != "audio":
                features = model.encode(kind, [media[j][1] for media, j in where])
            else:
                chosen = [bank[list(media[j][3])] for bank, (media, j) in zip(banks_of(np.stack([media[j][1] for media, j in where]), size), where)]
                encoded = model.audio.beats(torch.cat(chosen))[0].split([len(c) for c in chosen])           # of each (T, S, W)
                features = [MediaFeatures("audio", f, torch.ones(f.shape[:2], dtype=torch.bool)) for f in encoded]
            for (media, j), f in zip(where, features):
                media[j] = f
    return batch


@dataclass
class Lesson:
    """Practice in looking things up by their names: for each thing shown, in any order, the same form of statement and nothing else."""
    steps: int
    scenes: int                                        # a step
    view: str                                          # see `show`; "text": random words to be said again, nothing else
    forms: tuple[str, ...] = ()                        # see statements.py
    kinds: tuple[str, ...] = ("one", "many", "many")   # of scenes
    names: bool = False                                # names are looked up as well: their tokens count in the loss


# A small LM finds out how to look something up only where nothing else is to be learned and a step has many examples; what it has found out, it keeps.
LESSONS = (
    Lesson(800, 64, "text", names=True),                                      # copying
    Lesson(200, 32, "clip", ("movement",), ("action",)),
    Lesson(250, 64, "image", ("side",)),                                      # the dog -> its token -> where
    Lesson(150, 64, "image", ("height",)),
    Lesson(400, 32, "image", ("box",)),
    Lesson(400, 32, "audio", ("span", "order")),                              # the dog -> its tokens -> when
    Lesson(250, 32, "audio", ("compare",), ("many",)),                        # when and when -> which of the two is longer
    Lesson(350, 64, "moment", ("sounds",)),                                   # the dog, seen -> heard as well, or silent
    Lesson(150, 64, "frames", ("which",), ("one",)),                          # the dog -> its token -> of which video
    Lesson(350, 32, "pair", ("which",), ("one",)),
    Lesson(250, 48, "clip", ("sounds", "shown")),
    Lesson(600, 32, "clip", ("side", "span", "seen", "placed")),
    Lesson(200, 32, "clip", ("there", "ranked", "found"), names=True),        # on the left -> which thing
    Lesson(200, 32, "moment", ("placed", "both", "box")))


# view and kinds of scenes of the statements after the lessons, each as likely as its copies here
GENERAL = [("", ("one", "many", "many"))] * 4 + [("pair", ("one",)), ("", ("action",)), ("", ("face",))]


def train_read(model: AVLanguageModel, renderer: Renderer, config: BaseConfig, seed: int, log) -> None:
    """The LM learns to say what the connectors' tokens mean: the lessons, each with a little of the earlier ones, then statements of all forms."""
    rng, pools = random.Random(seed), {}
    model.requires_grad_(False)
    names = torch.tensor([i for thing in renderer.things for i in model.encode_text(f" {thing.label}")])
    ends = np.cumsum([round(lesson.steps * config.practice) for lesson in LESSONS])

    def batch_of(step, view, kinds, count):
        if view == "text":
            return [Shown([Part("text", text=line)], [], lambda forms, line=line: [line]) for line in (gibberish(model.tokenizer, rng) for _ in range(count))]
        pool = pools.setdefault((view, kinds, count), [])
        if step % 3 == 0 or not pool:                                         # encoding costs more than a step: each batch is shown about three times
            pairs = view in ("pair", "frames")
            scenes = draw(renderer, kinds, step + 10 ** 6, count, seed)
            others = zip(*(draw(renderer, kinds, step + 10 ** 6 + i, count, seed) for i in (1, 2))) if pairs else [()] * count
            pool.append(encode_all(model, [show(model, renderer, scene, rng, view, more) for scene, more in zip(scenes, others)]))
            del pool[:-8]
        return rng.choice(pool)

    def loss_of(step):
        number = int(np.searchsorted(ends, step, "right"))
        new = lesson = LESSONS[number] if number < len(LESSONS) else None
        if number and rng.random() < (.2 if new else .3):
            lesson = rng.choice(LESSONS[:number])
        if lesson:
            batch = batch_of(step, lesson.view, lesson.kinds, lesson.scenes if lesson is new else 24)
            notes, targets = [""] * len(batch), [" ".join(s.say(forms=lesson.forms)) for s in batch]
        else:
            batch = batch_of(step, *rng.choice(GENERAL), 24)
            notes, targets = zip(*(annotated(s.say(), rng) for s in batch))
        prompts = [[*s.parts, Part("text", text=note)] if note else s.parts for s, note in zip(batch, notes)]
        batch = model.collate(prompts, [s.media for s in batch], targets)
        if lesson and not lesson.names:                                       # which thing comes next is chance, and would be most of a lesson's loss
            batch["labels"][torch.isin(batch["labels"], names)] = -100
        loss, tokens = model(batch)
        loss = loss / tokens
        return loss, {"_".join((new.view, *new.forms[:1])): round(loss.item(), 3)} if new and lesson is new else {}

    train_stage("read", [model.llm, model.time, model.number], int(ends[-1]) + config.read_steps, config.read_lr, loss_of, log,
                [model.visual_qformer, model.audio_qformer], steady=.6)


def complete(model: AVLanguageModel, batch: list[Shown], beginnings: list[str], limit: int) -> list[str]:
    """How the model goes on after the beginning of a statement about each shown scene."""
    batch = model.collate([s.parts for s in batch], [s.media for s in batch], beginnings)
    batch = {**batch, "ids": batch["ids"][:, :-1], "attention": batch["attention"][:, :-1]}                 # without the end of text
    return [text.split(".")[0].strip() for text in model.generate(batch, limit)]


def check_base(model: AVLanguageModel, renderer: Renderer, seed: int, count: int) -> dict:
    """How the base goes on from the beginning of a statement about scenes that it was not trained on: shares that are right; IoU of boxes and seconds."""
    model.eval()
    rng, many, result = random.Random(seed), ("one", "many"), {}

    def overlap(gold: set, text: str) -> float:
        said = [int(v) for v in text.split() if v.isdigit()]
        said = set(range(*said)) if len(said) == 2 else set()
        return len(said & gold) / len(said | gold)

    def box(gold: tuple, text: str) -> float:
        said = [int(v) for v in text.split() if v.isdigit()]
        return iou(said, gold) if len(said) == 4 else 0

    def of_one(objects, beginning, right):
        """A question about the first of the things objects(scene): where it begins, and what is right."""
        return lambda scene: [(beginning(o), right(scene, o)) for o in objects(scene)[:1]]

    def shown(scene):
        return [o for o in scene.seen if o.seen_at(IMAGE_AT)]
    heard = (lambda scene: scene.heard), (lambda o: f"The {o.label} is heard")
    checks = {                                                                # name: view, kinds of scenes, scene -> [(beginning, answer or its score)]
        "place": ("clip", many, lambda s: [("The place is", s.place)]),
        "emotion": ("clip", ("face",), lambda s: [("The person feels", s.emotion)]),
        "movement": ("clip", ("action",), lambda s: [("The movement is", s.movement)]),
        "left_or_right": ("image", many, of_one(lambda s: [o for o in shown(s) if o.side != "middle"], lambda o: f"The {o.label} is on the", lambda s, o: o.side)),
        "heard_or_silent": ("clip", many, of_one(lambda s: s.seen, lambda o: f"The {o.label} is {at(o.side)} and is",
                                                 lambda s, o: lambda text: text.split()[:1] == ["heard" if o.heard else "silent"])),
        "span_exact": ("audio", many, of_one(*heard, lambda s, o: times(o.heard))),
        "span_iou": ("audio", many, of_one(*heard, lambda s, o: partial(overlap, set(range(*o.heard[0]))))),
        "span_in_clip_exact": ("clip", many, of_one(*heard, lambda s, o: times(o.heard))),
        "span_in_clip_iou": ("clip", many, of_one(*heard, lambda s, o: partial(overlap, set(range(*o.heard[0]))))),
        "seen_in_clip_iou": ("clip", many, of_one(lambda s: s.seen, lambda o: f"The {o.label} is seen",
                                                  lambda s, o: partial(overlap, set(range(*o.seen[0]))))),
        "thing_on_a_side": ("clip", many, of_one(lambda s: s.seen, lambda o: f"{at(o.side).capitalize()} is the", lambda s, o: lambda text: text.split(",")[0] == o.label)),
        "thing_heard_first": ("clip", many, of_one(lambda s: s.heard[:1] * (only(s.heard, ORDERS["first"]) is not None), lambda o: "Heard first is the", lambda s, o: o.label)),
        "box_iou": ("image", many, of_one(shown, lambda o: f"The {o.label} is at", lambda s, o: partial(box, mask_box(renderer.mask(s, o, IMAGE_AT)))))}
    for name, (view, kinds, ask) in checks.items():
        scenes = [renderer.scene("base", kinds[i % len(kinds)], 5 * 10 ** 8 + i, seed) for i in range(count)]
        asked = [(show(model, renderer, scene, rng, view, seen_at=IMAGE_AT), *question) for scene in scenes for question in ask(scene)]
        said = complete(model, encode_all(model, [a[0] for a in asked]), [a[1] for a in asked], 16) if asked else []
        right = [score(text) if callable(score) else text == score for text, (_, _, score) in zip(said, asked)]
        result[name] = round(sum(right) / max(1, len(right)), 3)
    model.train()
    return result


def train_base(config: BaseConfig) -> None:
    """Make the base and write it to its folder, with base.json: what it reaches, how long it took, and the log of the three stages.

    Killed and started again with the same command, it goes on after the last finished stage (stage.json).
    """
    folder, seed, began = Path(config.out), config.seed, time.time()
    if (folder / "base.json").exists():
        raise ModelError(f"{folder}: holds a finished base, which will not be overwritten; choose another --out")
    renderer, done = Renderer(), {"stages": [], "seconds": 0, "log": [], "config": asdict(config)}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "stage.json").exists():
        done = json.loads((folder / "stage.json").read_text())
        if done["config"] != asdict(config):
            raise ModelError(f"{folder}: an interrupted base with other settings ({done['config']}); use them to continue it, or another --out")
        model = load_base(folder).train()
    else:
        torch.manual_seed(seed)
        train_tokenizer(corpus(renderer, seed)).save(str(folder / "tokenizer.json"))
        model = AVLanguageModel(ModelConfig(**TINY_MODEL), load_tokenizer(folder / "tokenizer.json"))
        wake(model)
    for name, stage in (("see", train_see), ("hear", train_hear), ("read", train_read)):
        if name in done["stages"]:
            continue
        torch.manual_seed(seed)
        stage(model, renderer, config, seed, done["log"].append)
        model.save_base(folder)
        done = {**done, "stages": done["stages"] + [name], "seconds": done["seconds"] + time.time() - began}
        began = time.time()
        (folder / "stage.json").write_text(json.dumps(done))
    reached = {**check_base(model, renderer, seed, config.check_scenes), "minutes": round(done["seconds"] / 60, 1), "config": asdict(config)}
    (folder / "base.json").write_text(json.dumps({**reached, "log": done["log"]}, indent=1) + "\n")
    (folder / "stage.json").unlink()
    print(f"{folder}: {json.dumps(reached)}")
