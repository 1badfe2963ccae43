"""Small records beside a run, as strangers or a torn disk may have left them: only fields that fit are believed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Fields = Mapping[str, Callable[[Any], bool]]
"""By a field's name, whether a value may be the field's."""


def fitting(record: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """A record without the fields whose values do not fit.

    Args:
        record: The record, plain values.
        fields: What its fields may hold; fields that are not among them stay.
    """
    return {name: value for name, value in record.items() if name not in fields or fields[name](value)}


def is_text(value: Any) -> bool:
    """Whether it is a text of a usual length."""
    return isinstance(value, str) and len(value) <= 10_000


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 0 that a disk could count."""
    return type(value) is int and 0 <= value < 2**63


def is_moment(value: Any) -> bool:
    """Whether it is a number of seconds since 1970 that a calendar has."""
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value < 1e11
