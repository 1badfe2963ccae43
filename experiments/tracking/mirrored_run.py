"""The MLflow run that a journal is mirrored into."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ecotone.experiments.tracking import colours
from ecotone.experiments.tracking.artifacts import write_artifacts
from ecotone.experiments.tracking.front_metrics import MetricRow, front_metrics
from ecotone.experiments.tracking.images import front_image, is_due
from ecotone.experiments.tracking.names import CURSOR, PICTURE, VIEW_TAG, acceptable
from ecotone.experiments.tracking.notes import say
from ecotone.experiments.tracking.scoreboard import Line, Scoreboard
from ecotone.experiments.tracking.store import TrackingError, in_words, known_run, opened, sqlite_file
from ecotone.experiments.tracking.summary import Summary, summary_of
from ecotone.experiments.tracking.target import Target
from ecotone.experiments.tracking.view import RUNS, view_tag, view_value
from ecotone.populations import facts
from ecotone.populations.journal import Journal

ROWS_PER_BATCH = 1000  # MLflow's limit
_PORTION = 2000  # rows of the journal read at a time
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
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's pages for training, not for chats


class MirroredRun:
    """A connection to the MLflow run of a journal. Any error makes it useless: make another one.

    Args:
        target: Where to and as what.
        run_id: The MLflow run that was used before, if known.
    """

    def __init__(self, target: Target, run_id: str | None) -> None:
        self.target = target
        self.client = opened(target.uri)
        self.experiment_id = _experiment(self.client, target)
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
        self.board = Scoreboard(self.target.goals, self._stride(), self.target.created, self.cursor)
        self._after = -1
        self._describe(run.data.params)
        self._colour()

    def advance(self, journal: Journal, state: str) -> bool:
        """Log what is new; True when the search has ended and all of it is logged."""
        final = state != "running"
        if "ecotone.front" in self.tags and sum(1 for _ in journal.rows()) > self.cursor:
            self._succeed()
        if not final:
            self._set_status(state)
        for batch in _batches(self._lines(journal, state == "finished")):
            self._log(batch)
        if final:
            self._finish(journal, state)
        return final

    # -- rows ----------------------------------------------------------------------------------------------

    def _lines(self, journal: Journal, finished: bool) -> Iterator[Line]:
        """The lines after the cursor. Trials in flight hold up those behind them until the search is finished."""
        # Read in portions: a reader that lingers keeps the journal's write-ahead log from being folded in.
        while rows := list(islice(journal.rows(self._after, unscored=True), _PORTION)):
            for row in rows:
                if row.number != self._after + 1 and not finished:
                    return
                self._after = row.number
                if row.gradient is not None:
                    self.board.learn(row)
                    continue
                if not row.scored:
                    continue
                line = self.board.add(row)
                if line is not None and line.step > self.cursor:
                    yield line
                if is_due(self.board.count):
                    self._log_picture()
        line = self.board.last() if finished else None
        if line is not None and line.step > self.cursor:
            yield line

    def _log(self, rows: Sequence[MetricRow]) -> None:
        """Log one batch of (key, value, time, step); MLflow takes it as a whole or not at all."""
        from mlflow.entities import Metric

        self.client.log_batch(self.run_id, metrics=[Metric(*row) for row in rows])
        self.logged += len(rows)
        self.cursor = max([self.cursor, *(step for key, _, _, step in rows if key == CURSOR)])

    # -- the run as a whole ----------------------------------------------------------------------------------

    def _found(self) -> Any:
        runs = self.client.search_runs([self.experiment_id], f"tags.`ecotone.id` = '{self.target.identity}'")
        return next(filter(_is_current, runs), None)

    def _created(self) -> Any:
        tags = {**self.target.tags, "ecotone.id": self.target.identity, "mlflow.source.name": "ecotone"}
        stride = self.target.stride
        tags["ecotone.stride"] = "growing" if stride is None else str(stride)
        return self.client.create_run(
            self.experiment_id, start_time=round(self.target.created * 1000), tags=tags, run_name=self.target.name
        )

    def _succeed(self) -> None:
        """Go on in a new MLflow run, as the search goes on after its end.

        A front that is logged cannot be taken back, so the run so far stays what it is, an earlier end of the same
        search, and leaves the view; the new run shows the whole search.
        """
        self._set_status("finished")
        self._tag({_CURRENT: "false", VIEW_TAG: "superseded"})
        self._use(self._created())

    def _colour(self) -> None:
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
        """Write the experiment's view of these objectives if it is missing, where the server lets us."""
        from mlflow.exceptions import MlflowException

        tag = view_tag(self.target.goals)
        present = self.client.get_experiment(self.experiment_id).tags.get(tag)
        value = view_value(self.target.goals, self.target.held_out, present, round(time.time() * 1000))
        if value is not None:
            try:
                self.client.set_experiment_tag(self.experiment_id, tag, value)
            except MlflowException as error:
                say(f"no view of the fronts: {in_words(error, self.target.uri)}")

    def _stride(self) -> int | None:
        """The stride the run began with: a budget that is raised before the search's end must not move the steps."""
        text = self.tags.get("ecotone.stride", "growing")
        return None if text == "growing" else int(text)

    def _describe(self, present: Mapping[str, str]) -> None:
        """Log the parameters that are missing (MLflow never lets one change) and the tags that differ."""
        from mlflow.entities import Param

        missing = [Param(key, value[:6000]) for key, value in self.target.parameters.items() if key not in present]
        if missing:
            self.client.log_batch(self.run_id, params=missing)
        self._tag(self.target.tags)

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

    def _finish(self, journal: Journal, state: str) -> None:
        """Log what is known at the end, once for each end: a resumed search has several."""
        summary = summary_of(journal, self.board, self.target)
        mark = f"{state} {self.board.count} {summary.fingerprint}"
        if self.tags.get("ecotone.end") == mark:
            return
        now = round(self.board.time * 1000)
        rows = [(key, value, now, self.board.count) for key, value in summary.metrics.items()]
        if state == "finished" and self.tags.get("ecotone.front") != summary.front_mark:
            rows += self._missing(self._final_rows(summary, now))
        for begin in range(0, len(rows), ROWS_PER_BATCH):
            self._log(rows[begin : begin + ROWS_PER_BATCH])
        if state == "finished":
            self._tag({"ecotone.front": summary.front_mark})
            self._log_picture()
        self._colour()  # again: searches that began at the same time did not see each other
        self._set_status(state, _last_written(journal.path))
        reasons = {f"ecotone.{fact.name}": journal.fact(fact) or "" for fact in (facts.STOP_REASON, facts.ERROR)}
        self._tag({key: reason for key, reason in reasons.items() if reason or key in self.tags})
        self._artifacts(journal, summary)
        self._tag({"ecotone.end": mark})

    def _final_rows(self, summary: Summary, now: int) -> list[MetricRow]:
        rows = front_metrics(summary, self.target.goals, self.target.held_out, now)
        return rows + self.board.volumes.late(summary.references)

    def _missing(self, rows: Sequence[MetricRow]) -> list[MetricRow]:
        """Those that a mirror which was stopped in the middle has not logged."""
        begun = self.client.get_run(self.run_id).data.metrics.keys() & {row[0] for row in rows}
        there = {(key, metric.step) for key in begun for metric in self.client.get_metric_history(self.run_id, key)}
        return [row for row in rows if (row[0], row[3]) not in there]

    def _log_picture(self) -> None:
        """The front as it stands, once for each step."""
        step, points = self.board.count, self.board.front.points
        if len(self.target.goals) < 2 or not len(points) or step <= int(self.tags.get(_PICTURED, 0)):
            return
        signs = np.array([goal.sign for goal in self.target.goals])
        title = f"{self.target.name}: front after {step} evaluations"
        colour = self.tags.get(_COLOUR, colours.PALETTE[0])
        image = front_image(self.target.goals, np.array(self.board.recent), points * signs, title, colour)
        time_of = round(self.board.time * 1000)
        self.client.log_image(self.run_id, image, key=PICTURE, step=step, timestamp=time_of, synchronous=True)
        self._tag({_PICTURED: str(step)})

    def _artifacts(self, journal: Journal, summary: Summary) -> None:
        with tempfile.TemporaryDirectory(prefix="ecotone-") as folder:
            write_artifacts(Path(folder), journal, self.target, summary)
            self.client.log_artifacts(self.run_id, folder)
        self._tag({"mlflow.loggedArtifacts": json.dumps([{"path": "front.json", "type": "table"}])})


