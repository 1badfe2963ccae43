"""Linear merging: a weighted sum of the experts themselves (model soups, Wortsman et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ecotone.merging.kernel.materialise import Transform, unchanged
from ecotone.merging.operators.task_vectors import Pieces
from ecotone.populations.genome import Floats


@dataclass(frozen=True)
class Linear:
    """``theta = sum_k c_k theta_k``; coefficients need not sum to one."""

    name = "linear"
    needs_base = False
    changes = False
    affine = True
    geometry = None
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {}

    def columns(self, experts: Sequence[str]) -> tuple[str, ...]:
        """The experts: one coefficient each."""
        return tuple(experts)

    def seeds(self, experts: int) -> Floats:
        """(K, K) one-hot rows: each is an expert, bit for bit."""
        return np.eye(experts)

    def weights(self, coefficients: Floats, grams: Floats | None = None) -> Floats:
        """(S, K): the coefficients."""
        return np.asarray(coefficients, np.float64)

    def transform(self, pieces: Pieces) -> Transform:
        """The experts are mixed as they are."""
        return unchanged
