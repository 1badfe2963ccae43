"""Python functions as objectives: which way is better, and how a recipe written in Python names them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Literal, TypeVar, overload

from ecotone.populations.errors import InputError

Function = TypeVar("Function", bound=Callable[..., Any])
Direction = Literal["maximize", "minimize"]

FILE_MODULE = "_ecotone_file_"  # the names of modules that are loaded from a call's file begin so

_DIRECTION = "__ecotone_direction__"
_NOT_NAMED = (type, staticmethod, classmethod, partial, BuiltinFunctionType)


@overload
def objective(function: Function, *, direction: Direction = "maximize") -> Function: ...


@overload
def objective(function: None = None, *, direction: Direction = "maximize") -> Callable[[Function], Function]: ...


def objective(function: Any = None, *, direction: Direction = "maximize") -> Any:
    """Say of a Python function that it is an objective, and which way is better.

    A recipe that names the function must say the same direction: a loss that is maximised by mistake is refused before
    anything is scored. The function itself is not changed.

    Args:
        function: Takes the merged model (and keyword arguments) and returns a number, or a number and scores by
            example.
        direction: Whether more is better or less.

    Raises:
        InputError: The direction is neither, or ``function`` is no function that can be marked.

    Example::

        @objective(direction="minimize")
        def loss(model, path):
            return 0.5

        recipe["objectives"] = {"search": [as_objective(loss, path="data.json")]}
    """
    if direction not in ("maximize", "minimize"):
        raise InputError(f"objective: direction: expected maximize or minimize, found {direction!r}.")

    def marked(one: Function) -> Function:
        _check_function(one)
        try:
            setattr(one, _DIRECTION, direction)
        except (AttributeError, TypeError) as error:
            raise _no_function(one) from error
        return one

    return marked if function is None else marked(function)


def direction_of(function: Callable[..., Any]) -> Direction | None:
    """The direction that a function was marked with; None of one that is not marked."""
    return getattr(function, _DIRECTION, None)


def as_objective(function: Callable[..., Any], name: str | None = None, /, **arguments: Any) -> dict[str, Any]:
    """A recipe's objective that calls a function, for recipes that are written in Python.

    The first two are given by position, so that the function may have arguments of these names.

    Args:
        function: The objective, marked by ``objective`` or not.
        name: What its scores are called; by default the function's name.
        arguments: Keyword arguments that it is called with, plain values.

    Raises:
        InputError: Workers cannot import the function: it is no plain function of a module or file.
    """
    _check_function(function)
    return {
        "name": name or function.__name__,
        "type": "call",
        "direction": direction_of(function) or "maximize",
        "call": _named(function),
        "arguments": arguments,
    }


def _check_function(function: object) -> None:
    """Refuse what recipes cannot name: it is not itself what stands under its name in a module."""
    if isinstance(function, MethodType):  # a class method does stand there, unless the class inherits it
        owner = getattr(function.__self__, "__qualname__", None)
        named = function.__qualname__ == f"{owner}.{function.__name__}"
    else:
        names = [getattr(function, name, None) for name in ("__name__", "__qualname__", "__module__")]
        named = not isinstance(function, _NOT_NAMED) and all(isinstance(name, str) for name in names)
    if not (named and callable(function)):
        raise _no_function(function)


def _no_function(found: object) -> InputError:
    if isinstance(found, str):
        direction = found if found in ("maximize", "minimize") else "minimize"
        remedy = f'Give the function itself. The direction is said so: @objective(direction="{direction}").'
    elif isinstance(found, staticmethod | classmethod):
        remedy = f"Put @objective below @{type(found).__name__}."
    else:
        remedy = "Wrap it in a def: def score(model): return ..."
    return InputError(
        f"objective: expected a function at the top level of a module or a script, found {_described(found)}.", remedy
    )


def _described(found: object) -> str:
    if isinstance(found, MethodType):
        return f"the bound method {found.__qualname__!r}"
    if isinstance(found, BuiltinFunctionType):
        return f"the builtin {found.__qualname__!r}"
    if isinstance(found, type):
        return f"the class {found.__qualname__!r}"
    if isinstance(found, partial):
        return "a functools.partial"
    if callable(found):
        return f"an object of type {type(found).__qualname__!r}"
    return repr(found)


def _named(function: Callable[..., Any]) -> str:
    """The function as recipes name it: by its module, or by its file where other processes cannot import its module."""
    path, module = function.__qualname__, function.__module__
    if "<" in path:
        raise InputError(
            f"objective: expected a function that workers can import, found {path!r}.", "Define it in a module's body."
        )
    if module != "__main__" and not module.startswith(FILE_MODULE):
        return f"{module}:{path}"
    file = getattr(sys.modules.get(module), "__file__", None)
    inner = inspect.unwrap(function, stop=inspect.isfunction)
    if file is None or not isinstance(inner, FunctionType | MethodType) or inspect.getsourcefile(inner) is None:
        raise InputError(
            f"objective: expected {path!r} in a file, found it in a notebook or a shell.",
            "Write it into a file, e.g. metrics.py, and import it from there.",
        )
    return f"{Path(file).resolve()}:{path}"
