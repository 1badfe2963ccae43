"""MAP: exact on noise-free quadratics, honest about its predictions, clear about what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import numpy as np
import pytest

from ecotone.populations.errors import InputError
from ecotone.populations.fronts import hypervolume, non_dominated
from ecotone.populations.genome import Floats
from ecotone.populations.trial import Evaluation, Goal, Outcome, Trial
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.map import MapSearch, MapSettings, Surrogates, predicted_front, reach, spread
from ecotone.search.surrogates import Link

GOALS = (Goal("a"), Goal("b"))
TOLD = Outcome(accepted=True)
QUICK: dict[str, int] = {"generations": 20, "filling": 1}
Scores = Callable[[Floats], Floats]  # (N, D) to (N, M)


def box(sources: int, segments: int = 1, high: float = 1.5) -> CoefficientBox:
    return CoefficientBox(np.arange(segments + 1), sources, 0.0, high)


def specialists(count: int, seed: int, link: str = "sigmoid") -> Scores:
    """Link(concave quadratic) scores, one a source, each best near its own one-hot vector."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(-0.2, 0.3, (count, count))
    np.fill_diagonal(centres, rng.uniform(0.7, 1.2, count))
    shapes = [np.eye(count) + 0.25 * (b @ b.T) for b in rng.normal(size=(count, count, count))]
    heights = rng.uniform(1, 3, count)

    def scores(points: Floats) -> Floats:
        away = [points - centre for centre in centres]
        latent = [h - 2 * np.einsum("ni,ij,nj->n", d, s, d) for d, s, h in zip(away, shapes, heights, strict=True)]
        return Link(link).forward(np.stack(latent, axis=1))  # type: ignore[arg-type]

    return scores


def run(search: MapSearch, scores: Scores, batch: int = 7, fails: tuple[int, ...] = ()) -> dict[int, Floats]:
    """Everything told, in batches; the measured scores by trial number."""
    found = {}
    while not search.done:
        trials = search.ask(batch)
        assert trials
        for trial in trials:
            if trial.number in fails:
                search.tell(trial, Evaluation.failed("exception", "no"), TOLD)
                continue
            found[trial.number] = scores(search.box.point(trial.genome)[None])[0]
            named = {goal.name: float(s) for goal, s in zip(search.goals, found[trial.number], strict=True)}
            search.tell(trial, Evaluation(named), TOLD)
    return found


def goals(count: int) -> tuple[Goal, ...]:
    return tuple(Goal(name) for name in "abcdefgh"[:count])


def grid(side: int, dimension: int, high: float = 1.5) -> Floats:
    axes = np.meshgrid(*[np.linspace(0, high, side)] * dimension, indexing="ij")
    return np.stack([axis.ravel() for axis in axes], axis=1)


# -- known answers -------------------------------------------------------------------------------------------


FINE = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dimension", "side", "short", "link"),
    [
        (2, 1000, 1e-3, "sigmoid"),
        (3, 60, 2e-2, "sigmoid"),
        pytest.param(3, 60, 2e-2, "softplus", marks=FINE),
        pytest.param(4, 20, 0.2, "sigmoid", marks=FINE),
        pytest.param(2, 3000, 1e-3, "softplus", marks=FINE),
        pytest.param(3, 200, 3e-3, "softplus", marks=FINE),
        pytest.param(3, 200, 3e-3, "sigmoid", marks=FINE),
        pytest.param(4, 50, 5e-2, "softplus", marks=FINE),
        pytest.param(4, 50, 5e-2, "sigmoid", marks=FINE),
    ],
)
def test_the_predicted_front_is_a_dense_grids(dimension: int, side: int, short: float, link: str) -> None:
    """On noise-free quadratics with a link: the hypervolume is not 0.1 % below that of the grid's exact scores.

    It may be above by what the grid itself is ``short`` of the front.
    """
    truth = specialists(dimension, 0, link)
    search = MapSearch(box(dimension), goals(dimension), 0, MapSettings(links=link, front=1), **QUICK)
    run(search, truth)
    model = search._surrogates()
    low, high = np.zeros(dimension), np.full(dimension, 1.5)
    points, scores = predicted_front(model.cautious, low, high, np.random.default_rng(0))
    assert scores == pytest.approx(truth(points), abs=1e-8)
    dense = truth(grid(side, dimension))
    ours, theirs = hypervolume(scores, np.zeros(dimension)), hypervolume(dense[non_dominated(dense)], [0] * dimension)
    assert ours > theirs * (1 - 1e-3)
    assert ours < theirs * (1 + short)


