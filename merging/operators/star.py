"""STAR: task vectors cut to few singular values, at the same nuclear norm (Lee et al. 2025, arXiv:2502.10339).

Of each task vector tau_k = U S Vᵀ the fewest leading singular values stay that hold the share eta of their sum, the
nuclear norm. They are scaled so that their sum is the whole one:

    r = least number with sum_(i <= r) S_i >= eta sum_i S_i
    tau'_k = (sum_i S_i / sum_(i <= r) S_i) U[:, :r] S[:r] V[:, :r]ᵀ,   v_k = tau'_k / K

The mean is what the authors' code takes (``combine: mean``); ``sum`` leaves out the K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ecotone.merging.operators.prepared import Combine
from ecotone.merging.operators.spectra import report_alike, svd, task_matrices
from ecotone.merging.operators.whole import Known, Layer, Report, WholeMatrices


@dataclass(frozen=True)
class Star(WholeMatrices):
    """``theta = base + sum_k c_k v_k`` with v_k of each task's leading singular values, scaled up.

    Args:
        eta: The share of a task vector's nuclear norm that its leading singular values hold; 1 keeps all.
        combine: How the task vectors are combined, those of other tensors too: ``mean`` divides them by their number.
    """

    eta: Annotated[float, Field(gt=0, le=1)] = 0.4
    combine: Combine = "mean"

    name = "star"
    unites = False

    def layer(
        self, at: Layer, base: Tensor, experts: Sequence[Tensor], known: Known, report: Report
    ) -> Sequence[Tensor]:
        """The K vectors, by a decomposition of each task vector."""
        vectors = task_matrices(at, base, experts)
        report_alike(vectors, report)
        return [self._cut(vector) / self._number(vectors) for vector in vectors]

    def rest(self, at: Layer, base: Tensor, experts: Sequence[Tensor], report: Report) -> Sequence[Tensor]:
        """The task vectors, divided by their number for a mean."""
        return [(expert - base) / self._number(experts) for expert in experts]

    def _number(self, experts: Sequence[Tensor]) -> int:
        return len(experts) if self.combine == "mean" else 1

    def _cut(self, vector: Tensor) -> Tensor:
        left, values, right = svd(vector)
        reached = values.cumsum(0)
        whole = values.sum()
        if not bool(whole):
            return torch.zeros_like(vector)
        many = min(int((reached < self.eta * whole).sum()) + 1, len(values))
        return left[:, :many] * (values[:many] * (whole / reached[many - 1])) @ right[:many]
