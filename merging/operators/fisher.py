"""Fisher merging: means weighted by the diagonal Fisher information (Matena & Raffel 2022, arXiv:2111.09832).

    v_k = (F_k + f) tau_k / sum_j (F_j + f)

with F_k the diagonal of expert k's Fisher information on its own data (equation 3), the label drawn from the expert's
own predictions. The floor ``f`` is relative to the mean of all F, as Fisher values of large models are tiny.
``base + sum_k v_k`` is the published merge for equal lambdas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ecotone.merging.operators.whole import FromSlopes, Known, Layer, Report, Wanted


@dataclass(frozen=True)
class Fisher(FromSlopes):
    """``theta = base + sum_k c_k v_k`` with v_k of Fisher merging; c = 1 is the published merge.

    Args:
        floor: Added to all F, as a share of their mean in the layer: where no expert has any the mean of the task
            vectors is taken.
        normalise: Divide each F_k by its norm in the layer, so that no expert outweighs the others by its scale alone.
    """

    floor: Annotated[float, Field(ge=0)] = 1e-6
    normalise: bool = False

    name = "fisher"
    statistics: ClassVar[tuple[Wanted, ...]] = ("fisher",)
    folds = True

    def layer(
        self, at: Layer, base: Tensor, experts: Sequence[Tensor], known: Known, report: Report
    ) -> Sequence[Tensor]:
        """The experts' shares of the weighted mean."""
        weights = torch.stack(list(known.fisher))
        if not bool(weights.any()):
            report.warnings.append("no expert has slopes here, so this is the mean of the task vectors")
        if self.normalise:
            weights = weights / weights.flatten(1).norm(dim=1).clamp_min(torch.finfo(weights.dtype).tiny)[:, None, None]
        floor = max(self.floor * float(weights.mean()), torch.finfo(weights.dtype).tiny ** 0.5)
        weights = weights + floor
        shares = weights / weights.sum(0)
        return [share * (expert - base) for share, expert in zip(shares, experts, strict=True)]
