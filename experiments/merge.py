"""The recipe's ``merge`` part: an operator, and whatever settings that operator declares."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, GetJsonSchemaHandler, TypeAdapter, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from ecotone.populations.errors import EcotoneError, InputError, nearest
from ecotone.settings import Located, MoreField, Part, refused

if TYPE_CHECKING:
    from ecotone.merging.operators.declared import Setting

# Operators import torch, and so are imported when a recipe is read, not with this module.


class Range(Part):
    """Bounds between which a search chooses a setting of the merge operator, for every merge anew.

    Attributes:
        low: The smallest value.
        high: The largest value.
        scale: The scale on which values are searched: ``linear``, ``log``, or ``integer`` for whole numbers alone.
    """

    low: float
    high: float
    scale: Literal["linear", "log", "integer"] = "linear"

    @model_validator(mode="after")
    def _is_open(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low: expected less than high ({self.high}), found {self.low}")
        if not math.isfinite(self.high - self.low):
            raise ValueError(f"low: expected a finite distance to high ({self.high}), found {self.low}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"low: expected more than 0 with scale log, found {self.low}")
        return self


class Choices(Part):
    """Values of a setting that an operator prepares its vectors with. Each merge has one of them.

    Vectors are prepared once for every combination of the values that settings may have. Each combination takes the
    disk space of a model for every coefficient.

    Attributes:
        choices: The values.
        most: The most combinations that all choices of the operator may make.
    """

    choices: tuple[Any, ...] = Field(min_length=2)
    most: int = Field(default=8, ge=2, le=64)


_CHOICES: TypeAdapter[dict[str, Choices]] = TypeAdapter(dict[str, Choices])
_RANGES: TypeAdapter[dict[str, Range]] = TypeAdapter(dict[str, Range])


class Merge(Part):
    """How sources are made of the models.

    Beside its own fields it takes the settings of the operator, each by its name (``density: 0.2``). A setting that the
    operator lets a search choose may be given bounds (``density: {low: 0.1, high: 0.9}``): then it is searched beside
    the coefficients. A setting that an operator prepares its vectors with may be given choices (``ridge: {choices:
    [1e-6, 1e-4, 1e-2]}``): then vectors are prepared for each of them, and the search chooses.

    Attributes:
        operator: The merge operator. ``linear`` mixes the experts themselves. ``task_arithmetic`` adds task vectors to
            the base. ``ties``, ``dare`` and ``dare_ties`` add thinned task vectors, ``ties_vectors`` those of
            AdaMerging++. ``slerp`` goes from one of two models to the other. ``stack`` puts the vectors of several
            operators side by side, and ``one_of`` takes those of one of several. ``ecotone plugins`` lists all
            operators.
        dtype: The type that merged weights are rounded to, scored in and exported in. None means the type in which the
            experts are stored (float32 when there is an architecture and the experts mix types).
        freeze: Patterns of names of tensors that are not merged: merges have those of ``models.base``, or of the first
            expert. ``*`` stands for any text: ``*.mlp.gate.weight``.
        only: Patterns of names of the tensors that are merged; all others are frozen. Empty merges all.
        rank: The rank that the update of each module is cut to, by its singular values, before a merge of LoRA adapters
            is scored: what is scored is then what is served as an adapter of that rank. None scores merges as they
            are.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")
    operator: str = "linear"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    freeze: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    rank: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _of_the_operator(cls, value: Any) -> Any:
        """Check the keys beside our fields against the operator's declarations. None stands for the default."""
        if not isinstance(value, Mapping):
            return value
        for key in value:
            if not isinstance(key, str):
                raise refused(str(key), value[key], f"keys should be strings, found {key!r}")
        own = {key: one for key, one in value.items() if key in cls.model_fields}
        name = own.get("operator", cls.model_fields["operator"].default)
        given = {key: one for key, one in value.items() if key not in own and one is not None}
        found = _checked(name, given)
        _check_choices(found)
        return {**own, **found}

    @property
    def settings(self) -> dict[str, Any]:
        """The operator's settings that are given and the same for all merges."""
        return {name: value for name, value in self._given.items() if not isinstance(value, Range | Choices)}

    @property
    def choices(self) -> dict[str, Choices]:
        """The settings of which each merge has one of several values."""
        return {name: value for name, value in self._given.items() if isinstance(value, Choices)}

    @property
    def ranges(self) -> dict[str, Range]:
        """The settings that are searched, with their bounds. Of choices it is the number of a combination."""
        found = {name: value for name, value in self._given.items() if isinstance(value, Range)}
        count = len(_combinations(self.choices))
        return {**found, **({"chosen": Range(low=0, high=count - 1, scale="integer")} if count else {})}

    @property
    def combined(self) -> tuple[str, dict[str, Any]]:
        """The operator that merges, and its settings: with choices ``one_of`` for all their combinations."""
        return _combined(self.operator, self.settings, self.choices)

    @property
    def reads_data(self) -> bool:
        """Whether the operator prepares its vectors from the data of calibration tasks."""
        from ecotone.merging import operators
        from ecotone.merging.operators.stack import preparing
        from ecotone.merging.operators.whole import FromData

        return any(isinstance(one, FromData) for one in preparing(operators.get(*self.combined)).values())

    def with_paths(self, resolve: Located) -> Merge:
        """The same with the files that the operator's settings name put through ``resolve``."""
        from ecotone.merging import operators

        settings = self.settings
        changed = operators.with_paths(self.operator, settings, resolve)
        return self if changed == settings else self.model_copy(update=changed)

    @property
    def _given(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})

    @classmethod
    def part_at(cls, _key: str) -> type[Part]:
        """Bounds."""
        return Range

    @classmethod
    def more_fields(cls) -> Iterator[MoreField]:
        """The settings of every operator that can be used."""
        from ecotone.merging import operators
        from ecotone.merging.operators.whole import WholeMatrices

        for name in operators.OPERATORS.usable():
            for setting in operators.settings_of(name).values():
                shape = setting.adapter.json_schema()
                if setting.bounds is not None:
                    shape = {"anyOf": [shape, {"type": "object", "title": Range.__name__}]}
                if issubclass(operators.OPERATORS.get(name, "operator"), WholeMatrices):
                    shape = {"anyOf": [*shape.get("anyOf", [shape]), {"type": "object", "title": Choices.__name__}]}
                yield MoreField(setting.name, (name,), shape, setting.default, setting.text)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The JSON Schema with the settings of every operator."""
        whole = super().__get_pydantic_json_schema__(schema, handler)
        shape = handler.resolve_ref_schema(whole)
        more: dict[str, dict[str, Any]] = {}
        takes: dict[str, list[str]] = {}
        for one in cls.more_fields():
            known = more.setdefault(one.name, {"anyOf": [], "description": ""})
            known["description"] += f"{', '.join(one.kinds)}: {one.text} "
            takes.setdefault(one.name, []).extend(one.kinds)
            known["anyOf"] += [] if one.shape in known["anyOf"] else [one.shape]
        shape["properties"] |= more
        shape["allOf"] = [_only_with(name, kinds) for name, kinds in takes.items()]
        shape["additionalProperties"] = False
        return whole


def _only_with(setting: str, operators: Sequence[str]) -> dict[str, Any]:
    """JSON Schema that refuses a setting unless the operator is one of those that have it."""
    of_these = {"properties": {"operator": {"enum": list(operators)}}}
    default = Merge.model_fields["operator"].default
    return {
        "if": of_these if default in operators else {**of_these, "required": ["operator"]},
        "else": {"properties": {setting: False}},
    }


def _checked(operator: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The operator's settings, each checked by its declaration, bounds as ``Range``.

    Raises:
        ValidationError: There is no such operator or setting, or a value does not fit; it names the place.
    """
    from ecotone.merging import operators

    try:
        known = operators.settings_of(operator)
    except InputError as error:
        raise refused(
            "operator", operator, f"{error.message.removeprefix('merge.operator: ')} {error.remedy}"
        ) from error
    for key in given:
        if key not in known:
            raise refused(key, given[key], _unknown(operator, key, known))
    return {key: _value(operator, key, value) for key, value in given.items()}


