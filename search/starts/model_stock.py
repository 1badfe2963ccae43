"""Model Stock (Jang et al. 2024, arXiv:2403.19522): how far from the base to the experts' average, tensor by tensor.

    t = K cos / (1 + (K - 1) cos),   c_k = t / K                                   (the paper's proposition 1)

cos is the mean cosine of the angles between the K task vectors over the tensor. The more the experts agree, the nearer
the merge comes to their average. cos cannot be below -1/(K - 1), near which t goes to minus infinity; so a cosine of 0
or less gives the base. Where no expert differs from the base, or there is one expert, t is 1.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from ecotone.populations.genome import Floats
from ecotone.search.starts.base import Geometry, Solver, Weighs


class ModelStockSettings(Solver):
    """Model Stock: the base and the experts' average, mixed by the angles between task vectors.

    Attributes:
        solve: ``model_stock``: between the base and the average, by the angles between the task vectors of each tensor.
    """

    solve: Literal["model_stock"]

    of: ClassVar[tuple[Weighs, ...]] = ("task_vectors",)

    def coefficients(self, models: Geometry) -> Floats:
        """(T, K): t / K for every expert."""
        count = len(models.experts)
        shares = ratios(models) / count
        return models.of_experts(np.repeat(shares[:, None], count, axis=1))


def ratios(models: Geometry) -> Floats:
    """(T,) t, between 0 and 1."""
    count = len(models.experts)
    if count == 1:
        return np.ones(models.tensors)
    cosines = models.cosines
    mean = (cosines.sum(axis=(1, 2)) - np.einsum("tkk->t", cosines)) / (count * (count - 1))
    mean = np.maximum(mean, 0.0)
    t = np.minimum(count * mean / (1 + (count - 1) * mean), 1.0)
    return np.where(models.lengths.any(axis=1), t, 1.0)
