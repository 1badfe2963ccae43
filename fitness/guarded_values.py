"""Dicts, lists and sets that belong to a model's state, in each other: what they hold now, put back when it differs.

``ecotone.fitness.guards`` tells what is certain and what is likely.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import is_dataclass
from itertools import chain
from operator import is_
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

DEPTH = 8
"""How deep containers are followed into each other."""
LONG = 4096
"""Values of the largest container that lies in another one and is watched."""
MISSING = object()
"""Stands for a value that is not there."""

Values: TypeAlias = dict[str, Any]
_METHODS = ("__iter__", "__len__", "__getitem__", "__setitem__", "keys", "values", "items", "update", "clear")
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)

SINGLE = frozenset({*_PLAIN, Tensor, nn.Parameter, FunctionType, MethodType})
"""Types of values that hold no others."""
_CAPTURING = "transformers.utils.output_capturing"  # its hooks come with the first call that asks for hidden states
_ORDINARY = frozenset({dict, OrderedDict, list, set, tuple})


def equal(old: Any, new: Any) -> bool:
    """Whether two plain values are the same; of others only identity counts."""
    return isinstance(old, _PLAIN) and type(old) is type(new) and old == new


class Contents:
    """Containers and what they hold. Each is watched once, under its first name."""

    def __init__(self) -> None:
        self._known: set[int] = set()
        self._dicts: list[tuple[Values, Values, str, str]] = []
        self._lists: list[tuple[list[Any], list[Any], str, str]] = []
        self._sets: list[tuple[set[Any], set[Any], str, str]] = []

    def watch(self, values: Values, sort: str, place: str) -> None:
        """Watch a dict, and nothing in it.

        Args:
            values: The dict.
            sort: The kind of its changes.
            place: Its name; may be empty.
        """
        if id(values) not in self._known:
            self._known.add(id(values))
            self._dicts.append((values, dict(values), sort, place))

    def follow(self, value: Any, sort: str, place: str, depth: int = 0) -> None:
        """Watch a container, and those in it.

        Args:
            value: A dict, list, set, tuple, dataclass, namespace or configuration; anything else is left out.
            sort: The kind of its changes.
            place: Its name.
            depth: In how many others it lies.
        """
        if type(value) in SINGLE:
            return
        inner = _parts(value, place)
        if inner is None or depth > DEPTH or (depth and len(inner) > LONG):
            return
        if not isinstance(value, tuple):
            if id(inner) in self._known:
                return
            if isinstance(inner, dict):
                self.watch(inner, sort, place)
            elif isinstance(inner, list):
                self._lists.append((inner, list(inner), sort, place))
            else:
                self._sets.append((inner, set(inner), sort, place))
            self._known.add(id(inner))
        children = inner.items() if isinstance(inner, dict) else enumerate(inner)
        for key, child in children:
            if type(child) not in SINGLE:
                self.follow(child, sort, f"{place}.{key}".strip("."), depth + 1)

    def seal(self) -> None:
        """Nothing more is watched."""
        self._now = [now for now, before, _, _ in self._dicts if before]
        self._empty = [now for now, before, _, _ in self._dicts if not before]  # most hooks
        self._ids = self._identities()
        self._keys = [*chain.from_iterable(self._now)]

    def same(self) -> bool:
        """Whether nothing differs, quickly; the keys of dicts are left out."""
        return (
            not any(self._empty)
            and self._identities() == self._ids
            and all(len(now) == len(old) and all(map(is_, now, old)) for now, old, _, _ in self._lists)
            and all(now == old for now, old, _, _ in self._sets)
        )

    def same_keys(self) -> bool:
        """Whether dicts have the same keys, in the same order."""
        return [*chain.from_iterable(self._now)] == self._keys

    def put_back(self) -> list[tuple[str, str]]:
        """Put back what differs; return kinds of changes, and names."""
        found: list[tuple[str, str]] = []
        for now, before, sort, place in self._dicts:
            found += _changes(now, before, sort, place)
            if [*map(id, now.values())] != [*map(id, before.values())] or [*now] != [*before]:
                now.clear()
                now.update(before)
        for items, old, sort, place in self._lists:
            if len(items) != len(old) or not all(map(is_, items, old)):
                alike = len(items) == len(old) and all(map(equal, old, items))
                items[:] = old
                found += [] if alike else [(sort, place)]
        for members, earlier, sort, place in self._sets:
            if members != earlier:
                members.clear()
                members.update(earlier)
                found.append((sort, place))
        return found

    def _identities(self) -> list[int]:
        return [*map(id, chain.from_iterable(map(dict.values, self._now)))]


def _parts(value: Any, place: str) -> Any:
    """What a container holds: itself, or the attributes of an object; None of what is no container."""
    if isinstance(value, dict | list | set | tuple):
        return value if _ordinary(type(value)) else None
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is not dict or isinstance(value, type | nn.Module):
        return None
    configured = place.rpartition(".")[2].endswith("config")
    return attributes if configured or isinstance(value, SimpleNamespace) or is_dataclass(value) else None


def _ordinary(kind: type) -> bool:
    """Whether reading and filling a container runs no code of its class."""
    if kind in _ORDINARY:
        return True
    base = next(one for one in (OrderedDict, dict, list, set, tuple) if issubclass(kind, one))
    return all(getattr(kind, name, None) is getattr(base, name, None) for name in _METHODS)


def _changes(now: Values, before: Values, sort: str, place: str) -> Iterator[tuple[str, str]]:
    for key in {**before, **now}:
        old, new = before.get(key, MISSING), now.get(key, MISSING)
        if old is not new and not equal(old, new):
            yield _kind(sort, key, old, new), f"{place}.{key}".strip(".")


def _kind(sort: str, key: str, old: Any, new: Any) -> str:
    """The kind of a change; empty for what a library does by itself, which is told to nobody."""
    if key == "_output_capturing_hooks_installed" or getattr(new, "__module__", None) == _CAPTURING:
        return ""
    if sort in ("attributes", "classes", "globals") and (isinstance(old, Tensor) or isinstance(new, Tensor)):
        return ""  # a model's own cache
    if sort != "attributes":
        return sort
    if key == "training":
        return "training mode"
    return "forward" if callable(new) and not isinstance(new, type) else "attributes"
