"""The part of a recipe that says where a run is mirrored to: by which trackers, and where each of them keeps it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import (
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from ecotone.experiments.tracking.mlflow import MlflowPlace, MlflowSettings
from ecotone.experiments.tracking.protocol import TrackerSettings
from ecotone.experiments.tracking.registry import TRACKERS
from ecotone.experiments.tracking.wandb import WandbSettings
from ecotone.experiments.words import explained
from ecotone.populations.errors import InputError, closest, nearest
from ecotone.populations.secrets import take_places
from ecotone.settings import MoreField, Part, by_name, refused


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


@dataclass(frozen=True)
class Gone:
    """A tracker that a run is mirrored to, and that cannot be used here.

    Args:
        given: Its settings, as the run's recipe has them.
        why: The reason: the field, and what is wrong with it, without a full stop.
    """

    given: Any
    why: str


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
    _gone: dict[str, Gone] = PrivateAttr(default_factory=dict)

    @property
    def trackers(self) -> dict[str, TrackerSettings]:
        """The settings of the trackers that are on, by name."""
        ours: dict[str, TrackerSettings | None] = {
            "mlflow": MlflowSettings(uri=self.uri, experiment=self.experiment) if self.mlflow else None,
            "wandb": self.wandb,
        }
        return {name: settings for name, settings in (ours | self._others).items() if settings is not None}

    def warnings(self) -> Iterator[str]:
        """A line for each tracker of a recorded recipe that cannot be used here. Its settings are kept."""
        for gone in self._gone.values():
            yield f"Warning: {gone.why}; the run is not mirrored there."

    def recorded(self, before: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
        """The settings as the journal keeps them. The mirror, which is a process of its own, reads them there.

        Args:
            before: The settings that the journal has now. Those of trackers that cannot be used here stay.
        """
        here = {
            name: take_places(settings.recorded().model_dump(mode="json")) for name, settings in self.trackers.items()
        }
        gone = {name: before.get(name, gone.given) for name, gone in self._gone.items()}
        return {**here, **take_places(gone)}

    @model_validator(mode="wrap")
    @classmethod
    def _with_others(
        cls, given: Any, handler: ModelWrapValidatorHandler[TrackingSettings], info: ValidationInfo
    ) -> TrackingSettings:
        """Take trackers of other packages out.

        The context of a recorded recipe holds, in ``recorded``, what it says of trackers. One that cannot be used here
        is then kept as it is: a tracker only mirrors the run.
        """
        if not isinstance(given, Mapping):
            return handler(given)
        recorded: Mapping[str, Any] = (info.context or {}).get("recorded") or {}
        own, others, gone = {}, {}, {}
        for name, value in given.items():
            if name in cls.model_fields or not isinstance(name, str):
                own[name] = value
                continue
            try:
                others[name] = None if name in recorded and not value else _plugged(name, value)
            except (InputError, ValidationError) as error:
                if not isinstance(value, Mapping) or recorded.get(name) != value:
                    raise
                gone[name] = Gone(value, _why(name, error))
        settings = handler(own)
        settings._others, settings._gone = others, gone
        return settings

    @model_serializer(mode="wrap")
    def _with_others_again(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As recipes are written."""
        fields: dict[str, Any] = handler(self)
        others = {name: one and one.model_dump(mode="json") for name, one in self._others.items()}
        return fields | others | {name: gone.given for name, gone in self._gone.items()}

    @classmethod
    def part_at(cls, key: str) -> type[Part]:
        """The settings of another package's tracker."""
        return cls._plugins().get(key, TrackerSettings)

    @classmethod
    def more_fields(cls) -> Iterator[MoreField]:
        """The trackers of other packages."""
        shape = {"anyOf": [{"type": "boolean"}, {"type": "object", "properties": {}}, {"type": "null"}]}
        for name, kind in cls._plugins().items():
            yield MoreField(name, (), shape, None, kind.summary(), kind)

    @classmethod
    def _plugins(cls) -> dict[str, type[TrackerSettings]]:
        """The trackers of other packages that can be used, by name."""
        return {name: kind for name, kind in TRACKERS.usable().items() if name not in cls.model_fields}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        found = super().__get_pydantic_json_schema__(schema, handler)
        properties = handler.resolve_ref_schema(found)["properties"]
        for name, kind in cls._plugins().items():
            shape = handler(kind.__pydantic_core_schema__)
            kind.with_texts(handler.resolve_ref_schema(shape))
            properties[name] = {"anyOf": [{"type": "boolean"}, shape, {"type": "null"}], "default": None}
        return found


def _plugged(name: str, value: Any) -> TrackerSettings | None:
    """The settings of another package's tracker; None when it is switched off.

    Raises:
        ValidationError: There is no such tracker, or the value does not fit it.
        InputError: The tracker cannot be used.
    """
    if name not in TRACKERS:
        known = list(dict.fromkeys([*TrackingSettings.model_fields, *TRACKERS]))
        package = "" if closest(name, known) else " If another package has this tracker, install that package."
        raise refused(name, value, f"unknown key. {nearest(name, known)}{package}")
    given = _switched(value)
    if given is None:
        return None
    return by_name(TRACKERS.get(name, f"tracking.{name}")).validate_python({name: given})[name]  # type: ignore[no-any-return]


def _why(name: str, error: InputError | ValidationError) -> str:
    """The reason why a recorded tracker cannot be used here."""
    if name not in TRACKERS:
        return f"tracking.{name}: no installed package has this tracker"
    if isinstance(error, InputError):
        return error.message.rstrip(".")
    return f"tracking.{explained(error, TrackingSettings).splitlines()[0]}".rstrip(".")
