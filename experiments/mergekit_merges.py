"""Merges that are written for mergekit, read: their models, and what their filters say.

A parameter of mergekit's is a number, or a list of filters of which the first that is part of a tensor's name gives the
value; an entry without a filter gives it for the rest. A merge with ``tasks`` beside it says all that a search needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ecotone.merging.models.layout import natural
from ecotone.populations.components import components
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Floats

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


@dataclass(frozen=True)
class Chosen:
    """What a merge's weights say beside the models and the method.

    Args:
        frozen: Filters of the tensors that are the base's, or the first model's.
        filters: All filters, in the order in which they count.
        start: The mean weight of the models that are merged, over the other tensors.
    """

    frozen: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    start: float | None = None


def documented(setting: Any, name: str) -> float | None:
    """The value of a parameter for a tensor, as mergekit documents it; None for none."""
    if not isinstance(setting, Sequence):
        return None if setting is None else float(setting)
    for entry in setting:
        if entry.get("filter") in (None, "*") or entry["filter"] in name:
            return float(entry["value"])
    return None


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
    shared = record.get("parameters") or {}
    settings = {
        str(one.get("model")): (one.get("parameters") or {}).get("weight", shared.get("weight")) for one in models
    }
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
    return _searched(record, genome, filters, rows)


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
    return {"genome": genome, **rest}, Chosen(held, filters, float(np.nanmean(moved)))


def _value(setting: Any, name: str) -> float:
    found = documented(setting, name)
    return np.nan if found is None else found


def _check(setting: Any, place: str) -> None:
    entries = setting if isinstance(setting, list) else []
    plain = setting is None or isinstance(setting, int | float | list)
    if not plain or not all(
        isinstance(entry, Mapping) and isinstance(entry.get("value"), int | float) for entry in entries
    ):
        raise InputError(
            f"{place}: expected a number, or filters with a number each, found {setting!r}.",
            "Weights that change from layer to layer are not read: give each layer a filter.",
        )


# -- what filters pick -------------------------------------------------------------------------------------------


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


def frozen_patterns(chosen: Chosen, names: Sequence[str]) -> list[str]:
    """Patterns, with ``*`` for any text, of the tensors that a merge freezes.

    Args:
        chosen: What its weights say.
        names: The models' tensors; empty where they are not at hand.
    """
    if not chosen.frozen:
        return []
    patterns = [f"*{one}*" for one in chosen.frozen]
    numbers = {chosen.filters.index(one) for one in chosen.frozen}
    held = [name for name, number in picked(chosen.filters, names).items() if number in numbers]
    wide = [name for name in names if any(one in name for one in chosen.frozen)]
    return patterns if set(held) == set(wide) else held
