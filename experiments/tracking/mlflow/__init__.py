"""MLflow, the default tracker: one MLflow run a search, and a view of charts in which the fronts of searches lie.

Where to go on is asked of MLflow itself: the metric ``evaluations`` is the last row of every batch, and its latest
value says up to where the journal is mirrored. MLflow is imported only inside the functions that need it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import ValidationInfo, field_validator

from ecotone.experiments.tracking.mlflow import store
from ecotone.experiments.tracking.protocol import Memory, TrackerSettings, on_record
from ecotone.experiments.tracking.subject import Subject
from ecotone.extras import how_to_install
from ecotone.populations import secrets
from ecotone.populations.errors import InputError
from ecotone.settings import Part

if TYPE_CHECKING:
    from ecotone.experiments.tracking.mlflow.run import MlflowRecord


_LONGEST = 500  # characters of an experiment's name


class MlflowPlace(Part):
    """Where MLflow keeps a run.

    Attributes:
        uri: The URI of an MLflow server or store. None means $MLFLOW_TRACKING_URI, or else an SQLite file beside the
            runs. User name, password and query are never recorded: a run keeps them in a file that only you can read.
        experiment: The MLflow experiment that holds the run.
    """

    uri: str | None = None
    experiment: str = "ecotone"

    @field_validator("uri", "experiment")
    @classmethod
    def _accepted(cls, value: str | None, info: ValidationInfo) -> str | None:
        """Refuse what MLflow refuses, before anything runs."""
        if value is None or on_record(value, info):
            return value if value is None or info.field_name != "uri" else secrets.take(value)
        if info.field_name == "uri":
            store.check_uri(value)
            return secrets.take(value)
        if not 0 < len(value) <= _LONGEST:
            raise ValueError(f"expected a name of 1 to {_LONGEST} characters, found {value!r}")
        return value


class MlflowSettings(MlflowPlace, TrackerSettings):
    """MLflow: a server or an embedded store."""

    title: ClassVar[str] = "MLflow"
    packages: ClassVar[tuple[str, ...]] = ("mlflow",)
    lacks: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def install(cls) -> str:
        """The extra."""
        return how_to_install("mlflow")

    def recorded(self) -> MlflowSettings:
        """With the URI that $MLFLOW_TRACKING_URI names, made absolute."""
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri and not self.uri:
            try:
                store.check_uri(uri)
            except ValueError as error:
                raise InputError(
                    f"$MLFLOW_TRACKING_URI: {error}.", "Set tracking.uri, or tracking.mlflow=false."
                ) from error
        return self.model_copy(update={"uri": None if uri is None else secrets.take(store.absolute_uri(uri))})

    def describe(self) -> str:
        """The store and the experiment."""
        place = "the embedded store beside the runs" if self.uri is None else secrets.place(self.uri)
        return f"experiment {self.experiment!r} of {place}"

    def store(self, directory: Path) -> str:
        """The tracking URI for the run in ``directory``; ``store.client_of`` knows the credentials."""
        return store.absolute_uri(self.uri or store.default_uri(directory.parent))

    def place(self, directory: Path) -> str:
        """The tracking URI without user name, password and query."""
        return secrets.place(self.store(directory))

    def open(self, subject: Subject, directory: Path, memory: Memory) -> MlflowRecord:
        """The MLflow run, found by its id or by its tag, or made."""
        from ecotone.experiments.tracking.mlflow.run import MlflowRecord

        return MlflowRecord(subject, self.store(directory), self.experiment, memory.get("run_id"))

    def in_words(self, error: BaseException) -> str:
        """One line about an error. For a server that does not answer, it says only that."""
        return store.in_words(error, self.uri or "")
