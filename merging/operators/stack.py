"""Methods side by side: the vectors of several operators as columns of one merge.

Nearly all methods are linear in their coefficients, ``base + sum_k c_k v_k``, each with its own vectors. So is their
sum:

    theta = base + sum_m sum_k c_mk v_mk

for methods m and the columns k of each. A search over it goes from method to method, segment by segment, and prepares
nothing anew. Where only one method has coefficients other than zero, the merge is that method's, bit for bit.

Each method mixes what it mixes alone. One that prepares whole matrices has its own basis in the cache, and shares it
with runs that use it alone. One that changes task vectors piece by piece, as TIES does, changes them as they are read.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, TypeAlias

import numpy as np
from pydantic import ConfigDict, PlainSerializer, PlainValidator, WithJsonSchema, model_serializer
from torch import Tensor

from ecotone.merging import operators
from ecotone.merging.kernel.materialise import Transform, unchanged
from ecotone.merging.models.model import Model
from ecotone.merging.operators.base import Operator
from ecotone.merging.operators.declared import InWords, checked
from ecotone.merging.operators.task_vectors import Pieces
from ecotone.merging.operators.whole import WholeMatrices
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Floats
from ecotone.settings import Located, Part

EQUAL = "methods in equal parts"
"""The name of the merge that shares the methods' own merges out evenly."""


class Method(Part):
    """A method of a stack: an operator, and beside it the settings that it declares. Texts and records name it.

    Attributes:
        operator: The name of the operator.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")
    operator: str

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that are given."""
        return dict(self.__pydantic_extra__ or {})

    @model_serializer
    def _as_given(self) -> Any:
        """As recipes have it: the name alone where no setting is given."""
        return {"operator": self.operator, **self.settings} if self.settings else self.operator

    @property
    def told(self) -> str:
        """The settings in words."""
        return ", ".join(f"{name} {value}" for name, value in self.settings.items())

    def __str__(self) -> str:
        return f"{self.operator} ({self.told})" if self.settings else self.operator


def methods_of(given: Any) -> tuple[Method, ...]:
    """The methods of a stack as a recipe gives them, checked.

    Args:
        given: A list. Each item is the name of an operator, or a mapping of ``operator`` and settings.

    Raises:
        InputError: It is no such list, an operator or a setting is unknown or does not fit, an operator cannot stand
            beside others, or two methods are the same.
    """
    if not isinstance(given, list | tuple) or not given:
        raise InputError(
            f"methods: expected a list of operators, found {given!r}.", "For example [task_arithmetic, kfac]."
        )
    found = tuple(_method(one.model_dump() if isinstance(one, Method) else one) for one in given)
    for method in found:
        _check(operators.get(method.operator, method.settings))
        if found.count(method) > 1:
            raise InputError(f"methods: expected different methods, found {method} twice.", "Give it once.")
    return found


def as_given(methods: Sequence[Method]) -> list[Any]:
    """Methods as recipes have them; ``methods_of`` takes them back."""
    return [method.model_dump() for method in methods]


def _method(given: Any) -> Method:
    """One method, its settings checked by the operator's declarations. None stands for the default."""
    record = {"operator": given} if isinstance(given, str) else given
    if not isinstance(record, Mapping) or not isinstance(record.get("operator"), str):
        raise InputError(
            f"methods: expected names of operators, or mappings with the key operator, found {given!r}.",
            "For example {operator: regmean, ridge: 1e-4}.",
        )
    name, settings = record["operator"], {key: value for key, value in record.items() if key != "operator"}
    for key in settings:
        if not isinstance(key, str):
            raise InputError(f"methods: {name}: expected names of settings, found {key!r}.")
    kind = operators.OPERATORS.get(name, "methods")
    try:
        settings = checked(kind, {key: one for key, one in settings.items() if one is not None}, strict=False)
    except InputError as error:
        raise InputError(f"methods: {name}: {error.message}", error.remedy) from error
    return Method(operator=name, **settings)


def _check(operator: Operator) -> None:
    """Refuse an operator whose merges are not the base and a sum of vectors, one a coefficient."""
    said, remedy = "", "Leave it out, or use it alone."
    if isinstance(operator, Stack):
        said, remedy = "a stack has no others in it", "Name their methods in one list."
    elif not operator.affine or operator.geometry is not None:
        said = "its merges are not linear in their coefficients"
    elif not operator.needs_base:
        said, remedy = "it adds to no base", "Use task_arithmetic, which adds the experts' differences from the base."
    elif not _one_a_column(operator):
        said = "it does not mix one vector for each coefficient"
    if said:
        raise InputError(
            f"methods: expected operators that add vectors to the base, found {operator.name!r}: {said}.", remedy
        )


