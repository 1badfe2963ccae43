"""Sums and functions whose bits depend on the numbers alone.

Operators that weigh entries by functions of them must give the same bits on every device, in whatever order the experts
come and however tensors are cut. Libraries promise this of single sums, products and quotients, not of ``exp`` and
``tanh``. So these are made of sums, products and quotients here, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_TERMS = 14  # of the series of exp(r) - 1 for |r| <= log(2) / 2; the next one is below a unit in the last place
_LOG2_HIGH = float.fromhex("0x1.62E42FEE00000p-1")  # its last bits are zero, so whole multiples are exact
_LOG2_LOW = 1.90821492927058770002e-10  # log(2) less that
_LEAST, _MOST = -708.0, 709.0  # where exp is a normal number of float64


def summed(terms: Sequence[Tensor]) -> Tensor:
    """The sum of K tensors (n,), a new one, the same whatever their order: the smallest is added first."""
    rows = list(terms)
    for high in range(len(rows) - 1, 0, -1) if len(rows) > 2 else ():
        for low in range(high):
            pair = rows[low : low + 2]
            rows[low], rows[low + 1] = torch.minimum(*pair), torch.maximum(*pair)
    total = rows[0] + 0.0  # and no negative zero
    for row in rows[1:]:
        total.add_(row)
    return total


def exp(x: Tensor) -> Tensor:
    """The exponential of ``x``, float64; what is out of range gives the smallest or largest power that is in it."""
    rest, scale = _reduced(x)
    return rest.add_(1).mul_(scale)


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent of ``x``, float64."""
    rest, scale = _reduced(x.abs().mul_(2).clamp_(max=40))
    grown = rest.mul_(scale).add_(scale.sub_(1))  # exp(2 |x|) - 1, also for small |x|
    return grown.div_(grown + 2).mul_(x.sign())


def _reduced(x: Tensor) -> tuple[Tensor, Tensor]:
    """exp(r) - 1 and 2^k with exp(x) = exp(r) 2^k and |r| at most log(2) / 2."""
    x = x.clamp(_LEAST, _MOST)
    whole = torch.round(x * (1 / math.log(2)))
    rest = x - whole * _LOG2_HIGH - whole * _LOG2_LOW
    series = torch.full_like(rest, 1 / math.factorial(_TERMS))
    for power in range(_TERMS - 1, 0, -1):
        series.mul_(rest).add_(1 / math.factorial(power))
    scale = whole.long().add_(1023).bitwise_left_shift_(52).view(torch.float64)
    return series.mul_(rest), scale
