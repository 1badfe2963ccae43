"""The conformance suite of trackers, and the short journals that it mirrors.

The author of a tracker gives its tests a subclass of ``TrackerSuite`` with one fixture::

    class TestMine(TrackerSuite):
        @pytest.fixture
        def case(self, tmp_path, monkeypatch):
            return Mine(tmp_path, monkeypatch)

where ``Mine`` is a ``Case``: what the tracker is called, how it is set, how it is down, and what it shows, read back.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from ecotone.experiments import marks, tracking
from ecotone.populations import facts
from ecotone.populations.facts import Note
from ecotone.populations.genome import Genome
from ecotone.populations.journal import Journal
from ecotone.populations.trial import Evaluation, Scores, Trial

GOALS = (("acc", "maximize"), ("loss", "minimize"))
FILES = frozenset(
    ("recipe.yaml", "front.json", "candidates.csv", "front.csv", "genomes.json", "environment.json", "report.html")
)
"""The files that a tracker gets of a finished search with two objectives."""

History = Mapping[str, Sequence[tuple[int, float]]]
"""By metric: steps on its axis, and values."""


@dataclass(frozen=True)
class Shown:
    """The content of one run, read back from a tracker.

    Args:
        history: Steps and values of each metric that has a history.
        summary: The latest or only value of each metric.
        parameters: The recipe, flattened.
        table: The front: columns and rows; None when there is none.
        files: Names of the files, without pictures.
        runs: The number of the tracker's runs that show the search.
    """

    history: History
    summary: Mapping[str, float]
    parameters: Mapping[str, str]
    table: tuple[Sequence[str], Sequence[Sequence[Any]]] | None
    files: frozenset[str]
    runs: int


class Case(Protocol):
    """How a tracker is tried.

    Attributes:
        tracker: Its name in recipes.
        settings: Its settings while it is there.
    """

    tracker: str
    settings: Mapping[str, Any]

    def down(self) -> AbstractContextManager[Mapping[str, Any]]:
        """Inside, its settings for a place that cannot be reached."""

    def shown(self, directory: Path) -> Shown:
        """The content that it shows of the run in ``directory``."""


# -- journals ------------------------------------------------------------------------------------------------


def genome(number: int) -> Genome:
    """The merge of trial ``number``; numbers 0 and 1000 are the models ``a`` and ``b``."""
    return Genome.uniform(10, [number / 7, 1.0])


def scores(number: int) -> dict[str, float] | None:
    """The scores of trial ``number``. Accuracy costs loss. Every seventh trial fails. Scores repeat after 28 trials."""
    if number % 7 == 3:
        return None
    turn = number % 28 + 12
    return {"acc": (turn * 37 % 101) / 101, "loss": 1.0 + (turn * 37 % 101 * 0.6 + turn * 53 % 29) / 89}


def evaluation(number: int) -> Evaluation:
    """The evaluation of trial ``number``."""
    scored = scores(number)
    return Evaluation.failed("not finite", "acc: NaN") if scored is None else Evaluation(scored, seconds=0.5)


def noted(budget: int | None, **others: str) -> list[Note]:
    """The facts of a journal whose budget is so many evaluations; ``others`` replace them."""
    recipe = {
        "seed": 3,
        "models": ["a", "b"],
        "search": {"type": "m2n2", "options": {"archive": 20}},
        "note": "x" * 9000,
    }
    told = {
        "recipe": json.dumps(recipe),
        "name": "digits",
        "algorithm": "m2n2",
        "signature": "5ca1ab1e",
        "seed": "3",
        "goals": json.dumps(GOALS),
        "held_out_goals": json.dumps([["test acc", "maximize"]]),
        "budget": json.dumps({"evaluations": budget, "seconds": None}),
        "state": "running",
        "tracking": json.dumps({"uri": None, "experiment": "merges"}),
        "models": json.dumps(["a", "b"]),
        "versions": json.dumps({"numpy": "2.0"}),
        **others,
    }
    return marks.with_mark([Note(name, text) for name, text in told.items()])  # a run of this user's own


def tell(journal: Journal, begin: int, end: int, batch: int = 5) -> None:
    """Trials ``begin`` to ``end - 1``, in batches."""
    for first in range(begin, end, batch):
        numbers = range(first, min(first + batch, end))
        trials = [Trial(n, genome(n), (n - 1,) if n else ()) for n in numbers]
        journal.asked(first, len(trials), trials)
        journal.arrived([(t, evaluation(t.number)) for t in trials])
        journal.told(first)


def finish(journal: Journal, held_out: Sequence[int] = (), state: str = "finished") -> None:
    """Score the models, and the trials ``held_out`` on held-out data, and note the end."""
    for name, number in (("a", 0), ("b", 1000)):
        journal.refer(name, genome(number))
    journal.measured(genome(1000), Scores(), Evaluation({"acc": 0.25, "loss": 2.5}))
    for number in (0, 1000, *held_out):
        journal.measured(genome(number), Scores("held_out"), Evaluation({"test acc": 0.5 + number / 4000}))
    journal.note(facts.STATE, state)


def a_run(runs: Path, count: int, budget: int | None, name: str = "one", **others: str) -> Path:
    """A finished run of ``count`` evaluations."""
    directory = runs / name
    directory.mkdir(parents=True)
    (directory / "recipe.yaml").write_text("seed: 3\n")
    with Journal.create(directory / "journal.sqlite", noted(budget, **others)) as journal:
        tell(journal, 0, count)
        finish(journal, held_out=[best(count)])
        journal.note(facts.STOP_REASON, "the budget is spent")
    return directory


def best(count: int) -> int:
    """The trial of best mean, in ranges over the models; the first of equals."""
    means = {n: mean(s) for n in range(count) if (s := scores(n))}
    return max(means, key=lambda n: (means[n], -n))


def mean(found: Mapping[str, float]) -> float:
    """The mean of shares of the range from the worse to the better model."""
    a, b = scores(0) or {}, {"acc": 0.25, "loss": 2.5}
    assert b["acc"] < a["acc"]
    assert b["loss"] > a["loss"]
    return (
        (found["acc"] - b["acc"]) / (a["acc"] - b["acc"]) + (b["loss"] - found["loss"]) / (b["loss"] - a["loss"])
    ) / 2


def front(count: int) -> list[int]:
    """Trials that no other dominates, by accuracy."""
    ok = {n: s for n in range(count) if (s := scores(n))}
    kept = [
        n
        for n, s in ok.items()
        if not any(
            o["acc"] >= s["acc"] and o["loss"] <= s["loss"] and (o != s or m < n) for m, o in ok.items() if m != n
        )
    ]
    return sorted(kept, key=lambda n: (ok[n]["acc"], n))


def volume(count: int) -> float:
    """The hypervolume of the front, down to accuracy 0 and loss 2.5, the worst scores of the reference merges."""
    area, covered = 0.0, 0.0
    for number in front(count):  # by accuracy: each adds a strip
        found = scores(number) or {}
        area += max(0.0, found["acc"] - covered) * max(0.0, 2.5 - found["loss"]) if found["loss"] < 2.5 else 0.0
        covered = max(covered, found["acc"])
    return round(area, 12)


def expected(count: int, borders: Sequence[int]) -> dict[str, list[tuple[int, float]]]:
    """The history that the scores imply, computed the slow way; rates are left out."""
    history: dict[str, list[tuple[int, float]]] = {}
    for before, step in zip([0, *borders], borders, strict=False):
        window = [s for n in range(before, step) if (s := scores(n))]
        ok = [s for n in range(step) if (s := scores(n))]
        values = {
            "evaluations": step,
            "failures": step - len(ok),
            "front_size": len(front(step)),
            "best/acc": max(s["acc"] for s in ok),
            "best/loss": min(s["loss"] for s in ok),
        }
        if window:
            values["acc"] = math.fsum(s["acc"] for s in window) / len(window)
            values["loss"] = math.fsum(s["loss"] for s in window) / len(window)
        for key, value in values.items():
            history.setdefault(key, []).append((step, value))
    history.update({key: [(count, value)] for key, value in expected_end(count).items()})
    history["hypervolume"] = [(step, volume(step)) for step in borders]
    history["best/mean"] = [(step, round(mean(scores(best(step)) or {}), 12)) for step in borders]
    for name in ("acc", "loss"):
        history[f"front/{name}"] = [(k, scores(n)[name]) for k, n in enumerate(front(count))]  # type: ignore[index]
    return history


def expected_end(count: int) -> dict[str, float]:
    """The metrics at the end: held-out scores of the best, and scores of the models."""
    return {
        "held_out/test acc": 0.5 + best(count) / 4000,
        "references/a/acc": scores(0)["acc"],  # type: ignore[index]
        "references/a/loss": scores(0)["loss"],  # type: ignore[index]
        "references/a/held_out/test acc": 0.5,
        "references/b/acc": 0.25,
        "references/b/loss": 2.5,
        "references/b/held_out/test acc": 0.75,
    }


def without_rates(history: History) -> dict[str, list[tuple[int, float]]]:
    """The metrics that follow from the scores alone, to be compared with ``expected``."""
    digits = {"hypervolume": 12, "best/mean": 12}
    return {
        key: [(step, round(value, digits.get(key, 17))) for step, value in rows]
        for key, rows in history.items()
        if key != "evaluations_per_second"
    }


# -- the suite -----------------------------------------------------------------------------------------------

COUNT = 43
_KILLED = """
import itertools, os, signal, sys
from ecotone.experiments.tracking import following, mirroring, protocol

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

