"""Merges to begin with: solved coefficients against formulas on the vectors, their place in a search, recipes, runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ecotone.experiments import compose
from ecotone.experiments.checks import validate
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.report import start_lines
from ecotone.experiments.running import launch, resume
from ecotone.experiments.runs import Run
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.populations.gram import GramTable
from ecotone.populations.journal import Journal
from ecotone.populations.space import Space
from ecotone.populations.trial import Goal
from ecotone.search.cma_es import CmaEs, CmaEsSettings
from ecotone.search.coefficients import Parts
from ecotone.search.kinds import Context, SearchSettings
from ecotone.search.registry import SEARCHES
from ecotone.search.starts.base import Geometry, Weighs
from ecotone.search.starts.placing import begun, placed, solved
from ecotone.search.starts.registry import SOLVERS
from ecotone.testing.searches import SPACE, TASKS, WOVEN

Vector = NDArray[np.float64]
SIZES = (6, 11, 40, 3, 25)
TENSORS = ("embed.weight", "layers.0.weight", "layers.1.weight", "layers.2.bias", "head.weight")
BLOCKS = ("embed", "layers.0", "layers.1", "layers.2", "head")
TWO_GOALS = (Goal("one"), Goal("two"))


def space_of(vectors: Vector, seeds: Vector | None = None, fine: bool = True) -> Space:
    """Models whose K sources are ``vectors`` (K, n) over five tensors; regions are elements, or halves of tensors."""
    borders = np.cumsum((0, *SIZES))
    regions = np.arange(borders[-1] + 1) if fine else np.union1d(borders, borders[:-1] + np.array(SIZES) // 2)
    rows = np.eye(len(vectors)) if seeds is None else seeds
    names = tuple(f"expert-{i}" for i in range(len(rows)))
    gram = GramTable.from_vectors(vectors, regions)
    return Space(names, TENSORS, borders, BLOCKS, borders, gram, rows, names)


def vectors_of(count: int, seed: int = 0) -> Vector:
    """Vectors that have something in common, of different lengths."""
    rng = np.random.default_rng(seed)
    common, own = rng.standard_normal(sum(SIZES)), rng.standard_normal((count, sum(SIZES)))
    return np.asarray((common + own) * rng.uniform(0.2, 3.0, (count, 1)))


def coefficients(solve: str, space: Space, weighs: Weighs = "task_vectors", **settings: Any) -> Vector:
    """(T, K) what a solver says of the models."""
    solver = SOLVERS.get(solve, "solve").model_validate({"solve": solve, **settings})
    models = Geometry(space, weighs)
    solver.check_operator(weighs)
    solver.check(models)
    found = solver.coefficients(models)
    assert np.isfinite(found).all()
    return found


def pieces(vectors: Vector) -> list[Vector]:
    """(K, n_t) by tensor."""
    return [vectors[:, a:b] for a, b in pairwise(np.cumsum((0, *SIZES)))]


def merged(table: Vector, vectors: Vector) -> list[Vector]:
    """By tensor, the sum of the vectors with their coefficients."""
    return [row @ piece for row, piece in zip(table, pieces(vectors), strict=True)]


def close(found: Sequence[Vector], expected: Sequence[Vector], tolerance: float = 1e-11) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * (1 + np.abs(other).max()))


# -- formulas, computed on the vectors themselves --------------------------------------------------------------


def model_stock(piece: Vector) -> Vector:
    """Between the base (0) and the average, by the mean pairwise cosine."""
    count = len(piece)
    units = piece / np.linalg.norm(piece, axis=1, keepdims=True)
    mean = np.mean([units[i] @ units[j] for i in range(count) for j in range(i)])
    return np.asarray(count * mean / (1 + (count - 1) * mean) * piece.mean(axis=0))


def log(point: Vector, other: Vector) -> Vector:
    """The tangent at a point of the sphere that leads to another."""
    angle = math.acos(min(1.0, max(-1.0, float(point @ other))))
    across = other - (point @ other) * point
    return np.asarray(angle * across / np.linalg.norm(across)) if np.linalg.norm(across) > 1e-15 else 0 * across


def exp(point: Vector, tangent: Vector) -> Vector:
    length = float(np.linalg.norm(tangent))
    return np.asarray(point if length == 0 else math.cos(length) * point + math.sin(length) * tangent / length)


def multi_slerp(piece: Vector, shares: Vector) -> Vector:
    """As published: units are projected into the tangent space at their mean, averaged there, and put back."""
    lengths = np.linalg.norm(piece, axis=1)
    units = piece / lengths[:, None]
    mean = shares @ units
    mean /= np.linalg.norm(mean)
    tangent = shares @ (units - (units @ mean)[:, None] * mean)
    assert np.linalg.norm(tangent) < 1e-12  # zero by construction
    return np.asarray((shares @ lengths) * exp(mean, tangent))


def karcher(piece: Vector, shares: Vector) -> Vector:
    lengths = np.linalg.norm(piece, axis=1)
    units = piece / lengths[:, None]
    point = shares @ units
    point /= np.linalg.norm(point)
    for _ in range(400):
        point = exp(point, sum(w * log(point, u) for w, u in zip(shares, units, strict=True)))
    return np.asarray((shares @ lengths) * point)


def slerp(piece: Vector, t: float) -> Vector:
    a, b = piece
    angle = math.acos(float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))
    return np.asarray((math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle))


SHARES = {"expert-0": 1.0, "expert-1": 3.0, "expert-2": 2.0}


@pytest.mark.parametrize("fine", [True, False])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock_is_the_formula_on_the_task_vectors(count: int, fine: bool) -> None:
    vectors = vectors_of(count)
    table = coefficients("model_stock", space_of(vectors, fine=fine))
    close(merged(table, vectors), [model_stock(piece) for piece in pieces(vectors)])


@pytest.mark.parametrize("weighs", ["task_vectors", "models"])
@pytest.mark.parametrize("fine", [True, False])
def test_means_on_the_sphere_are_those_of_the_vectors(weighs: Weighs, fine: bool) -> None:
    vectors = vectors_of(3)
    space, shares = space_of(vectors, fine=fine), np.array([1, 3, 2]) / 6
    table = coefficients("multi_slerp", space, weighs, weights=SHARES)
    close(merged(table, vectors), [multi_slerp(piece, shares) for piece in pieces(vectors)])
    table = coefficients("karcher", space, weighs, weights=SHARES)
    close(merged(table, vectors), [karcher(piece, shares) for piece in pieces(vectors)], 1e-9)
    for merge, piece in zip(merged(table, vectors), pieces(vectors), strict=True):
        point, units = merge / np.linalg.norm(merge), piece / np.linalg.norm(piece, axis=1, keepdims=True)
        assert np.linalg.norm(sum(w * log(point, u) for w, u in zip(shares, units, strict=True))) < 1e-7
    even = np.full(3, 1 / 3)
    close(merged(coefficients("multi_slerp", space), vectors), [multi_slerp(piece, even) for piece in pieces(vectors)])


def test_models_of_one_base_are_nearly_parallel_and_their_means_are_exact() -> None:
    base = np.random.default_rng(5).standard_normal(sum(SIZES))
    vectors = base + 1e-5 * vectors_of(3)
    space = space_of(vectors)
    for solve, formula in (("multi_slerp", multi_slerp), ("karcher", karcher)):
        table = coefficients(solve, space, "models", weights=SHARES)
        expected = [formula(piece, np.array([1, 3, 2]) / 6) for piece in pieces(vectors)]
        close(merged(table, vectors), expected, 1e-12)


def test_nuslerp_is_slerp_by_tensor_and_of_equal_lengths_the_karcher_mean() -> None:
    vectors = vectors_of(2)
    weights = {"expert-0": 1.0, "expert-1": 3.0}
    table = coefficients("nuslerp", space_of(vectors), weights=weights)
    close(merged(table, vectors), [slerp(piece, 0.75) for piece in pieces(vectors)])
    level = np.hstack([piece / np.linalg.norm(piece, axis=1, keepdims=True) for piece in pieces(vectors)])
    means = [coefficients(solve, space_of(level), weights=weights) for solve in ("nuslerp", "karcher")]
    np.testing.assert_allclose(*means, atol=1e-10)
    halves = [coefficients(solve, space_of(level)) for solve in ("nuslerp", "multi_slerp")]
    np.testing.assert_allclose(*halves, atol=1e-12)
    for end, row in (("expert-0", [1, 0]), ("expert-1", [0, 1])):
        rest = {"expert-0": 0.0, "expert-1": 0.0} | {end: 1.0}
        np.testing.assert_allclose(coefficients("nuslerp", space_of(vectors), weights=rest), [row] * 5, atol=1e-15)


BY_TENSOR = ("model_stock", "multi_slerp", "karcher")


@pytest.mark.parametrize("solve", BY_TENSOR)
def test_one_expert_is_the_expert(solve: str) -> None:
    np.testing.assert_allclose(coefficients(solve, space_of(vectors_of(1))), np.ones((5, 1)), atol=1e-15)


@pytest.mark.parametrize("solve", BY_TENSOR)
def test_equal_experts_are_the_expert(solve: str) -> None:
    vectors = np.repeat(vectors_of(1), 4, axis=0)
    np.testing.assert_allclose(coefficients(solve, space_of(vectors)), np.full((5, 4), 0.25), atol=1e-12)


@pytest.mark.parametrize("solve", [*BY_TENSOR, "nuslerp"])
def test_experts_that_are_the_base_give_the_average(solve: str) -> None:
    """All task vectors are zero, or those of one tensor, or all of one expert."""
    vectors = vectors_of(2)
    np.testing.assert_array_equal(coefficients(solve, space_of(0 * vectors)), np.full((5, 2), 0.5))
    vectors[:, 6:17] = 0
    table = coefficients(solve, space_of(vectors))
    np.testing.assert_array_equal(table[1], [0.5, 0.5])
    vectors[0] = 0
    table = coefficients(solve, space_of(vectors))
    if solve == "model_stock":  # nothing agrees with nothing
        np.testing.assert_array_equal(table[[0, 2, 3, 4]], np.zeros((4, 2)))
    else:
        np.testing.assert_allclose(table, np.full((5, 2), 0.5), atol=1e-15)


def test_orthogonal_experts_leave_the_base_and_their_means_keep_the_mean_length() -> None:
    vectors = np.hstack([np.linalg.qr(np.random.default_rng(0).standard_normal((n, 3)))[0].T for n in SIZES])
    space = space_of(vectors)
    np.testing.assert_allclose(coefficients("model_stock", space), np.zeros((5, 3)), atol=1e-14)
    for solve in ("multi_slerp", "karcher"):
        np.testing.assert_allclose(coefficients(solve, space), np.full((5, 3), 1 / math.sqrt(3)), atol=1e-12)


@pytest.mark.parametrize("cosine", [-0.3, -1 / 3])
def test_experts_that_point_apart_clamp_model_stock(cosine: float) -> None:
    """Four vectors with these cosines: t would be -12, and minus infinity (or, by rounding, infinity)."""
    values, turned = np.linalg.eigh((1 - cosine) * np.eye(4) + cosine)
    vectors = np.tile(turned * np.sqrt(np.maximum(values, 0)), (1, 22))[:, : sum(SIZES)]
    whole = np.zeros((4, sum(SIZES)))
    for start, size in zip(np.cumsum((0, *SIZES)), SIZES, strict=False):
        whole[:, start : start + min(size, 4)] = vectors[:, : min(size, 4)]
    table = coefficients("model_stock", space_of(whole))
    assert ((table >= 0) & (table <= 0.25)).all()
    np.testing.assert_array_equal(table[[0, 1, 2, 4]], np.zeros((4, 4)))


@pytest.mark.parametrize("solve", BY_TENSOR)
def test_directions_that_cancel_out_give_finite_coefficients(solve: str) -> None:
    one = vectors_of(1)
    table = coefficients(solve, space_of(np.vstack([one, -one])))
    assert np.abs(table).max() <= 0.5


@pytest.mark.parametrize("solve", BY_TENSOR)
def test_permuting_models_permutes_coefficients(solve: str) -> None:
    vectors, order = vectors_of(4), [2, 0, 3, 1]
    table = coefficients(solve, space_of(vectors))
    np.testing.assert_allclose(coefficients(solve, space_of(vectors[order])), table[:, order], atol=1e-12)


@pytest.mark.parametrize("solve", BY_TENSOR)
def test_the_size_of_task_vectors_does_not_matter_nor_that_of_one_tensor(solve: str) -> None:
    """Guards are relative: a bias of differences of a millionth beside large ones has its angles."""
    vectors = vectors_of(3)
    table = coefficients(solve, space_of(vectors))
    np.testing.assert_allclose(coefficients(solve, space_of(1e-9 * vectors)), table, atol=1e-9)
    vectors[:, 57:60] *= 1e-6  # the fourth tensor, after larger ones
    np.testing.assert_allclose(coefficients(solve, space_of(vectors)), table, atol=2e-3)


def test_what_is_below_rounding_counts_as_zero() -> None:
    vectors = vectors_of(3)
    vectors[:, 57:60] *= 1e-12
    np.testing.assert_allclose(coefficients("model_stock", space_of(vectors))[3], np.full(3, 1 / 3))


@pytest.mark.parametrize("solve", [*BY_TENSOR, "average", "lines", "mwa"])
def test_coefficients_are_those_that_give_the_merge_under_the_operator(solve: str) -> None:
    """An operator that damps task vectors to a quarter needs four times the coefficients."""
    vectors = vectors_of(3)
    settings = {"metrics": SHARES} if solve == "mwa" else {}
    plain = coefficients(solve, space_of(vectors), **settings)
    damped = coefficients(solve, space_of(vectors / 4, 4 * np.eye(3)), **settings)
    np.testing.assert_allclose(damped, 4 * plain, atol=1e-12)


def test_infinite_inner_products_are_refused() -> None:
    vectors = vectors_of(2)
    vectors[0, 3] = math.inf
    with np.errstate(invalid="ignore"), pytest.raises(InputError, match="inner products are not finite"):
        coefficients("model_stock", space_of(vectors))


# -- formulas without inner products ---------------------------------------------------------------------------


def test_lines_grows_with_depth() -> None:
    table = coefficients("lines", space_of(vectors_of(2)), alpha=0.2, beta=0.6)
    np.testing.assert_allclose(table, np.repeat([[0.2], [0.2], [0.5], [0.8], [0.2]], 2, axis=1))
    assert (coefficients("lines", space_of(vectors_of(2)), alpha=0.3, beta=0.0) == 0.3).all()
    assert (coefficients("lines", space_of(vectors_of(2)), alpha=1.0, beta=0.0) == 1).all()
    np.testing.assert_allclose(coefficients("lines", space_of(vectors_of(4)))[:, 0], [0.25, 0.25, 0.375, 0.5, 0.25])


def test_stacks_have_depths_of_their_own() -> None:
    blocks = ("decoder.layers.0", "decoder.layers.2", "decoder.layers.10", "encoder.layers.7", "head")
    borders = np.cumsum((0, *SIZES))
    names = ("a", "b")
    space = Space(names, TENSORS, borders, blocks, borders, GramTable.from_vectors(vectors_of(2)), np.eye(2), names)
    np.testing.assert_array_equal(Geometry(space, "task_vectors").depths, [0, 0.5, 1, 0, np.nan])


def test_mwa_weighs_by_a_power_of_the_metric() -> None:
    space, losses = space_of(vectors_of(3)), {"expert-0": 0.5, "expert-1": 0.25, "expert-2": 1.0}
    np.testing.assert_allclose(coefficients("mwa", space, losses=losses)[0], np.array([2, 4, 1]) / 7)
    np.testing.assert_allclose(coefficients("mwa", space, losses=losses, p=2)[0], np.array([4, 16, 1]) / 21)
    inverse = {name: 1 / loss for name, loss in losses.items()}
    np.testing.assert_allclose(coefficients("mwa", space, metrics=inverse)[0], np.array([2, 4, 1]) / 7)
    np.testing.assert_allclose(coefficients("mwa", space, losses=losses, p=0), np.full((5, 3), 1 / 3))
    np.testing.assert_allclose(coefficients("mwa", space, losses=losses, p=1e6), [[0, 1, 0]] * 5)
    np.testing.assert_allclose(coefficients("mwa", space, losses=dict.fromkeys(losses, 3.0)), np.full((5, 3), 1 / 3))


def test_one_shot_is_all_ones() -> None:
    space = space_of(vectors_of(3), 2 * np.eye(3))
    assert (coefficients("one_shot", space, "prepared") == 1).all()


@pytest.mark.parametrize(
    ("solve", "weighs", "settings", "message"),
    [
        ("model_stock", "models", {}, "model_stock weighs task vectors, found a merge.operator that mixes the models"),
        ("one_shot", "models", {}, "one_shot weighs task vectors"),
        ("lines", "models", {}, "lines weighs task vectors"),
        ("model_stock", "prepared", {}, r"mixes others in their place.*solve: one_shot"),
        ("karcher", "prepared", {}, "mixes others in their place"),
        ("lines", "prepared", {"alpha": 0.5}, "expected alpha and beta with a merge.operator that mixes others"),
        ("nuslerp", "models", {}, r"between two experts, found 3\. Use multi_slerp or karcher"),
        ("karcher", "models", {"weights": {"expert1": 1}}, "there is no expert 'expert1'. Did you mean 'expert-1'"),
        ("karcher", "models", {"weights": {"expert-1": -1}}, "weights: expected numbers of at least 0"),
        ("karcher", "models", {"weights": dict.fromkeys(SHARES, 0)}, "weights: expected numbers of at least 0"),
        ("mwa", "models", {"losses": {"expert-0": 1, "expert-1": 1}}, "found none for expert-2"),
        ("mwa", "models", {"metrics": {"expert_0": 1}}, "mwa: metrics: there is no expert 'expert_0'"),
    ],
)
def test_what_a_formula_has_no_meaning_for_is_refused(
    solve: str, weighs: Weighs, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        coefficients(solve, space_of(vectors_of(3)), weighs, **settings)


def test_lines_without_blocks_is_refused() -> None:
    with pytest.raises(InputError, match="found no tensor of a numbered block"):
        coefficients("lines", SPACE)


# -- their place in a search -----------------------------------------------------------------------------------


def settings_of(algorithm: str, solve: Any, **others: Any) -> SearchSettings:
    start = solve if isinstance(solve, Mapping) else {"solve": solve}
    return SEARCHES.get(algorithm, "search").model_validate({"algorithm": algorithm, "start": start, **others})


def context_of(space: Space, goals: Sequence[Goal] = TWO_GOALS, **others: Any) -> Context:
    return Context(space, tuple(goals), 0, 300, **{"weighs": "task_vectors", **others})


def test_coarser_segments_have_the_mean_by_length_and_finer_ones_the_same() -> None:
    space = space_of(vectors_of(3))
    table = coefficients("model_stock", space)
    genome = Genome.per_tensor(space, table)
    mean = np.array(SIZES) / sum(SIZES) @ table
    assert placed(genome, Parts(np.array([0, space.size]))).coefficients == pytest.approx(mean[None], abs=1e-15)
    first = placed(genome, Parts(np.array([0, 10, space.size])))  # cuts a tensor
    assert first.coefficients[0] == pytest.approx((6 * table[0] + 4 * table[1]) / 10, abs=1e-15)
    assert placed(genome, Parts(np.arange(space.size + 1))) == genome
    assert placed(genome, Parts(space.tensor_borders)) == genome


def test_components_share_the_mean_of_their_tensors() -> None:
    context = context_of(WOVEN)
    (found,) = solved(settings_of("nsga2", "model_stock", granularity="components"), context)
    table = coefficients("model_stock", WOVEN)
    rows = found.genome.refined(WOVEN.tensor_borders)
    assert rows[0] == pytest.approx((4 * table[0] + 14 * table[2]) / 18, abs=1e-11)
    assert rows[2].tolist() == rows[0].tolist()
    assert "each of the search's 2 components has the mean, weighted by length" in found.text


def test_coefficients_outside_of_the_bounds_are_moved_to_them() -> None:
    settings = settings_of("bayesian_map", "one_shot", high=0.5)
    (found,) = solved(settings, context_of(SPACE))
    assert (found.genome.coefficients == 0.5).all()
    assert found.text.endswith("moved into the bounds of the search, 0 to 0.5")


STACK = {"solve": ["model_stock", {"solve": "multi_slerp"}, "average", "average"]}


@pytest.mark.parametrize("granularity", ["model", "tensor"])
@pytest.mark.parametrize("algorithm", ["nsga2", "optuna", "map", "bayesian_map"])
def test_the_first_candidates_are_the_solved_merges(algorithm: str, granularity: str) -> None:
    settings = settings_of(algorithm, STACK, granularity=granularity)
    context = context_of(SPACE)
    context = begun(settings, context)
    wanted = list(dict.fromkeys(one.genome for one in solved(settings, context_of(SPACE))))
    assert len(wanted) == 3
    search, _ = settings.make(context)
    trials = search.ask(20)
    assert [trial.genome.digest for trial in trials[:3]] == [genome.digest for genome in wanted]
    digests = {trial.genome.digest for trial in trials}
    assert {Genome.uniform(SPACE.size, row).digest for row in np.eye(3)} <= digests  # the models come, too


def test_m2n2_begins_with_the_solved_merges_and_the_models() -> None:
    settings = settings_of("m2n2", STACK)
    search, _ = settings.make(begun(settings, context_of(SPACE)))
    trials = search.ask(20)
    assert [trial.genome for trial in trials[3:]] == [Genome.uniform(SPACE.size, row) for row in np.eye(3)]
    assert [one.genome for one in solved(settings, context_of(SPACE))][:3] == [trial.genome for trial in trials[:3]]
    np.testing.assert_allclose(
        trials[0].genome.refined(SPACE.tensor_borders), coefficients("model_stock", SPACE), atol=2**-40
    )


def test_cma_es_has_the_solved_merge_for_its_mean() -> None:
    settings = settings_of("cma_es", "model_stock", granularity="tensor")
    search, _ = settings.make(begun(settings, context_of(SPACE)))
    point = coefficients("model_stock", SPACE).ravel()
    assert isinstance(search, CmaEs)
    plain = CmaEs(search.box, TWO_GOALS, 0, CmaEsSettings(granularity="tensor"), np.round(point * 2**40) / 2**40)
    assert [trial.genome for trial in search.ask(6)] == [trial.genome for trial in plain.ask(6)]


@pytest.mark.parametrize("algorithm", ["adamerging", "expert_merging"])
def test_gradients_begin_at_each_of_the_solved_merges(algorithm: str) -> None:
    settings = settings_of(algorithm, {"solve": ["multi_slerp", "average"]})
    search, _ = settings.make(begun(settings, context_of(SPACE, tasks=TASKS)))
    lines = search.report()["lines"]  # type: ignore[attr-defined]
    expected = [coefficients("multi_slerp", SPACE), np.full((3, 3), 1 / 3)]
    if algorithm == "expert_merging":  # whose coefficients lie between 0 and 1
        expected[0] = np.minimum(expected[0], 0.999)
    for line, table in zip(lines, expected, strict=True):
        np.testing.assert_allclose(line["start"], table, atol=1e-11)


def test_the_searches_own_budget_counts_the_solved_merges() -> None:
    """MAP scores as many members of its front less; Bayesian MAP refuses a budget that is spent before it proposes."""
    plain, _ = SEARCHES.get("map", "search").model_validate({"algorithm": "map"}).make(context_of(SPACE))
    settings = settings_of("map", ["model_stock", "average"])
    search, _ = settings.make(begun(settings, context_of(SPACE)))
    assert search.front == plain.front - 2  # type: ignore[attr-defined]
    settings = settings_of("map", ["model_stock", "average"], samples=10)
    with pytest.raises(InputError, match=r"the 10 samples of the design and the 2 merges to begin with, found 12"):
        settings.make(begun(settings, Context(SPACE, TWO_GOALS, 0, 12, weighs="task_vectors")))
    tight = Context(SPACE, TWO_GOALS, 0, 10, weighs="task_vectors")
    settings = settings_of("bayesian_map", ["model_stock", "average"], samples=8)
    with pytest.raises(InputError, match=r"budget.evaluations: expected more than 10"):
        settings.make(begun(settings, tight))


@pytest.mark.parametrize("algorithm", [name for name in SEARCHES if SEARCHES.owns(name)])
def test_a_search_that_cannot_begin_with_merges_refuses_in_words(algorithm: str) -> None:
    kind = SEARCHES.get(algorithm, "search")
    begins = kind.model_validate({"algorithm": algorithm}).begins()
    if not begins.refusal or algorithm == "one_shot":  # which is its start, but no later stage
        assert settings_of(algorithm, "average").solvers
        return
    with pytest.raises(ValueError, match=f"start: {begins.refusal}; leave start out"):
        settings_of(algorithm, "average")


def test_a_mean_is_one_merge() -> None:
    with pytest.raises(ValueError, match="cma_es begins with one merge, found 2 to solve; name one"):
        settings_of("cma_es", ["average", "one_shot"])


def test_operators_that_are_not_linear_in_their_coefficients_are_refused() -> None:
    settings = settings_of("nsga2", "average")
    with pytest.raises(InputError, match="expected merges that are linear in their coefficients"):
        begun(settings, context_of(SPACE, affine=False))


# -- recipes ---------------------------------------------------------------------------------------------------

EVALUATIONS = 14
TOYS = """
import signal
import numpy as np

