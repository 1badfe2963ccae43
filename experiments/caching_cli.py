"""The command that lists and frees the cache of this machine: ``ecotone cache``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ecotone.experiments.options import JsonOption, print_json
from ecotone.experiments.printing import echo
from ecotone.populations.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ecotone.experiments.caching import Entry

FreeOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Remove prepared vectors, those that were not used for longest first, until at least so much is freed: "
        "10GB.",
    ),
]
RemoveOption = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY", help="Remove what has this key, or the beginning of a key. Repeatable."),
]


def cache(free: FreeOption = None, remove: RemoveOption = None, as_json: JsonOption = False) -> None:
    """List what lies in the cache ($ECOTONE_CACHE) and can be made again, or remove some of it.

    Vectors that operators have prepared, models of preparation steps, statistics and remembered hashes. Runs make again
    what they miss. Copies of runs are not listed and not removed.
    """
    from ecotone.experiments import caching
    from ecotone.populations.folders import cache_folder

    if free is not None and remove:
        raise InputError("--free: expected without --remove, found both.", "Leave one out.")
    acts = free is not None or bool(remove)
    removed = caching.remove(remove) if remove else [] if free is None else caching.free(caching.size(free))
    left = caching.entries()
    if as_json:
        print_json(
            {
                "folder": str(cache_folder()),
                "bytes": sum(one.nbytes for one in left),
                "entries": [one.record() for one in left],
                **({"removed": [one.record() for one in removed]} if acts else {}),
            }
        )
        return
    if acts:
        for one in removed:
            echo(f"Removed {one.key}: {one.text}.")
        echo(f"{caching.total(removed)} are freed, {caching.total(left)} are left in {cache_folder()}.")
        return
    _show(left)
    echo(f"{caching.total(left)} in {cache_folder()}, all of which can be made again.")


def _show(found: Sequence[Entry]) -> None:
    from rich.table import Table

    from ecotone.experiments import report, storage
    from ecotone.merging.placement import readable

    if not found:
        return
    table = Table(box=None)
    for name in ("sort", "key", "what", "size", "last used"):
        table.add_column(name, overflow="fold", justify="right" if name == "size" else "left")
    for one in found:
        used = "now" if one.in_use else storage.moment(one.used)
        table.add_row(one.sort, one.key, one.text, readable(one.nbytes), used)
    report.console().print(table)


def register(app: typer.Typer) -> None:
    """Make the command part of ``app``."""
    app.command()(cache)
