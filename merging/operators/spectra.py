"""Singular values for operators that prepare whole matrices: what TSV-M, ISO-C, KnOTS and others have in common.

Matrices of low rank, as adapters give, have singular vectors that nothing determines: those of the singular value zero.
They differ between machines and have no meaning, so no operator here uses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from ecotone.merging.operators.whole import Layer, Report
from ecotone.populations.errors import InputError

Cut: TypeAlias = Annotated[float, Field(gt=0, lt=1)]
"""A share of the largest singular value; those that are not above it count as zero."""


def task_matrices(at: Layer, base: Tensor, experts: Sequence[Tensor]) -> list[Tensor]:
    """K matrices ``expert - base``.

    Raises:
        InputError: One has an entry that is NaN or infinite.
    """
    vectors = [expert - base for expert in experts]
    for number, vector in enumerate(vectors, 1):
        if not bool(torch.isfinite(vector).all()):
            raise InputError(
                f"models: expected finite weights in {at.name!r}, found NaN or infinity in the base or in expert "
                f"{number} of {len(vectors)}.",
                "Whole matrices are decomposed here; leave the tensor out with merge.freeze, or take another operator.",
            )
    return vectors


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin singular value decomposition of a matrix (m, n), with q = min(m, n).

    Returns:
        (m, q) left vectors, (q,) values in descending order, (q, n) right vectors.
    """
    try:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # LAPACK's divide and conquer fails on rare matrices, but seldom on the triangle of the same matrix.
        rotation, triangle = torch.linalg.qr(matrix)
        left, values, right = torch.linalg.svd(triangle, full_matrices=False)
        left = rotation @ left
    return left, values, right


def row_space(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(q,) singular values and (q, n) right singular vectors of a matrix (m, n) that may have many rows."""
    _, values, right = svd(torch.linalg.qr(matrix, mode="r").R)
    return values, right


def precision(matrix: Tensor) -> float:
    """The share of the largest singular value of a matrix at which others cannot be told from zero."""
    return max(matrix.shape) * torch.finfo(matrix.dtype).eps


def rank(values: Tensor, cut: float) -> int:
    """How many singular values, in descending order, are above ``cut`` times the largest; 0 if all are zero."""
    return int((values > cut * values[:1]).sum())


def polar(matrix: Tensor) -> Tensor:
    """(m, n) the nearest matrix with orthonormal columns (or rows): ``P Qᵀ`` of the decomposition ``P S Qᵀ``.

    Where columns depend on each other, it is the polar factor on their range: ``P`` and ``Q`` of positive values only.
    """
    left, values, right = svd(matrix)
    many = rank(values, precision(matrix))
    return left[:, :many] @ right[:many]


def report_alike(vectors: Sequence[Tensor], report: Report) -> None:
    """Report the largest cosine of two task vectors of a layer."""
    norms = [float(torch.linalg.vector_norm(vector)) for vector in vectors]
    moved = [k for k, norm in enumerate(norms) if norm]
    flat = [vector.flatten() for vector in vectors]
    cosines = {(j, k): float(flat[j] @ flat[k]) / norms[j] / norms[k] for k in moved for j in moved if j < k}
    if not cosines:
        return
    report.numbers["cosine"] = max(cosines.values())
