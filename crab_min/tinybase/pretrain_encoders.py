"""Pre-training of the tiny base's encoders: two stages, each supervised through small probes.

  see    vision encoder + visual Q-Former: what is where in a picture
  hear   BEATs + audio Q-Former: which things sound in a piece of sound, and how a voice feels

The probes read the labels off the Q-Former's tokens and are thrown away afterwards. They are why a
2-million-parameter LM learns to use its media tokens in minutes: without them the connectors get no
useful gradient before the LM has learned to read their tokens (pretrain_lm.py).

Shapes: B scenes of a batch, C things of the world, Q queries, D width of the LM, S patches,
W width of an encoder, T pieces of sound, F frames of a filter bank.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from crab_min.answers import GRID, mask_box
from crab_min.backbones.composed import ComposedModel
from crab_min.beats import fbank
from crab_min.errors import ModelError
from crab_min.model import bf16_autocast
from crab_min.world.rendering import Renderer
from crab_min.world.scenes import EMOTIONS, Scene
from crab_min.world.things import SECONDS, SIZE

CELLS = 6  # of the grid of 2 rows and 3 columns laid over a frame, one query per cell
PATCHES = SIZE // 8  # patches of 8 x 8 pixels per side of a frame
TENS = GRID // 10 + 1  # the tens of a box edge: 0 to 22
PICTURES = 64  # per step of stage see
CLIPS = 24  # per step of stage hear

Figures = dict[str, float]  # what the progress bar and the log show beside the loss


# --- the loop of all stages -----------------------------------------------------------------------
class Stage:
    """One stage of pre-training: AdamW, warm-up and cosine decay, bfloat16 products, a log.

    Args:
        trained: modules and their peak learning rates.
        log: takes one dict per 50 steps.
        constant_share: the share of the steps before the rate begins to fall; 1: it never falls.
    """

    def __init__(
        self,
        name: str,
        trained: list[tuple[list[nn.Module], float]],
        steps: int,
        log: Callable,
        constant_share: float = 0,
    ):
        self.name, self.steps, self.log = name, steps, log
        groups = [{"params": unfreeze(modules), "lr": lr} for modules, lr in trained]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        factor = partial(rate_factor, steps=steps, constant_share=constant_share)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.step = 0
        self.bar = tqdm(total=steps, desc=name, unit="step")
        self.recent_losses: deque[float] = deque(maxlen=50)

    def update(self, loss_of: Callable[[int], tuple[Tensor, Figures]]) -> Figures:
        """Make one optimizer step on the loss that `loss_of` gives for the number of the step."""
        with bf16_autocast():
            loss, figures = loss_of(self.step)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()

        # report: the mean loss of the last 50 steps, the figures of the last one
        self.recent_losses.append(loss.item())
        self.step += 1
        self.bar.update()
        if self.step % 50 == 0 or self.step == self.steps:
            mean = sum(self.recent_losses) / len(self.recent_losses)
            self.bar.set_postfix(loss=f"{mean:.3f}", **figures)
            self.log({"stage": self.name, "step": self.step, "loss": round(mean, 4), **figures})
        return figures

    def run(self, loss_of: Callable[[int], tuple[Tensor, Figures]]) -> None:
        """Make all steps."""
        for _ in range(self.steps):
            self.update(loss_of)
        self.bar.close()


def rate_factor(step: int, steps: int, constant_share: float) -> float:
    """Return the factor on the peak learning rate: 100 steps of warm-up, a cosine down to 1 %."""
    decay = max(0, step / max(1, steps) - constant_share) / max(1e-9, 1 - constant_share)
    return min((step + 1) / 100, 0.51 + 0.5 * np.cos(np.pi * decay))


def unfreeze(modules: list[nn.Module]) -> list[nn.Parameter]:
    """Let some modules learn, and return their parameters."""
    parameters = []
    for module in modules:
        parameters += module.requires_grad_(True).parameters()
    return parameters


def probe(width: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 256), nn.GELU(), nn.Linear(256, outputs)
    )


# --- scenes ---------------------------------------------------------------------------------------
def sample_scenes(
    renderer: Renderer, kinds: tuple[str, ...], step: int, count: int, seed: int
) -> list[Scene]:
    """Return `count` scenes of split "base" that no other step has, their kinds taking turns."""
    scenes = []
    for i in range(count):
        scenes.append(renderer.scene("base", kinds[i % len(kinds)], step * count + i, seed))
    return scenes


def augment(media: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change brightness and noise of frames (uint8), loudness and hiss of a wave (float32).

    Files of the world are clean, those of users are not.
    """
    if media.dtype == np.uint8:
        noise = rng.normal(0, rng.uniform(0, 4), media.shape).astype(np.float32)
        brightness = np.float32(rng.normal(0, 3))
        return (media + noise + brightness).clip(0, 255).astype(np.uint8)
    noise = rng.standard_normal(media.shape, np.float32) * np.float32(rng.uniform(0, 0.003))
    loudness = np.float32(rng.uniform(0.8, 1.2))
    return media * loudness + noise


