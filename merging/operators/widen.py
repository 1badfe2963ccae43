"""WIDEN: task vectors weighed by how far each column moved in size and direction (Yu et al. 2024, arXiv:2408.03092).

A column W_j of a matrix has the magnitude |W_j| and the direction W_j / |W_j|. For expert k and column j of n:

    D_kj = | |W_kj| - |W_0j| |   and   1 - cos(W_kj, W_0j)
    r_kj = rank of D_kj among those of the expert, from 0 to n - 1, divided by n
    s_kj = exp(r_kj) / sum_i exp(r_ij), or ``calibration`` where r_kj > ratio mean_j r_kj
    theta = base + sum_k c_k v_k,   v_k = (s of magnitudes + s of directions) / 2 tau_k

A tensor with one axis has scores by entry, with |tau_k| in the place of r_k. All c_k = 1 is the published merge. Scores
of the experts need not add up to 1.

Input embeddings have a column for each token, the other matrices one for each input. In a stack of matrices (three
axes) each matrix has columns of its own. A convolution (four axes or more) has one for each weight of an output. Equal
D share the lowest of their ranks. Of two directions of which one is 0 the cosine is 0; a column that is 0 in both has
not moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ecotone.merging.kernel.materialise import Transform
from ecotone.merging.models.ties import INPUT_EMBEDDINGS
from ecotone.merging.operators.by_tensor import ByTensor
from ecotone.merging.operators.elementary import exp, summed
from ecotone.merging.operators.prepared import PreparedVectors, prepared
from ecotone.merging.operators.task_vectors import Pieces, Whole, task_vectors
from ecotone.populations.genome import Floats

Sums: TypeAlias = NDArray[np.float64]
"""(J, 3, matrices, n) sums over columns of W_j^2, W_0 (W_j - W_0) and (W_j - W_0)^2 for J models."""

_ROUNDING = 1e-12  # a share of a column's squared move below which a change of direction is rounding


@dataclass(frozen=True)
class Widen(PreparedVectors):
    """``theta = base + sum_k c_k v_k`` with v_k of WIDEN; zero coefficients give the base.

    A score for each column and expert is kept in memory: some 10 MB an expert for a model of 7 billion parameters.

    Args:
        ratio: The multiple of its expert's mean rank beyond which a column has the score ``calibration``.
        calibration: The score of such columns (the authors' c).
    """

    ratio: Annotated[float, Field(ge=0, le=10)] = 1.0
    calibration: Annotated[float, Field(ge=0, le=10)] = 1.0

    name = "widen"
    published: ClassVar[float | None] = 1.0
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {"ratio": (0.0, 10.0), "calibration": (0.0, 10.0)}

    def transform(self, pieces: Pieces) -> Transform:
        """Streams the models once, for the magnitudes and directions of columns."""
        facts = pieces.each(lambda whole: self._fact(whole, pieces.kind))
        return _Weighed(pieces.kind, ByTensor(pieces.tensors, facts), self.calibration)

    def _fact(self, whole: Whole, kind: torch.dtype) -> Tensor:
        """(K, columns) scores; (K,) magnitudes beyond which scores are calibrated where a tensor has but one axis."""
        if len(whole.shape) < 2:
            sizes = [np.abs(vector.numpy()).mean(dtype=np.float64) for vector in task_vectors(whole.read(0), kind)]
            return torch.tensor([self.ratio * float(size) for size in sizes], dtype=torch.float64)
        magnitudes, directions = (self._scores(moves) for moves in _moves(_sums(whole)))
        return (magnitudes + directions) * 0.5

    def _scores(self, moves: Floats) -> Tensor:
        """(K, columns) scores of moves (K, matrices, n)."""
        count = moves.shape[2]
        ranks = np.array([[np.searchsorted(np.sort(row), row) for row in expert] for expert in moves])
        beyond = ranks * count > self.ratio * ranks.sum(axis=2, keepdims=True)
        scores = _softmax([torch.from_numpy(expert.ravel() / count) for expert in ranks])
        return torch.stack(scores).masked_fill_(torch.from_numpy(beyond).flatten(1), self.calibration)


def _sums(whole: Whole) -> Sums:
    """The sums over columns of all models, a block of whole rows at a time."""
    by_token = whole.name.endswith(INPUT_EMBEDDINGS)
    rows = whole.size // whole.width
    columns = (1, rows) if by_token else (rows // whole.height, whole.width)
    sums = np.zeros((len(whole.stored), 3, *columns))

    def add(pieces: Sequence[Tensor], start: int) -> None:
        tables = [piece.double().numpy().reshape(-1, whole.width) for piece in pieces]
        first = (start - whole.start) // whole.width
        stop = first + len(tables[0])
        for j, table in enumerate(tables):
            moved = table - tables[0]
            for place, products in zip(sums[j], (table * table, tables[0] * moved, moved * moved), strict=True):
                if by_token:
                    place[0, first:stop] = products.sum(axis=1)
                else:
                    low, high = first // whole.height, -(-stop // whole.height)
                    cuts = np.maximum(np.arange(low, high) * whole.height, first) - first
                    place[low:high] += np.add.reduceat(products, cuts, axis=0)

    whole.map(add)
    return sums


def _moves(sums: Sums) -> tuple[Floats, Floats]:
    """(K, matrices, n) moves of columns in magnitude, and in direction. A column that has not moved gives exactly 0."""
    squares, products, moved = sums[:, 0], sums[1:, 1], sums[1:, 2]
    lengths = np.sqrt(squares)
    base, experts = lengths[0], lengths[1:]
    both = base + experts
    longer = np.divide(2 * products + moved, both, out=np.zeros_like(both), where=both > 0)
    aside = moved - longer * longer
    aside[aside < _ROUNDING * moved] = 0
    area = 2 * base * experts
    angles = np.divide(aside, area, out=(moved > 0).astype(np.float64), where=area > 0)
    return np.abs(longer), np.clip(angles, 0, 2)


def _softmax(terms: Sequence[Tensor]) -> list[Tensor]:
    """K tensors of shares that add up to 1 at each position."""
    most = terms[0].clone()
    for term in terms[1:]:
        torch.maximum(most, term, out=most)
    powers = [exp(term - most) for term in terms]
    total = summed(powers)
    return [power.div_(total) for power in powers]


@dataclass(frozen=True, eq=False)
class _Weighed:
    """Weighs task vectors by the scores of columns or entries, in pieces of the base and K experts.

    Args:
        kind: The type in which task vectors are formed.
        facts: By tensor, the scores of columns, or the magnitudes beyond which those of entries are calibrated.
        calibration: The score of these.
    """

    kind: torch.dtype
    facts: ByTensor[Tensor]
    calibration: float

    def __call__(self, pieces: Sequence[Tensor], start: int) -> list[Tensor]:
        """The base, and K vectors ``v_k``."""
        return prepared(pieces, start, lambda cut, low: self.facts.vectors(cut, low, self._vectors))

    def _vectors(self, pieces: Sequence[Tensor], place: int, whole: Whole, fact: Tensor) -> Sequence[Tensor]:
        vectors = [vector.double() for vector in task_vectors(pieces, self.kind)]
        for vector, score in zip(vectors, self._scores(vectors, place, whole, fact), strict=True):
            vector.mul_(score)
        return vectors

    def _scores(self, vectors: Sequence[Tensor], place: int, whole: Whole, fact: Tensor) -> Sequence[Tensor]:
        """K tensors of the scores of entries."""
        count, device = vectors[0].numel(), vectors[0].device
        if fact.dim() == 1:
            sizes = [vector.abs() for vector in vectors]
            limits = zip(_softmax(sizes), sizes, fact.tolist(), strict=True)
            return [score.masked_fill_(size > limit, self.calibration) for score, size, limit in limits]
        by_token = whole.name.endswith(INPUT_EMBEDDINGS)
        columns = (whole.rows if by_token else whole.columns)(place, count, device)
        return [table[columns] for table in fact.to(device)]