PROBES = np.random.default_rng(1).standard_normal((80, 38)) / 5


def right(model, task, log="", stop=0):
    vector = np.concatenate([tensor.numpy().ravel() for tensor in model.values()]).astype(np.float64)
    answers = PROBES[task::2] @ vector > 0.1 + 0.2 * task
    if log and task == 0:
        with open(log, "a") as file:
            file.write("x\\n")
        if stop and len(open(log).readlines()) == stop:
            signal.raise_signal(signal.SIGINT)  # as Ctrl-C
    return float(answers.mean()), answers
"""


def toy_recipe(folder: Path, search: Any, stop: int = 0, **others: Any) -> Recipe:
    """A base and three experts of two layers and a head, and two objectives."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "starts_toys.py").write_text(TOYS)
    names = ("base", "left", "middle", "right")
    base = None
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        own = {"layers.0.weight": (4, 4), "layers.1.weight": (4, 4), "head.weight": (2, 3)}
        tensors = {key: rng.standard_normal(shape) for key, shape in own.items()}
        base = base or tensors
        moved = {key: (base[key] + 0.4 * (value + tensors["head.weight"].mean())) for key, value in tensors.items()}
        written = base if name == "base" else moved
        save_file({key: value.astype(np.float32) for key, value in written.items()}, folder / f"{name}.safetensors")

    def objective(task: int, **arguments: Any) -> dict[str, Any]:
        call = {"type": "call", "call": "starts_toys:right", "arguments": {"task": task, **arguments}}
        return {"name": f"task {task}", **call}

    record = {
        "name": "toy",
        "models": {"base": "base.safetensors", "experts": [f"{name}.safetensors" for name in names[1:]]},
        "merge": {"operator": "task_arithmetic"},
        "objectives": {"search": [objective(task, log=str(folder / "calls"), stop=stop) for task in range(2)]},
        "search": search,
        "scoring": {"batch": 2, "in_flight": 4},
        "budget": {"evaluations": EVALUATIONS},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
        **others,
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(record))
    return Recipe.from_yaml(path)


