"""The tensors of a base that an adapter's names mean.

PEFT names the modules of the model that it has wrapped, and a checkpoint's names are often others
(``ecotone.merging.models.names``). A name that the checkpoint has is taken as it is. Any other is looked up in the
module that transformers makes of the base.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from ecotone.merging.models import architectures
from ecotone.merging.models.layout import Layout
from ecotone.merging.models.model import Model
from ecotone.merging.models.names import Place, Scattered, names_of, shapes_of
from ecotone.populations.errors import InputError

Spot = Place | Scattered | None
"""Where a tensor of a checkpoint lies in a module's tensor; None where it is the whole of it, as it is."""


@dataclass(frozen=True)
class Target:
    """A module's tensor, and the tensors of a checkpoint that are parts of it.

    Args:
        name: The module's tensor.
        shape: Its shape.
        spots: By the checkpoint's name, where each part lies.
    """

    name: str
    shape: tuple[int, ...]
    spots: Mapping[str, Spot]

    @property
    def whole(self) -> str | None:
        """The checkpoint's tensor that is the whole of it, if there is one."""
        names = [name for name, spot in self.spots.items() if spot is None]
        return names[0] if len(names) == len(self.spots) == 1 else None


class Targets:
    """Finds the tensors of a base by the names of its modules.

    Args:
        base: The base.
        aliases: Names of tied tensors that it lacks, and the tensors in their place.
    """

    def __init__(self, base: Model, aliases: Mapping[str, str]) -> None:
        self._base, self._aliases = base, aliases
        self.failure: InputError | None = None
        """The reason why the module could not be made, where it was needed and could not."""

    def named(self, name: str) -> Target | None:
        """The tensor of a name, or None."""
        kept = self._aliases.get(name, name)
        if kept in self._base.tensors:
            return Target(name, self._base.tensors[kept].shape, {name: None})
        known = self._module()
        found = None if known is None else known.named(name)
        if known is None or found is None or found not in known.spots:
            return None
        return Target(found, known.shapes[found], known.spots[found])

    def parameters(self, module: str, wanted: Collection[str]) -> tuple[list[str], bool]:
        """The parameters of a module that an adapter changes one by one.

        Args:
            module: Its name.
            wanted: Ends of the names of parameters.

        Returns:
            Names in the order in which the module has them, and whether its stacks are (E, in, out).
        """
        known = self._module()
        found = None if known is None else known.submodule(module)
        if known is None or found is None:
            return [], False
        place = known.module.get_submodule(found)
        names = [f"{found}.{name}" for name, _ in place.named_parameters(recurse=False)]
        chosen = [name for name in names if any(name == one or name.endswith(f".{one}") for one in wanted)]
        return chosen, bool(getattr(place, "is_transposed", False))

    def beside(self, name: str) -> list[Target]:
        """All tensors of the module that has the tensor called ``name``, itself included."""
        module = name.rpartition(".")[0]
        names = [one for one in self._base.tensors if one.rpartition(".")[0] == module]
        if not names:
            known = self._module()
            names = [] if known is None else [one for one in known.spots if one.rpartition(".")[0] == module]
        return [target for one in names if (target := self.named(one)) is not None]

    def _module(self) -> _Known | None:
        if not self._base.is_hugging_face or self.failure is not None:
            return None
        try:
            return _known(_Same(self._base))
        except InputError as error:
            self.failure = error
            return None


@dataclass(frozen=True)
class _Known:
    """The module of a base, without weights, and where the base's tensors lie in its own."""

    module: nn.Module
    shapes: Mapping[str, tuple[int, ...]]
    spots: Mapping[str, Mapping[str, Spot]]
    modules: frozenset[str]

    def named(self, name: str) -> str | None:
        """The module's name of a tensor: as it is, or with or without the prefix of the base model."""
        return next((one for one in self._ways(name) if one in self.shapes), None)

    def submodule(self, name: str) -> str | None:
        """The name of a part of the module, likewise."""
        return next((one for one in self._ways(name) if one in self.modules), None)

    def _ways(self, name: str) -> list[str]:
        prefix = str(getattr(self.module, "base_model_prefix", "") or "")
        return [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")] if prefix else [name]


class _Same:
    """A base that is equal to itself alone, so that what is known of it can be kept."""

    def __init__(self, base: Model) -> None:
        self.base = base

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.base is self.base

    def __hash__(self) -> int:
        return id(self.base)


@lru_cache(maxsize=1)
def _known(same: _Same) -> _Known:
    module = architectures.outline(same.base)
    names = names_of(module, Layout.of(same.base))
    shapes = shapes_of(module)
    spots: dict[str, dict[str, Spot]] = {}
    for place in names.places.values():
        spots.setdefault(place.target, {})[place.name] = None if place.whole else place
    for one in names.scattered.values():
        for target in one.targets:
            spots.setdefault(target, {})[one.name] = one
    return _Known(module, shapes, spots, frozenset(name for name, _ in module.named_modules()))
