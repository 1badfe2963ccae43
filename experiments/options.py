"""Arguments and options that several commands share, and how they are applied."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ecotone.experiments.recipe import Recipe


def local(option: str) -> Callable[[str], Path]:
    """The parser of an option or argument that is a path on this machine: it refuses URLs."""

    def path(text: str) -> Path:
        from ecotone.experiments.storage import on_this_machine

        return on_this_machine(text, option)

    return path


RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run directory or its URL, or an MLflow run id.")]
RecipeArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        parser=local("RECIPE"),
        help="A recipe file (YAML), or a ready recipe's name, e.g. digits-specialists.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a field, e.g. seed=3 or search.alpha=0. Repeatable."),
]


TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Use the functions, files and servers that the record names, although it was made elsewhere. Lists them.",
    ),
]
WhereOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--folder",
        metavar="DIR",
        parser=local("--folder"),
        help="Folder of Python modules that the recipe names. Repeatable.",
    ),
]


@dataclass(frozen=True)
class Word:
    """The user's word on a record: whether it is trusted, and where its modules are.

    Args:
        trust: Whether what it names may be used.
        folders: Folders of its Python modules.
        accept_changes: Whether files that have changed since the run began may be used.
    """

    trust: bool
    folders: tuple[str, ...]
    accept_changes: bool = False

    def options(self) -> dict[str, Any]:
        """Keyword arguments of what acts on a record."""
        return {**vars(self), "notify": say}


def recipe_of(
    path: Path,
    settings: list[str] | None,
    workers: int | None = None,
    address: str | None = None,
    *,
    spare_tasks: bool = False,
) -> Recipe:
    """The recipe of a file, with the fields that the command line replaces."""
    from ecotone.experiments.recipe import Recipe

    return Recipe.from_yaml(path, changes_of(settings, workers, address), spare_tasks=spare_tasks)


def changes_of(settings: list[str] | None, workers: int | None = None, address: str | None = None) -> dict[str, Any]:
    """The fields that the command line replaces, by dotted name."""
    from ecotone.experiments.recipe import parse_settings

    changes = parse_settings(settings or [])
    if workers == 0:
        changes["runtime.pool"] = "serial"
    elif workers is not None:
        changes |= {"runtime.pool": "ray", "runtime.workers": workers}
    if address is not None:
        changes |= {"runtime.pool": "ray", "runtime.address": address}
    return changes


@contextlib.contextmanager
def users_code() -> Iterator[None]:
    """Send what the user's functions print, and warnings, to stderr meanwhile: stdout is for results."""
    from ecotone.experiments import logs

    with contextlib.redirect_stdout(sys.stderr), logs.said(lambda text: typer.echo(text, err=True)):
        yield


def say(text: str) -> None:
    """Print a sentence on stderr."""
    typer.echo(text, err=True)


def print_json(value: Any) -> None:
    """Print ``value`` on stdout."""
    typer.echo(json.dumps(value, indent=1, default=float))
