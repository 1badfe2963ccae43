"""The preparation step of a recipe: run once, into a folder of the cache that is named by all that it depends on."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ecotone.experiments.recipe import Recipe
from ecotone.fitness.callables import resolve
from ecotone.populations.errors import EcotoneError, InputError
from ecotone.populations.files import all_synchronised, synchronised
from ecotone.populations.folders import cache_folder
from ecotone.populations.secrets import plain
from ecotone.settings import split_call


def prepared_folder(recipe: Recipe) -> Path | None:
    """The folder of the recipe's preparation step; None without a step.

    It is named by the recipe, and by the function, its arguments and the source of its module: after an edit the step
    runs again. What a recipe of another name has prepared by the same step is taken as it is.
    """
    if recipe.prepare is None:
        return None
    folders, key = cache_folder() / "prepared", _preparation_key(recipe)
    own = folders / f"{recipe.name}-{key}"
    return own if own.is_dir() else min(folders.glob(f"*-{key}"), default=own)


def _preparation_key(recipe: Recipe) -> str:
    """16 hexadecimal digits of everything that changes the step's output."""
    assert recipe.prepare is not None
    place, function, is_file = split_call(recipe.prepare.call)
    name = f"{Path(place).name}:{function}" if is_file else recipe.prepare.call  # a job's folder is another each time
    text = json.dumps([name, plain(_preparation_arguments(recipe)), _module_source(recipe)], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def prepare(recipe: Recipe) -> Path | None:
    """Run the preparation step unless its folder is there; the folder appears whole or not at all.

    Raises:
        InputError: The function cannot be found, refuses its arguments, or fails.
    """
    folder = prepared_folder(recipe)
    if folder is None or folder.is_dir():
        return folder
    assert recipe.prepare is not None
    function = resolve(recipe.prepare.call, "prepare.call")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder.parent).close()
    except OSError as error:
        raise InputError(
            f"prepare: {folder.parent} cannot be written ({error.strerror or error}).",
            "What the preparation step makes is kept there; $ECOTONE_CACHE names another folder.",
        ) from error
    with _only_one(folder.parent / f"{_preparation_key(recipe)}.lock"):
        folder = prepared_folder(recipe)  # a recipe of another name may have come first
        assert folder is not None
        if folder.is_dir():
            return folder
        work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            function(str(work), **_preparation_arguments(recipe))
            all_synchronised(work)
            work.rename(folder)
            synchronised(folder.parent)
        except EcotoneError as error:
            raise type(error)(f"prepare: {error.message}", error.remedy) from error
        except Exception as error:
            raise InputError(
                f"prepare: {recipe.prepare.call} failed: {type(error).__name__}: {error}", "Check prepare.arguments."
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def _preparation_arguments(recipe: Recipe) -> dict[str, Any]:
    """The step's arguments; the recipe's seed is added when the function takes a seed and none is given."""
    assert recipe.prepare is not None
    arguments = dict(recipe.prepare.arguments)
    function = resolve(recipe.prepare.call, "prepare.call")
    if "seed" in inspect.signature(function).parameters:
        arguments.setdefault("seed", recipe.seed)
    return arguments


def _module_source(recipe: Recipe) -> str:
    """The text of the module that defines the step's function; empty when it has none, as of builtins."""
    assert recipe.prepare is not None
    function = inspect.unwrap(resolve(recipe.prepare.call, "prepare.call"))
    module = inspect.getmodule(function)
    try:
        return "" if module is None else inspect.getsource(module)
    except (OSError, TypeError):
        return ""


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
