"""Labelled examples for an objective, checked before the first candidate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fitness.callables import call
from fitness.specs import CallSpec
from populations.errors import InputError


def labelled(spec: CallSpec, field: str) -> tuple[Tensor, Tensor]:
    """Inputs (N, ...) and labels (N,) that the function of ``spec`` returns as tensors or arrays.

    Args:
        spec: The function and its arguments.
        field: Where the user wrote it, for error messages.

    Raises:
        InputError: It cannot be called, or what it returns is not a pair of N inputs and N integer labels.
    """
    made = call(spec, field)
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        raise InputError(f"{field}: expected {spec.call} to return (inputs, labels), found {_kind(made)}.")
    inputs, labels = _tensor(made[0], f"{field}: inputs"), _tensor(made[1], f"{field}: labels")
    check_labelled(inputs, labels, field)
    return inputs, labels


def check_labelled(inputs: Tensor, labels: Tensor, field: str) -> None:
    """Raise ``InputError`` unless inputs are (N, ...), N >= 1, and labels (N,) integers that are not negative."""
    if inputs.ndim < 1 or inputs.shape[0] == 0:
        raise InputError(f"{field}: inputs: expected shape (N, ...) with N >= 1, found {tuple(inputs.shape)}.")
    if labels.shape != (inputs.shape[0],):
        raise InputError(
            f"{field}: labels: expected shape ({inputs.shape[0]},), one an input, found {tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"{field}: labels: expected integers, found {labels.dtype}.", "Convert them with .long().")
    if int(labels.min()) < 0:
        raise InputError(f"{field}: labels: expected class numbers from 0, found {int(labels.min())}.")
    if inputs.is_floating_point() and not bool(torch.isfinite(inputs).all()):
        raise InputError(f"{field}: inputs: expected finite numbers, found NaN or infinity.")


def _tensor(values: Any, field: str) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{field}: expected a tensor or an array, found {_kind(values)} ({error}).") from error


def _kind(value: Any) -> str:
    size = f" of {len(value)}" if isinstance(value, (tuple, list, dict)) else ""
    return f"{type(value).__name__}{size}"
