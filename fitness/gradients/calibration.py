"""Calibration tasks: batches of a task's examples, and the loss on them that merge coefficients are tuned by.

AdaMerging (Yang et al. 2024, arXiv:2310.02575) minimises the entropy of each task's predictions on inputs without
labels; with labels the loss may be the cross-entropy. Expert Merging (``ecotone.fitness.gradients.distillation``) has
a merge be like an expert. The text of ``ecotone.fitness.data`` tells how a user writes the function that returns the
examples, that of ``ecotone.fitness.heads`` the one that returns a task's classification head.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ecotone.fitness import heads
from ecotone.fitness.data import Examples, Inputs, load
from ecotone.fitness.heads import Head, logits
from ecotone.fitness.kinds import CalibrationSettings, ObjectiveContext
from ecotone.fitness.objectives import check_classes, entropies
from ecotone.populations.errors import InputError, told

Loss: TypeAlias = Literal["entropy", "cross_entropy"]


class Task:
    """A stream of batches of one task's examples, and the loss on each.

    The stream is one random order of all examples after the other, each drawn from (seed, name, epoch). A batch may
    reach from one order into the next, so that no example is left out. Batch ``step`` depends on nothing else:
    not on the batches asked for before, nor on the process.

    Args:
        name: The task's name.
        examples: (N, ...) inputs on the model's device, with labels for ``cross_entropy``.
        loss: ``entropy`` or ``cross_entropy``.
        head: Makes the logits of the model's outputs; None takes the outputs, or their ``logits``.
        batch: Examples in a batch; with fewer than that each batch has all of them.
        seed: The seed of the orders, at least 0.

    Raises:
        InputError: Batch is below 1, the seed below 0, the loss unknown, or labels are missing that it needs.
    """

    def __init__(
        self,
        name: str,
        examples: Examples,
        loss: Loss = "entropy",
        head: Head | None = None,
        batch: int = 16,
        seed: int = 0,
    ) -> None:
        self.name = name
        self._examples = examples
        self._loss = loss
        self._head = head
        self._check(batch, seed)
        self._batch = min(batch, len(examples))
        self._order = lru_cache(maxsize=2)(partial(order_of, seed, name, len(examples)))
        self._classes = 0 if examples.labels is None else int(examples.labels.max()) + 1

    @property
    def examples(self) -> Examples:
        """All examples."""
        return self._examples

    @property
    def head(self) -> Head | None:
        """Makes the logits of the model's outputs; None where the outputs are the logits."""
        return self._head

    def batch(self, step: int) -> Examples:
        """The examples of batch ``step``, from 0."""
        size = len(self._examples)
        places = np.arange(step * self._batch, (step + 1) * self._batch)
        rows = [self._order(int(place) // size)[int(place) % size] for place in places]
        return self._examples.rows(torch.tensor(rows))

    def fits(self, model: Any, experts: Sequence[str]) -> None:
        """Raise ``InputError`` where it is plain before the first batch that the loss cannot be computed.

        Args:
            model: The module that merges are shown in.
            experts: Names of the experts.
        """
        self._try(lambda inputs: check_classes(logits(model, inputs, self._head), self._classes))

    def _try(self, run: Callable[[Inputs], object]) -> None:
        """Run a pass on one example, with whatever weights there are."""
        where = f"calibration {self.name!r}"
        try:
            with torch.no_grad():
                run(self._examples.rows(torch.tensor([0])).inputs)
        except InputError as error:
            raise InputError(f"{where}: {error.message}", error.remedy) from error
        except Exception as error:
            raise InputError(
                f"{where}: the model and the task's head cannot be run on an example: {told(error)}",
                "Check what the data function returns, and the head's width against that of the model's outputs.",
            ) from error

    def prepare(self, step: int, expert: Callable[[str], Any]) -> None:
        """Make ready for ``loss`` on batch ``step``.

        Args:
            step: Number of the batch.
            expert: Returns the model with the weights of the expert of that name. Whatever weights it had are gone.
        """

    def loss(self, model: Any, step: int) -> tuple[Tensor, dict[str, float], int]:
        """The mean loss of ``model`` on batch ``step``, with its graph; details; and the number of examples.

        ``diversity`` among the details is the entropy of the mean prediction, divided by ln C: near 0 when one class
        is predicted for all examples, which is how entropy can fall while a model collapses. n examples with sure
        predictions give ln(n) / ln(C) at most.

        Raises:
            InputError: The model is no module, its logits are not (n, C) with C >= 2 and a column for each label, or
                the loss does not depend on the model's parameters where they ask for gradients.
        """
        batch = self.batch(step)
        outputs = logits(model, batch.inputs, self._head)
        details = {"diversity": diversity(outputs.detach())}
        if self._loss == "entropy":
            loss = entropies(outputs).mean()
        else:
            assert batch.labels is not None
            check_classes(outputs, self._classes)
            loss = nn.functional.cross_entropy(outputs, batch.labels.long())
        check_graph(loss, model)
        return loss, details, len(batch)

    def _check(self, batch: int, seed: int) -> None:
        where = f"calibration {self.name!r}"
        if batch < 1:
            raise InputError(f"{where}: batch: expected at least 1, found {batch}.")
        if seed < 0:
            raise InputError(f"{where}: seed: expected at least 0, found {seed}.")
        if self._loss not in ("entropy", "cross_entropy"):
            raise InputError(f"{where}: loss: expected entropy or cross_entropy, found {self._loss!r}.")
        if self._loss == "cross_entropy" and self._examples.labels is None:
            raise InputError(f"{where}: loss: cross_entropy needs labels, found none.", "Return (inputs, labels).")


class _ClassifierLossSettings(CalibrationSettings):
    """Base of the losses of a classifier's logits."""

    needs_expert: ClassVar[bool] = False

    def build(self, context: ObjectiveContext, seed: int) -> Task:
        """The task, its data and head on the device."""
        loss: Loss = "cross_entropy" if self.needs_labels else "entropy"
        examples, head = parts_of(self, context)
        return Task(self.name, examples, loss, head, self.batch, seed)


class EntropyLossSettings(_ClassifierLossSettings):
    """Mean entropy of the predictions (AdaMerging); it needs no labels.

    Attributes:
        loss: ``entropy``: the mean entropy of the predictions; needs no labels.
    """

    loss: Literal["entropy"] = "entropy"

    needs_labels: ClassVar[bool] = False


class CrossEntropyLossSettings(_ClassifierLossSettings):
    """Mean cross-entropy of the predictions with the labels.

    Attributes:
        loss: ``cross_entropy``: the mean cross-entropy of the predictions and the labels.
    """

    loss: Literal["cross_entropy"] = "cross_entropy"

    needs_labels: ClassVar[bool] = True


def parts_of(settings: CalibrationSettings, context: ObjectiveContext) -> tuple[Examples, Head | None]:
    """A task's examples and head, on the model's device.

    Raises:
        InputError: The data or the head do not fit.
    """
    examples = load(settings.data, f"{settings.where}: data", settings.needs_labels)
    head = heads.build(settings.head, f"{settings.where}: head", context.device, context.dtype)
    return examples.to(context.device, context.dtype), head


def order_of(seed: int, name: str, size: int, epoch: int) -> NDArray[np.int64]:
    """(size,) the order of all examples in one epoch."""
    named = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(named, epoch)))
    return rng.permutation(size)


def diversity(logits: Tensor) -> float:
    """Entropy of the mean prediction of (n, C) logits, divided by ln C."""
    mean = torch.softmax(logits, -1).mean(0, keepdim=True)
    return float(entropies(mean.log())) / math.log(logits.shape[1])


def check_graph(loss: Tensor, model: nn.Module) -> None:
    """Raise ``InputError`` unless the loss depends on the model's parameters, where they ask for gradients."""
    if torch.is_grad_enabled() and not loss.requires_grad and any(p.requires_grad for p in model.parameters()):
        raise InputError(
            "expected a loss that depends on the model's parameters, found one without gradients.",
            "A head must compute with torch throughout: no detach, no argmax, no numpy.",
        )
