"""Reading what users write in YAML: nothing that they wrote is lost or changed without a word."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ecotone.experiments.words import written
from ecotone.populations.errors import InputError

DEEPEST = 100  # mappings and lists in each other


class _Once(yaml.SafeLoader):
    """Refuses a key that a mapping has twice. What ``<<`` merges may still be given anew."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"line {line}: {key.value!r} is given twice; keep one of them")
                seen.add((key.tag, key.value))
        return node


def load(text: str) -> Any:
    """The value of a YAML text, as ``yaml.safe_load`` gives it.

    Raises:
        yaml.YAMLError: It is not YAML, a mapping has a key twice, or it is nested too deep.
    """
    try:
        return yaml.load(text, _Once)  # noqa: S506 - a safe loader
    except RecursionError as error:
        raise yaml.YAMLError(f"expected at most {DEEPEST} mappings and lists in each other, found more") from error


def at_home(path: str, where: str = "path") -> Path:
    """The path with a home folder in place of its ``~``.

    Args:
        path: The path as it was written.
        where: How messages name it.

    Raises:
        InputError: No user of that name has a home folder here.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{where}: expected the home folder of a user, found {path!r}.", "Write the path out."
        ) from error


def check_plain(value: Any, where: str) -> None:
    """Refuse a value that JSON, and so the journal, would not give back as it is.

    Args:
        value: The value.
        where: How messages name it.

    Raises:
        InputError: It holds more than text, numbers, lists and mappings, a key that is no text, or is nested too deep.
    """
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: expected text, numbers, lists and mappings only ({error}).", "Put dates and the like in quotes."
        ) from error
    left: list[tuple[list[int | str], Any]] = [([], value)]
    while left:
        place, one = left.pop()
        if len(place) > DEEPEST:
            raise InputError(f"{where}: expected at most {DEEPEST} mappings and lists in each other, found more.")
        wrong = [key for key in one if not isinstance(key, str)] if isinstance(one, Mapping) else []
        if wrong:
            field = f"{written(place)}: " if place else ""
            key = json.dumps(wrong[0])
            raise InputError(f"{where}: {field}expected text as keys of mappings, found {key}; put it in quotes.")
        items = one.items() if isinstance(one, Mapping) else enumerate(one) if isinstance(one, list | tuple) else ()
        left += [([*place, step], inner) for step, inner in items]
