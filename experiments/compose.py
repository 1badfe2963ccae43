"""From a recipe to the objects that run it: worker spec, pool, population and search."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ecotone.experiments.parts import Call, LanguageObjective, Objective, PythonObjective
from ecotone.experiments.recipe import (
    PREPARED,
    BayesianMapBox,
    Box,
    Budget,
    Calibration,
    CmaEsBox,
    ExpertMergingSearch,
    GradientSearch,
    M2N2Search,
    MapBox,
    Models,
    ModelsFirstBox,
    NestedMapBox,
    NsgaBox,
    OptunaBox,
    Race,
    RandomBox,
    Range,
    Recipe,
    SearchPart,
    Stages,
    SurrogateBox,
)
from ecotone.fitness.callables import resolve
from ecotone.fitness.pools import Pool, SerialPool
from ecotone.fitness.specs import LIMITS, CalibrationSpec, CallSpec, Distillation, ObjectiveSpec, WorkerSpec
from ecotone.merging import operators
from ecotone.merging.operators.base import Operator
from ecotone.merging.sources import Sources
from ecotone.populations.errors import EcotoneError, InputError, PoolError, nearest
from ecotone.populations.folders import cache_folder
from ecotone.populations.genome import Floats, Genome, Integers
from ecotone.populations.gram import GramTable
from ecotone.populations.niches import NicheArchive
from ecotone.populations.population import ElitistArchive, Population
from ecotone.populations.space import Space
from ecotone.populations.trial import Goal
from ecotone.search.coefficients import CoefficientBox, Setting, borders_of
from ecotone.search.m2n2 import M2N2, M2N2Settings
from ecotone.search.manager import Schedule
from ecotone.search.protocol import Search
from ecotone.search.random_search import RandomSearch


def goals_of(objectives: Sequence[Objective]) -> tuple[Goal, ...]:
    """Names and directions of a recipe's objectives."""
    return tuple(Goal(objective.name, objective.direction) for objective in objectives)


_PACKAGES = (
    *("ecotone", "numpy", "scipy", "torch", "cmaes", "pymoo", "moocore", "optuna"),
    *("ray", "mlflow", "transformers", "lm_eval", "peft"),
)


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def python_paths(folders: tuple[str, ...]) -> tuple[str, ...]:
    """Put the working directory and ``folders`` on the Python path; returns them."""
    paths = tuple(dict.fromkeys([*folders, str(Path.cwd())]))
    sys.path.extend(path for path in paths if path not in sys.path)
    return paths


# -- preparation -----------------------------------------------------------------------------------------


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
    """16 hexadecimal digits of all that changes what the step writes."""
    assert recipe.prepare is not None
    text = json.dumps([recipe.prepare.call, _preparation_arguments(recipe), _module_source(recipe)], sort_keys=True)
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
            work.rename(folder)
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


# -- worker and pool -------------------------------------------------------------------------------------


def worker_spec(recipe: Recipe, prepared: Path | None, sys_path: Sequence[str] = ()) -> WorkerSpec:
    """What a worker of this recipe is made of."""
    models, runtime = recipe.models, recipe.runtime
    architecture = models.architecture
    ray = runtime.pool == "ray"
    return WorkerSpec(
        experts=tuple(_located(path, prepared) for path in models.experts),
        base=None if models.base is None else _located(models.base, prepared),
        operator=recipe.merge.operator,
        settings=recipe.merge.settings,
        names=models.names,
        vocabulary=models.vocabulary,
        architecture=_call(architecture, prepared) if isinstance(architecture, Call) else architecture,
        search=tuple(_objective(objective, recipe, prepared) for objective in recipe.objectives.search),
        held_out=tuple(_objective(objective, recipe, prepared) for objective in recipe.objectives.held_out),
        divided=any(getattr(part, "race", None) is not None for part in recipe.searches),
        calibration=tuple(_calibration(task, recipe.seed, prepared) for task in recipe.calibration),
        checkpointing=recipe.scoring.checkpointing,
        device=recipe.scoring.device,
        dtype=recipe.merge.dtype,
        threads=recipe.scoring.threads,
        dense=any(isinstance(part, M2N2Search) and part.mutation > 0 for part in recipe.searches),
        sys_path=tuple(sys_path),
        sources=runtime.sources,
        batch=recipe.scoring.batch,
        neighbours=runtime.workers if ray else 1,
        device_share=min(1.0, runtime.gpus_per_worker or 1.0) if ray else 1.0,
    )


