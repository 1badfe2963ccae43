"""The part of a recipe that says where a run is mirrored to: by which trackers, and where each of them keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from ecotone.experiments.tracking.mlflow import MlflowPlace, MlflowSettings
from ecotone.experiments.tracking.protocol import TrackerSettings
from ecotone.experiments.tracking.registry import TRACKERS
from ecotone.experiments.tracking.wandb import WandbSettings


class Switch:
    """An annotation of settings, or None: ``true`` stands for all defaults, and ``false`` for None."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(_switched, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "boolean"}, *handler(schema)["anyOf"]]}


def _switched(value: Any) -> Any:
    if isinstance(value, bool):
        return {} if value else None
    return value


class TrackingSettings(MlflowPlace):
    """Where the run is mirrored to. Several trackers may be on at once; each has all of the run.

    A tracker of an installed package is named like ours: ``name: true``, or ``name:`` with its settings.

    Attributes:
        mlflow: Mirror the run into MLflow.
        wandb: Mirror the run into Weights & Biases: ``true``, or the settings of W&B.
    """

    mlflow: bool = True
    wandb: Annotated[WandbSettings | None, Switch()] = None
    _others: dict[str, TrackerSettings | None] = PrivateAttr(default_factory=dict)

    @property
    def trackers(self) -> dict[str, TrackerSettings]:
        """The settings of the trackers that are on, by name."""
        ours: dict[str, TrackerSettings | None] = {
            "mlflow": MlflowSettings(uri=self.uri, experiment=self.experiment) if self.mlflow else None,
            "wandb": self.wandb,
        }
        return {name: settings for name, settings in (ours | self._others).items() if settings is not None}

    def recorded(self) -> dict[str, Any]:
        """The settings as the journal keeps them. The mirror, which is a process of its own, reads them there."""
        return {name: settings.recorded().model_dump(mode="json") for name, settings in self.trackers.items()}

    @model_validator(mode="wrap")
    @classmethod
    def _with_others(cls, given: Any, handler: ModelWrapValidatorHandler[TrackingSettings]) -> TrackingSettings:
        """Take trackers of other packages out; an unknown key stays where it is, and is refused like any."""
        if not isinstance(given, Mapping):
            return handler(given)
        plugins = set(TRACKERS) - cls.model_fields.keys()
        others = {name: _plugged(name, value) for name, value in given.items() if name in plugins}
        settings = handler({name: value for name, value in given.items() if name not in others})
        settings._others = others
        return settings

    @model_serializer(mode="wrap")
    def _with_others_again(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As recipes are written."""
        fields: dict[str, Any] = handler(self)
        return fields | {name: one and one.model_dump(mode="json") for name, one in self._others.items()}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        found = super().__get_pydantic_json_schema__(schema, handler)
        properties = handler.resolve_ref_schema(found)["properties"]
        plugins = {name: kind for name, kind in TRACKERS.usable().items() if name not in cls.model_fields}
        for name, kind in plugins.items():
            shape = handler(kind.__pydantic_core_schema__)
            kind.with_texts(handler.resolve_ref_schema(shape))
            properties[name] = {"anyOf": [{"type": "boolean"}, shape, {"type": "null"}], "default": None}
        return found


def _plugged(name: str, value: Any) -> TrackerSettings | None:
    """The settings of another package's tracker; None when it is switched off."""
    given = _switched(value)
    if given is None:
        return None
    try:
        return TRACKERS.get(name, f"tracking.{name}").model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, (name, *first["loc"])))
        raise ValueError(f"{field}: {first['msg'][0].lower()}{first['msg'][1:]}, found {first['input']!r}") from error
