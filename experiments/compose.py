"""From a recipe to the objects that run it: worker spec, pool, population and search."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ecotone.experiments import preparation
from ecotone.experiments.fingerprints import code_of
from ecotone.experiments.merge import Range
from ecotone.experiments.recipe import Models, Recipe
from ecotone.fitness.callables import put_last
from ecotone.fitness.kinds import ObjectiveSettings
from ecotone.fitness.opening import open_sources
from ecotone.fitness.pools import Pool, SerialPool
from ecotone.fitness.preparing.prepare import check_data
from ecotone.fitness.specs import WorkerSpec
from ecotone.merging import operators
from ecotone.merging.models.hub import is_repository
from ecotone.merging.models.matching import Treatment
from ecotone.merging.operators.base import Operator
from ecotone.merging.operators.own import own_merges
from ecotone.merging.operators.stack import preparing, published
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError, nearest
from ecotone.populations.genome import Genome
from ecotone.populations.gram import GramTable
from ecotone.populations.space import Space
from ecotone.populations.trial import Goal
from ecotone.search.chain import ChainSettings, of_stage
from ecotone.search.coefficients import Setting
from ecotone.search.kinds import Context, Pair, SearchSettings
from ecotone.search.manager import Schedule
from ecotone.search.starts import placing
from ecotone.settings import PREPARED, Call


def goals_of(objectives: Sequence[ObjectiveSettings]) -> tuple[Goal, ...]:
    """Names and directions of a recipe's objectives."""
    return tuple(objective.goal for objective in objectives)


_PACKAGES = (
    *("ecotone", "numpy", "scipy", "torch", "cmaes", "pymoo", "moocore", "optuna"),
    *("ray", "mlflow", "transformers", "lm_eval", "peft"),
)


def versions() -> dict[str, str]:
    """Versions of the software that results depend on."""
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def python_paths(folders: tuple[str, ...]) -> tuple[str, ...]:
    """Put ``folders`` and the working directory last on the Python path; returns them."""
    paths = tuple(dict.fromkeys([*folders, str(Path.cwd())]))
    put_last(paths)
    return paths


# -- worker and pool -------------------------------------------------------------------------------------


def worker_spec(recipe: Recipe, prepared: Path | None, sys_path: Sequence[str] = ()) -> WorkerSpec:
    """The spec from which a worker of this recipe is made."""
    models, runtime = recipe.models, recipe.runtime
    architecture, objectives = models.architecture, recipe.objectives
    ray = runtime.pool == "ray"
    located = partial(_located, prepared=prepared)
    operator, settings = recipe.merge.with_paths(located).combined
    spec = WorkerSpec(
        experts=tuple(_located(path, prepared) for path in models.experts),
        base=None if models.base is None else _located(models.base, prepared),
        operator=operator,
        settings=settings,
        names=models.names,
        vocabulary=models.vocabulary,
        treatment=Treatment(models.unused, recipe.merge.freeze, recipe.merge.only, architecture == "auto"),
        config=models.config,
        architecture=architecture.located(located) if isinstance(architecture, Call) else architecture,
        search=tuple(objective.located(located) for objective in objectives.search),
        held_out=tuple(objective.located(located) for objective in objectives.held_out),
        tokenizer=_tokenizer(recipe, prepared),
        divided=any(getattr(part, "race", None) is not None for part in recipe.searches),
        nonnegative=any(part.needs().nonnegative for part in recipe.searches),
        varied=any(part.needs().varied for part in recipe.searches),
        calibration=tuple(task.located(located) for task in recipe.calibration),
        seed=recipe.seed,
        backend=recipe.scoring,
        device=recipe.scoring.device,
        dtype=recipe.merge.dtype,
        rank=recipe.merge.rank,
        threads=recipe.scoring.threads,
        dense=any(part.needs().vectors for part in recipe.searches),
        sys_path=tuple(sys_path),
        sources=runtime.sources,
        batch=recipe.scoring.batch,
        neighbours=runtime.workers if ray else 1,
        device_share=min(1.0, runtime.gpus_per_worker or 1.0) if ray else 1.0,
        cache_bytes=runtime.cache_bytes,
    )
    if preparing(operators.get(operator, settings)):
        spec = replace(spec, code=code_of(recipe, spec))
    return spec


