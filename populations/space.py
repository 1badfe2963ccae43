"""The models of a merge as a search knows them: layout and geometry, never weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ecotone.populations.components import Component, components
from ecotone.populations.contents import Record
from ecotone.populations.genome import Floats, Integers
from ecotone.populations.gram import GramTable


@dataclass(frozen=True, eq=False)
class Space:
    """The flat parameter vector of a merge and the sources that span it.

    Args:
        sources: K names, in the order of a genome's coefficient columns.
        tensors: Names of the parameter tensors in flat order.
        tensor_borders: (T+1,) where each tensor begins, then n.
        blocks: Names of the blocks (runs of tensors of one layer) in flat order.
        block_borders: (B+1,) where each block begins, then n.
        gram: Gram matrices of the sources by region; its borders are the allowed split points.
        seeds: (J, K) coefficient rows that reproduce the original models under the merge operator.
        seed_names: J names of those models.
        vectors: (K, n) float32 sources themselves, only when evolving from scratch; None otherwise.
        others: Names of the models' tensors that are not merged. A tensor's neighbours tell what it is.
        contents: The hashes of the models' files, as the worker that gives the space has found them.
    """

    sources: tuple[str, ...]
    tensors: tuple[str, ...]
    tensor_borders: Integers
    blocks: tuple[str, ...]
    block_borders: Integers
    gram: GramTable
    seeds: Floats
    seed_names: tuple[str, ...]
    vectors: NDArray[np.float32] | None = None
    others: tuple[str, ...] = ()
    contents: Record = field(default_factory=dict)

    @property
    def size(self) -> int:
        """n, the length of the flat parameter vector."""
        return int(self.tensor_borders[-1])

    @property
    def dimension(self) -> int:
        """K, the number of sources."""
        return len(self.sources)

    @cached_property
    def components(self) -> tuple[Component, ...]:
        """The role of each tensor in the model, as its name tells it."""
        return components((*self.tensors, *self.others))[: len(self.tensors)]

    def like(self, other: Space) -> bool:
        """True when the other has the same sources, tensors, blocks and seeds; geometry and vectors may differ."""
        return (
            (self.sources, self.tensors, self.blocks, self.seed_names)
            == (other.sources, other.tensors, other.blocks, other.seed_names)
            and np.array_equal(self.tensor_borders, other.tensor_borders)
            and np.array_equal(self.block_borders, other.block_borders)
            and np.array_equal(self.seeds, other.seeds)
        )

    def borders(self, granularity: str) -> Integers:
        """Segment borders of a granularity: ``model`` (one segment), ``block``, ``tensor`` or ``element``.

        ``element`` means the finest regions of the Gram table: single elements for small models.
        """
        match granularity:
            case "model":
                return np.array([0, self.size])
            case "block":
                return self.block_borders
            case "tensor":
                return self.tensor_borders
            case "element":
                return self.gram.borders
            case _:
                raise ValueError(f"granularity: expected model, block, tensor or element, found {granularity!r}")