BAYES = {"algorithm": "bayesian_map", "samples": 4, "paths": 2, "candidates": 16, "low": 0.0, "high": 1.5}
SEVERAL = {"solve": ["model_stock", {"solve": "lines", "beta": 0.5}, "one_shot"]}


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def genomes(run: Run) -> list[Genome]:
    with Journal.open(run.directory / "journal.sqlite") as journal:
        return [journal.trial(row.number).genome for row in journal.rows()]


def test_a_run_begins_with_the_solved_merges_of_its_models_and_resumes_the_same(toys: Path) -> None:
    recipe = toy_recipe(toys, BAYES | {"start": SEVERAL})
    whole = launch(recipe, toys / "run", folders=(str(toys),))
    base, *experts = (toys / f"{name}.safetensors" for name in ("base", "left", "middle", "right"))
    vectors = task_vectors(base, experts)
    sizes = np.array([6, 16, 16])
    t = [model_stock(piece) @ piece.mean(axis=0) / (piece.mean(axis=0) @ piece.mean(axis=0)) for piece in vectors]
    first, second, third = genomes(whole)[:3]
    assert first.coefficients == pytest.approx(np.full((1, 3), sizes @ t / 38 / 3), abs=1e-7)
    assert second.coefficients == pytest.approx(np.full((1, 3), 1 / 3 + 0.5 * 16 / 38), abs=1e-12)
    assert (third.coefficients == 1).all()
    lines = start_lines(whole)
    assert lines[0].startswith("Began with model_stock: coefficients by tensor, of which the model has the mean, ")
    assert lines[2] == "Began with one_shot: the same coefficients everywhere. Means: left 1, middle 1, right 1."

    stopping = toy_recipe(toys / "stopped", BAYES | {"start": SEVERAL}, stop=8)
    with pytest.raises(KeyboardInterrupt):
        launch(stopping, toys / "s", folders=(str(toys),))
    assert 0 < len(genomes(Run(toys / "s"))) < EVALUATIONS
    again = resume(toys / "s")
    assert [genome.digest for genome in genomes(again)] == [genome.digest for genome in genomes(whole)]
    assert start_lines(again) == lines


