"""OPCM: models merged one after the other, each less what is taken already (Tang et al. 2025, arXiv:2501.09522).

Let T_1 = tau_1 and lambda_1 = 1. With the merge so far T_(t-1) = U S Vᵀ, r the number of leading singular values that
hold at most ``alpha`` of their sum, the next task vector is cleaned and added, and the result gets the mean norm of the
task vectors:

    A = Uᵀ tau_t V, its diagonal and its block A[:r, :r] set to zero;   clean_t = U A Vᵀ
    T_t = (lambda_(t-1) T_(t-1) + clean_t) / lambda_t,   lambda_t so that ||T_t|| = mean of ||tau_1|| ... ||tau_t||

As lambda_t T_t = lambda_(t-1) T_(t-1) + clean_t, the scales along the way cancel, and T_K = s sum_k clean_k with one
number s = (mean of ||tau_k||) / ||sum_k clean_k||. So v_k = s clean_k. The paper takes the norms over the whole model.
Matrices are prepared one at a time, so ``rescale: layer`` takes them over each layer: that differs from the paper where
layers differ in s. ``rescale: none`` has s = 1. Then one coefficient, the s of the whole model (about 1 / sqrt(K)),
gives the paper's merge. The report has ``norm`` and ``mean_norm`` of each tensor, of which s is made.

Singular vectors of the value zero are arbitrary, so diagonal entries of A are set to zero for positive values only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ecotone.merging.operators.spectra import precision, rank, svd, task_matrices
from ecotone.merging.operators.whole import Known, Layer, Report, WholeMatrices


@dataclass(frozen=True)
class Opcm(WholeMatrices):
    """``theta = base + sum_k c_k v_k`` with v_k orthogonal to the merge of the models before; their order matters.

    The order is that of the experts in the recipe.

    Args:
        alpha: The share of the sum of the singular values of the merge so far whose space is closed to the next task
            vector. 0 closes only the directions of single singular vectors.
        rescale: The size of the merge of a tensor: ``layer`` gives it the mean norm of the tensor's task vectors,
            ``none`` leaves it.
    """

    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.5
    rescale: Literal["layer", "none"] = "layer"

    name = "opcm"
    unites = False
    rest_by_element = False

    def layer(
        self, at: Layer, base: Tensor, experts: Sequence[Tensor], known: Known, report: Report
    ) -> Sequence[Tensor]:
        """The K vectors, by a decomposition of each merge but the last."""
        vectors = task_matrices(at, base, experts)
        cleaned = vectors[:1]
        merged = vectors[0]
        for vector in vectors[1:]:
            cleaned.append(self._cleaned(vector, merged))
            merged = merged + cleaned[-1]
        report.numbers |= {"norm": _norm(merged), "mean_norm": sum(map(_norm, vectors)) / len(vectors)}
        return self._rescaled(cleaned, vectors, merged)

    def rest(self, at: Layer, base: Tensor, experts: Sequence[Tensor], report: Report) -> Sequence[Tensor]:
        """The task vectors, rescaled by at most 1: they may cancel, so that no factor gives their sum a size."""
        vectors = [expert - base for expert in experts]
        merged = sum(vectors[1:], start=vectors[0])
        report.numbers |= {"norm": _norm(merged), "mean_norm": sum(map(_norm, vectors)) / len(vectors)}
        return self._rescaled(vectors, vectors, merged, most=1.0)

    def _cleaned(self, vector: Tensor, merged: Tensor) -> Tensor:
        left, values, right = svd(merged)
        many = rank(values, precision(merged))
        left, values, right = left[:, :many], values[:many], right[:many]
        closed = int((values.cumsum(0) <= self.alpha * values.sum()).sum())
        taken = torch.linalg.multi_dot([left.mT, vector, right.mT])
        removed = torch.diag(taken.diagonal())
        removed[:closed, :closed] = taken[:closed, :closed]
        return vector - left @ removed @ right

    def _rescaled(
        self, cleaned: Sequence[Tensor], vectors: Sequence[Tensor], merged: Tensor, most: float = torch.inf
    ) -> Sequence[Tensor]:
        size = _norm(merged)
        if self.rescale == "none" or not size:
            return cleaned
        factor = min(most, sum(map(_norm, vectors)) / len(vectors) / size)
        return [each * factor for each in cleaned]


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))
