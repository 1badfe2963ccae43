"""The worker measures candidates. It is a plain class, the same in this process and on a cluster."""

from __future__ import annotations

import contextlib
import logging
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, SupportsFloat

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ecotone.fitness.backends.base import BackendContext
from ecotone.fitness.callables import put_last
from ecotone.fitness.kinds import ObjectiveContext
from ecotone.fitness.language.generation import same_model
from ecotone.fitness.objectives import Model, same_draws
from ecotone.fitness.protocol import CalibrationTask, Divisible, Objective, Score
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.statistics.gather import Gatherer, NotFiniteError
from ecotone.fitness.statistics.kinds import Data
from ecotone.merging.models.checkpoint import located
from ecotone.merging.models.files import Files
from ecotone.merging.placement import Free, Needs, settled
from ecotone.merging.sources import Sources
from ecotone.populations.errors import EcotoneError, InputError, PoolError, first_line, nearest, told
from ecotone.populations.genome import Genome
from ecotone.populations.samples import Sample
from ecotone.populations.space import Space
from ecotone.populations.trial import Evaluation, Gradient, Scores, Statistics, Trial, Wish
from ecotone.registry import TELL, whose

_log = logging.getLogger("ecotone")


class WorkerBrokenError(PoolError):
    """A candidate has left this process's GPU in a state in which it computes nothing any more."""


class NotScoredError(InputError):
    """An objective cannot be computed for a reference merge, or gives it no finite score."""


def open_sources(spec: WorkerSpec) -> Sources:
    """The models of a worker, opened; only headers are read.

    Raises:
        EcotoneError: As for ``Sources.open``.
    """
    models = (spec.experts, spec.base, spec.operator, spec.names, spec.settings, spec.vocabulary)
    return Sources.open(*models, spec.sources, spec.treatment, spec.config, spec.rank)


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
    kind = _kind(spec, sources)
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
        self._device = _device(spec.device)
        self._sources = open_sources(spec)
        self._place()
        kind = _kind(spec, self._sources)
        self._backend = spec.backend.make(BackendContext(self._sources, spec.architecture, self._device, kind))
        tokenizer = None if spec.tokenizer is None else located(spec.tokenizer)
        self.files: Files = self._sources.files(tokenizer)
        """The models' files. They are looked at before and after each batch."""
        self.files.hash()
        context = ObjectiveContext(self._device, self._backend.dtype, None if tokenizer is None else str(tokenizer))
        self._objectives: dict[str, list[Objective]] = {
            "search": [objective.build(context) for objective in spec.search],
            "held_out": [objective.build(context) for objective in spec.held_out],
        }
        self._parts: dict[tuple[int, int, float, float], Objective] = {}  # by objective and part of a sample
        if spec.divided and (whole := [one for one in self._objectives["search"] if not isinstance(one, Divisible)]):
            raise _indivisible(whole[0])
        if spec.calibration and not isinstance(self._backend.model, nn.Module):
            raise InputError("calibration: expected a torch module to differentiate.", "Name an architecture.")
        self._tasks = {task.name: task.build(context, spec.seed) for task in spec.calibration}
        for task in self._tasks.values():
            task.fits(self._backend.model, self._sources.names)

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
        return [evaluation for some in groups for evaluation in self._measure_group(some)]

    def _differentiated(self, trials: Sequence[Trial]) -> list[Evaluation]:
        return [self._differentiate(trial, trial.gradient) for trial in trials if trial.gradient is not None]

    def _measure_group(self, trials: Sequence[Trial]) -> list[Evaluation]:
        """Trials whose weights are merged in one pass, or one by one if that fails."""
        evaluations: list[Evaluation] = []
        began = time.perf_counter()
        try:
            models = self._backend.show([trial.genome for trial in trials])
            shared = (time.perf_counter() - began) / len(trials)
            for trial in trials:
                began = time.perf_counter() - shared
                model = next(models)
                merging = {"merge_seconds": round(time.perf_counter() - began, 6)}
                evaluations.append(replace(self._evaluate(trial, model, began), details=merging))
        except Exception as error:
            if len(trials) == 1:
                return [_failed("merging", error, began)]
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
            scores = self._scores(few, next(self._backend.show([merge])), time.perf_counter())
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
        whole, sample = self._objectives[trial.wants.subset], trial.wants.sample
        scores = self._scores([self._part(objective, sample) for objective in whole], model, began)
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

    def _scores(self, objectives: Sequence[Objective], model: Model, began: float) -> dict[str, Score] | Evaluation:
        """The scores of ``model``, by objective; or the failure of the first objective that fails."""
        scores: dict[str, Score] = {}
        with same_model(objectives):
            for objective in objectives:
                name = objective.goal.name
                try:
                    score = _checked(objective, objective.score(model))
                except (Exception, SystemExit) as error:
                    return _failed(f"objective {name!r}", error, began)
                if not math.isfinite(score.value):
                    return self._not_finite(f"objective {name!r}: expected a finite score, found {score.value}", began)
                scores[name] = score
        return scores

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
            assert now.per_example is not None
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
                with same_draws(batch.step):  # a model or head may draw: dropout that is never off
                    value, numbers, count = self._task(name).loss(model, batch.step)
                details.update({Evaluation.detail_of(name, key): number for key, number in numbers.items()})
                items += count
                yield value

        try:
            for name in batch.tasks:
                self._task(name).prepare(batch.step, self._backend.expert)
            values, gradient = self._backend.gradient(trial.genome, losses, batch.weights)
        except (Exception, SystemExit) as error:
            return _failed(f"calibration {name!r}", error, began)
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

    def _gathered(self, trials: Sequence[Trial]) -> list[Evaluation]:
        return [self._gather(trial, trial.wants) for trial in trials if isinstance(trial.wants, Statistics)]

    def _gather(self, trial: Trial, wants: Statistics) -> Evaluation:
        began, subject = time.perf_counter(), f"statistics {wants.kind}"
        try:
            evaluation = self._gatherer.evaluate(trial.genome, wants)
        except NotFiniteError as error:
            return self._not_finite(f"{subject}: {error}", began)
        except (Exception, SystemExit) as error:
            return _failed(subject, error, began)
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


