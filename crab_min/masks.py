"""From the states of mask tokens to a mask: Crab's decoder and its losses (2503.13068, section 3.2; sizes: papers/crab.md 1.5).

The LM ends an answer with <mask_0> ... <mask_5>, three for each of two layers ("scales") of the vision encoder. The states that *predict*
these tokens are projected and averaged over the three, to one prompt a scale. Each level l, coarse then fine, then does

    queries = generator(learned queries, prompt_l) + level_embed_l               what to look for
    queries, image = two_way_l(queries, neck(features_l) + no_mask)              queries read the image and the image the queries (SAM, 2304.02643)
    maps    = mlp(queries) . upscale(image)                                      a map a query, at twice the image's grid
    logits  = classify(mix(maps))                                                one channel: the mask (S4, MS3, Ref-AVS), or 71: classes (AVSS)

The fine level works on twice the grid, weighted by where the coarse one saw something: image * (sigmoid(mean of its logits) + 1). The mask is
the mean of both. What differs from the released code: samples are batched; the generator's layers are chained (there each layer reads the
learned queries anew and only the last counts; `chained=False` keeps that); the random matrices of the position code are saved with the
weights (there each start draws new ones); losses are means over the samples (there sums). Two things help a small decoder that learns from
nothing: how its weights begin (`sharpen`) and states that are centred and scaled (`calibrate`); without them it drew every object for a
thousand steps, whatever was asked.

At the end of the file Crab+'s other way (2603.04128): boxes and points as text, of which SAM2 makes masks.

Shapes: B samples, S = 2 scales, M = 3 tokens a scale, Q queries, C width, h x w grid of the vision features, D width of the LM.
"""
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crab_min.answers import MASK_TOKENS
from crab_min.sources.av_uie import CLASSES

SCALES, EACH = 2, len(MASK_TOKENS) // 2                # three tokens for each of two layers of the vision encoder


@dataclass
class MaskConfig:
    """Crab's sizes; width_in is the vision encoder's, width_out the LM's."""
    width_in: int
    width_out: int
    width: int = 256
    heads: int = 8
    queries: int = 300
    feedforward: int = 2048
    depth: int = 2                                     # layers of each two-way transformer
    generator: int = 2                                 # layers of the query generator
    chained: bool = True
    low: int = 112                                     # pixels a side at which the two levels are averaged
    size: int = 224                                    # pixels a side of the mask


