"""EMR-Merging's unified task vector: the largest entries that agree (Huang et al. 2024, arXiv:2405.17461).

    gamma = sign(sum_k tau_k), a sum of 0 counting as negative
    tau_uni = gamma max(|tau_k| : tau_k gamma > 0)        0 where none agrees
    theta = base + sum_k c_k v_k,   v_k = tau_uni where tau_k = tau_uni, else 0

Each entry of the unified vector is an entry of some task vector, so it stays with the expert that has it (equal ones
share it evenly), and every expert has a coefficient. All c_k = 1 is ``base + tau_uni``, EMR-Merging's first step
("elect"). Its masks and rescalers by task, which are applied at inference, are no part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ecotone.merging.kernel.materialise import Transform
from ecotone.merging.operators.prepared import PreparedVectors, keep, prepared, shared
from ecotone.merging.operators.task_vectors import Pieces, task_vectors
from ecotone.merging.operators.ties_vectors import sign_of_sum


@dataclass(frozen=True)
class Emr(PreparedVectors):
    """``theta = base + sum_k c_k v_k`` with v_k that add up to the unified vector; zero coefficients give the base."""

    name = "emr"
    published: ClassVar[float | None] = 1.0

    def transform(self, pieces: Pieces) -> Transform:
        """Reads nothing beforehand: an entry depends on those of its position."""
        return _Unified(pieces.kind)


@dataclass(frozen=True)
class _Unified:
    """Keeps the largest agreeing entries, in pieces of the base and K experts."""

    kind: torch.dtype

    def __call__(self, pieces: Sequence[Tensor], start: int) -> list[Tensor]:
        """The base, and K vectors ``v_k``."""
        return prepared(pieces, start, self._vectors)

    def _vectors(self, pieces: Sequence[Tensor], _start: int) -> Sequence[Tensor]:
        vectors = task_vectors(pieces, self.kind)
        signs = sign_of_sum(vectors)
        signs.sub_(signs.clone().eq_(0))
        sizes = [vector.mul(signs) for vector in vectors]  # below 0 where it disagrees
        largest = sizes[0].clamp(min=0)
        for size in sizes[1:]:
            torch.maximum(largest, size, out=largest)
        for vector, size in zip(vectors, sizes, strict=True):
            keep(vector, size.eq_(largest))
        return shared(vectors, "mean")
