"""Damped task arithmetic: task vectors are shortened before they are added to the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from ecotone.merging.kernel.materialise import Transform, unchanged
from ecotone.merging.operators.task_vectors import Pieces
from ecotone.populations.genome import Floats


@dataclass(frozen=True)
class Damped:
    """``theta = base + damping * sum_k c_k (theta_k - base)``.

    Args:
        damping: Each task vector's factor.
    """

    damping: Annotated[float, Field(gt=0, le=1)] = 0.5

    name = "damped"
    needs_base = True
    changes = False
    affine = True
    geometry = None
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {"damping": (0.0, 1.0)}

    def columns(self, experts: Sequence[str]) -> tuple[str, ...]:
        """The experts: one coefficient each."""
        return tuple(experts)

    def seeds(self, experts: int) -> Floats:
        """(K, K) rows that undo the damping."""
        return np.eye(experts) / self.damping

    def weights(self, coefficients: Floats, grams: Floats | None = None) -> Floats:
        """(S, K+1): the base's weight, then the damped coefficients."""
        table = self.damping * np.asarray(coefficients, np.float64)
        return np.column_stack([1.0 - table.sum(axis=1), table])

    def transform(self, pieces: Pieces) -> Transform:
        """Base and experts are mixed as they are."""
        return unchanged
