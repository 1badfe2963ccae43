"""Spherical linear interpolation of two models (Shoemake 1985).

    theta = sin((1 - t) omega) / sin(omega) A + sin(t omega) / sin(omega) B

where omega is the angle between A and B. A segment's weights are constants that depend on t and, through the models'
norms and inner product, on the data: a linear combination all the same. Fine-tuned models of one base are nearly
parallel, so that SLERP of them hardly differs from their average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ecotone.merging.kernel.materialise import Transform, unchanged
from ecotone.merging.operators.task_vectors import Pieces
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Floats

PARALLEL = 1e-6  # the sine of an angle below which interpolation is linear


@dataclass(frozen=True)
class Slerp:
    """Interpolation on the arc between two models; a genome's one coefficient a segment is t, the second model's share.

    Args:
        per: The angles to interpolate on: ``model`` takes the one angle between the whole models, ``tensor`` takes the
            angle of each tensor.
    """

    per: Literal["model", "tensor"] = "model"

    name = "slerp"
    needs_base = False
    changes = False
    affine = False
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {}

    @property
    def geometry(self) -> Literal["model", "tensor"]:
        """The part of the model over which an angle is taken."""
        return self.per

    def columns(self, experts: Sequence[str]) -> tuple[str, ...]:
        """The second expert, whose share t is.

        Raises:
            InputError: There are not two experts.
        """
        if len(experts) != 2:
            raise InputError(
                f"experts: slerp interpolates between two models, found {len(experts)}.",
                "Give two, or use linear or task_arithmetic.",
            )
        return (experts[1],)

    def seeds(self, experts: int) -> Floats:
        """(2, 1): at t = 0 lies the first, at t = 1 the second, bit for bit."""
        return np.array([[0.0], [1.0]])

    def weights(self, coefficients: Floats, grams: Floats | None = None) -> Floats:
        """(S, 2) for (S, 1) t and (S, 2, 2) inner products; linear where models are parallel, as without ``grams``."""
        t = np.asarray(coefficients, np.float64)[:, 0]
        linear = np.column_stack([1.0 - t, t])
        if grams is None:
            return linear
        first, both, second = grams[:, 0, 0], grams[:, 0, 1], grams[:, 1, 1]
        angle = np.arctan2(np.sqrt(np.maximum(first * second - both**2, 0.0)), both)
        sine = np.sin(angle)
        parallel = sine <= PARALLEL
        arc = np.sin(linear * angle[:, None]) / np.where(parallel, 1.0, sine)[:, None]
        return np.where(parallel[:, None], linear, arc)

    def transform(self, pieces: Pieces) -> Transform:
        """The models are mixed as they are."""
        return unchanged
