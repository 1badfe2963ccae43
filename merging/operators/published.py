"""The merges that an operator's method has published: where a search over its coefficients begins."""

from __future__ import annotations

import numpy as np

from ecotone.merging.operators.base import Operator
from ecotone.merging.operators.stack import Stack
from ecotone.populations.genome import Floats


def published(operator: Operator, experts: int) -> dict[str, Floats]:
    """By name, (K,) coefficients of published merges, the one that searches begin with first; empty without any.

    Args:
        operator: The operator: one that says where its published merge lies (``around``), or a stack of several.
        experts: E, how many experts are merged.

    Raises:
        InputError: The operator does not merge so many.
    """
    if isinstance(operator, Stack):
        return operator.published(experts)
    around = getattr(operator, "around", None)
    if around is None:
        return {}
    columns = operator.columns([str(number) for number in range(experts)])
    return {f"at {around:g}": np.full(len(columns), float(around))}
