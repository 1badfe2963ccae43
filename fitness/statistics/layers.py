"""Linear layers of a model, and the rows that reach them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
        with torch.no_grad(), _hooked(layers, partial(_take_rows, take, _mask(inputs))):
            outputs(model, inputs)


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


def _mask(inputs: Inputs) -> Tensor | None:
    """(n, L) which tokens count, where the inputs say so."""
    mask = inputs.get(MASK) if isinstance(inputs, Mapping) else None
    return None if mask is None or mask.ndim != 2 else mask != 0


def _take_rows(take: Take, mask: Tensor | None, name: str, values: Tensor) -> None:
    """Flatten (..., features) to rows; the mask applies where it has a place for each row.

    That it has not for what a model makes of whole texts, or of a decoder's.
    """
    rows = values.detach().reshape(-1, values.shape[-1])
    tokens = mask is not None and (values.shape[:-1] == mask.shape or (values.ndim == 2 and len(rows) == mask.numel()))
    take(name, rows[mask.reshape(-1)] if mask is not None and tokens else rows)
