"""Task vectors, streamed. Operators read all of them before they change any."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from ecotone.merging.kernel.lazy import Source, formed
from ecotone.merging.kernel.materialise import CHUNK, DEVICE_SPAN, over_threads
from ecotone.merging.models.layout import Layout
from ecotone.populations.genome import Integers

SPAN = 262_144  # elements of a model read at a time
BLOCK = 262_144  # elements of whole rows read at a time; bits of sums over tensors depend on it
DIGITS = 16  # bits a pass of the search for a threshold

Read: TypeAlias = Callable[[str], Sequence[Source]]
"""By tensor name, J flat tensors as the checkpoints hold them: memory-mapped, or formed a piece at a time."""
Result = TypeVar("Result")
Visit: TypeAlias = Callable[[Sequence[Tensor], int], Result]
"""A function of J flat pieces and their position in the flat vector."""


def task_vectors(pieces: Sequence[Tensor], kind: torch.dtype) -> list[Tensor]:
    """K new tensors ``expert - base`` of J = K + 1 pieces, each difference rounded to ``kind``."""
    base, *experts = (piece.to(kind) for piece in pieces)
    return [expert - base for expert in experts]


def chunks(pieces: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cuts of flat pieces, small enough for a core's cache and for torch to use one thread (larger on a GPU)."""
    span = CHUNK if pieces[0].device.type == "cpu" else DEVICE_SPAN
    for low in range(0, pieces[0].numel(), span):
        yield [piece[low : low + span] for piece in pieces]


@dataclass(frozen=True, eq=False)
class Whole:
    """One tensor of the base and the K experts, for operators that look at whole tensors before they change pieces.

    It is a matrix, or a stack of matrices. A row is what lies along the last axis. A tensor of four axes or more (a
    convolution's weight) has a row for each output. One of a single axis, or none, is one row.

    Args:
        name: Its name.
        shape: Its shape.
        start: Its position in the flat vector.
        stored: J flat tensors, the base's first.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stored: Sequence[Source]

    @property
    def size(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """The length of a row."""
        if len(self.shape) < 2:
            return self.size
        return math.prod(self.shape[1:]) if len(self.shape) > 3 else self.shape[-1]

    @property
    def height(self) -> int:
        """The number of rows of one matrix."""
        if len(self.shape) < 2:
            return 1
        return self.shape[0] if len(self.shape) > 3 else self.shape[-2]

    @property
    def block(self) -> int:
        """Elements of a block: as many whole rows as ``BLOCK`` elements hold, at least one."""
        return max(1, BLOCK // self.width) * self.width

    def rows(self, low: int, count: int, device: torch.device) -> Tensor:
        """(count,) the numbers of the rows that elements from ``low`` on lie in."""
        return torch.arange(low, low + count, device=device).div_(self.width, rounding_mode="floor")

    def columns(self, low: int, count: int, device: torch.device) -> Tensor:
        """(count,) the numbers of the columns that elements from ``low`` on lie in; each matrix has its own."""
        places = torch.arange(low, low + count, device=device)
        matrices = places.div(self.width * self.height, rounding_mode="floor")
        return places.remainder_(self.width).add_(matrices, alpha=self.width)

    def read(self, low: int) -> list[Tensor]:
        """J flat pieces: the block of whole rows that begins at element ``low`` of the tensor."""
        part = slice(low, min(low + self.block, self.size))
        return [formed(tensor[part]) for tensor in self.stored]

    def map(self, work: Visit[Result]) -> list[Result]:
        """The results of ``work`` for every block of whole rows, in their order."""
        return [work(self.read(low), self.start + low) for low in range(0, self.size, self.block)]


class Pieces:
    """The base and K experts of a merge, in pieces.

    Args:
        layout: The flat vector.
        read: By tensor name, J = K + 1 flat tensors, the base first.
    """

    def __init__(self, layout: Layout, read: Read) -> None:
        self.kind: torch.dtype = torch.float64 if torch.float64 in layout.dtypes else torch.float32
        """The type in which task vectors are formed."""
        self.size: int = layout.size
        """n, the length of a task vector."""
        self._layout, self._read = layout, read

    @cached_property
    def tensors(self) -> tuple[Whole, ...]:
        """The T tensors, in flat order."""
        names, shapes = self._layout.tensors, self._layout.shapes
        starts = self._layout.tensor_borders[:-1].tolist()
        return tuple(Whole(*each, self._read(each[0])) for each in zip(names, shapes, starts, strict=True))

    @cached_property
    def _places(self) -> list[tuple[Sequence[Source], int, slice]]:
        """Stored tensors, the position of a piece of them in the flat vector, and its place in them."""
        return [
            (whole.stored, whole.start + low, slice(low, low + SPAN))
            for whole in self.tensors
            for low in range(0, whole.size, SPAN)
        ]

    @property
    def vectors(self) -> int:
        """K."""
        return len(self.tensors[0].stored) - 1

    def each(self, work: Callable[[Whole], Result]) -> list[Result]:
        """The results of ``work`` for every tensor, in flat order. Uses torch's threads."""
        results: dict[int, Result] = {}

        def do(whole: Whole) -> None:
            results[whole.start] = work(whole)

        over_threads(do, self.tensors, torch.get_num_threads())
        return [results[whole.start] for whole in self.tensors]

    def map(self, work: Visit[Result]) -> list[Result]:
        """The results of ``work`` for every piece and its position, in any order. Uses torch's threads."""
        results: list[Result] = []

        def do(place: tuple[Sequence[Source], int, slice]) -> None:
            stored, start, part = place
            results.append(work([formed(tensor[part]) for tensor in stored], start))

        over_threads(do, self._places, torch.get_num_threads())
        return results

    def part(self, span: slice) -> Pieces:
        """The base and some of the models: those whose numbers ``span`` has, the base's being 0."""

        def read(name: str) -> list[Source]:
            stored = self._read(name)
            return [stored[0], *stored[span]]

        return Pieces(self._layout, read)

    @cached_property
    def leading(self) -> Integers:
        """(K, 65536) how many magnitudes have each leading 16 bits: where every search for thresholds begins."""
        bits = torch.finfo(self.kind).bits
        return _counted(self, bits - DIGITS, [0] * self.vectors)


