"""Statistics of layers for operators that prepare: of each expert, over the tasks that are its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ecotone.fitness.heads import outputs
from ecotone.fitness.preparing.layers import Unit
from ecotone.fitness.statistics.kinds import Data
from ecotone.fitness.statistics.layers import Masks, Take, mask_of, observable_layers, observe, output_rows
from ecotone.fitness.statistics.moments import (
    Moments,
    SlopeSettings,
    fisher_of,
    inputs_of,
    slopes_of,
    together,
    with_one,
)
from ecotone.merging.operators.whole import FromData, FromSlopes, Known, Wanted


class _PassedError(Exception):
    """All that is wanted of a forward pass has been seen."""


@dataclass(frozen=True)
class Gathered:
    """Statistics of one expert, by the names of modules.

    Args:
        inputs: (in + 1, in + 1) means of x xᵀ, a 1 appended to x.
        slopes: (out, out) means of g gᵀ.
        fisher: (out, in + 1) diagonals of the Fisher information.
        outputs: (in + 1, out) means of x yᵀ.
        rows: Numbers of rows.
    """

    inputs: Mapping[str, Tensor]
    slopes: Mapping[str, Tensor]
    fisher: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    rows: Mapping[str, int]


GROUP_BYTES = 4 * 2**30
"""Bytes of the statistics of all experts that are held at a time; layers beyond that are observed in another pass."""


def groups(
    layers: Mapping[str, nn.Module], wanted: Sequence[Wanted], experts: int, limit: int | None = None
) -> list[list[str]]:
    """Layers in runs whose statistics take at most ``limit`` bytes together, or one layer.

    Args:
        layers: Linear layers, by name.
        wanted: The statistics.
        experts: How many experts there are.
        limit: Bytes; None is ``GROUP_BYTES``.
    """
    found: list[list[str]] = []
    total, most = 0, GROUP_BYTES if limit is None else limit
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        turned = weight.ndim == 2 and not isinstance(layer, nn.Linear)
        rows, columns = weight.shape[::-1] if turned else (len(weight), weight[0].numel())
        sizes = {"inputs": (columns + 1) ** 2, "slopes": rows**2, "fisher": rows * (columns + 1)}
        taken = 8 * experts * sum(sizes.get(kind, rows * (columns + 1)) for kind in wanted)
        if not found or total + taken > most:
            found.append([])
            total = 0
        found[-1].append(name)
        total += taken
    return found


def called(model: nn.Module, data: Data, batch: int) -> list[str]:
    """The layers that the data reach, in the order of their first calls."""
    seen: dict[str, None] = {}
    observe(model, observable_layers(model), data, batch, lambda name, _: seen.setdefault(name))
    return list(seen)


def slopes_and_fisher(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    tasks: Sequence[Data],
    wanted: Sequence[Wanted],
    operator: FromData,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, int]]:
    """The means of g gᵀ and the diagonals of the Fisher information of an expert, as far as they are wanted.

    Returns:
        Both, by layer, and the number of rows of each layer.
    """
    given = {"batch": operator.batch, **({"passes": operator.passes} if isinstance(operator, FromSlopes) else {})}
    settings = SlopeSettings.model_validate(given)
    found: list[dict[str, Tensor]] = []
    rows: dict[str, int] = {}
    for kind, of in (("slopes", slopes_of), ("fisher", fisher_of)):
        whole = together(of(model, layers, task, settings) for task in (tasks if kind in wanted else ()))
        rows |= whole.rows()
        found.append(whole.means())
    return found[0], found[1], rows


def inputs_over(
    model: nn.Module, layers: Mapping[str, nn.Module], tasks: Sequence[Data], batch: int, ends: str | None = None
) -> Moments:
    """Sums of x xᵀ of the layers over several tasks.

    Args:
        model: The module.
        layers: Layers of it.
        tasks: The data.
        batch: Examples in a pass.
        ends: The module after which a pass is broken off; None makes whole passes.
    """
    with _ending(model, ends):
        return together(inputs_of(model, layers, task, batch) for task in tasks)


def outputs_by_row(
    model: nn.Module, layers: Mapping[str, nn.Module], task: Data, batch: int, ends: str | None = None
) -> dict[str, list[Tensor]]:
    """(rows, out) outputs of each call of each layer, in the order of the calls, on the CPU."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    with _ending(model, ends), torch.no_grad():
        for inputs in task.examples.batches(batch):
            with recording(layers, mask_of(inputs), found):
                outputs(model, inputs)
    return found


@contextmanager
def recording(layers: Mapping[str, nn.Module], masks: Masks, found: Mapping[str, list[Tensor]]) -> Iterator[None]:
    """Append to ``found`` the (rows, out) outputs of each call of the layers in the passes that are made meanwhile."""

    def seen(name: str, layer: nn.Module, _inputs: Any, made: Tensor) -> None:
        found[name].append(output_rows(layer, made, masks.of(name)).cpu())

    handles = [layer.register_forward_hook(partial(seen, name), prepend=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def outputs_over(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    task: Data,
    own: Mapping[str, list[Tensor]],
    batch: int,
    ends: str | None = None,
) -> Moments:
    """Sums of x yᵀ, (in + 1, out): x what reaches the layers in this model, y the expert's own outputs by row."""
    found = Moments()
    with _ending(model, ends):
        observe(model, layers, task, batch, beside(own, found))
    return found


def beside(own: Mapping[str, list[Tensor]], found: Moments) -> Take:
    """Takes rows of inputs x, and adds up x yᵀ, (in + 1, out), with the rows y that it takes out of ``own`` in turn."""

    def take(name: str, rows: Tensor) -> None:
        targets = own[name].pop(0).to(rows.device)
        found.add(name, with_one(rows).mT @ targets.double(), len(rows))

    return take


@contextmanager
def _ending(model: nn.Module, ends: str | None) -> Iterator[None]:
    """Have passes of the model end, without a result, after one of its modules."""
    if ends is None:
        yield
        return

    def stop(*_: object) -> None:
        raise _PassedError

    def quiet(*given: Any, **named: Any) -> Any:
        try:
            return forward(*given, **named)
        except _PassedError:
            return None

    forward: Callable[..., Any] = model.forward
    handle = model.get_submodule(ends).register_forward_hook(stop)
    model.forward = quiet
    try:
        yield
    finally:
        del model.forward
        handle.remove()


def known_of(unit: Unit, experts: Sequence[Gathered], wanted: Sequence[Wanted]) -> Known | None:
    """What an operator wants to know of a unit; None where the data of some expert do not reach it."""
    name = unit.module
    if name is None:
        return None
    columns = slice(None) if unit.at.folded else slice(None, -1)
    rows = unit.rows or slice(None)
    cuts: dict[str, tuple[slice, ...]] = {
        "inputs": (columns, columns),
        "slopes": (rows, rows),
        "fisher": (rows, columns),
        "outputs": (columns, rows),
    }
    found: dict[str, list[Tensor]] = {}
    for kind in wanted:
        by_expert = [getattr(one, kind) for one in experts]
        if any(name not in one for one in by_expert):
            return None
        found[kind] = [one[name][cuts[kind]] for one in by_expert]
    return Known(**found, rows=[one.rows.get(name, 0) for one in experts], thresholds=())
