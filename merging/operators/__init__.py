"""Merge operators, by name. An operator says what a genome's coefficients mean.

To add one, write its file beside these and list it here: the conformance suite (``tests/test_merging_operators.py``)
then runs over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from merging.operators.base import Operator
from merging.operators.linear import Linear
from merging.operators.task_arithmetic import TaskArithmetic
from merging.operators.ties_vectors import TiesVectors
from populations.errors import InputError, nearest

operators = {operator.name: operator for operator in (Linear, TaskArithmetic, TiesVectors)}


def get(name: str, settings: Mapping[str, Any] | None = None) -> Operator:
    """The operator called ``name``.

    Args:
        name: Its name.
        settings: Its settings by name; those not given have their defaults.

    Raises:
        InputError: There is none (the nearest name is given), or a setting is unknown or out of range.
    """
    if name not in operators:
        raise InputError(f"operator: expected a merge operator, found {name!r}.", nearest(name, tuple(operators)))
    kind, given = operators[name], dict(settings or {})
    known = tuple(field.name for field in fields(kind))
    for setting in given:
        if setting not in known:
            remedy = nearest(setting, known) if known else "It takes none."
            raise InputError(f"{setting}: the operator {name!r} has no such setting.", remedy)
    return kind(**given)