def largest(pieces: Pieces, rank: int) -> tuple[float, ...]:
    """The ``rank``-th largest magnitude (1 is the largest) of each of the K task vectors, exactly.

    A radix selection: magnitudes are in the order of their bits, so each pass over the models counts the next 16 bits
    of those that agree with the bits found so far. That takes two passes (four in float64), the first of which serves
    every rank, and a table of K x 65,536 counts.
    """
    width = torch.finfo(pieces.kind).bits
    found, ranks = [0] * pieces.vectors, [rank] * pieces.vectors
    for shift in range(width - DIGITS, -1, -DIGITS):
        counts = pieces.leading if shift == width - DIGITS else _counted(pieces, shift, found)
        for k, row in enumerate(counts):
            reached = np.cumsum(row[::-1])
            place = int(np.searchsorted(reached, ranks[k]))  # counted from the largest digit
            ranks[k] -= int(reached[place - 1]) if place else 0
            found[k] = found[k] << DIGITS | (len(row) - 1 - place)
    return tuple(np.array(found, f"u{width // 8}").view(f"f{width // 8}").tolist())


def _counted(pieces: Pieces, shift: int, found: Sequence[int]) -> Integers:
    """(K, 65536) how often each 16 bits above bit ``shift`` come after the bits ``found``."""
    counts, lock = np.zeros((pieces.vectors, 1 << DIGITS), np.int64), Lock()
    unsigned = np.dtype(f"u{torch.finfo(pieces.kind).bits // 8}")

    def count(piece: Sequence[Tensor], _start: int) -> None:
        parts = [[vector.abs_().numpy() for vector in task_vectors(cut, pieces.kind)] for cut in chunks(piece)]
        for k, magnitudes in enumerate(zip(*parts, strict=True)):
            leading = np.concatenate(magnitudes).view(unsigned) >> unsigned.type(shift)
            digits = leading[leading >> unsigned.type(DIGITS) == found[k]] & unsigned.type((1 << DIGITS) - 1)
            row = np.bincount(digits.astype(np.int64), minlength=1 << DIGITS)
            with lock:
                counts[k] += row

    pieces.map(count)
    return counts
