"""Errors a user can act on: what was given, what was expected, what to do."""

from __future__ import annotations

import re
import traceback
import unicodedata
from collections.abc import Sequence
from difflib import get_close_matches

from ecotone.populations.secrets import stripped

_PASTED = re.compile(r"[\w ./:@~+,=%#()\[\]-]*")
LONGEST = 20_000
"""Characters of an error's message and of a traceback that are kept, of the beginning and the end together."""


def shortened(text: str, most: int = LONGEST) -> str:
    """``text``, or its beginning and its end with a word between them that it was cut.

    Args:
        text: Any text: an exception's may be megabytes long.
        most: The most characters of it that stay.
    """
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail]} [... cut: {len(text) - most:,} of {len(text):,} characters ...] {text[-tail:]}"


class EcotoneError(Exception):
    """Any failure that Ecotone explains in words instead of a traceback. Its words are stripped of secrets.

    Args:
        message: A sentence about the error, naming the field or file, what was expected and what was found.
        remedy: One sentence on what the user can do about it, or an empty string.

    Both may quote names and texts of strangers, so both are ``shown``.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        self.message: str = shown(message, LONGEST, lines=True)
        self.remedy: str = shown(remedy, LONGEST, lines=True)
        super().__init__(f"{self.message} {self.remedy}".strip())

    def __reduce__(self) -> tuple[type[EcotoneError], tuple[str, str]]:
        return type(self), (self.message, self.remedy)


class InputError(EcotoneError):
    """The user's recipe, arguments or data do not fit."""


class CheckpointError(EcotoneError):
    """A checkpoint cannot be used: missing, unsafe, corrupt or of another shape."""


class JournalError(EcotoneError):
    """The run directory's journal cannot be read or written."""


class DamagedJournalError(JournalError):
    """Something in the journal is not as it was written."""


class PoolError(EcotoneError):
    """Workers cannot be started or placed."""


class SearchError(EcotoneError):
    """The search cannot go on."""


_LINE = 2_000  # characters of a message's first line that are kept


def text_of(error: BaseException) -> str:
    """An exception's message without secrets, cut if it is long; a phrase where its ``__str__`` raises."""
    try:
        return shortened(stripped(str(error)))
    except BaseException as second:  # any code of the user's may stand there
        return f"(no text: its __str__ raised {type(second).__name__})"


def trace_of(error: BaseException) -> str:
    """An exception's traceback with those of its causes, without secrets, cut if it is long."""
    try:
        return shortened(stripped("".join(traceback.format_exception(error))))
    except BaseException as second:  # too deep a chain, no memory, texts that raise
        return f"{type(error).__name__}: no traceback can be made of it ({type(second).__name__})"


def shown(text: str, most: int = 1000, *, lines: bool = False) -> str:
    r"""A text of a stranger's as it may be printed: in errors, tables, logs, pages and trackers.

    Names of tensors, models and files, and messages of exceptions, may hold terminal escapes (colours, links, the
    window's title), marks that turn the direction of writing, or characters that cannot be seen. Each is written as its
    escape, ``\x1b`` for instance, as ``repr`` writes it. All other characters stay, but secrets (``stripped``).

    Args:
        text: The text.
        most: The most characters; of a longer text the middle is left out.
        lines: Keep line breaks and tabs.
    """
    text = shortened(stripped(text), most)
    if text.isprintable():  # nearly always
        return text
    kept = "\n\t" if lines else ""
    return "".join(one if one in kept or _is_seen(one) else _escaped(one) for one in text)


def _is_seen(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def can_be_pasted(*texts: object) -> bool:
    """Whether names of strangers may stand in quotes in a command that people copy: nothing in them ends the quotes."""
    return all(_PASTED.fullmatch(str(text)) for text in texts)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, as it may be printed; empty when it has none."""
    return shown((text_of(error).strip().splitlines() or [""])[0], _LINE)


def told(error: BaseException) -> str:
    """The type of an exception and the first line of its message, as ``ValueError: too long``."""
    return f"{type(error).__name__}: {first_line(error)}".rstrip(": ")


def sentence(text: str) -> str:
    """A text with a full stop at its end, if it has none: texts of other packages may have one."""
    return text if text.endswith((".", "!", "?")) else f"{text}."


def closest(word: str, known: Sequence[str]) -> str | None:
    """The known word closest to ``word``; None when none is like it."""
    begun = [one for one in known if len(word) > 2 and one.startswith(word)]
    close = begun or get_close_matches(word, known, n=1, cutoff=0.5)
    return close[0] if close else None


def nearest(word: str, known: Sequence[str]) -> str:
    """``"Did you mean 'x'?"`` for the known word closest to ``word``, or the list of known words."""
    close = closest(word, known)
    if close is not None:
        return f"Did you mean {close!r}?"
    return "Known: " + ", ".join(sorted(known)) + "."
