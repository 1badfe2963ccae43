"""Objectives: accuracy and entropy of classifiers, and Python functions.

Each kind's settings stand before it. ``ecotone.fitness.registry`` has all kinds by name; those of language models have
modules of their own.

A stack of small candidates is scored one after the other with its tensors swapped into one module. Batching
them with ``torch.func.vmap`` was measured and is slower on a CPU wherever speed matters (a 64-256-10 MLP over
1437 examples: 1,100 to 1,400 against 1,650 candidates a second on one thread), because it takes the bias, the
product and the activation apart. Scoring in turn also makes a score the same bits whatever it was batched with.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from ecotone.fitness import heads
from ecotone.fitness.callables import resolve
from ecotone.fitness.data import Batches, Examples, Inputs, check, load
from ecotone.fitness.heads import Head, logits
from ecotone.fitness.kinds import NamedCall, ObjectiveContext, ObjectiveSettings
from ecotone.fitness.protocol import Score, pooled_mean
from ecotone.fitness.scores import by_example, no_number
from ecotone.marked import direction_of
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Integers
from ecotone.populations.trial import Goal
from ecotone.settings import Arguments, Call

Model: TypeAlias = nn.Module | dict[str, Tensor]

BATCH = 512
"""Examples in one forward pass of a classifier where the recipe names no batch."""


class ClassifierSettings(ObjectiveSettings):
    """Base of the objectives of classifiers.

    Attributes:
        data: A call that returns (inputs, labels). Inputs are a tensor or an array (N, ...), or a mapping of tensors by
            name, as Hugging Face models take. Labels are (N,) class numbers from 0.
        head: A call that returns the task's classification head, where the merged model is only the encoder. The head
            is a callable from (outputs, inputs) to logits. It is never merged.
        batch: Examples in one forward pass. Fewer examples take less memory. None lets Ecotone choose.
    """

    data: Call
    head: Call | None = None
    batch: int | None = Field(default=None, ge=1)

    by_example: ClassVar[bool | None] = True
    needs_tokenizer: ClassVar[bool] = False
    paths: ClassVar[tuple[str, ...]] = ()

    def _examples(self, context: ObjectiveContext, labelled: bool) -> Examples:
        return load(self.data, f"{self.where}: data", labelled).to(context.device, context.dtype)

    def _head(self, context: ObjectiveContext) -> Head | None:
        return heads.build(self.head, f"{self.where}: head", context.device, context.dtype)


class AccuracySettings(ClassifierSettings):
    """The share of examples whose highest output is the label.

    Attributes:
        type: ``accuracy``: the share of examples whose highest output is the label.
    """

    type: Literal["accuracy"] = "accuracy"
    direction: Literal["maximize"] = "maximize"

    limits: ClassVar[tuple[float, float] | None] = (0.0, 1.0)

    def build(self, context: ObjectiveContext) -> Accuracy:
        """The objective, its data on the device."""
        examples = self._examples(context, labelled=True)
        assert examples.labels is not None
        return Accuracy(self.goal, examples.inputs, examples.labels, self.batch or BATCH, self._head(context))


@dataclass(frozen=True, eq=False)
class Accuracy:
    """The share of examples whose largest logit is the label's: classification accuracy.

    Args:
        goal: Name and direction.
        inputs: (N, ...) what the module takes, or (N, ...) by name, on its device and in its dtype.
        labels: (N,) class numbers from 0.
        batch: Largest number of examples in one forward pass; the N examples are cut evenly.
        head: Makes the logits of the module's outputs; None takes the outputs, or their ``logits``.
        classes: The fewest classes that logits must have; None is as many as the labels name.

    Raises:
        InputError: Inputs and labels do not fit each other, or batch is below 1.
    """

    goal: Goal
    inputs: Inputs
    labels: Tensor
    batch: int = BATCH
    head: Head | None = None
    classes: int | None = None
    _batches: Batches = field(init=False, repr=False)
    _classes: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_batches", _cut(Examples(self.inputs, self.labels), self.batch, self.goal))
        object.__setattr__(self, "_classes", self.classes or int(self.labels.max()) + 1)

    def score(self, model: Any) -> Score:
        """Accuracy, with one bool an example. Logits with NaN make the score NaN.

        Raises:
            InputError: The model is no module, or its logits are not (N, classes) with a column for each label.
        """
        with torch.no_grad():
            found = [self._logits(model, inputs).max(-1) for inputs in self._batches]
            largest, predicted = zip(*found, strict=True)
            right: NDArray[np.bool_] = (self._batches.restored(predicted) == self.labels).cpu().numpy()
            broken = _any_nan(self._batches.restored(largest))  # the maximum of a row passes NaN on
        value = float("nan") if broken else int(np.count_nonzero(right)) / right.size
        return Score(value, right, right.size)

    @property
    def count(self) -> int:
        """Examples."""
        return len(self.labels)

    def subset(self, numbers: Integers) -> Accuracy:
        """The accuracy on the examples ``numbers`` alone."""
        part = Examples(self.inputs, self.labels).rows(torch.from_numpy(numbers.copy()))
        assert part.labels is not None
        return Accuracy(self.goal, part.inputs, part.labels, self.batch, self.head, self._classes)

    def pooled(self, each: NDArray[Any], numbers: Integers) -> tuple[float, float]:
        """The share that is right."""
        return pooled_mean(each, self.count)

    def _logits(self, model: Any, inputs: Inputs) -> Tensor:
        found = logits(model, inputs, self.head)
        check_classes(found, self._classes)
        return found


class EntropySettings(ClassifierSettings):
    """Mean entropy of a classifier's predictions, in nats; it needs no labels.

    Attributes:
        type: ``entropy``: the mean entropy of a classifier's predictions, in nats.
        data: A call that returns the inputs, or (inputs, labels) whose labels are not used. Inputs are a tensor or an
            array (N, ...), or a mapping of tensors by name.
    """

    type: Literal["entropy"]
    direction: Literal["minimize"] = "minimize"

    limits: ClassVar[tuple[float, float] | None] = (0.0, math.inf)

    def build(self, context: ObjectiveContext) -> Entropy:
        """The objective, its data on the device."""
        inputs = self._examples(context, labelled=False).inputs
        return Entropy(self.goal, inputs, self.batch or BATCH, self._head(context))


@dataclass(frozen=True, eq=False)
class Entropy:
    """The mean entropy of the predictions: how unsure a classifier is of inputs without labels.

    H(p) = -sum_c p_c ln p_c in nats, p the softmax of the logits; from 0 (sure) to ln C. AdaMerging minimises it
    (Yang et al. 2024, arXiv:2310.02575, equation 5). A model that says one class of everything has the least: watch
    an accuracy beside it.

    Args:
        goal: Name and direction.
        inputs: (N, ...) what the module takes, or (N, ...) by name, on its device and in its dtype.
        batch: Largest number of examples in one forward pass; the N examples are cut evenly.
        head: Makes the logits of the module's outputs; None takes the outputs, or their ``logits``.

    Raises:
        InputError: There are no inputs, or batch is below 1.
    """

    goal: Goal
    inputs: Inputs
    batch: int = BATCH
    head: Head | None = None
    _batches: Batches = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_batches", _cut(Examples(self.inputs), self.batch, self.goal))

    def score(self, model: Any) -> Score:
        """Mean entropy, with one entropy an example. Logits with NaN make the score NaN.

        Raises:
            InputError: The model is no module, or its logits are not (N, classes) of at least 2 classes.
        """
        with torch.no_grad():
            parts = [entropies(logits(model, inputs, self.head)) for inputs in self._batches]
            per_example = self._batches.restored(parts).cpu().numpy()
        return Score(float(per_example.mean(dtype=np.float64)), per_example, per_example.size)

    @property
    def count(self) -> int:
        """Examples."""
        return len(Examples(self.inputs))

    def subset(self, numbers: Integers) -> Entropy:
        """The entropy on the examples ``numbers`` alone."""
        part = Examples(self.inputs).rows(torch.from_numpy(numbers.copy()))
        return Entropy(self.goal, part.inputs, self.batch, self.head)

    def pooled(self, each: NDArray[Any], numbers: Integers) -> tuple[float, float]:
        """The mean."""
        return pooled_mean(each, self.count)


def entropies(logits: Tensor) -> Tensor:
    """(n,) entropies in nats of the softmax of (n, C) logits. Logits of minus infinity are classes ruled out.

    Raises:
        InputError: There are fewer than 2 classes: the entropy is 0 whatever the model says.
    """
    if logits.shape[1] < 2:
        raise InputError(f"expected at least 2 classes to take an entropy of, found {logits.shape[1]}.")
    logs = torch.log_softmax(logits, -1).clamp_min(torch.finfo(logits.dtype).min)  # 0 * -inf would be NaN
    return -(logs.exp() * logs).sum(-1)


def check_classes(logits: Tensor, classes: int) -> None:
    """Raise ``InputError`` unless (n, C) logits have a column for each of so many classes."""
    if logits.shape[1] < classes:
        raise InputError(f"expected an output for each label from 0 to {classes - 1}, found {logits.shape[1]} outputs.")


def _cut(examples: Examples, batch: int, goal: Goal) -> Batches:
    where = f"objective {goal.name!r}"
    check(examples, where)
    if batch < 1:
        raise InputError(f"{where}: batch: expected at least 1, found {batch}.")
    return examples.batches(batch)


def _any_nan(values: Tensor) -> bool:
    """Whether there is a NaN. The sum tells in one pass; only when it is NaN (infinities may cancel) look closer."""
    return math.isnan(float(values.sum())) and bool(torch.isnan(values).any())


class CallSettings(ObjectiveSettings):
    """A function of the merged model that returns a number, or a number and one score an example.

    Attributes:
        type: ``call``: a Python function that scores the merged model.
        call: The function: ``package.module:function``, or ``./file.py:function`` with a path relative to the recipe's
            folder. It gets the model, then the arguments.
        arguments: Keyword arguments of the function, plain values. A text that begins with ``prepared:`` is a path,
            relative to the folder that the preparation step wrote.
    """

    type: Literal["call"]
    direction: Literal["maximize", "minimize"] = "maximize"
    call: str
    arguments: Arguments = Field(default_factory=dict)

    limits: ClassVar[tuple[float, float] | None] = None
    by_example: ClassVar[bool | None] = None
    needs_tokenizer: ClassVar[bool] = False
    paths: ClassVar[tuple[str, ...]] = ()

    def calls(self) -> list[NamedCall]:
        """The function, which gets the model."""
        return [NamedCall("", Call(call=self.call, arguments=self.arguments), given=1)]

    def build(self, context: ObjectiveContext) -> CallableObjective:
        """The objective.

        Raises:
            InputError: There is no such function, or it says of itself that the other direction is better.
        """
        return CallableObjective(self.goal, self._function(), self.arguments)

    def examine(self) -> Iterator[tuple[str, str]]:
        """Nothing to tell; refuses a function that says of itself that the other direction is better."""
        self._function()
        return iter(())

    def _function(self) -> Callable[..., Any]:
        function = resolve(self.call, f"{self.where}: call")
        said = direction_of(function)
        if said not in (None, self.direction):
            raise InputError(
                f"{self.where}: direction: expected {said}, as {self.call} is marked, found {self.direction}.",
                f"Say direction: {said} in the recipe.",
            )
        return function


@dataclass(frozen=True, eq=False)
class CallableObjective:
    """Any measure a Python function can take.

    The global generators of ``random``, numpy and torch start each call from the same state and get their own
    state back afterwards: a function that draws from them gives a candidate the same score on every worker,
    and gives all candidates the same draws.

    Args:
        goal: Name and direction.
        function: Called as ``function(model, **arguments)``; returns a number, or a number and one score an
            example. It may not keep the model, whose weights are replaced after the call.
        arguments: Keyword arguments.
    """

    goal: Goal
    function: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def score(self, model: Any) -> Score:
        """The score that the function returns for ``model``.

        Raises:
            InputError: The function returns neither a number nor (number, scores by example).
        """
        with torch.no_grad(), same_draws():
            return _score_of(self.function(model, **_own(self.arguments)))


def _own(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments of one call: what it does to lists and mappings among them is none of the next call's."""
    changing = any(isinstance(one, list | dict | set) for one in arguments.values())
    return deepcopy(dict(arguments)) if changing else arguments


def _score_of(returned: Any) -> Score:
    value, per_example = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    if (found := no_number(value)) is not None:
        raise InputError(f"expected the function to return a number or (number, scores by example), found {found}.")
    number = float(value)
    if per_example is None:
        return Score(number)
    scores = by_example(per_example)
    finite = scores.dtype.kind != "f" or bool(np.isfinite(scores).all())
    return Score(number if finite else float("nan"), scores, scores.size)


@contextmanager
def same_draws(seed: int = 0) -> Iterator[None]:
    """Python's, numpy's and torch's global generators begin from ``seed``, and are as they were afterwards."""
    python, numpy_state = random.getstate(), np.random.get_state()
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if started else ()
    with torch.random.fork_rng(devices):
        random.seed(seed)
        np.random.seed(seed)
        _seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


def _seed(seed: int) -> None:
    """``torch.manual_seed``; without an accelerator, without the stack that it notes for each kind of them."""
    if _has_accelerator():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@cache
def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
