"""Scores are numbers: what an objective returns is taken as it is, or refused in words, never converted.

``float()`` takes the text "0.5", True, an array of one bool and a complex array of one number. None of them is a score:
they are slips of the function that returned them, and a search that goes on with them optimises something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecotone.fitness.protocol import Score
from ecotone.populations.errors import InputError, first_line

_ROUNDING = 1e-6  # a mean of numbers in [0, 1] may be above 1 by less


class NotFiniteScoreError(InputError):
    """A score is NaN or infinite, or one example's is."""


@dataclass(frozen=True)
class Expected:
    """What is known of an objective's scores before it gives one.

    Args:
        limits: The least and the most that an example can score; None where nothing is declared.
        count: The number of scores by example; None where it is not known.
    """

    limits: tuple[float, float] | None = None
    count: int | None = None


ANYTHING = Expected()
"""Nothing is known."""


def number(value: Any, subject: str) -> float:
    """``value`` as a float: a Python number, or a number of numpy or torch without dimensions.

    Args:
        value: Anything.
        subject: The subject of the message: ``the score``.

    Raises:
        InputError: It is text, a bool, complex, None, an array with dimensions, or no number at all.
    """
    kind = no_number(value)
    if kind is not None:
        raise InputError(f"{subject}: expected a number, found {kind}.")
    return float(value)


def no_number(value: Any) -> str | None:
    """What ``value`` is, in words, where it is no number; None when it is one."""
    if type(value) is float or type(value) is int:
        return None
    if isinstance(value, bool | np.bool_):
        return f"the bool {value}"
    if isinstance(value, str | bytes):
        return f"the text {value[:40]!r}"
    if isinstance(value, Tensor):
        if value.ndim:
            return f"a tensor of shape {tuple(value.shape)}"
        return f"a tensor of {value.dtype}" if value.is_complex() or value.dtype == torch.bool else None
    if isinstance(value, np.ndarray | np.generic) or hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.ndim:
            return f"an array of shape {array.shape}"
        return None if array.dtype.kind in "iuf" else f"an array of {array.dtype}"
    return None if isinstance(value, Real | Decimal) else type(value).__name__


def by_example(values: Any) -> NDArray[Any]:
    """(N,) scores by example: numbers, or bools for right and wrong.

    Raises:
        InputError: They have another shape, or are neither numbers nor bools.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    try:
        scores = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise InputError(f"expected scores by example of shape (N,), found others ({first_line(error)}).") from error
    if scores.ndim != 1 or scores.dtype.kind not in "biuf":
        raise InputError(
            f"expected scores by example of shape (N,), numbers or bools, found {scores.shape} of {scores.dtype}."
        )
    return scores


def checked(score: Score, subject: str, expected: Expected = ANYTHING) -> Score:
    """``score`` with a float and a plain array, if it is a score.

    Args:
        score: What an objective returned.
        subject: The objective, for messages.
        expected: What is known of it.

    Raises:
        InputError: Its value is no number, its scores by example are no (N,) numbers or bools, their number is not the
            expected one, or they are out of the declared range.
        NotFiniteScoreError: One of them is NaN or infinite. The message names the place.
    """
    value, each = number(score.value, f"{subject}: the score"), score.per_example
    if each is not None:
        each = by_example(each)
        if expected.count is not None and each.size != expected.count:
            raise InputError(f"{subject}: expected {expected.count} scores by example, found {each.size}.")
        _check_each(each, value, subject, expected.limits)
    if not math.isfinite(value):
        raise NotFiniteScoreError(f"{subject}: expected a finite score, found {value}")
    if expected.limits is not None:
        _check_limits(value, f"{subject}: expected a score", "", expected.limits)
    items = number(score.items, f"{subject}: items")
    if type(score.value) is float and each is score.per_example and type(score.items) is int:
        return score
    return replace(score, value=value, per_example=each, items=int(items))


def _check_each(each: NDArray[Any], value: float, subject: str, limits: tuple[float, float] | None) -> None:
    """Refuse NaN, and infinity where it makes the score infinite: one text's perplexity may be beyond all numbers."""
    if each.dtype.kind == "f":
        broken = np.flatnonzero(np.isnan(each) if math.isfinite(value) else ~np.isfinite(each))
        if broken.size:
            first = int(broken[0])
            raise NotFiniteScoreError(
                f"{subject}: expected finite scores by example, found {each[first]} at example {first} "
                f"({broken.size} of {each.size} are not finite)"
            )
    if limits is None or each.dtype.kind == "b" or not each.size:
        return
    for place in (int(each.argmin()), int(each.argmax())):
        _check_limits(float(each[place]), f"{subject}: expected scores by example", f" at example {place}", limits)


def _check_limits(value: float, words: str, place: str, limits: tuple[float, float]) -> None:
    least, most = limits
    slack = _ROUNDING * max(1.0, abs(value))
    if not least - slack <= value <= most + slack:
        span = f"from {least:g} to {most:g}" if math.isfinite(most) else f"of at least {least:g}"
        raise InputError(f"{words} {span}, as its kind declares, found {value:g}{place}.")


def shown(value: Any) -> str:
    """A value of any kind for a message, cut, whatever its ``__repr__`` does."""
    try:
        return repr(value)[:100]
    except BaseException as error:  # any code of the user's may stand there
        return f"an object of type {type(value).__name__} (its __repr__ raised {type(error).__name__})"


def facts(details: Any, subject: str) -> dict[str, float]:
    """A loss's details by name, all numbers.

    Raises:
        InputError: They are no mapping of names to numbers.
    """
    if not isinstance(details, Mapping):
        raise InputError(f"{subject}: expected details as numbers by name, found {type(details).__name__}.")
    return {str(name): number(value, f"{subject}: {name}") for name, value in details.items()}
