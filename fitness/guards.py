"""Guards around user code: what an objective changes in the model, or in the process, spoils no later score.

An objective, a calibration loss, a head or a statistic gets the one model that a worker has. It may replace a layer,
add a hook, write into weights or set a switch of torch, and return. Every later score would be wrong then, without a
word. After such a call a guard compares the model with its state before, puts back what differs, and says so once for
each kind of change and objective. The score that the call returned stands: it began with the model as it should be.

What is certain, whatever the call did through torch's functions and Python's attributes:

- modules, parameters and buffers are the same objects, of the same types, shapes and memory;
- hooks of all kinds, instance attributes (a patched ``forward`` among them), modes, and configurations of Hugging Face
  modules are the same, and so are the classes' ``forward`` and ``__call__``;
- no tensor was written into by an operation that torch counts (``_version``), asks for gradients, or has one;
- torch's process-wide settings (``STATES``) and the functions of ``torch.nn.functional`` are the same.

What is likely: writes that torch does not count, as those through ``.data`` or numpy. Tensors that no merge rewrites
are compared bit by bit after each call of user code (large ones on 32 elements). Merged weights are compared bit by bit
after the first call of each objective that another one follows, and on 32 elements of each tensor after every later
call. The functions of ``torch`` itself, the methods of tensors and the other methods of the model's classes are
compared after calls 1, 2, 4, 8 and so on of an objective, after calls that take longer than ``SLOW`` seconds, and after
each call of an objective that has changed some.

Weights that were written into are merged again before the next objective. What cannot be put back makes this candidate
and all later ones of the worker fail.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, is_
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules_of_torch
from torch.utils import _device as device_of_torch

from ecotone.fitness.guarded_weights import Weights
from ecotone.populations.errors import InputError

SLOW = 0.1
"""Seconds of a call after which the whole of torch's functions is compared."""

_SORTS = {"_parameters": "parameters", "_buffers": "buffers", "_modules": "layers"}
_METHODS = attrgetter("forward", "__call__", "_call_impl", "__getattr__")
_REPLACED = frozenset({"forward", "__call__", "_call_impl", "__getattr__", "__getattribute__", "__setattr__"})
_UNDO = "Have it undo what it sets, with try and finally."
_COPY = "Have it work on a copy: copy.deepcopy(model)."

_log = logging.getLogger("ecotone")


class SpoiledError(InputError):
    """User code has changed the model, or the process, in a way that cannot be put back."""


@dataclass(frozen=True)
class Change:
    """One thing that user code has changed.

    Args:
        kind: ``layers``, ``parameters``, ``buffers``, ``hooks``, ``forward``, ``training mode``, ``attributes``,
            ``classes``, ``gradients``, ``weights``, ``torch's functions``, or a setting of ``STATES``.
        place: The name of the layer, tensor or function; may be empty.
    """

    kind: str
    place: str = ""


@dataclass(frozen=True)
class State:
    """A process-wide setting that changes scores.

    Args:
        name: Its name in messages.
        get: Returns it.
        put: Sets it.
    """

    name: str
    get: Callable[[], Any]
    put: Callable[[Any], Any]


def _states() -> Iterator[State]:
    """The settings that this build of torch has."""
    yield State("the default type", torch.get_default_dtype, torch.set_default_dtype)
    yield State("gradient mode", torch.is_grad_enabled, torch._C._set_grad_enabled)
    yield State("the number of threads", torch.get_num_threads, torch.set_num_threads)
    yield State("the default device", lambda: device_of_torch.CURRENT_DEVICE, torch.set_default_device)
    yield State("function modes", torch._C._len_torch_function_stack, _pop_functions)
    yield State("inference mode", torch.is_inference_mode_enabled, _leave_inference)
    for device in ("cpu", "cuda"):
        yield State(f"autocast on {device}", _of(torch.is_autocast_enabled, device), _to(device))
    yield State("matmul precision", torch._C._get_float32_matmul_precision, torch._C._set_float32_matmul_precision)
    yield State("deterministic algorithms", torch._C._get_deterministic_algorithms, _deterministic)
    flags = ("cudnn_enabled", "cudnn_benchmark", "cudnn_deterministic", "cudnn_allow_tf32", "cublas_allow_tf32")
    attention = ("flash", "mem_efficient", "math", "cudnn")
    pairs = {flag.replace("_", " "): (f"_get_{flag}", f"_set_{flag}") for flag in (*flags, "mkldnn_enabled")}
    pairs |= {f"{one} attention": (f"_get_{one}_sdp_enabled", f"_set_sdp_use_{one}") for one in attention}
    for name, (get, put) in pairs.items():
        if hasattr(torch._C, get) and hasattr(torch._C, put):
            yield State(name, getattr(torch._C, get), getattr(torch._C, put))


