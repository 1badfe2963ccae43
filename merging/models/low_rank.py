"""Flat tensors that an adapter forms from its base when they are read, a piece at a time.

The sum over the ranks is taken in their order, each product and each sum rounded once, then added to the base. So a
piece has the same bits however the tensor is cut and wherever it is formed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ecotone.merging.kernel import compiled
from ecotone.merging.kernel.lazy import SPAN, Source, formed
from ecotone.merging.kernel.materialise import CHUNK, DEVICE_SPAN


@dataclass(frozen=True, eq=False)
class LowRank:
    """A stretch of a flattened matrix ``base + left @ right`` that is formed when it is read.

    Args:
        base: (N,) of any floating-point type; it may itself be formed as it is read.
        left: (R, r) in the type in which it is formed.
        right: (r, C) of that type, contiguous.
        start: The stretch's position in the flattened (R, C) matrix.
        large: Whether it is part of a model large enough for compiled loops.
    """

    base: Source
    left: Tensor
    right: Tensor
    start: int = 0
    large: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The type in which it is formed."""
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        """The device on which it is formed."""
        return self.left.device

    def numel(self) -> int:
        """N."""
        return self.base.numel()

    def __getitem__(self, part: slice) -> LowRank:
        low, _, _ = part.indices(self.numel())
        return replace(self, base=self.base[part], start=self.start + low)

    def to(self, device: torch.device) -> LowRank:
        """The same on another device: the base's elements and the factors go there."""
        return replace(self, base=self.base.to(device), left=self.left.to(device), right=self.right.to(device))

    def formed(self) -> Tensor:
        """(N,) the elements."""
        out = formed(self.base).to(self.dtype, copy=True)
        here = out.device.type == "cpu"
        if not (here and self.large and compiled.add_product(out, self.left, self.right, self.start)):
            for rows, columns, part in _blocks(
                self.start, out.numel(), self.right.shape[1], CHUNK if here else DEVICE_SPAN
            ):
                left, right = self.left[rows], self.right[:, columns]
                total = left[:, :1] * right[:1]
                term = torch.empty_like(total)
                for k in range(1, right.shape[0]):
                    total += torch.mul(left[:, k : k + 1], right[k], out=term)
                out[part] += total.view(-1)
        return out


def _blocks(start: int, size: int, columns: int, span: int) -> Iterator[tuple[slice, slice, slice]]:
    """Rows, columns and place in the stretch of blocks of a matrix that together are ``size`` of its flat elements."""
    at = 0
    while at < size:
        row, column = divmod(start + at, columns)
        whole = min(size - at, span) // columns
        if column == 0 and whole:
            rows, across = whole, columns
        else:
            rows, across = 1, min(columns - column, size - at)
        yield slice(row, row + rows), slice(column, column + across), slice(at, at + rows * across)
        at += rows * across


@dataclass(frozen=True, eq=False)
class Scaled:
    """A stretch of a flattened matrix whose rows, or columns, are multiplied by numbers when it is read.

    Args:
        source: (N,) the stretch.
        factors: (R,) numbers for the rows, or (C,) for the columns, in the type of the source.
        columns: C.
        by_row: Whether the numbers are for the rows.
        start: The stretch's position in the flattened (R, C) matrix.
    """

    source: LowRank
    factors: Tensor
    columns: int
    by_row: bool
    start: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The type in which it is formed."""
        return self.source.dtype

    @property
    def device(self) -> torch.device:
        """The device on which it is formed."""
        return self.source.device

    def numel(self) -> int:
        """N."""
        return self.source.numel()

    def __getitem__(self, part: slice) -> Scaled:
        low, _, _ = part.indices(self.numel())
        return replace(self, source=self.source[part], start=self.start + low)

    def to(self, device: torch.device) -> Scaled:
        """The same on another device."""
        return replace(self, source=self.source.to(device), factors=self.factors.to(device))

    def formed(self) -> Tensor:
        """(N,) the elements."""
        out = self.source.formed()
        span = CHUNK if out.device.type == "cpu" else DEVICE_SPAN
        for rows, columns, part in _blocks(self.start, out.numel(), self.columns, span):
            factors = self.factors[rows, None] if self.by_row else self.factors[None, columns]
            block = out[part].view(rows.stop - rows.start, -1)
            block *= factors
        return out


def lengths(matrix: Source, columns: int, by_row: bool) -> Tensor:
    """The Euclidean lengths of the rows of a flattened (R, C) matrix, or of its columns, in its type.

    Squares are summed in float64, in their order by one thread, so the result has the same bits everywhere.
    """
    rows = matrix.numel() // columns
    squares = torch.zeros(rows if by_row else columns, dtype=torch.float64)
    step = max(1, SPAN // columns)
    for low in range(0, rows, step):
        piece = formed(matrix[low * columns : min(low + step, rows) * columns]).view(-1, columns).double().square()
        if by_row:
            squares[low : low + step] = torch.from_numpy(piece.numpy().sum(axis=1))
        else:
            squares += torch.from_numpy(piece.numpy().sum(axis=0))
    return squares.sqrt().to(matrix.dtype)
