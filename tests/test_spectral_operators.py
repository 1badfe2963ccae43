"""Operators on whole matrices without data, against the methods' definitions in numpy, and by their invariants.

The definitions here are written straight from the papers' formulas, over whole models of one layer. The package
fusion-bench has most of these methods too, and can check them as a separate program.
"""

import dataclasses

import numpy as np
import pytest
import scipy.linalg
import torch

from ecotone.merging.operators import spectra
from ecotone.merging.operators.declared import check_declared, settings_of
from ecotone.merging.operators.iso_c import IsoC
from ecotone.merging.operators.iso_cts import IsoCts, dimensions
from ecotone.merging.operators.knots import Knots
from ecotone.merging.operators.opcm import Opcm
from ecotone.merging.operators.star import Star
from ecotone.merging.operators.tsv_m import TsvM, density
from ecotone.merging.operators.whole import Known, Layer, Report
from ecotone.merging.operators.wudi import Wudi
from ecotone.populations.errors import InputError

KINDS = (Wudi, TsvM, IsoC, IsoCts, Opcm, Star, Knots)
OPERATORS = (
    *(kind() for kind in KINDS),
    Wudi(steps=7, toward="sum"),
    TsvM(clip=1.5, ranks="sparsity"),
    Opcm(rescale="none"),
    Star(combine="sum", eta=1.0),
    Knots(density=1.0, scaled=False, combine="sum"),
)
ALL = pytest.mark.parametrize("operator", OPERATORS, ids=str)


def drawn(count, rows, columns, seed=0, rank=None):
    """(count, rows, columns) task vectors of different sizes."""
    rng = np.random.default_rng(seed)
    sizes = 0.1 * (1 + np.arange(count)[:, None, None])
    if rank is None:
        return sizes * rng.normal(size=(count, rows, columns))
    return sizes * rng.normal(size=(count, rows, rank)) @ rng.normal(size=(count, rank, columns))


def run(operator, vectors, dtype=torch.float64, kind="linear"):
    """(columns, rows, columns) the prepared vectors, and the report."""
    vectors = torch.tensor(np.asarray(vectors), dtype=dtype)
    base = torch.randn(vectors.shape[1:], dtype=dtype, generator=torch.Generator().manual_seed(9))
    report = Report()
    at = Layer("fc.weight", kind, tuple(base.shape))
    found = operator.layer(at, base, [base + vector for vector in vectors], Known(), report)
    assert len(found) == len(operator.columns([str(k) for k in range(len(vectors))]))
    for each in found:
        assert each.shape == base.shape
        assert each.dtype == dtype
    assert all(np.isfinite(list(report.numbers.values())))
    return torch.stack(list(found)).numpy(), report


def prepared(operator, vectors, **options):
    return run(operator, vectors, **options)[0]


def merged(operator, vectors, **options):
    """What is added to the base at c = 1."""
    return prepared(operator, vectors, **options).sum(axis=0)


def close(found, expected, atol=1e-11):
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=atol * max(1e-300, np.abs(expected).max()))


def inverse_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors / np.sqrt(values) @ vectors.T


# -- the published merges ------------------------------------------------------------------------------------


def grams(vectors):
    return [tau.T @ tau / np.sum(tau**2) for tau in vectors]


def interference(merge, vectors):
    return sum(np.sum(((merge - tau) @ tau.T) ** 2) / np.sum(tau**2) for tau in vectors)


@pytest.mark.parametrize("shape", [(9, 6), (4, 30)])
@pytest.mark.parametrize("toward", ["mean", "sum"])
def test_wudi_minimises_the_interference_and_the_ridge(shape, toward):
    vectors, ridge = drawn(3, *shape), 0.3
    inside, target = grams(vectors), vectors.mean(axis=0) if toward == "mean" else vectors.sum(axis=0)
    eps = ridge * np.trace(sum(inside)) / shape[1]
    right = sum(tau @ gram for tau, gram in zip(vectors, inside, strict=True)) + eps * target
    expected = np.linalg.solve(sum(inside) + eps * np.eye(shape[1]), right.T).T
    close(merged(Wudi(ridge=ridge, toward=toward), vectors), expected)
    # Each vector is that of the formula, not only their sum.
    weight = 1 / 3 if toward == "mean" else 1.0
    own = vectors[1] @ (inside[1] + weight * eps * np.eye(shape[1]))
    close(prepared(Wudi(ridge=ridge, toward=toward), vectors)[1] @ (sum(inside) + eps * np.eye(shape[1])), own)


