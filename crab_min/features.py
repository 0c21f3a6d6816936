"""Samples -> media -> features -> batches: what stands between the annotation files and a model.

`Features` decodes media in worker processes and keeps what the frozen encoders made of them, so that a clip that many questions share is
decoded and encoded once; `Mixer` says which samples make up the batch of a step.
"""
import os
import random
from collections import Counter
from dataclasses import dataclass, field

from torch.utils.data import DataLoader
from tqdm import tqdm

from crab_min.data import DataError, MediaSet, Sample
from crab_min.interface import Part
from crab_min.model import AVLanguageModel, MediaFeatures


@dataclass
class Features:
    """Frozen-encoder features of media parts, computed once and kept where `keep` is set (half precision, in memory)."""
    model: AVLanguageModel
    keep: bool = True
    max_bad: float = .01                               # share of unreadable media above which `fill` stops
    store: dict = field(default_factory=dict)
    bad: dict = field(default_factory=dict)            # part -> reason

    def fill(self, samples: list[Sample], strict: bool = True) -> None:
        """Decode and encode every medium of the samples that is not there yet, with a progress bar.

        strict: an unreadable file is an error; else it is listed in `bad`, up to `max_bad` of all. Raises DataError.
        """
        parts = sorted({p for s in samples for p in s.media if p not in self.store and p not in self.bad}, key=lambda p: (p.kind, p.path, p.index))
        loader = DataLoader(MediaSet(parts, self.model.frame_size), batch_size=8, num_workers=min(2, os.cpu_count() or 1) if len(parts) > 32 else 0,
                            collate_fn=list)
        with tqdm(total=len(parts), desc="decoding and encoding", unit="file", disable=len(parts) < 32) as bar:
            for group in loader:
                for i, _, reason in group:
                    if reason is not None:
                        self.reject(parts[i], reason, strict, len(parts))
                self.encode([(parts[i], *loaded) for i, loaded, reason in group if reason is None])
                bar.update(len(group))

    def reject(self, part: Part, reason: str, strict: bool, total: int) -> None:
        if strict:
            raise DataError(reason)
        self.bad[part] = reason
        tqdm.write(f"skipped: {reason}")
        if len(self.bad) > self.max_bad * max(total, len(self.store)) and len(self.bad) > 1:
            raise DataError(f"{len(self.bad)} unreadable files, more than --max-bad {self.max_bad:.0%}; the last: {reason}")

    def encode(self, loaded: list[tuple]) -> None:
        groups: dict = {}
        for part, arrays, seconds in loaded:
            groups.setdefault((part.kind, len(arrays)), []).append((part, arrays, seconds))
        for (kind, _), items in groups.items():
            for (part, *_), features in zip(items, self.model.encode(kind, [arrays for _, arrays, _ in items], [seconds for *_, seconds in items])):
                features.features = features.features.half()
                self.store[part] = features

    def __call__(self, samples: list[Sample]) -> list[list[MediaFeatures]]:
        """The features of each sample's media, in reading order."""
        self.fill(samples)
        media = [[self.store[p] for p in s.media] for s in samples]
        if not self.keep:
            self.store.clear()
        return media


# --- order -----------------------------------------------------------------------------------------------------------------
class Mixer:
    """Which samples make up the batch of a step: a function of (seed, step) alone, so that a resumed run goes on where it was.

    A task is drawn with probability proportional to (rows ** alpha); within a task every row comes once before any comes twice.
    """

    def __init__(self, samples: list[Sample], batch_size: int, seed: int, alpha: float = .5):
        self.batch_size, self.seed = batch_size, seed
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