def emotion_labels(scenes: list[Scene], visible: bool = False) -> Tensor:
    """Return the index (B,) of each scene's emotion, len(EMOTIONS) where there is none.

    Args:
        visible: leave out the emotions of masked faces, which cannot be seen.
    """
    labels = torch.full((len(scenes),), len(EMOTIONS))
    for i, scene in enumerate(scenes):
        if scene.emotion and not (visible and scene.masked):
            labels[i] = EMOTIONS.index(scene.emotion)
    return labels


# --- stage see ------------------------------------------------------------------------------------
def train_see(
    model: ComposedModel, renderer: Renderer, steps: int, lr: float, seed: int, log: Callable
) -> None:
    """Train the vision encoder and the visual Q-Former on single frames.

    Query q tells which thing has its centre in cell q of the grid, and its box. All queries
    together tell the place and the emotion of a face. A cell for each query is what makes the
    Q-Former learn to look in minutes: DETR without its matching.
    """
    rng = np.random.default_rng(seed)
    probes = VisualProbes(model, len(renderer.things), len(renderer.places))

    def loss_of(step: int) -> tuple[Tensor, Figures]:
        # one frame per scene, at any time
        kinds = ("one", "many", "many", "action", "face")
        scenes = sample_scenes(renderer, kinds, step, PICTURES, seed)
        times = rng.uniform(0, SECONDS, len(scenes))
        frames = np.stack([renderer.frames(scene, [t]) for scene, t in zip(scenes, times)])
        targets = visual_targets(renderer, scenes, times)

        features = model.vision(torch.from_numpy(augment(frames, rng)))  # (B, 1, S, W)
        tokens = model.visual_qformer(features)[:, 0]  # (B, Q, D)
        return probes(features[:, 0], tokens, targets)

    trained = [model.vision, model.visual_qformer, probes]
    Stage("see", [(trained, lr)], steps, log).run(loss_of)


@dataclass
class VisualTargets:
    """Labels of B frames. Things are indices; where a cell or patch shows none, the index is C."""

    cell_thing: Tensor  # (B, Q)
    cell_box: Tensor  # (B, Q, 4), 0 to 1
    patch_thing: Tensor  # (B * S,)
    patch_box: Tensor  # (B * S, 4), the whole box of the thing that the patch shows a part of
    place: Tensor  # (B,)
    emotion: Tensor  # (B,), of a face that can be seen


def visual_targets(renderer: Renderer, scenes: list[Scene], times: np.ndarray) -> VisualTargets:
    # every cell and patch is empty at first
    no_thing, count = len(renderer.things), len(scenes)
    cell_thing = np.full((count, CELLS), no_thing)
    cell_box = np.zeros((count, CELLS, 4))
    patch_thing = np.full((count, PATCHES, PATCHES), no_thing)
    patch_box = np.zeros((count, PATCHES, PATCHES, 4))

    # things, each in the cell of its centre and in the patches that it covers
    for i, (scene, t) in enumerate(zip(scenes, times)):
        if scene.kind == "face":
            continue  # a face is no thing
        for obj in scene.objects:
            mask = renderer.mask(scene, obj, t)
            box = mask_box(mask)
            if box is None:
                continue
            cell = cell_of_box(box)
            cell_thing[i, cell], cell_box[i, cell] = obj.thing, np.array(box) / GRID
            # covered: about a third of the patch's pixels, 0 or 255 in the mask, are of the thing
            covered = mask.reshape(PATCHES, 8, PATCHES, 8).mean((1, 3)) > 80
            patch_thing[i, covered], patch_box[i, covered] = obj.thing, cell_box[i, cell]

    places = list(renderer.places)
    return VisualTargets(
        torch.from_numpy(cell_thing),
        torch.from_numpy(cell_box).float(),
        torch.from_numpy(patch_thing).flatten(),
        torch.from_numpy(patch_box).float().flatten(0, 2),
        torch.tensor([places.index(scene.place) for scene in scenes]),
        emotion_labels(scenes, visible=True),
    )


