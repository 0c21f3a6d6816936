"""Samples -> media -> features -> batches.

This stands between annotation files and a model. `Features` decodes media in worker processes and
encodes them with the model's frozen encoders. It either keeps the features, so that a clip that
many questions share is decoded and encoded once (small models, small data), or works some batches
ahead of the model and keeps nothing. `Mixer` decides before that which samples make a batch, so
that nothing depends on the number of workers.
"""

import itertools
import os
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
from tqdm import tqdm

from crab_min.config import DataConfig
from crab_min.data import BLACK, LoadedMedia, Sample, decode_ahead
from crab_min.devices import free_memory, one_core_per_thread
from crab_min.encoders import ENCODERS, MediaFeatures, encode_own, encode_side
from crab_min.errors import DataError
from crab_min.interface import PromptPart
from crab_min.model import AVLanguageModel
from crab_min.runs import processes

ENCODED_TOGETHER = 8  # media that a frozen encoder takes at once
FILES_WITHOUT_WORKERS = 32  # at most; starting workers costs more than decoding so few files

SampleBatch = tuple[list[Sample], list[list[MediaFeatures]]]
EncodedGroup = tuple[list[LoadedMedia], dict[PromptPart, MediaFeatures]]


@dataclass
class Features:
    """The features of media parts, in half precision.

    Attributes:
        keep: keep all features in memory.
        max_bad: share of unreadable files above which work stops.
        workers: processes that decode.
        cache: part -> its features; without `keep`, of the present batch alone.
        unreadable: part -> the reason.
        announced: files that `prepare` has been asked for so far.
        first_of: side channel -> width and path of its first features.
        together: media that an encoder takes at once; fewer where memory was too short.
    """

    model: AVLanguageModel
    keep: bool = True
    max_bad: float = DataConfig.max_bad
    workers: int = DataConfig.workers
    cache: dict[PromptPart, MediaFeatures] = field(default_factory=dict)
    unreadable: dict[PromptPart, str] = field(default_factory=dict)
    announced: int = 0
    first_of: dict[str, tuple[int, str]] = field(default_factory=dict)
    together: int = ENCODED_TOGETHER

    def prepare(self, samples: list[Sample], strict: bool = True) -> list[Sample]:
        """Return the samples whose media can be read.

        With `keep` all media are decoded and encoded now; else it is checked that the files exist.

        Args:
            strict: an unreadable file is an error; else it is skipped, up to `max_bad` of all.

        Raises:
            DataError: an unreadable file, or too many.
        """
        # a medium of several samples is announced, decoded and encoded once
        parts = {part for sample in samples for part in sample.media}
        parts -= self.cache.keys() | self.unreadable.keys()
        self.announced += len(parts)
        if self.keep:
            self.encode_all(sorted(parts, key=decoding_order), strict)
        else:
            for part in sorted(parts, key=decoding_order):
                if part.path != BLACK and not os.path.exists(part.path):
                    reason = f"{part.path}: no such file; fetch it, or correct the annotation"
                    self.skip(part, reason, strict)
        return self.readable(samples)

    def batches(self, plan: Iterable[list[Sample]], strict: bool = True) -> Iterator[SampleBatch]:
        """Yield the batches of `plan` in order, with the features of their media.

        Args:
            strict: an unreadable file is an error; else its samples are left out of the batch.
        """
        if self.keep:
            for samples in plan:
                samples = self.readable(samples)
                yield samples, self(samples)
            return

        # workers decode the parts of the next batches while the model works on this one
        ahead: deque[list[Sample]] = deque()

        def parts_of_batches() -> Iterator[list[PromptPart]]:
            for samples in plan:
                ahead.append(samples)
                parts = dict.fromkeys(part for sample in samples for part in sample.media)
                yield [part for part in parts if part not in self.unreadable]

        for loaded in decode_ahead(parts_of_batches(), self.model.frame_size, self.workers):
            self.add(loaded, self.encode(loaded), strict)
            samples = self.readable(ahead.popleft())
            yield samples, self(samples)

    def __call__(self, samples: list[Sample]) -> list[list[MediaFeatures]]:
        """Return the features of each sample's media in reading order."""
        # encode what is not there yet
        wanted = dict.fromkeys(part for sample in samples for part in sample.media)
        missing = [part for part in wanted if part not in self.cache]
        if missing:
            self.encode_all(missing, strict=True)
        # one list per sample
        media = []
        for sample in samples:
            media.append([self.cache[part] for part in sample.media])
        if not self.keep:
            self.cache.clear()
        return media

    def readable(self, samples: list[Sample]) -> list[Sample]:
        """Return the samples that have no unreadable medium."""
        return [s for s in samples if self.unreadable.keys().isdisjoint(s.media)]

    def skip(self, part: PromptPart, reason: str, strict: bool) -> None:
        """Note an unreadable file; raise DataError if `strict`, or if there are too many."""
        if strict:
            raise DataError(reason)
        if reason not in self.unreadable.values():  # once for the video and the sound of a clip
            tqdm.write(f"skipped: {reason}")
        self.unreadable[part] = reason
        count = len(self.unreadable)
        if count > self.max_bad * self.announced and count > 1:
            raise DataError(
                f"{count} unreadable files, more than --max-bad {self.max_bad:.0%}; "
                f"the last: {reason}"
            )

    # --- decoding and encoding

    def encode_all(self, parts: list[PromptPart], strict: bool) -> None:
        """Put the features of parts into the cache, with a progress bar if they are many."""
        quiet = len(parts) <= FILES_WITHOUT_WORKERS or processes.rank() > 0
        with tqdm(
            total=len(parts), desc="decoding and encoding", unit="file", disable=quiet
        ) as bar:
            for loaded, features in self.decode_and_encode(cut(parts, ENCODED_TOGETHER)):
                self.add(loaded, features, strict)
                bar.update(len(loaded))

    def decode_and_encode(self, groups: list[list[PromptPart]]) -> Iterator[EncodedGroup]:
        """Yield the decoded media of each group of parts with their features."""
        # worker processes decode ahead
        workers = self.workers if len(groups) * ENCODED_TOGETHER > FILES_WITHOUT_WORKERS else 0
        loader = iter(decode_ahead(groups, self.model.frame_size, workers))

        # on a CPU each core encodes a group: small matrices gain little from a second core
        cores = torch.get_num_threads() if self.model.device.type == "cpu" else 1
        if len(groups) < cores or cores == 1:
            for loaded in loader:
                yield loaded, self.encode(loaded)
            return
        with one_core_per_thread(), ThreadPool(cores) as pool:
            while side_by_side := list(itertools.islice(loader, cores)):
                yield from zip(side_by_side, pool.map(self.encode, side_by_side))

    def add(
        self, loaded: list[LoadedMedia], features: dict[PromptPart, MediaFeatures], strict: bool
    ) -> None:
        """Put features into the cache; note the files that cannot be used."""
        for medium in loaded:
            part = medium.part
            error = medium.error or self.width_error(part, features[part])
            if error:
                self.skip(part, error, strict)
            else:
                self.cache[part] = features[part]

    def encode(self, loaded: list[LoadedMedia]) -> dict[PromptPart, MediaFeatures]:
        """Encode decoded media; those of one kind and shape go together."""
        groups: dict[tuple, list[LoadedMedia]] = {}
        for medium in loaded:
            if medium.error:
                continue
            arrays = medium.arrays
            shape = len(arrays) if isinstance(arrays, list) else tuple(arrays.shape)
            key = (encoded_as(medium), own_encoder(medium.part), shape)
            groups.setdefault(key, []).append(medium)

        # half precision: what an encoder gives is kept for every epoch
        encoded = {}
        for (kind, own, _), media in groups.items():
            for medium, features in zip(media, self.encode_within_memory(kind, own, media)):
                features.features = features.features.half()
                features.scales = [scale.half() for scale in features.scales]
                encoded[medium.part] = features
        return encoded

    def width_error(self, part: PromptPart, features: MediaFeatures) -> str:
        """Say that features of a side channel are of another width than those before; or ""."""
        if not part.side:
            return ""
        width = features.features.shape[-1]
        first_width, first_path = self.first_of.setdefault(part.side, (width, part.path))
        if width == first_width:
            return ""
        return (
            f"{part.path}: side channel {part.side} {width} wide, in {first_path} {first_width}; "
            "give files of one encoder"
        )

    def encode_within_memory(
        self, kind: str, own: str, media: list[LoadedMedia]
    ) -> list[MediaFeatures]:
        """Encode media of one kind and shape, `together` at once.

        Raises:
            torch.OutOfMemoryError: one medium alone does not fit.
        """
        encoded: list[MediaFeatures] = []
        while len(encoded) < len(media):
            part = media[len(encoded) : len(encoded) + self.together]
            try:
                encoded += self.encode_group(kind, own, part)
                continue
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
            # here, since within the handler the error keeps all tensors of the failed call
            free_memory()
            if self.together == ENCODED_TOGETHER:
                tqdm.write(
                    f"out of memory with {len(part)} media at once; encoding goes on with fewer"
                )
            self.together = len(part) // 2
        return encoded

    def encode_group(self, kind: str, own: str, media: list[LoadedMedia]) -> list[MediaFeatures]:
        """Encode media of one kind and shape.

        Args:
            own: name of the encoder that is registered for them; "" for the model's.
        """
        arrays = [medium.arrays for medium in media]
        if own:
            device = self.model.device
            return [MediaFeatures(kind, encode_own(own, array, device)) for array in arrays]
        if kind in ("fast", "array", "points"):
            return [encode_side(kind, array) for array in arrays]
        with self.model.inference_autocast():
            return self.model.encode(kind, arrays, [medium.seconds for medium in media])


