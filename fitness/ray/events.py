"""Events that the Ray pool writes to the log, and the errors that they and failures quote."""

from __future__ import annotations

import logging
from typing import Any

from ecotone.populations.errors import EcotoneError, PoolError, first_line, sentence

log: logging.Logger = logging.getLogger("ecotone")


def event(level: int, name: str, sentence: str, **fields: Any) -> None:
    """Write one event to the log.

    Args:
        level: A level of ``logging``.
        name: The event's name, which the operations guide lists.
        sentence: A sentence about the event, for people.
        fields: The same for programs.
    """
    log.log(level, sentence, extra={"event": name, **fields})


def reason(error: Exception) -> str:
    """The first line of an exception's text, or its type's name when it has none."""
    return first_line(error) or type(error).__name__


def cause(error: Exception) -> Exception:
    """The exception that a worker raised, without Ray's wrapping."""
    raised = getattr(error, "cause", None)
    return (
        raised
        if isinstance(raised, EcotoneError)
        else PoolError(sentence(f"pool: a worker raised {_last_line(error)}"))
    )


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
