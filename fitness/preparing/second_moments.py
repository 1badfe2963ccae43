"""Second moments of gradients, from files that the user kept of each expert's optimiser."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ecotone.merging.models.checkpoint import Checkpoint
from ecotone.merging.operators.whole import WholeMatrices
from ecotone.merging.sources import Sources
from ecotone.populations.contents import contents
from ecotone.populations.errors import InputError, nearest

FIELD = "merge.second_moments"


class SecondMoments:
    """Adam's ``exp_avg_sq`` of each expert: a safetensors file each, with the names and shapes of the models' tensors.

    A tensor that was not trained may be missing: its second moments are 0. Only headers are read at first.

    Args:
        sources: The models.
        operator: An operator with a setting ``second_moments``: paths by the experts' names.

    Raises:
        InputError: The names are not those of the experts, or a file has tensors of other names or shapes.
        CheckpointError: A file cannot be read.
    """

    def __init__(self, sources: Sources, operator: WholeMatrices) -> None:
        paths: dict[str, Any] = dict(getattr(operator, "second_moments", {}))
        self._sources = sources
        for name in sources.names:
            if name not in paths:
                raise InputError(
                    f"{FIELD}: expected a file for each expert, found none for {name!r}.",
                    f"Give {name}: PATH, a safetensors file of Adam's exp_avg_sq. fisher estimates the like from data.",
                )
        for name in paths:
            if name not in sources.names:
                raise InputError(
                    f"{FIELD}: expected names of experts, found {name!r}.", nearest(name, list(sources.names))
                )
        self._files = tuple(Checkpoint.open(paths[name]) for name in sources.names)
        for file in self._files:
            self._check(file)

    @cached_property
    def digests(self) -> list[str]:
        """K hashes of the files' bytes."""
        found = contents([shard.path for file in self._files for shard in file.shards])
        return ["+".join(found[shard.path].digest for shard in file.shards) for file in self._files]

    def of(self, name: str) -> list[Tensor]:
        """K tensors, one for each expert, in the files' types.

        Raises:
            InputError: A file lacks a tensor that its expert was trained on, or has negative or infinite numbers.
        """
        assert self._sources.base is not None
        base, found = self._sources.base.tensor(name), []
        for file, expert in zip(self._files, self._sources.experts, strict=True):
            if name not in file.tensors:
                if not torch.equal(expert.tensor(name), base):
                    raise InputError(
                        f"{FIELD}: {file.path}: {name}: expected second moments, as {expert.name} was trained on it, "
                        "found none.",
                        nearest(name, tuple(file.tensors)),
                    )
                found.append(torch.zeros(()).expand(base.shape))
                continue
            moments = file.tensor(name)
            if not bool((moments >= 0).all()) or not bool(torch.isfinite(moments).all()):
                raise InputError(
                    f"{FIELD}: {file.path}: {name}: expected finite numbers of at least 0, found others.",
                    "Save exp_avg_sq, not exp_avg.",
                )
            found.append(moments)
        return found

    def _check(self, file: Checkpoint) -> None:
        known = self._sources.layout.parameters
        if not file.tensors.keys() & known.keys():
            raise InputError(
                f"{FIELD}: {file.path}: expected tensors named as the models', such as {next(iter(known))}, found "
                f"{', '.join(sorted(file.tensors)[:3]) or 'none'}.",
                "Name them as the model's checkpoint does.",
            )
        for name, info in file.tensors.items():
            if name in known and tuple(info.shape) != tuple(known[name].shape):
                raise InputError(
                    f"{FIELD}: {file.path}: {name}: expected the shape {list(known[name].shape)}, found "
                    f"{list(info.shape)}."
                )
