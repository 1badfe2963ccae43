"""Merge operators, by name. An operator says what a genome's coefficients mean.

To add one, write its file beside these and list it here: the conformance suite (``tests/test_merging_operators.py``)
then runs over it.
"""

from __future__ import annotations

from merging.operators.base import Operator
from merging.operators.linear import Linear
from merging.operators.task_arithmetic import TaskArithmetic
from populations.errors import InputError, nearest

operators: dict[str, Operator] = {operator.name: operator for operator in (Linear(), TaskArithmetic())}


def get(name: str) -> Operator:
    """The operator called ``name``.

    Raises:
        InputError: There is none; the nearest name is given.
    """
    if name not in operators:
        raise InputError(f"operator: expected a merge operator, found {name!r}.", nearest(name, tuple(operators)))
    return operators[name]