def check_operator(recipe: Recipe) -> Operator:
    """The merge operator with its settings.

    Raises:
        InputError: There is no such operator, a setting or one of its bounds does not fit it, or the search cannot take
            what its coefficients mean.
    """
    merge = recipe.merge
    try:
        operator = operators.get(merge.operator, merge.settings)
        for name, bounds in merge.ranges.items():
            for bound in (bounds.low, bounds.high):
                value = int(bound) if bounds.scale == "integer" else bound
                operators.tuned(operators.get(merge.operator, {**merge.settings, name: value}), {name: value})
    except InputError as error:
        raise InputError(f"merge.{error.message.removeprefix('genome: ')}", error.remedy) from error
    for part in recipe.searches:
        if not operator.affine and isinstance(part, M2N2Search | GradientSearch):
            raise InputError(
                f"merge.operator: {part.algorithm} needs merges that are linear in their coefficients, found "
                f"{merge.operator!r}.",
                "Use linear or task_arithmetic, or search with cma_es, random, map, nsga2 or optuna.",
            )
    return operator


def _searched(recipe: Recipe) -> tuple[Setting, ...]:
    """The operator's settings that are searched beside the coefficients."""
    operator = check_operator(recipe)
    return tuple(
        Setting(name, bounds.low, bounds.high, bounds.scale, _inside(getattr(operator, name), bounds))
        for name, bounds in recipe.merge.ranges.items()
    )


def _inside(value: float, bounds: Range) -> float | None:
    return value if bounds.low <= value <= bounds.high else None


def make_pool(recipe: Recipe, spec: WorkerSpec) -> Pool:
    """The pool that ``runtime`` asks for."""
    runtime = recipe.runtime
    if runtime.pool == "serial":
        return SerialPool(spec)
    try:
        from ecotone.fitness.ray_pool import RayPool
    except ImportError as error:
        raise PoolError(
            f"runtime.pool: Ray is not installed ({error}).",
            "`pip install 'ecotone[ray]'`, or --set runtime.pool=serial.",
        ) from error
    return RayPool(
        spec,
        workers=runtime.workers,
        address=runtime.address,
        cpus_per_worker=runtime.cpus_per_worker,
        gpus_per_worker=runtime.gpus_per_worker,
        resources=dict(runtime.resources),
        start_timeout=runtime.start_timeout,
        attempts=runtime.attempts,
        time_limit=runtime.time_limit,
        idle_timeout=runtime.idle_timeout,
    )


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


def _call(call: Call | PythonObjective, prepared: Path | None) -> CallSpec:
    return CallSpec(call.call, {name: _expanded(value, prepared) for name, value in call.arguments.items()})


def _head(call: Call | None, prepared: Path | None) -> CallSpec | None:
    return None if call is None else _call(call, prepared)


def _expanded(value: Any, prepared: Path | None) -> Any:
    """``value`` with the paths in it, at any depth, that begin with ``prepared:`` made whole."""
    if isinstance(value, dict):
        return {key: _expanded(one, prepared) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_expanded(one, prepared) for one in value]
    return _located(value, prepared) if isinstance(value, str) else value


def _objective(objective: Objective, recipe: Recipe, prepared: Path | None) -> ObjectiveSpec:
    goal = Goal(objective.name, objective.direction)
    if isinstance(objective, PythonObjective):
        return ObjectiveSpec(goal, "call", call=_call(objective, prepared))
    if isinstance(objective, LanguageObjective):
        settings: dict[str, Any] = _expanded(objective.settings, prepared)
        return ObjectiveSpec(goal, objective.type, settings=settings, tokenizer=tokenizer_of(recipe, prepared))
    data, head = _call(objective.data, prepared), _head(objective.head, prepared)
    spec = ObjectiveSpec(goal, objective.type, data=data, head=head)
    return spec if objective.batch is None else replace(spec, batch=objective.batch)


def tokenizer_of(recipe: Recipe, prepared: Path | None) -> str:
    """The directory of the tokenizer: that of the recipe, or else the base's or the first expert's."""
    models = recipe.models
    return _located(models.tokenizer or models.base or models.experts[0], prepared)


def _calibration(task: Calibration, seed: int, prepared: Path | None) -> CalibrationSpec:
    data, head = _call(task.data, prepared), _head(task.head, prepared)
    spec = CalibrationSpec(task.name, data, task.loss, head, task.batch, seed)
    if task.loss != "distillation":
        return spec
    wanted = Distillation(task.expert or task.name, task.temperature, task.hidden, task.layers)
    return replace(spec, distillation=wanted)


