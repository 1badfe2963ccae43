"""Functions that a recipe names, as ``package.module:function`` or ``path/to/file.py:function``.

A file is loaded under a private name, so it can be called as any module is. Folders of the user's own modules come last
on the Python path, so none of their names hides an installed package.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterable
from functools import cache, reduce
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from ecotone.fitness.former_names import present_name, tell
from ecotone.marked import FILE_MODULE
from ecotone.populations.errors import EcotoneError, InputError, nearest, sentence, told
from ecotone.settings import Call, split_call

_loading = threading.RLock()


def put_last(folders: Iterable[str]) -> None:
    """Put folders of the user's own modules at the end of the Python path, in this process.

    They are moved there if they stand anywhere else: Ray and ``python -m`` put the working directory first, where a
    ``datasets.py`` beside the recipe would be imported in place of the installed package.
    """
    last = {os.path.realpath(folder): folder for folder in folders}
    others = [entry for entry in sys.path if os.path.realpath(entry) not in last]
    sys.path[:] = [*others, *last.values()]


@cache
def _installed() -> tuple[str, ...]:
    """The folders of installed packages and of Python's own, each as it is named and as it is, with a slash."""
    places = (sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib", "platstdlib"))
    return tuple(f"{path}{os.sep}" for place in places for path in (place, os.path.realpath(place)))


def is_installed(file: str | Path) -> bool:
    """Whether a file is of an installed package, or of Python itself, and so none of the user's own."""
    return str(file).startswith(_installed()) or os.path.realpath(file).startswith(_installed())


def resolve(path: str, field: str = "call") -> Callable[..., Any]:
    """The function that ``path`` names.

    Args:
        path: ``package.module:function`` or ``path/to/file.py:function``; the part after the colon may be dotted
            (``module:Class.method``). A relative path of a file is one from the working directory.
        field: The field in which the user wrote it, for the error message.

    Raises:
        InputError: There is no colon, a file's name lacks its .py, no such module or file, no such attribute, or it
            cannot be called; or the module or file raises when it is imported.
    """
    place, attribute, is_file = split_call(path)
    if not (place and attribute):
        raise InputError(
            f"{field}: expected 'package.module:function' or './file.py:function', found {path!r}.",
            "Put a colon before the function.",
        )
    if not is_file and (place.startswith((".", "~")) or place.endswith(".py") or os.sep in place):
        found = f"{attribute!r} after {place!r}" if place.endswith(".py") else repr(place)
        raise InputError(
            f"{field}: expected 'package.module:function' or './file.py:function', found {path!r}.",
            f"A file's name ends in .py, and one function follows after a colon: found {found}.",
        )
    module = _loaded(Path(place), path, field) if is_file else _imported(place, path, field)
    try:
        function = reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        origin = getattr(module, "__file__", None) or ", ".join(getattr(module, "__path__", ()))
        raise InputError(
            f"{field}: {'file' if is_file else 'module'} {place!r} has no {attribute!r} (of {path!r}).",
            nearest(attribute, known) if known else f"It was found at {origin}, and has no functions.",
        ) from error
    if not callable(function):
        raise InputError(f"{field}: expected a function at {path!r}, found {type(function).__name__}.")
    return function


def call(spec: Call, field: str = "call") -> Any:
    """The value that the function of ``spec`` returns for its arguments.

    Raises:
        InputError: The function cannot be resolved, or it raised. The message names ``field``.
    """
    function = resolve(spec.call, field)
    try:
        return function(**spec.arguments)
    except (EcotoneError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit and its like are no end of the search
        raise InputError(f"{field}: {spec.call}({_shown(spec)}) raised {told(error)}.") from error


# -- modules -------------------------------------------------------------------------------------------------


def _imported(name: str, path: str, field: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise InputError(
                f"{field}: importing {name!r} (of {path!r}) needs the module {error.name!r}, which is not installed."
            ) from error
        present = present_name(name)
        if present is not None:
            tell(name, present)
            return _imported(present, path, field)
        raise InputError(
            f"{field}: no module named {error.name!r} (of {path!r}).",
            "Check the spelling, and that every worker can import it: install it, or put its folder on the path "
            "(--folder DIR of resume, export and verify).",
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise InputError(sentence(f"{field}: importing {name!r} (of {path!r}) raised {told(error)}")) from error


# -- files ---------------------------------------------------------------------------------------------------


def _loaded(file: Path, path: str, field: str) -> ModuleType:
    """The module of a file, loaded once a process; the file's folder is put last on the Python path."""
    file = file.expanduser().absolute()
    if not file.is_file():
        known = [one.name for one in file.parent.glob("*.py")]
        hint = nearest(file.name, known) if known else "It must be there on every machine that has workers."
        raise InputError(f"{field}: no such file: {file} (of {path!r}).", hint)
    key = hashlib.blake2b(os.fsencode(os.path.realpath(file)), digest_size=8).hexdigest()
    name = f"{FILE_MODULE}{key}"
    with _loading:
        if name not in sys.modules:
            put_last([str(file.parent)])
            _execute(name, file, path, field)
        return sys.modules[name]


def _execute(name: str, file: Path, path: str, field: str) -> None:
    """Run a file as the module of that name; a file that raises leaves none behind."""
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, KeyboardInterrupt):
            raise _broken(file, path, field, error) from error
        raise


def _broken(file: Path, path: str, field: str, error: BaseException) -> InputError:
    line = _line(file, error)
    where = str(file) if line is None else f"{file}, line {line}"
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        return InputError(
            f"{field}: {where} (of {path!r}) needs the module {error.name!r}, which is not installed.",
            "Install it, or put its file beside this one.",
        )
    return InputError(sentence(f"{field}: loading {where} (of {path!r}) raised {told(error)}"))


def _line(file: Path, error: BaseException) -> int | None:
    """The line of the file at which it failed to load."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return lines[-1] if lines else None


def _shown(spec: Call) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in spec.arguments.items())
