"""Arcee Fusion: the changes that matter most, by their size and by their row (Arcee AI, a method of mergekit).

    importance = |tau_k| KL(softmax(row of theta_k) || softmax(row of base))          in each tensor
    theta = base + sum_k c_k m_k tau_k,   m_k = importance >= median + spread (third quartile - first quartile)

One expert with c = 1 is the published merge, which is of two models. Of several experts each has a mask of its own, and
what is left of them adds up. Quartiles are entries of the sorted n by index, ``q (n - 1)`` rounded down, of all
entries: mergekit draws a million of larger tensors without a seed, so its merges differ from run to run (and it adds
1e-8 to probabilities).

A tensor with one axis is one row. So is, of a convolution (four axes or more), each output's weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeAlias

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ecotone.merging.kernel.materialise import Transform
from ecotone.merging.operators.by_tensor import ByTensor
from ecotone.merging.operators.order_statistics import order_statistics
from ecotone.merging.operators.prepared import PreparedVectors, keep, prepared
from ecotone.merging.operators.task_vectors import Pieces, Whole, task_vectors
from ecotone.populations.genome import Floats

Importance: TypeAlias = tuple[tuple[float, ...], Tensor]
"""Of a tensor the K thresholds, and (K, rows) the divergence of each row."""

_MOST = 600.0  # of the logarithm of a quotient of probabilities, so that its power is finite


@dataclass(frozen=True)
class ArceeFusion(PreparedVectors):
    """``theta = base + sum_k c_k m_k tau_k`` with masks of Arcee Fusion; zero coefficients give the base.

    A number for each row and expert is kept in memory: some 10 MB an expert for a model of 7 billion parameters.

    Args:
        spread: How many interquartile ranges above the median an entry's importance must be; 1.5 as published.
    """

    spread: Annotated[float, Field(ge=0, le=10)] = 1.5

    name = "arcee_fusion"
    published: ClassVar[float | None] = 1.0
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {"spread": (0.0, 10.0)}

    def transform(self, pieces: Pieces) -> Transform:
        """Streams the models five times, for the divergence of rows and the quartiles of each tensor."""
        facts = pieces.each(lambda whole: self._importance(whole, pieces.kind))
        return _Important(pieces.kind, ByTensor(pieces.tensors, facts))

    def _importance(self, whole: Whole, kind: torch.dtype) -> Importance:
        """The thresholds of a tensor, and its rows."""
        rows = torch.from_numpy(np.concatenate(whole.map(lambda pieces, _: _divergences(pieces, whole.width)), axis=1))

        def work(pieces: Sequence[Tensor], start: int) -> list[Tensor]:
            return _important(task_vectors(pieces, kind), start - whole.start, whole, rows)

        ranks = [whole.size - int(share * (whole.size - 1)) for share in (0.25, 0.5, 0.75)]
        quartiles = order_statistics(whole, work, [ranks] * len(rows), torch.float64)
        return tuple(median + self.spread * (high - low) for low, median, high in quartiles), rows


def _divergences(pieces: Sequence[Tensor], width: int) -> Floats:
    """(K, rows) KL(softmax(row of theta_k) || softmax(row of base)).

    As sum_j q_j g(log(p_j / q_j)) with g(r) = exp(r) r - exp(r) + 1, whose terms are not negative. So rows that hardly
    changed are as exact as others, and those that did not give 0.
    """
    base, *experts = (piece.double().numpy().reshape(-1, width) for piece in pieces)
    logarithms = base - _log_sum(base)
    shares, found = np.exp(logarithms), []
    for expert in experts:
        change = np.minimum((expert - base) - (_log_sum(expert) - _log_sum(base)), _MOST)
        growth = np.expm1(change)
        found.append((shares * (change * growth - (growth - change))).sum(axis=1))
    return np.maximum(found, 0)


def _log_sum(rows: Floats) -> Floats:
    """(rows, 1) the logarithm of the sum of the exponentials of each row."""
    most = rows.max(axis=1, keepdims=True)
    total: Floats = np.log(np.exp(rows - most).sum(axis=1, keepdims=True)) + most
    return total


def _important(vectors: Sequence[Tensor], place: int, whole: Whole, rows: Tensor) -> list[Tensor]:
    """K tensors of the importance of entries, in float64."""
    numbers = whole.rows(place, vectors[0].numel(), vectors[0].device)
    tables = rows.to(vectors[0].device)
    return [vector.abs().double().mul_(table[numbers]) for vector, table in zip(vectors, tables, strict=True)]


@dataclass(frozen=True, eq=False)
class _Important:
    """Drops entries of less importance, in pieces of the base and K experts.

    Args:
        kind: The type in which task vectors are formed.
        facts: By tensor, the thresholds and the divergence of rows.
    """

    kind: torch.dtype
    facts: ByTensor[Importance]

    def __call__(self, pieces: Sequence[Tensor], start: int) -> list[Tensor]:
        """The base, and K vectors."""
        return prepared(pieces, start, lambda cut, low: self.facts.vectors(cut, low, self._vectors))

    def _vectors(self, pieces: Sequence[Tensor], place: int, whole: Whole, fact: Importance) -> Sequence[Tensor]:
        thresholds, rows = fact
        vectors = task_vectors(pieces, self.kind)
        for vector, found, least in zip(vectors, _important(vectors, place, whole, rows), thresholds, strict=True):
            keep(vector, found.ge_(least))
        return vectors