def test_wudis_objective_has_its_least_value_there():
    vectors = drawn(3, 9, 6)
    best = merged(Wudi(ridge=1e-13), vectors)
    least = interference(best, vectors)
    rng = np.random.default_rng(1)
    for step in (1e-3, 1e-1):
        assert interference(best + step * rng.normal(size=best.shape), vectors) > least
    assert least < interference(vectors.mean(axis=0), vectors)
    # Drawn closer to the mean of the task vectors, it interferes more.
    gaps = [np.linalg.norm(merged(Wudi(ridge=ridge), vectors) - vectors.mean(axis=0)) for ridge in (1e-3, 0.1, 10)]
    assert gaps == sorted(gaps, reverse=True)


@pytest.mark.parametrize("shape", [(9, 6), (2, 12)])
@pytest.mark.parametrize("toward", ["mean", "sum"])
def test_wudis_steps_are_gradient_flow(shape, toward):
    vectors, steps = drawn(3, *shape), 5
    inside = grams(vectors)
    whole = sum(inside)
    time = steps / np.linalg.eigvalsh(whole).max()
    start = vectors.mean(axis=0) if toward == "mean" else vectors.sum(axis=0)
    target = sum(tau @ gram for tau, gram in zip(vectors, inside, strict=True))
    # The linear equation d tau / dt = target - tau H, solved as one with a row of constants below.
    block = np.block([[-whole, np.zeros((shape[1], shape[0]))], [target, np.zeros((shape[0], shape[0]))]])
    flow = scipy.linalg.expm(time * block)
    expected = start @ flow[: shape[1], : shape[1]] + flow[shape[1] :, : shape[1]]
    close(merged(Wudi(steps=steps, toward=toward), vectors), expected)


def test_wudis_flow_ends_at_the_closed_form():
    vectors = drawn(3, 9, 6)
    close(merged(Wudi(steps=10**6), vectors), merged(Wudi(ridge=1e-13), vectors), atol=1e-9)


def tsv(vectors):
    """Slots of the tasks in the matrices of all, each made orthogonal by its inverse root."""
    count, most = len(vectors), min(vectors[0].shape)
    share = int(most / count)
    lefts, sizes, rights = [], [], []
    for tau in vectors:
        u, s, vt = np.linalg.svd(tau)
        lefts.append(u[:, :share])
        sizes.append(s[:share])
        rights.append(vt[:share].T)
    left, right = np.hstack(lefts), np.hstack(rights)
    return left @ inverse_root(left.T @ left) * np.hstack(sizes) @ (right @ inverse_root(right.T @ right)).T


@pytest.mark.parametrize("shape", [(13, 8), (8, 13), (12, 12)])
def test_tsv_m_makes_the_leading_singular_vectors_orthogonal(shape):
    vectors = drawn(4, *shape)
    close(merged(TsvM(), vectors), tsv(vectors))


def test_tsv_m_merges_what_is_orthogonal_without_loss():
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(size, 6)))[0] for size in (20, 9))
    vectors = np.stack([left[:, i : i + 2] @ rng.normal(size=(2, 2)) @ right[:, i : i + 2].T for i in (0, 2, 4)])
    close(merged(TsvM(), vectors), vectors.sum(axis=0))
    close(prepared(TsvM(), vectors), vectors)
    close(prepared(TsvM(), vectors / 100), vectors / 100)


def test_tsv_m_with_more_experts_than_singular_values_takes_the_largest():
    vectors = drawn(5, 3, 8)  # the later, the larger
    found, report = run(TsvM(), vectors)
    assert np.linalg.norm(found[:2]) == 0
    leading = [np.linalg.svd(tau, full_matrices=False) for tau in vectors[2:]]
    left = np.hstack([u[:, :1] for u, _, _ in leading])
    right = np.hstack([vt[:1].T for _, _, vt in leading])
    sizes = np.array([s[0] for _, s, _ in leading])
    close(found.sum(axis=0), left @ inverse_root(left.T @ left) * sizes @ (right @ inverse_root(right.T @ right)).T)
    assert any(warning.startswith("5 experts share a matrix with 3 singular values") for warning in report.warnings)


