"""Task arithmetic: the base plus weighted task vectors (Ilharco et al. 2023, arXiv:2212.04089)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ecotone.merging.kernel.materialise import Transform, unchanged
from ecotone.merging.operators.task_vectors import Pieces
from ecotone.populations.genome import Floats


@dataclass(frozen=True)
class TaskArithmetic:
    """``theta = base + sum_k c_k (theta_k - base)``; a source is a task vector ``theta_k - base``.

    Written over the checkpoints the weights are ``[1 - sum_k c_k, c_1, ..., c_K]``: zero coefficients give the
    base bit for bit, a one-hot row the expert.
    """

    name = "task_arithmetic"
    needs_base = True
    changes = False
    affine = True
    geometry = None
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {}

    def columns(self, experts: Sequence[str]) -> tuple[str, ...]:
        """The experts: one coefficient each."""
        return tuple(experts)

    def seeds(self, experts: int) -> Floats:
        """(K, K) one-hot rows: base plus one whole task vector is the expert."""
        return np.eye(experts)

    def weights(self, coefficients: Floats, grams: Floats | None = None) -> Floats:
        """(S, K+1): the base's weight, then the coefficients."""
        table = np.asarray(coefficients, np.float64)
        return np.column_stack([1.0 - table.sum(axis=1), table])

    def transform(self, pieces: Pieces) -> Transform:
        """Base and experts are mixed as they are."""
        return unchanged
