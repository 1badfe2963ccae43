"""Coefficients in a box: the real vectors that vector searches work on, and the genomes they stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ecotone.populations.errors import InputError
from ecotone.populations.genome import Floats, Genome, Integers, Scalar
from ecotone.populations.space import Space
from ecotone.search.protocol import trial_rng

Granularity: TypeAlias = Literal["model", "groups", "block", "tensor"]


@dataclass(frozen=True)
class Setting:
    """A setting of the merge operator that is searched beside the coefficients (``Genome.parameters``).

    Args:
        name: Its name in the operator.
        low: Its smallest value.
        high: Its largest value.
        scale: ``linear``, ``log`` (then ``low`` is above 0), or ``integer`` (then all from low to high).
        default: The value of genomes without it; None means the middle of its scale.

    Raises:
        InputError: The bounds are not two finite numbers in order, or do not fit the scale.
    """

    name: str
    low: float
    high: float
    scale: Literal["linear", "log", "integer"] = "linear"
    default: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InputError(f"{self.name}: expected low below high, found {self.low:g} and {self.high:g}.")
        if self.scale == "log" and self.low <= 0:
            raise InputError(f"{self.name}: expected bounds above 0 for a log scale, found {self.low:g}.")
        if self.scale == "integer" and (self.low % 1 or self.high % 1):
            raise InputError(f"{self.name}: expected whole numbers, found {self.low:g} and {self.high:g}.")

    def value(self, share: float) -> float | int:
        """The value at ``share`` (0 to 1) of the way from low to high."""
        if self.scale == "integer":
            return int(min(max(self.low + math.floor(share * (self.high - self.low + 1)), self.low), self.high))
        if self.scale == "log":
            value = self.low * (self.high / self.low) ** share
        else:
            value = self.low + (self.high - self.low) * share
        return float(min(max(value, self.low), self.high))

    def share(self, parameters: Mapping[str, Scalar]) -> float:
        """How far from low to high a genome with these parameters is; outside 0 to 1 where it is out of bounds."""
        setting = parameters.get(self.name, self.default)
        if setting is None:
            return 0.5
        value = float(setting)
        if self.scale == "integer":
            return (value - self.low + 0.5) / (self.high - self.low + 1)
        if self.scale == "log":
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, eq=False)
class CoefficientBox:
    """One coefficient a segment and source, each between ``low`` and ``high``, and settings of the operator.

    A point is a vector of D = S K + P numbers, segment by segment: the K coefficients of the first segment first. P
    settings come last, scaled so that the bounds of each are ``low`` and ``high``, too: searches see a cube.

    Args:
        borders: (S+1,) segment borders in the flat parameter vector.
        sources: K.
        low: Smallest coefficient.
        high: Largest coefficient.
        settings: P settings of the merge operator that genomes are given.
    """

    borders: Integers
    sources: int
    low: float = 0.0
    high: float = 1.0
    settings: tuple[Setting, ...] = ()

    @classmethod
    def of(
        cls,
        space: Space,
        granularity: Granularity,
        low: float,
        high: float,
        groups: int = 1,
        settings: tuple[Setting, ...] = (),
    ) -> CoefficientBox:
        """The box over ``space`` with one segment a ``model``, ``block``, ``tensor``, or one of ``groups`` of blocks.

        Raises:
            InputError: There are fewer blocks than groups.
        """
        return cls(borders_of(space, granularity, groups), space.dimension, low, high, settings)

    @property
    def segments(self) -> int:
        """S, the number of segments."""
        return len(self.borders) - 1

    @property
    def coefficients(self) -> int:
        """S K, the number of coefficients."""
        return self.segments * self.sources

    @property
    def size(self) -> int:
        """D = S K + P, the number of variables."""
        return self.coefficients + len(self.settings)

    def genome(self, point: NDArray[np.floating]) -> Genome:
        """The merge that the (D,) ``point`` describes."""
        numbers = np.asarray(point, np.float64)
        table = numbers[: self.coefficients].reshape(self.segments, self.sources)
        if not self.settings:
            return Genome(self.borders, table)
        shares = (numbers[self.coefficients :] - self.low) / (self.high - self.low)
        values = zip(self.settings, shares.tolist(), strict=True)
        return Genome(self.borders, table, {setting.name: setting.value(share) for setting, share in values})

    def point(self, genome: Genome) -> Floats:
        """(D,) the point of a genome whose boundaries are among ours; the inverse of ``genome``, but for rounding."""
        return self._with(genome.refined(self.borders).ravel(), genome.parameters)

    def filled(self, coefficients: ArrayLike) -> Floats:
        """(..., D) points with the (..., S K) ``coefficients`` and every setting at its default."""
        return self._with(np.asarray(coefficients, np.float64), {})

    def _with(self, coefficients: Floats, parameters: Mapping[str, Scalar]) -> Floats:
        shares = np.array([setting.share(parameters) for setting in self.settings])
        scaled = self.low + (self.high - self.low) * shares
        return np.concatenate([coefficients, np.broadcast_to(scaled, (*coefficients.shape[:-1], len(shares)))], axis=-1)

    def draw(self, seed: int, number: int) -> Floats:
        """(D,) a point drawn evenly from the box, for trial ``number`` of a search seeded ``seed``."""
        return trial_rng(seed, number).uniform(self.low, self.high, self.size)

    def clip(self, points: Floats) -> Floats:
        """Points moved into the box."""
        return np.clip(points, self.low, self.high)

    def inside(self, points: ArrayLike | None) -> Floats:
        """(n, D) the points of (N, D) that lie in the box; no points for None.

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
