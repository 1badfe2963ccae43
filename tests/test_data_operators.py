"""Operators that prepare from data: their layers against the formulas, and what must hold of all of them."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from ecotone.merging import operators
from ecotone.merging.operators.kfac import KFac
from ecotone.merging.operators.whole import Known, Layer, Report
from ecotone.populations.errors import InputError
from ecotone.testing.prepared import invented, own_outputs

NAMES = ("one", "two", "three")
OURS = [
    operators.get("kfac"),
    operators.get("kfac", {"balance": "trace"}),
    operators.get("regmean"),
    operators.get("regmean", {"targets": "weights", "shrink": 0.9}),
    operators.get("regmean_pp"),
    operators.get("fisher"),
    operators.get("fisher", {"normalise": True}),
]
IDS = [f"{one.name}-{number}" for number, one in enumerate(OURS)]
SHAPES = [(6, 5), (1, 5), (6, 1)]


def models(shape, seed=0, count=3):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    return base, [base + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def vectors(operator, base, experts, known=None):
    names = NAMES[: len(experts)]
    known = own_outputs(invented(names, base.shape), experts) if known is None else known
    at = Layer("w", "linear", tuple(base.shape))
    found = operator.layer(at, base, experts, known, Report())
    assert all(bool(torch.isfinite(one).all()) for one in found)
    return torch.stack(list(found))


def close(one, other, tolerance=1e-6):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# -- formulas ------------------------------------------------------------------------------------------------


def test_regmean_is_the_least_squares_over_all_tasks():
    base, experts = models((4, 3))
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(50, 3)) for _ in experts]
    known = Known([torch.tensor(x.T @ x / 50) for x in rows], rows=[50] * 3)
    merged = base + vectors(operators.get("regmean", {"targets": "weights", "ridge": 0.0}), base, experts, known).sum(0)
    answers = [x @ expert.numpy().T for x, expert in zip(rows, experts, strict=True)]
    expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(answers), rcond=None)[0].T
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-8)


def test_regmean_with_own_targets_is_the_least_squares_of_what_the_experts_make_of_their_own_inputs():
    base, experts = models((4, 3))
    rng = np.random.default_rng(1)
    theirs = [rng.normal(size=(50, 3)) for _ in experts]
    merges = [x + 0.1 * rng.normal(size=x.shape) for x in theirs]
    answers = [x @ expert.numpy().T for x, expert in zip(theirs, experts, strict=True)]
    inputs = [torch.tensor(x.T @ x / 50) for x in merges]
    outputs = [torch.tensor(x.T @ y / 50) for x, y in zip(merges, answers, strict=True)]
    known = Known(inputs, outputs=outputs, rows=[50] * 3)
    merged = base + vectors(operators.get("regmean", {"ridge": 0.0}), base, experts, known).sum(0)
    expected = np.linalg.lstsq(np.concatenate(merges), np.concatenate(answers), rcond=None)[0].T
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-8)


def test_shrinking_leaves_the_diagonals():
    base, experts = models((4, 3))
    known = invented(NAMES, base.shape)
    grams = [gram.numpy() * 0.25 + np.diag(np.diag(gram.numpy())) * 0.75 for gram in known.inputs]
    total = sum(grams)
    merged = sum(expert.numpy() @ gram for expert, gram in zip(experts, grams, strict=True)) @ np.linalg.inv(total)
    operator = operators.get("regmean", {"targets": "weights", "ridge": 0.0, "shrink": 0.25})
    np.testing.assert_allclose((base + vectors(operator, base, experts, known).sum(0)).numpy(), merged, rtol=1e-8)


def test_fisher_is_the_mean_weighted_by_the_information():
    base, experts = models((4, 3))
    known = invented(NAMES, base.shape)
    weights = [fisher.numpy() for fisher in known.fisher]
    merged = sum(w * e.numpy() for w, e in zip(weights, experts, strict=True)) / sum(weights)
    plain = operators.get("fisher", {"floor": 0.0})
    np.testing.assert_allclose((base + vectors(plain, base, experts, known).sum(0)).numpy(), merged, rtol=1e-8)
    weights = [w / np.linalg.norm(w) for w in weights]
    merged = sum(w * e.numpy() for w, e in zip(weights, experts, strict=True)) / sum(weights)
    even = operators.get("fisher", {"floor": 0.0, "normalise": True})
    np.testing.assert_allclose((base + vectors(even, base, experts, known).sum(0)).numpy(), merged, rtol=1e-8)


def test_kfac_solves_its_normal_equations():
    """As one large linear system, written with Kronecker products."""
    base, experts = models((4, 3))
    known = invented(NAMES, base.shape)
    inner, outer = ([m.numpy() for m in some] for some in (known.inputs, known.slopes))
    ridge = 1e-2
    eps = ridge * sum(np.diag(a).mean() * np.diag(b).mean() for a, b in zip(inner, outer, strict=True))
    system = sum(np.kron(b, a.T) for a, b in zip(inner, outer, strict=True)) + eps * np.eye(12)
    found = vectors(operators.get("kfac", {"ridge": ridge, "tolerance": 1e-10}), base, experts, known)
    for k, expert in enumerate(experts):
        tau = (expert - base).numpy()
        right = outer[k] @ tau @ inner[k] + eps / 3 * tau
        np.testing.assert_allclose(found[k].numpy(), np.linalg.solve(system, right.ravel()).reshape(4, 3), rtol=1e-6)


def test_kfac_of_equal_slopes_is_regmean_and_of_equal_inputs_a_left_metric():
    base, experts = models((4, 3))
    known = invented(NAMES, base.shape)
    alike = replace(known, slopes=[torch.eye(4, dtype=torch.float64)] * 3)
    regmean = operators.get("regmean", {"targets": "weights", "ridge": 1e-9})
    kfac = KFac(ridge=1e-9, tolerance=1e-12)
    close(vectors(kfac, base, experts, alike), vectors(regmean, base, experts, alike))
    alike = replace(known, inputs=[torch.eye(3, dtype=torch.float64)] * 3)
    total = torch.linalg.inv(torch.stack(list(known.slopes)).sum(0))
    left = torch.stack([total @ b @ (e - base) for b, e in zip(known.slopes, experts, strict=True)])
    close(vectors(kfac, base, experts, alike), left)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("ridge", [1e-2, 1e-7])
def test_kfac_is_as_exact_as_asked_although_it_goes_on_in_float32(ridge, scale):
    base, experts = models((24, 40))
    known = invented(NAMES, base.shape)
    known = replace(known, slopes=[scale * one for one in known.slopes])
    base, experts = scale * base, [scale * expert for expert in experts]
    for tolerance in (1e-3, 1e-10):
        report = Report()
        settings = KFac(ridge=ridge, tolerance=tolerance, steps=2000)
        settings.layer(Layer("w", "linear", (24, 40)), base, experts, known, report)
        assert report.numbers["error"] <= 1e3 * tolerance
        assert not report.warnings


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("ridge", [1e-3, 1e-5, 1e-8])
def test_kfac_of_few_examples_is_its_closed_form_however_small_the_ridge(ridge, rows):
    """What no example reaches is determined by the ridge alone, and weighs almost nothing in the residual."""
    base, experts = models((5, 7))
    rng = np.random.default_rng(rows)
    inner, outer = ([x.T @ x for x in rng.standard_normal((3, rows, size))] for size in (7, 5))
    known = Known(inputs=[torch.from_numpy(a) for a in inner], slopes=[torch.from_numpy(b) for b in outer])
    report = Report()
    found = KFac(ridge=ridge, steps=2000).layer(Layer("w", "linear", (5, 7)), base, experts, known, report)
    eps = ridge * sum(np.diag(a).mean() * np.diag(b).mean() for a, b in zip(inner, outer, strict=True))
    system = sum(np.kron(b, a) for a, b in zip(inner, outer, strict=True)) + eps * np.eye(35)
    for k, expert in enumerate(experts):
        tau = (expert - base).numpy()
        right = outer[k] @ tau @ inner[k] + eps / 3 * tau
        exact = np.linalg.solve(system, right.ravel()).reshape(5, 7)
        assert np.linalg.norm(found[k].numpy() - exact) <= 4e-2 * np.linalg.norm(exact)
    assert not report.warnings


def test_kfac_refuses_statistics_that_are_not_finite():
    base, experts = models((4, 3))
    known = invented(NAMES, base.shape)
    known = replace(known, slopes=[known.slopes[0] * torch.nan, *known.slopes[1:]])
    with pytest.raises(InputError, match="the statistics of w are not finite"):
        KFac().layer(Layer("w", "linear", (4, 3)), base, experts, known, Report())


def test_kfac_says_where_it_has_not_converged():
    base, experts = models((6, 5))
    report = Report()
    known = invented(NAMES, base.shape)
    KFac(ridge=1e-6, steps=1).layer(Layer("w", "linear", (6, 5)), base, experts, known, report)
    assert report.numbers["error"] > 1e-4
    assert len(report.warnings) == 1
    assert re.match(
        r"conjugate gradients have not converged \(their relative error may be .*\): raise", report.warnings[0]
    )


# -- what holds of all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OURS, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestEach:
    def test_one_expert_and_equal_experts_give_the_expert(self, operator, shape):
        base, experts = models(shape)
        close(base + vectors(operator, base, experts[:1]).sum(0), experts[0])
        close(base + vectors(operator, base, experts[:1] * 3).sum(0), experts[0])

    def test_experts_that_are_the_base_give_the_base(self, operator, shape):
        base, _ = models(shape)
        close(vectors(operator, base, [base] * 3), torch.zeros(3, *shape, dtype=torch.float64), 1e-12)

    def test_the_order_of_models_does_not_matter(self, operator, shape):
        base, experts = models(shape)
        known = own_outputs(invented(NAMES, shape), experts)
        order = [2, 0, 1]
        turned = Known(**{name: [one[i] for i in order] for name, one in vars(known).items() if one})
        found = vectors(operator, base, [experts[i] for i in order], turned)
        close(found, vectors(operator, base, experts, known)[order])

    def test_rows_and_columns_may_be_permuted(self, operator, shape):
        base, experts = models(shape)
        known = own_outputs(invented(NAMES, shape), experts)
        rows, columns = (torch.randperm(size, generator=torch.Generator().manual_seed(1)) for size in shape)
        turned = Known(
            [a[columns][:, columns] for a in known.inputs],
            [b[rows][:, rows] for b in known.slopes],
            [f[rows][:, columns] for f in known.fisher],
            [o[columns][:, rows] for o in known.outputs],
            known.rows,
        )
        found = vectors(operator, base[rows][:, columns], [one[rows][:, columns] for one in experts], turned)
        close(found, vectors(operator, base, experts, known)[:, rows][:, :, columns])

    def test_task_vectors_may_be_scaled(self, operator, shape):
        base, experts = models(shape)
        known = invented(NAMES, shape)
        larger = [base + 5 * (one - base) for one in experts]
        found = vectors(operator, base, larger, own_outputs(known, larger))
        close(found, 5 * vectors(operator, base, experts, own_outputs(known, experts)))

    def test_dead_inputs_and_no_information_get_the_mean(self, operator, shape):
        base, experts = models(shape)
        known = invented(NAMES, shape)
        nothing = Known(
            *([torch.zeros_like(one) for one in some] for some in (known.inputs, known.slopes, known.fisher)),
            rows=known.rows,
        )
        nothing = own_outputs(nothing, experts)
        mean = torch.stack([(one - base) / 3 for one in experts])
        close(vectors(operator, base, experts, nothing), mean)
        dead = [a.clone() for a in known.inputs]
        for gram in dead:
            gram[0] = 0
            gram[:, 0] = 0
        known = own_outputs(replace(known, inputs=dead), experts)
        if "regmean" in operator.name:
            close(vectors(operator, base, experts, known)[:, :, 0], mean[:, :, 0])
        else:
            vectors(operator, base, experts, known)

    def test_moments_of_rank_one(self, operator, shape):
        base, experts = models(shape)
        known = invented(NAMES, shape)
        inputs = [torch.outer(a[0], a[0]) for a in known.inputs]
        slopes = [torch.outer(b[0], b[0]) for b in known.slopes]
        vectors(operator, base, experts, own_outputs(replace(known, inputs=inputs, slopes=slopes), experts))
