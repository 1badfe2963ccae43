"""Mirroring a run: once, or while its search goes on, in a process of its own for each tracker.

A tracker that hangs holds up its own process alone, and neither the search nor the other trackers.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import ecotone
from ecotone.experiments.gate import sendable
from ecotone.experiments.tracking.mirroring import Mirror
from ecotone.experiments.tracking.notes import MirrorReport, note, noted, own_notes, say, sole_mirror, status
from ecotone.experiments.tracking.protocol import SILENCE, Memory, TrackerSettings
from ecotone.experiments.tracking.registry import TRACKERS
from ecotone.experiments.tracking.subject import DEFAULT, Subject, state_of, trackers_of
from ecotone.experiments.trust import UntrustedError
from ecotone.experiments.words import explained
from ecotone.populations import credentials, facts
from ecotone.populations.errors import EcotoneError, InputError, JournalError, first_line
from ecotone.populations.folders import opened
from ecotone.populations.journal import Journal
from ecotone.populations.secrets import Sieve, hook, stripped, traceback_of

_WAIT = "Wait until it has ended; `ecotone status` shows what it has sent."
_BACK = "Nothing is lost: try again when it is back."
_MEND = "Nothing is lost: mend that, then try again."
_HANDOVER = 5.0  # seconds that a mirror waits for another one of the same run to end
FINAL_STATES = ("finished", "failed", "interrupted")


def mirror(
    run_dir: str | Path,
    tracker: str = DEFAULT,
    changes: Mapping[str, Any] | None = None,
    patience: float = 5.0,
    *,
    trust: bool = False,
) -> MirrorReport:
    """Log everything in the journal of ``run_dir`` that a tracker does not have yet.

    Args:
        run_dir: The run directory.
        tracker: The tracker's name.
        changes: Settings of the tracker that replace the journal's.
        patience: Seconds to wait for another mirror of this run to end.
        trust: Trust the places that the run names, although it bears no mark of this user's.

    Returns:
        What was done. A tracker that is down is an ``error`` in it, not an exception.

    Raises:
        UntrustedError: The run was made elsewhere, and names servers or folders that are not trusted.
        JournalError: There is no journal in ``run_dir``, or it cannot be read.
        InputError: There is no such tracker, or the settings are not its own.
    """
    directory = Path(run_dir).resolve()
    sendable(directory, str(run_dir), trust, given=[f"tracking.{name}" for name in changes or ()])
    settings = settings_of(directory, tracker, changes)
    with sole_mirror(directory, tracker, patience) as alone:
        if not alone:
            busy = "another process is mirroring this run"
            return MirrorReport(settings.place(directory), error=busy, remedy=_WAIT)
        with contextlib.closing(Attempts(directory, tracker, settings)) as attempts:
            return attempts.once(live=False)


def mirror_all(
    run_dir: str | Path,
    trackers: Sequence[str] = (),
    *,
    trust: bool = False,
    notify: Callable[[str], None] = lambda text: None,
) -> dict[str, MirrorReport]:
    """Mirror a run to each of the ``trackers``; reports by name. By default to the run's trackers, or else to MLflow.

    What goes wrong with one is in its report, and keeps nothing from the others.

    Args:
        run_dir: The run directory.
        trackers: Names of trackers.
        trust: As for ``mirror``.
        notify: Called with a sentence for each place that is trusted.

    Raises:
        UntrustedError: As for ``mirror``.
        InputError: One of ``trackers`` is neither a tracker nor one of the run's.
    """
    directory = Path(run_dir).resolve()
    sendable(directory, str(run_dir), trust, notify)
    on = chosen(directory)
    for name in trackers:
        if name not in on:
            TRACKERS.get(name, "tracker")
    return {name: _mirrored(directory, name, trust) for name in trackers or on or (DEFAULT,)}


def _mirrored(directory: Path, tracker: str, trust: bool) -> MirrorReport:
    try:
        return mirror(directory, tracker, trust=trust)
    except UntrustedError:
        raise
    except InputError as error:
        return MirrorReport("", error=error.message, remedy=error.remedy)


def chosen(directory: Path) -> tuple[str, ...]:
    """The trackers that a run is mirrored to."""
    with Journal.open(directory / "journal.sqlite") as journal:
        return tuple(trackers_of(journal))


def settings_of(directory: Path, tracker: str, changes: Mapping[str, Any] | None = None) -> TrackerSettings:
    """The settings of a tracker as the journal has them. For a tracker that was off, the settings of the recipe."""
    kind = _kind(tracker)
    with Journal.open(directory / "journal.sqlite") as journal:
        on, recipe = trackers_of(journal), journal.fact(facts.RECIPE) or {}
    beside = recipe.get("tracking", {}) if tracker == DEFAULT else {}
    given = on.get(tracker, {key: value for key, value in beside.items() if key in kind.model_fields})
    try:
        settings = kind.model_validate(credentials.restored({**given, **(changes or {})}))
    except ValidationError as error:
        place = "tracking" if tracker == DEFAULT else f"tracking.{tracker}"
        line = f"{place}.{explained(error, kind).splitlines()[0]}"
        change = f"`ecotone resume {directory} --set {line.split(':', 1)[0]}=VALUE`"
        raise InputError(line, f"Change it: {change}.") from error
    return settings if tracker in on else settings.recorded()


def _kind(tracker: str) -> type[TrackerSettings]:
    """The kind of a tracker that a run is mirrored to, or may be.

    Raises:
        InputError: No package has it any longer, or it cannot be used.
    """
    if tracker not in TRACKERS:
        raise InputError(
            f"tracking.{tracker}: no installed package has this tracker.", "Install the package that has it."
        )
    return TRACKERS.get(tracker, f"tracking.{tracker}")


def start(run_dir: str | Path, pid: int, tracker: str = DEFAULT) -> subprocess.Popen[bytes]:
    """Start mirroring the run that process ``pid`` writes, in a process that a Ctrl-C in the terminal does not reach.

    Its output goes to ``RUN_DIR/tracking.log``. Whoever starts it has made sure that the run may be mirrored.

    Raises:
        TrackingError: The tracker is not installed.
    """
    _kind(tracker).require()
    directory = Path(run_dir).resolve()
    # Not `-m`: a folder named `ecotone` in the user's working directory would be imported instead of this one.
    launch = (
        "import sys; sys.path[0] = sys.argv.pop(1); from ecotone.experiments.tracking import main; sys.exit(main())"
    )
    root = str(Path(str(ecotone.__file__)).resolve().parents[1])
    with opened(directory / "tracking.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", launch, root, str(directory), "--tracker", tracker, "--follow", str(pid), "--trust"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **credentials.unkept(), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )


def wait(
    process: subprocess.Popen[bytes], seconds: float, run_dir: str | Path | None = None, tracker: str = DEFAULT
) -> bool:
    """Wait at most ``seconds`` for a mirror made by ``start``; True when it has ended. It is left running otherwise.

    With ``run_dir``, waiting ends as soon as the mirror says that its tracker fails: one that is down delays nothing.
    """
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if run_dir is not None and status(run_dir, tracker)["error"] is not None:
            break
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(0.2, seconds))
    return process.poll() is not None


class Attempts:
    """Attempts to mirror a run to one tracker; they keep the record while it is good, and ``tracking.json`` true.

    Args:
        directory: The run directory.
        tracker: The tracker's name.
        settings: The tracker's settings; None for the journal's, once it is there.
    """

    trace: str

    def __init__(self, directory: Path, tracker: str, settings: TrackerSettings | None = None) -> None:
        self.directory = directory
        self.tracker = tracker
        self.trace = ""  # of the last failure
        self._settings = settings
        self._mirror: Mirror | None = None

    def once(self, live: bool) -> MirrorReport:
        """Mirror all that is new. ``live`` is true while the search's process runs."""
        complete, failure, remedy, mirror = False, None, "", None
        try:
            with Journal.open(self.directory / "journal.sqlite") as journal:
                mirror = self._mirror = self._mirror or self._opened(journal)
                complete = mirror.advance(journal, state_of(journal, live))
        except Exception as error:  # whatever it is, the journal has it all and the next attempt starts afresh
            mirror = self._mirror
            failure = stripped(self._settings.in_words(error)) if self._settings else first_line(error)
            if not (isinstance(error, EcotoneError) and error.remedy):  # which its words have
                remedy = _BACK if failure.endswith(SILENCE) else _MEND
            self.trace = "" if failure.endswith(SILENCE) else traceback_of(error)
        report, more = self._report(mirror, complete, failure)
        if failure is not None:
            self.close()
        note(self.directory, self.tracker, report, more)
        return replace(report, remedy=remedy)

    def close(self) -> None:
        """Let go of the tracker."""
        mirror, self._mirror = self._mirror, None
        if mirror is not None:
            try:
                mirror.record.close()
            except Exception as error:
                say(f"{self.tracker}: {first_line(error)}")

    def _opened(self, journal: Journal) -> Mirror:
        settings = self._settings = self._settings or settings_of(self.directory, self.tracker)
        subject = Subject.of(journal, self.directory)
        known = own_notes(self.directory, self.tracker)
        memory: Memory = {"run_id": known.get("run_id"), **(known.get("memory") or {})}
        here = known.get("uri") == settings.place(self.directory)
        return Mirror(subject, settings.open(subject, self.directory, memory if here else {}))

    def _report(
        self, mirror: Mirror | None, complete: bool, failure: str | None
    ) -> tuple[MirrorReport, dict[str, Any]]:
        """The report and the values noted beside it. Of a tracker that was not reached, the earlier values."""
        known = noted(self.directory, self.tracker)
        uri = self._settings.place(self.directory) if self._settings else str(known.get("uri") or "")
        if mirror is not None:
            record = mirror.record
            report = MirrorReport(
                uri, record.experiment_id, record.run_id, record.cursor, record.logged, complete, failure
            )
            more = {"experiment": record.experiment, "page": record.page, "memory": record.memory()}
            return report, {key: value for key, value in more.items() if value}
        if known.get("uri") != uri:
            return MirrorReport(uri, error=failure), {}
        report = MirrorReport(
            uri, known.get("experiment_id"), known.get("run_id"), known.get("mirrored", 0), error=failure
        )
        return report, {key: known[key] for key in ("experiment", "page", "memory") if key in known}


