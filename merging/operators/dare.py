"""DARE: random entries of task vectors are dropped, the others scaled up (Yu et al. 2024, arXiv:2311.03099).

    theta = base + sum_k c_k m_k tau_k / density

where each entry of the mask m_k is 1 with probability ``density``, so the expectation is task arithmetic.

Masks come from a counter: the 32 bits of an entry are half of the output number p // 2 of SplitMix64 (Steele, Lea and
Flood 2014), p the entry's position in the flat vector, seeded from the mask seed and the expert's number. So they are
the same whatever the device, the threads and the pieces, and as the density grows entries only join.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ecotone.merging.kernel.materialise import Transform
from ecotone.merging.operators.prepared import SEEDS, Density, MaskSeed, PreparedVectors, keep, prepared
from ecotone.merging.operators.task_vectors import Pieces, task_vectors

_STEP, _FIRST, _SECOND = (word - 2**64 for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Dare(PreparedVectors):
    """``theta = base + sum_k c_k m_k tau_k / density``; zero coefficients give the base.

    Args:
        density: The probability that an entry of a task vector is kept (the paper's 1 - p), not the share dropped.
        mask_seed: The seed that draws which entries are kept, from 0 to 2^32 - 1.
    """

    density: Density = 0.5
    mask_seed: MaskSeed = 0

    name = "dare"
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {"density": (0.0, 1.0), "mask_seed": (0, SEEDS - 1)}

    def transform(self, pieces: Pieces) -> Transform:
        """Reads nothing beforehand: whether an entry is kept depends on its position alone."""
        return _Scaled(pieces.kind, Masks(self.mask_seed, self.density), self.density)


@dataclass(frozen=True)
class Masks:
    """Masks that choose which entries of task vectors are kept.

    Args:
        seed: The mask seed.
        density: The probability with which an entry is kept.
    """

    seed: int
    density: float

    def apply(self, vectors: Sequence[Tensor], start: int) -> Sequence[Tensor]:
        """Set the entries of K vectors that are dropped to zero, in place; they begin at position ``start``."""
        least = -(2**31)
        limit = least + max(1, round(self.density * 2**32))
        if self.density < 1 and limit < 2**31:
            for number, vector in enumerate(vectors):
                bits = uniform_bits(self._key(number), start, vector.numel(), vector.device)
                keep(vector, bits.lt_(limit))
        return vectors

    def _key(self, number: int) -> int:
        return mask_key(self.seed, number)


def mask_key(seed: int, number: int) -> int:
    """The start of the generator of one expert's mask, a signed integer of 64 bits."""
    words = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)
    return int(words.view(np.int64)[0])


def uniform_bits(key: int, start: int, size: int, device: torch.device) -> Tensor:
    """(size,) int32 of 32 random bits each, for the positions from ``start`` on."""
    first = start // 2
    word = torch.arange(first + 1, (start + size + 1) // 2 + 1, device=device)
    word.mul_(_STEP).add_(key)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        word.bitwise_xor_(_shifted(word, shift)).mul_(factor)
    word.bitwise_xor_(_shifted(word, 31))
    return word.view(torch.int32)[start - 2 * first :][:size]


def _shifted(word: Tensor, by: int) -> Tensor:
    """Unsigned words shifted right."""
    return word.bitwise_right_shift(by).bitwise_and_((1 << (64 - by)) - 1)


def scaled(vectors: Sequence[Tensor], density: float) -> Sequence[Tensor]:
    """The vectors divided by the density, in place; a division on every device."""
    for vector in vectors:
        vector.div_(torch.tensor(density, dtype=vector.dtype, device=vector.device))
    return vectors


@dataclass(frozen=True)
class _Scaled:
    """Drops entries of task vectors and scales the others, in pieces of the base and K experts."""

    kind: torch.dtype
    masks: Masks
    density: float

    def __call__(self, pieces: Sequence[Tensor], start: int) -> list[Tensor]:
        """The base, and K vectors."""
        return prepared(pieces, start, self._vectors)

    def _vectors(self, pieces: Sequence[Tensor], start: int) -> Sequence[Tensor]:
        return scaled(self.masks.apply(task_vectors(pieces, self.kind), start), self.density)
