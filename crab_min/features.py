"""Samples -> media -> features -> batches: what stands between the annotation files and a model.

`Features` decodes media in worker processes. It either keeps what the frozen encoders made of them, so that a clip that many questions share
is decoded and encoded once (small models, small data), or decodes some batches ahead of the model and keeps nothing. What a batch holds is
decided before by `Mixer`, so that nothing depends on the number of workers.
"""
import itertools
import os
import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tqdm import tqdm

from crab_min.data import BLACK, DataError, Sample, decoding
from crab_min.encoders import ENCODERS, MediaFeatures, encode_own, encode_side
from crab_min.feature_cache import FeatureCache
from crab_min.interface import PromptPart
from crab_min.model import AVLanguageModel
from crab_min.runs import processes

WORKERS = min(4, os.cpu_count() or 1)                  # processes that decode


@dataclass
class Features:
    """Frozen-encoder features of media parts, in half precision."""
    model: AVLanguageModel
    keep: bool = True                                  # in memory, once computed
    max_bad: float = .01                               # share of unreadable media above which work stops
    folder: str = ""                                   # where features are kept on disk too (feature_cache.py)
    workers: int = WORKERS                             # processes that decode
    store: dict = field(default_factory=dict)
    bad: dict = field(default_factory=dict)            # part -> reason
    total: int = 0                                     # media that were announced to `prepare`

    def __post_init__(self):
        self.disk = FeatureCache(self.folder, self.model) if self.folder else None

    def prepare(self, samples: list[Sample], strict: bool = True) -> list[Sample]:
        """The samples whose media can be read. With `keep` all are decoded and encoded now, else it is checked that the files are there.

        strict: an unreadable file is an error; else it is listed in `bad`, up to `max_bad` of all. Raises DataError.
        """
        parts = sorted({p for s in samples for p in s.media if p not in self.store and p not in self.bad}, key=lambda p: (p.kind, p.path, p.index))
        self.total += len(parts)
        if self.keep:
            self.decode(parts, strict)
        else:
            self.take([(p, None, f"{p.path}: no such file; fetch it, or correct the annotation") for p in parts if p.path != BLACK and not os.path.exists(p.path)], strict)
        return self.readable(samples)

    def decode(self, parts: list[PromptPart], strict: bool) -> None:
        """Put the features of `parts` into the store, from the disk where it has them; many are decoded by workers, with a progress bar."""
        parts = self.fetch(parts)
        groups = [parts[i:i + 8] for i in range(0, len(parts), 8)]
        loader = decoding(groups, self.model.frame_size, self.workers if len(parts) > 32 else 0)
        with tqdm(total=len(parts), desc="decoding and encoding", unit="file", disable=len(parts) < 32 or processes.rank() > 0) as bar:
            for group in loader:
                self.take(group, strict)
                bar.update(len(group))

    def fetch(self, parts: list[PromptPart]) -> list[PromptPart]:
        """Put into the store what the disk has; the parts that it has not."""
        found = {part: features for part in parts if self.disk and (features := self.disk.read(part))}
        self.store |= found
        return [p for p in parts if p not in found]

    def readable(self, samples: list[Sample]) -> list[Sample]:
        return [s for s in samples if not any(p in self.bad for p in s.media)]

    def take(self, loaded: list[tuple], strict: bool) -> None:
        """Encode what a worker sent: (part, (arrays, seconds), None), or (part, None, why it cannot be read)."""
        groups: dict = {}
        for part, media, reason in loaded:
            if reason is None:
                kind = "view" if part.kind == "flow" or part.kind == "array" and media[0].dtype == "uint8" else part.kind            # pictures
                groups.setdefault((kind, part.side in ENCODERS and part.side, getattr(media[0], "shape", len(media[0]))), []).append((part, *media))
            elif strict:
                raise DataError(reason)
            else:
                self.bad[part] = reason
                tqdm.write(f"skipped: {reason}")
                if len(self.bad) > self.max_bad * self.total and len(self.bad) > 1:
                    raise DataError(f"{len(self.bad)} unreadable files, more than --max-bad {self.max_bad:.0%}; the last: {reason}")
        for (kind, own, _), items in groups.items():
            arrays = [arrays for _, arrays, _ in items]
            if own:
                found = [MediaFeatures(kind, encode_own(own, a, self.model.device)) for a in arrays]
            elif kind in ("fast", "array", "points"):
                found = [encode_side(kind, a) for a in arrays]
            else:
                found = self.model.encode(kind, arrays, [seconds for *_, seconds in items])
            for (part, *_), features in zip(items, found):
                features.features, features.scales = features.features.half(), [scale.half() for scale in features.scales]
                self.store[part] = features
                if self.disk:
                    self.disk.write(part, features)

    def batches(self, plan: Iterable[list[Sample]], strict: bool = True) -> Iterator[tuple[list[Sample], list[list[MediaFeatures]]]]:
        """The batches of `plan` in their order, each with the features of its samples' media; where not strict, without unreadable samples."""
        if self.keep:
            for samples in map(self.readable, plan):
                yield samples, self(samples)
            return
        ahead: deque[list[Sample]] = deque()

        def parts() -> Iterator[list[PromptPart]]:
            for samples in plan:
                ahead.append(samples)
                wanted = dict.fromkeys(p for s in samples for p in s.media if p not in self.bad)
                yield [p for p in wanted if not (self.disk and (file := self.disk.file(p)) and file.exists())]
        for loaded in decoding(parts(), self.model.frame_size, self.workers):
            self.take(loaded, strict)
            samples = self.readable(ahead.popleft())
            self.decode(list(dict.fromkeys(p for s in samples for p in s.media if p not in self.store)), strict)           # from the disk
            yield samples, self.of(samples)
            self.store.clear()

    def of(self, samples: list[Sample]) -> list[list[MediaFeatures]]:
        return [[self.store[p] for p in s.media] for s in samples]

    def __call__(self, samples: list[Sample]) -> list[list[MediaFeatures]]:
        """The features of each sample's media, in reading order, computed now where they are not kept."""
        if missing := list(dict.fromkeys(p for s in samples for p in s.media if p not in self.store)):
            self.decode(missing, strict=True)
        media = self.of(samples)
        if not self.keep:
            self.store.clear()
        return media


