"""Models whose vocabularies differ in size, made alike: the rows that each has of its embeddings and outputs.

The tensors are those that differ between the models exactly as their vocabularies do. Their rows are entries along the
axis of tokens, which may be another than the first.

Tokens are told apart by their numbers, so the models' tokenizers must agree on every number that two of them share.

    base    every expert has the base's rows: those it has added are left out
    union   every model has the rows of the largest. A row that a model lacks is the base's; where the base lacks it,
            too, it is the mean of the experts that have it

So with ``union`` a model that never saw a token says nothing about it: its task vector is zero there, and a row that
one expert alone has added is that expert's in every merge whose coefficients sum to one (task arithmetic: in every
merge).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ecotone.merging.kernel.lazy import Source, formed
from ecotone.merging.kernel.materialise import accumulator
from ecotone.merging.models import tokenizers
from ecotone.merging.models.layout import is_vocabulary, token_axis, token_count
from ecotone.merging.models.model import Model, TensorInfo, Wrapper
from ecotone.merging.models.ties import INPUT_EMBEDDINGS
from ecotone.populations.errors import CheckpointError, InputError

Vocabulary: TypeAlias = Literal["same", "base", "union"]


def fitted(models: Sequence[Model], base: Model | None, vocabulary: Vocabulary) -> list[Model]:
    """The models with vocabularies of one size.

    Args:
        models: All models of a merge, the base among them.
        base: The base, if there is one.
        vocabulary: ``same`` leaves them as they are; else what to do with rows that some of them lack.

    Raises:
        InputError: ``base`` without a base.
        CheckpointError: An expert has fewer rows than the base it is cut to, or two tokenizers give one number to
            different tokens (or one token two numbers).
    """
    if vocabulary == "same":
        return list(models)
    if vocabulary == "base" and base is None:
        raise InputError("vocabulary: 'base' needs a base model, found none.", "Use 'union', or give the base.")
    axes = _axes(models)
    if not axes:
        return list(models)
    check_numbers(models, None if base is None or vocabulary == "union" else _stop(base, axes))
    if vocabulary == "union" or base is None:
        lengths = [_lengths(model, axes) for model in models]
        sizes = {name: max(each[name] for each in lengths if name in each) for name in axes}
        experts = tuple(model for model in models if model is not base)
        return [Resized(model, sizes, base, experts, axes) for model in models]
    sizes = _lengths(base, axes)
    for model in models:
        for name, rows in _lengths(model, axes).items():
            if rows < sizes.get(name, 0):
                raise CheckpointError(
                    f"{model.path}: {name!r} has {rows} rows and the base's has {sizes[name]}.",
                    "vocabulary: 'base' leaves rows out and adds none; use 'union'.",
                )
    return [model if model is base else Resized(model, sizes, axes=axes) for model in models]


def input_rows(model: Model) -> int | None:
    """Rows of a model's input embedding, by its tensors, or else the ``vocab_size`` of its config; None if unknown."""
    rows = [info.shape[0] for name, info in model.tensors.items() if info.shape and name.endswith(INPUT_EMBEDDINGS)]
    if rows:
        return max(rows)
    return token_count(model)


def _axes(models: Sequence[Model]) -> dict[str, int]:
    """By name, the axis of tokens of the tensors in which models differ, and differ in nothing else."""
    names = dict.fromkeys(name for model in models for name in model.tensors)
    axes = {name: token_axis(name, [model for model in models if name in model.tensors]) for name in names}
    return {name: axis for name, axis in axes.items() if axis is not None}


def _lengths(model: Model, axes: Mapping[str, int]) -> dict[str, int]:
    return {name: model.tensors[name].shape[axis] for name, axis in axes.items() if name in model.tensors}


def _stop(base: Model, axes: Mapping[str, int]) -> int | None:
    """The number of tokens that are compared where all models are cut to the base's."""
    named = [info.shape[0] for name, info in base.tensors.items() if info.shape and is_vocabulary(name)]
    return max([*named, *_lengths(base, axes).values()], default=None)


