"""Coefficients in a box: the real vectors that vector searches work on, and the genomes they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from populations.errors import InputError
from populations.genome import Floats, Genome, Integers
from populations.space import Space
from search.protocol import trial_rng

Granularity: TypeAlias = Literal["model", "groups", "block", "tensor"]


@dataclass(frozen=True, eq=False)
class CoefficientBox:
    """One coefficient a segment and source, each between ``low`` and ``high``.

    A point is a vector of D = S K numbers, segment by segment: the K coefficients of the first segment first.

    Args:
        borders: (S+1,) segment borders in the flat parameter vector.
        sources: K.
        low: Smallest coefficient.
        high: Largest coefficient.
    """

    borders: Integers
    sources: int
    low: float = 0.0
    high: float = 1.0

    @classmethod
    def of(cls, space: Space, granularity: Granularity, low: float, high: float, groups: int = 1) -> CoefficientBox:
        """The box over ``space`` with one segment a ``model``, ``block``, ``tensor``, or one of ``groups`` of blocks.

        Raises:
            InputError: There are fewer blocks than groups.
        """
        return cls(borders_of(space, granularity, groups), space.dimension, low, high)

    @property
    def segments(self) -> int:
        """S, the number of segments."""
        return len(self.borders) - 1

    @property
    def size(self) -> int:
        """D = S K, the number of coefficients."""
        return self.segments * self.sources

    def genome(self, point: NDArray[np.floating]) -> Genome:
        """The merge that the (D,) coefficients ``point`` describe."""
        return Genome(self.borders, np.asarray(point, np.float64).reshape(self.segments, self.sources))

    def point(self, genome: Genome) -> Floats:
        """(D,) coefficients of a genome whose boundaries are among ours; the inverse of ``genome``."""
        return genome.refined(self.borders).ravel()

    def draw(self, seed: int, number: int) -> Floats:
        """(D,) coefficients drawn evenly from the box, for trial ``number`` of a search seeded ``seed``."""
        shape = (self.segments, self.sources)
        return trial_rng(seed, number).uniform(self.low, self.high, shape).ravel()

    def clip(self, points: Floats) -> Floats:
        """Points moved into the box."""
        return np.clip(points, self.low, self.high)

    def inside(self, points: ArrayLike | None) -> Floats:
        """(n, D) those of the points (N, D) that lie in the box; none of None.

        Raises:
            InputError: The points are not of shape (N, D).
        """
        rows = np.zeros((0, self.size)) if points is None else np.array(points, np.float64)
        if rows.ndim != 2 or rows.shape[1] != self.size:
            raise InputError(f"starts: expected shape (n, {self.size}), found {rows.shape}.")
        return rows[((rows >= self.low) & (rows <= self.high)).all(axis=1)]


def borders_of(space: Space, granularity: Granularity, groups: int = 1) -> Integers:
    """(S+1,) borders of one segment a ``model``, ``block``, ``tensor``, or one of ``groups`` of blocks.

    Raises:
        InputError: There are fewer blocks than groups.
    """
    return grouped(space, groups) if granularity == "groups" else np.asarray(space.borders(granularity))


def grouped(space: Space, groups: int) -> Integers:
    """(groups+1,) borders that put the blocks, in flat order, into ``groups`` runs of about as many parameters each.

    Raises:
        InputError: There are fewer blocks than groups.
    """
    edges = np.asarray(space.block_borders)
    blocks = len(edges) - 1
    if not 1 <= groups <= blocks:
        raise InputError(
            f"search.groups: expected between 1 and {blocks}, the number of blocks, found {groups}.",
            "Use fewer groups, or granularity: block.",
        )
    chosen = [0]
    for group in range(1, groups):
        wanted = space.size * group / groups
        first, last = chosen[-1] + 1, blocks - (groups - group)
        chosen.append(first + int(np.argmin(np.abs(edges[first : last + 1] - wanted))))
    return edges[[*chosen, blocks]]
