"""Running a recipe from start to end, and resuming what was stopped."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from ecotone.experiments import (
    beginnings,
    bus_errors,
    changes,
    checks,
    compose,
    gate,
    keeping,
    logs,
    marks,
    preparation,
    storage,
)
from ecotone.experiments.fingerprints import fingerprints
from ecotone.experiments.recipe import Recipe, check_recipe, check_resumable
from ecotone.experiments.runs import Run, check_search, front_rows
from ecotone.experiments.storage import JOURNAL, Place
from ecotone.experiments.words import wrote
from ecotone.fitness.pools import Pool, ReadsModels
from ecotone.merging.operators.base import Operator
from ecotone.merging.operators.own import own_merges
from ecotone.merging.operators.stack import preparing
from ecotone.merging.values import refuse_nan
from ecotone.populations import facts
from ecotone.populations.errors import EcotoneError, InputError, text_of
from ecotone.populations.folders import private_folder, write_private
from ecotone.populations.genome import Genome
from ecotone.populations.journal import Journal
from ecotone.populations.secrets import cleaning
from ecotone.populations.space import Space
from ecotone.populations.trial import Scores
from ecotone.search.kinds import Pair
from ecotone.search.manager import Manager, Observer, Progress, measure

if TYPE_CHECKING:
    from ecotone.experiments.tracking.watching import Followers

Notify = Callable[[str], None]

_LONGEST = 200  # characters of a recipe's name, where a directory is named after it
_log = logging.getLogger("ecotone")


@runtime_checkable
class Reporting(Protocol):
    """A search with a report of its own at its end: surrogates, a predicted front, a tree."""

    def report(self) -> dict[str, Any]:
        """Plain values and arrays."""


@cleaning()
def launch(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    observe: Observer = lambda progress: None,
    notify: Notify = lambda text: None,
    folders: tuple[str, ...] = (),
) -> Run:
    """Run a recipe to its budget and return the finished run.

    Args:
        recipe: The recipe to run.
        out: The run directory, a path or a URL, which must not hold a run; None makes ``runs/NAME-TIME``.
        observe: Called with the progress after every step.
        notify: Called with a sentence when something takes a while.
        folders: Folders to find the recipe's own Python functions in, besides the recipe's and the working directory.

    Raises:
        EcotoneError: The recipe cannot be run, or the search cannot go on; what was recorded is safe.
        KeyboardInterrupt: Stopped; the run can be resumed.
    """
    check_recipe(recipe)
    with (
        storage.opened(new_directory(recipe.name) if out is None else out, new=True, notify=notify) as place,
        beginnings.begun(place, notify) as beginning,
    ):
        directory = place.directory
        own = () if recipe.folder is None else (str(recipe.folder),)
        paths = compose.python_paths((*folders, *own))
        composition = _checked(recipe, paths, notify)
        notify("Starting the workers ...")
        _tell_unused(recipe, notify)
        _tell_preparing(composition.operator, notify)
        before = fingerprints(recipe, composition.spec)
        pool = compose.make_pool(recipe, replace(composition.spec, try_out=bool(composition.spec.search)))
        with _deaths_told(recipe, place), pool:
            space = pool.start()
            _check_numbers(space, notify)
            pair = composition.search(space)
            beginning.make_room(recipe.text())
            _write_recipe(recipe, directory, new=True)
            notes = [
                *_notes(composition, space, paths),
                *changes.opening(recipe, composition.spec, space, before),
                *_credentials(recipe, place, notify),
            ]
            with Journal.create(directory / JOURNAL, marks.with_mark(notes), beginning.lock) as journal:
                _carry_out(composition, pair, place, journal, pool, space, observe, notify)
    return Run(directory)


@cleaning()
def resume(
    run: str | Path | Run,
    settings: Mapping[str, Any] | None = None,
    *,
    accept_changes: bool = False,
    observe: Observer = lambda progress: None,
    notify: Notify = lambda text: None,
    trust: bool = False,
    folders: tuple[str, ...] = (),
) -> Run:
    """Go on with a run that was stopped or killed, or whose budget is raised. Completes a finished run's scores.

    A run that was made elsewhere, or by an Ecotone that left no marks, is marked as this user's own from then on.

    Args:
        run: The run, or its directory or URL.
        settings: Fields of ``runtime``, ``tracking`` and ``budget`` to replace, by dotted name.
        accept_changes: Go on although files of models, code or data have changed since the run began; it is recorded.
        observe: As for ``launch``.
        notify: As for ``launch``.
        trust: Trust what the run names, although it bears no mark of this user's (``ecotone.experiments.trust``).
        folders: Folders to find the recipe's own Python functions in, besides those that the run began with.

    Raises:
        UntrustedError: The run was made elsewhere, and names functions, paths or servers that are not trusted.
        EcotoneError: The run cannot go on; what was recorded is safe.
        KeyboardInterrupt: Stopped again.
    """
    where, given = run.where if isinstance(run, Run) else run, settings or {}
    gate.check_claim(where)
    with (
        storage.opened(where, new=False, notify=notify) as place,
        Journal.open(place.directory / JOURNAL, write=True) as journal,
    ):
        check_search(journal, place.where)
        standing = gate.resumable(journal, place.where, given, trust, notify)
        record, known = _recorded_paths(journal)
        recipe = _resumed_recipe(record, given, wrote(journal))
        deque(map(notify, recipe.tracking.warnings()), maxlen=0)
        secret = journal.fact(facts.CREDENTIALS) or ()
        deque(map(notify, keeping.missing(secret, recipe.tracking.recorded())), maxlen=0)
        paths = gate.python_paths(standing, folders, known)
        notify("Starting the workers ...")
        _tell_unused(recipe, notify)
        composition = compose.Composition(recipe, paths)
        _tell_preparing(composition.operator, notify)
        compared = changes.Comparison(journal, recipe, composition.spec, accept_changes, "resume", notify)
        compared.check_code()
        with _deaths_told(recipe, place), compose.make_pool(recipe, composition.spec) as pool:
            space = pool.start()
            _check_numbers(space, notify)
            compared.check_models(space.contents)
            compared.check_geometry(space)
            compared.record(space)
            present = (*folders, *known) if standing == "own" else (*folders, str(Path.cwd()))
            with journal.transaction():
                journal.note(facts.RECIPE, recipe.record())
                journal.note(facts.BUDGET, recipe.budget.model_dump(mode="json"))
                journal.note(facts.TRACKING, recipe.tracking.recorded(journal.fact(facts.TRACKING) or {}))
                journal.note(facts.SYS_PATH, present)
                for note in _credentials(recipe, place, notify, secret):
                    journal.note(facts.CREDENTIALS, facts.CREDENTIALS.read(note.text))
                versions = facts.VERSIONS.note(compared.versions)
                journal.complete([*_notes(composition, space, present), versions])  # what a repaired journal has lost
                marks.mark_journal(journal)
            if standing != "own" and marks.has_mark(journal):
                notify("The run is marked as yours from now on.")
            _write_recipe(recipe, place.directory)
            _carry_out(composition, composition.search(space), place, journal, pool, space, observe, notify)
    return Run(place.directory)


def _checked(recipe: Recipe, paths: Sequence[str], notify: Notify) -> compose.Composition:
    """Make every check of ``validate`` before anything starts, and prepare the models.

    A search on a cluster may start on a machine without the models. Then the workers check their headers.

    Raises:
        EcotoneError: Something does not fit.
    """
    composition = compose.Composition(recipe, paths)
    if not composition.prepared:
        deque(checks.findings(composition), maxlen=0)
        notify("Preparing the models ...")
        composition = compose.Composition(recipe, paths)
        preparation.prepare(recipe)
    if recipe.runtime.address is None or composition.here:
        deque(checks.findings(composition), maxlen=0)
    return composition


def _credentials(recipe: Recipe, place: Place, notify: Notify, known: Sequence[str] = ()) -> list[facts.Note]:
    """The fact of which URLs have credentials, if any have, beside those ``known`` before; these are kept elsewhere."""
    urls = keeping.kept(notify, recipe.record(), recipe.tracking.recorded(), place.where)
    return [facts.CREDENTIALS.note(tuple(dict.fromkeys([*known, *urls])))] if urls else []


def _write_recipe(recipe: Recipe, directory: Path, *, new: bool = False) -> None:
    """The resolved recipe as it now is, for people; the journal has it too."""
    file, text = directory / "recipe.yaml", recipe.text()
    try:
        private_folder(directory)
        if new and file.exists() and file.read_bytes() != text.encode():
            raise InputError(f"{file}: a file is there that the run would overwrite.", "Choose another --out.")
        write_private(file, text.encode())
    except OSError as error:
        raise InputError(
            f"{directory}: cannot be written ({error.strerror or error}).",
            "Check the path, the permissions and the space, or choose another --out.",
        ) from error


def _carry_out(
    composition: compose.Composition,
    pair: Pair,
    place: Place,
    journal: Journal,
    pool: Pool,
    space: Space,
    observe: Observer,
    notify: Notify,
) -> None:
    recipe, (search, population) = composition.recipe, pair
    goals = compose.goals_of(recipe.objectives.search)
    schedule = compose.make_schedule(recipe)
    runtime = recipe.runtime

    def guarded(progress: Progress) -> None:
        place.check()
        followers.look()
        observe(progress)

    with (
        logs.recorded(place.directory, runtime.log),
        place.copied(runtime.mirror_every, runtime.lease),
        _recorded(journal, place),
        _tracked(recipe, place, notify) as followers,
    ):
        manager = Manager(search, population, goals, pool, journal, schedule, guarded)
        with _drained(manager):
            reason = manager.run()
        if reason == "drained":
            raise KeyboardInterrupt
        journal.note(facts.STOP_REASON, reason)
        if isinstance(search, Reporting):
            journal.note(facts.REPORT, search.report())
        notify("Scoring the front on held-out data ...")
        _judge(composition, journal, pool, space)
        if isinstance(pool, ReadsModels):
            pool.check_models()
        deque(map(notify, changes.late(journal, recipe, composition.spec)), maxlen=0)
        journal.note(facts.STATE, "finished")


def _judge(composition: compose.Composition, journal: Journal, pool: Pool, space: Space) -> None:
    """Score the front, the best and the reference merges on held-out data, and the references on search data too."""
    recipe = composition.recipe
    batch = recipe.scoring.batch
    if any(part.compares for part in recipe.searches):
        for name, genome in references(recipe, composition.operator, space):
            journal.refer(name, genome)
    merges = [genome for _, genome in journal.references()]
    measure(pool, journal, merges, Scores(), batch)
    if recipe.objectives.held_out:
        goals = compose.goals_of(recipe.objectives.search)
        rows = front_rows(list(journal.rows()), goals)
        genomes = [journal.trial(row.number).genome for row in rows]
        measure(pool, journal, [*merges, *genomes], Scores("held_out"), batch)


def references(recipe: Recipe, operator: Operator, space: Space) -> Iterator[tuple[str, Genome]]:
    """The models themselves (with task vectors also the base) and the average of the experts.

    Where they are not the models as their files have them, their names say so: after an operator that changes models,
    with frozen tensors, cut to a rank. The base and the average have names that no expert has.
    """
    merge = recipe.merge
    marks = [
        *([merge.operator] if operator.changes else []),
        *(["frozen"] if merge.freeze or merge.only else []),
        *([] if merge.rank is None else [f"rank {merge.rank}"]),
    ]
    changed = f" ({', '.join(marks)})" if marks else ""
    experts = [f"{name}{changed}" for name in space.seed_names]

    def named(name: str) -> str:
        return named(f"{name}, no expert") if name in experts else name

    if recipe.models.base is not None and operator.needs_base:
        yield named("base"), Genome.uniform(space.size, np.zeros(space.dimension))
    for name, row in zip(experts, space.seeds, strict=True):
        yield name, Genome.uniform(space.size, row)
    average = {"average": Genome.uniform(space.size, space.seeds.mean(axis=0))}
    for name, genome in (own_merges(operator, len(space.seeds), space.size) or average).items():
        yield named(f"{name}{changed}"), genome


def _deaths_told(recipe: Recipe, place: Place) -> contextlib.AbstractContextManager[None]:
    """Words on a death of this process, where it scores itself."""
    if recipe.runtime.pool != "serial":
        return contextlib.nullcontext()
    return bus_errors.told(f"`ecotone resume {place.where}` names the file.")


@contextlib.contextmanager
def _drained(manager: Manager) -> Iterator[None]:
    """SIGTERM makes the manager finish the candidates in flight. A second one acts as it did before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def drain(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, before)
        manager.drain()

    before = signal.signal(signal.SIGTERM, drain) or signal.SIG_DFL
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _recorded(journal: Journal, place: Place) -> Iterator[None]:
    """Keep the journal's ``state`` true whatever happens, and log it."""
    resumed = bool(journal.events())
    _log.info(
        "The run in %s is resumed." if resumed else "The run in %s has started.",
        place.where,
        extra={"event": "run_resumed" if resumed else "run_started", "run": place.where},
    )
    journal.note(facts.STATE, "running")
    journal.note(facts.ERROR, "")
    try:
        yield
    except KeyboardInterrupt:
        journal.note(facts.STATE, "interrupted")
        raise
    except BaseException as error:
        with contextlib.suppress(EcotoneError):  # the journal itself may be what failed
            journal.note(facts.STATE, "failed")
            journal.note(facts.ERROR, text_of(error))
        raise
    finally:
        with contextlib.suppress(EcotoneError):
            state = journal.fact(facts.STATE)
            _log.info("The run is %s.", state, extra={"event": "run_ended", "run": place.where, "state": state})


