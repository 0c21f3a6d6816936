"""Crab's mask decoder: from the states of mask tokens to a mask.

Paper: Crab (2503.13068), the segmentation branch. The LM ends an answer with <mask_0> ... <mask_5>,
three for each of two layers ("scales") of the vision encoder. The states that predict these tokens
are projected and averaged over the three, to one prompt per scale. Each level l, first coarse, then
fine, does

    queries = generator(learned queries, prompt_l) + level_l            what to look for
    queries, image = two_way_l(queries, neck(features_l) + no_mask)     both attend to each other
    maps    = mlp(queries) . upscale(image)                             one map per query
    logits  = classifier(mix(maps))                                     the mask, or classes

where two_way is the two-way transformer of Segment Anything (2304.02643). The fine level works on
twice the grid, weighted by where the coarse one found something: image * (sigmoid(mean of its
logits) + 1). The mask is the mean of both levels. Losses, added to the LM's cross-entropy L_txt:

    lambda_bce L_bce + lambda_dice L_dice       masks (S4, MS3, Ref-AVS); released: 1 and 0.5
    lambda_ce L_ce                              classes (AVSS); lambda_ce = 1

    symbol               variable                      shape
    mask token states    states                        (B, S M, D)
    features_l           features[l]                   (B, h w, W)
    prompt_l             MaskDecoder.prompt            (B, 1, C)
    learned queries      MaskDecoder.queries           (Q, C)
    level_l              MaskDecoder.level[l]          (C,)
    logits               forward(...)                  (B, 1 or 71, size, size)

Shapes: B samples, S = 2 scales, M = 3 tokens per scale, Q queries, C width, h x w grid of the
vision features, W their width, D width of the LM.

What differs from the released code: samples are batched; the generator's layers are chained
(released: each layer reads the learned queries anew and only the last one counts; `chained=False`
keeps that); the random matrices of the positional encodings are saved with the weights (released:
drawn anew at every start); losses are means over the samples (released: sums). Two things help a
small decoder that learns from nothing, which otherwise drew every object for a thousand steps,
whatever was asked: how its weights begin (`sharpen`), and states that are centred and scaled
(`calibrate`).

Page of the course: docs/course/13_crab_masks.md.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCALES = 2  # layers of the vision encoder that the decoder reads, and levels of the decoder
TOKENS_PER_SCALE = 3
MASK_TOKEN_COUNT = SCALES * TOKENS_PER_SCALE


@dataclass
class MaskConfig:
    """Sizes of a mask decoder. The defaults are Crab's."""

    width_in: int  # W
    width_out: int  # D
    width: int = 256  # C
    heads: int = 8
    queries: int = 300  # Q
    feedforward: int = 2048
    depth: int = 2  # layers of each two-way transformer
    generator: int = 2  # layers of the query generator
    chained: bool = True  # the generator, see the top of the file; released: False
    low: int = 112  # pixels per side at which the two levels are averaged
    size: int = 224  # pixels per side of the mask
    class_count: int = 71  # of AVSS, with the background


