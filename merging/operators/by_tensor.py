"""What operators know of each tensor, found by position when pieces are changed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ecotone.merging.operators.task_vectors import Whole

Fact = TypeVar("Fact")


@dataclass(frozen=True, eq=False)
class ByTensor(Generic[Fact]):
    """The tensors of a merge, and a fact of each.

    Args:
        tensors: T tensors in flat order.
        facts: T facts.
    """

    tensors: Sequence[Whole]
    facts: Sequence[Fact]

    @cached_property
    def _starts(self) -> list[int]:
        return [whole.start for whole in self.tensors]

    def vectors(
        self,
        pieces: Sequence[Tensor],
        start: int,
        work: Callable[[Sequence[Tensor], int, Whole, Fact], Sequence[Tensor]],
    ) -> Sequence[Tensor]:
        """The K vectors that ``work`` makes of J pieces.

        Args:
            pieces: J flat pieces; they may lie in several tensors.
            start: Their position in the flat vector.
            work: Makes K vectors of pieces of one tensor, their place in it, the tensor and its fact.
        """
        stop, low, made = start + pieces[0].numel(), start, []
        index = bisect_right(self._starts, start) - 1
        while low < stop:
            whole, fact = self.tensors[index], self.facts[index]
            high = min(stop, whole.start + whole.size)
            part = [piece[low - start : high - start] for piece in pieces]
            made.append(work(part, low - whole.start, whole, fact))
            low, index = high, index + 1
        return made[0] if len(made) == 1 else [torch.cat(parts) for parts in zip(*made, strict=True)]
