"""Calibration tasks: batches of a task's examples, and the loss on them that merge coefficients are tuned by.

AdaMerging (Yang et al. 2024, arXiv:2310.02575) minimises the entropy of each task's predictions on inputs without
labels; with labels the loss may be the cross-entropy. The text of ``fitness.data`` tells how a user writes the function
that returns the examples, that of ``fitness.heads`` the one that returns a task's classification head.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache, partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fitness import heads
from fitness.data import Examples, load
from fitness.heads import Head, logits
from fitness.objectives import check_classes, entropies
from fitness.specs import CalibrationSpec
from populations.errors import InputError

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

    def batch(self, step: int) -> Examples:
        """The examples of batch ``step``, from 0."""
        size = len(self._examples)
        places = np.arange(step * self._batch, (step + 1) * self._batch)
        rows = [self._order(int(place) // size)[int(place) % size] for place in places]
        return self._examples.rows(torch.tensor(rows))

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


def build(spec: CalibrationSpec, device: torch.device, dtype: torch.dtype | None = None) -> Task:
    """The task of ``spec``, its data and head on ``device``, floating-point inputs in ``dtype`` (None: as they are).

    Raises:
        InputError: A field is out of range, or the data or the head do not fit.
    """
    where = f"calibration {spec.name!r}"
    examples = load(spec.data, f"{where}: data", labelled=spec.loss == "cross_entropy").to(device, dtype)
    head = heads.build(spec.head, f"{where}: head", device, dtype)
    return Task(spec.name, examples, spec.loss, head, spec.batch, spec.seed)


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
