"""The tensors of a merge's models that are kept in memory, and on which device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ecotone.merging.kernel.lazy import SPAN, Source, fill
from ecotone.merging.kernel.materialise import Stretch
from ecotone.merging.memory import Memory
from ecotone.merging.models.layout import Layout
from ecotone.merging.models.model import Model
from ecotone.merging.operators.task_vectors import Pieces
from ecotone.merging.placement import Free, Placement, Wish, chosen

CPU = torch.device("cpu")


class Held:
    """The tensors of the J models that are mixed. It reads them, and keeps some in memory.

    Args:
        models: The J models.
        memory: The memory that they take.
        wish: The place where the recipe asks to keep them.
    """

    loads: int

    def __init__(self, models: Sequence[Model], memory: Memory, wish: Wish) -> None:
        self.kept: dict[torch.device, dict[str, list[Tensor]]] = {}
        """By device and tensor name, the J flat tensors that are kept there."""
        self.loads = 0
        """Tensors read so far, each model's counted."""
        self._models, self._memory, self._wish = models, memory, wish
        self._placed: dict[torch.device, Placement] = {}

    def read(self, name: str) -> list[Source]:
        """J flat tensors, memory-mapped or formed as they are read: ``name`` as the models hold it."""
        self.loads += len(self._models)
        return [model.flat(name) for model in self._models]

    @cached_property
    def pieces(self) -> Pieces:
        """The tensors as operators stream them, the same for all settings."""
        return Pieces(self._memory.layout, self.read)

    def placed(self, device: torch.device) -> Placement:
        """The place of the tensors for merges on a device. ``auto`` is settled at its first use there."""
        if self._wish == "device" and device.type == "cpu":
            return "host"
        if self._wish != "auto":
            return self._wish
        device = numbered(device)
        if device not in self._placed:
            self._placed[device] = chosen(self._memory.needs(device), Free.here(device), device)
        return self._placed[device]

    def place(self, device: torch.device, placement: Placement) -> None:
        """Fix the placement that ``auto`` means on a device."""
        self._placed[numbered(device)] = placement

    def near(self, name: str, device: torch.device) -> Sequence[Source]:
        """J flat tensors from their place for merges on ``device``. Keeps them there if they are not kept yet."""
        placement = self.placed(device)
        if placement == "mapped":
            return self.read(name)
        kept = self.kept.setdefault(numbered(device) if placement == "device" else CPU, {})
        if name not in kept:
            kept[name] = self._copied(name, numbered(device), placement)
        return kept[name]

    def _copied(self, name: str, device: torch.device, placement: Placement) -> list[Tensor]:
        """J flat tensors in memory. A tensor that several models share is there once."""
        held: dict[tuple[int, torch.dtype], Tensor] = {}
        sources = self.read(name)
        keys = [(s.data_ptr() if isinstance(s, Tensor) else id(s), s.dtype) for s in sources]
        for key, source in zip(keys, sources, strict=True):
            if key in held:
                continue
            if placement == "device":
                held[key] = torch.empty(source.numel(), dtype=source.dtype, device=device)
                fill(held[key], source if isinstance(source, Tensor) else source.to(device))
            else:
                held[key] = torch.empty(source.numel(), dtype=source.dtype, pin_memory=device.type == "cuda")
                fill(held[key], source)
        return [held[key] for key in keys]


def as_rows(layout: Layout, models: int, read: Callable[[str], Stretch]) -> Stretch:
    """J vectors (n,) in the type in which they are summed.

    Args:
        layout: The flat vector.
        models: J.
        read: By tensor name, its stretch of the J models that are mixed.
    """
    kind = torch.float64 if torch.float64 in layout.dtypes else torch.float32
    rows = list(torch.empty(models, layout.size, dtype=kind))
    for name, start in zip(layout.tensors, layout.tensor_borders[:-1].tolist(), strict=True):
        stretch = read(name)
        for low in range(0, stretch.size, SPAN):
            for row, piece in zip(rows, stretch[low : low + SPAN].tensors(), strict=True):
                row[start + low : start + low + piece.numel()] = piece
    return Stretch(rows)


def numbered(device: torch.device) -> torch.device:
    """The device as tensors name it: a CUDA device with its number."""
    unnumbered = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if unnumbered else device
