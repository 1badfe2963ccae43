"""The ready recipes that are installed with Ecotone, found by name from any folder."""

from __future__ import annotations

from pathlib import Path

from ecotone.populations.errors import InputError, nearest

_FOLDER = Path(__file__).parent / "recipes"
_PLACES = (".", "recipes", "experiments/recipes")  # folders under which users name a ready recipe


def recipe_file(path: str | Path) -> Path:
    """The file of a recipe: that path itself, or a ready recipe.

    Args:
        path: A file, or what no file is called: a ready recipe's name, as ``digits-specialists``, or its place in a
            checkout, ``experiments/recipes/digits-specialists.yaml``.

    Raises:
        InputError: There is neither such a file nor such a ready recipe.
    """
    file = Path(path)
    if file.exists() and not file.is_dir():
        return file
    ready = {found.stem: found for found in _FOLDER.glob("*.yaml")}
    name = file.name.removesuffix(".yaml")
    if name in ready and file.parent.as_posix() in _PLACES:
        return ready[name]
    if file.is_dir():
        raise InputError(f"{file}: expected a recipe file, found a directory.", "Name a file in it.")
    known = [*ready, *(found.name for found in file.parent.glob("*.yaml"))]
    raise InputError(f"{file}: no such recipe.", nearest(file.name, known))
