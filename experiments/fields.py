"""Every field of a recipe in words: its type, bounds, default and text, from the declarations themselves.

``ecotone recipe --schema``, ``ecotone recipe --explain`` and the page of all fields are written from this.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import create_model
from pydantic.fields import FieldInfo

from ecotone.experiments.merge import Choices, Range
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.words import UNWRITTEN, parts_in
from ecotone.populations.errors import InputError, closest
from ecotone.populations.files import written_whole
from ecotone.search.chain import ChainSettings, StageSettings
from ecotone.search.starts.registry import Solvers
from ecotone.settings import Part, chosen_of

STAGE = ("stage",)
"""Stands as the kind of the keys of a stage, which lie beside those of its search."""

NESTED = (StageSettings, Solvers)
"""Parts whose own parts may stand without them, too: the search of a stage, solvers in a list. They are told once."""

_RANGE = "a mapping of bounds (low, high, scale)"
_CHOICES = "a mapping of choices (choices, most)"
_TOLD = re.compile(r"\bBy default (.+?)\.(?: |$)")
_WORDS = {
    **{"string": "text", "boolean": "true or false", "null": "none"},
    **{"integer": "a whole number", "number": "a number"},
}


@dataclass(frozen=True)
class FieldText:
    """A field in words.

    Args:
        path: Its dotted path in a recipe; positions in lists are left out.
        kinds: Names of the kinds that have it so, where it belongs to a kind (an algorithm, an operator, ...).
        type: The type of its values, with bounds.
        default: Its default as YAML would have it, or in words; ``required`` without one.
        text: Its meaning, in words.
    """

    path: str
    kinds: tuple[str, ...]
    type: str
    default: str
    text: str

    def __str__(self) -> str:
        kinds = f" ({', '.join(self.kinds)})" if self.kinds else ""
        default = "it is required" if self.default == "required" else f"by default {self.default}"
        return f"{self.path}{kinds}: {self.text}\n  {self.type}; {default}"


def schema() -> dict[str, Any]:
    """JSON Schema of a whole recipe: texts, defaults and bounds, the kinds of installed packages included."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def fields_of(
    part: type[Part], path: str = "", kinds: tuple[str, ...] = (), needed: str | None = None
) -> Iterator[FieldText]:
    """The fields of a part and of the parts in it, in the order of their declaration.

    Args:
        part: The part.
        path: Its path in a recipe.
        kinds: The kinds it belongs to.
        needed: The field that must be given, as without it the part is of another kind.
    """
    shapes = part.model_json_schema()
    for name, field in part.model_fields.items():
        place = f"{path}.{name}".lstrip(".")
        if (part, name) not in UNWRITTEN:
            shape = shapes["properties"][name] if "properties" in shapes else shape_of(field)
            text = part.texts().get(name, "")
            default = "required" if name == needed else _default(field, text)
            yield FieldText(place, kinds, in_words(shape, shapes.get("$defs", {})), default, text)
        if part in NESTED:
            continue
        for nested, own, tag in inside(part, name):
            below = path if part is ChainSettings else place
            yield from fields_of(nested, below, STAGE if nested in (ChainSettings, StageSettings) else own, tag)
    for more in part.more_fields():
        default = "none" if more.default is None else json.dumps(more.default, default=str)
        yield FieldText(f"{path}.{more.name}", more.kinds, in_words(more.shape, {}), default, more.text)
        if more.part is not None:
            yield from fields_of(more.part, f"{path}.{more.name}", more.kinds)


def shape_of(field: FieldInfo) -> dict[str, Any]:
    """JSON Schema of one field by itself."""
    alone = create_model("Alone", value=(Any if field.annotation is None else field.annotation, field))
    return dict(alone.model_json_schema()["properties"]["value"])


def inside(part: type[Part], name: str) -> list[tuple[type[Part], tuple[str, ...], str | None]]:
    """The parts that a field may hold, each with the names of its kind, if it is one, and the field that must name it.

    Only of the default kind no field must.
    """
    field = part.model_fields[name]
    chosen = chosen_of(field)
    parts = dict.fromkeys(parts_in(field.annotation))
    if chosen is None:
        return [(one, (), None) for one in parts]
    found: dict[type[Part], tuple[str, ...]] = {}
    for kind_name, kind in chosen.registry.usable().items():
        found[kind] = (*found.get(kind, ()), kind_name)
    kinds = [(kind, names, None if chosen.default in names else chosen.tag) for kind, names in found.items()]
    return [*kinds, *((one, (), None) for one in parts if not any(issubclass(kind, one) for kind in found))]


def everything() -> list[FieldText]:
    """Every field of a recipe. Fields that several kinds share come once."""
    return _joined(list(fields_of(Recipe)))


def explained_path(path: str) -> list[FieldText]:
    """The fields that a dotted path names; several where kinds have fields of that name that differ.

    Args:
        path: The path, as in ``--set``, ``objectives.search.0.batch``, or in messages, ``objectives.search[0].batch``.
            A kind's name may stand before its field, as in ``search.m2n2.archive``.

    Raises:
        InputError: No field has that path (the nearest one is given, or the fields beside it).
    """
    steps = [step for step in re.sub(r"\[(\d+)\]", r".\1", path).split(".") if not step.isdigit()]
    every = list(fields_of(Recipe))
    for words, part in ((_RANGE, Range), (_CHOICES, Choices)):
        every += [inner for one in every if words in one.type for inner in fields_of(part, one.path, one.kinds)]
    found = [one for one in every if _is(one, steps)]
    if not found:
        raise InputError(f"{path}: no field of a recipe has that path.", _nearest(steps, every))
    return _joined(found)


