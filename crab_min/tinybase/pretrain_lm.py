"""Pre-training of the tiny base's LM.

It learns to state what the connectors' tokens show.

The curriculum has four parts: copying random words; statements of all forms (captions.py); lessons
that look things up by name, one or two forms at a time ("The dog is on the left. The cat is in the
middle."), each until it is learned; and statements of all forms again. Half of the time statements
of all forms have keywords in the prompt, or are repeated in short, so that the LM learns to look at
words, not only at media.

Without the lessons the LM learned what is on the left, where a look at one place is enough, but not
where the dog is. Without statements of all forms before the lessons it did not learn that either
(assets/README.md).
"""

import itertools
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crab_min.backbones.composed import ComposedModel
from crab_min.config import BaseConfig
from crab_min.devices import bf16_autocast
from crab_min.interface import PromptPart
from crab_min.model import NO_LABEL
from crab_min.tinybase.captions import with_keywords_or_recap
from crab_min.tinybase.examples import Example, encode_examples, make_copy_example, make_example
from crab_min.tinybase.pretrain_encoders import Figures, sample_scenes, train_stage
from crab_min.world.rendering import Renderer


# --- the lessons ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Lesson:
    """Statements of one form about each thing that is shown.

    They are in any order, and there is nothing else.
    """

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
def train_read(model: ComposedModel, renderer: Renderer, config: BaseConfig, log: Callable) -> None:
    """Train the LM on the lessons and then on statements of all forms.

    The connectors learn too, at a fifth of the learning rate.
    """
    model.requires_grad_(False)
    trained = [
        ([model.llm, model.time, model.number], config.read_lr),
        ([model.visual_qformer, model.audio_qformer], config.read_lr / 5),
    ]
    curriculum = Curriculum(model, renderer, config.seed)

    # the lessons
    limit = 1 + sum(round(lesson.steps * config.practice) for lesson in LESSONS)
    losses = curriculum.lesson_losses(config.practice)
    train_stage("read: lessons", trained, losses, limit, log, constant_share=1)

    # statements of all forms; beginning at step `limit`, so that no lesson had the same scenes
    steps = config.read_steps
    losses = (curriculum.loss(limit + step, STATEMENTS, LESSONS) for step in range(steps))
    train_stage("read: statements", trained, losses, steps, log, constant_share=0.3)


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

    def lesson_losses(self, practice: float) -> Iterator[tuple[Tensor, Figures]]:
        """Yield the losses of each lesson, until its steps or its loss are reached."""
        steps = itertools.count()
        for number, lesson in enumerate(LESSONS):
            recent_losses: deque[float] = deque(maxlen=20)
            for _ in range(round(lesson.steps * practice)):
                loss, figures = self.loss(next(steps), lesson, LESSONS[:number])
                yield loss, figures
                recent_losses.extend(figures.values())
                if len(recent_losses) == 20 and sum(recent_losses) / 20 < lesson.until:
                    break

    @bf16_autocast(torch.device("cpu"))
    def loss(
        self, step: int, lesson: Lesson, earlier: tuple[Lesson, ...]
    ) -> tuple[Tensor, Figures]:
        """Return the loss per token of a batch of `lesson`.

        One time in four the batch is of an earlier lesson. The figures are the loss under the name
        of the lesson; there are none for an earlier one.
        """
        # the lesson itself or an earlier one, and the examples that it practises on
        practised, count = lesson, lesson.scenes
        if earlier and self.rng.random() < 0.25:
            practised, count = self.rng.choice(earlier), STATEMENTS.scenes
        view, kinds = practised.view, practised.kinds
        if not view:
            (view, kinds), count = self.rng.choice(MIXTURE), STATEMENTS.scenes
        examples = self.batch(step, view, kinds, count)

        # statements about them
        prompts, targets = [], []
        for example in examples:
            statements = example.sample_statements(forms=practised.forms)
            prompt_end, target = "", " ".join(statements)
            if not practised.view:
                prompt_end, target = with_keywords_or_recap(statements, self.rng)
            prompts.append([*example.parts, PromptPart("text", text=prompt_end)])
            targets.append(target)
        batch = self.model.collate(prompts, [example.media for example in examples], targets)

        # which thing comes next is chance, and names would be most of the loss of a lesson
        if practised.view and not practised.names:
            batch.labels[torch.isin(batch.labels, self.name_ids)] = NO_LABEL
        loss = self.model(batch) / batch.answer_tokens
        if practised is not lesson:
            return loss, {}
        name = "_".join((lesson.view or "statements", *lesson.forms[:1]))
        return loss, {name: round(loss.item(), 3)}

    def batch(self, step: int, view: str, kinds: tuple[str, ...], count: int) -> list[Example]:
        """Return a batch of encoded examples.

        Encoding costs more than a step of the LM, so each batch is used about three times. The
        statements about it are sampled anew every time.
        """
        if view == "text":
            return [make_copy_example(self.model.tokenizer, self.rng) for _ in range(count)]
        pool = self.pools[view, kinds, count]
        if step % 3 == 0 or not pool:
            # scenes that the encoders were not trained on, three per example in some views
            per_example = 3 if view in ("pair", "frames") else 1
            columns = []
            for first in range(step + 10**6, step + 10**6 + per_example):
                columns.append(sample_scenes(self.renderer, kinds, first, count, self.seed))
            rows = zip(*columns)
            examples = [make_example(self.renderer, scenes, self.rng, view) for scenes in rows]
            encode_examples(self.model, examples)
            pool.append(examples)
            del pool[:-8]
        return self.rng.choice(pool)
