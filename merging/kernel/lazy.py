"""Flat tensors that no file holds. They are computed when they are read, a piece at a time."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import torch
from torch import Tensor


class Lazy(Protocol):
    """A flat tensor of which any piece can be formed.

    A piece has the same bits however the tensor is cut and on whatever device it is formed.
    """

    @property
    def dtype(self) -> torch.dtype:
        """The type in which it is formed."""
        ...

    @property
    def device(self) -> torch.device:
        """The device on which it is formed."""
        ...

    def numel(self) -> int:
        """Its length."""
        ...

    def __getitem__(self, part: slice) -> Source:
        """A piece of the tensor, not yet formed."""
        ...

    def to(self, device: torch.device) -> Lazy:
        """The same tensor, formed on another device. Its inputs are copied there now."""
        ...

    def formed(self) -> Tensor:
        """The elements."""
        ...


Source: TypeAlias = Tensor | Lazy
"""A flat tensor, mapped or to be formed."""

SPAN = 1_048_576  # elements formed at a time where a whole tensor is wanted


def formed(source: Source) -> Tensor:
    """The elements of a flat tensor. Elements of a file are not copied."""
    return source if isinstance(source, Tensor) else source.formed()


def fill(out: Tensor, source: Source) -> None:
    """Write a flat tensor into one of its size, of any shape, floating-point type and device, a piece at a time."""
    flat = out.view(-1) if out.is_contiguous() else out.new_empty(out.numel())
    for low in range(0, flat.numel(), SPAN):
        flat[low : low + SPAN].copy_(formed(source[low : low + SPAN]))
    if not out.is_contiguous():
        out.copy_(flat.view(out.shape))