def task_vectors(base: Path, experts: Sequence[Path]) -> list[Vector]:
    """(K, n_t) task vectors by tensor, in flat order, read from the files."""
    from safetensors.numpy import load_file

    start = load_file(base)
    tensors = [load_file(expert) for expert in experts]
    return [
        np.array([(one[name].astype(np.float64) - start[name]).ravel() for one in tensors])
        for name in ("head.weight", "layers.0.weight", "layers.1.weight")
    ]


def test_validate_tells_how_alike_the_task_vectors_are(toys: Path) -> None:
    recipe = toy_recipe(toys, BAYES)
    base, *experts = (toys / f"{name}.safetensors" for name in ("base", "left", "middle", "right"))
    flat = np.concatenate([piece.reshape(3, -1) for piece in task_vectors(base, experts)], axis=1)
    lengths = np.linalg.norm(flat, axis=1)
    cosines = ((flat @ flat.T) / np.outer(lengths, lengths))[np.triu_indices(3, 1)]
    told = next(one.text for one in validate(recipe) if one.subject == "task vectors")
    assert told.endswith(f"of the base's length, cosines {cosines.min():.2g} to {cosines.max():.2g}")
    (toys / "middle.safetensors").write_bytes((toys / "left.safetensors").read_bytes())
    told = [one.text for one in validate(recipe) if one.subject == "task vectors"]
    assert any(text.startswith("Warning: left and middle are nearly the same (cosine 1.00") for text in told)