def _one_a_column(operator: Operator) -> bool:
    for experts in (2, 3):
        try:
            count = len(operator.columns([str(number) for number in range(experts)]))
        except InputError:  # it does not merge so many
            continue
        return operator.weights(np.zeros((1, count))).shape == (1, count + 1)
    return True


SHAPE: dict[str, Any] = {
    "type": "array",
    "items": {"anyOf": [{"type": "string"}, {"type": "object", "required": ["operator"]}]},
    "minItems": 1,
}
"""The JSON Schema of methods."""
LISTED = "a list of operators, each a name or a mapping of operator and its settings"
"""Methods in words."""

Methods: TypeAlias = Annotated[
    tuple[Method, ...],
    PlainValidator(methods_of),
    PlainSerializer(as_given),
    WithJsonSchema(SHAPE),
    InWords(LISTED),
]


@cache
def members_of(methods: tuple[Method, ...]) -> Mapping[str, Operator]:
    """The operators of methods, by label: the operator's name, and a number for the second of one name and on."""
    seen: Counter[str] = Counter()
    found = {}
    for method in methods:
        name = method.operator
        seen[name] += 1
        found[f"{name}-{seen[name]}" if seen[name] > 1 else name] = operators.get(name, method.settings)
    return found


def published(operator: Operator) -> float | None:
    """The coefficient of every source in an operator's published merge; None where there is no such merge."""
    found: float | None = getattr(operator, "around", getattr(operator, "published", None))
    return found


def preparing(operator: Operator) -> dict[str, WholeMatrices]:
    """The operators that prepare their vectors, by label: the operator itself, or methods of a stack."""
    parts = operator.members if isinstance(operator, Stack) else {operator.name: operator}
    return {label: one for label, one in parts.items() if isinstance(one, WholeMatrices)}


def own_merge(operator: Operator, experts: int) -> Floats:
    """(K,) coefficients of an operator's published merge, or else of the average of the experts."""
    rows = operator.seeds(experts)
    at = published(operator)
    return rows.mean(axis=0) if at is None else np.full(rows.shape[1], at)