@pytest.mark.slow
def test_two_concave_objectives_have_the_segment_between_their_peaks() -> None:
    """Round peaks of equal width: every best trade-off is a point between the peaks."""
    peaks = np.array([[1.0, 0.2], [0.3, 0.9]])

    def scores(points: Floats) -> Floats:
        return -np.sum((points[:, None] - peaks) ** 2, axis=2)

    search = MapSearch(box(2), GOALS, 0, MapSettings(front=12))
    found = run(search, scores)
    members = np.array([search._points[number] for number in range(12, 24)])
    along = peaks[1] - peaks[0]
    shares = (members - peaks[0]) @ along / (along @ along)
    assert members == pytest.approx(peaks[0] + shares[:, None] * along, abs=5e-3)
    assert np.diff(np.sort(shares)).max() < 0.2  # spread over all of it
    assert min(shares) == pytest.approx(0.0, abs=1e-2)
    assert max(shares) == pytest.approx(1.0, abs=1e-2)
    assert all(found[n] == pytest.approx(found_in(search.report(), n), abs=1e-8) for n in range(12, 24))


@pytest.mark.parametrize("dimension", [2, 3, 4])
def test_the_predicted_front_of_two_objectives_is_the_exact_one(dimension: int) -> None:
    """Any number of coefficients, two round peaks: the front is the segment between, in 20,001 steps."""
    rng = np.random.default_rng(dimension)
    peaks = rng.uniform(0.2, 1.3, (2, dimension))

    def scores(points: Floats) -> Floats:
        distance = np.sum((points[:, None] - peaks) ** 2, axis=2)
        return np.asarray(1 / (1 + np.exp(3 * distance - 1)))

    search = MapSearch(box(dimension), GOALS, 0, MapSettings(links="sigmoid", front=1), **QUICK)
    run(search, scores)
    low, high = np.zeros(dimension), np.full(dimension, 1.5)
    _, found = predicted_front(search._surrogates().cautious, low, high, np.random.default_rng(0))
    segment = scores(peaks[0] + np.linspace(0, 1, 20001)[:, None] * (peaks[1] - peaks[0]))
    exact = hypervolume(segment, np.zeros(2))
    assert hypervolume(found, np.zeros(2)) == pytest.approx(exact, rel=1e-3)


def found_in(report: dict, number: int) -> list[float]:
    return list(next(m for m in report["members"] if m["number"] == number)["predicted"].values())


def test_minimised_scores_are_minimised() -> None:
    def scores(points: Floats) -> Floats:
        return np.stack([np.sum((points - 0.25) ** 2, axis=1), np.sum((points - 1.0) ** 2, axis=1)], axis=1)

    losses = Goal("a", "minimize"), Goal("b", "minimize")
    search = MapSearch(box(2), losses, 0, MapSettings(links="identity", front=6), **QUICK)
    run(search, scores)
    members = np.array(search._points[12:])
    assert members[:, 0] == pytest.approx(members[:, 1], abs=0.02)
    assert members.min() > 0.24
    assert members.max() < 1.01


@pytest.mark.slow
def test_the_order_of_objectives_does_not_matter() -> None:
    truth = specialists(3, 1)
    volumes = []
    for order in ([0, 1, 2], [2, 0, 1]):

        def scores(points: Floats, order: list[int] = order) -> Floats:
            return truth(points)[:, order]

        front = predicted_front(scores, np.zeros(3), np.full(3, 1.5), np.random.default_rng(0), filling=6)[1]
        volumes.append(hypervolume(front, np.zeros(3)))
    assert volumes[0] == pytest.approx(volumes[1], rel=3e-3)


def test_one_best_point_is_a_front_of_one() -> None:
    """Objectives that agree: the predicted front is a point, and nothing is evaluated twice."""

    def scores(points: Floats) -> Floats:
        away = np.sum((points - 0.5) ** 2, axis=1)
        return np.stack([1 - away, 2 - 3 * away], axis=1)

    search = MapSearch(box(2), GOALS, 0, MapSettings(front=10), **QUICK)
    run(search, scores)
    assert search._points[12] == pytest.approx([0.5, 0.5], abs=0.01)


# -- the search ----------------------------------------------------------------------------------------------


def test_the_design_comes_at_once_and_the_front_when_it_is_told() -> None:
    search = MapSearch(box(2), GOALS, 0, evaluations=30, **QUICK)
    design = search.ask(100)
    assert len(design) == 12
    assert search.ask(1) == []
    truth = specialists(2, 0)
    for trial in design:
        search.tell(
            trial, Evaluation(dict(zip("ab", truth(search.box.point(trial.genome)[None])[0], strict=True))), TOLD
        )
    front = search.ask(100)
    assert [trial.number for trial in front] == list(range(12, 30))
    assert search.ask(1) == []
    assert not search.done


