"""DELLA: small entries of each row are dropped more often than large ones (Deep et al. 2024, arXiv:2406.11617).

MagPrune drops at random, in each row of width n by the rank r of an entry's magnitude (0 for the smallest, n - 1 for
the largest; equal ones share the mean of their ranks):

    p = density - epsilon + 2 epsilon r / (n - 1)              probability of being kept
    tau'_k = m_k tau_k / p                                     the mask m_k is 1 with probability p

so the expectation is tau_k. Then signs are elected and entries that agree are combined, as in ``dare_ties``:

    theta = base + sum_k c_k v_k,   v_k = tau'_k / A where tau'_k has the sign of sum_j tau'_j (0 counts as positive)

with A the number of experts that agree (``mean``) or 1 (``sum``). ``all`` leaves the election out: v_k = tau'_k, as
mergekit's ``della_linear``. All c_k = lambda is the paper's merge. mergekit does not divide by p; it restores the L1
norm of tensors.

Masks are those of ``dare``: from a counter at the entry's position, and as the density grows entries only join. A
tensor with one axis is one row. So is, of a convolution (four axes or more), each output's weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ecotone.merging.kernel.materialise import Transform
from ecotone.merging.operators.by_tensor import ByTensor
from ecotone.merging.operators.dare import mask_key, uniform_bits
from ecotone.merging.operators.prepared import SEEDS, Density, MaskSeed, PreparedVectors, keep, prepared, shared
from ecotone.merging.operators.task_vectors import Pieces, Whole, task_vectors
from ecotone.merging.operators.ties_vectors import sign_of_sum
from ecotone.populations.genome import Floats

Combining: TypeAlias = Literal["mean", "sum", "all"]


@dataclass(frozen=True)
class Della(PreparedVectors):
    """``theta = base + sum_k c_k v_k`` with v_k of DELLA; zero coefficients give the base.

    Ranks are found anew whenever a row is mixed, from the whole row in main memory. So merging large models takes
    several times as long as with ``dare_ties``.

    Args:
        density: The mean probability that an entry of a task vector is kept, not the share dropped.
        epsilon: How much more than that is the probability of a row's largest entry, and how much less that of its
            smallest. Near a density of 0 or 1 it is narrowed to what keeps probabilities from 0 to 1.
        mask_seed: The seed that draws which entries are kept, from 0 to 2^32 - 1.
        combine: How the entries of experts are combined: ``mean`` divides the sum of those that agree with the elected
            sign by the number of these experts, ``sum`` does not, ``all`` adds up the entries of all experts.
    """

    density: Density = 0.5
    epsilon: Annotated[float, Field(ge=0, le=0.5)] = 0.15
    mask_seed: MaskSeed = 0
    combine: Combining = "mean"

    name = "della"
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {
        "density": (0.0, 1.0),
        "epsilon": (0.0, 0.5),
        "mask_seed": (0, SEEDS - 1),
    }

    def transform(self, pieces: Pieces) -> Transform:
        """Reads nothing beforehand. Whole rows are read when parts of them are mixed."""
        rows = _Rows(self, pieces.kind, torch.get_num_threads() + 1)
        return _Elected(rows, ByTensor(pieces.tensors, [None] * len(pieces.tensors)), self.combine)


class _Rows:
    """Prunes blocks of whole rows, and keeps the latest.

    Args:
        operator: The settings.
        kind: The type in which task vectors are formed.
        most: Blocks that are kept.
    """

    def __init__(self, operator: Della, kind: torch.dtype, most: int) -> None:
        self._operator, self._kind, self._most = operator, kind, most
        self._kept: OrderedDict[int, list[Tensor]] = OrderedDict()
        self._lock = Lock()

    def read(self, whole: Whole, low: int, high: int) -> list[Tensor]:
        """K new tensors ``tau'_k`` of the elements ``low`` to ``high`` of a tensor, in main memory."""
        parts = []
        for first in range(low - low % whole.block, high, whole.block):
            part = slice(max(low - first, 0), high - first)
            parts.append([vector[part] for vector in self._block(whole, first)])
        return [torch.cat(each) for each in zip(*parts, strict=True)]

    def _block(self, whole: Whole, low: int) -> list[Tensor]:
        with self._lock:
            if whole.start + low in self._kept:
                self._kept.move_to_end(whole.start + low)
                return self._kept[whole.start + low]
        pruned = self._pruned(task_vectors(whole.read(low), self._kind), whole.width, whole.start + low)
        with self._lock:
            self._kept[whole.start + low] = pruned
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return pruned

    def _pruned(self, vectors: Sequence[Tensor], width: int, start: int) -> list[Tensor]:
        """K vectors ``tau'_k`` of whole rows at a position of the flat vector."""
        operator, pruned = self._operator, []
        reach = min(operator.epsilon, operator.density, 1 - operator.density)
        for number, vector in enumerate(vectors):
            shares = torch.from_numpy(_shares(vector.abs().numpy().reshape(-1, width)).ravel())
            chances = shares.mul_(2 * reach).add_(operator.density - reach)
            bits = uniform_bits(mask_key(operator.mask_seed, number), start, vector.numel(), vector.device)
            drawn = bits.double().add_(2.0**31).mul_(2.0**-32)  # in [0, 1)
            scaled = (vector.double() / chances).to(self._kind)
            keep(scaled, drawn.lt_(chances))
            pruned.append(scaled)
        return pruned


def _shares(sizes: NDArray[Any]) -> Floats:
    """(rows, n) ranks within each row as shares of the largest, n - 1; one half where all are equal."""
    width = sizes.shape[1]
    if width == 1:
        return np.full(sizes.shape, 0.5)
    order = np.argsort(sizes, axis=1)
    ordered = np.take_along_axis(sizes, order, axis=1)
    places = np.broadcast_to(np.arange(width), sizes.shape)
    differs = ordered[:, 1:] != ordered[:, :-1]
    begins = np.pad(differs, ((0, 0), (1, 0)), constant_values=True)
    ends = np.pad(differs, ((0, 0), (0, 1)), constant_values=True)
    first = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    last = np.minimum.accumulate(np.where(ends, places, width)[:, ::-1], axis=1)[:, ::-1]
    shares = np.empty(sizes.shape)
    np.put_along_axis(shares, order, (first + last) / (2 * (width - 1)), axis=1)
    return shares


@dataclass(frozen=True, eq=False)
class _Elected:
    """Prunes, elects and combines, in pieces of the base and K experts.

    Args:
        rows: Prunes whole rows.
        tensors: The tensors of the models.
        combine: How entries are combined.
    """

    rows: _Rows
    tensors: ByTensor[None]
    combine: Combining

    def __call__(self, pieces: Sequence[Tensor], start: int) -> list[Tensor]:
        """The base, and K vectors ``v_k``."""
        return prepared(pieces, start, lambda cut, low: self.tensors.vectors(cut, low, self._vectors))

    def _vectors(self, pieces: Sequence[Tensor], place: int, whole: Whole, _fact: None) -> Sequence[Tensor]:
        device = pieces[0].device
        vectors = [vector.to(device) for vector in self.rows.read(whole, place, place + pieces[0].numel())]
        if self.combine == "all":
            return vectors
        signs = sign_of_sum(vectors)
        signs.add_(signs.clone().eq_(0))
        for vector in vectors:
            keep(vector, vector.mul(signs).gt_(0))
        return shared(vectors, self.combine)
