"""Classification heads that stay as they are while encoders are tuned and merged."""

from __future__ import annotations

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
