"""How the tiny base learns to read its own eyes and ears: the LM says true statements about what its connectors' tokens show.

It goes on in lessons: copying random words; statements of all forms (places, things, boxes, spans, movements, voices); looking things up by name, one form
of statement at a time ("The dog is on the left. The cat is in the middle."), each until it is found out; and statements of all forms again, half of the
time with a keyword for each in the prompt, or repeated in short at the end: so the LM learns to look at words, not only at media. Without the lessons it
learned what is on the left, where a look at one place is enough, but not where the dog is; without statements before them it did not learn that either
(assets/README.md).

Shapes: T frames or pieces of sound, N samples, S encoder tokens of one piece, W encoder width.
"""
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from crab_min.answers import mask_box
from crab_min.backbones.composed import SPECIALS, ComposedModel
from crab_min.encoders import MediaFeatures
from crab_min.evaluation.metrics import iou
from crab_min.interface import PromptPart
from crab_min.tinybase.captions import pair_statements, scene_statements, with_keywords_or_recap
from crab_min.tinybase.pretrain_encoders import banks_of, draw, train_stage, worn
from crab_min.world.clauses import ORDERS, at_position, during, unique_minimum
from crab_min.world.rendering import Renderer
from crab_min.world.scenes import Scene
from crab_min.world.things import SECONDS

IMAGE_AT = 4.5                                         # second of the image in check_base


@dataclass
class Shown:
    """One or two scenes as the LM meets them: the parts of a prompt, its media, and a function that draws true statements about them.

    media: ("image" or "video", frames (T, H, W, 3)), or ("audio", wave (N,), seconds a piece, pieces); `train_read` puts features in their place.
    """
    parts: list[PromptPart]
    media: list
    say: Callable


