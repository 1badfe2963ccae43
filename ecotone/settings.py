"""Settings, declared once: the frozen part of a recipe that lies beside what it is for.

The settings of an algorithm, an objective, a backend or a tracker are a ``Part``: fields with their types, bounds and
defaults, and for each a text, which is its entry in the ``Attributes`` section of the class's docstring. A recipe is
checked by it, the algorithm is made of it, and the JSON Schema, ``ecotone recipe --explain`` and the page of all fields
are written from it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema
from typing_extensions import Self

from ecotone.populations.errors import InputError, shown, told
from ecotone.registry import TELL, Registry, blamed, is_ours, whose

_SECTION = re.compile(r"^(Attributes|Args):\s*$")
_ENTRY = re.compile(r"^ {4}(\w+): ?(.*)$")

Parts = TypeVar("Parts", bound=BaseModel)


class Part(BaseModel):
    """A part of a recipe: frozen, and closed to unknown keys."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where numbers are expected: Python counts them as 1 and 0, and YAML reads ``on`` so."""
        if _holds_truth(value) and _is_of_numbers(cls, info.field_name or ""):
            raise PydanticCustomError(NO_NUMBER, "expected a number")
        return value

    @classmethod
    def part_at(cls, _key: str) -> type[Part] | None:
        """The part that the value of a key beside the fields may be; None for a part that takes no such keys."""
        return None

    @classmethod
    def more_fields(cls) -> Iterator[MoreField]:
        """The keys that a part takes beside its fields, as they are declared elsewhere; empty for most parts."""
        yield from ()

    @classmethod
    def texts(cls) -> dict[str, str]:
        """The text of each field, in words; empty where the docstrings have none."""
        return {
            name: text or field.description or ""
            for (name, field), text in zip(
                cls.model_fields.items(), (_told(cls).get(name) for name in cls.model_fields), strict=True
            )
        }

    @classmethod
    def summary(cls) -> str:
        """The first paragraph of the docstring, in one line."""
        text = inspect.cleandoc(cls.__doc__ or "")
        return " ".join(text.split("\n\n", 1)[0].split())

    def located(self, located: Located) -> Self:
        """The same with the texts in it, at any depth, put through ``located``."""
        return self.model_validate({name: expanded(value, located) for name, value in self})

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The JSON Schema, each field with its text."""
        whole = handler(schema)
        cls.with_texts(handler.resolve_ref_schema(whole))
        return whole

    @classmethod
    def with_texts(cls, shape: JsonSchemaValue) -> JsonSchemaValue:
        """The JSON Schema of this part with its summary and the texts of its fields put in."""
        shape["description"] = cls.summary()
        for name, text in cls.texts().items():
            if text and name in shape.get("properties", {}):
                shape["properties"][name]["description"] = text
        return shape


NO_NUMBER = "no_number"
"""The type of the error of true or false where a number is expected."""


def _holds_truth(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_holds_truth, value))
    if isinstance(value, Mapping):
        return any(map(_holds_truth, value.values()))
    return isinstance(value, bool)


@cache
def _is_of_numbers(cls: type[Part], name: str) -> bool:
    """Whether a field holds numbers, or lists of them, and nothing that true or false may be."""
    held = set(leaves(cls.model_fields[name].annotation))
    return bool(held & {int, float}) and held <= {int, float, str, type(None), type(...)}


def leaves(annotation: Any) -> Iterator[Any]:
    """The types in an annotation that hold no others; of literals the values' types."""
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        yield from map(type, inner)
    elif get_origin(annotation) is Annotated:
        yield from leaves(inner[0])
    elif inner:
        for one in inner:
            yield from leaves(one)
    else:
        yield type(...) if annotation is ... else annotation


Answers: TypeAlias = Mapping[str, tuple[Callable[[Any], bool], str]]
"""Methods by name, each with what its answer must fulfil, and with the same in words."""

ANYTHING: tuple[Callable[[Any], bool], str] = (lambda answer: True, "anything")
TEXT: tuple[Callable[[Any], bool], str] = (lambda answer: isinstance(answer, str), "text")
TRUTH: tuple[Callable[[Any], bool], str] = (lambda answer: isinstance(answer, bool), "True or False")


class Kind(Part):
    """Base of the kinds that other packages may add. A mistake in a method of theirs is told with the package's name.

    Ecotone's own methods are called as they are. A method of another class raises ``InputError`` where it raises
    something else, if the class lies in a package with kinds, and where its answer is none that Ecotone can use.
    """

    _answers: ClassVar[Answers] = {}
    _passes: ClassVar[Mapping[str, type[Exception]]] = {}
    """Methods by name, each with an exception that it may raise beside ``EcotoneError``."""

    @property
    def _subject(self) -> str:
        """The recipe's field and the kind, for messages: ``search.algorithm: the search 'mine'``."""
        raise NotImplementedError

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if not is_ours(cls):
            for name in cls._answers.keys() & vars(cls).keys():
                method = getattr(cls, name)
                if inspect.isfunction(method):
                    setattr(cls, name, _answering(cls, name, method))


