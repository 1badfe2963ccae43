"""One reader of what may be damaged or hostile: JSON, packed bytes and arrays. Every failure is told in words.

What is read here came from a disk or a stranger. So each reader has a limit on size or depth, runs nothing, and raises
``MalformedError``, a ``ValueError`` that says what was expected and what was found. ``explained`` turns it, and the
errors that a value of another shape causes, into an error that names the subject and a remedy.

Ecotone's own records are read strictly: no key stands twice and, but where a user's numbers may be others, each number
is finite. Files of other programs (``config.json``, ``tokenizer.json``) are read as their own loaders read them: of a
key that stands twice the last value counts, and ``Infinity`` is a number, as configurations of Mamba write it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from ecotone.populations.errors import EcotoneError, InputError, first_line, shown

DEEPEST = 100
"""The most mappings and lists in each other."""
LARGEST = 1 << 26
"""The most bytes of a file of settings: 64 MiB."""
LARGEST_TOKENIZER = 1 << 28
"""The most bytes of a tokenizer's file: 256 MiB. The largest vocabularies of today take 35 MB."""
LARGEST_ARRAY = 1 << 36
"""The most bytes that are ever unpacked: 64 GiB of weights."""

_MANY = 1 << 18  # characters of a text that makes many objects
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


class MalformedError(ValueError):
    """What was read is not what it should be. Both texts may quote a stranger's, so both are ``shown``.

    Args:
        expected: What should have been there, as ``a JSON object``.
        found: What was there, or why it could not be read.
    """

    def __init__(self, expected: str, found: str) -> None:
        self.expected: str = shown(expected)
        self.found: str = shown(found)
        super().__init__(f"expected {self.expected}, found {self.found}")

    def __reduce__(self) -> tuple[type[MalformedError], tuple[str, str]]:
        return type(self), (self.expected, self.found)


@contextlib.contextmanager
def explained(
    subject: str, remedy: str = "", kind: type[EcotoneError] = InputError, expected: str = "a whole record"
) -> Iterator[None]:
    """Turn every error of decoding into one that names the subject.

    Args:
        subject: What is read: a file, a field, a table of the journal.
        remedy: What the user can do.
        kind: The class of the error.
        expected: What should be there, where a value of another shape leads to an error.

    Raises:
        EcotoneError: Of ``kind``, for whatever the body could not decode.
    """
    try:
        yield
    except MalformedError as error:
        raise kind(f"{subject}: {error}.", remedy) from error
    except OSError as error:
        raise kind(f"{subject}: cannot be read ({error.strerror or error}).", remedy) from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
        found = f"{type(error).__name__}: {first_line(error)}".rstrip(": ")
        raise kind(f"{subject}: expected {expected}, found another ({found}).", remedy) from error
    except (zlib.error, MemoryError) as error:
        raise kind(f"{subject}: expected {expected}, found one that cannot be unpacked.", remedy) from error


# -- files -----------------------------------------------------------------------------------------------------------


def file_bytes(path: Path, limit: int = LARGEST) -> bytes:
    """The bytes of a file.

    Args:
        path: The file.
        limit: The most bytes that are read.

    Raises:
        MalformedError: It is larger, or no regular file, so that reading might never end.
        OSError: It cannot be read.
    """
    if path.exists() and not path.is_file():
        raise MalformedError("a file", "a folder" if path.is_dir() else "a pipe, a socket or a device")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise MalformedError(f"at most {limit >> 20 or 1} MiB", "more")
    return data


