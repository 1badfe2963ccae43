"""Exact order statistics of numbers that are made of the models' weights, streamed.

A radix selection, as ``ecotone.merging.operators.task_vectors.largest`` for magnitudes: numbers are in the order of
their bits once those of negative ones are turned, so each pass counts the next 16 bits of those that agree with the
bits found so far. That takes two passes over float32 and four over float64, and a table of 65,536 counts for each.
Where there are few numbers they are sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecotone.merging.operators.task_vectors import DIGITS, Pieces, Visit, Whole, chunks
from ecotone.populations.genome import Integers

Work: TypeAlias = Callable[[Sequence[Tensor], int], Sequence[Tensor]]
"""A function that makes R tensors of numbers, each as long as the pieces, of J pieces and their position."""
Walk: TypeAlias = Callable[[Visit[None]], object]
"""A function that visits all pieces once, in any order and from any thread: ``Pieces.map`` or ``Whole.map``."""

FEW = 65_536  # numbers of a series that are sorted


def magnitudes(vectors: Sequence[Tensor]) -> list[Tensor]:
    """The magnitudes of K tensors, in place."""
    return [vector.abs_() for vector in vectors]


def order_statistics(
    models: Pieces | Whole, work: Work, ranks: Sequence[Sequence[int]], kind: torch.dtype
) -> list[tuple[float, ...]]:
    """For each of R series of numbers, those of the given ranks.

    Args:
        models: The models, or one tensor of them.
        work: Makes the R series of pieces of them.
        ranks: For each series the ranks, from 1 for the largest number.
        kind: float32 or float64, the type in which the numbers are compared.
    """
    if models.size <= FEW:
        return _sorted(models.map, work, ranks, kind)
    width = torch.finfo(kind).bits
    left = {(r, rank): rank for r, each in enumerate(ranks) for rank in each}
    found = dict.fromkeys(left, 0)
    for shift in range(width - DIGITS, -1, -DIGITS):
        counts = _counted(models.map, work, kind, shift, {(r, found[r, rank]) for r, rank in left})
        for r, rank in left:
            reached = np.cumsum(counts[r, found[r, rank]][::-1])
            place = int(np.searchsorted(reached, left[r, rank]))  # counted from the largest digit
            left[r, rank] -= int(reached[place - 1]) if place else 0
            found[r, rank] = found[r, rank] << DIGITS | (len(reached) - 1 - place)
    return [tuple(_number(found[r, rank], width) for rank in each) for r, each in enumerate(ranks)]


def _counted(
    walk: Walk, work: Work, kind: torch.dtype, shift: int, wanted: set[tuple[int, int]]
) -> dict[tuple[int, int], Integers]:
    """For series r and leading bits, how often each 16 bits above bit ``shift`` come after these."""
    counts = {each: np.zeros(1 << DIGITS, np.int64) for each in wanted}
    lock = Lock()

    def count(pieces: Sequence[Tensor], start: int) -> None:
        keys = [_keys(numbers) for numbers in _made(work, kind, pieces, start)]
        for (r, leading), row in counts.items():
            digits = keys[r] >> keys[r].dtype.type(shift)
            digits = digits[digits >> digits.dtype.type(DIGITS) == leading] & digits.dtype.type((1 << DIGITS) - 1)
            new = np.bincount(digits.astype(np.int64), minlength=1 << DIGITS)
            with lock:
                row += new

    walk(count)
    return counts


def _sorted(walk: Walk, work: Work, ranks: Sequence[Sequence[int]], kind: torch.dtype) -> list[tuple[float, ...]]:
    """The same by sorting all numbers."""
    made: list[list[NDArray[Any]]] = []
    walk(lambda pieces, start: made.append(_made(work, kind, pieces, start)))
    series = [np.sort(np.concatenate(parts) + 0.0) for parts in zip(*made, strict=True)]
    return [tuple(row[len(row) - np.array(each)].tolist()) for row, each in zip(series, ranks, strict=True)]


def _made(work: Work, kind: torch.dtype, pieces: Sequence[Tensor], start: int) -> list[NDArray[Any]]:
    """The R series of one piece, formed chunk by chunk."""
    made, low = [], start
    for cut in chunks(pieces):
        made.append([values.to(kind).numpy() for values in work(cut, low)])
        low += cut[0].numel()
    return [np.concatenate(parts) for parts in zip(*made, strict=True)]


def _keys(numbers: NDArray[Any]) -> NDArray[Any]:
    """Unsigned integers in the order of floating-point numbers; zeros of both signs are one."""
    bits = (numbers + 0.0).view(f"u{numbers.itemsize}")
    top = bits.dtype.type(8 * numbers.itemsize - 1)
    turned = (bits >> top) * np.iinfo(bits.dtype).max
    keys: NDArray[Any] = bits ^ (turned | bits.dtype.type(1) << top)
    return keys


def _number(key: int, width: int) -> float:
    """The number of a key."""
    top = 1 << width - 1
    bits = key ^ top if key & top else key ^ ((1 << width) - 1)
    return float(np.array(bits, f"u{width // 8}").view(f"f{width // 8}"))
