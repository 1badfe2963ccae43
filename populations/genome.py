"""The genome: a merge written as a piecewise-constant mixture over the flat parameter vector.

    theta[p] = anchor[p] + sum_k coefficients[segment(p), k] * source_k[p]  (+ residual[p])

A genome takes kilobytes where a model takes gigabytes. It travels to workers, the journal stores it, and an export
turns it into weights. The merge operator (``ecotone.merging.operators``) decides what the anchor and the sources are.
The algebra here holds for all operators.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic_core import to_json
from xxhash import xxh3_128

from ecotone.populations.arrays import packed_numbers
from ecotone.populations.errors import InputError
from ecotone.populations.parsing import MalformedError, json_object

if TYPE_CHECKING:
    from ecotone.populations.space import Space

Scalar: TypeAlias = bool | int | float | str
Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Genome:
    """A merge of K sources over a flat vector of n parameters, cut into S segments.

    Args:
        boundaries: (S+1,) strictly increasing positions in the flat vector; the first is 0, the last is n.
            Segment s covers the positions ``boundaries[s] <= p < boundaries[s + 1]``.
        coefficients: (S, K) weight of each source in each segment, finite, float64.
        parameters: Settings of the merge operator that prepared the sources (density, mask seed, ...).
        residual: (n,) float32 added to the mixture, only when evolving from scratch; None means zero.

    Raises:
        InputError: The shapes do not fit, the boundaries do not increase, or a number is not finite.
    """

    boundaries: Integers
    coefficients: Floats
    parameters: Mapping[str, Scalar] = field(default_factory=dict)
    residual: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "boundaries", _frozen(self.boundaries, np.int64))
        object.__setattr__(self, "coefficients", _frozen(self.coefficients, np.float64))
        object.__setattr__(self, "parameters", dict(self.parameters))
        if self.residual is not None:
            object.__setattr__(self, "residual", _frozen(self.residual, np.float32))
        _check(self)

    # -- construction ------------------------------------------------------------------------------------

    @classmethod
    def uniform(cls, size: int, coefficients: ArrayLike, **parameters: Scalar) -> Genome:
        """One segment over all ``size`` positions: ``coefficients`` is (K,). Task arithmetic, averaging, MAP."""
        return cls(np.array([0, size]), np.atleast_2d(np.asarray(coefficients, np.float64)), parameters)

    @classmethod
    def per_block(cls, space: Space, coefficients: ArrayLike, **parameters: Scalar) -> Genome:
        """One segment a block of ``space`` (a transformer layer, say): ``coefficients`` is (blocks, K)."""
        return cls(space.block_borders, np.asarray(coefficients, np.float64), parameters)

    @classmethod
    def per_tensor(cls, space: Space, coefficients: ArrayLike, **parameters: Scalar) -> Genome:
        """One segment a parameter tensor of ``space``: ``coefficients`` is (tensors, K)."""
        return cls(space.tensor_borders, np.asarray(coefficients, np.float64), parameters)

    @classmethod
    def dense(cls, vector: ArrayLike, sources: int) -> Genome:
        """A genome that is all residual: ``vector`` is (n,). Evolution from scratch breeds such genomes."""
        residual = np.asarray(vector, np.float32)
        return cls(*_nothing(residual.size, sources), {}, residual)

    # -- what it is --------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """n, the length of the flat parameter vector."""
        return int(self.boundaries[-1])

    @property
    def segments(self) -> int:
        """S, the number of segments."""
        return int(self.coefficients.shape[0])

    @property
    def sources(self) -> int:
        """K, the number of sources."""
        return int(self.coefficients.shape[1])

    @property
    def is_dense(self) -> bool:
        """True for a genome that is all residual, as ``Genome.dense`` makes them."""
        return self.residual is not None and self.segments == 1 and not self.parameters and not self.coefficients.any()

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits that are equal for genomes that describe the same merge."""
        plain = self.simplified()
        hasher = xxh3_128()
        hasher.update(plain.boundaries.astype("<i8").tobytes())
        hasher.update((plain.coefficients + 0.0).astype("<f8").tobytes())  # + 0.0 turns -0.0 into 0.0
        hasher.update(json.dumps(dict(plain.parameters), sort_keys=True).encode() if plain.parameters else b"{}")
        if plain.residual is not None:
            hasher.update(np.ascontiguousarray(plain.residual, "<f4").data)
        return hasher.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Genome) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    # -- algebra -----------------------------------------------------------------------------------------

    def refined(self, borders: Integers) -> Floats:
        """Coefficients (W, K) on the segments of ``borders`` (W+1,), which must contain our boundaries."""
        return self.coefficients[np.searchsorted(self.boundaries, borders[:-1], side="right") - 1]

    def split(self, position: int) -> Genome:
        """The same merge with one more boundary, at ``position`` (0 < position < n)."""
        if not 0 < position < self.size:
            raise InputError(f"position: expected 0 < position < {self.size}, found {position}.")
        borders = np.union1d(self.boundaries, [position])
        return Genome(borders, self.refined(borders), self.parameters, self.residual)

    def simplified(self, limit: int | None = None) -> Genome:
        """The same merge without boundaries between equal segments.

        With ``limit``, neighbouring segments are then joined until at most ``limit`` remain. The pair that moves the
        coefficients least comes first, and gets the length-weighted mean of both. So genomes stay small over a long
        search. Joining changes the merge, and its digest.
        """
        if self.segments == 1:
            return self
        same = (self.coefficients[1:] == self.coefficients[:-1]).all(axis=1)
        boundaries, coefficients = self.boundaries, self.coefficients
        if same.any():
            keep = np.concatenate([[True], ~same])
            boundaries, coefficients = np.append(boundaries[:-1][keep], boundaries[-1]), coefficients[keep]
        if limit is not None and len(coefficients) > limit:
            boundaries, coefficients = _joined(boundaries, coefficients, limit)
        if boundaries is self.boundaries:
            return self
        return Genome(boundaries, coefficients, self.parameters, self.residual)

    # -- text --------------------------------------------------------------------------------------------

    def to_json(self, residual: bool = True) -> str:
        """JSON that ``from_json`` reads back exactly; ``residual=False`` leaves the dense part out."""
        fields = {
            "boundaries": _numbers_text(self.boundaries),
            "coefficients": _numbers_text(self.coefficients),
            "parameters": json.dumps(dict(self.parameters)),
        }
        if residual and self.residual is not None:
            packed = zlib.compress(self.residual.astype("<f4").tobytes(), 1)
            fields["residual"] = f'"{base64.b64encode(packed).decode()}"'
        return "{" + ", ".join(f'"{name}": {text}' for name, text in fields.items()) + "}"

    @classmethod
    def from_json(cls, text: str) -> Genome:
        """The genome that ``to_json`` wrote.

        Raises:
            InputError: The text is not a genome.
        """
        try:
            record = json_object(text, finite=False, depth=None)  # a hook for each number would cost a third more
            boundaries = _read_numbers(record["boundaries"], "i", np.int64)
            coefficients = _read_numbers(record["coefficients"], "if", np.float64)
            packed = record.get("residual")
            residual = None
            if packed is not None:
                size = int(boundaries[-1]) if boundaries.size else 0
                residual = packed_numbers(base64.b64decode(packed), "<f4", size)
            return cls(boundaries, coefficients, _read_parameters(record["parameters"]), residual)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise InputError(
                f"genome: expected JSON written by Genome.to_json, found {text[:80]!r} ({error})."
            ) from error


