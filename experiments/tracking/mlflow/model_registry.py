"""An exported member as a version of a model in MLflow's registry."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

from ecotone.experiments.printing import markdown
from ecotone.experiments.recipe import algorithm_of
from ecotone.experiments.tracking.mlflow import MlflowSettings
from ecotone.experiments.tracking.mlflow.server import check_store, store_of
from ecotone.experiments.tracking.mlflow.store import ENVIRONMENT, client_of, in_words
from ecotone.experiments.tracking.notes import status
from ecotone.experiments.tracking.protocol import TrackingError
from ecotone.populations.errors import sentence
from ecotone.populations.secrets import clean

_T = TypeVar("_T")

UPLOAD_LIMIT = 2 * 1024**3  # bytes of an export that is uploaded whole


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    Args:
        name: The model's.
        version: The number that MLflow gave it.
        alias: An alias that also loads it, if any.
        uri: The URI by which MLflow loads it.
        uploaded: Whether its weights are in MLflow; otherwise the version's tag ``ecotone.path`` says where they are.
    """

    name: str
    version: str
    alias: str | None
    uri: str
    uploaded: bool


class Registrar:
    """Registers exports of one run. Making it checks that MLflow is there, before any weights are written.

    Args:
        run_dir: The run directory, whose search is in MLflow.
        name: The registered model, which is made if it is not there.
        alias: Points to the new version from now on.
        limit: Exports of more bytes are not uploaded: the version then has the small files and a path to the weights.
        trust: Trust the MLflow server and run that the run directory names, although it bears no mark of this user's.
        notify: Called with a sentence for each thing that is trusted.

    Raises:
        UntrustedError: The run was made elsewhere, and names a server or an MLflow run that is not trusted.
        TrackingError: MLflow is not installed or does not answer, it does not have the run, or the name is refused.
    """

    name: str
    alias: str | None
    limit: int

    def __init__(
        self,
        run_dir: str | Path,
        name: str,
        alias: str | None = None,
        limit: int = UPLOAD_LIMIT,
        *,
        trust: bool = False,
        notify: Callable[[str], object] = lambda text: None,
    ) -> None:
        MlflowSettings.require()
        _check_names(name, alias)
        self.name, self.alias, self.limit = name, alias, limit
        directory = Path(run_dir).resolve()
        known = status(directory, "mlflow")
        if known["run_id"] is None:
            raise TrackingError(
                f"--register: MLflow does not have the run {directory}.", "Send it with `ecotone sync`, then try again."
            )
        check_store(directory, trust, notify, noted_run=True)
        self._run_id = str(known["run_id"])
        self._uri = store_of(directory)
        self._ask(self._check)

    def register(self, path: str | Path) -> Version:
        """Register the model that ``ecotone.experiments.exports.export`` wrote to ``path``.

        Raises:
            TrackingError: MLflow does not take it; the export stays where it is.
        """
        with _patient():
            return self._ask(lambda client: self._register(client, Path(path).resolve()))

    def _ask(self, work: Callable[[Any], _T]) -> _T:
        try:
            return work(client_of(self._uri))
        except TrackingError:
            raise
        except Exception as error:
            raise TrackingError(
                f"--register: MLflow: {sentence(in_words(error, self._uri))}", "Check the tracking server and the name."
            ) from clean(error)

    def _check(self, client: Any) -> None:
        """Refuse early every model that would fail after the weights are written."""
        run = client.get_run(self._run_id)
        if run.info.lifecycle_stage != "active":
            raise TrackingError(
                f"--register: the MLflow run {self._run_id} was deleted.", "Write it anew with `ecotone sync`."
            )

    def _register(self, client: Any, path: Path) -> Version:
        from ecotone.experiments.exports import read_record

        record = read_record(path)
        folder = self._folder(client, f"models/member-{record['member']}")
        size = sum(file.stat().st_size for file in _files(path))
        whole = size <= self.limit
        for file in _files(path):
            if whole or file.suffix != ".safetensors":
                place = file.relative_to(path).parent if path.is_dir() else Path()
                client.log_artifact(self._run_id, str(file), str(Path(folder) / place))
        source = f"{client.get_run(self._run_id).info.artifact_uri.rstrip('/')}/{folder}"
        _make_model(client, self.name)
        made = client.create_model_version(
            self.name, source, run_id=self._run_id, tags=_tags(record, path, size, whole), description=_words(record)
        )
        if self.alias is not None:
            client.set_registered_model_alias(self.name, self.alias, made.version)
        uri = f"models:/{self.name}" + (f"@{self.alias}" if self.alias else f"/{made.version}")
        return Version(self.name, str(made.version), self.alias, uri, whole)

    def _folder(self, client: Any, wanted: str) -> str:
        """A folder among the run's artifacts that no other version has."""
        taken = {file.path for file in client.list_artifacts(self._run_id, "models")}
        numbered = (f"{wanted}-{number}" for number in count(2))
        return next(folder for folder in chain([wanted], numbered) if folder not in taken)


def _check_names(name: str, alias: str | None) -> None:
    """MLflow's rules, before anything is done."""
    if not name.strip() or set(name) & set("/:"):
        raise TrackingError(
            f"--register: expected a name without / and :, found {name!r}.", "As in --register qwen-math-code."
        )
    if alias is not None and (re.fullmatch(r"[\w-]+", alias) is None or re.fullmatch(r"(?i)latest|v\d+", alias)):
        raise TrackingError(
            f"--alias: expected letters, digits, _ and -, and neither 'latest' nor 'v1', found {alias!r}.",
            "As in --alias champion.",
        )


@contextlib.contextmanager
def _patient() -> Iterator[None]:
    """Inside, a request may take minutes, as that of a large file does, unless the user chose a time."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name)
    if before in (None, ENVIRONMENT[name]):
        os.environ[name] = "600"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def _make_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, tags={"ecotone": "true"})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _files(path: Path) -> Iterator[Path]:
    yield from sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _tags(record: dict[str, Any], path: Path, size: int, uploaded: bool) -> dict[str, str]:
    scores = {
        f"{subset}/{name}": f"{value:.6g}"
        for subset, found in record["scores"].items()
        for name, value in (found or {}).items()
    }
    return {
        "ecotone.member": str(record["member"]),
        "ecotone.digest": record["digest"],
        "ecotone.signature": record["signature"],
        "ecotone.path": str(path),
        "ecotone.bytes": str(size),
        "ecotone.uploaded": json.dumps(uploaded),
        "ecotone.scores": json.dumps(scores),
    }


def _words(record: dict[str, Any]) -> str:
    """A sentence for the model's page."""
    lines = [f"Member {record['member']} of the search {record['run']} ({algorithm_of(record['recipe'])})."]
    for subset, found in (("Search data", record["scores"]["search"]), ("Held-out data", record["scores"]["held_out"])):
        if found:
            lines.append(f"{subset}: {', '.join(f'{markdown(name)} {value:.4f}' for name, value in found.items())}.")
    return " ".join(lines)
