"""Whether a configuration gives as many layers as a checkpoint has tensors of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ecotone.merging.models.names import module_names

_COUNTS = re.compile(r"layer|depth|block")  # in the names of fields that count layers


@dataclass(frozen=True)
class Depth:
    """Layers of one list of a module whose number is not that of the checkpoint's.

    Args:
        path: The list's name in the module.
        made: The number of layers that the configuration makes.
        stored: The number of layers that the checkpoint has tensors of.
        fields: Fields of the configuration with the number ``made``.
    """

    path: str
    made: int
    stored: int
    fields: tuple[str, ...]

    def __str__(self) -> str:
        """One sentence with the field, what is stored and what it says."""
        field = " or ".join(self.fields) or "the number of layers"
        return (
            f"config.json: {field}: expected {self.stored}, as the checkpoint has tensors of {self.path}.0 to "
            f"{self.path}.{self.stored - 1}, found {self.made}."
        )


def differences(module: nn.Module, names: Iterable[str]) -> list[Depth]:
    """The lists of layers of which a checkpoint has tensors of more or fewer than the module has layers.

    Layers that transformers knows to leave unread, such as those that predict more tokens, do not count.

    Args:
        module: A module of transformers; it may be on the device ``meta``.
        names: The names of the checkpoint's tensors.
    """
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "to_dict"):
        return []
    fields: dict[str, Any] = config.to_dict()
    unread = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    more = sum(value for key, value in _numbers(fields) if key.endswith("num_nextn_predict_layers"))
    targets = [name for name in module_names(module, names) if not any(re.search(one, name) for one in unread)]
    found = []
    for path, layers in module.named_modules():
        listed = type(layers) is nn.ModuleList and len(layers) > 0 and not re.search(r"\.\d+\.", path)
        if not listed or not next(iter(layers.children())).state_dict():
            continue
        pattern = re.compile(rf"(?:^|\.){re.escape(path)}\.(\d+)\.")
        stored = max((int(one[1]) + 1 for one in map(pattern.search, targets) if one), default=0)
        if stored and stored != len(layers) and not len(layers) < stored <= len(layers) + more:
            counts = tuple(key for key, value in _numbers(fields) if value == len(layers) and _COUNTS.search(key))
            found.append(Depth(path, len(layers), stored, counts))
    return found


def _numbers(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """The whole numbers of a configuration and its parts, by the names of their fields."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            yield prefix + key, value