def _answering(kind: type[Kind], name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, refused in words where it raises or gives an answer that does not fit."""
    fits, expected = kind._answers[name]
    passes = (kind._passes[name],) if name in kind._passes else ()

    @wraps(method)
    def answering(self: Kind, *args: Any, **kwargs: Any) -> Any:
        with blamed(self._subject, kind, name, *passes):
            answer = method(self, *args, **kwargs)
            if inspect.isgenerator(answer):
                answer = iter([*answer])
        if not fits(answer):
            found = repr(answer)[:100]
            raise InputError(f"{whose(self._subject, kind)}: {name}(): expected {expected}, found {found}.", TELL)
        return answer

    return answering


@dataclass(frozen=True)
class MoreField:
    """A key that a part takes beside its fields.

    Args:
        name: The key.
        kinds: Names of the kinds that it belongs to.
        shape: JSON Schema of its value.
        default: Its value where none is given.
        text: Its meaning, in words.
        part: The part that its value may be; None where it is a plain value.
    """

    name: str
    kinds: tuple[str, ...]
    shape: Mapping[str, Any]
    default: Any
    text: str
    part: type[Part] | None = None


@cache
def _told(cls: type) -> Mapping[str, str]:
    """The texts of a class's fields, from the docstrings of the class and its bases."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        texts |= described(base.__dict__.get("__doc__") or "")
    return texts


def described(docstring: str) -> dict[str, str]:
    """The entries of a docstring's ``Attributes`` or ``Args`` section, each in one line, by name."""
    texts: dict[str, str] = {}
    inside, name = False, ""
    for line in inspect.cleandoc(docstring).splitlines():
        if _SECTION.match(line):
            inside = True
        elif inside and line and not line.startswith(" "):
            inside = False
        elif inside and (entry := _ENTRY.match(line)):
            name = entry[1]
            texts[name] = entry[2].strip()
        elif inside and name and line.strip():
            texts[name] = f"{texts[name]} {line.strip()}".strip()
    return texts


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


def _printable(name: str) -> str:
    if not name or shown(name, LONGEST_NAME) != name:
        raise ValueError(f"expected 1 to {LONGEST_NAME} characters that can be printed, found {name!r}")
    return name


LONGEST_NAME = 200
"""The most characters of a name that a recipe gives."""

Name: TypeAlias = Annotated[str, AfterValidator(_printable)]
"""A name that stands in tables, pages and trackers."""


class Call(Part):
    """A Python function and its keyword arguments.

    Attributes:
        call: The function: ``package.module:function``, or ``./file.py:function`` with a path relative to the recipe's
            folder.
        arguments: Keyword arguments of the function, plain values. A text that begins with ``prepared:`` is a path,
            relative to the folder that the preparation step wrote.
    """

    call: str
    arguments: Arguments = Field(default_factory=dict)


PREPARED = "prepared:"
"""The beginning of a path that is relative to the folder that the preparation step wrote."""

Located: TypeAlias = Callable[[str], str]
"""Makes a path whole that begins with ``PREPARED``; any other text stays as it is."""


def expanded(value: Any, located: Located) -> Any:
    """``value`` with the texts in it, at any depth, put through ``located``."""
    if isinstance(value, Part):
        return value.located(located)
    if isinstance(value, Mapping):
        return {key: expanded(one, located) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [expanded(one, located) for one in value]
    return located(value) if isinstance(value, str) else value


# -- parts chosen by name from a registry ------------------------------------------------------------------------

UNKNOWN_KIND = "unknown_kind"
"""The type of the error of a tag that names no kind that can be used. Its message is whole: it needs no "found"."""


@dataclass(frozen=True)
class Chosen:
    """Makes a field one of the kinds of a registry, which a key of the mapping names::

        search: Annotated[SearchSettings, Chosen(SEARCHES, "algorithm")]

    The kind is looked up when a value is validated, so kinds of other packages are taken like ours, and none is
    imported that is not named. An error lies at the same place as in a union of pydantic's: below the name of the kind.
    The JSON Schema is ``oneOf`` all kinds that can be used; only the default kind may go without the tag.

    Args:
        registry: The kinds, each a ``Part``.
        tag: The key that names the kind, which is a field of every kind.
        default: The kind of a mapping without that key; None refuses it.
    """

    registry: Registry[Any]
    tag: str
    default: str | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.validated)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        kinds = {name: kind.__pydantic_core_schema__ for name, kind in self.registry.usable().items()}
        union = handler(core_schema.tagged_union_schema(kinds, self.tag))
        for one in union.get("oneOf", [union]):
            kind = handler.resolve_ref_schema(one)
            names = kind["properties"][self.tag]
            if self.default is None or self.default not in names.get("enum", [names.get("const")]):
                kind["required"] = sorted({*kind.get("required", ()), self.tag})
        return union

    def validated(self, value: Any) -> Part:
        """The settings that a mapping, or an instance, is of.

        Raises:
            ValidationError: The kind cannot be used, or the value does not fit it.
        """
        if isinstance(value, Mapping):
            value = dict(value) if self.default is None else {self.tag: self.default, **value}
            name = value.get(self.tag)
        elif isinstance(value, Part):
            name = getattr(value, self.tag, None)
        else:
            raise PydanticCustomError("no_settings", "Expected a mapping of settings")
        kind = self._kind(name)
        with blamed(f"{self.tag}: the {self.registry.sort} {name!r}", kind, "model_validate", ValidationError):
            # Of a mapping the locations of errors begin with the key, as they do in a tagged union.
            return by_name(kind).validate_python({name: value})[name]  # type: ignore[no-any-return]

    def _kind(self, name: Any) -> type[Part]:
        try:
            return self.registry.get(name, self.tag)  # type: ignore[no-any-return]
        except InputError as error:
            raise refused(self.tag, name, f"{error.message.removeprefix(f'{self.tag}: ')} {error.remedy}") from error


def refused(key: str, value: Any, said: str) -> ValidationError:
    """The error that the value of a key is refused with, in words that are whole."""
    problem = PydanticCustomError(UNKNOWN_KIND, "{said}", {"said": said.strip()})
    return ValidationError.from_exception_data("part", [InitErrorDetails(type=problem, loc=(key,), input=value)])


@cache
def by_name(kind: type[Part]) -> TypeAdapter[dict[str, Any]]:
    """Takes a mapping of a name to settings of ``kind``: locations of errors begin with the name."""
    return TypeAdapter(dict[str, kind])  # type: ignore[valid-type]


def chosen_of(field: FieldInfo) -> Chosen | None:
    """The registry that a field's value, or the value of an item or a member of it, is chosen from; else None."""
    return next(_markers([*field.metadata, field.annotation]), None)


def _markers(annotations: Any) -> Iterator[Chosen]:
    for annotation in annotations:
        if isinstance(annotation, Chosen):
            yield annotation
        else:
            yield from _markers([*getattr(annotation, "__metadata__", ()), *get_args(annotation)])


def check_kind(name: str, kind: Any, base: type[Part], tag: str) -> None:
    """Refuse a kind that does not declare all that its sort must.

    Args:
        name: Its name in recipes.
        kind: The kind.
        base: The base class of kinds of the sort. Its abstract methods, and its class variables without a value, are
            what each of them must have.
        tag: The field that names the kind.

    Raises:
        InputError: It is no class of ``base``, its tag is not the name, it lacks a method or a class variable, or its
            fields are refused by ``check_fields``.
    """
    if isinstance(kind, base):
        found = type(kind).__name__
        raise InputError(
            f"expected a class made of {base.__name__}, found an instance of {found}.", f"Register the class {found}."
        )
    if not (isinstance(kind, type) and issubclass(kind, base)):
        found = kind.__name__ if isinstance(kind, type) else type(kind).__name__
        raise InputError(f"expected a class made of {base.__name__}, found {found}.")
    field = kind.model_fields.get(tag)
    names = () if field is None else get_args(field.annotation)
    if name not in names:
        known = ", ".join(map(repr, names)) or "none"
        raise InputError(
            f"{tag}: expected a Literal that holds {name!r}, found {known}.",
            f"Declare {tag}: Literal[{name!r}] in {kind.__name__}.",
        )
    lacking = [*sorted(kind.__abstractmethods__), *(v for v in sorted(base.__class_vars__) if not hasattr(kind, v))]
    if lacking:
        raise InputError(f"{kind.__name__} lacks {', '.join(lacking)}.", f"{base.__name__} says what each is.")
    check_fields(kind)


def check_fields(kind: type[Part]) -> None:
    """Refuse a class whose fields lack what a recipe, its JSON Schema and its documentation need.

    The schema and the defaults of Ecotone's own classes are not made here: they are tested, and commands stay fast.

    Raises:
        InputError: A field has no text, a type without a JSON Schema, or a default that cannot be made.
    """
    silent = [field for field, text in kind.texts().items() if not text]
    if silent:
        raise InputError(
            f"{kind.__name__}: expected a text for each field, found none for {', '.join(silent)}.",
            "Write it into the Attributes section of the class's docstring.",
        )
    if not is_ours(kind):
        check_shape(kind)


def check_shape(kind: type[Part]) -> None:
    """Make the JSON Schema and the defaults of a class of settings.

    Raises:
        InputError: One of them cannot be made.
    """
    try:
        kind.model_rebuild()
        kind.model_json_schema()
    except Exception as error:
        raise InputError(
            f"{kind.__name__}: expected fields of types that have a JSON Schema, found none: {told(error)}.",
            "Import the types with the class, and use those of pydantic.",
        ) from error
    for name, field in kind.model_fields.items():
        _check_default(f"{kind.__name__}: {name}", field)


def _check_default(where: str, field: FieldInfo) -> None:
    try:
        field.get_default(call_default_factory=True)
    except Exception as error:
        raise InputError(
            f"{where}: its default cannot be made: {told(error)}.",
            "Mend its default_factory, which is called without arguments.",
        ) from error


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