def check_numbers(models: Sequence[Model], stop: int | None = None) -> None:
    """Refuse models whose tokenizers disagree on the meaning of a token's number. Models without tokenizers pass.

    Args:
        models: Two or more.
        stop: Only numbers below it count.

    Raises:
        CheckpointError: Two tokenizers give one number to different tokens, or one token two numbers.
    """
    tokens: dict[int, tuple[str, Model]] = {}
    numbers: dict[str, tuple[int, Model]] = {}
    for model in models:
        for number, token in (tokenizers.vocabulary(model.tokenizer) or {}).items():
            if stop is not None and number >= stop:
                continue
            said, by = tokens.setdefault(number, (token, model))
            place, giver = numbers.setdefault(token, (number, model))
            if said != token:
                clash = f"token {number} is {said!r} in {_label(by)} and {token!r} in {_label(model)}"
            elif place != number:
                clash = f"the token {token!r} has number {place} in {_label(giver)} and {number} in {_label(model)}"
            else:
                continue
            raise CheckpointError(
                f"vocabulary: the tokenizers disagree: {clash}.",
                "Rows of embeddings can be matched only where they agree; retrain with one tokenizer.",
            )


def _label(model: Model) -> str:
    return f"{model.name!r} ({model.path})"


@dataclass(frozen=True)
class Resized(Wrapper):
    """A model with other numbers of rows in its embeddings and outputs.

    Args:
        model: The model.
        sizes: The number of rows that each tensor is to have, by name.
        base: The model whose rows replace missing rows.
        experts: The models whose mean replaces rows that the base lacks, too.
        axes: By name, the axis along which the rows lie; the first where it is not named.
    """

    sizes: Mapping[str, int]
    base: Model | None = None
    experts: tuple[Model, ...] = ()
    axes: Mapping[str, int] = field(default_factory=dict)

    @property
    def change(self) -> str:
        """How many rows it has."""
        return f"embeddings of {max(self.sizes.values())} rows"

    @property
    def rows(self) -> int | None:
        """Rows of its input embedding, if their number is another."""
        of_inputs = (rows for name, rows in self.sizes.items() if name.endswith(INPUT_EMBEDDINGS))
        by_shape = (rows for name, rows in self.sizes.items() if not is_vocabulary(name))
        return next(of_inputs, next(by_shape, self.model.rows))

    @property
    def tokenizer(self) -> Path:
        """The model's own; where vocabularies are united, the one of all models that has the most tokens."""
        places = [model.tokenizer for model in (self.base, *self.experts) if model is not None]
        return max(places, key=lambda place: len(tokenizers.vocabulary(place) or ()), default=self.model.tokenizer)

    @cached_property
    def config(self) -> Mapping[str, Any] | None:
        """The model's ``config.json`` with the number of tokens that its embeddings have now."""
        config = self.model.config
        rows = self.rows
        if config is None or rows is None:
            return config
        text = config.get("text_config")
        if isinstance(text, dict) and "vocab_size" in text:
            config = {**config, "text_config": {**text, "vocab_size": rows}}
        return {**config, "vocab_size": rows} if "vocab_size" in config else config

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """By name, the shape and the model's own type of every tensor; lacking rows may be read in a wider one."""
        infos = dict(self.model.tensors)
        for name, rows in self.sizes.items():
            if name in infos:
                shape, axis = infos[name].shape, self._axis(name)
                infos[name] = replace(infos[name], shape=(*shape[:axis], rows, *shape[axis + 1 :]))
        return infos

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name``, whole."""
        if name not in self.sizes:
            return self.model.tensor(name)
        return formed(self.flat(name)).view(self.tensors[name].shape)

    def flat(self, name: str) -> Source:
        """The tensor ``name``, flat. Rows that it lacks are read from other models, a piece at a time."""
        own = self.model.flat(name)
        if name not in self.sizes:
            return own
        shape, axis = self.model.tensors[name].shape, self._axis(name)
        width, rows, count = prod(shape[axis + 1 :]), self.sizes[name], shape[axis]
        borders = self._borders(name, count, rows)
        parts: list[Source] = []
        for outer in range(prod(shape[:axis])):  # 1 where the rows lie along the first axis
            start = outer * count * width
            parts.append(own[start : start + min(count, rows) * width])
            parts += [self._lacking(name, low, high, outer, width) for low, high in pairwise(borders)]
        return parts[0] if len(parts) == 1 else Joined(tuple(parts))

    def holder(self, name: str) -> Model:
        """Itself where the tensor has other rows; else the model, or one in it."""
        return self if name in self.sizes else self.model.holder(name)

    def working_bytes(self, name: str) -> int:
        """Bytes that reading takes in the model, and in the models that lend it rows."""
        read = {id(self.model): self.model}
        if name in self.sizes and self._count(self.model, name) < self.sizes[name]:
            read |= {id(other): other for other in self._lenders(name)}
        return sum(model.working_bytes(name) for model in read.values())

    def mergekit_reference(self) -> str:
        """Refused.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"{self.path}: mergekit has its own ways to make vocabularies alike, found one that was resized."
        )

    def _axis(self, name: str) -> int:
        return self.axes.get(name, 0)

    def _count(self, model: Model, name: str) -> int:
        return model.tensors[name].shape[self._axis(name)]

    def _lenders(self, name: str) -> list[Model]:
        return [other for other in (self.base, *self.experts) if other and name in other.tensors]

    def _borders(self, name: str, count: int, rows: int) -> list[int]:
        """The numbers of lacking rows at which other models begin to lend them; none where no row lacks."""
        if count >= rows:
            return []
        others = [self._count(other, name) for other in self._lenders(name)]
        return sorted({count, rows, *(other for other in others if count < other < rows)})

    def _lacking(self, name: str, low: int, high: int, outer: int, width: int) -> Source:
        """Rows low to high, which this model has not, as others have them."""
        having = [model for model in self._lenders(name) if self._count(model, name) >= high]
        starts = [outer * self._count(model, name) for model in having]
        parts = tuple(
            model.flat(name)[(start + low) * width : (start + high) * width]
            for model, start in zip(having, starts, strict=True)
        )
        return parts[0] if len(parts) == 1 or having[0] is self.base else Mean(parts)


