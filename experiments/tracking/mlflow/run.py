"""The MLflow run that a journal is mirrored into."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ecotone.experiments.tracking.mlflow import colours
from ecotone.experiments.tracking.mlflow.store import artifacts_of, in_words, known_run, opened, sqlite_file
from ecotone.experiments.tracking.mlflow.view import RUNS, VIEW_TAG, view_key, view_tag, view_value
from ecotone.experiments.tracking.names import CURSOR, PICTURE, acceptable
from ecotone.experiments.tracking.notes import say
from ecotone.experiments.tracking.protocol import End, Line, Memory, TrackingError
from ecotone.experiments.tracking.subject import Subject

MetricRow: TypeAlias = tuple[str, float, int, int]
"""Key, value, time (unix milliseconds) and step."""

ROWS_PER_BATCH = 1000  # MLflow's limit
_STATUS = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
    "killed": "KILLED",
}
_CURRENT = "ecotone.current"  # a run's: "false" when its search went on, in another one
_COLOUR = "ecotone.colour"  # that we gave
_PICTURED = "ecotone.pictured"
_FRONT = "ecotone.front"
_END = "ecotone.end"
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's pages for training, not for chats


class MlflowRecord:
    """A connection to the MLflow run of a search. Where it stands is asked of MLflow, and noted in the run's tags.

    Args:
        subject: The facts of the run as a whole.
        uri: The tracking URI.
        experiment: The name of the experiment.
        run_id: The MLflow run that was used before, if known.
    """

    logged: int
    cursor: int

    page: str | None = None  # the pages are those of a server, which an embedded store lacks

    def __init__(self, subject: Subject, uri: str, experiment: str, run_id: str | None) -> None:
        self.subject = subject
        self.uri = uri
        self.experiment = experiment
        self.client: Any = opened(uri)
        self.experiment_id: str = _experiment(self.client, uri, experiment)
        self.logged = 0
        run = known_run(self.client, run_id)
        self._use(run if run is not None and _is_current(run) else self._found() or self._created())
        self._show_fronts()

    def _use(self, run: Any) -> None:
        """Go on in this MLflow run, from where it stands."""
        self.run_id: str = run.info.run_id
        self.tags: dict[str, str] = dict(run.data.tags)
        self.status: str = run.info.status
        self.cursor = int(run.data.metrics.get(CURSOR, 0))
        self._describe(run.data.params)
        self._give_colour()

    @property
    def stride(self) -> int | None:
        """The stride the run began with: a budget that is raised before the search's end must not move the steps."""
        text = self.tags.get("ecotone.stride", "growing")
        return None if text == "growing" else int(text)

    @property
    def colour(self) -> str:
        """The run's colour in MLflow's charts."""
        return self.tags.get(_COLOUR, colours.PALETTE[0])

    @property
    def pictured(self) -> int:
        """Evaluations of the latest picture."""
        return int(self.tags.get(_PICTURED, 0))

    @property
    def end(self) -> str:
        """The mark of the end that MLflow shows."""
        return self.tags.get(_END, "")

    @property
    def front(self) -> str:
        """The mark of the front that MLflow shows."""
        return self.tags.get(_FRONT, "")

    def memory(self) -> Memory:
        """Nothing: MLflow can be asked."""
        return {}

    def close(self) -> None:
        """Nothing is open between two requests."""

    # -- while the search goes on ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Show that the search goes on."""
        self._set_status("running")

    def log(self, lines: Iterable[Line]) -> None:
        """Log lines in batches, cut between them where possible."""
        for batch in _batches(lines):
            self._log(batch)

    def _log(self, rows: Sequence[MetricRow]) -> None:
        """Log one batch; MLflow takes it as a whole or not at all."""
        from mlflow.entities import Metric

        self.client.log_batch(self.run_id, metrics=[Metric(*row) for row in rows])
        self.logged += len(rows)
        self.cursor = max([self.cursor, *(step for key, _, _, step in rows if key == CURSOR)])

    def show(self, image: Any, step: int, time: int) -> None:
        """Log a picture."""
        self.client.log_image(self.run_id, image, key=PICTURE, step=step, timestamp=time, synchronous=True)
        self._tag({_PICTURED: str(step)})

    # -- the run as a whole ----------------------------------------------------------------------------------

    def _found(self) -> Any:
        runs = self.client.search_runs([self.experiment_id], f"tags.`ecotone.id` = '{self.subject.identity}'")
        return next(filter(_is_current, runs), None)

    def _created(self) -> Any:
        tags = {**self._identity(), "ecotone.id": self.subject.identity, "mlflow.source.name": "ecotone"}
        stride = self.subject.stride
        tags["ecotone.stride"] = "growing" if stride is None else str(stride)
        return self.client.create_run(
            self.experiment_id, start_time=round(self.subject.created * 1000), tags=tags, run_name=self.subject.name
        )

    def go_on(self, evaluations: int) -> None:
        """Take more; after a front in a new MLflow run, and the run so far leaves the view."""
        if not self.front or evaluations <= self.cursor:
            self._tag({_END: ""})
            return
        self._set_status("finished")
        self._tag({_CURRENT: "false", VIEW_TAG: "superseded"})
        self._use(self._created())

    def _give_colour(self) -> None:
        """A colour that no other search in the view has, unless the user chose one."""
        if self.tags.get(colours.TAG) != self.tags.get(_COLOUR):
            return
        query = f"tags.`{VIEW_TAG}` = '{self.tags[VIEW_TAG]}'"
        shown = self.client.search_runs([self.experiment_id], query, max_results=RUNS)
        mine = (self.tags.get(colours.TAG), self.run_id)
        taken = [(run.data.tags.get(colours.TAG), run.info.run_id) for run in shown if run.info.run_id != self.run_id]
        if mine[0] is None or any(colour == mine[0] and run_id < mine[1] for colour, run_id in taken):
            colour = colours.free_colour(found for found, _ in taken if found)
            self._tag({colours.TAG: colour, _COLOUR: colour})

    def _show_fronts(self) -> None:
        """Write the experiment's view of the run's objectives, if it is missing and the server allows it."""
        from mlflow.exceptions import MlflowException

        tag = view_tag(self.subject.goals)
        present = self.client.get_experiment(self.experiment_id).tags.get(tag)
        value = view_value(self.subject.goals, self.subject.held_out, present, round(time.time() * 1000))
        if value is not None:
            try:
                self.client.set_experiment_tag(self.experiment_id, tag, value)
            except MlflowException as error:
                say(f"no view of the fronts: {in_words(error, self.uri)}")

    def _describe(self, present: Mapping[str, str]) -> None:
        """Log the parameters that are missing (MLflow never lets one change) and the tags that differ."""
        from mlflow.entities import Param

        missing = [Param(key, value[:6000]) for key, value in self.subject.parameters.items() if key not in present]
        if missing:
            self.client.log_batch(self.run_id, params=missing)
        self._tag(self._identity())

    def _identity(self) -> dict[str, str]:
        """The tags that runs are looked up by."""
        return {**self.subject.tags, VIEW_TAG: view_key(self.subject.goals)}

    def _tag(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        changed = {key: value[:5000] for key, value in tags.items() if self.tags.get(key) != value[:5000]}
        if changed:
            self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in changed.items()])
            self.tags.update(changed)

    def _set_status(self, state: str, ended: float | None = None) -> None:
        wanted = _STATUS[state]
        if self.status != wanted:
            if wanted == "RUNNING":
                self.client.update_run(self.run_id, status=wanted)
            else:
                self.client.set_terminated(self.run_id, wanted, round((ended or time.time()) * 1000))
            self.status = wanted
        self._tag({"ecotone.state": state})

    # -- the end -----------------------------------------------------------------------------------------------

    def finish(self, end: End) -> None:
        """Log the end: metrics and front, the state, the files, and at last the mark of a complete end."""
        rows = [(key, value, end.time, end.evaluations) for key, value in end.metrics.items()]
        if end.front != self.front:
            rows += self._missing([row for line in end.lines for row in _rows(line)])
        for begin in range(0, len(rows), ROWS_PER_BATCH):
            self._log(rows[begin : begin + ROWS_PER_BATCH])
        if end.front:
            self._tag({_FRONT: end.front})
        self._give_colour()  # again: searches that began at the same time did not see each other
        self._set_status(end.state, end.ended)
        reasons = {f"ecotone.{key}": reason for key, reason in end.reasons.items()}
        self._tag({key: reason for key, reason in reasons.items() if reason or key in self.tags})
        self._artifacts(end)
        self._tag({_END: end.mark})

    def _missing(self, rows: Sequence[MetricRow]) -> list[MetricRow]:
        """The metrics that an interrupted mirror has not logged."""
        begun = self.client.get_run(self.run_id).data.metrics.keys() & {row[0] for row in rows}
        there = {(key, metric.step) for key in begun for metric in self.client.get_metric_history(self.run_id, key)}
        return [row for row in rows if (row[0], row[3]) not in there]

    def _artifacts(self, end: End) -> None:
        with tempfile.TemporaryDirectory(prefix="ecotone-") as folder:
            end.write(Path(folder))
            self.client.log_artifacts(self.run_id, folder)
        self._tag({"mlflow.loggedArtifacts": json.dumps([{"path": "front.json", "type": "table"}])})


