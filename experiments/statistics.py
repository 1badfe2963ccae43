"""Statistics of the models of a recipe, journalled in a directory of their own: ``ecotone statistics``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ecotone.experiments import compose, marks, preparation
from ecotone.experiments.changes import same_contents, same_models
from ecotone.experiments.merge import Merge
from ecotone.experiments.recipe import Recipe, check_recipe
from ecotone.experiments.running import Notify, references
from ecotone.experiments.storage import JOURNAL, on_this_machine
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.statistics.cache import Cache
from ecotone.fitness.statistics.kinds import chosen
from ecotone.merging.operators.stack import preparing
from ecotone.populations import facts
from ecotone.populations.birth import born
from ecotone.populations.errors import InputError, nearest
from ecotone.populations.genome import Genome
from ecotone.populations.journal import Journal
from ecotone.populations.space import Space
from ecotone.populations.trial import Evaluation, Statistics
from ecotone.search.manager import measure


@dataclass(frozen=True)
class ModelStatistics:
    """The statistics that were gathered of one model.

    Args:
        model: The model's name: an expert's, ``base`` or ``average``.
        genome: The digest of the genome that gives the model.
        evaluation: Key and digest of the statistics, or the reason for having none; seconds; ``details`` name the file.
        layers: The shapes of the tensors, by name; empty where the file is on another machine.
    """

    model: str
    genome: str
    evaluation: Evaluation
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As plain values for JSON."""
        found, stored = self.evaluation, self.evaluation.statistics
        return {
            "model": self.model,
            "genome": self.genome,
            "failure": None if found.failure is None else f"{found.failure.kind}: {found.failure.message}",
            "key": None if stored is None else stored.key,
            "digest": None if stored is None else stored.digest,
            "bytes": 0 if stored is None else stored.nbytes,
            "layers": {name: list(shape) for name, shape in self.layers.items()},
            "seconds": found.seconds,
            "examples": found.items,
            "file": found.details.get("file"),
        }


def gather(
    recipe: Recipe,
    wants: Statistics,
    out: str | Path,
    *,
    models: Sequence[str] = (),
    notify: Notify = lambda text: None,
) -> list[ModelStatistics]:
    """Gather statistics of models, or go on where an earlier call ended.

    Statistics that the journal in ``out`` has, and the cache of this machine holds undamaged, are not gathered again.
    Those that failed are tried again. ``out`` may be the directory of a run of the same recipe that is not going on.

    Args:
        recipe: Names the models and the calibration tasks.
        wants: The statistics; without tasks those of all.
        out: The directory of the journal.
        models: Names of experts, ``base`` or ``average``; by default all experts.
        notify: Called with a sentence when something takes a while.

    Raises:
        EcotoneError: The kind, a setting, a task or a model is not known, the models cannot be opened, or ``out`` holds
            another recipe's journal.
    """
    out = on_this_machine(out, "out")
    check_recipe(recipe)
    recipe = _of_models(recipe)
    wants = _checked(recipe, wants)
    own = () if recipe.folder is None else (str(recipe.folder),)
    paths = compose.python_paths(own)
    notify("Starting the workers ...")
    spec = compose.worker_spec(recipe, preparation.prepare(recipe), paths)
    cache = Cache()
    with compose.make_pool(recipe, _alone(spec)) as pool:
        space = pool.start()
        genomes = dict(_genomes(recipe, space, models))
        with _journal(out / JOURNAL, recipe, space, paths) as journal:
            notify(f"Gathering {wants.kind} of {', '.join(genomes)} ...")
            found = measure(pool, journal, genomes.values(), wants, 1, _held(cache))
    return [_told(name, genome, found[genome.digest], cache) for name, genome in genomes.items()]


def _of_models(recipe: Recipe) -> Recipe:
    """The recipe with task arithmetic for an operator that prepares: statistics are of the models themselves."""
    if not preparing(compose.check_operator(recipe)):
        return recipe
    own = {name: getattr(recipe.merge, name) for name in ("dtype", "freeze", "only")}
    return recipe.model_copy(update={"merge": Merge(operator="task_arithmetic", **own)})


def _checked(recipe: Recipe, wants: Statistics) -> Statistics:
    """The wish with the names of all its tasks."""
    chosen(wants)
    names = [task.name for task in recipe.calibration]
    if not names:
        raise InputError(
            "calibration: statistics are gathered over calibration tasks, and the recipe has none.",
            "Give one task or more: their data are used, labels are not.",
        )
    for name in wants.tasks:
        if name not in names:
            raise InputError(f"tasks: expected one of {', '.join(names)}, found {name!r}.", nearest(name, names))
    return replace(wants, tasks=tuple(dict.fromkeys(wants.tasks or names)))  # each once


def _alone(spec: WorkerSpec) -> WorkerSpec:
    """A worker that scores nothing."""
    return replace(spec, search=(), held_out=(), divided=False, dense=False)


def _genomes(recipe: Recipe, space: Space, models: Sequence[str]) -> Iterator[tuple[str, Genome]]:
    """The wanted models by name; all experts where none are named."""
    known = dict(references(recipe, compose.check_operator(recipe), space))
    experts = list(known)[-1 - len(space.seed_names) : -1]  # the average is last; before them there may be the base
    for name in models or experts:
        if name not in known:
            raise InputError(f"models: expected one of {', '.join(known)}, found {name!r}.", nearest(name, list(known)))
        yield name, known[name]


def _journal(file: Path, recipe: Recipe, space: Space, paths: tuple[str, ...]) -> Journal:
    """The journal, new or gone on with."""
    if not born(file):
        notes = [
            facts.NAME.note(recipe.name),
            facts.RECIPE.note(recipe.record()),
            facts.SIGNATURE.note(recipe.signature),
            facts.MODELS.note(space.seed_names),
            facts.GEOMETRY.note(space.gram.prefix[-1].tolist()),
            facts.CONTENTS.note(space.contents),
            facts.VERSIONS.note(compose.versions()),
            facts.SYS_PATH.note(paths),
            facts.STATE.note("finished"),  # there is no search to be gone on with
        ]
        return Journal.create(file, marks.with_mark(notes))
    journal = Journal.open(file, write=True)
    try:
        if journal.fact(facts.SIGNATURE) != recipe.signature:
            raise InputError(f"{file.parent}: another recipe's journal is there.", "Choose another --out.")
        same_contents(journal, space)
        same_models(journal, space)
    except BaseException:
        journal.close()
        raise
    return journal


def _held(cache: Cache) -> Callable[[Evaluation], bool]:
    def held(evaluation: Evaluation) -> bool:
        return evaluation.statistics is not None and cache.holds(evaluation.statistics)

    return held


def _told(name: str, genome: Genome, evaluation: Evaluation, cache: Cache) -> ModelStatistics:
    stored = evaluation.statistics
    if stored is None or not cache.holds(stored):
        return ModelStatistics(name, genome.digest, evaluation)
    tensors = cache.read(stored)
    shapes = {layer: tuple(tensor.shape) for layer, tensor in tensors.items()}
    return ModelStatistics(name, genome.digest, evaluation, shapes)
