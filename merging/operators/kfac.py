"""K-FAC merging: least squares in the metric of both sides (MaTS, Tam et al. 2024, arXiv:2312.04339).

For a layer with weights W_k [out, in], the bias folded in as an input that is 1, let A_k = E[x xᵀ] of its inputs and
B_k = E[g gᵀ] of the slopes at its outputs, of expert k on its own data with its own head (K-FAC's approximation of the
Fisher information). The merge W minimises ``sum_k tr B_k (W - W_k) A_k (W - W_k)ᵀ``. With a ridge:

    L[X] = sum_j B_j X A_j + eps X,     eps = ridge * sum_j mean(diag A_j) mean(diag B_j)
    v_k  = L^-1 [B_k tau_k A_k + (eps / K) tau_k]

L is solved by preconditioned conjugate gradients from tau_k / K, in rounds: each in float32, from the residual that the
round before left in float64. Where float32 gets no further, float64 goes on. It stops when the preconditioned residual,
which is about the error of the vectors, is below ``tolerance``, and the residual over eps, which bounds their error, is
below ``BOUND`` times that: what no data reach is determined by eps alone, and weighs almost nothing in the first. With
``sequential`` (RegMean++'s idea) the A_k of a block are those of the inputs that it gets in the merge of the blocks
before it; the B_k stay those of the experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ecotone.merging.operators.whole import FromSlopes, Known, Layer, Report, Wanted
from ecotone.populations.errors import InputError

ROUND = 1e-3
"""What a round of conjugate gradients leaves of the preconditioned residual."""
BOUND = 1e3
"""How many times ``tolerance`` the relative error of the vectors may be in directions that no data reach."""
SINGLE = 0.25
"""The share of all steps that a round in float32 takes at most."""


@dataclass(frozen=True)
class KFac(FromSlopes):
    """``theta = base + sum_k c_k v_k`` with v_k of K-FAC merging; c = 1 is the merge of the closed form.

    Args:
        ridge: The share of the mean curvature that is added to that of every direction. The slopes of a softmax add up
            to zero, so without it the last layer of a classifier has no solution.
        sequential: Prepare blocks in the order of depth, with the inputs that they get in the merge.
        balance: ``trace`` scales each B_k to the same trace, so that experts of small losses count as much as others;
            ``none`` leaves them.
        tolerance: The relative error of the vectors at which conjugate gradients stop, as the preconditioned residual
            tells it. In directions that no data reach it may be about 1e3 times this.
        steps: The most steps of conjugate gradients.
    """

    ridge: Annotated[float, Field(ge=1e-8)] = 1e-3
    sequential: bool = True
    balance: Literal["none", "trace"] = "none"
    tolerance: Annotated[float, Field(ge=1e-12, lt=1)] = 1e-5
    steps: Annotated[int, Field(ge=1)] = 200

    name = "kfac"
    statistics: ClassVar[tuple[Wanted, ...]] = ("inputs", "slopes")
    folds = True
    version: ClassVar[int] = 3

    @property
    def order(self) -> Literal["any", "depth"]:
        """``depth`` where it is sequential."""
        return "depth" if self.sequential else "any"

    def layer(
        self, at: Layer, base: Tensor, experts: Sequence[Tensor], known: Known, report: Report
    ) -> Sequence[Tensor]:
        """The solutions of the normal equations, one for each expert's right-hand side."""
        inner, outer = torch.stack(list(known.inputs)), torch.stack(list(known.slopes))
        if self.balance == "trace":
            traces = outer.diagonal(dim1=1, dim2=2).sum(1)
            outer = outer * (traces.mean() / traces.clamp_min(torch.finfo(outer.dtype).tiny))[:, None, None]
        inner, outer = _about_one(inner), _about_one(outer)
        scales = inner.diagonal(dim1=1, dim2=2).mean(1) * outer.diagonal(dim1=1, dim2=2).mean(1)
        if not bool(torch.isfinite(scales.sum())):
            raise InputError(
                f"merge.operator: kfac: the statistics of {at.name} are not finite.",
                "Check what the calibration tasks' data functions return, or use an architecture in float32.",
            )
        if not float(scales.sum()) > 0:
            report.warnings.append("no expert has slopes here, so this is the mean of the task vectors")
            return [(expert - base) / len(experts) for expert in experts]
        outer = outer / scales.sum()
        eps = max(self.ridge, torch.finfo(outer.dtype).eps)
        taus = torch.stack([expert - base for expert in experts])
        right = outer @ taus @ inner + eps / len(experts) * taus
        start = taus / len(experts)
        found, error, steps = solved(inner, outer, eps, right, start, self.tolerance, self.steps)
        report.numbers |= {"error": error, "steps": float(steps)}
        if error > 10 * BOUND * self.tolerance:
            reached = f"their relative error may be {error:.1g}"
            report.warnings.append(f"conjugate gradients have not converged ({reached}): raise the ridge or the steps")
        return list(found)