@contextlib.contextmanager
def _tracked(recipe: Recipe, place: Place, notify: Notify) -> Iterator[Followers]:
    """Have processes of their own mirror the journal into the recipe's trackers meanwhile."""
    from ecotone.experiments.tracking.watching import Followers

    followers = Followers(place.directory, place.where, recipe.tracking.trackers, notify)
    try:
        yield followers
    except BaseException:
        followers.leave()
        raise
    followers.wait(60)


def _notes(composition: compose.Composition, space: Space, paths: tuple[str, ...]) -> list[facts.Note]:
    """The facts that open the journal of a new run."""
    recipe = composition.recipe
    objectives = recipe.objectives
    starts = compose.solved_starts(recipe, space, composition.operator)
    components = [found for one in recipe.searches if (found := one.parts(space)).names]
    return [
        facts.NAME.note(recipe.name),
        facts.RECIPE.note(recipe.record()),
        facts.SIGNATURE.note(recipe.signature),
        facts.ALGORITHM.note(recipe.search.algorithm),
        facts.SEED.note(recipe.seed),
        facts.GOALS.note(compose.goals_of(objectives.search)),
        facts.HELD_OUT_GOALS.note(compose.goals_of(objectives.held_out)),
        facts.BUDGET.note(recipe.budget.model_dump(mode="json")),
        facts.TRACKING.note(recipe.tracking.recorded()),
        facts.MODELS.note(space.seed_names),
        facts.SYS_PATH.note(paths),
        facts.GEOMETRY.note(space.gram.prefix[-1].tolist()),
        *(facts.COMPONENTS.note(parts.record()) for parts in components[-1:]),
        *([facts.STARTS.note(starts)] if starts else []),
        facts.STATE.note("running"),
    ]