def _of(function: Callable[[str], bool], device: str) -> Callable[[], bool]:
    return lambda: function(device)


def _to(device: str) -> Callable[[bool], None]:
    return lambda on: torch.set_autocast_enabled(device, on)


def _deterministic(on: bool) -> None:
    torch.use_deterministic_algorithms(on)


def _pop_functions(length: int) -> None:
    while torch._C._len_torch_function_stack() > length:
        torch._C._pop_torch_function_stack()


def _leave_inference(on: bool) -> None:
    """Nothing: torch leaves inference mode only where it was entered. The comparison that follows says so."""


STATES: tuple[State, ...] = tuple(_states())
"""Torch's settings that change scores: types, devices, modes, precisions, threads, deterministic algorithms."""
_GETS = tuple(state.get for state in STATES)


TorchFunctions: TypeAlias = dict[str, tuple[Any, dict[str, Any]]]
"""Modules and classes of torch by name, each with its functions by name."""


class Process:
    """The process-wide settings, as they are when user code begins.

    Args:
        functions: Torch's functions as they should be; None takes them as they are.
    """

    def __init__(self, functions: TorchFunctions | None = None) -> None:
        self._before = [get() for get in _GETS]
        owners = (nn.functional, torch, torch.Tensor)
        self.functions: TorchFunctions = functions or {one.__name__: (one, _functions(one)) for one in owners}

    def begin(self) -> None:
        """Settings that differ now are the caller's own: another thread has other modes."""
        self._before = [get() for get in _GETS]

    def same(self) -> bool:
        """Whether the settings are as they were; functions are left out."""
        return [get() for get in _GETS] == self._before

    def mend(self, foreign: bool, deep: bool) -> list[Change]:
        """Put back what differs; return it.

        Args:
            foreign: Look at the functions of ``torch.nn.functional``, too.
            deep: Look at torch's functions, and the methods of tensors.

        Raises:
            SpoiledError: Something cannot be put back.
        """
        changes = [] if self.same() else self._put_back()
        watched = list(self.functions.items())
        for name, (owner, functions) in watched if deep else watched[:1] if foreign else ():
            for key in _patched(owner, functions):
                if _of_torch(vars(owner).get(key)):  # torch wraps some of its own when more of it is imported
                    functions[key] = vars(owner)[key]
                    continue
                setattr(owner, key, functions[key])
                changes.append(Change("torch's functions", f"{name}.{key}"))
        return changes

    def _put_back(self) -> list[Change]:
        changes = []
        for state, before in zip(STATES, self._before, strict=True):
            if state.get() != before:
                state.put(before)
                changes.append(Change(state.name))
        for state, before in zip(STATES, self._before, strict=True):
            if state.get() != before:
                raise SpoiledError(f"it left {state.name} at {state.get()!r} (it was {before!r})", _UNDO)
        return changes


def _of_torch(function: Any) -> bool:
    """Whether the code of a function lies in torch."""
    return str(getattr(function, "__globals__", {}).get("__name__")).partition(".")[0] == "torch"


def _functions(owner: Any) -> dict[str, Any]:
    """The functions of a module or a class, by name."""
    return {name: value for name, value in vars(owner).items() if callable(value) and not isinstance(value, type)}


def _patched(owner: Any, functions: Mapping[str, Any]) -> list[str]:
    """The names of ``functions`` that ``owner`` has something else under now."""
    present = vars(owner)
    return [name for name, function in functions.items() if present.get(name) is not function]


