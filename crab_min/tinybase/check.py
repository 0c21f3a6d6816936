"""A check of the finished tiny base: its completions of the beginning of a clause.

The scenes are of split "base" but were in no stage of its training. A figure is a share of right
completions, or a mean intersection over union of boxes or of seconds.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from crab_min.backbones.composed import ComposedModel
from crab_min.evaluation.metrics import iou
from crab_min.tinybase.captions import scene_facts
from crab_min.tinybase.examples import Example, encode_examples, make_example
from crab_min.world.rendering import Renderer
from crab_min.world.scenes import Scene
from crab_min.world.things import SECONDS

FRAME_AT = 4.5  # second of the frame


# --- scores of a completion, 0 to 1 ---------------------------------------------------------------
def exact(text: str, gold: str) -> bool:
    return text == gold


def first_word(text: str, gold: str) -> bool:
    return text.split()[:1] == [gold]


def before_comma(text: str, gold: str) -> bool:
    return text.split(",")[0] == gold


def span_iou(text: str, gold: str) -> float:
    """Return the intersection over union of "from 2 to 7" and another span."""
    numbers = numbers_in(text)
    predicted = set(range(*numbers)) if len(numbers) == 2 else set()
    seconds = set(range(*numbers_in(gold)))
    return len(predicted & seconds) / len(predicted | seconds)


def box_iou(text: str, gold: str) -> float:
    """Return the intersection over union of "10 20 60 80" and another box."""
    numbers = numbers_in(text)
    return iou(numbers, numbers_in(gold)) if len(numbers) == 4 else 0


def numbers_in(text: str) -> list[int]:
    return [int(word) for word in text.split() if word.isdigit()]


# --- the checks -----------------------------------------------------------------------------------
@dataclass
class Check:
    """One figure of base.json.

    The first clause of a scene (captions.py) that the pattern matches is completed: its first group
    is given, its second one is the gold completion. A scene without such a clause is left out.
    """

    view: str  # a key of SHOWN
    pattern: str
    score: Callable[[str, str], float] = exact
    kinds: tuple[str, ...] = ("one", "many")  # of scenes


# view of make_example -> what it shows, as arguments of scene_facts
SHOWN = {
    "image": {"frame_at": FRAME_AT},
    "audio": {"video": False, "audio": range(SECONDS)},
    "clip": {"audio": range(SECONDS)},
}
HEARD = r"(the \w+ is heard) (from \d+ to \d+)"
CHECKS = {
    "place": Check("clip", r"(the place is) (\w+)"),
    "emotion": Check("clip", r"(the person feels) (\w+)", kinds=("face",)),
    "movement": Check("clip", r"(the movement is) (\w+)", kinds=("action",)),
    "left_or_right": Check("image", r"(the \w+ is on the) (left|right)"),
    "heard_or_silent": Check("clip", r"(the \w+ is .+ and is) (heard|silent).*", first_word),
    "span_exact": Check("audio", HEARD),
    "span_iou": Check("audio", HEARD, span_iou),
    "span_in_clip_exact": Check("clip", HEARD),
    "span_in_clip_iou": Check("clip", HEARD, span_iou),
    "seen_in_clip_iou": Check("clip", r"(the \w+ is seen) (from \d+ to \d+)", span_iou),
    "thing_on_a_side": Check("clip", r"((?:on|in) the \w+ is the) (\w+)", before_comma),
    "thing_heard_first": Check("clip", r"(heard first is the) (\w+)"),
    "box_iou": Check("image", r"(the \w+ is at) ([\d ]+)", box_iou),
}


def check_base(model: ComposedModel, renderer: Renderer, seed: int, count: int) -> dict[str, float]:
    """Return the figure of each check, by name, over `count` scenes per check."""
    model.eval()
    rng, figures = random.Random(seed), {}
    for name, check in CHECKS.items():
        examples, clauses = [], []
        for i in range(count):
            kind = check.kinds[i % len(check.kinds)]
            scene = renderer.scene("base", kind, 5 * 10**8 + i, seed)
            clause = first_match(renderer, scene, check)
            if clause:
                examples.append(make_example(renderer, [scene], rng, check.view, FRAME_AT))
                clauses.append(clause)
        figures[name] = round(mean_score(model, examples, clauses, check.score), 3)
    return figures


def first_match(renderer: Renderer, scene: Scene, check: Check) -> re.Match | None:
    """Return the match of the first clause that a check is about."""
    for group in scene_facts(renderer, scene, random.Random(0), **SHOWN[check.view]):
        for clauses in group.values():
            for clause in clauses:
                if match := re.fullmatch(check.pattern, clause):
                    return match
    return None


def mean_score(
    model: ComposedModel, examples: list[Example], clauses: list[re.Match], score: Callable
) -> float:
    """Let the model complete the clauses and return its mean score.

    It is 0 where there are none.
    """
    if not clauses:
        return 0.0

    # each beginning stands where the target stands in training, without its end of text
    encode_examples(model, examples)
    prompts = [example.parts for example in examples]
    media = [example.media for example in examples]
    batch = model.collate(prompts, media, [clause[1].capitalize() for clause in clauses])
    batch = replace(batch, ids=batch.ids[:, :-1], attention=batch.attention[:, :-1])

    # the rest of each statement, up to the full stop
    texts = [text.split(".")[0].strip() for text in model.generate(batch, 16)]
    return sum(score(text, clause[2]) for text, clause in zip(texts, clauses)) / len(clauses)
