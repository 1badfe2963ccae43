"""The command line in this process and in processes of its own, for tests that read what it says, stop and kill it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).parents[1]


def same_arithmetic() -> dict[str, str]:
    """What an environment of its own takes along, so that another process chooses the same BLAS kernels as this one."""
    return {name: value for name, value in os.environ.items() if name.startswith("OPENBLAS_")}


@dataclass(frozen=True)
class Said:
    """What a command of the console script ended with and printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Ecotone: TypeAlias = Callable[..., Said]  # of the ``ecotone`` fixture: takes the command and its arguments


@contextlib.contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The command line in a process of its own; gone at the end whatever happens."""
    program = [sys.executable, "-m", "ecotone.experiments.cli", *map(str, arguments)]
    process = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"it ended early: {process.communicate()[1]}")
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.002)


def killed(*arguments: object, when: Callable[[], bool]) -> None:
    """The command line in a process of its own, killed (-9) as soon as ``when()`` is true."""
    with started(*arguments) as process:
        wait_until(when, process)
        process.kill()
        process.wait()
