"""RegMean: each layer's least squares over the inputs of all tasks (Jin et al. 2023, arXiv:2212.09849).

For a layer with weights W_k [out, in], the bias folded in as an input that is 1, and G_k = E[x xᵀ] over the inputs x
that expert k's own data make there, the merge W minimises ``sum_k E ||(W - W_k) x||²`` (equation 1). With a ridge:

    v_k = tau_k (G_k + (eps / K) I) (sum_j G_j + eps I)^-1,     eps = ridge * mean(diag(sum_j G_j))

so ``base + sum_k v_k`` is RegMean's closed form (equation 2), and inputs that no task has get the mean of the task
vectors. ``shrink`` multiplies the off-diagonal elements of all G_k (the paper's alpha): for too few examples.
``targets: own`` aims at what the expert makes of its own activations, given the inputs that the merge makes there. Then
errors of the layers before are corrected, too, and layers are prepared in the order of depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ecotone.merging.operators.whole import FromData, Known, Layer, Report, Wanted

MANY = 4
"""Examples an input channel from which the least ridge does."""


@dataclass(frozen=True)
class RegMean(FromData):
    """``theta = base + sum_k c_k v_k`` with v_k of RegMean; c = 1 is the published merge.

    Args:
        ridge: The share of the mean diagonal element that is added to the sum of the Gram matrices. None takes 1e-6
            where each expert has at least four rows of data for an input channel, and 1e-3 otherwise.
        shrink: The factor of the off-diagonal elements of the Gram matrices; 1 leaves them as they are.
        targets: ``weights`` aims at what the expert's weights make of the inputs; ``own`` at what the expert makes of
            its own activations, given the inputs in the merge (layers are then prepared in the order of depth).
    """

    ridge: Annotated[float, Field(ge=0)] | None = None
    shrink: Annotated[float, Field(ge=0, le=1)] = 1.0
    targets: Literal["weights", "own"] = "own"

    name = "regmean"
    folds = True

    @property
    def wanted(self) -> tuple[Wanted, ...]:
        """Second moments of inputs, and of inputs with outputs for own targets."""
        return ("inputs", "outputs") if self.targets == "own" else ("inputs",)

    @property
    def order(self) -> Literal["any", "depth"]:
        """``depth`` for own targets."""
        return "depth" if self.targets == "own" else "any"

    def layer(
        self, at: Layer, base: Tensor, experts: Sequence[Tensor], known: Known, report: Report
    ) -> Sequence[Tensor]:
        """The solution of the least squares, split into the experts' parts."""
        grams = [shrunk(gram, self.shrink) for gram in known.inputs]
        total, eps = regularised(grams, self.ridge, known.rows, report)
        if self.targets == "weights" and proportional(grams):
            report.warnings.append("the tasks have the same inputs here, so this is the plain average of the experts")
        vectors = []
        for k, expert in enumerate(experts):
            tau = expert - base
            if self.targets == "own":
                right = known.outputs[k].mT - base @ grams[k] + eps / len(experts) * tau
            else:
                right = tau @ grams[k] + eps / len(experts) * tau
            vectors.append(solved(total, right))
        return vectors


def shrunk(gram: Tensor, factor: float) -> Tensor:
    """A Gram matrix with its off-diagonal elements multiplied."""
    return gram if factor == 1 else gram * factor + torch.diag(gram.diagonal()) * (1 - factor)


def regularised(
    grams: Sequence[Tensor], ridge: float | None, rows: Sequence[int], report: Report
) -> tuple[Tensor, float]:
    """The sum of the Gram matrices with ``eps`` on its diagonal, and ``eps``.

    Args:
        grams: K matrices (in, in).
        ridge: The share of the mean diagonal element; None chooses it by the number of rows.
        rows: K numbers of rows.
        report: Takes the condition number, and warnings.
    """
    total = torch.stack(list(grams)).sum(0)
    width = len(total)
    few = min(rows, default=width) < MANY * width
    share = (1e-3 if few else 1e-6) if ridge is None else ridge
    eps = share * float(total.diagonal().mean())
    eps = eps if eps > 0 else torch.finfo(total.dtype).tiny ** 0.5
    damped = total + eps * torch.eye(width, dtype=total.dtype, device=total.device)
    values = torch.linalg.eigvalsh(damped)
    least, most = float(values[0]), float(values[-1])
    report.numbers["condition"] = most / least if least > 0 else float("inf")
    if report.numbers["condition"] > 1 / (10 * torch.finfo(total.dtype).eps):
        report.warnings.append("the Gram matrices are nearly singular: raise the ridge, or give more examples")
    return damped, eps


def proportional(grams: Sequence[Tensor], tolerance: float = 1e-3) -> bool:
    """Whether all Gram matrices are multiples of each other."""
    first = grams[0]
    for gram in grams[1:]:
        scale = float((first * gram).sum() / first.square().sum().clamp_min(1e-300))
        if float((gram - scale * first).norm()) > tolerance * float(gram.norm()):
            return False
    return len(grams) > 1


def solved(total: Tensor, right: Tensor) -> Tensor:
    """X with X total = right, for a symmetric positive definite ``total``."""
    factor, failed = torch.linalg.cholesky_ex(total)
    if int(failed):  # not positive definite to rounding
        inverse: Tensor = torch.linalg.pinv(total, hermitian=True)
        return right @ inverse
    found: Tensor = torch.cholesky_solve(right.mT, factor)
    return found.mT
