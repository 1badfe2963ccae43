"""Closeness to the middle: how near a model's weights are to zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ecotone.fitness.kinds import ObjectiveContext, ObjectiveSettings
from ecotone.fitness.protocol import Score
from ecotone.populations.trial import Goal


class ClosenessSettings(ObjectiveSettings):
    """How near the weights are to zero: 1 / (1 + norm / scale).

    Attributes:
        scale: The norm at which the score is one half.
    """

    type: Literal["closeness"]
    direction: Literal["maximize"] = "maximize"
    scale: float = Field(default=1.0, gt=0)

    limits: ClassVar[tuple[float, float] | None] = None
    by_example: ClassVar[bool | None] = False
    needs_tokenizer: ClassVar[bool] = False
    paths: ClassVar[tuple[str, ...]] = ()

    def build(self, context: ObjectiveContext) -> Closeness:
        """The objective, which has no data."""
        return Closeness(self.goal, self.scale)


@dataclass(frozen=True)
class Closeness:
    """The score of a model.

    Args:
        goal: Name and direction.
        scale: The norm at which the score is one half.
    """

    goal: Goal
    scale: float

    def score(self, model: Any) -> Score:
        """One number for the whole model."""
        tensors = model.values() if isinstance(model, dict) else model.parameters()
        squares = sum(float(tensor.detach().to(torch.float64).square().sum()) for tensor in tensors)
        return Score(1 / (1 + squares**0.5 / self.scale))
