"""Linear merging: a weighted sum of the experts themselves (model soups, Wortsman et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from merging.layout import Layout
from merging.materialise import Transform, unchanged
from merging.operators.base import Read
from populations.genome import Floats


@dataclass(frozen=True)
class Linear:
    """``theta = sum_k c_k theta_k``; coefficients need not sum to one."""

    name = "linear"
    needs_base = False
    changes = False

    def seeds(self, sources: int) -> Floats:
        """(K, K) one-hot rows: each is an expert, bit for bit."""
        return np.eye(sources)

    def weights(self, coefficients: Floats) -> Floats:
        """(S, K): the coefficients."""
        return np.asarray(coefficients, np.float64)

    def transform(self, layout: Layout, read: Read) -> Transform:
        """The experts are mixed as they are."""
        return unchanged
