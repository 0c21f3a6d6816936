"""Pre-training of the tiny base's LM: it learns to state what the connectors' tokens show.

The curriculum has four parts: copying random words; statements of all forms (captions.py); lessons
that look things up by name, one or two forms at a time ("The dog is on the left. The cat is in the
middle."), each until it is learned; and statements of all forms again. Half of the time statements
of all forms have keywords in the prompt, or are repeated in short, so that the LM learns to look at
words, not only at media.

Without the lessons the LM learned what is on the left, where a look at one place is enough, but not
where the dog is. Without statements of all forms before the lessons it did not learn that either
(assets/README.md).
"""

import random
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from crab_min.backbones.composed import ComposedModel
from crab_min.interface import PromptPart
from crab_min.tinybase.captions import with_keywords_or_recap
from crab_min.tinybase.examples import Example, encode_examples, make_copy_example, make_example
from crab_min.tinybase.pretrain_encoders import Figures, Stage, sample_scenes
from crab_min.world.rendering import Renderer


# --- the lessons ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Lesson:
    """Statements of one form about each thing that is shown, in any order, and nothing else."""

    steps: int  # at most
    scenes: int  # per step
    view: str  # see make_example; "text": random words to copy; "": statements of all forms
    forms: tuple[str, ...] = ()  # see captions.py; each example takes one of them
    kinds: tuple[str, ...] = ("one", "many", "many")  # of scenes
    names: bool = False  # names of things are looked up too, so their tokens count in the loss
    until: float = 0  # loss per token at which the lesson is learned and the next one begins


STATEMENTS = Lesson(steps=0, scenes=24, view="")
# Views and kinds of scenes for statements of all forms; copies make one likelier.
MIXTURE = [
    *[("", ("one", "many", "many"))] * 4,
    ("pair", ("one",)),
    ("", ("action",)),
    ("", ("face",)),
]

# A small LM discovers a lookup only where nothing else is to be learned, where a step has many
# examples, and after statements of all forms, perhaps because it must know first what its tokens
# are called. It keeps a lookup as long as it is practised.
# fmt: off
LESSONS = (
    Lesson(700, 64, "text", names=True),                             # copying
    replace(STATEMENTS, steps=2500),
    Lesson(150, 64, "image", ("place",), until=0.02),
    Lesson(100, 32, "clip", ("movement",), ("action",)),
    Lesson(100, 64, "image", ("there",), names=True),                # a side -> the thing there
    Lesson(800, 64, "image", ("side",), until=0.02),                 # a thing -> its side
    Lesson(400, 64, "image", ("height",), until=0.02),
    Lesson(350, 32, "image", ("box",)),
    Lesson(300, 32, "audio", ("span", "order")),                     # a thing -> its seconds
    Lesson(150, 32, "audio", ("compare",), ("many",)),               # two spans -> the longer one
    Lesson(700, 64, "moment", ("sounds",), until=0.03),              # a thing seen -> heard, silent
    Lesson(400, 64, "frames", ("which",), ("one",), until=0.03),     # a thing -> its video
    Lesson(400, 32, "pair", ("which",), ("one",), until=0.05),
    Lesson(400, 48, "clip", ("sounds", "shown"), until=0.03),
    Lesson(400, 32, "clip", ("side", "span", "seen", "placed")),
    Lesson(150, 32, "clip", ("all", "there", "ranked", "found"), names=True),
    Lesson(120, 32, "moment", ("placed", "both", "box"), names=True),
)
# fmt: on


