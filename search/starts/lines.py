"""LiNeS: coefficients that grow with depth (Wang et al. 2024, "LiNeS: Post-training Layer Scaling").

    lambda_l = alpha + beta l / (L - 1)

l is the number of the block from 0, L the number of blocks. Tensors outside of blocks get alpha. Every task vector of a
block is scaled by the same lambda_l.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from ecotone.populations.errors import InputError
from ecotone.populations.genome import Floats
from ecotone.search.starts.base import FIELD, By, Geometry, Solver, Weighs


class LinesSettings(Solver):
    """LiNeS: coefficients that grow linearly with depth.

    Attributes:
        solve: ``lines``: ``alpha`` in the first block and outside of blocks, ``alpha + beta`` in the last.
        alpha: The coefficient of the first block, and of tensors outside of blocks. By default 1/K for K experts, as
            the paper has it for task arithmetic. It must be given for operators that mix others in place of the task
            vectors.
        beta: The coefficient of the last block less that of the first. By default 1/K. The paper sweeps it as others
            sweep lambda.
    """

    solve: Literal["lines"]
    alpha: float | None = None
    beta: float | None = None

    by: ClassVar[By] = "block"
    of: ClassVar[tuple[Weighs, ...]] = ("task_vectors", "prepared")

    def check(self, models: Geometry) -> None:
        """Refuse models without blocks, and defaults where they have no meaning."""
        if np.isnan(models.depths).all():
            raise InputError(
                f"{FIELD}: lines scales blocks by depth, found no tensor of a numbered block (such as layers.0).",
                "Use solve: average, or one_shot.",
            )
        if models.weighs == "prepared" and (self.alpha is None or self.beta is None):
            raise InputError(
                f"{FIELD}: lines: expected alpha and beta with a merge.operator that mixes others in place of the task "
                "vectors, found no number for one of them.",
                "With alpha + beta = 1 the last block is the operator's own merge: say alpha: 0.5, beta: 0.5.",
            )

    def coefficients(self, models: Geometry) -> Floats:
        """(T, K): lambda_l for every expert."""
        share = 1 / len(models.experts)
        alpha, beta = (share if value is None else value for value in (self.alpha, self.beta))
        scale = alpha + beta * np.nan_to_num(models.depths)
        return models.of_experts(np.repeat(scale[:, None], len(models.experts), axis=1))
