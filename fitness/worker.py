"""What measures candidates: a plain class, the same in this process and on a cluster."""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Sequence

import torch

from fitness.objectives import Model, Objective, Score, build
from fitness.resident import Resident
from fitness.specs import WorkerSpec
from merging.sources import Sources
from populations.errors import EcotoneError, InputError
from populations.space import Space
from populations.trial import Evaluation, Trial


class Worker:
    """Holds the sources, one resident model and the objectives, and scores one batch of trials after the other.

    What it says of a trial depends on the spec alone: not on earlier trials, on its batch or on the process.
    The number of CPU threads is set for the whole process.

    Args:
        spec: All of it.

    Raises:
        EcotoneError: A checkpoint, the architecture, an objective or its data cannot be used.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        sys.path[:0] = [folder for folder in spec.sys_path if folder not in sys.path]
        torch.set_num_threads(spec.threads)
        self._spec = spec
        self._device = _device(spec.device)
        self._sources = Sources.open(spec.experts, spec.base, spec.operator, spec.names, spec.settings)
        stored = None if spec.architecture is None else self._sources.layout.dtype
        self._resident = Resident(self._sources, spec.architecture, self._device, _dtype(spec.dtype) or stored)
        self._objectives: dict[str, list[Objective]] = {
            "search": [build(objective, self._device, self._resident.dtype) for objective in spec.search],
            "held_out": [build(objective, self._device, self._resident.dtype) for objective in spec.held_out],
        }

    def space(self) -> Space:
        """What the search may know of the models; streams the sources once."""
        return self._sources.space(self._spec.dense)

    def measure(self, trials: Sequence[Trial]) -> list[Evaluation]:
        """One evaluation a trial, in order. A trial that cannot be scored has a failure; the others are unaffected."""
        group = self._resident.group
        evaluations: list[Evaluation] = []
        for start in range(0, len(trials), group):
            evaluations += self._measure_group(trials[start : start + group])
        return evaluations

    def _measure_group(self, trials: Sequence[Trial]) -> list[Evaluation]:
        """Trials whose weights are merged in one pass, or one by one if that fails."""
        evaluations: list[Evaluation] = []
        began = time.perf_counter()
        try:
            models = self._resident.show([trial.genome for trial in trials])
            shared = (time.perf_counter() - began) / len(trials)
            for trial in trials:
                began = time.perf_counter() - shared
                evaluations.append(self._evaluate(trial, next(models), began))
        except Exception as error:
            if len(trials) == 1:
                return [_failed("merging", error, began)]
            return [self._measure_group([trial])[0] for trial in trials]
        return evaluations

    def _evaluate(self, trial: Trial, model: Model, began: float) -> Evaluation:
        scores: dict[str, Score] = {}
        for objective in self._objectives[trial.subset]:
            name = objective.goal.name
            try:
                score = objective.score(model)
            except (Exception, SystemExit) as error:
                return _failed(f"objective {name!r}", error, began)
            if not math.isfinite(score.value):
                return self._not_finite(name, score.value, began)
            scores[name] = score
        return Evaluation(
            {name: score.value for name, score in scores.items()},
            {name: score.per_example for name, score in scores.items() if score.per_example is not None},
            seconds=time.perf_counter() - began,
            items=sum(score.items for score in scores.values()),
        )

    def _not_finite(self, name: str, value: float, began: float) -> Evaluation:
        tensor = self._resident.not_finite()
        cause = f"the merged weights hold NaN or infinity ({tensor})" if tensor else "the merged weights are finite"
        message = f"objective {name!r}: expected a finite score, found {value}; {cause}."
        return Evaluation.failed("not finite", message, seconds=time.perf_counter() - began)


def _failed(where: str, error: BaseException, began: float) -> Evaluation:
    """A failure that names where it happened and what was raised."""
    kind = "out of memory" if _out_of_memory(error) else "exception"
    if kind == "out of memory" and torch.cuda.is_available():
        torch.cuda.empty_cache()
    first = (str(error).strip().splitlines() or [""])[0]
    message = first if isinstance(error, EcotoneError) else f"{type(error).__name__}: {first}".rstrip(": ")
    details = "".join(traceback.format_exception(error))
    return Evaluation.failed(kind, f"{where}: {message}", details, time.perf_counter() - began)


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


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise InputError(f"dtype: expected float32, bfloat16 or float16, found {name!r}.")
    return kind
