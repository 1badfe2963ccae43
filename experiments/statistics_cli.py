"""The command that gathers statistics of models: ``ecotone statistics``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ecotone.experiments.options import JsonOption, RecipeArgument, SetOption, local, print_json, recipe_of, users_code

if TYPE_CHECKING:
    from ecotone.experiments.statistics import ModelStatistics

KindOption = Annotated[str, typer.Option(metavar="KIND", help="Which statistics, e.g. magnitude.")]
OutOption = Annotated[
    Path,
    typer.Option(
        metavar="DIR", parser=local("--out"), help="Where the journal is kept. One that is there is gone on with."
    ),
]
ModelOption = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="NAME", help="An expert, base or average; by default all experts. Repeatable."),
]
TaskOption = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="NAME", help="A calibration task; by default all. Repeatable."),
]
WithOption = Annotated[
    list[str] | None,
    typer.Option("--with", metavar="KEY=VALUE", help="A setting of the kind, e.g. examples=256. Repeatable."),
]


def statistics(
    recipe: RecipeArgument,
    kind: KindOption,
    out: OutOption,
    models: ModelOption = None,
    tasks: TaskOption = None,
    settings_of_kind: WithOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Gather statistics of a recipe's models over its calibration tasks.

    The tensors stay in the cache ($ECOTONE_CACHE); the journal in --out has their keys and digests. The same command
    goes on where it was stopped.
    """
    from ecotone.experiments.recipe import parse_settings
    from ecotone.experiments.statistics import gather
    from ecotone.populations.trial import Statistics

    chosen = recipe_of(recipe, settings, spare_tasks=True)
    wants = Statistics(kind, tuple(tasks or ()), parse_settings(settings_of_kind or [], "--with", "examples=256"))
    with users_code():
        found = gather(chosen, wants, out, models=models or (), notify=lambda text: typer.echo(text, err=True))
    if as_json:
        print_json({"kind": kind, "out": str(out), "models": [one.record() for one in found]})
    else:
        _show(found)
    if any(not one.evaluation.ok for one in found):
        raise typer.Exit(1)


def _show(found: list[ModelStatistics]) -> None:
    for one in found:
        record = one.record()
        if record["failure"] is not None:
            typer.echo(f"{one.model}: failed: {record['failure']}")
            continue
        typer.echo(
            f"{one.model}: {record['examples'] or 'no new'} examples in {record['seconds']:.2f} s, "
            f"{record['bytes']:,} bytes, digest {record['digest']}"
        )
        for layer, shape in record["layers"].items():
            typer.echo(f"  {layer}: {' x '.join(map(str, shape))}")
        typer.echo(f"  in {record['file']}")


def register(app: typer.Typer) -> None:
    """Make the command part of ``app``."""
    app.command()(statistics)
