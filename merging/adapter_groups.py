"""What the adapters of a merge change, put together: which updates are of the same tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ecotone.merging.models.layout import Layout
from ecotone.merging.models.lora import Adapter
from ecotone.merging.models.lora_changes import Added, Change, Elements, Kept, Normed, Part, Rows, Shifted, Update
from ecotone.merging.models.lora_names import Targets
from ecotone.merging.models.model import Model
from ecotone.populations.errors import InputError

AS_CHECKPOINT = "Export a checkpoint instead: leave the format out."


@dataclass(eq=False)
class Group:
    """The updates that adapters make to the same tensors.

    Args:
        updates: By the number of the adapter, its update.
        parts: By tensor of the base, the parts of the module's tensor that it is; None for no rectangles of it.
        normed: Whether one of them gives rows lengths of its own.
    """

    updates: dict[int, Update] = field(default_factory=dict)
    parts: dict[str, tuple[Part, ...] | None] = field(default_factory=dict)
    normed: bool = False

    @property
    def target(self) -> str:
        """The module's tensor."""
        return next(iter(self.updates.values())).target

    @property
    def parameter(self) -> bool:
        """Whether the tensor was chosen as a parameter, and not as the weight of a module."""
        return all(update.parameter for update in self.updates.values())


class Changed:
    """The tensors that the adapters of a merge change, and how the merge of them is stored.

    Args:
        experts: The experts of the merge.
        frozen: Names of tensors of the base that are not merged.

    Raises:
        InputError: They are not all adapters, their changes do not go together, or all of them are frozen.
    """

    def __init__(self, experts: Sequence[Model], frozen: Set[str] = frozenset()) -> None:
        self.frozen = frozen
        self.adapters: tuple[Adapter, ...] = _adapters(experts)
        self.base: Model = self.adapters[0].base
        self.targets: Targets = Targets(self.base, Layout.of(self.base).aliases)
        self.whole: dict[str, str] = {}
        """By tensor of the base that is merged whole, the module's tensor."""
        self.rows: dict[str, tuple[str, set[int]]] = {}
        """By tensor of the base with trained tokens, the module's tensor and the tokens' numbers."""
        self.groups: list[Group] = []
        """The low-rank updates."""
        self._sort_out()

    def shape(self, group: Group) -> tuple[int, int, int]:
        """(E, R, C) of a group's tensor: E matrices."""
        number, update = next(iter(group.updates.items()))
        return update.shape(self.adapters[number].weights)

    def _sort_out(self) -> None:
        """Find the updates that belong together, and the tensors that are stored whole."""
        found: dict[tuple[str, str], Group] = {}
        for number, adapter in enumerate(self.adapters):
            own: dict[Update, Group] = {}
            for name, changes in adapter.changes.items():
                for change in self._lasting(adapter, name, changes):
                    if isinstance(change, Added | Elements | Normed):
                        group = own.setdefault(change.update, Group({number: change.update}))
                        group.parts[name] = _parts(change)
                        group.normed |= isinstance(change, Normed)
                    elif name in self.frozen:
                        continue
                    elif isinstance(change, Rows):
                        self.rows.setdefault(name, (change.target, set()))[1].update(change.tokens)
                    else:
                        assert isinstance(change, Kept | Shifted)
                        self._check_single(name, change)
                        self.whole[name] = change.target
            for group in own.values():
                self._join(found, group)
        for name in list(self.rows):
            if name in self.whole or any(name in group.parts for group in found.values()):
                self.whole[name] = self.rows.pop(name)[0]
        merged = (group for group in dict.fromkeys(found.values()) if not group.parts.keys() <= self.frozen)
        self.groups = [group for group in merged if not self._stored_whole(group)]
        if not (self.groups or self.whole or self.rows):
            raise InputError(
                "merge: expected tensors to merge that adapters change, found all of them frozen.",
                "Freeze fewer (merge.freeze, merge.only).",
            )

    def _lasting(self, adapter: Adapter, name: str, changes: Sequence[Change]) -> Iterator[Change]:
        """Without tensors that the adapter stores and that are the base's: PEFT stores those of a changed embedding."""
        for change in changes:
            if isinstance(change, Kept) and change.spot is None:
                stored, own = adapter.weights.tensor(change.key).reshape(-1), self.base.flat(name)
                if isinstance(own, Tensor) and stored.dtype == own.dtype and torch.equal(stored, own):
                    continue
            yield change

    def _check_single(self, name: str, change: Kept | Shifted) -> None:
        if change.spot is not None:
            raise InputError(
                f"models.experts: {name!r} is merged whole, and is only a part of the module's {change.target!r}.",
                AS_CHECKPOINT,
            )

    def _join(self, found: dict[tuple[str, str], Group], group: Group) -> None:
        """Put an adapter's group with those of others that change the same tensors."""
        keys = [(name, group.target if parts is None else "") for name, parts in group.parts.items()]
        known = {id(one): one for key in keys if (one := found.get(key)) is not None}
        if not known:
            found.update(dict.fromkeys(keys, group))
            return
        other = next(iter(known.values()))
        update, first = next(iter(group.updates.items()))[1], next(iter(other.updates.values()))
        alike = (update.experts, update.transposed) == (first.experts, first.transposed)
        if len(known) > 1 or other.parts.keys() != group.parts.keys() or not alike:
            raise InputError(
                f"models.experts: adapters change {next(iter(group.parts))!r} as parts of different tensors, "
                f"{first.target!r} and {update.target!r}.",
                AS_CHECKPOINT,
            )
        other.updates |= group.updates
        other.normed |= group.normed

    def _stored_whole(self, group: Group) -> bool:
        whole = [name for name in group.parts if name in self.whole]
        if whole and len(group.parts) > 1:
            raise InputError(f"models.experts: {whole[0]!r} is only a part of what an adapter changes.", AS_CHECKPOINT)
        return bool(whole)


def _adapters(experts: Sequence[Model]) -> tuple[Adapter, ...]:
    found = []
    for expert in experts:
        if not isinstance(expert, Adapter):
            change = getattr(expert, "change", None)
            text = "a full model" if change is None else f"a model with {change}"
            raise InputError(
                f"models.experts: a merge is an adapter where all experts are LoRA adapters of one base, found {text}, "
                f"{expert.name!r} ({expert.path}).",
                AS_CHECKPOINT,
            )
        found.append(expert)
    return tuple(found)


def _parts(change: Added | Elements | Normed) -> tuple[Part, ...] | None:
    if isinstance(change, Elements):
        return None
    return change.parts if isinstance(change, Added) else (Part(),)
