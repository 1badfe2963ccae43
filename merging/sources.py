"""The models of a merge, opened together: what a worker holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ecotone.merging import operators
from ecotone.merging.inner_products import gram_table, region_borders, vectors_of
from ecotone.merging.kernel.lazy import SPAN, Source, fill
from ecotone.merging.kernel.materialise import COMPILED_SPAN, DEVICE_SPAN, SMALL, Mixture, Stretch, Transform, mix
from ecotone.merging.models import preflight, tokenizers
from ecotone.merging.models.checkpoint import Checkpoint, Model, is_adapter, located
from ecotone.merging.models.layout import Layout
from ecotone.merging.models.lora import Adapter
from ecotone.merging.models.vocabulary import Resized, Vocabulary, fitted
from ecotone.merging.operators.base import Operator, directions, weights_of
from ecotone.merging.operators.task_vectors import Pieces
from ecotone.merging.placement import Bytes, Free, Needs, Placement, Wish, chosen
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.populations.gram import GramTable
from ecotone.populations.space import Space

RESIDENT_BYTES = 256 * 2**20  # what is mixed is kept in main memory, as rows, where it fits in this
TUNED = 2  # settings of genomes' own for which what is mixed is kept
CPU = torch.device("cpu")


class Sources:
    """The checkpoints of a merge, memory-mapped, with the operator that gives genomes their meaning.

    Use ``Sources.open``. What of them is kept in memory is a matter of their placement
    (``ecotone.merging.placement``): as the checkpoints hold them, adapters formed. Models that are small are kept as
    they are mixed, too, unless they are to be
    mapped: as a row of float32 each.

    Args:
        layout: The flat vector that the models share.
        operator: The merge operator.
        experts: K models.
        base: The base model, if there is one. Operators that need no base take from it only integer buffers and,
            on export, the configuration and tokenizer.
        placement: Where they are kept; no bit of a merge depends on it.
    """

    def __init__(
        self,
        layout: Layout,
        operator: Operator,
        experts: Sequence[Model],
        base: Model | None = None,
        placement: Wish = "auto",
    ) -> None:
        self.layout = layout
        self.operator = operator
        self.experts = tuple(experts)
        self.base = base
        self.placement = placement
        self._placed: dict[torch.device, Placement] = {}
        self._kept: dict[torch.device, dict[str, list[Tensor]]] = {}
        self._tuned: dict[Operator, Sources] = {}  # the latest comes last
        self.loads = 0
        """Tensors read so far, each checkpoint's counted."""

    @classmethod
    def open(
        cls,
        experts: Sequence[str | Path],
        base: str | Path | None = None,
        operator: str = "linear",
        names: Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        vocabulary: Vocabulary = "same",
        placement: Wish = "auto",
    ) -> Sources:
        """Open the models of a merge and check from their headers that they fit together.

        Args:
            experts: Paths of the K models to merge: safetensors files, directories, directories of LoRA adapters, or
                repositories of the Hugging Face hub that hold one of these.
            base: Path of the model they were fine-tuned from; needed by operators on task vectors and by adapters.
            operator: Name of the merge operator.
            names: K distinct names; by default those of the files or directories, made distinct.
            settings: The operator's settings by name.
            vocabulary: What to do with models of other vocabulary sizes: refuse them (``same``), cut them to the
                base's, or take the ``union`` (``ecotone.merging.models.vocabulary``).
            placement: Where the models are kept (``ecotone.merging.placement``).

        Raises:
            InputError: No expert, no such operator or setting, a base is lacking, or the names do not fit.
            CheckpointError: A model cannot be read, or two of them differ.
        """
        operation = operators.get(operator, settings or {})
        if not experts:
            raise InputError("experts: expected at least one model, found none.")
        if operation.needs_base and base is None:
            raise InputError(f"base: the operator {operator!r} needs the model the experts were fine-tuned from.")
        if names is not None and (len(names) != len(experts) or len(set(names)) != len(names)):
            raise InputError(f"names: expected {len(experts)} distinct names, found {list(names)}.")
        root = None if base is None else Checkpoint.open(base)
        opened = [_expert(path, root) for path in experts]
        labels = _distinct([expert.name for expert in opened]) if names is None else list(names)
        operation.columns(labels)
        named: list[Model] = [replace(expert, name=label) for expert, label in zip(opened, labels, strict=True)]
        models = fitted(([root] if root else []) + named, root, vocabulary)
        layout = preflight.check(models)
        return cls(layout, operation, models[-len(named) :], models[0] if root else None, placement)

    @property
    def names(self) -> tuple[str, ...]:
        """K names of the experts."""
        return tuple(expert.name for expert in self.experts)

    @property
    def checkpoints(self) -> tuple[Model, ...]:
        """The J models that are mixed: the experts, after the base when the operator needs it."""
        if self.operator.needs_base and self.base is not None:
            return (self.base, *self.experts)
        return self.experts

    @property
    def origin(self) -> Model:
        """Where buffers and configuration come from: the base, or else the first expert."""
        return self.base or self.experts[0]

    @cached_property
    def tokenizer(self) -> Path:
        """Where the tokenizer that goes with every merge is: the origin's directory, or the first that has one.

        Where vocabularies are united it is the one with the most tokens.
        """
        places = [model.path for model in (self.origin, *self.experts)]
        if isinstance(self.origin, Resized):
            return max(places, key=lambda place: len(tokenizers.vocabulary(place) or ()))
        return next((place for place in places if tokenizers.has_tokenizer(place)), self.origin.path)

    @property
    def large(self) -> bool:
        """Whether a merge is long enough for compiled loops to pay."""
        return len(self.checkpoints) * self.layout.size > SMALL

    def stretch(self, name: str) -> Stretch:
        """``name`` in every model that is mixed; the operator's work on it is done as pieces of it are used."""
        start = int(self.layout.tensor_borders[self.layout.tensors.index(name)])
        return Stretch(self._stored(name), self._transform, start)

    def near(self, name: str, device: torch.device) -> Stretch:
        """``stretch(name)`` from where the sources are kept for merges on ``device``; what is not yet kept is now."""
        device, placement = _numbered(device), self.placed(device)
        if placement == "mapped":
            return self.stretch(name)
        index = self.layout.tensors.index(name)
        start, stop = self.layout.tensor_borders[index : index + 2].tolist()
        if device.type == "cpu" and self._formed and self._matrix is not None:
            return self._matrix[start:stop]
        kept = self._kept.setdefault(device if placement == "device" else CPU, {})
        if name not in kept:
            kept[name] = self._held(name, device, placement)
        return Stretch(kept[name], self._transform, start)

    def placed(self, device: torch.device) -> Placement:
        """Where the sources are kept for merges on a device; ``auto`` is settled at its first use there."""
        if self.placement == "device" and device.type == "cpu":
            return "host"
        if self.placement != "auto":
            return self.placement
        device = _numbered(device)
        if device not in self._placed:
            self._placed[device] = chosen(self.needs(device), Free.here(device), device)
        return self._placed[device]

    def place(self, device: torch.device, placement: Placement) -> None:
        """Settle what ``auto`` means on a device."""
        self._placed[_numbered(device)] = placement

    def needs(
        self,
        device: torch.device,
        dtype: torch.dtype | None = None,
        threads: int = 1,
        stack: int = 0,
        settings: bool = False,
    ) -> Needs:
        """The memory that a worker takes, from headers alone.

        Args:
            device: Where it merges.
            dtype: Type of its model; None is the checkpoints' own.
            threads: CPU threads.
            stack: Bytes of the candidates that it merges in one pass; 0 where they are merged in place.
            settings: Whether genomes have settings of their own, for the latest of which rows are kept, too.
        """
        cuda = device.type == "cuda"
        model = sum(info.nbytes for info in self.layout.buffers.values())
        model += sum(info.size * (dtype or info.dtype).itemsize for info in self.layout.parameters.values())
        rows = self._row_bytes * (1 + TUNED if settings and self.operator.changes else 1)
        if not cuda and self._formed and rows:
            kept, buffers = rows, 2 * stack
        else:
            kept, buffers = self._stored_bytes(rounded=cuda), 2 * stack + (rows if stack else 0)
        buffers += self._chunk_bytes(COMPILED_SPAN, 2) * threads + self._gram_bytes
        places: dict[Placement, Bytes]
        if cuda:
            staged = 2 * _power_of_two(self._chunk_bytes(DEVICE_SPAN, 1))
            on_device = Bytes(2 * stack + self._chunk_bytes(DEVICE_SPAN, 4), buffers + staged)
            places = {"device": Bytes(self._stored_bytes()), "host": Bytes(host=kept), "mapped": Bytes()}
            return Needs(Bytes(model), on_device, places)
        places = {"device": Bytes(host=kept), "host": Bytes(host=kept), "mapped": Bytes()}
        return Needs(Bytes(host=model), Bytes(host=buffers), places, formed=self._formed and rows > 0)

    @property
    def _formed(self) -> bool:
        """Whether what is mixed is not what files hold."""
        return self.operator.changes or not all(isinstance(model, Checkpoint) for model in self.checkpoints)

    def _held(self, name: str, device: torch.device, placement: Placement) -> list[Tensor]:
        """J flat tensors in memory: what several models share is there once."""
        held: dict[tuple[int, torch.dtype], Tensor] = {}
        stored = self._stored(name)
        keys = [(s.data_ptr() if isinstance(s, Tensor) else id(s), s.dtype) for s in stored]
        for key, source in zip(keys, stored, strict=True):
            if key in held:
                continue
            if placement == "device":
                held[key] = torch.empty(source.numel(), dtype=source.dtype, device=device)
                fill(held[key], source if isinstance(source, Tensor) else source.to(device))
            else:
                held[key] = torch.empty(source.numel(), dtype=source.dtype, pin_memory=device.type == "cuda")
                fill(held[key], source)
        return [held[key] for key in keys]

    @property
    def _row_bytes(self) -> int:
        """Bytes of a row a model where they are kept as rows, else 0."""
        types = {dtype == torch.float64 for dtype in self.layout.dtypes}
        size = len(self.checkpoints) * self.layout.size * (8 if True in types else 4)
        return size if len(types) == 1 and size <= RESIDENT_BYTES and self.placement != "mapped" else 0

    def _stored_bytes(self, *, rounded: bool = False) -> int:
        """Bytes of the J models as they are kept; page-locked tensors take a power of two."""
        infos = [
            holder.tensors[name]
            for name in self.layout.tensors
            for holder in {id(h): h for h in (_holder(model, name) for model in self.checkpoints)}.values()
        ]
        return sum(_power_of_two(info.nbytes) if rounded else info.nbytes for info in infos)

    def _chunk_bytes(self, span: int, copies: int) -> int:
        """The most that a thread takes for a chunk: ``copies`` of each source, and what the sum takes."""
        span = min(span, max(info.size for info in self.layout.parameters.values()))
        width = 8 if torch.float64 in self.layout.dtypes else 4
        return span * width * (copies * len(self.checkpoints) + (6 if copies > 1 else 0))

    @property
    def _gram_bytes(self) -> int:
        """The Gram table, its sums, and a copy to send."""
        columns = len(self.operator.columns(self.names))
        regions = len(region_borders(self.layout, columns))
        return 8 * regions * (3 * columns**2 + 2)

    def read(self, name: str) -> list[Tensor]:
        """J flat tensors: ``name`` in every model that is mixed, memory-mapped where nothing is changed or formed."""
        return self.stretch(name).tensors()

    def buffers(self) -> dict[str, Tensor]:
        """Integer, bool and empty tensors of the base (or the first expert), by name."""
        return {name: self.origin.tensor(name) for name in self.layout.buffers}

    def space(self, dense: bool = False) -> Space:
        """What a search may know of these models; streams the weights once for the Gram table.

        Args:
            dense: Also give the (K, n) sources themselves, for evolving small models from scratch.
        """
        columns = self.operator.columns(self.names)
        gram = gram_table(self.layout, self.stretch, directions(self.operator, len(columns)), torch.get_num_threads())
        return Space(
            sources=columns,
            tensors=self.layout.tensors,
            tensor_borders=self.layout.tensor_borders,
            blocks=self.layout.blocks,
            block_borders=self.layout.block_borders,
            gram=gram,
            seeds=self.operator.seeds(len(self.experts)),
            seed_names=self.names,
            vectors=self._vectors() if dense else None,
        )

    def mixture(self, genome: Genome) -> Mixture:
        """The genome as weights over the J checkpoints.

        Raises:
            InputError: The genome is of another size, another number of sources, or another operator's settings.
        """
        if genome.size != self.layout.size:
            raise InputError(f"genome: expected {self.layout.size} parameters, found {genome.size}.")
        columns = self.operator.columns(self.names)
        if genome.sources != len(columns):
            raise InputError(
                f"genome: expected {len(columns)} coefficients a segment ({', '.join(columns)}), "
                f"found {genome.sources}."
            )
        operator = operators.tuned(self.operator, genome.parameters)
        borders, weights = weights_of(operator, genome, self.layout, lambda: self.tuned(genome)._geometry)
        return Mixture(borders, weights, genome.residual)

    def tuned(self, genome: Genome) -> Sources:
        """The same models under the operator with a genome's own settings (``Genome.parameters``).

        What is found out and kept for settings is forgotten when others have been asked for since.

        Raises:
            InputError: The operator has no such setting to search over, or it is out of range.
        """
        operator = operators.tuned(self.operator, genome.parameters)
        if operator == self.operator:
            return self
        if operator not in self._tuned:
            while len(self._tuned) >= TUNED:
                del self._tuned[next(iter(self._tuned))]
            other = copy(self)
            other.operator, other._tuned = operator, {}
            other._pieces = self._pieces
            for name in ("_transform", "_matrix", "_geometry"):
                other.__dict__.pop(name, None)
            self._tuned[operator] = other
        self._tuned[operator] = self._tuned.pop(operator)
        return self._tuned[operator]

    def materialise(self, genomes: Sequence[Genome], out: Sequence[Mapping[str, Tensor]]) -> None:
        """Write the merged weights into existing tensors, all genomes in one pass over the sources.

        Accumulates in float32 and rounds once to the type of each output tensor. A genome's result does not depend
        on the other genomes, the number of threads or the chunks.

        Args:
            genomes: B genomes.
            out: B mappings from tensor names to tensors of any floating-point type, all on one device, such as
                ``dict(model.named_parameters())``. Other names in it are left alone. They must be distinct and must
                not share memory with the sources.

        Raises:
            InputError: A genome does not fit, or a tensor is missing or of another shape.
        """
        mixtures = [self.mixture(genome) for genome in genomes]
        if len(out) != len(mixtures):
            raise InputError(f"out: expected one mapping for each of {len(mixtures)} genomes, found {len(out)}.")
        targets = [self._targets(tensors) for tensors in out]
        for tuned, members in self._groups(genomes):
            tuned._fill([mixtures[i] for i in members], [targets[i] for i in members])

    def _groups(self, genomes: Sequence[Genome]) -> Iterator[tuple[Sources, list[int]]]:
        """What genomes of the same settings mix, and their places."""
        groups: dict[Operator, list[int]] = {}
        for index, genome in enumerate(genomes):
            groups.setdefault(operators.tuned(self.operator, genome.parameters), []).append(index)
        for members in groups.values():
            yield self.tuned(genomes[members[0]]), members

    def _fill(self, mixtures: Sequence[Mixture], targets: Sequence[Sequence[Tensor]]) -> None:
        """Write merges into tensors in the order of the layout."""
        borders = self.layout.tensor_borders
        with torch.no_grad():
            for index, name in enumerate(self.layout.tensors):
                views = [target[index] for target in targets]
                flat = [v.view(-1) if v.is_contiguous() else v.new_empty(v.numel()) for v in views]
                mix(self.near(name, flat[0].device), int(borders[index]), mixtures, flat, self.large)
                for view, values in zip(views, flat, strict=True):
                    if not view.is_contiguous():
                        view.copy_(values.view(view.shape))

    def stack(
        self, genomes: Sequence[Genome], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Merge B genomes of a small model at once.

        Args:
            genomes: B genomes.
            dtype: Type of the result; the models' own by default (float32 when they mix types).
            device: Where the result goes.

        Returns:
            By tensor name, (B, *shape) views of one new (B, n) buffer.

        Raises:
            InputError: A genome does not fit.
        """
        mixtures = [self.mixture(genome) for genome in genomes]
        here = CPU if self._row_bytes else torch.device(device)
        buffer = torch.empty(len(mixtures), self.layout.size, dtype=dtype or self.layout.dtype, device=here)
        for tuned, members in self._groups(genomes):
            rows = [buffer[i] for i in members]
            if tuned._matrix is not None:
                mix(tuned._matrix, 0, [mixtures[i] for i in members], rows, self.large)
            else:
                self.materialise([genomes[i] for i in members], [self._views(row) for row in rows])
        return self._views(buffer.to(device))

    def _stored(self, name: str) -> list[Source]:
        """J flat tensors, memory-mapped or formed as they are read: ``name`` as the checkpoints hold it."""
        self.loads += len(self.checkpoints)
        return [checkpoint.flat(name) for checkpoint in self.checkpoints]

    @cached_property
    def _transform(self) -> Transform:
        """The operator's work on the stored tensors; what it must know of all of them is found at first use."""
        return self.operator.transform(self._pieces)

    @cached_property
    def _pieces(self) -> Pieces:
        """The stored tensors as operators stream them, the same for all settings."""
        return Pieces(self.layout, self._stored)

    @cached_property
    def _geometry(self) -> GramTable:
        """Inner products of the J models, by tensor."""
        each = [[(j, 1.0)] for j in range(len(self.checkpoints))]
        return gram_table(self.layout, self.stretch, each, torch.get_num_threads(), 0)

    def _views(self, buffer: Tensor) -> dict[str, Tensor]:
        """By tensor name, views of a (..., n) buffer."""
        borders, lead = self.layout.tensor_borders.tolist(), buffer.shape[:-1]
        return {
            name: buffer[..., borders[i] : borders[i + 1]].view((*lead, *shape))
            for i, (name, shape) in enumerate(zip(self.layout.tensors, self.layout.shapes, strict=True))
        }

    def _targets(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        twins = {kept: alias for alias, kept in self.layout.aliases.items() if alias in tensors}
        found = []
        for name, shape in zip(self.layout.tensors, self.layout.shapes, strict=True):
            target = tensors.get(name, tensors.get(twins.get(name, name)))
            if target is None:
                raise InputError(
                    f"out: expected a tensor {name!r}, found none among {len(tensors)} names.",
                    "Does the architecture's state dict have the names of the checkpoints?",
                )
            if tuple(target.shape) != shape:
                raise InputError(f"out: tensor {name!r} should have shape {shape}, found {tuple(target.shape)}.")
            found.append(target.detach())
        return found

    @cached_property
    def _matrix(self) -> Stretch | None:
        """J vectors (n,) in the type they are summed in, of models small enough to keep, or None."""
        if not self._row_bytes:
            return None
        kind = torch.float64 if torch.float64 in self.layout.dtypes else torch.float32
        rows = list(torch.empty(len(self.checkpoints), self.layout.size, dtype=kind))
        for name, start in zip(self.layout.tensors, self.layout.tensor_borders[:-1].tolist(), strict=True):
            stretch = self.stretch(name)
            for low in range(0, stretch.size, SPAN):
                for row, piece in zip(rows, stretch[low : low + SPAN].tensors(), strict=True):
                    row[start + low : start + low + piece.numel()] = piece
        return Stretch(rows)

    def _vectors(self) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        moves = directions(self.operator, len(self.operator.columns(self.names)))
        columns = [np.array(vectors_of(self.read(name), moves), np.float32) for name in self.layout.tensors]
        return np.concatenate(columns, axis=1)


def _expert(path: str | Path, base: Checkpoint | None) -> Checkpoint | Adapter:
    place = located(path)
    if not is_adapter(place):
        return Checkpoint.open(place)
    if base is None:
        raise InputError(f"base: the expert {str(path)!r} is a LoRA adapter and needs the model it was trained on.")
    return Adapter.open(place, base)


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with -2, -3, ... added to those seen before."""
    seen: Counter[str] = Counter()
    distinct: list[str] = []
    for name in names:
        candidate = name
        while candidate in distinct:
            seen[name] += 1
            candidate = f"{name}-{seen[name] + 1}"
        distinct.append(candidate)
    return distinct


def _numbered(device: torch.device) -> torch.device:
    """The device as tensors name it: a CUDA device with its number."""
    unnumbered = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if unnumbered else device


def _holder(model: Model, name: str) -> Model:
    """The model that has a tensor of its own: an adapter's is often its base."""
    if isinstance(model, Resized) and name not in model.sizes:
        return _holder(model.model, name)
    if isinstance(model, Adapter) and name not in model.factors and name not in model.whole:
        return model.base
    return model


def _power_of_two(count: int) -> int:
    """What torch takes of page-locked memory for ``count`` bytes."""
    return 1 << max(0, count - 1).bit_length()
