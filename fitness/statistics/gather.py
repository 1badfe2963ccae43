"""Statistics for the trials that want them. The worker reads them from the cache, or else gathers them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn
from xxhash import xxh3_128

from ecotone.fitness.backends.base import Backend
from ecotone.fitness.data import Examples
from ecotone.fitness.heads import Head
from ecotone.fitness.statistics.cache import Cache, digest_of
from ecotone.fitness.statistics.kinds import Data, chosen
from ecotone.merging.kernel.lazy import SPAN, formed
from ecotone.merging.models.model import Model
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.populations.trial import Evaluation, Statistics


class NotFiniteError(InputError):
    """Statistics hold NaN or infinity."""


class Gatherer:
    """Gathers statistics of merges, or finds them in the cache.

    Args:
        sources: The models that genomes mix.
        backend: Shows merges.
        architecture: Tells architectures of the same tensors apart: its text is part of the keys.
        data: Returns a calibration task's data by its name.
        cache: The cache of statistics; None is this machine's.
    """

    def __init__(
        self,
        sources: Sources,
        backend: Backend,
        architecture: object,
        data: Callable[[str], Data],
        cache: Cache | None = None,
    ) -> None:
        self._sources = sources
        self._backend = backend
        self._architecture = architecture
        self._data = data
        self._cache = Cache() if cache is None else cache

    def evaluate(self, genome: Genome, wants: Statistics) -> Evaluation:
        """The statistics of the merge of ``genome``; ``details`` say in which file they lie, and if they lay there.

        Raises:
            InputError: There is no such kind or task, a setting does not fit, or the cache cannot be written.
            NotFiniteError: The statistics hold NaN or infinity. The model still shows the merge.
        """
        kind, settings = chosen(wants)
        tasks = [_cut(self._data(name), settings.examples) for name in wants.tasks]
        key = self.key(genome, wants, tasks)
        statistics = self._cache.find(key)
        details: dict[str, str | int | float] = {
            "file": str(self._cache.file(key)),
            "cached": int(statistics is not None),
        }
        if statistics is not None:
            return Evaluation({}, details=details, statistics=statistics)
        model = next(self._backend.show([genome]))
        if not isinstance(model, nn.Module):
            raise InputError("expected a torch module to observe, found a dict of tensors.", "Name an architecture.")
        tensors = kind(settings).gather(model, tasks)
        _check(tensors)
        about = {"kind": wants.kind, "genome": genome.digest, "tasks": json.dumps(wants.tasks)}
        statistics = self._cache.write(key, tensors, about)
        return Evaluation({}, items=sum(len(task.examples) for task in tasks), details=details, statistics=statistics)

    def key(self, genome: Genome, wants: Statistics, tasks: Sequence[Data]) -> str:
        """All that the statistics depend on, as 32 hexadecimal digits, the same in every process."""
        kind, settings = chosen(wants)
        parts = {
            "genome": genome.digest,
            "models": self._models,
            "kind": [wants.kind, kind.version],
            "settings": settings.model_dump(mode="json"),
            "tasks": [[digest_of_examples(task.examples), digest_of_head(task.head)] for task in tasks],
        }
        configured = self._sources.configured_for(genome)
        if configured is not self._sources.configured:
            parts["config"] = _config_of(configured)
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    @cached_property
    def _models(self) -> list[str]:
        """The models' weights, and the functions that make a merge of them and a module of the merge."""
        sources = self._sources
        module = [str(self._architecture), _config_of(sources.configured)]
        merge = [repr(sources.operator), str(self._backend.dtype), digest_of(sources.buffers())]
        return [*module, *merge, *(_digest_of_model(model, sources.layout.tensors) for model in sources.checkpoints)]


def _config_of(model: Model) -> str:
    return json.dumps(model.config, sort_keys=True, default=str)


def _cut(data: Data, count: int | None) -> Data:
    """The first ``count`` examples; None takes all."""
    if count is None or count >= len(data.examples):
        return data
    return replace(data, examples=data.examples.rows(torch.arange(count)))


def _check(tensors: Mapping[str, Tensor]) -> None:
    if not tensors:
        raise InputError("expected a model with linear layers, found none that the data reach.")
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NotFiniteError(f"layer {name!r}: expected finite statistics, found NaN or infinity")


def _digest_of_model(model: Model, names: Sequence[str]) -> str:
    """A hash of a model's weights as they are read, formed a piece at a time."""
    hasher = xxh3_128()
    for name in names:
        flat = model.flat(name)
        hasher.update(f"{name} {flat.dtype} {flat.numel()}\n".encode())
        for low in range(0, flat.numel(), SPAN):
            hasher.update(formed(flat[low : low + SPAN]).cpu().contiguous().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def digest_of_examples(examples: Examples) -> str:
    """A hash of the inputs of examples."""
    inputs = examples.inputs
    return digest_of(inputs if isinstance(inputs, Mapping) else {"": inputs})


def digest_of_head(head: Head | None) -> str:
    """A hash of a head's weights, or the name of a head without."""
    if head is None:
        return ""
    function = head.function
    if isinstance(function, nn.Module):
        return f"{type(function).__qualname__} {digest_of(function.state_dict())}"
    return f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', type(function).__qualname__)}"
