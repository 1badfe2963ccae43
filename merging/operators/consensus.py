"""Consensus Merging: task vectors where several tasks need them (Wang et al. 2024, arXiv:2405.07813).

    tau_M = sum_k tau_k
    m_k   = |tau_k| > mask_lambda |tau_M - tau_k|          TALL masks
    theta = base + sum_k c_k v_k,   v_k = [sum_j m_j >= agree] tau_k

A TALL mask marks the entries that a task needs. Those that fewer than ``agree`` tasks need are dropped: selfish ones,
of one task, and catastrophic ones, of none. All c_k = alpha is the paper's ``base + alpha tau_M`` on the consensus;
MergeBench takes alpha = 0.4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ecotone.merging.kernel.materialise import Transform
from ecotone.merging.operators.elementary import summed
from ecotone.merging.operators.prepared import PreparedVectors, keep, prepared
from ecotone.merging.operators.task_vectors import Pieces, task_vectors
from ecotone.populations.errors import InputError


@dataclass(frozen=True)
class Consensus(PreparedVectors):
    """``theta = base + sum_k c_k v_k`` with v_k on the consensus of TALL masks; zero coefficients give the base.

    Args:
        mask_lambda: The factor of the other tasks' sum that an entry must exceed to be in its task's mask (the paper's
            lambda_t, one for all tasks); 0.2 to 0.6 are usual. Masks shrink as it grows.
        agree: The number of masks that an entry must be in (the paper's k). 0 is task arithmetic, 1 drops catastrophic
            entries only.
    """

    mask_lambda: Annotated[float, Field(ge=0, le=2)] = 0.4
    agree: Annotated[int, Field(ge=0)] = 2

    name = "consensus"
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {"mask_lambda": (0.0, 2.0)}

    def columns(self, experts: Sequence[str]) -> tuple[str, ...]:
        """The experts: one coefficient each.

        Raises:
            InputError: There are fewer than must agree, so that every merge would be the base.
        """
        if len(experts) < self.agree:
            raise InputError(
                f"merge.agree: expected at most the number of experts, {len(experts)}, found {self.agree}: no entry is "
                "in so many masks, and every merge would be the base.",
                "Set merge.agree to a smaller number.",
            )
        return tuple(experts)

    def transform(self, pieces: Pieces) -> Transform:
        """Reads nothing beforehand: masks depend on the entries of one position."""
        return _Agreeing(pieces.kind, self.mask_lambda, self.agree)


@dataclass(frozen=True)
class _Agreeing:
    """Drops entries that too few masks hold, in pieces of the base and K experts.

    Args:
        kind: The type in which task vectors are formed.
        factor: The factor of the sum of the others.
        agree: The least number of masks.
    """

    kind: torch.dtype
    factor: float
    agree: int

    def __call__(self, pieces: Sequence[Tensor], start: int) -> list[Tensor]:
        """The base, and K vectors ``v_k``."""
        return prepared(pieces, start, self._vectors)

    def _vectors(self, pieces: Sequence[Tensor], _start: int) -> Sequence[Tensor]:
        vectors = task_vectors(pieces, self.kind)
        exact = [vector.double() for vector in vectors]
        total, votes = summed(exact), torch.zeros_like(exact[0])
        for vector in exact:
            others = (total - vector).abs_().mul_(self.factor)
            votes.add_(vector.abs().gt_(others))
        agreed = votes.ge_(self.agree)
        for vector in vectors:
            keep(vector, agreed)
        return vectors
