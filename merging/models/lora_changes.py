"""What an adapter does to one tensor of its base, as PEFT merges it. Tensors are formed when they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ecotone.merging.kernel.lazy import Source, formed
from ecotone.merging.models.low_rank import LowRank, Scaled, lengths
from ecotone.merging.models.model import TensorInfo
from ecotone.merging.models.names import Place, Scattered
from ecotone.merging.models.vocabulary import Joined


class Weights(Protocol):
    """An adapter's own tensors, on disk or in memory."""

    @property
    def path(self) -> Path:
        """Where they come from, for messages."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """By name, their shapes and types."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name``."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Tensors in memory.

    Args:
        path: What they are called in messages.
        held: By name, the tensors.
    """

    path: Path
    held: Mapping[str, Tensor]

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """By name, their shapes and types."""
        return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self.held.items()}

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name``."""
        return self.held[name]


class Change(Protocol):
    """A change of one tensor."""

    @property
    def replaces(self) -> bool:
        """Whether the tensor before the change does not matter."""
        ...

    def info(self, before: TensorInfo, weights: Weights) -> TensorInfo:
        """Shape and type of the changed tensor."""
        ...

    def over(self, before: Source, weights: Weights, large: bool) -> Source:
        """The changed tensor, flat.

        Args:
            before: The tensor before the change.
            weights: The adapter's own tensors.
            large: Whether the model is large enough for compiled loops.
        """
        ...

    def working_bytes(self, after: TensorInfo, weights: Weights) -> int:
        """Bytes of main memory that reading takes, those of the tensor before the change left out."""
        ...


def kind_of(dtype: torch.dtype) -> torch.dtype:
    """The type in which a tensor of a base is changed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Update:
    """The low-rank update of a module's tensor, as an adapter stores it: ``scale * B @ A``.

    Of a stack of experts there is one for each: their ranks are stored together, those of ``A`` expert by expert and
    those of ``B`` rank by rank.

    Args:
        module: PEFT's name of the module.
        target: The module's tensor.
        a: Name of the stored (E r, C) factor; a convolution's has more axes.
        b: Name of the stored (R, r E) factor.
        scale: The number that the product is multiplied by.
        transposed: Whether the product is the tensor's transpose.
        experts: E.
        parameter: Whether the tensor was chosen as a parameter, and not as the weight of a module.
    """

    module: str
    target: str
    a: str
    b: str
    scale: float
    transposed: bool = False
    experts: int = 1
    parameter: bool = False

    def rank(self, weights: Weights) -> int:
        """r, for one expert."""
        return weights.tensors[self.a].shape[0] // self.experts

    def shape(self, weights: Weights) -> tuple[int, int, int]:
        """(E, R, C) of the module's tensor."""
        a, b = weights.tensors[self.a].shape, weights.tensors[self.b].shape
        product = (b[0], math.prod(a[1:]))
        return (self.experts, *(product[::-1] if self.transposed else product))

    def factors(self, weights: Weights, kind: torch.dtype, expert: int = 0) -> tuple[Tensor, Tensor]:
        """(R, r) with the scale in it and (r, C), of one expert."""
        a, b = weights.tensor(self.a), weights.tensor(self.b)
        rank = self.rank(weights)
        left = b.reshape(len(b), rank, self.experts)[..., expert].to(kind)
        right = a.reshape(self.experts, rank, -1)[expert].to(kind)
        if self.transposed:
            left, right = right.T, left.T
        return left * self.scale, right

    def working_bytes(self, weights: Weights, kind: torch.dtype) -> int:
        """Bytes of the factors of all experts in the type in which they are multiplied."""
        return kind.itemsize * (weights.tensors[self.a].size + weights.tensors[self.b].size)


@dataclass(frozen=True)
class Part:
    """A part of one matrix of a module's tensor.

    Args:
        expert: The matrix, where there is a stack of them.
        rows: Its rows.
        columns: Its columns.
        flipped: Whether the part is stored with its columns as rows.
    """

    expert: int = 0
    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))
    flipped: bool = False


@dataclass(frozen=True)
class Added:
    """A low-rank product is added.

    Args:
        update: The update of the module's tensor.
        parts: The parts of it that make up the checkpoint's tensor, one after the other.
    """

    update: Update
    parts: tuple[Part, ...] = (Part(),)
    replaces = False

    def info(self, before: TensorInfo, weights: Weights) -> TensorInfo:
        """The shape before, in the type in which it is formed."""
        return TensorInfo(before.shape, kind_of(before.dtype))

    def over(self, before: Source, weights: Weights, large: bool) -> Source:
        """The sum, formed a piece at a time."""
        pieces: list[Source] = []
        start = 0
        for part in self.parts:
            left, right = self._factors(part, weights, kind_of(before.dtype))
            size = left.shape[0] * right.shape[1]
            pieces.append(LowRank(before[start : start + size], left, right, large=large))
            start += size
        return pieces[0] if len(pieces) == 1 else Joined(tuple(pieces))

    def working_bytes(self, after: TensorInfo, weights: Weights) -> int:
        """The factors."""
        return self.update.working_bytes(weights, after.dtype)

    def _factors(self, part: Part, weights: Weights, kind: torch.dtype) -> tuple[Tensor, Tensor]:
        left, right = self.update.factors(weights, kind, part.expert)
        left, right = left[part.rows], right[:, part.columns]
        if part.flipped:
            left, right = right.T, left.T
        return left.contiguous(), right.contiguous()