# -- search ----------------------------------------------------------------------------------------------


def make_search(recipe: Recipe, space: Space, starts: Sequence[Genome] = ()) -> tuple[Search, Population]:
    """The algorithm and the population that ``search`` asks for.

    Args:
        recipe: What is asked for.
        space: The models.
        starts: Merges for the algorithm to begin with, where it can.

    Raises:
        InputError: The algorithm does not fit the objectives or the number of coefficients, or is not installed; or the
            segments of a stage's merges do not fit those of the next.
    """
    part, goals = recipe.search, goals_of(recipe.objectives.search)
    if isinstance(part, Stages):
        return _staged(recipe, part, space)
    if isinstance(part, M2N2Search):
        return _raced(recipe, *_m2n2(recipe, part, space, starts))
    if isinstance(part, GradientSearch):
        return _gradient_search(recipe, part, space, starts), ElitistArchive(goals, part.archive)
    return _raced(recipe, _box_search(recipe, part, space, starts), ElitistArchive(goals, part.archive))


def _raced(recipe: Recipe, search: Search, population: Population) -> tuple[Search, Population]:
    """The search, its candidates racing where the recipe says so."""
    race: Race | None = getattr(recipe.search, "race", None)
    if race is None:
        return search, population
    from ecotone.search.racing import RaceSettings, Racing

    objectives = recipe.objectives.search
    limits = {one.name: LIMITS[one.type] for one in objectives if one.type in LIMITS}
    whole = search.first_child if isinstance(search, M2N2) else 0
    settings, own = RaceSettings(**race.model_dump()), isinstance(recipe.search, NsgaBox)
    goals = goals_of(objectives)
    return Racing(search, population, goals, recipe.seed, settings, limits, whole, own_parents=own), population


def _staged(recipe: Recipe, chain: Stages, space: Space) -> tuple[Search, Population]:
    from ecotone.search.stages import Stage, StagedSearch

    _check_segments(chain, space)
    stages = []
    for index, one in enumerate(stage_recipes(recipe)):
        make = partial(_begun, one, space, index)
        if index:  # the first is made at once; what does not fit the others is refused before anything is scored
            make(())
        part = chain.stages[index]
        stages.append(Stage(part.search.algorithm, make, part.evaluations, chain.starts[index], part.most))
    search = StagedSearch(stages, goals_of(recipe.objectives.search))
    return search, search.population


def _begun(recipe: Recipe, space: Space, index: int, starts: Sequence[Genome]) -> tuple[Search, Population]:
    with _of_stage(index):
        return make_search(recipe, space, starts)


@contextlib.contextmanager
def _of_stage(index: int) -> Iterator[None]:
    """Have errors name the stage's fields as the recipe has them."""
    try:
        yield
    except InputError as error:
        place = f"search[{index}]."

        def named(text: str) -> str:
            return text.replace("search.", place).replace("budget.evaluations", f"{place}evaluations")

        raise InputError(named(error.message), named(error.remedy)) from error


def stage_recipes(recipe: Recipe) -> tuple[Recipe, ...]:
    """The recipe of each stage as a search of its own, with its seed and share; without stages the recipe itself."""
    from ecotone.search.stages import stage_seed

    chain, budget = recipe.search, recipe.budget
    if not isinstance(chain, Stages):
        return (recipe,)
    rest = None if budget.evaluations is None else budget.evaluations - chain.shared_out
    return tuple(
        recipe.model_copy(
            update={
                "search": stage.search,
                "seed": stage_seed(recipe.seed, index),
                "budget": Budget.model_construct(evaluations=stage.evaluations or rest, seconds=budget.seconds),
            }
        )
        for index, stage in enumerate(chain.stages)
    )


def _check_segments(chain: Stages, space: Space) -> None:
    """Refuse a stage whose segments lack borders that the merges of the stage before it may have."""
    reached = np.zeros(0, np.int64)
    for index, stage in enumerate(chain.stages):
        part = stage.search
        with _of_stage(index):
            own = _borders(part, space)
        begins = chain.starts[index] != "none"
        if begins and not isinstance(part, M2N2Search) and not np.isin(reached, own).all():
            raise InputError(
                f"search[{index}].granularity: the segments of the merges of stage {index - 1} have borders that its "
                f"own, {part.granularity}, lack.",
                "Make it finer, the stage before coarser, or say start: none.",
            )
        reached = np.union1d(own, reached) if begins else own


