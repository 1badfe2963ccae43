"""Where a conversion moves numbers, found out without any numbers.

A conversion stacks, joins, splits, transposes and reshapes tensors. ``traced`` runs it on tensors that hold nothing but
a list of *boxes*: parts of the tensor in which the position in a stored tensor is linear in the indices. Each operation
of PyTorch turns boxes into boxes, exactly and at the true shapes. So a layer's 256 experts of a billion numbers each
take as much memory as those of a toy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

MOST = 1 << 16
"""The most boxes of a tensor. A conversion that cuts it into more is not traced."""


class UntracedError(Exception):
    """An operation is none that only moves numbers, or cuts them too small."""


@dataclass(frozen=True)
class Side:
    """One axis of a box.

    Args:
        start: The first index in the tensor.
        length: How many indices there are.
        step: The step in the stored tensor from one to the next.
    """

    start: int
    length: int
    step: int


@dataclass(frozen=True)
class Box:
    """A part of a tensor, and where its numbers come from.

    Args:
        source: The number of the stored tensor.
        offset: The position in it, flattened, of the box's first number.
        sides: Its axes, which are those of the tensor.
    """

    source: int
    offset: int
    sides: tuple[Side, ...]

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(side.length for side in self.sides)


Boxes: TypeAlias = tuple[Box, ...]
Shape: TypeAlias = tuple[int, ...]


def contiguous(shape: Sequence[int]) -> Shape:
    """The strides of a tensor that lies in order, as PyTorch gives them."""
    return tuple(torch.empty(tuple(shape), device="meta").stride())


# -- operations on boxes -----------------------------------------------------------------------------------------


def _moved(box: Box, axis: int, by: int) -> Box:
    """The box at another place of a tensor."""
    sides = list(box.sides)
    sides[axis] = replace(sides[axis], start=sides[axis].start + by)
    return Box(box.source, box.offset, tuple(sides))


def _cut(box: Box, axis: int, start: int, stop: int) -> Box | None:
    """The part of a box between two indices of an axis, which are counted from ``start`` on; None for nothing."""
    side = box.sides[axis]
    first, last = max(side.start, start), min(side.start + side.length, stop)
    if first >= last:
        return None
    sides = list(box.sides)
    sides[axis] = Side(first - start, last - first, side.step)
    return Box(box.source, box.offset + (first - side.start) * side.step, tuple(sides))


def _sliced(boxes: Boxes, axis: int, start: int, stop: int) -> Boxes:
    return tuple(found for box in boxes if (found := _cut(box, axis, start, stop)) is not None)


def _dropped(boxes: Boxes, axes: Iterable[int]) -> Boxes:
    """Without axes of length 1."""
    gone = set(axes)
    return tuple(
        Box(box.source, box.offset, tuple(side for axis, side in enumerate(box.sides) if axis not in gone))
        for box in boxes
    )


def _widened(boxes: Boxes, axis: int) -> Boxes:
    """With one more axis, of length 1."""
    return tuple(Box(box.source, box.offset, (*box.sides[:axis], Side(0, 1, 0), *box.sides[axis:])) for box in boxes)


def _reshaped(boxes: Boxes, old: Shape, new: Shape) -> Boxes:
    """Of a tensor of the shape ``old``, seen as one of the shape ``new``."""
    if math.prod(old) != math.prod(new) or not math.prod(old):
        raise UntracedError("a reshape of other sizes")
    for first, last, sizes in _matched(old, new):
        boxes = _few(
            Box(part.source, part.offset, (*part.sides[:first], *sides, *part.sides[first + 1 :]))
            for box in boxes
            for part in _merged(box, first, old[first : first + last])
            for part, sides in _split(part, first, sizes)
        )
        old = (*old[:first], *sizes, *old[first + last :])
    return boxes


def _few(boxes: Iterable[Box]) -> Boxes:
    found: list[Box] = []
    for box in boxes:
        found.append(box)
        if len(found) > MOST:
            raise UntracedError("too many parts")
    return tuple(found)


def _matched(old: Shape, new: Shape) -> list[tuple[int, int, Shape]]:
    """The fewest axes that hold the same numbers in both shapes.

    Each is the number of its first axis (those before it are as in ``new``), how many of ``old`` it has, and the sizes
    that it has in ``new``.
    """
    found = []
    i = j = 0
    while i < len(old) or j < len(new):
        mine, theirs = [i], [j]
        left = old[i] if i < len(old) else 1
        right = new[j] if j < len(new) else 1
        i, j = i + (i < len(old)), j + (j < len(new))
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        found.append((theirs[0], i - mine[0], new[theirs[0] : j]))
    return found


def _merged(box: Box, first: int, sizes: Shape) -> list[Box]:
    """Boxes in which the axes from ``first`` on, of these sizes, are one."""
    if not sizes:
        return list(_widened((box,), first))
    parts = [box]
    for inner in reversed(range(1, len(sizes))):
        parts = [one for part in parts for one in _joined(part, first + inner - 1, math.prod(sizes[inner:]))]
    return parts


def _joined(box: Box, axis: int, size: int) -> list[Box]:
    """Boxes in which an axis and the next, which has ``size`` indices, are one."""
    outer, inner = box.sides[axis : axis + 2]
    if outer.length == 1:
        side = Side(outer.start * size + inner.start, inner.length, inner.step)
    elif inner.length == size and (size == 1 or outer.step == inner.step * size):
        side = Side(outer.start * size, outer.length * size, inner.step if size > 1 else outer.step)
    else:
        if outer.length > MOST:
            raise UntracedError("too many parts")
        rows = [_cut(box, axis, outer.start + row, outer.start + row + 1) for row in range(outer.length)]
        moved = [_moved(one, axis, outer.start + row) for row, one in enumerate(rows) if one is not None]
        return [part for one in moved for part in _joined(one, axis, size)]
    return [Box(box.source, box.offset, (*box.sides[:axis], side, *box.sides[axis + 2 :]))]


def _split(box: Box, axis: int, sizes: Shape) -> list[tuple[Box, tuple[Side, ...]]]:
    """Parts of a box, each with the sides of the axes of these sizes that its axis becomes."""
    side = box.sides[axis]
    if not sizes:
        return [(box, ())]
    if len(sizes) == 1:
        return [(box, (side,))]
    rest = math.prod(sizes[1:])
    row, last = side.start // rest, (side.start + side.length - 1) // rest
    if row == last:
        inside = _moved(box, axis, -row * rest)
        return [(part, (Side(row, 1, 0), *sides)) for part, sides in _split(inside, axis, sizes[1:])]
    if side.start % rest or side.length % rest:
        cuts = sorted({side.start, *((row + 1) * rest, last * rest), side.start + side.length})
        parts = [
            _moved(part, axis, begin)
            for begin, end in pairwise(cuts)
            if (part := _cut(box, axis, begin, end)) is not None
        ]
        return [one for part in parts for one in _split(part, axis, sizes)]
    sides = list(box.sides)
    sides[axis] = Side(0, rest, side.step)
    inside = Box(box.source, box.offset, tuple(sides))
    outer = Side(side.start // rest, side.length // rest, side.step * rest)
    return [(part, (outer, *inner)) for part, inner in _split(inside, axis, sizes[1:])]


# -- tensors -----------------------------------------------------------------------------------------------------


class Traced(Tensor):
    """A tensor without numbers that knows where they would come from.

    To PyTorch it lies in order, whatever was done to it.
    """

    boxes: Boxes

    @staticmethod
    def __new__(cls, shape: Sequence[int], boxes: Boxes) -> Traced:
        """A tensor of a shape that the boxes fill."""
        made: Traced = Tensor._make_wrapper_subclass(
            cls, tuple(shape), strides=contiguous(shape), dtype=torch.float32, device=torch.device("meta")
        )
        made.boxes = boxes
        return made

    def __init__(self, shape: Sequence[int], boxes: Boxes) -> None:
        """Made by ``__new__``."""

    @classmethod
    def of(cls, source: int, shape: Sequence[int]) -> Traced:
        """The stored tensor ``source``."""
        steps = contiguous(shape)
        sides = tuple(Side(0, length, step) for length, step in zip(shape, steps, strict=True))
        return cls(shape, (Box(source, 0, sides),))

    def __repr__(self) -> str:  # type: ignore[override]
        """Shape and boxes."""
        return f"Traced({tuple(self.shape)}, {self.boxes})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[Any, Any] | None = None
    ) -> Any:
        """One operation of PyTorch, or those that it is made of, as inference mode hands over whole ones."""
        run = _OPERATIONS.get(function)
        if run is not None:
            return run(*args, **(kwargs or {}))
        made = function.decompose(*args, **(kwargs or {}))
        if made is NotImplemented:
            raise UntracedError(str(function))
        return made


def _axis(tensor: Tensor, axis: int, more: int = 0) -> int:
    return axis % (tensor.dim() + more)


def _same(tensor: Traced, **_: Any) -> Traced:
    return Traced(tensor.shape, tensor.boxes)


def _cat(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    axis, at, boxes = _axis(tensors[0], dim), 0, list[Box]()
    for tensor in tensors:
        boxes += [_moved(box, axis, at) for box in tensor.boxes]
        at += tensor.shape[axis]
    shape = list(tensors[0].shape)
    shape[axis] = at
    return Traced(shape, tuple(boxes))


def _stack(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    return _cat([_unsqueeze(tensor, dim) for tensor in tensors], _axis(tensors[0], dim, 1))


def _unsqueeze(tensor: Traced, dim: int) -> Traced:
    axis = _axis(tensor, dim, 1)
    return Traced((*tensor.shape[:axis], 1, *tensor.shape[axis:]), _widened(tensor.boxes, axis))


def _squeeze(tensor: Traced, dim: int | Sequence[int] | None = None) -> Traced:
    named = range(tensor.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {axis for axis in (_axis(tensor, one) for one in named) if tensor.shape[axis] == 1}
    shape = [length for axis, length in enumerate(tensor.shape) if axis not in gone]
    return Traced(shape, _dropped(tensor.boxes, gone))


def _slice(tensor: Traced, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Traced:
    if step != 1:
        raise UntracedError("a slice with steps")
    axis = _axis(tensor, dim)
    begin, stop, _ = slice(start, end).indices(tensor.shape[axis])
    return _between(tensor, axis, begin, max(begin, stop))


def _between(tensor: Traced, axis: int, start: int, stop: int) -> Traced:
    shape = (*tensor.shape[:axis], stop - start, *tensor.shape[axis + 1 :])
    return Traced(shape, _sliced(tensor.boxes, axis, start, stop))


def _select(tensor: Traced, dim: int, index: int) -> Traced:
    axis = _axis(tensor, dim)
    place = index % tensor.shape[axis]
    part = _between(tensor, axis, place, place + 1)
    return Traced((*tensor.shape[:axis], *tensor.shape[axis + 1 :]), _dropped(part.boxes, [axis]))


def _unbind(tensor: Traced, dim: int = 0) -> list[Traced]:
    return [_select(tensor, dim, index) for index in range(tensor.shape[_axis(tensor, dim)])]


def _split_evenly(tensor: Traced, size: int, dim: int = 0) -> list[Traced]:
    axis = _axis(tensor, dim)
    length = tensor.shape[axis]
    return [_between(tensor, axis, start, min(start + size, length)) for start in range(0, length, size)]


def _split_sizes(tensor: Traced, sizes: Sequence[int], dim: int = 0) -> list[Traced]:
    axis, at, parts = _axis(tensor, dim), 0, []
    for size in sizes:
        parts.append(_between(tensor, axis, at, at + size))
        at += size
    return parts


def _permute(tensor: Traced, dims: Sequence[int]) -> Traced:
    order = [_axis(tensor, axis) for axis in dims]
    boxes = tuple(Box(box.source, box.offset, tuple(box.sides[axis] for axis in order)) for box in tensor.boxes)
    return Traced([tensor.shape[axis] for axis in order], boxes)


def _transpose(tensor: Traced, first: int, second: int) -> Traced:
    order = list(range(tensor.dim()))
    first, second = _axis(tensor, first), _axis(tensor, second)
    order[first], order[second] = order[second], order[first]
    return _permute(tensor, order)


def _transposed(tensor: Traced) -> Traced:
    return _permute(tensor, list(reversed(range(tensor.dim()))))


def _view(tensor: Traced, size: Sequence[int]) -> Traced:
    new = list(size)
    if -1 in new:
        new[new.index(-1)] = tensor.numel() // max(1, -math.prod(new))
    return Traced(new, _reshaped(tensor.boxes, tuple(tensor.shape), tuple(new)))


_ATEN = torch.ops.aten
_OPERATIONS: Mapping[Any, Callable[..., Any]] = {
    _ATEN.alias.default: _same,
    _ATEN.detach.default: _same,
    _ATEN.clone.default: _same,
    _ATEN.cat.default: _cat,
    _ATEN.stack.default: _stack,
    _ATEN.unsqueeze.default: _unsqueeze,
    _ATEN.squeeze.default: _squeeze,
    _ATEN.squeeze.dim: _squeeze,
    _ATEN.squeeze.dims: _squeeze,
    _ATEN.slice.Tensor: _slice,
    _ATEN.select.int: _select,
    _ATEN.unbind.int: _unbind,
    _ATEN.split.Tensor: _split_evenly,
    _ATEN.split_with_sizes.default: _split_sizes,
    _ATEN.permute.default: _permute,
    _ATEN.transpose.int: _transpose,
    _ATEN.t.default: _transposed,
    _ATEN.view.default: _view,
    _ATEN._unsafe_view.default: _view,
}


# -- from boxes to places ----------------------------------------------------------------------------------------


def view_of(shape: Sequence[int], box: Box, target: Sequence[int]) -> tuple[Shape, int] | None:
    """Strides and offset, in the target, of a stored tensor that one box holds whole; None if there is no such view.

    Args:
        shape: The stored tensor's shape.
        box: The box, of the target.
        target: The target's shape.
    """
    own, offset = contiguous(shape), sum(s.start * t for s, t in zip(box.sides, contiguous(target), strict=True))
    digits = [
        (side.step, side.length, step)
        for side, step in zip(box.sides, contiguous(target), strict=True)
        if side.length > 1
    ]
    edges = [step for step, length in zip(own, shape, strict=True) if length > 1]
    pieces = _digits(_together(sorted(digits, reverse=True)), edges)
    if pieces is None or box.offset:
        return None
    expected, strides = 1, dict[int, int]()
    ends = {step: step * length for step, length in zip(own, shape, strict=True) if length > 1}
    for step, length, there in reversed(pieces):
        if step != expected:
            return None
        if step in ends:
            strides[step] = there
            begin = step
        elif there != strides[begin] * (step // begin):
            return None
        expected = step * length
    if expected != math.prod(shape):
        return None
    return tuple(strides[step] if length > 1 else step for step, length in zip(own, shape, strict=True)), offset


def _together(digits: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Digits, largest step first, joined where two count on as one in both tensors."""
    found: list[tuple[int, int, int]] = []
    for step, length, there in digits:
        last = found[-1] if found else (0, 0, 0)
        if (last[0], last[2]) == (step * length, there * length):
            found[-1] = (step, last[1] * length, there)
        else:
            found.append((step, length, there))
    return found


