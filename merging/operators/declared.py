"""An operator's settings: the fields of its frozen dataclass, with the types that check them and the texts of docs.

A setting is declared once. Its type bounds it (``Annotated[float, Field(gt=0, le=1)]``), the dataclass has its default,
the ``Args`` section of the docstring its text, and ``searchable`` the widest bounds of a search over it. Recipes,
genomes, the JSON Schema and messages read it there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache, cached_property
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from ecotone.merging.operators.base import Operator
from ecotone.populations.errors import InputError, first_line, nearest, told
from ecotone.registry import is_ours
from ecotone.settings import described

SAYS = tuple(name for name in vars(Operator) if not name.startswith("_"))
"""The attributes and methods that every operator must have."""

OF_MERGE = ("operator", "dtype", "freeze", "only", "rank")
"""The keys of a recipe's ``merge`` that lie beside the settings of the operator."""

_KINDS = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


@dataclass(frozen=True)
class InWords:
    """A note in the annotation of a setting: its allowed values in words, where its type alone does not say them.

    Args:
        text: The words.
    """

    text: str


@dataclass(frozen=True)
class Setting:
    """A setting of an operator.

    Args:
        name: Its name in recipes.
        type: Its annotation, bounds included; pydantic checks values by it.
        default: Its value where none is given.
        text: Its meaning, in words.
        bounds: The widest bounds of a search over it; None where a search may not choose it.
    """

    name: str
    type: Any
    default: Any
    text: str
    bounds: tuple[float, float] | None = None

    @cached_property
    def adapter(self) -> TypeAdapter[Any]:
        """The pydantic adapter that checks values and gives the JSON Schema."""
        try:
            return TypeAdapter(self.type, config=ConfigDict(allow_inf_nan=False))
        except PydanticUserError:  # a dataclass or a model, which has its own configuration
            return TypeAdapter(self.type)

    @property
    def expected(self) -> str:
        """The allowed values, in words: ``a number above 0 and at most 1``."""
        return _in_words(self.type)

    def checked(self, value: Any, strict: bool = True) -> Any:
        """A value of the setting.

        Args:
            value: The given value.
            strict: Refuse values of another type; otherwise those of YAML are taken that mean one, a list for a tuple.

        Raises:
            InputError: It is of another type, or out of bounds.
        """
        try:
            return self.adapter.validate_python(value, strict=strict)
        except ValidationError as error:
            said = error.errors(include_url=False)[0]["msg"]
            wanted = f"expected {self.expected}" if self.expected else said[:1].lower() + said[1:]
            raise InputError(f"{self.name}: {wanted}, found {value!r}.", self.text) from error


@cache
def settings_of(kind: type[Operator]) -> Mapping[str, Setting]:
    """The settings of an operator's class, by name."""
    types, texts, bounds = get_type_hints(kind, include_extras=True), _texts(kind), _searchable(kind)
    return {
        field.name: Setting(
            field.name, types[field.name], _default(field), texts.get(field.name, ""), bounds.get(field.name)
        )
        for field in _fields(kind)
    }


