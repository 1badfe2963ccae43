"""One merge and no search: ``ecotone merge``.

It is a run of one trial (``ecotone.search.one_shot``) in a folder that is removed afterwards, and its member is
exported like any other. So whatever holds for runs and exports holds for it: checks, hashes, marks, model card and
``verify``.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ecotone.experiments import compose
from ecotone.experiments.exports import export
from ecotone.experiments.reading import yaml_file
from ecotone.experiments.ready import recipe_file
from ecotone.experiments.recipe import Recipe, apply_settings
from ecotone.experiments.running import launch
from ecotone.experiments.storage import on_this_machine
from ecotone.merging import operators
from ecotone.merging.export import check_target
from ecotone.merging.models.checkpoint import located
from ecotone.merging.operators.base import Operator
from ecotone.merging.operators.stack import EQUAL, preparing, published
from ecotone.merging.operators.whole import FromData, WholeMatrices
from ecotone.populations import facts
from ecotone.populations.errors import InputError, nearest
from ecotone.populations.parsing import foreign_or_none
from ecotone.search.one_shot import OneShotSettings
from ecotone.settings import split_call

Notify: TypeAlias = Callable[[str], None]
At: TypeAlias = float | tuple[float, ...] | None

_TEXTS = "ecotone.fitness.language.inputs"
_OWN = ("dtype", "freeze", "only", "rank")  # of a recipe's merge part, whatever the operator
_HERE: dict[str, Any] = {
    "budget": {"evaluations": 1},
    "runtime.pool": "serial",
    "runtime.workers": 1,
    "runtime.address": None,
    "runtime.time_limit": None,
    "tracking": {"mlflow": False},
}


@dataclass(frozen=True)
class Models:
    """What is merged where there is no recipe.

    Args:
        experts: Paths or repositories of the experts.
        base: That of the model they were tuned from.
        calibration: ``FILE`` for all experts or ``NAME=FILE`` for one: texts, or a function that returns inputs.
        architecture: ``auto``, or a function that returns the module; None chooses.
        tokenizer: The folder of the tokenizer of the texts; None takes the base's, or else the first expert's.
    """

    experts: Sequence[str]
    base: str | None = None
    calibration: Sequence[str] = ()
    architecture: str | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class Merged:
    """A merge that was made.

    Args:
        path: Its place.
        operator: The operator's name.
        coefficients: By source; where they differ by tensor, their mean, weighted by length.
        taken: Where the coefficients come from, in words.
        scores: By ``search`` and ``held_out``, as far as there are objectives.
    """

    path: Path
    operator: str
    coefficients: Mapping[str, float]
    taken: str
    scores: Mapping[str, Mapping[str, float]]

    def record(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {**vars(self), "path": str(self.path)}


def merge(recipe: Recipe, to: str | Path, *, notify: Notify = lambda text: None) -> Merged:
    """Make the one merge of a recipe, score it and export it.

    Args:
        recipe: Its search is ``one_shot``, as ``of_recipe`` and ``of_models`` return it.
        to: As for ``export``.
        notify: Called with a sentence when something takes a while.

    Raises:
        EcotoneError: The recipe cannot be run, the merge cannot be scored, or the target is in the way.
    """
    if not isinstance(recipe.search, OneShotSettings):
        raise InputError("search.algorithm: one merge is made by one_shot, found another.", "Leave search out.")
    target = on_this_machine(to, "to")
    check_target(target)
    operator = compose.check_operator(recipe)
    if found := preparing(operator):
        notify(f"Preparing the vectors of {', '.join(found)}, unless they are in the cache ...")
    folders = () if recipe.folder is None else (str(recipe.folder),)
    with tempfile.TemporaryDirectory(prefix="ecotone-merge-") as folder:
        run = launch(recipe, Path(folder) / "run")
        trial, scored = run.trial(0), run.scored(0)
        with run.journal() as journal:
            names = journal.fact(facts.MODELS) or ()
        path = export(run, 0, target, trust=True, folders=folders)
    genome = trial.genome
    row = (np.diff(genome.boundaries) / genome.size @ genome.coefficients).tolist()
    columns = operator.columns(names)
    both = {"search": scored.scores, "held_out": scored.held_out}
    return Merged(
        path,
        operator.name,
        dict(zip(columns, row, strict=True)),
        _taken(recipe.search, operator),
        {subset: dict(found) for subset, found in both.items() if found},
    )


def _taken(search: OneShotSettings, operator: Operator) -> str:
    if search.solvers:
        return f"solved by {search.solvers[0].solve}; by tensor, this is the mean"
    if search.at is not None:
        return "as given"
    if operator.name == "stack":
        return EQUAL
    return "the average" if published(operator) is None else "the operator's published merge"


# -- with a recipe -------------------------------------------------------------------------------------------------


def of_recipe(
    path: Path,
    settings: Mapping[str, Any] | None = None,
    *,
    operator: str | None = None,
    at: At = None,
    solve: str | None = None,
    scores: bool = True,
) -> Recipe:
    """A recipe file as a recipe of one merge, in this process.

    Args:
        path: The file, or the name of a ready recipe.
        settings: Fields to replace, by dotted name.
        operator: Another operator than the recipe's, with its default settings; None for the recipe's own.
        at: The coefficient of every source, or one for each; None as ``one_shot`` chooses.
        solve: The solver of the coefficients, in place of ``at``.
        scores: Whether the objectives stay.

    Raises:
        InputError: As for ``Recipe.from_yaml``.
    """
    found = yaml_file(recipe_file(path))[1].value
    record: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    changed = {"search": _search(record.get("search"), at, solve)}
    if operator is not None:
        changed["merge"] = _with_operator(record.get("merge"), operator)
    changed |= {**(settings or {}), **_HERE}
    if not scores:
        changed["objectives"] = {"search": []}
    recipe = Recipe.from_yaml(path, changed, spare_tasks=True)
    return recipe if recipe.merge.reads_data else recipe.model_copy(update={"calibration": ()})


def _with_operator(merge: Any, operator: str) -> dict[str, Any]:
    """The recipe's merge part with that operator, and the settings of the other one left out."""
    known = merge if isinstance(merge, Mapping) else {}
    kept = known if known.get("operator", "linear") == operator else {key: known[key] for key in _OWN if key in known}
    return {**kept, "operator": operator}


