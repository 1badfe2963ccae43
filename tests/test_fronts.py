"""Front tools: known answers, definitions written out, and the edge cases that moocore leaves to its caller."""

from __future__ import annotations

import moocore
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ecotone.populations.errors import InputError
from ecotone.populations.fronts import (
    attainment,
    epsilon,
    hypervolume,
    hypervolume_over,
    igd_plus,
    non_dominated,
    ranks,
)
from ecotone.populations.pareto import ParetoFront
from ecotone.populations.trial import Goal

STAIRS = np.array([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]])

tables = st.integers(1, 5).flatmap(
    lambda columns: arrays(
        np.float64,
        st.tuples(st.integers(0, 40), st.just(columns)),
        elements=st.integers(0, 4).map(float),  # coarse, so that equal points and ties are common
    )
)


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a >= b).all() and (a > b).any())


@given(tables)
def test_non_dominated_is_its_definition_and_agrees_with_the_running_front(points):
    found = non_dominated(points)
    for i, point in enumerate(points):
        beaten = any(dominates(other, point) for other in points)
        earlier = any((points[j] == point).all() for j in range(i))
        assert found[i] == (not beaten and not earlier)
    front = ParetoFront([Goal(str(column)) for column in range(points.shape[1])])
    for number, point in enumerate(points):
        front.add(number, point)
    assert sorted(front.numbers) == np.flatnonzero(found).tolist()


@pytest.mark.parametrize("columns", [2, 3, 4, 6])
def test_the_running_front_agrees_with_moocore_on_many_points(columns):
    points = np.random.default_rng(columns).integers(0, 9, (600, columns)).astype(float)
    front = ParetoFront([Goal(str(column)) for column in range(columns)])
    for number, point in enumerate(points):
        front.add(number, point)
    expected = moocore.is_nondominated(-points)
    assert sorted(front.numbers) == np.flatnonzero(expected).tolist()
    np.testing.assert_array_equal(non_dominated(points), expected)


@given(tables)
def test_ranks_peel_front_after_front(points):
    found = ranks(points)
    assert found.shape == (len(points),)
    for i, point in enumerate(points):
        above = [found[j] for j, other in enumerate(points) if dominates(other, point)]
        assert found[i] == (max(above) + 1 if above else 0)


def test_hypervolume_of_stairs_boxes_and_nothing():
    assert hypervolume(STAIRS, [0, 0]) == pytest.approx(6.0)
    assert hypervolume(STAIRS, [1, 1]) == pytest.approx(1.0)  # only (2, 2) is above it in both
    assert hypervolume([[0.5, 0.5, 0.5, 0.5]], [0, 0, 0, 0]) == pytest.approx(0.5**4)
    assert hypervolume([[0.2], [0.7]], [0.1]) == pytest.approx(0.6)
    assert hypervolume(np.zeros((0, 3)), [0, 0, 0]) == 0.0
    assert hypervolume([[-1.0, 5.0]], [0, 0]) == 0.0


@pytest.mark.slow
@given(tables)
def test_hypervolume_counts_the_unit_cells_dominated(points):
    columns = points.shape[1]
    cells = np.stack(np.meshgrid(*[np.arange(4) + 1.0] * columns, indexing="ij"), -1).reshape(-1, columns)
    dominated = sum(any((point >= cell).all() for point in points) for cell in cells)
    assert hypervolume(points, np.zeros(columns)) == pytest.approx(dominated)


@given(tables)
def test_running_hypervolume_is_that_of_each_beginning(points):
    reference = np.full(points.shape[1], 0.5)
    running = hypervolume_over(points, reference)
    expected = [hypervolume(points[: n + 1], reference) for n in range(len(points))]
    np.testing.assert_allclose(running, expected, atol=1e-12)