def test_validate_names_the_start(toys: Path) -> None:
    texts = {one.subject: one.text for one in validate(toy_recipe(toys, BAYES | {"start": SEVERAL}))}
    assert texts["search.start"] == (
        "begins with model_stock (coefficients by tensor, of which the model has the mean, weighted by length); lines "
        "(coefficients by block, of which the model has the mean, weighted by length); one_shot (the same coefficients "
        "everywhere)"
    )
    assert "7 samples before it proposes anything" in texts["search"]
    chain = [
        {"algorithm": "nsga2", "granularity": "tensor", "evaluations": 8, "start": {"solve": "karcher"}},
        {"algorithm": "cma_es", "granularity": "tensor", "start": "best"},
    ]
    texts = {one.subject: one.text for one in validate(toy_recipe(toys, chain))}
    assert texts["search[0].start"] == "begins with karcher (coefficients by tensor)"
    assert "search[1].start" not in texts


def test_the_first_stage_of_a_chain_may_begin_with_solved_merges(toys: Path) -> None:
    first = {"algorithm": "nsga2", "granularity": "tensor", "start": {"solve": ["karcher", "average"]}}
    last = {"algorithm": "cma_es", "granularity": "tensor", "start": "best"}
    recipe = toy_recipe(toys, [first | {"evaluations": 8}, last])
    assert recipe.chain is not None
    assert recipe.chain.starts == ("none", "best")
    assert Recipe.from_record(recipe.record()).record() == recipe.record()
    run = launch(recipe, toys / "run", folders=(str(toys),))
    found = genomes(run)
    single = toy_recipe(toys, first)
    alone, _ = compose.make_search(single, spaced(single))
    assert [genome.digest for genome in found[:4]] == [trial.genome.digest for trial in alone.ask(4)]
    assert start_lines(run)[1] == "Began with average: the same coefficients everywhere. Means: " + (
        "left 0.3333, middle 0.3333, right 0.3333."
    )


