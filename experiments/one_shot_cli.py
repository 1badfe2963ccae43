"""The command that merges without a search: ``ecotone merge``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ecotone.experiments.options import JsonOption, SetOption, changes_of, local, print_json, say, users_code
from ecotone.experiments.printing import echo
from ecotone.populations.errors import InputError

if TYPE_CHECKING:
    from ecotone.experiments.one_shot import Merged

OptionalRecipe = Annotated[
    Path | None,
    typer.Argument(
        metavar="RECIPE",
        parser=local("RECIPE"),
        help="A recipe file (YAML), or a ready recipe's name. Without one, give --operator and --experts.",
        show_default=False,
    ),
]
ToOption = Annotated[
    Path,
    typer.Option(
        metavar="DIR", parser=local("--to"), help="A new directory, or a path that ends in .safetensors, for the merge."
    ),
]
OperatorOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="The merge operator; with a recipe, in place of the recipe's.")
]
AtOption = Annotated[
    str | None,
    typer.Option(
        "--at",
        metavar="NUMBER",
        help="The coefficient of every source, or one for each: 0.3,0.5. By default the operator's published merge, or "
        "else the average.",
    ),
]
SolveOption = Annotated[
    str | None,
    typer.Option(
        metavar="SOLVER",
        help="Solve the coefficients from the models' inner products, e.g. model_stock or karcher; --set "
        "search.start.beta=0.5 sets a setting of the solver.",
    ),
]
ExpertsOption = Annotated[
    list[str] | None, typer.Option("--experts", metavar="MODEL ...", help="Without a recipe: the models to merge.")
]
BaseOption = Annotated[str | None, typer.Option(metavar="MODEL", help="The model that the experts were tuned from.")]
CalibrationOption = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        metavar="[NAME=]FILE ...",
        help="Texts for operators that read data: for all experts, or NAME=FILE for one. A .jsonl file has "
        '{"text": ...} a line, any other file a text a line. Or a function that returns inputs.',
    ),
]
ArchitectureOption = Annotated[
    str | None,
    typer.Option(metavar="CALL", help="auto for Hugging Face directories, or a function that returns the module."),
]
TokenizerOption = Annotated[
    str | None, typer.Option(metavar="DIR", help="The tokenizer of the texts; by default the base's.")
]
_SEVERAL = ("--experts", "--calibration")


class _Variadic(TyperCommand):
    """A command with options that take several values: ``--experts A B`` is ``--experts A --experts B``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments, with such an option before each of its values."""
        spread, option, first = list[str](), "", False
        for arg in args:
            if arg.startswith("-"):
                option, first = (arg, True) if arg in _SEVERAL else ("", False)
                spread.append(arg)
            else:
                spread += [arg] if first or not option else [option, arg]
                first = False
        return super().parse_args(ctx, spread)


def merge(
    to: ToOption,
    recipe: OptionalRecipe = None,
    operator: OperatorOption = None,
    at: AtOption = None,
    solve: SolveOption = None,
    base: BaseOption = None,
    experts: ExpertsOption = None,
    calibration: CalibrationOption = None,
    architecture: ArchitectureOption = None,
    tokenizer: TokenizerOption = None,
    settings: SetOption = None,
    no_scores: Annotated[bool, typer.Option("--no-scores", help="Do not score the merge.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Merge once, without a search: prepare, merge, score on the recipe's objectives, and export.

    With a recipe: `ecotone merge RECIPE --to DIR`. Without: `ecotone merge --operator kfac --base B --experts A1 A2
    --calibration texts.jsonl --to DIR`; --set merge.ridge=0.01 sets a setting of the operator.
    """
    from ecotone.experiments import one_shot

    models = {
        "--experts": experts,
        "--base": base,
        "--calibration": calibration,
        "--architecture": architecture,
        "--tokenizer": tokenizer,
    }
    if at is not None and solve is not None:
        raise InputError("--solve: expected without --at, found both.", "Leave one out.")
    changes, numbers = changes_of(settings), one_shot.coefficients(at)
    if recipe is None:
        given = one_shot.Models(experts or (), base, calibration or (), architecture, tokenizer)
        chosen = one_shot.of_models(operator, given, changes, at=numbers, solve=solve)
    else:
        _refuse(models)
        chosen = one_shot.of_recipe(recipe, changes, operator=operator, at=numbers, solve=solve, scores=not no_scores)
    with users_code():
        merged = one_shot.merge(chosen, to, notify=say)
    if as_json:
        print_json(merged.record())
    else:
        _show(merged)


def _refuse(given: dict[str, Any]) -> None:
    for option, value in given.items():
        if value:
            raise InputError(
                f"{option}: expected without a recipe, which names its models, found both.", "Leave one out."
            )


def _show(merged: Merged) -> None:
    from ecotone.experiments import report

    values = list(merged.coefficients.values())
    numbers = f"{values[0]:g} each" if len(set(values)) == 1 else ", ".join(f"{value:g}" for value in values)
    echo(f"{merged.operator} of {', '.join(merged.coefficients)} at {numbers} ({merged.taken}).")
    rows = [
        (name, ", ".join(f"{subset.replace('_', ' ')} {report.score_text(found[name])}" for subset, found in scored))
        for name in dict.fromkeys(name for found in merged.scores.values() for name in found)
        if (scored := [(subset, found) for subset, found in merged.scores.items() if name in found])
    ]
    if rows:
        report.console().print(report.lines(rows))
    check = f" Check it with: ecotone verify {shlex.quote(str(merged.path))}" if rows else ""
    echo(f"The merge is in {merged.path}.{check}")


def register(app: typer.Typer) -> None:
    """Make the command part of ``app``."""
    app.command(cls=_Variadic)(merge)