def _value(operator: str, key: str, value: Any) -> Any:
    from ecotone.merging import operators

    if isinstance(value, Range | Choices):
        return value
    if isinstance(value, Mapping) and "choices" in value:
        return _of_choices(operator, key, value)
    if isinstance(value, Mapping) and operators.settings_of(operator)[key].bounds is not None:
        return _RANGES.validate_python({key: value})[key]
    try:
        return operators.checked(operator, {key: value})[key]
    except EcotoneError as error:
        raise refused(key, value, f"{error.message.removeprefix(f'merge.{key}: ')} {error.remedy}".strip()) from error


def _combinations(choices: Mapping[str, Choices]) -> list[dict[str, Any]]:
    """The settings of each combination of choices; empty without any."""
    values = [one.choices for one in choices.values()]
    return [dict(zip(choices, each, strict=True)) for each in itertools.product(*values)] if values else []


def _combined(operator: str, settings: dict[str, Any], choices: Mapping[str, Choices]) -> tuple[str, dict[str, Any]]:
    """The operator for all combinations of choices, and its settings; the operator itself without any."""
    from ecotone.merging import operators

    made = [{"operator": operator, **settings, **each} for each in _combinations(choices)]
    return ("one_of", operators.checked("one_of", {"methods": made})) if made else (operator, settings)


