"""Which tensors of a checkpoint make up which tensors of a module.

A checkpoint's names are often not its module's. transformers renames tensors when it loads them, adds or removes the
prefix of the base model, stacks the experts of a mixture, fuses and splits projections, and converts all of it back
when it saves. Its own registry of these conversions is followed here, so every family that it knows is known.

Merges are made in the checkpoints' names and layout. Each of their tensors has a ``Place`` in the module: a part of one
of its tensors. Conversions only move numbers. So a conversion is found out once, on tensors that know where their
numbers come from (``ecotone.merging.models.moves``). Afterwards merged values are written into views of the module's
tensors, and gradients are read from such views.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ecotone.merging.models.moves import Box, Traced, UntracedError, contiguous, covers, view_of
from ecotone.populations.errors import InputError, nearest, told

if TYPE_CHECKING:
    from ecotone.merging.models.layout import Layout

Shapes = Mapping[str, tuple[int, ...]]

COUNTED = 1 << 27
"""The most numbers of a group whose places are found by counting them, where its conversion cannot be traced."""

_OWN_MODULE = "Give the architecture as a function (package.module:function) that returns the module."


@dataclass(frozen=True)
class Place:
    """The part of a module's tensor that a tensor of a checkpoint goes into.

    Args:
        name: The checkpoint's tensor.
        target: The module's tensor.
        shape: The shape of the checkpoint's tensor.
        stride: Its strides in the target, which is contiguous; None where they are those of a tensor by itself.
        offset: Its first element in the target.
    """

    name: str
    target: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    offset: int = 0

    @property
    def whole(self) -> bool:
        """Whether it is the whole of the target, as it is."""
        return self.stride is None

    def of(self, tensor: Tensor) -> Tensor:
        """The place in ``tensor``, which is the target or has its shape: a view."""
        if self.stride is None:
            return tensor
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)

    def positions(self, target: str) -> tuple[Tensor, Tensor]:
        """(n,) positions in ``target``, the module's tensor, and (n,) the positions of the same elements here."""
        stride = contiguous(self.shape) if self.stride is None else self.stride
        return _positions(self.shape, (stride, self.offset)), torch.arange(math.prod(self.shape))