def show(model: ComposedModel, renderer: Renderer, scene: Scene, rng: random.Random, view: str = "", others: tuple[Scene, ...] = (),
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
        shown.parts += PromptPart("text", text="\n" * bool(shown.parts) + marker), PromptPart(kind)
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
    shown.say = partial(scene_statements, renderer, scene, rng, view != "audio", seen_at if view in ("image", "moment", "still") else None, hears)
    return shown


def encode_all(model: ComposedModel, batch: list[Shown]) -> list[Shown]:
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
    steps: int                                         # at most
    scenes: int                                        # a step
    view: str                                          # see `show`; "text": random words to be said again, nothing else; "": statements of all forms
    forms: tuple[str, ...] = ()                        # see statements.py
    kinds: tuple[str, ...] = ("one", "many", "many")   # of scenes
    names: bool = False                                # names are looked up as well: their tokens count in the loss
    until: float = 0                                   # loss a token at which it is learned, and the next lesson begins


# view and kinds of scenes of statements of all forms, each as likely as its copies here
GENERAL = [("", ("one", "many", "many"))] * 4 + [("pair", ("one",)), ("", ("action",)), ("", ("face",))]
STATEMENTS = Lesson(0, 24, "")                         # of all forms, see GENERAL

# A small LM finds out how to look something up only where nothing else is to be learned, a step has many examples, and statements of all forms came
# before (perhaps because it must know what its tokens are called). What it has found out it keeps, as long as it is practised.
LESSONS = (
    Lesson(700, 64, "text", names=True),                                      # copying
    replace(STATEMENTS, steps=2500),
    Lesson(150, 64, "image", ("place",), until=.02),
    Lesson(100, 32, "clip", ("movement",), ("action",)),
    Lesson(100, 64, "image", ("there",), names=True),                         # on the left -> its token -> the dog
    Lesson(800, 64, "image", ("side",), until=.02),                           # the dog -> its token -> where
    Lesson(400, 64, "image", ("height",), until=.02),
    Lesson(350, 32, "image", ("box",)),
    Lesson(300, 32, "audio", ("span", "order")),                              # the dog -> its tokens -> when
    Lesson(150, 32, "audio", ("compare",), ("many",)),                        # when and when -> which of the two is longer
    Lesson(700, 64, "moment", ("sounds",), until=.03),                        # the dog, seen -> heard as well, or silent
    Lesson(400, 64, "frames", ("which",), ("one",), until=.03),               # the dog -> its token -> of which video
    Lesson(400, 32, "pair", ("which",), ("one",), until=.05),
    Lesson(400, 48, "clip", ("sounds", "shown"), until=.03),
    Lesson(400, 32, "clip", ("side", "span", "seen", "placed")),
    Lesson(150, 32, "clip", ("all", "there", "ranked", "found"), names=True), # on the left -> which thing
    Lesson(120, 32, "moment", ("placed", "both", "box"), names=True))


def gibberish(text, rng: random.Random) -> str:
    """Random tokens, to be said again: copying is all the base can learn of the words that it is never told about."""
    return text.decode([rng.randrange(len(SPECIALS), len(text)) for _ in range(rng.randint(3, 14))])


def train_read(model: ComposedModel, renderer: Renderer, practice: float, steps: int, lr: float, seed: int, log) -> None:
    """The LM learns to say what the connectors' tokens mean: the lessons, each with a little of the earlier ones, and more statements of all forms.

    practice: factor on the steps of the lessons; steps: those after the lessons.
    """
    rng, pools = random.Random(seed), {}
    model.requires_grad_(False)
    names = torch.tensor([i for thing in renderer.things for i in model.encode_text(f" {thing.label}")])

    def batch_of(step, view, kinds, count):
        if view == "text":
            return [Shown([PromptPart("text", text=line)], [], lambda forms, line=line: [line]) for line in (gibberish(model.tokenizer, rng) for _ in range(count))]
        pool = pools.setdefault((view, kinds, count), [])
        if step % 3 == 0 or not pool:                                         # encoding costs more than a step: each batch is shown about three times
            pairs = view in ("pair", "frames")
            scenes = draw(renderer, kinds, step + 10 ** 6, count, seed)
            others = zip(*(draw(renderer, kinds, step + 10 ** 6 + i, count, seed) for i in (1, 2))) if pairs else [()] * count
            pool.append(encode_all(model, [show(model, renderer, scene, rng, view, more) for scene, more in zip(scenes, others)]))
            del pool[:-8]
        return rng.choice(pool)

    def loss_of(step, new, earlier):
        """The loss of a batch of lesson `new`, or one time in four of one of the `earlier`."""
        lesson = rng.choice(earlier) if earlier and rng.random() < .25 else new
        if lesson.view:
            batch = batch_of(step, lesson.view, lesson.kinds, lesson.scenes if lesson is new else 24)
            notes, targets = [""] * len(batch), [" ".join(s.say(forms=lesson.forms)) for s in batch]
        else:
            batch = batch_of(step, *rng.choice(GENERAL), 24)
            notes, targets = zip(*(with_keywords_or_recap(s.say(), rng) for s in batch))
        prompts = [[*s.parts, PromptPart("text", text=note)] if note else s.parts for s, note in zip(batch, notes)]
        batch = model.collate(prompts, [s.media for s in batch], targets)
        if lesson.view and not lesson.names:                                  # which thing comes next is chance, and would be most of the loss
            batch["labels"][torch.isin(batch["labels"], names)] = -100
        loss, tokens = model(batch)
        loss = loss / tokens
        return loss, {"_".join((new.view or "statements", *new.forms[:1])): round(loss.item(), 3)} if lesson is new else {}

    number, began, recent = 0, 0, deque(maxlen=20)                            # of the lesson, its first step, its last losses

    def lessons(step):
        nonlocal number, began
        while step - began >= round(LESSONS[number].steps * practice) or len(recent) == 20 and sum(recent) / 20 < LESSONS[number].until:
            number, began = number + 1, step
            recent.clear()
            if number == len(LESSONS):
                return None
        loss, figures = loss_of(step, LESSONS[number], LESSONS[:number])
        recent.extend(figures.values())
        return loss, figures

    learned, slowly = [model.llm, model.time, model.number], [model.visual_qformer, model.audio_qformer]
    most = sum(round(lesson.steps * practice) for lesson in LESSONS)
    train_stage("read: lessons", learned, most + 1, lr, lessons, log, slowly, steady=1)
    train_stage("read: statements", learned, steps, lr, lambda step: loss_of(step + most + 1, STATEMENTS, LESSONS), log, slowly, steady=.3)


def complete(model: ComposedModel, batch: list[Shown], beginnings: list[str], limit: int) -> list[str]:
    """How the model goes on after the beginning of a statement about each shown scene."""
    batch = model.collate([s.parts for s in batch], [s.media for s in batch], beginnings)
    batch = {**batch, "ids": batch["ids"][:, :-1], "attention": batch["attention"][:, :-1]}                 # without the end of text
    return [text.split(".")[0].strip() for text in model.generate(batch, limit)]


def check_base(model: ComposedModel, renderer: Renderer, seed: int, count: int) -> dict:
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
        "left_or_right": ("image", many, of_one(lambda s: [o for o in shown(s) if o.position != "middle"], lambda o: f"The {o.label} is on the", lambda s, o: o.position)),
        "heard_or_silent": ("clip", many, of_one(lambda s: s.seen, lambda o: f"The {o.label} is {at_position(o.position)} and is",
                                                 lambda s, o: lambda text: text.split()[:1] == ["heard" if o.heard else "silent"])),
        "span_exact": ("audio", many, of_one(*heard, lambda s, o: during(o.heard))),
        "span_iou": ("audio", many, of_one(*heard, lambda s, o: partial(overlap, set(range(*o.heard[0]))))),
        "span_in_clip_exact": ("clip", many, of_one(*heard, lambda s, o: during(o.heard))),
        "span_in_clip_iou": ("clip", many, of_one(*heard, lambda s, o: partial(overlap, set(range(*o.heard[0]))))),
        "seen_in_clip_iou": ("clip", many, of_one(lambda s: s.seen, lambda o: f"The {o.label} is seen",
                                                  lambda s, o: partial(overlap, set(range(*o.seen[0]))))),
        "thing_on_a_side": ("clip", many, of_one(lambda s: s.seen, lambda o: f"{at_position(o.position).capitalize()} is the", lambda s, o: lambda text: text.split(",")[0] == o.label)),
        "thing_heard_first": ("clip", many, of_one(lambda s: s.heard[:1] * (unique_minimum(s.heard, ORDERS["first"]) is not None), lambda o: "Heard first is the", lambda s, o: o.label)),
        "box_iou": ("image", many, of_one(shown, lambda o: f"The {o.label} is at", lambda s, o: partial(box, mask_box(renderer.mask(s, o, IMAGE_AT)))))}
    for name, (view, kinds, ask) in checks.items():
        scenes = [renderer.scene("base", kinds[i % len(kinds)], 5 * 10 ** 8 + i, seed) for i in range(count)]
        asked = [(show(model, renderer, scene, rng, view, seen_at=IMAGE_AT), *question) for scene in scenes for question in ask(scene)]
        said = complete(model, encode_all(model, [a[0] for a in asked]), [a[1] for a in asked], 16) if asked else []
        right = [score(text) if callable(score) else text == score for text, (_, _, score) in zip(said, asked)]
        result[name] = round(sum(right) / max(1, len(right)), 3)
    model.train()
    return result
