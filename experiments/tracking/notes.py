"""The files that mirrors leave in the run directory: ``tracking.json``, locks, and their log. Needs no tracker."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecotone.experiments import marks
from ecotone.experiments.stored import fitting, is_count, is_text
from ecotone.experiments.tracking.protocol import Memory, TrackingError
from ecotone.experiments.tracking.subject import DEFAULT, trackers_of
from ecotone.populations.errors import JournalError, shown
from ecotone.populations.folders import opened, write_private
from ecotone.populations.journal import Journal
from ecotone.populations.parsing import file_bytes, json_object
from ecotone.populations.secrets import plain, without

_NOTES = "tracking.json"
_TRACKER = re.compile(r"\w[\w.-]*")
_FIELDS = {
    **dict.fromkeys(
        ("uri", "experiment", "experiment_id", "run_id", "page", "error"), lambda value: value is None or is_text(value)
    ),
    "mirrored": is_count,
    "complete": lambda value: isinstance(value, bool),
    "memory": lambda value: value is None or isinstance(value, dict),
}
"""What the notes on a tracker may hold."""
_OLD = "run_id"  # a key of the notes as they were when there was one tracker


@dataclass(frozen=True)
class MirrorReport:
    """The result of mirroring a run.

    Args:
        uri: The address of the run, without credentials.
        experiment_id: The tracker's experiment or project, or None when the tracker was not reached.
        run_id: The tracker's run, or None when the tracker was not reached.
        evaluations: Evaluations that the tracker shows.
        logged: Metric values logged this time.
        complete: Whether the search has ended and the tracker has all of it.
        error: One line that says what went wrong, or None.
        remedy: What the user can do about the error; empty where the error says it, or there is none.
    """

    uri: str
    experiment_id: str | None = None
    run_id: str | None = None
    evaluations: int = 0
    logged: int = 0
    complete: bool = False
    error: str | None = None
    remedy: str = ""


def status(run_dir: str | Path, tracker: str = DEFAULT) -> dict[str, Any]:
    """The state of the mirroring of a run, read from ``RUN_DIR/tracking.json``. Needs no tracker.

    Returns:
        ``uri`` (without credentials), ``experiment``, ``experiment_id``, ``run_id``, ``page`` (where people see it),
        ``mirrored`` (evaluations that the tracker shows), ``complete``, ``error`` (the last one, or None), and
        ``mirroring`` (a mirror is at work now).
    """
    directory = Path(run_dir).resolve()
    known = noted(directory, tracker)
    known.pop("memory", None)
    known.pop("mark", None)
    empty = dict.fromkeys(("uri", "experiment", "experiment_id", "run_id", "page", "error"))
    at_work = _being_mirrored(directory, tracker)
    return {**empty, "mirrored": 0, "complete": False, **known, "mirroring": at_work}


def statuses(run_dir: str | Path) -> dict[str, dict[str, Any]]:
    """``status`` of each tracker that a run is mirrored to, or was, by name."""
    directory = Path(run_dir).resolve()
    chosen: list[str] = []
    with contextlib.suppress(JournalError), Journal.open(directory / "journal.sqlite") as journal:
        chosen += trackers_of(journal)
    return {name: status(directory, name) for name in dict.fromkeys([*chosen, *_all_notes(directory)])}


def say(text: str) -> None:
    """A line for ``tracking.log``. Not ``logging``: MLflow's migrations reconfigure that for the whole process."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} [{os.getpid()}] {shown(text)}", flush=True)


@contextlib.contextmanager
def sole_mirror(directory: Path, tracker: str, patience: float) -> Iterator[bool]:
    """True inside when no other process mirrors this run to the tracker; waits up to ``patience`` seconds for one."""
    try:
        lock = opened(_lock_file(directory, tracker), "a")
    except OSError as error:
        raise TrackingError(f"{directory}: cannot be written ({error.strerror}).") from error
    with lock:
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < end:
                    time.sleep(0.1)
                    continue
                yield False
                return
            break
        yield True


def _lock_file(directory: Path, tracker: str) -> Path:
    return directory / f"tracking-{tracker}.lock"


def _being_mirrored(directory: Path, tracker: str) -> bool:
    with contextlib.suppress(OSError), _lock_file(directory, tracker).open("r") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def noted(directory: Path, tracker: str) -> dict[str, Any]:
    """The notes on a tracker in ``tracking.json``; empty when that file is missing or damaged."""
    known = _all_notes(directory).get(tracker)
    return fitting(known, _FIELDS) if isinstance(known, dict) else {}


def own_notes(directory: Path, tracker: str) -> dict[str, Any]:
    """The notes on a tracker that this user's mirrors wrote, for going on where they stood; else none.

    Others' notes would lead into runs and stores of another's choice.
    """
    known = noted(directory, tracker)
    return known if marks.is_marked("tracking", _marked_part(tracker, known), known.get("mark")) else {}


def _marked_part(tracker: str, known: Mapping[str, Any]) -> dict[str, Any]:
    return {"tracker": tracker, **{key: known.get(key) for key in ("uri", "experiment_id", "run_id", "memory")}}


def _all_notes(directory: Path) -> dict[str, Any]:
    """The notes of each tracker, by name."""
    try:
        known = json_object(file_bytes(directory / _NOTES))
    except (OSError, ValueError):
        return {}
    if _OLD in known:
        return {DEFAULT: known}
    return {name: one for name, one in known.items() if _TRACKER.fullmatch(name)}


def note(directory: Path, tracker: str, report: MirrorReport, more: Memory) -> None:
    """Write the notes on a tracker into ``tracking.json``, whole or not at all.

    Failing to write it stops nothing: it is for looking at, and what a tracker remembers in it only saves work.

    Args:
        directory: The run directory.
        tracker: The tracker's name.
        report: The result of its mirror.
        more: ``experiment``, ``page`` and ``memory``.
    """
    known: dict[str, Any] = {
        "uri": report.uri or None,
        "experiment_id": report.experiment_id,
        "run_id": report.run_id,
        "mirrored": report.evaluations,
        "complete": report.complete,
        "error": report.error,
        **more,
    }
    known = {**without(known), **({"memory": plain(more["memory"])} if "memory" in more else {})}
    mark = marks.mark_of("tracking", _marked_part(tracker, known))
    known |= {} if mark is None else {"mark": mark}
    if known == noted(directory, tracker):
        return
    try:
        with opened(directory / "tracking.lock", "a") as lock:  # mirrors of several trackers share the file
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_private(directory / _NOTES, json.dumps(_all_notes(directory) | {tracker: known}, indent=1).encode())
    except OSError as error:
        say(f"{_NOTES} cannot be written: {error}")
