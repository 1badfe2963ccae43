"""Errors a user can act on: what was given, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from ecotone.populations.secrets import stripped


class EcotoneError(Exception):
    """Any failure that Ecotone explains in words instead of a traceback. Its words are stripped of secrets.

    Args:
        message: A sentence about the error, naming the field or file, what was expected and what was found.
        remedy: One sentence on what the user can do about it, or an empty string.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        self.message: str = stripped(message)
        self.remedy: str = stripped(remedy)
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


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, without secrets; empty when it has none."""
    return stripped((str(error).strip().splitlines() or [""])[0])


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
