"""Whether the weights of a merge's models are numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ecotone.merging.kernel.lazy import SPAN, formed
from ecotone.merging.models.layout import Layout
from ecotone.merging.models.model import Model
from ecotone.populations.errors import InputError


def with_nan(layout: Layout, models: Iterable[Model]) -> list[str]:
    """Names of the models of which some merged weight is NaN.

    Reads all weights up to the first NaN of each model; those that models share, as adapters do their base's, once.
    """
    known: dict[tuple[int, str], bool] = {}

    def holds(model: Model, name: str) -> bool:
        key = (id(model.holder(name)), name)
        if key not in known:
            known[key] = has_nan(model, name)
        return known[key]

    return [model.name for model in models if any(holds(model, name) for name in layout.tensors)]


def has_nan(model: Model, name: str) -> bool:
    """Whether a tensor of a model holds NaN."""
    source = model.flat(name)
    pieces = (formed(source[at : at + SPAN]) for at in range(0, source.numel(), SPAN))
    return any(bool(torch.isnan(piece).any()) for piece in pieces)


def refuse_nan(names: Sequence[str], *, or_base: bool = False) -> None:
    """Refuse weights that are NaN: every merge with them is NaN, and scores alone may not show it.

    Args:
        names: Names of the models that have NaN among their weights.
        or_base: Whether the base may have them in the experts' place.

    Raises:
        InputError: There are such models.
    """
    if names:
        raise InputError(
            f"models: expected numbers as weights, found NaN in {', '.join(names)}"
            f"{' or in the base' if or_base else ''}.",
            "Download or export the checkpoint again.",
        )