@dataclass(frozen=True)
class Elements:
    """A low-rank product is added to elements that are no rectangle of the module's tensor. They are formed whole.

    Args:
        update: The update of the module's tensor.
        spot: Where the checkpoint's tensor lies in it.
    """

    update: Update
    spot: Place | Scattered
    replaces = False

    def info(self, before: TensorInfo, weights: Weights) -> TensorInfo:
        """The shape before, in the type in which it is formed."""
        return TensorInfo(before.shape, kind_of(before.dtype))

    def over(self, before: Source, weights: Weights, large: bool) -> Source:
        """The sum."""
        out = formed(before).to(kind_of(before.dtype), copy=True)
        there, here = self.spot.positions(self.update.target)
        _, rows, columns = self.update.shape(weights)
        expert, rest = there // (rows * columns), there % (rows * columns)
        for one in sorted(set(expert.tolist())):
            chosen = torch.nonzero(expert == one).view(-1)
            row, column = rest[chosen] // columns, rest[chosen] % columns
            left, right = self.update.factors(weights, out.dtype, one)
            total = left[row, 0] * right[0, column]
            for k in range(1, right.shape[0]):
                total += left[row, k] * right[k, column]
            out[here[chosen]] += total
        return out

    def working_bytes(self, after: TensorInfo, weights: Weights) -> int:
        """The tensor, positions and products of all of its elements, and the factors."""
        return 8 * 8 * after.size + self.update.working_bytes(weights, after.dtype)


@dataclass(frozen=True)
class Normed:
    """A low-rank product is added, and rows are then given lengths of the adapter's own (DoRA, Liu et al. 2024).

        W' = m * (W + scale * B @ A) / ||W + scale * B @ A||      (arXiv:2402.09353, equation 5)

    The lengths of the sum are found once, in a pass over the tensor; then pieces are formed like those of ``Added``.

    Args:
        update: The update; rows of the transpose are columns of the tensor.
        magnitudes: Name of the (R,) lengths.
        known: Keeps what the rows are multiplied by, by type.
    """

    update: Update
    magnitudes: str
    known: dict[torch.dtype, Tensor] = field(default_factory=dict, compare=False, repr=False)
    replaces = False

    def info(self, before: TensorInfo, weights: Weights) -> TensorInfo:
        """The shape before, in the type in which it is formed."""
        return TensorInfo(before.shape, kind_of(before.dtype))

    def over(self, before: Source, weights: Weights, large: bool) -> Source:
        """The product of numbers and rows, formed a piece at a time."""
        kind = kind_of(before.dtype)
        left, right = (factor.contiguous() for factor in self.update.factors(weights, kind))
        summed = LowRank(before, left, right, large=large)
        columns, by_row = right.shape[1], not self.update.transposed
        if kind not in self.known:
            wanted = weights.tensor(self.magnitudes).reshape(-1).to(kind)
            self.known[kind] = wanted / lengths(summed, columns, by_row)
        return Scaled(summed, self.known[kind], columns, by_row)

    def working_bytes(self, after: TensorInfo, weights: Weights) -> int:
        """The factors, and the numbers that rows are multiplied by."""
        own = after.dtype.itemsize * weights.tensors[self.magnitudes].size
        return self.update.working_bytes(weights, after.dtype) + own


@dataclass(frozen=True)
class Shifted:
    """A vector is added: the bias of an adapter's own.

    Args:
        key: Name of the stored vector.
        scale: The number that it is multiplied by.
        target: The module's tensor.
        spot: Where the checkpoint's tensor lies in it; None where it is the whole of it.
    """

    key: str
    scale: float
    target: str = ""
    spot: Place | Scattered | None = None
    replaces = False

    def info(self, before: TensorInfo, weights: Weights) -> TensorInfo:
        """The shape before, in the type in which it is formed."""
        return TensorInfo(before.shape, kind_of(before.dtype))

    def over(self, before: Source, weights: Weights, large: bool) -> Source:
        """The sum, formed a piece at a time."""
        kind = kind_of(before.dtype)
        vector = _cut(weights.tensor(self.key).reshape(-1), self.target, self.spot).to(kind)
        return LowRank(before, (vector.reshape(-1, 1) * self.scale).contiguous(), vector.new_ones(1, 1), large=large)

    def working_bytes(self, after: TensorInfo, weights: Weights) -> int:
        """The vector."""
        return after.dtype.itemsize * after.size


