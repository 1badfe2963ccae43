"""Objectives, calibration tasks and Python functions in short, for tests that need no recipe around them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from ecotone.fitness.kinds import CalibrationSettings, ObjectiveContext, ObjectiveSettings
from ecotone.fitness.registry import AnyCalibration, AnyObjective
from ecotone.populations.errors import InputError
from ecotone.settings import Call

CPU = torch.device("cpu")

_objectives: TypeAdapter[ObjectiveSettings] = TypeAdapter(AnyObjective)
_tasks: TypeAdapter[CalibrationSettings] = TypeAdapter(AnyCalibration)


def call(path: str, arguments: dict[str, Any] | None = None) -> Call:
    return Call(call=path, arguments=arguments or {})


def objective(name: str, kind: str = "accuracy", /, **fields: Any) -> ObjectiveSettings:
    """Settings of that kind; what is not given has its default."""
    return _objectives.validate_python({"name": name, "type": kind, **fields})


def calibration(name: str, data: Call, loss: str = "entropy", **fields: Any) -> CalibrationSettings:
    """A task's settings; what is not given has its default."""
    return _tasks.validate_python({"name": name, "data": data, "loss": loss, **fields})


def context(dtype: torch.dtype | None = None, tokenizer: Any = None, device: torch.device = CPU) -> ObjectiveContext:
    return ObjectiveContext(device, dtype, None if tokenizer is None else str(tokenizer))


@contextmanager
def refused(words: str) -> Iterator[None]:
    """Within, settings or what is built of them are refused; ``words`` is a pattern of field and reason."""
    with pytest.raises((InputError, ValidationError)) as caught:
        yield
    error = caught.value
    lines = [str(error)]
    if isinstance(error, ValidationError):
        lines = [
            f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Value error, ')}" for one in error.errors()
        ]
    assert any(re.search(words, line) for line in lines), lines
