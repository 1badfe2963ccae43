"""Functions that a recipe names as ``package.module:function``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import reduce
from typing import Any

from ecotone.populations.errors import EcotoneError, InputError, nearest
from ecotone.settings import Call


def resolve(path: str, field: str = "call") -> Callable[..., Any]:
    """The function that ``path`` names.

    Args:
        path: ``package.module:function``; the part after the colon may be dotted (``module:Class.method``).
        field: Where the user wrote it, for the error message.

    Raises:
        InputError: There is no colon, no such module, no such attribute, or it cannot be called.
    """
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise InputError(
            f"{field}: expected 'package.module:function', found {path!r}.", "Put a colon before the function."
        )
    module = _imported(module_name, path, field)
    try:
        function = reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise InputError(
            f"{field}: module {module_name!r} has no {attribute!r} (of {path!r}).", nearest(attribute, known)
        ) from error
    if not callable(function):
        raise InputError(f"{field}: expected a function at {path!r}, found {type(function).__name__}.")
    return function  # type: ignore[no-any-return]


def call(spec: Call, field: str = "call") -> Any:
    """What the function of ``spec`` returns for its arguments.

    Raises:
        InputError: It cannot be resolved, or it raised; the message names ``field``.
    """
    function = resolve(spec.call, field)
    try:
        return function(**spec.arguments)
    except EcotoneError:
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise InputError(f"{field}: {spec.call}({_shown(spec)}) raised {found}.") from error


def _imported(name: str, path: str, field: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise InputError(
                f"{field}: importing {name!r} (of {path!r}) needs the module {error.name!r}, which is not installed."
            ) from error
        raise InputError(
            f"{field}: no module named {error.name!r} (of {path!r}).",
            "Check the spelling, and that every worker can import it: install it, or put its folder on the path.",
        ) from error
    except Exception as error:
        raise InputError(
            f"{field}: importing {name!r} (of {path!r}) raised {type(error).__name__}: {error}."
        ) from error


def _shown(spec: Call) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in spec.arguments.items())
