"""MLflow's stores: where they are, opening them, and their errors in words. MLflow is imported when it is needed."""

from __future__ import annotations

import fcntl
import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ecotone.experiments import marks
from ecotone.experiments.storage import is_url
from ecotone.experiments.tracking.protocol import SILENCE, TrackingError
from ecotone.extras import how_to_install
from ecotone.populations import credentials
from ecotone.populations.errors import sentence, shown
from ecotone.populations.folders import opened as private_file
from ecotone.populations.folders import private, private_folder, tighten
from ecotone.populations.secrets import clean, place

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # A server that is down should say so at once; patience is ours, not each call's.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}

_SCHEMES = (
    *("http", "https", "file", "sqlite", "postgresql", "mysql", "mssql"),
    *("databricks", "databricks-uc", "uc"),
)


EMBEDDED = "mlflow.db"
"""The name of the embedded store beside runs."""


def default_uri(runs_dir: str | Path) -> str:
    """The embedded store of a directory of runs: ``RUNS/mlflow.db``, with artifacts in ``RUNS/mlartifacts``."""
    return f"sqlite:///{Path(runs_dir).resolve() / EMBEDDED}"


def artifacts_of(file: Path) -> Path:
    """The folder of the artifacts of an embedded store."""
    return file.parent / "mlartifacts"


def check_uri(uri: str) -> None:
    """Refuse a tracking URI whose scheme MLflow does not have.

    Raises:
        ValueError: It has not.
    """
    scheme = urlsplit(uri).scheme
    packages = {one.name for one in entry_points(group="mlflow.tracking_store")}
    if len(scheme) > 1 and scheme not in packages and scheme.split("+", 1)[0] not in _SCHEMES:
        raise ValueError(
            f"expected a path, or a URI of {', '.join([*_SCHEMES, *sorted(packages)])}, found {place(uri)!r}"
        )


def absolute_uri(uri: str) -> str:
    """``uri`` with a relative file made absolute, so that it means the same in every working directory."""
    path = sqlite_file(uri)
    if path is not None:
        _, mark, query = uri.partition("?")
        return f"sqlite:///{path.absolute()}{mark}{query}"
    return uri if ":" in uri else str(Path(uri).absolute())


def client_of(uri: str) -> Any:
    """A client of exactly this store, which must exist if it is a file, with the credentials that are kept for it."""
    path = sqlite_file(uri)
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=credentials.whole(uri))


def opened(uri: str) -> Any:
    """A client whose store is ready. An embedded store is made by one process at a time, and appears when whole."""
    path = sqlite_file(uri)
    if path is None:
        return client_of(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    with private_file(path.with_name(path.name + ".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.name == EMBEDDED:  # one that the user named may be shared
            tighten([path, artifacts_of(path)])
        if not path.is_file():
            draft = path.with_name(path.name + ".new")
            draft.unlink(missing_ok=True)
            private(draft)
            private_folder(artifacts_of(path))
            client_of(f"sqlite:///{draft}").search_experiments(max_results=1)
            draft.replace(path)
        client = client_of(uri)
        client.search_experiments(max_results=1)
    return client


def known_run(client: Any, run_id: str | None) -> Any:
    """The run of that id, or None when it is unknown or was deleted."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def sqlite_file(uri: str) -> Path | None:
    """The file of an embedded store; None for any other."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def in_words(error: BaseException, uri: str) -> str:
    """One line about an error, for the user."""
    text = shown(" ".join(str(error).split())) or type(error).__name__
    if isinstance(error, ImportError):
        return f"MLflow cannot be imported ({text}): `{how_to_install('mlflow')}`"
    if any(sign in text for sign in ("Max retries exceeded", "Connection refused", "timed out", "Connection aborted")):
        return f"the tracking server at {urlsplit(uri).hostname or place(uri)} {SILENCE}"
    return text if len(text) <= 300 else f"{text[:297]}..."


def find_run_dir(run_id: str, uri: str) -> str | Path:
    """The run directory of an MLflow run, a path or a URL, by its tag ``ecotone.run_dir``.

    A URL is taken only with this user's mark: whoever can write to the MLflow server chooses it.

    Raises:
        TrackingError: MLflow does not answer or has no such run, or it is not one of Ecotone's, its directory is gone,
            or it is a URL without this user's mark.
    """
    store = absolute_uri(uri)
    try:
        tags = client_of(store).get_run(run_id).data.tags
    except Exception as error:
        raise TrackingError(
            f"MLflow run {run_id}: {sentence(in_words(error, store))}",
            "Check the id and the tracking URI, or give the run directory.",
        ) from clean(error)
    if "ecotone.run_dir" not in tags:
        raise TrackingError(f"MLflow run {run_id} was not made by Ecotone (no tag ecotone.run_dir).")
    if is_url(tags["ecotone.run_dir"]):
        url = str(tags["ecotone.run_dir"])
        if not marks.is_marked("mlflow", url, tags.get("ecotone.mark")):
            raise TrackingError(
                f"MLflow run {run_id}: it names the URL {url!r} without a mark of yours, so nothing is fetched there.",
                "If you trust that place, give the URL itself.",
            )
        return url
    directory = Path(tags["ecotone.run_dir"])
    if not (directory / "journal.sqlite").is_file():
        raise TrackingError(
            f"MLflow run {run_id}: its run directory {directory} is not there.", "Give the directory it was moved to."
        )
    return directory
