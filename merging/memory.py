"""The memory that merging takes, computed from the headers of the models alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ecotone.merging.inner_products import region_borders
from ecotone.merging.kernel.materialise import COMPILED_SPAN, DEVICE_SPAN
from ecotone.merging.models.layout import Layout
from ecotone.merging.models.model import Model
from ecotone.merging.placement import Bytes, Needs, Placement

RESIDENT_BYTES = 256 * 2**20  # what is mixed is kept in main memory, as rows, where it fits in this
TUNED = 2  # settings of genomes' own for which what is mixed is kept


@dataclass(frozen=True)
class Memory:
    """The bytes that the models of a merge, and merging them, take.

    Args:
        layout: The flat vector of n parameters.
        models: The J models that are mixed.
        columns: K, the coefficients of a segment.
        changes: Whether the operator mixes others in place of the models.
        mapped: Whether nothing is to be kept in memory.
    """

    layout: Layout
    models: Sequence[Model]
    columns: int
    changes: bool
    mapped: bool

    @property
    def formed(self) -> bool:
        """Whether mixed tensors are computed first, because files do not hold them."""
        return self.changes or not all(model.stored for model in self.models)

    @property
    def row_bytes(self) -> int:
        """Bytes of all models as rows of numbers, where models are kept as rows; else 0."""
        types = {dtype == torch.float64 for dtype in self.layout.dtypes}
        size = len(self.models) * self.layout.size * (8 if True in types else 4)
        return size if len(types) == 1 and size <= RESIDENT_BYTES and not self.mapped else 0

    def needs(
        self,
        device: torch.device,
        dtype: torch.dtype | None = None,
        threads: int = 1,
        stack: int = 0,
        settings: bool = False,
    ) -> Needs:
        """The memory that a worker takes.

        Args:
            device: The device on which the worker merges.
            dtype: The type of the worker's model; None is the type of the checkpoints.
            threads: CPU threads of the worker.
            stack: Bytes of the candidates that the worker merges in one pass; 0 where it merges them in place.
            settings: Whether genomes have operator settings of their own. Rows of the latest settings are then kept.
        """
        rows = self.row_bytes * (1 + TUNED if settings and self.changes else 1)
        as_rows = device.type != "cuda" and self.formed and rows > 0
        buffers = self._chunk_bytes(COMPILED_SPAN, 2) * threads + self._gram_bytes + self._working_bytes
        buffers += 2 * stack + (rows if stack and not as_rows else 0)
        model = self._model_bytes(dtype)
        if device.type == "cuda":
            return self._on_device(model, buffers, stack)
        kept = Bytes(host=rows if as_rows else self._kept_bytes())
        places: dict[Placement, Bytes] = {"device": kept, "host": kept, "mapped": Bytes()}
        return Needs(Bytes(host=model), Bytes(host=buffers), places, formed=as_rows)

    def _on_device(self, model: int, buffers: int, stack: int) -> Needs:
        staged = 2 * _power_of_two(self._chunk_bytes(DEVICE_SPAN, 1))
        on_device = Bytes(2 * stack + self._chunk_bytes(DEVICE_SPAN, 4), buffers + staged)
        locked = Bytes(host=self._kept_bytes(locked=True))
        return Needs(Bytes(model), on_device, {"device": Bytes(self._kept_bytes()), "host": locked, "mapped": Bytes()})

    def _model_bytes(self, dtype: torch.dtype | None) -> int:
        parameters = sum(info.size * (dtype or info.dtype).itemsize for info in self.layout.parameters.values())
        return parameters + sum(info.nbytes for info in self.layout.buffers.values())

    def _kept_bytes(self, *, locked: bool = False) -> int:
        """Bytes of the J models as they are kept, shared tensors once; page-locked ones take a power of two."""
        infos = [
            holder.tensors[name]
            for name in self.layout.tensors
            for holder in {id(held): held for held in (model.holder(name) for model in self.models)}.values()
        ]
        return sum(_power_of_two(info.nbytes) if locked else info.nbytes for info in infos)

    @property
    def _working_bytes(self) -> int:
        """Bytes for reading one tensor of one model, or one of every model for an operator that changes them."""
        sizes = [sum(model.working_bytes(name) for model in self.models) for name in self.layout.tensors]
        return sum(sizes) if self.changes else max(sizes)

    def _chunk_bytes(self, span: int, copies: int) -> int:
        """The most bytes that a thread takes for a chunk: ``copies`` of each source, and the sum."""
        span = min(span, max(info.size for info in self.layout.parameters.values()))
        width = 8 if torch.float64 in self.layout.dtypes else 4
        return span * width * (copies * len(self.models) + (6 if copies > 1 else 0))

    @property
    def _gram_bytes(self) -> int:
        """The Gram table, its sums, and a copy to send."""
        regions = len(region_borders(self.layout, self.columns))
        return 8 * regions * (3 * self.columns**2 + 2)


def _power_of_two(count: int) -> int:
    """Bytes of page-locked memory that torch allocates for ``count`` bytes."""
    return 1 << max(0, count - 1).bit_length()
