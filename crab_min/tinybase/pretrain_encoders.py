"""Pre-training of the tiny base's encoders in two stages.

Each stage is supervised through small probes.

  see    vision encoder + visual Q-Former: what is where in a picture
  hear   BEATs + audio Q-Former: which things sound in a piece of sound, and how a voice feels

The probes read the labels off the Q-Former's tokens and are thrown away afterwards. They are why a
2-million-parameter LM learns to use its media tokens in minutes: without them the connectors get no
useful gradient before the LM has learned to read their tokens (pretrain_lm.py).

Shapes: B scenes of a batch, C things of the world, Q queries, D width of the LM, S patches,
W width of an encoder, T pieces of sound, N samples of a piece.
"""

from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from crab_min.answers import GRID, mask_box
from crab_min.backbones.composed import ComposedModel
from crab_min.config import BaseConfig
from crab_min.devices import bf16_autocast
from crab_min.errors import RunError
from crab_min.world.rendering import Renderer
from crab_min.world.scenes import EMOTIONS, Scene
from crab_min.world.things import RATE, SECONDS, SIZE

CELLS = 6  # of the grid of 2 rows and 3 columns laid over a frame, one query per cell, row by row
PATCHES = SIZE // 8  # patches of 8 x 8 pixels per side of a frame
# the cell (S,) in which each patch lies
ROWS, COLUMNS = torch.arange(PATCHES) // (PATCHES // 2), torch.arange(PATCHES) // (PATCHES // 3)
CELL_OF_PATCH = (3 * ROWS[:, None] + COLUMNS).flatten()
TENS = GRID // 10 + 1  # the tens of a box edge: 0 to 22
PICTURES = 64  # per step of stage see
CLIPS = 24  # per step of stage hear

# what the progress bar and the log show beside the loss
Figures = dict[str, float | Tensor]


# --- the loop of all stages -----------------------------------------------------------------------
def train_stage(
    name: str,
    trained: list[tuple[list[nn.Module], float]],
    losses: Iterable[tuple[Tensor, Figures]],
    steps: int,
    log: Callable,
    constant_share: float = 0,
) -> None:
    """Train some modules: AdamW, warm-up and cosine decay, a log.

    Args:
        trained: modules and their peak learning rates.
        losses: the loss of each step and its figures, computed when they are asked for.
        steps: the span of the schedule; the losses may end before.
        log: takes one dict per 50 steps.
        constant_share: the share of the steps before the rate begins to fall; 1: it never falls.
    """
    # what learns
    groups = []
    for modules, lr in trained:
        learning = nn.ModuleList(modules).requires_grad_(True)
        groups.append({"params": list(learning.parameters()), "lr": lr})
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)

    def rate_factor(step: int) -> float:
        # 100 steps of warm-up, a constant rate, a cosine down to 1 %
        decay = max(0, step / max(1, steps) - constant_share) / max(1e-9, 1 - constant_share)
        return min((step + 1) / 100, 0.51 + 0.5 * np.cos(np.pi * decay))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor)
    recent_losses: deque[float] = deque(maxlen=50)
    with tqdm(total=steps, desc=name, unit="step") as bar:
        for step, (loss, figures) in enumerate(losses, 1):
            # learn
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            if not norm.isfinite():
                raise RunError(f"{name}, step {step}: the norm of the gradient is {norm}")
            optimizer.step()
            schedule.step()

            # report: the mean loss of the last 50 steps, the figures of the last one
            recent_losses.append(loss.item())
            bar.update()
            if step % 50 == 0 or step == steps:
                means = {"loss": sum(recent_losses) / len(recent_losses)}
                numbers = {key: round(float(value), 4) for key, value in (means | figures).items()}
                bar.set_postfix(numbers)
                log({"stage": name, "step": step, **numbers})


def probe(width: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 256), nn.GELU(), nn.Linear(256, outputs)
    )


# --- scenes ---------------------------------------------------------------------------------------
def sample_scenes(
    renderer: Renderer, kinds: tuple[str, ...], step: int, count: int, seed: int
) -> list[Scene]:
    """Return `count` scenes of split "base" that no other step has.

    Their kinds take turns.
    """
    scenes = []
    for i in range(count):
        scenes.append(renderer.scene("base", kinds[i % len(kinds)], step * count + i, seed))
    return scenes


