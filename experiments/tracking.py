"""MLflow tracking: the journal of a run, mirrored into one MLflow run by a process of its own.

The journal is the truth; MLflow is a copy of it for looking at and comparing. The search never imports MLflow,
never waits for it and never shares its interpreter: ``python -m experiments.tracking RUN_DIR --follow PID`` reads
the journal about once a second, logs what is new in batches, and ends when the search has ended and all of it is
logged. With the tracking server down it keeps trying; whatever it missed, the next ``mirror`` of the run adds.

Where to go on is asked of MLflow itself: the metric ``evaluations`` is the last row of every batch, and its latest
value says up to where the journal is mirrored. Steps, values and times of all rows follow from the journal alone,
so a mirror that was killed and started again leaves the history an undisturbed one would have left.

Metrics, each with the number of evaluations as its step:

- ``<objective>``: mean over the candidates since the previous step; absent when all of them failed.
- ``best/<objective>``: the best so far in that objective; ``best/mean``: the best mean of the oriented scores
  (those of minimised objectives count negatively).
- ``front_size``, ``failures``, ``evaluations``, ``evaluations_per_second`` (over at least the last 100 and 1 s).
- At the end ``held_out/<objective>`` of the candidate of best mean, ``references/<name>/...`` of the merges to
  compare with, and ``front/<objective>``: one step for each member of the front, sorted by the first objective. A
  line chart of one of these over another (X-axis: Metric) shows the fronts of several searches in one picture.

This module imports MLflow only inside the functions that need it, so that ``status`` and ``start`` stay cheap.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request
import webbrowser
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from populations.errors import EcotoneError, JournalError
from populations.journal import Journal, Row
from populations.pareto import ParetoFront
from populations.population import mean_score
from populations.trial import Evaluation, Goal, oriented

STEPS = 1000  # of a metric, at most about
ROWS_PER_BATCH = 1000  # MLflow's limit
_PORTION = 2000  # rows of the journal read at a time
_HANDOVER = 5.0  # seconds that a mirror waits for another one of the same run to end
FINAL_STATES = ("finished", "failed", "interrupted")

_CURSOR = "evaluations"
_OWN_METRICS = {_CURSOR, "evaluations_per_second", "failures", "front_size", "best", "held_out", "references", "front"}
_STATUS = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
    "killed": "KILLED",
}
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # A server that is down should say so at once; patience is ours, not each call's.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's pages for training, not for chats
_SILENCE = "does not answer"
_LAST_WORDS = "Its output is in ui.log of the run directory."


class TrackingError(EcotoneError):
    """MLflow cannot be reached, started or understood."""


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


# -- the public face -------------------------------------------------------------------------------------


def default_uri(runs_dir: str | Path) -> str:
    """The embedded store of a directory of runs: ``RUNS/mlflow.db``, with artifacts in ``RUNS/mlartifacts``."""
    return f"sqlite:///{Path(runs_dir).resolve() / 'mlflow.db'}"


def installed() -> bool:
    """Whether MLflow can be imported; it is an extra."""
    return importlib.util.find_spec("mlflow") is not None


def absolute_uri(uri: str) -> str:
    """``uri`` with a relative file made absolute, so that it means the same in every working directory."""
    path = _sqlite_file(uri)
    if path is not None:
        _, mark, query = uri.partition("?")
        return f"sqlite:///{path.absolute()}{mark}{query}"
    return uri if ":" in uri else str(Path(uri).absolute())


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
        shown_uri = _Target.of(journal, directory, uri, experiment).shown_uri
    with _sole_mirror(directory, patience) as alone:
        if not alone:
            return MirrorReport(shown_uri, error="another process is mirroring this run")
        return _Attempts(directory, uri, experiment).once(live=False)


def start(run_dir: str | Path, pid: int) -> subprocess.Popen[bytes]:
    """Start mirroring the run that process ``pid`` writes, in a process that a Ctrl-C in the terminal does not reach.

    Its output goes to ``RUN_DIR/tracking.log``.

    Raises:
        TrackingError: MLflow is not installed.
    """
    _require_mlflow()
    directory = Path(run_dir).resolve()
    # Not `-m`: a folder named `experiments` in the user's working directory would be imported instead of this one.
    launch = "import sys; sys.path[0] = sys.argv.pop(1); from experiments.tracking import main; sys.exit(main())"
    root = str(Path(__file__).resolve().parents[1])
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


def status(run_dir: str | Path) -> dict[str, Any]:
    """What is known about the mirroring of a run, without MLflow: read from ``RUN_DIR/tracking.json``.

    Returns:
        ``uri`` (without credentials), ``experiment``, ``experiment_id``, ``run_id``, ``mirrored`` (evaluations that
        MLflow shows), ``complete``, ``error`` (the last one, or None), and ``mirroring`` (a mirror is at work now).
    """
    directory = Path(run_dir).resolve()
    empty = dict.fromkeys(("uri", "experiment", "experiment_id", "run_id", "error"))
    return {**empty, "mirrored": 0, "complete": False, **_noted(directory), "mirroring": _being_mirrored(directory)}


def find_run_dir(run_id: str, uri: str) -> Path:
    """The run directory of an MLflow run, by its tag ``ecotone.run_dir``.

    Raises:
        TrackingError: MLflow does not answer or has no such run, or it is not one of Ecotone's, or its directory
            is gone.
    """
    store = absolute_uri(uri)
    try:
        tags = _client(store).get_run(run_id).data.tags
    except Exception as error:
        raise TrackingError(
            f"MLflow run {run_id}: {_in_words(error, store)}.",
            "Check the id and the tracking URI, or give the run directory.",
        ) from error
    if "ecotone.run_dir" not in tags:
        raise TrackingError(f"MLflow run {run_id} was not made by Ecotone (no tag ecotone.run_dir).")
    directory = Path(tags["ecotone.run_dir"])
    if not (directory / "journal.sqlite").is_file():
        raise TrackingError(
            f"MLflow run {run_id}: its run directory {directory} is not there.", "Give the directory it was moved to."
        )
    return directory


def ui_address(run_dir: str | Path) -> str | None:
    """The page of the run on its tracking server, or None for an embedded store, which ``serve`` must serve first."""
    known = status(run_dir)
    if not str(known["uri"]).startswith(("http://", "https://")):
        return None
    return _page(str(known["uri"]), known)


def serve(
    run_dir: str | Path, port: int = 5000, open_browser: bool = False, say: Callable[[str], object] = print
) -> None:
    """Say where MLflow shows the run; for an embedded store, serve it on the loopback interface until Ctrl-C.

    Args:
        run_dir: The run directory.
        port: Where to serve an embedded store; 0 takes a free one.
        open_browser: Also open the page.
        say: Takes each line for the user.

    Raises:
        TrackingError: Nothing was mirrored yet, the port is in use, or MLflow does not start.
    """
    directory = Path(run_dir).resolve()
    known = status(directory)
    if known["uri"] is None:
        raise TrackingError(f"{directory}: nothing of it is in MLflow yet.", "Start the run, or `ecotone sync` it.")
    address = ui_address(directory)
    if address is not None:
        _show(address, open_browser, say)
        return
    _require_mlflow()
    chosen = _free_port(port)
    with _terminable():
        say("Starting MLflow, which takes some seconds ...")
        process = _serving(_store(directory, known), directory, chosen)
        try:
            _await_answer(process, chosen)
            _show(_page(f"http://127.0.0.1:{chosen}", known), open_browser, say)
            say("Ctrl-C stops the server.")
            process.wait()
        except KeyboardInterrupt:
            return
        finally:
            _stop(process)
    raise TrackingError(f"`mlflow server` ended with code {process.returncode}.", _LAST_WORDS)


# -- what the search was worth, step by step --------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """The metrics of one step: after ``step`` evaluations, at ``time`` (unix milliseconds)."""

    step: int
    time: int
    values: Mapping[str, float]


class Scoreboard:
    """Turns evaluations, in order, into the metrics of a search; what it says depends on the journal alone.

    Args:
        goals: The objectives.
        stride: A line every so many evaluations; None: every one at first, every other from 1,024 on, every fourth
            from 2,048 on, ... for a search whose budget is not a number of evaluations.
        created: When the run began (unix seconds).
    """

    def __init__(self, goals: Sequence[Goal], stride: int | None, created: float) -> None:
        self.goals = tuple(goals)
        self.stride = stride
        self.count = 0
        self.failures = 0
        self.time = created
        self.best: Row | None = None
        self.front = ParetoFront(goals)
        self.members: dict[int, Row] = {}
        self._best_mean = -math.inf
        self._records: dict[str, float] = {}
        self._window: list[Mapping[str, float]] = []
        self._arrivals: deque[tuple[int, float]] = deque([(0, created)])
        self._names = metric_names([goal.name for goal in goals])

    def add(self, row: Row) -> Line | None:
        """Take the next evaluation; the metrics, when a step is due."""
        self.count += 1
        self.time = max(self.time, row.time)
        self._arrivals.append((self.count, self.time))
        if row.failure is not None or row.scores is None:
            self.failures += 1
        else:
            self._score(row, row.scores)
        if not self.on_border:
            return None
        line = self.line()
        self._window.clear()
        return line

    def line(self) -> Line:
        """The metrics as they stand."""
        values: dict[str, float] = {}
        for goal in self.goals:
            name = self._names[goal.name]
            scores = [scores[goal.name] for scores in self._window]
            if scores:
                values[name] = math.fsum(scores) / len(scores)
            if goal.name in self._records:
                values[f"best/{name}"] = self._records[goal.name]
        if self.best is not None:
            values["best/mean"] = self._best_mean
        values["front_size"] = len(self.front.numbers)
        values["failures"] = self.failures
        rate = self._rate()
        if rate is not None:
            values["evaluations_per_second"] = rate
        values[_CURSOR] = self.count  # last: what is before it is logged when it is
        return Line(self.count, round(self.time * 1000), values)

    @property
    def on_border(self) -> bool:
        """True when a step ends at the latest evaluation."""
        stride = self.stride if self.stride is not None else 1 << max(0, self.count.bit_length() - 10)
        return self.count % stride == 0

    def _score(self, row: Row, scores: Mapping[str, float]) -> None:
        self._window.append(scores)
        for goal in self.goals:
            record = self._records.get(goal.name)
            if record is None or goal.sign * scores[goal.name] > goal.sign * record:
                self._records[goal.name] = scores[goal.name]
        point = oriented(scores, self.goals)
        mean = mean_score(scores, self.goals)
        if mean > self._best_mean:
            self._best_mean, self.best = mean, row
        if self.front.add(row.number, point):
            self.members = {n: row if n == row.number else self.members[n] for n in self.front.numbers}

    def _rate(self) -> float | None:
        """Evaluations a second since 100 evaluations and 1 s ago, or since the run began."""
        arrivals = self._arrivals
        while len(arrivals) > 1 and self._long_ago(*arrivals[1]):
            arrivals.popleft()
        number, when = arrivals[0]
        return (self.count - number) / (self.time - when) if self.time > when else None

    def _long_ago(self, number: int, when: float) -> bool:
        return self.count - number >= 100 and self.time - when >= 1.0


def metric_names(objectives: Sequence[str]) -> dict[str, str]:
    """The metric of each objective: its name where MLflow accepts it and no other metric has it."""
    names = {objective: acceptable(objective) for objective in objectives}
    return _distinct({o: f"objective/{n}" if n.split("/")[0] in _OWN_METRICS else n for o, n in names.items()})


def _distinct(names: Mapping[str, str]) -> dict[str, str]:
    """``names`` with underscores added where two are equal."""
    distinct: dict[str, str] = {}
    for key, name in names.items():
        while name in distinct.values():
            name += "_"
        distinct[key] = name
    return distinct


def acceptable(name: str) -> str:
    """``name`` with the characters that MLflow refuses in keys replaced by underscores, cut to 200 characters."""
    parts = re.sub(r"[^\w.\- /]", "_", name).split("/")
    kept = [part for part in (part.strip() for part in parts) if part.strip(".")]
    return "/".join(kept)[:200].rstrip("/ ") or "unnamed"


def flattened(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested recipe as parameters: keys joined by dots, lists and other values as JSON, text as it is."""
    flat: dict[str, str] = {}
    for key, item in value.items():
        name = acceptable(f"{prefix}{key}")
        if isinstance(item, Mapping) and item:
            flat.update(flattened(item, f"{name}."))
        else:
            flat[name] = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False, default=str)
    return flat