def _checked(objective: Objective, score: Any) -> Score:
    """The answer of ``Objective.score``.

    Raises:
        InputError: It is no ``Score``, or its value is no number.
    """
    if isinstance(score, Score) and isinstance(score.value, SupportsFloat):
        return score
    subject = whose("the objective", type(objective))
    raise InputError(f"{subject}: score(): expected a Score whose value is a number, found {repr(score)[:100]}.", TELL)


def _indivisible(objective: Objective) -> InputError:
    return InputError(
        f"search.race: objective {objective.goal.name!r} cannot be asked of some of its examples.",
        "Leave race out, or use an objective that scores each of its examples.",
    )


def _failed(where: str, error: BaseException, began: float) -> Evaluation:
    """A failed evaluation that names the place and the exception.

    Raises:
        WorkerBrokenError: Nothing will be computed here any more.
    """
    if isinstance(error, WorkerBrokenError):
        raise error
    kind = "out of memory" if _out_of_memory(error) else "exception"
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        _check_context(where, error)
        if kind == "out of memory":
            torch.cuda.empty_cache()
    message = first_line(error) if isinstance(error, EcotoneError) else told(error)
    details = "".join(traceback.format_exception(error))
    return Evaluation.failed(kind, f"{where}: {message}", details, time.perf_counter() - began)


def _check_context(where: str, error: BaseException) -> None:
    """Refuse to go on when an error of a kernel has broken the context: every later call would fail as well."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as broken:
        raise WorkerBrokenError(
            f"{where}: the GPU cannot be used any more in this process ({told(error)}).",
            "Where workers are processes (runtime.pool: ray) they are replaced; look at this candidate's inputs.",
        ) from broken


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device: expected a CUDA device, found none.", "Use device auto or cpu.")
    if name not in ("cpu", "cuda"):
        raise InputError(f"device: expected auto, cpu or cuda, found {name!r}.")
    return torch.device(name)


def _kind(spec: WorkerSpec, sources: Sources) -> torch.dtype | None:
    """The floating-point type of the resident model; None for the types of the tensors of a dict."""
    stored = None if spec.architecture is None else sources.layout.dtype
    return _dtype(spec.dtype) or stored


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise InputError(f"dtype: expected float32, bfloat16 or float16, found {name!r}.")
    return kind