def _numbers_text(values: NDArray[Any]) -> str:
    """Finite numbers as JSON that is read back exactly: eight times as fast as ``json.dumps``."""
    return to_json(values.tolist()).decode()


def _read_numbers(values: Any, kinds: str, dtype: Any) -> NDArray[Any]:
    """The array of a list of numbers. Text, truths alone, and numbers with a fraction for whole ones are refused."""
    found = np.asarray(values)
    if found.dtype.kind not in kinds:
        raise MalformedError("numbers", f"values of type {found.dtype}")
    return found.astype(dtype, copy=False)


def _read_parameters(found: Any) -> dict[str, Scalar]:
    """The operator's settings: single values by name."""
    single = isinstance(found, dict) and all(isinstance(value, bool | int | float | str) for value in found.values())
    if not single or not all(math.isfinite(value) for value in found.values() if isinstance(value, float)):
        raise MalformedError("parameters, single values by name", repr(found)[:80])
    return dict(found)


def combine(
    genomes: Sequence[Genome], weights: ArrayLike, borders: ArrayLike | None = None, limit: int | None = None
) -> Genome:
    """The linear combination of genomes of the same sources, with weights constant between ``borders``.

    Args:
        genomes: P genomes of equal size, sources and parameters.
        weights: (P,) for one weight each, or (W, P) for weights that change at ``borders``.
        borders: (W+1,) positions from 0 to n; needed when weights is (W, P).
        limit: The most segments; beyond it neighbours are joined (``Genome.simplified``).

    Returns:
        The genome whose mixture and residual are ``sum_p weights[w, p] * genomes[p]`` in each interval w.

    Raises:
        InputError: The genomes are not of the same sources and parameters, or the weights do not fit.
    """
    first = genomes[0]
    for genome in genomes:
        if (genome.size, genome.sources) != (first.size, first.sources):
            raise InputError(
                f"genomes: expected size {first.size} and {first.sources} sources, as the first has, "
                f"found {genome.size} and {genome.sources}."
            )
        if genome.parameters != first.parameters:
            raise InputError(
                f"genomes: expected the parameters of the first, {dict(first.parameters)}, found "
                f"{dict(genome.parameters)}."
            )
    table = np.atleast_2d(np.asarray(weights, np.float64))
    edges = np.array([0, first.size]) if borders is None else np.asarray(borders, np.int64)
    if table.shape != (len(edges) - 1, len(genomes)):
        raise InputError(f"weights: expected shape {(len(edges) - 1, len(genomes))}, found {table.shape}.")
    union = united(edges, *(g.boundaries for g in genomes))
    rows = table[np.searchsorted(edges, union[:-1], side="right") - 1]
    mixed = np.zeros((len(union) - 1, first.sources))
    for column, genome in enumerate(genomes):
        mixed += rows[:, column : column + 1] * genome.refined(union)
    return Genome(union, mixed, first.parameters, _combined_residual(genomes, table, edges)).simplified(limit)


