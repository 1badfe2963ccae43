"""WUDI-Merging: the merge with the least interference along each task vector (Cheng et al. 2025, arXiv:2503.08099).

The rows of a task vector tau_k = theta_k - base of a linear layer lie near the span of the layer's inputs on task k, so
the task vectors stand for the data. The merged tau minimises the interference

    sum_k ||(tau - tau_k) tau_kᵀ||² / ||tau_k||²  =  sum_k tr (tau - tau_k) G_k (tau - tau_k)ᵀ

with G_k = tau_kᵀ tau_k / ||tau_k||².

The authors start at the sum of the task vectors and stop Adam early, so their result depends on the scale of the task
vectors. Here are two solutions that do not. The closed form has a ridge. It draws to the mean (or the sum) of the task
vectors where they act little:

    v_k = tau_k (G_k + w eps I) (sum_j G_j + eps I)⁻¹,   w = 1/K (or 1),   eps = ridge * mean diag sum_j G_j

With ``steps``, gradient flow is stopped early instead, which is exact in the eigenbasis of H = sum_j G_j:

    v_k = tau_k (w exp(-H t) + G_k H⁺ (I - exp(-H t))),   t = steps / (largest eigenvalue of H)

With w = 1/K the factors of the task vectors sum to the identity: experts that are all alike give that expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ecotone.merging.operators.spectra import task_matrices
from ecotone.merging.operators.whole import Known, Layer, Report, WholeMatrices


@dataclass(frozen=True)
class Wudi(WholeMatrices):
    """``theta = base + sum_k c_k v_k`` with v_k that minimise the interference of the task vectors.

    Args:
        ridge: The ridge of the closed form, as a share of the mean diagonal entry of the sum of the G_k. A small one
            (0.01) leads far from the task vectors where they are large.
        steps: Steps of gradient flow in place of the ridge, each of length 1 / (largest eigenvalue of the sum of the
            G_k). 0 takes the closed form with the ridge.
        toward: The merge that the ridge draws to and that the flow starts from: the ``mean`` of the task vectors, or
            their ``sum``, which the authors start from.
        others: What becomes of tensors that are no matrices of layers: they stay at the ``base``, as the authors have
            it, or take the ``mean`` of the task vectors.
    """

    ridge: Annotated[float, Field(gt=0)] = 0.1
    steps: Annotated[int, Field(ge=0)] = 0
    toward: Literal["sum", "mean"] = "mean"
    others: Literal["base", "mean"] = "base"

    name = "wudi"

    def layer(
        self, at: Layer, base: Tensor, experts: Sequence[Tensor], known: Known, report: Report
    ) -> Sequence[Tensor]:
        """The K vectors, in the eigenbasis of H."""
        vectors = task_matrices(at, base, experts)
        norms = [torch.linalg.vector_norm(vector) for vector in vectors]
        if not any(norms):
            return vectors
        units = [vector / norm if norm else vector for vector, norm in zip(vectors, norms, strict=True)]
        stacked = torch.cat(units)
        values, basis = torch.linalg.eigh(stacked.mT @ stacked)  # H
        kept, learned = self._filters(values.clamp(min=0), 1.0 if self.toward == "sum" else 1 / len(vectors), report)
        prepared = []
        for vector, unit in zip(vectors, units, strict=True):
            inside, own = vector @ basis, unit @ basis
            acted = torch.linalg.multi_dot([inside, own.mT, own])  # tau_k G_k
            prepared.append((inside * kept + acted * learned) @ basis.mT)
        return prepared

    def _filters(self, values: Tensor, weight: float, report: Report) -> tuple[Tensor, Tensor]:
        """For each eigenvalue of H, in ascending order, the factors of ``tau_k`` and of ``tau_k G_k``."""
        if self.steps:
            time = self.steps / values[-1]
            learned = torch.where(values > 0, -torch.expm1(-values * time) / values, time)
            return weight * torch.exp(-values * time), learned
        ridge = self.ridge * values.mean()
        report.numbers["condition"] = float((values[-1] + ridge) / (values[0] + ridge))
        return weight * ridge / (values + ridge), 1 / (values + ridge)

    def rest(self, at: Layer, base: Tensor, experts: Sequence[Tensor], report: Report) -> Sequence[Tensor]:
        """Zeros, or each task vector's share of their mean."""
        if self.others == "base":
            return [torch.zeros_like(base) for _ in experts]
        return super().rest(at, base, experts, report)