def _borders(part: SearchPart, space: Space) -> Integers:
    """(S+1,) borders that the segments of a search's merges may have, when it begins with nothing else."""
    if isinstance(part, ExpertMergingSearch) and part.chunks is not None:
        return np.asarray(space.borders("element"))
    return np.asarray(space.borders(part.granularity) if isinstance(part, M2N2Search) else _segments(part, space))


def _segments(part: Box | GradientSearch, space: Space) -> Integers:
    return borders_of(space, part.granularity, part.groups)


def _check_budget(recipe: Recipe, design: int) -> None:
    """Refuse a budget that is spent before a model of the objectives can be of use."""
    evaluations = recipe.budget.evaluations
    if evaluations is not None and evaluations <= design:
        raise InputError(
            f"budget.evaluations: expected more than {design}, the samples that {recipe.search.algorithm} takes before "
            f"it proposes anything, found {evaluations}.",
            "Raise the budget, take fewer samples (search.samples), or use nsga2.",
        )


def _m2n2(recipe: Recipe, part: M2N2Search, space: Space, starts: Sequence[Genome]) -> tuple[Search, Population]:
    archive = NicheArchive(goals_of(recipe.objectives.search), part.archive, part.alpha, part.resource)
    switches = M2N2Settings(
        attraction=part.attraction,
        split=part.split,
        crossover=part.crossover,
        interpolation=part.interpolation,
        granularity=part.granularity,
        mutation=part.mutation,
        max_segments=part.max_segments,
    )
    search = M2N2(space, archive, switches, recipe.seed, starts)
    if part.refine is None:
        return search, archive
    from ecotone.search.refined import Refined

    return Refined(search, _tasks(recipe), **part.refine.model_dump()), archive


def _gradient_search(recipe: Recipe, part: GradientSearch, space: Space, starts: Sequence[Genome]) -> Search:
    borders, goals, tasks = _segments(part, space), goals_of(recipe.objectives.search), _tasks(recipe)
    settings = part.model_dump(exclude={"algorithm", "granularity", "groups", "archive"})
    settings["starts"] = [start.refined(borders) for start in starts] or None
    if isinstance(part, ExpertMergingSearch):
        from ecotone.search.expert_merging import ExpertMerging

        return ExpertMerging(space, tasks, goals, recipe.seed, **settings)
    from ecotone.search.adamerging import AdaMerging

    return AdaMerging(borders, space.dimension, tasks, goals, recipe.seed, **settings)


def _tasks(recipe: Recipe) -> list[str]:
    return [task.name for task in recipe.calibration]


def _box_search(recipe: Recipe, part: Box, space: Space, starts: Sequence[Genome]) -> Search:
    """A search over coefficients; modules that import much are imported when they are asked for."""
    box, goals, seed = _box(recipe, part, space), goals_of(recipe.objectives.search), recipe.seed
    if isinstance(part, SurrogateBox):
        return _surrogate_search(recipe, part, box, space, starts)
    if isinstance(part, NsgaBox):
        from ecotone.search.nsga import Nsga

        return Nsga(box, goals, seed, part.algorithm, **_settings(part), seeds=_seeds(part, box, space, starts))
    if isinstance(part, OptunaBox):
        from ecotone.search.optuna_search import OptunaSearch

        return OptunaSearch(box, goals, seed, **_settings(part), seeds=_seeds(part, box, space, starts))
    if isinstance(part, CmaEsBox):
        from ecotone.search.cma_es import CmaEs

        settings = _settings(part) | ({"start": box.point(starts[0])} if starts else {})
        if settings["start"] is None and not check_operator(recipe).affine:
            settings["start"] = (part.low + part.high) / 2  # halfway from one model to the other
        return CmaEs(box, goals, seed, **settings, separable=part.algorithm == "sep_cma_es")
    assert isinstance(part, RandomBox)
    return RandomSearch(box, seed)


def _surrogate_search(
    recipe: Recipe, part: SurrogateBox, box: CoefficientBox, space: Space, starts: Sequence[Genome]
) -> Search:
    goals, seed, budget = goals_of(recipe.objectives.search), recipe.seed, recipe.budget.evaluations
    settings, points = _settings(part), [box.point(start) for start in starts] or None
    if isinstance(part, MapBox):
        from ecotone.search.map import MapSearch

        return MapSearch(box, goals, seed, **settings, evaluations=budget, seeds=space.seeds, starts=points)
    if isinstance(part, NestedMapBox):
        from ecotone.search.nested_map import NestedMapSearch

        given = {name: value for name, value in settings.items() if value is not None}
        return NestedMapSearch(box, goals, seed, space.sources, **given, evaluations=budget)
    assert isinstance(part, BayesianMapBox)
    from ecotone.search.bayesian_map import BayesianMap
    from ecotone.search.surrogates import checked_links

    links = checked_links(part.links, goals)
    settings["links"] = [None if links[goal.name] == "auto" else links[goal.name] for goal in goals]
    settings["reference"] = _reference(part, goals)
    design = settings.pop("samples")
    search = BayesianMap(box, goals, seed, design=design, **settings, seeds=space.seeds, starts=points)
    if points is None:
        _check_budget(recipe, search.design)
    return search


