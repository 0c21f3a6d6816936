"""The size of the batches that a model answers, in tokens instead of rows.

What an answer needs grows with the tokens that the LM holds at once: keys and values of all layers,
and the widest moment of an MLP. So a batch has as many rows as a number of tokens allows, prompts
and answers together. Where a GPU has less memory than was thought, the number is halved.

Processes that share an LM (--fsdp) run it equally often: they agree on the number of parts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from crab_min.config import RunConfig
from crab_min.devices import free_memory
from crab_min.errors import RunError
from crab_min.runs import processes


@dataclass
class TokenBudget:
    """The number of padded tokens that a batch may have, prompts and answers together.

    It is kept for the next batches once it was halved.
    """

    tokens: int = RunConfig.eval_batch_tokens
    sharded: bool = False  # the LM is shared by all processes; then nothing is tried again
    halved: bool = False

    def run(
        self,
        answer: Callable[[list], list],
        items: list,
        lengths: list[int],
        most: int = 0,
        accompany: Callable[[], None] | None = None,
    ) -> list:
        """Call `answer` on parts of the items that are within the budget.

        An item that alone is longer than the budget is a part of its own.

        Args:
            answer: returns one result per item.
            lengths: tokens of each item: its prompt, and the answer that it may have.
            most: items of a part (0: any number).
            accompany: runs a sharded LM without a result, while other processes answer a part.
                None where all processes have the same items.

        Returns:
            The results, in the order of the items.

        Raises:
            RunError: one item alone does not fit into memory.
        """
        passes = 0
        if self.sharded and accompany:
            own = self.count_parts(lengths, most)
            passes = max(processes.gather(own)) - own
        results: list = []
        while len(results) < len(items):
            start = len(results)
            rows = self.rows(lengths[start:], most)
            try:
                results += answer(items[start : start + rows])
                continue
            except torch.OutOfMemoryError as error:
                if self.sharded:
                    raise
                reason = str(error).split(".")[0]
            # here, since within the handler the error keeps all tensors of the failed call
            self.halve(rows, lengths[start : start + rows], reason)
        for _ in range(passes):
            accompany()
        return results

    def count_parts(self, lengths: list[int], most: int) -> int:
        """Return the number of parts that items of these lengths make."""
        start = parts = 0
        while start < len(lengths):
            start += self.rows(lengths[start:], most)
            parts += 1
        return parts

    def rows(self, lengths: list[int], most: int) -> int:
        """Return how many of the next items make a part: at least one."""
        rows = longest = 0
        for length in lengths:
            longest = max(longest, length)
            is_full = rows > 0 and longest * (rows + 1) > self.tokens
            if is_full or (most and rows == most):
                break
            rows += 1
        return rows

    def halve(self, rows: int, lengths: list[int], reason: str) -> None:
        """Halve the budget below what a part of these lengths had."""
        if rows == 1:
            raise RunError(
                f"out of memory for one sample of {lengths[0]} tokens ({reason}); a run of "
                "train.py with fewer --frames or --load-in-4bit needs less, and train.py --plan "
                "says how much"
            )
        free_memory()
        if not self.halved:
            tqdm.write(
                f"out of memory with {rows} samples at once; evaluation goes on with fewer "
                f"(--eval-batch-tokens {self.tokens} is too much here)"
            )
        self.halved = True
        self.tokens = max(lengths) * rows // 2