def checked(kind: type[Operator], given: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
    """The settings that are given, each checked by its type.

    Raises:
        InputError: One is unknown (the nearest name is given), of another type, or out of bounds.
    """
    known = settings_of(kind)
    for name in given:
        if name not in known:
            remedy = nearest(name, tuple(known)) if known else "It takes none."
            raise InputError(f"{name}: the operator {kind.name!r} has no such setting.", remedy)
    return {name: known[name].checked(value, strict) for name, value in given.items()}


def check_declared(name: str, kind: Any) -> None:
    """Raise ``InputError`` unless an operator has all declarations.

    Args:
        name: Its name in recipes.
        kind: Its class.
    """
    wrong = next(_faults(name, kind), None)
    if wrong is not None:
        raise InputError(f"operator {name!r}: expected {wrong}.", "ecotone.merging.operators.base says what each is.")


def _faults(name: str, kind: Any) -> Iterator[str]:
    """The faults of an operator. Each text names the expected and the found."""
    if not _is_frozen(kind):
        found = f"an instance of {type(kind).__name__}" if is_dataclass(type(kind)) else repr(kind)
        yield f"a frozen dataclass, found {found}"
        return
    lacking = [each for each in SAYS if not hasattr(kind, each)]
    if lacking:
        yield f"a class that says {', '.join(SAYS)}, found no {', '.join(lacking)}"
        return
    if kind.name != name:
        yield f"one of this name, found {kind.name!r}"
    wrong = _wrong_bounds(kind.searchable)
    if wrong:
        yield wrong
        return
    try:
        settings_of(kind)
    except Exception as error:
        yield f"annotations and defaults that can be read, found {told(error)}"
        return
    texts, known = _texts(kind), [field.name for field in _fields(kind)]
    taken = [field for field in known if field in OF_MERGE]
    if taken:
        yield f"settings with other names than the keys of merge ({', '.join(OF_MERGE)}), found {', '.join(taken)}"
    for field in _fields(kind):
        if _default(field) is MISSING:
            yield f"a default of its setting {field.name!r}, found none"
        elif not texts.get(field.name):
            yield f"a text of its setting {field.name!r} in the Args section of its docstring, found none"
        else:
            yield from _faults_of(settings_of(kind)[field.name], shape=not is_ours(kind))
    unknown = [each for each in _searchable(kind) if each not in known]
    if unknown:
        yield f"searchable settings among its fields, found {', '.join(unknown)}"


def _wrong_bounds(searchable: Any) -> str:
    """The fault of the declaration ``searchable``; empty without one."""
    if not isinstance(searchable, Mapping):
        return f"searchable: a mapping of settings to (low, high), found {searchable!r}"
    for name, bounds in searchable.items():
        pair = isinstance(bounds, tuple | list) and len(bounds) == 2
        if not (pair and all(isinstance(bound, int | float) for bound in bounds) and bounds[0] < bounds[1]):
            return f"searchable: two numbers (low, high) with low below high for {name!r}, found {bounds!r}"
    return ""


def _faults_of(setting: Setting, *, shape: bool) -> Iterator[str]:
    """The faults of a setting; ``shape`` also makes its JSON Schema."""
    try:
        setting.checked(setting.default)
        if shape:
            setting.adapter.json_schema()
    except InputError as error:
        yield f"a default that fits its type, found {error.message}"
    except PydanticUserError as error:
        wanted = f"a type of its setting {setting.name!r} that pydantic can check and that has a JSON Schema"
        yield f"{wanted}, found {setting.type} ({first_line(error)})"


def _is_frozen(kind: Any) -> bool:
    parameters = getattr(kind, "__dataclass_params__", None)
    return isinstance(kind, type) and is_dataclass(kind) and parameters is not None and bool(parameters.frozen)


def _fields(kind: Any) -> tuple[Field[Any], ...]:
    return fields(kind)


def _searchable(kind: Any) -> Mapping[str, tuple[float, float]]:
    bounds: Mapping[str, tuple[float, float]] = kind.searchable
    return bounds


def _default(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def _texts(kind: type) -> dict[str, str]:
    """The texts of a class's fields, from the docstrings of the class and its bases."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        texts |= described(base.__dict__.get("__doc__") or "")
    return texts


# -- types in words ------------------------------------------------------------------------------------------


def _in_words(annotation: Any) -> str:
    """The allowed values of a type, in words; empty for types that need more than a few words."""
    if get_origin(annotation) is Literal:
        *first, last = map(str, get_args(annotation))
        return f"{', '.join(first)} or {last}" if first else last
    if get_origin(annotation) in (Union, UnionType) and NoneType in get_args(annotation):
        others = [_in_words(one) for one in get_args(annotation) if one is not NoneType]
        return f"{' or '.join(others)} or null" if all(others) else ""
    if get_origin(annotation) is Mapping:
        kind = _in_words(get_args(annotation)[1])
        return f"a mapping of names to {kind}" if kind else ""
    if get_origin(annotation) is not Annotated:
        return _KINDS.get(annotation, "")
    kind, *notes = get_args(annotation)
    for note in notes:
        if isinstance(note, InWords):
            return note.text
    given = {key: value for note in notes for key, value in _bounds_of(note)}
    if {"ge", "le"} <= given.keys():
        bounds = [f"from {given['ge']} to {given['le']}"]
    else:
        bounds = [f"{word} {given[key]}" for key, word in _BOUNDS.items() if key in given]
    return f"{_KINDS[kind]} {' and '.join(bounds)}".strip() if kind in _KINDS else ""


def _bounds_of(note: Any) -> Iterator[tuple[str, Any]]:
    for bound in getattr(note, "metadata", [note]):
        yield from ((key, getattr(bound, key)) for key in _BOUNDS if hasattr(bound, key))
