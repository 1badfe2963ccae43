"""The names of modules and classes, and what they stand for: functions, methods, class attributes, globals.

``ecotone.fitness.guards`` tells what is certain and what is likely. Names are compared by one comparison of dicts an
owner, which takes microseconds, as nearly all values are the same objects.
"""

from __future__ import annotations

import builtins
import dis
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import lru_cache
from operator import is_
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import nn

from ecotone.fitness.guarded_values import MISSING, equal

Owner: TypeAlias = Any
"""A module or a class."""

OF_TORCH: tuple[Owner, ...] = (
    nn.functional,
    torch,
    torch.Tensor,
    nn.Parameter,
    nn.init,
    torch.linalg,
    torch.fft,
    torch.special,
    torch._C._nn,
)
"""Modules and classes of torch whose names are watched. What tensors inherit from C can only be hidden by these."""

_PYTHONS = frozenset({"__annotations__", "__doc__", "__warningregistry__", "__parameters__", "__slotnames__"})
"""Names that Python adds when they are first used."""


class Names:
    """The names of modules and classes, as they are now.

    Args:
        owners: The modules and classes.
        used: Returns names that instances of the classes have: a name of the class would hide them.
    """

    def __init__(self, owners: Iterable[Owner], used: Callable[[], Collection[str]] = tuple) -> None:
        self._before = [(owner, vars(owner), dict(vars(owner))) for owner in owners]
        self._used = used

    def same(self) -> bool:
        """Whether the same names stand for the same things."""
        try:
            return all(now == before for _, now, before in self._before)
        except Exception:  # values that cannot be compared are others
            return False

    def put_back(self) -> list[str]:
        """Put back what differs; return its names. What torch and Python add by themselves is taken as it is now."""
        found = []
        for owner, now, before in self._before:
            for key in [*before, *(key for key in now if key not in before)]:
                old, new = before.get(key, MISSING), now.get(key, MISSING)
                if old is new or equal(old, new):
                    continue
                if _lazy(key, old, new) or (old is MISSING and not self._read(owner, key)):
                    before[key] = new
                    if new is MISSING:
                        del before[key]
                    continue
                _set(owner, key, old)
                found.append(f"{owner.__name__}.{key}")
        return found

    def _read(self, owner: Owner, key: str) -> bool:
        """Whether a name that was added to ``owner`` may be read by code that did not have it before."""
        if isinstance(owner, ModuleType):
            return key == "__getattr__" or hasattr(builtins, key)
        if not of_torch(owner):
            return True
        special = key.startswith("__") and key.endswith("__")
        return special or key in self._used() or any(key in vars(parent) for parent in owner.__mro__[1:])


class Globals:
    """Globals that the code of classes reads and never sets, as they are now.

    Args:
        classes: The classes. Those of torch are left out.
    """

    def __init__(self, classes: Iterable[type]) -> None:
        kinds = [kind for kind in classes if not of_torch(kind)]
        modules = {kind.__module__ for kind in kinds}
        parents = dict.fromkeys(one for kind in kinds for one in kind.__mro__ if one.__module__ in modules)
        self._before: list[tuple[dict[str, Any], str, tuple[str, ...], list[Any]]] = []
        for kind in parents:
            for values, names in _globals_of(kind):
                before = [values.get(name, MISSING) for name in names]
                self._before.append((values, kind.__module__, names, before))

    def values(self) -> Iterator[tuple[str, Any]]:
        """Places and values."""
        for _, module, names, before in self._before:
            yield from zip((f"{module}.{name}" for name in names), before, strict=True)

    def same(self) -> bool:
        """Whether they are the same objects."""
        return all(all(map(is_, map(values.get, names), before)) for values, _, names, before in self._before)

    def put_back(self) -> list[str]:
        """Put back what differs; return its places."""
        found = []
        for values, module, names, before in self._before:
            for name, old in zip(names, before, strict=True):
                new = values.get(name, MISSING)
                if old is not new:
                    values[name] = old
                    if not equal(old, new):
                        found.append(f"{module}.{name}")
        return found


def of_torch(owner: Owner) -> bool:
    """Whether a class, a function or a module is torch's."""
    name = owner.__name__ if isinstance(owner, ModuleType) else getattr(owner, "__module__", None)
    return str(name).partition(".")[0] == "torch"


def _lazy(key: str, old: Any, new: Any) -> bool:
    """Whether torch or Python has set a name by itself, as at an import or when a function is first used."""
    if key in _PYTHONS or key.startswith("___"):  # torch._dynamo marks classes so
        return True
    if isinstance(new, ModuleType):
        return old is MISSING or getattr(old, "__name__", None) == new.__name__
    code = getattr(new, "__globals__", {}).get("__name__")
    if str(code).partition(".")[0] != "torch":
        return False
    cells = [cell.cell_contents for cell in getattr(new, "__closure__", None) or () if _filled(cell)]
    return old is not MISSING and any(old is one for one in (getattr(new, "__wrapped__", None), *cells))


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _set(owner: Owner, key: str, value: Any) -> None:
    """Set a name, or delete it; where that is refused, the comparison that follows says so."""
    try:
        if value is MISSING:
            delattr(owner, key)
        else:
            setattr(owner, key, value)
    except (AttributeError, TypeError):
        pass


@lru_cache(maxsize=1024)
def _globals_of(kind: type) -> tuple[tuple[dict[str, Any], tuple[str, ...]], ...]:
    """Dicts of globals, each with the names that the functions of a class read from it and never set."""
    read: dict[int, tuple[dict[str, Any], dict[str, None], set[str]]] = {}
    seen: set[int] = set()
    left = [*filter(None, map(_function, vars(kind).values()))]
    while left:
        function = left.pop()
        if id(function) in seen or function.__globals__.get("__name__") != kind.__module__:
            continue
        seen.add(id(function))
        values = function.__globals__
        _, names, stored = read.setdefault(id(values), (values, {}, set()))
        for operation, name in _names(function.__code__):
            if operation.startswith("LOAD"):
                if name in values:
                    names[name] = None
                    left += filter(None, [_function(values[name])])
            else:
                stored.add(name)
    return tuple((values, tuple(one for one in names if one not in stored)) for values, names, stored in read.values())


def _function(value: Any) -> FunctionType | None:
    """The Python function of a method, a property, a decorated one."""
    value = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
    try:
        value = inspect.unwrap(value)
    except ValueError:
        return None
    return value if isinstance(value, FunctionType) else None


def _names(code: CodeType) -> Iterator[tuple[str, str]]:
    """Operations on globals, with the globals' names."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"):
            yield instruction.opname, instruction.argval
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)
