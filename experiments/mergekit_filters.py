"""mergekit's filters: how they are read, how few can say a merge's weights, and whether they pick components.

A parameter of mergekit's is a number, or a list of filters of which the first that is part of a tensor's name gives the
value; an entry without a filter gives it for the rest.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from ecotone.merging.models.layout import natural
from ecotone.populations.components import components

FILTERS = 64  # filters by parts of names that are looked for at most

TYPICAL = (
    "lm_head.weight",
    "model.embed_tokens.weight",
    *(
        f"model.layers.{layer}.{part}.weight"
        for layer in (0, 1)
        for part in (
            *(f"self_attn.{one}_proj" for one in "qkvo"),
            *(f"mlp.{one}_proj" for one in ("gate", "up", "down")),
            *("input_layernorm", "post_attention_layernorm"),
        )
    ),
    "model.layers.2.mlp.gate.weight",
    *(f"model.layers.2.mlp.experts.0.{one}_proj.weight" for one in ("gate", "up", "down")),
    "model.norm.weight",
)
"""Names of a language model's tensors, where the models themselves are not at hand."""


def documented(setting: Any, name: str) -> float | None:
    """The value of a parameter for a tensor, as mergekit documents it; None for none."""
    if not isinstance(setting, Sequence):
        return None if setting is None else float(setting)
    for entry in setting:
        if entry.get("filter") in (None, "*") or entry["filter"] in name:
            return float(entry["value"])
    return None


def shortest(values: Mapping[str, float]) -> list[tuple[str, float]]:
    """Filters with their values, by parts of names where those are half as many as others, or fewer."""
    chosen = filters(values)
    return by_parts(values, min(len(chosen) // 2, FILTERS)) or chosen


def filters(values: Mapping[str, float]) -> list[tuple[str, float]]:
    """Substring filters, of which the first that is part of a name gives that name's value.

    A filter is the beginning of several names, up to a dot, where all names that contain it have the same value;
    otherwise a full name. Full names that are part of other names come last, the longest first: none takes another's
    value.

    Args:
        values: By tensor name, its value.

    Returns:
        Filters with their values, in the order of the names as far as that is possible.
    """
    shared: dict[str, bool] = {}
    chosen: dict[str, float] = {}
    for (name, value), following in zip(values.items(), [*list(values)[1:], ""], strict=True):
        parts = name.split(".")
        for depth in range(1, len(parts)):
            start = ".".join(parts[:depth]) + "."
            if start not in shared:  # the name that follows spares most searches
                alike = following.startswith(start) and values[following] == value
                shared[start] = alike and all(values[other] == value for other in values if start in other)
            if shared[start]:
                chosen[start] = value
                break
        else:
            chosen[name] = value
    inside = _parts_of_others(tuple(values)) - {one for one, alike in shared.items() if alike}
    last = sorted((one for one in chosen if one in inside), key=len, reverse=True)
    return [(one, chosen[one]) for one in (*(one for one in chosen if one not in inside), *last)]


def by_parts(values: Mapping[str, float], most: int) -> list[tuple[str, float]] | None:
    """Filters that are parts of names, such as ``self_attn``; the first that is part of a name gives its value.

    So a merge by components is written in a few lines. The filter that settles most names comes first; of several, the
    shortest.

    Args:
        values: By tensor name, its value.
        most: The most filters to look for.

    Returns:
        Filters with their values; None where so few cannot say it.
    """
    names, numbers = list(values), np.array(list(values.values()))
    parts = sorted({part for name in names for part in _parts(name)}, key=lambda part: (len(part), part))
    left, found = np.ones(len(names), np.bool_), list[tuple[str, float]]()
    within = np.array([[part in name for name in names] for part in parts], np.bool_).reshape(len(parts), len(names))
    while left.any():
        reach = within & left
        lowest = np.where(reach, numbers, np.inf).min(axis=1)
        pure = reach.any(axis=1) & (lowest == np.where(reach, numbers, -np.inf).max(axis=1))
        if len(found) == most or not pure.any():
            return None
        best = int(np.argmax(np.where(pure, reach.sum(axis=1), -1)))
        found.append((parts[best], float(lowest[best])))
        left &= ~within[best]
    return found


def _parts(name: str) -> Iterator[str]:
    """The components of a tensor's name that are no numbers, alone and with the next."""
    for component, following in pairwise((*name.split("."), "0")):
        if not component.isdigit():
            yield component
            yield f".{component}."
            yield component if following.isdigit() else f"{component}.{following}"


@lru_cache(maxsize=1)
def _parts_of_others(names: tuple[str, ...]) -> frozenset[str]:
    """The names that are part of another: of all ends of names, in order, the one after them begins with them, too."""
    ends = sorted(name[start:] for name in names for start in range(len(name)))
    following = ((name, bisect_left(ends, name) + 1) for name in names)
    return frozenset(name for name, place in following if place < len(ends) and ends[place].startswith(name))


def picked(filters: Sequence[str], names: Iterable[str]) -> dict[str, int]:
    """By tensor name, the number of the filter that is the first to be part of it; -1 for none."""
    return {
        name: next((number for number, one in enumerate(filters) if one in name), -1)
        for name in sorted(names, key=natural)
    }


def are_components(filters: Sequence[str], names: Sequence[str]) -> bool:
    """Whether each filter picks whole components of a model, norms within them aside."""
    found: dict[str, set[int]] = {}
    chosen = picked(filters, names)
    for component, number in zip(components(list(chosen)), chosen.values(), strict=True):
        if component != "norms":
            found.setdefault(component, set()).add(number)
    return all(len(numbers) == 1 for numbers in found.values()) and {*range(len(filters))} <= set().union(
        *found.values()
    )
