"""The examples in the docstrings of search algorithms run as they stand."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import ecotone.search
from ecotone.populations.genome import Genome
from ecotone.populations.gram import GramTable
from ecotone.populations.space import Space
from ecotone.populations.trial import Evaluation, Goal, Trial
from ecotone.search.coefficients import CoefficientBox

VECTORS = np.random.default_rng(0).standard_normal((3, 24)).astype(np.float32)
NAMES = ("left", "middle", "right")
PROBES = np.random.default_rng(1).standard_normal((3, 40, 24))
GOALS = tuple(Goal(f"like {name}") for name in NAMES)
SHOWN = (
    *("AdaMerging", "BayesianMap", "CmaEs", "ExpertMerging", "M2N2", "MapSearch", "NestedMapSearch", "Nsga"),
    *("OptunaSearch", "Racing", "RandomSearch", "Refined", "StagedSearch"),
)


def classes() -> Iterator[type]:
    """The public classes of the package of searches."""
    for found in pkgutil.iter_modules(ecotone.search.__path__, "ecotone.search."):
        module = importlib.import_module(found.name)
        for name, value in vars(module).items():
            if inspect.isclass(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                yield value


def examples(docstring: str) -> Iterator[str]:
    """The code below each ``Example::``."""
    lines = inspect.cleandoc(docstring).splitlines()
    for start in (index + 1 for index, line in enumerate(lines) if line == "Example::"):
        ends = (index for index, line in enumerate(lines[start:], start) if line and not line.startswith(" "))
        yield textwrap.dedent("\n".join(lines[start : next(ends, len(lines))])).strip()


EXAMPLES = [(kind, code) for kind in classes() for code in examples(kind.__doc__ or "")]


def space() -> Space:
    """Three models of three tensors in two blocks."""
    tensors, blocks = ("a", "b", "c"), ("block 0", "block 1")
    gram = GramTable.from_vectors(VECTORS)
    borders = np.array([0, 4, 10, 24]), np.array([0, 10, 24])
    return Space(NAMES, tensors, borders[0], blocks, borders[1], gram, np.eye(3), NAMES, VECTORS)


def score(genome: Genome) -> Evaluation:
    """How many of each model's signs on 40 probes a merge has."""
    parts = zip(genome.boundaries[:-1], genome.boundaries[1:], genome.coefficients, strict=True)
    merged = np.concatenate([row @ VECTORS[:, begin:end] for begin, end, row in parts])
    right = np.sign(PROBES @ merged) == np.sign(np.einsum("mpd,md->mp", PROBES, VECTORS))
    each = {goal.name: row for goal, row in zip(GOALS, right, strict=True)}
    return Evaluation({name: float(row.mean()) for name, row in each.items()}, each)


def gradient(trial: Trial) -> Evaluation:
    """Losses of the tasks ``left`` and ``right`` (how far a merge is from the model of that name), and their slope."""
    assert trial.gradient is not None
    coefficients, wanted = trial.genome.coefficients, dict(zip(NAMES, np.eye(3), strict=True))
    away = {task: coefficients - wanted[task] for task in trial.gradient.tasks}
    slopes = [2.0 * w * away[task] for task, w in zip(away, trial.gradient.weights, strict=True)]
    losses = {task: float((each**2).sum()) for task, each in away.items()}
    return Evaluation(losses, gradient=np.sum(slopes, axis=0))


def noting(method: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    """The method, whose arguments and result are noted."""

    def noted(self: Any, *arguments: Any) -> Any:
        result = method(self, *arguments)
        calls.append((arguments, result))
        return result

    return noted


@pytest.mark.parametrize(("kind", "code"), EXAMPLES, ids=[kind.__name__ for kind, _ in EXAMPLES])
def test_the_example_proposes_and_is_told(kind: Any, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example is given a space of three models, its box, three goals, and two ways to measure a merge."""
    asks: list[Any] = []
    tells: list[Any] = []
    monkeypatch.setattr(kind, "ask", noting(kind.ask, asks))
    monkeypatch.setattr(kind, "tell", noting(kind.tell, tells))
    models = space()
    box = CoefficientBox.of(models, "model", 0.0, 1.0)
    given = {"space": models, "box": box, "goals": GOALS, "score": score, "gradient": gradient}
    exec(compile(code, f"<example of {kind.__name__}>", "exec"), vars(inspect.getmodule(kind)) | given)
    proposed = [trial.number for _, trials in asks for trial in trials]
    told = [arguments[0].number for arguments, _ in tells]
    assert len(proposed) >= 10
    assert told == proposed == list(range(len(proposed)))


@pytest.mark.parametrize("name", SHOWN)
def test_the_algorithm_shows_an_example(name: str) -> None:
    assert name in {kind.__name__ for kind, _ in EXAMPLES}
