"""The start that measured best for what coefficients weigh, on two families of digit encoders."""

from __future__ import annotations

from typing import ClassVar, Literal

from ecotone.populations.genome import Floats
from ecotone.search.starts.base import By, Geometry, Solver
from ecotone.search.starts.model_stock import ModelStockSettings
from ecotone.search.starts.plain import AverageSettings, OneShotSettings


class AutoSettings(Solver):
    """The start that measured best for the operator.

    The merge of the operator itself where it prepares its vectors. Of task vectors Model Stock, which is near the best
    of the solvers where tasks share their inputs, and far above the others where they do not. Of models the average.

    Attributes:
        solve: ``auto``: ``one_shot`` where the operator prepares its vectors, ``model_stock`` of task vectors, else
            ``average``.
    """

    solve: Literal["auto"]

    by: ClassVar[By] = "tensor"

    def coefficients(self, models: Geometry) -> Floats:
        """(T, K) those of the solver that is taken."""
        if models.weighs == "prepared":
            return OneShotSettings(solve="one_shot").coefficients(models)
        if models.weighs == "task_vectors":
            return ModelStockSettings(solve="model_stock").coefficients(models)
        return AverageSettings(solve="average").coefficients(models)
