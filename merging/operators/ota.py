"""OTA merging: means weighted by the optimiser's second moments, with FFG's masks (Mahdavinia et al. 2025).

"Harnessing Optimization Dynamics for Curvature-Informed Model Merging", arXiv:2509.11167.

With v_k Adam's running mean of squared gradients (``exp_avg_sq``) at the end of expert k's training, and
tau_k = theta_k - base,

    P_k = v_k^q                                            (a diagonal curvature; q = 1/2 is Adam's preconditioner)
    m_k = v_k tau_k^2 is among the largest ``density * n`` of the n of expert k       (FFG: Fast Fisher Grafting)
    theta = base + sum_k c_k u_k,    u_k = P_k m_k tau_k / sum_j P_j m_j

so c = 1 is the published merge. Second moments are tiny, down to 1e-18 and less. A constant beside them in the
denominator, as in the published code, shrinks the merge. Here the floor of P is relative to its mean in the tensor, and
is added to the numerator too. So entries that no expert has moments of get the mean of the task vectors. Thresholds
of masks are those of a density for the same reason.

The weights are the user's own: no data are read. From a trained model and its torch optimiser they are saved by::

    named = {name: optimiser.state.get(one, {}) for name, one in model.named_parameters()}
    moments = {name: state["exp_avg_sq"] for name, state in named.items() if state}
    safetensors.torch.save_file(moments, "math-moments.safetensors")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ecotone.merging.operators.order_statistics import order_statistics
from ecotone.merging.operators.prepared import Density
from ecotone.merging.operators.task_vectors import Pieces
from ecotone.merging.operators.whole import Known, Layer, Report, Wanted, WholeMatrices


@dataclass(frozen=True)
class Ota(WholeMatrices):
    """``theta = base + sum_k c_k u_k`` with u_k of OTA merging; c = 1 is the published merge.

    Args:
        second_moments: For each expert by its name, a safetensors file of Adam's ``exp_avg_sq`` with the names and
            shapes of the model's tensors. Tensors that were not trained may be missing.
        power: The power q of the second moments; 0 is the plain average, 0.5 and 1 are usual.
        floor: Added to the weights of all experts, as a share of their mean in the tensor.
        density: The share of each expert's n entries that FFG's mask keeps, over the whole model; 1 keeps all. A mask
            has the largest ``density * n`` entries (rounded, at least 1), and all equal to the smallest of them.
        uncovered: Where no mask keeps an entry: ``base`` leaves the base's weight, ``mean`` takes the weighted mean of
            all experts.
    """

    second_moments: Mapping[str, str] = field(default_factory=dict, hash=False)
    power: Annotated[float, Field(ge=0)] = 0.5
    floor: Annotated[float, Field(ge=0)] = 1e-12
    density: Density = 1.0
    uncovered: Literal["base", "mean"] = "base"

    name = "ota"
    statistics: ClassVar[tuple[Wanted, ...]] = ("second_moments",)
    elementwise = True
    paths: ClassVar[tuple[str, ...]] = ("second_moments",)

    def surveyed(self, pieces: Pieces) -> Sequence[float]:
        """K scores below which FFG masks entries; none at density 1."""
        if self.density == 1:
            return ()
        rank = max(1, round(self.density * pieces.size))
        count = pieces.vectors // 2

        def work(parts: Sequence[Tensor], _start: int) -> list[Tensor]:
            base, experts, moments = parts[0], parts[1 : count + 1], parts[count + 1 :]
            return [scores(e.double() - base.double(), v) for e, v in zip(experts, moments, strict=True)]

        return [found for (found,) in order_statistics(pieces, work, [[rank]] * count, torch.float32)]

    def layer(
        self, at: Layer, base: Tensor, experts: Sequence[Tensor], known: Known, report: Report
    ) -> Sequence[Tensor]:
        """The experts' shares of the weighted mean, of a tensor of any shape."""
        taus = torch.stack([expert - base for expert in experts])
        moments = torch.stack(list(known.second_moments))
        weights = moments**self.power
        weights = weights + max(self.floor * float(weights.mean()), torch.finfo(weights.dtype).tiny ** 0.5)
        if known.thresholds:
            kept = torch.stack(
                [scores(tau, v) >= threshold for tau, v, threshold in zip(taus, moments, known.thresholds, strict=True)]
            )
            report.numbers["kept"] = float(kept.double().mean())
            if self.uncovered == "mean":
                kept = kept | ~kept.any(0)
            weights = weights * kept
        total = weights.sum(0)
        shares = torch.where(total > 0, weights / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)
        return list(shares * taus)


def scores(tau: Tensor, moments: Tensor) -> Tensor:
    """|tau| sqrt(v) in float32: in the order of FFG's v tau^2, which float32 would not hold."""
    return (tau.double().abs() * moments.double().sqrt()).float()
