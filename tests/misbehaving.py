"""Kinds of objectives that change the model or the process, and return a right score.

Each is a Python function for a recipe's ``call``. It scores what ``well`` scores, and then, or before it returns,
changes something that would make later scores wrong. A benchmark runs them one by one beside a well-behaved objective
and counts the scores that differ from those of a run with ``well`` alone.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from itertools import count
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

GAIN = 1.0
GAINS = {"first": [1.0]}


def net() -> nn.Module:
    """The architecture: two layers, a buffer that no file has, and a factor."""
    return _Net()


_made: WeakSet[nn.Module] = WeakSet()


def gain() -> float:
    """What the architecture's outputs are multiplied with."""
    return GAIN * GAINS["first"][0]


class _Net(nn.Module):
    scale = 1.0
    sizes = {"outputs": 1.0}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.5)
        self.factor = 1.0
        self.tables = [[1.0], ({"one": 1.0},)]
        _made.add(self)
        self.register_buffer("shift", torch.linspace(-1, 1, 6), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(inputs) + self.shift)
        found: torch.Tensor = self.second(self.drop(hidden)) * self.factor
        found = found * self.scale * self.sizes["outputs"]
        table: Any = self.tables
        return found * table[0][0] * table[1][0]["one"] * gain()


def well(model: Any) -> float:
    """A sum of outputs that depends on every weight; of a dict of tensors, of its tensors."""
    if isinstance(model, dict):
        return float(sum((place + 1) * one.double().sum() for place, one in enumerate(model.values())))
    inputs = torch.linspace(-1, 1, 32).reshape(8, 4)
    return float(model(inputs.to(next(model.parameters()).dtype)).double().square().sum())


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs, and labels."""
    return torch.linspace(-1, 1, 32).reshape(8, 4), torch.arange(8) % 3


class Head(nn.Module):
    """A classification head that scales outputs, and then changes something.

    Args:
        bad: ``itself`` (its weight), ``model`` (a hook), ``weights`` (of the model), or the number of a kind.
    """

    def __init__(self, bad: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self._bad = bad

    def forward(self, outputs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Logits."""
        found = outputs * self.scale
        if self._bad == "itself":
            self.scale.data.mul_(2)
        for model in [*_made] if self._bad else []:  # as code may that keeps it somewhere
            if self._bad == "model":
                _forward_hook(model)
            elif self._bad == "weights":
                _written(model)
            elif self._bad != "itself":
                list(KINDS.values())[int(self._bad)](model)
        return found


def scored_first(change: Callable[[Any], object]) -> Callable[[Any], float]:
    def function(model: Any) -> float:
        value = well(model)
        change(model)
        return value

    function.__doc__ = change.__doc__
    return function


def _layer(model: Any) -> None:
    """Replaces a layer."""
    model.second = nn.Linear(6, 3)


def _parameter(model: Any) -> None:
    """Replaces a parameter."""
    model.first.weight = nn.Parameter(torch.ones(6, 4))


def _forward_hook(model: Any) -> None:
    """Adds a hook that changes outputs."""
    model.first.register_forward_hook(lambda module, inputs, output: output * 2)


def _pre_hook(model: Any) -> None:
    """Adds a hook that changes inputs."""
    model.second.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def _global_hook(model: Any) -> None:
    """Adds a hook to all modules of the process."""
    nn.modules.module.register_module_forward_hook(lambda module, inputs, output: output + 1)


def _forward(model: Any) -> None:
    """Patches ``forward`` of the model."""
    plain = model.forward
    model.forward = lambda inputs: plain(inputs) + 1


def _class_forward(model: Any) -> None:
    """Patches ``forward`` of a class."""
    plain = nn.Linear.forward
    nn.Linear.forward = lambda self, inputs: plain(self, inputs) * 3  # type: ignore[method-assign]


def _function(model: Any) -> None:
    """Patches a function of torch."""
    plain = nn.functional.linear
    nn.functional.linear = lambda *given: plain(*given) + 1


