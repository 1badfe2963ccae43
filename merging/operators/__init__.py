"""Merge operators, by name. An operator says what a genome's coefficients mean.

To add one, write its file beside these and list it here, or in another package name it as an entry point of the group
``ecotone.operators``. It is a frozen dataclass that follows ``ecotone.merging.operators.base.Operator``; its fields are
its settings (``ecotone.merging.operators.declared``). The conformance suite (``tests/test_merging_operators.py``) then
runs over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ecotone.merging.operators import declared
from ecotone.merging.operators.base import Operator
from ecotone.merging.operators.declared import Setting
from ecotone.populations.errors import InputError, nearest
from ecotone.populations.genome import Scalar
from ecotone.registry import Registry
from ecotone.settings import Located, expanded

_OURS = {
    "linear": "ecotone.merging.operators.linear:Linear",
    "slerp": "ecotone.merging.operators.slerp:Slerp",
    "task_arithmetic": "ecotone.merging.operators.task_arithmetic:TaskArithmetic",
    "ties": "ecotone.merging.operators.ties:Ties",
    "ties_vectors": "ecotone.merging.operators.ties_vectors:TiesVectors",
    "dare": "ecotone.merging.operators.dare:Dare",
    "dare_ties": "ecotone.merging.operators.dare_ties:DareTies",
    "kfac": "ecotone.merging.operators.kfac:KFac",
    "regmean": "ecotone.merging.operators.regmean:RegMean",
    "regmean_pp": "ecotone.merging.operators.regmean_pp:RegMeanPlusPlus",
    "fisher": "ecotone.merging.operators.fisher:Fisher",
    "ota": "ecotone.merging.operators.ota:Ota",
    "rcp": "ecotone.merging.operators.rcp:Rcp",
    "wudi": "ecotone.merging.operators.wudi:Wudi",
    "tsv_m": "ecotone.merging.operators.tsv_m:TsvM",
    "iso_c": "ecotone.merging.operators.iso_c:IsoC",
    "iso_cts": "ecotone.merging.operators.iso_cts:IsoCts",
    "opcm": "ecotone.merging.operators.opcm:Opcm",
    "star": "ecotone.merging.operators.star:Star",
    "knots": "ecotone.merging.operators.knots:Knots",
    "della": "ecotone.merging.operators.della:Della",
    "breadcrumbs": "ecotone.merging.operators.breadcrumbs:Breadcrumbs",
    "consensus": "ecotone.merging.operators.consensus:Consensus",
    "pcb": "ecotone.merging.operators.pcb:Pcb",
    "sce": "ecotone.merging.operators.sce:Sce",
    "emr": "ecotone.merging.operators.emr:Emr",
    "localize_and_stitch": "ecotone.merging.operators.localize_and_stitch:LocalizeAndStitch",
    "widen": "ecotone.merging.operators.widen:Widen",
    "arcee_fusion": "ecotone.merging.operators.arcee_fusion:ArceeFusion",
    "stack": "ecotone.merging.operators.stack:Stack",
    "one_of": "ecotone.merging.operators.one_of:OneOf",
}
OPERATORS: Registry[type[Operator]] = Registry("operator", "ecotone.operators", _OURS, declared.check_declared)


def get(name: str, settings: Mapping[str, Any] | None = None) -> Operator:
    """The operator called ``name``.

    Args:
        name: Its name.
        settings: Its settings by name; those not given have their defaults.

    Raises:
        InputError: There is none (the nearest name is given), or a setting is unknown or out of range.
    """
    kind = OPERATORS.get(name, "operator")
    return kind(**declared.checked(kind, settings or {}))


def settings_of(name: str) -> Mapping[str, Setting]:
    """The settings of the operator called ``name``, by name.

    Raises:
        InputError: There is none (the nearest name is given).
    """
    return declared.settings_of(OPERATORS.get(name, "merge.operator"))


def checked(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a recipe gives them, as the operator called ``name`` takes them.

    Args:
        name: The name of the operator.
        given: Its settings by name. Those that mean a value of their type are taken: a list for a tuple.

    Raises:
        InputError: There is no such operator or setting (the nearest name is given), or a value does not fit. The
            message begins with the recipe's field.
    """
    kind = OPERATORS.get(name, "merge.operator")
    try:
        return declared.checked(kind, given, strict=False)
    except InputError as error:
        raise InputError(f"merge.{error.message}", error.remedy) from error


def with_paths(name: str, settings: Mapping[str, Any], resolve: Located) -> dict[str, Any]:
    """The settings of the operator called ``name``, with the paths of files in them put through ``resolve``."""
    kind = OPERATORS.get(name, "merge.operator")
    if hasattr(kind, "with_paths"):
        found: dict[str, Any] = kind.with_paths(settings, resolve)
        return found
    paths = tuple(getattr(kind, "paths", ()))
    return {key: expanded(value, resolve) if key in paths else value for key, value in settings.items()}


def files(name: str, settings: Mapping[str, Any]) -> list[Path]:
    """The files that the settings of the operator called ``name`` name: its vectors depend on them."""
    found: list[Path] = []

    def noted(path: str) -> str:
        found.append(Path(path).expanduser())
        return path

    with_paths(name, settings, noted)
    return found


def tuned(operator: Operator, parameters: Mapping[str, Scalar]) -> Operator:
    """``operator`` with a genome's own settings.

    Raises:
        InputError: It has no such setting to search over (the nearest name is given), or one is out of range.
    """
    if not parameters:
        return operator
    known = tuple(operator.searchable)
    for parameter in parameters:
        if not known:
            raise InputError(f"genome: the operator {operator.name!r} takes no parameters, found {parameter!r}.")
        if parameter not in known:
            raise InputError(
                f"genome: the operator {operator.name!r} has no parameter {parameter!r}.", nearest(parameter, known)
            )
    settings = declared.settings_of(type(operator))
    for name, value in parameters.items():
        settings[name].checked(value)
    return replace(operator, **parameters)  # type: ignore[type-var]
