"""What a merge operator is."""

from __future__ import annotations

from typing import Protocol

from populations.genome import Floats


class Operator(Protocol):
    """The meaning of a genome's coefficients: weights over the J checkpoints of a merge.

    Every operator here is linear in the checkpoints, ``theta = sum_j w_j theta_j`` in each segment, so one kernel
    (``merging.materialise``) serves them all. With a base, checkpoint 0 is the base and 1..K are the experts.
    """

    @property
    def name(self) -> str:
        """What recipes call it."""
        ...

    @property
    def needs_base(self) -> bool:
        """Whether the sources are differences from a base model."""
        ...

    def seeds(self, sources: int) -> Floats:
        """(K, K) coefficient rows that reproduce the K experts."""
        ...

    def weights(self, coefficients: Floats) -> Floats:
        """(S, J) weights over the checkpoints for coefficients (S, K); J is K, or K+1 with a base."""
        ...