def _recorded_paths(journal: Journal) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The recorded recipe, and the folders on the Python path, of which the last is the working directory.

    The files that travel with a job lie in another folder each time. So a job moves paths in the working directory that
    the run began in to the present one.
    """
    record, folders = journal.fact(facts.RECIPE) or {}, journal.fact(facts.SYS_PATH) or ()
    if "ECOTONE_JOB" not in os.environ or not folders:
        return record, folders
    here = str(Path.cwd())
    return _moved(record, folders[-1], here), tuple(_moved(list(folders), folders[-1], here))


def _moved(value: Any, old: str, new: str) -> Any:
    """``value`` with the paths in it, at any depth, that are in ``old`` put into ``new``."""
    if isinstance(value, dict):
        return {key: _moved(one, old, new) for key, one in value.items()}
    if isinstance(value, list):
        return [_moved(one, old, new) for one in value]
    inside = isinstance(value, str) and (value == old or value.startswith(f"{old}{os.sep}"))
    return new + value.removeprefix(old) if inside else value


def _resumed_recipe(record: Mapping[str, Any], settings: Mapping[str, Any], written_by: str) -> Recipe:
    check_resumable(settings)
    return Recipe.read_back(record, written_by, settings)


def _check_numbers(space: Space, notify: Notify) -> None:
    """Refuse weights that are NaN: every merge with them is NaN, and scores alone may not show it."""
    squares = np.diagonal(space.gram.prefix[-1])
    missing = [name for name, square in zip(space.sources, squares, strict=True) if np.isnan(square)]
    refuse_nan(missing, or_base=len(missing) == len(squares))
    infinite = [name for name, square in zip(space.sources, squares, strict=True) if np.isinf(square)]
    if infinite:
        notify(f"Warning: the weights of {', '.join(infinite)} hold infinity, or are too large to be squared.")


def _tell_unused(recipe: Recipe, notify: Notify) -> None:
    if text := compose.unused_workers(recipe):
        notify(f"Warning: {text}")


def _tell_preparing(operator: Operator, notify: Notify) -> None:
    if found := preparing(operator):
        notify(f"Preparing the vectors of {', '.join(found)}, unless they are in the cache ...")


def new_directory(name: str) -> Path:
    """``runs/NAME-TIME``, numbered on if it exists.

    Raises:
        InputError: No directory can have such a long name.
    """
    stem = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if len(name) > _LONGEST:
        raise InputError(
            f"name: expected at most {_LONGEST} characters, as a directory is named after it, found {len(name)}.",
            "Choose another name, or give --out.",
        )
    candidates = [stem, *(stem.with_name(f"{stem.name}-{i}") for i in range(2, 1000))]
    return next(path for path in candidates if not path.exists())