def check_operator(recipe: Recipe) -> Operator:
    """The merge operator with its settings.

    Raises:
        InputError: There is no such operator, a setting or one of its bounds does not fit it, or the search cannot take
            what its coefficients mean.
    """
    merge = recipe.merge
    try:
        used, settings = merge.combined
        operator = operators.get(used, settings)
        for name, bounds in merge.ranges.items():
            for bound in (bounds.low, bounds.high):
                value = int(bound) if bounds.scale == "integer" else bound
                tuned = operators.tuned(operators.get(used, {**settings, name: value}), {name: value})
                tuned.columns([str(number) for number in range(len(recipe.models.experts))])
    except InputError as error:
        raise InputError(f"merge.{error.message.removeprefix('genome: ')}", error.remedy) from error
    for part in recipe.searches:
        if not operator.affine and part.needs().affine:
            raise InputError(
                f"merge.operator: {part.algorithm} needs merges that are linear in their coefficients, found "
                f"{merge.operator!r}.",
                "Use linear or task_arithmetic, or search with cma_es, random, map, nsga2 or optuna.",
            )
    return operator


def _inside(value: float, bounds: Range) -> float | None:
    return value if bounds.low <= value <= bounds.high else None


def make_pool(recipe: Recipe, spec: WorkerSpec) -> Pool:
    """The pool that ``runtime`` asks for."""
    runtime = recipe.runtime
    if runtime.pool == "serial":
        return SerialPool(spec)
    from ecotone.fitness.ray.pool import RayPool

    return RayPool(spec, runtime)


