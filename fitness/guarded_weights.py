"""The tensors of a guarded model: whether user code wrote into them, gave them other memory, hooks or gradients.

``ecotone.fitness.guards`` tells what is certain and what is likely.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import attrgetter, methodcaller
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from xxhash import xxh3_64_intdigest

PLACES = 32
"""Elements of a tensor that are compared after a call."""
WHOLE = 1024**2
"""Bytes of the largest tensor that a copy is kept of, if no merge rewrites it."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SEEN = attrgetter("requires_grad", "grad", "_backward_hooks", "_post_accumulate_grad_hooks", "dtype", "shape")
_address = methodcaller("data_ptr")
_version = attrgetter("_version")

Sample: TypeAlias = list[Tensor]


class Weights:
    """The parameters and buffers of a model, or the tensors of a dict.

    Args:
        model: A module, or a dict of tensors.
        rewritten: The ids of those that the next merge writes whole; None are all parameters.
    """

    def __init__(self, model: nn.Module | Mapping[str, Tensor], rewritten: Collection[int] | None = None) -> None:
        named = _tensors(model)
        own = {id(tensor) for tensor in named.values() if isinstance(tensor, nn.Parameter)}
        known = own if rewritten is None and isinstance(model, nn.Module) else rewritten
        merged = {name: one for name, one in named.items() if known is None or id(one) in known}
        self._names = [*named]
        self._tensors = [*named.values()]
        self._counted = [not tensor.is_inference() for tensor in self._tensors]
        self._seen = [*map(_SEEN, self._tensors)]
        self._held = [tensor.data for tensor in self._tensors]  # the memory that they have, whatever is done to them
        self._merged = [*merged.values()]
        fixed = {name: one for name, one in named.items() if name not in merged}
        self._copies = {name: (one, one.detach().clone()) for name, one in fixed.items() if one.nbytes <= WHOLE}
        large = {name: one for name, one in fixed.items() if name not in self._copies}
        self._large = [(name, one, _sample(_views([one]))) for name, one in large.items()]
        self._addresses: list[int] = []
        self._versions: list[int] = []
        self._viewed: list[int] = []  # the addresses that the views are of
        self._views: list[list[Tensor]] = []
        self._sampled: Sample | None = None
        self._digest: int | None = None
        self.note()

    def note(self) -> None:
        """A candidate's weights have been put in: from now on nothing may write into them."""
        self._addresses = [*map(_address, self._tensors)]
        self._versions = self._count()
        self._sampled = self._digest = None

    def watch(self, *, whole: bool) -> None:
        """Remember elements of the merged weights, or a hash of the whole of them, for the next ``changed``."""
        if self._sampled is None:
            if self._viewed != self._addresses:
                self._views, self._viewed = _views(self._merged), self._addresses
            self._sampled = _sample(self._views)
        if not whole:
            self._digest = None
        elif self._digest is None:
            self._digest = self.digest()

    def same(self) -> bool:
        """Whether memory, types, flags, hooks, gradients and versions are as noted, quickly."""
        return (
            [*map(_address, self._tensors)] == self._addresses
            and self._count() == self._versions
            and _alike([*map(_SEEN, self._tensors)], self._seen)
        )

    def changed(self) -> list[str]:
        """Names of the tensors that were written into or have other memory: a guess where only elements tell."""
        now, counts = [*map(_address, self._tensors)], self._count()
        found = [
            name
            for name, tensor, address, before, count, counted, seen in zip(
                self._names, self._tensors, now, self._addresses, counts, self._versions, self._seen, strict=True
            )
            if address != before or count != counted or (tensor.dtype, tensor.shape) != seen[-2:]
        ]
        if found or self._sampled is None:
            return found
        whole = self._digest is not None and self._digest != self.digest()
        if whole or not _equal(self._sampled, _sample(self._views)):
            return [self._names[0]] if len(self._names) == 1 else ["not told which"]
        return []

    def spoilt(self) -> tuple[list[str], str]:
        """Tensors that no merge rewrites and that hold something else: put back where a copy is kept.

        Returns:
            Their names, and that of a larger one, of which there is no copy; empty if none differs.
        """
        found = []
        for name, (tensor, copy) in self._copies.items():
            if tensor.dtype != copy.dtype or tensor.shape != copy.shape or not _equal([_bits(tensor)], [_bits(copy)]):
                found.append(name)
                if (tensor.dtype, tensor.shape) == (copy.dtype, copy.shape):
                    tensor.data.copy_(copy)
                else:
                    tensor.data = copy.clone()
        large = (name for name, tensor, sample in self._large if not _equal(sample, _sample(_views([tensor]))))
        return found, next(large, "")

    def put_back(self, *, noted: bool) -> list[tuple[str, str]]:
        """Give tensors their memory, flags, hooks and gradients back; returns kinds of changes, and names.

        Args:
            noted: Whether ``note`` was called for the weights that are shown; else only another type or shape tells
                that their memory is not theirs.
        """
        found = []
        rows = zip(self._names, self._tensors, self._seen, self._held, self._addresses, strict=True)
        for name, tensor, (asks, gradient, hooks, later, kind, shape), held, address in rows:
            other = (tensor.dtype, tensor.shape) != (kind, shape)
            moved = other or (noted and tensor.data_ptr() != address)
            if moved and (not noted or held.data_ptr() == address):
                tensor.data = held
            if other and not noted:
                found.append(("weights", name))
            if tensor.grad is not gradient or tensor.requires_grad != asks:
                tensor.grad = None if moved else gradient
                tensor.requires_grad_(asks)
                found.append(("gradients", name))
            present = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
            if present != (hooks, later):
                tensor._backward_hooks, tensor._post_accumulate_grad_hooks = hooks, later
                if any(one and one != before for one, before in zip(present, (hooks, later), strict=True)):
                    found.append(("hooks", name))  # one that was removed, as our own are, leaves an empty dict
        return found

    def digest(self, *, keep: bool = False) -> int:
        """A hash of all bits of the merged weights. On a GPU it is made of sums, which the order hardly changes.

        Args:
            keep: It is that of the weights as they should be, for ``watch`` and ``changed``.
        """
        found = []
        for tensor in self._merged:
            bits = _bits(tensor)
            if bits.device.type == "cpu":
                found.append(xxh3_64_intdigest(bits.contiguous().numpy().data))
            else:
                flat = bits.reshape(-1)
                found += [int(flat.sum(dtype=torch.int64)), int(flat[::3].sum(dtype=torch.int64))]
        digest = hash(tuple(found))
        self._digest = digest if keep else self._digest
        return digest

    def _count(self) -> list[int]:
        if all(self._counted):
            return [*map(_version, self._tensors)]
        return [one._version if counted else 0 for one, counted in zip(self._tensors, self._counted, strict=True)]


def _tensors(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model, each under its first name."""
    if isinstance(model, nn.Module):
        found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    else:
        found = dict(model)
    first: dict[int, str] = {}
    return {name: one for name, one in found.items() if first.setdefault(id(one), name) == name}


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers: NaN equals itself, and 0 is not -0."""
    flat = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return flat.view(_INTEGERS[flat.element_size()])


def _views(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Views of at most ``PLACES`` elements, evenly spread, of each tensor: lists of one type and device."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        bits = _bits(tensor)
        flat = bits.reshape(-1) if bits.is_contiguous() else bits[(0,) * (bits.ndim - 1)]
        step = -(-flat.numel() // PLACES)
        groups.setdefault((flat.dtype, flat.device), []).append(flat[::step])
    return [*groups.values()]


def _sample(views: Sequence[Sequence[Tensor]]) -> Sample:
    return [torch.cat(tuple(group)) for group in views]


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def _alike(some: Sequence[Any], others: Sequence[Any]) -> bool:
    try:
        return some == others
    except RuntimeError:  # two gradients are compared
        return False