def text_of(data: bytes) -> str:
    """The text that UTF-8 bytes encode; a mark at the beginning is left out.

    Raises:
        MalformedError: They are of another encoding, or no text.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise MalformedError("text in UTF-8", "text in UTF-16 or UTF-32")
    try:
        return data.decode("utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MalformedError("text in UTF-8", f"the byte {data[error.start]:#04x} in line {line}") from error


# -- JSON ------------------------------------------------------------------------------------------------------------


def json_value(text: str | bytes, *, once: bool = True, finite: bool = True, depth: int | None = DEEPEST) -> Any:
    """The value that a JSON text holds.

    Args:
        text: The text, or its bytes in UTF-8.
        once: Refuse a key that stands twice in an object. Otherwise its last value counts.
        finite: Refuse ``NaN``, ``Infinity`` and numbers too large for a double.
        depth: The most objects and lists in each other; None leaves it to the parser's own bound of about a thousand,
            which is faster for long lists of numbers.

    Raises:
        MalformedError: It is not such a text.
    """
    plain = text_of(text) if isinstance(text, bytes) else text
    with uncollected() if len(plain) > _MANY else contextlib.nullcontext():
        value = _decoded(_DECODERS[once, finite].decode, plain)
        if depth is not None:
            check_depth(value, depth)
    if _HALF_PAIR.search(plain):
        _check_texts(value)
    return value


def json_object(
    text: str | bytes, *, once: bool = True, finite: bool = True, depth: int | None = DEEPEST
) -> dict[str, Any]:
    """The object that a JSON text holds, as for ``json_value``.

    Raises:
        MalformedError: It is no such text, or holds another value.
    """
    value = json_value(text, once=once, finite=finite, depth=depth)
    if not isinstance(value, dict):
        raise MalformedError("a JSON object", kind_of(value))
    return value


def foreign_object(path: Path, limit: int = LARGEST) -> dict[str, Any]:
    """The object in another program's JSON file.

    Raises:
        MalformedError: It is too large, no JSON, or another value.
        OSError: It cannot be read.
    """
    return json_object(file_bytes(path, limit), once=False, finite=False)


def foreign_or_none(path: Path, limit: int = LARGEST) -> dict[str, Any]:
    """The object in another program's JSON file; empty where there is none that is one: its own loader refuses it.

    Raises:
        OSError: It is there and cannot be read.
    """
    try:
        return foreign_object(path, limit) if path.is_file() else {}
    except MalformedError:
        return {}


def kind_of(value: Any) -> str:
    """What a value of JSON is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Pause the search for garbage: it would look through a large value's objects, which all stay, again and again."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _decoded(decode: Callable[[str], Any], text: str) -> Any:
    try:
        return decode(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise MalformedError("JSON", f"none ({error.msg.lower()} at {place})") from error
    except MalformedError:
        raise
    except RecursionError as error:
        raise MalformedError(f"at most {DEEPEST} objects and lists in each other", "more") from error
    except ValueError as error:  # Python converts whole numbers up to a length
        raise MalformedError("JSON with numbers of a usual length", "a longer one") from error
    except MemoryError as error:
        raise MalformedError("JSON that fits in memory", "more") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values, each key once."""
    record = dict(pairs)
    if len(record) != len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise MalformedError("every key once", f"{shown(twice, 80)!r} twice")
    return record


def _not_finite(name: str) -> NoReturn:
    raise MalformedError("finite numbers", name)


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0:  # infinity
        raise MalformedError("numbers that a double can hold", shown(text, 40))
    return value


_DECODERS = {
    (once, finite): json.JSONDecoder(
        object_pairs_hook=_once if once else None,
        parse_constant=_not_finite if finite else None,
        parse_float=_finite if finite else None,
    )
    for once in (False, True)
    for finite in (False, True)
}


def check_depth(value: Any, most: int) -> None:
    """Refuse more than ``most`` objects and lists of JSON in each other, level by level: no recursion.

    Raises:
        MalformedError: There are more.
    """
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        if not level:
            return
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    if level:
        raise MalformedError(f"at most {most} objects and lists in each other", "more")


def _check_texts(value: Any) -> None:
    """Refuse half a pair of surrogates: it is no character, and no file, hash or page could take it."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            left += one
        elif isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError as error:
                raise MalformedError("text", f"half a pair of surrogates in {shown(one, 40)!r}") from error


# -- packed bytes ------------------------------------------------------------------------------------------------


def unpacked(blob: bytes, limit: int) -> bytes:
    """What zlib packed into ``blob``, at most ``limit`` bytes of it.

    Raises:
        MalformedError: It is damaged, cut short, followed by other bytes, or unpacks to more than the limit.
    """
    limit = max(0, min(limit, LARGEST_ARRAY))
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(blob, limit + 1)
    except (zlib.error, TypeError, MemoryError) as error:
        raise MalformedError("packed bytes", f"none ({first_line(error)})") from error
    if len(data) > limit:
        raise MalformedError(f"at most {limit} unpacked bytes", "more")
    if not stream.eof:
        raise MalformedError("packed bytes to their end", "a part of them")
    if stream.unused_data:
        raise MalformedError("packed bytes alone", f"{len(stream.unused_data)} more")
    return data
