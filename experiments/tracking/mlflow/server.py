"""MLflow's pages of a run: where they are, and serving them for an embedded store."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecotone.experiments import gate
from ecotone.experiments.tracking.following import settings_of, wait
from ecotone.experiments.tracking.mlflow import MlflowSettings
from ecotone.experiments.tracking.mlflow.store import ENVIRONMENT, artifacts_of, sqlite_file
from ecotone.experiments.tracking.mlflow.view import view_address, view_key
from ecotone.experiments.tracking.notes import status
from ecotone.experiments.tracking.protocol import TrackingError
from ecotone.experiments.tracking.subject import Subject
from ecotone.populations import credentials
from ecotone.populations.folders import opened, private_folder
from ecotone.populations.journal import Journal

_LAST_WORDS = "Its output is in ui.log of the run directory."


@dataclass(frozen=True)
class Pages:
    """The pages on which a server shows a run.

    Args:
        view: The charts of the experiment, in which the fronts of all its searches lie over each other.
        run: The run alone; the server's first page when MLflow does not have it yet.
    """

    view: str
    run: str


def ui_pages(run_dir: str | Path) -> Pages | None:
    """The pages of the run on its tracking server, or None for an embedded store, which ``serve`` must serve first."""
    directory = Path(run_dir).resolve()
    known = status(directory, "mlflow")
    if not str(known["uri"]).startswith(("http://", "https://")):
        return None
    return _pages(str(known["uri"]), directory, known)


def serve(
    run_dir: str | Path,
    port: int = 5000,
    open_browser: bool = False,
    say: Callable[[str], object] = print,
    *,
    trust: bool = False,
) -> None:
    """Say where MLflow shows the run; for an embedded store, serve it on the loopback interface until Ctrl-C.

    Args:
        run_dir: The run directory.
        port: The port of the server for an embedded store; 0 takes a free port.
        open_browser: Also open the view of the experiment's fronts.
        say: Takes each line for the user.
        trust: Trust the servers and stores that the run names, although it bears no mark of this user's.

    Raises:
        UntrustedError: The run was made elsewhere, and names a server or store that is not trusted.
        TrackingError: Nothing was mirrored yet, the port is in use, or MLflow does not start.
    """
    directory = Path(run_dir).resolve()
    known = status(directory, "mlflow")
    if known["uri"] is None:
        raise TrackingError(f"{directory}: nothing of it is in MLflow yet.", "Start the run, or `ecotone sync` it.")
    check_store(directory, trust, say)
    pages = ui_pages(directory)
    if pages is not None:
        _show(pages, open_browser, say)
        return
    MlflowSettings.require()
    chosen = free_port(port)
    with _terminable():
        say("Starting MLflow, which takes some seconds ...")
        process = serving(store_of(directory), directory, chosen)
        try:
            await_answer(process, chosen)
            _show(_pages(f"http://127.0.0.1:{chosen}", directory, known), open_browser, say)
            say("Ctrl-C stops the server.")
            process.wait()
        except KeyboardInterrupt:
            return
        finally:
            stop(process)
    raise TrackingError(f"`mlflow server` ended with code {process.returncode}.", _LAST_WORDS)


def _pages(base: str, directory: Path, known: Mapping[str, Any]) -> Pages:
    base, experiment = base.rstrip("/"), known["experiment_id"]
    if known["run_id"] is None:
        return Pages(base, base)
    with Journal.open(directory / "journal.sqlite") as journal:
        goals = Subject.of(journal, directory).goals
    return Pages(
        view_address(base, experiment, view_key(goals)), f"{base}/#/experiments/{experiment}/runs/{known['run_id']}"
    )


def _show(pages: Pages, open_browser: bool, say: Callable[[str], object]) -> None:
    say(f"All fronts:  {pages.view}")
    say(f"This search: {pages.run}")
    if open_browser:
        webbrowser.open(pages.view)


def free_port(port: int) -> int:
    """``port`` itself if nobody listens there; a free one for 0.

    Raises:
        TrackingError: It is in use.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise TrackingError(f"port {port} of 127.0.0.1 is in use.", "Choose another with --port.") from error
        return int(probe.getsockname()[1])


def serving(uri: str, directory: Path, port: int) -> subprocess.Popen[bytes]:
    """Start MLflow's server for the store ``uri``; its output goes to ``RUN_DIR/ui.log``."""
    file = sqlite_file(uri)
    artifacts = private_folder(artifacts_of(directory if file is None else file))
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", str(artifacts)]
    store = {"MLFLOW_BACKEND_STORE_URI": credentials.whole(uri)}  # others may read arguments, not the environment
    with opened(directory / "ui.log", "wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=directory,
            start_new_session=True,
            env={**os.environ, **ENVIRONMENT, **store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )


def store_of(directory: Path) -> str:
    """The URI of the store that a run was mirrored to."""
    known = str(status(directory, "mlflow")["uri"])
    settings = settings_of(directory, "mlflow")
    assert isinstance(settings, MlflowSettings)
    return settings.store(directory) if settings.place(directory) == known else known


def check_store(directory: Path, trust: bool, say: Callable[[str], object], noted_run: bool = False) -> None:
    """Make sure that the store of a run is one that this user chose, or trusts.

    Args:
        directory: The run directory.
        trust: Whether the user trusts whatever the run names.
        say: Takes each line about what is trusted.
        noted_run: Whether also the MLflow run, and not the store alone, must be one that this user's mirror noted.

    Raises:
        UntrustedError: It is not.
    """

    def notify(text: str) -> None:
        say(text)

    gate.sendable(directory, str(directory), trust, notify)
    settings = settings_of(directory, "mlflow")
    gate.check_notes(directory, str(directory), "" if noted_run else settings.place(directory), trust, notify)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM is answered like Ctrl-C, so that a server is not left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def await_answer(process: subprocess.Popen[bytes], port: int, seconds: float = 180.0) -> None:
    """Return when the server answers.

    Raises:
        TrackingError: It has ended, or does not answer in time.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise TrackingError("`mlflow server` ended at once.", _LAST_WORDS)
        try:
            with opener.open(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise TrackingError(f"`mlflow server` did not answer within {seconds:.0f} s.", _LAST_WORDS)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and the workers it started, all of its process group."""
    for order, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, order)
        if wait(process, seconds):
            return
