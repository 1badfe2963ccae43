"""Magnitudes: how large the inputs of each linear layer are on average, feature by feature.

They weigh the columns of a weight by how much is multiplied with them, as AIM (Nobari et al. 2025, arXiv:2502.02421)
and the pruning method Wanda (Sun et al. 2024, arXiv:2306.11695) do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ecotone.fitness.statistics.kinds import Data, Gathering
from ecotone.fitness.statistics.layers import linear_layers, observe


class Magnitude:
    """The mean of abs(x) over the rows x that reach a linear layer: (features,) in float64, for each layer.

    Rows of all tasks count alike, so a task counts by its tokens, or examples where there are no tokens. Layers that
    the data does not reach are left out.

    Args:
        settings: How many examples there are in a pass.
    """

    settings: ClassVar[type[Gathering]] = Gathering
    version: ClassVar[int] = 1

    def __init__(self, settings: Gathering) -> None:
        self._settings = settings

    def gather(self, model: nn.Module, tasks: Sequence[Data]) -> Mapping[str, Tensor]:
        """The magnitudes of ``model`` by the names of its layers, on the CPU."""
        sums: dict[str, Tensor] = {}
        rows: Counter[str] = Counter()

        def take(name: str, values: Tensor) -> None:
            added = values.abs().sum(0, dtype=torch.float64)
            sums[name] = sums[name] + added if name in sums else added
            rows[name] += len(values)

        layers = linear_layers(model)
        for task in tasks:
            observe(model, layers, task, self._settings.batch, take)
        return {name: (total / rows[name]).cpu() for name, total in sums.items() if rows[name]}