# --- parts of the decoder -------------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head attention whose queries, keys and values are given apart."""

    def __init__(self, width: int, heads: int, inner: int):
        """Make the linears; inner: width of the heads together."""
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, inner)
        self.key = nn.Linear(width, inner)
        self.value = nn.Linear(width, inner)
        self.out = nn.Linear(inner, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from q (B, n, C) to k and v (B, m, C): (B, n, C)."""
        q = self.split_heads(self.query(q))
        k = self.split_heads(self.key(k))
        v = self.split_heads(self.value(v))
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, heads, n, inner / heads)
        return self.out(attended.transpose(1, 2).flatten(2))  # (B, n, C)

    def split_heads(self, x: Tensor) -> Tensor:
        """Split the heads: (B, n, inner) -> (B, heads, n, inner / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class GeneratorLayer(nn.Module):
    """A layer in which queries attend to each other, then to the prompt; post-norm.

    A prompt is a single key, whose attention weight is 1, so all queries take the same from it.
    """

    def __init__(self, config: MaskConfig):
        super().__init__()
        width, heads = config.width, config.heads
        self.self_attention = Attention(width, heads, width)
        self.cross_attention = Attention(width, heads, width)
        inner = config.feedforward
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, queries: Tensor, prompt: Tensor) -> Tensor:
        """Update queries (B, Q, C) with a prompt (B, 1, C): (B, Q, C)."""
        norm_self, norm_cross, norm_mlp = self.norms
        queries = norm_self(queries + self.self_attention(q=queries, k=queries, v=queries))
        queries = norm_cross(queries + self.cross_attention(q=queries, k=prompt, v=prompt))
        return norm_mlp(queries + self.mlp(queries))


class TwoWayLayer(nn.Module):
    """A layer in which the queries attend to the image, and the image to the queries."""

    def __init__(self, config: MaskConfig, first: bool):
        """Make the layer; first: self-attention replaces the queries.

        There it has no positional encoding.
        """
        super().__init__()
        width, heads = config.width, config.heads
        self.first = first
        self.self_attention = Attention(width, heads, width)
        self.to_image = Attention(width, heads, width // 2)
        self.to_queries = Attention(width, heads, width // 2)
        self.mlp = relu_stack(nn.Linear, width, config.feedforward, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))

    def forward(
        self, queries: Tensor, image: Tensor, query_pe: Tensor, image_pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pass queries (B, Q, C) and image (B, hw, C) through the layer.

        Args:
            query_pe: positional encoding of the queries (B, Q, C).
            image_pe: positional encoding of the image (hw, C).
        """
        norm_self, norm_to_image, norm_mlp, norm_to_queries = self.norms

        # self-attention of the queries
        if self.first:
            queries = self.self_attention(q=queries, k=queries, v=queries)
        else:
            q = queries + query_pe
            k = queries + query_pe
            queries = queries + self.self_attention(q=q, k=k, v=queries)
        queries = norm_self(queries)

        # cross-attention, queries attending to the image
        q = queries + query_pe
        k = image + image_pe
        queries = norm_to_image(queries + self.to_image(q=q, k=k, v=image))

        # MLP
        queries = norm_mlp(queries + self.mlp(queries))

        # cross-attention, the image attending to the queries
        q = image + image_pe
        k = queries + query_pe
        image = norm_to_queries(image + self.to_queries(q=q, k=k, v=queries))
        return queries, image


class TwoWay(nn.Module):
    """Segment Anything's two-way transformer between queries and an image."""

    def __init__(self, config: MaskConfig):
        super().__init__()
        self.layers = nn.ModuleList(TwoWayLayer(config, first=i == 0) for i in range(config.depth))
        self.final = Attention(config.width, config.heads, config.width // 2)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, queries: Tensor, image: Tensor, image_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Update queries (B, Q, C) and image (B, hw, C); image_pe: encoding (hw, C)."""
        query_pe = queries  # the queries as they were at the start
        for layer in self.layers:
            queries, image = layer(queries, image, query_pe, image_pe)

        # a last attention from the queries to the image
        q = queries + query_pe
        k = image + image_pe
        return self.norm(queries + self.final(q=q, k=k, v=image)), image


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, h, w)."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class PositionalEncoding(nn.Module):
    """Random Fourier features: sines and cosines of random projections of x and y."""

    def __init__(self, width: int):
        super().__init__()
        # saved with the weights, which would mean nothing with another random matrix
        self.register_buffer("matrix", torch.randn(2, width // 2))

    def forward(self, h: int, w: int) -> Tensor:
        """Return the encoding (h w, C) of every cell of a grid."""
        y, x = torch.meshgrid(self.centres(h), self.centres(w), indexing="ij")  # (h, w)
        xy = torch.stack([x, y], -1).flatten(0, 1)  # (hw, 2)
        angles = 2 * math.pi * xy @ self.matrix  # (hw, C / 2)
        return torch.cat([angles.sin(), angles.cos()], -1)  # (hw, C)

    def centres(self, n: int) -> Tensor:
        """Return the centres of n cells between -1 and 1."""
        return (torch.arange(n, device=self.matrix.device) + 0.5) / n * 2 - 1


def relu_stack(layer: Callable, *widths: int) -> nn.Sequential:
    """Make layers from each of the widths to the next, with ReLUs in between."""
    modules = []
    for width, out in zip(widths, widths[1:]):
        modules += [layer(width, out), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def upsampling(width: int, out: int) -> nn.Sequential:
    """Double the grid of (B, width, h, w): a transposed convolution to `out` channels."""
    conv = nn.ConvTranspose2d(width, out, 2, stride=2)
    return nn.Sequential(conv, ChannelNorm(out), nn.GELU())


# --- the decoder ----------------------------------------------------------------------------------
class MaskDecoder(nn.Module):
    """States of the mask tokens and vision features of two layers -> logits of a mask."""

    def __init__(self, config: MaskConfig):
        super().__init__()
        self.config = config
        width, small = config.width, config.width // 8

        # prompts, from the states of the mask tokens
        self.prompt = relu_stack(nn.Linear, config.width_out, config.width_out, width)
        # the image, from the vision features; both levels share the neck
        self.neck = nn.Sequential(
            nn.Conv2d(config.width_in, width, 1, bias=False),
            ChannelNorm(width),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            ChannelNorm(width),
        )
        self.no_mask = nn.Parameter(0.02 * torch.randn(1, width))

        # queries
        self.queries = nn.Parameter(torch.randn(config.queries, width))
        self.level = nn.Parameter(torch.randn(SCALES, width))
        self.generator = nn.ModuleList(GeneratorLayer(config) for _ in range(config.generator))

        # queries meet the image
        self.places = nn.ModuleList(PositionalEncoding(width) for _ in range(SCALES))
        self.two_way = nn.ModuleList(TwoWay(config) for _ in range(SCALES))
        self.finer = upsampling(width, width)  # of the fine level's image
        self.upscale = upsampling(width, small)  # of the image, for the maps

        # maps to logits
        self.mlp = relu_stack(nn.Linear, width, width, width, small)
        pointwise = partial(nn.Conv2d, kernel_size=1)
        self.mix = relu_stack(pointwise, config.queries, width, width, small)
        self.binary = nn.Conv2d(small, 1, 1, bias=False)
        self.classes = nn.Conv2d(small, config.class_count, 1, bias=False)
        self.sharpen()

    @torch.no_grad()
    def sharpen(self) -> None:
        """Scale the initial weights so that a small decoder learns in hundreds of steps.

        Attention differs from position to position, the prompt weighs more, and near positions
        have similar encodings. With the initial weights of torch and Segment Anything, training
        stays for hundreds of steps where every object is drawn, whatever the prompt, and goes on
        drawing two of them where one is meant.
        """
        self.prompt[2].weight *= 4
        for encoding in self.places:
            encoding.matrix *= 0.4
        for module in self.modules():
            if isinstance(module, Attention):
                module.query.weight *= 3
                module.key.weight *= 3
            if isinstance(module, GeneratorLayer):
                module.cross_attention.value.weight *= 2.5
                module.cross_attention.out.weight *= 2.5

    def forward(self, states: Tensor, features: list[Tensor], classes: bool = False) -> Tensor:
        """Compute the logits of a mask.

        Args:
            states: the LM's states that predict the mask tokens (B, S M, D).
            features: of each scale the patch features of the vision encoder (B, h w, W).
            classes: True for the classes of AVSS, False for one mask.

        Returns:
            (B, 1 or class_count, size, size).
        """
        low, size = self.config.low, self.config.size
        prompts = self.prompt(states)  # (B, S M, C)
        prompts = prompts.unflatten(1, (SCALES, TOKENS_PER_SCALE)).mean(2)  # (B, S, C)

        mean, logits = 0, None
        for level, x in enumerate(features):
            image = self.image_of(x, logits)
            logits = self.decode_level(level, prompts[:, level, None], image, classes)
            mean = mean + resize(logits, low) / SCALES
        return resize(mean, size)

    def image_of(self, features: Tensor, coarse: Tensor | None) -> Tensor:
        """Turn features (B, h w, W) into an image (B, C, h, w).

        coarse: logits of the coarse level; with them the image is twice as fine, and weighted by
        where that level found something.
        """
        side = math.isqrt(features.shape[1])
        image = self.neck(features.mT.unflatten(-1, (side, side)))  # (B, C, h, w)
        if coarse is None:
            return image
        image = self.finer(image)  # (B, C, 2h, 2w)
        weight = coarse.mean(1, keepdim=True).sigmoid() + 1  # (B, 1, 2h, 2w)
        return image * weight

    def decode_level(self, level: int, prompt: Tensor, image: Tensor, classes: bool) -> Tensor:
        """Compute the logits (B, 1 or class_count, 2h, 2w) of an image (B, C, h, w)."""
        h, w = image.shape[-2:]
        queries = self.generate(prompt) + self.level[level]  # (B, Q, C)
        flat = (image + self.no_mask[..., None, None]).flatten(2).mT  # (B, hw, C)
        queries, flat = self.two_way[level](queries, flat, self.places[level](h, w))

        # one map per query: its product with every pixel of the upscaled image
        queries = self.mlp(queries)  # (B, Q, C / 8)
        image = self.upscale(flat.mT.unflatten(-1, (h, w)))  # (B, C / 8, 2h, 2w)
        maps = torch.einsum("bqc,bchw->bqhw", queries, image)  # (B, Q, 2h, 2w)
        classifier = self.classes if classes else self.binary
        return classifier(self.mix(maps))

    def generate(self, prompt: Tensor) -> Tensor:
        """Generate the queries (B, Q, C) for a prompt (B, 1, C)."""
        # where every layer reads the learned queries anew, only the last one counts
        layers = self.generator if self.config.chained else self.generator[-1:]
        queries = self.queries.expand(len(prompt), -1, -1)
        for layer in layers:
            queries = layer(queries, prompt)
        return queries


def resize(x: Tensor, size: int) -> Tensor:
    """Interpolate (B, n, h, w) to (B, n, size, size)."""
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False)


# --- losses ---------------------------------------------------------------------------------------
def dice_loss(logits: Tensor, gold: Tensor) -> Tensor:
    """Compute 1 - dice of each sample (B,), for logits and gold (B, 1, H, W).

    The scale of 1000 and the 1e-6 are the released code's.
    """
    predicted = logits.sigmoid().flatten(1) / 1000
    gold = gold.flatten(1)
    overlap = 2 * (predicted * gold).sum(1) + 1e-6
    return 1 - overlap / (predicted.sum(1) + gold.sum(1) / 1000 + 1e-6)


def mask_loss(
    logits: Tensor, gold: Tensor, lambda_bce: float = 1.0, lambda_dice: float = 0.5
) -> Tensor:
    """Compute lambda_bce L_bce + lambda_dice L_dice, the mean over the samples.

    Args:
        logits: (B, 1, H, W).
        gold: (B, 1, H, W), 0 or 1.
    """
    bce = F.binary_cross_entropy_with_logits(logits, gold)
    return lambda_bce * bce + lambda_dice * dice_loss(logits, gold).mean()


def loss_of_masks(
    logits: dict[int, Tensor], gold: dict[int, Tensor], lambda_bce: float, lambda_dice: float
) -> Tensor:
    """Compute the mean loss of a batch, whose rows may have masks or classes.

    Args:
        logits: row -> (1, H, W), or (class_count, H, W).
        gold: row -> 0. or 1. (1, H, W), or classes as int64 (1, H, W), -1 where a pixel does not
            count.

    Returns:
        The loss, zero where no row has both.
    """
    total = torch.zeros((), device=next(iter(gold.values())).device)
    count = 0
    for classes in (False, True):
        rows = [i for i in gold if i in logits and (gold[i].dtype == torch.long) == classes]
        if not rows:
            continue
        predicted = torch.stack([logits[i] for i in rows]).float()
        wanted = torch.stack([gold[i] for i in rows])
        if classes:
            loss = F.cross_entropy(predicted, wanted[:, 0], ignore_index=-1)
        else:
            loss = mask_loss(predicted, wanted, lambda_bce, lambda_dice)
        total = total + len(rows) * loss
        count += len(rows)
    return total / max(count, 1)


# --- mask tokens of an LM -------------------------------------------------------------------------
class ExtendedEmbedding(nn.Module):
    """An LM's embeddings with rows for further tokens, which can be trained alone."""

    def __init__(self, words: nn.Embedding, rows: nn.Parameter, first: int):
        """Put rows behind those of the LM; first: id of the token of the first row."""
        super().__init__()
        self.words = words
        self.rows = rows
        self.first = first

    @property
    def weight(self) -> Tensor:
        return self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        is_new = ids >= self.first
        old = self.words(ids.masked_fill(is_new, 0))  # (B, L, D)
        new = F.embedding((ids - self.first).clamp(min=0), self.rows)  # (B, L, D)
        return torch.where(is_new[..., None], new.to(old.dtype), old)


class ExtendedHead(nn.Module):
    """An LM's output layer with logits for further tokens."""

    def __init__(self, head: nn.Linear, rows: nn.Parameter, first: int):
        """Put rows behind those of the LM; first: id of the token of the first row."""
        super().__init__()
        self.head = head
        self.rows = rows
        self.first = first

    @property
    def weight(self) -> Tensor:
        return self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        old = self.head(x)  # (B, L, V)
        # ids between are placeholders of media, which the LM must never generate
        lowest = torch.finfo(old.dtype).min
        old = F.pad(old, (0, self.first - old.shape[-1]), value=lowest)  # (B, L, first)
        new = F.linear(x, self.rows.to(x.dtype))  # (B, L, 6)
        return torch.cat([old, new.to(old.dtype)], -1)


class MaskBranch(nn.Module):
    """The segmentation branch: rows of the mask tokens in an LM, and the decoder."""

    def __init__(self, config: MaskConfig, llm: nn.Module, first: int):
        """Extend the LM's embeddings and output layer; first: the id of <mask_0>."""
        super().__init__()
        self.first = first
        words, head = llm.get_input_embeddings(), llm.get_output_embeddings()
        scale = words.weight.detach().float().std()
        rows = torch.empty(MASK_TOKEN_COUNT, config.width_out, device=scale.device)
        self.read = nn.Parameter(scale * torch.randn_like(rows))  # in the embeddings
        self.said = nn.Parameter(scale * torch.randn_like(rows))  # in the output layer
        # of the states, once `calibrate` was called
        self.register_buffer("mean", torch.zeros(config.width_out))
        self.register_buffer("std", torch.ones(config.width_out))
        self.decoder = MaskDecoder(config)
        llm.set_input_embeddings(ExtendedEmbedding(words, self.read, first))
        llm.set_output_embeddings(ExtendedHead(head, self.said, first))

    @property
    def ids(self) -> Tensor:
        """Return the ids of the mask tokens."""
        return torch.arange(self.first, self.first + MASK_TOKEN_COUNT, device=self.read.device)

    def calibrate(self, states: Tensor) -> None:
        """Centre and scale the decoder's input as states (n, S M, D) are distributed.

        Such states have much in common. With what differs between them alone the decoder learns
        several times as fast.
        """
        self.mean.copy_(states.mean((0, 1)))
        self.std.copy_(states.std((0, 1)) + 1e-4)

    def forward(self, states: Tensor, features: list[Tensor], classes: bool = False) -> Tensor:
        """Compute the logits of a mask, see MaskDecoder.forward."""
        return self.decoder((states.float() - self.mean) / self.std, features, classes)

    def find(self, ids: Tensor, states: Tensor) -> dict[int, Tensor]:
        """Find the states that predict the mask tokens.

        Args:
            ids: (B, L).
            states: the LM's last states (B, L, D).

        Returns:
            row -> states (S M, D), for rows that have all mask tokens, in their order.
        """
        is_token = ids[:, None] == self.ids[:, None]  # (B, S M, L)
        positions = is_token.int().argmax(-1)  # (B, S M), where each token stands first
        is_complete = is_token.any(-1).all(-1) & (positions.diff() > 0).all(-1)
        is_complete &= positions[:, 0] > 0  # a state predicts the token behind it
        rows = is_complete.nonzero().flatten().tolist()
        return {row: states[row, positions[row] - 1] for row in rows}
