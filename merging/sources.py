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

from merging import operators, preflight, tokenizers
from merging.checkpoint import Checkpoint, Model, is_adapter, located
from merging.gram import gram_table, vectors_of
from merging.layout import Layout
from merging.lazy import Source
from merging.lora import Adapter
from merging.materialise import SMALL, Mixture, Stretch, Transform, mix, unchanged
from merging.operators.base import Operator, directions, weights_of
from merging.operators.task_vectors import Pieces
from merging.vocabulary import Resized, Vocabulary, fitted
from populations.errors import InputError
from populations.genome import Genome
from populations.gram import GramTable
from populations.space import Space

DEVICE_SHARE = 0.25  # of a CUDA device's free memory: sources that fit in it stay on the device
RESIDENT_BYTES = 256 * 2**20  # what is mixed is kept in memory where it fits in this and reading it takes work
TUNED = 2  # settings of genomes' own for which what is mixed is kept


class Sources:
    """The checkpoints of a merge, memory-mapped, with the operator that gives genomes their meaning.

    Use ``Sources.open``. Nothing is kept in memory except, for models small enough, what is mixed: LoRA adapters are
    formed as they are read.

    Args:
        layout: The flat vector that the models share.
        operator: The merge operator.
        experts: K models.
        base: The base model, if there is one. Operators that need no base take from it only integer buffers and,
            on export, the configuration and tokenizer.
    """

    def __init__(self, layout: Layout, operator: Operator, experts: Sequence[Model], base: Model | None = None) -> None:
        self.layout = layout
        self.operator = operator
        self.experts = tuple(experts)
        self.base = base
        self._kept: dict[torch.device, dict[str, Stretch] | None] = {}
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
                base's, or take the ``union`` (``merging.vocabulary``).

        Raises:
            InputError: No expert, no such operator or setting, a base is lacking, or the names do not fit.
            CheckpointError: A model cannot be read, or two of them differ.
        """
        chosen = operators.get(operator, settings or {})
        if not experts:
            raise InputError("experts: expected at least one model, found none.")
        if chosen.needs_base and base is None:
            raise InputError(f"base: the operator {operator!r} needs the model the experts were fine-tuned from.")
        if names is not None and (len(names) != len(experts) or len(set(names)) != len(names)):
            raise InputError(f"names: expected {len(experts)} distinct names, found {list(names)}.")
        root = None if base is None else Checkpoint.open(base)
        opened = [_expert(path, root) for path in experts]
        labels = _distinct([expert.name for expert in opened]) if names is None else list(names)
        chosen.columns(labels)
        named: list[Model] = [replace(expert, name=label) for expert, label in zip(opened, labels, strict=True)]
        models = fitted(([root] if root else []) + named, root, vocabulary)
        layout = preflight.check(models)
        return cls(layout, chosen, models[-len(named) :], models[0] if root else None)

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
        """``stretch(name)``, kept as it is mixed where that saves work and takes little memory.

        That is on a CUDA device, when all sources take a small part of its free memory, and in main memory when the
        models are small and the operator changes the experts or some of them are formed as they are read.
        """
        if device not in self._kept:
            self._kept[device] = {} if self._may_keep(device) else None
        kept = self._kept[device]
        if kept is None:
            return self.stretch(name)
        if name not in kept:
            here = self.stretch(name)
            there = Stretch([tensor.to(device) for tensor in here.stored], here.transform, here.start)
            kept[name] = Stretch(there.tensors(), start=here.start)
        return kept[name]

    def _may_keep(self, device: torch.device) -> bool:
        needed = sum(info.nbytes for checkpoint in self.checkpoints for info in checkpoint.tensors.values())
        if device.type == "cuda":
            return needed <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
        mapped = all(isinstance(checkpoint, Checkpoint) for checkpoint in self.checkpoints)
        return not (mapped and self._transform is unchanged) and needed <= RESIDENT_BYTES

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
            other.operator, other._kept, other._tuned = operator, {}, {}
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
        buffer = torch.empty(len(mixtures), self.layout.size, dtype=dtype or self.layout.dtype)
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
        """J float32 vectors (n,) of a model small enough to keep, or None."""
        small = len(self.checkpoints) * self.layout.size * 4 <= RESIDENT_BYTES
        if not small or torch.float64 in self.layout.dtypes:
            return None
        columns = [self.read(name) for name in self.layout.tensors]
        return Stretch([torch.cat([c[j].to(torch.float32) for c in columns]) for j in range(len(self.checkpoints))])

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
