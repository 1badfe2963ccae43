"""The votes of RCP-Merging: by element, how many examples want a domain model's change, against those that do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ecotone.fitness.backends.base import Backend
from ecotone.fitness.data import Examples
from ecotone.fitness.heads import logits_of, outputs
from ecotone.fitness.statistics.kinds import Data
from ecotone.fitness.statistics.layers import mask_of
from ecotone.merging.models.names import Names
from ecotone.merging.operators.rcp import Rcp
from ecotone.populations.errors import InputError

TOKENS = "input_ids"


class Votes:
    """Votes on every tensor of the models. Holds three numbers for each element of a model.

    Args:
        operator: The operator.
        experts: The names of the two experts.
        data: By expert, its examples.
        backend: Shows the experts.
        module: Its module.
        names: The correspondence of the checkpoints' tensors and the module's.

    Raises:
        InputError: Examples have no labels, or the model cannot be differentiated.
    """

    def __init__(
        self,
        operator: Rcp,
        experts: Sequence[str],
        data: Mapping[str, Sequence[Data]],
        backend: Backend,
        module: nn.Module,
        names: Names,
    ) -> None:
        self._names = names
        self._kept = operator.kept(experts)
        reasoning, domain = experts[self._kept], experts[1 - self._kept]
        backend.expert(reasoning)
        weights = {name: _precise(one).clone() for name, one in _parameters(module).items()}
        rests = importance(module, data[reasoning])
        backend.expert(domain)
        barriers = {
            name: operator.strength * rests[name] * (weights[name] - _precise(one)) ** 2
            for name, one in _parameters(module).items()
        }
        found = {name: total.cpu() for name, total in votes(module, data[domain], barriers).items()}
        own = {id(one): name for name, one in _parameters(module).items()}
        tied = module.named_parameters(remove_duplicate=False)
        self._votes = {name: found[own[id(one)]] for name, one in tied if id(one) in own}

    def of(self, name: str, shape: Sequence[int]) -> list[Tensor]:
        """Votes for the domain model's change less votes against it, and an empty tensor for the reasoning model.

        Args:
            name: A tensor of the checkpoints. Where the module has no use for it, all votes are against.
            shape: Its shape.
        """
        place, scattered = self._names.places.get(name), self._names.scattered.get(name)
        if place is not None and place.target in self._votes:
            found = place.of(self._votes[place.target]).reshape(tuple(shape))
        elif scattered is not None:
            found = scattered.take(self._votes, torch.zeros(()))
        else:
            found = -torch.ones(tuple(shape))
        pair = [torch.zeros(0), torch.zeros(0)]
        pair[1 - self._kept] = found
        return pair


def importance(module: nn.Module, tasks: Sequence[Data]) -> dict[str, Tensor]:
    """F, the mean over examples of (g theta)^2, by the module's parameters."""
    parameters = _parameters(module)
    totals = {name: torch.zeros_like(_precise(one)) for name, one in parameters.items()}
    count = 0
    for slopes in gradients(module, tasks):
        count += 1
        for name, slope in slopes.items():
            totals[name] += (_precise(slope) * _precise(parameters[name])) ** 2
    return {name: total / count for name, total in totals.items()}


def votes(module: nn.Module, tasks: Sequence[Data], barriers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the module's parameters, the examples with ``g theta + barrier <= 0`` less those of the others."""
    parameters = _parameters(module)
    totals = {name: torch.zeros(one.shape, device=one.device) for name, one in parameters.items()}
    for slopes in gradients(module, tasks):
        for name, one in parameters.items():
            sensitivity = _precise(slopes[name]) * _precise(one) if name in slopes else 0.0
            totals[name] += torch.where(sensitivity + barriers[name] <= 0, 1.0, -1.0)
    return totals


def gradients(module: nn.Module, tasks: Sequence[Data]) -> Iterator[dict[str, Tensor]]:
    """For one example after the other the gradient of its loss, by the names of the parameters that it depends on.

    Raises:
        InputError: An example has no label.
    """
    with _differentiable(module) as parameters:
        for task in tasks:
            for number in range(len(task.examples)):
                with torch.enable_grad():
                    loss = loss_of(module, task.examples.rows(torch.tensor([number])), task)
                    slopes = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                yield {name: slope for name, slope in zip(parameters, slopes, strict=True) if slope is not None}


def loss_of(module: nn.Module, example: Examples, task: Data) -> Tensor:
    """-log p(label | input) of one example; of a text without a label the mean over its tokens but the first.

    Raises:
        InputError: There is no label, and the example is no text of a causal language model.
    """
    inputs = example.inputs
    logits = logits_of(outputs(module, inputs), inputs, task.head, tokens=True)
    if example.labels is not None and logits.ndim == 2:
        return nn.functional.cross_entropy(logits, example.labels.long())
    tokens = inputs.get(TOKENS) if isinstance(inputs, Mapping) else None
    if example.labels is None and tokens is not None and logits.shape[:-1] == tokens.shape:
        mask = mask_of(inputs)
        kept = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        said = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        return -said[kept[:, 1:]].mean()
    raise InputError(
        f"calibration {task.name!r}: the operator rcp reads labelled examples, or texts of a causal language model, "
        "found neither.",
        "Use loss: cross_entropy and a data function that returns (inputs, labels); fisher and kfac need no labels.",
    )


def _precise(one: Tensor) -> Tensor:
    """In float32 at least, without a graph."""
    return one.detach().to(torch.promote_types(one.dtype, torch.float32))


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: one for name, one in module.named_parameters() if one.is_floating_point()}


@contextmanager
def _differentiable(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The parameters, which ask for gradients meanwhile."""
    parameters = _parameters(module)
    before = {name: one.requires_grad for name, one in parameters.items()}
    for one in parameters.values():
        one.requires_grad_(True)
    try:
        yield parameters
    finally:
        for name, one in parameters.items():
            one.requires_grad_(before[name])
