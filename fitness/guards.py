"""Guards around user code: what an objective changes in the model, or in the process, spoils no later score.

An objective, a calibration loss, a head or a statistic gets the one model that a worker has. It may replace a layer,
add a hook, write into weights or set a switch of torch, and return. Every later score would be wrong then, without a
word. After such a call a guard compares the model with its state before, puts back what differs, and says so once for
each kind of change and objective. The score that the call returned stands: it began with the model as it should be.

What is certain, whatever the call did through torch's functions and Python's attributes:

- modules, parameters and buffers are the same objects, of the same types, shapes and memory;
- hooks of all kinds, instance attributes (a patched ``forward`` among them), modes, and configurations of Hugging Face
  modules are the same, and so are dicts, lists and sets in them, in each other (``DEPTH`` deep, of ``LONG`` values);
- the classes of the modules, and their parents, have the same names for the same things: methods, properties, class
  attributes. So have ``torch``, its functions and tensors (``OF_TORCH``). A name that was added to torch counts where
  code reads it that did without: because it hides an inherited or a built-in one, or an attribute of the model;
- globals that the classes' own module has, and that their code reads and never sets, are the same;
- no tensor was written into by an operation that torch counts (``_version``), asks for gradients, or has one;
- torch's process-wide settings (``STATES``), function modes and dispatch modes among them, are the same.

What is likely: writes that torch does not count, as those through ``.data`` or numpy. Tensors that no merge rewrites
are compared bit by bit after each call of user code (large ones on 32 elements). Merged weights are compared bit by bit
after the first call of each objective that another one follows, and on 32 elements of each tensor after every later
call.

Threads that a call leaves behind may write at any moment. Those that end within a tenth of a second (a second in all)
count as a part of the call. While others live, and until what they did has been looked for once more, each merge is
made twice and compared bit by bit, and the model is compared after each call, ours too. Any difference fails the
candidate at hand, and all later ones as long as they live; the message names the objective that left a thread first. It
is likely only that no score is wrong then: a thread may take back what it wrote before the call ends, damage both
merges alike, or change a setting of the process for a moment. Threads that ``threading`` does not know are not known.

Not looked for: kernels that ``torch.library`` registers, the code of a function (``__code__``), objects other than
those above (arrays of numpy, instances of other classes), globals of other modules, and libraries in C.

Weights that were written into are merged again before the next objective. What cannot be put back makes this candidate
and all later ones of the worker fail.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules_of_torch
from torch.utils import _device as device_of_torch
from torch.utils._python_dispatch import TorchDispatchMode

from ecotone.fitness.guarded_names import OF_TORCH, Globals, Names, of_torch
from ecotone.fitness.guarded_values import SINGLE, Contents
from ecotone.fitness.guarded_weights import Weights
from ecotone.populations.errors import InputError

_SORTS = {"_parameters": "parameters", "_buffers": "buffers", "_modules": "layers"}
_METHODS = attrgetter("forward", "__call__", "_call_impl", "__getattr__")
_SETTINGS = frozenset({"torch's functions", "classes", "globals"})
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
            ``classes``, ``globals``, ``gradients``, ``weights``, ``torch's functions``, or a setting of ``STATES``.
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
    yield State("dispatch modes", torch._C._len_torch_dispatch_stack, _pop_dispatch)
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


def _pop_dispatch(length: int) -> None:
    while (now := torch._C._len_torch_dispatch_stack()) > length:
        mode = torch._C._get_dispatch_stack_at(now - 1)
        with suppress(Exception):  # it may have been put on the stack without __enter__
            leave: Callable[..., None] = TorchDispatchMode.__exit__  # it resets flags of torch; a subclass may do more
            leave(mode, None, None, None)
        if torch._C._len_torch_dispatch_stack() == now:
            torch._C._pop_torch_dispatch_stack()


def _leave_inference(on: bool) -> None:
    """Nothing: torch leaves inference mode only where it was entered. The comparison that follows says so."""


STATES: tuple[State, ...] = tuple(_states())
"""Torch's settings that change scores: types, devices, modes, precisions, threads, deterministic algorithms."""
_GETS = tuple(state.get for state in STATES)