def _digits(digits: Iterable[tuple[int, int, int]], edges: Iterable[int]) -> list[tuple[int, int, int]] | None:
    """Digits (step in the stored tensor, length, step in the target), cut at the edges; None where that cannot be."""
    found: list[tuple[int, int, int]] = []
    for step, length, there in digits:
        top = step * length
        for edge in sorted((edge for edge in edges if step < edge < top), reverse=True):
            if edge % step or top % edge:
                return None
            found.append((edge, top // edge, there * (edge // step)))
            top = edge
        found.append((step, top // step, there))
    return found


def covers(boxes: Sequence[Box], size: int) -> bool:
    """Whether boxes hold each of the ``size`` numbers of a stored tensor once.

    The positions p of a box are those of a product of arithmetic series, so the sum of x^p over them is a product of
    geometric series. It is the sum over all positions from 0 to ``size`` - 1, as a polynomial in x, only if each
    occurs once. Both are evaluated at fixed points of a field of 2^61 - 1 elements, where other polynomials of the
    degree agree at one point with a chance of ``size`` / 2^61 (Schwartz 1980, doi:10.1145/322217.322225).
    """
    if sum(box.size for box in boxes) != size:
        return False
    return all(
        sum(_sum_of_powers(point, box) for box in boxes) % _PRIME == _geometric(point, size) for point in _POINTS
    )


_PRIME = (1 << 61) - 1
_POINTS = (1_234_567_891_011, 987_654_321_123_456)


def _sum_of_powers(point: int, box: Box) -> int:
    found = pow(point, box.offset, _PRIME)
    for side in box.sides:
        found = found * _geometric(pow(point, side.step, _PRIME), side.length) % _PRIME
    return found


def _geometric(ratio: int, count: int) -> int:
    """1 + ratio + ... + ratio^(count - 1) in the field."""
    if ratio == 1:
        return count % _PRIME
    return (pow(ratio, count, _PRIME) - 1) * pow(ratio - 1, -1, _PRIME) % _PRIME