def test_tsv_ms_settings_are_off_where_nothing_stands_out():
    vectors = drawn(4, 40, 32)
    plain = prepared(TsvM(), vectors)
    close(prepared(TsvM(clip=1e3), vectors), plain)
    even = np.sign(vectors)  # as dense as can be
    close(prepared(TsvM(ranks="sparsity"), even), prepared(TsvM(), even))
    assert density(torch.tensor(vectors[0])) == pytest.approx(1, abs=0.05)
    assert density(torch.tensor(vectors[0] * (np.random.default_rng(0).random((40, 32)) < 0.1))) < 0.2


def test_tsv_m_clips_outliers_and_lowers_the_ranks_of_sparse_matrices():
    vectors = drawn(2, 20, 16)
    vectors[0, 3, 5] = 50.0
    limit = 3 * np.sqrt(np.mean(vectors**2, axis=2, keepdims=True))
    close(prepared(TsvM(clip=3), vectors), prepared(TsvM(), np.clip(vectors, -limit, limit)))
    sparse = vectors.copy()
    sparse[0] *= np.random.default_rng(1).random((20, 16)) < 0.3
    found, report = run(TsvM(ranks="sparsity"), sparse)
    share = density(torch.tensor(sparse[0]))
    assert np.linalg.matrix_rank(found[0]) == max(1, int(8 * share)) < 8
    assert report.numbers["rank"] < run(TsvM(), sparse)[1].numbers["rank"] == 16


@pytest.mark.parametrize("shape", [(13, 8), (8, 13), (12, 12)])
def test_iso_c_has_the_mean_singular_value_throughout(shape):
    vectors = drawn(3, *shape)
    u, s, vt = np.linalg.svd(vectors.sum(axis=0), full_matrices=False)
    close(merged(IsoC(), vectors), s.mean() * u @ vt, atol=1e-9)
    found = prepared(IsoC(), vectors)
    metric = s.mean() * u / s @ u.T
    close(found, metric @ vectors, atol=1e-9)


def test_iso_c_of_a_low_rank_takes_its_range():
    vectors = drawn(3, 20, 15, rank=2)
    u, s, vt = np.linalg.svd(vectors.sum(axis=0), full_matrices=False)
    expected = s[:6].mean() * u[:, :6] @ vt[:6]
    found, report = run(IsoC(), vectors)
    close(found.sum(axis=0), expected)
    assert report.numbers["rank"] == 6


def iso_cts(vectors, fraction):
    """The published algorithm, with slots: tasks first, the common space last, each side made orthogonal."""
    count, most = len(vectors), min(vectors[0].shape)
    own = round((most - int(most * fraction)) / count)
    shared = most - own * count
    u, s, vt = np.linalg.svd(sum(vectors), full_matrices=False)
    lefts, sizes, rights = [], [], []
    for tau in vectors:
        a, b, c = np.linalg.svd(tau - u[:, :shared] @ u[:, :shared].T @ tau, full_matrices=False)
        lefts.append(a[:, :own])
        sizes.append(b[:own])
        rights.append(c[:own].T)
    left = np.hstack([*lefts, u[:, :shared]])
    right = np.hstack([*rights, vt[:shared].T])
    size = np.hstack([*sizes, s[:shared]]).mean()
    return size * left @ inverse_root(left.T @ left) @ (right @ inverse_root(right.T @ right)).T


@pytest.mark.parametrize("shape", [(13, 10), (10, 13)])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("fraction", [0.3, 0.8, 1.0])
def test_iso_cts_joins_the_common_space_and_those_of_the_tasks(shape, count, fraction):
    vectors = drawn(count, *shape)
    found = prepared(IsoCts(common=fraction), vectors)
    assert found.shape == (1, *shape)
    close(found[0], iso_cts(vectors, fraction), atol=1e-9)


def test_iso_cts_rounds_so_that_each_task_has_as_many_dimensions():
    for most in range(1, 40):
        for count in range(1, 8):
            for fraction in (0.0, 0.3, 0.5, 0.8, 1.0):
                shared, own = dimensions(most, count, fraction)
                assert shared + own * count == most
                assert shared >= 0
                if round((most - int(most * fraction)) / count) * count <= most:
                    assert own == round((most - int(most * fraction)) / count)
    assert dimensions(10, 2, 0.5) == (6, 2)  # 2.5 goes to 2
    assert dimensions(14, 2, 0.5) == (6, 4)  # 3.5 goes to 4
    assert dimensions(3, 5, 0.0) == (3, 0)  # the authors' code has -2 common dimensions


