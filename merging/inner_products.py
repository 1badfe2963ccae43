"""Gram matrices of the sources by region of the flat vector, streamed from disk.

Regions are as fine as the table's memory allows (single elements for small models); each tensor is cut evenly and
tensor borders are always region borders. The differences, products and sums are taken in float64, from which the
manager computes the angles SLERP needs without touching a weight (``ecotone.populations.gram``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor, float64

from ecotone.merging.kernel.materialise import CHUNK, Stretch, over_threads
from ecotone.merging.models.layout import Layout
from ecotone.merging.operators.base import Term
from ecotone.populations.genome import Floats, Integers
from ecotone.populations.gram import GramTable

TABLE_BYTES = 16 * 2**20


def region_borders(layout: Layout, sources: int, table_bytes: int = TABLE_BYTES) -> Integers:
    """(R+1,) borders of the finest regions whose K x K float64 matrices fit in ``table_bytes``.

    A tensor keeps at least one region, so a table of very many tensors may be larger.
    """
    starts = layout.tensor_borders
    regions = max(1, table_bytes // (sources * sources * 8))
    if layout.size <= regions:
        return np.arange(layout.size + 1, dtype=np.int64)
    share = max(0, regions - len(layout.tensors)) / layout.size
    cuts = [_even(int(a), int(b), max(1, int((b - a) * share))) for a, b in itertools.pairwise(starts)]
    return np.append(np.concatenate(cuts), starts[-1])


def _even(start: int, stop: int, parts: int) -> Integers:
    return start + (stop - start) * np.arange(parts, dtype=np.int64) // parts


def gram_table(
    layout: Layout,
    read: Callable[[str], Stretch],
    directions: Sequence[Sequence[Term]],
    threads: int,
    table_bytes: int = TABLE_BYTES,
) -> GramTable:
    """The Gram table of the sources of a merge.

    Args:
        layout: The flat vector.
        read: By tensor name, its stretch of the J models that are mixed.
        directions: Each of the K sources as a sum over these models.
        threads: Threads to spread the work over; the result does not depend on it.
        table_bytes: Memory the table may take.
    """
    sources = len(directions)
    borders = region_borders(layout, sources, table_bytes)
    grams = np.zeros((len(borders) - 1, sources, sources))
    for name, start, stop in zip(layout.tensors, layout.tensor_borders[:-1], layout.tensor_borders[1:], strict=True):
        stretch = read(name)
        first, last = np.searchsorted(borders, [start, stop])
        local = borders[first : last + 1] - start

        def work(
            span: tuple[int, int], stretch: Stretch = stretch, first: int = first, local: Integers = local
        ) -> None:
            for low, high in _chunks(int(local[span[0]]), int(local[span[1]])):
                _accumulate(stretch[low:high].tensors(), low, local, grams[first:], directions)

        over_threads(work, _whole_regions(local), threads)
    return GramTable.from_regions(borders, grams)


def _whole_regions(local: Integers) -> list[tuple[int, int]]:
    """Ranges of regions of about one chunk each, so that no two threads share a region."""
    marks = np.searchsorted(local, np.arange(0, local[-1], CHUNK))
    marks = np.unique(np.append(marks, len(local) - 1))
    return [(int(a), int(b)) for a, b in itertools.pairwise(marks)]


def _chunks(start: int, stop: int) -> list[tuple[int, int]]:
    return [(low, min(low + CHUNK, stop)) for low in range(start, stop, CHUNK)]


def _accumulate(
    pieces: Sequence[Tensor], start: int, local: Integers, grams: Floats, directions: Sequence[Sequence[Term]]
) -> None:
    vectors = vectors_of(pieces, directions)
    stop = start + len(vectors[0])
    first = int(np.searchsorted(local, start, side="right")) - 1
    last = int(np.searchsorted(local, stop))
    cuts = np.maximum(local[first:last], start) - start
    for j, left in enumerate(vectors):
        for k, right in enumerate(vectors[j:], start=j):
            sums = np.add.reduceat(left * right, cuts)
            grams[first:last, j, k] += sums
            if k != j:
                grams[first:last, k, j] += sums


def vectors_of(pieces: Sequence[Tensor], directions: Sequence[Sequence[Term]]) -> list[Floats]:
    """Each of the K sources, summed over J flat pieces in float64."""
    models = [piece.to(float64).numpy() for piece in pieces]
    vectors = []
    for (first, weight), *rest in directions:
        total = weight * models[first]
        for j, factor in rest:
            total = total + factor * models[j]
        vectors.append(total)
    return vectors