@dataclass(frozen=True)
class Kept:
    """A tensor that the adapter stores takes the place of the base's.

    Args:
        key: Name of the stored tensor.
        target: The module's tensor.
        spot: Where the checkpoint's tensor lies in it; None where it is the whole of it.
    """

    key: str
    target: str = ""
    spot: Place | Scattered | None = None
    replaces = True

    def info(self, before: TensorInfo, weights: Weights) -> TensorInfo:
        """The shape before (or, of a vocabulary, the stored one), in the type in which it is stored."""
        stored = weights.tensors[self.key]
        return stored if self.spot is None else TensorInfo(before.shape, stored.dtype)

    def over(self, before: Source, weights: Weights, large: bool) -> Source:
        """The stored tensor, mapped where it is all of one."""
        return _cut(weights.tensor(self.key), self.target, self.spot).reshape(-1)

    def working_bytes(self, after: TensorInfo, weights: Weights) -> int:
        """None where it is mapped."""
        return 0 if self.spot is None else after.nbytes


@dataclass(frozen=True)
class Rows:
    """Rows that the adapter stores take the place of the base's: those of trained tokens.

    Args:
        key: Name of the stored (n, D) rows.
        tokens: (n,) the rows' numbers.
        target: The module's tensor.
    """

    key: str
    tokens: tuple[int, ...]
    target: str = ""
    replaces = False

    def info(self, before: TensorInfo, weights: Weights) -> TensorInfo:
        """The shape before, in the type of both, or in the one in which sums of them are taken."""
        stored = weights.tensors[self.key].dtype
        return before if stored == before.dtype else TensorInfo(before.shape, kind_of(before.dtype))

    def over(self, before: Source, weights: Weights, large: bool) -> Source:
        """The rows that stay and those that are replaced, one after the other."""
        stored = weights.tensor(self.key)
        stored = stored if stored.dtype == before.dtype else stored.to(kind_of(before.dtype))
        width = stored.shape[1]
        parts: list[Source] = []
        end = 0
        for number, row in sorted(zip(self.tokens, range(len(stored)), strict=True)):
            if number > end:
                parts.append(before[end * width : number * width])
            parts.append(stored[row])
            end = number + 1
        if end * width < before.numel():
            parts.append(before[end * width :])
        return Joined(tuple(parts))

    def working_bytes(self, after: TensorInfo, weights: Weights) -> int:
        """None: rows are mapped."""
        return 0


def parts_of(spot: Place, matrices: tuple[int, int, int]) -> tuple[Part, ...] | None:
    """The parts of (E, R, C) matrices that a place is, one after the other; None if it is no such parts."""
    _, rows, columns = matrices
    assert spot.stride is not None
    axes: list[tuple[str, int, int]] = []  # along what, how many, and in which steps
    for length, step in zip(spot.shape, spot.stride, strict=True):
        if length > 1:
            unit = rows * columns if step and step % (rows * columns) == 0 else columns if step % columns == 0 else 1
            axes.append(("e" if unit == rows * columns else "r" if unit == columns else "c", length, step // unit))
    expert, rest = divmod(spot.offset, rows * columns)
    row, column = divmod(rest, columns)
    stack = range(expert, expert + 1)
    if axes and axes[0][0] == "e":
        _, count, step = axes.pop(0)
        stack = range(expert, expert + count * step, step)
    along = "".join(kind for kind, _, _ in axes)
    if along not in ("rc", "cr") or not all(step for _, _, step in axes):
        return None
    spans = {kind: (length, step) for kind, length, step in axes}
    if row + (spans["r"][0] - 1) * spans["r"][1] >= rows or column + (spans["c"][0] - 1) * spans["c"][1] >= columns:
        return None
    cut = {
        kind: slice(start, start + (spans[kind][0] - 1) * spans[kind][1] + 1, spans[kind][1])
        for kind, start in (("r", row), ("c", column))
    }
    return tuple(Part(one, cut["r"], cut["c"], along == "cr") for one in stack)


def _cut(tensor: Tensor, target: str, spot: Place | Scattered | None) -> Tensor:
    """The part of a module's tensor that a checkpoint's tensor is."""
    if spot is None:
        return tensor
    if isinstance(spot, Place):
        return spot.of(tensor.contiguous())
    return spot.take({target: tensor}, tensor)


Changes = Mapping[str, tuple[Change, ...]]
"""By tensor of a base, what an adapter does to it, one after the other."""