def _is_current(run: Any) -> bool:
    """False for an earlier end of a search that went on."""
    return bool(run.data.tags.get(_CURRENT) != "false")


def _batches(lines: Iterable[Line]) -> Iterator[list[MetricRow]]:
    """Rows in batches that MLflow takes, cut between lines where possible."""
    batch: list[MetricRow] = []
    for line in lines:
        rows = _rows(line)
        if batch and len(batch) + len(rows) > ROWS_PER_BATCH:
            yield batch
            batch = []
        batch += rows
        while len(batch) > ROWS_PER_BATCH:
            yield batch[:ROWS_PER_BATCH]
            del batch[:ROWS_PER_BATCH]
    if batch:
        yield batch


def _rows(line: Line) -> list[MetricRow]:
    return [(key, float(value), line.time, line.step) for key, value in line.values.items()]


def _experiment(client: Any, uri: str, name: str) -> str:
    """The id of the experiment, which is made if missing."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        path = sqlite_file(uri)
        place = None if path is None else str(artifacts_of(path) / acceptable(name))
        try:
            return str(client.create_experiment(name, artifact_location=place, tags=_KIND))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"the MLflow experiment {name!r} was deleted.",
            f"Restore it with `mlflow experiments restore -x {experiment.experiment_id}`, "
            "or name another in the recipe.",
        )
    return str(experiment.experiment_id)
