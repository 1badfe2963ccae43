"""Problems for ``fronts.py``: merges of specialists with one accuracy a specialist, of digits and of short texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ecotone.experiments import compose, preparation
from ecotone.experiments.recipe import Recipe
from ecotone.fitness.worker import Worker
from ecotone.merging.sources import Sources
from ecotone.populations.genome import Floats, Genome
from ecotone.populations.trial import Scores, Subset, Trial
from ecotone.search.coefficients import CoefficientBox

LOW, HIGH = 0.0, 1.5
GROUPS: dict[str, tuple[tuple[int, ...], ...]] = {
    "three": ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9)),
    "four": ((0, 1, 2), (3, 4), (5, 6, 7), (8, 9)),
}
PROBLEMS = (*GROUPS, "text")
SIDES = {"three": 16, "text": 8}  # values a coefficient of the grid, where one can be measured
TITLES = {"three": "three groups of digits", "four": "four groups of digits", "text": "three kinds of text"}


class Scorer(Protocol):
    """Scores of merges on one part of the data."""

    def __call__(self, points: Floats) -> Floats:
        """(n, M) accuracies at the coefficients ``points`` (n, K)."""
        ...


def sources(problem: str) -> int:
    """Models to merge, which is also the number of objectives."""
    return len(GROUPS.get(problem, ("nouns", "verbs", "sections")))


def box(problem: str) -> CoefficientBox:
    return CoefficientBox(np.array([0, 1]), sources(problem), LOW, HIGH)


@lru_cache(maxsize=2)
def scorers(problem: str, seed: int, whole: bool) -> tuple[Scorer, Scorer | None]:
    """What guides the search, and what is held out from it (None with ``whole``).

    A seed decides images and training of the digits; texts and their encoders are the same for all seeds.
    """
    if problem == "text":
        return texts("search"), None if whole else texts("held_out")
    return _digits(GROUPS[problem], seed, whole)


# -- digits --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Digits:
    """Accuracies of merges on some images.

    Args:
        hidden: (K+1, N, H) what the base and each task vector give to the hidden layer's inputs.
        output: (K+1, C, H) weights of the last layer of the base and the task vectors.
        bias: (K+1, C) its biases.
        labels: (N,) digits.
        groups: Digits of each objective.
    """

    hidden: Floats
    output: Floats
    bias: Floats
    labels: Floats
    groups: tuple[tuple[int, ...], ...]

    def __call__(self, points: Floats) -> Floats:
        """As ``Scorer``."""
        return np.array([self._one(point) for point in points])

    def _one(self, point: Floats) -> Floats:
        weights = np.concatenate([[1.0], point]).astype(np.float32)
        layer = np.maximum(weights @ self.hidden.reshape(len(weights), -1), 0).reshape(self.hidden.shape[1:])
        logits = layer @ np.tensordot(weights, self.output, 1).T + weights @ self.bias
        right = logits.argmax(axis=1) == self.labels
        return np.array([right[np.isin(self.labels, group)].mean() for group in self.groups])


def _digits(groups: tuple[tuple[int, ...], ...], seed: int, whole: bool) -> tuple[Digits, Digits | None]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, order = (images / 16).astype(np.float32), np.random.default_rng(seed).permutation(len(labels))
    base, vectors = trained(images[order[:900]], labels[order[:900]], groups, seed)
    rest = order[900:]
    parts = [rest] if whole else [rest[::2], rest[1::2]]
    found = [_scorer(base, vectors, images[part], labels[part], groups) for part in parts]
    return found[0], None if whole else found[1]


def trained(images: Any, labels: Any, groups: Sequence[Sequence[int]], seed: int) -> tuple[Any, list[Any]]:
    """Parameters of the random start, and of each specialist less those."""
    import torch

    from ecotone.experiments.examples.digits import fit, mlp

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    base = mlp()
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    vectors = []
    for group in groups:
        base.load_state_dict(start)
        mine = np.isin(labels, group)
        fit(base, torch.from_numpy(images[mine]), torch.from_numpy(labels[mine]), epochs=60)
        vectors.append({name: (tensor - start[name]).numpy() for name, tensor in base.state_dict().items()})
    return {name: tensor.numpy() for name, tensor in start.items()}, vectors


def _scorer(base: Any, vectors: list[Any], images: Any, labels: Any, groups: tuple[tuple[int, ...], ...]) -> Digits:
    layers = [base, *vectors]
    hidden = np.stack([images @ layer["0.weight"].T + layer["0.bias"] for layer in layers])
    output, bias = (np.stack([layer[name] for layer in layers]) for name in ("2.weight", "2.bias"))
    return Digits(hidden, output, bias, labels, groups)


# -- texts ---------------------------------------------------------------------------------------------------

EXAMPLES = {"search": 200, "held_out": 200}  # of each kind of text


@dataclass(frozen=True, eq=False)
class Texts:
    """Accuracies of merged encoders on one part of the texts of ``text-map.yaml``, as a worker of it scores them."""

    worker: Worker
    size: int  # parameters
    subset: Subset

    def __call__(self, points: Floats) -> Floats:
        """As ``Scorer``."""
        whole = np.array([0, self.size])
        trials = [Trial(i, Genome(whole, point[None]), wants=Scores(self.subset)) for i, point in enumerate(points)]
        evaluations = self.worker.measure(trials)
        failures = [one.failure for one in evaluations if not one.ok]
        if failures:
            raise RuntimeError(failures[0])
        return np.array([list(one.scores.values()) for one in evaluations])


def texts(subset: Subset) -> Texts:
    """Of the recipe, with fewer examples and in bfloat16; tunes the encoders the first time."""
    worker, size = _text_worker()
    return Texts(worker, size, subset)


@lru_cache(maxsize=1)
def _text_worker() -> tuple[Worker, int]:
    settings: dict[str, Any] = {"merge.dtype": "bfloat16"}
    for part, count in EXAMPLES.items():
        settings |= {f"objectives.{part}.{i}.arguments.limit": count for i in range(sources("text"))}
    recipe = Recipe.from_yaml(Path(__file__).parents[1] / "experiments" / "recipes" / "text-map.yaml", settings)
    spec = compose.worker_spec(recipe, preparation.prepare(recipe))
    return Worker(spec), Sources.open(spec.experts, spec.base, spec.operator).layout.size