@dataclass(frozen=True)
class Stack:
    """``theta = base + sum_m sum_k c_mk v_mk``: the columns of several methods, beside each other.

    Searches begin where the methods' own merges have equal parts: a coefficient is 1/M of the one that it has in its
    method's published merge. Of methods without one, as task arithmetic, the average of the experts stands for it.

    Args:
        methods: The operators, by name, or by a mapping of ``operator`` and its settings. Columns are called after the
            method and the expert, as ``kfac:odd``; a second method of the same operator is ``kfac-2``. The operators
            must add vectors to the base and be linear in their coefficients.
    """

    methods: Methods = (Method(operator="task_arithmetic"), Method(operator="ties"))

    name = "stack"
    needs_base = True
    changes = True
    affine = True
    geometry = None
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {}

    @staticmethod
    def with_paths(settings: Mapping[str, Any], resolve: Located) -> dict[str, Any]:
        """The settings, with the paths of files in those of the methods put through ``resolve``."""
        found = tuple(
            Method(operator=one.operator, **operators.with_paths(one.operator, one.settings, resolve))
            for one in settings.get("methods", ())
        )
        return {**settings, **({"methods": found} if found else {})}

    @property
    def members(self) -> Mapping[str, Operator]:
        """The operators, by the labels of their columns."""
        return members_of(self.methods)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The bounds of coefficients in searches whose recipe gives none; None where no method has any.

        They are 1/M of those of the methods, as wide as holds the published merge of each one.
        """
        own = [one for one in (getattr(member, "bounds", None) for member in self.members.values()) if one is not None]
        if not own:
            return None
        most = max(published(member) or 0.0 for member in self.members.values())
        return min(low for low, _ in own) / len(self.members), max(
            most, max(high for _, high in own) / len(self.members)
        )

    def columns(self, experts: Sequence[str]) -> tuple[str, ...]:
        """The columns of all methods, method by method, as ``kfac:odd``.

        Raises:
            InputError: A method does not merge so many experts.
        """
        return tuple(f"{label}:{name}" for label, one in self.members.items() for name in one.columns(experts))

    def seeds(self, experts: int) -> Floats:
        """(E, K) rows that give the experts by task arithmetic, if it is one of the methods, or else by the first."""
        members = list(self.members.values())
        chosen = next((number for number, one in enumerate(members) if not one.changes), 0)
        width, spans = _spans_of(self, experts)
        rows = np.zeros((experts, width))
        rows[:, spans[chosen]] = members[chosen].seeds(experts)
        return rows

    def own_merges(self, experts: int) -> dict[str, Floats]:
        """By name, (K,) coefficients of the methods' own merges; before them those that share them out evenly."""
        width, spans = _spans_of(self, experts)
        alone = {}
        for (label, one), span in zip(self.members.items(), spans, strict=True):
            alone[label] = np.zeros(width)
            alone[label][span] = own_merge(one, experts)
        return alone if len(alone) == 1 else {EQUAL: np.mean([*alone.values()], axis=0), **alone}

    def weights(self, coefficients: Floats, grams: Floats | None = None) -> Floats:
        """(S, K+1): the base's weight, then those of each method's vectors.

        Raises:
            InputError: So many columns are not those of any number of experts.
        """
        table = np.asarray(coefficients, np.float64)
        base, vectors = None, []
        for one, span in zip(self.members.values(), _spans(self, table.shape[1]), strict=True):
            own = one.weights(table[:, span])
            base = own[:, 0] if base is None else base + (own[:, 0] - 1.0)  # the base itself is there once
            vectors.append(own[:, 1:])
        assert base is not None
        return np.column_stack([base, *vectors])

    def mixed(self, experts: Sequence[Model], basis: Sequence[Model]) -> tuple[Model, ...]:
        """K models that are mixed beside the base: for each method the experts, or the vectors that it has prepared.

        Args:
            experts: E models.
            basis: The prepared vectors of all methods that prepare some; empty where only the sizes of models matter.
        """
        left, found = iter(basis), list[Model]()
        names = [expert.name for expert in experts]
        for label, one in self.members.items():
            if not isinstance(one, WholeMatrices):
                found += experts
            elif basis:
                found += [next(left) for _ in one.columns(names)]
            else:  # each is a model of its own
                places = range(len(one.columns(names)))
                found += [experts[place % len(experts)].named(f"{label}:{place}") for place in places]
        return tuple(found)

    def transform(self, pieces: Pieces) -> Transform:
        """Each method's own transform of its part of the pieces."""
        spans = [slice(span.start + 1, span.stop + 1) for span in _spans(self, pieces.vectors)]
        found = [one.transform(pieces.part(span)) for one, span in zip(self.members.values(), spans, strict=True)]
        if all(transform is unchanged for transform in found):
            return unchanged
        return SideBySide(tuple(zip(spans, found, strict=True)))


@dataclass(frozen=True)
class SideBySide:
    """Changes pieces of the base and K others, method by method.

    Args:
        parts: For each method, its part of the pieces, and its transform of the base and these.
    """

    parts: tuple[tuple[slice, Transform], ...]

    def __call__(self, pieces: Sequence[Tensor], start: int) -> list[Tensor]:
        """The base, and K others."""
        mixed = [pieces[0]]
        for span, transform in self.parts:
            mixed += transform([pieces[0], *pieces[span]], start)[1:]
        return mixed


@cache
def _spans_of(stack: Stack, experts: int) -> tuple[int, tuple[slice, ...]]:
    """K, and the columns of each method, for a number of experts.

    Raises:
        InputError: A method does not merge so many.
    """
    names = [str(number) for number in range(experts)]
    ends = np.cumsum([0, *(len(one.columns(names)) for one in stack.members.values())]).tolist()
    return ends[-1], tuple(slice(low, high) for low, high in itertools.pairwise(ends))


@cache
def _spans(stack: Stack, columns: int) -> tuple[slice, ...]:
    """The columns of each method where there are so many in all.

    Raises:
        InputError: No number of experts has so many.
    """
    for experts in range(1, columns + 1):
        with contextlib.suppress(InputError):  # a method does not merge so many
            width, spans = _spans_of(stack, experts)
            if width == columns:
                return spans
    raise InputError(f"genome: expected columns of {', '.join(stack.members)}, found {columns} in all.")