def _search(search: Any, at: At, solve: str | None) -> dict[str, Any]:
    own = search if isinstance(search, Mapping) and search.get("algorithm") == "one_shot" else {}
    given = {**({} if at is None else {"at": at}), **({} if solve is None else {"start": {"solve": solve}})}
    return {"algorithm": "one_shot", **(given or own)}


# -- without a recipe ----------------------------------------------------------------------------------------------


def of_models(
    operator: str | None,
    models: Models,
    settings: Mapping[str, Any] | None = None,
    *,
    at: At = None,
    solve: str | None = None,
) -> Recipe:
    """A recipe of one merge of models, without objectives.

    Args:
        operator: The operator.
        models: The models.
        settings: Fields to replace, by dotted name: ``merge.ridge``.
        at: As for ``of_recipe``.
        solve: As for ``of_recipe``.

    Raises:
        EcotoneError: A model, an operator, data or a field is missing or does not fit.
    """
    if operator is None:
        raise InputError("--operator: expected a merge operator, found none.", "`ecotone plugins` lists them.")
    if not models.experts:
        raise InputError("--experts: expected the models to merge, found none.", "--experts A B, or give a recipe.")
    chosen = operators.OPERATORS.get(operator, "--operator")()
    if chosen.needs_base and models.base is None:
        raise InputError(
            f"--base: the operator {operator!r} adds to the model that the experts were tuned from, found none.",
            "Give it, or use --operator linear.",
        )
    names = labels(models.experts)
    architecture = _architecture(chosen, models)
    record = {
        "name": re.sub(r"[^A-Za-z0-9._-]", "-", operator),
        "models": {
            "experts": [*models.experts],
            "base": models.base,
            "names": names,
            "architecture": architecture,
        },
        "objectives": {"search": []},
        "merge": {"operator": operator},
        "calibration": _calibration(chosen, models, names) if isinstance(chosen, FromData) else [],
        "search": _search(None, at, solve),
        "runtime": {},
    }
    if models.calibration and not isinstance(chosen, FromData):
        raise InputError(f"--calibration: the operator {operator!r} reads no data, found some.", "Leave it out.")
    return Recipe.from_record(apply_settings(record, {**(settings or {}), **_HERE}), Path.cwd())


def labels(paths: Sequence[str]) -> list[str]:
    """Names of the experts: the last steps of their paths, as many as tell them apart."""
    steps = [Path(path).expanduser().parts for path in paths]
    for count in range(1, max(map(len, steps)) + 1):
        found = ["/".join(parts[-count:]).removesuffix(".safetensors") for parts in steps]
        if len(set(found)) == len(found):
            return found
    twice = next(path for number, path in enumerate(paths) if path in paths[:number])
    raise InputError(f"--experts: expected different models, found {twice} twice.", "Leave one out.")


