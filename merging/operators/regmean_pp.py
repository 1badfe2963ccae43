"""RegMean++: RegMean with the inputs that layers get in the merge (Nguyen et al. 2025, arXiv:2508.03121).

Blocks are merged one after the other. The Gram matrices of a block are those of the inputs that the merge of the blocks
before it makes of each expert's data, passed through the expert's own block. The closed form is RegMean's. Where all
tasks have the same inputs the Gram matrices are equal, and the merge is the plain average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ecotone.merging.operators.regmean import RegMean


@dataclass(frozen=True)
class RegMeanPlusPlus(RegMean):
    """``theta = base + sum_k c_k v_k`` with v_k of RegMean++; c = 1 is the published merge."""

    targets: Literal["weights", "own"] = "weights"

    name = "regmean_pp"

    @property
    def order(self) -> Literal["any", "depth"]:
        """``depth``."""
        return "depth"
