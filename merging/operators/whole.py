"""Operators that prepare whole matrices, one layer at a time, before a search begins.

Most one-shot methods are ``theta = base + sum_k c_k v_k`` with other ``v_k`` than the task vectors, and c = 1 is the
published merge. Where every element of a ``v_k`` depends on its whole matrix (a solve, a singular value
decomposition) or on statistics of the layer's inputs, the ``v_k`` are made once and kept on disk
(``ecotone.merging.basis``). A merge then reads them like checkpoints, so searches, gradients and exports stay as they
are.

An operator of this sort says which statistics it wants, and makes the K vectors of one layer from the models' weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field
from torch import Tensor

from ecotone.merging.kernel.materialise import Transform, unchanged
from ecotone.merging.operators.prepared import PreparedVectors
from ecotone.merging.operators.task_vectors import Pieces

LayerKind: TypeAlias = Literal["linear", "convolution", "embedding", "rest"]
"""A linear layer's weight; a convolution's, as a matrix (out, in * kernel); a table of rows by token; anything else."""
Wanted: TypeAlias = Literal["inputs", "slopes", "fisher", "outputs", "second_moments", "votes"]
"""The statistics of a layer that an operator may want, as the fields of ``Known``."""


@dataclass(frozen=True)
class Layer:
    """A layer whose weights are prepared.

    Args:
        name: The name of its weight in the checkpoints.
        kind: The sort of layer.
        shape: The shape of the weight in the checkpoints.
        folded: Whether the bias is the last column of the matrices: an input that is always 1.
    """

    name: str
    kind: LayerKind
    shape: tuple[int, ...]
    folded: bool = False


@dataclass(frozen=True)
class Known:
    """Statistics of a layer, each one for every expert. Moments are means over rows (tokens, or examples without).

    Args:
        inputs: K matrices (in, in): E[x xᵀ] of the layer's inputs.
        slopes: K matrices (out, out): E[g gᵀ], g the gradient of log p(y | x) by the layer's outputs, y drawn from the
            expert's own predictions.
        fisher: K matrices (out, in): the diagonal of the Fisher information of the weight.
        outputs: K matrices (in, out): E[x yᵀ], x the layer's inputs in the merge, y the expert's outputs for its own.
        rows: K numbers of rows.
        second_moments: K tensors of the weight's shape: Adam's running means of squared gradients at the end of each
            expert's training.
        votes: K tensors of the weight's shape: by element, the examples that want the expert's change less the others.
            Empty for an expert that is not voted on. For ``rcp`` alone.
        thresholds: What ``surveyed`` found in the whole models.
    """

    inputs: Sequence[Tensor] = ()
    slopes: Sequence[Tensor] = ()
    fisher: Sequence[Tensor] = ()
    outputs: Sequence[Tensor] = ()
    rows: Sequence[int] = ()
    second_moments: Sequence[Tensor] = ()
    votes: Sequence[Tensor] = ()
    thresholds: Sequence[float] = ()


@dataclass
class Report:
    """What an operator has to say of a layer that it prepared.

    Args:
        numbers: Figures by name, as ``condition`` and ``residual``.
        warnings: Sentences.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class WholeMatrices(PreparedVectors):
    """``theta = base + sum_k c_k v_k``, where the ``v_k`` are made of whole matrices. The base of such operators.

    A subclass writes ``layer``. Matrices come in float64 (float32 on an accelerator), with the bias as a last column
    where the operator folds.
    """

    statistics: ClassVar[tuple[Wanted, ...]] = ()
    """The statistics that ``layer`` reads. Without any the operator needs no data."""
    around: ClassVar[float] = 1.0
    """The coefficient of every vector in the published merge: searches begin there."""
    bounds: ClassVar[tuple[float, float]] = (0.0, 2.0)
    """The bounds of coefficients in searches whose recipe gives none."""
    unites: ClassVar[bool] = True
    """Whether experts that are all the same give that expert at c = 1. Others amplify what experts have in common."""
    folds: ClassVar[bool] = False
    """Whether a layer's bias is prepared with its weight. Otherwise it is prepared by ``rest``."""
    elementwise: ClassVar[bool] = False
    """Whether every element is prepared by itself. Then ``layer`` gets every tensor, in the checkpoints' shape."""
    rest_by_element: ClassVar[bool] = True
    """Whether ``rest`` makes every element by itself. Then it gets tensors in flat pieces, as tables are large."""
    paths: ClassVar[tuple[str, ...]] = ()
    """The settings that name files, at any depth. Recipes give them relative to their folder."""
    version: ClassVar[int] = 1
    """To be raised when the same models, settings and statistics give other vectors: older ones are in caches."""

    @property
    def wanted(self) -> tuple[Wanted, ...]:
        """The statistics that ``layer`` reads with these settings."""
        return self.statistics

    @property
    def order(self) -> Literal["any", "depth"]:
        """``depth`` where the statistics of a layer are those of the merge of the layers before it."""
        return "any"

    def surveyed(self, pieces: Pieces) -> Sequence[float]:
        """Numbers of the whole models that ``layer`` gets as ``known.thresholds``; none where they are not needed.

        Args:
            pieces: The base, the K experts and, where they are wanted, their K second moments.
        """
        return ()

    def layer(
        self, at: Layer, base: Tensor, experts: Sequence[Tensor], known: Known, report: Report
    ) -> Sequence[Tensor]:
        """The vectors ``v_k`` of one layer, as many as ``columns`` has names.

        Args:
            at: The layer; its kind is ``linear`` or ``convolution``.
            base: (out, in) the base's matrix.
            experts: K matrices (out, in).
            known: The wanted statistics.
            report: Takes figures and warnings.
        """
        raise NotImplementedError

    def rest(self, at: Layer, base: Tensor, experts: Sequence[Tensor], report: Report) -> Sequence[Tensor]:
        """The vectors of what is no matrix, or is not reached by the data: each task vector's share of their mean.

        Args:
            at: The tensor.
            base: The base's tensor in its own shape, or with ``rest_by_element`` some of its elements.
            experts: K tensors of that shape.
            report: Takes figures and warnings.
        """
        return [(expert - base) / len(experts) for expert in experts]

    def transform(self, pieces: Pieces) -> Transform:
        """The vectors as they were prepared."""
        return unchanged


@dataclass(frozen=True)
class FromData(WholeMatrices):
    """Operators whose vectors depend on data: the calibration tasks that bear the experts' names.

    No label is read, unless the operator says so (``needs_labels``).

    Args:
        examples: The most examples of each calibration task that statistics are gathered over.
        batch: Examples in one forward pass; bounds the memory for activations.
    """

    examples: Annotated[int, Field(ge=1)] = 512
    batch: Annotated[int, Field(ge=1)] = 32

    needs_labels: ClassVar[bool] = False
    """Whether examples must have labels, unless they are texts."""


@dataclass(frozen=True)
class FromSlopes(FromData):
    """Operators whose vectors depend on the slopes of the experts' own predictions.

    Args:
        passes: The most backward passes a batch. The slopes are exact where there are no more classes than that. Of
            more, classes share passes, which adds noise.
    """

    passes: Annotated[int, Field(ge=1)] = 4
