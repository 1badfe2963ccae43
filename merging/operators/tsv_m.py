"""TSV-Merge: the leading singular vectors of the tasks, made orthogonal (Gargiulo et al. 2025, arXiv:2412.00081).

Of each task vector tau_k = U_k S_k V_kᵀ of a matrix (m, n) the largest r = floor(min(m, n) / K) singular values stay.
The left vectors of all tasks, side by side, are replaced by the nearest matrix with orthonormal columns (their polar
factor, the paper's whitening), the right ones likewise:

    U⊥ = polar [U_1 ... U_K],   V⊥ = polar [V_1 ... V_K],   v_k = U⊥[k] S_k V⊥[k]ᵀ

The paper's merge is the sum of the v_k, and takes the mean of the tensors that are no matrices. Task vectors whose rank
is below r have fewer singular vectors here; the authors' code takes arbitrary ones of the value zero with them. So task
vectors of rank up to r, with rows and columns orthogonal to those of the others, merge to their exact sum.

Two settings follow the ideas of R-TSVM (Yang et al. 2025, arXiv:2502.06876): outliers are weighted down, and sparse
matrices get lower ranks. Its formulas and code were not read. The formulas here are Ecotone's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ecotone.merging.operators.spectra import Cut, polar, rank, report_alike, svd, task_matrices
from ecotone.merging.operators.whole import Known, Layer, Report, WholeMatrices


@dataclass(frozen=True)
class TsvM(WholeMatrices):
    """``theta = base + sum_k c_k v_k`` with v_k of the tasks' leading singular vectors, made orthogonal.

    With more experts K than min(m, n), the min(m, n) largest singular vectors of the experts stay, one of an expert.

    Args:
        clip: Entries of a task vector that are larger than this many times the root mean square of their row are cut to
            that before the decomposition (an idea of R-TSVM); 3 is usual for outliers, 0 cuts none.
        ranks: How many singular values stay: ``equal`` gives each task r. ``sparsity`` gives it r times the density of
            its task vector, (pi / 2) (mean of |tau|)² / mean of tau², at most 1: 1 for entries that are normally
            distributed, less where few entries hold most (an idea of R-TSVM).
        cut: Singular values of at most this share of a task vector's largest count as zero.
    """

    clip: Annotated[float, Field(ge=0)] = 0.0
    ranks: Literal["equal", "sparsity"] = "equal"
    cut: Cut = 1e-5

    name = "tsv_m"
    unites = False

    def layer(
        self, at: Layer, base: Tensor, experts: Sequence[Tensor], known: Known, report: Report
    ) -> Sequence[Tensor]:
        """The K vectors, by a decomposition of each task vector and of each side's singular vectors together."""
        vectors = task_matrices(at, base, experts)
        report_alike(vectors, report)
        parts = [self._leading(vector, len(vectors)) for vector in vectors]
        kept = self._chosen([values for _, values, _ in parts], min(base.shape), report)
        left = polar(torch.cat([left[:, :many] for (left, _, _), many in zip(parts, kept, strict=True)], 1))
        right = polar(torch.cat([right[:many] for (_, _, right), many in zip(parts, kept, strict=True)]))
        prepared, low = [], 0
        for (_, values, _), many in zip(parts, kept, strict=True):
            high = low + many
            prepared.append(left[:, low:high] * values[:many] @ right[low:high])
            low = high
        return prepared

    def _leading(self, vector: Tensor, tasks: int) -> tuple[Tensor, Tensor, Tensor]:
        """The leading singular vectors and values of a task vector; at least one."""
        if self.clip:
            most = self.clip * vector.square().mean(1, keepdim=True).sqrt()
            vector = torch.clamp(vector, -most, most)
        left, values, right = svd(vector)
        share = min(vector.shape) / tasks
        if self.ranks == "sparsity":
            share *= density(vector)
        many = min(rank(values, self.cut), max(1, int(share)))
        return left[:, :many].clone(), values[:many].clone(), right[:many].clone()

    def _chosen(self, values: Sequence[Tensor], most: int, report: Report) -> list[int]:
        """How many singular values of each task stay: all that it has, or with too many tasks those of the largest."""
        many = [len(each) for each in values]
        if len(values) > most:
            order = sorted(range(len(values)), key=lambda k: -float(values[k].sum()))
            many = [many[k] if k in order[:most] else 0 for k in range(len(values))]
            report.warnings.append(
                f"{len(values)} experts share a matrix with {most} singular values: only the {most} largest of their "
                "singular vectors are merged."
            )
        report.numbers["rank"] = sum(many)
        return many


def density(vector: Tensor) -> float:
    """(pi / 2) (mean of |tau|)² / mean of tau², at most 1: the share of its entries that a task vector uses, about."""
    power = float(vector.square().mean())
    return min(1.0, torch.pi / 2 * float(vector.abs().mean()) ** 2 / power) if power else 1.0