def _parametrized(model: Any) -> None:
    """Registers a parametrization."""

    class Half(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    parametrize.register_parametrization(model.first, "weight", Half())


def _mode(model: Any) -> None:
    """Leaves the model in training mode."""
    model.train()


def _written(model: Any) -> None:
    """Writes into the weights."""
    with torch.no_grad():
        for tensor in model.values() if isinstance(model, dict) else model.parameters():
            tensor.mul_(0.5)


def _written_data(model: Any) -> None:
    """Writes into the weights through ``.data``, which torch does not count."""
    for tensor in model.values() if isinstance(model, dict) else model.parameters():
        tensor.data.add_(1)


def _moved(model: Any) -> None:
    """Gives parameters other memory."""
    for tensor in model.parameters():
        tensor.data = torch.zeros_like(tensor)


def _halved(model: Any) -> None:
    """Converts the model to another type."""
    model.to(torch.bfloat16)


def _buffer(model: Any) -> None:
    """Writes into a buffer that no merge rewrites."""
    model.shift.data.fill_(5)


def _attribute(model: Any) -> None:
    """Sets an attribute that ``forward`` reads."""
    model.factor = 7.0


def _gradients(model: Any) -> None:
    """Switches gradients on, and leaves some."""
    model.requires_grad_(True)
    with torch.enable_grad():
        model(torch.ones(2, 4)).sum().backward()


def _default_type(model: Any) -> None:
    """Changes the default type of tensors."""
    torch.set_default_dtype(torch.float64)


def _autocast(model: Any) -> None:
    """Leaves autocast on."""
    torch.autocast("cpu", dtype=torch.bfloat16).__enter__()


def _function_mode(model: Any) -> None:
    """Leaves a mode on that changes torch's functions."""

    class Twice(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
            found = function(*given, **(named or {}))
            return found * 2 if function is torch.relu else found

    Twice().__enter__()


def _method_of_tensors(model: Any) -> None:
    """Adds a method to tensors that hides the one that they inherit."""
    plain = torch.Tensor.__mul__
    torch.Tensor.__mul__ = lambda self, other: plain(self, other) + 1  # type: ignore[method-assign, assignment, operator]


def _class_attribute(model: Any) -> None:
    """Sets an attribute of the model's class."""
    type(model).scale = 2.0


def _class_values(model: Any) -> None:
    """Writes into a dict of the model's class."""
    type(model).sizes["outputs"] = 2.0


def _property(model: Any) -> None:
    """Adds a property that hides an attribute."""
    type(model).factor = property(lambda self: 3.0, lambda self, value: None)


def _property_of_modules(model: Any) -> None:
    """Adds a property to a class of torch that hides an attribute."""
    nn.Module.factor = property(lambda self: 3.0, lambda self, value: None)  # type: ignore[attr-defined]


def _nested_list(model: Any) -> None:
    """Writes into a list in a list."""
    model.tables[0][0] = 5.0


def _nested_dict(model: Any) -> None:
    """Writes into a dict in a tuple in a list."""
    model.tables[1][0]["one"] = 5.0


def _dispatch_mode(model: Any) -> None:
    """Leaves a mode on that changes torch's operators."""

    class Twice(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
            found = function(*given, **(named or {}))
            return found * 2 if "relu" in str(function) else found

    Twice().__enter__()


_numbers = count()


def _third_function(model: Any) -> None:
    """Patches a function of torch at every third call."""
    if next(_numbers) % 3 == 2:
        torch.relu = lambda inputs: inputs * 2


def _global(model: Any) -> None:
    """Sets a global that the model's module reads."""
    globals()["GAIN"] = 2.0


def _global_values(model: Any) -> None:
    """Writes into a list in a global."""
    GAINS["first"][0] = 2.0


def _global_function(model: Any) -> None:
    """Patches a function of the model's module."""
    globals()["gain"] = lambda: 3.0


def _timer(model: Any) -> None:
    """Leaves a timer armed, whose signal ends the process."""
    signal.setitimer(signal.ITIMER_REAL, 0.02)


def _thread(model: Any) -> None:
    """Leaves a thread that writes into the weights a little later."""

    def write() -> None:
        for _ in range(4):
            time.sleep(0.0005)
            _written(model)

    threading.Thread(target=write).start()


def _thread_data(model: Any) -> None:
    """Leaves a thread that writes into one weight through ``.data`` a little later."""

    def write() -> None:
        for _ in range(4):
            time.sleep(0.0005)
            model.second.weight.data[1, 1] += 1

    threading.Thread(target=write).start()


def _long_thread(model: Any) -> None:
    """Leaves a thread that goes on writing into the weights."""

    def write() -> None:
        for _ in range(400):
            time.sleep(0.0005)
            _written(model)

    name = f"writes into {id(model)}"
    if all(thread.name != name for thread in threading.enumerate()):
        threading.Thread(target=write, name=name, daemon=True).start()


KINDS: dict[str, Callable[[Any], object]] = {
    "replaces a layer": _layer,
    "replaces a parameter": _parameter,
    "adds a forward hook": _forward_hook,
    "adds a pre-hook": _pre_hook,
    "adds a hook to all modules": _global_hook,
    "patches forward": _forward,
    "patches forward of a class": _class_forward,
    "patches a function of torch": _function,
    "registers a parametrization": _parametrized,
    "leaves training mode on": _mode,
    "writes into weights": _written,
    "writes into weights through .data": _written_data,
    "gives parameters other memory": _moved,
    "converts the model": _halved,
    "writes into a buffer": _buffer,
    "sets an attribute": _attribute,
    "switches gradients on": _gradients,
    "changes the default type": _default_type,
    "leaves autocast on": _autocast,
    "leaves a function mode on": _function_mode,
    "adds a method to tensors": _method_of_tensors,
    "sets an attribute of a class": _class_attribute,
    "writes into a dict of a class": _class_values,
    "adds a property": _property,
    "adds a property to all modules": _property_of_modules,
    "writes into a list in a list": _nested_list,
    "writes into a dict in a tuple": _nested_dict,
    "leaves a dispatch mode on": _dispatch_mode,
    "patches a function at its third call": _third_function,
    "sets a global": _global,
    "writes into a global's list": _global_values,
    "patches a function of the model's module": _global_function,
    "leaves a timer armed": _timer,
    "leaves a thread that writes": _thread,
    "leaves a thread that writes through .data": _thread_data,
    "leaves a thread that goes on writing": _long_thread,
}
"""The kinds: what an objective does besides scoring, by its name in a table."""

MAY_FAIL = ("leaves a thread that goes on writing",)
"""Those whose candidates may fail."""

OF_DICTS = ("writes into weights", "writes into weights through .data", "changes the default type")
"""Those that also work on a dict of tensors."""

FUNCTIONS: dict[str, Callable[[Any], float]] = {
    f"bad_{number}": scored_first(change) for number, change in enumerate(KINDS.values())
}
globals().update(FUNCTIONS)  # a recipe names a function by its module and name


def call_of(kind: str) -> str:
    """The recipe's ``call`` of a kind."""
    return f"misbehaving:bad_{list(KINDS).index(kind)}"
