"""A field of a recipe that takes a kind by name: its settings are looked up in a registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from ecotone.populations.errors import InputError
from ecotone.registry import Registry
from ecotone.settings import Part


class Chosen:
    """An annotation: ``Annotated[Base, Chosen(SEARCHES, "algorithm")]``.

    Args:
        registry: The kinds.
        tag: The field that names the kind.
    """

    def __init__(self, registry: Registry[Any], tag: str) -> None:
        self.registry = registry
        self.tag = tag

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validated,
            serialization=core_schema.plain_serializer_function_ser_schema(_dumped, info_arg=True),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        kinds = list(dict.fromkeys(self.registry.usable().values()))
        shapes = [(kind, handler(kind.__pydantic_core_schema__)) for kind in kinds]
        return {"oneOf": [kind.with_texts(handler.resolve_ref_schema(shape)) for kind, shape in shapes]}

    def _validated(self, value: Any) -> Any:
        if isinstance(value, Part):
            return value
        if not isinstance(value, Mapping):
            raise PydanticCustomError("mapping", "Input should be a mapping")
        try:
            kind = self.registry.get(value.get(self.tag), self.tag)
        except InputError as error:
            raise PydanticCustomError("kind", "{text}", {"text": str(error)}) from error
        return kind.model_validate(value)


def _dumped(value: Part, info: Any) -> dict[str, Any]:
    return value.model_dump(mode=info.mode, exclude_none=info.exclude_none)