def decoding_order(part: PromptPart) -> tuple:
    """Return the sort key of parts that are decoded together."""
    return part.kind, part.path, part.index


def encoded_as(medium: LoadedMedia) -> str:
    """Return the kind as which a medium is encoded.

    Flow and arrays of pictures are encoded as a view.
    """
    kind = medium.part.kind
    pictures = kind == "array" and medium.arrays.dtype == np.uint8
    return "view" if kind == "flow" or pictures else kind


def own_encoder(part: PromptPart) -> str:
    """Return the name of the encoder that is registered for a side channel, or ""."""
    return part.side if part.side in ENCODERS else ""


# --- which samples make a batch ------------------------------------------------------------------


class Mixer:
    """The samples in the batch of each step, as a function of seed and step alone.

    A resumed run therefore continues where it was. A task is drawn with probability proportional to
    rows ** exponent; within a task every row comes once before any comes twice. Of several sources
    each has its share of the samples (--data PATH:SHARE,...).

    Args:
        length: returns about how long a sample is. If given, the samples of `window` steps are
            sorted by it and cut into steps and batches again; the steps come in random order.
        step_batches: batches of a step, over all processes.
        window: with 1, a step has the samples that it has without `length`; its batches have less
            padding.
    """

    def __init__(
        self,
        samples: list[Sample],
        batch_size: int,
        seed: int,
        exponent: float = 0.5,
        length: Callable[[Sample], int] | None = None,
        step_batches: int = 1,
        window: int = 1,
    ):
        self.batch_size, self.seed = batch_size, seed
        self.length, self.step_batches, self.window = length, step_batches, window
        # the tasks of each source
        self.rows: dict[str, list[Sample]] = {}
        for sample in samples:
            self.rows.setdefault(sample.source + sample.task.name, []).append(sample)
        self.names = list(self.rows)
        self.weights = [len(self.rows[name]) ** exponent for name in self.names]
        if len({sample.source for sample in samples}) > 1:
            self.weights = self.with_shares(self.weights)

    def with_shares(self, weights: list[float]) -> list[float]:
        """Scale the weights of each source's tasks so that they sum to its share."""
        firsts = [self.rows[name][0] for name in self.names]
        sums: Counter[str] = Counter()
        for first, weight in zip(firsts, weights):
            sums[first.source] += weight
        return [first.share * w / sums[first.source] for first, w in zip(firsts, weights)]

    def __iter__(self) -> Iterator[list[Sample]]:
        """Yield batches without end; skip those already taken with itertools.islice."""
        mixed = self.mixed()
        if self.length is None:
            yield from mixed
            return
        # sort a window of steps by length and cut it anew: into steps, which are shuffled, and
        # these into batches, so that smaller batches and more of them make the same steps
        for number in itertools.count():
            drawn = itertools.chain(*itertools.islice(mixed, self.window * self.step_batches))
            samples = sorted(drawn, key=self.length)
            steps = cut(samples, self.batch_size * self.step_batches)
            random.Random(f"{self.seed}/{number}").shuffle(steps)
            for step in steps:
                yield from cut(step, self.batch_size)

    def mixed(self) -> Iterator[list[Sample]]:
        """Yield batches of any length."""
        rng = random.Random(self.seed)
        taken: Counter[str] = Counter()
        orders: dict[str, list[Sample]] = {}
        while True:
            # a task for each sample of the batch, and of each task its next row
            batch = []
            for name in rng.choices(self.names, self.weights, k=self.batch_size):
                epoch, position = divmod(taken[name], len(self.rows[name]))
                if position == 0:
                    orders[name] = self.shuffled(name, epoch)
                batch.append(orders[name][position])
                taken[name] += 1
            yield batch

    def shuffled(self, name: str, epoch: int) -> list[Sample]:
        """Return the rows of a task in the order of an epoch."""
        rows = list(self.rows[name])
        random.Random(f"{self.seed}/{name}/{epoch}").shuffle(rows)
        return rows


def cut(items: list, size: int) -> list[list]:
    """Cut a list into lists of `size` items; the last one may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
