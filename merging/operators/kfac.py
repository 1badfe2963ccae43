"""K-FAC merging: least squares in the metric of both sides (MaTS, Tam et al. 2024, arXiv:2312.04339).

For a layer with weights W_k [out, in], the bias folded in as an input that is 1, let A_k = E[x xᵀ] of its inputs and
B_k = E[g gᵀ] of the slopes at its outputs, of expert k on its own data with its own head (K-FAC's approximation of the
Fisher information). The merge W minimises ``sum_k tr B_k (W - W_k) A_k (W - W_k)ᵀ``. With a ridge:

    L[X] = sum_j B_j X A_j + eps X,     eps = ridge * sum_j mean(diag A_j) mean(diag B_j)
    v_k  = L^-1 [B_k tau_k A_k + (eps / K) tau_k]

L is solved by preconditioned conjugate gradients from tau_k / K. With ``sequential`` (RegMean++'s idea) the A_k of a
block are those of the inputs that it gets in the merge of the blocks before it; the B_k stay those of the experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ecotone.merging.operators.whole import FromSlopes, Known, Layer, Report, Wanted

TOLERANCE = 1e-8
"""The relative residual at which conjugate gradients stop."""


@dataclass(frozen=True)
class KFac(FromSlopes):
    """``theta = base + sum_k c_k v_k`` with v_k of K-FAC merging; c = 1 is the merge of the closed form.

    Args:
        ridge: The share of the mean curvature that is added to that of every direction. The slopes of a softmax add up
            to zero, so without it the last layer of a classifier has no solution.
        sequential: Prepare blocks in the order of depth, with the inputs that they get in the merge.
        balance: ``trace`` scales each B_k to the same trace, so that experts of small losses count as much as others;
            ``none`` leaves them.
        steps: The most steps of conjugate gradients.
    """

    ridge: Annotated[float, Field(ge=1e-8)] = 1e-3
    sequential: bool = True
    balance: Literal["none", "trace"] = "none"
    steps: Annotated[int, Field(ge=1)] = 200

    name = "kfac"
    statistics: ClassVar[tuple[Wanted, ...]] = ("inputs", "slopes")
    folds = True

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
        scales = inner.diagonal(dim1=1, dim2=2).mean(1) * outer.diagonal(dim1=1, dim2=2).mean(1)
        if not float(scales.sum()) > 0:
            report.warnings.append("no expert has slopes here, so this is the mean of the task vectors")
            return [(expert - base) / len(experts) for expert in experts]
        outer = outer / scales.sum()
        eps = max(self.ridge, torch.finfo(outer.dtype).eps)
        taus = torch.stack([expert - base for expert in experts])
        right = outer @ taus @ inner + eps / len(experts) * taus
        found, residual, steps = conjugate_gradients(inner, outer, eps, right, taus / len(experts), self.steps)
        report.numbers |= {"residual": residual, "steps": float(steps)}
        if residual > 1e-4:
            report.warnings.append("conjugate gradients have not converged: raise the ridge or the steps")
        return list(found)


def conjugate_gradients(
    inner: Tensor, outer: Tensor, eps: float, right: Tensor, start: Tensor, most: int
) -> tuple[Tensor, float, int]:
    """X_k with ``sum_j B_j X_k A_j + eps X_k = R_k`` for each k.

    The preconditioner is the inverse of ``X -> (sum_j B_j) X mean_j(A_j) + eps X``: exact where all A_j are the same.

    Args:
        inner: (K, in, in) A_j.
        outer: (K, out, out) B_j.
        eps: The ridge.
        right: (K, out, in) R_k.
        start: (K, out, in) first X_k.
        most: The most steps.

    Returns:
        X, the largest relative residual, and the number of steps.
    """
    across, a = torch.linalg.eigh(inner.mean(0))
    along, b = torch.linalg.eigh(outer.sum(0))
    curvature = along.clamp_min(0)[:, None] * across.clamp_min(0) + eps

    def applied(x: Tensor) -> Tensor:
        total = eps * x
        for right_factor, left_factor in zip(inner, outer, strict=True):
            total = total + left_factor @ x @ right_factor
        return total

    def preconditioned(x: Tensor) -> Tensor:
        turned: Tensor = (b.mT @ x @ a) / curvature
        found: Tensor = b @ turned @ a.mT
        return found

    tiny = torch.finfo(right.dtype).tiny
    norms = _dot(right, right).sqrt().clamp_min(tiny)
    x = start.clone()
    residual = right - applied(x)
    towards = preconditioned(residual)
    direction, slope = towards.clone(), _dot(residual, towards)
    step = 0
    while step < most and bool((open_ := _dot(residual, residual).sqrt() / norms > TOLERANCE).any()):
        moved = applied(direction)
        rate = torch.where(open_, slope / _dot(direction, moved).clamp_min(tiny), torch.zeros_like(slope))
        x = x + rate * direction
        residual = residual - rate * moved
        towards = preconditioned(residual)
        before, slope = slope, _dot(residual, towards)
        direction = towards + slope / before.clamp_min(tiny) * direction
        step += 1
    true = right - applied(x)
    return x, float((_dot(true, true).sqrt() / norms).max()), step


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """(K, 1, 1) inner products."""
    return (one * other).sum((1, 2), keepdim=True)
