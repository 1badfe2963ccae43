"""Task vectors freed of interference as in TIES, one coefficient each: the sources of AdaMerging++.

TIES-Merging is Yadav et al. 2023 (arXiv:2306.01708, algorithm 1), AdaMerging++ Yang et al. 2024 (arXiv:2310.02575,
section 3.3). Each task vector tau_k = theta_k - base is trimmed to its largest entries; every position elects the
sign of the sum of what is left; entries of the other sign become zero. TIES would now average; here the K vectors
tau'_k stay apart:

    theta = base + sum_k c_k tau'_k

An entry of tau'_k is that of tau_k or zero, so ``base + tau'_k`` takes each element from the expert or from the base,
unrounded and in their own type, and the merge is task arithmetic of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ecotone.merging.kernel import compiled
from ecotone.merging.kernel.materialise import SMALL, Transform
from ecotone.merging.operators.prepared import Density
from ecotone.merging.operators.task_arithmetic import TaskArithmetic
from ecotone.merging.operators.task_vectors import Pieces, chunks, largest, task_vectors

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TiesVectors(TaskArithmetic):
    """``theta = base + sum_k c_k tau'_k``; one-hot coefficients give an expert less its trimmed and outvoted entries.

    Args:
        density: The share of each task vector's n entries that trimming keeps; 0.2 is usual. Trimming keeps the largest
            ``density * n`` entries (rounded, at least 1), and all entries equal to the smallest of them (many, in
            models of 16 bits).
    """

    density: Density = 0.2

    name = "ties_vectors"
    changes = True
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {"density": (0.0, 1.0)}

    def transform(self, pieces: Pieces) -> Transform:
        """Streams the models to find the thresholds (``largest``) and once to count the signs."""
        return elected(pieces, self.density)


def elected(pieces: Pieces, density: float) -> Transform:
    """Trimming to ``density`` and electing signs: experts become ``base + tau'``."""
    rank = max(1, round(density * pieces.size))
    election = _Election(pieces.kind, (0.0,) * pieces.vectors if rank == pieces.size else largest(pieces, rank))
    balance = sum(pieces.map(election.balance)) if pieces.vectors > 1 else 0
    large = pieces.kind == torch.float32 and (pieces.vectors + 1) * pieces.size > SMALL
    return _Election(pieces.kind, election.thresholds, 1.0 if balance >= 0 else -1.0, large)


@dataclass(frozen=True)
class _Election:
    """Trims and elects in pieces of the base and K experts.

    Every decision is exact, so it does not depend on the order of the experts, on the device or on how the pieces
    are cut.

    Args:
        kind: The type in which task vectors are formed.
        thresholds: K magnitudes below which entries are trimmed.
        majority: The sign (1 or -1) of positions where what is left sums to zero.
        large: Whether compiled loops may be used and pay.
    """

    kind: torch.dtype
    thresholds: tuple[float, ...]
    majority: float = 1.0
    large: bool = False

    def __call__(self, pieces: Sequence[Tensor], start: int = 0) -> list[Tensor]:
        """The base, and K experts whose trimmed or outvoted elements are the base's."""
        base, *experts = pieces
        changed = [torch.empty_like(expert) for expert in experts]
        here = self.large and base.device.type == "cpu"
        if not (here and compiled.choose(pieces, changed, self.thresholds, self.majority)):
            for outs, cut in zip(chunks(changed), chunks(pieces), strict=True):
                self._choose(outs, cut)
        return [base, *changed]

    def _choose(self, outs: Sequence[Tensor], pieces: Sequence[Tensor]) -> None:
        base, *experts = pieces
        vectors = task_vectors(pieces, self.kind)
        signs = self._signs(vectors)
        signs.add_(signs.clone().eq_(0), alpha=self.majority)
        for out, expert, vector, threshold in zip(outs, experts, vectors, self.thresholds, strict=True):
            # Small or outvoted; 0 for NaN, which stays. At threshold 0 zero entries stay, too.
            replaced = vector.mul_(signs).lt_(threshold)
            _select(replaced, base, expert, out)

    def balance(self, pieces: Sequence[Tensor], start: int) -> int:
        """By how many positions the positive signs outnumber the negative ones."""
        signs = [self._signs(task_vectors(cut, self.kind)) for cut in chunks(pieces)]
        return sum(int((each > 0).sum() - (each < 0).sum()) for each in signs)

    def _signs(self, vectors: Sequence[Tensor]) -> Tensor:
        """The sign (-1, 0 or 1) of the sum of the trimmed vectors at each position, in their type."""
        pairs = zip(vectors, self.thresholds, strict=True)
        return sign_of_sum([vector.abs().ge_(threshold).mul_(vector) for vector, threshold in pairs])


def _select(flags: Tensor, chosen: Tensor, other: Tensor, out: Tensor) -> None:
    """Fill ``out`` with elements of ``chosen`` where ``flags`` is 1, and with elements of ``other`` where it is 0.

    In the integers of their bits: on a CPU torch.where and comparisons that give bools take ten times as long.
    """
    kind = _INTEGERS[out.element_size()]
    first, second = chosen.view(kind), other.view(kind)
    differing = torch.bitwise_xor(first, second).bitwise_and_(flags.to(kind).neg_())
    torch.bitwise_xor(second, differing, out=out.view(kind))


def sign_of_sum(terms: Sequence[Tensor]) -> Tensor:
    """The exact sign (-1, 0 or 1) of the sum of K tensors (n,), elementwise, in their type."""
    total = terms[0].clone()
    for term in terms[1:]:
        total.add_(term)
    if len(terms) > 2:  # the sum of two numbers never rounds to zero or across it
        magnitude = terms[0].abs()
        for term in terms[1:]:
            magnitude.add_(term.abs())
        # Rounding moves a sum of K terms by at most (K - 1) eps / 2 of the sum of their magnitudes.
        reach = magnitude * (len(terms) * torch.finfo(total.dtype).eps)
        doubtful = total.abs().le_(reach).mul_(magnitude)
        if doubtful.amax() != 0:
            places = doubtful.nonzero().squeeze(1)
            total[places] = _distilled([term[places] for term in terms])
    return total.sign_()


def _distilled(terms: Sequence[Tensor]) -> Tensor:
    """The leading part of the exact sum of K tensors (n,); the other parts are too small to change its sign.

    Each pass adds up the terms and puts the rounding errors in their places; K passes leave terms that no longer
    overlap (Bohlender 1977; Ogita, Rump and Oishi 2005, algorithm 4.3, for one pass).
    """
    rows = list(terms)
    for _ in rows:
        for low in range(len(rows) - 1):
            rows[low + 1], rows[low] = _two_sum(rows[low + 1], rows[low])
    return rows[-1]


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded sum and its error, exactly (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)