def test_a_later_stage_may_begin_with_solved_merges(toys: Path) -> None:
    first = {"algorithm": "nsga2", "granularity": "tensor", "evaluations": 6}
    recipe = toy_recipe(toys, [first, {"algorithm": "cma_es", "start": {"solve": "karcher"}}])
    assert recipe.chain is not None
    assert recipe.chain.starts == ("none", "none")
    run = launch(recipe, toys / "run", folders=(str(toys),))
    assert start_lines(run)[0].startswith("Stage 1 began with karcher: ")
    assert all((genome.coefficients >= 0).all() for genome in genomes(run)[6:])


def spaced(recipe: Recipe) -> Space:
    with compose.make_pool(recipe, compose.Composition(recipe).spec) as pool:
        return pool.start()


def test_records_and_signatures_of_recipes_without_a_start_stay(toys: Path) -> None:
    recipe = toy_recipe(toys, BAYES)
    assert "start" not in recipe.record()["search"]
    begins = toy_recipe(toys, BAYES | {"start": {"solve": "lines"}})
    assert begins.record()["search"]["start"] == {"solve": "lines", "alpha": None, "beta": None}
    assert begins.signature != recipe.signature
    assert Recipe.from_record(begins.record()).record() == begins.record()
    cma = toy_recipe(toys, {"algorithm": "cma_es"}).record()["search"]
    assert cma["start"] is None


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            {"solve": "model_stok"},
            "search.start.solve: expected one of .* found 'model_stok'. Did you mean 'model_stock'",
        ),
        ({"solve": ["average", "karchr"]}, r"search.start.solve\[1\].solve: .*Did you mean 'karcher'"),
        ({"solve": "lines", "alfa": 1}, "search.start.alfa: unknown key. Did you mean 'alpha'"),
        ({"solve": ["lines"], "alpha": 1}, "search.start: alpha: of several solvers settings stand in the list"),
        (
            {"solve": [{"solve": "lines", "alpha": "x"}]},
            r"search.start.solve\[0\].alpha: input should be a valid number",
        ),
        ({"solve": []}, "search.start.solve: expected a list of 1 or more, found 0"),
        ("best", "search.start: expected a mapping of settings, found 'best'"),
        ({"solve": "mwa"}, "search.start: expected losses or metrics of the experts, found neither"),
        ({"solve": "mwa", "losses": {"left": 0}}, "search.start: losses.left: expected a number above 0, found 0.0"),
    ],
)
def test_mistakes_are_told_with_the_field(toys: Path, start: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        toy_recipe(toys, BAYES | {"start": start})


@pytest.mark.parametrize(
    ("weighs", "solver"), [("prepared", "one_shot"), ("task_vectors", "model_stock"), ("models", "average")]
)
def test_auto_is_the_solver_that_suits_what_is_weighed(weighs, solver):
    models = Geometry(space_of(vectors_of(3)), weighs, np.full(3, 0.7) if weighs == "prepared" else None)
    auto, named = (SOLVERS.get(name, "solve").model_validate({"solve": name}) for name in ("auto", solver))
    assert np.array_equal(auto.coefficients(models), named.coefficients(models))
