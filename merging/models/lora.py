"""LoRA adapters as PEFT stores them (Hu et al. 2022, arXiv:2106.09685), opened as models that are formed when read.

    expert = base + scale * B @ A      scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

No merged copy exists, on disk or in memory: a piece of the expert is formed when it is read, in float32 (float64 where
the base is), and rounded nowhere in between. ``ecotone.merging.models.lora_changes`` has what an adapter may do to a
tensor, ``ecotone.merging.models.lora_reader`` how its files say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ecotone.merging.kernel.lazy import Source, formed
from ecotone.merging.kernel.materialise import SMALL
from ecotone.merging.models import lora_reader
from ecotone.merging.models.checkpoint import Checkpoint, default_name, located
from ecotone.merging.models.layout import aliases_of, has_token_rows
from ecotone.merging.models.lora_changes import Changes, InMemory, Weights
from ecotone.merging.models.matching import with_own_outputs
from ecotone.merging.models.model import Model, TensorInfo, Wrapper, mergekit_place
from ecotone.merging.models.ties import INPUT_EMBEDDINGS


@dataclass(frozen=True)
class Adapter:
    """An expert that is a base and a LoRA adapter. Use ``Adapter.open``.

    Args:
        path: The adapter's directory.
        name: The expert's name in reports.
        base: The model it was trained on.
        weights: The adapter's own tensors.
        settings: Its ``adapter_config.json``.
        changes: By tensor of the base, what the adapter does to it, one after the other.
    """

    path: Path
    name: str
    base: Model
    weights: Weights
    settings: Mapping[str, Any]
    changes: Changes

    @classmethod
    def open(cls, path: str | Path, base: Model, name: str | None = None) -> Adapter:
        """Open an adapter; only headers are read (and, of tied embeddings that it stores twice, the bytes).

        Args:
            path: A directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
            base: The model it was trained on. If the adapter changes an output or an embedding that are one tensor
                there, it is read as an untied model, as PEFT computes it.
            name: The expert's name in reports; the directory's name by default.

        Raises:
            CheckpointError: It cannot be read, is no LoRA, or does not fit the base.
        """
        place = located(path)
        weights = Checkpoint.open(lora_reader.weights_of(place), name or default_name(place))
        settings = lora_reader.settings_of(place, weights.tensors)
        try:
            changes = lora_reader.read(place, base, weights, settings)
        except lora_reader.TiedBaseError:
            apart = with_own_outputs(base)
            if apart is None or settings.get("ensure_weight_tying"):
                raise
            base, changes = apart, lora_reader.read(place, apart, weights, settings)
        return cls(place, weights.name, base, weights, settings, changes)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], base: Model) -> Adapter:
        """An adapter that is in memory, as PEFT would store it.

        Args:
            tensors: The tensors of its ``adapter_model.safetensors``.
            settings: Its ``adapter_config.json``.
            base: Its base.

        Raises:
            CheckpointError: It does not fit the base.
        """
        path = base.path / "adapter in memory"
        weights = InMemory(path, tensors)
        return cls(path, "adapter", base, weights, settings, lora_reader.read(path, base, weights, settings))

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The base's ``config.json``."""
        return self.base.config

    @property
    def metadata(self) -> Mapping[str, str]:
        """The free text of the base's headers."""
        return self.base.metadata

    @property
    def is_hugging_face(self) -> bool:
        """Whether the base is a directory with a ``config.json``."""
        return self.base.is_hugging_face

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter's own tensors."""
        return sum(info.nbytes for info in self.weights.tensors.values())

    @property
    def stored(self) -> bool:
        """False: the tensors that it changes are computed when they are read."""
        return False

    @property
    def rows(self) -> int | None:
        """Rows of the input embedding, where the adapter stores it with another number than the base's files have."""
        found = [name for name in self.changes if has_token_rows(self.base, name)]
        found.sort(key=lambda name: not name.endswith(INPUT_EMBEDDINGS))
        kept = [(name, self.tensors[name].shape[0]) for name in found]
        return next((rows for name, rows in kept if rows != self.base.tensors[name].shape[0]), self.base.rows)

    @property
    def files(self) -> Path:
        """The base's: an adapter has no ``config.json``."""
        return self.base.files

    @property
    def tokenizer(self) -> Path:
        """The adapter's directory."""
        return self.path

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """By name, the shape and type of the expert's tensors; the type is the one they are formed in."""
        left_out = aliases_of(self.base)
        infos = {name: info for name, info in self.base.tensors.items() if name not in left_out}
        for name, changes in self.changes.items():
            for change in changes:
                infos[name] = change.info(infos[name], self.weights)
        return infos

    @cached_property
    def _large(self) -> bool:
        return 2 * sum(info.size for info in self.base.tensors.values()) > SMALL

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name``, whole; it is in memory if the adapter changes it."""
        return formed(self.flat(name)).view(self.tensors[name].shape)

    def flat(self, name: str) -> Source:
        """The tensor ``name``, flat: mapped if the adapter leaves it as it is or stores it whole."""
        flat: Source = self.base.flat(name)
        for change in self.changes.get(name, ()):
            flat = change.over(flat, self.weights, self._large)
        return flat

    def holder(self, name: str) -> Model:
        """Itself where it changes the tensor or stores it whole; else the base, or the model in it."""
        return self if name in self.changes else self.base.holder(name)

    def working_bytes(self, name: str) -> int:
        """Bytes of the factors in the type in which they are multiplied, and the bytes that the base takes."""
        changes = self.changes.get(name, ())
        replaced = any(change.replaces for change in changes)
        own = sum(change.working_bytes(self.tensors[name], self.weights) for change in changes)
        return own + (0 if replaced else self.base.working_bytes(name))

    def mergekit_reference(self) -> str:
        """The base's reference, a plus sign and its own.

        Raises:
            InputError: mergekit cannot express the base, or would read a path otherwise.
        """
        return f"{self.base.mergekit_reference()}+{mergekit_place(self.path)}"

    def record(self) -> Mapping[str, Any]:
        """Its name and path, and the record of its base."""
        return {"name": self.name, "path": str(self.path), "change": "a LoRA adapter", "of": self.base.record()}

    def named(self, name: str) -> Adapter:
        """The same expert under another name."""
        return replace(self, name=name)


def adapters_in(model: Model) -> Iterator[Adapter]:
    """The adapters in a model: itself, or what it wraps."""
    if isinstance(model, Adapter):
        yield model
    elif isinstance(model, Wrapper):
        yield from adapters_in(model.model)