def augment(media: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change frames (uint8) or a wave (float32).

    Frames change in brightness and noise, the wave in loudness and hiss. Files of the world are
    clean, those of users are not.
    """
    if media.dtype == np.uint8:
        noise = rng.normal(0, rng.uniform(0, 4), media.shape).astype(np.float32)
        brightness = np.float32(rng.normal(0, 3))
        return (media + noise + brightness).clip(0, 255).astype(np.uint8)
    noise = rng.standard_normal(media.shape, np.float32) * np.float32(rng.uniform(0, 0.003))
    loudness = np.float32(rng.uniform(0.8, 1.2))
    return media * loudness + noise


def emotion_labels(scenes: list[Scene], visible: bool = False) -> Tensor:
    """Return the index (B,) of each scene's emotion.

    It is len(EMOTIONS) where there is none.

    Args:
        visible: leave out the emotions of masked faces, which cannot be seen.
    """
    labels = torch.full((len(scenes),), len(EMOTIONS))
    for i, scene in enumerate(scenes):
        if scene.emotion and not (visible and scene.masked):
            labels[i] = EMOTIONS.index(scene.emotion)
    return labels


# --- stage see ------------------------------------------------------------------------------------
def train_see(model: ComposedModel, renderer: Renderer, config: BaseConfig, log: Callable) -> None:
    """Train the vision encoder and the visual Q-Former on single frames.

    Query q tells which thing has its centre in cell q of the grid, and its box. All queries
    together tell the place and the emotion of a face. A cell for each query is what makes the
    Q-Former learn to look in minutes: DETR without its matching.
    """
    rng = np.random.default_rng(config.seed)
    probes = VisualProbes(model, len(renderer.things), len(renderer.places))

    @bf16_autocast(torch.device("cpu"))
    def loss_of(step: int) -> tuple[Tensor, Figures]:
        # one frame per scene, at any time
        kinds = ("one", "many", "many", "action", "face")
        scenes = sample_scenes(renderer, kinds, step, PICTURES, config.seed)
        times = rng.uniform(0, SECONDS, len(scenes))
        frames = np.stack([renderer.frames(scene, [t]) for scene, t in zip(scenes, times)])
        targets = visual_targets(renderer, scenes, times)

        features = model.vision(torch.from_numpy(augment(frames, rng)))  # (B, 1, S, W)
        tokens = model.visual_qformer(features)[:, 0]  # (B, Q, D)
        return probes(features[:, 0], tokens, targets)

    trained = [model.vision, model.visual_qformer, probes]
    losses = map(loss_of, range(config.see_steps))
    train_stage("see", [(trained, config.base_lr)], losses, config.see_steps, log)


def visual_targets(
    renderer: Renderer, scenes: list[Scene], times: np.ndarray
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what B frames show: cells, then patches, then the frames as a whole.

    Returns:
        The index of the thing (B, Q + S), C where there is none, and its whole box (B, Q + S, 4)
        from 0 to 1; the place (B,), and the emotion (B,) of a face that can be seen.
    """
    no_thing, count = len(renderer.things), len(scenes)
    things = torch.full((count, CELLS + PATCHES**2), no_thing)
    boxes = torch.zeros(count, CELLS + PATCHES**2, 4)
    for i, (scene, t) in enumerate(zip(scenes, times)):
        if scene.kind == "face":
            continue  # a face is no thing
        for obj in scene.objects:
            mask = renderer.mask(scene, obj, t)
            box = mask_box(mask)
            if box is None:
                continue
            # the cell that holds its centre, and the patches of which it covers about a third;
            # pixels of the mask are 0 or 255
            x1, y1, x2, y2 = box
            cell = 3 * int(y1 + y2 >= GRID) + min(3 * (x1 + x2) // (2 * GRID), 2)
            covered = mask.reshape(PATCHES, 8, PATCHES, 8).mean((1, 3)) > 80
            shows = np.append(np.arange(CELLS) == cell, covered)  # (Q + S,)
            things[i, shows], boxes[i, shows] = obj.thing, torch.tensor(box) / GRID

    names = list(renderer.places)
    places = torch.tensor([names.index(scene.place) for scene in scenes])
    return things, boxes, places, emotion_labels(scenes, visible=True)


class VisualProbes(nn.Module):
    """The probes of stage see and their losses.

    Two of them only help. `digits`: a number that can be read off linearly can be put into words.
    `patch`: the vision encoder gets a dense gradient from the first step on.
    """

    def __init__(self, model: ComposedModel, things: int, places: int):
        super().__init__()
        self.things, self.places = things, places
        queries, width = model.visual_qformer.config.queries, model.llm.config.hidden_size
        assert queries == CELLS, "TINY_MODEL: one query of the visual Q-Former per cell"
        self.cell = probe(width, things + 1 + 4)
        self.scene = probe(queries * width, places + len(EMOTIONS) + 1)
        self.digits = nn.Linear(width, 4 * TENS)
        self.patch = nn.Linear(model.vision.width, things + 1 + 4 + queries)

    def forward(
        self, features: Tensor, tokens: Tensor, targets: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Figures]:
        """Return the loss and the figures of a batch of frames.

        Args:
            features: the vision encoder's (B, S, W).
            tokens: the Q-Former's (B, Q, D).
            targets: see `visual_targets`.
        """
        things, boxes, places, emotions = targets
        things, patch_things = things.split([CELLS, PATCHES**2], 1)  # (B, Q), (B, S)
        boxes, patch_boxes = boxes.split([CELLS, PATCHES**2], 1)  # (B, Q, 4), (B, S, 4)
        occupied = things < self.things  # (B, Q)

        # what the tokens tell: each of its cell, all together of the frame
        thing, box = self.cell(tokens).split([self.things + 1, 4], -1)  # (B, Q, C + 1), (B, Q, 4)
        frame = self.scene(tokens.flatten(1))  # (B, places + 7)
        place, face = frame.split([self.places, len(EMOTIONS) + 1], 1)
        tens = self.digits(tokens)[occupied].unflatten(-1, (4, TENS))  # (objects, 4, TENS)

        # losses of the cells: the thing, its box, and the tens of the box in pixels
        weight = torch.tensor([2.0] * self.things + [1.0])
        box_error = (box - boxes).abs().mean(-1)[occupied].mean()
        tens_gold = ((boxes[occupied] * GRID).round() / 10).long()  # (objects, 4)
        loss = 2 * F.cross_entropy(thing.flatten(0, 1), things.flatten(), weight)
        loss = loss + 10 * box_error
        loss = loss + 0.5 * F.cross_entropy(tens.flatten(0, 1), tens_gold.flatten())

        # losses of the frame
        loss = loss + 0.3 * F.cross_entropy(place, places)
        loss = loss + F.cross_entropy(face, emotions)

        # losses of the patches: what each shows, the box of this thing, and the patch's own cell
        sizes = [self.things + 1, 4, CELLS]
        patch_thing, patch_box, patch_cell = self.patch(features).split(sizes, -1)  # (B, S, ...)
        weight = torch.tensor([10.0] * self.things + [1.0])  # nine patches in ten show no thing
        loss = loss + F.cross_entropy(patch_thing.flatten(0, 1), patch_things.flatten(), weight)
        patch_errors = (patch_box - patch_boxes).abs().mean(-1)  # (B, S)
        loss = loss + 10 * patch_errors[patch_things < self.things].mean()
        cell_gold = CELL_OF_PATCH.repeat(len(features))  # (B * S,)
        loss = loss + 0.3 * F.cross_entropy(patch_cell.flatten(0, 1), cell_gold)

        # shares of cells and faces that are right, and how far off the edges of boxes are
        found = (thing.argmax(-1) == things)[occupied].float().mean()
        face_right = (face.argmax(1) == emotions).float().mean()
        return loss, {"found": found, "box_off": GRID * box_error.detach(), "face": face_right}


# --- stage hear -----------------------------------------------------------------------------------
def train_hear(model: ComposedModel, renderer: Renderer, config: BaseConfig, log: Callable) -> None:
    """Train BEATs and the audio Q-Former on sound tracks.

    For each piece of one or two seconds the tokens tell which things sound in it, and the emotion
    of a voice.
    """
    things, rng = len(renderer.things), np.random.default_rng(config.seed)
    width = model.audio_qformer.config.queries * model.llm.config.hidden_size
    head = probe(width, things + len(EMOTIONS) + 1)

    @bf16_autocast(torch.device("cpu"))
    def loss_of(step: int) -> tuple[Tensor, Figures]:
        # sound tracks, and what sounds in each of their pieces
        seconds = 2 if step % 3 == 2 else 1  # per piece
        kinds = ("one", "many", "many", "action", "face", "face")
        scenes = sample_scenes(renderer, kinds, step, CLIPS, config.seed)
        sounding = torch.stack([sounding_things(scene, things, seconds) for scene in scenes])
        waves = np.stack([augment(renderer.wave(scene), rng) for scene in scenes])

        # what the tokens of a piece tell
        pieces = torch.from_numpy(waves).unflatten(1, (-1, RATE * seconds))  # (B, T, N)
        features, _ = model.audio(pieces)  # (B, T, 48 or 96, W)
        tokens = model.audio_qformer(features)  # (B, T, Q, D)
        thing, voice = head(tokens.flatten(2)).split([things, len(EMOTIONS) + 1], -1)

        voice_gold = emotion_labels(scenes)[:, None].expand(-1, thing.shape[1])  # (B, T)
        loss = F.binary_cross_entropy_with_logits(thing, sounding) * 5
        loss = loss + F.cross_entropy(voice.flatten(0, 1), voice_gold.flatten())

        # shares of pieces with all things right, and of voices
        all_right = ((thing > 0) == (sounding > 0)).all(-1)  # (B, T)
        voice_right = (voice.argmax(-1) == voice_gold)[voice_gold < len(EMOTIONS)]
        return loss, {"all_heard": all_right.float().mean(), "voice": voice_right.float().mean()}

    trained = [model.audio, model.audio_qformer, head]
    losses = map(loss_of, range(config.hear_steps))
    train_stage("hear", [(trained, config.base_lr)], losses, config.hear_steps, log)


def sounding_things(scene: Scene, things: int, seconds: int) -> Tensor:
    """Return which things sound in each piece of `seconds` s: 0 or 1, (T, C)."""
    sounding = torch.zeros(SECONDS // seconds, things)
    if scene.kind == "face":
        return sounding  # a voice is no thing
    for obj in scene.objects:
        for start, end in obj.heard:
            sounding[start // seconds : (end - 1) // seconds + 1, obj.thing] = 1
    return sounding
