"""Errors of a recipe in words: the field as the user wrote it, what was expected, what was found, what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias, get_args

from pydantic import ValidationError

from ecotone.chosen import Chosen
from ecotone.populations.errors import EcotoneError, nearest
from ecotone.search.chain import ChainSettings, StageSettings
from ecotone.settings import Part

Steps: TypeAlias = tuple[int | str, ...]

MOST = 5  # errors that are told
_UNWRITTEN = ((ChainSettings, "stages"), (StageSettings, "search"))  # fields that a user does not write


def explained(error: ValidationError, record: Any, root: type[Part]) -> str:
    """The first errors of a record that ``root`` refuses, a line each."""
    entries: list[dict[str, Any]] = [dict(entry) for entry in error.errors()]
    # Of a list whose items are wrong pydantic also says that it is too short without them.
    deeper = {entry["loc"][:end] for entry in entries for end in range(len(entry["loc"]))}
    told = [entry for entry in entries if not (entry["type"] == "too_short" and entry["loc"] in deeper)]
    lines = [_line(entry, record, root) for entry in told[:MOST]]
    more = len(told) - len(lines)
    return "\n".join(lines + ([f"... and {more} more."] if more > 0 else []))


def _line(entry: Mapping[str, Any], record: Any, root: type[Part]) -> str:
    kind, message = entry["type"], entry["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        place, part = _place(entry["loc"][:-1], record, root)
        key, known = str(entry["loc"][-1]), list(part.model_fields)
        if "stages" in entry["loc"]:
            known += [name for name in StageSettings.model_fields if name != "search"]
        return f"{_written([*place, key])}: unknown key. {nearest(key, known)}"
    field = _written(_place(entry["loc"], record, root)[0])
    if kind == "missing":
        return f"{field}: missing; a recipe needs `{field}`."
    if kind == "kind":
        return f"{field}.{message}"
    if kind == "value_error":
        return f"{message}." if field == "recipe" else f"{field}: {message}."
    return f"{field}: {message[0].lower()}{message[1:]}, found {entry['input']!r}."


def _place(steps: Steps, record: Any, root: type[Part]) -> tuple[list[int | str], type[Part]]:
    """The steps that the user wrote, without those that pydantic adds for unions, and the part they lead to."""
    part, value = root, record
    written: list[int | str] = []
    for step in steps:
        if isinstance(step, int):
            written.append(step)
            value = value[step] if isinstance(value, list | tuple) and step < len(value) else None
        elif step in part.model_fields:
            field = part.model_fields[step]
            if (part, step) not in _UNWRITTEN:
                written.append(step)
                value = value.get(step) if isinstance(value, Mapping) else None
            part = part_of([field.annotation, *field.metadata], value) or part
    return written, part


def part_of(annotations: Any, value: Any = None) -> type[Part] | None:
    """The part that a field allows for a value: the one there is, or the kind that the value names; else None.

    Args:
        annotations: The field's annotation and what it is annotated with.
        value: The value, as it is written, or a list of such.
    """
    found = dict.fromkeys(one for annotation in annotations for one in allowed(annotation))
    parts = [one for one in found if isinstance(one, type)]
    if isinstance(value, list | tuple) and ChainSettings in parts:
        return ChainSettings
    for chosen in (one for one in found if isinstance(one, Chosen)):
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, Mapping) and item.get(chosen.tag) in chosen.registry:
                try:
                    return chosen.registry.get(item[chosen.tag], chosen.tag)  # type: ignore[no-any-return]
                except EcotoneError:
                    return None
    return parts[0] if len(parts) == 1 else None


def allowed(annotation: Any) -> Iterator[type[Part] | Chosen]:
    """The parts and the choices of kinds that stand in an annotation, at any depth."""
    if isinstance(annotation, Chosen) or (isinstance(annotation, type) and issubclass(annotation, Part)):
        yield annotation
    for one in (*get_args(annotation), *getattr(annotation, "__metadata__", ())):
        yield from allowed(one)


def _written(steps: list[int | str]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".") or "recipe"
