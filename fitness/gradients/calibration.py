"""Calibration tasks: batches of a task's examples, and the loss on them that merge coefficients are tuned by.

AdaMerging (Yang et al. 2024, arXiv:2310.02575) minimises the entropy of each task's predictions on inputs without
labels; with labels the loss may be the cross-entropy. Expert Merging (``ecotone.fitness.gradients.distillation``) has
a merge be like an expert. The text of ``ecotone.fitness.data`` tells how a user writes the function that returns the
examples, that of ``ecotone.fitness.heads`` the one that returns a task's classification head.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ecotone.fitness import heads
from ecotone.fitness.data import Examples, Inputs, load
from ecotone.fitness.gradients import distillation
from ecotone.fitness.gradients.distillation import Behaviour, observe
from ecotone.fitness.heads import Head, logits
from ecotone.fitness.objectives import check_classes, entropies
from ecotone.fitness.specs import CalibrationSpec, Distillation
from ecotone.populations.errors import InputError, first_line, nearest

Loss: TypeAlias = Literal["entropy", "cross_entropy"]
CACHE_BYTES = 256 * 2**20  # for what an expert says of a task's batches; one batch is always kept


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
        seed: Of the orders, at least 0.

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
        self._order = lru_cache(maxsize=2)(partial(_order, seed, name, len(examples)))
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
            said = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(
                f"{where}: the model and the task's head cannot be run on an example: {said}",
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
        found = logits(model, batch.inputs, self._head)
        details = {"diversity": _diversity(found.detach())}
        if self._loss == "entropy":
            loss = entropies(found).mean()
        else:
            assert batch.labels is not None
            check_classes(found, self._classes)
            loss = nn.functional.cross_entropy(found, batch.labels.long())
        _check_graph(loss, model)
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


class Distilled(Task):
    """A stream of batches, and how far a merge is from an expert on each.

    Batches are cut once, evenly, and come in another order in each epoch: so what the expert says is found once a
    batch (``prepare``, before ``loss``), with the same module that shows merges, and kept in the CPU's memory.

    Args:
        name: The task's name.
        examples: As for ``Task``; labels are not used.
        wanted: From which expert, and how.
        head: As for ``Task``. Without one the logits may also be (n, L, C), a row for each token.
        batch: The most examples in a batch.
        seed: Of batches and orders, at least 0.
        cache_bytes: Memory for what the expert says; the batches that were not used for longest are forgotten first.

    Raises:
        InputError: Batch is below 1, the seed below 0, or the temperature not above 0.
    """

    def __init__(
        self,
        name: str,
        examples: Examples,
        wanted: Distillation,
        head: Head | None = None,
        batch: int = 16,
        seed: int = 0,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        super().__init__(name, examples, "entropy", head, batch, seed)
        _check_distillation(name, wanted)
        self._wanted = wanted
        order = torch.from_numpy(_order(seed, name, len(examples), 0))
        self._parts = order.tensor_split(-(-len(examples) // self._batch))
        self._turns = lru_cache(maxsize=2)(partial(_order, seed, name, len(self._parts)))
        self._said: OrderedDict[int, Behaviour] = OrderedDict()
        self._cache_bytes = cache_bytes

    def batch(self, step: int) -> Examples:
        """The examples of batch ``step``, from 0."""
        return self._examples.rows(self._parts[self._part(step)])

    def fits(self, model: Any, experts: Sequence[str]) -> None:
        """Raise ``InputError`` unless there is such an expert, and the model has such layers."""
        where, expert = f"calibration {self.name!r}", self._wanted.expert
        if expert not in experts:
            raise InputError(
                f"{where}: expert: expected one of {', '.join(experts)}, found {expert!r}.",
                nearest(expert, list(experts)),
            )

        def run(inputs: Inputs) -> None:
            distillation.check(model, inputs, self._head, self._wanted)
            observe(model, inputs, self._head, self._wanted)

        self._try(run)

    def prepare(self, step: int, expert: Callable[[str], Any]) -> None:
        """Have what the expert says of batch ``step``; a batch that is known needs no model."""
        part = self._part(step)
        if part not in self._said:
            with torch.no_grad():
                said = observe(expert(self._wanted.expert), self.batch(step).inputs, self._head, self._wanted)
            self._said[part] = said.to(torch.device("cpu"))
        self._said.move_to_end(part)
        while len(self._said) > 1 and sum(said.nbytes for said in self._said.values()) > self._cache_bytes:
            self._said.popitem(last=False)

    def loss(self, model: Any, step: int) -> tuple[Tensor, dict[str, float], int]:
        """The distance of ``model`` from the expert on batch ``step``, with its graph; details; number of examples.

        Details are ``diversity``, as in ``Task.loss``, and the two parts of the loss: ``soft_cross_entropy`` (with its
        factor T^2) and ``hidden``, the mean squared error without its weight.

        Raises:
            InputError: Logits or layers are not as ``ecotone.fitness.gradients.distillation`` says, or the loss does
                not depend on the model's parameters where they ask for gradients.
        """
        batch, wanted = self.batch(step), self._wanted
        found = observe(model, batch.inputs, self._head, wanted)
        expert = self._said[self._part(step)].to(found.logits.device)
        loss, soft, apart = distillation.distance(found, expert, wanted.temperature, wanted.hidden)
        _check_graph(loss, model)
        details = {"diversity": _diversity(found.logits.detach()), "soft_cross_entropy": float(soft.detach())}
        return loss, details | {"hidden": float(apart.detach())}, len(batch)

    def _part(self, step: int) -> int:
        return int(self._turns(step // len(self._parts))[step % len(self._parts)])


def _check_distillation(name: str, wanted: Distillation) -> None:
    where = f"calibration {name!r}"
    if not 0 < wanted.temperature < math.inf:
        raise InputError(f"{where}: temperature: expected a number above 0, found {wanted.temperature}.")
    if not 0 <= wanted.hidden < math.inf:
        raise InputError(f"{where}: hidden: expected a number of at least 0, found {wanted.hidden}.")


def build(spec: CalibrationSpec, device: torch.device, dtype: torch.dtype | None = None) -> Task:
    """The task of ``spec``, its data and head on ``device``, floating-point inputs in ``dtype`` (None: as they are).

    Raises:
        InputError: A field is out of range, or the data or the head do not fit.
    """
    where = f"calibration {spec.name!r}"
    examples = load(spec.data, f"{where}: data", labelled=spec.loss == "cross_entropy").to(device, dtype)
    head = heads.build(spec.head, f"{where}: head", device, dtype)
    if spec.loss != "distillation":
        return Task(spec.name, examples, spec.loss, head, spec.batch, spec.seed)
    wanted = spec.distillation or Distillation(spec.name)
    return Distilled(spec.name, examples, wanted, head, spec.batch, spec.seed)


def _order(seed: int, name: str, size: int, epoch: int) -> NDArray[np.int64]:
    """(size,) the order of all examples in one epoch."""
    named = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(named, epoch)))
    return rng.permutation(size)


def _diversity(logits: Tensor) -> float:
    """Entropy of the mean prediction of (n, C) logits, divided by ln C."""
    mean = torch.softmax(logits, -1).mean(0, keepdim=True)
    return float(entropies(mean.log())) / math.log(logits.shape[1])


def _check_graph(loss: Tensor, model: nn.Module) -> None:
    if torch.is_grad_enabled() and not loss.requires_grad and any(p.requires_grad for p in model.parameters()):
        raise InputError(
            "expected a loss that depends on the model's parameters, found one without gradients.",
            "A head must compute with torch throughout: no detach, no argmax, no numpy.",
        )
