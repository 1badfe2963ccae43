"""The protocol of merge operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol, TypeAlias

import numpy as np

from ecotone.merging.kernel.materialise import Transform
from ecotone.merging.models.layout import Layout
from ecotone.merging.operators.task_vectors import Pieces
from ecotone.populations.genome import Floats, Genome, Integers
from ecotone.populations.gram import GramTable

Term: TypeAlias = tuple[int, float]
"""The number of a model and its weight in a direction."""


class Operator(Protocol):
    """The meaning of a genome's coefficients: weights over the J models of a merge.

    Every operator here is linear in the models it mixes, ``theta = sum_j w_j theta_j`` in each segment, so one kernel
    (``ecotone.merging.kernel.materialise``) serves them all. With a base, model 0 is the base and 1..E are the
    experts. An operator may mix others in place of those of the checkpoints (``transform``). Its settings are its
    fields: it is a frozen dataclass, recipes give them by name, and each has a default. Some of them a genome may set
    for itself.
    """

    @property
    def name(self) -> str:
        """The operator's name in recipes."""
        ...

    @property
    def needs_base(self) -> bool:
        """Whether the sources are differences from a base model."""
        ...

    @property
    def changes(self) -> bool:
        """Whether others are mixed in place of the experts of the checkpoints."""
        ...

    @property
    def affine(self) -> bool:
        """Whether weights are affine in the coefficients, as gradients and M2N2's algebra of genomes ask."""
        ...

    @property
    def geometry(self) -> Literal["model", "tensor"] | None:
        """Over which part the inner products of the models determine the weights: all parameters, or each tensor."""
        ...

    @property
    def searchable(self) -> Mapping[str, tuple[float, float]]:
        """Settings that a genome may have of its own (``Genome.parameters``), and the widest bounds of a search."""
        ...

    def columns(self, experts: Sequence[str]) -> tuple[str, ...]:
        """K names of a genome's coefficients, for the names of E experts.

        Raises:
            InputError: The operator does not merge so many.
        """
        ...

    def seeds(self, experts: int) -> Floats:
        """(E, K) coefficient rows that reproduce the E experts, as they are mixed."""
        ...

    def weights(self, coefficients: Floats, grams: Floats | None = None) -> Floats:
        """(S, J) weights over the models for coefficients (S, K); J is E, or E+1 with a base.

        Args:
            coefficients: (S, K).
            grams: (S, J, J) inner products of the models where each segment lies, for operators with a ``geometry``.
        """
        ...

    def transform(self, pieces: Pieces) -> Transform:
        """The function that makes the mixed tensors from the stored ones; may first stream all stored tensors."""
        ...


def directions(operator: Operator, columns: int) -> list[list[Term]]:
    """For each of K coefficients, the models that it moves along; models of weight one come first."""
    none = np.zeros((columns, columns))
    table = operator.weights(np.eye(columns)) - operator.weights(none)
    rows = [[(j, weight) for j, weight in enumerate(row) if weight] for row in table.tolist()]
    return [sorted(row, key=lambda term: term[1] != 1.0) for row in rows]


def weights_of(
    operator: Operator, genome: Genome, layout: Layout, grams: Callable[[], GramTable]
) -> tuple[Integers, Floats]:
    """(S+1,) segment borders and (S, J) weights over the models of a genome.

    Args:
        operator: The operator, which gives coefficients their meaning.
        genome: The merge.
        layout: The flat vector.
        grams: Gives the Gram table of the J models, by tensor; asked for where the operator has a ``geometry``.
    """
    if operator.geometry is None:
        return genome.boundaries, operator.weights(genome.coefficients)
    parts = layout.tensor_borders if operator.geometry == "tensor" else np.array([0, layout.size])
    borders = np.union1d(genome.boundaries, parts)
    there = grams().between(parts)[np.searchsorted(parts, borders[:-1], side="right") - 1]
    return borders, operator.weights(genome.refined(borders), there)
