"""Localize-and-Stitch without data: largest entries, shared where they overlap (He et al. 2024, arXiv:2408.13656).

    m_k   = tau_k is among the largest ``density * n`` of its n entries, and is not 0
    theta = base + sum_k c_k v_k,   v_k = m_k tau_k / max(sum_j m_j, 1)

All c_k = 1 is the paper's stitching. (An overlap is divided by the number of masks there. The authors' code divides by
a counter that it overwrites.) The paper's masks that are learned from data are no part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ecotone.merging.kernel.materialise import Transform
from ecotone.merging.operators.prepared import Density, PreparedVectors, keep, prepared, shared
from ecotone.merging.operators.task_vectors import Pieces, largest, task_vectors


@dataclass(frozen=True)
class LocalizeAndStitch(PreparedVectors):
    """``theta = base + sum_k c_k v_k`` with v_k of Localize-and-Stitch; zero coefficients give the base.

    Args:
        density: The share of each task vector's n entries in its mask; 0.05 to 0.1 is usual. A mask has the largest
            ``density * n`` entries (rounded, at least 1), and all entries equal to the smallest of them, but no zeros.
    """

    density: Density = 0.1

    name = "localize_and_stitch"
    published: ClassVar[float | None] = 1.0
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {"density": (0.0, 1.0)}

    def transform(self, pieces: Pieces) -> Transform:
        """Streams the models to find the thresholds (``largest``)."""
        rank = max(1, round(self.density * pieces.size))
        whole = (0.0,) * pieces.vectors
        return _Stitched(pieces.kind, whole if rank == pieces.size else largest(pieces, rank))


@dataclass(frozen=True)
class _Stitched:
    """Drops entries outside the masks and shares the others, in pieces of the base and K experts.

    Args:
        kind: The type in which task vectors are formed.
        thresholds: K magnitudes below which entries are in no mask.
    """

    kind: torch.dtype
    thresholds: tuple[float, ...]

    def __call__(self, pieces: Sequence[Tensor], start: int) -> list[Tensor]:
        """The base, and K vectors ``v_k``."""
        return prepared(pieces, start, self._vectors)

    def _vectors(self, pieces: Sequence[Tensor], _start: int) -> Sequence[Tensor]:
        vectors = task_vectors(pieces, self.kind)
        for vector, threshold in zip(vectors, self.thresholds, strict=True):
            keep(vector, vector.abs().ge_(threshold))
        return shared(vectors, "mean")
