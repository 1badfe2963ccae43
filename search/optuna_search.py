"""Optuna's samplers over merge coefficients, behind our protocol: TPE, GP, NSGA-II, NSGA-III, CMA-ES, random, QMC.

The study lives in memory: the run's journal is the storage, and a resumed search asks and tells again what the
journal holds. Optuna's samplers draw from one stream, which its storages do not keep. Here every trial gets a sampler
of its own, seeded from the recipe's seed and the trial's number, so that a search rebuilt by replay or from
``state()`` goes on with the same points. What a sampler has learned it keeps with the trials of the study, or
learns again from their scores.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from ecotone.extras import how_to_install
from ecotone.populations.errors import InputError
from ecotone.populations.fronts import ranks
from ecotone.populations.genome import Floats
from ecotone.populations.population import ElitistArchive, climbed
from ecotone.populations.ranking import Extremes
from ecotone.populations.trial import Evaluation, Goal, Outcome, Trial, oriented
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.kinds import Begins, Context, ModelsFirstBox, Needs, Pair
from ecotone.search.nsga import seed_points
from ecotone.search.protocol import Search

Sampler: TypeAlias = Literal["tpe", "gp", "nsga2", "nsga3", "cma_es", "random", "qmc"]

GP_COEFFICIENTS = 32
"""The most coefficients that the sampler ``gp`` takes on."""

# Optuna's class, and of each setting our name, Optuna's name (None where it is ours alone) and the default.
_SAMPLERS: dict[str, tuple[str, dict[str, tuple[str | None, Any]]]] = {
    "tpe": (
        "TPESampler",
        {
            "startup": ("n_startup_trials", 10),
            "multivariate": ("multivariate", True),
            "constant_liar": ("constant_liar", True),
        },
    ),
    "gp": ("GPSampler", {"startup": ("n_startup_trials", 10), "history": (None, 200)}),
    "nsga2": ("NSGAIISampler", {"population": ("population_size", 50)}),
    "nsga3": ("NSGAIIISampler", {"population": ("population_size", 50)}),
    "cma_es": (
        "CmaEsSampler",
        {
            "startup": ("n_startup_trials", 1),
            "population": ("popsize", None),
            "separable": ("use_separable_cma", False),
        },
    ),
    "random": ("RandomSampler", {}),
    "qmc": ("QMCSampler", {}),
}


class OptunaSettings(ModelsFirstBox):
    """One of Optuna's samplers. A setting that is not given is the sampler's own.

    Attributes:
        algorithm: ``optuna``: one of Optuna's samplers.
        sampler: The sampler of Optuna: ``tpe``, ``gp``, ``nsga2``, ``nsga3``, ``cma_es``, ``random``, or ``qmc``
            (scrambled Sobol points).
        startup: Trials drawn evenly and scored before the sampler's model begins. None means 10 for ``tpe`` and ``gp``,
            1 for ``cma_es``; other samplers take none.
        multivariate: Model the coefficients jointly. Only for ``tpe``, where None means true.
        constant_liar: Treat trials in flight as poor, so that proposals differ. Only for ``tpe``, where None means
            true. It spreads proposals well without ``multivariate``, little with it.
        population: Trials in a generation. None means 50 for ``nsga2`` and ``nsga3``, and 4 + floor(3 ln D) for
            ``cma_es`` with D coefficients; other samplers take none.
        separable: Learn a diagonal covariance only. Only for ``cma_es``, where None means false.
        history: The most scored trials that the sampler's model is fitted to: half from the best fronts, half the
            latest. It bounds the time of a proposal. Only for ``gp``, where None means 200.
    """

    algorithm: Literal["optuna"] = "optuna"
    sampler: Sampler = "tpe"
    startup: int | None = Field(default=None, ge=1)
    multivariate: bool | None = None
    constant_liar: bool | None = None
    population: int | None = Field(default=None, ge=2)
    separable: bool | None = None
    history: int | None = Field(default=None, ge=2)

    def needs(self) -> Needs:
        """The reference directions of ``nsga3`` have a meaning for two objectives or more."""
        return Needs(objectives=2 if self.sampler == "nsga3" else 1)

    def imports(self) -> Mapping[str, tuple[str, ...]]:
        """Optuna; its Gaussian process also needs greenlet."""
        return {"optuna": ("optuna", "greenlet") if self.sampler == "gp" else ("optuna",)}

    def begins(self) -> Begins:
        """With merges that are scored in place of the models."""
        return Begins()

    def describe(self, search: Search | None, context: Context) -> str:
        """The bounds, and what CMA-ES climbs where directions differ."""
        return f"{super().describe(search, context)}{climbed(context.goals) if self.sampler == 'cma_es' else ''}"

    def make(self, context: Context) -> Pair:
        """The search, and an archive of the best."""
        box = self.box(context)
        search = OptunaSearch(box, context.goals, context.seed, self, self.first(box, context))
        return search, ElitistArchive(context.goals, self.archive)


class OptunaSearch:
    """One of Optuna's samplers; it never waits for results.

    TPE and GP take the trials in flight into account. CMA-ES optimises one number, the mean of the scores
    (``ecotone.populations.ranking``), all others see every objective. Where the mean is one of ranges, CMA-ES ranks a
    generation by those of everything told when it learns from it. Failed trials are told as failed.

    A proposal takes Optuna's time, and takes it again when a search is resumed. CPU milliseconds on one thread, two
    objectives, after 100 and 1000 trials (``benchmarks/proposals.py``):

    ======================  =====  =====  =====  =====
    coefficients               10     10     96     96
    trials                    100   1000    100   1000
    ======================  =====  =====  =====  =====
    tpe                         4     14     27     90
    tpe, not multivariate      12     46    120    460
    gp                        570    770
    nsga2, nsga3                1      1      5      6
    cma_es                      1      1      6      7
    random, qmc                 1      1      8      8
    ======================  =====  =====  =====  =====

    GP takes 180 ms with one objective, 1000 with three, and up to 3000 where the front is long (96 coefficients are
    refused). With it let ``scoring.in_flight`` exceed ``scoring.batch``: workers then have candidates left to score
    while the next are computed.

    Args:
        box: The bounds of the coefficients.
        goals: The M objectives.
        seed: The recipe's seed.
        settings: The sampler and its settings; None means the defaults.
        seeds: (n, D) points to score first, such as the models themselves; moved into the box.

    Raises:
        InputError: Optuna is not installed, the sampler lacks a setting that is given, or it does not fit the
            objectives or the number of coefficients.

    Example::

        from ecotone.populations.population import ElitistArchive
        from ecotone.search.optuna_search import OptunaSearch, OptunaSettings

        archive = ElitistArchive(goals, capacity=20)
        search = OptunaSearch(box, goals, 0, OptunaSettings(sampler="tpe", startup=5))
        for _ in range(10):
            for trial in search.ask(4):
                evaluation = score(trial.genome)
                search.tell(trial, evaluation, archive.add(trial, evaluation))
    """

    settings: OptunaSettings

    def __init__(
        self,
        box: CoefficientBox,
        goals: Sequence[Goal],
        seed: int,
        settings: OptunaSettings | None = None,
        seeds: ArrayLike | None = None,
    ) -> None:
        self.settings = settings = settings or OptunaSettings()
        _check(settings.sampler, box.size, len(goals))
        self.box = box
        self.goals: tuple[Goal, ...] = tuple(goals)
        self.seed = seed
        self._options = _options(settings)
        self._optuna = _imported()
        self._names = [f"c{i:05d}" for i in range(box.size)]
        self._space = dict.fromkeys(self._names, self._optuna.distributions.FloatDistribution(box.low, box.high))
        joint = self._space if self._options.get("multivariate", True) else {}
        self._class = _of_joint_space(getattr(self._optuna.samplers, _SAMPLERS[settings.sampler][0]), joint)
        self._next = 0
        self._told = Extremes(goals)
        self._points: dict[int, list[float]] = {}  # oriented scores by trial, where the sampler sees their mean
        self._read: dict[int, Any] = {}  # trials as they are read under the present scale
        with self._quietly():
            self._storage, self._study = self._opened()
            for point in seed_points(box, seeds):
                self._study.enqueue_trial(dict(zip(self._names, point.tolist(), strict=True)))

    @property
    def done(self) -> bool:
        """Never: samplers go on until the budget is spent."""
        return False

    def ask(self, n: int) -> list[Trial]:
        """``n`` trials. Each is proposed with knowledge of the earlier trials, scored or in flight."""
        numbers = range(self._next, self._next + n)
        with self._quietly():
            trials = [Trial(number, self.box.genome(self._proposed(number))) for number in numbers]
        self._next += n
        return trials

    def tell(self, trial: Trial, evaluation: Evaluation, outcome: Outcome) -> None:
        """Tell the study the scores, or that the trial failed."""
        with self._quietly():
            if evaluation.ok:
                self._study.tell(trial.number, self._values(trial.number, evaluation))
            else:
                self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)

    def state(self) -> dict[str, Any]:
        """The study: points, scores and states of its trials, the sampler's notes on them, and the scores' extremes.

        CMA-ES notes its optimiser, as the text of a pickle: restore only what a search of yours has given.
        """
        trials = self._study.get_trials(deepcopy=False)
        return {
            "next": self._next,
            "told": self._told.state(),
            "points": [[number, list(point)] for number, point in self._points.items()],
            "trials": [
                {
                    "state": trial.state.name,
                    "point": [trial.params[name] for name in self._names] if trial.params else None,
                    "values": trial.values,
                    "notes": dict(trial.system_attrs),
                }
                for trial in trials
            ],
            "notes": dict(self._storage.get_study_system_attrs(self._number())),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self._next = state["next"]
        self._told.restore(state["told"])
        self._points = {number: list(point) for number, point in state["points"]}
        self._read.clear()
        with self._quietly():
            self._storage, self._study = self._opened()
            for record in state["trials"]:
                self._study.add_trial(
                    self._frozen(record["state"], record["point"], record["values"], record["notes"]),
                )
            for name, note in state["notes"].items():
                self._storage.set_study_system_attr(self._number(), name, note)

    # -- the study ---------------------------------------------------------------------------------------

    def _opened(self) -> tuple[Any, Any]:
        """A storage in memory and its one study."""
        scalar = self.settings.sampler == "cma_es"
        kind = self._optuna.storages.InMemoryStorage
        storage = _reading(kind, self._read_anew)() if scalar else kind()
        directions = ["maximize"] * (1 if scalar else len(self.goals))  # scores are told oriented
        return storage, self._optuna.create_study(
            storage=storage, sampler=self._seeded(0), directions=directions, study_name="search"
        )

    def _number(self) -> int:
        return int(self._storage.get_study_id_from_name(self._study.study_name))

    def _values(self, number: int, evaluation: Evaluation) -> list[float]:
        """What the study is told of a trial: its scores, or where the sampler takes one number their present mean."""
        point: list[float] = oriented(evaluation.scores, self.goals).tolist()
        if self.settings.sampler != "cma_es":
            return point
        if self._told.take(point):
            self._read.clear()
        self._points[number] = point
        return [self._mean(number)]

    def _mean(self, number: int) -> float:
        return float(self._told.scale.means(np.array([self._points[number]]))[0])

    def _read_anew(self, trial: Any) -> Any:
        """A trial of the study, with its mean under the present scale: the study keeps the one that it was told."""
        if self._told.scale.unit != "ranges" or trial.values is None:
            return trial
        if trial.number not in self._read:
            self._read[trial.number] = other = copy.copy(trial)
            other.value = self._mean(trial.number)
        return self._read[trial.number]

    def _frozen(
        self, state: str, point: Sequence[float] | None, values: Sequence[float] | None, notes: dict[str, Any]
    ) -> Any:
        """A trial to add to a study; ``point`` is None while a seed waits for its turn."""
        return self._optuna.trial.create_trial(
            state=self._optuna.trial.TrialState[state],
            params={} if point is None else dict(zip(self._names, point, strict=True)),
            distributions={} if point is None else self._space,
            values=values,
            system_attrs=notes,
        )

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Without Optuna's log lines, and its warnings that samplers are experimental."""
        log, level = self._optuna.logging, self._optuna.logging.get_verbosity()
        log.set_verbosity(log.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
                yield
        finally:
            log.set_verbosity(level)

    # -- proposing ---------------------------------------------------------------------------------------

    def _proposed(self, number: int) -> Floats:
        study = self._shown()
        study.sampler = self._seeded(number)
        asked = study.ask(self._space)
        point = [asked.params[name] for name in self._names]
        if study is not self._study:
            self._study.add_trial(self._frozen("RUNNING", point, None, {}))
        return np.array(point, np.float64)

    def _seeded(self, number: int) -> Any:
        """The sampler of one trial. A QMC sequence is one for all trials; the study counts its points."""
        sampler = self.settings.sampler
        key = () if sampler == "qmc" else (number,)
        options: dict[str, Any] = {"seed": int(np.random.SeedSequence(self.seed, spawn_key=key).generate_state(1)[0])}
        if sampler == "qmc":
            options["scramble"] = True
        for name, (theirs, _) in _SAMPLERS[sampler][1].items():
            if theirs is not None:
                options[theirs] = self._options[name]
        return self._class(**options)

    def _shown(self) -> Any:
        """The study, or when it has more scored trials than ``history``, a copy that lacks the others."""
        history = self._options.get("history")
        if history is None:
            return self._study
        states = self._optuna.trial.TrialState
        scored = self._study.get_trials(deepcopy=False, states=(states.COMPLETE,))
        if len(scored) <= history:
            return self._study
        running = self._study.get_trials(deepcopy=False, states=(states.RUNNING,))
        _, study = self._opened()
        study.add_trials([*self._worth(scored, history), *running])
        return study

    def _worth(self, scored: Sequence[Any], history: int) -> list[Any]:
        """Half of ``history`` from the best fronts, the younger first; the other half the youngest of the rest."""
        rank = ranks([trial.values for trial in scored])
        order = np.lexsort((-np.arange(len(scored)), rank))
        best, rest = order[: history // 2], order[history // 2 :]
        kept = np.concatenate([best, np.sort(rest)[len(rest) - (history - len(best)) :]])
        return [scored[i] for i in np.sort(kept)]


def _check(sampler: Sampler, coefficients: int, objectives: int) -> None:
    if sampler == "nsga3" and objectives < 2:
        raise InputError(
            f"search.sampler: nsga3 expects two objectives or more, found {objectives}.",
            "For one objective use sampler: tpe or gp, or algorithm: cma_es.",
        )
    if sampler == "gp" and coefficients > GP_COEFFICIENTS:
        raise InputError(
            f"search.sampler: gp models at most {GP_COEFFICIENTS} coefficients, found {coefficients}.",
            "Use granularity: model or groups; or for so many algorithm: nsga2, sep_cma_es, or sampler: tpe.",
        )
    if sampler == "cma_es" and coefficients < 2:
        raise InputError(
            f"search.sampler: cma_es expects two coefficients or more, found {coefficients}.",
            "Use algorithm: cma_es, which takes one, or sampler: tpe.",
        )


def _options(settings: OptunaSettings) -> dict[str, Any]:
    """Every setting of the sampler, by our name: as given, or its default."""
    sampler = settings.sampler
    taken, any_samplers = _SAMPLERS[sampler][1], {name for _, names in _SAMPLERS.values() for name in names}
    given = settings.model_dump(include=any_samplers, exclude_none=True)
    for name, value in given.items():
        if name not in taken:
            raise InputError(
                f"search.{name}: sampler {sampler} has no such setting, found {value}.",
                f"Its settings: {', '.join(taken) or 'none'}.",
            )
    options = {name: given.get(name, default) for name, (_, default) in taken.items()}
    if "history" in given and options["history"] < options["startup"]:
        raise InputError(
            f"search.history: expected at least {options['startup']} (startup), found {options['history']}."
        )
    return options


def _imported() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise InputError(
            f"search.algorithm: Optuna is not installed ({error}).", f"`{how_to_install('optuna')}`."
        ) from error
    return optuna


def _of_joint_space(kind: type, space: dict[str, Any]) -> type:
    """The sampler class, told which coefficients it proposes jointly, which it would work out from all trials."""
    return type(kind.__name__, (kind,), {"infer_relative_search_space": lambda self, study, trial: dict(space)})


def _reading(kind: type, read: Callable[[Any], Any]) -> type:
    """The class of storage, all of whose trials are read through ``read``."""

    def get_all_trials(self: Any, study_id: int, deepcopy: bool = True, states: Any = None) -> list[Any]:
        return [read(trial) for trial in kind.get_all_trials(self, study_id, deepcopy, states)]  # type: ignore[attr-defined]

    return type(kind.__name__, (kind,), {"get_all_trials": get_all_trials})
