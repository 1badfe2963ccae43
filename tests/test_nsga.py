"""NSGA-II and NSGA-III: operators and selection against their formulas, and problems with known fronts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from ecotone.populations.errors import InputError
from ecotone.populations.fronts import hypervolume, igd_plus, ranks
from ecotone.populations.trial import Evaluation, Goal, Outcome
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.nsga import (
    Nsga,
    NsgaSettings,
    Variant,
    crowding,
    default_population,
    intercepts,
    most_redundant,
    polynomial,
    simulated_binary,
)
from ecotone.search.protocol import Search
from ecotone.search.random_search import RandomSearch
from ecotone.search.simplex import reference_directions

Table = NDArray[np.float64]
Problem = Callable[[Table], Table]
TAKEN = Outcome(accepted=True)
both = pytest.mark.parametrize("variant", ["nsga2", "nsga3"])


def box_of(size: int, low: float = 0.0, high: float = 1.0) -> CoefficientBox:
    return CoefficientBox(np.array([0, 10]), size, low, high)


def goals_of(count: int, direction: Literal["maximize", "minimize"] = "minimize") -> list[Goal]:
    return [Goal(f"f{i}", direction) for i in range(count)]


def carried_out(
    search: Search, problem: Problem, evaluations: int, sign: float = 1.0, flying: int = 8
) -> tuple[Table, Table]:
    """Points and costs of a search with ``flying`` trials in flight."""
    trials: list[Any] = []
    points: list[Table] = []
    costs: list[Table] = []
    while len(points) < evaluations:
        asked = search.ask(flying - len(trials))
        assert len(asked) == flying - len(trials)  # it never waits
        trials += asked
        trial = trials.pop(0)
        point = trial.genome.coefficients.ravel()
        cost = problem(point)
        search.tell(trial, Evaluation({f"f{i}": sign * float(c) for i, c in enumerate(cost)}), TAKEN)
        points.append(point)
        costs.append(cost)
    return np.array(points), np.array(costs)


def zdt1(x: Table) -> Table:
    """Zitzler, Deb and Thiele 2000; on the front f2 = 1 - sqrt(f1)."""
    g = 1.0 + 9.0 * x[1:].mean()
    return np.array([x[0], g * (1.0 - np.sqrt(x[0] / g))])


def dtlz2(x: Table) -> Table:
    """Deb, Thiele, Laumanns and Zitzler 2002, three objectives; the front is the unit sphere's octant."""
    g, (a, b) = 1.0 + ((x[2:] - 0.5) ** 2).sum(), x[:2] * np.pi / 2
    return g * np.array([np.cos(a) * np.cos(b), np.cos(a) * np.sin(b), np.sin(a)])


# -- known fronts --------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("seed", [0, 1])
def test_the_front_of_zdt1_is_found(variant: Variant, seed: int) -> None:
    reference = np.array([1.1, 1.1])
    whole = 1.1**2 - 1.0 / 3.0  # what the whole front dominates
    _, costs = carried_out(Nsga(box_of(5), goals_of(2), seed, NsgaSettings(algorithm=variant)), zdt1, 2000)
    assert hypervolume(-costs, -reference) > (0.98 if variant == "nsga2" else 0.94) * whole
    _, drawn = carried_out(RandomSearch(box_of(5), seed), zdt1, 2000)
    assert hypervolume(-drawn, -reference) < 0.5 * whole


@both
@pytest.mark.parametrize("seed", [0, 1])
def test_three_objectives_are_covered_far_better_than_by_random_search(variant: Variant, seed: int) -> None:
    corner = np.random.default_rng(0).random((400, 3))
    sphere = -corner / np.linalg.norm(corner, axis=1, keepdims=True)
    _, costs = carried_out(Nsga(box_of(7), goals_of(3), seed, NsgaSettings(algorithm=variant)), dtlz2, 800)
    _, drawn = carried_out(RandomSearch(box_of(7), seed), dtlz2, 800)
    assert igd_plus(-costs, sphere) < 0.5 * igd_plus(-drawn, sphere)


