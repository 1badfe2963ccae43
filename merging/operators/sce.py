"""SCE of FuseChat: select, calculate, erase, tensor by tensor (Wan et al. 2024, arXiv:2408.07990).

    select:    the ``density`` of a tensor's positions with the largest variance over the K experts' tau_k
    calculate: eta_k = mean of tau_k^2 over the selected positions, as a share of the sum over experts
    erase:     keep_k = tau_k has the sign of sum_j tau_j there (0 counts as positive) and is selected
    theta = base + sum_k c_k v_k,   v_k = eta_k tau_k keep_k / sum_j eta_j keep_j

All c_k = 1 is the published merge. As in the authors' code the share is one of the positions whose variance is not
zero, rounded down; at least one is selected. A tensor without variance (of one expert, or of equal ones) is selected
whole.

eta is a ratio, so it holds however small task vectors are. mergekit weighs all experts evenly where the sum of their
mean squares is below 1e-6, as in most fine-tuned language models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ecotone.merging.kernel.materialise import Transform
from ecotone.merging.operators.by_tensor import ByTensor
from ecotone.merging.operators.elementary import summed
from ecotone.merging.operators.order_statistics import order_statistics
from ecotone.merging.operators.prepared import Density, PreparedVectors, prepared
from ecotone.merging.operators.task_vectors import Pieces, Whole, chunks, task_vectors
from ecotone.merging.operators.ties_vectors import sign_of_sum

Chosen: TypeAlias = tuple[float, tuple[float, ...]]
"""The variance from which positions of a tensor are selected, and the K weights eta."""


@dataclass(frozen=True)
class Sce(PreparedVectors):
    """``theta = base + sum_k c_k v_k`` with v_k of SCE; zero coefficients give the base.

    Args:
        density: The share of each tensor's positions that is selected, 0.1 in the released models. Positions of the
            variance of the last selected one are, too.
        merges: What is merged. ``selected`` merges selected entries alone, as mergekit does; ``all`` has the selection
            only tell the weights of the experts, as FuseChat's own code does.
    """

    density: Density = 0.1
    merges: Literal["selected", "all"] = "selected"

    name = "sce"
    published: ClassVar[float | None] = 1.0
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {"density": (0.0, 1.0)}

    def transform(self, pieces: Pieces) -> Transform:
        """Streams the models six times: to count and to select positions, and for the weights of each tensor."""
        chosen = pieces.each(lambda whole: self._chosen(whole, pieces.kind))
        return _Erased(pieces.kind, ByTensor(pieces.tensors, chosen), self.merges == "selected")

    def _chosen(self, whole: Whole, kind: torch.dtype) -> Chosen:
        """The selection and the weights of one tensor."""
        threshold = self._threshold(whole, kind)

        def squares(pieces: Sequence[Tensor], _start: int) -> list[float]:
            parts = [_selected(task_vectors(cut, kind), threshold) for cut in chunks(pieces)]
            whole_rows = (np.concatenate([vector.numpy() for vector in row]) for row in zip(*parts, strict=True))
            return [float(np.square(row).sum()) for row in whole_rows]

        sums = np.sum(whole.map(squares), axis=0)
        total = np.sort(sums).sum()
        shares = sums / total if total > 0 else np.full(len(sums), 1 / len(sums))
        return threshold, tuple(shares.tolist())

    def _threshold(self, whole: Whole, kind: torch.dtype) -> float:
        """The least variance that is selected; 0 where all positions are."""
        if len(whole.stored) == 2 or self.density == 1:
            return 0.0

        def variances(pieces: Sequence[Tensor], _start: int) -> list[Tensor]:
            return [_variance(task_vectors(pieces, kind))]

        moved = sum(whole.map(lambda pieces, at: sum(int((variances(cut, at)[0] > 0).sum()) for cut in chunks(pieces))))
        rank = max(1, int(self.density * moved))
        return order_statistics(whole, variances, [(rank,)], torch.float64)[0][0]


def _variance(vectors: Sequence[Tensor]) -> Tensor:
    """The variance of K tensors at each position, in float64."""
    exact = [vector.double() for vector in vectors]
    least = exact[0].clone()
    for vector in exact[1:]:
        torch.minimum(least, vector, out=least)
    above = [vector - least for vector in exact]  # all exactly 0 where the vectors agree
    count = torch.tensor(float(len(above)), dtype=torch.float64, device=least.device)
    mean = summed(above).div_(count)
    return summed([vector.sub_(mean).square_() for vector in above]).div_(count)


def _selected(vectors: Sequence[Tensor], threshold: float) -> list[Tensor]:
    """The vectors in float64, zero where the variance is below the threshold."""
    exact = [vector.double() for vector in vectors]
    if threshold > 0:
        chosen = _variance(vectors).ge_(threshold)
        return [vector * chosen for vector in exact]
    return exact


@dataclass(frozen=True, eq=False)
class _Erased:
    """Selects, erases and weighs, in pieces of the base and K experts.

    Args:
        kind: The type in which task vectors are formed.
        chosen: By tensor, the selection and the weights.
        selected: Whether selected entries alone are merged.
    """

    kind: torch.dtype
    chosen: ByTensor[Chosen]
    selected: bool

    def __call__(self, pieces: Sequence[Tensor], start: int) -> list[Tensor]:
        """The base, and K vectors ``v_k``."""
        return prepared(pieces, start, lambda cut, low: self.chosen.vectors(cut, low, self._vectors))

    def _vectors(self, pieces: Sequence[Tensor], _place: int, _whole: Whole, chosen: Chosen) -> Sequence[Tensor]:
        threshold, shares = chosen
        vectors = _selected(task_vectors(pieces, self.kind), threshold if self.selected else 0.0)
        signs = sign_of_sum(vectors)
        signs.add_(signs.clone().eq_(0))
        weights = [vector.mul(signs).gt_(0).mul_(share) for vector, share in zip(vectors, shares, strict=True)]
        total = summed(weights)
        total.add_(total.clone().eq_(0))
        for vector, weight in zip(vectors, weights, strict=True):
            vector.mul_(weight.div_(total))
        return vectors
