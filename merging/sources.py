"""The models of a merge, opened together. Each worker holds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ecotone.merging import operators
from ecotone.merging.adapter_groups import Changed
from ecotone.merging.adapters import check_rank, merged_adapter
from ecotone.merging.held import CPU, Held, as_rows
from ecotone.merging.inner_products import gram_table, vectors_of
from ecotone.merging.kernel.lazy import fill
from ecotone.merging.kernel.materialise import SMALL, Mixture, Stretch, Transform, mix
from ecotone.merging.memory import TUNED, Memory
from ecotone.merging.models import configs, formats, matching, preflight, tokenizers
from ecotone.merging.models.files import Files
from ecotone.merging.models.layout import Layout
from ecotone.merging.models.matching import MERGED, NONE_APART, Apart, Treatment
from ecotone.merging.models.model import Model, declared
from ecotone.merging.models.vocabulary import Vocabulary, fitted
from ecotone.merging.operators.base import Operator, directions, weights_of
from ecotone.merging.operators.stack import Stack, preparing
from ecotone.merging.placement import Wish
from ecotone.merging.values import has_nan, refuse_nan
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.populations.gram import GramTable
from ecotone.populations.space import Space

_OF_SETTINGS = ("_transform", "_matrix", "_geometry")  # what is found out for an operator's settings


class Sources:
    """The checkpoints of a merge, memory-mapped, with the operator that gives genomes their meaning.

    Use ``Sources.open``. What of them is kept in memory is a matter of their placement
    (``ecotone.merging.placement``): as the checkpoints hold them, adapters formed. Models that are small are kept as
    they are mixed, too, unless they are to be mapped: as a row of float32 each.

    Args:
        layout: The flat vector that the models share.
        operator: The merge operator.
        experts: K models.
        base: The base model, if there is one. Operators that need no base take from it only integer buffers and,
            on export, the configuration and tokenizer.
        placement: The place where they are kept; no bit of a merge depends on it.
        config: The model whose config a merge has (``ecotone.merging.models.configs``).
        rank: The rank that the modules' updates of every merge of adapters are cut to; None for merges as they are.
        apart: The tensors that are not merged.
        basis: The vectors that are mixed in place of the experts, where the operator prepares them; until they are
            prepared nothing can be merged.
    """

    def __init__(
        self,
        layout: Layout,
        operator: Operator,
        experts: Sequence[Model],
        base: Model | None = None,
        placement: Wish = "auto",
        config: configs.Choice = "same",
        rank: int | None = None,
        apart: Apart = NONE_APART,
        basis: Sequence[Model] = (),
    ) -> None:
        self.layout = layout
        self.operator = operator
        self.experts: tuple[Model, ...] = tuple(declared(expert) for expert in experts)
        self.base: Model | None = None if base is None else declared(base)
        self.config: configs.Choice = config
        """The choice of the config that merges have."""
        self.basis: tuple[Model, ...] = tuple(declared(vector) for vector in basis)
        self.rank = rank
        if rank is not None:
            check_rank(operator, self.changed)
        columns = len(operator.columns(self.names))
        self.memory: Memory = Memory(layout, self.checkpoints, columns, operator.changes, placement == "mapped")
        """The memory that merging takes."""
        self.held: Held = Held(self.checkpoints, self.memory, placement)
        """The tensors that are kept in memory, and on which device."""
        self.apart = apart
        self._tuned: dict[Operator, Sources] = {}  # the latest comes last

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
        treatment: Treatment = MERGED,
        config: configs.Choice = "same",
        rank: int | None = None,
        basis: Sequence[Model] = (),
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
            placement: The place where the models are kept (``ecotone.merging.placement``).
            treatment: The tensors that are not merged.
            config: What to do with models whose configs compute something else: refuse them (``same``), or take that
                of the ``base``, of the ``first`` expert, or of ``each`` (``ecotone.merging.models.configs``).
            rank: The rank that the modules' updates of every merge of adapters are cut to.
            basis: The vectors that the operator has prepared (``ecotone.merging.basis``).

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
        root = None if base is None else formats.opened_whole(base)
        opened = [formats.opened(path, root) for path in experts]
        labels = _distinct([expert.name for expert in opened]) if names is None else list(names)
        operation.columns(labels)
        named = [expert.named(label) for expert, label in zip(opened, labels, strict=True)]
        models = matching.renamed(([root] if root else []) + named)
        models = matching.split(fitted(models, root, vocabulary))
        alike, origin = models[-len(named) :], models[0] if root else None
        apart = matching.apart(models, treatment, alike[0] if config == "first" else models[0])
        layout = preflight.check(models, apart)
        configs.check(models, origin, config)
        return cls(layout, operation, alike, origin, placement, config, rank, apart, basis)

    @property
    def names(self) -> tuple[str, ...]:
        """K names of the experts."""
        return tuple(expert.name for expert in self.experts)

    @property
    def checkpoints(self) -> tuple[Model, ...]:
        """The J models that are mixed: the experts, or what was prepared of them, after the base when the operator
        needs it.
        """
        mixed = self.basis or self.experts
        if isinstance(self.operator, Stack):
            mixed = self.operator.mixed(self.experts, self.basis)
        if self.operator.needs_base and self.base is not None:
            return (self.base, *mixed)
        return mixed

    @property
    def origin(self) -> Model:
        """The model that buffers come from: the base, or else the first expert."""
        return self.base or self.experts[0]

    @property
    def models(self) -> tuple[Model, ...]:
        """The base, if there is one, and the experts."""
        return self.experts if self.base is None else (self.base, *self.experts)

    def files(self, tokenizer: Path | None = None) -> Files:
        """The files that they are read from.

        Args:
            tokenizer: The folder of the tokenizer that objectives read; None where they read none.
        """
        base = {} if self.base is None else {"models.base": self.base}
        experts = {f"models.experts[{number}]": expert for number, expert in enumerate(self.experts)}
        basis = {f"merge.operator: {vector.name}": vector for vector in self.basis}
        return Files({**base, **experts, **basis}, tokenizer)

    @property
    def configured(self) -> Model:
        """The model whose config merges have."""
        return self.experts[0] if self.config == "first" else self.origin

    @cached_property
    def own_configs(self) -> Mapping[int, Model]:
        """By number, the experts that are computed with a config of their own when they are alone."""
        if self.config != "each":
            return {}
        whose = self.configured
        return {
            number: expert
            for number, expert in enumerate(self.experts)
            if expert is not whose and any(one.matters for one in configs.compare([whose, expert]))
        }

    def configured_for(self, genome: Genome) -> Model:
        """The model whose config a merge has: an expert that is alone in it has its own where ``each`` is to."""
        alone = self.alone(genome) if self.own_configs else None
        return self.configured if alone is None else self.own_configs.get(alone, self.configured)

    def alone(self, genome: Genome) -> int | None:
        """The number of the expert that a genome is: the reference merge of that expert, or its weights alone."""
        if genome.residual is not None:
            return None
        operator, count = operators.tuned(self.operator, genome.parameters), len(self.experts)
        for number, seed in enumerate(operator.seeds(count)):
            if bool((genome.coefficients == seed).all()):
                return number
        if operator.changes or operator.geometry is not None:
            return None
        weights = self.mixture(genome).weights
        (numbers,) = np.nonzero(weights[0])
        one_hot = len(numbers) == 1 and bool((weights == (np.arange(weights.shape[1]) == numbers[0])).all())
        number = int(numbers[0]) - (weights.shape[1] - count) if one_hot else -1  # the base comes before the experts
        return number if number >= 0 else None

    @cached_property
    def changed(self) -> Changed:
        """What the experts change, where all of them are adapters.

        Raises:
            InputError: They are not, or their changes do not go together.
        """
        return Changed(self.experts, self.layout.kept)

    @cached_property
    def tokenizer(self) -> Path:
        """The folder of every merge's tokenizer: the origin's, or that of the first model with a tokenizer."""
        places = [model.tokenizer for model in self.models]
        return next((place for place in places if tokenizers.has_tokenizer(place)), self.origin.files)

    @property
    def large(self) -> bool:
        """Whether a merge is long enough for compiled loops to pay."""
        return len(self.checkpoints) * self.layout.size > SMALL

    def stretch(self, name: str) -> Stretch:
        """The tensor ``name`` in every model that is mixed. The operator works on a piece when that piece is used."""
        return Stretch(self.held.read(name), self._transform, self.layout.span(name)[0])

    def near(self, name: str, device: torch.device) -> Stretch:
        """``stretch(name)`` from the place of the sources for merges on ``device``. Keeps the sources there."""
        start, stop = self.layout.span(name)
        in_rows = device.type == "cpu" and self.memory.formed and self.held.placed(device) != "mapped"
        if in_rows and self._matrix is not None:
            return self._matrix[start:stop]
        return Stretch(self.held.near(name, device), self._transform, start)

    def read(self, name: str) -> list[Tensor]:
        """J flat tensors: ``name`` in every model that is mixed, memory-mapped where nothing is changed or formed."""
        return self.stretch(name).tensors()

    def buffers(self) -> dict[str, Tensor]:
        """The tensors that are not merged, by name: the base's, or those of the first expert that has them."""
        return {name: self.giver(name).tensor(name) for name in self.layout.buffers}

    def check_kept(self) -> None:
        """Refuse NaN among the floating-point tensors that are not merged.

        Raises:
            InputError: There is some.
        """
        kept = ((self.giver(name), name) for name in sorted(self.layout.kept))
        refuse_nan(list(dict.fromkeys(model.name for model, name in kept if has_nan(model, name))))

    def giver(self, name: str) -> Model:
        """The model that a tensor which is not merged is taken from: the base, or the first expert that has it."""
        return next(model for model in self.models if name in model.tensors)

    def space(self, dense: bool = False) -> Space:
        """The search's view of the models: layout and inner products. Streams the weights once for the Gram table.

        Args:
            dense: Also give the (K, n) sources themselves, for evolving small models from scratch.
        """
        self.check_kept()
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
            others=tuple(self.layout.buffers),
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
            for name in _OF_SETTINGS:
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
        targets = [self.layout.found_in(tensors) for tensors in out]
        if self.rank is not None:
            for genome, tensors in zip(genomes, targets, strict=True):
                self._fill_cut(self.cut(genome), tensors)
            return
        for tuned, members in self._groups(genomes):
            tuned._fill([mixtures[i] for i in members], [targets[i] for i in members])

    def _groups(self, genomes: Sequence[Genome]) -> Iterator[tuple[Sources, list[int]]]:
        """For each group of genomes with the same operator settings, the sources that they mix and their indices."""
        groups: dict[Operator, list[int]] = {}
        for index, genome in enumerate(genomes):
            groups.setdefault(operators.tuned(self.operator, genome.parameters), []).append(index)
        for members in groups.values():
            yield self.tuned(genomes[members[0]]), members

    def cut(self, genome: Genome) -> Model:
        """A merge whose updates are cut to ``rank``: the base and the adapter that an export of it is.

        Raises:
            InputError: The merge is no adapter.
        """
        assert self.base is not None
        return merged_adapter(self, genome, self.rank).on(self.base)

    def _fill_cut(self, model: Model, targets: Sequence[Tensor]) -> None:
        """Write a model into tensors in the order of the layout."""
        with torch.no_grad():
            for name, target in zip(self.layout.tensors, targets, strict=True):
                fill(target, model.flat(name))

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
            device: The device of the result.

        Returns:
            By tensor name, (B, *shape) views of one new (B, n) buffer.

        Raises:
            InputError: A genome does not fit.
        """
        mixtures = [self.mixture(genome) for genome in genomes]
        here = CPU if self.memory.row_bytes else torch.device(device)
        buffer = torch.empty(len(mixtures), self.layout.size, dtype=dtype or self.layout.dtype, device=here)
        for tuned, members in self._groups(genomes):
            rows = [buffer[i] for i in members]
            if tuned._matrix is not None and self.rank is None:
                mix(tuned._matrix, 0, [mixtures[i] for i in members], rows, self.large)
            else:
                self.materialise([genomes[i] for i in members], [self.layout.views(row) for row in rows])
        return self.layout.views(buffer.to(device))

    @cached_property
    def _transform(self) -> Transform:
        """The operator's transform of the stored tensors. It is made at first use, which may stream all tensors."""
        if preparing(self.operator) and not self.basis:
            raise InputError(f"operator {self.operator.name!r}: expected the vectors that it prepares, found none.")
        return self.operator.transform(self.held.pieces)

    @cached_property
    def _matrix(self) -> Stretch | None:
        """J vectors (n,) in the type they are summed in, of models small enough to keep, or None."""
        return as_rows(self.layout, len(self.checkpoints), self.stretch) if self.memory.row_bytes else None

    @cached_property
    def _geometry(self) -> GramTable:
        """Inner products of the J models, by tensor."""
        each = [[(j, 1.0)] for j in range(len(self.checkpoints))]
        return gram_table(self.layout, self.stretch, each, torch.get_num_threads(), 0)

    def _vectors(self) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        moves = directions(self.operator, len(self.operator.columns(self.names)))
        columns = [np.array(vectors_of(self.read(name), moves), np.float32) for name in self.layout.tensors]
        return np.concatenate(columns, axis=1)


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, made distinct: -2, -3, ... is added to a name that was seen before."""
    seen: Counter[str] = Counter()
    distinct: list[str] = []
    for name in names:
        candidate = name
        while candidate in distinct:
            seen[name] += 1
            candidate = f"{name}-{seen[name] + 1}"
        distinct.append(candidate)
    return distinct
