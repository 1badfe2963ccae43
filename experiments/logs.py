"""Structured log lines: one JSON object for each event, in the run directory and, on request, on stdout.

Every module logs by ``logging.getLogger("ecotone")`` with a sentence. A record whose ``extra`` names an ``event`` is
one of the run's events. Its other extras are the event's fields. The logger's level decides which are written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from ecotone.populations.errors import LONGEST, shortened, shown
from ecotone.populations.folders import opened
from ecotone.populations.parsing import json_object
from ecotone.populations.secrets import LogFilter, stripped, without

if TYPE_CHECKING:
    from ecotone.search.manager import Progress

LOG = "log.jsonl"  # in the run directory
_log = logging.getLogger("ecotone")
_log.addFilter(LogFilter())  # whoever handles its records, they have no secrets
_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "event"}


class JsonLine(logging.Formatter):
    """A record as one line of JSON: ``time`` (UTC), ``level``, ``event``, ``message``, then the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        head = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": vars(record)["event"],
            "message": shortened(record.getMessage()),
        }
        named = {
            key: value for key, value in vars(record).items() if not key.startswith("_")
        }  # Ray adds some of its own
        fields = {key: value for key, value in named.items() if key not in _STANDARD}
        if record.exc_info:
            fields["traceback"] = shortened(stripped(self.formatException(record.exc_info)))
        return json.dumps({**head, **_plain(without(fields)), **head})


class _Lines(logging.FileHandler):
    """A file that may fail: a full disk costs lines, not the run, and is reported once. Only the user may read it."""

    _failed = False

    def _open(self) -> Any:
        return opened(self.baseFilename, self.mode, encoding=self.encoding)

    def emit(self, record: logging.LogRecord) -> None:
        """Append the record's line."""
        if self._failed:
            return
        try:
            super().emit(record)
        except OSError:  # the file cannot be opened; when it cannot be written, ``handleError`` is called
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Stop writing."""
        self._failed = True
        _log.warning("%s cannot be written; the run goes on without it.", self.baseFilename)

    def close(self) -> None:
        """Close the file, even if its last lines are lost."""
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def recorded(directory: Path, level: str = "info") -> Iterator[None]:
    """Append the run's events of that level, and above it, to ``directory/log.jsonl`` meanwhile.

    Warnings still go to stderr, as without a record.
    """
    handlers: list[logging.Handler] = [_events(_Lines(directory / LOG, encoding="utf-8", delay=True))]
    if not _log.hasHandlers() and logging.lastResort is not None:
        handlers.append(_Saying(lambda text: print(text, file=sys.stderr)))
    with _added(*handlers, level=level.upper()):
        yield


@contextlib.contextmanager
def streamed(stream: TextIO) -> Iterator[None]:
    """Write the events, and nothing else of the log, to ``stream`` meanwhile."""
    with _added(_events(logging.StreamHandler(stream))):
        yield


@contextlib.contextmanager
def said(say: Callable[[str], None]) -> Iterator[None]:
    """Give warnings to ``say``, as sentences, meanwhile."""
    with _added(_Saying(say)):
        yield


class _Saying(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(f"Warning: {shown(record.getMessage(), LONGEST, lines=True)}")


class Watcher(Protocol):
    """An observer of a search. It gets the progress after every step, and sentences when something takes a while."""

    def __call__(self, progress: Progress) -> None:
        """Take the progress in."""

    def say(self, text: str) -> None:
        """Pass a sentence on."""


class Heartbeat:
    """A watcher that logs ``progress`` now and then, so that a log shows that a run lives, and ``note`` for sentences.

    Args:
        seconds: Between two events.
        clock: Seconds; a test may give its own.
    """

    def __init__(self, seconds: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._next = -math.inf

    def __call__(self, progress: Progress) -> None:
        """Log the progress, unless the last event was a moment ago."""
        if self._clock() < self._next:
            return
        self._next = self._clock() + self._seconds
        best = " ".join(f"{name} {value:.4g}" for name, value in progress.best_scores.items()) or "none yet"
        fields = {
            "evaluations": progress.evaluations,
            "spent": progress.spent,
            "failures": progress.failures,
            "seconds": progress.elapsed,
            "front": progress.front_size,
            "best": progress.best,
            "scores": progress.best_scores,
        }
        _log.info("%g evaluations, best: %s.", progress.spent, best, extra={"event": "progress", **fields})

    def say(self, text: str) -> None:
        """Log the sentence."""
        _log.info("%s", text, extra={"event": "note"})


def in_words(line: str) -> str:
    """A line of such a log in words; any other line unchanged."""
    try:
        event = json_object(line, finite=False)
        return shown(f"{event['time'][:19].replace('T', ' ')} {event['level']}: {event['message']}", LONGEST)
    except (ValueError, TypeError, KeyError, AttributeError):
        return shown(line, LONGEST)


def _events(handler: logging.Handler) -> logging.Handler:
    handler.setFormatter(JsonLine())
    handler.addFilter(lambda record: hasattr(record, "event"))
    return handler


@contextlib.contextmanager
def _added(*handlers: logging.Handler, level: str = "INFO") -> Iterator[None]:
    """Add the handlers meanwhile, at that level or the logger's own lower one."""
    before = _log.level
    _log.setLevel(min(before or logging.CRITICAL, logging.getLevelName(level)))
    for handler in handlers:
        _log.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            _log.removeHandler(handler)
            if handler is not logging.lastResort:
                handler.close()
        _log.setLevel(before)


def _plain(value: Any) -> Any:
    """``value`` for JSON: numbers that are not finite, and unknown types, become text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, str | int):
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)