# --- order -----------------------------------------------------------------------------------------------------------------
class Mixer:
    """Which samples make up the batch of a step: a function of (seed, step) alone, so that a resumed run goes on where it was.

    A task is drawn with probability proportional to (rows ** alpha); within a task every row comes once before any comes twice.
    lengths: of each sample by id; then batches are made of samples of about one length, out of as many as fill 16 batches, which come in random order.
    """

    def __init__(self, samples: list[Sample], batch_size: int, seed: int, alpha: float = .5, lengths: dict[str, int] | None = None):
        self.batch_size, self.seed, self.lengths = batch_size, seed, lengths
        self.rows: dict[str, list[Sample]] = {}
        for sample in samples:
            self.rows.setdefault(sample.task.name, []).append(sample)
        self.names = list(self.rows)
        self.weights = [len(self.rows[n]) ** alpha for n in self.names]

    def epoch(self, name: str, number: int) -> list[Sample]:
        rows = list(self.rows[name])
        random.Random(f"{self.seed}/{name}/{number}").shuffle(rows)
        return rows

    def __iter__(self):
        """Batches without end; skip those already done with itertools.islice."""
        if self.lengths is None:
            yield from self.mixed()
            return
        mixed = self.mixed()
        for number in itertools.count():
            samples = sorted(itertools.chain(*itertools.islice(mixed, 16)), key=lambda s: self.lengths[s.id])
            batches = [samples[i:i + self.batch_size] for i in range(0, len(samples), self.batch_size)]
            random.Random(f"{self.seed}/{number}").shuffle(batches)
            yield from batches

    def mixed(self):
        rng, drawn, orders = random.Random(self.seed), Counter(), {}
        while True:
            batch = []
            for name in rng.choices(self.names, self.weights, k=self.batch_size):
                number, position = divmod(drawn[name], len(self.rows[name]))
                if position == 0:
                    orders[name] = self.epoch(name, number)
                batch.append(orders[name][position])
                drawn[name] += 1
            yield batch