def cell_of_box(box: tuple[int, int, int, int]) -> int:
    """Return the cell that holds the centre of a box on the 224 grid, row by row."""
    x1, y1, x2, y2 = box
    row = int(y1 + y2 >= GRID)
    column = min(3 * (x1 + x2) // (2 * GRID), 2)
    return 3 * row + column


def cells_of_patches() -> Tensor:
    """Return the cell (S,) in which each patch of a frame lies."""
    steps = torch.arange(PATCHES)
    rows, columns = steps // (PATCHES // 2), steps // (PATCHES // 3)
    return (3 * rows[:, None] + columns).flatten()  # (S,)


class VisualProbes(nn.Module):
    """The probes of stage see and their losses.

    Two of them only help. `digits`: a number that can be read off linearly can be put into words.
    `patch`: the vision encoder gets a dense gradient from the first step on.
    """

    def __init__(self, model: ComposedModel, things: int, places: int):
        super().__init__()
        self.things, self.places = things, places
        queries, width = model.visual_qformer.config.queries, model.llm.config.hidden_size
        if queries != CELLS:
            raise ModelError(
                f"visual_qformer: {queries} queries; stage see needs {CELLS}, one per cell of its "
                "grid: set queries of visual_qformer in the model's config"
            )
        self.cell = probe(width, things + 1 + 4)
        self.scene = probe(queries * width, places + len(EMOTIONS) + 1)
        self.digits = nn.Linear(width, 4 * TENS)
        self.patch = nn.Linear(model.vision.width, things + 1 + 4 + queries)

    def forward(
        self, features: Tensor, tokens: Tensor, targets: VisualTargets
    ) -> tuple[Tensor, Figures]:
        """Return the loss and the figures of a batch of frames.

        Args:
            features: the vision encoder's (B, S, W).
            tokens: the Q-Former's (B, Q, D).
        """
        # what the tokens tell: each of its cell, all together of the frame
        occupied = targets.cell_thing < self.things  # (B, Q)
        thing, box = self.cell(tokens).split([self.things + 1, 4], -1)  # (B, Q, C + 1), (B, Q, 4)
        frame = self.scene(tokens.flatten(1))  # (B, places + 7)
        place, face = frame.split([self.places, len(EMOTIONS) + 1], 1)
        tens = self.digits(tokens)[occupied].unflatten(-1, (4, TENS))  # (objects, 4, TENS)

        # losses of the cells: the thing, its box, and the tens of the box in pixels
        weight = torch.tensor([2.0] * self.things + [1.0])
        box_error = (box - targets.cell_box).abs().mean(-1)[occupied].mean()
        tens_gold = ((targets.cell_box[occupied] * GRID).round() / 10).long()  # (objects, 4)
        loss = 2 * F.cross_entropy(thing.flatten(0, 1), targets.cell_thing.flatten(), weight)
        loss = loss + 10 * box_error
        loss = loss + 0.5 * F.cross_entropy(tens.flatten(0, 1), tens_gold.flatten())

        # losses of the frame and of the patches
        loss = loss + 0.3 * F.cross_entropy(place, targets.place)
        loss = loss + F.cross_entropy(face, targets.emotion)
        loss = self.add_patch_losses(loss, features, targets)

        found = (thing.argmax(-1) == targets.cell_thing)[occupied].float().mean()
        face_right = (face.argmax(1) == targets.emotion).float().mean()
        figures = {
            "found": round(found.item(), 2),
            "box_off": round(GRID * box_error.item(), 1),
            "face": round(face_right.item(), 2),
        }
        return loss, figures

    def add_patch_losses(self, loss: Tensor, features: Tensor, targets: VisualTargets) -> Tensor:
        """Add the losses of what a patch shows, the box of this thing, and the patch's own cell."""
        sizes = [self.things + 1, 4, CELLS]
        thing, box, cell = self.patch(features).flatten(0, 1).split(sizes, 1)  # (B * S, ...) each
        weight = torch.ones(self.things + 1)
        weight[: self.things] = 10  # nine patches in ten show no thing
        loss = loss + F.cross_entropy(thing, targets.patch_thing, weight)
        shows_thing = targets.patch_thing < self.things  # (B * S,)
        loss = loss + 10 * (box - targets.patch_box).abs().mean(-1)[shows_thing].mean()
        cell_gold = cells_of_patches().repeat(len(features))  # (B * S,)
        return loss + 0.3 * F.cross_entropy(cell, cell_gold)


# --- stage hear -----------------------------------------------------------------------------------
def train_hear(
    model: ComposedModel, renderer: Renderer, steps: int, lr: float, seed: int, log: Callable
) -> None:
    """Train BEATs and the audio Q-Former on sound tracks.

    For each piece of one or two seconds the tokens tell which things sound in it, and the emotion
    of a voice.
    """
    things, rng = len(renderer.things), np.random.default_rng(seed)
    width = model.audio_qformer.config.queries * model.llm.config.hidden_size
    head = probe(width, things + len(EMOTIONS) + 1)

    def loss_of(step: int) -> tuple[Tensor, Figures]:
        # sound tracks, and what sounds in each of their pieces
        seconds = 2 if step % 3 == 2 else 1  # per piece
        kinds = ("one", "many", "many", "action", "face", "face")
        scenes = sample_scenes(renderer, kinds, step, CLIPS, seed)
        sounding = torch.stack([sounding_things(scene, things, seconds) for scene in scenes])
        waves = np.stack([augment(renderer.wave(scene), rng) for scene in scenes])

        # what the tokens of a piece tell
        banks = fbank_pieces(waves, seconds).flatten(0, 1)  # (B * T, F, 128)
        features, _ = model.audio.beats(banks)  # (B * T, 48 or 96, W)
        tokens = model.audio_qformer(features[:, None])  # (B * T, 1, Q, D)
        out = head(tokens.flatten(1)).unflatten(0, (CLIPS, -1))  # (B, T, C + 7)
        thing, voice = out.split([things, len(EMOTIONS) + 1], -1)

        voice_gold = emotion_labels(scenes)[:, None].expand(-1, thing.shape[1])  # (B, T)
        loss = F.binary_cross_entropy_with_logits(thing, sounding) * 5
        loss = loss + F.cross_entropy(voice.flatten(0, 1), voice_gold.flatten())

        # shares of pieces with all things right, and of voices
        all_right = ((thing > 0) == (sounding > 0)).all(-1)  # (B, T)
        is_voice = voice_gold[:, 0] < len(EMOTIONS)  # (B,)
        voice_right = (voice.argmax(-1) == voice_gold)[is_voice]
        figures = {
            "all_heard": round(all_right.float().mean().item(), 2),
            "voice": round(voice_right.float().mean().item(), 2),
        }
        return loss, figures

    trained = [model.audio, model.audio_qformer, head]
    Stage("hear", [(trained, lr)], steps, log).run(loss_of)


def sounding_things(scene: Scene, things: int, seconds: int) -> Tensor:
    """Return which things sound in each piece of `seconds` s of a scene: 0 or 1, (T, C)."""
    sounding = torch.zeros(SECONDS // seconds, things)
    for obj in scene.objects:
        if scene.kind == "face":
            continue  # a voice is no thing
        for second in range(SECONDS):
            if obj.heard_at(second):
                sounding[second // seconds, obj.thing] = 1
    return sounding


def fbank_pieces(waves: np.ndarray, seconds: int = 1) -> Tensor:
    """Cut the filter banks of 10-second waves (B, N) into pieces of `seconds` s: (B, T, F, 128).

    A frame of the bank reaches 25 ms ahead; a piece leaves out the frames that would reach over its
    end.
    """
    bank = fbank(torch.from_numpy(waves))  # (B, 998, 128): 100 frames per second
    length = 100 * seconds
    starts = range(0, 100 * SECONDS, length)
    return torch.stack([bank[:, start : start + length - 2] for start in starts], 1)
