"""The merges of an operator's own that a search over its coefficients begins with."""

from __future__ import annotations

from ecotone.merging.operators.base import Operator
from ecotone.merging.operators.one_of import OneOf
from ecotone.merging.operators.stack import Stack, own_merge
from ecotone.populations.genome import Genome


def own_merges(operator: Operator, experts: int, size: int) -> dict[str, Genome]:
    """By name, the merges, the one that searches begin with first; empty without any.

    Args:
        operator: The operator: one around whose published merge searches begin (``around``), a stack of several, or
            one of several; these have a parameter but for the one that is chosen where a merge has none.
        experts: E, how many experts are merged.
        size: n, the length of the flat vector.

    Raises:
        InputError: The operator does not merge so many.
    """
    if isinstance(operator, OneOf):
        alone = operator.alone(experts).items()
        chosen = {name: {} if number == operator.chosen else {"chosen": number} for name, (number, _) in alone}
        return {name: Genome.uniform(size, row, **chosen[name]) for name, (_, row) in alone}
    if isinstance(operator, Stack):
        return {name: Genome.uniform(size, row) for name, row in operator.own_merges(experts).items()}
    around = getattr(operator, "around", None)
    return {} if around is None else {f"at {around:g}": Genome.uniform(size, own_merge(operator, experts))}
