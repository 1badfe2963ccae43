"""The flat parameter vector: which tensors it holds, in which order, and the blocks they form.

The order is part of the meaning of a genome, so it is fixed: floating-point tensors in the natural order of
their names (runs of digits compare as numbers, so ``layers.2`` comes before ``layers.10``), each tensor flattened
in row-major order. It does not depend on the order in a file or on how the model was sharded. Tied weights appear
once; integer, bool, complex and empty tensors are buffers: they are not merged but copied from the base (or from
the first expert). Floating-point buffers (running means of batch normalisation) are merged like parameters. A recipe
may have others copied, too (``ecotone.merging.models.matching``).
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from ecotone.merging.models import refused, ties
from ecotone.merging.models.model import Model, TensorInfo
from ecotone.populations.errors import CheckpointError, InputError
from ecotone.populations.genome import Integers

OUTPUT_BIASES = ("lm_head.bias", "embed_out.bias", "cls.predictions.bias", "cls.predictions.decoder.bias")


@dataclass(frozen=True)
class Layout:
    """The layout of the flat vector of n parameters. Use ``Layout.of``.

    Args:
        parameters: By name in flat order, the shape of each tensor and its type in the model that the layout is of.
        buffers: By name, integer, bool, complex and empty tensors, and those of ``kept``, which are copied and not
            merged.
        aliases: By name, the tensor that takes the place of a tied one.
        kept: Names of floating-point tensors that are copied, as the recipe or the module asks for it.
    """

    parameters: Mapping[str, TensorInfo]
    buffers: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]
    kept: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        checkpoint: Model,
        kept: Mapping[str, TensorInfo] = MappingProxyType({}),
        dropped: Container[str] = (),
    ) -> Layout:
        """The layout of a checkpoint, from its headers (and, of tied tensors that it stores twice, the bytes).

        Args:
            checkpoint: The model.
            kept: Tensors that are copied and not merged, by name; the model may lack some.
            dropped: Names of tensors that are left out.

        Raises:
            CheckpointError: The weights are quantised, or of one process of several, or there is nothing to merge.
        """
        refused.check(checkpoint)
        aliases = aliases_of(checkpoint)
        parameters: dict[str, TensorInfo] = {}
        buffers: dict[str, TensorInfo] = {}
        infos = {**checkpoint.tensors, **kept}
        for name in sorted(infos, key=natural):
            info = infos[name]
            if name not in aliases and name not in dropped:
                merged = info.dtype.is_floating_point and info.size and name not in kept
                (parameters if merged else buffers)[name] = info
        if not parameters:
            raise CheckpointError(f"{checkpoint.path}: expected floating-point tensors to merge, found none.")
        floats = (name for name, info in kept.items() if info.dtype.is_floating_point and info.size)
        return cls(parameters, buffers, aliases, frozenset(floats))

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """T names in flat order."""
        return tuple(self.parameters)

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """T shapes in flat order."""
        return tuple(info.shape for info in self.parameters.values())

    @cached_property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """T types in flat order."""
        return tuple(info.dtype for info in self.parameters.values())

    @cached_property
    def tensor_borders(self) -> Integers:
        """(T+1,) where each tensor begins, then n."""
        return np.cumsum([0] + [info.size for info in self.parameters.values()], dtype=np.int64)

    @cached_property
    def _spans(self) -> dict[str, tuple[int, int]]:
        return dict(zip(self.tensors, pairwise(self.tensor_borders.tolist()), strict=True))

    def span(self, name: str) -> tuple[int, int]:
        """The begin and the end of a tensor in the flat vector."""
        return self._spans[name]

    @cached_property
    def _block_starts(self) -> tuple[tuple[str, int], ...]:
        starts: list[tuple[str, int]] = []
        for index, name in enumerate(self.tensors):
            block = block_of(name)
            if not starts or starts[-1][0] != block:
                starts.append((block, index))
        return tuple(starts)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """B names of the runs of consecutive tensors of one layer, in flat order."""
        return tuple(name for name, _ in self._block_starts)

    @cached_property
    def block_borders(self) -> Integers:
        """(B+1,) where each block begins, then n."""
        return np.append(self.tensor_borders[[index for _, index in self._block_starts]], self.tensor_borders[-1])

    @property
    def size(self) -> int:
        """n, the length of the flat vector."""
        return int(self.tensor_borders[-1])

    @property
    def dtype(self) -> torch.dtype:
        """The one type of all tensors, or float32 when they differ."""
        return self.dtypes[0] if len(set(self.dtypes)) == 1 else torch.float32

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """By tensor name, views of a (..., n) buffer."""
        borders, lead = self.tensor_borders.tolist(), buffer.shape[:-1]
        return {
            name: buffer[..., borders[i] : borders[i + 1]].view((*lead, *shape))
            for i, (name, shape) in enumerate(zip(self.tensors, self.shapes, strict=True))
        }

    def found_in(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The T tensors in flat order, of a mapping that may name tied ones by another name.

        Raises:
            InputError: One is missing or of another shape.
        """
        twins = {kept: alias for alias, kept in self.aliases.items() if alias in tensors}
        flat = []
        for name, shape in zip(self.tensors, self.shapes, strict=True):
            target = tensors.get(name, tensors.get(twins.get(name, name)))
            if target is None:
                raise InputError(
                    f"out: expected a tensor {name!r}, found none among {len(tensors)} names.",
                    "Does the architecture's state dict have the names of the checkpoints?",
                )
            if tuple(target.shape) != shape:
                raise InputError(f"out: tensor {name!r} should have shape {shape}, found {tuple(target.shape)}.")
            flat.append(target.detach())
        return flat