def follow(
    run_dir: str | Path,
    pid: int,
    poll: float = 1.0,
    patience: float = 30.0,
    stop: threading.Event | None = None,
    tracker: str = DEFAULT,
) -> MirrorReport | None:
    """Mirror a run while it goes on, and until the tracker has all of it.

    Args:
        run_dir: The run directory; its journal may yet have to appear.
        pid: The process that runs the search. Whoever else writes the journal later is followed too.
        poll: Seconds between two looks at the journal.
        patience: Seconds to keep trying after the search's end when the tracker fails.
        stop: When set, the mirror ends after the batch at hand.
        tracker: The tracker's name.

    Returns:
        The last report, or None when another process is mirroring this run already.
    """
    directory = Path(run_dir).resolve()
    stop = stop or threading.Event()
    birth = _birth(pid)
    with sole_mirror(directory, tracker, _HANDOVER) as alone:
        if not alone:
            return None
        with contextlib.closing(Attempts(directory, tracker)) as attempts:
            return _followed(attempts, lambda: _birth(pid) == birth is not None, poll, patience, stop)


def _followed(
    attempts: Attempts, alive: Callable[[], bool], poll: float, patience: float, stop: threading.Event
) -> MirrorReport:
    report = MirrorReport("")
    delay = due = 0.0
    deadline = math.inf
    while True:
        over = _is_over(attempts.directory, alive)
        if not over:
            deadline = math.inf
        elif deadline == math.inf:
            deadline, due, delay = time.monotonic() + patience, 0.0, 0.0
        if time.monotonic() >= due:
            report = _told(attempts.tracker, attempts.once(live=not over), report, attempts.trace)
            if report.complete:
                return report
            delay = 0.0 if report.error is None else min(max(1.0, 2 * delay), 5.0 if over else 30.0)
            due = time.monotonic() + delay
        if stop.is_set() or time.monotonic() >= deadline:
            return report
        stop.wait(poll)


