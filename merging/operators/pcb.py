"""PCB-Merging: entries of task vectors compete by size and by agreement (Du et al. 2024, arXiv:2410.02396).

    intra_k = exp(K minmax(|tau_k|)^2)        |tau_k| clamped at the outermost of its own magnitudes, over all n entries
    inter_k = tanh(tau_k sum_j tau_j)         not clamped
    s_k     = minmax(intra_k inter_k)         clamped from below at the (1 - density) quantile
    theta   = base + sum_k c_k v_k,   v_k = tau_k s_k / max(sum_j s_j, 1e-12)       tau_k clamped

Quantiles are entries of the sorted n by index: ``n q`` and ``n (1 - q) - 1`` rounded down, as in the authors' code. All
c_k = 1 is the published merge. The authors multiply it by lambda = 1.2, or search for c_k from 0.8 to 1.3.

The scores depend on the scale of task vectors: tanh is linear where these are small, as in most fine-tuned models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from ecotone.merging.kernel.materialise import Transform
from ecotone.merging.operators.elementary import exp, summed, tanh
from ecotone.merging.operators.order_statistics import magnitudes, order_statistics
from ecotone.merging.operators.prepared import Density, PreparedVectors, prepared
from ecotone.merging.operators.task_vectors import Pieces, task_vectors

Limits: TypeAlias = tuple[float, ...]
"""The least and the largest of numbers."""


@dataclass(frozen=True)
class Pcb(PreparedVectors):
    """``theta = base + sum_k c_k v_k`` with v_k of PCB-Merging; zero coefficients give the base.

    Args:
        density: The share of each task vector's entries whose scores count (the paper's r); 0.1 is the authors', 0.05
            where they search coefficients. More positions are merged, as experts have different ones.
        outliers: The share of magnitudes at either end of each task vector that are clamped to the nearest other one;
            the authors take 0.0001 for language models and 0.01 for vision models.
    """

    density: Density = 0.1
    outliers: Annotated[float, Field(ge=0, lt=0.5)] = 1e-4

    name = "pcb"
    published: ClassVar[float | None] = 1.0
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {"density": (0.0, 1.0)}

    def transform(self, pieces: Pieces) -> Transform:
        """Streams the models four times (eight in float64): for the limits of magnitudes, and for those of scores."""
        n, each = pieces.size, range(pieces.vectors)
        low, high = int(n * self.outliers), int(n * (1 - self.outliers) - 1)
        ranks = [(n - low, n - max(low, high))] * len(each)
        ends = order_statistics(pieces, lambda cut, _: magnitudes(task_vectors(cut, pieces.kind)), ranks, pieces.kind)
        competition = _Competition(pieces.kind, tuple(ends))
        least = min(int(n * (1 - self.density)), n - 1)
        limits = order_statistics(
            pieces, lambda cut, _: competition.scores(cut), [(n - least, 1)] * len(each), pieces.kind
        )
        return replace(competition, limits=tuple(limits))


@dataclass(frozen=True)
class _Competition:
    """Scores entries and shares positions among experts, in pieces of the base and K experts.

    Args:
        kind: The type in which task vectors and scores are formed.
        ends: K pairs: the magnitudes to which those outside are clamped.
        limits: K pairs: the score at which weights begin, and the largest score.
    """

    kind: torch.dtype
    ends: tuple[Limits, ...]
    limits: tuple[Limits, ...] = ()

    def __call__(self, pieces: Sequence[Tensor], start: int) -> list[Tensor]:
        """The base, and K vectors ``v_k``."""
        return prepared(pieces, start, self._vectors)

    def scores(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """K tensors ``intra_k inter_k``."""
        vectors = [vector.double() for vector in task_vectors(pieces, self.kind)]
        total, scores = summed(vectors), []
        for vector, (low, high) in zip(vectors, self.ends, strict=True):
            size = _between(vector.abs(), low, high, flat=0.0)
            intra = exp(size.mul_(size).mul_(len(vectors)))
            scores.append(tanh(vector.mul_(total)).mul_(intra).to(self.kind))
        return scores

    def _vectors(self, pieces: Sequence[Tensor], _start: int) -> Sequence[Tensor]:
        weights = [
            _between(score.double(), low, high, flat=1.0)
            for score, (low, high) in zip(self.scores(pieces), self.limits, strict=True)
        ]
        total = summed(weights).clamp_(min=1e-12)
        vectors = [vector.double() for vector in task_vectors(pieces, self.kind)]
        for vector, weight, (low, high) in zip(vectors, weights, self.ends, strict=True):
            size = vector.abs().clamp_(low, high)
            vector.sign_().mul_(size).mul_(weight).div_(total)
        return vectors


def _between(numbers: Tensor, low: float, high: float, flat: float) -> Tensor:
    """Numbers as shares of the way from ``low`` to ``high``, in place, those outside clamped.

    Where the two are equal, numbers that reach them are ``flat``, the others 0.
    """
    if low < high:
        span = torch.tensor(high - low, dtype=numbers.dtype, device=numbers.device)  # a division on every device
        return numbers.clamp_(low, high).sub_(low).div_(span)
    return numbers.ge_(high).mul_(flat)
