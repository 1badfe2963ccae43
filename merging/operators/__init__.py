"""Merge operators, by name. An operator says what a genome's coefficients mean.

To add one, write its file beside these and list it here: the conformance suite (``tests/test_merging_operators.py``)
then runs over it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from ecotone.merging.operators.base import Operator
from ecotone.merging.operators.dare import Dare
from ecotone.merging.operators.dare_ties import DareTies
from ecotone.merging.operators.linear import Linear
from ecotone.merging.operators.slerp import Slerp
from ecotone.merging.operators.task_arithmetic import TaskArithmetic
from ecotone.merging.operators.ties import Ties
from ecotone.merging.operators.ties_vectors import TiesVectors
from ecotone.populations.errors import InputError, nearest
from ecotone.populations.genome import Scalar

_ALL = (Linear, Slerp, TaskArithmetic, Ties, TiesVectors, Dare, DareTies)
operators: dict[str, Callable[..., Operator]] = {operator.name: operator for operator in _ALL}


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
    known = tuple(field.name for field in fields(kind))  # type: ignore[arg-type]
    for setting in given:
        if setting not in known:
            remedy = nearest(setting, known) if known else "It takes none."
            raise InputError(f"{setting}: the operator {name!r} has no such setting.", remedy)
    return kind(**given)


def tuned(operator: Operator, parameters: Mapping[str, Scalar]) -> Operator:
    """``operator`` with a genome's own settings.

    Raises:
        InputError: It has no such setting to search over (the nearest name is given), or one is out of range.
    """
    known = tuple(operator.searchable)
    for parameter in parameters:
        if not known:
            raise InputError(f"genome: the operator {operator.name!r} takes no parameters, found {parameter!r}.")
        if parameter not in known:
            raise InputError(
                f"genome: the operator {operator.name!r} has no parameter {parameter!r}.", nearest(parameter, known)
            )
    return replace(operator, **parameters) if parameters else operator  # type: ignore[type-var]
