"""Errors of a recipe in words: the field as the user wrote it, what was expected, what was found, what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from types import MappingProxyType
from typing import Any, get_args

from pydantic import ValidationError

from ecotone.populations import facts, secrets
from ecotone.populations.errors import nearest, sentence
from ecotone.populations.journal import Journal
from ecotone.populations.yaml_texts import Steps, Written, hint
from ecotone.search.chain import ChainSettings, StageSettings
from ecotone.search.starts.registry import Solvers
from ecotone.settings import NO_NUMBER, UNKNOWN_KIND, Part, chosen_of

MOST = 5  # errors that are told
_SHORT = 12  # characters of a text that is no token
_WANTED: Mapping[str, type] = {
    **dict.fromkeys(("string_type", "literal_error", "enum", "string_pattern_mismatch"), str),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "float_type", "float_parsing", NO_NUMBER), float),
}
"""Errors of pydantic after which a hint helps, and whether text or a number was expected."""
UNWRITTEN = ((ChainSettings, "stages"), (StageSettings, "search"))  # fields that a user does not write
MEMBERS: dict[int | str, type[Part]] = {"stages": ChainSettings, "several": Solvers}  # of unions, by tag


def wrote(journal: Journal) -> str:
    """The version of Ecotone that began a run; empty when it is not recorded."""
    return str((journal.fact(facts.VERSIONS) or {}).get("ecotone", ""))


def newer(written_by: str) -> str:
    """A sentence that says that a newer Ecotone wrote something; empty when it did not, or one patch newer at most.

    Args:
        written_by: The version of Ecotone that wrote it; empty when it is not known.
    """
    here = version("ecotone")
    if _minor(written_by) <= _minor(here):
        return ""
    return f"Ecotone {written_by} wrote this, and this is Ecotone {here}, which knows less: use the newer Ecotone."


def _minor(text: str) -> tuple[int, ...]:
    """Major and minor number of a version."""
    found = re.match(r"(\d+)(?:\.(\d+))?", text)  # of 0.2rc1 0 and 2
    return () if found is None else tuple(int(part or 0) for part in found.groups())


def explained(error: ValidationError, root: type[Part], scalars: Mapping[Steps, Written] = MappingProxyType({})) -> str:
    """The first errors of a record that ``root`` refuses, a line each.

    Args:
        error: The errors.
        root: The part that refuses the record.
        scalars: How numbers and the like were written in a YAML file, by the steps that lead to them.
    """
    entries: list[dict[str, Any]] = [dict(entry) for entry in error.errors()]
    # Of a list whose items are wrong pydantic also says that it is too short without them.
    deeper = {entry["loc"][:end] for entry in entries for end in range(len(entry["loc"]))}
    told = [entry for entry in entries if not (entry["type"] == "too_short" and entry["loc"] in deeper)]
    lines = [_hinted(entry, root, scalars) for entry in told[:MOST]]
    more = len(told) - len(lines)
    return "\n".join(lines + ([f"... and {more} more."] if more > 0 else []))


def _hinted(entry: Mapping[str, Any], root: type[Part], scalars: Mapping[Steps, Written]) -> str:
    """The line of an error, with how to write in YAML what was meant."""
    wanted = _WANTED.get(entry["type"])
    if wanted is None:
        return _line(entry, root)
    advice = hint(entry["input"], wanted, scalars.get(tuple(_place(entry["loc"], root)[0])))
    return f"{_line(entry, root)} {advice}".rstrip()


def _line(entry: Mapping[str, Any], root: type[Part]) -> str:
    kind, message = entry["type"], entry["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        place, part = _place(entry["loc"][:-1], root)
        key, known = str(entry["loc"][-1]), list(part.model_fields)
        if "stages" in entry["loc"]:
            known += [name for name in StageSettings.model_fields if name != "search"]
        return f"{written([*place, key])}: unknown key. {nearest(key, known)}"
    field = written(_place(entry["loc"], root)[0])
    if kind == "missing":
        return f"{field}: missing; a recipe needs `{field}`."
    if kind == UNKNOWN_KIND:
        return f"{field}: {message}"
    if kind == "too_short":
        least, given = entry["ctx"]["min_length"], entry["ctx"]["actual_length"]
        return f"{field}: expected a list of {least} or more, found {given}."
    if kind in ("tuple_type", "list_type"):
        return f"{field}: expected a list, found {_shown(entry['input'], field)}."
    if kind in ("model_type", "dict_type"):
        return f"{field}: expected a mapping, found {_shown(entry['input'], field)}."
    if kind == "value_error":
        return sentence(message if field == "recipe" else f"{field}: {message}")
    return f"{field}: {message[0].lower()}{message[1:]}, found {_shown(entry['input'], field)}."


def _shown(value: Any, field: str) -> str:
    """A value that does not fit, for a message. Where a secret may stand, a text is only described."""
    if field.partition(".")[0] == "tracking" or field == "runtime.address":
        value = _described(value)
    return repr(secrets.without(value))


def _described(value: Any) -> Any:
    """A value of a place with credentials: long texts that are no URLs, as a token may be, say only their length."""
    if isinstance(value, Mapping):
        return {key: _described(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_described(one) for one in value]
    if not isinstance(value, str) or len(value) <= _SHORT or "://" in value:
        return secrets.place(value) if isinstance(value, str) else value
    return f"a text of {len(value)} characters"


def _place(steps: Steps, root: type[Part]) -> tuple[list[int | str], type[Part]]:
    """The steps that the user wrote, without the steps that pydantic adds for unions, and the part they lead to."""
    part, chosen = root, None
    written: list[int | str] = []
    for step in steps:
        if isinstance(step, int):
            written.append(step)
        elif chosen is not None and step in chosen.registry:
            part, chosen = chosen.registry.get(step, chosen.tag), None
        elif chosen is not None and step == chosen.tag:
            written.append(step)
        elif step in part.model_fields:
            field = part.model_fields[step]
            if (part, step) not in UNWRITTEN:
                written.append(step)
            chosen = chosen_of(field)
            part = part if chosen else _part(field.annotation) or part
        elif (beside := part.part_at(step)) is not None:
            written.append(step)
            part = beside
        else:
            part, chosen = MEMBERS.get(step, part), None if step in MEMBERS else chosen
    return written, part


def _part(annotation: Any) -> type[Part] | None:
    """The one part that an annotation allows; None where there are none or several."""
    found = list(dict.fromkeys(parts_in(annotation)))
    return found[0] if len(found) == 1 else None


def parts_in(annotation: Any) -> Iterator[type[Part]]:
    """The parts that stand in an annotation, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        yield annotation
    for one in get_args(annotation):
        yield from parts_in(one)


def written(steps: list[int | str]) -> str:
    """The place of a field as users write it; ``recipe`` for the whole."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".") or "recipe"
