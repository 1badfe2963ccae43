"""Merges whose coefficients need no inner products: the operator's own at c = 1, the average, and weighted averages."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from ecotone.populations.errors import InputError
from ecotone.populations.genome import Floats
from ecotone.search.starts.base import FIELD, By, Geometry, Solver, Weighs, known


class OneShotSettings(Solver):
    """The operator's own merge: every coefficient is 1. With ``task_arithmetic`` it is the sum of the task vectors.

    Of a ``stack`` it is the merge that shares the methods' own merges out evenly.

    Attributes:
        solve: ``one_shot``: every coefficient is 1, as in the published merges of operators on task vectors. Of a
            ``stack``, all methods in equal parts.
    """

    solve: Literal["one_shot"]

    by: ClassVar[By] = "model"
    of: ClassVar[tuple[Weighs, ...]] = ("task_vectors", "prepared")

    def coefficients(self, models: Geometry) -> Floats:
        """(T, K) ones, or the operator's own."""
        row = np.ones(models.space.dimension) if models.published is None else models.published
        return np.tile(row, (models.tensors, 1))


class AverageSettings(Solver):
    """The average of the experts (model soups, Wortsman et al. 2022): every share is 1/K.

    Attributes:
        solve: ``average``: the mean of the experts, as the operator mixes them.
    """

    solve: Literal["average"]

    by: ClassVar[By] = "model"

    def coefficients(self, models: Geometry) -> Floats:
        """(T, K) the mean of the rows that reproduce the experts."""
        count = len(models.experts)
        return models.of_experts(np.full(count, 1 / count))


class MwaSettings(Solver):
    """Metrics-weighted averaging: the weight of an expert is a power of a metric of its own.

        w_k = m_k^p / sum_j m_j^p,   m_k the metric, or one over the loss

    The paper's exact formula could not be checked; this is its form.

    Attributes:
        solve: ``mwa``: an average weighted by the experts' own losses or metrics.
        losses: For each expert, by name, its loss, above 0: less is better.
        metrics: For each expert, by name, a number above 0, such as its score or its training step: more is better.
        p: The power; 0 is the plain average, and a large one takes the best expert alone.
    """

    solve: Literal["mwa"]
    losses: dict[str, float] | None = None
    metrics: dict[str, float] | None = None
    p: float = Field(default=1.0, ge=0)

    by: ClassVar[By] = "model"

    @model_validator(mode="after")
    def _is_of_one(self) -> MwaSettings:
        if (self.losses is None) == (self.metrics is None):
            found = "neither" if self.losses is None else "both"
            raise ValueError(f"expected losses or metrics of the experts, found {found}")
        for name, value in self._given.items():
            if value <= 0:
                raise ValueError(f"{self._key}.{name}: expected a number above 0, found {value}")
        return self

    @property
    def _key(self) -> str:
        return "metrics" if self.losses is None else "losses"

    @property
    def _given(self) -> dict[str, float]:
        return self.losses or self.metrics or {}

    def check(self, models: Geometry) -> None:
        """Refuse numbers of experts there are not, and experts without one."""
        known(self._given, models.experts, f"{FIELD}: mwa: {self._key}")
        missing = [name for name in models.experts if name not in self._given]
        if missing and len(set(models.experts)) == len(models.experts):
            raise InputError(
                f"{FIELD}: mwa: {self._key}: expected a number for each expert, found none for {', '.join(missing)}."
            )

    def coefficients(self, models: Geometry) -> Floats:
        """(T, K) the weights, the same in every tensor."""
        sign = 1.0 if self.losses is None else -1.0
        logs = sign * self.p * np.log([self._given[name] for name in models.experts])
        shares = np.exp(logs - logs.max())
        return models.of_experts(shares / shares.sum())
