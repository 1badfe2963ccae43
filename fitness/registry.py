"""Objectives and calibration losses by name: Ecotone's, and those of other packages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, SerializerFunctionWrapHandler, WrapSerializer

from ecotone.fitness.kinds import CalibrationSettings, ObjectiveSettings, check_loss, check_objective
from ecotone.populations.errors import InputError
from ecotone.registry import Registry
from ecotone.settings import Chosen

OBJECTIVES: Registry[type[ObjectiveSettings]] = Registry(
    "objective",
    "ecotone.objectives",
    {
        "accuracy": "ecotone.fitness.objectives:AccuracySettings",
        "entropy": "ecotone.fitness.objectives:EntropySettings",
        "call": "ecotone.fitness.objectives:CallSettings",
        "lm_eval": "ecotone.fitness.lm_eval:LmEvalSettings",
        "bits_per_byte": "ecotone.fitness.language.perplexity:PerplexitySettings",
        "likelihood": "ecotone.fitness.language.perplexity:LikelihoodSettings",
        "perplexity": "ecotone.fitness.language.perplexity:PerplexitySettings",
        "multiple_choice": "ecotone.fitness.language.choices:MultipleChoiceSettings",
        "tokens_generated": "ecotone.fitness.language.generation:TokensGeneratedSettings",
        "exact_match": "ecotone.fitness.language.generation:ExactMatchSettings",
    },
    check_objective,
)

LOSSES: Registry[type[CalibrationSettings]] = Registry(
    "calibration loss",
    "ecotone.losses",
    {
        "entropy": "ecotone.fitness.gradients.calibration:EntropyLossSettings",
        "cross_entropy": "ecotone.fitness.gradients.calibration:CrossEntropyLossSettings",
        "distillation": "ecotone.fitness.gradients.distillation:DistillationSettings",
    },
    check_loss,
)

LOSS = "entropy"
"""The loss of a calibration task that names none."""

_ALWAYS_TOLD: dict[str, Any] = {"expert": None, "temperature": 1.0, "hidden": 1.0, "layers": None}
"""Settings of distillation that records tell of every task. The signatures of recorded runs are made of them."""


def _own_settings(value: Any) -> Any:
    """A task's mapping without the keys that records have for every task. Refuses settings of another loss."""
    if not isinstance(value, Mapping):
        return value
    loss = value.get("loss", LOSS)
    try:
        known = LOSSES.get(str(loss), "loss").model_fields
    except InputError:
        return value  # what chooses the kind says why there is none
    untold = [key for key, plain in _ALWAYS_TOLD.items() if key not in known and value.get(key, plain) == plain]
    settings = {key: setting for key, setting in value.items() if key not in untold}
    for key in (key for key in settings if key not in known):
        owners = [name for name, kind in LOSSES.usable().items() if key in kind.model_fields]
        if owners:
            raise ValueError(f"{key}: belongs to loss: {' or '.join(owners)}, found loss: {loss}")
    return settings


def _recorded(task: Any, handler: SerializerFunctionWrapHandler) -> Any:
    record = handler(task)
    return {**record, **{name: plain for name, plain in _ALWAYS_TOLD.items() if name not in record}}


AnyObjective: TypeAlias = Annotated[ObjectiveSettings, Chosen(OBJECTIVES, "type")]
"""A recipe's objective: settings of the kind that its ``type`` names."""

AnyCalibration: TypeAlias = Annotated[
    CalibrationSettings, Chosen(LOSSES, "loss", LOSS), BeforeValidator(_own_settings), WrapSerializer(_recorded)
]
"""A recipe's calibration task: settings of the kind that its ``loss`` names."""
