"""Gradient checkpointing: layers compute their activations again on the way back instead of keeping them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ecotone.populations.errors import InputError


def layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a Hugging Face model that may be checkpointed.

    Raises:
        InputError: There are none: it is not a model of transformers, or of one whose layers cannot.
    """
    try:
        from transformers.modeling_layers import GradientCheckpointingLayer
    except ImportError:
        found = []
    else:
        found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise InputError(
            "checkpointing: expected a Hugging Face model whose layers can be checkpointed, "
            f"found {type(model).__name__}.",
            "Switch it off, or use a transformers release (4.53 or later) whose layers of this model can.",
        )
    return found


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Checkpoint each layer while the context lasts.

    transformers does this in training mode only, which in many models also switches dropout on. Here the layers stay
    in evaluation mode, so the loss and its gradient are the ones without checkpointing. Key and value caches, which a
    second run of a layer would spoil, are off meanwhile.

    Raises:
        InputError: The model has no such layers.
    """
    chosen = layers(model)
    before = [vars(layer).get("forward") for layer in chosen]
    caching = [config for config in _configs(model) if config.use_cache]
    try:
        for layer in chosen:
            layer.forward = partial(_again, layer.forward)
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True
        for layer, forward in zip(chosen, before, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward


def _again(forward: Any, *inputs: Any, **options: Any) -> Any:
    """``forward`` of the inputs, to be run a second time when its gradient is wanted."""
    return checkpoint(partial(forward, **options), *inputs, use_reentrant=False)


def _configs(model: nn.Module) -> list[Any]:
    """The configurations in the model that say whether to cache, each once."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in configs if hasattr(config, "use_cache")}.values())
