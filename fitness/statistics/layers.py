"""Linear layers and convolutions of a model, and the rows that reach them."""

from __future__ import annotations

import contextlib
import math
import re
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


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The classes of convolutions."""


def observable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers, and convolutions that map each patch of their inputs by one matrix, by name."""
    linear = linear_layers(model)
    return {name: module for name, module in model.named_modules() if name in linear or _is_plain(module)}


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a convolution of one group, without dilation, padded with zeros by numbers."""
    return (
        isinstance(module, CONVOLUTIONS)
        and module.groups == 1
        and set(module.dilation) == {1}
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def input_rows(layer: nn.Module, values: Tensor, mask: Tensor | None) -> Tensor:
    """(rows, in) of a layer's inputs. A convolution has a row for each patch: (channels * kernel) numbers."""
    if not isinstance(layer, CONVOLUTIONS):
        return rows_of(values, mask)
    kernel, stride = layer.kernel_size, layer.stride
    batched = values.detach() if values.ndim == len(kernel) + 2 else values.detach().unsqueeze(0)
    padding = [side for side in reversed(layer.padding) if isinstance(side, int)]
    sides = [side for one in padding for side in (one, one)]
    patches = nn.functional.pad(batched, sides)
    for place, (size, step) in enumerate(zip(kernel, stride, strict=True), 2):
        patches = patches.unfold(place, size, step)
    spatial = list(range(2, 2 + len(kernel)))
    order = [0, *spatial, 1, *range(2 + len(kernel), 2 + 2 * len(kernel))]
    return patches.permute(order).reshape(-1, batched.shape[1] * math.prod(kernel))


def output_rows(layer: nn.Module, values: Tensor, mask: Tensor | None) -> Tensor:
    """(rows, out) of a layer's outputs, or of what has their shape."""
    if not isinstance(layer, CONVOLUTIONS):
        return rows_of(values, mask)
    batched = values.detach() if values.ndim == len(layer.kernel_size) + 2 else values.detach().unsqueeze(0)
    return batched.movedim(1, -1).reshape(-1, batched.shape[1])


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


def taking(layers: Mapping[str, nn.Module], masks: Masks, take: Take) -> contextlib.AbstractContextManager[None]:
    """Give ``take`` the inputs of the layers in the passes that are made meanwhile.

    Args:
        layers: Modules, by name.
        masks: Which tokens count.
        take: As for ``observe``.
    """
    return _hooked(layers, masks, take)


@dataclass(frozen=True, eq=False)
class Observed:
    """One call of a layer in a pass whose graph is kept.

    Args:
        name: The layer's name.
        inputs: (rows, in) its inputs.
        probe: Zeros that were added to its outputs: a loss's gradient by them is that by the outputs.
        layer: The layer.
        mask: Which tokens count; None for all.
    """

    name: str
    inputs: Tensor
    probe: Tensor
    layer: nn.Module
    mask: Tensor | None

    def rows(self, values: Tensor) -> Tensor:
        """(rows, out) of the rows that count, of what has the shape of the layer's outputs."""
        return output_rows(self.layer, values, self.mask)


@contextmanager
def observed(layers: Mapping[str, nn.Module], masks: Masks) -> Iterator[list[Observed]]:
    """The calls of the layers in the pass that is made meanwhile, in their order.

    Args:
        layers: Modules, by name.
        masks: Which tokens count.
    """
    seen: list[Observed] = []

    def called(name: str, layer: nn.Module, given: Sequence[Any], named: Mapping[str, Any], made: Tensor) -> Tensor:
        inputs = given[0] if given else next(iter(named.values()))
        probe = torch.zeros_like(made, requires_grad=True)
        mask = masks.of(name)
        seen.append(Observed(name, input_rows(layer, inputs, mask), probe, layer, mask))
        return made + probe

    handles = [layer.register_forward_hook(partial(called, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], masks: Masks, take: Take) -> Iterator[None]:
    def seen(name: str, layer: nn.Module, inputs: Sequence[Any], named: Mapping[str, Any]) -> None:
        take(name, input_rows(layer, inputs[0] if inputs else next(iter(named.values())), masks.of(name)))

    handles = [layer.register_forward_pre_hook(partial(seen, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class Masks:
    """Which tokens of a batch count.

    Args:
        tokens: (n, L) those of the inputs; None for all.
        decoder: (n, L) those of a decoder's inputs, where an encoder has inputs of its own; None for all.
        apart: Whether a decoder has inputs of its own.
    """

    tokens: Tensor | None = None
    decoder: Tensor | None = None
    apart: bool = False

    def of(self, name: str) -> Tensor | None:
        """The mask of a layer's rows, by the layer's name. Keys and values of cross-attention are the encoder's."""
        if not self.apart or not _DECODER.search(name) or (_CROSS.search(name) and _KEYS.search(name)):
            return self.tokens
        return self.decoder

    @property
    def predictions(self) -> Tensor | None:
        """The mask of predictions by token."""
        return self.decoder if self.apart else self.tokens


_DECODER = re.compile(r"(^|\.)decoder(\.|$)")
_CROSS = re.compile(r"(^|\.)(EncDecAttention|encoder_attn|crossattention|cross_attn)(\.|$)")
_KEYS = re.compile(r"(^|\.)(k|v|k_proj|v_proj|key|value)$")


def mask_of(inputs: Inputs) -> Masks:
    """Which tokens count, where the inputs say so."""
    if not isinstance(inputs, Mapping):
        return Masks()
    found = [inputs.get(name) for name in (MASK, f"decoder_{MASK}")]
    tokens, decoder = (None if one is None or one.ndim != 2 else one != 0 for one in found)
    return Masks(tokens, decoder, any(name.startswith("decoder_") for name in inputs))


def rows_of(values: Tensor, mask: Tensor | None) -> Tensor:
    """(rows, features) of (..., features); the mask applies where it has a place for each row.

    That it has not for what a model makes of whole texts, or of a decoder's.
    """
    rows = values.detach().reshape(-1, values.shape[-1])
    tokens = mask is not None and (values.shape[:-1] == mask.shape or (values.ndim == 2 and len(rows) == mask.numel()))
    return rows[mask.reshape(-1)] if mask is not None and tokens else rows