def test_a_larger_budget_goes_on_where_a_smaller_one_stopped() -> None:
    searches = [MapSearch(box(3), goals(3), 0, evaluations=budget, **QUICK) for budget in (30, 45)]
    for search in searches:
        run(search, specialists(3, 0))
    small, large = ([point.tolist() for point in search._points] for search in searches)
    assert len(small) == 30
    assert len(large) == 45
    assert large[:30] == small


def test_failed_points_are_survived_and_replaced_when_too_many() -> None:
    truth = specialists(2, 0)
    few = MapSearch(box(2), GOALS, 0, MapSettings(front=5), **QUICK)
    run(few, truth, fails=(1, 4, 13))
    assert len(few._points) == 17  # six would do, ten are left
    report = few.report()
    assert [member["number"] for member in report["members"] if member["measured"] is None] == [13]
    many = MapSearch(box(2), GOALS, 0, MapSettings(front=5), **QUICK)
    run(many, truth, fails=tuple(range(8)))
    assert len(many._points) == 12 + 2 + 5
    assert many.report()["design"] == list(range(14))


def test_predictions_stay_in_the_box_and_near_the_samples() -> None:
    points = np.array([[0.2, 0.0], [0.7, 1.4]])
    low, high = reach(points, box(2), 0.1)
    assert low == pytest.approx([0.15, 0.0])
    assert high == pytest.approx([0.75, 1.5])

    def rising(points: Floats) -> Floats:
        return np.stack([points.sum(axis=1), points[:, 0] - points[:, 1]], axis=1)

    front = predicted_front(rising, low, high, np.random.default_rng(0), filling=6)[0]
    assert front.min(axis=0) == pytest.approx([0.75, 0.0], abs=2e-3)
    assert front.max(axis=0) == pytest.approx([0.75, 1.5], abs=2e-3)
    assert (front <= high).all()


def test_caution_prefers_what_is_known() -> None:
    """With noise, members lie where the surrogate is surer."""
    truth = specialists(3, 0)
    rng = np.random.default_rng(0)

    def noisy(points: Floats) -> Floats:
        return np.clip(truth(points) + rng.normal(0, 0.05, (len(points), 3)), 0, 1)

    search = MapSearch(box(3), goals(3), 0, MapSettings(front=20, caution=0.0), generations=20, filling=2)
    run(search, noisy)
    bold = search._chosen
    search.settings = MapSettings(front=20, caution=2.0)
    careful = search._choose(20)
    model = search._surrogates()
    assert bold is not None
    assert model.std(careful).mean() < 0.9 * model.std(bold).mean()


def test_spread_takes_the_ends_first_and_may_be_cut_anywhere() -> None:
    angle = np.linspace(0, np.pi / 2, 101)
    arc = np.stack([np.cos(angle), np.sin(angle)], axis=1) * [1, 1000]
    order = spread(arc, 9)
    assert set(order[:2]) == {0, 100}
    assert sorted(order[:3]) == [0, 50, 100]
    assert spread(arc, 5).tolist() == order[:5].tolist()
    assert len(spread(arc, 1000)) == 101
    assert len(spread(np.ones((7, 2)), 3)) == 1


# -- the report ----------------------------------------------------------------------------------------------


def test_the_report_has_both_fronts_the_gap_and_the_error_of_each_surrogate() -> None:
    truth, rng = specialists(2, 3), np.random.default_rng(0)

    def noisy(points: Floats) -> Floats:
        return np.clip(truth(points) + rng.normal(0, 0.02, (len(points), 2)), 0, 1)

    search = MapSearch(box(2), GOALS, 0, MapSettings(samples=20, front=15), **QUICK)
    found = run(search, noisy)
    report = search.report()
    assert json.loads(json.dumps(report)) == report
    assert report["design"] == list(range(20))
    assert report["links"] == {"a": "sigmoid", "b": "sigmoid"}
    gaps = []
    for member in report["members"]:
        assert list(member["measured"].values()) == found[member["number"]].tolist()
        gaps.append([member["measured"][name] - member["predicted"][name] for name in "ab"])
        assert all(error > 0 for error in member["std"].values())
    for name, column in zip("ab", np.array(gaps).T, strict=True):
        assert report["gap"][name]["mean"] == pytest.approx(column.mean())
        assert report["gap"][name]["rms"] == pytest.approx(np.sqrt(np.mean(column**2)))
        assert 0.01 < report["leave_one_out"][name] < 0.06
        assert report["gap"][name]["rms"] < 0.06


def test_a_report_before_the_front_is_known() -> None:
    search = MapSearch(box(2), GOALS, 0)
    assert search.report() == {"algorithm": "map", "objectives": ["a", "b"], "design": []}


