"""A candidate's failure, made of what was raised while it was measured."""

from __future__ import annotations

import time

import torch

from ecotone.fitness.guards import SpoiledError
from ecotone.fitness.scores import NotFiniteScoreError
from ecotone.populations.errors import EcotoneError, PoolError, first_line, text_of, told, trace_of
from ecotone.populations.trial import Evaluation


class WorkerBrokenError(PoolError):
    """A candidate has left this process's GPU in a state in which it computes nothing any more."""


def failed(where: str, error: BaseException, began: float) -> Evaluation:
    """A failed evaluation that names the place and the exception, which may be of any kind.

    Args:
        where: What was done or called; it begins the message, unless the error's own message does.
        error: What was raised.
        began: The value of ``time.perf_counter`` when it began.

    Raises:
        WorkerBrokenError: Nothing will be computed here any more.
    """
    if isinstance(error, WorkerBrokenError):
        raise error
    kind = "exception"
    if isinstance(error, NotFiniteScoreError):
        kind = "not finite"
    elif _out_of_memory(error):
        kind = "out of memory"
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        _check_context(where, error)
        if kind == "out of memory":
            torch.cuda.empty_cache()
    if isinstance(error, SpoiledError | NotFiniteScoreError) or (
        isinstance(error, EcotoneError) and error.message.startswith(where)
    ):
        message = first_line(error)
    else:
        message = f"{where}: {first_line(error) if isinstance(error, EcotoneError) else told(error)}"
    return Evaluation.failed(kind, message, trace_of(error), time.perf_counter() - began)


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
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in text_of(error)