def test_nsga3_spreads_its_survivors_over_the_directions() -> None:
    search = Nsga(box_of(7), goals_of(3), 0, NsgaSettings(algorithm="nsga3", population=36))
    carried_out(search, dtlz2, 1500)
    scores = search.state()["scores"]
    units = -scores / np.linalg.norm(scores, axis=1, keepdims=True)
    assert search.directions is not None
    wanted = search.directions / np.linalg.norm(search.directions, axis=1, keepdims=True)
    nearest = np.degrees(np.arccos(np.clip(wanted @ units.T, -1, 1))).min(axis=1)
    assert np.median(nearest) < 4.0  # directions are about 11 degrees apart


def test_one_objective_is_optimised_too() -> None:
    target = np.array([0.9, 0.1, 0.4, 0.6])
    _, costs = carried_out(Nsga(box_of(4), goals_of(1), 0), lambda x: np.array([((x - target) ** 2).sum()]), 600)
    assert costs.min() < 1e-3


# -- the search ----------------------------------------------------------------------------------------------


@both
def test_maximising_is_minimising_the_negated_scores(variant: Variant) -> None:
    down, _ = carried_out(Nsga(box_of(5), goals_of(2), 3, NsgaSettings(algorithm=variant)), zdt1, 150)
    rising = Nsga(box_of(5), goals_of(2, "maximize"), 3, NsgaSettings(algorithm=variant))
    up, _ = carried_out(rising, zdt1, 150, sign=-1.0)
    assert down.tolist() == up.tolist()


@both
def test_who_leaves_is_of_the_last_front(variant: Variant) -> None:
    search = Nsga(box_of(3), goals_of(2), 0, NsgaSettings(algorithm=variant, population=12))
    pool: list[int] = []
    scores: dict[int, Table] = {}
    for _ in range(60):
        for trial in search.ask(4):
            scores[trial.number] = -zdt1(trial.genome.coefficients.ravel())
            search.tell(trial, Evaluation({f"f{i}": -float(s) for i, s in enumerate(scores[trial.number])}), TAKEN)
            kept = search.state()
            assert kept["scores"].tolist() == [scores[i].tolist() for i in kept["survivors"]]
            pool.append(trial.number)
            rank = ranks(np.array([scores[i] for i in pool]))
            gone = set(pool) - set(kept["survivors"])
            assert len(gone) == (len(pool) > 12)
            assert gone <= {pool[i] for i in np.flatnonzero(rank == rank.max())}
            pool = kept["survivors"]


@both
def test_no_proposal_repeats_a_survivor_or_one_in_flight(variant: Variant) -> None:
    settings = NsgaSettings(algorithm=variant, population=6, mutation=0.1)
    search = Nsga(box_of(2), goals_of(2), 0, settings, np.eye(2))
    flying: list[Any] = []
    for _ in range(300):
        known = search.state()["points"].tolist()
        known += [trial.genome.coefficients.ravel().tolist() for trial in flying]
        flying += search.ask(1)
        assert flying[-1].genome.coefficients.ravel().tolist() not in known
        if len(flying) > 4:
            trial = flying.pop(0)
            cost = zdt1(trial.genome.coefficients.ravel())
            search.tell(trial, Evaluation({"f0": float(cost[0]), "f1": float(cost[1])}), TAKEN)


def test_children_name_their_parents_and_first_trials_have_none() -> None:
    search = Nsga(box_of(3), goals_of(2), 0, NsgaSettings(population=6), [[2.0, 0.0, -1.0]])
    first = search.ask(6)
    assert first[0].genome.coefficients.ravel().tolist() == [1.0, 0.0, 0.0]  # moved into the box
    assert all(trial.parents == () for trial in first)
    assert search.ask(1)[0].parents == ()  # nothing is told: drawn
    for trial in first[:3]:
        search.tell(trial, Evaluation({"f0": float(trial.number), "f1": -float(trial.number)}), TAKEN)
    assert all(set(trial.parents) <= {0, 1, 2} and len(set(trial.parents)) == 2 for trial in search.ask(20))


