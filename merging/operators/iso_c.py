"""ISO-C: the sum of the task vectors with all its singular values equal (Marczak et al. 2025, arXiv:2502.04959).

With M = sum_k tau_k = U S Vᵀ and s̄ the mean of its singular values, the paper's merge is ``base + s̄ U Vᵀ``. The polar
factor U Vᵀ = (M Mᵀ)^(-1/2) M is linear in the task vectors once its metric is known, so it splits into

    v_k = s̄ (M Mᵀ)^(-1/2) tau_k,   sum_k v_k = s̄ U Vᵀ

Where M has a rank below min(m, n), as with adapters, the paper's code gives the size s̄ also to singular vectors of the
value zero, which are arbitrary. Here the metric is that of the range of M, and s̄ the mean over the rank.

Task vectors are amplified along directions in which their sum is small. There the v_k cancel at c = 1, but not at
other coefficients: ``gain`` in the report is the largest ||v_k|| / ||tau_k||.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ecotone.merging.operators.spectra import Cut, rank, report_alike, svd, task_matrices
from ecotone.merging.operators.whole import Known, Layer, Report, WholeMatrices


@dataclass(frozen=True)
class IsoC(WholeMatrices):
    """``theta = base + sum_k c_k v_k`` with v_k whose sum has equal singular values.

    Args:
        cut: Singular values of at most this share of the sum's largest count as zero. The default is above the
            rounding of adapters in float32; those merged into weights of 16 bits need about 0.02.
    """

    cut: Cut = 1e-5

    name = "iso_c"
    unites = False

    def layer(
        self, at: Layer, base: Tensor, experts: Sequence[Tensor], known: Known, report: Report
    ) -> Sequence[Tensor]:
        """The K vectors, by a decomposition of the sum of the task vectors."""
        vectors = task_matrices(at, base, experts)
        report_alike(vectors, report)
        left, values, _ = svd(sum(vectors[1:], start=vectors[0]))
        many = rank(values, self.cut)
        left, values = left[:, :many], values[:many]
        metric = left * (values.mean() / values)
        prepared = [metric @ (left.mT @ vector) for vector in vectors]
        if many:
            report.numbers |= {"rank": many, "condition": float(values[0] / values[-1])}
            sizes = [
                (torch.linalg.vector_norm(v), torch.linalg.vector_norm(t))
                for v, t in zip(prepared, vectors, strict=True)
            ]
            report.numbers["gain"] = max(float(size / before) for size, before in sizes if before)
        return prepared