def _told(tracker: str, report: MirrorReport, before: MirrorReport, trace: str) -> MirrorReport:
    """Log the changes between two reports."""
    if report.error is not None and report.error != before.error:
        say(f"{tracker}: {report.error}; trying again\n{trace}".rstrip())
    if report.error is None and (before.error is not None or report.run_id != before.run_id):
        say(f"{tracker}: run {report.run_id} of experiment {report.experiment_id} at {report.uri}")
    if report.complete:
        say(f"{tracker}: complete: {report.evaluations} evaluations")
    return report


def _is_over(directory: Path, alive: Callable[[], bool]) -> bool:
    """True when the search has ended, or nobody is left to end it."""
    there = alive()  # before the journal is looked at: what a process that is gone wrote is there to be seen
    try:
        with Journal.open(directory / "journal.sqlite") as journal:
            return (journal.fact(facts.STATE) or "running") in FINAL_STATES or not (there or journal.in_use)
    except JournalError:
        return not there


def _birth(pid: int) -> str | None:
    """A text that tells a process from a later process with the same number; None when the process is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else _signalled(pid)
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _signalled(pid: int) -> str | None:
    """The same where there is no /proc: any process with that number will do."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "there"


def main(arguments: Sequence[str] | None = None) -> int:
    """Mirror a run directory: once, or while a process runs it. Returns 0 when the tracker has all of it."""
    parser = argparse.ArgumentParser(prog="python -m ecotone.experiments.tracking", description=main.__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--tracker", default=DEFAULT, help="where to")
    parser.add_argument("--follow", type=int, metavar="PID", help="go on until the search of this process has ended")
    parser.add_argument("--poll", type=float, default=1.0, help="seconds between two looks at the journal")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds to keep trying after the search's end")
    parser.add_argument("--trust", action="store_true", help="trust the places that a run made elsewhere names")
    options = parser.parse_args(arguments)
    hook()
    with contextlib.suppress(OSError):
        os.nice(10)
    stop = threading.Event()
    handlers = [
        (number, signal.signal(number, lambda *_: stop.set()) or signal.SIG_DFL)
        for number in (signal.SIGTERM, signal.SIGINT)
    ]
    # What other packages print goes into tracking.log, too.
    out, err = contextlib.redirect_stdout(Sieve(sys.stdout)), contextlib.redirect_stderr(Sieve(sys.stderr))
    try:
        with out, err:
            if options.follow is None:
                report: MirrorReport | None = mirror(options.run_dir, options.tracker, trust=options.trust)
            else:
                if not options.trust:
                    sendable(options.run_dir, str(options.run_dir), trust=False)
                report = follow(options.run_dir, options.follow, options.poll, options.patience, stop, options.tracker)
    except EcotoneError as error:
        say(str(error))
        return 1
    finally:
        for number, before in handlers:
            signal.signal(number, before)
    return 0 if report is None or report.error is None else 1