@dataclass(frozen=True, eq=False)
class Joined:
    """Flat tensors one after the other.

    Args:
        parts: On one device; those of other types than the rest are widened.
    """

    parts: tuple[Source, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The parts' type, or the one in which all of them are exact."""
        return _common(self.parts)

    @property
    def device(self) -> torch.device:
        """The device of the parts."""
        return self.parts[0].device

    def numel(self) -> int:
        """The sum of the parts' lengths."""
        return sum(part.numel() for part in self.parts)

    def __getitem__(self, part: slice) -> Source:
        low, high, _ = part.indices(self.numel())
        found: list[Source] = []
        start = 0
        for piece in self.parts:
            first, last = max(low - start, 0), min(high - start, piece.numel())
            if first < last:
                found.append(piece[first:last])
            start += piece.numel()
        return Joined(tuple(found)) if found else torch.empty(0, dtype=self.dtype, device=self.device)

    def to(self, device: torch.device) -> Joined:
        """The same on another device."""
        return Joined(tuple(part.to(device) for part in self.parts))

    def formed(self) -> Tensor:
        """The elements."""
        return torch.cat([formed(part).to(self.dtype) for part in self.parts])


@dataclass(frozen=True, eq=False)
class Mean:
    """The mean of flat tensors, taken in float32 (float64 where one of them is) in their order.

    Args:
        parts: Tensors of one length, on one device.
    """

    parts: tuple[Source, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The type in which it is taken."""
        return accumulator(self.parts)

    @property
    def device(self) -> torch.device:
        """The device of the parts."""
        return self.parts[0].device

    def numel(self) -> int:
        """Length of each part."""
        return self.parts[0].numel()

    def __getitem__(self, part: slice) -> Mean:
        return Mean(tuple(each[part] for each in self.parts))

    def to(self, device: torch.device) -> Mean:
        """The same on another device."""
        return Mean(tuple(part.to(device) for part in self.parts))

    def formed(self) -> Tensor:
        """The elements."""
        total = formed(self.parts[0]).to(self.dtype, copy=True)
        for part in self.parts[1:]:
            total += formed(part)
        return total.div_(len(self.parts))


def _common(sources: Sequence[Source]) -> torch.dtype:
    types = {source.dtype for source in sources}
    return types.pop() if len(types) == 1 else accumulator(sources)
