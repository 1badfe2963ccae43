"""Bayesian MAP: known fronts, what it does with failures and pending points, its limits, its parts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

import ecotone.search.bayesian_map as bayesian_map
from ecotone.populations.errors import InputError
from ecotone.populations.fronts import hypervolume
from ecotone.populations.genome import Floats
from ecotone.populations.trial import Evaluation, Goal, Outcome, Trial
from ecotone.search.bayesian_map import (
    BayesianMap,
    BayesianMapSettings,
    Bins,
    Known,
    Volume,
    angles,
    coordinates,
    from_angles,
    opening,
)
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.surrogates import Link

Score = Callable[[Floats], Floats]  # (D,) coefficients to (M,) scores
SMALL: dict[str, Any] = {"paths": 16, "candidates": 128}


def box_of(sources: int, low: float = 0.0, high: float = 1.0, segments: int = 1) -> CoefficientBox:
    return CoefficientBox(np.arange(segments + 1) * 10, sources, low, high)


def goals_of(count: int, direction: str = "maximize") -> tuple[Goal, ...]:
    return tuple(Goal(f"goal-{i}", direction) for i in range(count))  # type: ignore[arg-type]


def specialists(point: Floats) -> Floats:
    """Accuracies that fall with the distance from a corner each, and with the square of what is too much."""
    size = len(point)
    targets = 0.2 + 0.6 * np.eye(size)
    latent = 2.0 - 8.0 * np.sum((point - targets) ** 2, axis=1)
    return np.asarray(1 / (1 + np.exp(-latent)))


def evaluation(search: BayesianMap, scores: Floats) -> Evaluation:
    return Evaluation({goal.name: float(score) for goal, score in zip(search.goals, scores, strict=True)})


def run(search: BayesianMap, score: Score, budget: int, batch: int = 4) -> tuple[Floats, Floats]:
    """(N, D) points and (N, M) scores."""
    points: list[Floats] = []
    scores: list[Floats] = []
    while len(points) < budget and not search.done:
        for trial in search.ask(min(batch, budget - len(points))):
            points.append(trial.genome.coefficients.ravel())
            scores.append(score(points[-1]))
            search.tell(trial, evaluation(search, scores[-1]), Outcome(True))
    return np.array(points), np.array(scores)


def dense(score: Score, size: int, side: int) -> Floats:
    axis = np.linspace(0, 1, side)
    return np.array([score(np.array(point)) for point in itertools.product(axis, repeat=size)])


# -- known fronts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "side", "budget"), [(2, 101, 36), (3, 25, 60)])
def test_it_finds_the_front_of_quadratics(size: int, side: int, budget: int) -> None:
    search = BayesianMap(box_of(size), goals_of(size), 0, BayesianMapSettings(patience=None, **SMALL))
    found = hypervolume(run(search, specialists, budget)[1], np.zeros(size))
    assert found > (0.98 if size == 2 else 0.9) * hypervolume(dense(specialists, size, side), np.zeros(size))
    rng = np.random.default_rng(0)
    drawn = np.array([specialists(rng.uniform(0, 1, size)) for _ in range(budget)])
    assert found > 1.05 * hypervolume(drawn, np.zeros(size))


def test_losses_are_minimised() -> None:
    def losses(point: Floats) -> Floats:
        return -np.log(specialists(point))

    search = BayesianMap(box_of(2), goals_of(2, "minimize"), 0, BayesianMapSettings(patience=None, **SMALL))
    scores = run(search, losses, 40)[1]
    wanted = hypervolume(-dense(losses, 2, 101), [-2.0, -2.0])
    assert hypervolume(-scores, [-2.0, -2.0]) > 0.98 * wanted


def test_unbounded_scores_and_one_of_each_direction() -> None:
    goals = (Goal("gain"), Goal("cost", "minimize"))
    search = BayesianMap(box_of(2, -1.0, 1.0), goals, 0, BayesianMapSettings(patience=None, **SMALL))

    def score(point: Floats) -> Floats:
        return np.array([-50 * np.sum((point - 0.5) ** 2), 100 * np.sum((point + 0.5) ** 2) - 300])

    points, _ = run(search, score, 40)
    late = points[12:]
    assert np.abs(late[:, 0] - late[:, 1]).mean() < 0.15  # the front is the line between the two optima
    assert np.abs(late).max(axis=1).mean() < 0.6


def test_hypervolume_counts_from_the_worst_of_the_models() -> None:
    """Where every merge scores .7 and more, what is below the models alone is of no use."""
    search = BayesianMap(box_of(2, high=1.5), goals_of(2), 0, BayesianMapSettings(**SMALL))
    known = {(1, 0): (0.9, 0.75), (0, 1): (0.72, 0.85)}
    for trial in search.ask(search.design):
        scores = np.array(known.get(tuple(trial.genome.coefficients.ravel()), (0.95, 0.6)))
        search.tell(trial, evaluation(search, scores), Outcome(True))
    frame = search._frame(search._known(search.design))
    assert frame.reference.tolist() == [0.72, 0.75]


@pytest.mark.parametrize("reference", [(0.6, 0.0), (0.0, 0.6)])
def test_the_reference_says_which_part_of_the_front_counts(reference: tuple[float, float]) -> None:
    given = {"goal-0": reference[0], "goal-1": reference[1]}
    search = BayesianMap(box_of(2), goals_of(2), 0, BayesianMapSettings(reference=given, patience=None, **SMALL))
    scores = run(search, specialists, 36)[1][12:]
    assert (scores > np.array(reference) - 0.05).all(axis=1).mean() > 0.8


def test_a_front_may_have_segments() -> None:
    """Two segments of two models: each objective has its own wish for each segment."""

    def score(point: Floats) -> Floats:
        wishes = np.array([[0.9, 0.1, 0.5, 0.5], [0.1, 0.9, 0.5, 0.5]])
        return np.asarray(1 / (1 + np.exp(6 * np.sum((point - wishes) ** 2, axis=1) - 2)))

    search = BayesianMap(box_of(2, segments=2), goals_of(2), 0, BayesianMapSettings(patience=None, **SMALL))
    points, _ = run(search, score, 60)
    assert points.shape == (60, 4)
    assert np.abs(points[-24:, 2:] - 0.5).mean() < 0.1


# -- batches, failures, the end ------------------------------------------------------------------------------


def told(search: BayesianMap, score: Score = specialists) -> list[Trial]:
    """The design, told."""
    trials = search.ask(search.design)
    for trial in trials:
        search.tell(trial, evaluation(search, score(trial.genome.coefficients.ravel())), Outcome(True))
    return trials


def distances(points: Floats) -> Floats:
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    return np.asarray(apart[np.triu_indices(len(points), 1)])


def test_pending_points_are_not_proposed_again() -> None:
    search = BayesianMap(box_of(3), goals_of(3), 0, BayesianMapSettings(**SMALL))
    told(search)
    points = np.array([trial.genome.coefficients.ravel() for _ in range(5) for trial in search.ask(4)])
    assert points.shape == (20, 3)
    assert distances(points).min() > 1e-3
    assert np.median(distances(points)) > 0.2


def test_it_waits_for_half_of_the_design() -> None:
    search = BayesianMap(box_of(3), goals_of(3), 0, BayesianMapSettings(**SMALL))
    trials = search.ask(100)
    assert len(trials) == search.design == 8
    for trial in trials[:3]:
        search.tell(trial, evaluation(search, specialists(trial.genome.coefficients.ravel())), Outcome(True))
        assert search.ask(2) == []
    search.tell(trials[3], evaluation(search, np.full(3, 0.1)), Outcome(True))
    assert [trial.number for trial in search.ask(2)] == [8, 9]


@pytest.mark.parametrize("acquisition", ["hypervolume", "bins"])
def test_everything_stays_in_the_box(acquisition: Any) -> None:
    search = BayesianMap(box_of(3, -0.3, 0.7), goals_of(3), 0, BayesianMapSettings(acquisition=acquisition, **SMALL))
    points, _ = run(search, specialists, 40)
    assert points.min() >= -0.3
    assert points.max() <= 0.7


def test_a_region_that_fails_is_left() -> None:
    search = BayesianMap(box_of(2), goals_of(2), 0, BayesianMapSettings(patience=None, **SMALL))
    failed = []
    for _ in range(12):
        for trial in search.ask(4):
            point = trial.genome.coefficients.ravel()
            bad = point[0] > 0.6
            failed.append(bad)
            one = Evaluation.failed("not finite", "NaN") if bad else evaluation(search, specialists(point))
            search.tell(trial, one, Outcome(not bad))
    assert sum(failed[:6]) > 0
    assert np.mean(failed[-16:]) < 0.35


def test_dead_workers_say_nothing_about_a_point() -> None:
    search = BayesianMap(box_of(2), goals_of(2), 0, BayesianMapSettings(patience=None, **SMALL))
    for trial in search.ask(search.design):
        search.tell(trial, Evaluation.failed("worker died", "gone"), Outcome(False))
    assert search._known().points.shape == (0, 2)
    trials = search.ask(4)
    assert [trial.number for trial in trials] == [6, 7, 8, 9]


def test_while_everything_fails_it_looks_everywhere() -> None:
    search = BayesianMap(box_of(2), goals_of(2), 0, BayesianMapSettings(patience=3, **SMALL))
    points = []
    for _ in range(10):
        for trial in search.ask(4):
            points.append(trial.genome.coefficients.ravel())
            search.tell(trial, Evaluation.failed("exception", "no"), Outcome(False))
    assert len(points) == 38
    assert np.ptp(np.array(points), axis=0) == pytest.approx(np.ones(2), abs=0.15)
    assert not search.done


def test_it_ends_when_the_front_has_stopped_growing() -> None:
    def flat(point: Floats) -> Floats:
        return np.round(specialists(point), 1)  # soon nothing is left to find

    search = BayesianMap(box_of(2), goals_of(2), 0, BayesianMapSettings(patience=16, **SMALL))
    points, scores = run(search, flat, 400)
    assert 22 <= len(points) < 120
    assert search.done
    full, before = hypervolume(scores, [0, 0]), hypervolume(scores[:-16], [0, 0])
    assert full == pytest.approx(before, rel=0.003)
    unending = BayesianMap(box_of(2), goals_of(2), 0, BayesianMapSettings(patience=None, **SMALL))
    assert len(run(unending, flat, len(points) + 8)[0]) == len(points) + 8


def test_it_does_not_end_while_something_is_in_flight() -> None:
    search = BayesianMap(box_of(2), goals_of(2), 0, BayesianMapSettings(patience=1, tolerance=10.0, **SMALL))
    told(search)
    one, other = search.ask(2)
    search.tell(one, evaluation(search, np.array([0.1, 0.1])), Outcome(True))
    assert not search.done
    search.tell(other, evaluation(search, np.array([0.1, 0.1])), Outcome(True))
    assert search.done


# -- limits --------------------------------------------------------------------------------------------------


def test_sixteen_models_and_sixteen_objectives() -> None:
    def score(point: Floats) -> Floats:
        return np.asarray(1 / (1 + np.exp(4 * point.sum() / 16 - 6 * point)))

    search = BayesianMap(box_of(16), goals_of(16), 0, BayesianMapSettings(**SMALL))
    assert search.design == 34
    points, scores = run(search, score, 42, batch=8)
    assert points.shape == (42, 16)
    assert np.isfinite(scores).all()


def test_a_proposal_is_bounded_whatever_has_been_told(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    fit = bayesian_map.GaussianProcess.fit

    def noted(inputs: Any, *arguments: Any) -> Any:
        sizes.append(len(inputs))
        return fit(inputs, *arguments)

    monkeypatch.setattr(bayesian_map.GaussianProcess, "fit", noted)
    monkeypatch.setattr(bayesian_map, "REMEMBERED", 40)
    search = BayesianMap(box_of(2), goals_of(2), 0, BayesianMapSettings(samples=200, patience=None, **SMALL))
    told(search)
    assert len(search.ask(3)) == 3
    assert sizes == [40, 40]


def test_what_is_forgotten_is_dominated_and_not_all_that_is() -> None:
    search = BayesianMap(box_of(2), goals_of(2), 0, BayesianMapSettings(samples=100, **SMALL))
    told(search)
    everything, kept = search._known(100), search._known(40)
    assert len(kept.points) == 40
    assert hypervolume(kept.scores, [0, 0]) == hypervolume(everything.scores, [0, 0])
    assert kept.scores.mean(axis=1).min() < np.median(everything.scores.mean(axis=1))
    rows = [everything.points.tolist().index(point) for point in kept.points.tolist()]
    assert rows == sorted(rows)


@pytest.mark.parametrize(
    ("size", "objectives", "settings", "words"),
    [
        (3, 1, {}, "two objectives or more, found 1. For one objective use cma_es"),
        (96, 3, {}, "at most 32 coefficients, found 96"),
        (7, 3, {"acquisition": "bins"}, "at most 6 coefficients, found 7"),
        (3, 3, {"links": {"goal-0": "logit"}}, "there is no link 'logit'"),
        (3, 3, {"links": {"goal-9": "sigmoid"}}, "there is no objective 'goal-9'"),
        (3, 3, {"reference": {"goal-0": 0.0}}, "search.reference: expected a score for each of the objectives"),
    ],
)
def test_what_it_refuses(size: int, objectives: int, settings: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        BayesianMap(box_of(size), goals_of(objectives), 0, BayesianMapSettings(**settings))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"acquisition": "best"}, "acquisition"),
        ({"samples": 0}, "samples"),
        ({"reference": {"goal-0": math.nan}}, "reference.goal-0"),
        ({"patience": 0}, "patience"),
        ({"paths": 0}, "paths"),
        ({"candidates": 7}, "candidates"),
    ],
)
def test_settings_outside_their_bounds_are_refused(settings: Any, field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        BayesianMapSettings(**settings)
    assert [".".join(map(str, error["loc"])) for error in caught.value.errors()] == [field]


def test_a_constant_objective_gets_more_design_points_and_then_guides_nothing() -> None:
    def score(point: Floats) -> Floats:
        return np.array([specialists(point)[0], 0.25])

    search = BayesianMap(box_of(2), goals_of(2), 0, BayesianMapSettings(**SMALL))
    assert search.design == 6
    points, scores = run(search, score, 24, batch=3)
    assert len(points) == 24
    even = points[6:12]
    assert even.min(axis=0).max() < 0.4 < 0.6 < even.max(axis=0).min()  # spread over the box
    assert scores[12:, 0].max() > scores[:12, 0].max()  # the other objective is followed
    (warning,) = search.report()["warnings"]
    assert warning.startswith(
        "objectives.search.goal-1: the score is the same (0.25) at all 24 points, so no surrogate"
    )


def test_an_objective_that_is_constant_on_the_design_alone_is_followed_later() -> None:
    told = []

    def score(point: Floats) -> Floats:
        told.append(point)
        found = specialists(point)
        return np.array([found[0], 0.25 if len(told) <= 8 else found[1]])

    search = BayesianMap(box_of(2), goals_of(2), 0, BayesianMapSettings(**SMALL))
    run(search, score, 20, batch=2)
    assert len(told) == 20
    assert "warnings" not in search.report()


@pytest.mark.parametrize("value", [0.25, 1e200])
def test_a_search_in_which_nothing_differs_ends_after_a_second_design(value: float) -> None:
    search = BayesianMap(box_of(2), goals_of(2), 0, BayesianMapSettings(**SMALL))
    points, _ = run(search, lambda point: np.array([value, value * (2 if value > 1 and point[0] > 0.5 else 1)]), 100, 3)
    assert len(points) == 12
    assert search.done
    assert search.ask(3) == []
    assert len(search.report()["warnings"]) == 2


def test_a_front_of_one_point() -> None:
    """Losses of which one merge has the least of both: then the volume's units come from all that is known."""

    def score(point: Floats) -> Floats:
        return np.full(2, -5.0) + np.sum((point - 0.4) ** 2) * np.array([1.0, 30.0])

    goals = goals_of(2, "minimize")
    points, scores = run(BayesianMap(box_of(2), goals, 0, BayesianMapSettings(patience=None, **SMALL)), score, 30)
    assert np.abs(points[np.argmin(scores[:, 0])] - 0.4).max() < 0.02
    assert len(np.unique(points, axis=0)) == 30