def _check_choices(given: Mapping[str, Any]) -> None:
    """Refuse choices that are too many, or stand beside bounds.

    Raises:
        ValidationError: They are; it names the place.
    """
    choices = {key: one for key, one in given.items() if isinstance(one, Choices)}
    count = len(_combinations(choices))
    for key, one in given.items():
        if choices and isinstance(one, Range):
            raise refused(key, one, f"expected one value beside choices of {next(iter(choices))}, found bounds")
    for key, one in choices.items():
        if count > one.most:
            said = f"expected at most {one.most} combinations of choices, each of which is prepared, found {count}"
            raise refused(key, one, f"{said}. Leave some out, or raise most.")
        if len(set(map(repr, one.choices))) < len(one.choices):
            raise refused(key, one, f"expected different choices, found {', '.join(map(str, one.choices))}")


def _of_choices(operator: str, key: str, value: Mapping[str, Any]) -> Choices:
    from ecotone.merging import operators
    from ecotone.merging.operators.whole import WholeMatrices

    if not issubclass(operators.OPERATORS.get(operator, "operator"), WholeMatrices):
        bounds = operators.settings_of(operator)[key].bounds
        instead = "give bounds (low, high)" if bounds is not None else "give one value"
        raise refused(key, value, f"choices are for operators that prepare their vectors, found {operator}; {instead}")
    for name in value:
        if name not in Choices.model_fields:
            raise refused(
                key, value, f"{name}: unknown key beside choices. {nearest(str(name), [*Choices.model_fields])}"
            )
    found = _CHOICES.validate_python({key: value})[key]
    return found.model_copy(update={"choices": tuple(_value(operator, key, one) for one in found.choices)})


def _unknown(operator: str, key: str, known: Mapping[str, Setting]) -> str:
    """The message about a key that is neither a field of ``merge`` nor a setting of the operator."""
    from ecotone.merging import operators

    others = {name for kind in operators.OPERATORS.usable() for name in operators.settings_of(kind)}
    if key in others:
        takes = f"It takes {', '.join(known)}." if known else "It takes none."
        return f"the operator {operator!r} has no such setting. {takes}"
    return f"unknown key. {nearest(key, [*Merge.model_fields, *known])}"
