"""MLflow tracking: what is mirrored, that it is exact, and that nothing the server or a kill does changes it."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ecotone.experiments import tracking
from ecotone.experiments.runs import Run
from ecotone.experiments.tracking.mlflow.run import MlflowRecord
from ecotone.experiments.tracking.mlflow.server import free_port, serving
from ecotone.experiments.tracking.mlflow.server import stop as stop_server
from ecotone.experiments.tracking.mlflow.store import sqlite_file
from ecotone.experiments.tracking.mlflow.view import view_key, view_tag, view_value
from ecotone.experiments.tracking.names import acceptable, metric_names
from ecotone.experiments.tracking.scoreboard import Scoreboard
from ecotone.populations import facts
from ecotone.populations.errors import JournalError
from ecotone.populations.genome import Genome
from ecotone.populations.journal import Journal, Row
from ecotone.populations.trial import Evaluation, Goal, Gradient, Scores, Trial
from ecotone.testing.trackers import (
    GOALS,
    a_run,
    best,
    evaluation,
    expected,
    finish,
    front,
    genome,
    noted,
    scores,
    tell,
)

pytest.importorskip("mlflow")

ARTIFACTS = ("recipe.yaml", "front.json", "candidates.csv", "front.csv", "genomes.json", "environment.json")
GENEROUS = 240.0  # seconds for what happens within a few on an idle machine
History = dict[str, list[tuple[int, float, int]]]


# -- helpers -------------------------------------------------------------------------------------------------


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def history_of(uri: str, run_id: str) -> History:
    there = client(uri)
    return {
        key: [(m.step, m.value, m.timestamp) for m in there.get_metric_history(run_id, key)]
        for key in there.get_run(run_id).data.metrics
    }


def without_times(history: History) -> dict[str, list[tuple[int, float]]]:
    return {
        key: [(step, round(value, 12) if key in ("hypervolume", "best/mean") else value) for step, value, _ in rows]
        for key, rows in history.items()
        if key != "evaluations_per_second"
    }


def rows_in(uri: str) -> int:
    with sqlite3.connect(uri.removeprefix("sqlite:///"), timeout=30) as connection:
        (count,) = connection.execute("SELECT count(*) FROM metrics").fetchone()
        return int(count)


def eventually(condition: Callable[[], object]) -> None:
    """Wait for an event; the time is only there so that a test that fails ends."""
    end = time.monotonic() + GENEROUS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@pytest.fixture
def runs(tmp_path: Path, empty_store: Path) -> Path:
    """A directory of runs with its embedded store."""
    directory = tmp_path / "my runs"
    directory.mkdir()
    shutil.copyfile(empty_store, directory / "mlflow.db")
    return directory


# -- what is logged ------------------------------------------------------------------------------------------


def test_the_history_is_what_the_scores_imply(runs: Path) -> None:
    report = tracking.mirror(a_run(runs, 43, budget=100))
    assert report.error is None
    assert (report.complete, report.evaluations) == (True, 43)
    assert report.uri == tracking.default_uri(runs) == f"sqlite:///{runs}/mlflow.db"
    history = history_of(report.uri, report.run_id or "")
    assert without_times(history) == expected(43, range(1, 44))
    assert report.logged == sum(map(len, history.values()))


def test_long_searches_are_logged_in_strides(runs: Path) -> None:
    directory = a_run(runs, 38, budget=7000)
    report = tracking.mirror(directory)
    history = without_times(history_of(report.uri, report.run_id or ""))
    wanted = expected(38, [7, 14, 21, 28, 35])
    for key, value in expected(38, [35, 38]).items():  # the unfinished last window
        wanted[key] = (
            value if key.partition("/")[0] in ("front", "held_out", "references") else [*wanted[key], value[-1]]
        )
    assert history == wanted


def test_without_a_number_of_evaluations_the_stride_grows() -> None:
    board = Scoreboard([Goal("acc")], None, 0.0)
    steps = [line.step for row in _rows(9000) if (line := board.add(row))]
    assert steps[:1023] == list(range(1, 1024))
    assert steps[1023:1026] == [1024, 1026, 1028]
    assert len(steps) < 3000


def _rows(count: int) -> Iterator[Row]:
    return (Row(n, "d", (), {"acc": 0.5}, None, 0.0, float(n)) for n in range(count))


def test_rate_is_over_the_recent_past() -> None:
    """1,000 evaluations at 1 a second, then 1,000 at 50 a second in batches of 50."""
    board = Scoreboard([Goal("acc")], 1, 0.0)
    for n in range(1000):
        board.add(Row(n, "d", (), {"acc": 0.5}, None, 0.0, n + 1.0))
    for n in range(1000):
        line = board.add(Row(1000 + n, "d", (), {"acc": 0.5}, None, 0.0, 1000.0 + n // 50 + 1))
    assert line is not None
    assert line.values["evaluations_per_second"] == pytest.approx(50, rel=0.35)


def test_losses_of_calibration_tasks_are_means_since_the_step_before(runs: Path) -> None:
    """Gradient trials count as no evaluation, and hold none of them up while the search goes on."""
    directory = runs / "gradients"
    directory.mkdir(parents=True)
    (directory / "recipe.yaml").write_text("seed: 3\n")

    def learned(journal: Journal, first: int, losses: Sequence[float]) -> None:
        trials = [Trial(first + i, genome(0), wants=Gradient.of("math 1", i)) for i in range(len(losses))]
        journal.asked(first, len(trials), trials)
        told = [Evaluation({"math 1": loss}, gradient=np.zeros((1, 2))) for loss in losses]
        journal.arrived(zip(trials, told, strict=True))
        journal.told(first)

    with Journal.create(directory / "journal.sqlite", noted(3)) as journal:
        tell(journal, 0, 1)
        learned(journal, 1, [2.0, 4.0])
        tell(journal, 3, 4)
        learned(journal, 4, [1.0])
        report = tracking.mirror(directory)
        assert report.evaluations == 2
        tell(journal, 5, 6)
        finish(journal)
        journal.note(facts.STOP_REASON, "the budget is spent")
    report = tracking.mirror(directory)
    assert (report.evaluations, report.complete) == (3, True)
    history = history_of(report.uri, report.run_id)
    assert [(step, value) for step, value, _ in history["loss/math 1"]] == [(2, 3.0), (3, 1.0)]


def test_growing_journal_is_mirrored_piece_by_piece(runs: Path) -> None:
    directory = runs / "one"
    with Journal.create(directory / "journal.sqlite", noted(30)) as journal:
        for begin, end in ((0, 10), (10, 11), (11, 30)):
            tell(journal, begin, end)
            report = tracking.mirror(directory)
            assert (report.error, report.evaluations, report.complete) == (None, end, False)
            assert client(report.uri).get_run(report.run_id).info.status == "RUNNING"
        finish(journal, [best(30)])
    report = tracking.mirror(directory)
    history = history_of(report.uri, report.run_id or "")
    assert without_times(history) == expected(30, range(1, 31))
    assert client(report.uri).get_run(report.run_id).info.status == "FINISHED"


def test_a_trial_in_flight_holds_up_those_behind_it(runs: Path) -> None:
    directory = runs / "one"
    with Journal.create(directory / "journal.sqlite", noted(30)) as journal:
        trials = [Trial(n, genome(n)) for n in range(6)]
        journal.asked(0, 6, trials)
        journal.arrived([(t, evaluation(t.number)) for t in trials if t.number not in (2, 5)])
        assert tracking.mirror(directory).evaluations == 2
        journal.arrived([(trials[2], evaluation(2))])
        assert tracking.mirror(directory).evaluations == 5
        journal.arrived([(trials[5], evaluation(5))])
        finish(journal, [best(6)])
    report = tracking.mirror(directory)
    history = history_of(report.uri, report.run_id or "")
    assert without_times(history) == expected(6, range(1, 7))


def test_parameters_and_tags(runs: Path) -> None:
    directory = a_run(runs, 8, budget=8)
    report = tracking.mirror(directory)
    run = client(report.uri).get_run(report.run_id)
    assert run.info.run_name == "m2n2 seed 3, digits"
    assert {k: v for k, v in run.data.params.items() if k != "note"} == {
        "seed": "3",
        "models": '["a", "b"]',
        "search.type": "m2n2",
        "search.options.archive": "20",
    }
    assert run.data.params["note"] == "x" * 6000
    tags = run.data.tags
    assert tags["ecotone.run_dir"] == str(directory)
    assert (tags["algorithm"], tags["models"], tags["objectives"]) == ("m2n2", "a, b", "acc, loss")
    assert (tags["ecotone.signature"], tags["ecotone.state"]) == ("5ca1ab1e", "finished")
    assert tags["ecotone.stop_reason"] == "the budget is spent"
    assert "ecotone.error" not in tags
    assert client(report.uri).get_experiment(report.experiment_id).name == "merges"


def test_artifacts(runs: Path) -> None:
    report = tracking.mirror(a_run(runs, 30, budget=30))
    assert {file.path for file in client(report.uri).list_artifacts(report.run_id)} == {
        *ARTIFACTS,
        "images",
        "report.html",
    }
    recipe, front_file, candidates, table_file, genomes, environment = (
        next((runs / "mlartifacts").rglob(name)) for name in ARTIFACTS
    )
    assert recipe.read_text() == "seed: 3\n"
    shown = json.loads(front_file.read_text())
    assert shown["columns"] == ["number", "digest", "parents", "acc", "loss", "held_out/test acc"]
    assert [row[0] for row in shown["data"]] == front(30)
    assert [row[5] for row in shown["data"] if row[0] == best(30)] == [0.5 + best(30) / 4000]
    with table_file.open() as file:
        assert [int(row["number"]) for row in csv.DictReader(file)] == front(30)
    known = json.loads(genomes.read_text())
    assert known["models"] == ["a", "b"]
    assert list(known["members"]) == list(map(str, front(30)))
    for number in front(30):
        assert Genome.from_json(json.dumps(known["members"][str(number)]["genome"])) == genome(number)
    assert Genome.from_json(json.dumps(known["references"]["b"])) == genome(1000)
    assert json.loads(environment.read_text())["versions"] == {"numpy": "2.0"}
    with candidates.open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 30
    assert table[10]["failure"] == "not finite: acc: NaN"
    assert table[10]["acc"] == ""
    assert {k: table[11][k] for k in ("number", "parents", "digest")} == {
        "number": "11",
        "parents": "10",
        "digest": genome(11).digest,
    }
    assert float(table[11]["loss"]) == (scores(11) or {})["loss"]


@pytest.mark.parametrize(
    ("state", "status"),
    [("failed", "FAILED"), ("interrupted", "KILLED"), ("running", "KILLED"), ("finished", "FINISHED")],
)
def test_status_of_the_run(runs: Path, state: str, status: str) -> None:
    """A journal that says running while nobody writes it was killed."""
    directory = runs / "one"
    with Journal.create(directory / "journal.sqlite", noted(10)) as journal:
        tell(journal, 0, 5)
        journal.note(facts.STATE, state)
    report = tracking.mirror(directory)
    run = client(report.uri).get_run(report.run_id)
    assert (report.complete, run.info.status) == (True, status)
    assert run.data.tags["ecotone.state"] == ("killed" if state == "running" else state)


def test_a_resumed_run_runs_again_and_ends_like_an_uninterrupted_one(runs: Path) -> None:
    directory = runs / "one"
    with Journal.create(directory / "journal.sqlite", noted(7000)) as journal:
        tell(journal, 0, 10)
        journal.note(facts.STATE, "interrupted")
    first = tracking.mirror(directory)
    with Journal.open(directory / "journal.sqlite", write=True) as journal:
        journal.note(facts.STATE, "running")
        report = tracking.mirror(directory)
        assert client(report.uri).get_run(report.run_id).info.status == "RUNNING"
        tell(journal, 10, 35)
        finish(journal, [best(35)])
    report = tracking.mirror(directory)
    assert report.run_id == first.run_id
    assert client(report.uri).get_run(report.run_id).info.status == "FINISHED"
    history = without_times(history_of(report.uri, report.run_id or ""))
    assert history == expected(35, [7, 14, 21, 28, 35])


def test_an_extended_search_is_another_run_beside_its_first_end(runs: Path) -> None:
    """A logged front cannot be taken back: the view has the later run, and the earlier one is kept as it was."""
    directory = a_run(runs, 20, budget=20)
    first = tracking.mirror(directory)
    before = history_of(first.uri, first.run_id or "")
    with Journal.open(directory / "journal.sqlite", write=True) as journal:
        journal.note(facts.BUDGET, {"evaluations": 42, "seconds": None})
        journal.note(facts.STATE, "running")
        assert tracking.mirror(directory).run_id == first.run_id
        tell(journal, 20, 25)
        report = tracking.mirror(directory)
        assert (report.run_id != first.run_id, report.evaluations) == (True, 25)
        tell(journal, 25, 42)
        finish(journal, [best(42)])
    (directory / "tracking.json").unlink()
    last = tracking.mirror(directory)
    assert last.run_id == report.run_id
    assert without_times(history_of(last.uri, last.run_id or "")) == expected(42, range(1, 43))
    assert history_of(first.uri, first.run_id or "") == before
    earlier, later = (client(last.uri).get_run(run_id) for run_id in (first.run_id, last.run_id))
    assert (earlier.info.status, later.info.status) == ("FINISHED", "FINISHED")
    assert later.data.tags["ecotone.view"] == view_key(goals())
    assert earlier.data.tags["ecotone.view"] != later.data.tags["ecotone.view"]
    assert tracking.mirror(directory).logged == 0


def goals() -> list[Goal]:
    return [Goal(*goal) for goal in GOALS]  # type: ignore[arg-type]


def three(number: int) -> dict[str, float]:
    """What trial ``number`` scores in three objectives."""
    return {"a": (number * 37 % 41) / 41, "b": (number * 23 % 43) / 43, "c": -float(number * 11 % 17)}


def a_search_of_three(directory: Path, count: int) -> None:
    goals = json.dumps([["a", "maximize"], ["b", "maximize"], ["c", "minimize"]])
    with Journal.create(directory / "journal.sqlite", noted(count, goals=goals, held_out_goals=goals)) as journal:
        for n in range(count):
            trial = Trial(n, genome(n))
            journal.asked(n, 1, [trial])
            journal.arrived([(trial, Evaluation(three(n)))])
            journal.measured(trial.genome, Scores("held_out"), Evaluation({k: v / 2 for k, v in three(n).items()}))
        journal.note(facts.STATE, "finished")


def test_fronts_of_three_objectives(runs: Path) -> None:
    """All of them by the first objective; of each two objectives those that are not dominated in these two."""
    a_search_of_three(runs / "one", 40)
    report = tracking.mirror(runs / "one")
    history = without_times(history_of(report.uri, report.run_id or ""))

    def values(key: str) -> list[float]:
        assert [step for step, _ in history[key]] == list(range(len(history[key])))
        return [value for _, value in history[key]]

    points = [three(n) for n in range(40)]
    whole = sorted(_best(points, {"a": 1, "b": 1, "c": -1}), key=lambda p: p["a"])
    assert [dict(zip("abc", p, strict=True)) for p in zip(*(values(f"front/{o}") for o in "abc"), strict=True)] == whole
    assert values("front_held_out/c") == [p["c"] / 2 for p in whole]
    for x, y, signs in (("a", "b", (1, 1)), ("a", "c", (1, -1)), ("b", "c", (1, -1))):
        pair = sorted(_best(whole, dict(zip((x, y), signs, strict=True))), key=lambda p, x=x: p[x])  # type: ignore[misc]
        assert values(f"front_pairs/{x} under {y}") == [p[x] for p in pair]
        assert values(f"front_pairs/{y} over {x}") == [p[y] for p in pair]
        assert values(f"front_held_out_pairs/{y} over {x}") == [p[y] / 2 for p in pair]
        assert len(pair) < len(whole)


def _best(points: list[dict[str, float]], signs: dict[str, int]) -> list[dict[str, float]]:
    def dominates(p: dict[str, float], q: dict[str, float]) -> bool:
        pairs = [(p[name] * sign, q[name] * sign) for name, sign in signs.items()]
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    return [p for p in points if not any(dominates(q, p) for q in points)]


def test_the_hypervolume_is_there_while_the_search_goes_on(runs: Path) -> None:
    """Of scores in [0, 1] that are maximised, from 0: the same that `status` shows."""
    directory = runs / "one"
    goals = json.dumps([["a", "maximize"], ["b", "maximize"]])
    with Journal.create(directory / "journal.sqlite", noted(20, goals=goals)) as journal:
        for n in range(12):
            trial = Trial(n, genome(n))
            journal.asked(n, 1, [trial])
            journal.arrived([(trial, Evaluation({key: three(n)[key] for key in "ab"}))])
        report = tracking.mirror(directory)
        history = without_times(history_of(report.uri, report.run_id or ""))["hypervolume"]
        assert [step for step, _ in history] == list(range(1, 13))
        assert history == sorted(history)
        assert history[-1][1] == pytest.approx(Run(directory).status()["hypervolume"], abs=1e-12)


def test_pictures_of_the_evolving_front(runs: Path) -> None:
    """After 15, 30, 60 evaluations and at the end, once each, whenever the mirror stops and starts."""
    directory = runs / "one"
    with Journal.create(directory / "journal.sqlite", noted(70)) as journal:
        for begin, end in ((0, 20), (20, 31), (31, 70)):
            tell(journal, begin, end)
            tracking.mirror(directory)
        finish(journal, [best(70)])
    for _ in range(2):
        tracking.mirror(directory)
    files = [path.name for path in (runs / "mlartifacts").rglob("*.png")]
    assert sorted(int(re.findall(r"step.(\d+)", name)[0]) for name in files) == [15, 30, 60, 70]


def test_a_mirror_that_was_stopped_while_it_logged_the_front(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = a_run(runs, 40, budget=40)
    monkeypatch.setattr("ecotone.experiments.tracking.mlflow.run.ROWS_PER_BATCH", 4)

    def stopped(*_: object) -> None:
        raise OSError("stopped here")

    with monkeypatch.context() as during:
        logged = MlflowRecord._log

        def some(self: MlflowRecord, rows: Any) -> None:
            logged(self, rows)
            if any(key.startswith("front/") for key, *_ in rows):
                stopped()

        during.setattr(MlflowRecord, "_log", some)
        assert tracking.mirror(directory).error == "stopped here"
    report = tracking.mirror(directory)
    assert report.complete
    history = without_times(history_of(report.uri, report.run_id or ""))
    for key in ("front/acc", "front/loss", "hypervolume"):
        assert history[key] == expected(40, range(1, 41))[key]


def test_one_view_for_searches_of_the_same_objectives(runs: Path) -> None:
    """Whatever they hold out, in whatever order they name their objectives; its filter finds them all."""
    first = tracking.mirror(a_run(runs, 6, budget=6, name="one"))
    there = client(first.uri)
    tag = view_tag(goals())
    before = there.get_experiment(first.experiment_id).tags[tag]
    assert json.loads(before)["name"] == "Fronts: acc, loss"
    tracking.mirror(a_run(runs, 7, budget=7, name="two"))
    assert there.get_experiment(first.experiment_id).tags[tag] == before
    others = {"held_out_goals": json.dumps([["p", "maximize"], ["q", "maximize"]]), "goals": json.dumps(GOALS[::-1])}
    third = tracking.mirror(a_run(runs, 8, budget=8, name="three", **others))
    view = json.loads(there.get_experiment(first.experiment_id).tags[tag])
    state = json.loads(zlib.decompress(base64.b64decode(view["state"].removeprefix("deflate;"))))
    found = there.search_runs([first.experiment_id], state["searchFilter"])
    assert {run.info.run_id for run in found} >= {first.run_id, third.run_id}
    assert len(found) == 3
    charts = {(chart["type"], chart.get("selectedXAxisMetricKey"), chart.get("metricKey")) for chart in _charts(state)}
    assert ("LINE", "front_held_out/p", "front_held_out/q") in charts
    assert ("LINE", "", "hypervolume") in charts
    colours = [run.data.tags["mlflow.runColor"] for run in found]
    assert len(set(colours)) == 3


def _charts(state: dict[str, Any]) -> list[dict[str, Any]]:
    charts: list[dict[str, Any]] = state["compareRunCharts"]
    assert len({chart["uuid"] for chart in charts}) == len(charts)
    assert {chart["metricSectionId"] for chart in charts} == {one["uuid"] for one in state["compareRunSections"]}
    return charts


def test_a_colour_that_the_user_chose_stays(runs: Path) -> None:
    report = tracking.mirror(a_run(runs, 6, budget=6))
    client(report.uri).set_tag(report.run_id, "mlflow.runColor", "#123456")
    (runs / "one" / "tracking.json").unlink()
    tracking.mirror(runs / "one")
    assert client(report.uri).get_run(report.run_id).data.tags["mlflow.runColor"] == "#123456"


@pytest.mark.parametrize("count", [1, 2, 8, 40])
def test_a_view_fits_into_a_tag(count: int) -> None:
    many = [Goal(f"the accuracy of task number {index} of many") for index in range(count)]
    value = view_value(many, many, None, 0)
    assert value is not None
    assert len(value) <= 5000
    assert view_value(many, many, value, 1) is None
    assert view_value(many, many, "{ damaged", 0) == value


def test_names_that_mlflow_refuses(runs: Path) -> None:
    goals = [["acc@1 (%)", "maximize"], ["evaluations", "maximize"], ["../x//y", "maximize"], ["best/mean", "maximize"]]
    directory = runs / "one"
    recipe = {"a b": {"c@d": 1, "": None}, "flag": True, "empty": {}}
    with Journal.create(
        directory / "journal.sqlite", noted(5, goals=json.dumps(goals), recipe=json.dumps(recipe))
    ) as journal:
        for n in range(5):
            trial = Trial(n, genome(n))
            journal.asked(n, 1, [trial])
            journal.arrived([(trial, Evaluation({name: float(n + 1) for name, _ in goals}))])
        journal.note(facts.STATE, "finished")
    report = tracking.mirror(directory)
    assert (report.error, report.evaluations) == (None, 5)
    run = client(report.uri).get_run(report.run_id)
    assert run.data.metrics["evaluations"] == 5
    for key in ("acc_1 ___", "objective/evaluations", "x/y", "objective/best/mean"):
        assert run.data.metrics[key] == 5.0
    assert run.data.params == {"a b.c_d": "1", "a b.": "null", "flag": "true", "empty": "{}"}


def test_a_relative_store_means_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        tracking.absolute_uri("sqlite:///runs/mlflow.db?timeout=9") == f"sqlite:///{tmp_path}/runs/mlflow.db?timeout=9"
    )
    for uri in (tracking.default_uri("runs"), "http://127.0.0.1:5000", "databricks://profile"):
        assert tracking.absolute_uri(uri) == uri


def test_names_stay_apart() -> None:
    names = metric_names(["a(b)", "a[b]", "a_b_"])
    assert names == {"a(b)": "a_b_", "a[b]": "a_b__", "a_b_": "a_b___"}
    assert acceptable("///") == "unnamed"
    assert len(acceptable("x" * 999)) == 200


def test_more_objectives_than_one_batch_takes(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ecotone.experiments.tracking.mlflow.run.ROWS_PER_BATCH", 3)  # a line has up to nine rows
    report = tracking.mirror(a_run(runs, 12, budget=12))
    history = history_of(report.uri, report.run_id or "")
    assert without_times(history) == expected(12, range(1, 13))


# -- finding and being found ---------------------------------------------------------------------------------


def test_lost_notes_do_not_double_the_run(runs: Path) -> None:
    directory = a_run(runs, 12, budget=12)
    first = tracking.mirror(directory)
    (directory / "tracking.json").unlink()
    again = tracking.mirror(directory)
    assert (again.run_id, again.logged) == (first.run_id, 0)
    (directory / "tracking.json").write_text("{ damaged")
    assert tracking.mirror(directory).run_id == first.run_id


def test_a_run_deleted_in_mlflow_is_written_anew(runs: Path) -> None:
    directory = a_run(runs, 12, budget=12)
    first = tracking.mirror(directory)
    client(first.uri).delete_run(first.run_id)
    again = tracking.mirror(directory)
    assert again.run_id != first.run_id
    assert history_of(again.uri, again.run_id or "") == _all_history(first)


def _all_history(report: tracking.MirrorReport) -> History:
    return history_of(report.uri, report.run_id or "")


def test_a_moved_run_directory_is_found_where_it_is(runs: Path) -> None:
    first = tracking.mirror(a_run(runs, 5, budget=5))
    assert tracking.find_run_dir(first.run_id or "", first.uri) == runs / "one"
    (runs / "one").rename(runs / "other")
    with pytest.raises(tracking.TrackingError, match="is not there"):
        tracking.find_run_dir(first.run_id or "", first.uri)
    assert tracking.mirror(runs / "other").run_id == first.run_id
    assert tracking.find_run_dir(first.run_id or "", first.uri) == runs / "other"


def test_find_run_dir_explains(runs: Path) -> None:
    uri = tracking.default_uri(runs)
    with pytest.raises(tracking.TrackingError, match="not found"):
        tracking.find_run_dir("0" * 32, uri)
    with pytest.raises(tracking.TrackingError, match="is not there"):
        tracking.find_run_dir("0" * 32, tracking.default_uri(runs / "nowhere"))
    foreign = client(uri).create_run("0").info.run_id
    with pytest.raises(tracking.TrackingError, match="not made by Ecotone"):
        tracking.find_run_dir(foreign, uri)


def test_status_needs_no_mlflow(runs: Path) -> None:
    directory = a_run(runs, 6, budget=6)
    nothing = tracking.status(directory)
    assert (nothing["run_id"], nothing["mirrored"], nothing["mirroring"]) == (None, 0, False)
    report = tracking.mirror(directory)
    code = (
        "import json, sys\nfrom ecotone.experiments import tracking\n"
        f"print(json.dumps(tracking.status({str(directory)!r})))\n"
        "assert not {'mlflow', 'torch', 'ray'} & set(sys.modules), 'too much imported'"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert json.loads(output) == {
        "uri": report.uri,
        "experiment": "merges",
        "experiment_id": report.experiment_id,
        "run_id": report.run_id,
        "page": None,
        "mirrored": 6,
        "complete": True,
        "error": None,
        "mirroring": False,
    }
    assert tracking.ui_pages(directory) is None


def test_no_journal(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no journal"):
        tracking.mirror(tmp_path)


# -- faults --------------------------------------------------------------------------------------------------


def test_server_down_is_a_report_and_harms_nothing(tmp_path: Path) -> None:
    uri = f"http://user:secret@127.0.0.1:{free_port(0)}"
    directory = a_run(tmp_path, 12, budget=12, tracking=json.dumps({"uri": uri, "experiment": "merges"}))
    before = (directory / "journal.sqlite").read_bytes()
    report = tracking.mirror(directory)
    assert (report.complete, report.run_id) == (False, None)
    assert report.error == "the tracking server at 127.0.0.1 does not answer"
    assert (directory / "journal.sqlite").read_bytes() == before
    assert tracking.status(directory)["error"] == report.error
    assert "secret" not in (directory / "tracking.json").read_text()


def mirroring(directory: Path, rows: int = 30) -> subprocess.Popen[bytes]:
    """A process that mirrors in many small batches."""
    code = (
        "from ecotone.experiments.tracking import mirror\nfrom ecotone.experiments.tracking.mlflow import run\n"
        f"run.ROWS_PER_BATCH = {rows}\nmirror({str(directory)!r})"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_in_the_middle_then_mirrored_again(runs: Path, empty_store: Path, tmp_path: Path) -> None:
    directory = a_run(runs, 600, budget=600)
    undisturbed = tracking.mirror(directory, changes={"uri": _another_store(tmp_path, empty_store)})
    (directory / "tracking.json").unlink()
    uri = tracking.default_uri(runs)
    seen = []
    for wanted in (300, 1500):
        process = mirroring(directory)
        eventually(lambda enough=wanted: rows_in(uri) >= enough)
        process.kill()
        process.wait()
        seen.append(rows_in(uri))
    assert seen[0] < seen[1] < undisturbed.logged, "the kills came too late to test anything"
    report = tracking.mirror(directory)
    assert report.logged == undisturbed.logged - seen[1]
    assert history_of(uri, report.run_id or "") == _all_history(undisturbed)
    assert len(client(uri).search_runs([report.experiment_id])) == 1


def _another_store(tmp_path: Path, empty_store: Path) -> str:
    (tmp_path / "undisturbed").mkdir()
    shutil.copyfile(empty_store, tmp_path / "undisturbed" / "mlflow.db")
    return tracking.default_uri(tmp_path / "undisturbed")


@pytest.mark.slow
def test_two_processes_make_the_store_at_once(tmp_path: Path) -> None:
    """And what a process killed while making it left behind does not count."""
    directories = [a_run(tmp_path, 10, budget=10, name=name) for name in ("one", "two")]
    (tmp_path / "mlflow.db.new").write_bytes(b"half a database")
    processes = [mirroring(directory) for directory in directories]
    assert [process.wait() for process in processes] == [0, 0]
    states = [tracking.status(directory) for directory in directories]
    assert [state["error"] for state in states] == [None, None]
    assert [state["complete"] for state in states] == [True, True]
    assert states[0]["experiment_id"] == states[1]["experiment_id"]
    assert states[0]["run_id"] != states[1]["run_id"]
    assert not (tmp_path / "mlflow.db.new").exists()


# -- the process ---------------------------------------------------------------------------------------------


@pytest.fixture
def started() -> Iterator[Callable[[Path, int], subprocess.Popen[bytes]]]:
    """``tracking.start``, whose processes are gone after the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def begin(directory: Path, pid: int) -> subprocess.Popen[bytes]:
        processes.append(tracking.start(directory, pid))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_following_a_search(runs: Path, started: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A real process: detached, deaf to the user's folders, alone, ended by SIGTERM without loss, then by the end."""
    decoy = runs / "cwd" / "ecotone"
    decoy.mkdir(parents=True)
    (decoy / "__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.chdir(decoy.parent)
    directory = runs / "one"
    with Journal.create(directory / "journal.sqlite", noted(40)) as journal:
        tell(journal, 0, 10)
        first = started(directory, os.getpid())
        eventually(lambda: tracking.status(directory)["mirrored"] == 10)
        assert tracking.status(directory)["mirroring"]
        assert os.getsid(first.pid) == first.pid
        assert not tracking.wait(first, 0)
        assert tracking.mirror(directory, patience=0).error == "another process is mirroring this run"
        monkeypatch.setattr("ecotone.experiments.tracking.following._HANDOVER", 0.1)
        assert tracking.follow(directory, os.getpid()) is None
        first.send_signal(signal.SIGTERM)
        assert tracking.wait(first, GENEROUS)
        tell(journal, 10, 25)
        second = started(directory, os.getpid())
        eventually(lambda: tracking.status(directory)["mirrored"] == 25)
        tell(journal, 25, 40)
        finish(journal, [best(40)])
        assert tracking.wait(second, GENEROUS), "it ends with the search although the search's process goes on"
    assert (first.returncode, second.returncode) == (0, 0)
    known = tracking.status(directory)
    assert known["complete"]
    history = history_of(known["uri"], known["run_id"])
    assert without_times(history) == expected(40, range(1, 41))
    assert "complete: 40 evaluations" in (directory / "tracking.log").read_text()


def test_the_followed_process_is_killed(runs: Path) -> None:
    directory = runs / "one"
    with Journal.create(directory / "journal.sqlite", noted(40)) as journal:
        tell(journal, 0, 10)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    follower = threading.Thread(target=tracking.follow, args=(directory, sleeper.pid, 0.1))
    try:
        follower.start()
        eventually(lambda: tracking.status(directory)["mirrored"] == 10)
        known = tracking.status(directory)
        assert client(known["uri"]).get_run(known["run_id"]).info.status == "RUNNING"
    finally:
        sleeper.kill()  # and not reaped: a zombie is gone, too
    follower.join(GENEROUS)
    sleeper.wait()
    assert client(known["uri"]).get_run(known["run_id"]).info.status == "KILLED"


def test_a_run_resumed_while_its_mirror_still_waits_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is down, the search ends, another process resumes it: the first mirror does not leave at its end.

    Its patience is counted anew from the second end, on a clock that stands still meanwhile.
    """
    uri = f"http://127.0.0.1:{free_port(0)}"
    directory = a_run(tmp_path, 5, budget=5, tracking=json.dumps({"uri": uri, "experiment": "x"}))
    clock = Clock(monkeypatch)
    gone = subprocess.Popen(["true"])
    gone.wait()
    stop = threading.Event()
    follower = threading.Thread(target=tracking.follow, args=(directory, gone.pid, 0.01, 30.0, stop))
    with Journal.open(directory / "journal.sqlite", write=True) as journal:
        follower.start()
        try:
            eventually(lambda: tracking.status(directory)["error"])
            journal.note(facts.STATE, "running")
            clock.looks(3)
            clock.passes(1000.0)
            clock.looks(3)
            assert follower.is_alive()
            journal.note(facts.STATE, "finished")
            clock.looks(3)
            assert follower.is_alive()
            clock.passes(1000.0)
            follower.join(GENEROUS)
            assert not follower.is_alive()
        finally:
            stop.set()


class Clock:
    """The clock of a mirror in this process: it moves only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.read = 0
        monkeypatch.setattr("ecotone.experiments.tracking.following.time", SimpleNamespace(monotonic=self.monotonic))

    def monotonic(self) -> float:
        self.read += 1
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds

    def looks(self, times: int) -> None:
        """Return when the mirror has looked at the clock, and so at the journal, so many times more."""
        wanted = self.read + 3 * times
        eventually(lambda: self.read >= wanted)


def test_waiting_ends_when_the_server_is_down(tmp_path: Path, started: Callable[..., Any]) -> None:
    """Long before the seconds that it may take, and before the mirror gives up."""
    uri = f"http://127.0.0.1:{free_port(0)}"
    directory = a_run(tmp_path, 5, budget=5, tracking=json.dumps({"uri": uri, "experiment": "x"}))
    process = started(directory, os.getpid())
    assert not tracking.wait(process, 10 * GENEROUS, directory)
    assert tracking.status(directory)["error"]


@pytest.mark.slow
def test_patience_is_bounded_when_the_server_stays_down(tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{free_port(0)}"
    directory = a_run(tmp_path, 5, budget=5, tracking=json.dumps({"uri": uri, "experiment": "x"}))
    report = tracking.follow(directory, os.getpid(), poll=0.1, patience=2.0)
    assert report is not None
    assert report.error is not None


# -- servers -------------------------------------------------------------------------------------------------


def answers(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/health", timeout=2):
            return True
    except OSError:
        return False


def test_port_in_use(runs: Path) -> None:
    directory = a_run(runs, 3, budget=3)
    with pytest.raises(tracking.TrackingError, match="nothing of it is in MLflow"):
        tracking.serve(directory)
    tracking.mirror(directory)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(tracking.TrackingError, match=f"port {port} .* in use.*--port"):
            tracking.serve(directory, port)


@pytest.mark.slow
def test_serving_the_embedded_store(runs: Path) -> None:
    """The address that is printed answers, on the loopback interface, until SIGINT; then no server is left."""
    report = tracking.mirror(a_run(runs, 3, budget=3))
    port = free_port(0)
    code = f"from ecotone.experiments import tracking\ntracking.serve({str(runs / 'one')!r}, {port})"
    process = subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Starting MLflow")
        page = f"http://127.0.0.1:{port}/#/experiments/{report.experiment_id}/runs"
        view = f"{page}?compareRunsMode=CHART&viewStateShareKey={view_key(goals())}"
        assert process.stdout.readline().split() == ["All", "fronts:", view]
        assert process.stdout.readline().split() == ["This", "search:", f"{page}/{report.run_id}"]
        assert answers(port)
        assert client(f"http://127.0.0.1:{port}").get_run(report.run_id).info.status == "FINISHED"
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0
        assert not answers(port)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_server_that_comes_back_gets_everything(
    tmp_path: Path, empty_store: Path, started: Callable[..., Any]
) -> None:
    """Down at the start, killed in the middle: the history is the one an embedded store has."""
    port = free_port(0)
    uri = f"http://127.0.0.1:{port}"
    store = sqlite_file(_another_store(tmp_path, empty_store))
    assert store is not None
    directory = tmp_path / "runs" / "one"
    with Journal.create(
        directory / "journal.sqlite", noted(60, tracking=json.dumps({"uri": uri, "experiment": "merges"}))
    ) as journal:
        mirror = started(directory, os.getpid())
        tell(journal, 0, 20)
        eventually(lambda: tracking.status(directory)["error"])
        server = serving(f"sqlite:///{store}", directory, port)
        try:
            eventually(lambda: tracking.status(directory)["mirrored"] == 20)
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            tell(journal, 20, 45)
            eventually(lambda: tracking.status(directory)["error"])
            server = serving(f"sqlite:///{store}", directory, port)
            tell(journal, 45, 60)
            finish(journal, [best(60)])
            assert tracking.wait(mirror, GENEROUS)
            assert mirror.returncode == 0
            known = tracking.status(directory)
            pages = tracking.ui_pages(directory)
            assert pages is not None
            assert pages.run == f"{uri}/#/experiments/{known['experiment_id']}/runs/{known['run_id']}"
            assert pages.view.endswith(view_key(goals()))
            assert tracking.find_run_dir(known["run_id"], uri) == directory
        finally:
            stop_server(server)
    history = history_of(f"sqlite:///{store}", known["run_id"])
    assert without_times(history) == expected(60, range(1, 61))
