"""TIES-Merging: task vectors trimmed, their signs elected, what agrees averaged (Yadav et al. 2023, arXiv:2306.01708).

Algorithm 1. Each task vector tau_k = theta_k - base is trimmed to its largest entries over the whole model; every
position elects the sign of the sum of what is left; entries of the other sign become zero, and those that agree are
divided by their number, A of them at a position (``mean``, the paper's), or not (``sum``):

    theta = base + sum_k c_k v_k,   v_k = tau'_k / A

Trimming and the election know no coefficients, so the merge is linear in these, and c_k = lambda for all k is the
paper's ``base + lambda tau_m``. (mergekit has the experts' weights take part in the election: another method.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ecotone.merging.kernel.materialise import Transform
from ecotone.merging.operators.prepared import Combine, Density, PreparedVectors, prepared, shared
from ecotone.merging.operators.task_vectors import Pieces, task_vectors
from ecotone.merging.operators.ties_vectors import elected


@dataclass(frozen=True)
class Ties(PreparedVectors):
    """``theta = base + sum_k c_k v_k`` with v_k of TIES; zero coefficients give the base.

    Args:
        density: The share of each task vector's n entries that trimming keeps; 0.2 is usual. Trimming keeps the largest
            ``density * n`` entries (rounded, at least 1), and all entries equal to the smallest of them (many, in
            models of 16 bits).
        combine: How the entries of experts that agree on a sign are combined: ``mean`` divides their sum by the number
            of these experts, ``sum`` does not (then the merge equals that of ``ties_vectors``).
    """

    density: Density = 0.2
    combine: Combine = "mean"

    name = "ties"
    published: ClassVar[float | None] = 1.0
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {"density": (0.0, 1.0)}

    def transform(self, pieces: Pieces) -> Transform:
        """Streams the models to find the thresholds and once to count the signs, as ``ties_vectors`` does."""
        return _Disjoint(pieces.kind, elected(pieces, self.density), self.combine)


@dataclass(frozen=True)
class _Disjoint:
    """Makes the task vectors that trimming and election leave, in pieces of the base and K experts.

    Args:
        kind: The type in which task vectors are formed.
        election: Gives the base and ``base + tau'_k``.
        combine: ``mean`` divides an entry by the number of experts that agree on its sign; ``sum`` does not.
    """

    kind: torch.dtype
    election: Transform
    combine: Combine

    def __call__(self, pieces: Sequence[Tensor], start: int) -> list[Tensor]:
        """The base, and K vectors ``v_k``."""
        return prepared(pieces, start, self._vectors)

    def _vectors(self, pieces: Sequence[Tensor], start: int) -> Sequence[Tensor]:
        return shared(task_vectors(self.election(pieces, start), self.kind), self.combine)
