"""DARE followed by TIES' election: random entries are dropped, the others scaled up, outvoted ones become zero.

The composition of Yu et al. 2024 (arXiv:2311.03099) with Yadav et al. 2023 (arXiv:2306.01708): the masks of ``dare``
take the place of trimming by magnitude, then signs are elected and entries that agree combined as in ``ties``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ecotone.merging.kernel.materialise import Transform
from ecotone.merging.operators.dare import Masks, scaled
from ecotone.merging.operators.prepared import (
    SEEDS,
    Combine,
    Density,
    MaskSeed,
    PreparedVectors,
    keep,
    prepared,
    shared,
)
from ecotone.merging.operators.task_vectors import Pieces, chunks, task_vectors
from ecotone.merging.operators.ties_vectors import sign_of_sum


@dataclass(frozen=True)
class DareTies(PreparedVectors):
    """``theta = base + sum_k c_k v_k``, linear in the coefficients, which take no part in the election.

    Args:
        density: The probability that an entry of a task vector is kept, not the share dropped.
        mask_seed: The seed that draws which entries are kept, from 0 to 2^32 - 1.
        combine: How the entries of experts that agree on a sign are combined: ``mean`` divides their sum by the number
            of these experts, ``sum`` does not.
    """

    density: Density = 0.5
    mask_seed: MaskSeed = 0
    combine: Combine = "mean"

    name = "dare_ties"
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {"density": (0.0, 1.0), "mask_seed": (0, SEEDS - 1)}

    def transform(self, pieces: Pieces) -> Transform:
        """Streams the models once, to count the signs."""
        election = _Election(pieces.kind, Masks(self.mask_seed, self.density), self.density, self.combine)
        balance = sum(pieces.map(election.balance)) if pieces.vectors > 1 else 0
        return replace(election, majority=1.0 if balance >= 0 else -1.0)


@dataclass(frozen=True)
class _Election:
    """Drops, elects and combines, in pieces of the base and K experts.

    Args:
        kind: The type in which task vectors are formed.
        masks: The masks of entries that are kept.
        density: By which they are divided.
        combine: Whether entries are also divided by how many agree.
        majority: The sign (1 or -1) of positions where what is kept sums to zero.
    """

    kind: torch.dtype
    masks: Masks
    density: float
    combine: Combine
    majority: float = 1.0

    def __call__(self, pieces: Sequence[Tensor], start: int) -> list[Tensor]:
        """The base, and K vectors."""
        return prepared(pieces, start, self._vectors)

    def balance(self, pieces: Sequence[Tensor], start: int) -> int:
        """By how many positions the positive signs outnumber the negative ones."""
        total = 0
        for cut in chunks(pieces):
            signs = sign_of_sum(self._kept(cut, start))
            total += int((signs > 0).sum() - (signs < 0).sum())
            start += signs.numel()
        return total

    def _kept(self, pieces: Sequence[Tensor], start: int) -> Sequence[Tensor]:
        return self.masks.apply(task_vectors(pieces, self.kind), start)

    def _vectors(self, pieces: Sequence[Tensor], start: int) -> Sequence[Tensor]:
        vectors = self._kept(pieces, start)
        signs = sign_of_sum(vectors)
        signs.add_(signs.clone().eq_(0), alpha=self.majority)
        for vector in vectors:
            outvoted = vector.mul(signs).lt_(0)  # 0 for NaN, which stays
            keep(vector, outvoted.neg_().add_(1))
        return shared(scaled(vectors, self.density), self.combine)
