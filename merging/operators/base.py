"""What a merge operator is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from merging.layout import Layout
from merging.lazy import Source
from merging.materialise import Transform
from populations.genome import Floats

Read: TypeAlias = Callable[[str], Sequence[Source]]
"""By tensor name, J flat tensors as the checkpoints hold them: memory-mapped, or formed a piece at a time."""


class Operator(Protocol):
    """The meaning of a genome's coefficients: weights over the J models of a merge.

    Every operator here is linear in the models it mixes, ``theta = sum_j w_j theta_j`` in each segment, so one kernel
    (``merging.materialise``) serves them all. With a base, model 0 is the base and 1..K are the experts. An operator
    may mix changed experts in place of those of the checkpoints (``transform``). Its settings are its fields: it is a
    frozen dataclass, recipes give them by name, and each has a default.
    """

    @property
    def name(self) -> str:
        """What recipes call it."""
        ...

    @property
    def needs_base(self) -> bool:
        """Whether the sources are differences from a base model."""
        ...

    @property
    def changes(self) -> bool:
        """Whether changed experts are mixed in place of those of the checkpoints."""
        ...

    def seeds(self, sources: int) -> Floats:
        """(K, K) coefficient rows that reproduce the K experts, as they are mixed."""
        ...

    def weights(self, coefficients: Floats) -> Floats:
        """(S, J) weights over the models for coefficients (S, K); J is K, or K+1 with a base."""
        ...

    def transform(self, layout: Layout, read: Read) -> Transform:
        """What is mixed in place of the stored tensors; may stream all of them to find out what that is."""
        ...