def test_hypervolumes_of_many_objectives_are_estimated_closely_and_alike_each_time():
    points = np.random.default_rng(0).random((40, 7))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    exact = moocore.hypervolume(points, ref=np.zeros(7), maximise=True)
    found = hypervolume(points, np.zeros(7))
    assert found == pytest.approx(exact, rel=0.005)
    assert found == hypervolume(points, np.zeros(7))
    running = hypervolume_over(np.tile(points, (4, 1)), np.zeros(7))
    assert running[-1] == found
    assert (np.diff(running) >= 0).all()
    assert running[0] == pytest.approx(np.prod(points[0]))


def test_distances_to_a_front_have_known_values():
    front = np.array([[0.0, 2.0], [2.0, 0.0]])
    assert igd_plus(front, front) == 0.0
    assert igd_plus([[0.0, 1.0], [2.0, 0.0]], front) == pytest.approx(0.5)
    assert igd_plus(front + 1.0, front) == 0.0  # a better front is not farther away, as it is with IGD
    assert epsilon(front, front) == 0.0
    assert epsilon(front - 0.25, front) == pytest.approx(0.25)
    assert epsilon(front + 0.25, front) == pytest.approx(-0.25)
    assert igd_plus(np.zeros((0, 2)), front) == epsilon(np.zeros((0, 2)), front) == float("inf")


@pytest.mark.parametrize("level", [0.2, 0.4, 0.5, 0.6, 1.0])
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_attainment_is_reached_by_the_share_of_fronts_and_by_no_more(level, columns):
    generator = np.random.default_rng(7)
    fronts = [generator.random((6, columns)) for _ in range(5)]
    surface = attainment(fronts, level)
    needed = np.ceil(level * 5 - 1e-9)

    def reached(point: np.ndarray) -> int:
        return sum(bool((front >= point).all(axis=1).any()) for front in fronts)

    assert len(surface)
    assert all(reached(point) >= needed for point in surface)
    assert all(reached(point + 1e-9) < needed for point in surface)
    for point in generator.random((200, columns)):
        assert (reached(point) >= needed) == bool((surface >= point).all(axis=1).any())


def test_a_seed_without_a_front_counts_in_the_share():
    fronts = [STAIRS, STAIRS - 1, np.zeros((0, 2))]
    assert sorted(attainment(fronts, 0.5).tolist()) == (STAIRS - 1).tolist()
    assert attainment(fronts, 1.0).shape == (0, 2)


def test_no_points_are_no_front():
    assert non_dominated(np.zeros((0, 2))).shape == (0,)
    assert ranks(np.zeros((0, 2))).shape == (0,)
    assert hypervolume_over(np.zeros((0, 2)), [0, 0]).shape == (0,)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "tool",
    [
        non_dominated,
        ranks,
        lambda p: hypervolume(p, [0, 0]),
        lambda p: hypervolume_over(p, [0, 0]),
        lambda p: igd_plus(p, STAIRS),
        lambda p: epsilon(STAIRS, p),
        lambda p: attainment([p], 0.5),
    ],
)
def test_scores_that_are_not_finite_are_refused(tool, bad):
    with pytest.raises(InputError, match=r"expected finite scores, found .* in row 1"):
        tool([[0.0, 1.0], [bad, 0.5], [1.0, 0.0]])


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"expected shape \(N, M\)"):
        non_dominated([0.5, 0.2])
    with pytest.raises(InputError, match="reference: expected 2 finite numbers"):
        hypervolume(STAIRS, [0, 0, 0])
    with pytest.raises(InputError, match="one number of objectives"):
        igd_plus(STAIRS, np.zeros((1, 3)))
    with pytest.raises(InputError, match="reference_front: expected at least one point"):
        epsilon(STAIRS, np.zeros((0, 2)))
    with pytest.raises(InputError, match="at most three objectives, found 4"):
        attainment([np.zeros((1, 4))], 0.5)
    with pytest.raises(InputError, match="level"):
        attainment([STAIRS], 0.0)
    with pytest.raises(InputError, match="at least one front"):
        attainment([], 0.5)
