"""Searches, archives and stages select by the mean that tables show, also where a share and a large loss are mixed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_ranking import MIXED, POINTS, Listed, bests, evaluation, genome, searched

from ecotone.populations.genome import Floats
from ecotone.populations.population import ElitistArchive
from ecotone.populations.ranking import Extremes, Scale
from ecotone.populations.trial import Evaluation, Goal, Outcome, Trial, oriented
from ecotone.search.adamerging import AdaMergingSettings
from ecotone.search.cma_es import CmaEs, CmaEsSettings
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.kinds import Context, Pair, SearchSettings
from ecotone.search.nsga import NsgaSettings
from ecotone.search.optuna_search import OptunaSearch, OptunaSettings
from ecotone.search.racing import RaceSettings
from ecotone.search.stages import Stage, StagedSearch
from ecotone.testing.searches import (
    PROBES,
    SPACE,
    TASKS,
    Driver,
    differentiated,
    expanded,
    from_text,
    members,
    of_sample,
    to_text,
)

TAKEN = Outcome(accepted=True)
GOALS = (Goal("right"), Goal("perplexity", "minimize"))
RACE = RaceSettings(fidelities=(0.3, 0.6), group=4, eta=2.0)


def mixed(factor: float) -> Callable[[Trial], Evaluation]:
    """Gives a share and a loss that is larger by ``factor``, both with scores by example."""

    def score(trial: Trial) -> Evaluation:
        if trial.gradient is not None:
            return differentiated(trial)
        weights = expanded(trial.genome)
        right = 1 / (1 + np.exp(-PROBES @ weights))
        each = factor * (1 + (PROBES @ (weights - 0.3)) ** 2)
        whole = Evaluation(
            {"right": float(right.mean()), "perplexity": float(each.mean())}, {"right": right, "perplexity": each}
        )
        return of_sample(trial.sample, whole)

    return score


def of(settings: SearchSettings, factor: float = 1.0) -> Pair:
    limits = {"right": (0.0, 1.0), "perplexity": (0.0, 1000.0 * factor)}
    return settings.make(Context(SPACE, GOALS, 0, None, TASKS if settings.needs().gradients else (), limits=limits))


def chain() -> Pair:
    def first(starts: Any) -> Pair:
        return of(NsgaSettings(population=8))

    def second(starts: Any) -> Pair:
        made = CmaEsSettings(granularity="tensor")
        return made.make(Context(SPACE, GOALS, 1, None, (), starts=tuple(starts)))

    search = StagedSearch([Stage("nsga2", first, 16), Stage("cma_es", second, None, "best")], GOALS)
    return search, search.population


SMALL = {"granularity": "block", "archive": 5}
DESCENT = {"steps": 40, "check_every": 2, "patience": 2, "rate": 0.05, "restarts": 2}
KINDS: dict[str, Callable[[float], Pair]] = {
    "cma_es": lambda factor: of(CmaEsSettings(**SMALL)),  # type: ignore[arg-type]
    "sep_cma_es": lambda factor: of(CmaEsSettings(algorithm="sep_cma_es", **SMALL)),  # type: ignore[arg-type]
    "optuna": lambda factor: of(OptunaSettings(sampler="cma_es", **SMALL)),  # type: ignore[arg-type]
    "raced": lambda factor: of(CmaEsSettings(race=RACE, **SMALL), factor),  # type: ignore[arg-type]
    "descent": lambda factor: of(AdaMergingSettings(**SMALL, **DESCENT)),  # type: ignore[arg-type]
    "chain": lambda factor: chain(),
}


def made(kind: str, factor: float) -> Driver:
    return Driver(*KINDS[kind](factor), score=mixed(factor))


def course(driver: Driver, trials: int = 45) -> tuple[list[str], list[int]]:
    while driver.asked < trials and not driver.search.done:
        if len(driver.flying) < 5:
            driver.ask(min(3, trials - driver.asked))
        driver.tell()
    return driver.digests, members(driver.population)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_selected_does_not_depend_on_units(kind: str) -> None:
    """To the last bit: the factor is a power of two."""
    assert course(made(kind, 2.0**-10)) == course(made(kind, 2.0**10))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "optuna"])
def test_restored_from_its_state_it_goes_on_in_the_same_way(kind: str) -> None:
    """The conformance suite has Optuna with such objectives."""
    through, resumed = made(kind, 64.0), made(kind, 64.0)
    course(through, 23)
    resumed.search.restore(from_text(to_text(through.search.state())))
    resumed.population.restore(through.population.state())
    resumed.flying, resumed.asked, resumed.digests = deque(through.flying), through.asked, list(through.digests)
    assert course(through) == course(resumed)
    assert len(through.digests) > 30


# -- the elitist archive -------------------------------------------------------------------------------------


def drawn(seed: int, count: int) -> Floats:
    """(count, 2) accuracies and perplexities, the first two of which are the extremes."""
    points = np.random.default_rng(seed).uniform([0.2, 50.0], [0.9, 900.0], (count, 2))
    return np.concatenate([[[0.1, 1000.0], [1.0, 999.0], [0.2, 10.0]], points])


def trial(number: int) -> Trial:
    return Trial(number, genome(number))


def test_the_archive_keeps_those_of_highest_mean() -> None:
    points = drawn(0, 60)
    archive = ElitistArchive(MIXED, 6)
    for number, point in enumerate(points):
        archive.add(trial(number), evaluation(MIXED, point.tolist()))
    shares = (points[:, 0] - 0.1) / 0.9 + (1000.0 - points[:, 1]) / 990.0
    assert members(archive) == sorted(np.argsort(-shares)[:6].tolist())
    perplexity = sorted(range(len(points)), key=lambda i: points[i, 1])[:6]
    assert members(archive) != sorted(perplexity)


def test_members_are_measured_anew_when_ranges_grow() -> None:
    archive = ElitistArchive(MIXED, 2)
    for number, point in enumerate([(0.5, 100.0), (0.6, 110.0), (0.55, 101.0)]):
        archive.add(trial(number), evaluation(MIXED, point))
    assert members(archive) == [0, 2]  # shares of 0 and 1, 1 and 0, 0.5 and 0.9: the youngest of equals left
    archive.add(trial(3), evaluation(MIXED, (0.45, 10_000.0)))
    assert members(archive) == [0, 2]
    archive.add(trial(4), evaluation(MIXED, (0.54, 102.0)))  # perplexity hardly differs any more
    assert members(archive) == [2, 4]


def test_shares_that_leave_their_range_are_measured_by_ranges_from_then_on() -> None:
    goals = (Goal("a"), Goal("b"))
    archive = ElitistArchive(goals, 2)
    for number, point in enumerate([(0.2, 0.9), (0.6, 0.2), (5.0, 0.1), (4.0, 0.8)]):
        archive.add(trial(number), evaluation(goals, point))
    assert members(archive) == [0, 3]  # by plain means 2 would have stayed, not 0


def test_what_may_not_be_accepted_is_not_accepted() -> None:
    rng, refused = np.random.default_rng(1), 0
    for _ in range(60):
        archive = ElitistArchive(MIXED, 2)
        for number in range(6):
            archive.add(trial(number), evaluation(MIXED, rng.uniform([0, 10], [1, 1000]).tolist()))
        best = rng.uniform([0, 10], [0.8, 1000])
        if archive.may_accept(evaluation(MIXED, best.tolist())):
            continue
        refused += 1
        for worse in rng.exponential([0.3, 2000.0], (5, 2)) * rng.integers(0, 2, (5, 2)):
            other = ElitistArchive(MIXED, 2)
            other.restore(archive.state())
            point = best + worse * [-1, 1]
            assert not other.add(trial(6), evaluation(MIXED, point.tolist())).accepted
    assert refused > 12


# -- optimisers of one number ----------------------------------------------------------------------------------


def test_cma_es_ranks_a_generation_when_its_last_score_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    box = CoefficientBox.of(SPACE, "model", 0.0, 1.0)
    search = CmaEs(box, MIXED, 0, CmaEsSettings(population_size=4))
    told: list[list[float]] = []
    optimiser = search._optimiser
    monkeypatch.setattr(optimiser, "tell", lambda pairs: told.append([value for _, value in pairs]))
    trials = search.ask(4)
    for number in (2, 0, 3):
        search.tell(trials[number], evaluation(MIXED, POINTS[number]), TAKEN)
    search.tell(trials[1], Evaluation.failed("not finite", "NaN"), TAKEN)
    points = oriented_points([POINTS[number] for number in (0, 2, 3)])
    zero, two, three = (-Scale.of(MIXED, points).means(points)).tolist()
    assert told == [[zero, max(zero, two, three), two, three]]
    trials = search.ask(4)
    for one in trials:
        search.tell(one, evaluation(MIXED, (0.7, 100.0 * one.number)), TAKEN)
    assert told[1] == sorted(told[1])
    assert told[1][0] > told[1][-1] - 1.0  # shares of all that was told, not of the generation alone


def oriented_points(points: Any) -> Floats:
    return np.array([oriented(evaluation(MIXED, point).scores, MIXED) for point in points])


def test_optuna_reads_what_it_was_told_under_the_present_scale() -> None:
    box = CoefficientBox.of(SPACE, "model", 0.0, 1.0)
    search = OptunaSearch(box, MIXED, 0, OptunaSettings(sampler="cma_es"))
    for count, point in enumerate(POINTS, 1):
        (asked,) = search.ask(1)
        search.tell(asked, evaluation(MIXED, point), TAKEN)
        so_far = oriented_points(POINTS[:count])
        values = [one.value for one in search._study.get_trials(deepcopy=False)]
        assert values == Scale.of(MIXED, so_far).means(so_far).tolist()


def test_a_line_goes_on_while_its_checks_get_better_by_their_ranges() -> None:
    """Perplexity falls from 1000 to 102. Then it rises by 1 at each check, while accuracy rises, and falls at last."""

    def score(trial: Trial) -> Evaluation:
        if trial.gradient is not None:
            return Evaluation(
                dict.fromkeys(trial.gradient.tasks, 1.0), gradient=-np.ones(trial.genome.coefficients.shape)
            )
        moved = float(trial.genome.coefficients[0, 0])
        return Evaluation({"right": 0.9 - abs(moved - 0.5), "perplexity": 100.0 + 10 * moved if moved > 0.15 else 1e3})

    settings = AdaMergingSettings(granularity="model", init=0.1, rate=0.01, steps=200, check_every=10, patience=3)
    search, population = settings.make(Context(SPACE, GOALS, 0, None, TASKS))
    driver = Driver(search, population, score=score)
    while not search.done:
        driver.ask(3)
        driver.tell()
    report = search.report()  # type: ignore[attr-defined]
    line = report["lines"][0]
    assert report["unit"] == "ranges"
    assert (line["steps"], line["ended"]) == (70, "no better score in 3 checks")
    assert [check["scores"]["right"] for check in line["checks"]][4] == pytest.approx(0.9)


# -- one meaning everywhere ------------------------------------------------------------------------------------


def begun_with(points: Any, goals: tuple[Goal, ...]) -> list[int]:
    """Numbers of the merges that a stage with ``start: best`` begins with, after one with these scores."""
    first = Stage("listed", lambda starts: (Listed(len(points)), ElitistArchive(goals, 3)))
    second = Stage("listed", lambda starts: (Listed(0), ElitistArchive(goals, 3)), None, "best")
    search = StagedSearch([first, second], goals)
    for one in search.ask(len(points)):
        told = evaluation(goals, points[one.number])
        search.tell(one, told, search.population.add(one, told))
    assert search.ask(1) == []
    starts: list[int] = search.report()["stages"][1]["starts"]
    return starts


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_stages_archives_tables_fronts_trackers_and_exports_agree_on_the_best(tmp_path: Path, seed: int) -> None:
    points = drawn(seed, 25).tolist()
    manager = searched(tmp_path / "run", MIXED, points)
    numbers = bests(tmp_path / "run")
    archive = manager.population
    told = Extremes(MIXED)
    for point in oriented_points(points).tolist():
        told.take(point)
    scores = oriented_points([tuple(one.evaluation.scores.values()) for one in archive.members])
    numbers["archive"] = archive.members[int(told.scale.means(scores).argmax())].trial.number
    (numbers["stage"],) = begun_with(points, MIXED)
    assert set(numbers.values()) == {manager.progress.best}


@pytest.mark.parametrize("seed", range(4))
def test_a_stage_begins_with_the_best_of_everything_so_far(seed: int) -> None:
    rng = np.random.default_rng(seed)
    goals = (Goal("a"), MIXED[1], Goal("b"))
    points = rng.normal(size=(20, 3)) * [1.0, 500.0, 0.01]
    scores = points * [1.0, -1.0, 1.0]
    means = ((scores - scores.min(axis=0)) / np.ptp(scores, axis=0)).mean(axis=1)
    assert begun_with(points.tolist(), goals) == [int(np.argmax(means))]
