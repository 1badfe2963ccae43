"""Coefficients in a box: the real vectors that vector searches work on, and the genomes they stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ecotone.populations.components import COMPONENTS
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Floats, Genome, Integers, Scalar
from ecotone.populations.space import Space
from ecotone.search.protocol import trial_rng

Granularity: TypeAlias = Literal["model", "groups", "components", "block", "tensor"]


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of a model that have coefficients of their own: R of them, in S segments.

    Most often a part is one segment. A component, such as attention, has many, because its tensors lie apart.

    Args:
        borders: (S+1,) segment borders in the flat parameter vector.
        owners: (S,) the part of each segment, from 0 to R-1; None where each segment is a part.
        names: R names of the parts; empty where they have none.
    """

    borders: Integers
    owners: Integers | None = None
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        """R, the number of parts."""
        return len(self.borders) - 1 if self.owners is None else int(self.owners.max()) + 1

    def expanded(self, rows: Floats) -> Floats:
        """(S, K) by segment, the (R, K) ``rows`` of the parts."""
        return rows if self.owners is None else rows[self.owners]

    def summed(self, rows: Floats) -> Floats:
        """(R, K) by part, the sums of the (S, K) ``rows`` of its segments, such as a gradient's."""
        if self.owners is None:
            return rows
        sums = np.zeros((len(self), rows.shape[1]))
        np.add.at(sums, self.owners, rows)
        return sums

    def of(self, genome: Genome) -> Floats:
        """(R, K) coefficients of a genome whose boundaries are among ours.

        Where the segments of a part differ, it gets their mean weighted by length.
        """
        rows = genome.refined(self.borders)
        if self.owners is None:
            return rows
        first = rows[np.unique(self.owners, return_index=True)[1]]
        lengths = np.diff(self.borders).astype(np.float64)[:, None]
        means = self.summed(lengths * rows) / self.summed(lengths)
        alike = self.summed((rows != self.expanded(first)).astype(np.float64)) == 0
        return np.where(alike, first, means)

    def fits(self, genome: Genome) -> bool:
        """Whether the coefficients of a genome change between parts alone."""
        if genome.size != int(self.borders[-1]) or not np.isin(genome.boundaries, self.borders).all():
            return False
        return bool((self.expanded(self.of(genome)) == genome.refined(self.borders)).all())

    def holds(self, other: Parts) -> bool:
        """Whether every merge with the coefficients of ``other`` has its like among ours, to the bit."""
        if not np.isin(other.borders, self.borders).all():
            return False
        theirs = np.searchsorted(other.borders, self.borders[:-1], side="right") - 1
        theirs = theirs if other.owners is None else other.owners[theirs]
        if self.owners is None:
            return True
        first = theirs[np.unique(self.owners, return_index=True)[1]]
        return bool((theirs == first[self.owners]).all())

    def record(self) -> dict[str, Any]:
        """Plain values that ``read`` makes the same of."""
        owners = range(len(self)) if self.owners is None else self.owners.tolist()
        return {"borders": self.borders.tolist(), "owners": list(owners), "names": list(self.names)}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Parts:
        """The parts that ``record`` was made of."""
        return cls(np.array(record["borders"], np.int64), np.array(record["owners"], np.int64), tuple(record["names"]))

    @property
    def count(self) -> str:
        """How many there are, in words."""
        return f"{len(self)} {'components' if self.names else 'segments'}"

    def __str__(self) -> str:
        """How many there are, and their names."""
        return f"{self.count} ({', '.join(self.names)})" if self.names else self.count


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
    """One coefficient a part and source, each between ``low`` and ``high``, and settings of the operator.

    A part is a segment, or several that share their coefficients. A point is a vector of D = R K + P numbers, part by
    part: the K coefficients of the first part first. P settings come last, scaled so that the bounds of each are
    ``low`` and ``high``, too: searches see a cube.

    Args:
        borders: (S+1,) segment borders in the flat parameter vector.
        sources: K.
        low: Smallest coefficient.
        high: Largest coefficient.
        settings: P settings of the merge operator that genomes are given.
        owners: (S,) the part of each segment, from 0; None where each segment is a part.
        names: R names of the parts; empty where they have none.
    """

    borders: Integers
    sources: int
    low: float = 0.0
    high: float = 1.0
    settings: tuple[Setting, ...] = ()
    owners: Integers | None = None
    names: tuple[str, ...] = ()

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
        """The box over ``space`` with the parts of ``parts_of``.

        Raises:
            InputError: There are fewer blocks than groups.
        """
        parts = parts_of(space, granularity, groups)
        return cls(parts.borders, space.dimension, low, high, settings, parts.owners, parts.names)

    @cached_property
    def parts(self) -> Parts:
        """The R parts that have coefficients of their own."""
        return Parts(self.borders, self.owners, self.names)

    @property
    def segments(self) -> int:
        """S, the number of segments."""
        return len(self.borders) - 1

    @property
    def rows(self) -> int:
        """R, the number of parts."""
        return len(self.parts)

    @property
    def coefficients(self) -> int:
        """R K, the number of coefficients."""
        return self.rows * self.sources

    @property
    def size(self) -> int:
        """D = R K + P, the number of variables."""
        return self.coefficients + len(self.settings)

    def genome(self, point: NDArray[np.floating]) -> Genome:
        """The merge that the (D,) ``point`` describes."""
        numbers = np.asarray(point, np.float64)
        table = self.parts.expanded(numbers[: self.coefficients].reshape(self.rows, self.sources))
        if not self.settings:
            return Genome(self.borders, table)
        shares = (numbers[self.coefficients :] - self.low) / (self.high - self.low)
        values = zip(self.settings, shares.tolist(), strict=True)
        return Genome(self.borders, table, {setting.name: setting.value(share) for setting, share in values})

    def point(self, genome: Genome) -> Floats:
        """(D,) the point of a genome whose boundaries are among ours; the inverse of ``genome``, but for rounding.

        A part whose segments differ gets the mean of their coefficients, weighted by length.
        """
        return self._with(self.parts.of(genome).ravel(), genome.parameters)

    def filled(self, coefficients: ArrayLike) -> Floats:
        """(..., D) points with the (..., R K) ``coefficients`` and every setting at its default."""
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


def parts_of(space: Space, granularity: Granularity, groups: int = 1) -> Parts:
    """The parts that have coefficients of their own: the ``model``, one of ``groups`` of blocks, ``components``,
    a ``block`` or a ``tensor``.

    With ``components`` and several groups, each component has a part in each group in which it has tensors.

    Raises:
        InputError: There are fewer blocks than groups.
    """
    if granularity == "groups":
        return Parts(grouped(space, groups))
    return (
        _by_component(space, groups) if granularity == "components" else Parts(np.asarray(space.borders(granularity)))
    )


def _by_component(space: Space, groups: int) -> Parts:
    """Runs of tensors of one component and group; the parts in the order of the components, then of the groups."""
    starts = np.asarray(space.tensor_borders)[:-1]
    group = np.searchsorted(grouped(space, groups), starts, side="right") - 1
    kinds = np.array([COMPONENTS.index(component) for component in space.components]) * groups + group
    chosen, owners = np.unique(kinds, return_inverse=True)
    begins = np.concatenate([[True], owners[1:] != owners[:-1]])
    names = [COMPONENTS[kind // groups] + (f" {kind % groups + 1}" if groups > 1 else "") for kind in chosen.tolist()]
    return Parts(np.append(starts[begins], space.size), owners[begins], tuple(names))


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
