"""The chunk kernel as compiled loops, for large models where numba is installed.

The same arithmetic as ``ecotone.merging.kernel.materialise`` in one loop over each stretch: a product or sum is
rounded before it is used again (no fast-math, so no fused multiply-add), bfloat16 is widened by a shift and rounded
to nearest even by integer arithmetic, as torch does. Every byte is read from memory once, however many candidates
there are, because blocks stay in cache while all candidates are formed from them, and whole lines are written past
the caches.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecotone.merging.kernel.lazy import Source
from ecotone.populations.genome import Integers

_KINDS: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype(np.float32), torch.bfloat16: np.dtype(np.uint16)}


def supports(sources: Sequence[Source], outs: Sequence[Source]) -> bool:
    """Whether compiled loops can be used: numba is there, and all tensors are float32 or all are bfloat16."""
    types = {tensor.dtype for tensor in (*sources, *outs)}
    return len(types) == 1 and _works(sources[0].dtype)


@lru_cache
def _works(dtype: torch.dtype) -> bool:
    """Compile the loops for one type (or take them from numba's cache) and try them."""
    if dtype not in _KINDS:
        return False
    try:
        one, out = torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)
        Batch([_Candidate(np.array([0, 1]), np.ones((1, 1), np.float32))]).mix([one], 0, [out])
    except Exception as error:  # numba is missing, broken or too old for this numpy: numpy gives the same bits
        logging.getLogger(__name__).debug("compiled loops are not used: %s", error)
        return False
    return bool(out == one)


class Candidate(Protocol):
    """The part of ``ecotone.merging.kernel.materialise.Mixture`` that the compiled loops read."""

    @property
    def borders(self) -> Integers:
        """(S+1,) segment borders."""
        ...

    @property
    def single(self) -> NDArray[np.float32]:
        """(S, J) weights."""
        ...

    @property
    def residual(self) -> NDArray[np.float32] | None:
        """(n,) added to the sum, or None."""
        ...


@dataclass(frozen=True)
class _Candidate:
    borders: Integers
    single: NDArray[np.float32]
    residual: NDArray[np.float32] | None = None


class Batch:
    """B candidates as the arrays that the loops read.

    Args:
        mixtures: The candidates.
    """

    def __init__(self, mixtures: Sequence[Candidate]) -> None:
        # Held here because only their addresses are passed on.
        self._residuals = [None if m.residual is None else np.ascontiguousarray(m.residual) for m in mixtures]
        self.edges: NDArray[np.int64] = np.concatenate([mixture.borders for mixture in mixtures])
        self.first: NDArray[Any] = np.cumsum([0] + [len(mixture.borders) for mixture in mixtures])
        self.weights: NDArray[np.float32] = np.concatenate([mixture.single for mixture in mixtures])
        self.residuals: NDArray[np.int64] = np.array(
            [0 if r is None else r.ctypes.data for r in self._residuals], np.int64
        )

    def mix(self, sources: Sequence[Tensor], start: int, outs: Sequence[Tensor]) -> None:
        """Fill one flat stretch of every candidate; see ``ecotone.merging.kernel.materialise.mix``."""
        from ecotone.merging.kernel import loops  # imports numba

        kind, size = _KINDS[sources[0].dtype], sources[0].numel()
        candidates = (self.edges, self.first, self.weights, self.residuals)
        loops.mix(_addresses(sources), _addresses(outs), kind, kind.itemsize, start, size, *candidates)


def choose(stored: Sequence[Tensor], outs: Sequence[Tensor], thresholds: Sequence[float], majority: float) -> bool:
    """Trim and elect a stretch of the base and K experts, as ``ecotone.merging.operators.ties_vectors`` does.

    Args:
        stored: K+1 flat tensors in main memory, the base first.
        outs: K flat tensors in main memory, which are filled.
        thresholds: K magnitudes below which entries are trimmed.
        majority: The sign of positions that sum to zero.

    Returns:
        Whether it was done; False where the compiled loops do not support the tensors.
    """
    if not supports(stored, outs):
        return False
    from ecotone.merging.kernel import loops  # imports numba

    kind, single = _KINDS[stored[0].dtype], np.float32
    doubt = len(outs) * np.finfo(single).eps
    addresses = _addresses(stored), _addresses(outs)
    size = stored[0].numel()
    loops.choose(*addresses, kind, kind.itemsize, size, np.array(thresholds, single), single(majority), single(doubt))
    return True


def multiplies(sources: Sequence[Source], gradient: Tensor) -> bool:
    """Whether ``products`` can be used: sources are all float32 or all bfloat16, the gradient is one of the two."""
    return supports(sources, sources) and gradient.dtype in _KINDS


def products(
    sources: Sequence[Tensor], gradient: Tensor, directions: Sequence[Sequence[int]], lanes: NDArray[np.float32]
) -> None:
    """Add inner products of a gradient with directions to ``lanes``: that at position i to lane i modulo L.

    Args:
        sources: J flat tensors.
        gradient: A tensor of their length, float32 or bfloat16 as they are.
        directions: For each of K the source it is, or two sources whose difference it is.
        lanes: (K, L) float32.
    """
    from ecotone.merging.kernel import loops  # imports numba

    plus = np.array([numbers[0] for numbers in directions])
    minus = np.array([numbers[1] if len(numbers) > 1 else -1 for numbers in directions])
    places = _addresses(sources), gradient.data_ptr()
    kinds = _KINDS[sources[0].dtype], _KINDS[gradient.dtype]
    loops.products(*places, *kinds, *(kind.itemsize for kind in kinds), gradient.numel(), plus, minus, lanes)


def add_product(out: Tensor, left: Tensor, right: Tensor, start: int) -> bool:
    """Add a stretch of the flattened matrix ``left @ right``, as ``ecotone.merging.models.low_rank`` does.

    Args:
        out: (N,) float32 or float64 in main memory.
        left: (R, r) of that type.
        right: (r, C) of that type.
        start: Position of the stretch in the flattened matrix.

    Returns:
        Whether it was done; False where compiled loops do not work on this machine.
    """
    if not _works(torch.float32):
        return False
    from ecotone.merging.kernel import loops  # imports numba

    loops.add_product(out.numpy(), left.numpy(), right.numpy(), start)
    return True


def _addresses(tensors: Sequence[Tensor]) -> Integers:
    return np.array([tensor.data_ptr() for tensor in tensors], np.int64)
