"""Linear layers of a model, and the rows that reach them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ecotone.fitness.data import MASK, Inputs
from ecotone.fitness.heads import outputs
from ecotone.fitness.statistics.kinds import Data

Take: TypeAlias = Callable[[str, Tensor], None]
"""Is given a layer's name and (rows, features) of its inputs."""


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model, by name: ``nn.Linear``, and ``Conv1D`` of transformers (GPT-2's).

    A layer that is reached under two names is there once.
    """
    shared = sys.modules.get("transformers.pytorch_utils")
    kinds = (nn.Linear,) if shared is None else (nn.Linear, shared.Conv1D)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def observe(model: nn.Module, layers: Mapping[str, nn.Module], data: Data, batch: int, take: Take) -> None:
    """Give ``take`` the inputs of each layer for all examples, one pass after the other.

    A row is what the layer maps to one row of its outputs: an example, or one token of it. Rows of tokens that the
    attention mask leaves out are left out.

    Args:
        model: In evaluation mode.
        layers: Modules of it, by name.
        data: The examples.
        batch: Examples in one pass.
        take: Called where a layer is, with rows in the model's type.
    """
    for inputs in data.examples.batches(batch):
        with torch.no_grad(), taking(layers, mask_of(inputs), take):
            outputs(model, inputs)


def taking(layers: Mapping[str, nn.Module], mask: Tensor | None, take: Take) -> contextlib.AbstractContextManager[None]:
    """Give ``take`` the inputs of the layers in the passes that are made meanwhile.

    Args:
        layers: Modules, by name.
        mask: Which tokens count; None for all.
        take: As for ``observe``.
    """
    return _hooked(layers, partial(_take_rows, take, mask))


@dataclass(frozen=True, eq=False)
class Observed:
    """One call of a layer in a pass whose graph is kept.

    Args:
        name: The layer's name.
        inputs: (rows, in) its inputs.
        probe: Zeros that were added to its outputs: a loss's gradient by them is that by the outputs.
        mask: Which tokens count; None for all.
    """

    name: str
    inputs: Tensor
    probe: Tensor
    mask: Tensor | None

    def rows(self, values: Tensor) -> Tensor:
        """(rows, features) of the rows that count, of what has the shape of the layer's inputs or outputs."""
        return rows_of(values, self.mask)


@contextmanager
def observed(layers: Mapping[str, nn.Module], mask: Tensor | None) -> Iterator[list[Observed]]:
    """The calls of the layers in the pass that is made meanwhile, in their order.

    Args:
        layers: Modules, by name.
        mask: (n, L) which tokens count; None for all.
    """
    seen: list[Observed] = []

    def called(name: str, _module: nn.Module, given: Sequence[Any], named: Mapping[str, Any], made: Tensor) -> Tensor:
        inputs = given[0] if given else next(iter(named.values()))
        probe = torch.zeros_like(made, requires_grad=True)
        seen.append(Observed(name, rows_of(inputs, mask), probe, mask))
        return made + probe

    handles = [layer.register_forward_hook(partial(called, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], take: Take) -> Iterator[None]:
    def seen(name: str, _module: nn.Module, inputs: Sequence[Any], named: Mapping[str, Any]) -> None:
        take(name, inputs[0] if inputs else next(iter(named.values())))

    handles = [layer.register_forward_pre_hook(partial(seen, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mask_of(inputs: Inputs) -> Tensor | None:
    """(n, L) which tokens count, where the inputs say so."""
    mask = inputs.get(MASK) if isinstance(inputs, Mapping) else None
    return None if mask is None or mask.ndim != 2 else mask != 0


def rows_of(values: Tensor, mask: Tensor | None) -> Tensor:
    """(rows, features) of (..., features); the mask applies where it has a place for each row.

    That it has not for what a model makes of whole texts, or of a decoder's.
    """
    rows = values.detach().reshape(-1, values.shape[-1])
    tokens = mask is not None and (values.shape[:-1] == mask.shape or (values.ndim == 2 and len(rows) == mask.numel()))
    return rows[mask.reshape(-1)] if mask is not None and tokens else rows


def _take_rows(take: Take, mask: Tensor | None, name: str, values: Tensor) -> None:
    take(name, rows_of(values, mask))