@dataclass(frozen=True)
class Piece:
    """Elements of a tensor of a checkpoint that lie in regular steps, there and in a tensor of the module.

    Args:
        target: The module's tensor.
        shape: How many elements each step has.
        there: Strides and first element in the target.
        here: Strides and first element in the checkpoint's tensor.
    """

    target: str
    shape: tuple[int, ...]
    there: tuple[tuple[int, ...], int]
    here: tuple[tuple[int, ...], int]

    def views(self, target: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The elements in the target, and in the checkpoint's tensor; both are contiguous."""
        return self._view(target, self.there), self._view(values, self.here)

    def _view(self, tensor: Tensor, place: tuple[tuple[int, ...], int]) -> Tensor:
        return tensor.as_strided(self.shape, place[0], tensor.storage_offset() + place[1])


@dataclass(frozen=True)
class Scattered:
    """A tensor of a checkpoint whose elements lie in several places, or in no regular order.

    Args:
        name: The checkpoint's tensor.
        shape: Its shape.
        parts: By the module's tensor, (n,) positions in it and (n,) the positions of the same elements here.
        pieces: Its elements, where they lie in regular steps; then there are no parts.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    pieces: tuple[Piece, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """The module's tensors that it is put into."""
        return tuple(dict.fromkeys([*self.parts, *(piece.target for piece in self.pieces)]))

    def positions(self, target: str) -> tuple[Tensor, Tensor]:
        """(n,) positions in one of the module's tensors, and (n,) the positions of the same elements here."""
        if target in self.parts:
            return self.parts[target]
        pairs = [
            (_positions(one.shape, one.there), _positions(one.shape, one.here))
            for one in self.pieces
            if one.target == target
        ]
        there, here = (torch.cat(each) for each in zip(*pairs, strict=True))
        order = here.argsort()
        return there[order], here[order]

    def put(self, values: Tensor, state: Mapping[str, Tensor]) -> None:
        """Write the values of the checkpoint's tensor into the module's tensors."""
        for target, (there, here) in self.parts.items():
            state[target].view(-1)[there.to(values.device)] = values.reshape(-1)[here.to(values.device)]
        for piece in self.pieces:
            into, taken = piece.views(state[piece.target], values.contiguous())
            into.copy_(taken)

    def take(self, tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """The values of the checkpoint's tensor in tensors of the module's names; zero where there is none."""
        values = torch.zeros(math.prod(self.shape), dtype=like.dtype, device=like.device)
        for target, (there, here) in self.parts.items():
            if target in tensors:
                values[here.to(values.device)] = tensors[target].reshape(-1)[there.to(values.device)]
        for piece in self.pieces:
            if piece.target in tensors:
                taken, into = piece.views(tensors[piece.target].contiguous(), values)
                into.copy_(taken)
        return values.view(self.shape)


def _positions(shape: tuple[int, ...], place: tuple[tuple[int, ...], int]) -> Tensor:
    """(n,) of elements in regular steps."""
    strides, found = place[0], torch.tensor(place[1])
    for length, step in zip(shape, strides, strict=True):
        found = found.unsqueeze(-1) + torch.arange(length) * step
    return found.reshape(-1)


@dataclass(frozen=True)
class Names:
    """The correspondence of a checkpoint's tensors and a module's.

    Args:
        places: By the checkpoint's name, where most of its tensors lie.
        scattered: By the checkpoint's name, where the rest lies.
        unused: Names of the checkpoint's tensors that the module does not take.
        missing: Names of the module's tensors that the checkpoint has none for.
    """

    places: Mapping[str, Place]
    scattered: Mapping[str, Scattered] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def fitted(module: nn.Module, shapes: Shapes, aliases: Mapping[str, str] = MappingProxyType({})) -> Names:
    """The correspondence of tensors of these names and shapes, in a checkpoint, and those of a module.

    Names of a Hugging Face model are converted as transformers converts them. Of any other module they are its own.

    Args:
        module: The module; it may be on the device ``meta``.
        shapes: By the checkpoint's names, shapes.
        aliases: Names of tied tensors that the checkpoint may lack; by name, the tensor that takes their place.

    Raises:
        InputError: A tensor has another shape than the module's, a conversion cannot be made, a tensor of the module
            stays empty, or a module that is not of transformers has no place for one of the checkpoint's.
    """
    state = shapes_of(module)
    shapes = {**shapes, **{alias: shapes[kept] for alias, kept in aliases.items() if kept in shapes}}
    groups, unused = _grouped(module, shapes, state)
    places: dict[str, Place] = {}
    scattered: dict[str, Scattered] = {}
    known: dict[Any, list[_Spot]] = {}
    filled: set[str] = set()
    for target, group in groups.items():
        if group.converter is None:
            (name,) = group.members
            if shapes[name] != state[target]:
                raise InputError(
                    f"architecture: {name}: expected shape {shapes[name]}, as the checkpoints have, "
                    f"found {state[target]}."
                )
            places[name] = Place(name, target, shapes[name])
            filled.add(target)
            continue
        found, targets = _converted(module, target, group, shapes, state, known)
        filled |= set(targets)
        places |= {one.name: one for one in found if isinstance(one, Place)}
        scattered |= {one.name: one for one in found if isinstance(one, Scattered)}
    names = Names(places, scattered, tuple(unused), tuple(name for name in state if name not in filled))
    _check_complete(module, names, shapes, aliases)
    return names


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """By name, the shapes of a module's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def stored_names(module: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """By the module's name, the name in a checkpoint of each tensor that is loaded without a conversion.

    Args:
        module: The module; it may be on the device ``meta``.
        names: The checkpoint's names.
    """
    registry = _Registry(module, shapes_of(module))
    found: dict[str, str] = {}
    for name in names:
        target, pattern = registry.target(name)
        if pattern is None:
            found.setdefault(target, name)
    return found


def names_of(module: nn.Module, layout: Layout) -> Names:
    """The correspondence of the tensors of a layout and those of a module: see ``fitted``."""
    shapes = {name: info.shape for name, info in {**layout.parameters, **layout.buffers}.items()}
    return fitted(module, shapes, layout.aliases)


def module_names(module: nn.Module, names: Iterable[str]) -> list[str]:
    """The module's names of tensors of a checkpoint, whether or not the module has them."""
    registry = _Registry(module, shapes_of(module))
    return [registry.target(name)[0] for name in names]


def untie(module: nn.Module, names: Names, aliases: Mapping[str, str]) -> None:
    """Give each tensor of a checkpoint memory of its own in a module that has one tensor for two of them.

    transformers ties stored tensors whose numbers are equal, such as two copies of an output's bias. Merges of them
    may differ.
    """
    state = module.state_dict(keep_vars=True)
    taken: dict[int, tuple[str, str]] = {}
    for place in names.places.values():
        tensor, kept = state[place.target], aliases.get(place.name, place.name)
        target, first = taken.setdefault(id(tensor), (place.target, kept))
        if isinstance(tensor, nn.Parameter) and target != place.target and first != kept:
            parent, _, last = place.target.rpartition(".")
            own = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
            setattr(module.get_submodule(parent), last, own)


def _check_complete(module: nn.Module, names: Names, shapes: Shapes, aliases: Mapping[str, str]) -> None:
    """Refuse a checkpoint that leaves tensors of the module empty, or has tensors that a user's own module lacks.

    transformers leaves some tensors of a checkpoint unread. Those are merged and exported like the others.
    """
    state = module.state_dict(keep_vars=True)
    found = {*names.places, *names.scattered}
    kept = {name for alias, name in aliases.items() if alias in found}
    left = [name for name in names.unused if name not in kept and name not in aliases]
    if left and not hasattr(module, "base_model_prefix"):
        raise InputError(
            f"architecture: expected a tensor {left[0]!r} of shape {shapes[left[0]]}, as the checkpoints have, "
            f"found none.",
            nearest(left[0], list(state)),
        )
    filled = {id(state[place.target]) for place in names.places.values()}
    filled |= {id(state[target]) for one in names.scattered.values() for target in one.targets}
    computed = getattr(module, "_keys_to_ignore_on_load_missing", None) or ()  # by transformers, such as sinusoids
    for name in names.missing:
        tensor = state[name]
        if any(re.search(pattern, name) for pattern in computed):
            continue
        if tensor.is_floating_point() and id(tensor) not in filled:
            raise InputError(
                f"architecture: its tensor {name!r} of shape {tuple(tensor.shape)} is in no checkpoint.",
                nearest(name, sorted(found)),
            )


@dataclass(frozen=True)
class _Group:
    """Tensors of a checkpoint that are loaded together.

    Args:
        converter: transformers' conversion; None for one tensor that is only renamed.
        members: By the checkpoint's name, in the order that counts, the converter's pattern that it matches.
    """

    converter: Any
    members: dict[str, str | None]


def _grouped(module: nn.Module, shapes: Shapes, state: Shapes) -> tuple[dict[str, _Group], list[str]]:
    """By a name of the module, the tensors that are loaded into it; and tensors that are not loaded."""
    registry = _Registry(module, state)
    groups: dict[str, _Group] = {}
    unused: list[str] = []
    for name in registry.sorted(shapes):
        target, pattern = registry.target(name)
        if target not in state:
            unused.append(name)
        elif pattern is not None:
            groups.setdefault(target, _Group(registry.converter(pattern), {})).members[name] = pattern
        elif target in groups:
            raise InputError(
                f"architecture: the tensors {next(iter(groups[target].members))} and {name} of the checkpoints are "
                f"both loaded as {target}."
            )
        else:
            groups[target] = _Group(None, {name: None})
    return groups, unused


class _Registry:
    """transformers' conversions for one module; none for modules of others."""

    def __init__(self, module: nn.Module, state: Shapes) -> None:
        self._state = dict.fromkeys(state, True)
        self._prefix = str(getattr(module, "base_model_prefix", "") or "")
        self._renamings: list[Any] = []
        self._converters: list[Any] = []
        self._loading: Any = None
        try:
            from transformers import PreTrainedModel, core_model_loading
            from transformers.conversion_mapping import get_model_conversion_mapping
        except ImportError:  # no transformers, or one before 5, whose checkpoints have the names of modules
            return
        if not isinstance(module, PreTrainedModel):
            return
        self._loading = core_model_loading
        transforms = get_model_conversion_mapping(module)
        self._renamings = [one for one in transforms if isinstance(one, core_model_loading.WeightRenaming)]
        self._converters = [one for one in transforms if isinstance(one, core_model_loading.WeightConverter)]

    def sorted(self, names: Shapes) -> list[str]:
        """In the order in which transformers loads them, which is that of stacked experts."""
        return sorted(names) if self._loading is None else sorted(names, key=self._loading.dot_natural_key)

    def target(self, name: str) -> tuple[str, str | None]:
        """The module's name (of a conversion, its first), and the pattern of the conversion, or None."""
        if self._loading is None:
            return self._prefixed(name), None
        found = self._renamed(name, self._renamings, self._converters)
        if found[0] not in self._state and name in self._state:
            return name, None
        return found

    def converter(self, pattern: str) -> Any:
        """The conversion of a pattern."""
        return next(one for one in self._converters if pattern in one.source_patterns)

    def _renamed(self, name: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        target, pattern = self._loading.rename_source_key(name, renamings, converters)
        return self._prefixed(target), pattern

    def _prefixed(self, name: str) -> str:
        """The name with the prefix of the base model where the module has it, and without it where it does not."""
        if name in self._state or not self._prefix:
            return name
        bare, longer = name.removeprefix(f"{self._prefix}."), f"{self._prefix}.{name}"
        return bare if bare in self._state else longer if longer in self._state else name


def _converted(
    module: nn.Module,
    target: str,
    group: _Group,
    shapes: Shapes,
    state: Shapes,
    known: dict[Any, list[_Spot]],
) -> tuple[list[Place | Scattered], list[str]]:
    """Where the members of a group go, and the module's tensors that they make up. Groups that are alike are
    converted once.
    """
    made = _run(module, target, group, {name: torch.empty(shapes[name], device="meta") for name in group.members})
    for name, tensor in made.items():
        if tuple(tensor.shape) != state.get(name):
            wanted = "none of that name" if name not in state else f"one of shape {state[name]}"
            raise InputError(
                f"architecture: {', '.join(group.members)}: converted as transformers does, they are a tensor {name} "
                f"of shape {tuple(tensor.shape)}; expected {wanted}."
            )
    key = (
        tuple(group.converter.source_patterns),
        tuple((shapes[name], pattern) for name, pattern in group.members.items()),
    )
    if key not in known:
        known[key] = _spots(module, target, group, shapes)
    targets = list(made)
    return [
        spot.named(name, shapes[name], targets) for name, spot in zip(group.members, known[key], strict=True)
    ], targets


def _run(module: nn.Module, target: str, group: _Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What transformers makes of the members of a group: the module's tensors by name."""
    converter = deepcopy(group.converter)
    for name, pattern in group.members.items():
        converter.add_tensor(target, name, pattern, tensors[name])
    try:
        made = converter.convert(target, model=module, config=module.config)
    except UntracedError:
        raise
    except Exception as error:  # of operations of transformers, which expect tensors of certain numbers and shapes
        raise InputError(
            f"architecture: transformers cannot convert {', '.join(group.members)} of the checkpoints: {told(error)}."
        ) from error
    made = made[0] if isinstance(made, tuple) else made  # transformers 5.0 gives errors beside it
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class _Spot:
    """Where a member of a group goes, of whatever layer.

    Args:
        place: The number of the target, and strides (None: the whole) and offset in it; None if there is no such view.
        parts: By the number of the target, positions in it and in the member.
        pieces: Pieces, each with the number of its target.
    """

    place: tuple[int, tuple[int, ...] | None, int] | None = None
    parts: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    pieces: tuple[tuple[int, Piece], ...] = ()

    def named(self, name: str, shape: tuple[int, ...], targets: Sequence[str]) -> Place | Scattered:
        """Of a member and the targets of one layer."""
        if self.place is not None:
            target, stride, offset = self.place
            return Place(name, targets[target], shape, stride, offset)
        pieces = tuple(replace(piece, target=targets[number]) for number, piece in self.pieces)
        return Scattered(name, shape, {targets[number]: pair for number, pair in self.parts.items()}, pieces)


def _spots(module: nn.Module, target: str, group: _Group, shapes: Shapes) -> list[_Spot]:
    """Where each member of a group goes: traced, or else found by converting the numbers of the elements."""
    sizes = [math.prod(shapes[name]) for name in group.members]
    try:
        return _traced(module, target, group, [shapes[name] for name in group.members])
    except UntracedError as error:
        if sum(sizes) > COUNTED:
            raise InputError(
                f"architecture: expected a conversion that moves the numbers of {', '.join(group.members)} by known "
                f"operations, found {error}; their {sum(sizes):,} numbers are too many to find out where they go.",
                _OWN_MODULE,
            ) from error
        return _counted(module, target, group, shapes)


def _traced(module: nn.Module, target: str, group: _Group, shapes: Sequence[tuple[int, ...]]) -> list[_Spot]:
    """Where each member of a group goes, found by converting tensors that know where their numbers come from.

    Raises:
        UntracedError: The conversion does what is not known to move numbers only, or leaves some out.
    """
    stored = {
        name: Traced.of(number, shape) for number, (name, shape) in enumerate(zip(group.members, shapes, strict=True))
    }
    made = list(_run(module, target, group, stored).values())
    parts: list[list[tuple[Box, tuple[int, ...], int]]] = [[] for _ in shapes]
    for number, tensor in enumerate(made):
        if not isinstance(tensor, Traced):
            raise UntracedError("a tensor of its own making")
        for box in tensor.boxes:
            parts[box.source].append((box, tuple(tensor.shape), number))
    return [_placed(shape, own) for shape, own in zip(shapes, parts, strict=True)]


def _placed(shape: tuple[int, ...], parts: Sequence[tuple[Box, tuple[int, ...], int]]) -> _Spot:
    """Of the boxes that hold a member's numbers, each with its target's shape and number."""
    if not math.prod(shape) or not covers([box for box, *_ in parts], math.prod(shape)):
        raise UntracedError("numbers that are left out or taken twice")
    if len(parts) == 1:
        ((box, target, number),) = parts
        view = view_of(shape, box, target)
        if view is not None:
            strides, offset = view
            whole = shape == target and strides == contiguous(shape) and offset == 0
            return _Spot((number, None if whole else strides, offset))
    return _Spot(pieces=tuple((number, _piece(box, target)) for box, target, number in parts))


def _piece(box: Box, target: tuple[int, ...]) -> Piece:
    steps = contiguous(target)
    begin = sum(side.start * step for side, step in zip(box.sides, steps, strict=True))
    here = tuple(side.step for side in box.sides)
    if any(step < 0 for step in here):
        raise UntracedError("numbers in reverse order")
    return Piece("", tuple(side.length for side in box.sides), (steps, begin), (here, box.offset))


def _counted(module: nn.Module, target: str, group: _Group, shapes: Shapes) -> list[_Spot]:
    """Where each member of a group goes, found by converting the numbers of the elements.

    That takes 27 bytes an element of all members.
    """
    sizes = [math.prod(shapes[name]) for name in group.members]
    total = sum(sizes)
    kind = torch.int32 if total < 2**31 else torch.int64
    counted, begin = {}, 0
    for name, size in zip(group.members, sizes, strict=True):
        counted[name] = torch.arange(begin, begin + size, dtype=kind).view(shapes[name])
        begin += size
    made = list(_run(module, target, group, counted).values())
    lengths = [tensor.numel() for tensor in made]
    found = torch.cat([tensor.reshape(-1) for tensor in made])
    places = torch.full((total,), -1, dtype=kind)
    moved = found.numel() == total and not found.is_floating_point()
    if moved and total and bool(found.min() >= 0) and bool(found.max() < total):
        places[found.long()] = torch.arange(total, dtype=kind)
    if not moved or bool((places < 0).any()):
        raise InputError(
            f"architecture: expected a conversion that moves the numbers of {', '.join(group.members)}, found one that "
            f"changes them.",
            _OWN_MODULE,
        )
    members = torch.split(places, sizes)
    return [
        _spot(member.view(shapes[name]), [tuple(tensor.shape) for tensor in made], lengths)
        for name, member in zip(group.members, members, strict=True)
    ]


def _spot(places: Tensor, shapes: Sequence[tuple[int, ...]], lengths: Sequence[int]) -> _Spot:
    """Of the places of a member's elements among all elements of the targets."""
    parts: dict[int, tuple[Tensor, Tensor]] = {}
    flat, begin = places.reshape(-1).long(), 0
    for number, length in enumerate(lengths):
        here = torch.nonzero((flat >= begin) & (flat < begin + length)).view(-1)
        if len(here) == len(flat):
            strides = _strides(flat.view(places.shape))
            if strides is not None:
                offset = int(flat[0]) - begin
                whole = tuple(places.shape) == shapes[number] and len(flat) == length and offset == 0
                own = torch.empty(places.shape, device="meta").stride()
                return _Spot((number, None if whole and strides == own else strides, offset))
        if len(here):
            parts[number] = (flat[here] - begin, here)
        begin += length
    return _Spot(None, parts)


def _strides(places: Tensor) -> tuple[int, ...] | None:
    """Strides of a view whose elements lie at ``places``; None if there is no such view."""
    own = torch.empty(places.shape, device="meta").stride()
    first = int(places.reshape(-1)[0])
    strides, expected = [], torch.tensor(first)
    for axis, length in enumerate(places.shape):
        step = int(places.select(axis, 1).reshape(-1)[0]) - first if length > 1 else own[axis]
        strides.append(step)
        expected = expected.unsqueeze(-1) + torch.arange(length) * step
    return tuple(strides) if min(strides, default=0) >= 0 and torch.equal(expected, places) else None