def _reference(part: BayesianMapBox, goals: Sequence[Goal]) -> list[float] | None:
    names = [goal.name for goal in goals]
    if part.reference is None:
        return None
    if sorted(part.reference) != sorted(names):
        found = list(part.reference)
        raise InputError(f"search.reference: expected a score for each of the objectives {names}, found {found}.")
    return [part.reference[name] for name in names]


def _box(recipe: Recipe, part: Box, space: Space) -> CoefficientBox:
    return CoefficientBox.of(space, part.granularity, part.low, part.high, part.groups, _searched(recipe))


def _settings(part: Box) -> dict[str, Any]:
    """The settings that are an algorithm's own: recipes name them as its constructor does."""
    return part.model_dump(exclude={"algorithm", "race", *ModelsFirstBox.model_fields})


def _seeds(part: ModelsFirstBox, box: CoefficientBox, space: Space, starts: Sequence[Genome]) -> Floats | None:
    """(n, D) what to score first: the starts, moved into the box; without any, where asked for, models and average."""
    if starts:
        points = box.clip(np.array([box.point(start) for start in starts]))
        return points[np.sort(np.unique(points, axis=0, return_index=True)[1])]
    if not part.models_first:
        return None
    rows = [*space.seeds, space.seeds.mean(axis=0)]
    return np.array([box.point(Genome.uniform(space.size, row)) for row in rows])


def check_search(recipe: Recipe, sources: Sources | None = None) -> tuple[Search, Integers, int] | None:
    """The search over coefficients, made before a weight is read to refuse early what does not fit, the (S+1,) borders
    of its segments, and the number of models.

    Args:
        recipe: What to check.
        sources: The models; without them only searches with coefficients a model or a group can be checked.

    Returns:
        None when there is nothing to tell: for M2N2, where coefficients a block or tensor cannot be counted, and for
        stages, each of which is checked.

    Raises:
        InputError: As for ``make_search``.
    """
    part = recipe.search
    _check_experts(recipe, _names(recipe.models) if sources is None else sources.names)
    if isinstance(part, Stages):
        for index, one in enumerate(stage_recipes(recipe)):
            with _of_stage(index):
                check_search(one, sources)
        if sources is not None:
            _check_segments(part, _outline_of(sources))
        return None
    if isinstance(part, M2N2Search) or (sources is None and part.granularity in ("block", "tensor")):
        return None
    outline = _outline(recipe, part.groups) if sources is None else _outline_of(sources)
    return make_search(recipe, outline)[0], _segments(part, outline), outline.dimension


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
    )


def _outline(recipe: Recipe, groups: int) -> Space:
    """The space of models of which only the recipe is known, with one block a group."""
    names, operator = _names(recipe.models), check_operator(recipe)
    columns = operator.columns(names)
    blocks, borders, count = tuple(map(str, range(groups))), np.arange(groups + 1), len(columns)
    gram = GramTable.from_regions([0, groups], np.zeros((1, count, count)))
    return Space(columns, blocks, borders, blocks, borders, gram, operator.seeds(len(names)), names)


def _names(models: Models) -> tuple[str, ...]:
    """Names of the experts as far as the recipe tells; those of files may come twice."""
    paths = [expert.removeprefix(PREPARED).rstrip("/") for expert in models.experts]
    return models.names or tuple(Path(path).name.removesuffix(".safetensors") for path in paths)


def _check_experts(recipe: Recipe, names: Sequence[str]) -> None:
    """Refuse tasks that are drawn to an expert there is not, unless ``names`` (K,) are not all known yet."""
    for task in recipe.calibration:
        expert = task.expert or task.name
        if task.loss != "distillation" or expert in names or len(set(names)) < len(names):
            continue
        raise InputError(
            f"calibration {task.name!r}: expert: expected one of {', '.join(names)}, found {expert!r}.",
            nearest(expert, list(names)) if task.expert else "Say which expert the task is to be like.",
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
