"""Operators that prepare task vectors before they are mixed: the common part of TIES, DARE and others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ecotone.merging.kernel.materialise import accumulator
from ecotone.merging.operators.task_arithmetic import TaskArithmetic
from ecotone.merging.operators.task_vectors import chunks
from ecotone.populations.genome import Floats

SEEDS = 2**32

Density: TypeAlias = Annotated[float, Field(gt=0, le=1)]
"""A share of the entries of task vectors."""
MaskSeed: TypeAlias = Annotated[int, Field(ge=0, le=SEEDS - 1)]
"""The seed from which masks of random entries are drawn."""
Combine: TypeAlias = Literal["mean", "sum"]
"""How entries that agree are combined."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class PreparedVectors(TaskArithmetic):
    """``theta = base + sum_k c_k v_k``, where the operator makes the ``v_k`` from the task vectors.

    The ``v_k`` are mixed in place of the experts, in float32 (float64 where the models are): the merge is linear in the
    coefficients, and where all ``v_k`` are zero it is the base bit for bit.
    """

    changes = True
    published: ClassVar[float | None] = None
    """The coefficient of every vector in the paper's own merge; None where the paper leaves a factor open."""

    def weights(self, coefficients: Floats, grams: Floats | None = None) -> Floats:
        """(S, K+1): one for the base, then the coefficients."""
        table = np.asarray(coefficients, np.float64)
        return np.column_stack([np.ones(len(table)), table])


def prepared(
    pieces: Sequence[Tensor], start: int, work: Callable[[Sequence[Tensor], int], Sequence[Tensor]]
) -> list[Tensor]:
    """The base, and the K vectors that ``work`` makes of chunks of the pieces and their positions."""
    base, kind = pieces[0], accumulator(pieces)
    vectors = [torch.empty_like(base, dtype=kind) for _ in pieces[1:]]
    low = 0
    for cut in chunks(pieces):
        high = low + cut[0].numel()
        for vector, part in zip(vectors, work(cut, start + low), strict=True):
            vector[low:high] = part
        low = high
    return [base, *vectors]


def shared(vectors: Sequence[Tensor], combine: Combine) -> Sequence[Tensor]:
    """The vectors, for a mean each entry divided by how many of the K are not zero there; changed in place."""
    if combine == "mean":
        counts = torch.zeros_like(vectors[0])
        for vector in vectors:
            counts.add_(vector.sign().abs_())
        counts.clamp_(min=1)
        for vector in vectors:
            vector.div_(counts)
    return vectors


def keep(vector: Tensor, flags: Tensor) -> None:
    """Set the elements of ``vector`` to zero where ``flags`` is 0; the others, where it is 1, stay as they are.

    In the integers of their bits: on a CPU torch.where takes ten times as long, and NaN times 0 is not zero.
    """
    kind = _INTEGERS[vector.element_size()]
    vector.view(kind).bitwise_and_(flags.to(kind).neg_())