def test_where_nothing_can_be_gained_no_point_comes_twice() -> None:
    reference = {"goal-0": 2.0, "goal-1": 2.0}
    search = BayesianMap(box_of(2), goals_of(2), 0, BayesianMapSettings(reference=reference, **SMALL))
    points, _ = run(search, specialists, 40)
    assert distances(points).min() > 1e-3


def test_it_reports_how_far_the_models_can_be_trusted() -> None:
    search = BayesianMap(box_of(2), goals_of(2), 0, BayesianMapSettings(patience=None, **SMALL))
    assert search.report() == {"algorithm": "bayesian_map", "objectives": ["goal-0", "goal-1"], "design": []}
    trials = told(search)
    search.tell(search.ask(1)[0], Evaluation.failed("exception", "no"), Outcome(False))
    state = search.state()
    found = search.report()
    assert found["design"] == [trial.number for trial in trials]
    assert found["links"] == {"goal-0": "sigmoid", "goal-1": "sigmoid"}
    assert 0 < found["leave_one_out"]["goal-0"] < 0.5
    assert 0 < found["residual"]["goal-1"] < 1
    assert search.report() == found
    assert search.state()["logs"].tolist() == state["logs"].tolist()


# -- parts ---------------------------------------------------------------------------------------------------


def test_the_design_begins_with_the_models() -> None:
    points = opening(box_of(3, 0.0, 1.5), 8, 0)
    assert points[:3].tolist() == np.eye(3).tolist()
    assert points[3:5] == pytest.approx(np.array([[0.5] * 3, [1.0] * 3]))
    assert len(np.unique(points, axis=0)) == 8
    assert opening(box_of(2, segments=2), 10, 0)[:2].tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    given = opening(box_of(3), 8, 0, seeds=np.array([[0.0, 0.0, 0.0], [0.0, 0.9, 0.0]]))
    assert given[:2].tolist() == [[0, 0, 0], [0, 0.9, 0]]
    assert opening(box_of(16), 4, 0).shape == (4, 16)


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_hypervolume_is_a_mean_over_directions(objectives: int) -> None:
    rng = np.random.default_rng(1)
    front, extra = rng.uniform(0.2, 1.0, (2, 6, objectives))
    volume = Volume(bayesian_map.spread(rng, (1, 200_000, objectives)))
    ball = math.pi ** (objectives / 2) / math.gamma(objectives / 2 + 1) / 2**objectives
    volume.add(front[:, None])
    origin = np.zeros(objectives)
    before = hypervolume(front, origin)
    assert ball * volume.best.mean(dtype=np.float64) == pytest.approx(before, rel=0.01)
    wanted = [hypervolume(np.vstack([front, point]), origin) - before for point in extra]
    assert ball * volume.gains(volume.of(extra[:, None])) == pytest.approx(wanted, abs=0.005)


