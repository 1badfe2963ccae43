"""Inner products of merges from inner products of their sources, without touching a weight.

For merges ``u = sum_k a[segment, k] source_k`` and ``v`` likewise, ``<u, v> = sum_regions a_r^T G_r b_r`` where
``G_r[j, k] = <source_j, source_k>`` over region r. A worker streams the sources once to fill the table
(``ecotone.merging.inner_products``). The manager may run on a machine without weights. From the table it takes the
angle between any two merges, as SLERP needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ecotone.populations.errors import InputError
from ecotone.populations.genome import Floats, Genome, Integers, united


@dataclass(frozen=True, eq=False)
class GramTable:
    """Prefix sums of the Gram matrices of K sources over R regions of the flat vector.

    Args:
        borders: (R+1,) region borders, from 0 to n.
        prefix: (R+1, K, K) float64; ``prefix[j] - prefix[i]`` is the Gram matrix of regions i to j-1.
    """

    borders: Integers
    prefix: Floats

    @classmethod
    def from_regions(cls, borders: ArrayLike, grams: ArrayLike) -> GramTable:
        """The table of ``grams`` (R, K, K), the Gram matrix of each region between ``borders`` (R+1,)."""
        edges, blocks = np.asarray(borders, np.int64), np.asarray(grams, np.float64)
        prefix = np.zeros((blocks.shape[0] + 1, *blocks.shape[1:]))
        np.cumsum(blocks, axis=0, out=prefix[1:])
        return cls(edges, prefix)

    @classmethod
    def from_vectors(cls, vectors: ArrayLike, borders: ArrayLike | None = None) -> GramTable:
        """The table of small sources held in memory: ``vectors`` is (K, n); every element is a region by default."""
        sources = np.asarray(vectors, np.float64)
        edges = np.arange(sources.shape[1] + 1) if borders is None else np.asarray(borders, np.int64)
        products = sources.T[:, :, None] * sources.T[:, None, :]
        return cls.from_regions(edges, np.add.reduceat(products, edges[:-1], axis=0))

    def between(self, positions: Integers) -> Floats:
        """(W, K, K) Gram matrices of the intervals of ``positions`` (W+1,), which must be region borders."""
        index = np.searchsorted(self.borders, positions)
        if index.max() >= self.borders.size or (self.borders[index] != positions).any():
            wrong = [int(p) for p in positions if p not in self.borders][:3]
            raise InputError(f"positions: expected region borders of the Gram table, found {wrong}.")
        sums = self.prefix[index]
        return sums[1:] - sums[:-1]

    def inner(self, a: Genome, b: Genome) -> float:
        """The inner product of the mixtures of ``a`` and ``b`` (anchor and residuals left out)."""
        union = united(a.boundaries, b.boundaries)
        return float(np.einsum("sj,sjk,sk->", a.refined(union), self.between(union), b.refined(union)))
