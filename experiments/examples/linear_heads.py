"""Classification heads that stay as they are while encoders are tuned and merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def fit_head(inputs: Tensor, labels: Tensor, classes: int, strength: float = 0.1) -> nn.Linear:
    """Multinomial logistic regression on (N, F) features: minimal sum of log losses + |W|^2 / (2 ``strength``)."""
    head = nn.Linear(inputs.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        penalty = head.weight.square().sum() / (2 * strength * len(labels))
        value = nn.functional.cross_entropy(head(inputs), labels) + penalty
        torch.autograd.backward(value)
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    return head.requires_grad_(False)


class MeanHead(nn.Module):
    """A linear head on the mean of an encoder's last hidden states, as Hugging Face encoders return them.

    Args:
        weight: (C, F) one row a class.
        bias: (C,)
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """(n, C) logits of ``outputs.last_hidden_state`` (n, L, F), over the tokens of ``attention_mask`` (n, L)."""
        pooled = mean_states(outputs.last_hidden_state, inputs["attention_mask"])
        return nn.functional.linear(pooled, self.weight, self.bias)


def mean_states(states: Tensor, mask: Tensor) -> Tensor:
    """(n, F) means of states (n, L, F) over the positions where mask (n, L) is 1."""
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)