def lines(self, journal, finished, given=mirroring.Mirror._lines):
    yield from itertools.islice(given(self, journal, finished), 20)
    die()

if {when!r} == "in the middle":
    mirroring.Mirror._lines = lines
else:
    mirroring.write_artifacts = die
following.mirror({directory!r}, {tracker!r})
"""


class TrackerSuite:
    """A conformance suite for trackers. A subclass has a fixture ``case``."""

    @pytest.fixture
    def directory(self, case: Case, tmp_path: Path) -> Path:
        """A finished run that names the tracker."""
        return a_run(tmp_path / "runs", COUNT, COUNT, tracking=json.dumps({case.tracker: dict(case.settings)}))

    def mirrored(self, case: Case, directory: Path) -> tracking.MirrorReport:
        """The report of a mirror that must not fail."""
        report = tracking.mirror(directory, case.tracker)
        assert (report.error, report.complete, report.evaluations) == (None, True, COUNT)
        return report

    def whole(self, case: Case, directory: Path) -> Shown:
        """The content that the tracker shows, which must be the whole search, once."""
        shown = case.shown(directory)
        wanted = expected(COUNT, range(1, COUNT + 1))
        ended = expected_end(COUNT)
        history = without_rates(shown.history)
        assert {key: rows for key, rows in history.items() if key not in ended} == {
            key: rows for key, rows in wanted.items() if key not in ended
        }
        assert {key: shown.summary[key] for key in ended} == ended
        assert shown.runs == 1
        return shown

    def test_it_says_all_of_itself(self, case: Case) -> None:
        """The registry takes it, and its words are there."""
        settings = tracking.TRACKERS.get(case.tracker, "tracker").model_validate(dict(case.settings))
        assert settings.describe()
        assert settings.installed()
        assert settings.recorded().recorded() == settings.recorded()

    def test_a_search_is_shown_whole(self, case: Case, directory: Path) -> None:
        """Metrics at their steps, the front as metrics and as a table, the recipe, the files."""
        report = self.mirrored(case, directory)
        assert report.logged > COUNT
        shown = self.whole(case, directory)
        assert {key: shown.parameters[key] for key in ("seed", "models", "search.type", "search.options.archive")} == {
            "seed": "3",
            "models": '["a", "b"]',
            "search.type": "m2n2",
            "search.options.archive": "20",
        }
        assert shown.table is not None
        columns, rows = shown.table
        assert list(columns) == ["number", "digest", "parents", "acc", "loss", "held_out/test acc"]
        assert [row[0] for row in rows] == front(COUNT)
        assert [row[3] for row in rows] == [(scores(number) or {})["acc"] for number in front(COUNT)]
        assert shown.files == FILES

    def test_a_second_mirror_adds_nothing(self, case: Case, directory: Path) -> None:
        """Nor does one that has lost its notes."""
        first = self.mirrored(case, directory)
        again = self.mirrored(case, directory)
        assert (again.logged, again.run_id) == (0, first.run_id)
        self.whole(case, directory)
        (directory / "tracking.json").unlink()
        assert self.mirrored(case, directory).run_id == first.run_id
        self.whole(case, directory)

    @pytest.mark.parametrize("when", ["in the middle", "at the end"])
    def test_a_killed_mirror_is_made_good(self, case: Case, directory: Path, when: str) -> None:
        """Killed (-9) among the lines, or within the end: the next one leaves no row out, and none double."""
        code = _KILLED.format(when=when, directory=str(directory), tracker=case.tracker)
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
        self.mirrored(case, directory)
        self.whole(case, directory)

    def test_a_growing_journal_is_mirrored_piece_by_piece(self, case: Case, tmp_path: Path) -> None:
        """By processes that come and go, over an end that is none."""
        directory = tmp_path / "runs" / "one"
        settings = json.dumps({case.tracker: dict(case.settings)})
        with Journal.create(directory / "journal.sqlite", noted(COUNT, tracking=settings)) as journal:
            (directory / "recipe.yaml").write_text("seed: 3\n")
            for begin, end in ((0, 10), (10, 11), (11, 30)):
                tell(journal, begin, end)
                report = tracking.mirror(directory, case.tracker)
                assert (report.error, report.evaluations, report.complete) == (None, end, False)
            journal.note(facts.STATE, "interrupted")
        report = tracking.mirror(directory, case.tracker)
        assert (report.error, report.evaluations, report.complete) == (None, 30, True)
        with Journal.open(directory / "journal.sqlite", write=True) as journal:
            journal.note(facts.STATE, "running")
            tell(journal, 30, COUNT)
            finish(journal, [best(COUNT)])
        self.mirrored(case, directory)
        self.whole(case, directory)

    def test_a_search_that_is_judged_after_an_end(self, case: Case, tmp_path: Path) -> None:
        """A search stopped between its budget and its front goes on: no evaluation is new, and all of it is shown."""
        directory = tmp_path / "runs" / "one"
        settings = json.dumps({case.tracker: dict(case.settings)})
        with Journal.create(directory / "journal.sqlite", noted(COUNT, tracking=settings)) as journal:
            (directory / "recipe.yaml").write_text("seed: 3\n")
            tell(journal, 0, COUNT)
            journal.note(facts.STATE, "interrupted")
        self.mirrored(case, directory)
        with Journal.open(directory / "journal.sqlite", write=True) as journal:
            finish(journal, [best(COUNT)])
        self.mirrored(case, directory)
        self.whole(case, directory)

    def test_an_extended_search_leaves_its_first_end_alone(self, case: Case, tmp_path: Path) -> None:
        """A logged front cannot be taken back. So the search goes on in another run, which shows all of it."""
        tracked = json.dumps({case.tracker: dict(case.settings)})
        directory = a_run(tmp_path / "runs", 20, 20, tracking=tracked)
        first = tracking.mirror(directory, case.tracker)
        assert (first.error, first.complete) == (None, True)
        with Journal.open(directory / "journal.sqlite", write=True) as journal:
            journal.note(facts.BUDGET, {"evaluations": COUNT, "seconds": None})
            journal.note(facts.STATE, "running")
            tell(journal, 20, COUNT)
            finish(journal, [best(COUNT)])
        assert self.mirrored(case, directory).run_id != first.run_id
        shown = case.shown(directory)
        assert without_rates(shown.history)["front/acc"] == expected(COUNT, range(1, COUNT + 1))["front/acc"]
        assert without_rates(shown.history)["acc"] == expected(COUNT, range(1, COUNT + 1))["acc"]
        assert shown.runs == 2
        assert self.mirrored(case, directory).logged == 0

    def test_down_is_a_report_and_loses_nothing(self, case: Case, directory: Path) -> None:
        """The journal stays as it is, the notes name the error, and later all of it arrives."""
        before = (directory / "journal.sqlite").read_bytes()
        with case.down() as settings:
            report = tracking.mirror(directory, case.tracker, dict(settings))
        assert report.error
        assert (report.complete, report.evaluations) == (False, 0)
        assert tracking.status(directory, case.tracker)["error"] == report.error
        assert (directory / "journal.sqlite").read_bytes() == before
        self.mirrored(case, directory)
        assert tracking.status(directory, case.tracker)["error"] is None
        self.whole(case, directory)