def test_iso_cts_has_one_column():
    operator = IsoCts()
    assert operator.columns(["a", "b", "c"]) == ("merged",)
    assert operator.seeds(3).tolist() == [[1.0]] * 3
    assert operator.weights(np.array([[0.5], [2.0]])).tolist() == [[1, 0.5], [1, 2]]
    base, experts = torch.zeros(3), [torch.tensor([3.0, 0, 0]), torch.tensor([0.0, 6, 0])]
    assert [each.tolist() for each in operator.rest(Layer("b", "rest", (3,)), base, experts, Report())] == [[1.5, 3, 0]]


def opcm(vectors, alpha):
    """The published loop, with full matrices and the scale brought back after every model."""
    total, scale, norms = vectors[0], 1.0, [np.linalg.norm(vectors[0])]
    for tau in vectors[1:]:
        u, s, vt = np.linalg.svd(total)
        split = int(np.argmax(np.cumsum(s) / s.sum() > alpha))
        inside = u.T @ tau @ vt.T
        np.fill_diagonal(inside, 0)
        inside[:split, :split] = 0
        cleaned = u @ inside @ vt
        assert abs(np.sum(cleaned * total)) < 1e-10
        norms.append(np.linalg.norm(tau))
        total = scale * total + cleaned
        scale = np.linalg.norm(total) / np.mean(norms)
        total = total / scale
    return total, scale


@pytest.mark.parametrize("shape", [(13, 8), (8, 13), (12, 12)])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_opcm_is_the_published_loop(shape, alpha):
    vectors = drawn(4, *shape)
    total, scale = opcm(vectors, alpha)
    close(merged(Opcm(alpha=alpha), vectors), total, atol=1e-10)
    plain, report = run(Opcm(alpha=alpha, rescale="none"), vectors)
    close(plain.sum(axis=0), total * scale, atol=1e-10)
    assert report.numbers["norm"] / report.numbers["mean_norm"] == pytest.approx(scale)
    assert np.linalg.norm(total) == pytest.approx(np.mean([np.linalg.norm(tau) for tau in vectors]))


def test_opcm_adds_only_what_is_new():
    vectors = drawn(2, 13, 8)
    u, s, vt = np.linalg.svd(vectors[0], full_matrices=False)
    cleaned = prepared(Opcm(rescale="none"), vectors)
    close(cleaned[0], vectors[0])
    split = int(np.sum(np.cumsum(s) / s.sum() <= 0.5))
    assert split == 2
    before, after = u.T @ vectors[1] @ vt.T, u.T @ cleaned[1] @ vt.T
    gone = np.eye(8, dtype=bool)
    gone[:split, :split] = True
    assert np.abs(after[gone]).max() < 1e-12
    close(after[~gone], before[~gone])
    close(vectors[1] - u @ u.T @ vectors[1], cleaned[1] - u @ u.T @ cleaned[1])
    repeated = prepared(Opcm(rescale="none"), [vectors[0], 3 * vectors[0]])
    assert np.abs(repeated[1]).max() < 1e-12


def test_opcm_grows_as_the_root_of_the_number_of_models():
    vectors = np.random.default_rng(0).normal(size=(4, 60, 50))
    report = run(Opcm(), vectors)[1]
    assert report.numbers["norm"] / report.numbers["mean_norm"] == pytest.approx(2, abs=0.1)


def test_opcm_refuses_alpha_one_which_would_close_nothing():
    with pytest.raises(InputError, match="alpha: expected a number at least 0 and below 1"):
        settings_of(Opcm)["alpha"].checked(1.0)


def test_opcm_rescales_the_rest_by_no_more_than_one():
    base, one = torch.zeros(4, dtype=torch.float64), torch.arange(1.0, 5, dtype=torch.float64)
    at = Layer("b", "rest", (4,))
    for experts, factor in (([one, one], 0.5), ([one, -one], 1.0), ([one, -0.99 * one], 1.0), ([base, base], 1.0)):
        found = Opcm().rest(at, base, experts, Report())
        for each, expert in zip(found, experts, strict=True):
            torch.testing.assert_close(each, factor * expert)
        whole = Opcm(rescale="none").rest(at, base, experts, Report())
        assert all(torch.equal(each, expert) for each, expert in zip(whole, experts, strict=True))


