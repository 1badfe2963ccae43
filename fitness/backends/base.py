"""Scoring backends. A backend shows one candidate after the other to the objectives.

The settings of a backend are the recipe's ``scoring`` part. The worker opens the models and has the settings make the
backend. It knows nothing else of the backend. The first backend is a module in the worker's memory
(``ecotone.fitness.backends.resident``). A package of your own adds one by an entry point of the group
``ecotone.backends``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import Field, model_validator

from ecotone.populations.genome import Floats, Genome
from ecotone.settings import ANYTHING, TEXT, TRUTH, Answers, Call, Kind, check_kind

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ecotone.merging.placement import Needs
    from ecotone.merging.sources import Sources


class Backend(Protocol):
    """Shows candidates to objectives, one after the other.

    A worker calls ``show`` with at most ``group`` genomes and has every objective score each model before it asks for
    the next. A backend without gradients raises ``InputError`` in ``gradient`` and ``expert``, and its settings say so.

    If an objective writes into the weights, the worker calls ``show`` again for the same genome, and then for those
    that were left. Two attributes are optional. ``rewritten`` has the ids of the tensors that ``show`` writes whole
    (without it: the parameters). ``distrust()`` is called when objectives have written into tensors: the next ``show``
    then writes also those that it usually leaves as they are.
    """

    group: int
    """How many candidates are merged in one pass."""
    dtype: torch.dtype | None
    """The floating-point type that merges are scored in; None when the model mixes several."""

    @property
    def model(self) -> Any:
        """The object that objectives score: a module in evaluation mode, a dict of tensors by name, or a client."""
        ...

    def show(self, genomes: Sequence[Genome]) -> Iterator[Any]:
        """The model with the weights of one genome after the other.

        Raises:
            InputError: A genome does not fit the models; nothing has been shown then.
        """
        ...

    def gradient(
        self, genome: Genome, losses: Callable[[nn.Module], Iterator[Tensor]], weights: Sequence[float] = (1.0,)
    ) -> tuple[list[float], Floats]:
        """Losses of a merge, and (S, K) the gradient of their weighted sum by its coefficients.

        Raises:
            InputError: The backend has no gradients, the genome does not fit, or a loss is no scalar with a graph.
        """
        ...

    def expert(self, name: str) -> nn.Module:
        """The module with an expert's own weights.

        Raises:
            InputError: There is no such expert, or the backend has no module.
        """
        ...

    def not_finite(self) -> str:
        """Name of the first tensor that holds NaN or infinity now; empty without one, or where it cannot be known."""
        ...


@dataclass(frozen=True)
class BackendContext:
    """The models and the device that a backend is made for.

    Args:
        sources: The models.
        architecture: A call that makes the torch module, ``auto`` for Hugging Face directories, or None for no module.
        device: The device on which the worker merges.
        dtype: The floating-point type that merges are rounded to; None keeps the architecture's own.
    """

    sources: Sources
    architecture: Call | Literal["auto"] | None
    device: torch.device
    dtype: torch.dtype | None


class ScoringSettings(Kind):
    """How candidates are scored. Floating-point results depend on it, so it is part of a recipe's signature.

    A backend's settings are a subclass with a ``Literal`` of its name as ``backend``, and all abstract methods.

    Attributes:
        backend: The name of the backend that shows candidates to the objectives.
        batch: Candidates that are proposed and scored together.
        in_flight: The most candidates in flight: proposed, but not yet learned from. None means two batches. With
            strict order, two to three batches for each worker keep all workers busy, because the oldest batch holds up
            new proposals.
        order: When the search learns from results. ``strict`` learns in the order of proposals, so that results depend
            only on the recipe. ``arrival`` learns at once, so that workers never wait.
        threads: CPU threads that each worker computes with.
        device: The device that workers compute on. ``auto`` takes a GPU where the worker has one.
    """

    backend: str
    batch: int = Field(default=8, ge=1)
    in_flight: int | None = Field(default=None, ge=1)
    order: Literal["strict", "arrival"] = "strict"
    threads: int = Field(default=1, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    _answers: ClassVar[Answers] = {
        "gradients": TRUTH,
        "make": (lambda answer: hasattr(answer, "show"), "a backend, which has show"),
        "needs": ANYTHING,
        "describe": TEXT,
    }

    @property
    def _subject(self) -> str:
        return f"scoring.backend: the scoring backend {self.backend!r}"

    @model_validator(mode="after")
    def _room(self) -> ScoringSettings:
        if self.in_flight is not None and self.in_flight < self.batch:
            raise ValueError(f"in_flight: expected at least batch ({self.batch}), found {self.in_flight}")
        return self

    @property
    def window(self) -> int:
        """The most candidates in flight: two batches unless said otherwise."""
        return 2 * self.batch if self.in_flight is None else self.in_flight

    @abstractmethod
    def gradients(self) -> bool:
        """Whether merges can be differentiated by their coefficients."""

    @abstractmethod
    def make(self, context: BackendContext) -> Backend:
        """The backend.

        Raises:
            InputError: The architecture cannot be made or does not fit the models, or a package is not installed.
        """

    @abstractmethod
    def needs(
        self,
        sources: Sources,
        device: torch.device,
        dtype: torch.dtype | None,
        threads: int,
        batch: int | None,
        *,
        settings: bool,
    ) -> Needs:
        """The memory that a worker takes, from the models' headers alone.

        Args:
            sources: The models.
            device: The device on which it merges.
            dtype: The floating-point type that merges are rounded to.
            threads: CPU threads that it merges with.
            batch: The most candidates scored together; None if it is not known.
            settings: Whether genomes have settings of the operator of their own.
        """

    @abstractmethod
    def describe(self) -> str:
        """A phrase about the backend for the report of ``validate``."""


def check_declared(name: str, kind: Any) -> None:
    """Refuse a backend that lacks a declaration (``ecotone.settings.check_kind``).

    Raises:
        InputError: It is no subclass of ``ScoringSettings``, its ``backend`` is no ``Literal`` with this name, or it
            lacks a method or the text of a field.
    """
    check_kind(name, kind, ScoringSettings, "backend")