@both
def test_failures_never_breed(variant: Variant) -> None:
    search = Nsga(box_of(3), goals_of(2), 0, NsgaSettings(algorithm=variant, population=5))
    failed: set[int] = set()
    for _ in range(40):
        for trial in search.ask(3):
            assert not failed & set(trial.parents)
            if trial.number % 3 == 1 or trial.number < 9:
                failed.add(trial.number)
                search.tell(trial, Evaluation.failed("exception", "no"), Outcome(accepted=False))
            else:
                cost = zdt1(trial.genome.coefficients.ravel())
                search.tell(trial, Evaluation({"f0": float(cost[0]), "f1": float(cost[1])}), TAKEN)
    assert len(failed) > 40
    assert search.state()["survivors"]


def test_what_does_not_fit_is_refused_in_words() -> None:
    with pytest.raises(InputError, match=r"nsga3 expects two objectives or more, found 1.*cma_es"):
        Nsga(box_of(3), goals_of(1), 0, NsgaSettings(algorithm="nsga3"))
    with pytest.raises(ValidationError, match="population"):
        NsgaSettings(population=3)
    with pytest.raises(InputError, match=r"seeds: expected shape \(n, 3\), found \(2, 2\)"):
        Nsga(box_of(3), goals_of(2), 0, seeds=np.eye(2))


def test_the_default_population_has_a_direction_for_every_objective() -> None:
    for objectives in range(2, 41):
        search = Nsga(box_of(3), goals_of(objectives), 0, NsgaSettings(algorithm="nsga3"))
        assert search.directions is not None
        assert objectives <= len(search.directions) <= search.population == default_population(objectives)


# -- selection -----------------------------------------------------------------------------------------------


def test_crowding_is_the_perimeter_between_neighbours() -> None:
    front = np.array([[0.0, 4.0], [1.0, 3.0], [3.0, 1.0], [4.0, 0.0], [1.5, 2.5]])
    # (3 - 1.5 + 1 - 0) / 4 and the like: neighbours' gaps over the ranges, both objectives
    assert crowding(front).tolist() == [np.inf, 0.75, 1.25, np.inf, 1.0]
    assert crowding(np.ones((3, 2))).tolist() == [0.0, 0.0, 0.0]
    assert crowding(np.array([[2.0, 5.0]])).tolist() == [0.0]


@pytest.mark.parametrize("objectives", [2, 3, 5])
def test_nsga2_drops_whom_pymoo_drops(objectives: int) -> None:
    rank_and_crowding = pytest.importorskip("pymoo.operators.survival.rank_and_crowding.classes")
    population = pytest.importorskip("pymoo.core.population")
    problem = pytest.importorskip("pymoo.core.problem")
    rng = np.random.default_rng(objectives)
    for _ in range(20):
        costs = rng.random((11, objectives))
        search = Nsga(box_of(3), goals_of(objectives), 0, NsgaSettings(population=10))
        for trial, cost in zip(search.ask(11), costs, strict=True):
            search.tell(trial, Evaluation({f"f{i}": float(c) for i, c in enumerate(cost)}), TAKEN)
        theirs = rank_and_crowding.RankAndCrowding().do(
            problem.Problem(n_var=1, n_obj=objectives),
            population.Population.new("X", np.arange(11.0)[:, None], "F", costs),
            n_survive=10,
            random_state=np.random.default_rng(0),
        )
        last = ranks(-costs) == ranks(-costs).max()
        if np.isfinite(crowding(-costs[last])).any():  # otherwise they draw lots
            assert sorted(theirs.get("X").ravel().tolist()) == search.state()["survivors"]


