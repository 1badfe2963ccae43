"""What a mirror leaves in the run directory: ``tracking.json``, its lock, and its log. Needs no MLflow."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecotone.experiments.tracking.store import TrackingError


@dataclass(frozen=True)
class MirrorReport:
    """What a mirror achieved.

    Args:
        uri: The tracking URI, without credentials.
        experiment_id: MLflow's experiment, or None when MLflow was not reached.
        run_id: MLflow's run, or None when MLflow was not reached.
        evaluations: Evaluations that MLflow shows.
        logged: Metric rows logged this time.
        complete: The search has ended and all of it is in MLflow.
        error: One line that says what went wrong, or None.
    """

    uri: str
    experiment_id: str | None = None
    run_id: str | None = None
    evaluations: int = 0
    logged: int = 0
    complete: bool = False
    error: str | None = None


def status(run_dir: str | Path) -> dict[str, Any]:
    """What is known about the mirroring of a run, without MLflow: read from ``RUN_DIR/tracking.json``.

    Returns:
        ``uri`` (without credentials), ``experiment``, ``experiment_id``, ``run_id``, ``mirrored`` (evaluations that
        MLflow shows), ``complete``, ``error`` (the last one, or None), and ``mirroring`` (a mirror is at work now).
    """
    directory = Path(run_dir).resolve()
    empty = dict.fromkeys(("uri", "experiment", "experiment_id", "run_id", "error"))
    return {**empty, "mirrored": 0, "complete": False, **noted(directory), "mirroring": _being_mirrored(directory)}


def say(text: str) -> None:
    """A line for ``tracking.log``. Not ``logging``: MLflow's migrations reconfigure that for the whole process."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} [{os.getpid()}] {text}", flush=True)


@contextlib.contextmanager
def sole_mirror(directory: Path, patience: float) -> Iterator[bool]:
    """True inside when no other process mirrors this run; waits up to ``patience`` seconds for one to end."""
    try:
        lock = (directory / "tracking.lock").open("a")
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


def _being_mirrored(directory: Path) -> bool:
    with contextlib.suppress(OSError), (directory / "tracking.lock").open("r") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def noted(directory: Path) -> dict[str, Any]:
    """What ``tracking.json`` says; nothing when it is missing or damaged."""
    try:
        known = json.loads((directory / "tracking.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def note(directory: Path, report: MirrorReport, experiment: str | None) -> None:
    """Write ``tracking.json``, whole or not at all. It is for looking at: failing to write it stops nothing."""
    known = {
        "uri": report.uri or None,
        "experiment": experiment,
        "experiment_id": report.experiment_id,
        "run_id": report.run_id,
        "mirrored": report.evaluations,
        "complete": report.complete,
        "error": report.error,
    }
    if known == noted(directory):
        return
    draft = directory / "tracking.json.new"
    try:
        draft.write_text(json.dumps(known, indent=1), encoding="utf-8")
        draft.replace(directory / "tracking.json")
    except OSError as error:
        say(f"tracking.json cannot be written: {error}")