def solved(
    inner: Tensor, outer: Tensor, eps: float, right: Tensor, start: Tensor, tolerance: float, most: int
) -> tuple[Tensor, float, int]:
    """X_k with ``sum_j B_j X_k A_j + eps X_k = R_k`` for each k.

    Args:
        inner: (K, in, in) A_j.
        outer: (K, out, out) B_j.
        eps: The ridge.
        right: (K, out, in) R_k.
        start: (K, out, in) first X_k.
        tolerance: The relative preconditioned residual to stop at.
        most: The most steps.

    Returns:
        X, a bound of their largest relative error, and the number of steps.
    """
    across, a = torch.linalg.eigh(inner.mean(0))
    along, b = torch.linalg.eigh(outer.sum(0))
    # In these two bases the preconditioner, which is exact where all A_j are the same, divides element by element.
    curvature = along.clamp_min(0)[:, None] * across.clamp_min(0) + eps
    inner, outer, right, x = a.mT @ inner @ a, b.mT @ outer @ b, b.mT @ right @ a, b.mT @ start @ a
    norms = _norms(right / curvature).clamp_min(torch.finfo(right.dtype).tiny)
    allowed = torch.stack([norms * tolerance, norms * eps * BOUND * tolerance])
    residual = right - _applied(inner, outer, eps, x)
    left, steps, kind = float(_excess(residual / curvature, residual, allowed).max()), 0, torch.float32
    while left > 1 and steps < most:
        scale = _norms(residual).clamp_min(torch.finfo(right.dtype).tiny)  # keeps float32 far from its ends
        goal = allowed / scale * max(1.0, ROUND * left)
        limit = most - steps if kind == right.dtype else min(most - steps, max(1, int(SINGLE * most)))
        factors = (inner.to(kind), outer.to(kind), curvature.to(kind))
        moved, took = conjugate_gradients(*factors, (residual / scale).to(kind), eps, goal.to(kind), limit)
        better = x + moved.to(x.dtype) * scale
        rest = right - _applied(inner, outer, eps, better)
        now, steps = float(_excess(rest / curvature, rest, allowed).max()), steps + took
        stuck = not now < 0.1 * left  # also where float32 has overflowed
        if now < left:
            x, residual, left = better, rest, now
        if stuck and kind == right.dtype:
            break
        kind = right.dtype if stuck else kind
    return b @ x @ a.mT, float((_norms(residual) / norms).max()) / eps, steps


def conjugate_gradients(
    inner: Tensor, outer: Tensor, curvature: Tensor, right: Tensor, eps: float, allowed: Tensor, most: int
) -> tuple[Tensor, int]:
    """X_k with ``sum_j B_j X_k A_j + eps X_k = R_k`` for each k, from zero, and the number of steps.

    Args:
        inner: (K, in, in) A_j.
        outer: (K, out, out) B_j.
        curvature: (out, in) the diagonal that preconditions.
        right: (K, out, in) R_k, of norms about 1.
        eps: The ridge.
        allowed: (2, K, 1, 1) norms of the preconditioned residuals and of the residuals to stop at.
        most: The most steps.
    """
    tiny = torch.finfo(right.dtype).tiny
    x, residual = torch.zeros_like(right), right.clone()
    towards = residual / curvature
    direction, slope = towards.clone(), _dot(residual, towards)
    step = 0
    while step < most and bool((open_ := _excess(towards, residual, allowed) > 1).any()):
        moved = _applied(inner, outer, eps, direction)
        rate = torch.where(open_, slope / _dot(direction, moved).clamp_min(tiny), torch.zeros_like(slope))
        x.addcmul_(rate, direction)
        residual.addcmul_(rate, moved, value=-1)
        torch.div(residual, curvature, out=towards)
        before, slope = slope, _dot(residual, towards)
        direction = torch.addcmul(towards, slope / before.clamp_min(tiny), direction)
        step += 1
    return x, step


def _excess(towards: Tensor, residual: Tensor, allowed: Tensor) -> Tensor:
    """(K, 1, 1) preconditioned residuals, or residuals, over those that are ``allowed``: the larger ratio."""
    tiny = torch.finfo(residual.dtype).tiny
    return (torch.stack([_norms(towards), _norms(residual)]) / allowed.clamp_min(tiny)).amax(0)


def _applied(inner: Tensor, outer: Tensor, eps: float, x: Tensor) -> Tensor:
    """(K, out, in): ``sum_j B_j X_k A_j + eps X_k``."""
    total = eps * x
    for right_factor, left_factor in zip(inner, outer, strict=True):
        total += left_factor @ x @ right_factor
    return total


def _about_one(moments: Tensor) -> Tensor:
    """Moments over the largest mean diagonal among them: products of two kinds then stay within float32."""
    largest = moments.diagonal(dim1=1, dim2=2).mean(1).max()
    return moments / largest if bool(largest > 0) else moments


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """(K, 1, 1) inner products."""
    return (one * other).sum((1, 2), keepdim=True)


def _norms(matrices: Tensor) -> Tensor:
    """(K, 1, 1) Frobenius norms."""
    return _dot(matrices, matrices).sqrt()
