"""Merges that are written for mergekit, read: their models, and what their filters say.

A merge with ``tasks`` beside it says all that a search needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ecotone.experiments.mergekit_filters import documented, picked
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Floats


@dataclass(frozen=True)
class Chosen:
    """What a merge's weights say beside the models and the method.

    Args:
        frozen: Filters of the tensors that are the base's, or the first model's.
        filters: All filters, in the order in which they count.
        rest: Whether tensors that no filter picks are frozen, too.
        start: The mean weight of the models that are merged, over the other tensors; None where none was read.
    """

    frozen: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    rest: bool = False
    start: float | None = None


def evolution_of(record: Mapping[str, Any], place: Path) -> tuple[dict[str, Any], Chosen]:
    """A merge with tasks as mergekit-evolve's configuration of a search, and what its weights say.

    Args:
        record: The file's content: ``models``, ``merge_method`` and ``tasks`` among it.
        place: The file, for messages.

    Raises:
        InputError: It has slices, weights that change from layer to layer, or no models.
    """
    models = record.get("models")
    if not isinstance(models, list) or not models or not all(isinstance(one, Mapping) for one in models):
        raise InputError(
            f"{place}: models: expected a list of models, found {'slices' if 'slices' in record else repr(models)}.",
            "Merges of slices are no merges of whole models, and are not read.",
        )
    shared = _parameters(record, f"{place}: parameters")
    settings = {}
    for number, one in enumerate(models):
        if not isinstance(one.get("model"), str):
            raise InputError(f"{place}: models[{number}]: model: expected text, found {one.get('model')!r}.")
        own = _parameters(one, f"{place}: models[{number}]: parameters")
        settings[one["model"]] = own.get("weight", shared.get("weight"))
    for model, setting in settings.items():
        _check(setting, f"{place}: models: {model}: weight")
    filters = tuple(
        dict.fromkeys(
            entry["filter"]
            for setting in settings.values()
            for entry in (setting if isinstance(setting, list) else ())
            if entry.get("filter") not in (None, "*")
        )
    )
    genome = {
        "models": [one["model"] for one in models],
        "merge_method": record["merge_method"],
        **{key: record[key] for key in ("base_model", "tokenizer_source") if record.get(key) is not None},
        **({"normalize": shared["normalize"]} if "normalize" in shared else {}),
    }
    rows = np.array([[_value(setting, one) for setting in settings.values()] for one in (*filters, "\0")])
    found, chosen = _searched(record, genome, filters, rows)
    if chosen.start is None:
        raise InputError(
            f"{place}: models: expected weights of models that are merged, found none: nothing is left to search for."
        )
    return found, chosen


def _searched(
    record: Mapping[str, Any], genome: dict[str, Any], filters: tuple[str, ...], rows: Floats
) -> tuple[dict[str, Any], Chosen]:
    """The search over a merge whose weights by filter, and of the rest, are ``rows``; NaN where it has none."""
    base, models = genome.get("base_model"), genome["models"]
    mixed = [number for number, model in enumerate(models) if model != base]
    frozen = (rows[:, mixed] == 0).all(axis=1)
    if genome["merge_method"] == "linear":
        kept = models.index(base) if base in models else 0 if base is None else None
        others = [number for number in range(len(models)) if number != kept]
        frozen = (rows[:, others] == 0).all(axis=1) & (rows[:, kept] == 1) if kept is not None else frozen & False
        frozen &= ~np.isnan(rows).any(axis=1)
        own = rows[~frozen][:, kept] if base in models else np.zeros(1)
        if own.any() and np.allclose(np.nansum(rows, axis=1)[~np.isnan(rows).all(axis=1)], 1.0):
            genome |= {"merge_method": "task_arithmetic", "normalize": False}  # the base's weight is what others leave
        elif own.any():
            mixed = list(range(len(models)))
            if kept == 0:
                del genome["base_model"]
    genome["models"] = [models[number] for number in mixed]
    moved = rows[~frozen][:, mixed]
    names = [one for one, held in zip(filters, frozen, strict=False) if not held]
    genome |= {"filters": names} if names else {}
    genome |= {"allow_negative_weights": True} if (moved < 0).any() else {}
    rest = {key: record[key] for key in ("tasks", "limit", "num_fewshot", "apply_chat_template") if key in record}
    held = tuple(one for one, still in zip(filters, frozen, strict=False) if still)
    known = moved[~np.isnan(moved)]
    start = float(known.mean()) if known.size else None
    return {"genome": genome, **rest}, Chosen(held, filters, bool(frozen[-1]), start)


def _parameters(part: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """The parameters of a merge or of a model in it."""
    found = part.get("parameters") or {}
    if not isinstance(found, Mapping):
        raise InputError(f"{place}: expected a mapping, found {found!r}.")
    return found


def _value(setting: Any, name: str) -> float:
    found = documented(setting, name)
    return np.nan if found is None else found


def _check(setting: Any, place: str) -> None:
    entries = setting if isinstance(setting, list) else []
    plain = setting is None or isinstance(setting, int | float | list)
    if not plain or not all(
        isinstance(entry, Mapping)
        and isinstance(entry.get("value"), int | float)
        and isinstance(entry.get("filter"), str | None)
        for entry in entries
    ):
        raise InputError(
            f"{place}: expected a number, or filters with a number each, found {setting!r}.",
            "Weights that change from layer to layer are not read: give each layer a filter.",
        )


def frozen_parts(chosen: Chosen, names: Sequence[str]) -> dict[str, list[str]]:
    """The recipe's ``merge.freeze`` or ``merge.only``: patterns, with ``*`` for any text, of a merge's frozen tensors.

    Args:
        chosen: What its weights say.
        names: The models' tensors; empty where they are not at hand.
    """
    listed = [one for one in chosen.filters if (one in chosen.frozen) != chosen.rest]
    if not listed and not chosen.rest:
        return {}
    numbers = {chosen.filters.index(one) for one in listed}
    picks = [name for name, number in picked(chosen.filters, names).items() if number in numbers]
    wide = {name for name in names if any(one in name for one in listed)}
    return {"only" if chosen.rest else "freeze": [f"*{one}*" for one in listed] if wide == set(picks) else picks}
