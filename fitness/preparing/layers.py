"""The layers of the models of a merge: which tensors are matrices, which are their biases, which module has them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecotone.fitness.statistics.layers import CONVOLUTIONS, linear_layers
from ecotone.merging.models.layout import Layout
from ecotone.merging.models.names import Names, Place
from ecotone.merging.operators.whole import Layer, LayerKind

_TABLES = re.compile(
    r"(^|[._])(embed\w*|wte|wpe|shared|lm_head|embed_out|\w*embeddings?|relative_attention_bias)([._]|$)", re.IGNORECASE
)
_EXPERTS = re.compile(r"(^|[._])experts?([._]|$)")


@dataclass(frozen=True)
class Unit:
    """A layer, with the places of its tensors.

    Args:
        at: The layer as operators see it.
        bias: The name of its bias in the checkpoints; None without one, or where it is prepared by itself.
        module: The name of the module that has it; None where there is no module.
        rows: The rows of the module's outputs that are this tensor's, where a module fuses several; None for all.
        turned: Whether the checkpoint holds the matrix as (in, out).
        stacked: Whether the tensor is a stack of matrices.
    """

    at: Layer
    bias: str | None = None
    module: str | None = None
    rows: slice | None = None
    turned: bool = False
    stacked: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return (self.at.name,) if self.bias is None else (self.at.name, self.bias)

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(out, in) of a weight, the bias as the last column where it is folded."""
        whole = weight.mT if self.turned else weight.reshape(len(weight), -1)
        return whole if bias is None else torch.cat([whole, bias.reshape(-1, 1)], 1)

    def parts(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """The tensors of a matrix, as the checkpoints shape them, in the order of ``names``."""
        weight = matrix if self.bias is None else matrix[:, :-1]
        shaped = (weight.mT if self.turned else weight).reshape(self.at.shape)
        return (shaped,) if self.bias is None else (shaped, matrix[:, -1])


def whole_tensors(layout: Layout) -> list[Unit]:
    """All tensors of a layout as units by themselves, for operators that prepare every element by itself."""
    return [Unit(Layer(name, "rest", tuple(info.shape))) for name, info in layout.parameters.items()]


def units(
    layout: Layout, model: Any = None, names: Names | None = None, *, folds: bool = False, observes: bool = False
) -> list[Unit]:
    """All tensors of a layout as units, in its order.

    Args:
        layout: The flat vector.
        model: The module that shows merges, if there is one. Without it sorts of layers are told by shapes and names.
        names: The correspondence of the checkpoints' tensors and the module's.
        folds: Whether biases are prepared with their weights.
        observes: Whether only layers of the module count as matrices, because they are to be observed.
    """
    of_modules = {} if names is None or not isinstance(model, nn.Module) else _of_modules(layout, model, names, folds)
    taken = {name for unit in of_modules.values() for name in unit.names}
    found = []
    for name, info in layout.parameters.items():
        if name in of_modules:
            found.append(of_modules[name])
        elif name not in taken:
            found.append(_by_shape(layout, name, info.shape, folds and not of_modules, observes=observes))
    biases = {unit.bias for unit in found}
    return [unit for unit in found if unit.at.name not in biases]


def _by_shape(layout: Layout, name: str, shape: Sequence[int], folds: bool, observes: bool) -> Unit:
    """A unit as its shape and name tell. What is to be observed is a layer of the module."""
    kind: LayerKind = "rest"
    if len(shape) >= 2 and _TABLES.search(name):
        kind = "embedding"
    elif len(shape) == 3 and _EXPERTS.search(name):
        return Unit(Layer(name, "linear", tuple(shape)), stacked=True)
    elif len(shape) >= 3 and name.endswith("weight"):
        kind = "convolution"
    elif len(shape) == 2 and not observes:
        kind = "linear"
    bias = f"{name.removesuffix('weight')}bias" if name.endswith("weight") else ""
    known_bias = layout.parameters.get(bias)
    own = folds and kind in ("linear", "convolution") and known_bias is not None and known_bias.shape == (shape[0],)
    return Unit(Layer(name, kind, tuple(shape), own), bias if own else None)


def _of_modules(layout: Layout, model: nn.Module, names: Names, folds: bool) -> dict[str, Unit]:
    """The linear layers and convolutions of a module, by the name of their weight in the checkpoints."""
    by_target: dict[str, list[Place]] = {}
    for place in names.places.values():
        by_target.setdefault(place.target, []).append(place)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = linear_layers(model)
    found: dict[str, Unit] = {}
    for module_name, module in model.named_modules():
        is_linear = module_name in linear
        if not is_linear and not isinstance(module, CONVOLUTIONS):
            continue
        weight = module.weight
        kind: LayerKind = "embedding" if module is head else "linear" if is_linear else "convolution"
        turned = is_linear and not isinstance(module, nn.Linear)
        for place in by_target.get(f"{module_name}.weight", ()):
            rows = _rows(place, tuple(weight.shape), turned)
            if rows is None or place.name not in layout.parameters:
                continue
            bias = (
                _bias(by_target.get(f"{module_name}.bias", ()), rows, layout) if folds and kind != "embedding" else None
            )
            at = Layer(place.name, kind, layout.parameters[place.name].shape, bias is not None)
            whole = rows == slice(0, weight.shape[1 if turned else 0])
            found[place.name] = Unit(at, bias, module_name, None if whole else rows, turned)
    return found


def _rows(place: Place, shape: Sequence[int], turned: bool) -> slice | None:
    """The rows of a module's weight that a checkpoint's tensor is; None where it is no run of whole rows."""
    if place.whole:
        return slice(0, shape[1 if turned else 0])
    width = shape[1] if len(shape) == 2 else 0
    if turned or not width or len(place.shape) != 2 or place.stride != (width, 1) or place.offset % width:
        return None
    first = place.offset // width
    return slice(first, first + place.shape[0]) if place.shape[1] == width else None


def _bias(places: Sequence[Place], rows: slice, layout: Layout) -> str | None:
    """The checkpoint's tensor that is the bias of these rows."""
    for place in places:
        first = 0 if place.whole else place.offset
        if place.name in layout.parameters and first == rows.start and place.shape == (rows.stop - rows.start,):
            return place.name
    return None


def sorted_by_module(found: Sequence[Unit]) -> dict[str | None, list[Unit]]:
    """Matrices by the names of the modules that have them; under None all that no module of layers has."""
    by_module: dict[str | None, list[Unit]] = {}
    for unit in found:
        by_module.setdefault(unit.module if unit.at.kind in ("linear", "convolution") else None, []).append(unit)
    return by_module


def stages(model: nn.Module, order: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Blocks of a module in the order in which they are called, each with its linear layers.

    A block is a member of the outermost ``ModuleList`` that a layer lies in; a layer that lies in none is one by
    itself.

    Args:
        model: The module.
        order: Names of linear layers, in the order in which the module calls them.
    """
    modules = dict(model.named_modules())
    found: dict[str, list[str]] = {}
    for name in order:
        found.setdefault(_block(name, modules), []).append(name)
    yield from found.items()


def _block(name: str, modules: Mapping[str, nn.Module]) -> str:
    parts = name.split(".")
    for count in range(1, len(parts)):
        if isinstance(modules.get(".".join(parts[:count])), nn.ModuleList):
            return ".".join(parts[: count + 1])
    return name
