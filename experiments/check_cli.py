"""The command that checks and repairs a run's journal: ``ecotone check``."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from ecotone.experiments.options import JsonOption, print_json

if TYPE_CHECKING:
    from ecotone.experiments.damage import Checked

DirectoryArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or its URL.")]
RepairOption = Annotated[
    bool,
    typer.Option(
        "--repair",
        help="Put a journal of all rows before the damage in its place. The damaged one is kept in a folder beside it.",
    ),
]


def check(run: DirectoryArgument, repair: RepairOption = False, as_json: JsonOption = False) -> None:
    """Check every row of a run's journal, and say what is damaged and what can be saved.

    Exits with 0 when everything is whole, or was repaired, and with 1 when something is damaged.
    """
    from ecotone.experiments import damage

    found = damage.check(run)
    aside = None
    if repair and not found.whole:
        found, aside = damage.repair(run)
    if as_json:
        print_json({**found.record(), "repaired": aside is not None, "aside": None if aside is None else str(aside)})
    elif aside is not None:
        typer.echo(_damaged(found))
        typer.echo(f"Repaired: {_counts(found)} The damaged journal is in {aside}.")
        typer.echo(f"Go on with: ecotone resume {shlex.quote(run)}")
    elif found.whole:
        rows = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in found.rows.items() if count)
        typer.echo(f"{run}: the journal is whole: {rows}.")
    else:
        typer.echo(_damaged(found))
        typer.echo(f"What can be saved: {_counts(found)}")
        typer.echo(f"`ecotone check {shlex.quote(run)} --repair` saves it, and keeps the damaged journal beside it.")
    if not found.whole and aside is None:
        raise typer.Exit(1)


def _damaged(found: Checked) -> str:
    return f"{found.run}: the journal is damaged. The first damage: {found.damage}."


def _counts(found: Checked) -> str:
    """Rows kept, and facts that are lost."""
    most = found.rows["evaluations"]
    text = f"{found.kept['evaluations']} of {max(most, found.kept['evaluations'])} evaluations that can be read, "
    text += f"and {found.kept['measurements']} of {found.rows['measurements']} results outside the search."
    if found.lost:
        text += f" Lost: {', '.join(found.lost)}, which the recipe beside it and the next `resume` give anew."
    return text


def register(app: typer.Typer) -> None:
    """Make the command part of ``app``."""
    app.command()(check)