def _architecture(operator: Any, models: Models) -> Any:
    """How the module is made: of the configuration where the operator prepares and there is one, or by a function."""
    given = models.architecture
    if given is not None and given != "auto":
        return {"call": given}
    configured = (located(models.base or models.experts[0]) / "config.json").is_file()
    if given == "auto" and not configured:
        raise InputError(
            f"--architecture: auto takes Hugging Face directories, found no config.json in "
            f"{models.base or models.experts[0]}.",
            "Name a function that returns the module: package.module:function.",
        )
    if given is None and isinstance(operator, FromData) and not configured:
        raise InputError(
            f"--architecture: the operator {operator.name!r} gathers statistics of layers, found plain weights.",
            "Name a function that returns the module: package.module:function.",
        )
    return "auto" if configured and isinstance(operator, WholeMatrices) else given


def _calibration(operator: FromData, models: Models, names: Sequence[str]) -> list[dict[str, Any]]:
    """A task for each expert. Nothing but its inputs is read."""
    by_expert: dict[str, list[str]] = {name: [] for name in names}
    for text in models.calibration:
        name, place = _named(text, names)
        for one in names if name is None else [name]:
            by_expert[one].append(place)
    for name, places in by_expert.items():
        if not places:
            raise InputError(
                f"--calibration: the operator {operator.name!r} reads inputs of each expert's own task, found none for "
                f"{name!r}.",
                f"--calibration FILE for all, or {name}=FILE; a FILE has a text a line, or {{'text': ...}} in .jsonl. "
                f"Operators that read none: {', '.join(without_data())}.",
            )
    needs_logits = bool({"slopes", "fisher", "votes"} & set(operator.wanted))
    head = {} if needs_logits or _has_logits(models) else {"head": {"call": f"{_TEXTS}:answering"}}
    return [
        {"name": name, "loss": "distillation", "hidden": 0.0, "data": _data(models, places), **head}
        for name, places in by_expert.items()
    ]


def _has_logits(models: Models) -> bool:
    """Whether the module's outputs have logits, as far as a configuration tells: encoders alone have none."""
    if models.architecture not in (None, "auto"):
        return True
    named = foreign_or_none(located(models.base or models.experts[0]) / "config.json").get("architectures")
    return not isinstance(named, list) or any(re.search("For[A-Z]|LMHead", str(one)) for one in named)


def without_data() -> list[str]:
    """The operators that read no data."""
    return [name for name, kind in operators.OPERATORS.usable().items() if not issubclass(kind, FromData)]


def _named(text: str, names: Sequence[str]) -> tuple[str | None, str]:
    """The expert that data are for, None for all, and their place."""
    name, equals, place = text.partition("=")
    if not equals or Path(text).expanduser().exists():
        return None, text
    if name not in names:
        raise InputError(
            f"--calibration: expected the name of an expert before '=', one of {', '.join(names)}, found {name!r}.",
            nearest(name, names),
        )
    return name, place


def _data(models: Models, places: Sequence[str]) -> dict[str, Any]:
    """The data function of an expert's files, or the one that is named."""
    files = [Path(place).expanduser() for place in places]
    missing = [place for place, file in zip(places, files, strict=True) if not file.is_file()]
    if not missing:
        tokenizer = models.tokenizer or models.base or models.experts[0]
        place = Path(tokenizer).expanduser()
        arguments = {
            "files": [str(file.absolute()) for file in files],
            "tokenizer": str(place.absolute()) if place.exists() else tokenizer,
        }
        return {"call": f"{_TEXTS}:texts", "arguments": arguments}
    if all(split_call(places[0])[:2]) and len(places) == 1:
        return {"call": places[0]}
    raise InputError(
        f"--calibration: {missing[0]}: no such file.", "Give a file of texts, or a function that returns inputs."
    )


# -- options -------------------------------------------------------------------------------------------------------


def coefficients(text: str | None) -> At:
    """``0.3`` or ``0.3,0.5`` as numbers.

    Raises:
        InputError: It is neither.
    """
    if text is None:
        return None
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", part) for part in parts):
        raise InputError(
            f"--at: expected a number, or numbers separated by commas, one for each source, found {text!r}."
        )
    numbers = tuple(map(float, parts))
    return numbers[0] if len(numbers) == 1 else numbers