Values: TypeAlias = dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Watched:
    """A dict that belongs to the model's state: itself, its contents before, and where it lies."""

    now: Values
    before: Values
    sort: str
    place: str

    def changes(self) -> Iterator[Change]:
        """What differs."""
        for key in {**self.before, **self.now}:
            old, new = self.before.get(key, _MISSING), self.now.get(key, _MISSING)
            if old is not new and not _equal(old, new):
                yield Change(self._kind(key, old, new), f"{self.place}.{key}".strip("."))

    def put_back(self) -> None:
        if list(map(id, self.now.values())) != list(map(id, self.before.values())) or [*self.now] != [*self.before]:
            self.now.clear()
            self.now.update(self.before)

    def _kind(self, key: str, old: Any, new: Any) -> str:
        if self.sort != "attributes":
            return self.sort
        if key == "training":
            return "training mode"
        if isinstance(old, Tensor) or isinstance(new, Tensor):
            return ""  # a model's own cache
        return "forward" if callable(new) and not isinstance(new, type) else "attributes"


_MISSING = object()


def _equal(old: Any, new: Any) -> bool:
    """Whether two plain values are the same; of others only identity counts."""
    plain = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
    return isinstance(old, plain) and type(old) is type(new) and old == new


class Structure:
    """Modules, parameters, buffers, hooks, attributes and methods of a model, as they are now.

    Args:
        model: A module, or a dict of tensors.
    """

    def __init__(self, model: nn.Module | dict[str, Tensor]) -> None:
        self._dicts: list[_Watched] = []
        self._lists: list[tuple[list[Any], list[Any], str]] = []
        self._known: set[int] = set()
        self._modules: list[nn.Module] = []
        if isinstance(model, nn.Module):
            for name, module in model.named_modules():
                self._modules.append(module)
                self._watch_module(name, module)
        else:
            self._watch(model, "parameters", "")
        for name, value in vars(modules_of_torch).items():
            if name.startswith("_global_") and isinstance(value, dict):
                self._watch(value, "hooks", "all modules")
        self._types = [type(module) for module in self._modules]
        self._classes = list(dict.fromkeys(self._types))
        self._methods = [*map(_METHODS, self._classes)]
        parents = dict.fromkeys(chain.from_iterable(one.__mro__ for one in self._classes))
        self._functions = {one: _functions(one) for one in parents if one is not object}
        self._now = [watched.now for watched in self._dicts if watched.before]
        self._empty = [watched.now for watched in self._dicts if not watched.before]  # most hooks
        self._ids = self._identities()

    def same(self) -> bool:
        """Whether nothing differs, quickly; the classes' other methods are left out."""
        return (
            not any(self._empty)
            and self._identities() == self._ids
            and [*map(type, self._modules)] == self._types
            and [*map(_METHODS, self._classes)] == self._methods
            and all(len(now) == len(old) and all(map(is_, now, old)) for now, old, _ in self._lists)
        )

    def mend(self, deep: bool) -> list[Change]:
        """Put back what differs; return it."""
        changes = [] if self.same() else self._put_back()
        if deep or any(change.kind == "classes" for change in changes):
            changes += self._put_back_methods()
        return changes

    def _identities(self) -> list[int]:
        return [*map(id, chain.from_iterable(map(dict.values, self._now)))]

    def _put_back(self) -> list[Change]:
        changes = []
        for module, kind in zip(self._modules, self._types, strict=True):
            if type(module) is not kind:
                module.__class__ = kind
                changes.append(Change("classes", kind.__name__))
        for watched in self._dicts:
            changes += watched.changes()
            watched.put_back()
        for now, before, place in self._lists:
            if len(now) != len(before) or not all(map(is_, now, before)):
                now[:] = before
                changes.append(Change("attributes", place))
        if [*map(_METHODS, self._classes)] != self._methods:
            changes += self._put_back_methods()
        return changes

    def _put_back_methods(self) -> list[Change]:
        changes = []
        for owner, functions in self._functions.items():
            added = [name for name in _functions(owner) if name not in functions and name in _REPLACED]
            for name in added:
                delattr(owner, name)
            patched = _patched(owner, functions)
            for name in patched:
                setattr(owner, name, functions[name])
            changes += [Change("classes", f"{owner.__name__}.{name}") for name in (*added, *patched)]
        return changes

    def _watch_module(self, name: str, module: nn.Module) -> None:
        own = vars(module)
        self._watch(own, "attributes", name)
        for key, value in own.items():
            place = f"{name}.{key}".strip(".")
            if key.endswith("config") and type(getattr(value, "__dict__", None)) is dict:
                self._watch(vars(value), "attributes", place)
                for inner, values in vars(value).items():
                    if type(values) is dict:
                        self._watch(values, "attributes", f"{place}.{inner}")
            elif isinstance(value, dict):
                hooks = key.endswith("_hooks") or "_hooks_" in key
                self._watch(value, _SORTS.get(key, "hooks" if hooks else "attributes"), name)
            elif isinstance(value, list) and id(value) not in self._known:
                self._known.add(id(value))
                self._lists.append((value, list(value), place))

    def _watch(self, values: Values, sort: str, place: str) -> None:
        if id(values) not in self._known:
            self._known.add(id(values))
            self._dicts.append(_Watched(values, dict(values), sort, place))