def natural(name: str) -> tuple[tuple[str, int], ...]:
    """The sort key of natural order: text compares as text, runs of digits as numbers."""
    parts = re.split(r"([0-9]+)", name)
    return tuple((text, int(digits)) for text, digits in zip(parts[::2], [*parts[1::2], "-1"], strict=True))


def block_of(name: str) -> str:
    """The block of a tensor: its name up to the first number (``model.layers.3``), else its first two components.

    The last component (``weight``) never counts, so ``lm_head.weight`` is in ``lm_head``.
    """
    components = name.split(".")
    for index, component in enumerate(components):
        if component.isdigit():
            return ".".join(components[: index + 1])
    return ".".join(components[: max(1, min(2, len(components) - 1))])


def aliases_of(checkpoint: Model) -> dict[str, str]:
    """Tied tensors by the name left out: the output embedding, and names that ``safetensors.save_model`` drops."""
    stored = checkpoint.tensors
    dropped = {alias: kept for alias, kept in checkpoint.metadata.items() if alias not in stored and kept in stored}
    return dropped | {
        name: kept
        for name, kept in ties.tied_matrices(checkpoint).items()
        if name in stored and stored[name] == stored[kept] and ties.equal(checkpoint, name, kept)
    }


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has a row for each token: the embeddings, and the output's weights and bias."""
    return name.endswith((*ties.INPUT_EMBEDDINGS, *ties.OUTPUT_EMBEDDINGS, *OUTPUT_BIASES))


def token_axis(name: str, models: Sequence[Model]) -> int | None:
    """The axis in which a tensor of models differs since it has an entry for each token; None if it is not so.

    It is the only axis that differs, and in each model as long as its vocabulary. Where no config says how long that
    is, the axis is the first of the tensors that ``is_vocabulary`` knows by name.

    Args:
        name: The tensor's name.
        models: Models that have it.
    """
    shapes = [model.tensors[name].shape for model in models]
    if len({len(shape) for shape in shapes}) != 1:
        return None
    differing = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    if len(differing) != 1:
        return None
    (axis,) = differing
    known = axis == 0 and is_vocabulary(name)
    exact = all(shape[axis] == token_count(model) for shape, model in zip(shapes, models, strict=True))
    return axis if known or exact else None


def has_token_rows(model: Model, name: str) -> bool:
    """Whether a tensor of a model has as many rows as the model has tokens, or is known by name to have them."""
    return is_vocabulary(name) or model.tensors[name].shape[:1] == (token_count(model),)


def token_count(model: Model) -> int | None:
    """The length of a model's vocabulary: the rows that it is given, or the ``vocab_size`` of its config."""
    if model.rows is not None:
        return model.rows
    config = model.config or {}
    text = config.get("text_config")
    size = (text if isinstance(text, Mapping) and "vocab_size" in text else config).get("vocab_size")
    return size if isinstance(size, int) else None
