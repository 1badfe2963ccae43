"""Mirroring a run: once, or while its search goes on, in a process of its own."""

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
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import ecotone
from ecotone.experiments.tracking.mirrored_run import MirroredRun
from ecotone.experiments.tracking.notes import MirrorReport, note, noted, say, sole_mirror, status
from ecotone.experiments.tracking.store import SILENCE, in_words, require_mlflow
from ecotone.experiments.tracking.target import Target, state_of
from ecotone.populations import facts
from ecotone.populations.errors import EcotoneError, JournalError
from ecotone.populations.journal import Journal

_HANDOVER = 5.0  # seconds that a mirror waits for another one of the same run to end
FINAL_STATES = ("finished", "failed", "interrupted")


def mirror(
    run_dir: str | Path, uri: str | None = None, experiment: str | None = None, patience: float = 5.0
) -> MirrorReport:
    """Log everything in the journal of ``run_dir`` that MLflow does not have yet.

    Args:
        run_dir: The run directory.
        uri: The tracking URI; the journal's own when None.
        experiment: The name of the experiment; the journal's own when None.
        patience: Seconds to wait for another mirror of this run to end.

    Returns:
        What was done. A tracking server that is down is an ``error`` in it, not an exception.

    Raises:
        JournalError: There is no journal in ``run_dir``, or it cannot be read.
    """
    directory = Path(run_dir).resolve()
    with Journal.open(directory / "journal.sqlite") as journal:
        shown_uri = Target.of(journal, directory, uri, experiment).shown_uri
    with sole_mirror(directory, patience) as alone:
        if not alone:
            return MirrorReport(shown_uri, error="another process is mirroring this run")
        return Attempts(directory, uri, experiment).once(live=False)


def start(run_dir: str | Path, pid: int) -> subprocess.Popen[bytes]:
    """Start mirroring the run that process ``pid`` writes, in a process that a Ctrl-C in the terminal does not reach.

    Its output goes to ``RUN_DIR/tracking.log``.

    Raises:
        TrackingError: MLflow is not installed.
    """
    require_mlflow()
    directory = Path(run_dir).resolve()
    # Not `-m`: a folder named `ecotone` in the user's working directory would be imported instead of this one.
    launch = (
        "import sys; sys.path[0] = sys.argv.pop(1); from ecotone.experiments.tracking import main; sys.exit(main())"
    )
    root = str(Path(str(ecotone.__file__)).resolve().parents[1])
    with (directory / "tracking.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", launch, root, str(directory), "--follow", str(pid)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )


def wait(process: subprocess.Popen[bytes], seconds: float, run_dir: str | Path | None = None) -> bool:
    """Wait at most ``seconds`` for a mirror made by ``start``; True when it has ended. It is left running otherwise.

    With ``run_dir``, waiting ends as soon as the mirror says that MLflow fails: a server that is down delays nothing.
    """
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if run_dir is not None and status(run_dir)["error"] is not None:
            break
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(0.2, seconds))
    return process.poll() is not None


class Attempts:
    """Attempts to mirror a run, keeping the connection while it is good and ``tracking.json`` up to date."""

    def __init__(self, directory: Path, uri: str | None = None, experiment: str | None = None) -> None:
        self.directory = directory
        self._wanted = (uri, experiment)
        self._mirror: MirroredRun | None = None
        self.trace = ""  # of the last failure

    def once(self, live: bool) -> MirrorReport:
        """Mirror what is new; ``live`` says that the search's process is there."""
        target, mirror, complete, failure = None, self._mirror, False, None
        try:
            with Journal.open(self.directory / "journal.sqlite") as journal:
                if mirror is None:
                    target = Target.of(journal, self.directory, *self._wanted)
                    mirror = self._mirror = MirroredRun(target, self._known_run_id(target))
                complete = mirror.advance(journal, state_of(journal, live))
        except Exception as error:  # whatever it is, the journal has it all and the next attempt starts afresh
            self._mirror = None
            failure = in_words(error, target.uri if target else "")
            self.trace = "" if failure.endswith(SILENCE) else traceback.format_exc()
        report = self._report(mirror, target, complete, failure)
        target = mirror.target if mirror else target
        note(self.directory, report, target.experiment if target else None)
        return report

    def _known_run_id(self, target: Target) -> str | None:
        known = noted(self.directory)
        return known.get("run_id") if known.get("uri") == target.shown_uri else None

    def _report(
        self, mirror: MirroredRun | None, target: Target | None, complete: bool, failure: str | None
    ) -> MirrorReport:
        if mirror is not None:
            uri = mirror.target.shown_uri
            return MirrorReport(
                uri, mirror.experiment_id, mirror.run_id, mirror.cursor, mirror.logged, complete, failure
            )
        known = noted(self.directory)
        uri = target.shown_uri if target else str(known.get("uri") or "")
        if known.get("uri") != uri:
            return MirrorReport(uri, error=failure)
        return MirrorReport(
            uri, known.get("experiment_id"), known.get("run_id"), known.get("mirrored", 0), error=failure
        )


def follow(
    run_dir: str | Path, pid: int, poll: float = 1.0, patience: float = 30.0, stop: threading.Event | None = None
) -> MirrorReport | None:
    """Mirror a run while it goes on, and until all of it is in MLflow.

    Args:
        run_dir: The run directory; its journal may yet have to appear.
        pid: The process that runs the search. Whoever else writes the journal later is followed too.
        poll: Seconds between two looks at the journal.
        patience: Seconds to keep trying after the search's end when MLflow fails.
        stop: When set, the mirror ends after the batch at hand.

    Returns:
        The last report, or None when another process is mirroring this run already.
    """
    directory = Path(run_dir).resolve()
    stop = stop or threading.Event()
    birth = _birth(pid)
    with sole_mirror(directory, _HANDOVER) as alone:
        if not alone:
            return None
        return _followed(Attempts(directory), lambda: _birth(pid) == birth is not None, poll, patience, stop)


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
            report = _told(attempts.once(live=not over), report, attempts.trace)
            if report.complete:
                return report
            delay = 0.0 if report.error is None else min(max(1.0, 2 * delay), 5.0 if over else 30.0)
            due = time.monotonic() + delay
        if stop.is_set() or time.monotonic() >= deadline:
            return report
        stop.wait(poll)


def _told(report: MirrorReport, before: MirrorReport, trace: str) -> MirrorReport:
    """Say what changed between two reports."""
    if report.error is not None and report.error != before.error:
        say(f"{report.error}; trying again\n{trace}".rstrip())
    if report.error is None and (before.error is not None or report.run_id != before.run_id):
        say(f"run {report.run_id} of experiment {report.experiment_id} at {report.uri}")
    if report.complete:
        say(f"complete: {report.evaluations} evaluations")
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
    """What tells a process from a later one with the same number; None when it is gone."""
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
    """Mirror a run directory: once, or while a process runs it. Returns 0 when all of it is in MLflow."""
    parser = argparse.ArgumentParser(prog="python -m ecotone.experiments.tracking", description=main.__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--follow", type=int, metavar="PID", help="go on until the search of this process has ended")
    parser.add_argument("--poll", type=float, default=1.0, help="seconds between two looks at the journal")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds to keep trying after the search's end")
    options = parser.parse_args(arguments)
    with contextlib.suppress(OSError):
        os.nice(10)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        if options.follow is None:
            report: MirrorReport | None = mirror(options.run_dir)
        else:
            report = follow(options.run_dir, options.follow, options.poll, options.patience, stop)
    except EcotoneError as error:
        say(str(error))
        return 1
    return 0 if report is None or report.error is None else 1