# -- refusals ------------------------------------------------------------------------------------------------


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(InputError, match=r"two or more objectives.*cma_es"):
        MapSearch(box(2), (Goal("a"),), 0)
    with pytest.raises(InputError, match=r"samples: expected at least 10.*3 variables, found 9.*20"):
        MapSearch(box(3), GOALS, 0, MapSettings(samples=9))
    with pytest.raises(InputError, match=r"evaluations: expected more than the 20 samples.*found 20"):
        MapSearch(box(3), GOALS, 0, evaluations=20)
    with pytest.raises(InputError, match=r"96 variables \(12 segments x 8.*4753.*granularity: model.*nsga2, cma_es"):
        MapSearch(box(8, segments=12), GOALS, 0)
    with pytest.raises(InputError, match=r"no link 'sigmod'.*sigmoid"):
        MapSearch(box(2), GOALS, 0, MapSettings(links="sigmod"))
    with pytest.raises(InputError, match=r"no objective 'aa'.*'a'"):
        MapSearch(box(2), GOALS, 0, MapSettings(links={"aa": "sigmoid"}))
    assert MapSearch(box(2), GOALS, 0, MapSettings(links={"b": "identity"})).links == {"a": "auto", "b": "identity"}
    assert MapSearch(box(3), GOALS, 0, MapSettings(samples=10), evaluations=11).front == 1
    assert MapSearch(box(1), GOALS, 0).samples == 6


@pytest.mark.slow
def test_a_design_on_which_an_objective_is_constant_grows() -> None:
    seen = []

    def scores(points: Floats) -> Floats:
        seen.append(points)
        return np.array([[points[0, 0], 0.25 if len(seen) <= 12 else 0.9 - points[0, 1] ** 2]])

    search = MapSearch(box(2), GOALS, 0, MapSettings(front=3), evaluations=60, **QUICK)
    run(search, scores, batch=4)
    report = search.report()
    assert len(report["design"]) == 12 + 4  # the first four more were enough
    assert len(np.unique(seen, axis=0)) == 16 + 3
    assert "warnings" not in report
    assert len({member["predicted"]["b"] for member in report["members"]}) == 3


def test_an_objective_that_stays_constant_guides_nothing_and_the_report_says_so() -> None:
    def scores(points: Floats) -> Floats:
        return np.stack([points[:, 0] - points[:, 0] ** 2, np.full(len(points), 0.25)], axis=1)

    search = MapSearch(box(2), GOALS, 0, MapSettings(), evaluations=20, **QUICK)
    found = run(search, scores)
    report = search.report()
    assert len(report["design"]) == 12 + 4  # half of what is left of the budget
    assert report["warnings"] == [
        "objectives.search.b: the score is the same (0.25) at all 16 points, so no surrogate of it could be fitted and "
        "it guided nothing. Widen search.low and search.high, score more examples, or leave this objective out."
    ]
    assert max(found[member["number"]][0] for member in report["members"]) == pytest.approx(0.25, abs=1e-4)


def test_surrogates_take_the_links_they_are_given() -> None:
    points = np.random.default_rng(0).random((20, 2))
    values = np.stack([points[:, 0], 3 * points[:, 1]], axis=1)
    found = Surrogates.fit(points, values, GOALS, {"a": "auto", "b": "auto"})
    assert [model.link.name for model in found.models] == ["sigmoid", "identity"]
    found = Surrogates.fit(points, values, GOALS, {"a": "identity", "b": "softplus"})
    assert [model.link.name for model in found.models] == ["identity", "softplus"]
    assert found.predict(points)[:, 0] == pytest.approx(values[:, 0], abs=1e-8)


def test_a_link_that_does_not_fit_the_scores_is_replaced_and_the_report_says_so() -> None:
    search = MapSearch(box(2), GOALS, 0, MapSettings(links={"b": "sigmoid"}), **QUICK)
    run(search, lambda points: np.stack([points[:, 0], 100 * points[:, 1] + 2], axis=1))
    report = search.report()
    assert report["links"]["b"] == "identity"
    (warning,) = report["warnings"]
    assert re.fullmatch(
        r"search\.links\.b: sigmoid is for scores between 0 and 1, found [0-9.]+, so identity was used\.", warning
    )


@pytest.mark.slow
def test_sixteen_models_are_proposed_in_seconds() -> None:
    """153 coefficients a surrogate, sixteen surrogates."""
    truth = specialists(16, 0)
    search = MapSearch(box(16), tuple(Goal(f"g{i}") for i in range(16)), 0, MapSettings(front=4), generations=5)
    trials = search.ask(400)
    assert len(trials) == 2 * 153
    for trial in trials:
        scores = truth(search.box.point(trial.genome)[None])[0]
        search.tell(trial, Evaluation({f"g{i}": float(s) for i, s in enumerate(scores)}), TOLD)
    chosen = search.ask(4)
    assert len(chosen) == 4
    assert isinstance(chosen[0], Trial)
