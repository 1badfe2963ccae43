"""How alike the experts of a merge are, over the whole model: what a practitioner would warn of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ecotone.populations.genome import Floats

ALIKE = 0.9
"""The cosine of two task vectors above which experts count as nearly the same."""
FAR = 1.0
"""The length of a task vector, as a share of the base's, above which an expert counts as unrelated to the base."""

PIECE = 2**20
"""Elements of a tensor that are worked on at a time, so that a table takes no more memory than a layer."""


class Likeness:
    """Inner products of task vectors, added up tensor by tensor.

    Args:
        names: K names of the experts.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._products: Floats = np.zeros((len(names), len(names)))
        self._base = 0.0

    def add(self, base: Tensor, experts: Sequence[Tensor]) -> None:
        """Add a tensor of the base and of the K experts."""
        flat = [one.reshape(-1) for one in (base, *experts)]
        for start, *others in zip(*(torch.split(one, PIECE) for one in flat), strict=True):
            vectors = torch.stack([other - start for other in others])
            self._products += (vectors @ vectors.mT).double().cpu().numpy()
            self._base += float(start.double().square().sum())

    @property
    def cosines(self) -> Floats:
        """(K, K) cosines of the task vectors; 0 where an expert is the base."""
        lengths = np.sqrt(np.diagonal(self._products))
        scale = np.outer(lengths, lengths)
        found: Floats = np.divide(self._products, scale, out=np.zeros_like(scale), where=scale > 0)
        return found

    @property
    def summary(self) -> str:
        """Lengths as shares of the base's, and cosines, in words."""
        shares = np.sqrt(np.diagonal(self._products)) / max(self._base**0.5, 1e-300)
        text = f"{_between(shares)} of the base's length"
        if len(self._names) > 1:
            text += f", cosines {_between(self.cosines[np.triu_indices(len(self._names), 1)])}"
        return text

    def warnings(self, unites: bool) -> Iterator[str]:
        """Sentences about experts that are nearly the same, are the base, or have little to do with it.

        Args:
            unites: Whether equal experts give that expert under the operator.
        """
        cosines, lengths = self.cosines, np.sqrt(np.diagonal(self._products))
        effect = "they count twice" if unites else "the operator amplifies what they share"
        for j, k in zip(*np.nonzero(np.triu(cosines, 1) > ALIKE), strict=True):
            yield (
                f"{self._names[j]} and {self._names[k]} are nearly the same (cosine {cosines[j, k]:.2f} of their task "
                f"vectors): {effect}; leave one out, or lower its coefficient"
            )
        for name, length in zip(self._names, lengths, strict=True):
            if length == 0:
                yield f"{name} is the base itself"
            elif length > FAR * self._base**0.5:
                share = length / max(self._base**0.5, 1e-300)
                yield f"the task vector of {name} is {share:.1f} times as long as the base: was it tuned from it?"


def _between(values: Floats) -> str:
    low, high = (f"{value:.2g}" for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"