# -- where to, and as what ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """Where a run is mirrored to, and what the journal says of the run as a whole."""

    uri: str
    experiment: str
    name: str
    identity: str
    created: float
    goals: tuple[Goal, ...]
    held_out: tuple[Goal, ...]
    stride: int | None
    parameters: Mapping[str, str]
    tags: Mapping[str, str]

    @classmethod
    def of(cls, journal: Journal, directory: Path, uri: str | None, experiment: str | None) -> _Target:
        wanted = _json_fact(journal, "tracking", {})
        created = journal.fact("created") or "0"
        name = journal.fact("name") or directory.name
        signature = journal.fact("signature") or ""
        budget = _json_fact(journal, "budget", {}).get("evaluations")
        goals = tuple(Goal(*goal) for goal in _json_fact(journal, "goals", []))
        return cls(
            uri=absolute_uri(uri or wanted.get("uri") or default_uri(directory.parent)),
            experiment=experiment or wanted.get("experiment") or "ecotone",
            name=name,
            identity=hashlib.blake2b("\n".join((created, name, signature)).encode(), digest_size=16).hexdigest(),
            created=float(created),
            goals=goals,
            held_out=tuple(Goal(*goal) for goal in _json_fact(journal, "held_out_goals", [])),
            stride=None if budget is None else max(1, int(budget) // STEPS),
            parameters=flattened(_json_fact(journal, "recipe", {})),
            tags={
                "algorithm": journal.fact("algorithm") or "",
                "models": ", ".join(map(str, _json_fact(journal, "models", []))),
                "objectives": ", ".join(goal.name for goal in goals),
                "ecotone.run_dir": str(directory),
                "ecotone.signature": signature,
                "ecotone.versions": journal.fact("versions") or "{}",
            },
        )

    @property
    def shown_uri(self) -> str:
        """The URI without user name and password."""
        parts = urlsplit(self.uri)
        if "@" not in parts.netloc:
            return self.uri
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _json_fact(journal: Journal, key: str, otherwise: Any) -> Any:
    text = journal.fact(key)
    return otherwise if text is None else json.loads(text) or otherwise


def _state(journal: Journal, live: bool) -> str:
    """The journal's state; ``killed`` when it says running but nobody runs it."""
    state = journal.fact("state") or "running"
    if state == "running" and not live and not journal.in_use:
        return "killed"
    return state


# -- MLflow ------------------------------------------------------------------------------------------------


class _Mirror:
    """A connection to the MLflow run of a journal. Any error makes it useless: make another one.

    Args:
        target: Where to and as what.
        run_id: The MLflow run that was used before, if known.
    """

    def __init__(self, target: _Target, run_id: str | None) -> None:
        self.target = target
        self.client = _opened(target.uri)
        self.experiment_id = _experiment(self.client, target)
        run = _known_run(self.client, run_id) or self._found() or self._created()
        self.run_id: str = run.info.run_id
        self.tags: dict[str, str] = dict(run.data.tags)
        self.status: str = run.info.status
        self.cursor = int(run.data.metrics.get(_CURSOR, 0))
        self.logged = 0
        self.board = Scoreboard(target.goals, self._stride(), target.created)
        self._after = -1
        self._describe(run.data.params)

    def advance(self, journal: Journal, state: str) -> bool:
        """Log what is new; True when the search has ended and all of it is logged."""
        final = state != "running"
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
        while rows := list(islice(journal.rows(self._after), _PORTION)):
            for row in rows:
                if row.number != self._after + 1 and not finished:
                    return
                self._after = row.number
                line = self.board.add(row)
                if line is not None and line.step > self.cursor:
                    yield line
        if finished and self.board.count > self.cursor and not self.board.on_border:
            yield self.board.line()

    def _log(self, rows: Sequence[tuple[str, float, int, int]]) -> None:
        """Log one batch of (key, value, time, step); MLflow takes it as a whole or not at all."""
        from mlflow.entities import Metric

        self.client.log_batch(self.run_id, metrics=[Metric(*row) for row in rows])
        self.logged += len(rows)
        self.cursor = max([self.cursor, *(step for key, _, _, step in rows if key == _CURSOR)])

    # -- the run as a whole ----------------------------------------------------------------------------------

    def _found(self) -> Any:
        runs = self.client.search_runs(
            [self.experiment_id], f"tags.`ecotone.id` = '{self.target.identity}'", max_results=1
        )
        return runs[0] if runs else None

    def _created(self) -> Any:
        tags = {**self.target.tags, "ecotone.id": self.target.identity, "mlflow.source.name": "ecotone"}
        stride = self.target.stride
        tags["ecotone.stride"] = "growing" if stride is None else str(stride)
        return self.client.create_run(
            self.experiment_id, start_time=round(self.target.created * 1000), tags=tags, run_name=self.target.name
        )

    def _stride(self) -> int | None:
        """The stride the run began with: a budget that was extended must not move the steps."""
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
        summary = _summary(journal, self.board, self.target)
        mark = f"{state} {self.board.count} {summary.fingerprint}"
        if self.tags.get("ecotone.end") == mark:
            return
        now = round(self.board.time * 1000)
        rows = [(key, value, now, self.board.count) for key, value in summary.metrics.items()]
        if state == "finished" and self.tags.get("ecotone.front") != summary.front_mark:
            rows += self._front_rows(summary, now)
        for begin in range(0, len(rows), ROWS_PER_BATCH):
            self._log(rows[begin : begin + ROWS_PER_BATCH])
        if state == "finished":
            self._tag({"ecotone.front": summary.front_mark})
        self._set_status(state, _last_written(journal.path))
        reasons = {f"ecotone.{key}": journal.fact(key) or "" for key in ("stop_reason", "error")}
        self._tag({key: reason for key, reason in reasons.items() if reason or key in self.tags})
        self._artifacts(journal, summary)
        self._tag({"ecotone.end": mark})

    def _front_rows(self, summary: _Summary, now: int) -> list[tuple[str, float, int, int]]:
        """The front, step by step. Histories cannot be rewritten, so an extended search's front has another name."""
        if len(self.target.goals) < 2:
            return []
        prefix = f"front_{self.board.count}" if "ecotone.front" in self.tags else "front"
        names = metric_names([goal.name for goal in self.target.goals])
        return [
            (f"{prefix}/{names[goal.name]}", (row.scores or {})[goal.name], now, step)
            for step, row in enumerate(summary.front)
            for goal in self.target.goals
        ]

    def _artifacts(self, journal: Journal, summary: _Summary) -> None:
        with tempfile.TemporaryDirectory(prefix="ecotone-") as folder:
            here = Path(folder)
            (here / "front.json").write_text(json.dumps(summary.table), encoding="utf-8")
            _write_candidates(journal, self.target.goals, here / "candidates.csv")
            recipe = journal.path.parent / "recipe.yaml"
            if recipe.is_file():
                shutil.copyfile(recipe, here / "recipe.yaml")
            self.client.log_artifacts(self.run_id, folder)
        self._tag({"mlflow.loggedArtifacts": json.dumps([{"path": "front.json", "type": "table"}])})


def _batches(lines: Iterable[Line]) -> Iterator[list[tuple[str, float, int, int]]]:
    """Rows (key, value, time, step) in batches that MLflow takes, cut between lines where possible."""
    batch: list[tuple[str, float, int, int]] = []
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


def _require_mlflow() -> None:
    if not installed():
        raise TrackingError("MLflow is not installed.", "pip install 'ecotone[mlflow]', or switch tracking off.")


def _client(uri: str) -> Any:
    """A client of exactly this store, which must exist if it is a file."""
    path = _sqlite_file(uri)
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _opened(uri: str) -> Any:
    """A client whose store is ready. An embedded store is made by one process at a time, and appears when whole."""
    path = _sqlite_file(uri)
    if path is None:
        return _client(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            draft = path.with_name(path.name + ".new")
            draft.unlink(missing_ok=True)
            draft.touch()
            _client(f"sqlite:///{draft}").search_experiments(max_results=1)
            draft.replace(path)
        client = _client(uri)
        client.search_experiments(max_results=1)
    return client


def _experiment(client: Any, target: _Target) -> str:
    """The id of the experiment, which is made if missing."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(target.experiment)
    if found is None:
        path = _sqlite_file(target.uri)
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


def _known_run(client: Any, run_id: str | None) -> Any:
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


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def _in_words(error: BaseException, uri: str) -> str:
    """One line that says what went wrong, for the user."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ImportError):
        return f"MLflow cannot be imported ({text}): pip install 'ecotone[mlflow]'"
    if any(sign in text for sign in ("Max retries exceeded", "Connection refused", "timed out", "Connection aborted")):
        return f"the tracking server at {urlsplit(uri).hostname or uri} {_SILENCE}"
    return text if len(text) <= 300 else f"{text[:297]}..."


# -- the end of a search -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Summary:
    """What is logged at the end: metrics, the front by its first objective, and the front as a table."""

    metrics: Mapping[str, float]
    front: Sequence[Row]
    table: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        text = json.dumps([self.metrics, self.table], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def front_mark(self) -> str:
        text = json.dumps([row.number for row in self.front])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _summary(journal: Journal, board: Scoreboard, target: _Target) -> _Summary:
    names = metric_names([goal.name for goal in (*target.goals, *target.held_out)])
    metrics: dict[str, float] = {}
    if board.best is not None:
        held_out = _measured(journal.measurement(board.best.digest, "held_out"))
        metrics.update({f"held_out/{names[goal.name]}": held_out[goal.name] for goal in _of(target.held_out, held_out)})
    for reference, digest, searched in _references(journal):
        held_out = _measured(journal.measurement(digest, "held_out"))
        for goal in _of(target.goals, searched):
            metrics[f"references/{reference}/{names[goal.name]}"] = searched[goal.name]
        for goal in _of(target.held_out, held_out):
            metrics[f"references/{reference}/held_out/{names[goal.name]}"] = held_out[goal.name]
    first = target.goals[0].name if target.goals else ""
    front = sorted(board.members.values(), key=lambda row: ((row.scores or {}).get(first, 0.0), row.number))
    return _Summary(metrics, front, _front_table(journal, front, target))


def _of(goals: Iterable[Goal], scores: Mapping[str, float]) -> list[Goal]:
    return [goal for goal in goals if goal.name in scores]


def _measured(evaluation: Evaluation | None) -> Mapping[str, float]:
    return {} if evaluation is None or not evaluation.ok else evaluation.scores


def _references(journal: Journal) -> list[tuple[str, str, Mapping[str, float]]]:
    """Metric name, digest and search scores of each merge to compare with; a trial of the same genome counts."""
    references = journal.references()
    names = _distinct({name: acceptable(name) for name, _ in references})
    scores = {g.digest: _measured(journal.measurement(g.digest, "search")) for _, g in references}
    if any(not found for found in scores.values()):
        for row in journal.rows():
            if row.failure is None and row.digest in scores and not scores[row.digest]:
                scores[row.digest] = row.scores or {}
    return [(names[name], genome.digest, scores[genome.digest]) for name, genome in references]


def _front_table(journal: Journal, front: Sequence[Row], target: _Target) -> dict[str, Any]:
    """The front as MLflow's table artifact: columns and rows."""
    goals = [goal.name for goal in target.goals]
    held_out = [goal.name for goal in target.held_out]
    data = []
    for row in front:
        measured = _measured(journal.measurement(row.digest, "held_out"))
        scores = [(row.scores or {}).get(name) for name in goals]
        parents = " ".join(map(str, row.parents))
        data.append([row.number, row.digest, parents, *scores, *(measured.get(name) for name in held_out)])
    return {"columns": ["number", "digest", "parents", *goals, *(f"held_out/{n}" for n in held_out)], "data": data}


def _write_candidates(journal: Journal, goals: Sequence[Goal], path: Path) -> None:
    """Every candidate that was evaluated, one a row."""
    names = [goal.name for goal in goals]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["number", "parents", "digest", *names, "failure", "seconds"])
        for row in journal.rows():
            scores = row.scores or {}
            failure = "" if row.failure is None else f"{row.failure.kind}: {row.failure.message}"
            parents = " ".join(map(str, row.parents))
            writer.writerow([row.number, parents, row.digest, *map(scores.get, names), failure, row.seconds])


def _last_written(path: Path) -> float:
    """When the run ended (unix seconds): the last change of its journal."""
    files = (path, path.with_name(path.name + "-wal"))
    return min(time.time(), max(file.stat().st_mtime for file in files if file.exists()))


# -- following a search ----------------------------------------------------------------------------------------


class _Attempts:
    """Attempts to mirror a run, keeping the connection while it is good and ``tracking.json`` up to date."""

    def __init__(self, directory: Path, uri: str | None = None, experiment: str | None = None) -> None:
        self.directory = directory
        self._wanted = (uri, experiment)
        self._mirror: _Mirror | None = None
        self.trace = ""  # of the last failure

    def once(self, live: bool) -> MirrorReport:
        """Mirror what is new; ``live`` says that the search's process is there."""
        target, mirror, complete, failure = None, self._mirror, False, None
        try:
            with Journal.open(self.directory / "journal.sqlite") as journal:
                if mirror is None:
                    target = _Target.of(journal, self.directory, *self._wanted)
                    mirror = self._mirror = _Mirror(target, self._known_run_id(target))
                complete = mirror.advance(journal, _state(journal, live))
        except Exception as error:  # whatever it is, the journal has it all and the next attempt starts afresh
            self._mirror = None
            failure = _in_words(error, target.uri if target else "")
            self.trace = "" if failure.endswith(_SILENCE) else traceback.format_exc()
        report = self._report(mirror, target, complete, failure)
        target = mirror.target if mirror else target
        _note(self.directory, report, target.experiment if target else None)
        return report

    def _known_run_id(self, target: _Target) -> str | None:
        known = _noted(self.directory)
        return known.get("run_id") if known.get("uri") == target.shown_uri else None

    def _report(
        self, mirror: _Mirror | None, target: _Target | None, complete: bool, failure: str | None
    ) -> MirrorReport:
        if mirror is not None:
            uri = mirror.target.shown_uri
            return MirrorReport(
                uri, mirror.experiment_id, mirror.run_id, mirror.cursor, mirror.logged, complete, failure
            )
        known = _noted(self.directory)
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
    with _sole_mirror(directory, _HANDOVER) as alone:
        if not alone:
            return None
        return _followed(_Attempts(directory), lambda: _birth(pid) == birth is not None, poll, patience, stop)


def _followed(
    attempts: _Attempts, alive: Callable[[], bool], poll: float, patience: float, stop: threading.Event
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
        _say(f"{report.error}; trying again\n{trace}".rstrip())
    if report.error is None and (before.error is not None or report.run_id != before.run_id):
        _say(f"run {report.run_id} of experiment {report.experiment_id} at {report.uri}")
    if report.complete:
        _say(f"complete: {report.evaluations} evaluations")
    return report


def _say(text: str) -> None:
    """A line for ``tracking.log``. Not ``logging``: MLflow's migrations reconfigure that for the whole process."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} [{os.getpid()}] {text}", flush=True)


def _is_over(directory: Path, alive: Callable[[], bool]) -> bool:
    """True when the search has ended, or nobody is left to end it."""
    there = alive()  # before the journal is looked at: what a process that is gone wrote is there to be seen
    try:
        with Journal.open(directory / "journal.sqlite") as journal:
            return journal.fact("state") in FINAL_STATES or not (there or journal.in_use)
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


@contextlib.contextmanager
def _sole_mirror(directory: Path, patience: float) -> Iterator[bool]:
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


def _noted(directory: Path) -> dict[str, Any]:
    """What ``tracking.json`` says; nothing when it is missing or damaged."""
    try:
        known = json.loads((directory / "tracking.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _note(directory: Path, report: MirrorReport, experiment: str | None) -> None:
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
    if known == _noted(directory):
        return
    draft = directory / "tracking.json.new"
    try:
        draft.write_text(json.dumps(known, indent=1), encoding="utf-8")
        draft.replace(directory / "tracking.json")
    except OSError as error:
        _say(f"tracking.json cannot be written: {error}")


# -- the user interface ----------------------------------------------------------------------------------------


def _page(base: str, known: Mapping[str, Any]) -> str:
    """The address of the run's page, or of the server when the run is not there yet."""
    if known["run_id"] is None:
        return base.rstrip("/")
    return f"{base.rstrip('/')}/#/experiments/{known['experiment_id']}/runs/{known['run_id']}"


def _show(address: str, open_browser: bool, say: Callable[[str], object]) -> None:
    say(address)
    if open_browser:
        webbrowser.open(address)


def _free_port(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise TrackingError(f"port {port} of 127.0.0.1 is in use.", "Choose another with --port.") from error
        return int(probe.getsockname()[1])


def _serving(uri: str, directory: Path, port: int) -> subprocess.Popen[bytes]:
    """Start MLflow's server for the store ``uri``; its output goes to ``RUN_DIR/ui.log``."""
    file = _sqlite_file(uri)
    artifacts = (directory.parent if file is None else file.parent) / "mlartifacts"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", uri, "--artifacts-destination", str(artifacts)]
    with (directory / "ui.log").open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=directory,
            start_new_session=True,
            env={**os.environ, **_ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )


def _store(directory: Path, known: Mapping[str, Any]) -> str:
    """The URI of the store a run was mirrored to, credentials included if the journal has them."""
    with Journal.open(directory / "journal.sqlite") as journal:
        target = _Target.of(journal, directory, None, None)
    return target.uri if target.shown_uri == known["uri"] else str(known["uri"])


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


def _await_answer(process: subprocess.Popen[bytes], port: int, seconds: float = 180.0) -> None:
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


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and the workers it started, all of its process group."""
    for order, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, order)
        if wait(process, seconds):
            return


# -- the process -----------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Mirror a run directory: once, or while a process runs it. Returns 0 when all of it is in MLflow."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tracking", description=main.__doc__)
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
        _say(str(error))
        return 1
    return 0 if report is None or report.error is None else 1


if __name__ == "__main__":
    sys.exit(main())
