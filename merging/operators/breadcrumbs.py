"""Model Breadcrumbs: neither the largest nor the smallest entries (Davari and Belilovsky 2023, arXiv:2312.06795).

    theta = base + sum_k c_k m_k tau_k

In each tensor of n entries m_k drops the ``gamma * n`` largest magnitudes, outliers, and as many of the smallest as
leave ``density * n`` (both rounded down; at least one is left). Where the two do not go together, fewer of the largest
are dropped. All c_k = alpha is the paper's ``base + alpha sum_k m_k tau_k``.

Where ``gamma * n`` is below 1, none of the largest are dropped; mergekit loses such tensors whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from ecotone.merging.kernel.materialise import Transform
from ecotone.merging.operators.by_tensor import ByTensor
from ecotone.merging.operators.order_statistics import magnitudes, order_statistics
from ecotone.merging.operators.prepared import Density, PreparedVectors, keep, prepared
from ecotone.merging.operators.task_vectors import Pieces, Whole, task_vectors

Limits: TypeAlias = Sequence[tuple[float, ...]]
"""For each of K task vectors the least and the largest magnitude of a tensor that is kept."""


@dataclass(frozen=True)
class Breadcrumbs(PreparedVectors):
    """``theta = base + sum_k c_k m_k tau_k`` with masks of Model Breadcrumbs; zero coefficients give the base.

    Args:
        density: The share of each tensor's entries that is kept; 0.9 is usual. Entries equal to the largest or the
            smallest kept one stay, too (many, in models of 16 bits).
        gamma: The share of each tensor's entries, the largest, that is dropped; 0.01 is usual.
    """

    density: Density = 0.9
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.01

    name = "breadcrumbs"
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {"density": (0.0, 1.0), "gamma": (0.0, 0.5)}

    def transform(self, pieces: Pieces) -> Transform:
        """Streams the models twice (four times in float64), to find the limits of each tensor."""
        limits = pieces.each(lambda whole: self._limits(whole, pieces.kind))
        return _Between(pieces.kind, ByTensor(pieces.tensors, limits))

    def _limits(self, whole: Whole, kind: torch.dtype) -> Limits:
        """The limits of one tensor's magnitudes."""
        n = whole.size
        kept = max(1, int(self.density * n))
        dropped = min(int(self.gamma * n), n - kept)
        ranks = [(dropped + kept, dropped + 1)] * (len(whole.stored) - 1)
        return order_statistics(whole, lambda cut, _: magnitudes(task_vectors(cut, kind)), ranks, kind)


@dataclass(frozen=True, eq=False)
class _Between:
    """Drops entries outside the limits of their tensor, in pieces of the base and K experts.

    Args:
        kind: The type in which task vectors are formed.
        limits: By tensor, the limits.
    """

    kind: torch.dtype
    limits: ByTensor[Limits]

    def __call__(self, pieces: Sequence[Tensor], start: int) -> list[Tensor]:
        """The base, and K vectors."""
        return prepared(pieces, start, lambda cut, low: self.limits.vectors(cut, low, self._vectors))

    def _vectors(self, pieces: Sequence[Tensor], _place: int, _whole: Whole, limits: Limits) -> Sequence[Tensor]:
        vectors = task_vectors(pieces, self.kind)
        for vector, (low, high) in zip(vectors, limits, strict=True):
            size = vector.abs()
            keep(vector, size.clone().ge_(low).mul_(size.le_(high)))
        return vectors