class Process:
    """The process-wide settings, as they are when user code begins.

    Args:
        names: Torch's functions as they should be; None takes them as they are.
    """

    def __init__(self, names: Names | None = None) -> None:
        self._before = [get() for get in _GETS]
        self.names: Names = Names(OF_TORCH) if names is None else names

    def begin(self) -> None:
        """Settings that differ now are the caller's own: another thread has other modes."""
        self._before = [get() for get in _GETS]

    def same(self) -> bool:
        """Whether the settings are as they were; functions are left out."""
        return [get() for get in _GETS] == self._before

    def mend(self, *, foreign: bool) -> list[Change]:
        """Put back what differs; return it.

        Args:
            foreign: Look at torch's functions and the methods of tensors, too.

        Raises:
            SpoiledError: Something cannot be put back.
        """
        changes = [] if self.same() else self._put_back()
        if foreign and not self.names.same():
            changes += [Change("torch's functions", name) for name in self.names.put_back()]
            if not self.names.same():
                raise SpoiledError("it changed torch's functions in a way that cannot be put back", _UNDO)
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


class Structure:
    """Modules, parameters, buffers, hooks, attributes, classes and globals of a model, as they are now.

    Args:
        model: A module, or a dict of tensors.
    """

    def __init__(self, model: nn.Module | dict[str, Tensor]) -> None:
        self._contents = Contents()
        self._modules: list[nn.Module] = []
        if isinstance(model, nn.Module):
            for name, module in model.named_modules():
                self._modules.append(module)
                self._watch_module(name, module)
        else:
            self._contents.watch(model, "parameters", "")
        for name, value in vars(modules_of_torch).items():
            if name.startswith("_global_") and isinstance(value, dict):
                self._contents.watch(value, "hooks", "all modules")
        self._types = [type(module) for module in self._modules]
        self._classes = list(dict.fromkeys(self._types))
        self._methods = [*map(_METHODS, self._classes)]
        parents = dict.fromkeys(chain.from_iterable(one.__mro__ for one in self._classes))
        self._names = Names([one for one in parents if one is not object], self._used)
        self._globals = Globals(self._classes)
        for one in parents:
            for key, value in vars(one).items() if not of_torch(one) else ():
                if not key.startswith("__"):
                    self._contents.follow(value, "classes", f"{one.__name__}.{key}")
        for place, value in self._globals.values():
            self._contents.follow(value, "globals", place)
        self._contents.seal()

    def same(self) -> bool:
        """Whether nothing differs, quickly; most names of classes, and globals, are left out."""
        return (
            self._contents.same()
            and [*map(type, self._modules)] == self._types
            and [*map(_METHODS, self._classes)] == self._methods
        )

    def same_names(self) -> bool:
        """Whether names of classes and dicts stand for what they did, and globals, too."""
        return self._names.same() and self._globals.same() and self._contents.same_keys()

    def mend(self) -> list[Change]:
        """Put back what differs; return it."""
        changes = []
        for module, kind in zip(self._modules, self._types, strict=True):
            if type(module) is not kind:
                module.__class__ = kind
                changes.append(Change("classes", kind.__name__))
        changes += [Change(kind, place) for kind, place in self._contents.put_back()]
        changes += [Change("classes", name) for name in self._names.put_back()]
        return changes + [Change("globals", name) for name in self._globals.put_back()]

    def _used(self) -> set[str]:
        """Names that the modules have: a name of a class would hide them."""
        sorts = (vars(module) for module in self._modules)
        inner = [(own, *(own[sort] for sort in _SORTS if sort in own)) for own in sorts]
        return {*chain.from_iterable(chain.from_iterable(inner))}

    def _watch_module(self, name: str, module: nn.Module) -> None:
        own = vars(module)
        self._contents.watch(own, "attributes", name)
        for key, value in own.items():
            if type(value) in SINGLE:
                continue
            place = f"{name}.{key}".strip(".")
            hooks = key.endswith("_hooks") or "_hooks_" in key
            if isinstance(value, dict) and (hooks or key in _SORTS):
                self._contents.watch(value, _SORTS.get(key, "hooks"), name)
            else:
                self._contents.follow(value, "attributes", place)


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
        self.structure: Structure = Structure(model)
        self.weights: Weights = Weights(model, rewritten)

    def same(self) -> bool:
        return self.structure.same() and self.weights.same()