def _nearest(steps: list[str], every: list[FieldText]) -> str:
    """The known path nearest to one that no field has, or else the fields of the nearest part."""
    kinds = {kind for one in every for kind in one.kinds}
    plain = [step for step in steps if step not in kinds] or steps
    known = list(dict.fromkeys(one.path for one in every))
    for end in range(len(plain) - 1, 0, -1):
        part = ".".join(plain[:end])
        below = [path.removeprefix(f"{part}.").partition(".")[0] for path in known if path.startswith(f"{part}.")]
        if below:
            close = closest(plain[end], below)
            fields = f"Fields of {part}: {', '.join(dict.fromkeys(below))}."
            return fields if close is None else f"Did you mean '{part}.{close}'?"
    close = closest(".".join(plain), known)
    fields = f"Fields of a recipe: {', '.join(path for path in known if '.' not in path)}."
    return fields if close is None else f"Did you mean {close!r}?"


def _is(field: FieldText, steps: list[str]) -> bool:
    """Whether the steps of a path lead to a field, with a kind's name between them or without."""
    return field.path == ".".join(steps) or any(
        kind in steps and field.path == ".".join(step for step in steps if step != kind) for kind in field.kinds
    )


def _joined(found: list[FieldText]) -> list[FieldText]:
    """Fields that say the same, told once."""
    groups: dict[tuple[str, str, str, str], tuple[str, ...]] = {}
    for one in found:
        key = (one.path, one.type, one.default, one.text)
        groups[key] = tuple(dict.fromkeys((*groups.get(key, ()), *one.kinds)))
    return [FieldText(path, kinds, kind, default, text) for (path, kind, default, text), kinds in groups.items()]


def _default(field: FieldInfo, text: str) -> str:
    """The default of a field; of one that is None the words of its text, where that says what holds then."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    chosen = chosen_of(field)
    if isinstance(value, Part):
        return f"{chosen.tag}: {getattr(value, chosen.tag)}" if chosen else "the defaults of its fields"
    if value is None:
        told = _TOLD.search(text)
        return told[1].replace("``", "") if told else "none"
    return json.dumps(value, default=str)


def in_words(shape: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    """A JSON Schema of one field as a phrase: ``a whole number of at least 2``.

    Args:
        shape: The schema.
        parts: Schemas that it refers to, by name.
    """
    if "$ref" in shape:
        return in_words(parts.get(shape["$ref"].rsplit("/", 1)[-1], {}), parts)
    several = shape.get("anyOf") or shape.get("oneOf") or shape.get("allOf")
    if several and "properties" not in shape:
        taken = any("none" in one.get("enum", ()) for one in several)  # ``none`` is one of the values to choose from
        words = dict.fromkeys(in_words(one, parts) for one in several if not (taken and one.get("type") == "null"))
        return " or ".join(sorted(words, key=lambda word: word == "none"))
    if "enum" in shape:
        return "one of " + ", ".join(str(one) for one in shape["enum"])
    if "const" in shape:
        return str(shape["const"])
    kind = shape.get("type")
    if kind == "array":
        return f"a list of: {in_words(shape['items'], parts)}" if "items" in shape else "a list"
    if kind == "object":
        if shape.get("title") == Range.__name__:
            return _RANGE
        if shape.get("title") == Choices.__name__:
            return _CHOICES
        return "a mapping of the fields below" if "properties" in shape else "a mapping"
    return _WORDS.get(str(kind), "any value") + _bounds(shape)


def _bounds(shape: Mapping[str, Any]) -> str:
    told = [
        f"{words} {shape[key]:g}"
        for key, words in (
            ("minimum", "of at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
        )
        if key in shape
    ]
    return f" {' and '.join(told)}" if told else ""


def page() -> str:
    """Every field as one Markdown page: a section a part, and for a part that has kinds one a kind."""
    lines = [
        "# Every field of a recipe",
        "",
        "Written by `make docs` from the declarations. `ecotone recipe --explain FIELD` says the same of one field.",
        "",
    ]
    told = set()
    for title, summary, fields in sections(Recipe, "recipe"):
        if (title, summary) in told:  # what several kinds have
            continue
        told.add((title, summary))
        lines += [f"## {title}", "", summary, "", "| field | takes | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [
            f"| `{one.path}` | {_cell(one.type)} | `{_cell(one.default)}` | {_cell(one.text)} |" for one in fields
        ]
        lines.append("")
    return "\n".join(lines)


def sections(
    part: type[Part], title: str, path: str = "", needed: str | None = None
) -> Iterator[tuple[str, str, list[FieldText]]]:
    """Title, summary and own fields of a part, and then of the parts in it. Kinds with several names come once."""
    own = [
        one
        for one in fields_of(part, path, needed=needed)
        if one.path.removeprefix(path).count(".") <= (1 if path else 0)
    ]
    if part is not ChainSettings:
        yield title, part.summary(), own
    if part in NESTED:
        return
    for name in part.model_fields:
        place = f"{path}.{name}".lstrip(".") if (part, name) not in UNWRITTEN else path
        for nested, kinds, tag in inside(part, name):
            of = STAGE if nested is StageSettings else kinds
            yield from sections(nested, f"{place}: {', '.join(of)}" if of else place, place, tag)
    for more in part.more_fields():
        if more.part is not None:
            yield from sections(more.part, f"{path}.{more.name}", f"{path}.{more.name}")


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    written_whole(sys.argv[1], page() + "\n")
