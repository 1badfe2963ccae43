"""The part of a recipe that says where a run is mirrored to: by which trackers, and where each of them keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer
from pydantic.functional_validators import model_validator

from ecotone.experiments.tracking.mlflow import MlflowPlace, MlflowSettings
from ecotone.experiments.tracking.protocol import TrackerSettings
from ecotone.experiments.tracking.registry import TRACKERS
from ecotone.experiments.tracking.wandb import WandbSettings

DEFAULT = "mlflow"
"""What is mirrored to when nothing is said, and what `ecotone sync` takes for a run that has no tracker."""
OTHERS = "others"


def _switched(value: Any) -> Any:
    """``true`` means all defaults, ``false`` nothing."""
    if isinstance(value, bool):
        return {} if value else None
    return value


Switched: TypeAlias = Annotated[WandbSettings | None, BeforeValidator(_switched)]


class TrackingSettings(MlflowPlace):
    """Where the run is mirrored to. Several trackers may be on at once; each has all of the run.

    A tracker of an installed package is named like ours: ``name: true``, or ``name:`` with its settings.

    Attributes:
        mlflow: Mirror the journal into MLflow.
        wandb: Mirror the journal into Weights & Biases: ``true``, or its settings.
        others: Settings of trackers of other packages, by name. Recipes give them beside ``mlflow`` and ``wandb``.
    """

    mlflow: bool = True
    wandb: Switched = None
    others: dict[str, Any] = Field(default_factory=dict)

    @property
    def trackers(self) -> dict[str, TrackerSettings]:
        """The settings of those that are on, by name."""
        ours: dict[str, TrackerSettings | None] = {
            "mlflow": MlflowSettings(uri=self.uri, experiment=self.experiment) if self.mlflow else None,
            "wandb": self.wandb,
        }
        return {name: one for name, one in (ours | self.others).items() if one is not None}

    def fact(self) -> str:
        """What the journal keeps of it, as JSON: a mirror is a process of its own, and reads it there."""
        return json.dumps({name: one.recorded().model_dump(mode="json") for name, one in self.trackers.items()})

    @model_validator(mode="before")
    @classmethod
    def _with_others(cls, given: Any) -> Any:
        """Take trackers of other packages in; an unknown key stays where it is, and is refused like any."""
        if not isinstance(given, Mapping):
            return given
        known = {name: value for name, value in given.items() if name not in TRACKERS or name in cls.model_fields}
        named = {name: value for name, value in given.items() if name not in known}
        if not named:
            return given
        return {**known, OTHERS: {name: _plugged(name, value) for name, value in named.items()}}

    @model_serializer(mode="wrap")
    def _beside_ours(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As recipes are written."""
        fields: dict[str, Any] = handler(self)
        fields.pop(OTHERS, None)
        return fields | {name: one and one.model_dump(mode="json") for name, one in self.others.items()}


def _plugged(name: str, value: Any) -> TrackerSettings | None:
    """The settings of another package's tracker; None when it is switched off."""
    if isinstance(value, TrackerSettings) or _switched(value) is None:
        return value or None
    try:
        return TRACKERS.get(name, f"tracking.{name}").model_validate(_switched(value))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, (name, *first["loc"])))
        raise ValueError(f"{field}: {first['msg'][0].lower()}{first['msg'][1:]}, found {first['input']!r}") from error
