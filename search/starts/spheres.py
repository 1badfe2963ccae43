"""Means on a sphere, tensor by tensor: NuSLERP of two vectors, multi-SLERP and the Karcher mean of several.

The vectors x_k are what the operator's coefficients weigh: with a base the task vectors, with ``linear`` the models.
u_k = x_k / |x_k| are their directions, w_k weights whose sum is 1. All that the formulas need of x_k are their lengths
and the cosines C between them, so a point of the sphere is a vector of coefficients over the u_k.

Vectors without length have no direction. They take no part, and their coefficient is w_k. Where directions cancel each
other out, no mean of them exists, and coefficients are w_k: the weighted average.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from ecotone.populations.errors import InputError
from ecotone.populations.genome import Floats
from ecotone.search.starts.base import FIELD, Geometry, Weighs, Weighted

PARALLEL = 1e-6  # the sine of an angle below which interpolation is linear
CANCELLED = 1e-12  # the square of a sum of directions that counts as zero
STEPS, NEAR = 500, 1e-13  # of the Karcher mean: the most steps, and the change of coefficients at which it has settled


class MultiSlerpSettings(Weighted):
    """multi-SLERP: the weighted mean of directions, at the weighted mean of lengths.

        theta = (sum_k w_k |x_k|) normalise(sum_k w_k u_k)

    (The published procedure also averages in the tangent space at that mean. There the sum is zero by construction.)

    Attributes:
        solve: ``multi_slerp``: the weighted mean of the directions of each tensor, at the mean of the lengths.
    """

    solve: Literal["multi_slerp"]

    of: ClassVar[tuple[Weighs, ...]] = ("models", "task_vectors")

    def coefficients(self, models: Geometry) -> Floats:
        """(T, K): ``R w_k / (|x_k| |sum_j w_j u_j|)``."""
        shares = self.shares(models.experts)
        point, there = _middle(models, shares)
        return models.of_experts(_scaled(models, shares, point, there))


class KarcherSettings(Weighted):
    """The Karcher mean: the point of the sphere whose squared angles to the directions have the least weighted sum.

        T = sum_k w_k log_m(u_k),   m <- exp_m(T)   until T is 0

    at the weighted mean of the lengths, as for multi-SLERP, whose direction is the first m.

    Attributes:
        solve: ``karcher``: the mean of each tensor's directions by angles on the sphere, at the mean of the lengths.
    """

    solve: Literal["karcher"]

    of: ClassVar[tuple[Weighs, ...]] = ("models", "task_vectors")

    def coefficients(self, models: Geometry) -> Floats:
        """(T, K): the coefficients of the mean."""
        shares = self.shares(models.experts)
        point, there = _middle(models, shares)
        weights = np.where(models.lengths > 0, shares, 0.0)
        weights = weights / np.where(there, weights.sum(axis=1), 1.0)[:, None]
        for _ in range(STEPS):
            tangent, point = _stepped(models.cosines, weights, point)
            if np.abs(tangent[there]).max(initial=0.0) <= NEAR:
                break
        return models.of_experts(_scaled(models, shares, point, there))


class NuSlerpSettings(Weighted):
    """NuSLERP of two experts, each tensor one vector: SLERP at the second's share of the weights.

        theta = sin((1 - t) omega) / sin(omega) x_1 + sin(t omega) / sin(omega) x_2,   t = w_2

    omega is the angle between the two over the tensor. Interpolation is linear where they are parallel, or one has no
    length.

    Attributes:
        solve: ``nuslerp``: SLERP of two experts by the angle of each tensor.
    """

    solve: Literal["nuslerp"]

    of: ClassVar[tuple[Weighs, ...]] = ("models", "task_vectors")

    def check(self, models: Geometry) -> None:
        """Refuse other than two experts."""
        if len(models.experts) != 2:
            raise InputError(
                f"{FIELD}: nuslerp interpolates between two experts, found {len(models.experts)}.",
                "Use multi_slerp or karcher.",
            )
        super().check(models)

    def coefficients(self, models: Geometry) -> Floats:
        """(T, K): the weights of SLERP."""
        shares, cosine = self.shares(models.experts), models.cosines[:, 0, 1]
        angle = np.arctan2(np.sqrt(1 - cosine**2), cosine)
        sine = np.sin(angle)
        linear = (sine <= PARALLEL) | ~models.lengths.all(axis=1)
        arc = np.sin(angle[:, None] * shares) / np.where(linear, 1.0, sine)[:, None]
        return models.of_experts(np.where(linear[:, None], shares, arc))


def _middle(models: Geometry, shares: Floats) -> tuple[Floats, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """(T, E) coefficients over the u_k of the weighted mean direction, and (T,) whether there is one."""
    squares = np.einsum("j,tjk,k->t", shares, models.cosines, shares)
    there = squares > CANCELLED
    return shares / np.sqrt(np.where(there, squares, 1.0))[:, None], there


def _stepped(cosines: Floats, weights: Floats, point: Floats) -> tuple[Floats, Floats]:
    """The tangent T at ``point``, as (T, E) coefficients over the u_k, and the point that it leads to.

    log_m(u) = f (u - cos m) with f = angle / sin, and exp_m(T) = cos|T| m + sin|T|/|T| T.
    """
    along = np.clip(np.einsum("tjk,tk->tj", cosines, point), -1.0, 1.0)
    sines = np.sqrt(1 - along**2)
    factors = np.where(sines > 0, np.arctan2(sines, along) / np.where(sines > 0, sines, 1.0), along > 0) * weights
    tangent = factors - (factors * along).sum(axis=1, keepdims=True) * point
    length = np.sqrt(np.maximum(np.einsum("tj,tjk,tk->t", tangent, cosines, tangent), 0.0))[:, None]
    moved = np.cos(length) * point + np.sinc(length / np.pi) * tangent
    squares = np.einsum("tj,tjk,tk->t", moved, cosines, moved)
    return tangent, moved / np.sqrt(np.where(squares > 0, squares, 1.0))[:, None]


def _scaled(
    models: Geometry, shares: Floats, point: Floats, there: np.ndarray[tuple[int], np.dtype[np.bool_]]
) -> Floats:
    """(T, E) shares of the experts for points of the sphere, at the weighted mean of the lengths."""
    lengths = models.lengths
    radius = lengths @ shares
    solved = radius[:, None] * point / np.where(lengths > 0, lengths, 1.0)
    return np.where(there[:, None] & (lengths > 0), solved, shares)