@dataclass(eq=False)
class User:
    """A piece of user code, as guards know it.

    Args:
        subject: Its name in messages: ``objective 'accuracy'``.
        foreign: Whether it is the user's own code, or another package's. Ours only runs the model.
        calls: How often it was called.
        warned: The kinds of changes that were told of.
    """

    subject: str
    foreign: bool
    calls: int = 0
    warned: set[str] = field(default_factory=set)

    def warn(self, kind: str, sentence: str) -> None:
        """Tell of one kind of change, once."""
        if kind not in self.warned:
            self.warned.add(kind)
            _log.warning("%s", sentence, extra={"event": "objective_misbehaved", "subject": self.subject, "kind": kind})


class _Guarded:
    """A model, its structure, and its tensors."""

    def __init__(self, model: Any, rewritten: Collection[int] | None) -> None:
        self.model = model
        self.structure = Structure(model)
        self.weights = Weights(model, rewritten)

    def same(self) -> bool:
        return self.structure.same() and self.weights.same()


_DEEP = frozenset({"torch's functions", "classes"})  # who changes these once is looked at closely each time


class Inside:
    """Guards one call in the middle of a gradient, where flags and methods differ from those of a model at rest.

    Args:
        model: The module.
        shown: What is known of its tensors.
        functions: Torch's functions as they should be.
    """

    def __init__(self, model: nn.Module, shown: _Guarded | None, functions: TorchFunctions) -> None:
        self._structure = Structure(model)
        self._process = Process(functions)
        self._shown = shown

    def mend(self) -> list[Change]:
        """Put back what differs, in tensors that are not merged, too; return it."""
        changes = [*self._process.mend(foreign=True, deep=False), *self._structure.mend(deep=False)]
        fixed = [] if self._shown is None else self._shown.weights.spoilt()[0]
        return [*changes, *(Change("buffers", name) for name in fixed)]