@pytest.mark.parametrize("eta", [0.01, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_star_keeps_the_nuclear_norm_in_fewer_singular_values(eta, combine):
    vectors = drawn(3, 13, 8)
    expected = []
    for tau in vectors:
        u, s, vt = np.linalg.svd(tau, full_matrices=False)
        many = next((r for r in range(1, 9) if s[:r].sum() >= eta * s.sum()), 8)
        assert many < 8 or eta > 0.8
        expected.append(u[:, :many] * (s[:many] * s.sum() / s[:many].sum()) @ vt[:many])
        assert np.linalg.norm(expected[-1], "nuc") == pytest.approx(s.sum())
    close(prepared(Star(eta=eta, combine=combine), vectors), np.array(expected) / (3 if combine == "mean" else 1))


def test_stars_rest_is_combined_alike():
    base, experts = torch.ones(2), [torch.tensor([3.0, 1]), torch.tensor([1.0, 5])]
    at = Layer("b", "rest", (2,))
    assert [each.tolist() for each in Star().rest(at, base, experts, Report())] == [[1, 0], [0, 2]]
    assert [each.tolist() for each in Star(combine="sum").rest(at, base, experts, Report())] == [[2, 0], [0, 4]]


def knots(vectors, share, scaled, mean):
    """TIES on the parts of one decomposition, entry by entry."""
    count, width = len(vectors), vectors[0].shape[1]
    u, s, vt = np.linalg.svd(np.hstack(list(vectors)), full_matrices=False)
    parts = [s[:, None] * vt[:, k * width : (k + 1) * width] for k in range(count)]
    compared = parts if scaled else [vt[:, k * width : (k + 1) * width] for k in range(count)]
    many = max(1, round(share * parts[0].size))
    trimmed = np.stack(
        [np.where(np.abs(c) >= np.sort(np.abs(c).ravel())[-many], p, 0) for p, c in zip(parts, compared, strict=True)]
    )
    assert [np.count_nonzero(part) for part in trimmed] == [many] * count
    elected = np.sign(trimmed.sum(axis=0))
    agreeing = np.where(trimmed * elected > 0, trimmed, 0)
    if mean:
        agreeing = agreeing / np.maximum(1, np.count_nonzero(agreeing, axis=0))
    return u @ agreeing


@pytest.mark.parametrize("shape", [(7, 10), (30, 6)])
@pytest.mark.parametrize("share", [0.2, 1.0])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_knots_is_ties_in_common_singular_vectors(shape, share, scaled, combine):
    vectors = drawn(3, *shape)
    operator = Knots(density=share, scaled=scaled, combine=combine)
    close(prepared(operator, vectors), knots(vectors, share, scaled, combine == "mean"))


def test_knots_drops_singular_values_by_their_share_of_the_largest():
    vectors = drawn(3, 20, 15, rank=2)
    found, report = run(Knots(), vectors)
    assert report.numbers["rank"] == 6
    # Task vectors of any size: the authors' absolute bound of 1e-5 would leave nothing of these.
    close(prepared(Knots(), 1e-8 * vectors), 1e-8 * found, atol=1e-6)


@pytest.mark.parametrize("operator", [TsvM(), IsoC(), IsoCts(), Knots()], ids=str)
def test_the_rounding_of_adapters_in_float32_is_not_taken_for_directions(operator):
    vectors = drawn(3, 20, 15, rank=2)
    noise = 1e-7 * np.random.default_rng(5).normal(size=vectors.shape)
    np.testing.assert_allclose(prepared(operator, vectors + noise), prepared(operator, vectors), atol=1e-4)


# -- invariants ----------------------------------------------------------------------------------------------


def orthogonal(size, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


@ALL
@pytest.mark.parametrize("shape", [(9, 7), (7, 9)])
def test_rows_and_columns_in_another_order_and_task_vectors_of_another_size(operator, shape):
    vectors = drawn(3, *shape)
    rng = np.random.default_rng(3)
    rows, columns = rng.permutation(shape[0]), rng.permutation(shape[1])
    found = prepared(operator, vectors)
    close(prepared(operator, vectors[:, rows][:, :, columns]), found[:, rows][:, :, columns], atol=1e-8)
    for scale in (1e-6, 1e4):
        close(prepared(operator, scale * vectors), scale * found, atol=1e-7)


@pytest.mark.parametrize("operator", [one for one in OPERATORS if not isinstance(one, Opcm)], ids=str)
def test_experts_in_another_order(operator):
    vectors, order = drawn(4, 9, 7), [2, 0, 3, 1]
    found = prepared(operator, vectors)
    close(prepared(operator, vectors[order]), found[order] if len(found) > 1 else found, atol=1e-8)


@pytest.mark.parametrize(
    "operator", [one for one in OPERATORS if not isinstance(one, Knots) and not getattr(one, "clip", 0)], ids=str
)
@pytest.mark.parametrize("case", ["all ranks", "rank one", "a sum of lower rank"])
def test_rotations_of_both_sides_rotate_the_vectors(operator, case):
    """Also where ranks are low: nothing depends on the singular vectors of the value zero."""
    vectors = drawn(3, 9, 7, rank=None if case == "all ranks" else 1)
    if case == "a sum of lower rank":
        vectors[1] = -vectors[0]
    left, right = orthogonal(9, 1), orthogonal(7, 2)
    close(prepared(operator, left @ vectors @ right), left @ prepared(operator, vectors) @ right, atol=1e-8)


def test_knots_rotates_with_the_rows():
    vectors, left = drawn(3, 9, 7), orthogonal(9, 1)
    close(prepared(Knots(), left @ vectors), left @ prepared(Knots(), vectors), atol=1e-8)


WHOLE = [Wudi(), Wudi(steps=3), TsvM(), Opcm(), Star(eta=1.0), Knots(density=1.0)]


@pytest.mark.parametrize("operator", WHOLE, ids=str)
@pytest.mark.parametrize("rank", [None, 2])
def test_one_expert_of_which_all_is_kept_is_itself(operator, rank):
    vectors = drawn(1, 9, 7, rank=rank)
    close(prepared(operator, vectors), vectors)


@pytest.mark.parametrize("operator", [Wudi(), Wudi(ridge=1e-6), Wudi(steps=3), Knots(density=1.0)], ids=str)
@pytest.mark.parametrize("shape", [(9, 7), (3, 20)])
def test_experts_all_alike_give_the_expert(operator, shape):
    vectors = np.repeat(drawn(1, *shape), 3, axis=0)
    close(merged(operator, vectors), vectors[0], atol=1e-8)


@pytest.mark.parametrize("operator", [TsvM(), IsoC(), IsoCts(), Star(), Star(combine="sum")], ids=str)
def test_near_duplicates_are_amplified_and_their_cosine_is_told(operator):
    rng = np.random.default_rng(0)
    one = rng.normal(size=(48, 32))
    found, report = run(operator, [one + 1e-3 * rng.normal(size=one.shape) for _ in range(3)])
    assert np.linalg.norm(found.sum(axis=0) - one) > 0.9 * np.linalg.norm(one)
    assert np.linalg.norm(found.sum(axis=0)) > 1.3 * np.linalg.norm(one)
    assert report.numbers["cosine"] > 0.999
    assert run(operator, rng.normal(size=(3, 48, 32)))[1].warnings == []


def test_tsv_m_of_exact_copies_is_their_leading_part():
    """The singular vectors of copies depend on each other, and the polar factor on their range adds none."""
    one = drawn(1, 12, 9)
    u, s, vt = np.linalg.svd(one[0], full_matrices=False)
    close(merged(TsvM(), np.repeat(one, 3, axis=0)), u[:, :3] * s[:3] @ vt[:3])


# -- matrices of all sorts -----------------------------------------------------------------------------------


def odd(name):
    """Task vectors with which something could divide by zero."""
    vectors = drawn(3, 6, 5)
    if name == "dead column":
        vectors[:, :, 2] = 0
    elif name == "dead row":
        vectors[:, 3] = 0
    elif name == "one row":
        vectors = vectors[:, :1]
    elif name == "one column":
        vectors = vectors[:, :, :1]
    elif name == "one entry":
        vectors = vectors[:, :1, :1]
    elif name == "first at the base":
        vectors[0] = 0
    elif name == "last at the base":
        vectors[2] = 0
    elif name == "cancelling":
        vectors = np.stack([vectors[0], -vectors[0]])
    elif name == "rank one":
        vectors = drawn(3, 6, 5, rank=1)
    elif name == "many experts":
        vectors = drawn(9, 6, 5)
    return vectors


ODD = (
    *("dead column", "dead row", "one row", "one column", "one entry", "first at the base", "last at the base"),
    *("cancelling", "rank one", "many experts"),
)


@ALL
@pytest.mark.parametrize("name", ODD)
def test_odd_matrices_are_prepared_as_any_others(operator, name):
    vectors = odd(name)
    found = prepared(operator, vectors)
    assert np.isfinite(found).all()
    largest = np.linalg.norm(vectors, axis=(1, 2)).sum()
    assert np.linalg.norm(found.sum(axis=0)) <= 20 * largest
    if name == "dead column":
        assert np.abs(found[:, :, 2]).max() < 1e-12
    if name == "dead row":
        assert np.abs(found[:, 3]).max() < 1e-12
    if name.endswith("at the base") and len(found) == len(vectors):
        assert not found[0 if name.startswith("first") else 2].any()
    if name == "last at the base" and isinstance(operator, Opcm) and operator.rescale == "none":
        close(found[:2], prepared(operator, vectors[:2]))


@ALL
@pytest.mark.parametrize("shape", [(6, 5), (1, 5), (5, 1)])
def test_experts_that_are_the_base_give_the_base(operator, shape):
    found = prepared(operator, np.zeros((3, *shape)))
    assert not found.any()
    base = torch.randn(5, dtype=torch.float64)
    rest = operator.rest(Layer("b", "rest", (5,)), base, [base] * 3, Report())
    assert len(rest) == len(operator.columns(["a", "b", "c"]))
    assert not torch.stack(list(rest)).any()


@ALL
def test_float32_and_repetition(operator):
    """On accelerators matrices come in float32. The same matrices give the same bits."""
    vectors = drawn(3, 9, 7)
    np.testing.assert_allclose(prepared(operator, vectors, dtype=torch.float32), prepared(operator, vectors), atol=1e-4)
    assert prepared(operator, vectors).tobytes() == prepared(operator, vectors, kind="convolution").tobytes()


@pytest.mark.parametrize("operator", [kind() for kind in KINDS], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(operator, value):
    vectors = drawn(3, 6, 5)
    vectors[1, 2, 3] = value
    with pytest.raises(InputError, match=r"finite weights in 'fc.weight', found NaN or infinity .* expert 2 of 3"):
        run(operator, vectors)


def test_a_decomposition_that_fails_is_tried_on_the_triangle(monkeypatch):
    matrix = torch.tensor(drawn(1, 9, 7)[0])
    expected, real = torch.linalg.svdvals(matrix), torch.linalg.svd

    def fails_on_it(given, full_matrices):
        if torch.equal(given, matrix):
            raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")
        return real(given, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", fails_on_it)
    left, values, right = spectra.svd(matrix)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(left * values @ right, matrix)


# -- tensors that are no matrices, and declarations ----------------------------------------------------------


@pytest.mark.parametrize("operator", [Wudi(others="mean"), TsvM(), IsoC(), Star(), Knots()], ids=str)
def test_the_rest_takes_the_mean_of_the_task_vectors(operator):
    base, experts = torch.ones(2), [torch.tensor([3.0, 1]), torch.tensor([1.0, 5])]
    found = operator.rest(Layer("b", "rest", (2,)), base, experts, Report())
    assert [each.tolist() for each in found] == [[1, 0], [0, 2]]


def test_wudi_leaves_the_rest_at_the_base():
    base, experts = torch.ones(2, 2), [torch.zeros(2, 2), torch.full((2, 2), 3.0)]
    found = Wudi().rest(Layer("norm", "rest", (2, 2)), base, experts, Report())
    assert torch.equal(torch.stack(list(found)), torch.zeros(2, 2, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_what_they_declare_is_complete(kind):
    check_declared(kind.name, kind)
    assert kind.statistics == ()
    assert kind().order == "any"
    assert len(dataclasses.fields(kind)) == len(settings_of(kind)) > 0
    for setting in settings_of(kind).values():
        assert setting.text.endswith(".")
        assert setting.expected