def test_what_was_picked_adds_nothing_again() -> None:
    volume = Volume.fixed(3)
    reached = volume.of(np.random.default_rng(0).uniform(0, 1, (5, 1, 3)))
    assert (volume.gains(reached) > 0).all()
    volume.take(reached[2])
    assert volume.gains(reached)[2] == 0.0
    worse = volume.of(np.full((1, 1, 3), 1e-3))
    assert volume.gains(worse).tolist() == [0.0]


def test_coordinates_of_the_residual() -> None:
    inputs = coordinates(box_of(3, 0.0, 2.0), np.array([[2.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    assert inputs.points.tolist() == [[1, -1, -1], [0, 0, 0], [-1, -1, -1]]
    directions, above, sizes = np.split(inputs.places, [3, 6], axis=1)
    assert directions == pytest.approx(np.array([[2, 0, 0], [2 / 3**0.5] * 3, [0, 0, 0]]), abs=0.02)
    assert above == pytest.approx(np.array([[4 / 3, -2 / 3, -2 / 3], [0, 0, 0], [0, 0, 0]]))
    assert sizes.ravel() == pytest.approx([2 / 3**0.5, 1, 0])
    assert coordinates(box_of(2, segments=3), np.zeros((4, 6))).places.shape == (4, 15)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_angles_there_and_back(size: int) -> None:
    points = np.random.default_rng(0).uniform(0, 1, (50, size))
    turns = angles(points)
    assert turns.shape == (50, size - 1)
    assert ((turns >= 0) & (turns <= np.pi / 2)).all()
    norms = np.linalg.norm(points, axis=1, keepdims=True)
    assert norms * from_angles(turns) == pytest.approx(points, abs=1e-12)


def known_in(turns: Sequence[Sequence[float]], scores: Score) -> Known:
    points = 0.5 * from_angles(np.asarray(turns, np.float64))
    return Known(points, np.array([scores(point) for point in points]), np.ones(2))


def test_empty_bins_are_visited() -> None:
    """The paper's never are."""
    known = known_in([[0.1], [0.12], [0.2], [0.3], [0.35]], lambda point: specialists(point))
    search = Bins(box_of(2), known, [Link("sigmoid")] * 2)
    points = search.points(400, np.random.default_rng(0))
    bins = (angles(points).ravel() / (np.pi / 8)).astype(int)
    assert np.bincount(bins, minlength=4) == pytest.approx(np.full(4, 100), abs=40)
    norms = np.linalg.norm(points, axis=1)
    assert norms.min() >= 0.2
    assert norms.max() <= 0.8


def test_bins_where_the_quadratic_is_wrong_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    turns = np.linspace(0.02, np.pi / 2 - 0.02, 60)[:, None]

    def rough(point: Floats) -> Floats:
        noise = 0.45 * rng.choice([-1.0, 1.0]) if angles(point[None])[0, 0] > 3 * np.pi / 8 else 0.0
        return np.array([0.5 + noise, 0.5])

    scores = Bins(box_of(2), known_in(turns.tolist(), rough), [Link("identity")] * 2).scores(np.random.default_rng(1))
    assert int(np.argmax(scores)) == 3
    assert scores[3] > 4 * scores[:3].max()


def test_bins_propose_and_learn() -> None:
    search = BayesianMap(box_of(3), goals_of(3), 0, BayesianMapSettings(acquisition="bins", patience=None))
    points, scores = run(search, specialists, 40)
    assert len(np.unique(points, axis=0)) == 40
    assert hypervolume(scores, np.zeros(3)) > 0.5 * hypervolume(dense(specialists, 3, 15), np.zeros(3))
