"""The worker measures candidates. It is a plain class, the same in this process and on a cluster."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ecotone.fitness.backends.base import BackendContext
from ecotone.fitness.callables import put_last
from ecotone.fitness.failures import failed
from ecotone.fitness.guards import User
from ecotone.fitness.kinds import ObjectiveContext
from ecotone.fitness.language.generation import same_model
from ecotone.fitness.objectives import Model, same_draws
from ecotone.fitness.opening import device_of, kind_of, open_sources
from ecotone.fitness.preparing.prepare import basis_of
from ecotone.fitness.protocol import CalibrationTask, Divisible, Objective, Score
from ecotone.fitness.scores import ANYTHING, Expected, NotFiniteScoreError, checked, facts, no_number, number, shown
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.statistics.gather import Gatherer, NotFiniteError
from ecotone.fitness.statistics.kinds import Data, chosen
from ecotone.fitness.supervision import Supervisor, is_foreign
from ecotone.merging.models.checkpoint import located
from ecotone.merging.models.files import Files
from ecotone.merging.placement import Free, Needs, settled
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError, nearest
from ecotone.populations.genome import Genome
from ecotone.populations.samples import Sample
from ecotone.populations.space import Space
from ecotone.populations.trial import Evaluation, Gradient, Scores, Statistics, Subset, Trial, Wish
from ecotone.registry import TELL, whose

_log = logging.getLogger("ecotone")


class NotScoredError(InputError):
    """An objective cannot be computed for a reference merge, or gives it no finite score."""


def needs_of(spec: WorkerSpec, sources: Sources, device: torch.device, *, settings: bool = False) -> Needs:
    """The memory that a worker takes, from headers alone.

    Args:
        spec: The spec from which the worker is made.
        sources: Its models.
        device: The device on which it merges.
        settings: Whether genomes have settings of their own.

    Raises:
        InputError: The spec's type is none.
    """
    kind = kind_of(spec, sources)
    return spec.backend.needs(sources, device, kind, spec.threads, spec.batch, settings=settings)


class Worker:
    """Holds the sources, a backend that shows merges, objectives and calibration tasks; measures batch after batch.

    What it says of a trial depends on the spec alone: not on earlier trials, on its batch or on the process.
    The number of CPU threads is set for the whole process.

    Args:
        spec: All of it.

    Raises:
        EcotoneError: A checkpoint, the architecture, an objective or its data cannot be used, or there is no memory for
            the model, or for the sources where the spec wants them.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        put_last(spec.sys_path)
        torch.set_num_threads(spec.threads)
        self._spec = spec
        self._device = device_of(spec.device)
        self._sources = open_sources(spec, basis_of(spec))
        self._place()
        kind = kind_of(spec, self._sources)
        self._backend = spec.backend.make(BackendContext(self._sources, spec.architecture, self._device, kind))
        tokenizer = None if spec.tokenizer is None else located(spec.tokenizer)
        self.files: Files = self._sources.files(tokenizer)
        """The models' files. They are looked at before and after each batch."""
        self.files.hash()
        context = ObjectiveContext(self._device, self._backend.dtype, None if tokenizer is None else str(tokenizer))
        self._objectives: dict[Subset, list[Objective]] = {
            "search": [objective.build(context) for objective in spec.search],
            "held_out": [objective.build(context) for objective in spec.held_out],
        }
        self._known: dict[int, tuple[Objective, User, Expected]] = {}  # which keep the objectives, and so their ids
        self._expected = {
            (group, one.name): Expected(one.limits)
            for group, objectives in (("search", spec.search), ("held_out", spec.held_out))
            for one in objectives
        }
        self._again = False  # an objective of the last candidate wrote into the weights
        self._parts: dict[tuple[int, int, float, float], Objective] = {}  # by objective and part of a sample
        if spec.divided and (whole := [one for one in self._objectives["search"] if not isinstance(one, Divisible)]):
            raise _indivisible(whole[0])
        if spec.calibration and not isinstance(self._backend.model, nn.Module):
            raise InputError("calibration: expected a torch module to differentiate.", "Name an architecture.")
        self._tasks = {task.name: task.build(context, spec.seed) for task in spec.calibration}
        every = [*self._tasks.values(), *(one for group in self._objectives.values() for one in group)]
        heads = [head.function for one in every if (head := getattr(one, "head", None)) is not None]
        self._supervisor = Supervisor(self._backend, [head for head in heads if isinstance(head, nn.Module)])
        for group, objectives in self._objectives.items():
            for one in objectives:  # known before the first batch begins
                self._about(group, one)
        with self._supervisor.signals:
            self._supervisor.begin()
            for name, task in self._tasks.items():
                task.fits(self._backend.model, self._sources.names)
                self._supervisor.restore(self._task_user(name), merged=False)
        self._gatherer = Gatherer(self._sources, self._backend, spec.architecture, self._data)
        self._measures: dict[type[Wish], Callable[[Sequence[Trial]], list[Evaluation]]] = {
            Scores: self._scored,
            Gradient: self._differentiated,
            Statistics: self._gathered,
        }

    def _place(self) -> None:
        """Settle where the sources are kept, before anything is."""
        spec, device = self._spec, self._device
        free = Free.here(device)
        share = free.divided(spec.device_share, spec.neighbours)
        needs = needs_of(spec, self._sources, device)
        self._sources.held.place(device, settled(spec.sources, needs, free, share, device))

    def space(self) -> Space:
        """The search's view of the models: layout, inner products, hashes of files. Streams the sources once.

        Raises:
            InputError: As for ``try_out`` and ``check_varied``, where the spec asks for the try-out.
            ModelChangedError: A model's file has changed since it was opened.
        """
        first = self.try_out() if self._spec.try_out else {}
        space = self._sources.space(self._spec.dense)
        words = "objectives.search.%s: %g for the first and for the last expert: does it depend on the model?"
        same: dict[str, float] = {}
        with contextlib.suppress(NotScoredError):  # of weights that are no numbers the space tells better
            same = self.same_scores(first)
        self.check_varied(same)
        for name, value in same.items():
            _log.warning(words, name, value)
        self.files.look()
        return replace(space, contents=self.files.contents)

    def measure(self, trials: Sequence[Trial]) -> list[Evaluation]:
        """One evaluation a trial, in order, of what the trial wants.

        A trial that cannot be measured has a failure; the others are unaffected. While a model's file is touched, its
        bytes may be others for a moment, so the trials are then measured again.

        Raises:
            ModelChangedError: A model's file has changed since it was opened; nothing that was measured now counts.
            WorkerBrokenError: One has broken the GPU's context, as an assertion in a kernel does. Make another worker
                in another process.
        """
        self.files.glance()  # what has changed since the last look is seen after the batch at the latest
        while True:
            loads, runs = self._sources.held.loads, groupby(trials, lambda trial: type(trial.wants))
            with self._supervisor.signals:
                self._supervisor.begin()
                found = [evaluation for wish, run in runs for evaluation in self._measures[wish](list(run))]
            if not (self.files.look() if self._may_have_read(trials, loads) else self.files.glance()):
                return found

    def _may_have_read(self, trials: Sequence[Trial], loads: int) -> bool:
        """Whether the trials may have read models' files. They have not where all that is mixed is kept in memory.

        Args:
            trials: The trials.
            loads: The number of tensors that had been read before them.
        """
        sources = self._sources
        if loads != sources.held.loads or sources.rank is not None or sources.own_configs:
            return True
        return not all(isinstance(trial.wants, Scores) for trial in trials)

    def _scored(self, trials: Sequence[Trial]) -> list[Evaluation]:
        group = self._backend.group
        groups = [trials[start : start + group] for start in range(0, len(trials), group)]
        with self._supervisor.settled():
            return [evaluation for some in groups for evaluation in self._measure_group(some)]

    def _differentiated(self, trials: Sequence[Trial]) -> list[Evaluation]:
        with self._supervisor.settled():
            return [self._differentiate(trial, trial.gradient) for trial in trials if trial.gradient is not None]

    def _measure_group(self, trials: Sequence[Trial]) -> list[Evaluation]:
        """Trials whose weights are merged in one pass, or one by one if that fails."""
        evaluations: list[Evaluation] = []
        began = time.perf_counter()
        try:
            models = self._backend.show([trial.genome for trial in trials])
            shared = (time.perf_counter() - began) / len(trials)
            for place, trial in enumerate(trials, 1):
                began = time.perf_counter() - shared
                model = next(models)
                self._supervisor.shown(model)
                if twice := self._supervisor.careful:
                    model = self._merged_twice(trial.genome)
                merging = {"merge_seconds": round(time.perf_counter() - began, 6)}
                self._again = False
                evaluations.append(replace(self._evaluate(trial, model, began), details=merging))
                if self._again or twice:
                    models = self._backend.show([left.genome for left in trials[place:]]) if trials[place:] else models
        except BaseException as error:
            self._supervisor.signals.pass_on(error)
            if len(trials) == 1:
                return [failed("merging", error, began)]
            return [self._measure_group([trial])[0] for trial in trials]
        return evaluations

    def try_out(self, number: int = 0) -> dict[str, float]:
        """Score an expert, on one example of each objective that can be asked of one and on all of others.

        Args:
            number: The number of the expert, from 0.

        Returns:
            The scores of those of the search that were asked of all their examples, by name.

        Raises:
            InputError: An objective cannot be computed, its score is no finite number, or it is below 0 and the search
                takes none below. The message names it.
            WorkerBrokenError: As for ``measure``.
        """
        return self._tried(self._sources.operator.seeds(len(self._sources.experts))[number])

    def _tried(self, coefficients: NDArray[np.float64]) -> dict[str, float]:
        """The scores of ``try_out`` for the merge with one coefficient a model, (K,)."""
        merge = Genome.uniform(self._sources.layout.size, coefficients)
        whole: dict[str, float] = {}
        for group, objectives in self._objectives.items():
            few = [one.subset(np.zeros(1, np.int64)) if isinstance(one, Divisible) else one for one in objectives]
            with self._supervisor.signals:
                self._supervisor.begin()
                model = self._shown(merge)
                scores = self._scores(group, few, merge, model, time.perf_counter())
            if isinstance(scores, Evaluation):
                assert scores.failure is not None
                raise NotScoredError(
                    scores.failure.text,
                    "It was tried out on the first expert, before any of the budget is spent.",
                )
            if group == "search":
                self._check_nonnegative(scores)
                whole = {one.goal.name: scores[one.goal.name].value for one in few if not isinstance(one, Divisible)}
        return whole

    def same_scores(self, first: Mapping[str, float]) -> dict[str, float]:
        """Try out the last expert; its scores that equal those of the first, by name.

        Args:
            first: The scores that ``try_out`` returned of the first expert.

        Raises:
            InputError: As for ``try_out``.
        """
        count = len(self._sources.experts)
        last = self.try_out(count - 1) if first and count > 1 else {}
        return {name: value for name, value in first.items() if last.get(name) == value}

    def check_varied(self, same: Mapping[str, float]) -> None:
        """Refuse objectives that give one score to all reference merges, where the search needs scores that differ.

        Args:
            same: The scores that ``same_scores`` returned.

        Raises:
            InputError: An objective gives all experts, their average and the base, if there is one, the same score.
        """
        if not self._spec.varied:
            return
        operator = self._sources.operator
        seeds = operator.seeds(len(self._sources.experts))
        base = [np.zeros_like(seeds[0])] if operator.needs_base else []
        for merge in (seeds.mean(axis=0), *base, *seeds[1:-1]):
            if not same:
                return
            try:
                found = self._tried(merge)
            except NotScoredError:  # a merge of which no score is known is no equal one
                return
            same = {name: value for name, value in same.items() if found[name] == value}
        for name, value in same.items():
            raise InputError(
                f"objectives.search.{name}: expected scores that differ between merges, as a surrogate is fitted to "
                f"them, found {value:g} for every expert and for their average.",
                "Have it depend on the model, or leave it out.",
            )

    def _check_nonnegative(self, scores: Mapping[str, Score]) -> None:
        for name, score in scores.items() if self._spec.nonnegative else ():
            least = np.min([score.value, *(() if score.per_example is None else score.per_example)])
            if least < 0:
                raise InputError(
                    f"objectives.search.{name}: expected scores of at least 0, which the search shares out among "
                    f"merges, found {least:.6g} for an expert.",
                    "Transform the score (accuracy, exp(-loss)), or use another algorithm.",
                )

    def _evaluate(self, trial: Trial, model: Model, began: float) -> Evaluation:
        assert isinstance(trial.wants, Scores)
        group, sample = trial.wants.subset, trial.wants.sample
        whole = self._objectives[group]
        parts = [self._part(objective, sample) for objective in whole]
        scores = self._scores(group, parts, trial.genome, model, began)
        if isinstance(scores, Evaluation):
            return scores
        if sample is not None:
            return self._joined(sample, whole, scores, began)
        return Evaluation(
            {name: score.value for name, score in scores.items()},
            {name: score.per_example for name, score in scores.items() if score.per_example is not None},
            seconds=time.perf_counter() - began,
            items=sum(score.items for score in scores.values()),
        )

    def _scores(
        self, group: Subset, objectives: Sequence[Objective], genome: Genome, model: Model, began: float
    ) -> dict[str, Score] | Evaluation:
        """The scores of ``model``, by objective; or the failure of the first objective that fails.

        Args:
            group: The objectives' group.
            objectives: Its objectives, whole or in part.
            genome: The merge that ``model`` shows: it is merged again if an objective writes into the weights.
            model: It has just been shown.
            began: When the work on the candidate began.
        """
        scores: dict[str, Score] = {}
        with same_model(objectives):
            for left, objective in zip(reversed(range(len(objectives))), objectives, strict=True):
                name, (user, expected) = objective.goal.name, self._about(group, objective)
                score, again = None, False
                try:
                    try:
                        score = self._scored_by(user, objective, model, expected, follows=left > 0)
                    finally:
                        if user.foreign or self._supervisor.careful or score is None:
                            again = self._supervisor.restore(user)
                    if again and left:
                        model = self._shown(genome)
                except BaseException as error:
                    self._supervisor.signals.pass_on(error)
                    self._again |= again or self._supervisor.careful
                    return self._failed_score(user, genome, error, again, began)
                self._again |= again or self._supervisor.careful
                scores[name] = score
        return scores

    def _scored_by(self, user: User, objective: Objective, model: Model, expected: Expected, *, follows: bool) -> Score:
        """The score of ``model``, which is one."""
        score = self._supervisor.call(user, lambda: objective.score(model), follows=follows)
        if not isinstance(score, Score) or no_number(score.value) is not None:
            subject = whose("the objective", type(objective))
            found = shown(score)
            raise InputError(f"{subject}: score(): expected a Score whose value is a number, found {found}.", TELL)
        return checked(score, user.subject, expected)

    def _failed_score(self, user: User, genome: Genome, error: BaseException, again: bool, began: float) -> Evaluation:
        if isinstance(error, NotFiniteScoreError):
            if again:  # what is said of the weights must be true of the merge
                self._shown(genome)
            return self._not_finite(error.message, began)
        return failed(user.subject, error, began)

    def _shown(self, genome: Genome) -> Model:
        """The model with the weights of a genome."""
        model: Model = next(self._backend.show([genome]))
        self._supervisor.shown(model)
        return self._merged_twice(genome) if self._supervisor.careful else model

    def _merged_twice(self, genome: Genome) -> Model:
        """The model that is shown, merged once more, as a thread of user code may have written into it meanwhile.

        Raises:
            SpoiledError: The two merges differ.
        """
        with self._supervisor.merged_again():
            model: Model = next(self._backend.show([genome]))
            self._supervisor.shown(model)
        return model

    def _about(self, group: Subset, objective: Objective) -> tuple[User, Expected]:
        """What is known of an objective: found once, as to ask a protocol takes as long as a small forward pass."""
        known = self._known.get(id(objective))
        if known is None:
            expected = self._expected.get((group, objective.goal.name), ANYTHING)
            if isinstance(objective, Divisible):
                expected = replace(expected, count=objective.count)
            foreign = is_foreign(type(objective), getattr(objective, "head", None))
            user = self._supervisor.user(f"objective {group}", objective.goal.name, foreign)
            known = self._known[id(objective)] = objective, user, expected
        return known[1:]

    def _task_user(self, name: str) -> User:
        task = self._task(name)
        return self._supervisor.user("calibration", name, is_foreign(type(task), task.head))

    def _part(self, objective: Objective, sample: Sample | None) -> Objective:
        """The objective on the examples of a sample that are to be scored now, made once."""
        if sample is None:
            return objective
        if not isinstance(objective, Divisible):
            raise _indivisible(objective)
        key = (id(objective), sample.seed, sample.start, sample.stop)
        if key not in self._parts:
            self._parts[key] = objective.subset(sample.now(objective.count))
        return self._parts[key]

    def _joined(
        self, sample: Sample, objectives: Sequence[Objective], found: Mapping[str, Score], began: float
    ) -> Evaluation:
        """The evaluation of the examples seen before and now together.

        Once all examples are seen, scores by example are in the objectives' own order.
        """
        scores, errors, per_example = dict[str, float](), dict[str, float](), dict[str, NDArray[Any]]()
        for objective in objectives:
            assert isinstance(objective, Divisible)
            name, numbers, now = objective.goal.name, sample.then(objective.count), found[objective.goal.name]
            if now.per_example is None:
                raise InputError(f"objective {name!r}: expected scores by example of a sample, found none.")
            pooled = np.concatenate([sample.seen[name], now.per_example]) if sample.start else now.per_example
            if not sample.partial:
                pooled, numbers = pooled[np.argsort(numbers)], np.arange(objective.count)
            scores[name], errors[name] = objective.pooled(pooled, numbers)
            per_example[name] = pooled
        items, seconds = sum(score.items for score in found.values()), time.perf_counter() - began
        return Evaluation(scores, per_example, None, seconds, items, errors=errors if sample.partial else {})

    def _differentiate(self, trial: Trial, batch: Gradient) -> Evaluation:
        began = time.perf_counter()
        name, details, items = batch.tasks[0], dict[str, float](), 0

        def losses(model: nn.Module) -> Iterator[Tensor]:
            nonlocal name, items
            for name in batch.tasks:
                value, numbers, count = self._loss(name, model, batch.step)
                subject = f"calibration {name!r}"
                for key, fact in facts(numbers, subject).items():
                    details[Evaluation.detail_of(name, key)] = fact
                items += int(number(count, f"{subject}: examples"))
                yield value

        try:
            try:
                for name in batch.tasks:
                    self._prepare(name, batch.step)
                values, gradient = self._backend.gradient(trial.genome, losses, batch.weights)
            finally:
                if name in self._tasks and ((user := self._task_user(name)).foreign or self._supervisor.careful):
                    self._supervisor.restore(user, merged=False)
        except BaseException as error:
            self._supervisor.signals.pass_on(error)
            return failed(f"calibration {name!r}", error, began)
        scores = dict(zip(batch.tasks, values, strict=True))
        for name, value in scores.items():
            if not math.isfinite(value):
                message = f"calibration {name!r}: expected a finite loss, found {value}"
                return self._not_finite(message, began)
        if not np.isfinite(gradient).all():
            subject = f"calibration {', '.join(map(repr, batch.tasks))}"
            return self._not_finite(f"{subject}: expected a finite gradient, found NaN or infinity", began)
        seconds = time.perf_counter() - began
        return Evaluation(scores, seconds=seconds, items=items, details=details, gradient=gradient)

    def _prepare(self, name: str, step: int) -> None:
        """Have a task made ready; what it does to the weights is undone when the merge is shown."""
        task = self._task(name)
        user = self._task_user(name)
        self._supervisor.call(user, lambda: task.prepare(step, self._backend.expert), follows=False)
        if user.foreign:
            self._supervisor.restore(user, merged=False, fixed=False)
            self._supervisor.distrust()

    def _loss(self, name: str, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float], int]:
        """A task's loss; a model or head may draw in it: dropout that is never off."""

        def loss() -> tuple[Tensor, dict[str, float], int]:
            with same_draws(step):
                return self._task(name).loss(model, step)

        return self._supervisor.call_loss(self._task_user(name), model, loss)

    def _gathered(self, trials: Sequence[Trial]) -> list[Evaluation]:
        return [self._gather(trial, trial.wants) for trial in trials if isinstance(trial.wants, Statistics)]

    def _gather(self, trial: Trial, wants: Statistics) -> Evaluation:
        began, subject = time.perf_counter(), f"statistics {wants.kind}"
        try:
            kind, _ = chosen(wants)
            heads = [self._tasks[name].head for name in wants.tasks if name in self._tasks]
            user = self._supervisor.user("statistics", wants.kind, is_foreign(kind, *heads))
            gather = partial(self._gatherer.evaluate, trial.genome, wants)
            try:
                evaluation = self._supervisor.call(user, gather, follows=False)
            finally:
                self._supervisor.restore(user, merged=False)
        except NotFiniteError as error:
            return self._not_finite(f"{subject}: {error}", began)
        except BaseException as error:
            self._supervisor.signals.pass_on(error)
            return failed(subject, error, began)
        return replace(evaluation, seconds=time.perf_counter() - began)

    def _data(self, name: str) -> Data:
        task = self._task(name)
        return Data(name, task.examples, task.head)

    def _task(self, name: str) -> CalibrationTask:
        if name in self._tasks:
            return self._tasks[name]
        remedy = nearest(name, tuple(self._tasks)) if self._tasks else "The worker has no calibration tasks."
        raise InputError(f"expected a calibration task of that name, found {name!r}.", remedy)

    def _not_finite(self, found: str, began: float) -> Evaluation:
        tensor = self._backend.not_finite()
        cause = f"the merged weights hold NaN or infinity ({tensor})" if tensor else "the merged weights are finite"
        return Evaluation.failed("not finite", f"{found}; {cause}.", seconds=time.perf_counter() - began)


def _indivisible(objective: Objective) -> InputError:
    return InputError(
        f"search.race: objective {objective.goal.name!r} cannot be asked of some of its examples.",
        "Leave race out, or use an objective that scores each of its examples.",
    )
