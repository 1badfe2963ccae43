"""ISO-CTS: a common space and spaces of the tasks, with equal singular values (Marczak et al. 2025, arXiv:2502.04959).

Of the sum M = sum_k tau_k of matrices (m, n) only the leading singular vectors stay, the common space; the others make
room for d of each task. With p = min(m, n), d = round((p - floor(common p)) / K), and h = p - K d:

    M = U S Vᵀ,   C = U[:, :h],   tau_k - C Cᵀ tau_k = U_k S_k V_kᵀ
    U⊥ = polar [U_1[:, :d] ... U_K[:, :d]  U[:, :h]],   V⊥ = polar [V_1[:, :d] ... V_K[:, :d]  V[:, :h]]
    v = s̄ U⊥ V⊥ᵀ,   s̄ the mean of the p singular values that stay

The merge is no sum over the tasks, so there is one vector, and one coefficient in each segment. Singular vectors of the
value zero, which are arbitrary, are left out, and s̄ is then the mean over the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ecotone.merging.operators.spectra import Cut, polar, rank, report_alike, svd, task_matrices
from ecotone.merging.operators.whole import Known, Layer, Report, WholeMatrices
from ecotone.populations.genome import Floats


@dataclass(frozen=True)
class IsoCts(WholeMatrices):
    """``theta = base + c v`` with v of a common space and the tasks' own, all singular values equal.

    Args:
        common: The share of the min(m, n) singular values that the common space has. Rounding gives each task the same
            number of the others.
        cut: Singular values of at most this share of the largest count as zero. The default is above the
            rounding of adapters in float32; those merged into weights of 16 bits need about 0.02.
    """

    common: Annotated[float, Field(ge=0, le=1)] = 0.8
    cut: Cut = 1e-5

    name = "iso_cts"
    unites = False

    def columns(self, experts: Sequence[str]) -> tuple[str, ...]:
        """One coefficient, of all experts together."""
        return ("merged",)

    def seeds(self, experts: int) -> Floats:
        """(E, 1) ones: no coefficients give an expert, and every row is the published merge."""
        return np.ones((experts, 1))

    def layer(
        self, at: Layer, base: Tensor, experts: Sequence[Tensor], known: Known, report: Report
    ) -> Sequence[Tensor]:
        """One vector, by a decomposition of the sum, of each task vector, and of each side's singular vectors."""
        vectors = task_matrices(at, base, experts)
        report_alike(vectors, report)
        shared, own = dimensions(min(base.shape), len(vectors), self.common)
        left, values, right = svd(sum(vectors[1:], start=vectors[0]))
        shared = min(shared, rank(values, self.cut))
        common = _leading(left, values, right, shared)
        inside = common[0]
        parts = [_leading(*svd(vector - inside @ (inside.mT @ vector)), own) for vector in vectors]
        lefts, sizes, rights = zip(*parts, common, strict=True)
        size = torch.cat(sizes)
        if not bool(size.any()):
            return [torch.zeros_like(base)]
        kept = size > self.cut * size.max()
        report.numbers |= {"common": shared, "own": own, "rank": int(kept.sum())}
        return [size[kept].mean() * polar(torch.cat(lefts, 1)[:, kept]) @ polar(torch.cat(rights)[kept])]

    def rest(self, at: Layer, base: Tensor, experts: Sequence[Tensor], report: Report) -> Sequence[Tensor]:
        """The mean of the task vectors."""
        shares = super().rest(at, base, experts, report)
        return [sum(shares[1:], start=shares[0])]


def _leading(left: Tensor, values: Tensor, right: Tensor, many: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular vectors and values, copied, so that the others can be freed."""
    return left[:, :many].clone(), values[:many].clone(), right[:many].clone()


def dimensions(most: int, tasks: int, common: float) -> tuple[int, int]:
    """The dimensions of the common space and of each task's, of ``most`` in all; halves are rounded to even."""
    own = min(round((most - int(most * common)) / tasks), most // tasks)
    return most - own * tasks, own
