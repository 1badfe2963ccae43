"""Settings, declared once: the frozen part of a recipe that lies beside what it is for.

The settings of an algorithm, an objective, a backend or a tracker are a ``Part``: fields with their types, bounds and
defaults, and for each a text, which is its entry in the ``Attributes`` section of the class's docstring. A recipe is
checked by it, the algorithm is made of it, and the JSON Schema, ``ecotone recipe --explain`` and the page of all fields
are written from it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

_SECTION = re.compile(r"^(Attributes|Args):\s*$")
_ENTRY = re.compile(r"^ {4}(\w+): ?(.*)$")

Parts = TypeVar("Parts", bound=BaseModel)


class Part(BaseModel):
    """A part of a recipe: frozen, and closed to unknown keys."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    @classmethod
    def texts(cls) -> dict[str, str]:
        """The text of each field, in words; empty where the docstrings have none."""
        return {
            name: told or field.description or ""
            for (name, field), told in zip(
                cls.model_fields.items(), (_told(cls).get(name) for name in cls.model_fields), strict=True
            )
        }

    @classmethod
    def summary(cls) -> str:
        """The first paragraph of the docstring, in one line."""
        text = inspect.cleandoc(cls.__doc__ or "")
        return " ".join(text.split("\n\n", 1)[0].split())

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The JSON Schema, each field with its text."""
        found = handler.resolve_ref_schema(handler(schema))
        found["description"] = cls.summary()
        for name, text in cls.texts().items():
            if text and name in found.get("properties", {}):
                found["properties"][name]["description"] = text
        return found


@cache
def _told(cls: type) -> Mapping[str, str]:
    """What the docstrings of a class and of those that it is made of say of its fields."""
    told: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        told |= described(one.__dict__.get("__doc__") or "")
    return told


def described(docstring: str) -> dict[str, str]:
    """The entries of a docstring's ``Attributes`` or ``Args`` section, each in one line, by name."""
    found: dict[str, str] = {}
    inside, name = False, ""
    for line in inspect.cleandoc(docstring).splitlines():
        if _SECTION.match(line):
            inside = True
        elif inside and line and not line.startswith(" "):
            inside = False
        elif inside and (entry := _ENTRY.match(line)):
            name = entry[1]
            found[name] = entry[2].strip()
        elif inside and name and line.strip():
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _with_text_keys(arguments: dict[str, Any]) -> dict[str, Any]:
    """Refuse keys that JSON, and so the journal, would turn into text."""
    left: list[Any] = [arguments]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            wrong = [key for key in value if not isinstance(key, str)]
            if wrong:
                raise ValueError(f"expected text as keys of mappings, found {wrong[0]!r}; put it in quotes")
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
    return arguments


Arguments: TypeAlias = Annotated[dict[str, Any], AfterValidator(_with_text_keys)]


class Call(Part):
    """A Python function and its keyword arguments.

    Attributes:
        call: ``package.module:function``, or ``./file.py:function`` for a file, whose path is relative to the
            recipe's folder.
        arguments: Keyword arguments, plain values. One that begins with ``prepared:`` is a path, relative to what the
            preparation step wrote.
    """

    call: str
    arguments: Arguments = Field(default_factory=dict)


PREPARED = "prepared:"
"""With this a path begins that is relative to what the preparation step wrote."""

Located: TypeAlias = Callable[[str], str]
"""Makes a path whole that begins with ``PREPARED``; any other text stays as it is."""


def expanded(value: Any, located: Located) -> Any:
    """``value`` with the texts in it, at any depth, put through ``located``."""
    if isinstance(value, Mapping):
        return {key: expanded(one, located) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [expanded(one, located) for one in value]
    return located(value) if isinstance(value, str) else value


def split_call(text: str) -> tuple[str, str, bool]:
    """The module or file that a call names, the function in it, and whether the former is a file (``.py``)."""
    place, _, function = text.rpartition(":")
    if place.endswith(".py"):
        return place, function, True
    module, _, function = text.partition(":")
    return module, function, False


def with_files(part: Parts, located: Located) -> Parts:
    """A part with the files that its calls name, at any depth, put through ``located``."""
    found = {name: _with_files(name, getattr(part, name), located) for name in type(part).model_fields}
    changed = {name: value for name, value in found.items() if value is not getattr(part, name)}
    return part.model_copy(update=changed) if changed else part


def _with_files(field: str, value: Any, located: Located) -> Any:
    if isinstance(value, BaseModel):
        return with_files(value, located)
    if isinstance(value, tuple):
        parts = tuple(_with_files(field, one, located) for one in value)
        return parts if any(new is not old for new, old in zip(parts, value, strict=True)) else value
    if field != "call" or not isinstance(value, str):
        return value
    place, function, is_file = split_call(value)
    return f"{located(place)}:{function}" if is_file else value