def unused_workers(recipe: Recipe) -> str:
    """A sentence when more workers are asked for than ``scoring`` leaves work for; else nothing."""
    runtime, scoring = recipe.runtime, recipe.scoring
    busy = max(1, scoring.window // scoring.batch)
    if runtime.pool == "serial" or runtime.workers <= busy:
        return ""
    return (
        f"{busy} of {runtime.workers} workers have work at a time: scoring.in_flight is {scoring.window}, "
        f"scoring.batch {scoring.batch}. An in_flight of {2 * runtime.workers * scoring.batch} or so keeps all busy."
    )


def _located(path: str, prepared: Path | None) -> str:
    if not path.startswith(PREPARED):
        return path
    assert prepared is not None
    return str(prepared / path.removeprefix(PREPARED))


def _tokenizer(recipe: Recipe, prepared: Path | None) -> str | None:
    """The directory of the tokenizer: that of the recipe, or else the base's or the first expert's."""
    models, objectives = recipe.models, (*recipe.objectives.search, *recipe.objectives.held_out)
    if not any(objective.needs_tokenizer for objective in objectives):
        return None
    return _located(models.tokenizer or models.base or models.experts[0], prepared)


# -- search ----------------------------------------------------------------------------------------------


def context_of(
    recipe: Recipe, space: Space, starts: Sequence[Genome] = (), operator: Operator | None = None
) -> Context:
    """The context that the recipe's search is made in.

    Args:
        recipe: The recipe.
        space: The models.
        starts: Merges to begin with.
        operator: The recipe's merge operator; None makes it.
    """
    operator = operator or check_operator(recipe)
    objectives = recipe.objectives.search
    return Context(
        space=space,
        goals=goals_of(objectives),
        seed=recipe.seed,
        evaluations=recipe.budget.evaluations,
        tasks=tuple(task.name for task in recipe.calibration),
        starts=tuple(starts),
        searched=tuple(
            Setting(name, bounds.low, bounds.high, bounds.scale, _inside(getattr(operator, name), bounds))
            for name, bounds in recipe.merge.ranges.items()
        ),
        affine=operator.affine,
        own=tuple(
            one
            for one in own_merges(operator, len(space.seeds), space.size).values()
            if one.parameters.keys() <= recipe.merge.ranges.keys()
        ),
        published=published(operator),
        weighs="prepared" if operator.changes else "task_vectors" if operator.needs_base else "models",
        limits={one.name: one.limits for one in objectives if one.limits is not None},
    )


def make_search(recipe: Recipe, space: Space, starts: Sequence[Genome] = (), operator: Operator | None = None) -> Pair:
    """The algorithm and the population that ``search`` asks for.

    Args:
        recipe: The recipe.
        space: The models.
        starts: Merges for the algorithm to begin with, where it can.
        operator: The recipe's merge operator, if it is there already.

    Raises:
        InputError: The algorithm does not fit the objectives or the number of coefficients, or is not installed; or the
            segments of a stage's merges do not fit those of the next.
    """
    context, search = context_of(recipe, space, starts, operator), recipe.search
    return search.make(context if isinstance(search, ChainSettings) else placing.begun(search, context))


def solved_starts(recipe: Recipe, space: Space, operator: Operator) -> list[dict[str, Any]]:
    """The merges that searches begin with because their ``start`` solves them, in the order of the stages."""
    context = context_of(recipe, space, operator=operator)
    return [one.record(stage) for stage, part in enumerate(recipe.searches) for one in placing.solved(part, context)]


@dataclass(frozen=True)
class Outlined:
    """A search before the models' weights are read, for checks.

    Args:
        settings: The algorithm's.
        pair: The search and its population; None where the headers, or the names alone, are not enough to make them.
        context: The context it is made for.
        coefficients: (segments, models) of its merges; None where they are not known yet.
        components: The names of the parts that have coefficients, where they are components and not segments.
        begins: The merges that it begins with because its ``start`` solves them, in words.
    """

    settings: SearchSettings
    pair: Pair | None
    context: Context
    coefficients: tuple[int, int] | None
    components: tuple[str, ...] = ()
    begins: tuple[str, ...] = ()

    def suits(self, space: Space) -> bool:
        """Whether the search is what ``space`` would give, and can be carried out."""
        geometry = self.settings.needs().geometry or bool(self.settings.solvers)
        return self.pair is not None and not geometry and self.context.space.like(space)

    @property
    def text(self) -> str:
        """The algorithm, its number of coefficients as far as known, and its own description."""
        size = ""
        if self.coefficients is not None:
            segments, models = self.coefficients
            parts = f"{segments} component{'s' if segments > 1 else ''}" if self.components else str(segments)
            size = f": {segments * models} coefficients ({parts} x {models} models)"
            size += f" of {', '.join(self.components)}" if self.components else ""
        search = None if self.pair is None else self.pair[0]
        return f"{self.settings.algorithm}{size}{self.settings.describe(search, self.context)}"


def check_search(recipe: Recipe, sources: Sources | None = None, operator: Operator | None = None) -> list[Outlined]:
    """Make the search, or each of its stages, as far as that is possible before a weight is read, to refuse early.

    Args:
        recipe: The recipe to check.
        sources: The models; without them only searches with coefficients a model or a group can be made.
        operator: The recipe's merge operator, if it is there already.

    Raises:
        InputError: As for ``make_search``.
    """
    _check_experts(recipe, _names(recipe.models) if sources is None else sources.names)
    operator = operator or check_operator(recipe)
    chain = recipe.chain
    if chain is None:
        return [_outlined(recipe, recipe.searches[0], operator, sources)]
    if sources is not None:
        chain.check_segments(_outline_of(sources))
    found = []
    for index, stage in enumerate(chain.stages):
        with of_stage(index):
            found.append(_outlined(recipe, stage.search, operator, sources, chain, index))
    return found


def _outlined(
    recipe: Recipe,
    settings: SearchSettings,
    operator: Operator,
    sources: Sources | None,
    chain: ChainSettings | None = None,
    index: int = 0,
) -> Outlined:
    groups = getattr(settings, "groups", 1)
    outline = _outline(recipe, operator, groups) if sources is None else _outline_of(sources)
    context = context_of(recipe, outline, operator=operator)
    context = context if chain is None else chain.contexts(context)[index]
    begins = tuple(placing.texts(settings, None if sources is None else outline))
    if settings.needs().vectors or (sources is None and not settings.reads_only_names()):
        return Outlined(settings, None, context, None, begins=begins)
    segments = settings.segments(outline)
    coefficients = None if segments is None else (segments, outline.dimension)
    names = () if segments is None else settings.parts(outline).names
    pair = settings.make(placing.begun(settings, context, known=False))
    return Outlined(settings, pair, context, coefficients, names, begins)


def _outline_of(sources: Sources) -> Space:
    """The space of models of which only the headers are known: it lacks their geometry."""
    layout, columns = sources.layout, sources.operator.columns(sources.names)
    count = len(columns)
    return Space(
        sources=columns,
        tensors=layout.tensors,
        tensor_borders=layout.tensor_borders,
        blocks=layout.blocks,
        block_borders=layout.block_borders,
        gram=GramTable.from_regions([0, layout.size], np.zeros((1, count, count))),
        seeds=sources.operator.seeds(len(sources.experts)),
        seed_names=sources.names,
        others=tuple(layout.buffers),
    )


def _outline(recipe: Recipe, operator: Operator, groups: int) -> Space:
    """The space of models of which only the recipe is known, with one block a group."""
    names = _names(recipe.models)
    columns = operator.columns(names)
    blocks, borders, count = tuple(map(str, range(groups))), np.arange(groups + 1), len(columns)
    gram = GramTable.from_regions([0, groups], np.zeros((1, count, count)))
    return Space(columns, blocks, borders, blocks, borders, gram, operator.seeds(len(names)), names)


def _names(models: Models) -> tuple[str, ...]:
    """Names of the experts as far as the recipe tells. File names may come twice."""
    paths = [expert.removeprefix(PREPARED).rstrip("/") for expert in models.experts]
    return models.names or tuple(Path(path).name.removesuffix(".safetensors") for path in paths)


def _check_experts(recipe: Recipe, names: Sequence[str]) -> None:
    """Refuse tasks that are drawn to an expert there is not, unless ``names`` (K,) are not all known yet.

    Where the operator reads data refuse experts without a task of their own, too.
    """
    if recipe.merge.reads_data and len(set(names)) == len(names):
        owners = [task.teacher or task.name for task in recipe.calibration]
        check_data(recipe.merge.operator, {name: [one for one in owners if one == name] for name in names})
    for task in recipe.calibration:
        expert = task.teacher
        if expert is None or expert in names or len(set(names)) < len(names):
            continue
        raise InputError(
            f"{task.where}: expert: expected one of {', '.join(names)}, found {expert!r}.",
            nearest(expert, list(names)) if expert != task.name else "Say which expert the task is to be like.",
        )


def make_schedule(recipe: Recipe) -> Schedule:
    """Budget, batches and order."""
    return Schedule(
        evaluations=recipe.budget.evaluations,
        seconds=recipe.budget.seconds,
        batch=recipe.scoring.batch,
        in_flight=recipe.scoring.window,
        order=recipe.scoring.order,
        grace=recipe.runtime.grace,
    )


class Composition:
    """The objects that run a recipe. Each is made once, when it is first read.

    Args:
        recipe: The recipe.
        sys_path: Folders that workers find the user's own modules in.
    """

    def __init__(self, recipe: Recipe, sys_path: Sequence[str] = ()) -> None:
        self.recipe = recipe
        self._sys_path = tuple(sys_path)

    @cached_property
    def operator(self) -> Operator:
        """The merge operator.

        Raises:
            InputError: As for ``check_operator``.
        """
        return check_operator(self.recipe)

    @property
    def prepared(self) -> bool:
        """Whether nothing is left to prepare: its models and data can be looked at."""
        folder = preparation.prepared_folder(self.recipe)
        return folder is None or folder.is_dir()

    @property
    def here(self) -> bool:
        """Whether the models lie on this machine, as far as they are paths."""
        models = self.recipe.models
        paths = [path for path in (*models.experts, models.base) if path is not None and not is_repository(path)]
        return all(path.startswith(PREPARED) or Path(path).exists() for path in paths)

    @cached_property
    def spec(self) -> WorkerSpec:
        """The spec from which a worker is made. Runs the preparation step unless it has been run.

        Raises:
            InputError: The preparation step failed.
        """
        return worker_spec(self.recipe, preparation.prepare(self.recipe), self._sys_path)

    @cached_property
    def sources(self) -> Sources:
        """The models, of which only headers are read.

        Raises:
            EcotoneError: They cannot be opened, or do not fit each other.
        """
        return open_sources(self.spec)

    @cached_property
    def outlined(self) -> list[Outlined]:
        """The search, or its stages, as far as they can be made before a weight is read.

        Raises:
            InputError: As for ``make_search``.
        """
        return check_search(self.recipe, self.sources if self.prepared else None, self.operator)

    def search(self, space: Space) -> Pair:
        """The search and its population, as they were made from the models' headers if that was possible.

        Args:
            space: The models.

        Raises:
            InputError: As for ``make_search``.
        """
        made: list[Outlined] = self.__dict__.get("outlined", [])
        if self.recipe.chain is None and made and made[0].suits(space):
            assert made[0].pair is not None
            return made[0].pair
        return make_search(self.recipe, space, operator=self.operator)
