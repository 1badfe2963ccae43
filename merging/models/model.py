"""A model of a merge: a checkpoint, or what is formed from one as it is read. Models wrap models.

    Checkpoint <- Adapter (LoRA) <- Resized (vocabulary) <- Sources

A merge knows nothing of the classes of its models. Each answers for itself: whether its files hold what is read, which
model a tensor is of, what reading it takes in memory, how mergekit would name it, what a record says of it, and where
an export finds the configuration and the tokenizer. A wrapper that left such an answer to the model in it would be
merged rightly and exported wrongly, so ``declared`` refuses it. ``Wrapper`` gives the cautious answers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ecotone.merging.kernel.lazy import Source
from ecotone.merging.models import hub
from ecotone.populations.errors import InputError


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a tensor, from the file's header."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.size * self.dtype.itemsize


class Model(Protocol):
    """A model of a merge. It is a value: nothing that it answers changes."""

    @property
    def path(self) -> Path:
        """The path it was opened from."""
        ...

    @property
    def name(self) -> str:
        """The model's name in reports."""
        ...

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The model's ``config.json``, None for a plain state dict."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """By name, the shape and type of every tensor as it is read."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """The headers' free text."""
        ...

    @property
    def is_hugging_face(self) -> bool:
        """True with a ``config.json``."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of its own on disk."""
        ...

    @property
    def stored(self) -> bool:
        """Whether its files hold every tensor as it is read, so that keeping one in memory spares no work."""
        ...

    @property
    def rows(self) -> int | None:
        """Rows of its input embedding if ``files`` have another number; else None."""
        ...

    @property
    def files(self) -> Path:
        """The place of configuration and licences for an export: a directory, or the file of plain weights."""
        ...

    @property
    def tokenizer(self) -> Path:
        """The folder of its tokenizer, if it has one."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name``, whole."""
        ...

    def flat(self, name: str) -> Source:
        """The tensor ``name``, flat: mapped, or formed a piece at a time."""
        ...

    def holder(self, name: str) -> Model:
        """The model that the tensor ``name`` is of: itself, or the one in it whose tensor is read as it is.

        Models of one merge that share a tensor keep it in memory once.
        """
        ...

    def working_bytes(self, name: str) -> int:
        """Bytes of main memory that ``flat(name)`` takes for computed tensors and factors. Mapped files take none."""
        ...

    def mergekit_reference(self) -> str:
        """The name by which mergekit loads the model: a path or a repository; ``base+adapter`` for an adapter.

        Raises:
            InputError: mergekit cannot express it, or would read its path otherwise.
        """
        ...

    def record(self) -> Mapping[str, Any]:
        """The model's entry in the record of an export: plain values, and the entries of the models that it wraps."""
        ...

    def named(self, name: str) -> Model:
        """The same model under another name."""
        ...


SAYS = tuple(name for name in vars(Model) if not name.startswith("_"))
"""The attributes and methods that every model must have."""

_WEIGHTS = ("tensor", "flat")
_DEPENDING = ("stored", "holder", "working_bytes", "mergekit_reference", "record")


def declared(model: Any) -> Model:
    """``model``, if its class has all declarations of a model.

    Attributes that ``__getattr__`` takes from another object do not count, nor do answers inherited from a class of
    other weights.

    Raises:
        InputError: It does not; what is lacking is named.
    """
    kind = type(model)
    declarations = {*dir(kind), *getattr(model, "__dict__", {})}
    lacking = [name for name in SAYS if name not in declarations]
    inherited = [] if lacking else _of_other_weights(kind)
    if not lacking and not inherited:
        return model  # type: ignore[no-any-return]
    wanted = ", ".join(lacking or inherited)
    found = "none of its own" if lacking else "answers inherited from a class that reads other weights"
    raise InputError(
        f"{kind.__module__}.{kind.__qualname__}: expected a model that says of itself {wanted}; found {found}.",
        "Make it a subclass of ecotone.merging.models.model.Wrapper, which answers with caution, or write them.",
    )


