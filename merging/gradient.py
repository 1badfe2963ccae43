"""The gradient of a loss by a genome's coefficients, from the gradient by the merged weights.

Operators are linear, ``theta = sum_j w_j(c) theta_j`` with ``w(c) = w(0) + c A``, so in segment s

    dL/dc[s, k] = <dL/dtheta[s], sum_j A[k, j] theta_j[s]>

which for task arithmetic is the inner product with the task vector (AdaMerging, Yang et al. 2024, arXiv:2310.02575).
No graph goes through the merge and no source direction is ever held whole: gradients come tensor by tensor, as a
backward pass makes them, and the directions are formed chunk by chunk. In main memory a chunk whose gradient is zero is
passed over: that of an embedding has few rows that are not.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecotone.merging.kernel import compiled
from ecotone.merging.kernel.materialise import CHUNK, DEVICE_SPAN, Stretch, accumulator, over_threads
from ecotone.merging.operators.base import Term, directions
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Floats, Genome

LANES = 1020  # partial sums of a chunk

Directions: TypeAlias = Sequence[Sequence[Term]]
Place: TypeAlias = tuple[int, slice]
"""A row of the table of sums, and the part of the stretch that it is about."""
Kernel: TypeAlias = Callable[[Stretch, Tensor, Directions, Tensor, Place], None]


class Slopes:
    """Inner products ``<dL/dtheta[segment s], d theta/d c[s, k]>``, collected tensor by tensor.

    Directions and products are taken in float32 (float64 for float64 sources) by chunk and added up in float64, in an
    order that depends neither on the number of threads nor on when a tensor's gradient comes.

    Args:
        sources: The sources that are mixed.
        genome: The genome at which the gradient is taken. Its residual is a constant.

    Raises:
        InputError: The genome does not fit the sources, or its operator is not linear in the coefficients.
    """

    def __init__(self, sources: Sources, genome: Genome) -> None:
        sources.mixture(genome)
        if sources.rank is not None:
            raise InputError("merge.rank: expected no gradients of merges that are cut to a rank: they have none.")
        self._sources = sources = sources.tuned(genome)
        self._shape = genome.coefficients.shape
        self._borders: list[int] = genome.boundaries.tolist()
        self._places = {name: index for index, name in enumerate(sources.layout.tensors)}
        self._directions = _directions(sources)
        self._sums: list[tuple[int, list[int], Tensor]] = []

    def add(self, name: str, gradient: Tensor) -> None:
        """Take in dL/dtheta of one tensor. Twice for one name (tied weights) gives the sum.

        Args:
            name: A tensor of the layout.
            gradient: A tensor of the tensor's shape (or flat), any floating-point type, any device. It is not kept.

        Raises:
            InputError: The layout has no such tensor, or one of another size.
        """
        index = self._places.get(name)
        if index is None:
            raise InputError(f"gradient: expected a tensor of the layout, found {name!r}.")
        start, stop = self._sources.layout.tensor_borders[index : index + 2].tolist()
        if gradient.numel() != stop - start:
            raise InputError(f"gradient: {name}: expected {stop - start} elements, found {gradient.numel()}.")
        flat = (gradient if gradient.layout == torch.strided else gradient.to_dense()).detach().reshape(-1)
        on_cpu = flat.device.type == "cpu"
        parts = self._parts(start, stop, CHUNK if on_cpu else DEVICE_SPAN)
        stretch = self._sources.near(name, flat.device)
        sums = flat.new_zeros(len(parts), self._shape[1], dtype=torch.float64)
        work = partial(self._kernel(stretch, flat), stretch, flat, self._directions, sums)
        rows = [(number, slice(low, high)) for number, (_, low, high) in enumerate(parts)]
        over_threads(work, rows, torch.get_num_threads() if on_cpu else 1)
        self._sums.append((index, [segment for segment, _, _ in parts], sums))

    def _kernel(self, stretch: Stretch, gradient: Tensor) -> Kernel:
        if gradient.device.type != "cpu":
            return _on_device
        compiles = self._sources.large and compiled.multiplies(stretch.sample(), gradient)
        return _by_loops if compiles and _simple(self._directions) else _in_cache

    @property
    def values(self) -> Floats:
        """(S, K) the derivatives so far; zero where no tensor with a gradient lies."""
        total = np.zeros(self._shape)
        for _, segments, sums in sorted(self._sums, key=lambda entry: entry[0]):
            np.add.at(total, segments, sums.to("cpu", torch.float64).numpy())
        return total

    def _parts(self, start: int, stop: int, span: int) -> list[tuple[int, int, int]]:
        """(segment, low, high) of pieces of at most ``span`` elements, positions counted from ``start``."""
        parts = []
        first, last = bisect_right(self._borders, start) - 1, bisect_left(self._borders, stop)
        for segment in range(first, last):
            low, high = max(start, self._borders[segment]), min(stop, self._borders[segment + 1])
            parts += [(segment, at - start, min(at + span, high) - start) for at in range(low, high, span)]
        return parts


def _directions(sources: Sources) -> Directions:
    """For each of K coefficients the models that it moves along.

    Raises:
        InputError: They depend on the coefficients.
    """
    if not sources.operator.affine:
        raise InputError(
            f"operator: expected one that is linear in its coefficients, found {sources.operator.name!r}.",
            "Gradients are inner products with fixed directions; use a search without gradients.",
        )
    return directions(sources.operator, len(sources.operator.columns(sources.names)))


# -- the inner products over one part of a stretch, into one row of a (parts, K) table -----------------------


def _by_loops(stretch: Stretch, gradient: Tensor, directions: Directions, sums: Tensor, at: Place) -> None:
    """Compiled loops, with the bits of ``_in_cache``."""
    row, part = at
    if not _any(gradient[part]):
        return
    lanes = np.zeros((len(directions), LANES), np.float32)
    compiled.products(stretch[part].tensors(), gradient[part], [[j for j, _ in terms] for terms in directions], lanes)
    sums.numpy()[row] = lanes.sum(axis=1, dtype=np.float64)


@np.errstate(over="ignore", invalid="ignore")  # a bad candidate is a result
def _in_cache(stretch: Stretch, gradient: Tensor, directions: Directions, sums: Tensor, at: Place) -> None:
    row, part = at
    if not _any(gradient[part]):
        return
    kind = accumulator(stretch.stored)
    slope = gradient[part].to(kind)
    stage = _stager(stretch[part].tensors(), kind)
    room = torch.empty_like(slope)
    lanes = np.zeros((len(directions), LANES), room.numpy().dtype)
    for terms, into in zip(directions, lanes, strict=True):
        np.multiply(_direction(stage, terms, room).numpy(), slope.numpy(), out=room.numpy())
        _deal(room.numpy(), into)
    sums.numpy()[row] = lanes.sum(axis=1, dtype=np.float64)


def _any(values: Tensor) -> bool:
    """Whether some value in main memory is not zero; numpy tells several times as fast."""
    return bool((values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy().any())


def _deal(values: NDArray[Any], lanes: NDArray[Any]) -> None:
    """Add element i to lane i modulo ``LANES``, one after the other."""
    whole = values.size // LANES * LANES
    if whole:
        np.add.reduce(values[:whole].reshape(-1, LANES), axis=0, out=lanes)
    lanes[: values.size - whole] += values[whole:]


def _on_device(stretch: Stretch, gradient: Tensor, directions: Directions, sums: Tensor, at: Place) -> None:
    row, part = at
    kind = accumulator(stretch.stored)
    slope = gradient[part].to(kind)
    stage = _stager(stretch[part].tensors(sums.device), kind)
    room = torch.empty_like(slope)
    for k, terms in enumerate(directions):
        sums[row, k] = torch.sum(torch.mul(_direction(stage, terms, room), slope, out=room))


def _stager(sources: Sequence[Tensor], kind: torch.dtype) -> Callable[[int], Tensor]:
    """A function that gives source j in the type ``kind``; the first, all directions' base if there is one, is kept."""
    first = sources[0].to(kind)
    return lambda j: first if j == 0 else sources[j].to(kind)


def _direction(stage: Callable[[int], Tensor], terms: Sequence[Term], room: Tensor) -> Tensor:
    """``d theta / d c_k``, in ``room`` unless it is one of the sources."""
    (first, weight), *rest = terms
    total = stage(first) if weight == 1.0 else torch.mul(stage(first), weight, out=room)
    for j, factor in rest:
        total = torch.add(total, stage(j), alpha=factor, out=room)
    return total


def _simple(directions: Directions) -> bool:
    """Whether each direction is a source or the difference of two."""
    return all([weight for _, weight in terms] in ([1.0], [1.0, -1.0]) for terms in directions)
