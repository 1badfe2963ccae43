"""Task vectors, streamed. Operators read all of them before they change any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
DIGITS = 16  # bits a pass of the search for a threshold

Read: TypeAlias = Callable[[str], Sequence[Source]]
"""By tensor name, J flat tensors as the checkpoints hold them: memory-mapped, or formed a piece at a time."""
Result = TypeVar("Result")


def task_vectors(pieces: Sequence[Tensor], kind: torch.dtype) -> list[Tensor]:
    """K new tensors ``expert - base`` of J = K + 1 pieces, each difference rounded to ``kind``."""
    base, *experts = (piece.to(kind) for piece in pieces)
    return [expert - base for expert in experts]


def chunks(pieces: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cuts of flat pieces, small enough for a core's cache and for torch to use one thread (larger on a GPU)."""
    span = CHUNK if pieces[0].device.type == "cpu" else DEVICE_SPAN
    for low in range(0, pieces[0].numel(), span):
        yield [piece[low : low + span] for piece in pieces]


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
    def _places(self) -> list[tuple[Sequence[Source], int, slice]]:
        """Stored tensors, the position of a piece of them in the flat vector, and its place in them."""
        starts = self._layout.tensor_borders[:-1].tolist()
        return [
            (stored, start + low, slice(low, low + SPAN))
            for stored, start in zip(map(self._read, self._layout.tensors), starts, strict=True)
            for low in range(0, stored[0].numel(), SPAN)
        ]

    @property
    def vectors(self) -> int:
        """K."""
        return len(self._places[0][0]) - 1

    def map(self, work: Callable[[Sequence[Tensor], int], Result]) -> list[Result]:
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