class Inside:
    """Guards one call in the middle of a gradient, where flags and methods differ from those of a model at rest.

    Args:
        model: The module.
        shown: What is known of its tensors.
        names: Torch's functions as they should be.
    """

    def __init__(self, model: nn.Module, shown: _Guarded | None, names: Names) -> None:
        self._structure = Structure(model)
        self._process = Process(names)
        self._shown = shown

    def mend(self) -> list[Change]:
        """Put back what differs, in tensors that are not merged, too; return it."""
        changes = self._process.mend(foreign=True)
        if not (self._structure.same() and self._structure.same_names()):
            changes += self._structure.mend()
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

    def watch(self, *, whole: bool) -> None:
        """User code is about to be called, and other code uses the same weights afterwards.

        Args:
            whole: Compare the weights bit by bit afterwards.
        """
        if self._shown is not None:
            self._shown.weights.watch(whole=whole)

    def digest(self, *, keep: bool = False) -> int | None:
        """A hash of the weights that are shown; None if nothing is known of them.

        Args:
            keep: Compare the weights with it after the next calls.
        """
        return None if self._shown is None else self._shown.weights.digest(keep=keep)

    def inside(self, model: nn.Module) -> Inside:
        """A guard of ``model`` as it is now, for a call in the middle of a gradient: parameters ask for gradients."""
        return Inside(model, self._shown, self._process.names)

    def written(self) -> list[str]:
        """Names of the shown model's tensors that were written into since ``shown``."""
        return [] if self._shown is None else self._shown.weights.changed()

    def after(
        self, user: User, *, merged: bool = True, fixed: bool = True, blamed: User | None = None
    ) -> tuple[list[Change], bool]:
        """User code has been called: put back what it changed, and tell of it.

        Args:
            user: The code.
            merged: Whether ``shown`` was called before: else it is not known which weights there should be.
            fixed: Whether the tensors that are not merged are those of merges.
            blamed: Whose threads may have made the changes; None blames ``user``.

        Returns:
            What was changed, and whether the weights must be merged again.

        Raises:
            SpoiledError: Something cannot be put back. Every later ``shown`` raises it as well.
        """
        user.calls += 1
        blamed = blamed or user
        if not blamed.foreign and self._quiet(merged):
            return [], False
        try:
            changes = self._process.mend(foreign=blamed.foreign)
            again = False
            for guarded in self._all():
                known = merged and guarded is self._shown
                found, written = self._mended(guarded, blamed, known, fixed or guarded in self._heads)
                changes, again = [*changes, *found], again or written
        except SpoiledError as error:
            self._spoilt = SpoiledError(f"{blamed.subject} cannot be undone: {error.message}.", error.remedy)
            raise self._spoilt from None
        if changes and blamed.foreign:
            tell(blamed, changes)
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

    def _mended(self, guarded: _Guarded, user: User, merged: bool, others: bool) -> tuple[list[Change], bool]:
        """Put a model back. Returns what was changed, and whether its weights must be merged again."""
        weights, structure = guarded.weights, guarded.structure
        same = structure.same() and (not user.foreign or structure.same_names())
        quiet = same and (not merged or weights.same())
        changes = [] if same else structure.mend()
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
        if not (same or (structure.same() and structure.same_names())):
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
        settings = any(kind == state.name for state in STATES) or kind in _SETTINGS
        done = "The weights are merged again." if kind == "weights" else "That is put back after each call."
        user.warn(kind, f"{user.subject} changed {kind}{where}. {done} {_UNDO if settings else _COPY}")