def _of_other_weights(kind: type) -> list[str]:
    """Answers that depend on the weights and are inherited from a class above the one that reads the weights."""
    makers = {name: _maker(kind, name) for name in (*_WEIGHTS, *_DEPENDING)}
    reads = min(kind.__mro__.index(makers[name]) for name in _WEIGHTS)
    return [name for name in _DEPENDING if makers[name] is not Wrapper and kind.__mro__.index(makers[name]) > reads]


def _maker(kind: type, name: str) -> type:
    return next(one for one in kind.__mro__ if name in vars(one))


@dataclass(frozen=True)
class Wrapper(ABC):
    """A model that is formed from another as it is read.

    A subclass says what the ``change`` is and forms a ``tensor``; it is a frozen dataclass. The rest is answered with
    caution: no file holds what is read, every tensor is its own and is formed whole, mergekit cannot express it.

    Args:
        model: The model in it.

    Example:
        >>> @dataclass(frozen=True)
        ... class Halved(Wrapper):
        ...     change = "all weights halved"
        ...
        ...     def tensor(self, name):
        ...         return self.model.tensor(name) / 2
    """

    model: Model

    @property
    @abstractmethod
    def change(self) -> str:
        """The change that is made to the model, in a few words: ``rows in another order``."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """The tensor ``name``, whole."""

    def flat(self, name: str) -> Source:
        """The tensor ``name``, flat."""
        return self.tensor(name).reshape(-1)

    @property
    def path(self) -> Path:
        """The path the model was opened from."""
        return self.model.path

    @property
    def name(self) -> str:
        """The model's name in reports."""
        return self.model.name

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The model's ``config.json``."""
        return self.model.config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """By name, the shape and type of every tensor as it is read."""
        return self.model.tensors

    @property
    def metadata(self) -> Mapping[str, str]:
        """The free text of the model's headers."""
        return self.model.metadata

    @property
    def is_hugging_face(self) -> bool:
        """True with a ``config.json``."""
        return self.model.is_hugging_face

    @property
    def nbytes(self) -> int:
        """Bytes of the model's own on disk."""
        return self.model.nbytes

    @property
    def stored(self) -> bool:
        """False: no file holds the tensors as they are read."""
        return False

    @property
    def rows(self) -> int | None:
        """The model's own answer."""
        return self.model.rows

    @property
    def files(self) -> Path:
        """The place of the model's configuration and licences."""
        return self.model.files

    @property
    def tokenizer(self) -> Path:
        """The folder of the model's tokenizer."""
        return self.model.tokenizer

    def holder(self, name: str) -> Model:
        """Itself."""
        return self

    def working_bytes(self, name: str) -> int:
        """Bytes of the whole tensor, and the bytes that the wrapped model takes."""
        return self.tensors[name].nbytes + self.model.working_bytes(name)

    def mergekit_reference(self) -> str:
        """Refused.

        Raises:
            InputError: Always; the change is named.
        """
        raise InputError(f"{self.path}: mergekit merges what files hold, found a model with {self.change}.")

    def record(self) -> Mapping[str, Any]:
        """The change, and the record of the model."""
        return {"name": self.name, "change": self.change, "of": self.model.record()}

    def named(self, name: str) -> Model:
        """The same model under another name."""
        return replace(self, model=self.model.named(name))


def mergekit_place(path: Path) -> str:
    """The name by which mergekit loads a path. A snapshot in the hub's cache becomes ``repository@commit``.

    Raises:
        InputError: The path has a character that mergekit reads otherwise.
    """
    place = path.absolute()
    repository = hub.repository_of(place)
    if repository:
        return f"{repository}@{place.name}"
    if "@" in str(place) or "+" in str(place):
        raise InputError(
            f"{place}: mergekit reads @ as the beginning of a revision and + as that of an adapter, found in a path.",
            "Rename the directory, or link to it by another name.",
        )
    return str(place)
