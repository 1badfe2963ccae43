"""Task arithmetic: the base plus weighted task vectors (Ilharco et al. 2023, arXiv:2212.04089)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from merging.layout import Layout
from merging.materialise import Transform, unchanged
from merging.operators.base import Read
from populations.genome import Floats


@dataclass(frozen=True)
class TaskArithmetic:
    """``theta = base + sum_k c_k (theta_k - base)``; a source is a task vector ``theta_k - base``.

    Written over the checkpoints the weights are ``[1 - sum_k c_k, c_1, ..., c_K]``: zero coefficients give the
    base bit for bit, a one-hot row the expert.
    """

    name = "task_arithmetic"
    needs_base = True
    changes = False

    def seeds(self, sources: int) -> Floats:
        """(K, K) one-hot rows: base plus one whole task vector is the expert."""
        return np.eye(sources)

    def weights(self, coefficients: Floats) -> Floats:
        """(S, K+1): the base's weight, then the coefficients."""
        table = np.asarray(coefficients, np.float64)
        return np.column_stack([1.0 - table.sum(axis=1), table])

    def transform(self, layout: Layout, read: Read) -> Transform:
        """Base and experts are mixed as they are."""
        return unchanged
