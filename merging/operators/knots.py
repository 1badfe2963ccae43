"""KnOTS-TIES: TIES in singular vectors that adapters have in common (Stoica et al. 2025, arXiv:2410.19735).

The task vectors of a matrix (m, n) are decomposed side by side, which gives them left singular vectors in common:

    [tau_1 ... tau_K] = U S [V_1ᵀ ... V_Kᵀ]

TIES-Merging (arXiv:2306.01708) is then applied to the parts S V_kᵀ = Uᵀ tau_k: each keeps its largest entries, every
position elects the sign of the sum of what is left, entries of the other sign become zero, and what agrees is averaged:

    v_k = U (S V_kᵀ)' / A,   A entries agreeing at a position

The authors' released settings trim S V_kᵀ; ``scaled: false`` trims the V_kᵀ, as the paper draws it. Both give the same
signs. The authors trim over all layers of the model together. Matrices are prepared one at a time, so here each layer
keeps the share ``density`` of each part. The authors' code drops singular values below an absolute 1e-5; here the bound
is relative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ecotone.merging.operators.prepared import Combine, Density, shared
from ecotone.merging.operators.spectra import Cut, rank, row_space, task_matrices
from ecotone.merging.operators.ties_vectors import sign_of_sum
from ecotone.merging.operators.whole import Known, Layer, Report, WholeMatrices


@dataclass(frozen=True)
class Knots(WholeMatrices):
    """``theta = base + sum_k c_k v_k`` with v_k of TIES in the task vectors' common singular vectors.

    Args:
        density: The share of the entries of each task's part of a layer that trimming keeps; 0.2 is the authors'.
        combine: How entries that agree on a sign are combined: ``mean`` divides their sum by their number, ``sum`` does
            not.
        scaled: Whether trimming compares entries with their singular values (the authors' code) or without them.
        cut: Singular values of at most this share of the largest count as zero.
    """

    density: Density = 0.2
    combine: Combine = "mean"
    scaled: bool = True
    cut: Cut = 1e-5

    name = "knots"
    unites = False

    def layer(
        self, at: Layer, base: Tensor, experts: Sequence[Tensor], known: Known, report: Report
    ) -> Sequence[Tensor]:
        """The K vectors, by a decomposition of the task vectors side by side."""
        vectors = task_matrices(at, base, experts)
        values, lefts = row_space(torch.cat([vector.mT for vector in vectors]))
        many = rank(values, self.cut)
        report.numbers["rank"] = many
        if not many:
            return vectors
        values, lefts = values[:many], lefts[:many]
        parts = [self._trimmed(lefts @ vector, values) for vector in vectors]
        _elect(parts)
        return [lefts.mT @ part for part in shared(parts, self.combine)]

    def _trimmed(self, part: Tensor, values: Tensor) -> Tensor:
        """A part (r, n) with its small entries set to zero; all that equal the smallest kept one stay."""
        sizes = part.abs() if self.scaled else part.abs() / values[:, None]
        dropped = part.numel() - max(1, round(self.density * part.numel()))
        return part * (sizes >= sizes.flatten().kthvalue(dropped + 1).values)


def _elect(parts: Sequence[Tensor]) -> None:
    """Set entries whose sign lost the vote to zero, in place; where all sum to zero, the layer's majority votes."""
    signs = sign_of_sum([part.flatten() for part in parts]).view_as(parts[0])
    signs[signs == 0] = 1.0 if signs.sum() >= 0 else -1.0
    for part in parts:
        part.mul_(part * signs > 0)