class Guards:
    """Compares the model, heads and the process with their states before, after each call of user code.

    Args:
        model: The module, or dict of tensors, that a backend shows. Others, which nothing is known of, are not guarded.
        rewritten: Ids of the tensors that each merge writes whole; None are all parameters.
        heads: Modules that are not merged, such as classification heads.
    """

    def __init__(self, model: Any, rewritten: Collection[int] | None, heads: Iterable[nn.Module] = ()) -> None:
        self._rewritten = rewritten
        self._process = Process()
        self._models: dict[int, _Guarded] = {}
        self._shown: _Guarded | None = None
        self._heads = [_Guarded(head, ()) for head in {id(head): head for head in heads}.values()]
        self._spoilt: SpoiledError | None = None
        self._doubtful: str | None = None  # who may have written into large tensors, which the backend puts back
        self.shown(model)

    def shown(self, model: Any) -> None:
        """A candidate's weights have been put into ``model``.

        Raises:
            SpoiledError: Something was changed before that cannot be put back.
        """
        if self._spoilt is not None:
            raise self._spoilt
        if self._doubtful is not None and (spoilt := self._all_spoilt()):
            self._spoilt = SpoiledError(f"{self._doubtful} cannot be undone: it wrote into {spoilt}.", _COPY)
            raise self._spoilt
        self._doubtful = None
        if not isinstance(model, nn.Module | dict):
            self._shown = None
            return
        guarded = self._models.get(id(model))
        if guarded is None:
            guarded = self._models[id(model)] = _Guarded(model, self._rewritten)
        guarded.weights.note()
        self._shown = guarded

    def begin(self) -> None:
        """The process-wide settings that are so now are the caller's own."""
        self._process.begin()

    def watch(self, user: User) -> None:
        """User code is about to be called, and other code uses the same weights afterwards."""
        if self._shown is not None:
            self._shown.weights.watch(whole=user.calls == 0)

    def inside(self, model: nn.Module) -> Inside:
        """A guard of ``model`` as it is now, for a call in the middle of a gradient: parameters ask for gradients."""
        return Inside(model, self._shown, self._process.functions)

    def written(self) -> list[str]:
        """Names of the shown model's tensors that were written into since ``shown``."""
        return [] if self._shown is None else self._shown.weights.changed()

    def after(
        self, user: User, seconds: float, *, merged: bool = True, fixed: bool = True
    ) -> tuple[list[Change], bool]:
        """User code has been called: put back what it changed, and tell of it.

        Args:
            user: The code.
            seconds: The time that it took.
            merged: Whether ``shown`` was called before: else it is not known which weights there should be.
            fixed: Whether the tensors that are not merged are those of merges.

        Returns:
            What was changed, and whether the weights must be merged again.

        Raises:
            SpoiledError: Something cannot be put back. Every later ``shown`` raises it as well.
        """
        user.calls += 1
        if not user.foreign and self._quiet(merged):
            return [], False
        patches = not _DEEP.isdisjoint(user.warned)
        deep = user.foreign and (user.calls & (user.calls - 1) == 0 or seconds > SLOW or patches)
        try:
            changes = self._process.mend(user.foreign, deep)
            again = False
            for guarded in self._all():
                known = merged and guarded is self._shown
                found, written = self._mended(guarded, user, deep, known, fixed or guarded in self._heads)
                changes, again = [*changes, *found], again or written
        except SpoiledError as error:
            self._spoilt = SpoiledError(f"{user.subject} cannot be undone: {error.message}.", error.remedy)
            raise self._spoilt from None
        if changes and user.foreign:
            tell(user, changes)
        return changes, again

    def _quiet(self, merged: bool) -> bool:
        """Whether nothing differs, quickly."""
        return (
            self._process.same()
            and all(guarded.structure.same() for guarded in self._models.values())
            and (not merged or self._shown is None or self._shown.weights.same())
        )

    def _all_spoilt(self) -> str:
        return next((name for one in self._models.values() if (name := one.weights.spoilt()[1])), "")

    def _all(self) -> Iterator[_Guarded]:
        return chain(self._models.values(), self._heads)

    def _mended(
        self, guarded: _Guarded, user: User, deep: bool, merged: bool, others: bool
    ) -> tuple[list[Change], bool]:
        """Put a model back. Returns what was changed, and whether its weights must be merged again."""
        weights = guarded.weights
        same = guarded.structure.same()
        quiet = same and (not merged or weights.same())
        changes = [] if same and not deep else guarded.structure.mend(deep)
        written = weights.changed() if merged else []
        if user.foreign or not quiet or written:
            changes += [Change(kind, name) for kind, name in weights.put_back(noted=merged)]
        fixed, large = weights.spoilt() if others else ([], "")
        changes += [Change("buffers", name) for name in fixed]
        changes += [Change("weights", name) for name in written if name not in fixed]
        if large and guarded in self._heads:
            raise SpoiledError(f"it wrote into {large} of a head", _COPY)
        if large:
            self._doubtful = user.subject
        if not same and not guarded.structure.same():
            raise SpoiledError("it changed the model's layers or classes in a way that cannot be put back", _COPY)
        again = any(change.kind == "weights" for change in changes)
        return changes, bool(large) or again


def tell(user: User, changes: Sequence[Change]) -> None:
    """One warning for each kind of change."""
    kinds: dict[str, list[str]] = {}
    for change in changes:
        kinds.setdefault(change.kind, []).append(change.place)
    for kind, places in kinds.items():
        if not kind:
            continue
        named = [place for place in dict.fromkeys(places) if place]
        more = f" and {len(named) - 2} more" if len(named) > 3 else ""
        where = f" ({', '.join(named[: 2 if more else 3])}{more})" if named else ""
        settings = any(kind == state.name for state in STATES) or kind == "torch's functions"
        done = "The weights are merged again." if kind == "weights" else "That is put back after each call."
        user.warn(kind, f"{user.subject} changed {kind}{where}. {done} {_UNDO if settings else _COPY}")
