"""Archives and fronts: a conformance suite over every population, the niches' known answers, brute-force fronts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ecotone.populations.errors import EcotoneError, InputError, SearchError, nearest
from ecotone.populations.fronts import non_dominated
from ecotone.populations.genome import Genome
from ecotone.populations.niches import NicheArchive
from ecotone.populations.pareto import ParetoFront
from ecotone.populations.population import ElitistArchive, Population
from ecotone.populations.trial import Evaluation, Failure, Goal, Outcome, Trial

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

ACCURACY = (Goal("accuracy"),)
PAPER = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]]
MAKERS: dict[str, Callable[[int], Population]] = {
    "niches": lambda capacity: NicheArchive(ACCURACY, capacity),
    "niches-alpha-0": lambda capacity: NicheArchive(ACCURACY, capacity, alpha=0.0),
    "niches-alpha-2-one": lambda capacity: NicheArchive(ACCURACY, capacity, alpha=2.0, resource="one"),
    "elitist": lambda capacity: ElitistArchive(ACCURACY, capacity),
    "elitist-minimize": lambda capacity: ElitistArchive((Goal("accuracy", "minimize"),), capacity),
}


def trial(number: int) -> Trial:
    return Trial(number, Genome.uniform(4, [float(number)]))


def scored(row: object) -> Evaluation:
    values = np.asarray(row)
    return Evaluation({"accuracy": float(values.mean())}, {"accuracy": values})


def filled(rows: object, **arguments: object) -> NicheArchive:
    archive = NicheArchive(ACCURACY, 20, **arguments)  # type: ignore[arg-type]
    for number, row in enumerate(np.asarray(rows)):
        archive.add(trial(number), scored(row))
    return archive


def numbers(population: Population) -> list[int]:
    return [member.trial.number for member in population.members]


# -- every population ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("real", [False, True])
def test_capacity_holds_and_outcomes_say_what_happened(kind: str, real: bool) -> None:
    rng = np.random.default_rng(1)
    population = MAKERS[kind](5)
    assert population.capacity == 5
    refused = 0
    for number in range(120):
        before = numbers(population)
        row = rng.random(7) if real else rng.random(7) < rng.random()
        outcome = population.add(trial(number), scored(row))
        after = numbers(population)
        assert len(after) <= 5
        assert outcome.accepted == (number in after)
        assert set(outcome.evicted) == set(before) - set(after)
        assert number not in outcome.evicted
        assert after == sorted(after)  # oldest first
        refused += not outcome.accepted
    assert 0 < refused < 115


@pytest.mark.parametrize("kind", MAKERS)
def test_a_failed_evaluation_is_never_accepted(kind: str) -> None:
    population = MAKERS[kind](3)
    failed = Evaluation.failed("exception", "ValueError: no")
    assert population.add(trial(0), failed) == Outcome(accepted=False)
    population.add(trial(1), scored([True, False]))
    assert population.add(trial(2), failed) == Outcome(accepted=False)
    assert numbers(population) == [1]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("real", [False, True])
def test_restore_continues_as_if_nothing_had_happened(kind: str, real: bool) -> None:
    rng = np.random.default_rng(2)
    rows = [rng.random(9) if real else rng.random(9) < 0.5 for _ in range(80)]
    through, stopped = MAKERS[kind](6), MAKERS[kind](6)
    for number, row in enumerate(rows):
        expected = through.add(trial(number), scored(row))
        assert stopped.add(trial(number), scored(row)) == expected
        if number % 13 == 7:
            resumed = MAKERS[kind](6)
            resumed.restore(stopped.state())
            stopped = resumed
            assert numbers(stopped) == numbers(through)
            if isinstance(through, NicheArchive):
                assert isinstance(stopped, NicheArchive)
                assert stopped.fitness().tobytes() == through.fitness().tobytes()
                assert stopped.attraction(0).tobytes() == through.attraction(0).tobytes()


@pytest.mark.parametrize("kind", MAKERS)
def test_a_state_does_not_change_afterwards(kind: str) -> None:
    population = MAKERS[kind](2)
    for number in range(2):
        population.add(trial(number), scored([number == 0, True]))
    state = population.state()
    for number in range(2, 9):
        population.add(trial(number), scored([True, True, True][:2]))
    old = MAKERS[kind](2)
    old.restore(state)
    assert numbers(old) == [0, 1]
    empty = MAKERS[kind](2)
    empty.restore(MAKERS[kind](2).state())
    assert not empty.members
    assert empty.add(trial(0), scored([True])).accepted


# -- niches: the known answers -------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, [1, 1, 1]), (0.0, [2, 2, 1]), (2.0, [0.5, 0.5, 1])])
@pytest.mark.parametrize("resource", ["max", "one"])
def test_shared_fitness(alpha: float, expected: list[float], resource: str) -> None:
    assert filled(PAPER, alpha=alpha, resource=resource).fitness().tolist() == expected


def test_attraction() -> None:
    archive = filled(PAPER)
    assert archive.attraction(0).tolist() == [0, 0, 1]
    assert archive.attraction(1).tolist() == [0, 0, 1]
    assert archive.attraction(2).tolist() == [1, 1, 0]


BINARY = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=8)


@given(BINARY)
def test_at_alpha_1_fitness_sums_to_what_is_solved_by_anyone(rows: list[list[bool]]) -> None:
    assert filled(rows).fitness().sum() == pytest.approx(int(np.any(rows, axis=0).sum()), abs=1e-12)


@given(BINARY, st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_right_or_wrong_scores_make_both_resources_one(rows: list[list[bool]], alpha: float) -> None:
    most, one = filled(rows, alpha=alpha, resource="max"), filled(rows, alpha=alpha, resource="one")
    assert most.fitness().tolist() == one.fitness().tolist()
    for index in range(len(rows)):
        assert most.attraction(index).tolist() == one.attraction(index).tolist()


def test_continuous_scores_tell_the_resources_apart() -> None:
    rows = [[0.5, 0.0], [0.25, 0.25]]
    assert filled(rows, resource="one").fitness() == pytest.approx([0.5 / 0.75, 0.25 / 0.75 + 1])
    assert filled(rows, resource="max").fitness() == pytest.approx([0.5 * 0.5 / 0.75, 0.5 * 0.25 / 0.75 + 0.25])


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.just(0.0) | st.floats(1e-6, 10), min_size=5, max_size=5), min_size=2, max_size=7),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.sampled_from(["max", "one"]),
)
def test_fitness_and_attraction_are_the_formula(rows: list[list[float]], alpha: float, resource: str) -> None:
    archive, scores = filled(rows, alpha=alpha, resource=resource), np.array(rows)
    worth = np.zeros(5)
    for j in range(5):
        demand = scores[:, j].sum()
        if demand > 0:
            worth[j] = (scores[:, j].max() if resource == "max" else 1.0) / demand**alpha
    assert archive.fitness() == pytest.approx(scores @ worth, rel=1e-9, abs=1e-300)
    for a in range(len(rows)):
        wanted = [sum(max(0.0, s - r) * w for s, r, w in zip(row, rows[a], worth, strict=True)) for row in rows]
        assert archive.attraction(a) == pytest.approx(wanted, rel=1e-9, abs=1e-300)
        assert archive.attraction(a)[a] == 0


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("resource", ["max", "one"])
def test_scores_next_to_nothing_leave_fitness_finite(alpha: float, resource: str) -> None:
    """As exp(-loss) gives for a hopeless model."""
    archive = filled([[5e-324, 1.0], [0.0, 1e-200], [1e-300, 0.0]], alpha=alpha, resource=resource)
    assert np.isfinite(archive.fitness()).all()
    assert np.isfinite(archive.attraction(0)).all()
    assert archive.fitness()[0] > 0


def test_the_least_fit_leaves_and_the_oldest_of_equals() -> None:
    archive = NicheArchive(ACCURACY, capacity=3)
    for number, row in enumerate(PAPER):
        archive.add(trial(number), scored(np.array(row, bool)))
    # A newcomer in an empty niche: 0 and 1 share theirs and are equal; 0 is older.
    assert archive.add(trial(3), scored([False, False, False, True])) == Outcome(True, (0,))
    assert numbers(archive) == [1, 2, 3]
    # A newcomer that solves nothing leaves at once.
    assert archive.add(trial(4), scored([False] * 4)) == Outcome(False)
    # One who solves what the third solves shares its niche; the older one leaves.
    assert archive.add(trial(5), scored([False, False, True, False])) == Outcome(True, (2,))


def test_a_plain_genetic_algorithm_drops_the_specialist_that_niches_keep() -> None:
    kept: dict[float, list[int]] = {}
    for alpha in (0.0, 1.0):
        archive = NicheArchive(ACCURACY, capacity=3, alpha=alpha)
        for number, row in enumerate([[0, 0, 0, 1, 1], *[[1, 1, 1, 0, 0]] * 3]):
            archive.add(trial(number), scored(np.array(row, bool)))
        kept[alpha] = numbers(archive)
    assert kept == {0.0: [1, 2, 3], 1.0: [0, 2, 3]}


def test_examples_of_all_objectives_lie_side_by_side() -> None:
    archive = NicheArchive((Goal("a"), Goal("b")), capacity=3)
    one = Evaluation({"a": 1.0, "b": 0.5}, {"a": np.array([True, True]), "b": np.array([True, False])})
    two = Evaluation({"a": 0.0, "b": 1.0}, {"a": np.array([False, False]), "b": np.array([True, True])})
    archive.add(trial(0), one)
    archive.add(trial(1), two)
    assert archive.fitness().tolist() == [2.5, 1.5]
    assert archive.attraction(0).tolist() == [0, 1]


def test_an_objective_without_examples_is_one_resource() -> None:
    archive = NicheArchive(ACCURACY, capacity=3)
    archive.add(trial(0), Evaluation({"accuracy": 0.75}))
    archive.add(trial(1), Evaluation({"accuracy": 0.25}))
    assert archive.fitness().tolist() == [0.75 * 0.75, 0.25 * 0.75]


def test_the_niche_archive_refuses_what_it_cannot_share() -> None:
    with pytest.raises(InputError, match=r"objective 'loss'.*found direction minimize"):
        NicheArchive((Goal("loss", "minimize"),))
    with pytest.raises(InputError, match="archive: expected at least 2 members, found 1"):
        NicheArchive(ACCURACY, capacity=1)
    for alpha in (-1.0, float("nan")):
        with pytest.raises(InputError, match="alpha: expected a number of at least 0"):
            NicheArchive(ACCURACY, alpha=alpha)
    with pytest.raises(SearchError, match=r"per-example scores of at least 0, found -0\.5"):
        NicheArchive(ACCURACY).add(trial(0), scored([-0.5, 1.0]))
    archive = filled([[True, False]])
    with pytest.raises(SearchError, match="trial 1: expected 2 per-example scores, found 3"):
        archive.add(trial(1), scored([True, True, True]))


# -- the elitist archive -------------------------------------------------------------------------------------


def test_the_elitist_archive_keeps_the_best_and_the_older_of_equals() -> None:
    archive = ElitistArchive(ACCURACY, capacity=3)
    values = [0.2, 0.9, 0.5, 0.5, 0.1, 0.95, 0.9]
    outcomes = [archive.add(trial(i), Evaluation({"accuracy": value})) for i, value in enumerate(values)]
    assert numbers(archive) == [1, 5, 6]
    assert outcomes[3] == Outcome(True, (0,))
    assert outcomes[4] == Outcome(False)
    assert outcomes[5] == Outcome(True, (3,))  # 2 is as good and older
    assert outcomes[6] == Outcome(True, (2,))


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.integers(1, 6), st.booleans())
def test_the_elitist_archive_against_sorting(values: list[float], capacity: int, minimise: bool) -> None:
    goals = (Goal("accuracy", "minimize" if minimise else "maximize"),)
    archive = ElitistArchive(goals, capacity)
    for number, value in enumerate(values):
        archive.add(trial(number), Evaluation({"accuracy": value}))
    order = sorted(range(len(values)), key=lambda i: (values[i] if minimise else -values[i], i))
    assert numbers(archive) == sorted(order[:capacity])


# -- fronts --------------------------------------------------------------------------------------------------


def brute_force(points: NDArray[np.float64]) -> list[int]:
    """Numbers that no other dominates; of equals the lowest."""
    kept = []
    for i, point in enumerate(points):
        better = (points >= point).all(axis=1) & (points > point).any(axis=1)
        same = (points[:i] == point).all(axis=1)
        if not better.any() and not same.any():
            kept.append(i)
    return kept


COARSE = st.integers(0, 4).map(float)  # many ties


@pytest.mark.parametrize("objectives", [1, 2, 3])
@settings(max_examples=80)
@given(data=st.data())
def test_the_front_is_what_brute_force_finds(objectives: int, data: st.DataObject) -> None:
    row = st.lists(COARSE, min_size=objectives, max_size=objectives)
    points = np.array(data.draw(st.lists(row, min_size=1, max_size=25)))
    goals = [Goal(f"o{i}") for i in range(objectives)]
    expected = brute_force(points)
    assert np.flatnonzero(non_dominated(points)).tolist() == expected
    front = ParetoFront(goals)
    for number, point in enumerate(points):
        joined = front.add(number, point)
        assert joined == (number in front.numbers)
        assert sorted(front.numbers) == brute_force(points[: number + 1])
    assert np.array_equal(front.points, points[front.numbers])


@settings(max_examples=80)
@given(data=st.data())
def test_the_front_does_not_depend_on_the_order_of_arrival(data: st.DataObject) -> None:
    """With ``order: arrival`` results are learned out of order; reports read them in order of number."""
    points = np.array(data.draw(st.lists(st.lists(COARSE, min_size=2, max_size=2), min_size=1, max_size=20)))
    front = ParetoFront([Goal("a"), Goal("b")])
    for number in data.draw(st.permutations(range(len(points)))):
        joined = front.add(number, points[number])
        assert joined == (number in front.numbers)
    assert sorted(front.numbers) == brute_force(points)


# -- small things --------------------------------------------------------------------------------------------


def test_an_evaluation_says_whether_it_has_scores() -> None:
    assert Evaluation({"a": 1.0}).ok
    failed = Evaluation.failed("exception", "no", "traceback", seconds=2.0)
    assert not failed.ok
    assert failed.failure == Failure("exception", "no", "traceback")
    assert failed.seconds == 2.0


def test_errors_join_message_and_remedy_and_survive_pickling() -> None:
    import pickle

    error = InputError("a: expected b, found c.", "Do d.")
    assert str(error) == "a: expected b, found c. Do d."
    assert str(EcotoneError("a")) == "a"
    back = pickle.loads(pickle.dumps(error))  # as workers send them
    assert isinstance(back, InputError)
    assert (back.message, back.remedy) == (error.message, error.remedy)


def test_the_nearest_word() -> None:
    assert nearest("alpa", ["alpha", "archive"]) == "Did you mean 'alpha'?"
    assert nearest("zzz", ["b", "a"]) == "Known: a, b."
