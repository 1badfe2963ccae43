"""Python functions as objectives: which way is better, and how a recipe written in Python names them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from ecotone.populations.errors import InputError

Function = TypeVar("Function", bound=Callable[..., Any])
Direction = Literal["maximize", "minimize"]

_DIRECTION = "__ecotone_direction__"


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
        InputError: The direction is neither.

    Example::

        @objective(direction="minimize")
        def loss(model, path):
            return 0.5

        recipe["objectives"] = {"search": [as_objective(loss, path="data.json")]}
    """
    if direction not in ("maximize", "minimize"):
        raise InputError(f"objective: direction: expected maximize or minimize, found {direction!r}.")

    def marked(one: Function) -> Function:
        setattr(one, _DIRECTION, direction)
        return one

    return marked if function is None else marked(function)


def direction_of(function: Callable[..., Any]) -> Direction | None:
    """The direction that a function was marked with; None of one that is not marked."""
    return getattr(function, _DIRECTION, None)


def as_objective(function: Callable[..., Any], name: str | None = None, **arguments: Any) -> dict[str, Any]:
    """A recipe's objective that calls a function, for recipes that are written in Python.

    Args:
        function: The objective, marked by ``objective`` or not.
        name: What its scores are called; by default the function's name.
        arguments: Keyword arguments that it is called with, plain values.

    Raises:
        InputError: Workers cannot import the function: it is no plain function of a module or file.
    """
    return {
        "name": name or function.__name__,
        "type": "call",
        "direction": direction_of(function) or "maximize",
        "call": _named(function),
        "arguments": arguments,
    }


def _named(function: Callable[..., Any]) -> str:
    """The function as recipes name it: by its module, or by its file where its module is the program itself."""
    path, module = function.__qualname__, function.__module__
    if "<" in path:
        raise InputError(
            f"objective: expected a function that workers can import, found {path!r}.", "Define it in a module's body."
        )
    if module != "__main__":
        return f"{module}:{path}"
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is None or inspect.getsourcefile(function) is None:
        raise InputError(
            f"objective: expected {path!r} in a file, found it in a notebook or a shell.",
            "Write it into a file, e.g. metrics.py, and import it from there.",
        )
    return f"{Path(file).resolve()}:{path}"
