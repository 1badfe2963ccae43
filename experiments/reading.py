"""Reading what users write in YAML: nothing that they wrote is lost or changed without a word."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ecotone.experiments.words import written
from ecotone.populations.errors import InputError, sentence
from ecotone.populations.parsing import DEEPEST, file_bytes, text_of
from ecotone.populations.yaml_texts import LARGEST_TEXT, Document, YamlError, document


def yaml_file(file: Path) -> tuple[str, Document]:
    """The text of a YAML file, and what it says.

    Raises:
        InputError: It cannot be read, is no text, or is not YAML as ``ecotone.populations.yaml_texts`` reads it.
    """
    try:
        data = file_bytes(file, LARGEST_TEXT)
        found = document(data)
    except OSError as error:
        raise InputError(f"{file}: cannot be read as YAML: {error.strerror or error}.") from error
    except (YamlError, ValueError) as error:
        raise InputError(sentence(f"{file}: cannot be read as YAML: {error}")) from error
    return text_of(data), found


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
