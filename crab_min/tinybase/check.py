"""Check of the finished tiny base: how well it completes the beginning of a statement.

The scenes are of split "base" but were in no stage of its training. A figure is a share of right
completions, or a mean intersection over union of boxes or of seconds.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from crab_min.answers import mask_box
from crab_min.backbones.composed import ComposedModel
from crab_min.evaluation.metrics import iou
from crab_min.tinybase.examples import Example, encode_examples, make_example
from crab_min.world.clauses import ORDERS, at_position, during, unique_minimum
from crab_min.world.rendering import Renderer
from crab_min.world.scenes import Object, Scene, Span

FRAME_AT = 4.5  # second of the frame


@dataclass
class Completion:
    """The beginning of a statement, and how the rest of it is scored."""

    beginning: str
    gold: object
    score: Callable[[str, object], float]  # (text of the model, gold) -> 0 to 1


# --- scores ---------------------------------------------------------------------------------------
def exact(text: str, gold: str) -> bool:
    return text == gold


def first_word(text: str, gold: str) -> bool:
    return text.split()[:1] == [gold]


def before_comma(text: str, gold: str) -> bool:
    return text.split(",")[0] == gold


def span_iou(text: str, gold: Span) -> float:
    """Return the intersection over union of "from 2 to 7" and a span, in seconds."""
    numbers = numbers_in(text)
    predicted = set(range(*numbers)) if len(numbers) == 2 else set()
    seconds = set(range(*gold))
    return len(predicted & seconds) / len(predicted | seconds)


def box_iou(text: str, gold: tuple) -> float:
    """Return the intersection over union of "10 20 60 80" and a box."""
    numbers = numbers_in(text)
    return iou(numbers, gold) if len(numbers) == 4 else 0


def numbers_in(text: str) -> list[int]:
    return [int(word) for word in text.split() if word.isdigit()]


# --- completions: one about the first object that suits, none where no object does ----------------
def place(renderer: Renderer, scene: Scene) -> list[Completion]:
    return [Completion("The place is", scene.place, exact)]


def emotion(renderer: Renderer, scene: Scene) -> list[Completion]:
    return [Completion("The person feels", scene.emotion, exact)]


def movement(renderer: Renderer, scene: Scene) -> list[Completion]:
    return [Completion("The movement is", scene.movement, exact)]


def left_or_right(renderer: Renderer, scene: Scene) -> list[Completion]:
    objects = [obj for obj in seen_in_frame(scene) if obj.position != "middle"]
    return [Completion(f"The {obj.label} is on the", obj.position, exact) for obj in objects[:1]]


def box(renderer: Renderer, scene: Scene) -> list[Completion]:
    completions = []
    for obj in seen_in_frame(scene)[:1]:
        gold = mask_box(renderer.mask(scene, obj, FRAME_AT))
        completions.append(Completion(f"The {obj.label} is at", gold, box_iou))
    return completions


def seen_in_frame(scene: Scene) -> list[Object]:
    return [obj for obj in scene.seen if obj.seen_at(FRAME_AT)]


def heard_or_silent(renderer: Renderer, scene: Scene) -> list[Completion]:
    completions = []
    for obj in scene.seen[:1]:
        beginning = f"The {obj.label} is {at_position(obj.position)} and is"
        gold = "heard" if obj.heard else "silent"
        completions.append(Completion(beginning, gold, first_word))
    return completions


def thing_at_position(renderer: Renderer, scene: Scene) -> list[Completion]:
    completions = []
    for obj in scene.seen[:1]:
        beginning = f"{at_position(obj.position).capitalize()} is the"
        completions.append(Completion(beginning, obj.label, before_comma))
    return completions


def span_seen(renderer: Renderer, scene: Scene) -> list[Completion]:
    return [Completion(f"The {o.label} is seen", o.seen[0], span_iou) for o in scene.seen[:1]]


def span_heard(renderer: Renderer, scene: Scene) -> list[Completion]:
    return [Completion(f"The {o.label} is heard", o.heard[0], span_iou) for o in scene.heard[:1]]


def span_text(renderer: Renderer, scene: Scene) -> list[Completion]:
    return [Completion(f"The {o.label} is heard", during(o.heard), exact) for o in scene.heard[:1]]


def heard_first(renderer: Renderer, scene: Scene) -> list[Completion]:
    first = unique_minimum(scene.heard, ORDERS["first"])
    return [Completion("Heard first is the", first.label, exact)] if first else []


# --- the checks -----------------------------------------------------------------------------------
@dataclass
class Check:
    """One figure of base.json."""

    name: str
    view: str  # see make_example
    completions: Callable[[Renderer, Scene], list[Completion]]
    kinds: tuple[str, ...] = ("one", "many")  # of scenes


CHECKS = (
    Check("place", "clip", place),
    Check("emotion", "clip", emotion, kinds=("face",)),
    Check("movement", "clip", movement, kinds=("action",)),
    Check("left_or_right", "image", left_or_right),
    Check("heard_or_silent", "clip", heard_or_silent),
    Check("span_exact", "audio", span_text),
    Check("span_iou", "audio", span_heard),
    Check("span_in_clip_exact", "clip", span_text),
    Check("span_in_clip_iou", "clip", span_heard),
    Check("seen_in_clip_iou", "clip", span_seen),
    Check("thing_on_a_side", "clip", thing_at_position),
    Check("thing_heard_first", "clip", heard_first),
    Check("box_iou", "image", box),
)


def check_base(model: ComposedModel, renderer: Renderer, seed: int, count: int) -> dict[str, float]:
    """Return the figure of each check, by name, over `count` scenes per check."""
    model.eval()
    rng, figures = random.Random(seed), {}
    for check in CHECKS:
        examples, completions = [], []
        for i in range(count):
            kind = check.kinds[i % len(check.kinds)]
            scene = renderer.scene("base", kind, 5 * 10**8 + i, seed)
            for completion in check.completions(renderer, scene):
                examples.append(make_example(renderer, [scene], rng, check.view, FRAME_AT))
                completions.append(completion)
        figures[check.name] = round(mean_score(model, examples, completions), 3)
    model.train()
    return figures


def mean_score(
    model: ComposedModel, examples: list[Example], completions: list[Completion]
) -> float:
    """Let the model complete the beginnings and return its mean score, 0 where there are none."""
    if not completions:
        return 0.0

    # each beginning stands where the target stands in training, without its end of text
    encode_examples(model, examples)
    prompts = [example.parts for example in examples]
    media = [example.media for example in examples]
    batch = model.collate(prompts, media, [completion.beginning for completion in completions])
    batch = replace(batch, ids=batch.ids[:, :-1], attention=batch.attention[:, :-1])

    # the rest of each statement, up to the full stop
    total = 0.0
    for text, completion in zip(model.generate(batch, 16), completions):
        rest = text.split(".")[0].strip()
        total += completion.score(rest, completion.gold)
    return total / len(completions)