def _is_current(run: Any) -> bool:
    """False for an earlier end of a search that went on."""
    return bool(run.data.tags.get(_CURRENT) != "false")


def _batches(lines: Iterable[Line]) -> Iterator[list[MetricRow]]:
    """Rows (key, value, time, step) in batches that MLflow takes, cut between lines where possible."""
    batch: list[MetricRow] = []
    for line in lines:
        rows = [(key, float(value), line.time, line.step) for key, value in line.values.items()]
        if batch and len(batch) + len(rows) > ROWS_PER_BATCH:
            yield batch
            batch = []
        batch += rows
        while len(batch) > ROWS_PER_BATCH:
            yield batch[:ROWS_PER_BATCH]
            del batch[:ROWS_PER_BATCH]
    if batch:
        yield batch


def _experiment(client: Any, target: Target) -> str:
    """The id of the experiment, which is made if missing."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(target.experiment)
    if found is None:
        path = sqlite_file(target.uri)
        place = None if path is None else str(path.parent / "mlartifacts" / acceptable(target.experiment))
        try:
            return str(client.create_experiment(target.experiment, artifact_location=place, tags=_KIND))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(target.experiment)
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"the MLflow experiment {target.experiment!r} was deleted",
            f"Restore it with `mlflow experiments restore -x {found.experiment_id}`, or name another in the recipe",
        )
    return str(found.experiment_id)


def _last_written(path: Path) -> float:
    """When the run ended (unix seconds): the last change of its journal."""
    files = (path, path.with_name(path.name + "-wal"))
    return min(time.time(), max(file.stat().st_mtime for file in files if file.exists()))
