"""The torch module that candidates' weights are put into."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ecotone.fitness.callables import call
from ecotone.merging.models.architectures import loaded
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.settings import Call


def make(architecture: Call | Literal["auto"], sources: Sources, dtype: torch.dtype | None = None) -> nn.Module:
    """A module of the sources' architecture, its floating-point tensors in ``dtype`` (None: as it is made).

    Args:
        architecture: A function that returns the module, or ``auto`` for the class that the ``config.json`` of merges
            names (``Sources.configured``). Code that a checkpoint brings along is never run.
        sources: The models that are merged.
        dtype: Floating-point type.

    Raises:
        InputError: The function does not return a module; there is no ``config.json``; transformers is not
            installed or lacks the class.
    """
    if isinstance(architecture, Call):
        module = call(architecture, "architecture")
        if not isinstance(module, nn.Module):
            found = type(module).__name__
            raise InputError(f"architecture: expected {architecture.call} to return a torch module, found {found}.")
        return module if dtype is None else module.to(dtype)
    if architecture != "auto":
        raise InputError(f"architecture: expected 'auto' or a function, found {architecture!r}.")
    return loaded(sources.configured, dtype)
