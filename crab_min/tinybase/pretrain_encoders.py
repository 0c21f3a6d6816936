"""How the tiny base learns to see and to hear: two stages, each a loop that supervises a Q-Former's tokens through a small probe.

  see    vision encoder + visual Q-Former: what is where in a picture
  hear   BEATs + audio Q-Former: what sounds in a second, and how a voice feels
The probes are thrown away after. They are why a 2-million-parameter LM learns to look at all in minutes: without them the connectors get their first
useful gradient only after the LM has learned to read them (reading.py).

Shapes: B scenes of a batch, C things of the world, Q queries, D width, S patches, T pieces of sound.
"""
from collections import deque
from dataclasses import dataclass

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

BINS = GRID // 10 + 1                                  # the tens of a box edge, 0 to 22


def train_stage(name: str, modules: list, steps: int, lr: float, loss_of, log, slow: list = (), steady: float = 0) -> None:
    """The loop that all stages share: AdamW, warm-up and cosine, bfloat16 products.

    loss_of: step -> (loss, figures for the log), or None to end the stage early;
    slow: modules trained at a fifth of the learning rate; steady: the share of the steps before the rate falls (1: it never does).
    """
    groups = [{"params": [p for m in part for p in m.requires_grad_(True).parameters()], "lr": rate} for part, rate in ((modules, lr), (slow, lr / 5)) if part]
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 100, .51 + .5 * np.cos(np.pi * max(0, s / max(1, steps) - steady) / max(1e-9, 1 - steady))))
    bar, recent = tqdm(range(steps), desc=name, unit="step"), deque(maxlen=50)
    for step in bar:
        with bf16_autocast():
            result = loss_of(step)
        if result is None:
            break
        loss, figures = result
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


def train_see(model: ComposedModel, renderer: Renderer, steps: int, lr: float, seed: int, log) -> None:
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

    train_stage("see", [model.vision, model.visual_qformer, cell_head, scene_head, digit_head, patch_head], steps, lr, loss_of, log)


def banks_of(waves: np.ndarray, seconds: int = 1) -> Tensor:
    """fbank of the consecutive pieces of `seconds` s of 10-s waves (B, N): (B, T, F, 128); a frame never reaches over its piece's end."""
    whole, hop = fbank(torch.from_numpy(waves)), 100 * seconds                                              # (B, 998, 128)
    return torch.stack([whole[:, start:start + hop - 2] for start in range(0, 100 * SECONDS, hop)], 1)


def train_hear(model: ComposedModel, renderer: Renderer, steps: int, lr: float, seed: int, log) -> None:
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

    train_stage("hear", [model.audio, model.audio_qformer, head], steps, lr, loss_of, log)