def united(*borders: Integers) -> Integers:
    """All borders in order, each once. Faster than ``numpy.unique`` for short arrays, by half."""
    every = np.concatenate(borders)
    every.sort()
    new = np.ones(len(every), np.bool_)
    np.not_equal(every[1:], every[:-1], out=new[1:])
    return every[new]


@lru_cache(maxsize=8)
def _nothing(size: int, sources: int) -> tuple[Integers, Floats]:
    """Boundaries and coefficients of one segment without any source; read-only, so that genomes may share them."""
    return _frozen(np.array([0, size]), np.int64), _frozen(np.zeros((1, sources)), np.float64)


def _combined_residual(genomes: Sequence[Genome], table: Floats, edges: Integers) -> NDArray[np.float32] | None:
    if all(g.residual is None for g in genomes):
        return None
    total = np.zeros(genomes[0].size, np.float32)
    for column, genome in enumerate(genomes):
        if genome.residual is None:
            continue
        for row, (start, stop) in enumerate(pairwise(edges)):
            total[start:stop] += np.float32(table[row, column]) * genome.residual[start:stop]
    return total


def _joined(boundaries: Integers, coefficients: Floats, limit: int) -> tuple[Integers, Floats]:
    if limit < 1:
        raise InputError(f"limit: expected at least 1 segment, found {limit}.")
    edges, rows = boundaries.tolist(), list(coefficients)
    while len(rows) > limit:
        lengths = np.diff(edges)
        gaps = np.sum(np.diff(np.asarray(rows), axis=0) ** 2, axis=1)
        # Joining neighbours of lengths a, b moves the coefficients by ab/(a+b) * gap, as in Ward's clustering.
        costs = gaps * lengths[:-1] * lengths[1:] / (lengths[:-1] + lengths[1:])
        at = int(np.argmin(costs))
        share = lengths[at] / (lengths[at] + lengths[at + 1])
        rows[at : at + 2] = [share * rows[at] + (1 - share) * rows[at + 1]]
        del edges[at + 1]
    return np.asarray(edges, np.int64), np.asarray(rows)


def _frozen(values: ArrayLike, kind: Any) -> NDArray[Any]:
    array = np.asarray(values, kind)
    if array.flags.writeable:
        array = array.view() if array.base is None and array is not values else array.copy()
        array.flags.writeable = False
    return array


def _check(genome: Genome) -> None:
    boundaries, coefficients, residual = genome.boundaries, genome.coefficients, genome.residual
    if boundaries.ndim != 1 or boundaries.size < 2 or boundaries[0] != 0 or (boundaries[1:] <= boundaries[:-1]).any():
        raise InputError(f"boundaries: expected positions that increase from 0 to n, found {boundaries.tolist()[:8]}.")
    if coefficients.ndim != 2 or coefficients.shape[0] != boundaries.size - 1 or coefficients.shape[1] < 1:
        raise InputError(
            f"coefficients: expected shape ({boundaries.size - 1}, K) for {boundaries.size - 1} segments, "
            f"found {coefficients.shape}."
        )
    if not np.isfinite(coefficients).all():
        raise InputError("coefficients: expected finite numbers, found NaN or infinity.")
    if residual is not None and residual.shape != (genome.size,):
        raise InputError(f"residual: expected shape ({genome.size},), found {residual.shape}.")
