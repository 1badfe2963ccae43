"""One of several methods: each merge says which one's vectors its coefficients weigh.

    theta = base + sum_k c_k v_mk,   m chosen by the merge

So settings that vectors are prepared with can be searched: each alternative is prepared once, and a merge names one.
A ``stack`` mixes its methods; here one alone counts, and there are as many coefficients as it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeAlias

import numpy as np
from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema

from ecotone.merging.kernel.materialise import Transform, unchanged
from ecotone.merging.operators.base import Operator
from ecotone.merging.operators.declared import InWords
from ecotone.merging.operators.stack import (
    LISTED,
    SHAPE,
    Method,
    SideBySide,
    Stack,
    as_given,
    members_of,
    methods_of,
    own_merge,
)
from ecotone.merging.operators.task_vectors import Pieces
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Floats

MOST = 64
"""The most methods that one may be chosen of."""


def alternatives_of(given: Any) -> tuple[Method, ...]:
    """The methods as a recipe gives them, checked.

    Raises:
        InputError: As for ``methods_of``; or they are too many, or have different numbers of coefficients.
    """
    found = methods_of(given)
    if len(found) > MOST:
        raise InputError(f"methods: expected at most {MOST}, found {len(found)}.", "Leave some out.")
    counts = {len(one.columns(("0", "1"))) for one in members_of(found).values()}
    if len(counts) > 1:
        raise InputError(
            "methods: expected methods with as many coefficients as each other, found "
            f"{' and '.join(map(str, sorted(counts)))} for two experts.",
            "Leave out those that have one for all experts, or use the operator stack.",
        )
    return found


Alternatives: TypeAlias = Annotated[
    tuple[Method, ...],
    PlainValidator(alternatives_of),
    PlainSerializer(as_given),
    WithJsonSchema(SHAPE),
    InWords(LISTED),
]


@dataclass(frozen=True)
class OneOf(Stack):
    """``theta = base + sum_k c_k v_mk`` with the vectors of one of several methods.

    Args:
        methods: The operators, by name, or by a mapping of ``operator`` and its settings. They must add vectors to the
            base, be linear in their coefficients, and have as many of these as each other.
        chosen: The number of the method that counts, from 0. With bounds (scale ``integer``) each merge has its own.
    """

    methods: Alternatives = (Method(operator="task_arithmetic"), Method(operator="ties"))
    chosen: Annotated[int, Field(ge=0, le=MOST - 1)] = 0

    name = "one_of"
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {"chosen": (0, MOST - 1)}

    @property
    def method(self) -> Operator:
        """The operator that counts.

        Raises:
            InputError: There are not so many.
        """
        members = tuple(self.members.values())
        if self.chosen >= len(members):
            raise InputError(f"chosen: expected the number of a method, 0 to {len(members) - 1}, found {self.chosen}.")
        return members[self.chosen]

    @property
    def around(self) -> float | None:
        """The coefficient of every vector in the published merge of the method that counts; None without one."""
        found: float | None = getattr(self.method, "around", None)
        return found

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The bounds of coefficients in searches whose recipe gives none: the widest of the methods."""
        own = [one for one in (getattr(member, "bounds", None) for member in self.members.values()) if one is not None]
        return (min(low for low, _ in own), max(high for _, high in own)) if own else None

    def columns(self, experts: Sequence[str]) -> tuple[str, ...]:
        """Those of the method that counts.

        Raises:
            InputError: There are not so many methods, or it does not merge so many experts.
        """
        return self.method.columns(experts)

    def seeds(self, experts: int) -> Floats:
        """(E, K) rows of the method that counts."""
        return self.method.seeds(experts)

    def weights(self, coefficients: Floats, grams: Floats | None = None) -> Floats:
        """(S, M K+1): the base's weight, then those of each method's vectors: 0 but for the one that counts."""
        own = self.method.weights(np.asarray(coefficients, np.float64))
        count = own.shape[1] - 1
        table = np.zeros((len(own), 1 + count * len(self.members)))
        table[:, 0] = own[:, 0]
        table[:, 1 + count * self.chosen :][:, :count] = own[:, 1:]
        return table

    def transform(self, pieces: Pieces) -> Transform:
        """The transform of the method that counts; the others stay as they are, and have no weight."""
        count = pieces.vectors // len(self.members)
        span = slice(1 + count * self.chosen, 1 + count * (self.chosen + 1))
        found = self.method.transform(pieces.part(span))
        if found is unchanged:
            return unchanged
        around = slice(1, span.start), slice(span.stop, pieces.vectors + 1)
        return SideBySide(((around[0], unchanged), (span, found), (around[1], unchanged)))

    def alone(self, experts: int) -> dict[str, tuple[int, Floats]]:
        """By name, the number of each method and the (K,) coefficients of its own merge, the chosen one's first."""
        same = len({method.operator for method in self.methods}) == 1
        found = {}
        for number, (method, one) in enumerate(zip(self.methods, self.members.values(), strict=True)):
            name = method.told if same and method.settings else str(method)
            found[name] = number, own_merge(one, experts)
        return dict(sorted(found.items(), key=lambda item: item[1][0] != self.chosen))