def test_nsga3_drops_the_farthest_of_the_fullest_direction() -> None:
    directions = reference_directions(2, 3)
    costs = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [0.45, 0.56], [0.52, 0.49]])
    assert (ranks(-costs) == 0).all()
    assert most_redundant(costs, ranks(-costs), directions) == 3
    assert most_redundant(np.delete(costs, 3, axis=0), np.zeros(4, np.int64), directions) == 3  # was 4
    behind = np.vstack([costs, [[0.9, 0.9]]])
    assert most_redundant(behind, ranks(-behind), directions) == 5  # the last front first


def test_the_axes_are_cut_where_the_extreme_points_lie() -> None:
    plane = np.array([[2.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 0.1], [0.5, 0.5, 0.05]])
    assert intercepts(plane, np.zeros(4, np.int64)) == pytest.approx([2.0, 5.0, 0.1])
    line = np.array([[1.0, 0.0], [3.0, 0.0]])  # no plane: the worst of the front, 1 where there is none
    assert intercepts(line, np.array([0, 1])) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(("objectives", "count", "expected"), [(2, 20, 20), (3, 91, 91), (3, 95, 91), (8, 156, 156)])
def test_reference_directions_are_those_of_the_paper(objectives: int, count: int, expected: int) -> None:
    directions = reference_directions(objectives, count)
    assert directions.shape == (expected, objectives)
    assert np.allclose(directions.sum(axis=1), 1.0)
    assert directions.min() >= 0.0
    assert len(np.unique(directions.round(9), axis=0)) == expected
    assert all(any(np.allclose(row, axis) for row in directions) for axis in np.eye(objectives))


# -- variation -----------------------------------------------------------------------------------------------


def test_crossover_spreads_as_its_distribution_says() -> None:
    """Far from the box's ends: P(beta <= b) = b^(index + 1) / 2 for b <= 1, and children centre on their parents."""
    size, index = 40_000, 3.0
    box = box_of(size, -1000.0, 1000.0)
    a, b = np.full(size, 0.4), np.full(size, 0.6)
    child = simulated_binary(np.random.default_rng(0), a, b, box, index)
    crossed = child[child != 0.4]
    beta = np.abs(crossed - 0.5) / 0.1
    assert len(crossed) == pytest.approx(size / 2, rel=0.03)
    assert crossed.mean() == pytest.approx(0.5, abs=0.003)
    for bound in (0.5, 0.8, 1.0):
        assert (beta <= bound).mean() == pytest.approx(0.5 * bound ** (index + 1), abs=0.01)
    assert (beta <= 1.5).mean() == pytest.approx(1.0 - 0.5 * 1.5 ** -(index + 1), abs=0.01)


def test_mutation_spreads_as_its_distribution_says() -> None:
    """At the box's middle: P(step <= -d) = ((1-d)^(index+1) - 2^-(index+1)) / (2 (1 - 2^-(index+1))), d in widths."""
    size, index = 40_000, 4.0
    box = box_of(size, -1.0, 3.0)
    step = (polynomial(np.random.default_rng(1), np.full(size, 1.0), box, 1.0, index) - 1.0) / 4.0
    least = 0.5 ** (index + 1)
    for distance in (0.05, 0.2, 0.4):
        expected = ((1 - distance) ** (index + 1) - least) / (2 * (1 - least))
        assert (step <= -distance).mean() == pytest.approx(expected, abs=0.01)
        assert (step >= distance).mean() == pytest.approx(expected, abs=0.01)


def test_children_stay_in_the_box_and_reach_its_ends() -> None:
    rng, box = np.random.default_rng(2), box_of(5000, 0.2, 0.7)
    for index in (0.5, 20.0):
        a, b = (rng.choice([0.2, 0.25, 0.5, 0.7], 5000) for _ in range(2))
        child = simulated_binary(rng, a, b, box, index)
        mutant = polynomial(rng, child, box, 1.0, index)
        for points in (child, mutant):
            assert np.isfinite(points).all()
            assert points.min() >= 0.2
            assert points.max() <= 0.7
    assert mutant.std() > 0.1
    assert np.array_equal(simulated_binary(rng, a, a, box, 20.0), a)
    assert np.array_equal(polynomial(rng, a, box, 0.0, 20.0), a)