@dataclass
class SegmentConfig:
    """Whether and how a run answers with masks."""
    masks: str = field(default="", metadata={"help": "composed: decoder (answers end in mask tokens, which a decoder makes masks of), or nothing: boxes and points as text", "choices": ["", "decoder"]})
    mask_width: int = field(default=256, metadata={"help": "width of the mask decoder"})
    mask_heads: int = field(default=8, metadata={"help": "heads of the mask decoder's attention"})
    mask_queries: int = field(default=300, metadata={"help": "queries of the mask decoder"})
    mask_chained: bool = field(default=True, metadata={"help": "each layer of the mask decoder's query generator reads what the one before it made (released: the learned queries)"})
    mask_bce: float = field(default=1., metadata={"help": "weight of the cross-entropy of a mask's pixels"})
    mask_dice: float = field(default=.5, metadata={"help": "weight of the dice loss of a mask"})

    def sizes(self, width_in: int, width_out: int, size: int) -> MaskConfig:
        return MaskConfig(width_in, width_out, self.mask_width, self.mask_heads, self.mask_queries, 8 * self.mask_width, chained=self.mask_chained, low=size // 2, size=size)


class Attention(nn.Module):
    """Multi-head attention at `inner` width; `context` gives keys, `values` what is read there."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.out = nn.Linear(inner, width)

    def forward(self, x: Tensor, context: Tensor, values: Tensor) -> Tensor:
        q, k, v = (linear(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for linear, y in ((self.query, x), (self.key, context), (self.value, values)))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def feedforward(width: int, inner: int, between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), between, nn.Linear(inner, width))


class GeneratorLayer(nn.Module):
    """Queries (B, Q, C) read each other, then the prompt (B, 1, C); post-norm. Of one prompt all take the same: the weight of a single key is 1."""

    def __init__(self, c: MaskConfig):
        super().__init__()
        self.self_attention, self.cross_attention = Attention(c.width, c.heads, c.width), Attention(c.width, c.heads, c.width)
        self.mlp = feedforward(c.width, c.feedforward, nn.GELU())
        self.norms = nn.ModuleList(nn.LayerNorm(c.width) for _ in range(3))

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        x = self.norms[0](x + self.self_attention(x, x, x))
        x = self.norms[1](x + self.cross_attention(x, prompt, prompt))
        return self.norms[2](x + self.mlp(x))


class TwoWayLayer(nn.Module):
    """Queries (B, Q, C) read each other and the image (B, hw, C), then the image the queries. The queries' code is what they were at the start."""

    def __init__(self, c: MaskConfig, first: bool):
        super().__init__()
        self.first = first                             # the first layer's self-attention replaces the queries, where others add
        self.self_attention = Attention(c.width, c.heads, c.width)
        self.to_image, self.to_queries = Attention(c.width, c.heads, c.width // 2), Attention(c.width, c.heads, c.width // 2)
        self.mlp = feedforward(c.width, c.feedforward, nn.ReLU())
        self.norms = nn.ModuleList(nn.LayerNorm(c.width) for _ in range(4))

    def forward(self, queries: Tensor, image: Tensor, code: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        if self.first:
            x = self.norms[0](self.self_attention(queries, queries, queries))
        else:
            x = self.norms[0](queries + self.self_attention(queries + code, queries + code, queries))
        x = self.norms[1](x + self.to_image(x + code, image + places, image))
        x = self.norms[2](x + self.mlp(x))
        return x, self.norms[3](image + self.to_queries(image + places, x + code, x))


class TwoWay(nn.Module):
    """SAM's two-way transformer: (queries (B, Q, C), image (B, hw, C), its places (hw, C)) -> both, read."""

    def __init__(self, c: MaskConfig):
        super().__init__()
        self.layers = nn.ModuleList(TwoWayLayer(c, first=i == 0) for i in range(c.depth))
        self.final, self.norm = Attention(c.width, c.heads, c.width // 2), nn.LayerNorm(c.width)

    def forward(self, queries: Tensor, image: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        code = queries
        for layer in self.layers:
            queries, image = layer(queries, image, code, places)
        return self.norm(queries + self.final(queries + code, image + places, image)), image


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, h, w)."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class PositionalEncoding(nn.Module):
    """A code (hw, C) for each place of a grid: sines and cosines of random projections of its row and column (random Fourier features)."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("matrix", torch.randn(2, width // 2))               # saved with the weights: a code drawn anew would mean nothing to them

    def forward(self, h: int, w: int) -> Tensor:
        rows, columns = ((torch.arange(n, device=self.matrix.device) + .5) / n * 2 - 1 for n in (h, w))
        at = torch.stack([columns.expand(h, w), rows[:, None].expand(h, w)], -1).flatten(0, 1)       # (hw, 2): x, y in -1 .. 1
        turns = 2 * math.pi * at @ self.matrix
        return torch.cat([turns.sin(), turns.cos()], -1)


class MaskDecoder(nn.Module):
    """(states of the mask tokens (B, S M, D), vision features of S layers, (B, hw, W) each) -> logits (B, 1 or 71, size, size)."""

    def __init__(self, config: MaskConfig):
        super().__init__()
        self.config = c = config
        self.prompt = nn.Sequential(nn.Linear(c.width_out, c.width_out), nn.ReLU(), nn.Linear(c.width_out, c.width))
        self.neck = nn.Sequential(nn.Conv2d(c.width_in, c.width, 1, bias=False), ChannelNorm(c.width), nn.Conv2d(c.width, c.width, 3, padding=1, bias=False), ChannelNorm(c.width))
        self.no_mask = nn.Parameter(.02 * torch.randn(1, c.width))
        self.queries, self.level = nn.Parameter(torch.randn(c.queries, c.width)), nn.Parameter(torch.randn(SCALES, c.width))
        self.generator = nn.ModuleList(GeneratorLayer(c) for _ in range(c.generator))
        self.places = nn.ModuleList(PositionalEncoding(c.width) for _ in range(SCALES))
        self.two_way = nn.ModuleList(TwoWay(c) for _ in range(SCALES))
        self.finer = nn.Sequential(nn.ConvTranspose2d(c.width, c.width, 2, stride=2), ChannelNorm(c.width), nn.GELU())
        small = c.width // 8
        self.upscale = nn.Sequential(nn.ConvTranspose2d(c.width, small, 2, stride=2), ChannelNorm(small), nn.GELU())
        self.mlp = nn.Sequential(nn.Linear(c.width, c.width), nn.ReLU(), nn.Linear(c.width, c.width), nn.ReLU(), nn.Linear(c.width, small))
        self.mix = nn.Sequential(nn.Conv2d(c.queries, c.width, 1), nn.ReLU(), nn.Conv2d(c.width, c.width, 1), nn.ReLU(), nn.Conv2d(c.width, small, 1))
        self.binary, self.classes = nn.Conv2d(small, 1, 1, bias=False), nn.Conv2d(small, CLASSES, 1, bias=False)
        self.sharpen()

    @torch.no_grad()
    def sharpen(self) -> None:
        """Begin with attention that differs from place to place, a prompt that is felt and a code of places in which near ones are alike. As torch and SAM initialise them,
        training stays for hundreds of steps where every object is drawn, whatever the prompt, and goes on drawing two of them where one is meant."""
        self.prompt[2].weight *= 4
        for places in self.places:
            places.matrix *= .4
        for module in self.modules():
            if isinstance(module, Attention):
                module.query.weight *= 3
                module.key.weight *= 3
            if isinstance(module, GeneratorLayer):
                module.cross_attention.value.weight *= 2.5
                module.cross_attention.out.weight *= 2.5

    def forward(self, states: Tensor, features: list[Tensor], classes: bool = False) -> Tensor:
        c, total, logits = self.config, 0, None
        prompts = self.prompt(states).unflatten(1, (SCALES, EACH)).mean(2)                       # (B, S, C)
        for level, x in enumerate(features):
            side = math.isqrt(x.shape[1])
            image = self.neck(x.mT.unflatten(-1, (side, side)))                                  # (B, C, h, w)
            if level:
                image = self.finer(image) * (logits.mean(1, keepdim=True).sigmoid() + 1)         # (B, C, 2h, 2w)
            h, w = image.shape[-2:]
            queries = self.generate(prompts[:, level, None]) + self.level[level]
            queries, image = self.two_way[level](queries, (image + self.no_mask[..., None, None]).flatten(2).mT, self.places[level](h, w))
            maps = torch.einsum("bqc,bchw->bqhw", self.mlp(queries), self.upscale(image.mT.unflatten(-1, (h, w))))
            logits = (self.classes if classes else self.binary)(self.mix(maps))
            total = total + F.interpolate(logits, (c.low, c.low), mode="bilinear", align_corners=False) / SCALES
        return F.interpolate(total, (c.size, c.size), mode="bilinear", align_corners=False)

    def generate(self, prompt: Tensor) -> Tensor:
        """Queries (B, Q, C) for a prompt (B, 1, C)."""
        start = x = self.queries.expand(len(prompt), -1, -1)
        for layer in self.generator:
            x = layer(x if self.config.chained else start, prompt)
        return x


def dice_loss(logits: Tensor, gold: Tensor) -> Tensor:
    """1 - dice of each sample (B,); logits and gold (B, 1, H, W). The scale of 1000 and 1e-6 are the released code's."""
    p, gold = logits.sigmoid().flatten(1) / 1000, gold.flatten(1)
    return 1 - (2 * (p * gold).sum(1) + 1e-6) / (p.sum(1) + gold.sum(1) / 1000 + 1e-6)


def mask_loss(logits: Tensor, gold: Tensor, bce: float = 1., dice: float = .5) -> Tensor:
    """Mean over the samples of bce * cross-entropy (pixel mean) + dice * dice loss; logits (B, 1, H, W), gold 0 or 1."""
    return bce * F.binary_cross_entropy_with_logits(logits, gold) + dice * dice_loss(logits, gold).mean()


def loss_of_masks(found: dict[int, Tensor], gold: dict[int, Tensor], bce: float, dice: float) -> Tensor:
    """The mean loss of the masks of a batch, by row: logits (1, H, W) against 0 or 1, or (71, H, W) against classes (1, H, W) long."""
    total, count = torch.zeros((), device=next(iter(gold.values())).device), 0
    for classes in (False, True):
        rows = [i for i, mask in gold.items() if i in found and (mask.dtype == torch.long) == classes]
        if rows:
            logits, masks = torch.stack([found[i] for i in rows]).float(), torch.stack([gold[i] for i in rows])
            total = total + len(rows) * (F.cross_entropy(logits, masks[:, 0], ignore_index=-1) if classes else mask_loss(logits, masks, bce, dice))
            count += len(rows)
    return total / max(count, 1)


# --- beside an LM ----------------------------------------------------------------------------------------------------------
class ExtendedEmbedding(nn.Module):
    """An LM's embeddings, and rows of more words behind them, which can be trained alone."""

    def __init__(self, words: nn.Embedding, rows: nn.Parameter, first: int):
        super().__init__()
        self.words, self.rows, self.first = words, rows, first

    @property
    def weight(self) -> Tensor:
        return self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        new = ids >= self.first
        x = self.words(ids.masked_fill(new, 0))
        return torch.where(new[..., None], F.embedding((ids - self.first).clamp(min=0), self.rows).to(x.dtype), x)


class ExtendedHead(nn.Module):
    """An LM's output layer, and behind it the logits of more words; those between (placeholders of media) are never said."""

    def __init__(self, head: nn.Linear, rows: nn.Parameter, first: int):
        super().__init__()
        self.head, self.rows, self.first = head, rows, first

    @property
    def weight(self) -> Tensor:
        return self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        y = F.pad(y, (0, self.first - y.shape[-1]), value=torch.finfo(y.dtype).min)
        return torch.cat([y, F.linear(x, self.rows.to(x.dtype)).to(y.dtype)], -1)


class MaskBranch(nn.Module):
    """What masks add to an LM: the mask tokens' rows in its embeddings and its output layer, and the decoder that reads their states."""

    def __init__(self, config: MaskConfig, llm: nn.Module, first: int):
        """first: the id of <mask_0>."""
        super().__init__()
        self.first, count = first, SCALES * EACH
        words, head = llm.get_input_embeddings(), llm.get_output_embeddings()
        scale = words.weight.float().std().item()
        self.read, self.said = (nn.Parameter(scale * torch.randn(count, config.width_out)) for _ in range(2))
        self.register_buffer("mean", torch.zeros(config.width_out))           # of the states, where `calibrate` was called
        self.register_buffer("std", torch.ones(config.width_out))
        self.decoder = MaskDecoder(config)
        llm.set_input_embeddings(ExtendedEmbedding(words, self.read, first))
        llm.set_output_embeddings(ExtendedHead(head, self.said, first))

    def calibrate(self, states: Tensor) -> None:
        """From now on give the decoder what differs between states like these (n, S M, D), which have much in common: it learns several times as fast."""
        self.mean.copy_(states.mean((0, 1)))
        self.std.copy_(states.std((0, 1)) + 1e-4)

    def forward(self, states: Tensor, features: list[Tensor], classes: bool = False) -> Tensor:
        return self.decoder((states.float() - self.mean) / self.std, features, classes)

    @property
    def ids(self) -> Tensor:
        return torch.arange(self.first, self.first + len(self.read), device=self.read.device)

    def find(self, ids: Tensor, states: Tensor) -> dict[int, Tensor]:
        """{row: the states (S M, D) that predict its mask tokens} of the rows of ids (B, L) that have all of them in their order; states (B, L, D)."""
        found = {}
        for row, (line, state) in enumerate(zip(ids, states)):
            at = [(line == self.first + k).nonzero().flatten().tolist()[:1] for k in range(len(self.read))]
            places = [p for each in at for p in each]
            if len(places) == len(self.read) and places == sorted(places) and places[0] > 0:
                found[row] = state[torch.tensor(places, device=state.device) - 1]
        return found


# --- the second stage of Crab+: boxes and points, then SAM2 ------------------------------------------------------------------


