"""Best and mean have one meaning: in tables, the front, trackers, what is exported, and the manager."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from managing import begun, ended

from ecotone.experiments.report import closing_table, console, front_table
from ecotone.experiments.runs import Run
from ecotone.experiments.tracking.scoreboard import Scoreboard
from ecotone.experiments.tracking.subject import Subject
from ecotone.experiments.tracking.summary import summary_of
from ecotone.fitness.pools import Batch, Completed
from ecotone.populations import facts
from ecotone.populations.errors import InputError
from ecotone.populations.facts import Note
from ecotone.populations.genome import Genome
from ecotone.populations.journal import Journal
from ecotone.populations.pareto import ParetoFront
from ecotone.populations.population import ElitistArchive
from ecotone.populations.ranking import Leader, Scale
from ecotone.populations.trial import Evaluation, Goal, Outcome, Scores, Trial, oriented
from ecotone.search.cma_es import CmaEsSettings
from ecotone.search.kinds import Context
from ecotone.search.manager import Manager, Schedule
from ecotone.search.optuna_search import OptunaSettings
from ecotone.testing.searches import SPACE

MIXED = (Goal("accuracy"), Goal("bits", "minimize"))
# Of two models one is exact and one compresses well. The second candidate is the worst of all, and yet the plain sum
# of accuracy and bits is largest for it.
MODELS = {"exact": (0.9, 3.0), "terse": (0.5, 1.0), "average": (0.7, 2.0)}
POINTS = [(0.6, 1.4), (0.4, 9.0), (0.8, 1.6), (0.9, 3.0), (0.85, 2.5)]


def genome(number: int) -> Genome:
    return Genome.uniform(10, [number / 10, 1.0])


class Listed:
    """A search whose trials are known beforehand."""

    def __init__(self, count: int) -> None:
        self._count, self._next = count, 0

    @property
    def done(self) -> bool:
        return self._next == self._count

    def ask(self, n: int) -> list[Trial]:
        trials = [Trial(number, genome(number)) for number in range(self._next, min(self._next + n, self._count))]
        self._next += len(trials)
        return trials

    def tell(self, trial: Trial, evaluation: Evaluation, outcome: Outcome) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {"next": self._next}

    def restore(self, state: dict[str, Any]) -> None:
        self._next = state["next"]


class Told:
    """A pool that knows the scores."""

    slots = 1

    def __init__(self, goals: Sequence[Goal], points: Sequence[Sequence[float]]) -> None:
        self._goals, self._points, self._batches = goals, points, list[Batch]()

    def submit(self, batch: Batch) -> None:
        self._batches.append(batch)

    def completed(self, timeout: float | None = None) -> Completed:
        done, self._batches = self._batches, []
        return [(batch, [evaluation(self._goals, self._points[t.number]) for t in batch.trials]) for batch in done]


def evaluation(goals: Sequence[Goal], point: Sequence[float]) -> Evaluation:
    return Evaluation({goal.name: float(value) for goal, value in zip(goals, point, strict=True)})


def searched(directory: Path, goals: Sequence[Goal], points: Sequence[Sequence[float]]) -> Manager:
    """The manager of a search that ended, whose reference merges are not scored yet."""
    directory.mkdir()
    pairs = json.dumps([[goal.name, goal.direction] for goal in goals])
    noted = {"name": "toy", "goals": pairs, "held_out_goals": pairs, "models": json.dumps(["exact", "terse"])}
    Journal.create(directory / "journal.sqlite", starmap(Note, {**noted, "recipe": '{"seed": 0}'}.items())).close()
    pool = Told(goals, points)
    archive = ElitistArchive(goals, 5)
    manager = begun(directory / "journal.sqlite", Listed(len(points)), archive, goals, pool, Schedule())  # type: ignore[arg-type]
    assert ended(manager) == "converged"
    return manager


def refer(directory: Path, goals: Sequence[Goal], models: dict[str, Sequence[float]]) -> None:
    """Score the reference merges."""
    with Journal.open(directory / "journal.sqlite", write=True) as journal:
        for index, (name, point) in enumerate(models.items()):
            merge = Genome.uniform(10, [index, 7.0])
            journal.refer(name, merge)
            journal.measured(merge, Scores(), evaluation(goals, point))
            journal.measured(merge, Scores("held_out"), evaluation(goals, point))
        journal.note(facts.STATE, "finished")


def bests(directory: Path) -> dict[str, Any]:
    """The number of the best member, as each place has it."""
    run = Run(directory)
    with run.journal() as journal:
        subject = Subject.of(journal, directory)
        board = Scoreboard(subject.goals, 1, subject.created)
        lines = [line for row in journal.rows() if (line := board.add(row))]
        summary = summary_of(journal, board, subject)
        row = board.best(summary.references)
        late = board.late(summary.references)
    shown = [line.values["best/mean"] for line in [*lines, *late] if "best/mean" in line.values]
    scale, _ = run.scales()
    best = run.best()
    assert best is not None
    assert row is not None
    assert shown[-1] == pytest.approx(scale.mean(best.scores))
    assert len(shown) == len(lines)
    table = closing_table(run).columns[0]
    return {
        "best": best.id,
        "export": run.trial("best").number,
        "status": run.status()["best"]["id"],
        "front": run.front()[0].id,
        "table": int(next(str(cell) for cell in table.cells if "best" in str(cell)).split("member ")[1].rstrip(")")),
        "tracker": row.number,
    }


def test_the_worst_model_has_the_lowest_mean_and_its_column_says_what_it_is_of(tmp_path: Path) -> None:
    searched(tmp_path / "run", MIXED, POINTS)
    refer(tmp_path / "run", MIXED, MODELS)
    run = Run(tmp_path / "run")
    assert set(bests(tmp_path / "run").values()) == {2}
    scale, held_out = run.scales()
    models = dict.fromkeys(MODELS, 0.5)
    # exact: (1 + 0) / 2, terse: (0 + 1) / 2; member 2: ((.8 - .5) / .4 + (3 - 1.6) / 2) / 2
    found = {str(one.id): scale.mean(one.scores) for one in [*run.references(), *run.front()]}
    assert found == pytest.approx(models | {"2": 0.725, "0": 0.525, "3": 0.5, "4": 0.5625})
    assert held_out.mean({"accuracy": 0.9, "bits": 1.0}) == pytest.approx(1.0)
    terminal = console()
    with terminal.capture() as captured:
        terminal.print(closing_table(run))
        terminal.print(front_table(run, run.front()))
    text = " ".join(captured.get().split())
    assert text.count("mean of") == 4
    assert "each score as a share of its range over the models and their average, 0 the worst and 1 the best" in text
    assert "0.7250" in text


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "goals",
    [MIXED, (Goal("a", "minimize"), Goal("b", "minimize"), Goal("c")), (Goal("a"), Goal("b"))],
    ids=["mixed", "three", "percents"],
)
def test_all_places_agree_on_the_best_member(tmp_path: Path, goals: tuple[Goal, ...], seed: int) -> None:
    rng = np.random.default_rng([seed, len(goals)])
    units = 10.0 ** rng.integers(-2, 4, len(goals))
    points = (rng.uniform(-1, 1, (30, len(goals))) * units).tolist()
    manager = searched(tmp_path / "run", goals, points)
    before = bests(tmp_path / "run")
    assert set(before.values()) == {manager.progress.best}
    assert manager.progress.best_scores == evaluation(goals, points[manager.progress.best or 0]).scores
    refer(tmp_path / "run", goals, {"exact": points[3], "terse": points[5], "average": points[7]})
    assert len(set(bests(tmp_path / "run").values())) == 1


def test_the_best_does_not_depend_on_units(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    points, models = rng.uniform(0.2, 0.9, (40, 2)), rng.uniform(0.2, 0.9, (3, 2))
    for name, factor in (("bits", 1.0), ("nats", np.log(2)), ("thousands", 1000.0)):
        unit = np.array([1.0, factor])
        searched(tmp_path / name, MIXED, (points * unit).tolist())
        refer(tmp_path / name, MIXED, dict(zip(("exact", "terse", "average"), models * unit, strict=True)))
    assert len({bests(tmp_path / name)["best"] for name in ("bits", "nats", "thousands")}) == 1


def test_shares_are_added_as_they_are_to_the_last_bit(tmp_path: Path) -> None:
    goals = (Goal("a"), Goal("b"), Goal("c"))
    points = np.random.default_rng(1).uniform(size=(50, 3)).tolist()
    manager = searched(tmp_path / "run", goals, points)
    refer(tmp_path / "run", goals, {"exact": (0.1, 0.9, 0.4), "terse": (0.9, 0.3, 0.1)})
    plain = [sum(point) / 3 for point in points]
    assert set(bests(tmp_path / "run").values()) == {int(np.argmax(plain))}
    assert manager.progress.quality == max(plain)
    scale, _ = Run(tmp_path / "run").scales()
    assert (scale.unit, scale.title, scale.words) == ("shares", "mean", "")
    assert [scale.mean(evaluation(goals, point).scores) for point in points] == plain


def test_one_objective_is_its_score() -> None:
    goals = (Goal("loss", "minimize"),)
    scale = Scale.of(goals, [[-3.0], [-1.0]], [[-2.0], [-4.0]])
    assert scale.unit == "score"
    assert scale.mean({"loss": 3.0}) == -3.0


def test_what_cannot_be_measured_is_not_shown() -> None:
    assert not Scale.of(MIXED, [[0.5, -2.0]]).known
    assert Scale.of(MIXED, [[0.5, -2.0]]).mean({"accuracy": 0.5, "bits": 2.0}) is None
    half = Scale.of(MIXED, [[0.5, -2.0], [0.7, -2.0]])  # bits are the same
    assert half.mean({"accuracy": 0.6, "bits": 2.0}) == pytest.approx(0.5)
    assert half.mean({"accuracy": 0.6}) is None
    assert half.mean(None) is None
    assert "everything scored so far" in half.words
    largest = Scale.of(MIXED, [[-1.7e308, -1.7e308], [1.7e308, 1.7e308]])
    assert largest.mean({"accuracy": 1.7e308, "bits": 0.0}) == pytest.approx(0.75)


def test_nothing_scored_has_no_best(tmp_path: Path) -> None:
    searched(tmp_path / "run", MIXED, [])
    run = Run(tmp_path / "run")
    assert run.best() is None
    assert run.front() == []
    with pytest.raises(InputError, match="nothing has been scored yet"):
        run.trial("best")


@pytest.mark.parametrize("shares", [True, False])
def test_the_leader_is_the_best_of_the_front_in_whatever_order_candidates_come(shares: bool) -> None:
    goals = (Goal("a"), Goal("b")) if shares else MIXED
    rng = np.random.default_rng(2)
    points = rng.integers(0, 4, (60, 2)) / 4 + (0 if shares else rng.integers(0, 2, (60, 1)))
    numbers = set()
    for _ in range(5):
        front, leader = ParetoFront(goals), Leader(goals)
        for number in rng.permutation(len(points)).tolist():
            point = oriented(evaluation(goals, points[number]).scores, goals)
            front.add(number, point)
            leader.take(number, point, front)
            assert leader.number == front.numbers[leader.scale.best(front.numbers, front.points)]
        numbers.add(leader.number)
    assert len(numbers) == 1


@pytest.mark.parametrize("settings", [CmaEsSettings(), OptunaSettings(sampler="cma_es")])
def test_scalar_searches_say_what_they_climb(settings: CmaEsSettings | OptunaSettings) -> None:
    for goals in (MIXED, (Goal("a"), Goal("b"))):
        words = settings.describe(None, Context(SPACE, goals, 0, None, ()))
        assert ("climbs the mean of ranges: each score as a share of its range" in words) == (goals == MIXED)
    assert "climbs" not in OptunaSettings(sampler="tpe").describe(None, Context(SPACE, MIXED, 0, None, ()))