# --- the stage ------------------------------------------------------------------------------------
def train_read(
    model: ComposedModel,
    renderer: Renderer,
    practice: float,
    steps: int,
    lr: float,
    seed: int,
    log: Callable,
) -> None:
    """Train the LM on the lessons and then on statements of all forms.

    The connectors learn too, at a fifth of the learning rate.

    Args:
        practice: factor on the steps of the lessons.
        steps: number of steps after the lessons.
    """
    model.requires_grad_(False)
    trained = [
        ([model.llm, model.time, model.number], lr),
        ([model.visual_qformer, model.audio_qformer], lr / 5),
    ]
    curriculum = Curriculum(model, renderer, seed)

    # each lesson, until its steps are made or its loss is reached
    limit = 1 + sum(round(lesson.steps * practice) for lesson in LESSONS)
    stage = Stage("read: lessons", trained, limit, log, constant_share=1)
    for number, lesson in enumerate(LESSONS):
        loss_of = partial(curriculum.loss, lesson=lesson, earlier=LESSONS[:number])
        recent_losses: deque[float] = deque(maxlen=20)
        for _ in range(round(lesson.steps * practice)):
            recent_losses.extend(stage.update(loss_of).values())
            if len(recent_losses) == 20 and sum(recent_losses) / 20 < lesson.until:
                break
    stage.bar.close()

    # statements of all forms; beginning at step `limit`, so that no lesson had the same scenes
    stage = Stage("read: statements", trained, steps, log, constant_share=0.3)
    stage.run(lambda step: curriculum.loss(limit + step, STATEMENTS, LESSONS))


class Curriculum:
    """Batches of examples, and the LM's loss on statements about them."""

    def __init__(self, model: ComposedModel, renderer: Renderer, seed: int):
        self.model, self.renderer, self.seed = model, renderer, seed
        self.rng = random.Random(seed)
        self.pools: dict[tuple, list[list[Example]]] = defaultdict(list)  # recent batches
        name_ids = []
        for thing in renderer.things:
            name_ids += model.encode_text(f" {thing.label}")
        self.name_ids = torch.tensor(name_ids)

    def loss(
        self, step: int, lesson: Lesson, earlier: tuple[Lesson, ...]
    ) -> tuple[Tensor, Figures]:
        """Return the loss per token of a batch of `lesson`, one time in four of an earlier one.

        The figures are the loss under the name of the lesson; there are none for an earlier one.
        """
        practised, count = lesson, lesson.scenes
        if earlier and self.rng.random() < 0.25:
            practised, count = self.rng.choice(earlier), STATEMENTS.scenes
        view, kinds = practised.view, practised.kinds
        if not view:
            (view, kinds), count = self.rng.choice(MIXTURE), STATEMENTS.scenes
        examples = self.batch(step, view, kinds, count)

        prompts, targets = [], []
        for example in examples:
            prompt_end, target = self.sample_target(example, practised)
            prompts.append(example.parts + prompt_end)
            targets.append(target)
        batch = self.model.collate(prompts, [example.media for example in examples], targets)
        # which thing comes next is chance, and names would be most of the loss of a lesson
        if practised.view and not practised.names:
            batch.labels[torch.isin(batch.labels, self.name_ids)] = -100

        loss = self.model(batch) / batch.answer_tokens
        if practised is not lesson:
            return loss, {}
        name = "_".join((lesson.view or "statements", *lesson.forms[:1]))
        return loss, {name: round(loss.item(), 3)}

    def sample_target(self, example: Example, lesson: Lesson) -> tuple[list[PromptPart], str]:
        """Sample statements about an example: (what they add to the prompt, the target)."""
        if lesson.view:
            return [], " ".join(example.sample_statements(forms=lesson.forms))
        keywords, target = with_keywords_or_recap(example.sample_statements(), self.rng)
        return [PromptPart("text", text=keywords)] if keywords else [], target

    def batch(self, step: int, view: str, kinds: tuple[str, ...], count: int) -> list[Example]:
        """Return a batch of encoded examples.

        Encoding costs more than a step of the LM, so each batch is used about three times. The
        statements about it are sampled anew every time.
        """
        if view == "text":
            return [make_copy_example(self.model.tokenizer, self.rng) for _ in range(count)]
        pool = self.pools[view, kinds, count]
        if step % 3 == 0 or not pool:
            pool.append(self.new_batch(step, view, kinds, count))
            del pool[:-8]
        return self.rng.choice(pool)

    def new_batch(self, step: int, view: str, kinds: tuple[str, ...], count: int) -> list[Example]:
        # scenes that the encoders were not trained on, three per example where a view takes three
        per_example = 3 if view in ("pair", "frames") else 1
        columns = []
        for i in range(per_example):
            columns.append(sample_scenes(self.renderer, kinds, step + 10**6 + i, count, self.seed))
        examples = []
        for scenes in zip(*columns):
            examples.append(make_example(self.renderer, list(scenes), self.rng, view))
        encode_examples(self.model, examples)
        return examples
